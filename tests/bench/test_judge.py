import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linic.bench import judge as module
from linic.bench.judge import COLUMNS, KEYS, Judge
from linic.bench.perceptual import Measures
from linic.bench.ssimulacra2 import ssimulacra2

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS = Path(os.environ.get("LINIC_MEASURES") or SHARED / "data" / "weights")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no weights of the measures: {WEIGHTS} is no folder")
VVC = SHARED / "anchors" / "vvc_extreme"
needs_vvc = pytest.mark.skipif(not VVC.is_dir() or not (SHARED / "data" / "kodak").is_dir(), reason="no VVC pictures")


def pictures(height: int = 64, width: int = 96) -> tuple[np.ndarray, np.ndarray]:
    grains = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    clean = (np.arange(width)[None, :, None] * 2 + np.arange(height)[:, None, None]) % 256
    return clean.repeat(3, 2).astype(np.uint8), ((3 * clean + grains) // 4).astype(np.uint8)


@needs_vvc
@pytest.mark.parametrize(("rate", "name"), [("0.0118", "kodim20"), ("0.0250", "kodim20"), ("0.0250", "kodim04")])
def test_ssimulacra2_is_that_of_the_cpp_tool(rate, name):
    wanted = json.loads((VVC / "index.json").read_text())["pictures"][rate][name]["ssimulacra2"]
    original = Image.open(SHARED / "data" / "kodak" / f"{name}.png").convert("RGB")
    decoded = Image.open(VVC / rate / f"{name}.webp").convert("RGB").resize(original.size, Image.Resampling.LANCZOS)
    assert ssimulacra2(np.asarray(original), np.asarray(decoded)) == pytest.approx(wanted, abs=0.05)


def test_ssimulacra2_of_equal_pictures_is_100_and_small_ones_have_none():
    clean, noisy = pictures(256, 257)
    assert ssimulacra2(clean, clean) == 100
    assert ssimulacra2(clean, noisy) < 50
    assert ssimulacra2(clean[:255], clean[:255]) is None


def test_the_columns_are_these_and_those_that_may_be_trained_on_are_marked():
    assert KEYS == ("psnr-rgb", "ms-ssim-rgb", "ssimulacra2", "lpips-alex", "lpips-squeeze", "vgg19n", "seam256-ratio",
                    "seam32-ratio", "seam16-ratio", "ac16-excess", "ac8-excess", "ac4-excess", "ac2-excess",
                    "grad-ratio")
    assert {c.key for c in COLUMNS if c.in_loss} == {"psnr-rgb", "lpips-squeeze", "vgg19n"}
    assert all(c in module.NOTE for c in ("LPIPS(alex)", "LPIPS(squeeze)", "VGG19n"))


def test_without_weights_there_are_the_measures_that_need_none():
    clean, noisy = pictures()
    row = Judge()(clean, noisy)
    assert tuple(row) == KEYS
    assert row["psnr-rgb"] and row["seam32-ratio"] and row["grad-ratio"] > 1
    assert row["lpips-alex"] is row["vgg19n"] is row["seam256-ratio"] is row["ms-ssim-rgb"] is None


def test_equal_pictures_have_no_psnr_and_the_traces_of_the_original():
    clean, _ = pictures()
    row = Judge()(clean, clean)
    assert row["psnr-rgb"] is None and row["seam16-ratio"] == 1 and row["ac4-excess"] == 0


def test_a_flat_or_tiny_picture_is_judged_by_what_is_defined():
    flat = np.full((40, 40, 3), 7, np.uint8)
    assert json.dumps(Judge()(flat, flat), allow_nan=False)
    assert Judge()(flat[:1, :1], flat[:1, :1] + np.uint8(1))["psnr-rgb"] == pytest.approx(48.13, abs=0.01)


@needs_weights
def test_keeping_the_originals_features_changes_no_number():
    judge, measures = Judge(WEIGHTS), Measures(WEIGHTS)
    clean, noisy = pictures()
    a, b = (torch.from_numpy(p).permute(2, 0, 1)[None].float() / 255 for p in (noisy, clean))
    for _ in range(2):
        row = judge(clean, noisy)
        assert row["lpips-alex"] == float(measures.lpips(a, b, "alex"))
        assert row["lpips-squeeze"] == float(measures.lpips(a, b, "squeeze"))
        assert row["vgg19n"] == pytest.approx(float(measures.vgg(a, b)), rel=0.01)
    assert judge(noisy, clean)["lpips-alex"] == float(measures.lpips(b, a, "alex"))
    assert judge.identity == Judge(WEIGHTS).identity != Judge().identity
