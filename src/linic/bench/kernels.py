"""Times of the operators in kernels/, beside `k + v` of the same size in the same run.

Milliseconds differ from machine to machine and with what else runs; the multiple of one addition hardly does.
On a GPU the measure is a device copy: GB/s of the bytes that have to move, each input read and each output written
once, and how much of the copy's rate that is.
run() -> one dict a row; table(rows) -> text. In: nothing but torch; it touches no files.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from linic.kernels import biwkv, dwconv5
from linic.kernels.biwkv import torch_form
from linic.kernels.choice import ABSENT, unfused
from linic.models.blocks import Block, Linear
from linic.models.config import Style

BIWKV_SHAPES = [(1, 1536, 192), (1, 6144, 128), (1, 6144, 192), (1, 24576, 64), (8, 256, 192), (8, 1024, 128)]
DWCONV5_SHAPES = [(1, 64, 96, 128), (8, 16, 16, 128)]
MIX_SHAPE = (4, 32, 32, 128)  # of blocks with operands in bf16, as in training
# Tokens of a picture of 6 Mpixels at 1/8, 1/16 and 1/32 of its size, and for dwconv5 the same as rows and columns.
CUDA_STAGES = [((256, 384), 96), ((128, 192), 144), ((64, 96), 256)]
CUDA_BATCHES = (1, 8, 64)
SMALL = 1 << 26  # bytes; below, starting kernels takes as long as running them, so a CUDA graph is timed
# Everything timed: name of the operator, shape, name of the form, the function and its inputs.
Case = tuple[str, Sequence[int], str, Callable[..., Tensor], list[Tensor]]


def run(
    threads: int = 1, repeats: int = 7, device: str = "cpu", dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
) -> list[dict]:
    """operator, shape, backend; milliseconds: add_ms (`k + v`), forward_ms, both_ms (forward and backward);
    forward_ratio, both_ratio: multiples of add_ms. Each the best of `repeats`.
    device "cuda": dtype, and instead of the addition copy_ms; forward_gbs, both_gbs; forward_percent, both_percent of
    the copy's rate. Medians of `repeats`; NaN where memory did not suffice. `threads` and `dtypes` are of one device
    each: "cpu" is float32."""
    if device != "cpu":
        return [row for dtype in dtypes for row in _run_on_cuda(device, dtype, repeats)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_measure(case, repeats) for case in _cases()]
    finally:
        torch.set_num_threads(before)


def table(rows: list[dict]) -> str:
    if rows and "copy_ms" in rows[0]:
        return _cuda_table(rows)
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
    block = Block(MIX_SHAPE[3], 2, Style(zero_init=False), pixels=8)
    assert block.spatial is not None
    for name, module in (("spatial", block.spatial), ("channel", block.channel)):
        module.requires_grad_(False)
        for linear in module.modules():
            if isinstance(linear, Linear):
                linear.bf16 = "always"
        names, values = zip(*module.named_parameters())
        for form in ("plain",) if ABSENT["native"] else ("fused", "plain"):
            inputs = [torch.randn(MIX_SHAPE), *(v.detach() for v in values)]
            cases.append((name, MIX_SHAPE, form, partial(_mix, module, names, form), inputs))
    return cases


def _mix(module: nn.Module, names: Sequence[str], form: str, x: Tensor, *values: Tensor) -> Tensor:
    with unfused() if form == "plain" else nullcontext():
        y: Tensor = functional_call(module, dict(zip(names, values)), (x,))
        return y


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


# CUDA.


def _run_on_cuda(device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    rows = []
    for (height, width), channels in CUDA_STAGES:
        for batch in CUDA_BATCHES:
            rows += _biwkv_on_cuda((batch, height * width, channels), dtype, device, repeats)
            rows += _dwconv5_on_cuda((batch, height, width, channels), dtype, device, repeats)
    return rows


def _biwkv_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    tokens, channels = shape[1:]
    w, u = 8 * torch.rand(channels, device=device) / tokens, torch.zeros(channels, device=device)
    inputs = [w, u, *(torch.randn(shape, device=device, dtype=dtype) for _ in range(2))]
    forms: list[tuple[str, Callable[..., Tensor]]] = [("torch", partial(biwkv, backend="torch"))]
    # The torch form's arithmetic without its look at w and u, which would break the compiler's graph.
    forms.append(("compiled", torch.compile(_sums)))
    if not ABSENT["triton"]:
        forms.append(("triton", partial(biwkv, backend="triton")))
    return _rows_on_cuda("biwkv", shape, inputs, forms, (3, 8), repeats)  # k v y; and k v g gk gv


def _sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch_form._forward_sums(w, u, k.float(), v.float())[0].to(v.dtype)


def _dwconv5_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    x, weight = torch.randn(shape, device=device, dtype=dtype), torch.randn(25, shape[3], device=device, dtype=dtype)
    forms: list[tuple[str, Callable[..., Tensor]]] = [("conv2d", _conv2d), ("torch", partial(dwconv5, backend="torch"))]
    if not ABSENT["triton"]:
        forms.append(("triton", partial(dwconv5, backend="triton")))
    return _rows_on_cuda("dwconv5", shape, [x, weight], forms, (2, 5), repeats)  # x y; and x g gx


def _rows_on_cuda(
    operator: str,
    shape: tuple[int, ...],
    inputs: list[Tensor],
    forms: list[tuple[str, Callable[..., Tensor]]],
    tensors: tuple[int, int],
    repeats: int,
) -> list[dict]:
    """`tensors`: how many of the shape have to move, forward and in both."""
    like = inputs[-2] if operator == "dwconv5" else inputs[-1]
    size = like.numel() * like.element_size()
    g, rows = torch.randn_like(like), []
    half = torch.empty(tensors[0] * size // 2, dtype=torch.uint8, device=like.device).random_(0, 256)
    copy = _device_seconds(partial(torch.empty_like(half).copy_, half), repeats, size < SMALL)
    del half
    leaves = [t.detach().requires_grad_() for t in inputs]
    for name, function in forms:
        # Only Triton waits for nothing on the way: what does, no graph can hold.
        graph = size < SMALL and name == "triton"
        with torch.no_grad():
            forward = _device_seconds(partial(function, *inputs), repeats, graph)
        both = _device_seconds(partial(_forward_and_backward, function, leaves, g), repeats, graph)
        row: dict = {"operator": operator, "shape": list(shape), "dtype": str(like.dtype)[6:], "backend": name}
        row["copy_ms"] = 1e3 * copy
        for part, seconds, count in (("forward", forward, tensors[0]), ("both", both, tensors[1])):
            row[f"{part}_ms"] = 1e3 * seconds
            row[f"{part}_gbs"] = count * size / seconds / 1e9
            row[f"{part}_percent"] = 100 * copy * count / tensors[0] / seconds
        rows.append(row)
    return rows


def _forward_and_backward(function: Callable[..., Tensor], leaves: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*leaves), leaves, g)


def _device_seconds(function: Callable[[], object], repeats: int, graph: bool) -> float:
    """Median of `repeats`, by CUDA events; 20 calls in one graph if `graph`, else one by one."""
    try:
        side = torch.cuda.Stream()  # capture wants its warm-up on a stream of its own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation, memory and caches
                function()
        torch.cuda.current_stream().wait_stream(side)
        call, calls = function, 1
        if graph:
            captured, calls = torch.cuda.CUDAGraph(), 20
            with torch.cuda.graph(captured):
                for _ in range(calls):
                    function()
            call = captured.replay
            call()
        seconds = []
        for _ in range(max(repeats, 1)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / calls)
        return sorted(seconds)[len(seconds) // 2]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.nan


def _cuda_table(rows: list[dict]) -> str:
    lines = [
        "median, milliseconds, GB/s of the bytes that have to move, and percent of a device copy's rate",
        f"{'operator':9}{'shape':>18}  {'dtype':9}{'backend':9}{'copy':>8}{'forward':>26}{'forward+backward':>28}",
    ]
    for row in rows:
        shape = ",".join(str(n) for n in row["shape"])
        lines.append(
            f"{row['operator']:9}{shape:>18}  {row['dtype']:9}{row['backend']:9}{row['copy_ms']:8.3f}"
            f"{row['forward_ms']:10.3f} {row['forward_gbs']:6.0f} ({row['forward_percent']:4.0f} %)"
            f"{row['both_ms']:12.3f} {row['both_gbs']:6.0f} ({row['both_percent']:4.0f} %)"
        )
    return "\n".join(lines)
