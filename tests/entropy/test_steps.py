"""Step programs: the order, each operator in Python's integers and at its ends, refusals, and the walk both ways."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from linic.entropy.convert import BONUS_LIMIT, DECAY_LIMIT, OCTAVE, table
from linic.entropy.fast import Torch
from linic.entropy.operators import EXP_FIRST, MEAN_LIMIT, SPAN, SYMBOL_LIMIT, WORD, Op, Spec
from linic.entropy.program import Program
from linic.entropy.steps import KINDS, OFFSETS, SEQUENCES, Numpy, StepProgram, known_answer, order, plan
from linic.entropy.walk import walk
from linic.errors import LimitExceeded, WeightsError
from linic.models import build, preset, rcm, tokens
from linic.models.config import from_dict, to_dict
from linic.models.lower_mrt import lower, rounding, scales
from linic.rangecoder import Decoder, Encoder
from linic.rangecoder.tables import laplace_tables
from small_models import CARRIERS_HERE, Recorder

ORDERS = [("staggered", 0), ("windows", 8)]
FRAMES = [(1, 1), (1, 7), (5, 1), (3, 5), (9, 17), (16, 24), (7, 33)]
EXP = table("exp").astype(np.int64)
RUN = {kind: operator.run for kind, operator in StepProgram.operators.items()}


def ints(low, high, *shape, seed=0):
    return np.random.default_rng(seed).integers(low, high + 1, shape)


# The order.


@pytest.mark.parametrize("kind, window", [*ORDERS, ("windows", 3)])
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_the_order_is_that_of_the_float_network(kind, window, frame):
    twin, none = tokens.Order(*frame, kind, window), frame[0] * frame[1]
    places = order(kind, window, *frame)
    assert np.array_equal(np.sort(np.concatenate([p.tokens for p in places])), np.arange(none))
    assert OFFSETS[kind] == tokens.OFFSETS[kind] and len(twin.sequences) == SEQUENCES[kind]
    steps = [twin.step[p.tokens].unique() for p in places]
    assert all(len(s) == 1 for s in steps) and (torch.cat(steps).diff() > 0).all()
    for p in places:
        assert np.array_equal(p.neighbours, twin.neighbours[p.tokens])
    for i, sequence in enumerate(twin.sequences):
        for line in sequence.tolist():
            there = [t for t in line if t < none]
            found = {}
            for p in places:
                found |= dict(zip(p.tokens.tolist(), p.before[i].tolist()))
            for at, token in enumerate(there):
                assert [t for t in found[token] if t < none] == there[at::-1]


@pytest.mark.parametrize("kind, window", ORDERS)
def test_a_step_looks_at_earlier_steps_only_and_none_is_empty(kind, window):
    done = set()
    for p in order(kind, window, 13, 19):
        seen = {*p.neighbours.ravel().tolist()} | {t for b in p.before for t in b[:, 1:].ravel().tolist()}
        assert seen - {13 * 19} <= done and len(p.tokens)
        assert all(np.array_equal(b[:, 0], p.tokens) and (b[:, -1] < 13 * 19).any() for b in p.before)
        done |= {*p.tokens.tolist()}


# The operators.


def test_past_and_known_are_the_features_of_the_float_network():
    y = ints(-99, 99, 2, 15, 4)
    twin = tokens.Order(3, 5, "staggered", 8)
    wanted = rcm.gather(torch.nn.functional.pad(torch.from_numpy(y), (0, 1), value=1), twin)
    history = np.concatenate([y, np.zeros((2, 1, 4), np.int64)], 1)
    for p in order("staggered", 0, 3, 5):
        past = RUN["past"](Op("past", "x", (), (), ()), 0, history, p.neighbours)
        known = RUN["known"](Op("known", "x", (), (), (512,)), 0, history, p.neighbours)
        assert past.shape == (2, 1, len(p.tokens), 40) and known.shape == (2, 1, len(p.tokens), 10)
        part = wanted[:, p.tokens].numpy()
        assert np.array_equal(past[:, 0].reshape(part[..., :4].shape), part[..., :4])
        assert np.array_equal(known[:, 0], 512 * part[..., 4])


NEAR = Op("near", "y", ("x", "past"), ("w", "q"), ())


def test_near_is_exact_at_31_bits_and_refused_beyond():
    largest = WORD // (11 * 8191)
    q = np.array([[1 << 17] * 2, [1 << 45, -(1 << 45)], [17, 45], [-WORD] * 2, [WORD] * 2])
    weight = np.full((11, 2), 8191)
    weight[:, 1] = -8191
    check = StepProgram.operators["near"].check
    spec, wide = (Spec(np.full(n, -largest), np.full(n, largest), 1) for n in (2, 20))
    assert check(NEAR, spec, wide, weight, q).high.max() == WORD
    x, past = np.full((1, 1, 3, 2), largest), np.full((1, 1, 3, 20), largest)
    past[0, 0, 1], x[0, 0, 2] = 5, -7
    def of(t, c):
        m, add, shift, low, high = q[:, c].tolist()
        values = [x[0, 0, t, c], *past[0, 0, t, c::2]]
        return min(max((sum(int(a) * int(w) for a, w in zip(values, weight[:, c])) * m + add) >> shift, low), high)

    exact = [[of(t, c) for c in range(2)] for t in range(3)]
    assert RUN["near"](NEAR, 0, x, past, weight, q).tolist() == [[exact]]
    assert backend({"w": weight, "q": q})._near(NEAR, 0, *map(int32, (x, past))).tolist() == [[exact]]
    with pytest.raises(WeightsError, match="32 bits"):
        check(NEAR, Spec(spec.low - 1, spec.high, 1), Spec(wide.low, wide.high + 1, 1), weight, q)


def int32(x):
    return torch.from_numpy(np.ascontiguousarray(x)).int()


def backend(tensors):
    """torch's operators without a program."""
    made = Torch.__new__(Torch)
    made.device, made._ready, made._cache, made._native = torch.device("cpu"), {}, {}, None
    made.tensors = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    if "q" in tensors:
        m, c, s, low, high = made.tensors["q"].double()
        made._ready["q"] = m * 2**-s, c * 2**-s, low, high
    return made


