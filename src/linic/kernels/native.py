"""The compiled CPU kernels, loaded through ctypes where they were built (native.cpp, setup.py; README.md here).

`lib` is the library or None, `missing` the reason why not. Every call returns a status; `check` turns it into "done" or
"use the torch form".
"""

from typing import Any

from linic.kernels import library
from linic.kernels.library import FLOAT, INT, POINTER

SIGNATURES: dict[str, list[Any]] = {
    # w u k k_b k_t v v_b v_t y den, B T C threads
    "linic_biwkv_forward": [POINTER] * 3 + [INT] * 2 + [POINTER] + [INT] * 2 + [POINTER] * 2 + [INT] * 4,
    # w u k k_b k_t v v_b v_t y den g gk gv gw gu, B T C threads
    "linic_biwkv_backward": [POINTER] * 3 + [INT] * 2 + [POINTER] + [INT] * 2 + [POINTER] * 7 + [INT] * 4,
    "linic_dwconv5_forward": [POINTER] * 3 + [INT] * 6,  # x weight y, B H W C flip threads
    "linic_dwconv5_weight": [POINTER] * 3 + [INT] * 5,  # x g gw, B H W C threads
    # x weight bias kernel stats y, eps, half B H W C threads
    "linic_norm_forward": [POINTER] * 6 + [FLOAT] + [INT] * 6,
    # x weight bias kernel stats g residual gx gn gaffine gkernel, half B H W C threads
    "linic_norm_backward": [POINTER] * 11 + [INT] * 6,
    "linic_attend_forward": [POINTER] * 6 + [FLOAT] * 3 + [INT] * 6,  # kvr w u y den p, limits, half hard B T C threads
    # kvr w u y den g gkvr gw gu, limits, half hard B T C threads
    "linic_attend_backward": [POINTER] * 9 + [FLOAT] * 3 + [INT] * 6,
    "linic_square_forward": [POINTER] * 2 + [FLOAT] + [INT] * 5,  # kr square, limit, half rows C hidden threads
    "linic_square_backward": [POINTER] * 3 + [FLOAT] + [INT] * 5,  # kr g gkr, limit, half rows C hidden threads
    "linic_gate_forward": [POINTER] * 4 + [FLOAT] + [INT] * 5,  # x kr o y, limit, half rows C hidden threads
    "linic_gate_backward": [POINTER] * 5 + [FLOAT] + [INT] * 5,  # g kr o go gkr, limit, half rows C hidden threads
    "linic_add": [POINTER] * 3 + [INT] * 4,  # x o y, one_row rows C threads
    "linic_gaussian_forward": [POINTER] * 3 + [FLOAT] + [INT] * 2,  # d s p, least, n threads
    "linic_gaussian_backward": [POINTER] * 6 + [FLOAT] + [INT] * 2,  # d s p g gd gs, least, n threads
    "linic_gelu_forward": [POINTER] * 2 + [FLOAT] + [INT] * 2,  # x y, limit, n threads
    "linic_gelu_backward": [POINTER] * 3 + [FLOAT] + [INT] * 2,  # x g gx, limit, n threads
    "linic_chunk": [],  # rows of a part of gaffine
}
REFUSED, NO_MEMORY = 1, 2  # Status in native.cpp


lib, missing = library.load("_native", "linic", SIGNATURES)
if lib is not None:
    lib.linic_chunk.restype = INT


def describe() -> str:
    return library.describe(lib, "linic")


def instruction_sets() -> list[str]:
    return library.instruction_sets(lib, "linic")


def use(instruction_set: str) -> None:
    library.use(lib, "linic", instruction_set)


def check(status: int) -> bool:
    """True: done. False: refused, the values are beyond this arithmetic (native.cpp: WIDE)."""
    if status == NO_MEMORY:
        raise MemoryError("the CPU kernels could not get their scratch memory: use smaller tiles or a smaller batch")
    return status != REFUSED
