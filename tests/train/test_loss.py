import math

import numpy as np
import pytest
import torch
from train_helpers import Tiny, picture

from linic.bench import metrics
from linic.errors import UsageError
from linic.models import build
from linic.train import evaluate, flops
from linic.train.loss import ms_ssim, rate_distortion, weigh
from linic.train.recipe import Loss


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("height, width", [(176, 176), (203, 241), (256, 192)])
def test_ms_ssim_is_that_of_the_bench(height, width):
    pytest.importorskip("pytorch_msssim")
    a = picture(1, height, width)
    noise = np.random.default_rng(0).normal(0, 15, a.shape)
    mixed = (0.8 * a + 0.2 * picture(2, height, width)).astype(np.uint8)
    for b in ((a + noise).clip(0, 255).astype(np.uint8), mixed, a):
        assert float(ms_ssim(tensor(a), tensor(b))) == pytest.approx(metrics.ms_ssim(a, b), abs=2e-6)
    # Of pictures that have nothing in common theirs is 0, and ours a little above: a slope at 0 would be infinite.
    assert metrics.ms_ssim(a, 255 - a) == 0 and 0 < float(ms_ssim(tensor(a), tensor(255 - a))) < 1e-2


def test_ms_ssim_has_a_finite_gradient_that_leads_to_the_picture_even_from_its_opposite():
    a = tensor(picture(1, 192, 192))
    for start in (torch.rand_like(a), 1 - a, a, torch.full_like(a, 0.5)):
        x = start.clone().requires_grad_()
        (1 - ms_ssim(x, a)).sum().backward()
        assert torch.isfinite(x.grad).all()
    noise = 0.1 * torch.randn_like(a)
    x = (a + noise).requires_grad_()
    (1 - ms_ssim(x, a)).sum().backward()
    assert (x.grad * noise).sum() > 0
    batch = ms_ssim(torch.cat([a, a + noise]), torch.cat([a, a]))
    assert batch.shape == (2,) and batch[0] == pytest.approx(1, abs=1e-6) and batch[1] == pytest.approx(
        float(ms_ssim(a + noise, a)), abs=1e-6)


def test_ms_ssim_of_a_picture_too_small_for_five_scales_is_refused():
    with pytest.raises(UsageError, match="MS-SSIM of 200x175 pixels: five scales need 176 on each side"):
        ms_ssim(torch.rand(1, 3, 175, 200), torch.rand(1, 3, 175, 200))


def test_the_loss_is_that_of_the_papers():
    assert weigh(Loss(lambda_=0.025), 50.0, 1e-3, 0.4) == pytest.approx(0.025 * 65025 * 1e-3 + 0.4)
    assert weigh(Loss(distortion="ms-ssim", lambda_=8.73), 50.0, 0.02, 0.3) == pytest.approx(8.73 * 0.02 + 0.3)
    drawn = 0.0012 * (0.07 / 0.0012) ** 0.7
    assert weigh(Loss(0.35), 70.0, 1e-3, 0.4) == pytest.approx(
        (drawn * 65025 * 1e-3 + 0.4) * (drawn / 0.013) ** -0.35)
    assert weigh(Loss(distortion="ms-ssim"), 70.0, 0.02, 0.3) == pytest.approx(1280 * drawn * 0.02 + 0.3)


def test_training_and_evaluation_weigh_the_same_distortion():
    model, pixels = Tiny().eval(), torch.from_numpy(picture(1, 192, 192))
    for loss in (Loss(0.35), Loss(distortion="ms-ssim", lambda_=16.64)):
        with torch.no_grad():
            x, quality = tensor(pixels.numpy()), torch.tensor([50.0])
            terms = rate_distortion(model(x, quality), x, quality, loss)
            row = evaluate.evaluate(model, [pixels], [50.0], loss)[0]
        assert row["loss"] == pytest.approx(float(terms.loss), rel=0.02)       # 8-bit values, clamped, there
        assert ("ms_ssim" in row) == (loss.distortion == "ms-ssim")


def test_with_even_1_a_crop_counts_by_its_share_of_its_loss_and_a_flat_one_stays_finite():
    x, quality = torch.rand(3, 3, 16, 16), torch.tensor([10.0, 50.0, 90.0])
    likelihoods = {name: torch.full((3, 4, 2, 2), 0.5) for name in ("y", "z")}

    def slopes(even):
        x_hat = (x + torch.tensor([0.1, 0.02, 0.0]).view(3, 1, 1, 1)).requires_grad_()
        terms = rate_distortion({"x_hat": x_hat, "likelihoods": likelihoods}, x, quality, Loss(0.35, even))
        terms.loss.sum().backward()
        return terms.loss.detach(), x_hat.grad

    (plain, before), (_, after) = slopes(0.0), slopes(1.0)
    assert torch.allclose(after, before / plain.view(3, 1, 1, 1)) and after.isfinite().all()


def test_operations_of_a_step_are_counted_without_a_step():
    model = build("lalic-xs")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    count = flops.of_pixel(model, 128, Loss())
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert count == pytest.approx(flops.of_pixel(model, 64, Loss()), rel=0.01)         # they grow with the area
    assert 256**2 * count == pytest.approx(9.3e9, rel=0.05)     # forward 3.1, backward twice that
    assert math.isnan(flops.of_pixel(torch.nn.Linear(3, 3), 64, Loss()))
    assert 1e8 < flops.peak("cpu") < 1e14


def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch):
    for name, value in (("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak("cuda") == value
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    assert math.isnan(flops.peak("cuda"))
