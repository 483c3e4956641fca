"""BiWKV in Triton: float32, bfloat16 or float16 in memory, float32 sums, float64 exponents. Signatures of cpu.py.

The tokens are cut into chunks, and a program takes one chunk of BLOCK channels: G groups of R rows, a warp a group.
A thread keeps the R rows of one channel in registers, and both filters run through them as plain recurrences.

    totals    reads k, v            what a chunk hands to its right and to its left
    carries   in place, on those    what reaches a chunk from either side: a scan over chunks, 1 / 64 of the data
    outputs   reads k, v, writes y

Backward is the same with the gradient's filter in place of the first one: its totals need y and the denominator,
which are computed again from k, v and the carries of forward. That is cheaper than writing and reading both.

A sum is always a triple (n, d, a): numerator n e^a, denominator d e^a. *Narrow* programs (|w| R and |u| small: all
that a trained model has) take one exp an element, and a group of rows has one a. *Wide* ones carry a per row, as a
running log-sum-exp: always right, several times slower. A program looks at its own channels to choose, so nothing
is read back by the host. No atomics: same bits every time.
"""
# mypy: allow-untyped-defs, disable-error-code="assignment, misc, operator"
# Kernels are Triton's language: arguments get their types at launch, and tuples grow in loops that it unrolls.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # channels of a program: one a thread, so that a warp reads 64 or 128 bytes of a row
# Tokens of a chunk -> (R, G) of forward, (R, G) of backward. R rows a thread set the registers, G is the warps.
TILES = {64: ((8, 8), (4, 16)), 128: ((16, 8), (8, 16))}
# Chunks, at most -> (R, G) of the scan over them; beyond R G chunks a program goes round again, with one carry.
CARRY_TILES = ((16, (4, 4)), (64, (4, 16)), (float("inf"), (8, 16)))
LARGE = 1 << 25  # from this many elements on memory is the limit: fewer carries; below, more programs are worth more
# So that the wide path, which is rare, spills, and the narrow one does not lose warps to it.
OPTIONS = {"maxnreg": 128, "enable_fp_fusion": True}

# Exponent of an empty sum: finite, so that differences of two are not NaN; a power of two, so that float32 has it,
# and so large that taking any decay off it leaves it as it is.
NOTHING = tl.constexpr(-(2.0**126))
LOWEST = tl.constexpr(-3.4028234e38)
MOST = tl.constexpr(1e4)  # of |w| a token: beyond, other tokens count for all or for nothing
NARROW_W = tl.constexpr(16.0)  # of |w| R: a group's sums stay within e^+-16 of their unit, far inside float32
NARROW_U = tl.constexpr(20.0)


def chunk_length(batch: int, tokens: int, channels: int) -> int:
    """By shape alone: forward and backward agree on it, and a CUDA graph can be captured."""
    return 128 if batch * tokens * channels >= LARGE else 64


