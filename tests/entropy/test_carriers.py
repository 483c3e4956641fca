"""torch gives NumPy's integers, bit for bit: by every carrier, in every size, whatever the batch and the threads."""
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linic import weights
from linic.entropy import carriers
from linic.entropy.fast import Torch
from linic.entropy.operators import WORD
from linic.entropy.program import Numpy, Program, plan
from linic.entropy.walk import walk
from linic.errors import BackendMissing, UsageError
from linic.models.lower import calibrate, lower
from linic.rangecoder import Decoder, Encoder
from small_models import CARRIERS_HERE, Recorder, randomised, small

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny.safetensors"


@pytest.fixture(scope="module")
def programs():
    """By width of the weights. 14: our small networks; paper: the paper's, with convolutions and Channel Mixes."""
    model = randomised(small("lalic-s"))
    seen = calibrate(model, [torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)], [50.0])
    made = {14: (model, lower(model)), 8: (model, lower(model, seen))}
    paper = randomised(small("lalic", **{"context.hidden": 2}))
    made["paper"] = paper, lower(paper)
    return {key: Program(b.lines, b.finish(), model.config.scales) for key, (model, b) in made.items()}


def walked(program, backend, quality, size, z=None, y_q8=None):
    coder = Recorder()
    y_hat = walk(plan(program, backend, quality, size, z, y_q8), coder)
    return [array for step in coder.steps for array in step] + [y_hat]


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("carrier", CARRIERS_HERE)
@pytest.mark.parametrize("key", [8, 14, "paper"])
def test_torch_gives_the_integers_of_numpy_by_every_carrier(programs, key, carrier, monkeypatch):
    monkeypatch.setenv("LINIC_CARRIER", carrier)
    program = programs[key]
    backend = Torch(program)
    assert {used for used, _ in backend.carriers.values()} == {carrier}
    assert max(backend.carriers) == (8 if key == 8 else 14)
    for quality, size in ((0, (1, 1)), (50, (1, 3)), (100, (5, 2))):
        wanted = walked(program, Numpy(program), quality, size)
        assert len(np.unique(wanted[-1])) > 20
        assert_equal(walked(program, backend, quality, size), wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(programs, threads):
    before, program = torch.get_num_threads(), programs[8]
    wanted = walked(program, Numpy(program), 30, (4, 5))
    try:
        torch.set_num_threads(threads)
        assert_equal(walked(program, Torch(program), 30, (4, 5)), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photo():
    """Latents of a small picture, by the shipped model."""
    shipped = weights.load("lalic-xs")
    picture = np.asarray(Image.open(ROOT / "examples" / "photo.png").convert("RGB"))[100:228, 200:392]
    model = shipped.model
    with torch.inference_mode():
        l = model.level(torch.tensor([60.0]), torch.zeros(1))
        y = model.analyse(torch.from_numpy(picture.copy())[None].float() / 255, l)
        z = model.density.symbols(model.hyper_latent(y, l))[0].int().numpy()
    return shipped, z, torch.round(y[0] * 256).int().numpy()


@pytest.mark.parametrize("carrier", [None, *CARRIERS_HERE])
def test_the_shipped_model_writes_the_same_bytes_on_both_backends(photo, carrier, monkeypatch):
    monkeypatch.setenv("LINIC_CARRIER", carrier or "")
    shipped, z, y_q8 = photo
    program, streams, latents = shipped.program, [], []
    for backend in (Numpy(program), Torch(program)):
        coder = Encoder(shipped.tables)
        latents.append(walk(plan(program, backend, 60, z.shape[:2], z, y_q8), coder))
        streams.append(coder.finish())
        reader = Decoder(shipped.tables, streams[0])
        latents.append(walk(plan(program, backend, 60, z.shape[:2]), reader))
        reader.finish()
    assert streams[0] == streams[1] and len(streams[0]) > 500
    assert all(np.array_equal(latents[0], other) for other in latents[1:])


# Single operators: position and neighbours in a batch do not matter, nor does how a register lies in memory.


def registers(program, batch, seed=5):
    """Random registers within their bounds, by name, (batch, 8, 8 or 4, C); `coded` ones are narrower."""
    rng = np.random.default_rng(seed)
    for name, spec in program.specs.items():
        span = (np.maximum(spec.low, -(1 << 20)), np.minimum(spec.high, 1 << 20) + 1)
        yield name, rng.integers(*span, (batch, 8, 4 if spec.half else 8, spec.channels))


@pytest.mark.parametrize("carrier", ["", "f64", "int8"])
@pytest.mark.parametrize("key", [8, 14, "paper"])
def test_an_element_of_a_batch_is_what_it_is_alone_and_strides_do_not_matter(programs, key, carrier, monkeypatch):
    monkeypatch.setenv("LINIC_CARRIER", carrier)
    program = programs[key]
    numpy, backend, known = Numpy(program), Torch(program), dict(registers(program, 8))
    kinds = set()
    for op in program.ops:
        if op.kind in ("symbols", "code") or (op.kind in kinds and op.kind not in ("linear", "rescale", "biwkv")):
            continue
        inputs = [backend.register(known[a]) for a in op.args]
        whole = numpy.run(op, 40, [known[a] for a in op.args])

        def result(values, op=op):
            return backend.numpy(backend.run(op, 40, values))

        assert np.array_equal(result(inputs), whole), op
        for part in (slice(0, 1), slice(4, 7), slice(7, 8)):
            assert np.array_equal(result([x[part] for x in inputs]), whole[part]), op
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        wider = [torch.cat([x, x], 3)[..., : x.shape[3]] for x in inputs]
        if op.kind not in ("half", "join"):         # their inputs are results of others, always in order
            assert np.array_equal(result(turned), whole), op
            assert np.array_equal(result(wider), whole), op
        kinds.add(op.kind)
    assert len(kinds) >= 13


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_pictures_has_the_latents_of_each(programs, batch):
    program, rng = programs[8], np.random.default_rng(7)
    backend = Torch(program)
    z = rng.integers(-9, 10, (batch, 2, 3, program.z_channels))
    y_q8 = rng.integers(-4000, 4000, (batch, 8, 12, program.latents))
    whole = walked(program, backend, 20, (2, 3), z, y_q8)[-1]
    for i in range(batch):
        assert_equal([whole[i]], walked(program, backend, 20, (2, 3), z[i], y_q8[i])[-1:])


# Products at the ends of their ranges.


@pytest.mark.parametrize("carrier", CARRIERS_HERE)
@pytest.mark.parametrize("k", [1, 7, 1032, 1033, 4096])
@pytest.mark.parametrize("top", [127, 8191])
def test_a_carrier_is_exact_on_the_largest_and_the_smallest_numbers(carrier, k, top):
    if carrier == "native":
        top = min(top, WORD // (8192 * k))          # it gets lines only whose sums fit int32
    rows = torch.tensor([8191, -8192, 0, -1, 1]).repeat_interleave(k).view(5, k)
    x = torch.cat([rows, torch.where(torch.arange(k) % 2 == 0, 8191, -8192)[None], torch.randint(-8192, 8192, (9, k))])
    ends = torch.tensor([top, -top, -1, 1]).repeat_interleave(k).view(4, k)
    w = torch.cat([ends, torch.randint(-top, top + 1, (9, k))])
    assert torch.equal(carriers.carry(carrier, w)(x.int()).double(), (x @ w.T).double())


def test_small_weights_beside_one_large_do_not_leave_int32():
    """-1 is the digits (-1, 127): the sum of the digits can be far larger than that of the weights."""
    w = torch.full((8, 4096), -1)
    w[0, 0] = 300
    x = torch.full((3, 4096), 8191)
    assert torch.equal(carriers.carry("int8", w)(x.int()), (x @ w.T).double())


# The choice.


@pytest.fixture
def broken(monkeypatch):
    """Makes carriers wrong by one in one place."""
    def make(*names):
        for name in names:
            good = carriers._MAKERS[name]

            def wrong(weight, good=good):
                product = good(weight)

                def run(x):
                    total = product(x)
                    total[-1, -1] += 1
                    return total
                return run

            monkeypatch.setitem(carriers._MAKERS, name, wrong)
        carriers.self_test.cache_clear()
    monkeypatch.delenv("LINIC_CARRIER", raising=False)
    yield make
    carriers.self_test.cache_clear()


def test_a_carrier_that_is_wrong_is_found_and_the_next_one_taken(broken, programs):
    broken("native", "int8")
    name, why = carriers.choose("cpu", 8, [(16, 24)])
    assert name == "f64" and "int8: wrong sums for weights 16x24" in why and "f64 passed" in why
    program = programs[8]
    assert_equal(walked(program, Torch(program), 50, (1, 2)), walked(program, Numpy(program), 50, (1, 2)))


def test_without_any_right_carrier_nothing_is_decoded(broken):
    broken(*carriers.CARRIERS)
    with pytest.raises(BackendMissing, match=r"no exact integer arithmetic on cpu.*wrong sums"):
        carriers.choose("cpu", 14, [(5, 3)])


def test_a_carrier_that_was_asked_for_is_not_replaced(broken, monkeypatch):
    broken("int8")
    monkeypatch.setenv("LINIC_CARRIER", "int8")
    with pytest.raises(BackendMissing, match="int8: wrong sums"):
        carriers.choose("cpu", 8, [(5, 3)])


def test_a_carrier_that_does_not_exist_is_a_usage_error(monkeypatch, programs):
    monkeypatch.setenv("LINIC_CARRIER", "nonsense")
    with pytest.raises(UsageError, match=r"nonsense.*int8, f32, f64, i64"):
        Torch(programs[8])


@pytest.mark.parametrize("bits, name", [*itertools.product([8, 14], CARRIERS_HERE)])
def test_every_carrier_passes_its_self_test_here(bits, name):
    carriers.self_test.cache_clear()
    assert carriers.self_test(name, "cpu", bits, ((1, 1), (192, 96), (7, 1600))) == ""


# Programs that no export writes, but a file may hold: still the same integers on both.


def test_lines_that_share_weights_may_have_inputs_of_different_width():
    """Wide inputs do not fit the digits that narrow ones take."""
    eye, c = np.eye(32, dtype=np.int8), np.zeros((1, 32), np.int32)
    requant = np.array([[1, 0, 0, -60000, 60000]] * 32).T
    lines = [["symbols", "z", [], [], [32]], ["linear", "narrow", ["z"], ["eye", "requant"], []],
             ["rescale", "wide", ["z"], ["m", "c"], [0, -60000, 60000]],
             ["linear", "also", ["wide"], ["eye", "requant"], []],
             ["shuffle", "at16", ["also"], [], [4]], ["rescale", "index", ["at16"], ["n", "n"], [0, 0, 3]],
             *(["half", f"{x[0]}{p}", [x], [], [p]] for x in ("at16", "index") for p in (0, 1)),
             ["code", "y0", ["a0", "i0"], [], [0, 0, 1]], ["code", "y1", ["a1", "i1"], [], [0, 1, 1]],
             ["join", "y", ["y0", "y1"], [], []]]
    program = Program(lines, {"eye": eye, "requant": requant, "m": c + 235, "c": c, "n": c[:, :2]}, 4)
    wanted = walked(program, Numpy(program), 0, (2, 2))
    assert np.abs(wanted[-1]).max() > 8191
    assert_equal(walked(program, Torch(program), 0, (2, 2)), wanted)