CAUSAL = Op("causal", "y", ("k", "v"), ("decay", "bonus", "exp"), (0,))


def causal_exact(k, v, decay, bonus, exp):
    """The last token of a sequence, one channel, by the words of Causal's description, in Python's integers."""
    x, t = [max(a - max(k), -SPAN) for a in k], len(k) - 1
    a = [exp[max(x[i] - (t - 1 - i) * decay, EXP_FIRST) - EXP_FIRST] for i in range(t)]
    a.append(exp[x[t] + bonus - EXP_FIRST])
    den = sum(a)
    num = sum(p * q for p, q in zip(a, v))
    assert abs(num) + den < 2**48
    return (num + (den >> 1)) // den


@pytest.mark.parametrize("decay", [0, 1, 330, DECAY_LIMIT])
@pytest.mark.parametrize("bonus", [-BONUS_LIMIT, 17, BONUS_LIMIT])
def test_causal_is_exact_on_both_backends_for_sequences_of_any_length(decay, bonus):
    """Channels: the ends of v under equal keys, the ends of k, ordinary ones."""
    lengths, count = [1, 2, 24, 64, 256], 256
    rng = np.random.default_rng(decay + bonus % 7)
    k = np.stack([np.full(256, 7091), np.full(256, -1 << 20), rng.choice([-1 << 20, 1 << 20], 256),
                  rng.integers(-7091, 7092, 256), np.arange(256) * -80], 1)
    v = np.stack([np.full(256, 8191), np.full(256, -8192), rng.choice([-8192, 8191], 256),
                  rng.integers(-8192, 8192, 256), rng.integers(-8192, 8192, 256)], 1)
    before = np.full((len(lengths), count), count)
    for row, n in enumerate(lengths):
        before[row, :n] = np.arange(n)[::-1]
    tensors = {"decay": np.full(5, decay), "bonus": np.full(5, bonus), "exp": table("exp")}
    spec = Spec(np.full(5, -8192), np.full(5, 8191), 1)
    keys = Spec(np.full(5, -1 << 20), np.full(5, 1 << 20), 1)
    StepProgram.operators["causal"].check(CAUSAL, keys, spec, 1, *(t.astype(np.int64) for t in tensors.values()))
    histories = [np.concatenate([np.stack([x, x[::-1]]), np.zeros((2, 1, 5), np.int64)], 1) for x in (k, v)]
    found = RUN["causal"](CAUSAL, 0, *histories, before, *tensors.values())
    assert found.shape == (2, 1, len(lengths), 5)
    exp = EXP.tolist()
    for batch, history in enumerate(zip(*histories)):
        for row, n in enumerate(lengths):
            exact = [causal_exact(history[0][:n, c].tolist(), history[1][:n, c].tolist(), decay, bonus, exp)
                     for c in range(5)]
            assert found[batch, 0, row].tolist() == exact
    got = backend(tensors)._causal(CAUSAL, 0, *map(int32, histories), torch.from_numpy(before))
    assert np.array_equal(got.numpy(), found)