def aux_shape(k: Tensor) -> tuple[int, int, int, int]:
    """The carries of forward: (n, d, a) from the left, then from the right, of every chunk. None if there is one."""
    batch, tokens, channels = k.shape
    chunks = triton.cdiv(tokens, chunk_length(batch, tokens, channels))
    return batch, chunks if chunks > 1 else 0, 6, channels


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w, u, k, v = w.contiguous(), u.contiguous(), _rows_in_place(k), _rows_in_place(v)
    y, aux = v.new_empty(v.shape), k.new_empty(aux_shape(k), dtype=torch.float32)
    B, T, C = k.shape
    L = chunk_length(B, T, C)
    R, G = TILES[L][0]
    grid, chunks = _grid(B, T, C, L)
    where_from = (k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    options = {"R": R, "G": G, "BLOCK": BLOCK, "num_warps": G, **OPTIONS}
    with torch.cuda.device_of(k):
        if chunks > 1:
            _totals[grid](w, *where_from, aux, T, C, chunks, **options)
            _scan_chunks(w, aux, L)
        _outputs[grid](w, u, *where_from, aux, y, T, C, chunks, CARRIES=chunks > 1, **options)
    return y, aux


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, aux: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, u, k, v, g = w.contiguous(), u.contiguous(), _rows_in_place(k), _rows_in_place(v), _rows_in_place(g)
    gk, gv = k.new_empty(k.shape), v.new_empty(v.shape)
    B, T, C = k.shape
    L = chunk_length(B, T, C)
    R, G = TILES[L][1]
    grid, chunks = _grid(B, T, C, L)
    from_right_and_left, partial = torch.empty_like(aux), w.new_empty(2, B * chunks, C)
    strides = [stride for t in (k, v, g) for stride in t.stride()[:2]]
    options = {"R": R, "G": G, "BLOCK": BLOCK, "num_warps": G, **OPTIONS}
    with torch.cuda.device_of(k):
        if chunks > 1:
            _gradient_totals[grid](w, u, k, v, g, *strides, aux, from_right_and_left, T, C, chunks, **options)
            _scan_chunks(w, from_right_and_left, L)
        _gradients[grid](
            w, u, k, v, g, *strides, aux, from_right_and_left, gk, gv, partial, T, C, chunks,
            CARRIES=chunks > 1, **options,
        )  # fmt: skip
    return partial[0].sum(0), partial[1].sum(0), gk, gv


def _scan_chunks(w: Tensor, totals: Tensor, L: int) -> None:
    B, chunks, _, C = totals.shape
    R, G = next(tile for most, tile in CARRY_TILES if chunks <= most)
    grid = (B * 2 * triton.cdiv(C, BLOCK),)
    _carries[grid](w, totals, L, C, chunks, R=R, G=G, BLOCK=BLOCK, num_warps=G, **OPTIONS)


def _grid(batch: int, tokens: int, channels: int, length: int) -> tuple[tuple[int], int]:
    chunks = triton.cdiv(tokens, length)
    return (batch * chunks * triton.cdiv(channels, BLOCK),), chunks


def _rows_in_place(t: Tensor) -> Tensor:
    """Channels side by side in memory; batch and token may lie anyhow."""
    return t if t.stride(2) == 1 else t.contiguous()


# Kernels. Tensors are (G, BLOCK), a tuple of R of them is a chunk; w is float64 (1, BLOCK).


@triton.jit
def _totals(w_p, k_p, v_p, k_b, k_t, v_b, v_t, out_p, T, C, chunks, R: tl.constexpr, G: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    b, chunk, c, inside = _place(tl.program_id(0), C, chunks, BLOCK)
    w = _decay(w_p, c, inside)
    t = (chunk * R * G + tl.arange(0, G) * R)[:, None]
    k = _rows(k_p + b * k_b + t.to(tl.int64) * k_t + c, k_t, t, T, inside, float("-inf"), R)
    v = _rows(v_p + b * v_b + t.to(tl.int64) * v_t + c, v_t, t, T, inside, 0.0, R)
    out = out_p + (b * chunks + chunk) * 6 * C + c
    if _fits(w, R):
        base, e, x, z = _weigh(k, v, False, R)
        _store_totals(out, C, inside, base, e, x, z, w, False, R, G)
    else:
        base, e, x, z = _weigh(k, v, True, R)
        _store_totals(out, C, inside, base, e, x, z, w, True, R, G)


@triton.jit
def _carries(w_p, io_p, L, C, chunks, R: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    """What a chunk inherits. Chunks are to this what tokens are to a chunk; a program takes one side."""
    b, side, c, inside = _place(tl.program_id(0), C, 2, BLOCK)
    w = _decay(w_p, c, inside) * L
    rows = tl.arange(0, G)[:, None] * R
    io = io_p + (b * chunks * 6 + side * 3) * C + c
    n = tl.zeros([1, BLOCK], tl.float32)
    d = n
    a = tl.full([1, BLOCK], NOTHING, tl.float64)
    for first in range(0, chunks, R * G):
        exponent, x, z = (), (), ()
        for r in tl.static_range(R):
            i = first + rows + r
            # From the right the last chunk comes first.
            at = io + tl.where(side == 0, i, chunks - 1 - i).to(tl.int64) * 6 * C
            there = inside & (i < chunks)
            x += (tl.load(at, mask=there, other=0.0),)
            z += (tl.load(at + C, mask=there, other=0.0),)
            exponent += (tl.load(at + 2 * C, mask=there, other=float("-inf")).to(tl.float64),)
        zero = tl.zeros([G, BLOCK], tl.float32)
        empty = tl.full([G, BLOCK], NOTHING, tl.float64)
        gn, gd, ga, _, _, _ = _run(exponent, x, z, zero, zero, empty, w, True, True, R)
        cn, cd, ca = _gather(gn, gd, ga, n, d, a, w, True, R, G)
        _, _, _, sn, sd, sa = _run(exponent, x, z, cn, cd, ca, w, True, True, R)
        for r in tl.static_range(R):
            i = first + rows + r
            at = io + tl.where(side == 0, i, chunks - 1 - i).to(tl.int64) * 6 * C
            # The float32 exponent is exact, as what it lacks goes into n and d.
            sa32 = sa[r].to(tl.float32)
            lacks = (sa[r] - sa32.to(tl.float64)).to(tl.float32)
            f = tl.exp(tl.minimum(tl.maximum(lacks, -60.0), 60.0))
            there = inside & (i < chunks)
            tl.store(at, sn[r] * f, mask=there)
            tl.store(at + C, sd[r] * f, mask=there)
            tl.store(at + 2 * C, sa32, mask=there)
        n, d, a = _add_up(gn, gd, ga, n, d, a, w, True, R, G)


@triton.jit
def _outputs(w_p, u_p, k_p, v_p, k_b, k_t, v_b, v_t, carry_p, y_p, T, C, chunks, CARRIES: tl.constexpr,
             R: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Backwards: what _totals read last may still be in the cache.
    b, chunk, c, inside = _place(tl.num_programs(0) - 1 - tl.program_id(0), C, chunks, BLOCK)
    w = _decay(w_p, c, inside)
    u = tl.load(u_p + c, mask=inside, other=0.0).to(tl.float64)
    t = (chunk * R * G + tl.arange(0, G) * R)[:, None]
    k = _rows(k_p + b * k_b + t.to(tl.int64) * k_t + c, k_t, t, T, inside, float("-inf"), R)
    v = _rows(v_p + b * v_b + t.to(tl.int64) * v_t + c, v_t, t, T, inside, 0.0, R)
    carry = _load_carry(carry_p + (b * chunks + chunk) * 6 * C + c, C, inside, CARRIES, BLOCK)
    y = y_p + (b * T + t) * C + c
    if _fits(w, R) & _modest(u):
        _store_outputs(y, C, t, T, inside, k, v, carry, w, u, False, R, G)
    else:
        _store_outputs(y, C, t, T, inside, k, v, carry, w, u, True, R, G)


@triton.jit
def _gradient_totals(w_p, u_p, k_p, v_p, g_p, k_b, k_t, v_b, v_t, g_b, g_t, carry_p, out_p, T, C, chunks,
                     R: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b, chunk, c, inside = _place(tl.program_id(0), C, chunks, BLOCK)
    w = _decay(w_p, c, inside)
    u = tl.load(u_p + c, mask=inside, other=0.0).to(tl.float64)
    t = (chunk * R * G + tl.arange(0, G) * R)[:, None]
    k = _rows(k_p + b * k_b + t.to(tl.int64) * k_t + c, k_t, t, T, inside, float("-inf"), R)
    v = _rows(v_p + b * v_b + t.to(tl.int64) * v_t + c, v_t, t, T, inside, 0.0, R)
    g = _rows(g_p + b * g_b + t.to(tl.int64) * g_t + c, g_t, t, T, inside, 0.0, R)
    carry = _load_carry(carry_p + (b * chunks + chunk) * 6 * C + c, C, inside, True, BLOCK)
    out = out_p + (b * chunks + chunk) * 6 * C + c
    if _fits(w, R) & _modest(u):
        _store_gradient_totals(out, C, t, T, inside, k, v, g, carry, w, u, False, R, G)
    else:
        _store_gradient_totals(out, C, t, T, inside, k, v, g, carry, w, u, True, R, G)


@triton.jit
def _gradients(w_p, u_p, k_p, v_p, g_p, k_b, k_t, v_b, v_t, g_b, g_t, carry_p, gradient_carry_p, gk_p, gv_p,
               partial_p, T, C, chunks, CARRIES: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    b, chunk, c, inside = _place(tl.num_programs(0) - 1 - tl.program_id(0), C, chunks, BLOCK)
    w = _decay(w_p, c, inside)
    u = tl.load(u_p + c, mask=inside, other=0.0).to(tl.float64)
    t = (chunk * R * G + tl.arange(0, G) * R)[:, None]
    k = _rows(k_p + b * k_b + t.to(tl.int64) * k_t + c, k_t, t, T, inside, float("-inf"), R)
    v = _rows(v_p + b * v_b + t.to(tl.int64) * v_t + c, v_t, t, T, inside, 0.0, R)
    g = _rows(g_p + b * g_b + t.to(tl.int64) * g_t + c, g_t, t, T, inside, 0.0, R)
    at = (b * chunks + chunk) * 6 * C + c
    carry = _load_carry(carry_p + at, C, inside, CARRIES, BLOCK)
    back = _load_carry(gradient_carry_p + at, C, inside, CARRIES, BLOCK)
    gk, gv = gk_p + (b * T + t) * C + c, gv_p + (b * T + t) * C + c
    sums = partial_p + (b * chunks + chunk) * C + c
    all_sums = tl.num_programs(0).to(tl.int64) // tl.cdiv(C, BLOCK) * C  # from those for w to those for u
    if _fits(w, R) & _modest(u):
        _store_gradients(gk, gv, sums, sums + all_sums, C, t, T, inside, k, v, g, carry, back, w, u, False, R, G)
    else:
        _store_gradients(gk, gv, sums, sums + all_sums, C, t, T, inside, k, v, g, carry, back, w, u, True, R, G)


# What the kernels are made of.


@triton.jit
def _place(pid, C, chunks, BLOCK: tl.constexpr):
    """Batch element (int64: it multiplies strides), chunk and channels. Neighbours in a row run side by side."""
    blocks = tl.cdiv(C, BLOCK)
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    chunk = (pid // blocks) % chunks
    return (pid // (blocks * chunks)).to(tl.int64), chunk, c, c < C


@triton.jit
def _decay(w_p, c, inside):
    w = tl.load(w_p + c, mask=inside, other=0.0).to(tl.float64)
    return tl.where(w > MOST, MOST, tl.where(w < -MOST, -MOST, w))  # a NaN stays one


@triton.jit
def _fits(w, R: tl.constexpr):
    return tl.max(tl.abs(w)) * R <= NARROW_W


@triton.jit
def _modest(u):
    return tl.max(tl.abs(u)) <= NARROW_U


@triton.jit
def _rows(p, stride, t, T, inside, other: tl.constexpr, R: tl.constexpr):
    rows = ()
    for r in tl.static_range(R):
        rows += (tl.load(p + r * stride, mask=inside & (t + r < T), other=other).to(tl.float32),)
    return rows


@triton.jit
def _load_carry(p, C, inside, CARRIES: tl.constexpr, BLOCK: tl.constexpr):
    """(n, d, a) from the left, (n, d, a) from the right, (1, BLOCK) each."""
    zero = tl.zeros([1, BLOCK], tl.float32)
    nothing = tl.full([1, BLOCK], NOTHING, tl.float64)
    carry = (zero, zero, nothing, zero, zero, nothing)
    if CARRIES:
        carry = ()
        for i in tl.static_range(6):
            carry += (tl.load(p + i * C, mask=inside, other=0.0),)
        carry = (carry[0], carry[1], carry[2].to(tl.float64), carry[3], carry[4], carry[5].to(tl.float64))
    return carry


@triton.jit
def _weigh(k, v, WIDE: tl.constexpr, R: tl.constexpr):
    """The rows as exponent, numerator and denominator, and the exponent of an empty sum of them. Narrow: one
    exponent, the largest, for all rows of a group."""
    exponent, x, z = (), (), ()
    if WIDE:
        base = tl.full(k[0].shape, NOTHING, tl.float64)
        for r in tl.static_range(R):
            exponent += (k[r].to(tl.float64),)
            z += (tl.full(k[0].shape, 1.0, tl.float32),)
        x = v
    else:
        top = k[0]
        for r in tl.static_range(1, R):
            top = tl.maximum(top, k[r])
        top = tl.maximum(top, LOWEST)  # a group beyond the last token: exp(-inf - LOWEST) is 0
        base = top.to(tl.float64)
        for r in tl.static_range(R):
            e = tl.exp(k[r] - top)
            exponent += (base,)
            x += (e * v[r],)
            z += (e,)
    return base, exponent, x, z


@triton.jit
def _run(exponent, x, z, n, d, a, w, FORWARD: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr):
    """The filter s' = e^-w s + x through R rows, from (n, d, a). -> its end, and as tuples the state before each row.
    Narrow: x, z and the state are in the same unit e^a."""
    ns, ds, exponents = (), (), ()
    if not WIDE:
        rho = tl.exp(-w.to(tl.float32))
    for i in tl.static_range(R):
        # In full at each use: an index that has a name is no longer a constant to Triton.
        xr, zr = x[i if FORWARD else R - 1 - i], z[i if FORWARD else R - 1 - i]
        # Not (*ns, n), which is no part of Triton's language.
        if FORWARD:
            ns, ds, exponents = ns + (n,), ds + (d,), exponents + (a,)  # noqa: RUF005
        else:
            ns, ds, exponents = (n,) + ns, (d,) + ds, (a,) + exponents  # noqa: RUF005
        if WIDE:
            b = exponent[i if FORWARD else R - 1 - i]
            top = tl.maximum(a - w, b)
            keep, take = tl.exp((a - w - top).to(tl.float32)), tl.exp((b - top).to(tl.float32))
            n = n * keep + xr * take
            d = d * keep + zr * take
            a = top
        else:
            n = n * rho + xr
            d = d * rho + zr
    return n, d, a, ns, ds, exponents


@triton.jit
def _gather(n, d, a, cn, cd, ca, w, FORWARD: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """What reaches each group: from the groups on one side, whose totals are (n, d, a), and from the carry.
    Every pair of groups on its own, with its true distance: nothing cancels and nothing drifts."""
    source, target = tl.arange(0, G)[:, None, None], tl.arange(0, G)[None, :, None]
    if FORWARD:
        between, before = target - source - 1, tl.arange(0, G)[:, None]
    else:
        between, before = source - target - 1, G - 1 - tl.arange(0, G)[:, None]
    # The carry's exponent holds at the edge of the tile; every group in between costs R steps.
    reach = tl.where(between >= 0, a[:, None, :] - (between * R) * w[:, None, :], NOTHING)
    carried = ca - (before * R) * w
    top = tl.maximum(tl.max(reach, 0), carried)
    f = tl.where(between >= 0, tl.exp((reach - top[None, :, :]).to(tl.float32)), 0.0)
    fc = tl.exp((carried - top).to(tl.float32))
    return tl.sum(n[:, None, :] * f, 0) + cn * fc, tl.sum(d[:, None, :] * f, 0) + cd * fc, top


@triton.jit
def _add_up(n, d, a, cn, cd, ca, w, FORWARD: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """The groups' totals and the carry at the far edge of the tile: (1, BLOCK) each."""
    if FORWARD:
        between = G - 1 - tl.arange(0, G)[:, None]
    else:
        between = tl.arange(0, G)[:, None]
    reach = a - (between * R) * w
    carried = ca - (R * G) * w
    top = tl.maximum(tl.max(reach, 0)[None, :], carried)
    top = top.to(tl.float32).to(tl.float64)  # what is stored in float32 is exact: its rounding is in n and d
    f = tl.exp((reach - top).to(tl.float32))
    fc = tl.exp((carried - top).to(tl.float32))
    return tl.sum(n * f, 0)[None, :] + cn * fc, tl.sum(d * f, 0)[None, :] + cd * fc, top


@triton.jit
def _states(exponent, x, z, base, cn, cd, ca, w, FORWARD: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
            G: tl.constexpr):  # fmt: skip
    """Tuples n, d, a: what has reached each row from one side."""
    zero = tl.zeros(base.shape, tl.float32)
    n, d, a, _, _, _ = _run(exponent, x, z, zero, zero, base, w, FORWARD, WIDE, R)
    n, d, a = _gather(n, d, a, cn, cd, ca, w, FORWARD, R, G)
    if not WIDE:
        unit = tl.maximum(a, base)
        f, fc = tl.exp((base - unit).to(tl.float32)), tl.exp((a - unit).to(tl.float32))
        n, d, a = n * fc, d * fc, unit
        scaled_x, scaled_z = (), ()
        for r in tl.static_range(R):
            scaled_x += (x[r] * f,)
            scaled_z += (z[r] * f,)
        x, z = scaled_x, scaled_z
    _, _, _, ns, ds, exponents = _run(exponent, x, z, n, d, a, w, FORWARD, WIDE, R)
    return ns, ds, exponents


@triton.jit
def _quotient(x, z, exponent, ln, ld, la, rn, rd, ra, u):
    """One row's y, its denominator d e^top, top, and the weight of the row itself in that unit."""
    own = exponent + u
    top = tl.maximum(tl.maximum(la, ra), own)
    fl, fr, fo = (tl.exp((la - top).to(tl.float32)), tl.exp((ra - top).to(tl.float32)),
                  tl.exp((own - top).to(tl.float32)))  # fmt: skip
    d = ld * fl + rd * fr + z * fo
    return (ln * fl + rn * fr + x * fo) / d, d, top, z * fo


@triton.jit
def _store_totals(out, C, inside, base, exponent, x, z, w, WIDE: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    zero = tl.zeros(base.shape, tl.float32)
    nothing = tl.full(base.shape, NOTHING, tl.float64)
    none = tl.max(nothing, 0)[None, :]
    for side in tl.static_range(2):
        n, d, a, _, _, _ = _run(exponent, x, z, zero, zero, base, w, side == 0, WIDE, R)
        n, d, a = _add_up(n, d, a, 0.0, 0.0, none, w, side == 0, R, G)
        tl.store(out + (3 * side) * C, n, mask=inside)
        tl.store(out + (3 * side + 1) * C, d, mask=inside)
        tl.store(out + (3 * side + 2) * C, a.to(tl.float32), mask=inside)


@triton.jit
def _store_outputs(y, C, t, T, inside, k, v, carry, w, u, WIDE: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    base, exponent, x, z = _weigh(k, v, WIDE, R)
    rn, rd, ra = _states(exponent, x, z, base, carry[3], carry[4], carry[5], w, False, WIDE, R, G)
    ln, ld, la = _states(exponent, x, z, base, carry[0], carry[1], carry[2], w, True, WIDE, R, G)
    for r in tl.static_range(R):
        value, _, _, _ = _quotient(x[r], z[r], exponent[r], ln[r], ld[r], la[r], rn[r], rd[r], ra[r], u)
        tl.store(y + r * C, value.to(y.dtype.element_ty), mask=inside & (t + r < T))


@triton.jit
def _store_gradient_totals(out, C, t, T, inside, k, v, g, carry, w, u, WIDE: tl.constexpr, R: tl.constexpr,
                           G: tl.constexpr):  # fmt: skip
    base, exponent, x, z = _weigh(k, v, WIDE, R)
    rn, rd, ra = _states(exponent, x, z, base, carry[3], carry[4], carry[5], w, False, WIDE, R, G)
    ln, ld, la = _states(exponent, x, z, base, carry[0], carry[1], carry[2], w, True, WIDE, R, G)
    back, h, hy = (), (), ()
    for r in tl.static_range(R):
        value, d, top, _ = _quotient(x[r], z[r], exponent[r], ln[r], ld[r], la[r], rn[r], rd[r], ra[r], u)
        share = tl.where(t + r < T, g[r] / d, 0.0)
        back += (-top,)
        h += (share,)
        hy += (tl.where(t + r < T, -share * value, 0.0),)
    empty = tl.full(base.shape, NOTHING, tl.float64) if WIDE else back[0]
    _store_totals(out, C, inside, empty, back, h, hy, w, WIDE, R, G)


@triton.jit
def _store_gradients(gk_p, gv_p, gw_p, gu_p, C, t, T, inside, k, v, g, carry, reverse, w, u, WIDE: tl.constexpr,
                     R: tl.constexpr, G: tl.constexpr):  # fmt: skip
    # The kernel is symmetric: the gradients of numerator and denominator, g / d and -g y / d, run through the same
    # two filters. At every row, what came from one side pairs with what goes to the other: that is the gradient of w.
    base, exponent, x, z = _weigh(k, v, WIDE, R)
    rn, rd, ra = _states(exponent, x, z, base, carry[3], carry[4], carry[5], w, False, WIDE, R, G)
    ln, ld, la = _states(exponent, x, z, base, carry[0], carry[1], carry[2], w, True, WIDE, R, G)
    back, h, hy = (), (), ()
    gu = tl.zeros(base.shape, tl.float32)
    for r in tl.static_range(R):
        value, d, top, own = _quotient(x[r], z[r], exponent[r], ln[r], ld[r], la[r], rn[r], rd[r], ra[r], u)
        share = tl.where(t + r < T, g[r] / d, 0.0)
        back += (-top,)
        h += (share,)
        hy += (tl.where(t + r < T, -share * value, 0.0),)
        gu += tl.where(t + r < T, own * share * (v[r] - value), 0.0)
    empty = tl.full(base.shape, NOTHING, tl.float64) if WIDE else back[0]
    # fr has come from the right, so it goes to the left: with l it pairs.
    frn, frd, fra = _states(back, h, hy, empty, reverse[3], reverse[4], reverse[5], w, False, WIDE, R, G)
    fln, fld, fla = _states(back, h, hy, empty, reverse[0], reverse[1], reverse[2], w, True, WIDE, R, G)
    gw = tl.zeros(base.shape, tl.float32)
    for r in tl.static_range(R):
        through = (ln[r] * frn[r] + ld[r] * frd[r]) * tl.exp((la[r] + fra[r] - w).to(tl.float32))
        through += (rn[r] * fln[r] + rd[r] * fld[r]) * tl.exp((ra[r] + fla[r] - w).to(tl.float32))
        gw -= tl.where(t + r < T, through, 0.0)
        # Exponents of weights, so not above 0 but for a group's range: narrow, they are the same for all its rows.
        fl, fr = tl.exp((exponent[r] + fla[r]).to(tl.float32)), tl.exp((exponent[r] + fra[r]).to(tl.float32))
        fo = tl.exp((exponent[r] + u + back[r]).to(tl.float32))
        gv = z[r] * (fln[r] * fl + frn[r] * fr + h[r] * fo)
        gk = z[r] * (fld[r] * fl + frd[r] * fr + hy[r] * fo) + v[r] * gv
        there = inside & (t + r < T)
        tl.store(gv_p + r * C, gv.to(gv_p.dtype.element_ty), mask=there)
        tl.store(gk_p + r * C, gk.to(gk_p.dtype.element_ty), mask=there)
    tl.store(gw_p, tl.sum(gw, 0)[None, :], mask=inside)
    tl.store(gu_p, tl.sum(gu, 0)[None, :], mask=inside)
