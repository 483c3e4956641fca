"""BiWKV: every backend against the float64 definition, in value and in all four gradients."""

import ctypes
import math
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linic.errors import BackendMissing, UsageError
from linic.kernels import biwkv, native
from linic.kernels.biwkv import torch_form
from linic.kernels.biwkv.reference import biwkv as reference

# Largest error allowed, relative to the largest value of the tensor. One table, with its reasons.
TOLERANCE = {
    # Products and sums round at 6e-8, exp of a position's weight (up to e^20) at 1e-6; carries are double.
    torch.float32: 5e-6,
    # An exponent of 200,000 (w = -200 a token, 1,000 tokens) has 3e-11 between neighbours, in the reference too.
    torch.float64: 2e-10,
}
# gw alone sums T^2 terms of either sign that nearly cancel: its relative error is that of the sum of their sizes.
GW_FACTOR = {torch.float32: 20, torch.float64: 1}
BACKENDS = ["torch"] if native.lib is None else ["native", "torch"]

DECAYS = {  # of w * T, but "huge" is w itself: each picks another path
    "bounded": lambda tokens, r: 32 * r / tokens,
    "zero": lambda tokens, r: 0 * r,
    "negative": lambda tokens, r: -30 * r / tokens,
    "either sign": lambda tokens, r: (400 * r - 200) / tokens,
    "large": lambda tokens, r: 200 * r / tokens,
    "huge": lambda tokens, r: 200 * r,
    "huge, negative": lambda tokens, r: -200 * r,
}


def random_inputs(batch, tokens, channels, decay, spread, seed):
    """float32 values, so that every dtype gets the same ones: w, u, k, v and the gradient of y."""
    r = torch.Generator().manual_seed(seed)
    w = DECAYS[decay](tokens, torch.rand(channels, generator=r))
    u = torch.randn(channels, generator=r)
    k = spread * (2 * torch.rand(batch, tokens, channels, generator=r) - 1)
    v, g = (torch.randn(batch, tokens, channels, generator=r) for _ in range(2))
    return w, u, k, v, g


def value_and_gradients(function, inputs):
    *values, g = inputs
    leaves = [t.detach().clone().requires_grad_() for t in values]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def by_reference(inputs):
    return value_and_gradients(reference, [t.double() for t in inputs])


def assert_close(got, expected, dtype, factor=1):
    for name, a, b in zip(("y", "gw", "gu", "gk", "gv"), got, expected):
        scale = max(b.double().abs().max().item(), 0.1)  # a gradient that is 0 in truth is a difference of terms near 1
        worst = (a.double() - b.double()).abs().max().item()
        allowed = factor * TOLERANCE[dtype] * (GW_FACTOR[dtype] if name == "gw" else 1)
        assert worst <= allowed * scale, f"{name}: off by {worst:.1e} at scale {scale:.1e}"


def seed_of(*case):
    """Other numbers for every case, the same ones every day: a failure can be looked at again."""
    return sum(map(ord, repr(case)))


@cache
def expected(batch, tokens, channels, decay, spread):
    inputs = random_inputs(batch, tokens, channels, decay, spread, seed_of(tokens, decay, spread))
    return inputs, by_reference(inputs)


def test_the_reference_is_the_formula():
    w, u, k, v, _ = random_inputs(1, 4, 1, "bounded", 3, 5)
    for t in range(4):
        weights = [
            math.exp(k[0, i, 0] + u[0]) if i == t else math.exp(k[0, i, 0] - (abs(t - i) - 1) * w[0]) for i in range(4)
        ]
        y = sum(weight * v[0, i, 0].item() for i, weight in enumerate(weights)) / sum(weights)
        assert reference(w, u, k, v)[0, t, 0].item() == pytest.approx(y, rel=1e-6)


