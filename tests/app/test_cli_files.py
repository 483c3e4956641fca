import io
import json
import sys

import pytest
from PIL import Image

import linic
from linic.app.cli import main
from linic.errors import LatentsMismatch

pytestmark = pytest.mark.usefixtures("stand_in")


class Pipe:
    """Stands for stdin or stdout: text, with the bytes below in `buffer`."""

    def __init__(self, data=b""):
        self.buffer = io.BytesIO(data)

    def isatty(self):
        return False


def test_a_picture_goes_to_a_file_and_back(photo, tmp_path, capsys):
    assert main(["encode", str(photo), "-q", "70"]) == 0
    assert main(["decode", str(tmp_path / "photo.linic"), str(tmp_path / "back.png")]) == 0
    assert Image.open(tmp_path / "back.png").tobytes() == Image.open(photo).tobytes()
    first, second = capsys.readouterr().out.splitlines()
    size = (tmp_path / "photo.linic").stat().st_size
    assert first.startswith(f"{tmp_path / 'photo.linic'}  {size} bytes  {8 * size / (48 * 32):.3f} bpp  q 70")
    assert second.startswith(f"{tmp_path / 'back.png'}  48x32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.png", "photo.linic", "photo.png"]


@pytest.mark.parametrize("output", [["{}/x.linic"], ["-o", "{}/x.linic"]])
def test_the_output_is_named_with_or_without_o(photo, tmp_path, output):
    assert main(["encode", str(photo), *(o.format(tmp_path) for o in output)]) == 0
    assert (tmp_path / "x.linic").exists()


def test_two_outputs_are_one_too_many(photo, capsys):
    assert main(["encode", str(photo), "a", "-o", "b"]) == 2
    assert "two outputs" in capsys.readouterr().err


def test_an_existing_output_is_refused_before_any_work_and_overwritten_with_force(photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "photo.linic").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(linic, "encode", lambda *a, **k: pytest.fail("worked in vain"))
        assert main(["encode", str(photo)]) == 2
    assert capsys.readouterr().err == f"linic: {tmp_path / 'photo.linic'}: exists already; --force overwrites it\n"
    assert (tmp_path / "photo.linic").read_bytes() == b"old"
    assert main(["encode", str(photo), "--force"]) == 0
    assert (tmp_path / "photo.linic").read_bytes() != b"old"


def test_the_input_is_never_its_own_output(photo, capsys):
    assert main(["encode", str(photo), str(photo), "--force"]) == 2
    assert "same file" in capsys.readouterr().err


def test_a_second_picture_is_no_output_even_with_force(photo, tmp_path, capsys):
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    before = (tmp_path / "b.png").read_bytes()
    assert main(["encode", str(photo), str(tmp_path / "b.png"), "--force"]) == 2
    assert "not a picture" in capsys.readouterr().err and (tmp_path / "b.png").read_bytes() == before


