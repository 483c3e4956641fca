"""The compiled integer kernels give the integers that entropy/operators.py defines, on every instruction set here."""

import numpy as np
import pytest
import torch

from linic import weights
from linic.entropy import carriers, native
from linic.entropy.fast import Torch
from linic.entropy.operators import (
    BONUS_LIMIT,
    DECAY_LIMIT,
    EXP_FIRST,
    EXP_LAST,
    FALL_FIRST,
    OPERATORS,
    QUALITIES,
    WORD,
    Op,
    Spec,
)
from linic.entropy.program import Numpy, known_answer, plan
from linic.entropy.steps import StepProgram
from linic.entropy.walk import walk
from linic.errors import BackendMissing
from linic.kernels import exact

needed = pytest.mark.skipif(exact.lib is None, reason=exact.missing)
GRIDS = [(1, 1, 1), (3, 2, 3), (1, 7, 9), (2, 8, 13)]
DEFINED = {**OPERATORS, **StepProgram.operators}
SIZES = [(*grid, c) for grid, c in zip(GRIDS, (1, 16, 21, 96))] + [(1, 1, 1, 96), (3, 5, 1, 7), (1, 1, 50, 33)]
EXP, FALL = (np.rint(2.0 ** (np.arange(first, last + 1) / 1024 + bits)).astype(np.int64)
             for first, last, bits in ((EXP_FIRST, EXP_LAST, 20), (FALL_FIRST, BONUS_LIMIT, 14)))


@pytest.fixture(params=exact.instruction_sets())
def isa(request):
    exact.use(request.param)
    yield request.param
    exact.use(exact.instruction_sets()[0])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def drawn(random, shape, low, high):
    """Numbers of a register, its ends among them."""
    x = random.integers(low, high + 1, shape)
    x[random.random(shape) < 0.1] = low
    x[random.random(shape) < 0.1] = high
    return x


def requant(random, n, shift=(18, 30), limit=8191):
    return np.stack([random.integers(0, 1 << 17, n), random.integers(-(1 << 35), 1 << 35, n),
                     random.integers(*shift, n), -random.integers(0, limit + 1, n), random.integers(0, limit + 1, n)])


def refuse(op, *_):
    raise AssertionError(f"{op.kind} -> {op.out} was left to torch")


def both(ops, tensors, inputs, quality=40, register=lambda x: torch.from_numpy(x).int(), wait=True, specs=None,
         fallback=refuse):
    """The registers of these lines by the definition and by the kernels."""
    specs = specs or {name: Spec(*(np.full(x.shape[3], f()) for f in (x.min, x.max)), 1) for name, x in inputs.items()}
    wanted, got = dict(inputs), {name: register(x) for name, x in inputs.items()}
    for op in ops:
        own = [tensors[t] for t in op.tensors]
        specs[op.out] = DEFINED[op.kind].check(op, *(specs[a] for a in op.args), *own)
    kernels = native.Native(ops, tensors, specs, fallback, wait)
    for op in ops:
        wanted[op.out] = DEFINED[op.kind].run(op, quality, *(wanted[a] for a in op.args),
                                              *(tensors[t] for t in op.tensors))
        got[op.out] = kernels.run(op, quality, [got[a] for a in op.args])
    return wanted, got, kernels


def equal(ops, tensors, inputs, **options):
    wanted, got, kernels = both(ops, tensors, inputs, **options)
    for op in [op for op in ops if not options.get("wait", True)] or ops[-1:]:
        np.testing.assert_array_equal(kernels.tensor(got[op.out]).numpy(), wanted[op.out], err_msg=op.out)


@needed
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_is_the_definition(isa, threads, size, random):
    for n, low, high in ((1, -8191, 8191), (50, -32767, 32767), (16, 0, 255), (33, -8191, 8191)):
        tensors = {"w": drawn(random, (n, size[3]), -127, 127), "q": requant(random, n)}
        tensors["w"][0] = 127
        equal([Op("linear", "y", ("x",), ("w", "q"), ())], tensors, {"x": drawn(random, size, low, high)})


