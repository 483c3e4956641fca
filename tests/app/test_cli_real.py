"""The doors with the real codec behind them."""
import numpy as np
import pytest
from PIL import Image

from linic.app.cli import main
from linic.bench.metrics import psnr
from linic.picture import attach, metadata, read, save, to_array

PROFILE = b"a profile " * 40


@pytest.mark.parametrize("mode, size", [("RGB", (97, 65)), ("L", (40, 130)), ("RGB", (1, 1))])
def test_a_picture_of_any_size_comes_back_alike_with_its_metadata(tmp_path, mode, size, capsys):
    y, x = np.mgrid[0:size[1], 0:size[0]]
    smooth = np.stack([128 + 60 * np.sin(x / 9), 128 + 60 * np.cos(y / 7), 100 + (x + y) / 4], axis=-1)
    picture = attach(Image.fromarray(smooth.astype(np.uint8)).convert(mode), {"icc_profile": PROFILE})
    save(picture, tmp_path / "a.png")
    assert main(["encode", str(tmp_path / "a.png"), "-q", "80"]) == 0
    assert main(["decode", str(tmp_path / "a.linic"), str(tmp_path / "b.png")]) == 0
    again = read(tmp_path / "b.png")
    assert (again.mode, again.size, metadata(again)) == (mode, size, {"icc_profile": PROFILE})
    assert psnr(to_array(picture), to_array(again)) > 20


def test_a_file_cut_short_or_altered_returns_3_or_5_and_leaves_nothing(tmp_path, capsys):
    Image.effect_noise((70, 50), 50).convert("RGB").save(tmp_path / "a.png")
    main(["encode", str(tmp_path / "a.png")])
    data = (tmp_path / "a.linic").read_bytes()
    middle = len(data) // 2
    for bad in (data[:middle], data[:-1], data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1:]):
        (tmp_path / "bad.linic").write_bytes(bad)
        assert main(["decode", str(tmp_path / "bad.linic"), str(tmp_path / "b.png")]) in (3, 5)
        assert capsys.readouterr().err.startswith(f"linic: {tmp_path / 'bad.linic'}: byte ")
    assert not (tmp_path / "b.png").exists()


def test_the_doctor_finds_this_installation_good(capsys):
    assert main(["doctor"]) == 0
    assert "all good" in capsys.readouterr().out
