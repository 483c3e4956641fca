"""Checkerboard halves of a latent grid, and the anchor neighbours of every non-anchor.

Anchors are the positions with row + column even; they are coded first. A half of (B, H, W, C), W even, is
(B, H, W/2, C): row r keeps its positions in column order.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The taps of a 5x5 kernel around a non-anchor at which anchors lie: 12 of 25.
TAPS = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if (i + j) % 2]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) -> anchors, non-anchors."""
    halves: tuple[Tensor, Tensor] = _Split.apply(x)
    return halves


def join(anchors: Tensor, others: Tensor) -> Tensor:
    """The inverse of `split`."""
    whole: Tensor = _Join.apply(anchors, others)
    return whole


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    b, h, w, c = x.shape
    anchors, others = (x.new_empty(b, h, w // 2, c) for _ in range(2))
    for row in (0, 1):
        anchors[:, row::2] = x[:, row::2, row::2]
        others[:, row::2] = x[:, row::2, 1 - row :: 2]
    return anchors, others


def _join(anchors: Tensor, others: Tensor) -> Tensor:
    b, h, w, c = anchors.shape
    x = anchors.new_empty(b, h, 2 * w, c)
    for row in (0, 1):
        x[:, row::2, row::2] = anchors[:, row::2]
        x[:, row::2, 1 - row :: 2] = others[:, row::2]
    return x


# Each is the other's gradient. As slices of autograd they would be the most frequent operations of a training step.
class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return _split(x)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return join(*g)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor) -> Tensor:
        return _join(anchors, others)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return split(g)


@lru_cache(maxsize=32)
def _neighbours(h: int, w: int, device: torch.device) -> Tensor:
    """For each non-anchor, in the half's order, where its 12 neighbours lie in the other half; h*w/2 where outside."""
    row = torch.arange(h)[:, None].expand(h, w // 2)
    column = 2 * torch.arange(w // 2)[None] + (1 - row % 2)
    found = []
    for i, j in TAPS:
        r, c = row + i, column + j
        inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)
        found.append(torch.where(inside, r * (w // 2) + c.div(2, rounding_mode="floor"), h * w // 2))
    return torch.stack(found, 2).reshape(-1).to(device)


def anchors_around(anchors: Tensor) -> Tensor:
    """Anchors (B, H, W/2, C) -> (B, H, W/2, 12 C): the rows of a masked 5x5 convolution at the non-anchors."""
    b, h, half, c = anchors.shape
    flat = F.pad(anchors.reshape(b, h * half, c), (0, 0, 0, 1))  # one row of zeros for what lies outside
    with torch.inference_mode(False):
        index = _neighbours(h, 2 * half, anchors.device)
    return flat.index_select(1, index).view(b, h, half, 12 * c)