@pytest.mark.parametrize("spread", [3, 60])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 64, 65, 1000])
def test_value_and_gradients_are_the_references(form, tokens, decay, spread):
    backend, dtype = form
    batch, channels = (1, 3) if tokens == 1000 else (2, 19)
    inputs, right = expected(batch, tokens, channels, decay, spread)
    got = value_and_gradients(lambda *a: biwkv(*a, backend=backend), [t.to(dtype) for t in inputs])
    assert_close(got, right, dtype)
    assert got[0].dtype == dtype


@pytest.mark.parametrize("decay", ["bounded", "negative", "large"])
def test_24576_tokens_agree_with_the_float64_scan(form, decay):
    backend, dtype = form
    inputs = random_inputs(1, 24576, 17, decay, 3, 1)
    w, u, k, v, g = (t.double() for t in inputs)
    y, aux = torch_form._forward_scan(w, u, k, v)
    right = [y, *torch_form._backward_scan(w, u, k, v, y, aux, g)]
    got = value_and_gradients(lambda *a: biwkv(*a, backend=backend), [t.to(dtype) for t in inputs])
    assert_close(got, right, dtype)


@pytest.mark.parametrize("channels", [1, 2, 7, 15, 16, 17, 31, 33, 48])
def test_any_number_of_channels(form, channels):
    backend, dtype = form
    inputs = random_inputs(3, 21, channels, "bounded", 3, channels)
    got = value_and_gradients(lambda *a: biwkv(*a, backend=backend), [t.to(dtype) for t in inputs])
    assert_close(got, by_reference(inputs), dtype)


def test_keys_and_values_may_be_slices_of_one_tensor(form):
    backend, dtype = form
    w, u, k, v, g = (t.to(dtype) for t in random_inputs(2, 33, 20, "bounded", 3, 3))
    plain = value_and_gradients(lambda *a: biwkv(*a, backend=backend), (w, u, k, v, g))
    poison = torch.full_like(k, math.nan)  # what lies between the rows must not be used
    leaf = torch.cat([k, v, poison], 2).requires_grad_()
    y = biwkv(w, u, leaf[..., :20], leaf[..., 20:40], backend=backend)
    (grad,) = torch.autograd.grad(y, leaf, g)
    assert torch.equal(y, plain[0])
    assert torch.equal(grad[..., :20], plain[3]) and torch.equal(grad[..., 20:40], plain[4])


def test_any_strides_give_the_same_result(form):
    backend, dtype = form
    w, u, k, v, g = (t.to(dtype) for t in random_inputs(3, 10, 18, "bounded", 3, 4))
    plain = value_and_gradients(lambda *a: biwkv(*a, backend=backend), (w, u, k, v, g))
    turned = [k.permute(2, 0, 1).contiguous().permute(1, 2, 0), v.transpose(0, 1).contiguous().transpose(0, 1)]
    leaves = [t.requires_grad_() for t in (torch.stack([w, w], 1)[:, 0], u.flip(0).flip(0), *turned)]
    y = biwkv(*leaves, backend=backend)
    odd_g = g.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip([y, *torch.autograd.grad(y, leaves, odd_g)], plain):
        assert torch.equal(a, b)


def test_one_tensor_expanded_over_the_batch_is_taken(form):
    backend, dtype = form
    *inputs, _ = (t.to(dtype) for t in random_inputs(1, 12, 5, "bounded", 3, 6))
    g = torch.randn(1, 12, 1).to(dtype).expand(4, 12, 5)

    def expanded(function):
        return lambda w, u, k, v: function(w, u, k.expand(4, -1, -1), v.expand(4, -1, -1))

    got = value_and_gradients(expanded(lambda *a: biwkv(*a, backend=backend)), (*inputs, g))
    assert_close(got, value_and_gradients(expanded(reference), [t.double() for t in (*inputs, g)]), dtype)


