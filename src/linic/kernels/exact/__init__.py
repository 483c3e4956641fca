"""The compiled integer kernels (exact.cpp), loaded through ctypes: what normative programs run on where they are here.

`lib` is the library or None, `missing` the reason why not. LINIC_NO_NATIVE=1 leaves it out, LINIC_ISA names the
instruction set instead of the best; both are read at import. Registers are int32 (B, H, W, C) with contiguous
channels; of anything else a copy is made. Nothing is checked here: the bounds are the program's (entropy/native.py).
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from linic.kernels import library
from linic.kernels.library import INT, POINTER
from linic.kernels.native import NO_MEMORY

SIGNATURES = {
    "linic_exact_chain": [POINTER, INT, POINTER] + [INT] * 4,   # steps count slots, scratch quality rows threads
    # k k_t v v_t decay bonus exp fall y, B T C threads
    "linic_exact_biwkv": [POINTER, INT, POINTER, INT] + [POINTER] * 5 + [INT] * 4,
    "linic_exact_depthwise": [POINTER, INT] + [POINTER] * 3 + [INT] * 5,   # x stride weight requant y, B H W C threads
}
BLOCK, LIFT = 16, 1 << 53                                       # as in exact.cpp
KINDS = ("linear", "norm", "rescale", "lookup", "gate", "square", "add", "copy", "gather")    # in Kind's order
INSIDE, BY_ROWS, WHOLE = range(3)                               # slots
NOTHING, KEPT = -1, -2                                          # rows that gather takes from nowhere
REQUANT = np.dtype([("m", "i8", (2, 8)), ("c", "i8", (2, 8)), ("s", "i8", (2, 8)), ("excess", "u4", 16),
                    ("low", "i4", 16), ("high", "i4", 16)])


def _load() -> tuple[Any, str]:
    found, why = library.load("_exact", "linic_exact", SIGNATURES)
    isa = os.environ.get("LINIC_ISA")
    if found is not None and isa and not found.linic_exact_use_isa(isa.encode()):
        return None, f"LINIC_ISA={isa} is not here"
    return found, why


lib, missing = _load()


def describe() -> str:
    return library.describe(lib, "linic_exact")


def instruction_sets() -> list[str]:
    return library.instruction_sets(lib, "linic_exact")


def use(instruction_set: str) -> None:
    library.use(lib, "linic_exact", instruction_set)


class Step(NamedTuple):
    """One operator of a chain. out, a, b: (slot, first channel); a tensor: address, and elements between the rows of
    two qualities."""

    kind: str
    out: tuple[int, int]
    a: tuple[int, int]
    b: tuple[int, int]
    channels: int
    inputs: int = 0
    numbers: Sequence[int] = ()
    tensors: Sequence[tuple[int, int]] = ()


def steps(made: Sequence[Step]) -> npt.NDArray[np.int64]:
    """As exact.cpp wants them."""
    rows = []
    for s in made:
        tensors = [*s.tensors, (0, 0), (0, 0)]
        rows.append([KINDS.index(s.kind), *s.out, *s.a, *s.b, s.channels, s.inputs, *[*s.numbers, 0, 0, 0][:3],
                     *(t[0] for t in tensors[:2]), *(t[1] for t in tensors[:2])])
    return np.array(rows, np.int64)


def chain(made: npt.NDArray[np.int64], slots: Sequence[tuple[int, int, int]], scratch: int, quality: int,
          rows: int) -> None:
    """slots: (address, stride, BY_ROWS or WHOLE) or (first channel in scratch, stride, INSIDE). scratch: channels in
    all."""
    table = np.array(slots, np.int64)
    assert lib is not None
    _check(lib.linic_exact_chain(made.ctypes.data, len(made), table.ctypes.data, scratch, quality, rows,
                                 torch.get_num_threads()))


def strided(x: Tensor) -> tuple[Tensor, int]:
    """The register, copied where its pixels are not evenly spaced, and the distance of two of them."""
    _, h, w, c = x.shape
    _, rows, pixels, channels = x.stride()
    distance = pixels if w > 1 else rows if h > 1 else x.stride(0) if len(x) > 1 else c
    even = ((channels == 1 or c == 1) and (h == 1 or rows == w * distance)
            and (len(x) == 1 or x.stride(0) == h * w * distance))
    return (x, distance) if even else (x.contiguous(), c)


def pack_weight(weight: Tensor) -> Tensor:
    """(N, K) -> int16 (N / 16, K / 2, 16, 2), zeros where N or K ends."""
    n, k = weight.shape
    blocks, pairs = -(-n // BLOCK), (k + 1) // 2
    packed = torch.zeros(blocks * BLOCK, 2 * pairs, dtype=torch.int16)
    packed[:n, :k] = weight
    return packed.view(blocks, BLOCK, pairs, 2).transpose(1, 2).contiguous()


def pack_requant(requant: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """(5, N): m, c, s, low, high -> struct Requant of each block of channels."""
    blocks = -(-requant.shape[1] // BLOCK)
    padded = np.zeros((5, blocks * BLOCK), np.int64)
    padded[:, :requant.shape[1]] = requant
    m, c, s, low, high = padded.reshape(5, blocks, BLOCK)
    packed = np.zeros(blocks, REQUANT)
    for name, values in (("m", m), ("c", c + LIFT), ("s", s)):
        packed[name] = values.reshape(blocks, 8, 2).transpose(0, 2, 1)
    packed["excess"] = LIFT >> s & 0xFFFFFFFF
    packed["low"], packed["high"] = low, high
    return packed


def biwkv(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, exp: Tensor, fall: Tensor) -> Tensor:
    """The tensors: int32, contiguous."""
    (b, h, w, c), (k, k_t), (v, v_t) = k.shape, strided(k), strided(v)
    y = torch.empty(b, h, w, c, dtype=torch.int32)
    assert lib is not None
    _check(lib.linic_exact_biwkv(k.data_ptr(), k_t, v.data_ptr(), v_t, decay.data_ptr(), bonus.data_ptr(),
                                 exp.data_ptr(), fall.data_ptr(), y.data_ptr(), b, h * w, c, torch.get_num_threads()))
    return y


def depthwise(x: Tensor, weight: Tensor, requant: npt.NDArray[np.void]) -> Tensor:
    """weight: int32 (25, C padded to whole blocks); requant: packed."""
    (b, h, w, c), (x, stride) = x.shape, strided(x)
    y = torch.empty(b, h, w, c, dtype=torch.int32)
    assert lib is not None
    _check(lib.linic_exact_depthwise(x.data_ptr(), stride, weight.data_ptr(), requant.ctypes.data, y.data_ptr(), b, h,
                                     w, c, torch.get_num_threads()))
    return y


def _check(status: int) -> None:
    if status == NO_MEMORY:
        raise MemoryError("the integer kernels could not get their scratch memory: use smaller tiles or batches")
