"""Times of the operators in kernels/, beside `k + v` of the same size in the same run.

Milliseconds differ from machine to machine and with what else runs; the multiple of one addition hardly does.
run() -> one dict a row; table(rows) -> text. In: nothing but torch; it touches no files.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from linic.kernels import biwkv, dwconv5
from linic.kernels.choice import ABSENT

BIWKV_SHAPES = [(1, 1536, 192), (1, 6144, 128), (1, 6144, 192), (1, 24576, 64), (8, 256, 192), (8, 1024, 128)]
DWCONV5_SHAPES = [(1, 64, 96, 128), (8, 16, 16, 128)]
# Everything timed: name of the operator, shape, name of the form, the function and its inputs.
Case = tuple[str, Sequence[int], str, Callable[..., Tensor], list[Tensor]]


def run(threads: int = 1, repeats: int = 7) -> list[dict]:
    """operator, shape, backend; milliseconds: add_ms (`k + v`), forward_ms, both_ms (forward and backward);
    forward_ratio, both_ratio: multiples of add_ms. Each the best of `repeats`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_measure(case, repeats) for case in _cases()]
    finally:
        torch.set_num_threads(before)


def table(rows: list[dict]) -> str:
    lines = [
        "best of several, milliseconds (multiples of one addition of the same size)",
        f"{'operator':9}{'shape':>15}  {'backend':8}{'k + v':>8}{'forward':>18}{'forward+backward':>20}",
    ]
    for row in rows:
        shape = ",".join(str(n) for n in row["shape"])
        lines.append(
            f"{row['operator']:9}{shape:>15}  {row['backend']:8}{row['add_ms']:8.3f}"
            f"{row['forward_ms']:10.2f} ({row['forward_ratio']:4.0f}x)"
            f"{row['both_ms']:12.2f} ({row['both_ratio']:4.0f}x)"
        )
    return "\n".join(lines)


def _cases() -> list[Case]:
    backends = [name for name in ("native", "torch") if not ABSENT[name]]
    cases: list[Case] = []
    for shape in BIWKV_SHAPES:
        tokens, channels = shape[1:]
        k, v, w, u = torch.randn(shape), torch.randn(shape), 8 * torch.rand(channels) / tokens, torch.zeros(channels)
        for name in backends:
            cases.append(("biwkv", shape, name, partial(biwkv, backend=name), [w, u, k, v]))
    for shape4 in DWCONV5_SHAPES:
        x, weight = torch.randn(shape4), torch.randn(25, shape4[3])
        for name in backends:
            cases.append(("dwconv5", shape4, name, partial(dwconv5, backend=name), [x, weight]))
        cases.append(("dwconv5", shape4, "conv2d", _conv2d, [x, weight]))
    return cases


def _conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """torch's own, with its own gradients, on the same memory layout: what dwconv5 has to beat."""
    channels = x.shape[3]
    kernel = weight.t().reshape(channels, 1, 5, 5)
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=2, groups=channels).permute(0, 2, 3, 1)


def _measure(case: Case, repeats: int) -> dict:
    operator, shape, backend, function, inputs = case
    leaves = [t.clone().requires_grad_() for t in inputs]
    a, b, g = (torch.randn(*shape) for _ in range(3))
    with torch.inference_mode():
        add = _best(lambda: a + b, 5 * repeats)
        forward = _best(lambda: function(*inputs), repeats)
    both = _best(lambda: torch.autograd.grad(function(*leaves), leaves, g), repeats)
    return {
        "operator": operator,
        "shape": list(shape),
        "backend": backend,
        "add_ms": 1e3 * add,
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "forward_ratio": forward / add,
        "both_ratio": both / add,
    }


def _best(function: Callable[[], object], repeats: int) -> float:
    function()  # memory and caches warm
    seconds = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
