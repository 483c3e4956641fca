"""Which backend runs an operator: what is here, what was asked for, what suits device and dtype.

Raises BackendMissing where a backend is not here, UsageError where the request makes no sense.
"""

import torch

from linic.errors import BackendMissing, UsageError
from linic.kernels import native

# First one that is here and takes the dtype. A Triton kernel goes in front of "torch" for cuda when there is one.
FOR_DEVICE = {"cpu": ("native", "torch"), "cuda": ("torch",)}
# A backend that is not named for an operator here is the torch form's: it runs wherever torch does.
ABSENT = {"torch": "", "native": native.missing, "triton": "not written yet in this version of linic"}


def choose(operator: str, device: str, dtype: torch.dtype, asked: str | None) -> str:
    """The name of the backend. `dtype` is the one computed in: float32 or float64."""
    if asked is None:
        for name in FOR_DEVICE.get(device, ("torch",)):
            if not ABSENT[name] and (name != "native" or dtype == torch.float32):
                return name
    if asked not in ABSENT:
        raise UsageError(f"{operator}: no backend {asked!r}: use one of {', '.join(ABSENT)}, or None to choose")
    if ABSENT[asked]:
        raise BackendMissing(
            f"{operator}: backend {asked!r} is not here: {ABSENT[asked]}. "
            "Leave the backend out to take the best one here, or use 'torch', which runs everywhere."
        )
    if asked == "native" and (device != "cpu" or dtype != torch.float32):
        raise UsageError(f"{operator}: backend 'native' computes float32 on cpu, not {dtype} on {device}: use 'torch'")
    return asked


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any input has it, else float32 (half precision is only a storage format here)."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
