"""Densities of the hyper latent z: one learned distribution per channel, independent of position.

likelihood(z): (..., C) -> probability of the unit bin around each value. cdf(x): (N, C) float64 -> (N, C).
`frequencies()` turns the trained density into tables: the range is found by bisection on the cumulative, so there
are no quantile parameters, no auxiliary loss and nothing to call before coding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.entropy.rounding import LIKELIHOOD_MIN, bounded

Z_LIMIT = 255  # |z| that a file may hold
_TAIL = 2.0**-24  # what may lie outside a table on each side: one count of the coder


class Density(nn.Module):
    """Common part; a subclass gives `cdf`. `median`: what z is rounded relative to, 0 but in imported checkpoints."""

    median: Tensor | float

    def symbols(self, z: Tensor) -> Tensor:
        """What a file holds for z: integers, as floats."""
        return torch.round(z - self.median).clamp(-Z_LIMIT, Z_LIMIT)

    def cdf(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def likelihood(self, z: Tensor) -> Tensor:
        return bounded(self.cdf(z + 0.5) - self.cdf(z - 0.5), LIKELIHOOD_MIN)

    @torch.no_grad()
    def bounds(self, channels: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest integer of each channel's table, by bisection of the cumulative."""
        found = []
        for target in (_TAIL, 1 - _TAIL):
            low = torch.full((channels,), -float(Z_LIMIT) - 1, dtype=torch.float64)
            high = -low
            for _ in range(60):
                middle = (low + high) / 2
                above = self.cdf((middle + self.median)[None])[0] < target
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            found.append(high)
        first = found[0].floor().clamp(-Z_LIMIT, Z_LIMIT)
        # At least one regular entry beside the escape.
        return first.long(), torch.maximum(found[1].ceil().clamp(-Z_LIMIT, Z_LIMIT), first).long()

    @torch.no_grad()
    def probabilities(self, channels: int) -> list[tuple[int, list[float]]]:
        """Per channel: (symbol of the first entry, [probability of each symbol ..., of all others])."""
        first, last = self.bounds(channels)
        out = []
        for c in range(channels):
            edges = torch.arange(int(first[c]), int(last[c]) + 2, dtype=torch.float64) - 0.5
            cumulative = self.cdf(edges[:, None].expand(-1, channels) + self.median)[:, c]
            p = (cumulative[1:] - cumulative[:-1]).clamp_min(0).tolist()
            out.append((int(first[c]), [*p, max(0.0, 1 - sum(p))]))
        return out


class LogisticMixture(Density):
    """Three logistic components a channel. (Our small presets: fewer operations than `Factorized`, equal rate.)"""

    def __init__(self, channels: int):
        super().__init__()
        self.median = 0.0
        self.logit = nn.Parameter(torch.zeros(channels, 3))
        self.mean = nn.Parameter(torch.tensor([[-1.0, 0.0, 1.0]] * channels))
        self.ln_scale = nn.Parameter(torch.zeros(channels, 3))

    def cdf(self, x: Tensor) -> Tensor:
        t = (x[..., None] - self.mean.to(x.dtype)) * torch.exp(-self.ln_scale.to(x.dtype).clamp(-3, 6))
        return (torch.softmax(self.logit.to(x.dtype), 1) * torch.sigmoid(t)).sum(-1)


class Factorized(Density):
    """The monotone network of Balle et al. 2018 (appendix 6.1) per channel: widths 1-3-3-3-3-1, as in LALIC."""

    WIDTHS = (1, 3, 3, 3, 3, 1)

    def __init__(self, channels: int, init_scale: float = 10.0):
        super().__init__()
        self.register_buffer("median", torch.zeros(channels))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        step = init_scale ** (1 / (len(self.WIDTHS) - 1))
        for i, o in zip(self.WIDTHS, self.WIDTHS[1:]):
            start = torch.log(torch.expm1(torch.tensor(1 / step / o)))
            self.matrices.append(nn.Parameter(start.repeat(channels, o, i)))
            self.biases.append(nn.Parameter(torch.empty(channels, o, 1).uniform_(-0.5, 0.5)))
            if o > 1:
                self.factors.append(nn.Parameter(torch.zeros(channels, o, 1)))

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> logit of the cumulative, same shape."""
        t = x.reshape(-1, x.shape[-1]).T[:, None]  # C, 1, N
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases)):
            t = F.softplus(matrix.to(x.dtype)) @ t + bias.to(x.dtype)
            if i < len(self.factors):
                t = t + torch.tanh(self.factors[i].to(x.dtype)) * torch.tanh(t)
        return t[:, 0].T.reshape(x.shape)

    def cdf(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(x))

    def likelihood(self, z: Tensor) -> Tensor:
        low, high = self.logits(z - 0.5), self.logits(z + 0.5)
        # On the far side of the median the difference of two numbers near 1 would cancel: mirror it.
        sign = -torch.sign(low + high).detach()
        p = (torch.sigmoid(sign * high) - torch.sigmoid(sign * low)).abs()
        return bounded(p, LIKELIHOOD_MIN)
