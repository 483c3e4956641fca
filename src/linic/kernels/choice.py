"""Which backend runs an operator: what is here, what was asked for, what suits device and dtype.

Raises BackendMissing where a backend is not here, UsageError where the request makes no sense.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from linic.errors import BackendMissing, UsageError
from linic.kernels import native

# First one that is here and takes the dtype.
FOR_DEVICE = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}
# Triton's own switch, which it reads when a kernel is defined: run as numpy, on a CPU, thousands of times slower.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _no_triton() -> str:
    """Why Triton is not here, or "". Asks nothing of a GPU: that would start CUDA at import."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'linic[gpu]', on Linux)"
    if INTERPRETED:
        return ""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler (gcc, clang or CC) to start its kernels"
    return ""


# A backend that is not named for an operator here is the torch form's: it runs wherever torch does.
ABSENT = {"torch": "", "native": native.missing, "triton": _no_triton()}


def choose(operator: str, device: str, dtype: torch.dtype, asked: str | None) -> str:
    """The name of the backend. `dtype` is the one computed in: float32 or float64."""
    if asked is None:
        for name in FOR_DEVICE.get(device, ("torch",)):
            if not ABSENT[name] and (name == "torch" or dtype == torch.float32):
                return name
    if asked not in ABSENT:
        raise UsageError(f"{operator}: no backend {asked!r}: use one of {', '.join(ABSENT)}, or None to choose")
    reason = ABSENT[asked]
    if asked == "triton" and not reason and device != "cuda" and not INTERPRETED:
        reason = f"it runs on cuda, and the tensors are on {device}"
    if reason:
        raise BackendMissing(
            f"{operator}: backend {asked!r} is not here: {reason}. "
            "Leave the backend out to take the best one here, or use 'torch', which runs everywhere."
        )
    if asked == "native" and (device != "cpu" or dtype != torch.float32):
        raise UsageError(f"{operator}: backend 'native' computes float32 on cpu, not {dtype} on {device}: use 'torch'")
    if asked == "triton" and dtype != torch.float32:
        raise UsageError(f"{operator}: backend 'triton' computes float32, not {dtype}: use 'torch'")
    return asked


def implementation(operator: str, backend: str) -> ModuleType:
    """The module with forward and backward. Triton's is imported when it is first used: that takes half a second."""
    name = {"native": "cpu", "torch": "torch_form", "triton": "triton"}[backend]
    return importlib.import_module(f"linic.kernels.{operator}.{name}")


def nobody_watches(device: str) -> bool:
    """In plain inference a backend may be called directly: no gradient, no compiler, no dispatch mode (FLOP counter,
    fake tensors) wants to see the operator. The first call of a registered one imports torch's compiler: a second."""
    if torch.compiler.is_compiling():
        return False
    return device in ("cpu", "cuda") and torch.is_inference_mode_enabled() and _get_current_dispatch_mode() is None


_plain = False


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, nothing is fusible: for comparisons."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def fusible(*tensors: torch.Tensor) -> bool:
    """Whether a chain of operations on these (none empty) may run as one compiled step: float32 on a CPU, and nobody
    (compiler, tracer, FLOP counter) wants to see the single operators."""
    if _plain or native.lib is None:
        return False
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or not t.numel() for t in tensors):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return _get_current_dispatch_mode() is None


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any input has it, else float32 (half precision is only a storage format here)."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
