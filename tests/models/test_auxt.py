"""Wavelet shortcuts (AuxT) and the starts of the resampling layers."""
import pytest
import torch

from linic.errors import UsageError
from linic.models import build, preset
from linic.models.blocks import space_to_depth
from linic.models.config import from_dict, to_dict
from linic.models.lalic import Wavelet, _haar


@pytest.mark.parametrize("n", [2, 4])
def test_the_wavelet_is_orthonormal_and_its_first_band_the_mean(n):
    h = _haar(n)
    assert torch.allclose(h @ h.T, torch.eye(n * n), atol=1e-6)
    assert torch.allclose(h[0], torch.full((n * n,), 1 / n))
    assert torch.allclose(h[1:].sum(1), torch.zeros(n * n - 1), atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_up_is_the_transpose_of_down_and_inverts_it_where_no_channel_is_lost(factor):
    torch.manual_seed(0)
    down, up = Wavelet(3, 3 * factor**2, factor, up=False), Wavelet(3 * factor**2, 3, factor, up=True)
    up.load_state_dict(down.state_dict())
    x = torch.randn(2, 8, 12, 3)
    assert torch.allclose(up(down(x)), x, atol=1e-5)
    with torch.no_grad():
        down.gain.uniform_(0.5, 2)
    up.load_state_dict(down.state_dict())
    y = torch.randn_like(down(x))
    assert (down(x) * y).sum().item() == pytest.approx((x * up(y)).sum().item(), rel=1e-4)


def test_a_gain_scales_one_band_of_one_channel():
    torch.manual_seed(0)
    down = Wavelet(3, 12, 2, up=False)
    with torch.no_grad():
        down.proj.weight.copy_(torch.eye(12))
        down.gain.zero_()
        down.gain[4] = 5.0                              # band 1, channel 1
    x = torch.randn(1, 4, 4, 3)
    bands = torch.einsum("...pc,qp->...qc", space_to_depth(x, 2).unflatten(3, (4, 3)), _haar(2)).flatten(3)
    expected = torch.zeros_like(bands)
    expected[..., 4] = 5 * bands[..., 4]
    assert torch.allclose(down(x), expected, atol=1e-5)


def linear_part(name):
    """A fresh model's reconstruction of crops without rounding: analysis, then synthesis."""
    torch.manual_seed(0)
    crops, model = torch.rand(128, 64, 64, 3).cumsum(1).cumsum(2), build(name).eval()
    crops = crops / crops.amax()
    model.init_klt(crops)
    l = torch.zeros(8)
    with torch.no_grad():
        y = model.analyse(crops[:8], l)
        got = model.synthesise(y, l)
    error = (got - crops[:8]).square().mean() / (crops[:8] - crops[:8].mean()).square().mean()
    return model, y, error.item()


def test_the_klt_start_is_the_same_codec_with_shortcuts_as_without():
    plain, y, error = linear_part("lalic-xs")
    shortcut, z, same = linear_part("ablation-xs-auxt-klt")
    assert error < 0.02
    assert same == pytest.approx(error, abs=2e-3)
    assert torch.allclose(y, z, atol=0.05 * float(y.abs().max()))
    assert torch.allclose(plain.ln_prior[:100], shortcut.ln_prior[:100], atol=0.1)


def test_the_orthogonal_start_has_orthonormal_axes_and_a_prior_of_the_data():
    model, y, _ = linear_part("ablation-xs-orthogonal")
    weight = model.g_a.stages[1].resample.proj.weight
    assert torch.allclose(weight @ weight.T, torch.eye(128), atol=1e-5)
    assert torch.equal(model.g_s.stages[2].resample.proj.weight, weight.T)
    spread = (y.reshape(-1, 256).std(0).log() - model.ln_prior).abs()
    assert spread.median() < 0.5


@pytest.mark.parametrize("name", ["ablation-xs-auxt", "ablation-xs-auxt-klt"])
def test_the_model_with_shortcuts_trains_and_only_its_transforms_have_them(name):
    torch.manual_seed(0)
    model = build(name)
    names = {k.rpartition("shortcut.")[0] for k, _ in model.named_parameters() if "shortcut" in k}
    assert names == {"g_a.stages.0.", "g_a.stages.1.", "g_a.stages.2.", "g_s.", "g_s.stages.1.", "g_s.stages.2."}
    out = model(torch.rand(1, 3, 64, 64), torch.tensor([50.0]))
    (out["x_hat"].square().mean() - out["likelihoods"]["y"].log2().mean()).backward()
    assert not [k for k, p in model.named_parameters() if "shortcut" in k and not p.grad.abs().sum() > 0]


def test_existing_presets_are_what_they_were():
    assert sum(p.numel() for p in build("lalic-xs").parameters()) == 3_889_272
    assert not [k for k in build("lalic-xs").state_dict() if "shortcut" in k]
    with pytest.raises(UsageError, match=r"hyper\.shortcut"):
        from_dict({**(data := to_dict(preset("lalic-xs"))), "hyper": {**data["hyper"], "shortcut": "wavelet"}})
