"""Makes the golden files of the family MRT: `python tests/golden/mrt/make.py` writes two models, .linic files and
latents.json. As make.py above: only when the format changes on purpose, and never once MRT weights have shipped.

The models are tiny and untrained, one for each order of coding; their RCMs are random, so that every operator and every
branch of the coder has something to do.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import linic
from linic import codec, container, weights
from linic.models import Mrt

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import make as lalic  # noqa: E402

import mrt_files  # noqa: E402

ORDERS = ("staggered", "windows")
FILES = {"1x1-q0": ((1, 1), 0), "200x140-q60": ((200, 140), 60), "2100x40-q100": ((2100, 40), 100)}


def model(order: str) -> Mrt:
    made = mrt_files.made(replace(mrt_files.TINY, name=f"tiny-mrt-{order}", order=order))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.rcm.named_parameters():
            if p.ndim == 2 and not name.startswith(("row", "blocks.0.near", "blocks.1.near")):
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
            elif name.endswith(("row.weight", ".u", "bias")):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return made


def main() -> None:
    latents = {}
    for order in ORDERS:
        path = HERE / f"{order}.safetensors"
        weights.save(path, model(order), {"note": "for tests only: untrained"})
        digest = weights.read_card(path)["digest"]
        for name, (size, quality) in FILES.items():
            image = Image.fromarray(lalic.pixels(*size, seed=99))
            container.FROZEN.pop(17, None)
            versions = {f"{order}-{name}": linic.encode(image, quality=quality, model=path)}
            if size == (200, 140):
                container.FROZEN[17] = digest       # the compact profile can say registered codes alone
                versions[f"{order}-{name}-compact"] = linic.encode(image, quality, path, profile="compact")
            for version, content in versions.items():
                (HERE / f"{version}.linic").write_bytes(content)
                latents[version] = codec.verify(content, path)["latents"]
                print(version, len(content), "bytes", latents[version][:16])
        print(path.name, path.stat().st_size, "bytes")
    (HERE / "latents.json").write_text(json.dumps(latents, indent=1) + "\n")


if __name__ == "__main__":
    main()
