"""The depthwise 5x5 convolution in Triton: float32, bfloat16 or float16 in memory, float32 sums. Signatures of cpu.py.

A program takes ROWS x COLUMNS pixels of BLOCK channels: a thread has one column of one channel and keeps its
ROWS + 4 rows of input, five columns wide, in registers; what neighbours share comes from the cache.
The input's gradient is the same kernel with the weights turned. The weight's gradient keeps the 25 sums of a
channel in registers over many tiles; programs write partial sums, which torch adds. No atomics: same bits every time.
"""
# mypy: allow-untyped-defs, disable-error-code="assignment, misc, operator"
# Kernels are Triton's language: arguments get their types at launch, and tuples grow in loops that it unrolls.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # channels of a program: one a thread, so that a warp reads 64 or 128 bytes of a pixel
ROWS, COLUMNS = 8, 8  # with a margin of two on every side 2.25 times the input is read, mostly from the cache
OPTIONS = {"maxnreg": 128, "enable_fp_fusion": True}  # two programs of 8 warps a multiprocessor, and no spills
PROGRAMS = 2048  # of the weight's gradient: fills the largest GPU several times; more would only be more partial sums


def forward(x: Tensor, weight: Tensor) -> Tensor:
    return _convolve(x.contiguous(), weight.contiguous(), turned=False)


def backward(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x, g, weight = x.contiguous(), g.contiguous(), weight.contiguous()
    B, H, W, C = x.shape
    tiles, blocks = B * triton.cdiv(H, ROWS) * triton.cdiv(W, COLUMNS), triton.cdiv(C, BLOCK)
    share = triton.cdiv(tiles * blocks, PROGRAMS)  # tiles that one program adds up
    programs = triton.cdiv(tiles, share)
    partial = weight.new_empty(programs, 25, C)
    with torch.cuda.device_of(x):
        _weight_gradient[(programs * blocks,)](
            x, g, partial, H, W, C, tiles, share, ROWS=ROWS, COLUMNS=COLUMNS, BLOCK=BLOCK,
            num_warps=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return _convolve(g, weight, turned=True).to(x.dtype), partial.sum(0)


def _convolve(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    B, H, W, C = x.shape
    y = x.new_empty(x.shape)
    grid = (B * triton.cdiv(H, ROWS) * triton.cdiv(W, COLUMNS) * triton.cdiv(C, BLOCK),)
    with torch.cuda.device_of(x):
        _convolution[grid](
            x, weight, y, H, W, C, TURNED=turned, ROWS=ROWS, COLUMNS=COLUMNS, BLOCK=BLOCK,
            num_warps=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return y


@triton.jit
def _convolution(x_p, weight_p, y_p, H, W, C, TURNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    b, top, column = _tile(tl.program_id(0) // blocks, H, W, ROWS, COLUMNS)
    weight = ()
    for tap in tl.static_range(25):
        weight += (tl.load(weight_p + (24 - tap if TURNED else tap) * C + c, mask=c < C, other=0.0),)
    x = _window(x_p + b * H * W * C + c, top, column, H, W, C, c < C, ROWS)
    out = ()
    for row in tl.static_range(ROWS):
        y = x[row * 5] * weight[0]
        for tap in tl.static_range(1, 25):
            y += x[row * 5 + tap] * weight[tap]
        out += (y,)
    # Stored at the end: the compiler moves no load across a store, as it cannot know that they do not overlap.
    for row in tl.static_range(ROWS):
        at = y_p + (b * H * W + (top + row) * W + column) * C + c
        there = (c < C) & (column < W) & (top + row < H)
        tl.store(at, out[row].to(y_p.dtype.element_ty), mask=there)


@triton.jit
def _weight_gradient(x_p, g_p, partial_p, H, W, C, tiles, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    program = tl.program_id(0) // blocks
    sums = ()
    for _ in tl.static_range(25):
        sums += (tl.zeros([COLUMNS, BLOCK], tl.float32),)
    for i in range(share):
        tile = program * share + i
        inside = c < tl.where(tile < tiles, C, 0)  # the last program may have fewer tiles
        b, top, column = _tile(tile, H, W, ROWS, COLUMNS)
        x = _window(x_p + b * H * W * C + c, top, column, H, W, C, inside, ROWS)
        g = ()
        for row in tl.static_range(ROWS):
            at = g_p + (b * H * W + (top + row) * W + column) * C + c
            there = inside & (column < W) & (top + row < H)
            g += (tl.load(at, mask=there, other=0.0).to(tl.float32),)
        added = ()
        for tap in tl.static_range(25):
            # A tile's own sum first: 64 terms, then as many as there are tiles, rounds less than all in one row.
            own = x[tap] * g[0]
            for row in tl.static_range(1, ROWS):
                own += x[row * 5 + tap] * g[row]
            added += (sums[tap] + own,)
        sums = added
    for tap in tl.static_range(25):
        total = tl.sum(sums[tap], 0)[None, :]
        tl.store(partial_p + (program.to(tl.int64) * 25 + tap) * C + c, total, mask=c < C)


@triton.jit
def _tile(index, H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """-> batch element (int64: it multiplies the size of a picture), first row (1, 1), columns (COLUMNS, 1)."""
    across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    column = (index % across) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    top = tl.zeros([1, 1], tl.int32) + (index // across) % down * ROWS
    return (index // (across * down)).to(tl.int64), top, column


@triton.jit
def _window(p, top, column, H, W, C, inside, ROWS: tl.constexpr):
    """The input under a tile, row by row from two above, five columns each: what tap 5 i + j of output row r sees
    is entry 5 (r + i) + j. Zeros outside the picture."""
    x = ()
    for row in tl.static_range(ROWS + 4):
        i = top + row - 2
        for j in tl.static_range(5):
            at = column + j - 2
            there = inside & (i >= 0) & (i < H) & (at >= 0) & (at < W)
            x += (tl.load(p + (i.to(tl.int64) * W + at) * C, mask=there, other=0.0).to(tl.float32),)
    return x
