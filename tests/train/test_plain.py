import json

import pytest
import torch
from train_helpers import ROOT

from linic.app.cli import main
from linic.errors import UsageError
from linic.kernels import native
from linic.models import blocks, build
from linic.train import plain
from linic.train.loss import rate_distortion
from linic.train.recipe import Loss


def test_the_plain_model_is_the_same_function_with_the_same_gradients():
    torch.manual_seed(0)
    model = build("lalic-xs")
    with torch.no_grad():
        for p in model.parameters():            # what starts silent must be heard
            p.add_(0.02 * torch.randn_like(p))
    other = build("lalic-xs")
    other.load_state_dict(model.state_dict())
    plain.plain(other)
    assert not any(isinstance(m, blocks.OmniShift) for m in other.modules())
    x, quality, rows = torch.rand(2, 3, 64, 64), torch.tensor([20.0, 80.0]), []
    for each, inside in ((model, False), (other, True)):
        torch.manual_seed(1)
        if inside:
            with plain.plain_kernels():
                terms = rate_distortion(each.train()(x, quality), x, quality, Loss(0.35))
        else:
            terms = rate_distortion(each.train()(x, quality), x, quality, Loss(0.35))
        terms.loss.mean().backward()
        gradients = [p.grad for n, p in each.named_parameters() if ".kvr." in n or "g_a.stages.0.resample" in n]
        rows.append((terms.loss.detach(), torch.cat([g.flatten() for g in gradients])))
    assert torch.allclose(rows[0][0], rows[1][0], rtol=1e-3)
    assert (rows[0][1] - rows[1][1]).norm() < 0.02 * rows[0][1].norm()


def test_the_comparison_reports_both_and_their_ratio(pictures, capsys):
    command = ["bench", "train", "--recipe", str(ROOT / "recipes" / "lalic-xs.toml"), "--data", str(pictures),
               "--set", "phases.0.crop=64", "--set", "phases.0.batch=2", "--repeats", "2", "--seconds", "1",
               "--workers", "1", "--threads", "1"]
    before = blocks.biwkv, native.lib
    assert main([*command, "--json"]) == 0
    assert before == (blocks.biwkv, native.lib)
    got = json.loads(capsys.readouterr().out)
    assert (got["preset"], got["crop"], got["batch"], got["threads"]) == ("lalic-xs", 64, 2, 1)
    assert len(got["engine_rounds"]) == len(got["plain_rounds"]) == 2 and min(got["plain_rounds"]) > 0
    ratios = [e / p for e, p in zip(got["engine_rounds"], got["plain_rounds"])]
    assert got["ratio"] == pytest.approx(sum(ratios) / 2)
    assert "ratio" in plain.table(plain.Comparison(**got))


def test_a_comparison_without_pictures_of_the_size_is_refused(pictures):
    with pytest.raises(UsageError, match="no picture there is as large as a crop of 512 pixels"):
        plain.Pictures(pictures, 512)
    assert main(["bench", "train"]) == 2
