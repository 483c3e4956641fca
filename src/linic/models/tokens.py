"""Where MRT's tokens lie: windows of a picture, the order in which tokens are coded, window cosine transforms (mrt.py).

All of it follows from sizes alone. Tensors are made once for a size and a device.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from linic.models.blocks import depth_to_space, space_to_depth

PATCH = 16              # pixels: side of a patch
FADE = 6                # pixels on each side of a window's border
CHROMA = 3.5            # frequency of a luma coefficient over that of an equally strong chroma one
_T = TypeVar("_T")


def cuts(n: int, most: int, between: bool = False) -> list[tuple[int, int]]:
    """n positions in the fewest windows of at most `most`, sizes differing by at most 1. between: windows around the
    borders of those."""
    count = -(-n // most)
    edges = [i * n // count for i in range(count + 1)]
    if between:
        edges = [0, *((a + b) // 2 for a, b in zip(edges, edges[1:])), n]
    return [(a, b) for a, b in zip(edges, edges[1:]) if a < b]


def _placed(x: _T, device: torch.device | str) -> _T:
    """The same with its tensors on a device. Named tuples, lists and objects of this module are gone through."""
    placed: Any = x
    if isinstance(x, Tensor):
        placed = x.to(device)
    elif isinstance(x, tuple) and hasattr(x, "_make"):
        placed = x._make(_placed(v, device) for v in x)
    elif isinstance(x, list):
        placed = [_placed(v, device) for v in x]
    elif isinstance(x, (Order, Slots)):
        vars(x).update({name: _placed(v, device) for name, v in vars(x).items()})
    return placed


class Window(NamedTuple):
    """The windows of one size, a x b. All of `patches` (n, a b) in row order."""

    a: int
    b: int
    patches: Tensor


@lru_cache(maxsize=256)
def windows(h: int, w: int, most: int, between: bool, device: torch.device | str = "cpu") -> list[Window]:
    """The windows of a grid, those of equal size together."""
    with torch.device("cpu"), torch.inference_mode(False):      # what is kept must serve training too
        position = torch.arange(h * w).view(h, w)
        found: dict[tuple[int, int], list[Tensor]] = {}
        for top, bottom in cuts(h, most, between):
            for left, right in cuts(w, most, between):
                found.setdefault((bottom - top, right - left), []).append(position[top:bottom, left:right].reshape(-1))
        return _placed([Window(a, b, torch.stack(parts)) for (a, b), parts in found.items()], device)


# --- order of 32 px cells -------------------------------------------------------------------------------------------

# Neighbours that may be known when a token is coded. Staggered rows know those above up to two columns ahead.
OFFSETS = {
    "staggered": ((0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1), (-2, -1), (-2, 0), (-2, 1), (-2, 2)),
    "windows": ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1), (0, -2), (-2, 0), (0, 2), (2, 0)),
}


class Order:
    """In which step each token of a frame (h, w) is coded, and what it may look at.

    staggered: every row two columns behind the one above, the whole frame in w + 2 (h - 1) steps. Sequences: rows and
    columns, in turns. windows: all windows in lockstep, row order within a window. Sequences: the windows.
    sequence: the same, but a token knows only the two before it in its window.
    step (h w,); neighbours (h w, offsets): position, or h w where not yet known; sequences: [(n, t) positions, h w
    where a sequence is shorter], one entry a kind.
    """

    def __init__(self, h: int, w: int, kind: str, window: int):
        self.count, none = h * w, h * w
        row, column = torch.arange(h)[:, None].expand(h, w), torch.arange(w)[None].expand(h, w)
        position = row * w + column
        if kind == "staggered":
            step = 2 * row + column
            self.sequences = [position, position.T.contiguous()]
        else:
            step, most = torch.empty(h, w, dtype=torch.long), max(b - a for a, b in cuts(w, window))
            parts = []
            for top, bottom in cuts(h, window):
                for left, right in cuts(w, window):
                    i, j = torch.arange(bottom - top)[:, None], torch.arange(right - left)[None]
                    step[top:bottom, left:right] = i * most + j
                    parts.append(position[top:bottom, left:right].reshape(-1))
            longest = max(map(len, parts))
            self.sequences = [torch.stack([F.pad(p, (0, longest - len(p)), value=none) for p in parts])]
        self.step = step.reshape(-1)
        if kind == "sequence":
            self.neighbours = _before(self.sequences[0], self.count)
            return
        found = []
        for up, left in OFFSETS[kind]:
            r, c = row + up, column + left
            n = r.clamp(0, h - 1) * w + c.clamp(0, w - 1)
            known = (r >= 0) & (r < h) & (c >= 0) & (c < w) & (self.step[n] < step)
            found.append(torch.where(known, n, none).reshape(-1))
        self.neighbours = torch.stack(found, 1)


def _before(sequences: Tensor, count: int) -> Tensor:
    """(n, t) positions -> (count, 2): the one before each, and the one before that; `count` where there is none."""
    padded = F.pad(sequences, (2, 0), value=count)
    out = torch.full((count + 1, 2), count)
    out[sequences] = torch.stack([padded[:, 1:-1], padded[:, :-2]], 2)
    return out[:-1]


@lru_cache(maxsize=256)
def order(h: int, w: int, kind: str, window: int, device: torch.device | str = "cpu") -> Order:
    with torch.device("cpu"), torch.inference_mode(False):
        return _placed(Order(h, w, kind, window), device)


# --- latent tokens of windows ---------------------------------------------------------------------------------------

ADJACENT = ((-1, 0), (0, -1), (0, 1), (1, 0))       # windows that a token sees, beside the two tokens before it


class Part(NamedTuple):
    """The n windows of a x b patches, all of which have t tokens."""

    a: int
    b: int
    patches: Tensor     # (n, a b) positions in the picture's grid
    tokens: Tensor      # (n, t) places among all tokens
    places: Tensor      # (n, t) places among all slots: window * most + slot
    slots: Tensor       # (t,)


class Slots:
    """Latent tokens of a picture of h x w patches: `most` slots in a full window of 16 x 16 patches, in smaller ones as
    many as their area has, spread evenly, at least 4. Tokens lie window after window; step k codes slot k of all
    windows. Attributes as in Order; slot (T,), place (T,) of each token, `present` (windows * most, 1): 1 where a slot
    has a token.
    """

    def __init__(self, h: int, w: int, most: int, window: int, across: bool):
        rows, columns = cuts(h, window), cuts(w, window)
        self.grid, self.size, self.most = (len(rows), len(columns)), (h, w), most
        self.fades = [_fade(rows), _fade(columns)]
        position = torch.arange(h * w).view(h, w)
        first, groups, slots = 0, dict[tuple[int, int], list[list[Tensor]]](), list[Tensor]()
        starts, lengths = [], []
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                a, b = bottom - top, right - left
                t = min(most, 4 * math.ceil(most * a * b / 1024))
                slot = torch.arange(t) * most // t
                place = (i * len(columns) + j) * most + slot
                groups.setdefault((a, b), []).append([position[top:bottom, left:right].reshape(-1),
                                                      torch.arange(first, first + t), place, slot])
                slots.append(slot)
                starts.append(first)
                lengths.append(t)
                first += t
        self.parts = []
        for (a, b), some in groups.items():
            patches, tokens, places = (torch.stack([window[i] for window in some]) for i in range(3))
            self.parts.append(Part(a, b, patches, tokens, places, some[0][3]))
        self.count, longest = first, max(lengths)
        self.slot = self.step = torch.cat(slots)
        self.place = torch.cat([n * most + s for n, s in enumerate(slots)])
        self.present = torch.zeros(len(slots) * most, 1)
        self.present[self.place] = 1
        self.sequences = [torch.stack([F.pad(torch.arange(s, s + t), (0, longest - t), value=first)
                                       for s, t in zip(starts, lengths)])]
        self.neighbours = _before(self.sequences[0], first)
        if across:
            start, length = (torch.tensor(x).view(self.grid) for x in (starts, lengths))
            window_of = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(lengths))
            others = [self._latest(window_of, i, j, start, length) for i, j in ADJACENT]
            self.neighbours = torch.cat([self.neighbours, torch.stack(others, 1)], 1)

    def _latest(self, window_of: Tensor, i: int, j: int, start: Tensor, length: Tensor) -> Tensor:
        """For each token the last one coded before it in the window i rows and j columns away."""
        rows, columns = self.grid
        r, c = window_of // columns + i, window_of % columns + j
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
        r, c = r.clamp(0, rows - 1), c.clamp(0, columns - 1)
        # Slots k most // t below s: those with k < s t / most.
        before = -(-self.slot * length[r, c] // self.most)
        return torch.where(inside & (before > 0), start[r, c] + before - 1, self.count)


def _fade(cuts: list[tuple[int, int]]) -> list[Tensor]:
    """For each pixel its mirror image across the next window border, and how much of that it takes."""
    mirror, share, near = torch.arange(PATCH * cuts[-1][1]), torch.zeros(PATCH * cuts[-1][1]), torch.arange(FADE)
    for _, end in cuts[:-1]:
        before, after = PATCH * end - 1 - near, PATCH * end + near
        mirror[before], mirror[after] = after, before
        share[before] = share[after] = 0.5 - 0.5 * (near + 0.5) / FADE
    return [mirror, share]


@lru_cache(maxsize=64)
def slots(h: int, w: int, most: int, window: int, across: bool, device: torch.device | str = "cpu") -> Slots:
    with torch.device("cpu"), torch.inference_mode(False):
        return _placed(Slots(h, w, most, window, across), device)


def neighbours(tokens: str, kind: str) -> int:
    """How many a token may look at."""
    if kind == "sequence":
        return 2
    return len(OFFSETS[kind]) if tokens == "cells" else 2 + len(ADJACENT)


# --- cosine transforms of windows -----------------------------------------------------------------------------------


def strongest(a: int, b: int, count: int) -> list[tuple[int, int, int]]:
    """The `count` coefficients (plane, u, v) of a window of a x b patches that pictures fill most, strongest first.

    By spatial frequency alone, so that any window size has its list: u/a + v/b, for chroma CHROMA times that. Such
    lists keep as much of pictures as a ranking by variances measured on 128 crops (docs/mrt.md).
    """
    reach = 8 + 4 * math.isqrt(count)       # nothing in the list lies beyond
    found = [((CHROMA if plane else 1.0) * (u * b + v * a), plane, u, v) for plane in range(3)
             for u in range(min(PATCH * a, reach)) for v in range(min(PATCH * b, reach))]
    return [(plane, u, v) for _, plane, u, v in sorted(found)[:count]]


class Basis(NamedTuple):
    """Of windows of a x b patches: cosines (U, 16 a) and (V, 16 b), places of the chosen ones in (3, U, V)."""

    rows: Tensor
    columns: Tensor
    chosen: Tensor


@lru_cache(maxsize=64)
def basis(a: int, b: int, count: int, device: torch.device | str = "cpu") -> Basis:
    with torch.device("cpu"), torch.inference_mode(False):
        planes, us, vs = torch.tensor(strongest(a, b, count)).T
        u, v = int(us.max()) + 1, int(vs.max()) + 1
        return _placed(Basis(_cosines(PATCH * a, u), _cosines(PATCH * b, v), (planes * u + us) * v + vs), device)


def _cosines(n: int, count: int) -> Tensor:
    """The first rows of the orthonormal DCT-II of n points."""
    u, x = torch.arange(count, dtype=torch.double)[:, None], torch.arange(n, dtype=torch.double)
    c = math.sqrt(2 / n) * torch.cos(math.pi / n * (x + 0.5) * u)
    c[0] /= math.sqrt(2)
    return c.float()


@lru_cache(maxsize=8)
def _opponent(device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal colours, rows: grey, blue against yellow, red against green."""
    with torch.device("cpu"), torch.inference_mode(False):
        rows = torch.tensor([[1.0, 1, 1], [-1, -1, 2], [1, -1, 0]])
        return (rows / rows.norm(dim=1, keepdim=True)).to(device)


