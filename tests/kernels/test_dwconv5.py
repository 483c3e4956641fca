"""The depthwise 5x5 convolution: every backend against 25 shifted products in float64, in value and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from linic.errors import BackendMissing, UsageError
from linic.kernels import dwconv5, native
from linic.kernels.dwconv5.reference import dwconv5 as reference

# Relative to the largest value. 25 products, or for the weight thousands of products of either sign, rounded at
# 6e-8 (float32) and 1e-16 (float64) each; sums are taken row by row, so they do not grow with the picture.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
BACKENDS = ["torch"] if native.lib is None else ["native", "torch"]


def random_inputs(shape, seed=0):
    """x, weight and the gradient of y; float32 values, so that every dtype gets the same ones."""
    r = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=r) for size in (shape, (25, shape[3]), shape)]


def value_and_gradients(function, inputs):
    *values, g = inputs
    leaves = [t.detach().clone().requires_grad_() for t in values]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def assert_close(got, expected, dtype):
    for name, a, b in zip(("y", "gx", "gw"), got, expected):
        worst, scale = (a.double() - b.double()).abs().max().item(), b.abs().max().item()
        assert worst <= TOLERANCE[dtype] * scale, f"{name}: off by {worst:.1e} at scale {scale:.1e}"


def test_the_reference_is_a_convolution():
    x, weight, _ = (t.double() for t in random_inputs((2, 6, 7, 3)))
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.t().reshape(3, 1, 5, 5), padding=2, groups=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(reference(x, weight), y)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 1, 1, 16), (1, 2, 9, 5), (1, 9, 2, 17), (3, 4, 4, 33), (1, 64, 96, 20), (1, 700, 3, 9)],
    ids=str,
)
def test_value_and_gradients_are_the_references(form, shape):
    backend, dtype = form
    inputs = random_inputs(shape, sum(shape))
    got = value_and_gradients(lambda *a: dwconv5(*a, backend=backend), [t.to(dtype) for t in inputs])
    assert_close(got, value_and_gradients(reference, [t.double() for t in inputs]), dtype)


def test_any_strides_give_the_same_result(form):
    backend, dtype = form
    x, weight, g = (t.to(dtype) for t in random_inputs((2, 7, 5, 18)))
    plain = value_and_gradients(lambda *a: dwconv5(*a, backend=backend), (x, weight, g))
    leaves = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), weight.t().contiguous().t()]
    leaves = [t.requires_grad_() for t in leaves]
    y = dwconv5(*leaves, backend=backend)
    odd_g = g.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip([y, *torch.autograd.grad(y, leaves, odd_g)], plain):
        assert torch.equal(a, b)


def test_every_output_is_written(form):
    backend, dtype = form
    inputs = [t.to(dtype) for t in random_inputs((2, 5, 6, 19))]
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN
    try:
        got = value_and_gradients(lambda *a: dwconv5(*a, backend=backend), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in got)


def test_a_nan_reaches_its_neighbours_only(form):
    backend, dtype = form
    x, weight, _ = (t.to(dtype) for t in random_inputs((1, 9, 9, 4)))
    x[0, 4, 4, 1] = math.nan
    bad = dwconv5(x, weight, backend=backend).isnan()
    assert bad[0, 2:7, 2:7, 1].all() and bad.sum() == 25


def test_gradcheck_of_the_torch_form():
    leaves = [t.double().requires_grad_() for t in random_inputs((2, 3, 4, 2))[:2]]
    assert torch.autograd.gradcheck(lambda *a: dwconv5(*a, backend="torch"), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, g = random_inputs((2, 5, 4, 3))
    torch.library.opcheck(torch.ops.linic.dwconv5.default, (x.requires_grad_(), weight.requires_grad_(), backend))
    args = x.detach(), weight.detach(), g, backend
    torch.library.opcheck(torch.ops.linic.dwconv5_backward.default, args)


def test_half_precision_autocast_inference_mode_and_meta(form):
    backend, dtype = form
    x, weight, _ = (t.to(dtype) for t in random_inputs((2, 5, 4, 3)))
    y = dwconv5(x, weight, backend=backend)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(dwconv5(x, weight, backend=backend), y)
    half = dwconv5(x.bfloat16(), weight.float())
    assert torch.equal(half, dwconv5(x.bfloat16().float(), weight.float()).bfloat16())
    meta = dwconv5(x.to("meta"), weight.to("meta"))
    assert meta.shape == y.shape and meta.dtype == dtype


def test_compile(form):
    backend, dtype = form
    inputs = [t.to(dtype) for t in random_inputs((2, 5, 4, 3))]
    compiled = torch.compile(lambda *a: 2 * dwconv5(*a, backend=backend), backend="aot_eager", fullgraph=True)
    eager = value_and_gradients(lambda *a: dwconv5(*a, backend=backend), inputs)
    assert_close(value_and_gradients(compiled, inputs), [2 * t for t in eager], dtype)


def test_flops_are_counted():
    x, weight, _ = random_inputs((2, 5, 4, 3))
    with FlopCounterMode(display=False) as counter:
        dwconv5(x.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 25 * x.numel()


def test_wrong_requests_say_what_is_wrong():
    x, weight = torch.zeros(1, 5, 4, 3), torch.zeros(25, 3)
    for bad in [(x[0], weight), (x, weight[:9]), (x, weight[:, :2]), (x[:, :0], weight)]:
        with pytest.raises(UsageError, match=r"dwconv5 takes x \(B, H, W, C\)"):
            dwconv5(*bad)
    with pytest.raises(BackendMissing, match=r"dwconv5: backend 'triton' is not here"):
        dwconv5(x, weight, backend="triton")


@pytest.mark.skipif(native.lib is None, reason=f"no compiled kernels: {native.missing}")
def test_threads_change_no_bit():
    inputs = random_inputs((2, 40, 9, 70))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(lambda *a: dwconv5(*a, backend="native"), inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
