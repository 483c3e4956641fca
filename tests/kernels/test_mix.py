"""The fused mixes and chains against the plain path: values and all gradients."""

import math
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from linic.entropy.rounding import bounded, gaussian_likelihood
from linic.kernels import mix, native, pointwise
from linic.kernels.choice import unfused
from linic.kernels.mix import cpu
from linic.models.blocks import Block, Linear, Projection, merge_shifts
from linic.models.config import Style

pytestmark = pytest.mark.skipif(native.lib is None, reason=f"no compiled kernels: {native.missing}")

# Relative to the norm of the whole tensor.
FLOAT32 = 2e-5
# Of either path against float64: both round operands to 8 bits, in other places. The fused one may not be worse.
BF16, ROOM = 0.02, 1.3


@pytest.fixture(params=native.instruction_sets())
def isa(request):
    native.use(request.param)
    yield request.param
    native.use(native.instruction_sets()[0])


@pytest.fixture
def plain():
    """A switch: from now on nothing is fused."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(unfused())


def block(channels=24, hidden=2, normative=False, shift=True, bf16="never", wild=0.5, **style):
    torch.manual_seed(sum(map(ord, repr((channels, hidden, normative, shift)))))
    made = Block(channels, hidden, Style(zero_init=False, **style), normative=normative, shift=shift)
    with torch.no_grad():
        for p in made.parameters():
            p += wild * torch.randn_like(p)
    for module in made.modules():
        if isinstance(module, Linear):
            module.bf16 = bf16
    return made


def inputs(shape):
    r = torch.Generator().manual_seed(sum(shape))
    return 2 * torch.randn(shape, generator=r), torch.randn(shape, generator=r)


def value_and_gradients(made, x, g):
    made.zero_grad()
    x = x.detach().requires_grad_()
    y = made(x)
    y.backward(g)
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in made.named_parameters()}}
    if x.shape[1] * x.shape[2] == 1:
        del found["spatial.u"]  # 0 in truth: a token that is alone cannot be weighed
    return found


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-6))


def assert_close(got, expected, allowed=FLOAT32):
    for name, value in expected.items():
        assert error(got[name], value) <= allowed, name


CASES = [(1, 1, 1, 24), (3, 3, 5, 5), (1, 7, 9, 16), (2, 20, 18, 40)]


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
@pytest.mark.parametrize("normative", [False, True], ids=["free", "normative"])
def test_float32_is_the_plain_path(isa, plain, normative, shift, shape):
    made = block(shape[3], 2 + shape[3] % 2, normative, shift)
    fused = value_and_gradients(made, *inputs(shape))
    plain()
    assert_close(fused, value_and_gradients(made, *inputs(shape)))


@pytest.mark.parametrize("normative", [False, True], ids=["free", "normative"])
@pytest.mark.parametrize("shape", CASES[1:], ids=str)
def test_bf16_is_as_close_to_float64_as_the_plain_path(isa, plain, normative, shape):
    made = block(shape[3], normative=normative, bf16="always", wild=0.1)
    x, g = inputs(shape)
    fused = value_and_gradients(made, x, g)
    plain()
    rounded = value_and_gradients(made, x, g)
    for module in made.modules():
        if isinstance(module, Linear):
            module.bf16 = "never"
    right = value_and_gradients(made.double(), x.double(), g.double())
    for name, value in right.items():
        assert error(fused[name], value) <= max(BF16, ROOM * error(rounded[name], value)), name


def test_long_sequences_keep_float32(plain):
    made, (x, g) = block(16, wild=0.2), inputs((1, 40, 50, 16))
    fused = value_and_gradients(made, x, g)
    plain()
    assert_close(fused, value_and_gradients(made, x, g))


@pytest.mark.parametrize("half", [False, True])
def test_threads_change_no_bit_and_every_output_is_written(isa, half):
    """Of the compiled parts: torch's own products may depend on the number of threads."""
    b, h, w, c, hidden = 3, 9, 11, 40, 80
    x, g = inputs((b, h, w, c))
    norm = torch.randn(c), torch.randn(c), torch.randn(25, c)
    limits, tokens = mix.Limits(4.8, 16, 8), (b, h * w)

    def everything():
        s, stats = cpu.norm_forward(x, *norm, 1e-5, half)
        kvr = torch.cat([s, s.flip(0), s.flip(1)], 1)
        found = [s, stats, *cpu.norm_backward(x, *norm, stats, s, g)]
        found += cpu.norm_forward(x, *norm[:2], None, 1e-5, half)
        found += cpu.norm_backward(x, *norm[:2], None, stats, s, g)
        p, y, den = cpu.attend_forward(kvr, norm[0].abs() / 99, norm[1], tokens, limits, True)
        found += [p, y, den, *cpu.attend_backward(kvr, norm[0].abs() / 99, norm[1], y, den, s, tokens, limits)]
        square, gkr = cpu.square_forward(kvr, hidden, limits), torch.empty_like(kvr)
        cpu.square_backward(kvr, square, gkr, limits)
        found += [square, cpu.gate_forward(x, kvr, s, limits), cpu.gate_backward(g, kvr, s, gkr, limits), gkr]
        found.append(cpu.add(x.view(-1, c), s.bfloat16()))
        return [t for t in found if t is not None]

    before, runs = torch.get_num_threads(), []
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*runs))


