"""A widened model computes what the smaller one does."""
import dataclasses

import pytest
import torch

from linic.errors import UsageError
from linic.models import build, preset
from linic.models.config import from_dict, to_dict
from linic.models.widen import obstacle, smaller, widen
from linic.train import checkpoint


def tiny(name="small", **sizes):
    """A lalic with every size small, and those of `sizes` by dotted key."""
    data = {**to_dict(preset("lalic-xs")), "name": name, "latents": 24, "hyper_latents": 8, "hyper_features": 16}
    data["transform"] = {**data["transform"], "widths": [8, 16, 24], "depths": [1, 1, 1]}
    data["hyper"] = {**data["hyper"], "widths": [16]}
    data["context"] = {**data["context"], "groups": [8, 16], "width": 16}
    for key, value in sizes.items():
        part, _, leaf = key.partition("__")
        if leaf:
            data[part][leaf] = value
        else:
            data[part] = value
    return from_dict(data)


LARGER = {
    "depth": dict(transform__depths=[2, 1, 3], hyper__depths=[2], context__depth=2),
    "hidden": dict(transform__hidden=3, hyper__hidden=4, context__hidden=3),
    "stream": dict(transform__widths=[16, 24, 40], hyper__widths=[24], context__width=24),
    "features": dict(hyper_latents=16, hyper_features=40),
    "latents": dict(latents=48, context__groups=[16, 32]),
}
LARGER["all"] = {k: v for sizes in LARGER.values() for k, v in sizes.items()}


def trained(config):
    """Weights as after training: nothing is zero."""
    model = build(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.05 * torch.randn_like(p)
            if name.endswith("norm.weight"):
                p += torch.rand_like(p)
    model.ln_prior.uniform_(0, 2)
    return model


def pair(**sizes):
    torch.manual_seed(0)
    small, large = trained(tiny()), build(tiny("large", **sizes)).eval()
    widen(small, large)
    return small, large


def results(model, quality=40.0):
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(torch.rand(2, 3, 64, 128), torch.full((2,), quality))
    bits = [-out["likelihoods"][k].log2().sum() for k in "yz"]
    return out["x_hat"], torch.stack(bits)


@pytest.mark.parametrize("what", ["depth", "hidden", "latents"])
@pytest.mark.parametrize("quality", [0.0, 100.0])
def test_more_depth_hidden_units_and_latents_change_nothing(what, quality):
    small, large = pair(**LARGER[what])
    (x, bits), (wider_x, wider_bits) = results(small, quality), results(large, quality)
    assert torch.allclose(x, wider_x, atol=1e-5)
    assert torch.allclose(bits, wider_bits, rtol=1e-4)


def test_more_hyper_latents_and_features_cost_next_to_nothing():
    small, large = pair(**LARGER["features"])
    (x, bits), (wider_x, wider_bits) = results(small), results(large)
    assert torch.allclose(x, wider_x, atol=1e-5)
    assert torch.allclose(bits[0], wider_bits[0], rtol=1e-4)
    assert 0 <= wider_bits[1] - bits[1] < 8 * 2 * 2 * 0.03      # added channels, positions, pictures


def test_a_wider_stream_is_exact_but_for_the_gate_of_the_channel_mix():
    torch.manual_seed(0)
    small, large = trained(tiny()), build(tiny("large", **LARGER["stream"])).eval()
    for name, p in small.named_parameters():
        if name.endswith("channel.out.weight"):
            p.data.zero_()
    widen(small, large)
    x, bits = results(small)
    wider_x, wider_bits = results(large)
    assert torch.allclose(x, wider_x, atol=2e-4)                # LayerNorm's epsilon
    assert torch.allclose(bits, wider_bits, rtol=1e-3)


def test_all_together_start_near_the_smaller_model():
    small, large = pair(**LARGER["all"])
    fresh = build(tiny("large", **LARGER["all"])).eval()
    (x, bits), (wider_x, wider_bits), (fresh_x, _) = results(small), results(large), results(fresh)
    assert (x - wider_x).norm() < 0.05 * (x - fresh_x).norm()
    assert torch.allclose(bits, wider_bits, rtol=0.05)


def test_everything_that_was_added_learns_from_the_second_step_on():
    _, large = pair(**LARGER["all"])
    large.train()
    before = {k: p.detach().clone() for k, p in large.named_parameters()}
    optimiser = torch.optim.AdamW(large.parameters(), 1e-4)
    for _ in range(3):
        torch.manual_seed(2)
        out = large(torch.rand(2, 3, 64, 128), torch.tensor([10.0, 90.0]))
        loss = 1e3 * (out["x_hat"] - 0.3).square().mean()
        loss = loss - sum(p.log2().mean() for p in out["likelihoods"].values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    still = [k for k, p in large.named_parameters() if torch.equal(p, before[k])]
    assert not still
    zero = [k for k, p in large.named_parameters() if p.ndim == 2 and (p == 0).all(1).any()]
    assert not [k for k in zero if not k.startswith("contexts")], zero


@pytest.mark.parametrize("change, message", [
    (dict(transform__widths=[8, 8, 24]), "transform.widths is larger in small"),
    (dict(transform__kernels=[1, 3, 1, 1]), "has convolutions|kernels differs"),
    (dict(latents=16, context__groups=[8, 8]), "context.groups is larger"),
    (dict(latents=32, context__groups=[8, 16, 8]), "another length"),
    (dict(variable_rate=False), "variable_rate differs"),
])
def test_what_cannot_be_widened_is_refused_with_its_reason(change, message):
    small, large = build(tiny()), build(tiny("large", **change))
    with pytest.raises(UsageError, match=message):
        widen(small, large)
    assert not smaller(small.config, large.config)


def test_lalic_s_can_start_from_lalic_xs_by_init_and_says_so():
    assert not obstacle(preset("lalic-xs"), preset("lalic-s"))
    assert not smaller(preset("lalic-xs"), dataclasses.replace(preset("lalic-xs"), name="other"))
    lines: list[str] = []
    torch.manual_seed(0)
    assert checkpoint.initialise(build("lalic-s"), "lalic-xs", lines.append) == ([], [])
    assert lines == ["lalic-xs: lalic-xs widened to lalic-s"]
