import pytest
import torch
from train_helpers import Tiny

from linic.errors import UsageError
from linic.train import checkpoint, parts

ABOUT = {"preset": "lalic-xs", "step": 7, "weights": "ema"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "ema.safetensors"
    checkpoint.save(path, {**Tiny().state_dict(), "count": torch.arange(3)}, ABOUT)
    return path


def test_parts_are_small_and_join_to_the_same_bf16_bits(source, tmp_path):
    manifest = parts.split(source, tmp_path / "out", part_bytes=5000)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.part")]
    assert len(sizes) == len(manifest["parts"]) > 3 and max(sizes) == 5000 and sum(sizes) == manifest["bytes"]
    assert parts.join(tmp_path / "out", tmp_path / "joined.safetensors") == ABOUT
    assert parts.join(tmp_path / "out" / "ema.json", tmp_path / "joined.safetensors") == ABOUT
    (a, _), (b, about) = checkpoint.load(source), checkpoint.load(tmp_path / "joined.safetensors")
    assert about == ABOUT and a.keys() == b.keys() and b["down.weight"].dtype == torch.float32
    assert all(torch.equal(a[k].bfloat16().float() if k != "count" else a[k], b[k]) for k in a)
    checkpoint.take_over(Tiny(), b, "joined")


def test_missing_damaged_and_foreign_parts_are_named(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no manifest"):
        parts.join(tmp_path / "nowhere", tmp_path / "joined.safetensors")
    parts.split(source, out, part_bytes=5000)
    part = out / "ema-1.part"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"ema-1\.part: damaged"):
        parts.join(out, tmp_path / "joined.safetensors")
    part.unlink()
    with pytest.raises(UsageError, match=r"ema-1\.part: missing"):
        parts.join(out, tmp_path / "joined.safetensors")
    assert not (tmp_path / "joined.safetensors").exists()


def test_what_is_too_large_to_travel_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="more than the 0 that may travel"):
        parts.split(source, tmp_path / "out", most_bytes=100)