@pytest.mark.parametrize("bf16", ["never", "always"])
def test_without_gradients_the_value_is_the_same(bf16):
    made, (x, _) = block(40, bf16=bf16), inputs((2, 13, 11, 40))
    y = made(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(made(x), y)
            assert_close({"y": merge_shifts(block(40, bf16=bf16))(x)}, {"y": y}, 1e-6 if bf16 == "never" else 1e-2)


def test_any_strides_are_taken(isa):
    made, (x, g) = block(24), inputs((2, 6, 8, 24))
    right = value_and_gradients(made, x, g)
    turned = [t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for t in (x, g)]
    assert not turned[0].is_contiguous()
    got = value_and_gradients(made, *turned)
    assert all(torch.equal(got[name], value) for name, value in right.items())


@pytest.mark.parametrize("bf16", ["never", "always"])
@pytest.mark.parametrize("normative", [False, True])
def test_what_the_compiled_loop_refuses_goes_the_plain_way(plain, normative, bf16):
    made, (x, g) = block(24, normative=normative, bf16=bf16).spatial, inputs((2, 5, 4, 24))
    with torch.no_grad():
        made.kvr.weight[3] = math.nan  # one key of 24: its own column of values is lost, and what is made of it
    kvr = torch.randn(2, 20, 72)
    kvr[..., 3] = math.nan
    decay = [t.detach().requires_grad_() for t in made.decay(20, x)]
    p = made.attend(kvr, *decay)
    assert p[..., 3].isnan().all() and p[..., [2, 4]].isfinite().all()
    fused = value_and_gradients(made, x, g)
    plain()
    for name, value in value_and_gradients(made, x, g).items():
        assert torch.equal(fused[name].isnan(), value.isnan()), name


@pytest.mark.parametrize("normative", [False, True], ids=["free", "normative"])
def test_extreme_weights_are_as_right_as_on_the_plain_path(isa, plain, normative):
    """Saturated keys, gates and clamps, where a bound's gradient passes on one side only."""
    made, (x, g) = block(16, normative=normative, wild=3), inputs((1, 8, 9, 16))
    fused = value_and_gradients(made, x, g)
    plain()
    single = value_and_gradients(made, x, g)
    for name, right in value_and_gradients(made.double(), x.double(), g.double()).items():
        assert error(fused[name], right) <= FLOAT32 + ROOM * error(single[name], right), name


def test_a_nan_is_handed_on(isa):
    x, _ = inputs((1, 8, 8, 16))
    x[0, 4, 4, 3] = math.nan
    assert block(16)(x).isnan().all()  # LayerNorm, then every token reads every other


@pytest.mark.parametrize("style", [{"bounds": "authors"}, {"layer_scale": True}, {"scan": "column"},
                                   {"attention": "aft"}, {"attention": "none"}], ids=str)  # fmt: skip
def test_other_styles_take_the_plain_path(monkeypatch, style):
    monkeypatch.setattr(mix, "spatial_mix", None)
    made = block(16, **style)
    assert all(t.isfinite().all() for t in value_and_gradients(made, *inputs((1, 4, 5, 16))).values())


def test_who_wants_to_see_the_operators_sees_them(monkeypatch):
    made, (x, _) = block(16), inputs((1, 4, 5, 16))
    monkeypatch.setattr(mix, "spatial_mix", None)
    monkeypatch.setattr(mix, "channel_mix", None)
    with FlopCounterMode(display=False) as counter:
        made(x).sum().backward()
    assert counter.get_total_flops() > 20 * 16 * 16 * 20
    assert made.double()(x.double()).dtype == torch.float64
    made.float()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert compiled(x).shape == x.shape


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_rounds_operands_only_in_training(plain, bias):
    made, (x, g) = Projection(40, 24, bias=bias), inputs((2, 3, 5, 40))
    g = g[..., :24]
    exact = value_and_gradients(made, x, g)
    made.bf16 = "training"
    fused = value_and_gradients(made, x, g)
    assert fused["y"].dtype == torch.float32
    assert 1e-4 < error(fused["y"], exact["y"]) < 1e-2
    assert torch.equal(made.eval()(x), exact["y"])
    plain()
    assert_close(fused, value_and_gradients(made.train(), x, g), 1e-2)


def test_the_probability_of_a_bin(isa):
    r = torch.Generator().manual_seed(0)
    d = torch.randn(3001, generator=r) * torch.exp(2 * torch.randn(3001, generator=r))
    s = 7.7 * torch.rand(3001, generator=r) - 2.2
    runs = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (d, s)]
        p = gaussian_likelihood(*leaves)
        runs.append([p.detach(), *torch.autograd.grad(-torch.log2(p).sum(), leaves)])
    for got, right in zip(*runs):  # differences of two numbers near 1 where the scale is large
        assert ((got - right).abs() <= 5e-4 * (right.abs() + 1e-3)).all()
    bad = torch.tensor([math.nan, 0.0]), torch.tensor([0.0, math.nan])
    assert gaussian_likelihood(*bad).isnan().all()


def test_the_bounded_gelu(isa):
    x, g = 5 * torch.randn(1003), torch.randn(1003)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, right = pointwise.gelu(leaf, 8), F.gelu(bounded(exact, -8, 8))
    torch.testing.assert_close(y.double(), right, atol=1e-6, rtol=0)
    y.backward(g)
    right.backward(g.double())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=3e-6, rtol=0)
