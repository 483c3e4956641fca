"""What the eye minds, as terms of a training loss. (x_hat, x), both (B, 3, H, W) in [0, 1], sides from 96 px.

    lpips    LPIPS v0.1 on SqueezeNet                                         } of both pictures under one fresh random
    vgg      VGG19n: distance of unit features, of `count` of the batch only  } transform, so that nothing can be drawn
    wd       Wasserstein distortion on the same features as vgg               } where the strides of a network miss it
    phase    16 px lattices, which the transform alone does not prevent
    seam     borders of 16 px cells that stand out

Scalars, unweighted, means over the batch, differentiable in x_hat; the recipe weighs them. x_hat need not be clamped.
Draws come from torch's CPU generator. The networks run in bf16, all else in float32.

AlexNet and Inception judge (bench/perceptual.py): their weights are never touched here, or they would judge no more.
Source of wd: Wasserstein distortion (arXiv 2412.00505), here as means and deviations of square pools.
Raises UsageError for pictures that do not fit, and at once where a weight file is missing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linic.bench.perceptual import Measures, unit_distance
from linic.errors import UsageError

SMALLEST_SIDE = 96          # three quarters of it, a quarter of that at relu3_1, still hold one pool of 16
CELL = 16                   # pixels
PART, LEVEL = 64, 1 / 255
POOLS = (4, 8, 16)          # positions of a tap
RELUS = (0, 2, 4)           # relu1_1, relu2_1, relu3_1 of the taps


class Terms(NamedTuple):
    lpips: Tensor
    vgg: Tensor
    wd: Tensor
    phase: Tensor
    seam: Tensor


class Perceptual:
    """`side`: of the transformed pictures; `window`: of the part of them that VGG sees, of `count` pictures. Pixels."""

    def __init__(self, measures: Measures, count: int = 2, window: int = 128, side: int = 192,
                 dtype: torch.dtype = torch.bfloat16):
        measures.weights("squeeze", dtype)
        measures.weights("vgg", dtype)
        self.measures, self.count, self.window, self.side, self.dtype = measures, count, window, side, dtype

    def __call__(self, x_hat: Tensor, x: Tensor) -> Terms:
        if x_hat.shape != x.shape or min(x.shape[2:]) < SMALLEST_SIDE:
            raise UsageError(f"pictures of one shape, sides from {SMALLEST_SIDE}, are needed, "
                             f"not {tuple(x_hat.shape)} and {tuple(x.shape)}")
        x_hat, x = x_hat.float(), x.float()
        a, b = shared_transform(x_hat, x, self.side)
        some = torch.randperm(len(a))[:self.count].to(a.device)
        top, left = (_draw(n - self.window) for n in a.shape[2:])
        a_part, b_part = (t[some, :, top:top + self.window, left:left + self.window] for t in (a, b))
        taps = self.measures.pairs("vgg", a_part, b_part, self.dtype)
        return Terms(self.measures.lpips(a, b, "squeeze", self.dtype).mean(), unit_distance(taps).mean(),
                     wasserstein([taps[i] for i in RELUS]), phase(x_hat - x), seam(x_hat))


def seam(x_hat: Tensor) -> Tensor:
    """Borders of 16 px cells that stand out: squared ln of the mean gradient across them over that elsewhere, in parts
    of 64 px. A flat sky counts as much as foliage: a grid is seen there first. Both ways: a first run that was told of
    standing out alone ended with borders .8 times as strong as all else."""
    parts = []
    for x in (x_hat, x_hat.mT):
        x = x[..., :x.shape[2] // PART * PART, :x.shape[3] // PART * PART]
        steps = F.pad((x[..., 1:] - x[..., :-1]).abs(), (1, 0))         # step n: from n - 1 to n
        b, c, h, w = steps.shape
        cells = steps.view(b, c, h // PART, PART, w // PART, PART // CELL, CELL).mean((1, 3))   # b, h, w, cells, CELL
        border, inside = cells[..., 0], cells[..., 1:].mean((3, 4))
        border = torch.cat([border[:, :, :1, 1:].mean(3), border[:, :, 1:].mean(3)], 2)     # the first is no border
        parts.append(torch.log((border + LEVEL) / (inside + LEVEL)).square().mean())
    return torch.stack(parts).mean()


def shared_transform(a: Tensor, b: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """A crop, scaled by 0.75 to 1.25 to `side` or three quarters of a smaller picture, transposed or not, its colours
    mixed. The same for both."""
    height, width = a.shape[2:]
    side = min(side, 3 * min(height, width) // 4)
    cut = min(round(side / float(torch.empty(()).uniform_(0.75, 1.25))), height, width)
    top, left, turned = _draw(height - cut), _draw(width - cut), _draw(1)
    colours = (torch.eye(3) + 0.08 * torch.randn(3, 3)).to(a.device)

    def transformed(t: Tensor) -> Tensor:
        t = t[:, :, top:top + cut, left:left + cut]
        t = F.interpolate(t, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return torch.einsum("ij,bjhw->bihw", colours, (t.mT if turned else t) - 0.5) + 0.5

    return transformed(a), transformed(b)


def wasserstein(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Squared differences of local means and deviations, mean over taps and pools. Texture may move, not change."""
    def moments(f: Tensor, pool: int) -> Tensor:
        mean = F.avg_pool2d(f, pool)
        variance = F.avg_pool2d(f.square(), pool) - mean.square()
        return torch.stack([mean, (variance.clamp_min(0) + 1e-3).sqrt()])

    # 2: the sum of the means' and the deviations' error, not their mean.
    return 2 * torch.stack([(moments(f, pool) - moments(g, pool)).square().mean()
                            for f, g in pairs for pool in POOLS]).mean()


def phase(error: Tensor) -> Tensor:
    """(B, 3, H, W) -> mean square of the error that all 16 px cells of a picture have in common, but for its mean.

    A lattice of any form counts in full; noise in n cells for 1 / n of its power; a shade or a blur hardly at all.
    """
    rows, columns = (n // CELL for n in error.shape[2:])
    cells = error[:, :, :rows * CELL, :columns * CELL].reshape(*error.shape[:2], rows, CELL, columns, CELL)
    common = cells.mean((2, 4))                             # (B, 3, 16, 16)
    return (common - common.mean((2, 3), keepdim=True)).square().mean()


def _draw(most: int) -> int:
    """0 .. most, 0 where that is less."""
    return int(torch.randint(max(most, 0) + 1, ()))
