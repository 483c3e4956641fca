"""Operators on tensors: values in, values out, no modules and no parameters. README.md has formulas and timings.

    biwkv(w, u, k, v)      (C,), (C,), (B, T, C), (B, T, C) -> (B, T, C)    kernels/biwkv/
    dwconv5(x, weight)     (B, H, W, C), (25, C) -> (B, H, W, C)            kernels/dwconv5/

Each operator is a folder: reference.py (the definition), torch_form.py (everywhere), cpu.py (compiled),
triton.py (GPU). mix/ and pointwise/ fuse chains of operations on a CPU; their definition is the code that calls them.
Never bit-exact between devices or backends: what steers the range coder uses integers (entropy/).
"""

import torch

from linic.kernels import native
from linic.kernels.biwkv import biwkv
from linic.kernels.choice import ABSENT, choose
from linic.kernels.dwconv5 import dwconv5

__all__ = ["backends", "biwkv", "dwconv5"]


def backends() -> dict[str, dict[str, str]]:
    """For each operator: every backend with "here" or the reason why not, and what runs "cpu float32"."""
    state = {name: f"absent: {reason}" if reason else "here" for name, reason in ABSENT.items()}
    if native.lib is not None:
        state["native"] = f"here ({native.describe()})"
    return {op: {**state, "cpu float32": choose(op, "cpu", torch.float32, None)} for op in ("biwkv", "dwconv5")}
