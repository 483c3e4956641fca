"""Weight files of untrained MRT models. Their start is a linear codec fitted to noise: bad, but it codes."""
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from linic import weights
from linic.models import AnyConfig, Mrt, build
from linic.models.config import MrtConfig

TINY = MrtConfig(name="tiny-mrt", family="mrt", width=24, heads=2, stem=(12, 16), pixels=(16, 16, 12),
                 pixel_depths=(1, 1, 1), decoder_pairs=2, rcm_width=16, rcm_depth=2, encoder_pairs=1, latents=6,
                 window=4, scales=20)


def made(config: str | AnyConfig, seed: int = 0) -> Mrt:
    """No layer of it is silent, not even those that are at the start."""
    torch.manual_seed(seed)
    model: Any = build(config).eval()
    model.init_klt(noise().permute(0, 2, 3, 1))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any() and p.ndim > 1 and name.startswith(("decoder.", "rcm.")):
                p.normal_(0, 0.02 / p[0].numel() ** 0.5)
    return model


def noise() -> torch.Tensor:
    """(12, 3, 256, 256): as strong in each octave, as photographs are; grey for the most part."""
    octaves = [F.interpolate(torch.randn(12, 1, n, n) + 0.3 * torch.randn(12, 3, n, n), size=(256, 256), mode="bicubic")
               for n in (2, 4, 8, 16, 32, 64, 128)]
    return (0.5 + 0.09 * sum(octaves)).clamp(0, 1)


def critic(model: Mrt, seed: int = 1) -> dict[str, torch.Tensor]:
    """Another decoder, not far away."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + 0.1 * value.abs().mean() * torch.randn(value.shape, generator=generator)
            for key, value in model.state_dict().items() if weights.second(key)}


def write(folder: Path, name: str = "mrt-xs", config: str | AnyConfig = "mrt-xs") -> Path:
    """With two decoders."""
    path = folder / f"{name}.safetensors"
    save(path, made(config), name)
    return path


def save(path: Path, model: Mrt, name: str) -> None:
    weights.save(path, model, {"name": name}, adversarial=critic(model))
