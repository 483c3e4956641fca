"""The Triton kernels against the float64 definitions, in value and in all gradients.

On a CPU they run in Triton's interpreter, which has to be switched on before anything is imported: a process of its
own runs this file again. With a CUDA device the same cases, and larger ones, run there (`-m gpu`).
"""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from linic.errors import BackendMissing, UsageError
from linic.kernels import biwkv, choice, dwconv5
from linic.kernels.biwkv import torch_form
from linic.kernels.biwkv.reference import biwkv as biwkv_reference
from linic.kernels.dwconv5.reference import dwconv5 as dwconv5_reference

HERE = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HERE, reason="triton is not installed")

# Largest error, relative to the largest value of the tensor.
TOLERANCE = {
    # Products and sums round at 6e-8, a GPU's exp at 2e-7, and up to 16 decays are multiplied in a row.
    torch.float32: 1e-5,
    # One rounding at the end; the interpreter cuts off instead of rounding, a whole unit of 8 bits.
    torch.bfloat16: 2.0**-7,
}
# gw alone sums T^2 terms of either sign that nearly cancel; gk cancels too where one far token has all the weight,
# which nothing but a decay of some -200 a token does: there v_i - y_j is 0 but for the rounding of either.
FACTOR = {"gw": 20}
FACTOR_OF_HUGE_NEGATIVE = {"gw": 1000, "gk": 20}

DECAYS = {  # of w * T, but "huge" is w itself
    "bounded": lambda tokens, r: 32 * r / tokens,
    "zero": lambda tokens, r: 0 * r,
    "negative": lambda tokens, r: -30 * r / tokens,
    "either sign": lambda tokens, r: (400 * r - 200) / tokens,
    "large": lambda tokens, r: 200 * r / tokens,
    "huge": lambda tokens, r: 200 * r,
    "huge, negative": lambda tokens, r: -200 * r,
}
SHAPES = [(1, 1, 1), (3, 2, 16), (1, 15, 40), (1, 63, 1), (3, 65, 16), (1, 200, 40)]
PICTURES = [(1, 1, 1, 1), (3, 3, 4, 16), (1, 9, 9, 40)]


def biwkv_inputs(shape, decay, spread, dtype=torch.float32, device="cpu"):
    """w, u, k, v and the gradient of y; other numbers for every case, the same ones every day."""
    tokens, channels = shape[1:]
    r = torch.Generator().manual_seed(sum(map(ord, repr((shape, decay, spread)))))
    w = DECAYS[decay](tokens, torch.rand(channels, generator=r))
    u = torch.randn(channels, generator=r)
    k = spread * (2 * torch.rand(shape, generator=r) - 1)
    v, g = (torch.randn(shape, generator=r) for _ in range(2))
    return [t.to(device) for t in (w, u, k.to(dtype), v.to(dtype), g.to(dtype))]


def dwconv5_inputs(shape, dtype=torch.float32, device="cpu"):
    r = torch.Generator().manual_seed(sum(shape))
    x, weight, g = (torch.randn(size, generator=r) for size in (shape, (25, shape[3]), shape))
    return [t.to(device) for t in (x.to(dtype), weight, g.to(dtype))]


def by_triton(function):
    return lambda *inputs: function(*inputs, backend="triton")


def value_and_gradients(function, inputs):
    *values, g = inputs
    leaves = [t.detach().clone().requires_grad_() for t in values]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def assert_close(names, got, expected, factors):
    for name, a, b in zip(names, got, expected):
        scale = max(b.double().abs().max().item(), 0.1)  # a gradient that is 0 in truth is a difference of terms near 1
        error = (a.double() - b.double()).abs()
        allowed = TOLERANCE[a.dtype] * (1 if a.dtype == torch.bfloat16 else factors.get(name, 1)) * scale
        assert (error <= allowed).all(), f"{name}: off by {error.max():.1e} at scale {scale:.1e}, allowed {allowed:.1e}"


