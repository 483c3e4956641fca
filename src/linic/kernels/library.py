"""Loads a compiled library of kernels through ctypes, and asks what each of them can be asked.

A library has a prefix for its functions and four of its own: PREFIX_isa, _isa_here, _use_isa and _openmp. Loading never
compiles. LINIC_NO_NATIVE=1, read at import, leaves all of them out.
"""

import ctypes
import importlib.machinery
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from linic.errors import BackendMissing

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def load(name: str, prefix: str, signatures: Mapping[str, list[Any]]) -> tuple[ctypes.CDLL | None, str]:
    """The library built as linic.kernels.NAME or None, and the reason why not."""
    if os.environ.get("LINIC_NO_NATIVE", "0") not in ("", "0"):
        return None, "switched off by LINIC_NO_NATIVE"
    built = [Path(__file__).parent / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in built if path.exists()), None)
    if path is None:
        return None, "not built: install linic from source where a C++ compiler (g++) is found"
    try:
        if sys.platform == "linux":
            _share_openmp()
        lib = ctypes.CDLL(str(path))
        for function, arguments in signatures.items():
            getattr(lib, function).argtypes = arguments
        for function in (f"{prefix}_isa", f"{prefix}_isa_here"):
            getattr(lib, function).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"built, but does not load ({error}): install linic again"
    return lib, ""


def _share_openmp() -> None:
    """Make the OpenMP library that torch brings visible to ours, which are linked without one on purpose:
    two of them would keep two pools of threads that spin against each other."""
    root = Path(torch.__file__).parent
    bundled = [*root.glob("lib/libgomp*"), *root.parent.glob("torch.libs/libgomp*")]
    for name in [str(path) for path in bundled] or ["libgomp.so.1"]:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def describe(lib: Any, prefix: str) -> str:
    """Instruction set and threading in use, for `linic doctor`."""
    threads = "OpenMP" if getattr(lib, f"{prefix}_openmp")() else "one thread"
    return f"{getattr(lib, f'{prefix}_isa')().decode()}, {threads}"


def instruction_sets(lib: Any, prefix: str) -> list[str]:
    """Those of this machine that the library was compiled for, best (in use) first. For tests, as use() is."""
    names = [] if lib is None else [getattr(lib, f"{prefix}_isa_here")(index) for index in range(8)]
    return [name.decode() for name in names if name]


def use(lib: Any, prefix: str, instruction_set: str) -> None:
    if lib is None or not getattr(lib, f"{prefix}_use_isa")(instruction_set.encode()):
        here = instruction_sets(lib, prefix)
        raise BackendMissing(f"instruction set {instruction_set!r} is not here: use one of {here}")
