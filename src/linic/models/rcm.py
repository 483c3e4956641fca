"""RCM: the model of MRT's tokens. Known tokens -> mean and ln scale of the next ones.

A linear predictor, and beside it causal RWKV blocks over the tokens in coding order. Which tokens a token may look at,
and along which sequences: tokens.Order, tokens.Slots. (B, T, C): T tokens of a frame.
lower_mrt.py writes it as an integer program: bounds are those of normative blocks (blocks.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.entropy.rounding import bounded
from linic.models.blocks import QualityRow
from linic.models.config import MrtConfig
from linic.models.tokens import Order, Slots, neighbours


class CausalBlock(nn.Module):
    """RWKV block over tokens in coding order: x + gate * out(WKV over the sequence so far), then a Channel Mix.

    Both mixes see, beside the token itself, its known neighbours, each channel weighed on its own: what Omni-Shift is
    to a picture. Bounds as in normative blocks (blocks.py): k +-4.8, v +-16, gates +-8, residual +-64.
    """

    def __init__(self, channels: int, neighbours: int, kind: int):
        super().__init__()
        self.kind = kind        # which of the order's sequences
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.near1 = nn.Parameter(torch.randn(neighbours, channels) * 0.2 / neighbours)
        self.near2 = nn.Parameter(torch.randn(neighbours, channels) * 0.2 / neighbours)
        self.kvr = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.kr = nn.Linear(channels, 3 * channels, bias=False)         # [hidden 2x | gate]
        self.last = nn.Linear(2 * channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.last.weight)
        self.w = nn.Parameter(torch.linspace(-3, 3, channels))
        self.u = nn.Parameter(torch.zeros(channels))

    def decay(self) -> tuple[Tensor, Tensor]:
        """Decay a token, in nats: .0005 .. .2231; bonus of the token itself."""
        return 0.2226 * torch.sigmoid(self.w) + 0.0005, 3 * torch.tanh(self.u / 3)

    def mix(self, k: Tensor, v: Tensor, r: Tensor, sequence: Tensor) -> Tensor:
        return torch.sigmoid(r) * self.wkv(k, v, sequence)

    def wkv(self, k: Tensor, v: Tensor, sequence: Tensor) -> Tensor:
        """k, v (B, T, C) -> causal weighted means of v along the sequences (n, t), (B, T, C)."""
        b, count, c = k.shape
        t = sequence.shape[1]
        e = F.pad(torch.exp(k), (0, 0, 0, 1))                                   # 0 where there is no token
        both = torch.stack([e * F.pad(v, (0, 0, 0, 1)), e], 1)                  # B, 2, T + 1, C
        both = both[:, :, sequence.reshape(-1)].view(-1, t, c)                  # B 2 n, t, C
        distance = torch.arange(t, device=k.device)[:, None] - torch.arange(t, device=k.device)[None] - 1
        w, u = self.decay()
        past = torch.exp(-distance.clamp_min(0) * w[:, None, None])
        weight = torch.where(distance >= 0, past, torch.where(distance == -1, torch.exp(u)[:, None, None], 0.0))
        sums = torch.bmm(weight, both.permute(2, 1, 0)).permute(2, 1, 0)        # over C: (t, t) x (t, B 2 n)
        num, den = sums.reshape(b, 2, -1, c).unbind(1)
        flat = sequence.reshape(-1)
        y = k.new_zeros(b, count + 1, c)
        y[:, flat] = num / den.clamp_min(1e-9)
        return y[:, :count]

    def forward(self, x: Tensor, order: Order | Slots) -> Tensor:
        """(B, T, C) -> same."""
        c = x.shape[2]
        s = near(self.norm1(x), self.near1, order)
        k, v, r = self.kvr(s).split(c, 2)
        k, v, r = bounded(k, -4.8, 4.8), bounded(v, -16, 16), bounded(r, -8, 8)
        sequence = order.sequences[self.kind % len(order.sequences)]
        x = (x + self.out(self.mix(k, v, r, sequence))).clamp(-64, 64)
        k, r = self.kr(near(self.norm2(x), self.near2, order)).split((2 * c, c), 2)
        k = torch.relu(k).clamp(max=16)
        return (x + torch.sigmoid(bounded(r, -8, 8)) * self.last(k * k)).clamp(-64, 64)


class CausalAttention(CausalBlock):
    """The same with softmax attention along the sequences in place of WKV; r is the query. Distance is a penalty of its
    own for each head. Floats only: an ablation."""

    def __init__(self, channels: int, neighbours: int, kind: int):
        super().__init__(channels, neighbours, kind)
        del self.w, self.u
        self.heads = channels // 32
        self.slope = nn.Parameter(-torch.arange(1.0, self.heads + 1))      # ln

    def mix(self, k: Tensor, v: Tensor, r: Tensor, sequence: Tensor) -> Tensor:
        b, count, c = k.shape
        n, t = sequence.shape
        rkv = F.pad(torch.stack([r, k, v]), (0, 0, 0, 1))[:, :, sequence.reshape(-1)]
        r, k, v = rkv.view(3, b * n, t, self.heads, c // self.heads).transpose(2, 3)
        distance = torch.arange(t, device=k.device)[:, None] - torch.arange(t, device=k.device)[None]
        bias = torch.where(distance >= 0, -distance * torch.exp(self.slope)[:, None, None], -math.inf)
        mixed = F.scaled_dot_product_attention(r, k, v, bias.to(v.dtype)).transpose(1, 2)
        y = k.new_zeros(b, count + 1, c)
        y[:, sequence.reshape(-1)] = mixed.reshape(b, n * t, c)
        return y[:, :count]


def gather(x: Tensor, order: Order | Slots) -> Tensor:
    """(B, T, C) -> (B, T, offsets, C): the known neighbours, zeros for the others."""
    index = order.neighbours
    return F.pad(x, (0, 0, 0, 1))[:, index.reshape(-1)].view(len(x), *index.shape, x.shape[2])


def near(x: Tensor, weight: Tensor, order: Order | Slots) -> Tensor:
    return x + (gather(x, order) * weight).sum(2)


class Rcm(nn.Module):
    """Known tokens -> mean and ln scale of the next ones: a network, and beside it a linear predictor."""

    def __init__(self, config: MrtConfig):
        super().__init__()
        c, width, n = config.latents, config.rcm_width, neighbours(config.tokens, config.order)
        kind = CausalBlock if config.rcm == "rwkv" else CausalAttention
        self.first = nn.Linear(n * (c + 1), width)
        self.linear = nn.Linear(n * (c + 1), c)
        self.row = QualityRow(width)
        self.blocks = nn.ModuleList(kind(width, n, i) for i in range(config.rcm_depth))
        self.norm = nn.LayerNorm(width)
        self.mean, self.scale = nn.Linear(width, c), nn.Linear(width, c)
        for part in (self.linear, self.mean, self.scale):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        self.slot = None if config.tokens == "cells" else nn.Parameter(torch.randn(config.slots, width) * 0.02)

    def features(self, known: Tensor, order: Order | Slots) -> Tensor:
        """(B, T, C) -> (B, T, offsets (C + 1)): each neighbour's values, then 1 where it is known."""
        return gather(F.pad(known, (0, 1), value=1.0), order).flatten(2)

    def forward(self, known: Tensor, l: Tensor, order: Order | Slots) -> tuple[Tensor, Tensor]:
        """known (B, T, C), tokens in units of their deviation: row t of the result depends on rows coded before alone.
        -> mean in the same unit, ln scale relative to the prior."""
        f = self.features(known, order)
        x = self.row(self.first(f)[:, None], l)[:, 0]
        if self.slot is not None and isinstance(order, Slots):
            x = x + self.slot[order.slot]
        x = x.clamp(-64, 64)
        for block in self.blocks:
            x = block(x, order)
        x = self.norm(x)
        return (self.mean(x) + self.linear(f)).clamp(-16, 16), self.scale(x).clamp(-16, 16)