def test_every_output_is_written(form):
    backend, dtype = form
    inputs = [t.to(dtype) for t in random_inputs(2, 17, 19, "bounded", 3, 2)]
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN
    try:
        assert torch.empty(1).isnan().all()
        got = value_and_gradients(lambda *a: biwkv(*a, backend=backend), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("where", ["w", "u", "k", "v"])
def test_a_nan_is_handed_on_and_not_hidden(form, where):
    backend, dtype = form
    inputs = dict(zip("wukv", (t.to(dtype) for t in random_inputs(1, 9, 4, "bounded", 3, 8))))
    inputs[where][..., 1] = math.nan
    y = biwkv(**inputs, backend=backend)
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2, 3]].isfinite().all()


def test_a_constant_added_to_keys_changes_nothing_and_to_values_adds_itself(form):
    backend, dtype = form
    w, u, k, v, _ = (t.to(dtype) for t in random_inputs(2, 50, 9, "bounded", 3, 9))
    y = biwkv(w, u, k, v, backend=backend)
    assert_close([biwkv(w, u, k + 4, v + 1, backend=backend)], [y + 1], dtype, 10)


def test_extreme_u_is_taken(form):
    backend, dtype = form
    w, u, k, v, g = (t.to(dtype) for t in random_inputs(1, 20, 6, "bounded", 3, 10))
    inputs = (w, 200 * u, k, v, g)
    got = value_and_gradients(lambda *a: biwkv(*a, backend=backend), inputs)
    assert_close(got, by_reference(inputs), dtype)


@pytest.mark.parametrize("decay", ["bounded", "huge", "huge, negative"])
def test_gradcheck_of_the_torch_form(decay):
    *inputs, _ = random_inputs(2, 7, 3, decay, 2, 11)
    leaves = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *a: biwkv(*a, backend="torch"), leaves)


