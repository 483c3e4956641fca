"""Stage 1 of MRT: discrete targets. What a patch of 16 px shows, as a number, for the decoder's tokens to predict.

    x --SqueezeNet fire9--> 512 features a patch ---+
      --VGG19n, means and deviations--> 896 --------+--> principal axes --> nearest of k means = the code

Codes are made once, when a run begins, of training crops (seeded; codes.safetensors in the run's folder). Two linear
heads on the decoder's features after its pairs, at 1/16, predict them; loss in that stage:

    lambda * bpp + 100 * mse of pictures a quarter as large + weight * mean cross-entropy

Source of the order, codes first and pixels later: the paper, as far as known; which codes is not, these are ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.bench.perceptual import Measures
from linic.models import Mrt
from linic.train import checkpoint, recipe
from linic.train.data import Crops
from linic.train.loss import Terms, extreme, rate_distortion
from linic.train.perceptual import RELUS, Perceptual
from linic.train.recipe import Loss
from linic.train.stage import Stage

PATCH, SIDE = 16, 256           # pixels: of a code, of the crops that codes are made of
ROUNDS = 15                     # of k-means
AT_ONCE = 8                     # crops in a network
NETWORKS = ("squeeze", "vgg")


@torch.no_grad()
def features(measures: Measures, network: str, x: Tensor) -> Tensor:
    """x (B, 3, H, W), sides multiples of 16 -> (B, H/16, W/16, F), one row a patch."""
    if network == "squeeze":
        # 8 px on each side: the last features then stand at the middle of every patch.
        found = measures.taps("squeeze", F.pad(x, (8, 8, 8, 8), mode="reflect"), torch.bfloat16)[-1].float()
        found = found / (torch.linalg.vector_norm(found, dim=1, keepdim=True) + 1e-6)
    else:
        taps, parts = measures.taps("vgg", x, torch.bfloat16), []
        for i, step in zip(RELUS, (16, 8, 4)):
            mean, square = (F.avg_pool2d(t, step) for t in (taps[i].float(), taps[i].float().square()))
            parts += [mean, (square - mean.square()).clamp_min(0).sqrt()]
        found = torch.cat(parts, 1)
    return found.permute(0, 2, 3, 1)


class Codebook(nn.Module):
    """Features (..., F) -> codes (...), int64."""

    mean: Tensor
    axes: Tensor
    centres: Tensor

    def __init__(self, features: int, axes: int, count: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.zeros(features, axes))
        self.register_buffer("centres", torch.zeros(count, axes))

    @torch.no_grad()
    def fit(self, rows: Tensor, generator: torch.Generator) -> None:
        """rows (N, F), N >= count."""
        self.mean.copy_(rows.mean(0))
        centred = (rows - self.mean).double()
        self.axes.copy_(torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :self.axes.shape[1]])
        points = (rows - self.mean) @ self.axes
        pick = torch.randperm(len(points), generator=generator).to(points.device)
        centres = points[pick[:len(self.centres)]].clone()
        for i in range(ROUNDS):
            code = _nearest(points, centres)
            sums = torch.zeros_like(centres).index_add_(0, code, points)
            sizes = torch.bincount(code, minlength=len(centres))
            anew = points[pick.roll(-(i + 1) * len(centres))[:len(centres)]]        # for those that nothing is near
            centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), anew)
        self.centres.copy_(centres)

    def forward(self, rows: Tensor) -> Tensor:
        flat = (rows.flatten(0, -2) - self.mean) @ self.axes
        return _nearest(flat, self.centres).view(rows.shape[:-1])


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([(centres.square().sum(1) - 2 * part @ centres.T).argmin(1) for part in points.split(8192)])


class Codes(Stage):
    """`first`: whether this is stage 1, or the term of later phases."""

    names = ("CE squeeze", "CE vgg", "right", "right vgg")

    def __init__(self, numbers: recipe.Codes, model: Mrt, measures: Measures, lr: float,
                 betas: tuple[float, float] = (0.9, 0.98)):
        super().__init__()
        self.numbers, self.measures, self.first = numbers, measures, True
        self.model = (model,)                       # not a part of this module
        counts, sizes = (numbers.squeeze, numbers.vgg), (512, 896)
        self.books = nn.ModuleList(Codebook(f, numbers.axes, n) for f, n in zip(sizes, counts))
        self.heads = nn.ModuleList(nn.Linear(model.config.width, n) for n in counts)
        for head in self.heads:
            nn.init.zeros_(head.weight)             # type: ignore[arg-type]
            nn.init.zeros_(head.bias)               # type: ignore[arg-type]
        self.to(next(model.parameters()).device)
        self.equip(self.heads.parameters(), lr, betas, 1.0)

    def prepare(self, crops: Crops, seed: int, file: Path | None = None) -> None:
        """Codes of `file`, or new ones, which are then written there."""
        asked = {k: getattr(self.numbers, k) for k in ("squeeze", "vgg", "axes", "examples")}
        if file and file.exists():
            tensors, about = checkpoint.load(file)
            if about == asked:
                self.books.load_state_dict(tensors)
                return
        x = crops.batch(self.numbers.examples, SIDE).permute(0, 3, 1, 2)
        generator, books = torch.Generator().manual_seed(seed), self.books
        for network, book in zip(NETWORKS, books):
            rows = torch.cat([features(self.measures, network, part).flatten(0, 2) for part in x.split(AT_ONCE)])
            book.fit(rows, generator)               # type: ignore[operator]
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(file, books.state_dict(), asked)

    @torch.no_grad()
    def targets(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> codes (B, H/16, W/16) of SqueezeNet, and of VGG for the first `count`."""
        some = (x, x[:self.numbers.count])
        return [book(features(self.measures, network, part))
                for network, book, part in zip(NETWORKS, self.books, some)]

    @contextmanager
    def tokens(self) -> Iterator[list[Tensor]]:
        """What the decoder's last pair gave inside."""
        decoder, found = self.model[0].decoder, list[Tensor]()
        last: Any = decoder.pairs[-1] if len(decoder.pairs) else decoder.row
        hook = last.register_forward_hook(
            lambda module, inputs, out: found.append(out[0] if isinstance(out, tuple) else out))
        try:
            yield found
        finally:
            hook.remove()

    def objective(self, forward: Callable[..., Any], x: Tensor, quality: Tensor, loss: Loss,
                  judge: Perceptual | None) -> tuple[Terms, Tensor | None, Tensor]:
        with self.tokens() as found:
            out = forward(x, quality)
        terms = rate_distortion(out, x, quality, loss, None if self.first else judge)
        if self.first:
            coarse = F.avg_pool2d(out["x_hat"] - x, 4).square().mean((1, 2, 3))
            terms = Terms(extreme(out["lambda"], coarse, terms.bpp), terms.mse, terms.bpp, terms.aside)
        token = F.layer_norm(found[-1].float(), found[-1].shape[-1:])
        entropies, right = [], []
        for head, wanted in zip(self.heads, self.targets(x)):
            logits = head(token[:len(wanted)]).flatten(0, 2)
            entropies.append(F.cross_entropy(logits, wanted.flatten()))
            right.append((logits.argmax(1) == wanted.flatten()).float().mean())
        weight = self.numbers.weight if self.first else self.numbers.later
        added = weight * torch.stack(entropies).mean()
        return (Terms(terms.loss + added, terms.mse, terms.bpp, terms.aside), None,
                torch.stack([*entropies, *right]).detach())
