import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

from linic.train import checkpoint, parts

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "lease.py"
spec = importlib.util.spec_from_file_location("lease", SCRIPT)
assert spec and spec.loader
lease = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lease)


@pytest.fixture
def work(tmp_path):
    for name in ("data", "run"):
        (tmp_path / "work" / name).mkdir(parents=True)
    return tmp_path / "work"


@pytest.fixture
def recipe(tmp_path):
    """The small model, with the schedule of a lease."""
    text = (ROOT / "recipes" / "lalic-xs.toml").read_text()
    path = tmp_path / "xs.toml"
    path.write_text(text.replace('shape = "cosine"', 'shape = "linear"\ndecay = 0.3'))
    return path


def test_the_rehearsal_runs_every_command_of_a_lease_in_the_tree_that_travels(recipe):
    done = subprocess.run([sys.executable, SCRIPT, "rehearse", "--recipe", recipe, "--limit", "200"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    said = done.stdout
    for line in ("strangers are blocked: yes", "steps and weights: yes", "the later shard: yes", "the end: yes",
                 "a trunk from before the decay: yes", "bit for bit: yes", "what comes back fits: yes", "all well"):
        assert line in said
    assert "raw (no trunk yet)" in said and "ladder: eager" in said


def test_a_rehearsal_of_a_broken_recipe_fails(recipe):
    recipe.write_text(recipe.read_text().replace("lalic-xs", "lalic-xxs"))
    done = subprocess.run([sys.executable, SCRIPT, "rehearse", "--recipe", recipe], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no preset 'lalic-xxs'" in done.stderr and "the dry run failed: nothing was started" in done.stderr


def test_the_blocker_hides_strangers_and_leaves_what_the_five_need(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(lease.BLOCKER)
    code = ("import importlib.util as u; print([bool(u.find_spec(n)) for n in "
            "('pytest', 'constriction', 'scipy', 'torch', 'PIL', 'numpy', 'safetensors', 'typing_extensions')])")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([False] * 3 + [True] * 5)


def test_shards_arrive_whole_and_once(work, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    with pytest.raises(lease.Refused, match=r"no \.tar there"):
        lease.add(SimpleNamespace(work=work, data_from=tmp_path / "more"))
    (tmp_path / "more" / "a.tar").write_bytes(b"tar")
    for _ in range(2):
        assert lease.main(["add", "--work", str(work), "--data-from", str(tmp_path / "more")]) == 0
    assert [p.name for p in (work / "data").iterdir()] == ["a.tar"]
    assert (work / "data" / "a.tar").stat().st_mtime < time.time() - 30     # the library need not wait
    assert "is there already" in capsys.readouterr().out


def test_the_end_can_be_set_at_any_time(work, capsys):
    assert lease.main(["end", "--work", str(work), "--in", "90"]) == 0
    assert float((work / "end").read_text()) == pytest.approx(time.time() + 90, abs=5)
    assert "end in 90 s; 0.0 % were done" in capsys.readouterr().out


def test_a_poll_brings_log_status_and_the_weights_that_there_are(work, tmp_path, capsys):
    (work / "log").write_text("first\nlast\n")
    (work / "run" / "status.json").write_text(json.dumps(
        {"state": "running", "progress": 0.5, "step": 3, "crops": 6, "pictures": 2, "best": None}))
    ask = ["poll", "--work", str(work), "--out", str(tmp_path / "out")]
    assert lease.main([*ask, "--weights", "ema"]) == 0
    assert "no ema weights yet" in capsys.readouterr().out
    checkpoint.save(work / "run" / "raw.safetensors", {"w": torch.randn(50)}, {"preset": "lalic-xs"})
    assert lease.main([*ask, "--weights", "trunk"]) == 0
    said = capsys.readouterr().out
    assert "raw (no trunk yet)" in said and "over: running, 50.0 %, step 3" in said and "last" in said
    assert sorted(os.listdir(tmp_path / "out")) == ["log", "raw-0.part", "raw.json", "status.json"]
    assert lease.main(["join", str(tmp_path / "out"), "-o", str(tmp_path / "raw.safetensors")]) == 0
    a, b = (checkpoint.load(p / "raw.safetensors")[0]["w"] for p in (work / "run", tmp_path))
    assert torch.equal(a.bfloat16().float(), b)
    (tmp_path / "out" / "raw-0.part").unlink()
    assert lease.main(["join", str(tmp_path / "out"), "-o", str(tmp_path / "raw.safetensors")]) == 1
    assert "raw-0.part: missing" in capsys.readouterr().err


def test_a_run_that_dies_goes_on_from_its_state_more_carefully(work, monkeypatch):
    (work / "end").write_text(str(time.time() + 100))
    asked, codes = [], [-9, 1, 0]

    def run(command, env):
        asked.append(command)
        (work / "run" / "state.safetensors").touch()
        return SimpleNamespace(returncode=codes.pop(0))

    monkeypatch.setattr(lease.subprocess, "run", run)
    args = SimpleNamespace(recipe="r.toml", data=work / "data", work=work, valid=None, measures=None, init="trunk",
                           device="cuda", speed="ladder")
    assert lease.supervise(args) == 0
    assert [c[c.index("--speed") + 1] for c in asked] == ["ladder", "eager", "safe"]
    assert ["--resume" in c for c in asked] == [False, True, True] == ["--init" not in c for c in asked]
    asked.clear()
    codes[:] = [2]
    assert lease.supervise(args) == 2 and len(asked) == 1


def test_a_step_that_dies_is_tried_on_torch_kernels_before_the_start_is_refused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(b"")
    checks, started, codes = [], [], [-11, 0]
    monkeypatch.setattr(lease.subprocess, "run", lambda command, env: (
        checks.append(command), SimpleNamespace(returncode=codes.pop(0)))[1])
    monkeypatch.setattr(lease.subprocess, "Popen", lambda command, **more: (
        started.append((command, more)), SimpleNamespace(pid=2 ** 22 + 1))[1])
    assert lease.main(["start", "--recipe", str(ROOT / "recipes" / "lalic-s.toml"), "--data", str(tmp_path / "data"),
                       "--work", str(tmp_path / "work")]) == 0
    assert ["--torch-kernels" in c for c in checks] == [False, True]
    (command, more), = started
    assert "supervise" in command and more["start_new_session"]
    assert float((tmp_path / "work" / "end").read_text()) == pytest.approx(time.time() + 24 * 60, abs=20)
    assert (tmp_path / "work" / "tree" / "src" / "linic" / "train" / "loop.py").exists()


def test_a_start_without_pictures_or_weights_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    ask = ["start", "--recipe", str(ROOT / "recipes" / "lalic-xs.toml"), "--data", str(tmp_path / "data"), "--work",
           str(tmp_path / "work"), "--device", "cpu"]
    assert lease.main(ask) == 1 and "no shards (.tar) and no pictures" in capsys.readouterr().err
    (tmp_path / "data" / "a.tar").write_bytes(b"")
    assert lease.main([*ask, "--init", str(tmp_path / "trunk")]) == 1
    assert "--init" in capsys.readouterr().err
    checkpoint.save(tmp_path / "trunk.safetensors", {"w": torch.randn(5)}, {"preset": "lalic-xs"})
    parts.split(tmp_path / "trunk.safetensors", tmp_path / "parts")
    assert lease.main([*ask, "--init", str(tmp_path / "parts")]) == 1       # parts are joined, then the dry run fails
    assert "the dry run failed" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "work" / "init.safetensors")[1] == {"preset": "lalic-xs"}


def test_the_commands_of_the_log_are_accepted_and_short():
    """Of each line of docs/training-log.md that calls this script: arguments parse, length is what a call may have."""
    lines = [line.strip() for line in (ROOT / "docs" / "training-log.md").read_text().splitlines()
             if line.startswith("    python") and "scripts/lease.py" in line]
    assert len(lines) >= 5 and all(len(line) < 2000 for line in lines)
    for line in lines:
        for command in line.replace("$((LEFT - 150))", "900").partition("#")[0].split("&&"):
            words = shlex.split(command)
            args = lease._parser().parse_args(words[words.index("scripts/lease.py") + 1:])
            assert callable(args.run)


@pytest.mark.skipif(not features.check("avif"), reason="writes an AVIF")
def test_without_avif_the_check_says_what_to_carry(tmp_path, monkeypatch):
    f = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(f, "avif")
    (tmp_path / "a.avif").write_bytes(f.getvalue())
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "avif" and check(name))
    with pytest.raises(lease.Refused, match=r"cannot read AVIF(.|\n)*--site(.|\n)*pip download"):
        lease.check(SimpleNamespace(recipe=ROOT / "recipes" / "lalic-xs.toml", data=tmp_path, device="cpu", init=None,
                                    measures=None, torch_kernels=False))
