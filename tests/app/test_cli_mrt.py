"""The doors for extreme files, with an untrained model behind them."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mrt_files
from linic import container, weights
from linic.app.cli import main
from linic.errors import UsageError
from linic.models import preset
from linic.train import checkpoint
from linic.train.export import export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mrt-xs.safetensors"
    mrt_files.save(path, mrt_files.made(mrt_files.TINY), "mrt-xs")
    return path


@pytest.fixture
def installed(model, monkeypatch):
    monkeypatch.setenv("LINIC_MODELS", str(model.parent))
    monkeypatch.setitem(container.FROZEN, 17, weights.read_card(model)["digest"])


@pytest.fixture
def picture(tmp_path):
    y, x = np.mgrid[0:96, 0:128]
    smooth = np.stack([128 + 60 * np.sin(x / 19), 128 + 60 * np.cos(y / 17), 100 + (x + y) / 4], axis=-1)
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.usefixtures("installed")
def test_an_extreme_file_goes_there_and_back_and_says_what_it_is(picture, tmp_path, capsys):
    assert main(["encode", str(picture), "--extreme", "-q", "70"]) == 0
    line = capsys.readouterr().out
    size = (tmp_path / "a.linic").stat().st_size
    assert f"{size} bytes" in line and "q 70  mrt-xs" in line
    assert main(["info", str(tmp_path / "a.linic")]) == 0
    told = capsys.readouterr().out
    assert "generative reconstruction" in told and "must not be used as evidence" in told
    assert main(["info", str(tmp_path / "a.linic"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["symbols"] == 3 * 4 * 6
    files = []
    for realism in ("0", "0.5", "1"):
        out = tmp_path / "b.png"
        assert main(["decode", str(tmp_path / "a.linic"), str(out), "--force", "--realism", realism]) == 0
        assert capsys.readouterr().err == f"linic: {out}: {container.NOTE}\n"
        files.append(out.read_bytes())
    assert len(set(files)) == 3
    back = Image.open(tmp_path / "b.png")
    assert back.size == (128, 96) and back.info["Comment"] == container.NOTE
    assert main(["decode", str(tmp_path / "a.linic"), str(tmp_path / "c.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == container.NOTE
    assert (tmp_path / "c.png").read_bytes() == files[2]


@pytest.mark.usefixtures("installed")
def test_a_target_is_met_or_refused_with_what_is_possible(picture, tmp_path, capsys):
    assert main(["encode", str(picture), "--bpp", "0.04", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "mrt-xs" and facts["bpp"] <= 0.04
    assert facts["bytes"] == (tmp_path / "a.linic").stat().st_size
    assert main(["encode", str(picture), "--size", "2000", "--force", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "lalic-xs" and facts["bytes"] <= 2000
    assert main(["encode", str(picture), "--size", "9", "--force"]) == 2
    assert "mrt-xs needs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["encode", str(picture), "--size", "9", "-q", "3"])
    with pytest.raises(SystemExit):
        main(["encode", str(picture), "--bpp", "-1"])
    assert "bits per pixel above 0" in capsys.readouterr().err


def test_realism_of_a_faithful_file_and_extreme_with_a_model_are_wrong_usage(picture, tmp_path, capsys):
    assert main(["encode", str(picture)]) == 0
    assert main(["decode", str(tmp_path / "a.linic"), str(tmp_path / "b.png"), "--realism", "0"]) == 2
    assert "realism" in capsys.readouterr().err
    assert main(["encode", str(picture), "--force", "--extreme", "--model", "lalic-xs"]) == 2
    assert "chooses the model" in capsys.readouterr().err


def test_a_model_that_has_no_code_is_named_where_it_is_installed(picture, model, monkeypatch, capsys):
    monkeypatch.setenv("LINIC_MODELS", str(model.parent))
    assert main(["encode", str(picture), "--extreme"]) == 0
    assert "q 50  mrt-xs" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_show_prints_the_steps_program(model, capsys):
    assert main(["models", "show", "mrt-xs"]) == 0
    text = capsys.readouterr().out
    assert "order(" in text and "causal(" in text and "code(" in text
    assert len(text.splitlines()) == len(weights.load_program(model)[0].ops) + 1
    assert main(["models"]) == 0 and "mrt-xs" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_the_doctor_looks_at_the_extreme_model_too(monkeypatch, capsys):
    from linic.app.cli import doctor
    monkeypatch.setattr(doctor, "backends", dict)
    monkeypatch.setattr(doctor, "ENOUGH_EXTREME_DB", 5.0)       # it has learnt nothing
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["exact mrt-xs"]["numpy"] == facts["exact mrt-xs"]["cpu i64"] == "equal"
    assert facts["round trip mrt-xs"]["model"] == "mrt-xs" and facts["round trip"]["model"] == "lalic-xs"
    assert main(["doctor", "--model", "mrt-xs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]["numpy"] == "equal"


# Export. The preset's name leads to the tiny configuration.


@pytest.fixture
def runs(tmp_path, monkeypatch):
    from linic import models
    monkeypatch.setattr(models, "preset", lambda name: mrt_files.TINY if name == "tiny-mrt" else preset(name))
    first = mrt_files.made(mrt_files.TINY)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    second = {**state, **mrt_files.critic(first), "rate_control": torch.ones(6)}
    for name, tensors in (("first", state), ("second", second)):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "raw.safetensors", tensors, {"preset": "tiny-mrt", "weights": "raw"})
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((70, 70), 60).convert("RGB").resize((140, 100)).save(tmp_path / "pictures" / "a.png")
    return tmp_path


def test_a_run_becomes_a_model_with_two_decoders_measured_on_whole_files(runs, capsys):
    out = runs / "tiny.safetensors"
    assert main(["export", str(runs / "first"), "-o", str(out), "--adversarial", str(runs / "second"),
                 "--measure", str(runs / "pictures"), "--about", "data=noise"]) == 0
    card = weights.read_card(out)
    assert card["decoders"] == ["faithful", "adversarial"] and card["data"] == "noise" and len(card["history"]) == 2
    measured = card["measured"]
    assert len(measured["bpp"]) == len(measured["bpp_payload"]) == 3 and measured["bpp"][0] > measured["bpp_payload"][0]
    tensors = load_file(out)
    assert tensors["int.rcm.blocks.0.kr.weight"].dtype == torch.int8          # calibrated
    kept = checkpoint.load(runs / "second" / "raw.safetensors")[0]["gain_dec"]
    assert torch.allclose(tensors["adversarial.gain_dec"].float(), kept, atol=1e-2)


def test_a_second_decoder_whose_stream_moved_is_refused(runs):
    path = runs / "second" / "raw.safetensors"
    tensors, about = checkpoint.load(path)
    tensors["rcm.mean.weight"] = tensors["rcm.mean.weight"] + 0.01
    checkpoint.save(path, tensors, about)
    with pytest.raises(UsageError, match=r"rcm\.mean\.weight differs"):
        export(runs / "first", runs / "x.safetensors", adversarial=runs / "second")
    assert not (runs / "x.safetensors").exists()