def to_frequencies(x: Tensor, slots: Slots, channels: int) -> Tensor:
    """Picture (B, H, W, 3) -> strongest coefficients of each window as its tokens, (B, T, C)."""
    n, (h, w) = len(x), slots.size
    x = space_to_depth(x @ _opponent(x.device).T.to(x.dtype), PATCH).view(n, h * w, -1)
    y = x.new_zeros(n, slots.count, channels)
    for a, b, patches, tokens, *_ in slots.parts:
        rows, columns, chosen = basis(a, b, tokens.shape[1] * channels, x.device)
        part = x[:, patches.reshape(-1)].view(-1, a, b, PATCH, PATCH, 3).permute(0, 5, 1, 3, 2, 4)
        part = rows.to(x.dtype) @ part.reshape(-1, 3, PATCH * a, PATCH * b) @ columns.T.to(x.dtype)
        y[:, tokens.reshape(-1)] = part.flatten(1)[:, chosen].view(n, -1, channels)
    return y


def from_frequencies(y: Tensor, slots: Slots) -> Tensor:
    """(B, T, C) -> (B, H, W, 3): the transposed map, then windows faded into each other at their borders."""
    n, (h, w) = len(y), slots.size
    x = y.new_zeros(n, h * w, PATCH * PATCH * 3)
    for a, b, patches, tokens, *_ in slots.parts:
        rows, columns, chosen = basis(a, b, tokens.shape[1] * y.shape[2], y.device)
        part = y.new_zeros(n * len(tokens), 3 * len(rows) * len(columns))
        part[:, chosen] = y[:, tokens.reshape(-1)].reshape(len(part), -1)
        part = rows.T.to(y.dtype) @ part.view(-1, 3, len(rows), len(columns)) @ columns.to(y.dtype)
        part = part.view(-1, 3, a, PATCH, b, PATCH).permute(0, 2, 4, 3, 5, 1)
        x[:, patches.reshape(-1)] = part.reshape(n, -1, PATCH * PATCH * 3)
    x = depth_to_space(x.view(n, h, w, -1), PATCH) @ _opponent(y.device).to(y.dtype)
    for dim, (mirror, share) in enumerate(slots.fades, 1):
        x = x + share.to(x.dtype).view(-1, *[1] * (3 - dim)) * (x.index_select(dim, mirror) - x)
    return x