def test_causal_follows_its_float_twin():
    c, t = 12, 40
    block = rcm.CausalBlock(c, 10, 0)
    with torch.no_grad():
        block.u.normal_()
    k, v = np.rint(np.random.default_rng(0).normal(0, 2500, (t, c))).clip(-7091, 7091), ints(-8191, 8191, t, c)
    w, u = (x.detach().double().numpy() * OCTAVE for x in block.decay())
    k_v = (torch.from_numpy(x)[None] for x in (k / OCTAVE, v / 512))
    twin = block.double().wkv(*k_v, torch.arange(t)[None])
    histories = [np.concatenate([x.astype(np.int64), np.zeros((1, c), np.int64)])[None] for x in (k, v)]
    before = np.full((t, t), t)
    for at in range(t):
        before[at, :at + 1] = np.arange(at, -1, -1)
    found = RUN["causal"](CAUSAL, 0, *histories, before, np.rint(w), np.rint(u).astype(np.int64), EXP)
    # The decay of a token is rounded to 2^-10 octaves: half a unit over 40 tokens is 1.4 % of a weight.
    error = np.abs(found[0, 0] / 512 - twin[0].detach().numpy())
    assert error.max() < 0.1 and np.sqrt((error**2).mean()) < 0.02


# Programs: a smallest one, and what each line of it must not be.

LINES = [["order", "order", [], [], [0, 0, 2]], ["past", "before", ["y"], [], []],
         ["known", "known", ["y"], [], [512]], ["rescale", "values", ["before"], ["many", "none"], [0, -99, 99]],
         ["concat", "f", ["values", "known"], [], []],
         ["linear", "x", ["f"], ["w", "q"], []], ["past", "around", ["x"], [], []],
         ["near", "k", ["x", "around"], ["near", "q"], []], ["causal", "v", ["k", "x"], ["d", "d", "exp"], [1]],
         ["rescale", "index", ["v"], ["one", "half"], [0, 0, 3]], ["code", "y", ["v", "index"], [], [1]]]
TENSORS = {"many": np.ones((1, 20), np.int8), "none": np.zeros((1, 20), np.int8), "w": ints(-9, 9, 2, 30),
           "q": np.array([[3, 3], [0, 1], [2, 2], [-99, -99], [99, 99]]), "near": ints(-9, 9, 11, 2),
           "d": np.array([3, 50]), "exp": table("exp"), "one": np.ones((1, 2), np.int8),
           "half": np.ones((1, 2), np.int8)}