def test_json_is_one_object_on_stdout(photo, tmp_path, capsys):
    assert main(["encode", str(photo), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == (tmp_path / "photo.linic").stat().st_size
    assert (facts["width"], facts["height"], facts["quality"], facts["model"]) == (48, 32, 50, "lalic-xs")
    assert main(["decode", str(tmp_path / "photo.linic"), str(tmp_path / "x.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "RGB"


def test_dashes_stand_for_stdin_and_stdout(photo, monkeypatch, capsys):
    encoded = Pipe()
    monkeypatch.setattr(sys, "stdin", Pipe(photo.read_bytes()))
    monkeypatch.setattr(sys, "stdout", encoded)
    assert main(["encode", "-"]) == 0
    decoded = Pipe()
    monkeypatch.setattr(sys, "stdin", Pipe(encoded.buffer.getvalue()))
    monkeypatch.setattr(sys, "stdout", decoded)
    assert main(["decode", "-", "-"]) == 0
    assert Image.open(io.BytesIO(decoded.buffer.getvalue())).tobytes() == Image.open(photo).tobytes()


def test_stdout_does_not_take_both_the_file_and_json(photo, monkeypatch, capsys):
    assert main(["encode", str(photo), "-", "--json"]) == 2
    assert "both" in capsys.readouterr().err


def test_binary_data_is_not_written_to_a_terminal(photo, monkeypatch, capsys):
    monkeypatch.setattr(Pipe, "isatty", lambda self: True)
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert main(["encode", str(photo), "-"]) == 2
    assert "terminal" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "decode", "info"])
def test_a_missing_input_is_named_once(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == f"linic: {tmp_path / 'gone'}: no such file or directory\n"


def test_a_picture_of_a_refused_mode_names_the_mode(tmp_path, capsys):
    Image.new("CMYK", (4, 4)).save(tmp_path / "a.tif")
    assert main(["encode", str(tmp_path / "a.tif")]) == 2
    assert capsys.readouterr().err.startswith(f"linic: {tmp_path / 'a.tif'}: mode CMYK is not taken")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_a_damaged_file_names_path_and_byte_and_returns_3_without_output(tmp_path, capsys):
    (tmp_path / "bad.linic").write_bytes(b"rubbish")
    assert main(["decode", str(tmp_path / "bad.linic")]) == 3
    assert capsys.readouterr().err == f"linic: {tmp_path / 'bad.linic'}: byte 0: no signature\n"
    assert [p.name for p in tmp_path.iterdir()] == ["bad.linic"]


def test_a_picture_over_the_limit_returns_3(photo, tmp_path):
    main(["encode", str(photo)])
    assert main(["decode", str(tmp_path / "photo.linic"), str(tmp_path / "x.png"), "--max-pixels", "100"]) == 3


def test_a_missing_model_returns_4(photo, capsys):
    assert main(["encode", str(photo), "--model", "huge"]) == 4
    assert capsys.readouterr().err.startswith(f"linic: {photo}: no model 'huge'")


def test_other_latents_return_5_and_a_keyboard_interrupt_130(photo, monkeypatch, capsys):
    def raising(error):
        def encode(*args, **kwargs):
            raise error
        return encode
    monkeypatch.setattr(linic, "encode", raising(LatentsMismatch(9, "other latents")))
    assert main(["encode", str(photo)]) == 5
    monkeypatch.setattr(linic, "encode", raising(KeyboardInterrupt()))
    assert main(["encode", str(photo)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_traceback_is_there_for_who_asks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LINIC_TRACEBACK", "1")
    main(["info", str(tmp_path / "gone")])
    assert "Traceback" in capsys.readouterr().err


def test_metadata_the_format_cannot_carry_is_said_on_stderr(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", icc_profile=b"profile")
    main(["encode", str(tmp_path / "a.png")])
    assert main(["decode", str(tmp_path / "a.linic"), str(tmp_path / "b.bmp")]) == 0
    assert "bmp does not carry icc_profile" in capsys.readouterr().err
    assert main(["decode", str(tmp_path / "a.linic"), str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "b.png").info["icc_profile"] == b"profile"


def test_an_unknown_suffix_is_refused_before_decoding(tmp_path, capsys):
    assert main(["decode", str(tmp_path / "gone.linic"), str(tmp_path / "x.xyz")]) == 2
    assert "unknown suffix '.xyz'" in capsys.readouterr().err


def test_info_prints_what_the_file_says(photo, tmp_path, capsys):
    main(["encode", str(photo)])
    capsys.readouterr()
    assert main(["info", str(tmp_path / "photo.linic")]) == 0
    assert "width    48\n" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "photo.linic"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["height"] == 32


@pytest.mark.parametrize("wrong", [["encode"], ["encode", "a", "-q", "101"], ["encode", "a", "-q", "ten"], ["unknown"],
                                   ["encode", "a", "--threads", "0"], ["decode", "a", "--max-pixels", "-1"]])
def test_wrong_usage_exits_with_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(wrong)
    assert stop.value.code == 2
    assert "usage: linic" in capsys.readouterr().err


def test_a_damaged_picture_is_bad_input(tmp_path, capsys):
    for content in (b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)):
        (tmp_path / "a.png").write_bytes(content)
        assert main(["encode", str(tmp_path / "a.png")]) == 3
        assert "a.png" in capsys.readouterr().err
