import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from linic.bench import perceptual
from linic.bench.perceptual import FILES, Measures, frechet, patches
from linic.bench.structure import structure
from linic.errors import UsageError

WEIGHTS = Path(os.environ.get("LINIC_MEASURES") or Path(__file__).parents[3] / "shared" / "data" / "weights")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no weights of the measures: {WEIGHTS} is no folder")


@pytest.fixture
def measures() -> Measures:
    return Measures(WEIGHTS)


def pair(height: int = 96, width: int = 112, noise: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves and a chequerboard, with noise of so many grey levels and without."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    squares = ((x * 8).floor() + (y * 6).floor()) % 2
    clean = torch.stack([0.5 + 0.4 * torch.sin(9 * x + 4 * y), 0.5 + 0.3 * torch.cos(13 * x * y), squares * 0.6 + 0.2])
    grains = np.random.default_rng(0).integers(-noise, noise + 1, (3, height, width))
    return (clean + torch.from_numpy(grains).float() / 255).clamp(0, 1)[None], clean[None]


# Of pair(), by the research prototype's own functions (shared/prototype/mrt/feat.py: lpips, vgg_terms in float32,
# grids), 21 Nov 2026, torch 2.13 on a CPU. Its LPIPS was compared with published values: weights/README.md.
PROTOTYPE = {"alex": 0.0770623, "squeeze": 0.3379336, "vgg": 0.0727285}
STRUCTURE = {
    "seam32": 2.673772, "seam16": 2.988838, "seam8": 1.967776, "seam4": 1.549696, "ripple4": 0.299453,
    "ripple8": 0.380362, "ripple16": 0.531734, "ac2": 0.094839, "ac4": 0.00414, "ac8": 0.005806, "ac16": -0.181698,
    "grad": 0.004646}


def distance(measures: Measures, name: str, a: torch.Tensor, b: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return measures.vgg(a, b, **kwargs) if name == "vgg" else measures.lpips(a, b, name, **kwargs)


@needs_weights
@pytest.mark.parametrize("name", PROTOTYPE)
def test_a_distance_is_that_of_the_prototype_for_every_picture_of_a_batch(measures, name):
    a, b = pair()
    batch = distance(measures, name, torch.cat([a, b]), torch.cat([b, b]))
    assert batch.shape == (2,) and batch.dtype == torch.float32
    assert float(batch[0]) == pytest.approx(PROTOTYPE[name], rel=1e-4) and batch[1] == 0


@needs_weights
@pytest.mark.parametrize("name", PROTOTYPE)
def test_a_distance_grows_with_noise(measures, name):
    found = [float(distance(measures, name, *pair(64, 64, noise))) for noise in (5, 15, 45)]
    assert 0 < found[0] < found[1] < found[2] < 1.5


@needs_weights
@pytest.mark.parametrize("name", PROTOTYPE)
def test_bf16_networks_measure_about_the_same(measures, name):
    exact = float(distance(measures, name, *pair()))
    assert float(distance(measures, name, *pair(), dtype=torch.bfloat16)) == pytest.approx(exact, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):                         # float32 was asked for
        assert float(distance(measures, name, *pair())) == exact


@needs_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROTOTYPE)
def test_the_gradient_reaches_the_picture_and_nothing_else(measures, name, dtype):
    a, b = (t.requires_grad_() for t in pair(64, 64))
    distance(measures, name, a, b, dtype=dtype).sum().backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().max() > 0
    assert b.grad is None and not any(t.requires_grad or t.grad is not None
                                      for t in measures.weights(name, dtype).values())
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)                # features that are zero altogether
    distance(measures, name, flat, pair(64, 64)[1], dtype=dtype).sum().backward()
    assert torch.isfinite(flat.grad).all()


@needs_weights
def test_weights_first_read_in_inference_mode_serve_training_too(measures):
    perceptual._load.cache_clear()
    a, b = pair(64, 64)
    with torch.inference_mode():
        measures.lpips(a, b)
    measures.lpips(a.requires_grad_(), b).sum().backward()
    assert a.grad.abs().max() > 0


@needs_weights
def test_the_trunks_are_those_whose_taps_the_weights_readme_states(measures):
    """Mean of each tap for a picture of zeros after the scaling; Inception's last of a 299 px one."""
    stated = {"alex": (0.03849, 0.29633, 0.21872, 0.29192, 0.07898), "inception": (0.06963,),
              "squeeze": (0.17899, 1.15229, 4.55539, 9.71108, 10.31918, 5.47462, 0.7382)}
    with torch.no_grad():
        for network, means in stated.items():
            zeros = torch.zeros(1, 3, *(2 * [299 if network == "inception" else 64]))
            taps = perceptual.TAPS[network](measures.weights(network), zeros)
            assert [float(t.mean()) for t in taps] == pytest.approx(means, abs=2e-5)


