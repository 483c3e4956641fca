"""The compiled CPU kernels, loaded through ctypes where they were built (native.cpp, setup.py; README.md here).

`lib` is the library or None, `missing` the reason why not. LINIC_NO_NATIVE=1, read at import, leaves it out.
Loading never compiles. Every call returns a status; `check` turns it into "done" or "use the torch form".
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import torch

from linic.errors import BackendMissing

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
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


def _share_openmp() -> None:
    """Make the OpenMP library that torch brings visible to ours, which is linked without one on purpose:
    two of them would keep two pools of threads that spin against each other."""
    root = Path(torch.__file__).parent
    bundled = [*root.glob("lib/libgomp*"), *root.parent.glob("torch.libs/libgomp*")]
    for name in [str(path) for path in bundled] or ["libgomp.so.1"]:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LINIC_NO_NATIVE", "0") not in ("", "0"):
        return None, "switched off by LINIC_NO_NATIVE"
    here = Path(__file__).parent
    built = [here / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in built if path.exists()), None)
    if path is None:
        return None, "not built: install linic from source where a C++ compiler (g++) is found"
    try:
        if sys.platform == "linux":
            _share_openmp()
        lib = ctypes.CDLL(str(path))
        for name, arguments in SIGNATURES.items():
            getattr(lib, name).argtypes = arguments
        lib.linic_chunk.restype = INT
        lib.linic_isa.restype = lib.linic_isa_here.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"built, but does not load ({error}): install linic again"
    return lib, ""


lib, missing = _load()


def describe() -> str:
    """Instruction set and threading in use, for `linic doctor`."""
    assert lib is not None
    return f"{lib.linic_isa().decode()}, {'OpenMP' if lib.linic_openmp() else 'one thread'}"


def instruction_sets() -> list[str]:
    """Those of this machine that the library was compiled for, best (in use) first. For tests, as use() is."""
    names = [] if lib is None else [lib.linic_isa_here(index) for index in range(8)]
    return [name.decode() for name in names if name]


def use(instruction_set: str) -> None:
    if lib is None or not lib.linic_use_isa(instruction_set.encode()):
        raise BackendMissing(f"instruction set {instruction_set!r} is not here: use one of {instruction_sets()}")


def check(status: int) -> bool:
    """True: done. False: refused, the values are beyond this arithmetic (native.cpp: WIDE)."""
    if status == NO_MEMORY:
        raise MemoryError("the CPU kernels could not get their scratch memory: use smaller tiles or a smaller batch")
    return status != REFUSED