@pytest.mark.parametrize("tokens", [65, 128, 150])
def test_the_running_sum_for_gpus_is_the_plain_one(tokens):
    x = torch.randn(2, 3, tokens, 4, dtype=torch.float64)
    torch.testing.assert_close(torch_form._running_sum_in_two_levels(x), x.cumsum(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_cast_back(dtype):
    w, u, k, v, _ = random_inputs(2, 30, 8, "bounded", 3, 12)
    k, v = k.to(dtype), v.to(dtype)
    y = biwkv(w, u, k, v)
    assert y.dtype == dtype
    assert torch.equal(y, biwkv(w, u, k.float(), v.float()).to(dtype))


def test_autocast_changes_nothing():
    *inputs, _ = random_inputs(2, 30, 8, "bounded", 3, 12)
    for backend in ("torch", None):
        with torch.autocast("cpu", torch.bfloat16):
            y = biwkv(*inputs, backend=backend)
        assert torch.equal(y, biwkv(*inputs, backend=backend))


@pytest.mark.parametrize("decay", ["bounded", "huge"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, decay):
    w, u, k, v, g = random_inputs(2, 9, 5, decay, 3, 13)
    leaves = [t.requires_grad_() for t in (w, u, k, v)]
    torch.library.opcheck(torch.ops.linic.biwkv.default, (*leaves, backend))
    y, aux = (t.detach() for t in torch.ops.linic.biwkv(*leaves, backend))
    detached = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.linic.biwkv_backward.default, (*detached, y, aux, g, backend))


def test_compile_inference_mode_and_meta(form):
    backend, dtype = form
    inputs = [t.to(dtype) for t in random_inputs(2, 9, 5, "bounded", 3, 14)]
    eager = value_and_gradients(lambda *a: biwkv(*a, backend=backend), inputs)
    compiled = torch.compile(lambda *a: 2 * biwkv(*a, backend=backend), backend="aot_eager", fullgraph=True)
    doubled = value_and_gradients(compiled, inputs)
    assert_close(doubled, [2 * t for t in eager], dtype)
    with torch.inference_mode():
        assert torch.equal(biwkv(*inputs[:4], backend=backend), eager[0])
    meta = biwkv(*(t.to("meta") for t in inputs[:4]))
    assert meta.shape == eager[0].shape and meta.dtype == dtype and meta.is_meta


def test_flops_are_counted():
    *inputs, _ = random_inputs(2, 9, 5, "bounded", 3, 15)
    leaves = [t.requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        biwkv(*leaves).sum().backward()
    assert counter.get_total_flops() == 2 * 9 * 5 * (16 + 42)


def test_shapes_are_checked():
    w, k = torch.zeros(4), torch.zeros(1, 3, 4)
    empty = k[:, :0]
    for bad in [(w, w, k[0], k[0]), (w, w, k, k[:, :2]), (w[:3], w, k, k), (w, w[:3], k, k), (w, w, empty, empty)]:
        with pytest.raises(UsageError, match=r"biwkv takes w, u \(C,\)"):
            biwkv(*bad)


def test_backends_that_are_not_there_say_what_to_do():
    args = torch.zeros(4), torch.zeros(4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    with pytest.raises(BackendMissing, match=r"'triton' is not here: .*use 'torch'"):
        biwkv(*args, backend="triton")
    with pytest.raises(UsageError, match="no backend 'cuda': use one of"):
        biwkv(*args, backend="cuda")


needs_native = pytest.mark.skipif(native.lib is None, reason=f"no compiled kernels: {native.missing}")


@needs_native
def test_native_takes_float32_on_a_cpu_only():
    args = [t.double() for t in random_inputs(1, 3, 4, "bounded", 3, 16)[:4]]
    with pytest.raises(UsageError, match="'native' computes float32 on cpu"):
        biwkv(*args, backend="native")
    assert biwkv(*args).dtype == torch.float64


@needs_native
@pytest.mark.parametrize("decay, spread", [("bounded", 60), ("zero", 60), ("negative", 60), ("large", 3), ("huge", 3)])
def test_native_needs_no_help_inside_its_range(monkeypatch, decay, spread):
    inputs = random_inputs(2, 100, 20, decay, spread, 20)
    monkeypatch.setattr(torch_form, "forward", None)
    monkeypatch.setattr(torch_form, "backward", None)
    assert all(t.isfinite().all() for t in value_and_gradients(lambda *a: biwkv(*a, backend="native"), inputs))


@needs_native
@pytest.mark.parametrize("decay", DECAYS)
def test_native_and_torch_agree(decay):
    inputs = random_inputs(2, 300, 35, decay, 5, 17)
    runs = [value_and_gradients(lambda *a, b=b: biwkv(*a, backend=b), inputs) for b in ("native", "torch")]
    assert_close(*runs, torch.float32, 2)


@needs_native
def test_threads_change_no_bit():
    inputs = random_inputs(2, 100, 70, "bounded", 3, 18)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(lambda *a: biwkv(*a, backend="native"), inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("channels", [1, 5, 16, 19])
def test_native_writes_inside_its_outputs_only(isa, channels):
    native.use(isa)
    w, u, k, v, _ = random_inputs(1, 6, channels, "bounded", 3, 19)
    size, guard = 6 * channels, 64
    y, den = (torch.full((size + 2 * guard,), 7.0) for _ in range(2))
    strides = (6 * channels, channels)
    native.lib.linic_biwkv_forward(
        w.data_ptr(), u.data_ptr(), k.data_ptr(), *strides, v.data_ptr(), *strides,
        y[guard:].data_ptr(), den[guard:].data_ptr(), 1, 6, channels, 1,
    )  # fmt: skip
    native.use(native.instruction_sets()[0])
    for t in (y, den):
        assert (t[:guard] == 7).all() and (t[-guard:] == 7).all() and (t[guard:-guard] != 7).all()


@needs_native
def test_no_memory_for_scratch_is_a_status_and_an_error_not_a_crash():
    one = torch.zeros(1)
    p = one.data_ptr()
    status = native.lib.linic_biwkv_forward(p, p, p, 0, 0, p, 0, 0, p, p, 1, ctypes.c_int64(1 << 50), 1, 1)
    assert status == native.NO_MEMORY
    with pytest.raises(MemoryError, match="smaller"):
        native.check(status)