@needed
def test_linear_at_the_limits_of_its_sums_and_shifts(isa, random):
    k = 2063
    x = np.where(random.random((1, 2, 31, k)) < 0.5, 8191, -8191)
    x[0, 0, 0], x[0, 0, 1] = 8191, -8191
    w = np.where(random.random((3, k)) < 0.5, 127, -127)
    w[0], w[1] = 127, -127
    limits = {"low": [-WORD] * 3, "high": [WORD] * 3}
    for m, c, s in ((1, 0, 0), (2, 1, 1), (1 << 17, 1 << 51, 45), (1 << 17, -(1 << 51), 44), (3, -7, 22)):
        q = np.array([[m] * 3, [c] * 3, [s] * 3, *limits.values()])
        equal([Op("linear", "y", ("x",), ("w", "q"), ())], {"w": w, "q": q}, {"x": x})


@needed
def test_sums_and_results_beyond_32_bits_are_left_to_torch(random):
    wide, narrow = Spec(np.full(9, -8191), np.full(9, 8191), 1), Spec(np.full(9, -1), np.full(9, 1), 1)
    q, w = np.array([[1], [0], [0], [-5], [5]]), np.full((1, 9), 8191)
    op = Op("linear", "y", ("x",), ("w", "q"), ())
    assert native.fits(op, narrow, w, q) and native.fits(op, wide, w, q)
    assert not native.fits(op, replaced(wide, 32768), w // 100, q)
    assert not native.fits(op, replaced(wide, 32767), w, q)
    assert not native.fits(op, wide, w, np.array([[4], [0], [0], [-5], [5]]))
    assert native.fits(op, wide, w, np.array([[4], [0], [2], [-5], [5]]))
    seen = []
    equal([op], {"w": w, "q": q}, {"x": drawn(random, (1, 2, 3, 9), -32767, 32767)},
          fallback=lambda op, quality, x: seen.append(op) or torch.clamp(x.long() @ torch.from_numpy(w).t(), -5, 5))
    assert seen == [op]


@needed
def test_an_operator_without_a_kernel_is_left_to_torch(random):
    ops = [Op("add", "k", ("x", "x"), (), (-9, 9)),
           Op("near", "y", ("x", "k"), ("w", "q"), ())]
    tensors = {"w": np.arange(10).reshape(2, 5), "q": requant(random, 5)}
    x = drawn(random, (1, 2, 3, 5), -99, 99)

    def fallback(op, quality, *registers):
        numbers = [r.long().numpy() for r in registers]
        return torch.from_numpy(DEFINED[op.kind].run(op, quality, *numbers, *tensors.values())).int()

    equal(ops, tensors, {"x": x}, fallback=fallback)


def replaced(spec, limit):
    return Spec(0 * spec.low - limit, 0 * spec.high + limit, 1)


@needed
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_goes_row_by_row_is_the_definition(isa, threads, size, random):
    c = size[3]
    tensors = {"m": random.integers(-(1 << 31), 1 << 31, (QUALITIES, c)), "one": np.full((1, c), 1 << 30),
               "c": random.integers(-(1 << 61), 1 << 61, (1, c)), "half": np.full((QUALITIES, c), 1 << 29),
               "table": random.integers(0, (1 << 15) + 1, 20001)}
    inputs = {"x": drawn(random, size, -(1 << 15), 1 << 15), "small": drawn(random, size, -9000, 9000),
              "wide": drawn(random, size, -(1 << 22), 1 << 22), "positive": drawn(random, size, 0, 32767)}
    limit = (1 << 23) // c
    inputs["even"] = np.clip(inputs["wide"], -limit, limit)
    ops = [Op(*line) for line in (
        ("rescale", "r1", ("wide",), ("m", "c"), (31, -WORD, WORD)), ("rescale", "r2", ("x",), ("m", "c"), (62, -3, 2)),
        ("rescale", "r3", ("x",), ("one", "half"), (30, -300, 32767)), ("rescale", "r4", ("x",), ("m", "c"), (0, 0, 9)),
        ("norm", "n1", ("even",), (), ()), ("norm", "n2", ("small",), (), ()),
        ("square", "s", ("positive",), (), (13, 8191)),
        ("lookup", "g", ("small",), ("table",), (-10000,)), ("gate", "h", ("g", "x"), (), ()),
        ("add", "a", ("wide", "x"), (), (-9, 1 << 21)), ("concat", "all", ("a", "g", "h"), (), ()),
        ("slice", "part", ("all",), (), (c // 2, 2 * c)))]
    equal(ops, tensors, inputs, wait=False)
    equal(ops, tensors, inputs, quality=100)


@needed
def test_norm_of_constant_rows_and_of_single_peaks(isa):
    x = np.zeros((1, 1, 6, 512), np.int64)
    x[0, 0, 1], x[0, 0, 2], x[0, 0, 3, 0], x[0, 0, 4, 511], x[0, 0, 5, ::2] = 16384, -16384, 16384, -1, 1
    equal([Op("norm", "y", ("x",), (), ())], {}, {"x": x})


@needed
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_biwkv_is_the_definition(isa, threads, size, random):
    c, ops = size[3], [Op("biwkv", "y", ("k", "v"), ("decay", "bonus", "exp", "fall"), ())]
    tensors = {"decay": drawn(random, c, 0, DECAY_LIMIT), "bonus": drawn(random, c, -BONUS_LIMIT, BONUS_LIMIT),
               "exp": EXP, "fall": FALL}
    for k in (9, 8191, 1 << 20):
        equal(ops, tensors, {"k": drawn(random, size, -k, k), "v": drawn(random, size, -8192, 8192)})


@needed
@pytest.mark.parametrize("decay", [0, DECAY_LIMIT])
def test_biwkv_of_a_whole_tile_stays_the_constant_that_v_is(isa, decay):
    ops = [Op("biwkv", "y", ("k", "v"), ("decay", "bonus", "exp", "fall"), ())]
    tensors = {"decay": np.full(3, decay), "bonus": np.array([-BONUS_LIMIT, 0, BONUS_LIMIT]), "exp": EXP, "fall": FALL}
    k = np.zeros((1, 128, 128, 3), np.int64)
    v = k + np.array([8192, -8192, 1])
    wanted, got, kernels = both(ops, tensors, {"k": k, "v": v})
    assert np.array_equal(kernels.tensor(got["y"]).numpy(), v) and np.array_equal(wanted["y"], v)


@needed
@pytest.mark.parametrize("size", [(1, 2, 2, 4), (3, 2, 6, 16), (2, 8, 4, 36), (1, 10, 26, 8)], ids=str)
@pytest.mark.parametrize("wait", [True, False])
def test_rows_from_elsewhere_are_the_definition(isa, threads, size, wait, random):
    inputs = {"x": drawn(random, size, -WORD + 9, WORD - 9)}
    specs = {"x": Spec(np.full(size[3], -WORD + 9), np.full(size[3], WORD - 9), 2)}
    offsets = (0, 0, -2, 2, 1, -1, 2, 0)
    ops = [Op(*line) for line in (
        ("half", "a", ("x",), (), (0,)), ("half", "b", ("x",), (), (1,)), ("join", "whole", ("a", "b"), (), ()),
        ("join", "swapped", ("b", "a"), (), ()), ("around", "near", ("a",), (), ()),
        ("patches", "beside", ("swapped",), (), offsets), ("shuffle", "cells", ("x",), (), (2,)),
        ("shuffle", "same", ("beside",), (), (1,)), ("shuffle", "far", ("beside",), (), (4,)),
        ("concat", "sum", ("whole", "x"), (), ()), ("slice", "part", ("far",), (), (0, 1)))]
    wanted, got, kernels = both(ops, {}, inputs, wait=wait, specs=specs)
    assert np.array_equal(wanted["whole"], inputs["x"])
    for name in ("near", "cells", "same", "part", "sum"):
        np.testing.assert_array_equal(kernels.tensor(got[name]).numpy(), wanted[name], err_msg=name)


@needed
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_depthwise_is_the_definition(isa, threads, size, random):
    tensors = {"w": drawn(random, (25, size[3]), -2000, 2000), "q": requant(random, size[3])}
    equal([Op("depthwise", "y", ("x",), ("w", "q"), ())], tensors, {"x": drawn(random, size, -8191, 8191)})


@needed
def test_slices_are_taken_without_copies_and_uneven_registers_with_one(random):
    x = torch.from_numpy(drawn(random, (2, 5, 6, 40), -8191, 8191)).int()
    part = x[..., 3:20]
    assert exact.strided(part)[0] is part and exact.strided(part)[1] == 40
    turned = x.transpose(1, 2)
    assert torch.equal(exact.strided(turned)[0], turned) and exact.strided(turned)[0] is not turned
    assert exact.strided(x[:, :, :1])[1] == 240         # a column: rows apart, and still even
    assert exact.strided(x[1:, 2:3])[1] == 40


@needed
@pytest.mark.parametrize("view", [lambda x: x[..., 3:20], lambda x: x.transpose(1, 2)[..., :17],
                                  lambda x: x[:, ::2, :, 20:37], lambda x: x[:, :, :1, :17],
                                  lambda x: x.flip(3)[..., 1:18]])
def test_registers_may_be_views(isa, view, random):
    c, whole = 17, torch.from_numpy(drawn(random, (3, 6, 5, 40), -8191, 8191)).int()
    tensors = {"w": drawn(random, (9, c), -127, 127), "q": requant(random, 9), "d": drawn(random, (25, c), -99, 99),
               "dq": requant(random, c), "decay": np.full(c, 999), "bonus": np.full(c, -7), "exp": EXP, "fall": FALL}
    inputs = {"x": view(whole).numpy().astype(np.int64)}
    for ops in ([Op("linear", "y", ("x",), ("w", "q"), ())], [Op("depthwise", "y", ("x",), ("d", "dq"), ())],
                [Op("biwkv", "y", ("x", "x"), ("decay", "bonus", "exp", "fall"), ())],
                [Op("add", "y", ("x", "x"), (), (-99, 9999))], [Op("norm", "y", ("x",), (), ())]):
        equal(ops, tensors, inputs, register=lambda _: view(whole))


@needed
def test_a_line_that_a_chain_alone_reads_is_never_stored(random):
    ops = [Op("add", "a", ("x", "x"), (), (-99, 99)), Op("norm", "b", ("a",), (), ()),
           Op("add", "c", ("b", "x"), (), (-5000, 5000))]
    wanted, got, kernels = both(ops, {}, {"x": drawn(random, (1, 3, 4, 5), -99, 99)})
    assert np.array_equal(kernels.tensor(got["c"]).numpy(), wanted["c"])
    assert got["a"].tensor.numel() == got["b"].tensor.numel() == 0
    again = native.Native(ops, {}, kernels.specs, refuse)
    first = again.run(ops[0], 0, [torch.from_numpy(wanted["x"]).int()])
    assert np.array_equal(again.tensor(first).numpy(), wanted["a"])         # asked for, so it is there


@needed
def test_chains_that_meet_become_one(random):
    names = ["near", "a", "far", "b", "a", "far"]
    ops = [Op("add", "a", ("x", "x"), (), (-9, 9)), Op("norm", "near", ("a",), (), ()),
           Op("add", "b", ("y", "y"), (), (-5, 5)), Op("norm", "far", ("b",), (), ()),
           Op("concat", "all", tuple(names), (), ()), Op("add", "end", ("all", "all"), (), (-16382, 99))]
    inputs = {name: drawn(random, (1, 3, 4, 5), -99, 99) for name in "xy"}
    wanted, got, kernels = both(ops, {}, inputs)
    assert len({got[op.out].chain for op in ops}) == 1
    assert np.array_equal(kernels.tensor(got["end"]).numpy(), wanted["end"])
    wanted, got, kernels = both([*ops, Op("add", "y2", ("far", "b"), (), (-1, 1))], {}, inputs)
    for name in ("end", "y2"):
        assert np.array_equal(kernels.tensor(got[name]).numpy(), wanted[name])


@needed
def test_the_result_is_kept_whoever_reads_it(random):
    ops = [Op("add", "y", ("x", "x"), (), (-9, 9)), Op("norm", "after", ("y",), (), ())]
    wanted, got, kernels = both(ops, {}, {"x": drawn(random, (1, 3, 4, 5), -99, 99)})
    for name in ("after", "y"):
        assert np.array_equal(kernels.tensor(got[name]).numpy(), wanted[name])


@needed
def test_every_instruction_set_passes_the_self_test(isa):
    assert native.self_test() == ""
    for bits, shapes in ((8, ((256, 1536), (1, 1))), (14, ((96, 96), (5, 3)))):
        carriers.self_test.cache_clear()
        assert carriers.choose("cpu", bits, shapes)[0] == "native"


@pytest.fixture(scope="module")
def shipped():
    program, tables, _ = weights.load_program("lalic-xs")
    random = np.random.default_rng(3)
    z = random.integers(-3, 4, (3, 1, 2, program.z_channels)).astype(np.int32)
    y_q8 = random.integers(-2000, 2001, (3, 4, 8, program.latents)).astype(np.int32)
    return program, tables, z, y_q8, coded(program, Numpy(program), z, y_q8)


class Symbols:
    """A coder that keeps what it is given."""

    def __init__(self):
        self.seen = []

    def code(self, index, symbols):
        self.seen += [index.copy(), symbols.copy()]
        return symbols


def coded(program, backend, z, y_q8):
    coder = Symbols()
    y_hat = walk(plan(program, backend, 37, (1, 2), z, y_q8), coder)
    return [*coder.seen, y_hat]


@needed
@pytest.mark.parametrize("wait", [True, False])
def test_the_shipped_model_codes_the_same_symbols_as_numpy(isa, threads, wait, shipped):
    program, _, z, y_q8, wanted = shipped
    backend = Torch(program, carrier="native")
    backend._native._wait = wait
    assert not backend._native.left
    for _ in range(2):                  # plans are kept from the first time
        assert all(map(np.array_equal, coded(program, backend, z, y_q8), wanted))


@needed
def test_the_known_answer_and_who_runs(shipped):
    program, tables, *_ = shipped
    backend = Torch(program)
    assert backend.carriers == {8: ("native", "native passed its self-test")}
    assert known_answer(program, tables, backend) == known_answer(program, tables, Torch(program, carrier="i64"))


def test_torch_carriers_use_no_compiled_kernel(monkeypatch, shipped):
    monkeypatch.setattr(exact, "lib", None)
    monkeypatch.setattr(exact, "missing", "taken away")
    carriers.self_test.cache_clear()
    program, _, z, y_q8, wanted = shipped
    backend = Torch(program)
    assert backend.carriers[8] == ("int8", "native: taken away; int8 passed its self-test")
    assert backend._native is None
    assert all(map(np.array_equal, coded(program, backend, z, y_q8), wanted))
    with pytest.raises(BackendMissing, match="taken away"):
        Torch(program, carrier="native")
    carriers.self_test.cache_clear()


def test_wrong_kernels_step_down(monkeypatch):
    carriers.self_test.cache_clear()
    monkeypatch.setattr(native, "self_test", lambda: "wrong kvr (test)")
    assert carriers.choose("cpu", 14, [(8, 8)]) == ("f64", "native: wrong kvr (test); f64 passed its self-test")
    carriers.self_test.cache_clear()


@needed
def test_the_environment_names_the_instruction_set_or_leaves_all_out(monkeypatch):
    monkeypatch.setenv("LINIC_ISA", "baseline")
    assert exact._load()[1] == "" and exact.describe().startswith("baseline, ")     # one library, loaded twice
    exact.use(exact.instruction_sets()[0])
    monkeypatch.setenv("LINIC_ISA", "abacus")
    assert exact._load() == (None, "LINIC_ISA=abacus is not here")
    monkeypatch.setenv("LINIC_NO_NATIVE", "1")
    assert exact._load() == (None, "switched off by LINIC_NO_NATIVE")
    with pytest.raises(BackendMissing, match="'abacus' is not here: use one of"):
        exact.use("abacus")