@needs_weights
def test_inception_gives_768_features_of_a_patch_of_any_size(measures):
    features = measures.inception(torch.cat(pair(64, 80)))
    assert features.shape == (2, 768) and not features.requires_grad
    assert frechet(features, features) == pytest.approx(0, abs=1e-6) and frechet(features, features.flip(0) + 1) > 700


def test_frechet_is_the_distance_of_two_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2000, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    b = torch.randn(900, 5, generator=generator) + 1
    covariances = [np.cov(t.double().numpy().T) for t in (a, b)]
    product = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    means = float((a.double().mean(0) - b.double().mean(0)).square().sum())
    expected = means + sum(np.trace(c) for c in covariances) - 2 * np.sqrt(product).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a + 2) == pytest.approx(5 * 4, rel=1e-6)
    with pytest.raises(UsageError, match="at least two"):
        frechet(a[:1], b)


def test_patches_lie_side_by_side():
    picture = torch.arange(3 * 70 * 100).view(3, 70, 100)
    cut = patches(picture, 32)
    assert cut.shape == (6, 3, 32, 32) and torch.equal(cut[4], picture[:, 32:64, 32:64])
    assert torch.equal(patches(picture, 32, 16)[0], picture[:, 16:48, 16:48])


def test_a_missing_folder_or_file_is_named_with_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("LINIC_MEASURES", raising=False)
    with pytest.raises(UsageError, match=r"no folder is named.*LINIC_MEASURES.*lpips_v0\.1_alex\.safetensors"):
        Measures()
    with pytest.raises(UsageError, match=r"nowhere is no folder.*squeezenet1_1\.safetensors"):
        Measures(tmp_path / "nowhere")
    monkeypatch.setenv("LINIC_MEASURES", str(tmp_path))
    with pytest.raises(UsageError, match=r"alex needs alexnet_features\.safetensors and lpips_v0\.1_alex\.safetensors"):
        Measures().lpips(*pair())
    (tmp_path / FILES["vgg"][0]).write_bytes(b"cut short")
    with pytest.raises(UsageError, match=r"vgg19_normalised_relu3_1\.safetensors: cannot be read"):
        Measures().vgg(*pair())


@needs_weights
def test_one_network_needs_its_own_files_only(tmp_path):
    for name in FILES["alex"]:
        shutil.copy(WEIGHTS / name, tmp_path)
    assert float(Measures(tmp_path).lpips(*pair())) == pytest.approx(PROTOTYPE["alex"], rel=1e-4)


@needs_weights
@pytest.mark.parametrize("a, b", [((1, 3, 64, 64), (1, 3, 64, 65)), ((3, 64, 64), (3, 64, 64)),
                                  ((1, 1, 64, 64), (1, 1, 64, 64)), ((1, 3, 31, 64), (1, 3, 31, 64))])
def test_pictures_that_do_not_fit_are_refused(measures, a, b):
    with pytest.raises(UsageError, match="of one shape"):
        measures.lpips(torch.rand(a), torch.rand(b))


def test_structure_is_that_of_the_prototype():
    assert structure(pair()[0][0]) == pytest.approx(STRUCTURE, abs=2e-6)


@pytest.mark.parametrize("period", [16, 32])
def test_an_artificial_seam_is_found_at_its_period(period):
    torch.manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 33, 59), (160, 288), mode="bicubic")[0]
    steps = 0.4 * torch.rand(160 // period, 288 // period).repeat_interleave(period, 0).repeat_interleave(period, 1)
    plain, seams = structure(picture), structure(picture + steps)
    assert plain[f"seam{period}"] == pytest.approx(1, abs=0.3)
    assert seams[f"seam{period}"] > 2 * plain[f"seam{period}"] and "seam256" in seams


def test_a_lattice_shows_in_the_correlation_at_its_period():
    torch.manual_seed(0)
    noise, tile = torch.rand(3, 128, 128), torch.rand(3, 8, 8)
    plain, lattice = structure(noise), structure(noise + tile.repeat(1, 16, 16))
    assert abs(plain["ac8"]) < 0.05 and lattice["ac8"] > 0.3 and abs(lattice["ac4"]) < 0.3


def test_structure_of_a_picture_too_small_is_refused():
    with pytest.raises(UsageError, match=r"sides from 34.*\(3, 33, 80\)"):
        structure(torch.rand(3, 33, 80))
