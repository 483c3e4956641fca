"""Makes the golden files: `python tests/golden/make.py` writes tiny.safetensors, four .linic files and latents.json.

Run it only when the format changes on purpose: that these files still decode is what a version promises. The model is
tiny and untrained (its prior is fitted to the pictures, its normative networks are random), so that every operator of
the small presets and every branch of the coder, escapes too, has something to do. Each file comes with the SHA-256 of
its latents as NumPy, the definition, gave them.
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import linic
from linic import codec, container, weights
from linic.models import build
from linic.models.config import Config, Context, Net

HERE = Path(__file__).parent
MODEL = HERE / "tiny.safetensors"
FILES = {"1x1-q0": ((1, 1), 0), "70x50-q50": ((70, 50), 50), "130x190-q100": ((130, 190), 100)}
CONFIG = Config(
    name="tiny", family="lalic", latents=8, hyper_latents=3, hyper_features=5, scales=10,
    transform=Net((4, 4, 1), (1, 1, 1), (6, 6), (1, 1), 2, (False, True)),
    hyper=Net((2, 2), (1, 1), (6,), (1,), 2, (True,)),
    context=Context((3, 5), "linear", "mlp", 6))


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    made = build(CONFIG).eval()
    made.init_klt(torch.from_numpy(np.stack([pixels(64, 64, seed) for seed in range(8)])).float() / 255)
    with torch.no_grad():
        for net in (made.h_s, made.contexts):
            for name, p in net.named_parameters():
                if p.ndim == 2 and not name.endswith("row.weight"):
                    p.normal_(0, 1 / p.shape[1] ** 0.5)
                elif name.endswith(("row.weight", ".u", "bias")):
                    p.normal_(0, 0.2)
                if "aggregate.scale" in name:
                    p *= 4
        made.h_a.head.proj.weight *= 8
    return made


def pixels(width: int, height: int, seed: int) -> np.ndarray:
    """Smooth, with some noise on top."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def compact(data: bytes, code: int = 1) -> bytes:
    """The same picture in the compact profile. It can only say registered codes: the model goes along by its path."""
    file = container.parse(data)
    y_hat: list[bytes] = []
    decode_tile(file, y_hat)
    small = replace(file, profile=container.COMPACT, digest=b"", model=code, metadata={}, unknown=[])
    small.tiles = [replace(file.tiles[0], checksum=small.checksum(0, y_hat[0]))]
    return container.build(small)


def decode_tile(file: container.Image, found: list[bytes]) -> None:
    from linic.entropy.program import Numpy, plan
    program, tables, _ = weights.load_program(MODEL)
    rows, columns = next(iter(file.cells()))
    steps = plan(program, Numpy(program), file.tiles[0].quality, codec._size(rows, columns))
    found.append(codec._bytes(codec._decode_tile(file, 0, tables, steps)))


def main() -> None:
    weights.save(MODEL, model(), {"name": "tiny", "note": "for tests only: untrained"})
    latents = {}
    for name, (size, quality) in FILES.items():
        data = linic.encode(Image.fromarray(pixels(*size, seed=99)), quality=quality, model=MODEL)
        versions = {name: data, f"{name}-compact": compact(data)} if size == (70, 50) else {name: data}
        for version, content in versions.items():
            (HERE / f"{version}.linic").write_bytes(content)
            latents[version] = codec.verify(content, MODEL)["latents"]
            print(version, len(content), "bytes", latents[version][:16])
    (HERE / "latents.json").write_text(json.dumps(latents, indent=1) + "\n")
    print(MODEL.name, MODEL.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
