"""Every integer operator beside its float twin, at the ends of its ranges in Python's integers, and what it refuses."""
import math
from itertools import accumulate, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linic.entropy import fast
from linic.entropy.convert import BONUS_LIMIT, DECAY_LIMIT, Builder, requantisation, table
from linic.entropy.operators import EXP_FIRST, FALL_FIRST, OPERATORS, SPAN, WORD, Op, Spec, isqrt
from linic.entropy.program import Program
from linic.errors import WeightsError
from linic.kernels.biwkv import reference
from linic.models import blocks, checkerboard
from linic.models.lower import Seen, _Lower

OCTAVE = 1024 / math.log(2)


def run(kind, *inputs, numbers=(), quality=0):
    return OPERATORS[kind].run(Op(kind, "out", (), (), numbers), quality, *inputs)


def check(kind, *inputs, numbers=()):
    return OPERATORS[kind].check(Op(kind, "out", (), (), numbers), *inputs)


def spec(low, high, n=4, scale=4, half=False):
    return Spec(np.full(n, low), np.full(n, high), scale, half)


def ints(low, high, *shape, seed=0):
    return np.random.default_rng(seed).integers(low, high + 1, shape)


def same(result, wanted):
    assert result.shape == wanted.shape and (result == wanted).all()


# Beside the float twin. The bounds: .5 for the rounding of the result, and what the rounding of constants adds.


def test_linear_is_the_float_product_rounded():
    x, weight = ints(-8192, 8191, 2, 3, 5, 40), ints(-8191, 8191, 24, 40, seed=1)
    scale, bias = np.geomspace(1e-9, 1e-7, 24), np.linspace(-3, 3, 24)
    requant = requantisation(weight, scale, bias, np.full(40, 8192), [512.0] * 24, [-8191] * 24, [8191] * 24)
    check("linear", spec(-8192, 8191, 40), weight, requant)
    twin = (x @ weight.T * scale + bias) * 512
    error = np.abs(run("linear", x, weight, requant) - twin.clip(-8191, 8191))
    assert (np.abs(twin) > 1000).any()
    assert error.max() <= 0.5 + 8191 / 2**16


