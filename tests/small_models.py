"""Presets made small, with random weights: what their normative programs compute can be tested in milliseconds."""
from typing import Any

import numpy as np
import torch

from linic.entropy import carriers
from linic.models import Lalic, build, preset
from linic.models.config import Config, from_dict, to_dict

# Compiled kernels are absent where there was no compiler; all else is everywhere.
CARRIERS_HERE = [name for name in carriers.CARRIERS
                 if name != "native" or not carriers.self_test(name, "cpu", 8, ((8, 8),))]


def small(base: str, **changes: Any) -> Config:
    """A preset with few and narrow layers. Numbers that are no multiples of 8: every carrier must pad."""
    data = to_dict(preset(base))
    for name, value in {"transform.widths": [8, 8, 8], "transform.depths": [1, 1, 1], "hyper.depths": [1],
                        "hyper.widths": [12], "latents": 9, "context.groups": [3, 6], "hyper_latents": 3,
                        "hyper_features": 5, "context.width": 11, "context.depth": 1, "scales": 20, **changes}.items():
        part, _, field = name.rpartition(".")
        (data[part] if part else data)[field] = value
    return from_dict(data)


def randomised(config: Config, seed: int = 0) -> Lalic:
    """Weights that leave no layer silent."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for net in (model.h_s, model.contexts):
            for p in net.parameters():
                p.add_(torch.randn_like(p) * (1 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.2))
        model.ln_prior.normal_(0.5, 1)
    return model


class Recorder:
    """Coder of a walk: gives what is wanted, or made-up symbols, and keeps them with their tables."""

    def __init__(self, seed: int = 0):
        self.rng, self.steps = np.random.default_rng(seed), []

    def code(self, index: np.ndarray, symbols: np.ndarray | None) -> np.ndarray:
        if symbols is None:
            symbols = (self.rng.standard_t(1, len(index)) * 3).clip(-255, 255).astype(np.int32)
        self.steps.append((index.copy(), symbols.copy()))
        return symbols
