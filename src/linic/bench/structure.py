"""Traces that a block codec leaves in one picture (3, H, W), values in [0, 1]: seams, ripple, lattices, lost energy.

All of the mean of the channels, mean of both directions. A picture has borders of its own: judge by the ratio to, or
the difference from, the original's numbers. Needs no original itself.

    seam256 .. seam4     mean |gradient| across the multiples of a period over that elsewhere: 1 = no seam
    ripple16 .. ripple4  the same at every phase of a period: deviation over mean of the phases
    ac2 .. ac16          correlation of the second difference with itself that many pixels on: 0 = no lattice
    grad                 mean squared gradient

seam256 is absent where no side has more than 257 pixels; all but `grad` are nan for a flat picture.
Raises UsageError for another shape or a side below 34, on which a period of 32 does not exist.
"""

import torch
from torch import Tensor

from linic.errors import UsageError

SMALLEST_SIDE = 34


def structure(picture: Tensor) -> dict[str, float]:
    if picture.dim() != 3 or picture.shape[0] != 3 or min(picture.shape[1:]) < SMALLEST_SIDE:
        raise UsageError(f"a picture (3, H, W) with sides from {SMALLEST_SIDE} is needed, not {tuple(picture.shape)}")
    grey = picture.float().mean(0)
    across, down = _along_rows(grey), _along_rows(grey.mT)
    both = [(name, [d[name] for d in (across, down) if name in d]) for name in across | down]
    return {name: sum(values) / len(values) for name, values in both}


def _along_rows(grey: Tensor) -> dict[str, float]:
    step = grey[:, 1:] - grey[:, :-1]
    size = step.abs().mean(0)
    at = torch.arange(1, len(size) + 1, device=grey.device)         # size[i]: from pixel at[i] - 1 to at[i]
    found = {}
    for period in (256, 32, 16, 8, 4):
        if len(size) > period:
            on = at % period == 0
            found[f"seam{period}"] = size[on].mean() / size[~on].mean()
    for period in (16, 8, 4):
        phases = torch.stack([size[at % period == k].mean() for k in range(period)])
        found[f"ripple{period}"] = phases.std() / phases.mean()
    bend = step[:, 1:] - step[:, :-1]
    for lag in (2, 4, 8, 16):
        found[f"ac{lag}"] = (bend[:, lag:] * bend[:, :-lag]).mean() / bend.square().mean()
    found["grad"] = step.square().mean()
    return {name: float(value) for name, value in found.items()}