def check_biwkv(shape, decay, spread, dtype=torch.float32, device="cpu"):
    inputs = biwkv_inputs(shape, decay, spread, dtype, device)
    expected = value_and_gradients(biwkv_reference, [t.double() for t in inputs])
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN: what is not written shows
    try:
        got = value_and_gradients(by_triton(biwkv), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got[0].dtype == got[3].dtype == got[4].dtype == dtype
    factors = FACTOR_OF_HUGE_NEGATIVE if decay == "huge, negative" else FACTOR
    assert_close(("y", "gw", "gu", "gk", "gv"), got, expected, factors)


def check_dwconv5(shape, dtype=torch.float32, device="cpu"):
    inputs = dwconv5_inputs(shape, dtype, device)
    expected = value_and_gradients(dwconv5_reference, [t.double() for t in inputs])
    torch.use_deterministic_algorithms(True)
    try:
        got = value_and_gradients(by_triton(dwconv5), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32
    assert_close(("y", "gx", "gw"), got, expected, {})


def strided_biwkv_agrees(device):
    w, u, k, v, g = biwkv_inputs((2, 33, 20), "bounded", 3, device=device)
    plain = value_and_gradients(by_triton(biwkv), (w, u, k, v, g))
    poison = torch.full_like(k, math.nan)  # what lies between the rows must not be used
    leaf = torch.cat([k, v, poison], 2).requires_grad_()
    y = biwkv(w, u, leaf[..., :20], leaf[..., 20:40], backend="triton")
    (grad,) = torch.autograd.grad(y, leaf, g.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(y, plain[0])
    assert torch.equal(grad[..., :20], plain[3]) and torch.equal(grad[..., 20:40], plain[4])


if choice.INTERPRETED:

    @pytest.fixture
    def short_chunks(monkeypatch):
        """Chunks of 16 tokens and a scan over 4 of them at a time: every loop goes round with few tokens."""
        from linic.kernels.biwkv import triton as form

        monkeypatch.setitem(form.TILES, 16, ((4, 4), (4, 4)))
        monkeypatch.setattr(form, "chunk_length", lambda *shape: 16)
        monkeypatch.setattr(form, "CARRY_TILES", ((math.inf, (2, 2)),))

    @pytest.mark.parametrize("decay, spread", [("bounded", 3), ("either sign", 60)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_biwkv_is_the_references(shape, decay, spread):
        check_biwkv(shape, decay, spread)

    @pytest.mark.parametrize("spread", [3, 60])
    @pytest.mark.parametrize("decay", DECAYS)
    def test_any_decay_over_several_chunks(short_chunks, decay, spread):
        check_biwkv((1, 70, 5), decay, spread)

    @pytest.mark.parametrize("decay", ["bounded", "huge"])
    def test_many_chunks(short_chunks, decay):
        check_biwkv((1, 200, 3), decay, 3)

    @pytest.mark.parametrize("tokens", [15, 70])
    def test_biwkv_in_bfloat16(tokens):
        check_biwkv((2, tokens, 16), "bounded", 3, torch.bfloat16)

    @pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
    def test_keys_and_values_keep_their_own_dtype(dtypes):
        w, u, k, v, _ = biwkv_inputs((1, 9, 4), "bounded", 3)
        k, v = k.to(dtypes[0]).requires_grad_(), v.to(dtypes[1]).requires_grad_()
        y = biwkv(w, u, k, v, backend="triton")
        gk, gv = torch.autograd.grad(y.sum(), (k, v))
        assert (y.dtype, gk.dtype, gv.dtype) == (dtypes[1], *dtypes)
        assert_close(["y"], [y.bfloat16()], [biwkv_reference(w, u, k, v)], {})

    def test_biwkv_reads_slices_in_place():
        strided_biwkv_agrees("cpu")

    @pytest.mark.parametrize("size", [1.0, 200.0])
    def test_extreme_u_and_finite_results_at_absurd_values(short_chunks, size):
        w, u, k, v, g = biwkv_inputs((1, 40, 6), "bounded", 3)
        u, w = 200 * u, w * torch.tensor([1, -1, 1e3, -1e3, 1e30, -1e30]) ** (size > 1)
        got = value_and_gradients(by_triton(biwkv), (w, u, size * k, v, g))
        assert all(t.isfinite().all() for t in got)
        if size == 1:
            expected = value_and_gradients(biwkv_reference, [t.double() for t in (w, u, k, v, g)])
            assert_close(("y", "gw", "gu", "gk", "gv"), got, expected, FACTOR)

    @pytest.mark.parametrize("where", ["w", "u", "k", "v"])
    def test_a_nan_is_handed_on_and_not_hidden(where):
        inputs = dict(zip("wukv", biwkv_inputs((1, 9, 4), "bounded", 3)))
        inputs[where][..., 1] = math.nan
        y = biwkv(**inputs, backend="triton")
        assert y[..., 1].isnan().all()
        assert y[..., [0, 2, 3]].isfinite().all()

    def test_results_are_the_same_twice():
        inputs = biwkv_inputs((1, 70, 5), "bounded", 3)
        once, again = (value_and_gradients(by_triton(biwkv), inputs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again))

    @pytest.mark.parametrize("tokens", [9, 70])
    def test_opcheck_and_compile_of_biwkv(tokens):
        w, u, k, v, g = biwkv_inputs((1, tokens, 5), "bounded", 3, torch.bfloat16)
        leaves = [t.requires_grad_() for t in (w, u, k, v)]
        torch.library.opcheck(torch.ops.linic.biwkv.default, (*leaves, "triton"), test_utils=OPCHECKS)
        y, aux = (t.detach() for t in torch.ops.linic.biwkv(*leaves, "triton"))
        arguments = *(t.detach() for t in leaves), y, aux, g, "triton"
        torch.library.opcheck(torch.ops.linic.biwkv_backward.default, arguments, test_utils=OPCHECKS)
        compiled = torch.compile(lambda *a: 2 * by_triton(biwkv)(*a), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*(t.detach() for t in leaves)), 2 * y)

    @pytest.mark.parametrize("shape", PICTURES, ids=str)
    def test_dwconv5_is_the_references(shape):
        check_dwconv5(shape)

    def test_dwconv5_in_bfloat16_and_many_tiles_to_a_program(monkeypatch):
        from linic.kernels.dwconv5 import triton as form

        monkeypatch.setattr(form, "PROGRAMS", 2)
        check_dwconv5((3, 9, 4, 16), torch.bfloat16)

    def test_a_nan_reaches_its_neighbours_only():
        x, weight, _ = dwconv5_inputs((1, 9, 9, 4))
        x[0, 4, 4, 1] = math.nan
        bad = dwconv5(x, weight, backend="triton").isnan()
        assert bad[0, 2:7, 2:7, 1].all() and bad.sum() == 25

    def test_opcheck_of_dwconv5():
        x, weight, g = dwconv5_inputs((1, 3, 2, 3))
        leaves = x.requires_grad_(), weight.requires_grad_()
        torch.library.opcheck(torch.ops.linic.dwconv5.default, (*leaves, "triton"), test_utils=OPCHECKS)
        arguments = x.detach(), weight.detach(), g, "triton"
        torch.library.opcheck(torch.ops.linic.dwconv5_backward.default, arguments, test_utils=OPCHECKS)

    # The dynamic check traces the operator four more times, which the interpreter feels; shapes are checked by these.
    OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")

else:

    @needs_triton
    def test_the_kernels_are_right_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
        assert "skipped" not in run.stdout.splitlines()[-1]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    for shape in SHAPES:
        for decay in DECAYS:
            for spread in (3, 60):
                check_biwkv(shape, decay, spread, device="cuda")
        check_biwkv(shape, "bounded", 3, torch.bfloat16, "cuda")
    for shape in [*PICTURES, (2, 64, 96, 96), (1, 700, 3, 9)]:
        for dtype in (torch.float32, torch.bfloat16):
            check_dwconv5(shape, dtype, "cuda")
    strided_biwkv_agrees("cuda")

    # Long ones, with chunks of 64 and of 128 tokens, against the scan in float64.
    for shape in [(1, 24576, 144), (8, 49152, 96)]:
        inputs = biwkv_inputs(shape, "bounded", 3, device="cuda")
        w, u, k, v, g = (t.double() for t in inputs)
        y, aux = torch_form._forward_sums(w, u, k, v)
        expected = [y, *torch_form._backward_sums(w, u, k, v, y, aux, g)]
        got = value_and_gradients(by_triton(biwkv), inputs)
        assert_close(("y", "gw", "gu", "gk", "gv"), got, expected, FACTOR)
        assert all(torch.equal(a, b) for a, b in zip(got, value_and_gradients(by_triton(biwkv), inputs)))

    def step():
        leaves = [t.detach().requires_grad_() for t in small]
        pixels = [t.detach().requires_grad_() for t in (x, weight)]
        y = biwkv(*leaves)  # unnamed: Triton is what a CUDA device gets
        z = dwconv5(*pixels)
        return [y, z, *torch.autograd.grad(y, leaves, g), *torch.autograd.grad(z, pixels, gz)]

    *small, g = biwkv_inputs((2, 300, 40), "bounded", 3, torch.bfloat16, "cuda")
    x, weight, gz = dwconv5_inputs((2, 20, 15, 40), torch.bfloat16, "cuda")
    eager = step()
    torch.cuda.set_sync_debug_mode("error")  # any wait for the device is now an error
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager))


def test_triton_is_the_choice_on_cuda_where_it_is_and_never_on_a_cpu(monkeypatch):
    for reason, expected in (("", "triton"), ("not there", "torch")):
        monkeypatch.setitem(choice.ABSENT, "triton", reason)
        assert choice.choose("biwkv", "cuda", torch.float32, None) == expected
        assert choice.choose("biwkv", "cuda", torch.float64, None) == "torch"
        assert choice.choose("biwkv", "cpu", torch.float32, None) != "triton"


def test_triton_asked_for_where_it_cannot_run_says_why(monkeypatch):
    c, k = torch.zeros(4), torch.zeros(1, 3, 4)
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setitem(choice.ABSENT, "triton", "triton is not installed")
    with pytest.raises(BackendMissing, match="'triton' is not here: triton is not installed"):
        biwkv(c, c, k, k, backend="triton")
    monkeypatch.setitem(choice.ABSENT, "triton", "")
    with pytest.raises(BackendMissing, match="it runs on cuda, and the tensors are on cpu"):
        biwkv(c, c, k, k, backend="triton")
    with pytest.raises(UsageError, match="'triton' computes float32"):
        choice.choose("biwkv", "cuda", torch.float64, "triton")