def test_depthwise_is_the_float_convolution_rounded():
    x, kernel = ints(-8191, 8191, 2, 7, 6, 8), np.random.default_rng(1).normal(0, 0.2, (25, 8))
    b = Builder()
    b.bits["x"], b.largest["x"] = 9, np.full(8, 8191)
    b.depthwise("x", "y", kernel, 10)
    weight, requant = b.tensors["y.weight"], b.tensors["y.requant"]
    check("depthwise", spec(-8191, 8191, 8), weight.astype(np.int64), requant)
    planes = torch.from_numpy(x / 512.0).permute(0, 3, 1, 2)
    twin = F.conv2d(planes, torch.from_numpy(kernel.T.reshape(8, 1, 5, 5)), padding=2, groups=8)
    twin = twin.permute(0, 2, 3, 1).numpy() * 1024
    error = np.abs(run("depthwise", x, weight, requant) - twin.clip(-8191, 8191))
    step = np.abs(kernel).max() / 8190       # of the weights
    assert error.max() <= 0.5 + 8191 / 2**16 + 25 * 16 * 1024 * step / 2
    assert np.sqrt((error**2).mean()) < 1


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_patches_and_linear_are_a_convolution(kernel):
    x, weight = ints(-100, 100, 2, 5, 4, 3), ints(-50, 50, 6, 3, kernel, kernel, seed=1)
    around = range(-(kernel // 2), kernel // 2 + 1)
    offsets = tuple(v for offset in product(around, around) for v in offset)
    rows = weight.transpose(0, 2, 3, 1).reshape(6, -1)
    requant = np.array([[1, 0, 0, -WORD, WORD]] * 6).T
    y = run("linear", run("patches", x, numbers=offsets), rows, requant)
    twin = F.conv2d(*(torch.from_numpy(t).double() for t in (x.transpose(0, 3, 1, 2), weight)), padding=kernel // 2)
    same(y, twin.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("factor, kernel", [(2, 5), (2, 3), (1, 3), (2, 1)])
def test_an_up_sampling_is_lowered_to_its_transposed_convolution(factor, kernel):
    torch.manual_seed(0)
    up = blocks.Up(6, 4, factor, kernel)
    lower = object.__new__(_Lower)
    lower.b, lower.seen, lower.weight_bits = Builder(), Seen(), lambda name: 14
    lower.names = {id(module): name or "up" for name, module in up.named_modules()}
    lower.b.bits["x"], lower.b.largest["x"] = 9, np.full(6, 8191)
    lower.up("x", up, 10, 8191)
    x = ints(-2000, 2000, 2, 4, 5, 6)
    value = x
    for kind, _, _, tensors, numbers in lower.b.lines:
        value = run(kind, value, *(lower.b.tensors[t] for t in tensors), numbers=tuple(numbers))
    twin = up.double()(torch.from_numpy(x / 512.0)).detach().numpy() * 1024
    assert value.shape == twin.shape == (2, 4 * factor, 5 * factor, 4)
    assert np.abs(value - twin).max() < 1.5 and np.abs(twin).max() > 1000


@pytest.mark.parametrize("channels, deviation", [(6, 300), (96, 512), (192, 4000), (640, 3000)])
def test_norm_is_torchs_layer_norm_within_one_step(channels, deviation):
    x = np.clip(np.random.default_rng(2).normal(40, deviation, (1, 8, 8, channels)).round().astype(np.int64),
                -(2**23 // channels), 2**23 // channels)
    y = run("norm", x)
    twin = F.layer_norm(torch.from_numpy(x).double(), (channels,), eps=0).numpy() * 512
    assert np.abs(y - twin.clip(-8191, 8191)).max() < 1
    assert np.abs(y).max() > 512


def test_square_is_the_float_square_rounded_down():
    x = np.arange(8192)[None, None, None]
    y = run("square", x, numbers=(13, 8191))
    twin = np.minimum(x * x / 2**13, 8191)
    assert (twin - y >= 0).all() and (twin - y < 1).all()


@pytest.mark.parametrize("name, first, twin", [
    ("sigmoid", -2048, lambda z: 2**15 * torch.sigmoid(z / 256)),
    ("gelu", -4096, lambda z: (1024 * F.gelu(z / 512)).clamp(max=8191))])
def test_a_table_is_its_function_rounded_to_the_nearest(name, first, twin):
    entries = table(name)
    x = np.arange(first, first + len(entries))[None, None, None]
    y = run("lookup", x, entries, numbers=(first,))
    assert np.abs(y - twin(torch.from_numpy(x).double()).numpy()).max() <= 0.5 + 1e-6
    assert check("lookup", spec(x.min(), x.max()), entries.astype(np.int64), numbers=(first,)).high[0] == entries.max()


def test_the_gate_is_the_product_rounded():
    g, x = ints(0, 1 << 15, 1, 50, 50, 3), ints(-(1 << 15), 1 << 15, 1, 50, 50, 3, seed=1)
    assert np.abs(run("gate", g, x) - g * x / 2**15).max() <= 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 3), (8, 12), (14, 20)])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_biwkv_is_the_reference_within_the_rounding_of_its_distances(shape, spread):
    rng, c, t = np.random.default_rng(3), 16, math.prod(shape)
    k = np.rint(np.clip(rng.normal(0, spread, (2, *shape, c)), -4.8, 4.8) * OCTAVE).astype(np.int64)
    v = np.clip(rng.normal(0, 2500, k.shape).round(), -8192, 8191).astype(np.int64)
    decay, bonus = ints(0, DECAY_LIMIT, c), ints(-4431, 4431, c)
    check("biwkv", spec(-7091, 7091, c), spec(-8192, 8191, c), decay, bonus, table("exp"), table("fall"))
    y = run("biwkv", k, v, decay, bonus, table("exp"), table("fall"))
    twin = reference.biwkv(torch.from_numpy(decay / OCTAVE / t), torch.from_numpy(bonus / OCTAVE),
                           *(torch.from_numpy(a).reshape(2, t, c) for a in (k / OCTAVE, v)))
    error = y.reshape(2, t, c) - twin.numpy()
    # Distances are rounded to 2^-10 octaves, weights thus wrong by 7e-4 at most, and with them a mean of |v| <= 8192.
    assert np.abs(error).max() <= 0.5 + 8192 * 7e-4 and np.quantile(np.abs(error), 0.999) <= 2
    assert error.std() < 0.4            # rounding alone is .29


def test_add_and_rescale_are_clamped_sums_and_products():
    a, b = ints(-9000, 9000, 1, 9, 9, 4), ints(-9000, 9000, 1, 9, 9, 4, seed=1)
    same(run("add", a, b, numbers=(-8191, 8191)), np.clip(a + b, -8191, 8191))
    factor, offset = np.linspace(-2, 2, 404).reshape(101, 4), np.linspace(100, -100, 4)[None]
    m, c = np.rint(factor * 2**20).astype(np.int64), np.rint((offset + 0.5) * 2**20).astype(np.int64)
    for quality in (0, 37, 100):
        y = run("rescale", a, m, c, numbers=(20, -8191, 8191), quality=quality)
        assert np.abs(y - (a * factor[quality] + offset).clip(-8191, 8191)).max() <= 0.5 + 9000 / 2**20


def test_layout_operators_are_those_of_the_networks():
    x = ints(-99, 99, 2, 4, 6, 18)
    t = torch.from_numpy(x)
    for f in (1, 3):
        same(run("shuffle", x, numbers=(f,)), blocks.depth_to_space(t, f).numpy())
    anchors, others = checkerboard.split(t)
    same(run("half", x, numbers=(0,)), anchors.numpy())
    same(run("half", x, numbers=(1,)), others.numpy())
    same(run("join", anchors.numpy(), others.numpy()), x)
    same(run("around", anchors.numpy()), checkerboard.anchors_around(anchors).numpy())
    same(run("slice", run("concat", x, x + 1), numbers=(16, 20)), np.concatenate([x[..., 16:], x[..., :2] + 1], 3))


# At the ends of the ranges that `check` admits: int64 against Python's integers.


def test_linear_reaches_2_to_the_53_and_not_beyond():
    k, m = 1024, 1 << 17
    x = np.full((1, 1, 2, k), 8191)
    x[0, 0, 1] = -8191
    weight, sums = np.full((2, k), 8191), k * 8191 * 8191
    weight[1] = -8191
    c = 2**53 - 1 - sums * m
    requant = np.array([[m, m], [c, -c], [23, 0], [-WORD, -WORD], [WORD, WORD]])
    check("linear", spec(-8191, 8191, k), weight, requant)
    exact = run("linear", x.astype(object), weight, requant.astype(object))
    same(run("linear", x, weight, requant), exact)
    assert exact[0, 0, 0, 0] == (2**53 - 1) >> 23
    beyond = requant.copy()
    beyond[1, 0] += 1
    with pytest.raises(WeightsError, match=r"2\^53"):
        check("linear", spec(-8191, 8191, k), weight, beyond)


def test_depthwise_reaches_31_bits_and_not_beyond():
    largest = WORD // (25 * 8191)
    weight, x = np.full((25, 2), 8191), np.full((1, 6, 6, 2), largest)
    weight[:, 1] = -8191
    requant = np.array([[1 << 17] * 2, [1 << 45, -(1 << 45)], [17, 45], [-WORD] * 2, [WORD] * 2])
    check("depthwise", spec(-largest, largest, 2), weight, requant)
    same(run("depthwise", x, weight, requant), run("depthwise", x.astype(object), weight, requant.astype(object)))
    with pytest.raises(WeightsError, match="32 bits"):
        check("depthwise", spec(-largest - 1, largest, 2), weight, requant)


@pytest.mark.parametrize("channels", [1, 2, 255, 256, 640, 16384])
def test_norm_is_exact_where_channels_times_values_reach_2_to_the_23(channels):
    most = 2**23 // channels
    rows = np.full((7, channels), most)
    rows[1], rows[2, 0], rows[3, ::2], rows[4, : channels // 2] = -most, -most, -most, -most
    rows[5], rows[6] = ints(-most, most, channels), 0
    rows[6, -1] = 1
    check("norm", spec(-most, most, channels))
    with pytest.raises(WeightsError, match=r"2\^23"):
        check("norm", spec(-most - 1, most, channels))
    found = run("norm", rows[None, None])[0, 0]
    for row, y in zip(rows.tolist(), found.tolist()):
        total = sum(row)
        root = math.isqrt(64 * (channels * sum(v * v for v in row) - total * total + 1))
        inverse = 2**40 // root
        assert y == [min(max(((channels * v - total) * inverse + 2**27) >> 28, -8191), 8191) for v in row]


def test_isqrt_is_exact_around_squares_up_to_2_to_the_52_on_both_backends():
    n = np.unique(np.concatenate([np.arange(1, 3000), 2**26 - np.arange(3000), ints(1, 2**26, 20000),
                                  2 ** np.arange(27)]))
    for d in (n * n - 1, n * n, n * n + 1):
        wanted = np.array([math.isqrt(v) for v in d.tolist()])
        same(isqrt(d), wanted)
        same(fast.isqrt(torch.from_numpy(d).double()).numpy(), wanted)


def biwkv_exact(k, v, decay, bonus, exp, fall):
    """One channel, by the words of BiWkv's description, in Python's integers."""
    t, top = len(k), max(k)
    e = [(2 * i - (t - 1)) * decay // (2 * t) for i in range(t)]
    x = [max(a - top, -SPAN) for a in k]
    p = [exp[a + d - EXP_FIRST] for a, d in zip(x, e)]
    q = [exp[a - d - EXP_FIRST] for a, d in zip(x, e)]
    s = [exp[a + bonus - EXP_FIRST] << 14 for a in x]

    def sums(weights, ahead, own):
        before = [0, *accumulate(weights)][:-1]
        after = [0, *accumulate(reversed(ahead))][:-1][::-1]
        return [(a * fall[-e[i - 1] - FALL_FIRST] if i else 0) + (b * fall[e[i + 1] - FALL_FIRST] if i + 1 < t else 0)
                + o for i, (a, b, o) in enumerate(zip(before, after, own))]

    num = sums(*([a * b for a, b in zip(w, v)] for w in (p, q, s)))
    den = sums(p, q, s)
    assert max(map(abs, num)) + max(den) < 2**63
    return [(a + (b >> 1)) // b for a, b in zip(num, den)]


@pytest.mark.parametrize("decay", [0, 1, 5909, DECAY_LIMIT])
@pytest.mark.parametrize("bonus", [-BONUS_LIMIT, BONUS_LIMIT])
def test_biwkv_is_exact_over_the_longest_sequence(decay, bonus):
    t = 1 << 14
    rng = np.random.default_rng(4)
    v = np.stack([np.full(t, 8191), np.full(t, -8192), rng.choice([-8192, 8191], t), rng.integers(-8192, 8192, t)], 1)
    k = np.stack([np.zeros(t), np.zeros(t), rng.choice([-1 << 20, 1 << 20], t), rng.integers(-7091, 7091, t)], 1)
    k, exp, fall = k.astype(np.int64), table("exp"), table("fall")
    tensors = np.full(4, decay), np.full(4, bonus), exp, fall
    check("biwkv", spec(-1 << 20, 1 << 20), spec(-8192, 8191), *(a.astype(np.int64) for a in tensors))
    found = run("biwkv", k.reshape(1, 128, 128, 4), v.reshape(1, 128, 128, 4), *tensors).reshape(t, 4)
    assert (found[:, 0] == 8191).all() and (found[:, 1] == -8192).all()
    for channel in range(4):
        exact = biwkv_exact(k[:, channel].tolist(), v[:, channel].tolist(), decay, bonus, exp.tolist(), fall.tolist())
        assert found[:, channel].tolist() == exact


def test_rescale_reaches_2_to_the_62():
    m, c, x = np.array([[1 << 45, -(1 << 45)]]), np.array([[2**61, -(2**61)]]), np.array([[[[WORD >> 16] * 2]]])
    check("rescale", spec(-WORD >> 16, WORD >> 16, 2), m, c, numbers=(31, -WORD, WORD))
    same(run("rescale", x, m, c, numbers=(31, -WORD, WORD)),
         np.clip((x.astype(object) * m.astype(object) + c.astype(object)) >> 31, -WORD, WORD))


@pytest.mark.parametrize("kind, inputs, numbers", [
    ("square", [spec(0, 32767)], (0, WORD)), ("gate", [spec(0, 1 << 15), spec(-(1 << 15), 1 << 15)], ()),
    ("add", [spec(-(1 << 30), 1 << 30), spec(1 - (1 << 30), (1 << 30) - 1)], (-WORD, WORD)),
    ("rescale", [spec(-8191, 8191), ints(-(1 << 40), 1 << 40, 101, 4), ints(-(1 << 60), 1 << 60, 1, 4)],
     (30, -9999, 9999)),
    ("lookup", [spec(-5, 4), np.array([9, -9, 3, 2, 1, 0, 5, 6, 7, 8])], (-5,))])
def test_results_stay_within_the_bounds_that_check_derives(kind, inputs, numbers):
    found = check(kind, *inputs, numbers=numbers)
    specs = [x for x in inputs if isinstance(x, Spec)]
    values = [np.stack([s.low, s.high, s.low // 2, s.high // 3])[None, None] for s in specs]
    for quality in (0, 100):
        for mixed in product(*([v, v[:, :, ::-1]] for v in values)):
            y = run(kind, *mixed, *inputs[len(specs):], numbers=numbers, quality=quality)
            assert (y >= found.low).all() and (y <= found.high).all()


@pytest.mark.parametrize("kind, numbers, half", [("patches", (1, 1, 0, 0), False), ("around", (), True)])
@pytest.mark.parametrize("low, high", [(3, 9), (-9, -3)])
def test_the_zeros_outside_count_in_the_bounds(kind, numbers, half, low, high):
    found = check(kind, spec(low, high, half=half), numbers=numbers)
    y = run(kind, ints(low, high, 1, 4, 2, 4), numbers=numbers)
    assert (y == 0).any() and (y >= found.low).all() and (y <= found.high).all()


# What is refused.

ONES, FLAT = np.ones((3, 4), np.int64), np.array([[1, 0, 0, -9, 9]] * 3).T
EXP, FALL = table("exp").astype(np.int64), table("fall").astype(np.int64)
NONE, LEAST = np.zeros(4, np.int64), np.iinfo(np.int64).min


def put(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


def biwkv(k=(-9, 9), v=(-9, 9), decay=NONE, bonus=NONE, exp=EXP, fall=FALL):
    return "biwkv", [spec(*k), spec(*v), decay, bonus, exp, fall], ()


def linear(weight=ONES, requant=FLAT, x=(-9, 9)):
    return "linear", [spec(*x), weight, requant], ()


def depthwise(weight, requant=FLAT, half=False):
    return "depthwise", [spec(-9, 9, 4, 4, half), weight, requant], ()


WINDOW, FOUR = np.ones((25, 4), np.int64), np.array([[1, 0, 0, -9, 9]] * 4).T
BAD = {
    "linear: wrong width": (linear(np.ones((3, 5), np.int64)), "4 channels"),
    "linear: one axis": (linear(np.ones(4, np.int64)), "4 channels"),
    "linear: no rows": (linear(np.ones((0, 4), np.int64), FLAT[:, :0]), "0 channels"),
    "linear: 15 bits": (linear(put(ONES, 0, 8192)), "14 bits"),
    "linear: least int64": (linear(put(ONES, 0, LEAST)), "14 bits"),
    "linear: short requantisation": (linear(requant=FLAT[:4]), "requantisation"),
    "linear: requantisation of another": (linear(requant=FLAT[:, :2]), "requantisation"),
    "linear: negative m": (linear(requant=put(FLAT, (0, 0), -1)), "m or s"),
    "linear: large m": (linear(requant=put(FLAT, (0, 0), (1 << 17) + 1)), "m or s"),
    "linear: negative shift": (linear(requant=put(FLAT, (2, 0), -1)), "m or s"),
    "linear: large shift": (linear(requant=put(FLAT, (2, 0), 46)), "m or s"),
    "linear: large c": (linear(requant=put(FLAT, (1, 0), 1 << 53)), r"c\| reaches"),
    "linear: least c": (linear(requant=put(FLAT, (1, 0), LEAST)), r"c\| reaches"),
    "linear: low above high": (linear(requant=put(FLAT, (3, 0), 10)), "32 bits"),
    "linear: result beyond 32 bits": (linear(requant=put(FLAT, (4, 0), 1 << 31)), "32 bits"),
    "linear: least low": (linear(requant=put(FLAT, (3, 0), LEAST)), "32 bits"),
    "depthwise: 24 taps": (depthwise(WINDOW[:24], FOUR), "weight"),
    "depthwise: on a half": (depthwise(WINDOW, FOUR, half=True), "weight"),
    "depthwise: least int64": (depthwise(put(WINDOW, 0, LEAST), FOUR), "14 bits"),
    "depthwise: requantisation": (depthwise(WINDOW, FLAT), "requantisation"),
    "patches: no offset": (("patches", [spec(-9, 9)], ()), "offsets"),
    "patches: half an offset": (("patches", [spec(-9, 9)], (1, 1, 1)), "offsets"),
    "patches: far": (("patches", [spec(-9, 9)], (3, 0)), "offsets"),
    "patches: on a half": (("patches", [spec(-9, 9, 4, 4, True)], (0, 0)), "offsets"),
    "patches: many channels": (("patches", [spec(-9, 9, 9000)], (0, 0, 1, 1)), "18000 channels"),
    "norm: large": (("norm", [spec(-(1 << 22), 0)], ()), r"2\^23"),
    "square: negative": (("square", [spec(-1, 9)], (0, 9)), "range"),
    "square: large": (("square", [spec(0, 32768)], (0, 9)), "range"),
    "square: shift": (("square", [spec(0, 9)], (-1, 9)), "range"),
    "square: high": (("square", [spec(0, 9)], (0, 0)), "range"),
    "lookup: below": (("lookup", [spec(-1, 3), NONE], (0,)), "a table of 4 from 0"),
    "lookup: above": (("lookup", [spec(0, 4), NONE], (0,)), "a table of 4 from 0"),
    "lookup: two axes": (("lookup", [spec(0, 3), ONES], (0,)), "table"),
    "lookup: beyond 32 bits": (("lookup", [spec(0, 3), put(NONE, 1, LEAST)], (0,)), "32 bits"),
    "gate: negative": (("gate", [spec(-1, 9), spec(-9, 9)], ()), "range"),
    "gate: above 1": (("gate", [spec(0, 32769), spec(-9, 9)], ()), "range"),
    "gate: large x": (("gate", [spec(0, 9), spec(-32769, 9)], ()), "range"),
    "gate: channels": (("gate", [spec(0, 9, 3), spec(-9, 9)], ()), "range"),
    "gate: grids": (("gate", [spec(0, 9, 4, 2), spec(-9, 9)], ()), "different grids"),
    "biwkv: large v": (biwkv(v=(-8193, 9)), "14 bits"),
    "biwkv: large k": (biwkv(k=(-9, (1 << 20) + 1)), "k beyond 20"),
    "biwkv: growing weights": (biwkv(decay=put(NONE, 0, -1)), "decay or bonus"),
    "biwkv: large decay": (biwkv(decay=put(NONE, 0, DECAY_LIMIT + 1)), "decay or bonus"),
    "biwkv: least bonus": (biwkv(bonus=put(NONE, 0, LEAST)), "decay or bonus"),
    "biwkv: large bonus": (biwkv(bonus=put(NONE, 0, BONUS_LIMIT + 1)), "decay or bonus"),
    "biwkv: channels": (biwkv(decay=NONE[:3], bonus=NONE[:3]), "shapes"),
    "biwkv: short exp": (biwkv(exp=EXP[:-1]), "table lengths"),
    "biwkv: short fall": (biwkv(fall=FALL[:-1]), "table lengths"),
    "biwkv: zero in exp": (biwkv(exp=put(EXP, 0, 0)), "tables out of range"),
    "biwkv: least in fall": (biwkv(fall=put(FALL, 0, LEAST)), "tables out of range"),
    "biwkv: exp that falls": (biwkv(exp=put(EXP, 0, EXP.max())), "63 bits"),
    "biwkv: fall that falls": (biwkv(fall=put(FALL, 0, FALL.max())), "63 bits"),
    "biwkv: constant tables": (biwkv(exp=np.full_like(EXP, 1 << 26)), "63 bits"),
    "add: beyond 32 bits": (("add", [spec(-9, WORD), spec(-9, 1)], (-9, 9)), "range"),
    "add: low above high": (("add", [spec(-9, 9), spec(-9, 9)], (9, -9)), "low above high"),
    "add: channels": (("add", [spec(-9, 9, 3), spec(-9, 9)], (-9, 9)), "range"),
    "add: half and whole": (("add", [spec(-9, 9, 4, 4, True), spec(-9, 9)], (-9, 9)), "different grids"),
    "rescale: rows": (("rescale", [spec(-9, 9), np.ones((100, 4)), ONES[:1]], (0, -9, 9)), "a row is"),
    "rescale: channels": (("rescale", [spec(-9, 9), ONES[:1, :3], ONES[:1]], (0, -9, 9)), "a row is"),
    "rescale: reach": (("rescale", [spec(-9, 9), put(ONES[:1], 0, 1 << 59), ONES[:1]], (0, -9, 9)), "range"),
    "rescale: least": (("rescale", [spec(-9, 9), ONES[:1], put(ONES[:1], 0, LEAST)], (0, -9, 9)), "range"),
    "rescale: shift": (("rescale", [spec(-9, 9), ONES[:1], ONES[:1]], (63, -9, 9)), "range"),
    "rescale: low above high": (("rescale", [spec(-9, 9), ONES[:1], ONES[:1]], (0, 9, -9)), "range"),
    "concat: nothing": (("concat", [], ()), "nothing to join"),
    "concat: grids": (("concat", [spec(0, 9), spec(0, 9, 4, 2)], ()), "different grids"),
    "concat: many channels": (("concat", [spec(0, 9, 9000)] * 2, ()), "18000 channels"),
    "slice: empty": (("slice", [spec(0, 9)], (2, 2)), "channels 2 to 2"),
    "slice: beyond": (("slice", [spec(0, 9)], (0, 5)), "channels 0 to 5 of 4"),
    "slice: negative": (("slice", [spec(0, 9)], (-1, 2)), "channels -1 to 2"),
    "shuffle: factor": (("shuffle", [spec(0, 9, 25)], (5,)), "factor 5"),
    "shuffle: none": (("shuffle", [spec(0, 9)], (0,)), "factor 0"),
    "shuffle: channels": (("shuffle", [spec(0, 9, 6)], (2,)), "factor 2"),
    "shuffle: fine enough": (("shuffle", [spec(0, 9, 4, 64)], (2,)), "factor 2"),
    "half: third half": (("half", [spec(0, 9)], (2,)), "half"),
    "half: of a half": (("half", [spec(0, 9, 4, 4, True)], (0,)), "half"),
    "half: of one row": (("half", [spec(0, 9, 4, 1)], (0,)), "half"),
    "join: wholes": (("join", [spec(0, 9), spec(0, 9)], ()), "not two halves"),
    "join: channels": (("join", [spec(0, 9, 4, 4, True), spec(0, 9, 3, 4, True)], ()), "not two halves"),
    "around: a whole": (("around", [spec(0, 9)], ()), "needs the anchors"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_could_leave_its_range_is_refused_when_a_program_is_loaded(case):
    (kind, inputs, numbers), message = BAD[case]
    with pytest.raises(WeightsError, match=message):
        check(kind, *inputs, numbers=numbers)


def test_every_operator_has_a_case_that_is_refused():
    assert {case.split(":")[0] for case in BAD} == set(OPERATORS)


# Programs: a smallest one, and what each line of it must not be.

LINES = [["symbols", "z", [], [], [2]], ["concat", "wide", ["z"] * 16, [], []], ["shuffle", "at16", ["wide"], [], [4]],
         ["rescale", "index", ["at16"], ["zero", "zero"], [0, 0, 3]],
         ["half", "m0", ["at16"], [], [0]], ["half", "i0", ["index"], [], [0]],
         ["half", "m1", ["at16"], [], [1]], ["half", "i1", ["index"], [], [1]],
         ["code", "y0", ["m0", "i0"], [], [0, 0, 1]], ["code", "y1", ["m1", "i1"], [], [0, 1, 1]],
         ["join", "y", ["y0", "y1"], [], []]]
TENSORS = {"zero": np.zeros((1, 2), np.int8)}


def changed(at, part, value):
    lines = [[*line] for line in LINES]
    lines[at][part] = value
    return lines


def test_a_smallest_program_is_accepted_and_says_what_it_is():
    program = Program(LINES, TENSORS, 4)
    assert (program.latents, program.z_channels, len(program.specs)) == (2, 2, len(LINES))
    assert program.lines() == LINES and "code(m0, i0, 0, 0, 1)" in str(program)


BAD_LINES = {
    "no list": ({}, "expected a list"), "a line of text": (["symbols"], "no operator"),
    "a short line": ([["symbols", "z", [], []]], "no operator"),
    "a number for a name": (changed(0, 1, 7), "no operator"),
    "an unknown kind": (changed(1, 0, "softmax"), "unknown operator 'softmax'"),
    "too many arguments": (changed(2, 2, ["wide", "z"]), "is not what it takes"),
    "too few numbers": (changed(2, 4, []), "is not what it takes"),
    "a tensor too many": (changed(2, 3, ["zero"]), "is not what it takes"),
    "bool for int": (changed(4, 4, [False]), "is not what it takes"),
    "float for int": (changed(4, 4, [0.0]), "is not what it takes"),
    "text for int": (changed(4, 4, ["0"]), "is not what it takes"),
    "a huge number": (changed(2, 4, [10**40]), "is not what it takes"),
    "beyond 32 bits": (changed(3, 4, [0, 0, 1 << 31]), "is not what it takes"),
    "257 arguments": (changed(1, 2, ["z"] * 257), "at most 256"),
    "read before written": (changed(1, 2, ["at16"] * 16), "which nothing has written"),
    "written twice": (changed(6, 1, "m0"), "written twice"),
    "no such tensor": (changed(3, 3, ["zero", "one"]), "'one' is not in the file"),
    "symbols twice": ([LINES[0], ["symbols", "more", [], [], [2]], *LINES[1:]], "symbols come once"),
    "no symbols": (changed(0, 4, [0]), "symbols come once"),
    "many symbols": (changed(0, 4, [4097]), "symbols come once"),
    "others before anchors": (changed(8, 4, [0, 1, 1]), "out of order"),
    "anchors twice": (changed(9, 4, [0, 0, 1]), "out of order"),
    "a gap": (changed(8, 4, [1, 0, 1]), "out of order"),
    "a third half": (changed(9, 4, [0, 2, 1]), "out of order"),
    "skip": (changed(8, 4, [0, 0, 5]), "out of order"),
    "index beyond the tables": (changed(3, 4, [0, 0, 4]) and changed(8, 2, ["m0", "m0"]), "index out of range"),
    "a whole coded": (changed(8, 2, ["at16", "index"]), "not two halves"),
    "another result": (changed(10, 1, "x"), "its result 'y'"),
    "a half as result": (changed(9, 1, "y")[:10], "its result 'y'"),
    "anchors without others": ([*LINES, ["code", "more", ["m0", "i0"], [], [2, 0, 1]]], "its result 'y'"),
    "too many lines": ([LINES[0]] * 20_001, "at most 20000"),
    "channels without end": ([LINES[0], ["concat", "c0", ["z"] * 256, [], []],
                              *(["concat", f"c{i}", ["c0"] * 32, [], []] for i in range(1, 200))], "channels in all"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_program_that_is_not_right_is_refused_with_its_line(case):
    lines, message = BAD_LINES[case]
    with pytest.raises(WeightsError, match=message):
        Program(lines, TENSORS, 4)


@pytest.mark.parametrize("tensor", [np.zeros((1, 2)), np.zeros((1, 2), bool), np.zeros((1, 2), np.uint8),
                                    np.zeros((1, 0), np.int8), np.zeros((1, 2), np.complex64)])
def test_tensors_of_a_program_are_signed_integers(tensor):
    with pytest.raises(WeightsError, match="not integers"):
        Program(LINES, {"zero": tensor}, 4)


def test_int8_weights_of_minus_128_are_weights_like_others():
    """abs() of them wraps in eight bits: they must not pass for something smaller than they are."""
    weight, requant = np.full((3, 4), -128, np.int8), FLAT
    found = check("linear", spec(-8191, 8191), weight.astype(np.int64), requant)
    x = np.full((1, 1, 1, 4), 8191)
    same(run("linear", x, weight, requant), np.clip(run("linear", x.astype(object), weight, requant), -9, 9))
    assert found.high.max() == 9
