from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linic.bench import estimate
from linic.bench.judge import Judge
from linic.errors import UsageError
from linic.models import build
from linic.train import checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """A start, and the same with blocks that do something."""
    torch.manual_seed(0)
    model, found = build("mrt-xs"), []
    model.init_klt(torch.rand(4, 256, 256, 3))
    for name in ("start", "raw"):
        found.append(tmp_path_factory.mktemp("run") / f"{name}.safetensors")
        checkpoint.save(found[-1], model.state_dict(), {"preset": "mrt-xs"})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return found


@pytest.fixture
def image() -> Image.Image:
    grains = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize((70, 97), Image.Resampling.BICUBIC)


def test_the_estimate_is_the_forward_pass_of_the_model_and_a_header(checkpoints, image):
    ours = estimate.Estimated(checkpoints[1])
    coded = ours.encode(image, 50)
    assert ours.decode(coded).size == image.size and ours.estimated
    x = np.pad(np.asarray(image), ((0, 31), (0, 26), (0, 0)), mode="edge")
    with torch.inference_mode():
        out = ours.model(torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255, torch.tensor([50.0]))
    assert coded.bytes == -(-float(out["bits"]) // 8) + estimate.HEADER


@pytest.mark.parametrize("variant", [v for v in estimate.VARIANTS if v != "all"])
def test_a_part_is_off_inside_and_back_afterwards(checkpoints, image, variant):
    ours, start = estimate.Estimated(checkpoints[1]), estimate.load(checkpoints[0])

    def both() -> tuple[int, np.ndarray]:
        coded = ours.encode(image, 100)
        return coded.bytes, np.asarray(ours.decode(coded))

    before = both()
    with estimate.switched(ours.model, variant, start) as there:
        inside = both()
    after = both()
    assert there == (len(ours.model.encoder.pairs) > 0 if variant.startswith("encoder ") and "start" not in variant
                     else True)
    assert after[0] == before[0] and (after[1] == before[1]).all()
    assert not there or inside[0] != before[0] or (inside[1] != before[1]).any()


def test_the_table_has_every_variant_that_there_is(checkpoints, image, tmp_path):
    image.save(tmp_path / "p.png")
    variants = ("all", "encoder at its start", "static prior")
    result = estimate.ablate(checkpoints[1], [tmp_path / "p.png"], Judge(), checkpoints[0], (0, 100), variants)
    assert list(result["curves"]) == list(variants)
    text = estimate.table(result)
    assert "ESTIMATED BITS" in text and "| static prior | 100 |" in text
    alone = estimate.ablate(checkpoints[1], [tmp_path / "p.png"], Judge(), None, (0,), variants)
    assert "encoder at its start" not in alone["curves"]


def test_the_linear_codec_alone_is_the_start(checkpoints, image):
    ours, start = estimate.Estimated(checkpoints[1]), estimate.Estimated(checkpoints[0])
    with estimate.switched(ours.model, "linear codec alone", start.model):
        inside = ours.encode(image, 50)
        picture = np.asarray(ours.decode(inside))
    alone = start.encode(image, 50)
    assert inside.bytes == alone.bytes and (picture == np.asarray(start.decode(alone))).all()


def test_what_is_no_checkpoint_of_mrt_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="not a checkpoint"):
        estimate.load(tmp_path / "x.safetensors")
    checkpoint.save(tmp_path / "y.safetensors", {"a": torch.zeros(1)}, {"preset": "mrt-xs"})
    with pytest.raises(UsageError, match="not weights"):
        estimate.load(tmp_path / "y.safetensors")
