import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from linic.app.cli import COMMANDS, common, is_here, main

HEAVY = ["numpy", "torch", "PIL", "scipy", "matplotlib", "constriction"]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("code", [
    "import linic",
    "from linic.app.cli import main; main([])",
    "from linic.app.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "from linic.app.cli import main; main(['--version'])",
    "from linic.app.cli import main\ntry: main(['encode', '--help'])\nexcept SystemExit: pass",
])
def test_help_loads_nothing_heavy(code):
    started = time.perf_counter()
    done = run_python(f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert time.perf_counter() - started < 5  # 0.06 s on an idle machine; loose, for a loaded one


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS if is_here(name))


@pytest.mark.parametrize("command", [name for name in COMMANDS if is_here(name)])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: linic {command}" in capsys.readouterr().out


def test_no_command_is_wrong_usage(capsys):
    assert main([]) == 2
    assert "usage: linic" in capsys.readouterr().err


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "linic", "encode", str(tmp_path / "gone.png")],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"linic: {tmp_path / 'gone.png'}: no such file or directory\n"


def test_qualities_are_a_list_or_even_steps():
    assert common.qualities("0,25,50") == [0, 25, 50]
    assert common.qualities("0,10,...,100") == list(range(0, 101, 10))
    assert common.qualities("30") == [30]
    for wrong in ["", "0,...,100", "0,10,...,5", "0,101", "10,0,...,100"]:
        with pytest.raises(Exception, match=r"whole number|even steps|go up"):
            common.qualities(wrong)


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b", "c"):
        Image.effect_noise((48, 32), 60).convert("RGB").save(pictures / f"{name}.png")
    return pictures


@pytest.mark.usefixtures("stand_in")
def test_eval_writes_table_json_and_plot(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    assert main(["eval", str(folder), "-q", "10,50", "--limit", "2", "--anchors", "kodak", "--json", str(out["json"]),
                 "--markdown", str(out["md"]), "--plot", str(out["png"])]) == 0
    result = json.loads(out["json"].read_text())
    assert result["results"]["quality"] == [10, 50] and len(result["per_image"]) == 4
    assert str(tmp_path) not in result["command"]
    assert "VTM-9.1" in out["md"].read_text()
    assert Image.open(out["png"]).format == "PNG"
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("stand_in")
def test_eval_prints_the_report_where_nothing_else_is_asked(folder, capsys):
    assert main(["eval", str(folder), "-q", "10"]) == 0
    assert "| quality | bpp |" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
def test_eval_measures_the_classical_codecs_on_the_same_pictures(folder, tmp_path, capsys):
    assert main(["eval", str(folder), "-q", "10,50", "--anchors", "measured", "--json", str(tmp_path / "out.json"),
                 "--markdown", "-"]) == 0
    assert "| jpeg420 |" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["anchors"]["jpeg420"]["psnr"]) == 8 and "--anchors measured" in result["command"]


def test_eval_of_an_empty_folder_and_of_unknown_anchors_is_wrong_usage(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert main(["eval", str(tmp_path), "--anchors", "kodac"]) == 2
    assert "no pictures" in capsys.readouterr().err


MODEL = {"name": "tiny", "parameters": 3_900_000, "bytes": 7_800_000, "path": "tiny.safetensors", "licence": "MIT"}


@pytest.fixture
def models(monkeypatch):
    from linic import weights
    found = [MODEL, {"name": "bad", "bytes": 1, "path": "bad.safetensors", "error": "bad.safetensors: not a model"}]
    monkeypatch.setattr(weights, "available", lambda: found)


@pytest.mark.usefixtures("models")
def test_models_are_listed_and_a_broken_one_is_said(capsys):
    assert main(["models"]) == 0
    listed = capsys.readouterr()
    assert "3.90 M parameters" in listed.out and "licence" not in listed.out
    assert listed.err == "linic: bad.safetensors: not a model\n"
    assert main(["models", "--verbose"]) == 0
    assert "licence: MIT" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == MODEL


@pytest.mark.usefixtures("stand_in", "models")
def test_doctor_reports_every_part_and_survives_a_broken_one(monkeypatch, capsys):
    from linic.app.cli import doctor
    monkeypatch.setattr(doctor, "backends", lambda: {"biwkv": ["torch"]})
    monkeypatch.setattr(doctor, "exact", lambda model: {"numpy": "equal"})      # really: test_cli_exact.py
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "biwkv" in text and "all good" in text and "numpy" in text

    def broken():
        raise ImportError("no such library")
    monkeypatch.setattr(doctor, "backends", broken)
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert "no such library" in facts["backends"]["error"] and "PSNR" in facts["round trip"]


def test_the_kernels_bench_is_wired(monkeypatch, capsys):
    import types

    import linic.bench
    fake = types.SimpleNamespace(run=lambda threads, repeats, device: [{"threads": threads, "repeats": repeats}],
                                 table=lambda rows: f"table of {rows[0]['repeats']}")
    monkeypatch.setitem(sys.modules, "linic.bench.kernels", fake)
    monkeypatch.setattr(linic.bench, "kernels", fake, raising=False)
    assert main(["bench", "kernels", "--repeats", "3"]) == 0
    assert capsys.readouterr().out == "table of 3\n"
    assert main(["bench", "kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"threads": 1, "repeats": 7}]


@pytest.fixture
def fake_export(monkeypatch):
    calls = []

    def export(source, out, **options):
        calls.append((source, options))
        with open(out, "wb") as file:
            file.write(b"12345")
        return {"name": "tiny", "parameters": 3_900_000, "digest": "ab" * 8}

    from linic.train import export as room
    monkeypatch.setattr(room, "export", export)
    return calls


def test_export_makes_a_weight_file_and_never_overwrites_one_unasked(fake_export, tmp_path, capsys):
    command = ["export", "runs/a", "-o", str(tmp_path / "tiny.safetensors"), "--about", "data=some=pictures"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'tiny.safetensors'}  5 bytes  tiny  3.90 M parameters")
    assert fake_export == [("runs/a", {"measure": None, "about": {"data": "some=pictures"}, "int8": True,
                                         "adversarial": None})]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 5


def test_train_hands_its_arguments_to_the_training_room(tmp_path, capsys):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text("[nothing]\n")
    assert main(["train", str(recipe), "--data", str(tmp_path), "--budget", "90"]) == 2
    assert "write 90s, 60m or 1.5h" in capsys.readouterr().err
    assert main(["train", str(recipe), "--data", str(tmp_path), "--budget", "90s", "--out", str(tmp_path)]) == 2
    assert "wrong.toml" in capsys.readouterr().err
