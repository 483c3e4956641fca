"""Checkerboard halves of a latent grid, and the anchor neighbours of every non-anchor.

Anchors are the positions with row + column even; they are coded first. A half of (B, H, W, C), W even, is
(B, H, W/2, C): row r keeps its positions in column order.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# The taps of a 5x5 kernel around a non-anchor at which anchors lie: 12 of 25.
TAPS = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if (i + j) % 2]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) -> anchors, non-anchors."""
    b, h, w, c = x.shape
    q = x.view(b, h // 2, 2, w // 2, 2, c)
    anchors = torch.stack([q[:, :, 0, :, 0], q[:, :, 1, :, 1]], 2)
    others = torch.stack([q[:, :, 0, :, 1], q[:, :, 1, :, 0]], 2)
    return anchors.view(b, h, w // 2, c), others.view(b, h, w // 2, c)


def join(anchors: Tensor, others: Tensor) -> Tensor:
    """The inverse of `split`."""
    b, h, w, c = anchors.shape
    a, o = anchors.view(b, h // 2, 2, w, c), others.view(b, h // 2, 2, w, c)
    even = torch.stack([a[:, :, 0], o[:, :, 0]], 3)
    odd = torch.stack([o[:, :, 1], a[:, :, 1]], 3)
    return torch.stack([even, odd], 2).view(b, h, 2 * w, c)


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
