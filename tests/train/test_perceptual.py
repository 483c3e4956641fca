import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linic.bench.perceptual import FILES, Measures
from linic.errors import UsageError
from linic.train.perceptual import RELUS, Perceptual, Terms, phase, seam, shared_transform, wasserstein

WEIGHTS = Path(os.environ.get("LINIC_MEASURES") or Path(__file__).parents[3] / "shared" / "data" / "weights")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no weights of the measures: {WEIGHTS} is no folder")


@pytest.fixture
def measures() -> Measures:
    return Measures(WEIGHTS)


def waves(height: int = 96, width: int = 112) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    squares = ((x * 8).floor() + (y * 6).floor()) % 2
    return torch.stack([0.5 + 0.4 * torch.sin(9 * x + 4 * y), 0.5 + 0.3 * torch.cos(13 * x * y), squares * 0.6 + 0.2])


def batch(count: int = 3, side: int = 128) -> torch.Tensor:
    torch.manual_seed(0)
    return F.interpolate(torch.rand(count, 3, side // 4, side // 4), (side, side), mode="bicubic").clamp(0, 1)


@needs_weights
def test_the_terms_of_equal_pictures_are_zero_and_grow_with_noise(measures):
    loss, x = Perceptual(measures), batch()
    last = loss(x, x)[:4]                       # the seam term looks at x_hat alone
    assert all(float(t) == 0 for t in last)
    for sigma in (0.05, 0.2):
        torch.manual_seed(1)
        terms = loss(x + sigma * torch.randn_like(x), x)[:4]
        assert all(a > b for a, b in zip(terms, last)) and all(t.shape == () for t in terms)
        last = terms


@needs_weights
def test_every_term_has_a_finite_gradient_in_the_picture_and_in_nothing_else(measures):
    loss, x = Perceptual(measures), batch().requires_grad_()
    for start in (x + 0.1 * torch.randn_like(x), 2 * x - 0.5, torch.zeros_like(x)):
        x_hat = start.detach().requires_grad_()
        for name, term in zip(Terms._fields[:4], loss(x_hat, x)):
            gradient, = torch.autograd.grad(term, x_hat, retain_graph=True)
            assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
    loss(x_hat, x.detach()).lpips.backward()
    assert not any(t.requires_grad or t.grad is not None for network in ("squeeze", "vgg")
                   for t in measures.weights(network, torch.bfloat16).values())


@needs_weights
def test_gradients_do_not_flow_into_the_reference_through_the_networks(measures):
    x = batch().requires_grad_()
    terms = Perceptual(measures)(batch() + 0.1, x)
    assert not any(t.requires_grad for t in terms[:3])


@needs_weights
def test_bf16_gives_about_the_terms_of_float32(measures):
    x = batch()
    x_hat, found = x + 0.1 * torch.randn_like(x), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(2)
        found.append([float(t) for t in Perceptual(measures, dtype=dtype)(x_hat, x)])
    assert found[1] == pytest.approx(found[0], rel=0.03)


@needs_weights
def test_the_draws_are_those_of_the_global_generator(measures):
    loss, x = Perceptual(measures), batch()
    x_hat, found = x + 0.1 * torch.randn_like(x), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append([float(t) for t in loss(x_hat, x)])
    assert found[0] == found[1] and found[0][:3] != found[2][:3] and found[0][3] == found[2][3]


@needs_weights
def test_wasserstein_is_that_of_the_prototype(measures):
    """0.4396459: shared/prototype/mrt/feat.py, vgg_terms in float32 of this pair, 21 Nov 2026, torch 2.13 on a CPU."""
    grains = torch.from_numpy(np.random.default_rng(0).integers(-25, 26, (3, 96, 112))).float() / 255
    a, b = (waves() + grains).clamp(0, 1)[None], waves()[None]
    taps = measures.pairs("vgg", a, b)
    assert float(wasserstein([taps[i] for i in RELUS])) == pytest.approx(0.4396459, rel=1e-4)
    assert float(phase(a - b)) == pytest.approx(8.207184e-5, rel=1e-4)      # its train.py's expression


@needs_weights
def test_only_the_networks_of_the_loss_are_needed_never_those_that_judge(tmp_path):
    needed = FILES["squeeze"] + FILES["vgg"]
    for name in needed:
        (tmp_path / name).symlink_to(WEIGHTS / name)
    x = batch(1)
    assert Perceptual(Measures(tmp_path))(1 - x, x).lpips > 0
    for name in needed:                                 # the want shows before the first step
        (tmp_path / name).unlink()
        with pytest.raises(UsageError, match=f"needs {name}, missing there"):
            Perceptual(Measures(tmp_path))
        (tmp_path / name).symlink_to(WEIGHTS / name)


@needs_weights
def test_pictures_that_do_not_fit_are_refused(measures):
    loss = Perceptual(measures)
    loss(torch.rand(1, 3, 96, 131), torch.rand(1, 3, 96, 131))
    for a, b in (((1, 3, 96, 96), (1, 3, 96, 97)), ((1, 3, 95, 128), (1, 3, 95, 128))):
        with pytest.raises(UsageError, match="sides from 96"):
            loss(torch.rand(a), torch.rand(b))


def test_the_transform_is_one_for_both_and_another_each_time():
    x = batch(2, 256)
    shown = [shared_transform(x, x, 192) for _ in range(4)]
    assert all(torch.equal(a, b) and a.shape == (2, 3, 192, 192) for a, b in shown)
    assert all((shown[i][0] - shown[j][0]).abs().mean() > 0.01 for i in range(4) for j in range(i))
    assert shared_transform(batch(1, 100), batch(1, 100), 192)[0].shape == (1, 3, 75, 75)   # never enlarged beyond 1.25


@pytest.mark.parametrize("shift", [(0, 0), (5, 11)])
def test_a_lattice_of_16_px_counts_in_full_wherever_it_lies(shift):
    """Shifted pictures have the same lattice: a mean over shifts hides none of it."""
    torch.manual_seed(0)
    tile = torch.randn(1, 3, 16, 16)
    lattice = 0.02 * (tile - tile.mean((2, 3), keepdim=True)).repeat(2, 1, 8, 8).roll(shift, (2, 3))
    assert float(phase(lattice)) == pytest.approx(float(lattice.square().mean()), rel=1e-4)
    assert float(phase(lattice[:, :, :120, :125])) == pytest.approx(float(lattice.square().mean()), rel=1e-4)


def test_the_phase_term_hardly_sees_noise_shades_and_smooth_errors():
    torch.manual_seed(0)
    along = torch.arange(128) * 2 * math.pi / 128
    smooth = (along.sin()[:, None] + along.cos()).expand(1, 3, 128, 128)
    noise, shade = torch.randn(1, 3, 128, 128), torch.ones(1, 3, 128, 128)
    assert phase(smooth) < 1e-6 * smooth.square().mean() and phase(shade) < 1e-9
    assert float(phase(noise)) == pytest.approx(1 / 64, rel=0.2)            # of 64 cells


def test_the_seam_term_sees_a_grid_of_16_px_and_not_texture():
    torch.manual_seed(0)
    noise, smooth = torch.rand(2, 3, 128, 192), batch(2, 128)
    cells = torch.randn(2, 3, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    grid = (0.5 + 0.02 * cells + 0.003 * torch.randn(2, 3, 128, 128)).requires_grad_()
    before = float(seam(grid).detach())
    assert seam(noise) < 0.01 and seam(smooth) < 0.1 < 1 < before
    assert seam(grid.detach().roll((8, 8), (2, 3))) > 0.01      # borders weaker than all else
    gradient, = torch.autograd.grad(seam(grid), grid)
    assert float(seam((grid - 0.001 * gradient / gradient.abs().max()).detach())) < before