def changed(at, part, value):
    lines = [[*line] for line in LINES]
    lines[at][part] = value
    return lines


def test_a_smallest_program_is_accepted_and_says_what_it_is():
    program = StepProgram(LINES, TENSORS, 4)
    assert (program.kind, program.window, program.latents, program.z_channels) == ("staggered", 0, 2, 0)
    assert program.kept == {"y": 2, "x": 2, "k": 2} and program.lines() == LINES
    assert program.specs["before"].high.max() == MEAN_LIMIT + (SYMBOL_LIMIT << 8)
    assert "v = causal(k, x, d int64[2], d int64[2], exp int32[26157], 1)    # 2 ch, -99 .. 99" in str(program)
    ends = [["rescale", "index", ["x"], ["one", "half"], [0, 0, 3]], ["code", "y", ["x", "index"], [], [1]]]
    wide = {"w": ints(-9, 9, 2, 36), "many": np.ones((1, 24), int), "none": np.ones((1, 24), int)}
    windows = StepProgram([["order", "order", [], [], [1, 8, 2]], *LINES[1:6], *ends], TENSORS | wide, 4)
    assert (windows.kind, windows.window) == ("windows", 8) and windows.digest() != program.digest()


BAD_LINES = {
    "nothing": ([], "codes no 'y'"), "no code": (LINES[:-1], "codes no 'y'"),
    "no order": (LINES[5:], "nothing has written"),
    "order twice": ([*LINES, ["order", "more", [], [], [0, 0, 2]]], "not the first line"),
    "a third order": (changed(0, 4, [2, 0, 2]), "not an order"), "a window": (changed(0, 4, [0, 8, 2]), "not an order"),
    "no window": (changed(0, 4, [1, 0, 2]), "not an order"), "one cell": (changed(0, 4, [1, 1, 2]), "not an order"),
    "a huge window": (changed(0, 4, [1, 17, 2]), "not an order"),
    "no latents": (changed(0, 4, [0, 0, 0]), "not an order"), "many": (changed(0, 4, [0, 0, 4097]), "not an order"),
    "order read": (changed(6, 2, ["order"]), "no register"),
    "past of what comes": (changed(1, 2, ["k"]), "nothing has written"),
    "y before its line": (changed(3, 2, ["y"]), "nothing has written"),
    "y without a code": ([["order", "y", [], [], [0, 0, 2]]], "nothing else is coded"),
    "y not coded": ([*LINES[:-1], ["add", "y", ["v", "v"], [], [-9, 9]]], "nothing else is coded"),
    "coded elsewhere": (changed(10, 1, "z"), "nothing else is coded"),
    "coded twice": ([*LINES, LINES[-1]], "written twice"),
    "other latents": (changed(10, 2, ["f", "f"]), "30 means"), "skip": (changed(10, 4, [5]), "2 means"),
    "index": (changed(10, 2, ["v", "v"]), "index out of range"),
    "known as nothing": (changed(2, 4, [0]), "says nothing"),
    "a missing sequence": (changed(8, 4, [2]), "sequence 2 of 2"),
    "a depthwise": (changed(7, 0, "depthwise"), "unknown operator"), "symbols": (changed(0, 0, "symbols"), "unknown"),
    "near another": (changed(7, 2, ["x", "x"]), "for 2 and 2"), "near many": (changed(7, 2, ["f", "around"]), "for 30"),
    "too much past": ([*LINES[:6], *(["concat", f"x{i}", ["f"] * 32, [], []] for i in range(80)),
                       *(["past", f"p{i}", [f"x{i}"], [], []] for i in range(80)), *LINES[6:]], "channels"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_program_that_is_not_right_is_refused_with_its_line(case):
    lines, message = BAD_LINES[case]
    with pytest.raises(WeightsError, match=message):
        StepProgram(lines, TENSORS, 4)


BAD_TENSORS = {
    "near: 15 bits": ({"near": np.full((11, 2), 8192)}, "14 bits"),
    "near: rows": ({"near": ints(0, 1, 10, 2)}, "weight"),
    "near: sums": ({"q": np.array([[1, 1], [0, 0], [0, 0], [-WORD] * 2, [WORD] * 2])}, "32 bits"),
    "near: requant": ({"q": np.array([[3, 3], [0, 1], [46, 2], [-99, -99], [99, 99]])}, "m or s"),
    "causal: v": ({"q": np.array([[3, 3], [0, 1], [2, 2], [-8193] * 2, [99, 99]])}, "beyond 14"),
    "causal: decay": ({"d": np.array([-1, 3])}, "decay or bonus"), "causal: length": ({"d": np.array([3])}, "shapes"),
    "causal: large": ({"d": np.array([3, BONUS_LIMIT + 1])}, "decay or bonus"),
    "causal: least": ({"d": np.array([3, np.iinfo(np.int64).min])}, "decay or bonus"),
    "causal: short": ({"exp": table("exp")[1:]}, "table"), "causal: zero": ({"exp": 0 * table("exp")}, "table"),
    "causal: huge": ({"exp": np.full_like(table("exp"), (1 << 26) + 1)}, "table"),
    "floats": ({"w": np.ones((2, 30))}, "not integers"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_could_leave_a_range_are_refused(case):
    tensors, message = BAD_TENSORS[case]
    with pytest.raises(WeightsError, match=message):
        StepProgram(LINES, {**TENSORS, **tensors}, 4)


def test_a_program_of_a_whole_picture_is_none_of_steps_and_the_other_way_round():
    with pytest.raises(WeightsError, match="unknown operator 'order'"):
        Program(LINES, TENSORS, 4)
    with pytest.raises(WeightsError, match="unknown operator 'symbols'"):
        StepProgram([["symbols", "z", [], [], [2]]], TENSORS, 4)


# The walk.


@pytest.fixture(scope="module")
def tables():
    return laplace_tables(scales(preset("mrt-xs")))


@pytest.fixture(scope="module")
def programs():
    """mrt-xs with random weights everywhere, in both orders."""
    made = {}
    for kind in KINDS:
        torch.manual_seed(0)
        model = build(from_dict({**to_dict(preset("mrt-xs")), "order": kind})).eval()
        with torch.no_grad():
            for p in (*model.rcm.parameters(), model.prior):
                p.add_(torch.randn_like(p) * 0.05)
            model.ln_deviation.uniform_(-1, 3)
        b = lower(model)
        made[kind] = StepProgram(b.lines, b.finish(), model.config.scales)
    return made


def latents(program, *shape, seed=5):
    return np.rint(np.random.default_rng(seed).laplace(0, 500, (*shape, program.latents))).astype(np.int32)


ZONE = rounding(preset("mrt-xs"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", [(1, 1), (3, 5), (16, 24)], ids=str)
def test_what_was_encoded_is_decoded_on_another_backend(programs, tables, kind, frame):
    program = programs[kind]
    y, coder = latents(program, *frame), Encoder(tables)
    sent = walk(plan(program, Torch(program), 60, frame, y, ZONE), coder)
    data = coder.finish()
    reader = Decoder(tables, data)
    got = walk(plan(program, Numpy(program), 60, frame), reader)
    reader.finish()
    assert got.dtype == np.int32 and got.shape == y.shape and np.array_equal(sent, got)
    assert np.abs(got - y).mean() < 100
    assert len(data) > frame[0] * frame[1]


def walked(program, backend, y, quality=40, zone=ZONE):
    coder = Recorder()
    frame = y.shape[-3:-1] if y is not None else (9, 11)
    y_hat = walk(plan(program, backend, quality, frame, y, zone), coder)
    return [array for step in coder.steps for array in step] + [y_hat]


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("carrier", CARRIERS_HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_gives_the_integers_of_numpy_by_every_carrier(programs, kind, carrier, monkeypatch):
    monkeypatch.setenv("LINIC_CARRIER", carrier)
    program = programs[kind]
    made = Torch(program)
    assert {used for used, _ in made.carriers.values()} == {carrier}
    for y in (None, latents(program, 9, 11)):
        wanted = walked(program, Numpy(program), y)
        assert len(np.unique(wanted[-1])) > 100 and len(np.unique(np.concatenate(wanted[0:-1:2]))) > 20
        assert_equal(walked(program, made, y), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(programs, kind, threads):
    before, program = torch.get_num_threads(), programs[kind]
    wanted = walked(program, Numpy(program), latents(program, 6, 10))
    try:
        torch.set_num_threads(threads)
        for carrier in (None, "f64"):
            assert_equal(walked(program, Torch(program, carrier=carrier), latents(program, 6, 10)), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_frames_has_the_latents_of_each_in_one_stream(programs, kind, batch):
    program = programs[kind]
    y = latents(program, batch, 4, 9)
    for made in (Torch(program), Numpy(program)):
        whole = walked(program, made, y)
        assert whole[-1].shape == y.shape
        alone = [walked(program, made, y[i]) for i in range(batch)]
        assert_equal(whole[-1], [a[-1] for a in alone])
        for i, array in enumerate(whole[:-1]):      # picture by picture within each step
            assert np.array_equal(array, np.concatenate([a[i] for a in alone]))


def test_where_the_index_is_below_skip_nothing_is_coded(programs):
    class Spy(Numpy):
        def numpy(self, register):
            seen.append(register)
            return register

    program, seen = programs["staggered"], []
    lines = [*program.lines()[:-1], ["code", "y", [*program.ops[-1].args], [], [50]]]
    program = StepProgram(lines, program.tensors, 128)
    found = walked(program, Spy(program), latents(program, 4, 6))
    index, coded = np.concatenate([x.reshape(-1) for x in seen[1:-1:2]]), np.concatenate(found[0:-1:2])
    assert 9 < len(coded) == (index >= 50).sum() < len(index) - 9 and coded.min() >= 50


def test_rounding_is_that_of_the_float_model(programs):
    model = build(preset("mrt-xs"))
    assert len(ZONE) == model.config.latents
    distance = np.arange(-1500, 1500).repeat(16).reshape(-1, 16)
    from linic.entropy.steps import _symbols
    found = _symbols(distance, np.array(ZONE))
    wanted = model.round(torch.from_numpy(distance).double() / 256).numpy()
    ties = (np.abs(distance) % 256 == 128) & (np.arange(16) == 0)
    assert np.array_equal(found[~ties], wanted[~ties])
    assert np.array_equal(np.abs(found[ties]), (np.abs(distance[ties]) + 128) // 256)
    assert _symbols(np.array([1 << 23, -(1 << 23)]), np.array([128])).tolist() == [SYMBOL_LIMIT, -SYMBOL_LIMIT]


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-3, -3), (65, 1), (1, 65), (1 << 40, 1 << 40)])
def test_a_frame_too_large_is_refused_before_memory_is_taken(programs, size):
    program = programs["staggered"]
    with pytest.raises(LimitExceeded, match="2048x2048"):
        walk(plan(program, Numpy(program), 50, size), Recorder())


def test_the_known_answer_is_the_same_on_every_backend_and_of_every_program_another(programs, tables):
    answers = {kind: known_answer(program, tables, Numpy(program)) for kind, program in programs.items()}
    assert len({*answers.values()}) == 2
    for kind, program in programs.items():
        assert known_answer(program, tables, Torch(program)) == answers[kind]


def test_step_programs_run_without_torch():
    code = ("import sys; sys.modules['torch'] = None; import linic.entropy.steps as s; "
            "print(len(s.order('windows', 8, 9, 9)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == 25
