"""Float networks become integer programs that say the same: which can, how exactly, and what a weight file keeps."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linic
from linic import codec, container, weights
from linic.bench.entropy import Counter
from linic.entropy.fast import Torch
from linic.entropy.program import Numpy, Program, plan
from linic.entropy.walk import walk
from linic.errors import WeightsError
from linic.models import PRESETS, build, checkerboard, preset
from linic.models.lower import calibrate, lower, refused
from small_models import Recorder, randomised, small

ROOT = Path(__file__).parents[2]
CAN = ["lalic", "lalic-s", "lalic-xs"]
LALIC = [name for name in PRESETS if preset(name).family == "lalic"]
REFUSED = [name for name in LALIC if refused(preset(name))]
OTHERS = [name for name in LALIC if name not in (*CAN, *REFUSED)]


@pytest.mark.parametrize("name", CAN)
def test_a_preset_in_its_full_size_is_lowered_and_keeps_every_bound(name):
    config = preset(name)
    torch.manual_seed(0)
    model = build(config).eval()
    made = lower(model)
    program = Program(made.lines, made.finish(), config.scales)
    assert (program.latents, program.z_channels) == (config.latents, config.hyper_latents)
    assert sum(op.kind == "code" for op in program.ops) == 2 * len(config.context.groups)


def test_the_authors_preset_and_the_ablations_that_are_not_bounded_are_refused_with_a_reason():
    assert {"lalic-authors", "ablation-aft", "ablation-conv", "ablation-conv-plus", "ablation-xs-column"} <= {*REFUSED}
    assert not {*CAN} & {*REFUSED}
    for name in REFUSED:
        with torch.device("meta"):
            model = build(name)
        with pytest.raises(WeightsError, match=f"{name}: (its networks do not keep|a scan|an ablation)"):
            lower(model)


@pytest.fixture(scope="module")
def photo():
    return Image.open(ROOT / "examples" / "photo.png").convert("RGB").crop((100, 50, 356, 242))


class Spy(Numpy):
    """Keeps what comes out to the coder: mean and index of every half."""

    def __init__(self, program):
        super().__init__(program)
        self.seen = []

    def numpy(self, register):
        self.seen.append(register)
        return register


def decibels(wanted, found):
    return 10 * np.log10((wanted**2).mean() / ((found - wanted) ** 2).mean())


def compared(model, program, quality, z, y_q8):
    """(mean, index) of the program and (mean, ln scale) of the float64 networks, over all halves, at equal contexts."""
    spy = Spy(program)
    y_hat = torch.from_numpy(walk(plan(program, spy, quality, z.shape[:2], z, y_q8), Recorder()))[None].double() / 256
    model = model.double()
    with torch.no_grad():
        l = model.level(torch.tensor([quality], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        steps = model.parameters_in_order(torch.from_numpy(z)[None].double(), l)
        twin = [next(steps)]
        for group in y_hat.split(model.config.context.groups, 3):
            for half in checkerboard.split(group.contiguous()):
                if len(twin) < 2 * len(model.config.context.groups):
                    twin.append(steps.send(half))
    spies = [a.reshape(-1).astype(float) for a in spy.seen[:-1]]
    floats = [a.numpy().reshape(-1) for pair in twin for a in pair]
    assert [a.size for a in spies] == [a.size for a in floats]
    return (np.concatenate(part) for part in (spies[0::2], spies[1::2], floats[0::2], floats[1::2]))


@pytest.mark.parametrize("name", [*CAN, *OTHERS])
@pytest.mark.parametrize("quality", [0, 90])
def test_means_and_scales_are_those_of_the_float_networks(name, quality, photo):
    """Every preset that can be lowered, made small, with random weights; 14 bits."""
    model, pixels = randomised(small(name, scales=128)), torch.from_numpy(np.array(photo))
    made = lower(model, calibrate(model, [pixels], [quality]), lambda name: 14)
    program = Program(made.lines, made.finish(), 128)
    with torch.no_grad():
        l = model.level(torch.tensor([float(quality)]), torch.zeros(1))
        y = model.analyse(pixels[None].float() / 255, l)
        z = model.density.symbols(model.hyper_latent(y, l))[0].int().numpy()
    mean, index, wanted, ln_scale = compared(model, program, quality, z, torch.round(y[0] * 256).int().numpy())
    assert decibels(wanted, mean / 256) > 40
    position = (ln_scale - np.log(0.11)) / np.log(256 / 0.11) * 127
    assert np.abs(index - position).max() < 3 and np.abs(index - position).mean() < 0.35      # rounding alone is .25
    assert np.ptp(index) > 10


@pytest.fixture(scope="module")
def shipped():
    return weights.load("lalic-xs")


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_the_shipped_program_costs_no_rate_and_is_as_precise_as_it_must_be(shipped, photo, quality):
    ready = codec.Codec(str(weights.find("lalic-xs")), "cpu")
    z, y_q8 = ready.latents(np.array(photo), quality)
    rates = []
    level = ready._level(quality)
    for steps in (ready._plan(quality, z.shape[:2], z, y_q8), ready.model.plan(level, z.shape[:2], z, y_q8)):
        counter = Counter(ready.tables)
        walk(steps, counter)
        rates.append(counter.bits)
    assert rates[0] > 5000 and rates[0] <= 1.005 * rates[1]
    mean, index, wanted, ln_scale = compared(shipped.model, shipped.program, quality, z, y_q8)
    assert decibels(wanted, mean / 256) > 40
    step = np.log(256 / 0.11) / 127
    inside = index > 0                              # what is clamped there has no scale to compare
    assert decibels(ln_scale[inside], index[inside] * step + np.log(0.11)) > 32


@pytest.mark.parametrize("name", ["lalic-xs", "lalic"])
def test_a_saved_model_is_loaded_with_the_same_program_and_digest(name, tmp_path):
    model, path = randomised(small(name)), tmp_path / "small.safetensors"
    card = weights.save(path, model, {"name": "small"})
    made = lower(model)
    wanted = Program(made.lines, made.finish(), model.config.scales)
    loaded, (program, tables, digest) = weights.load(path), weights.load_program(path)
    for found in (loaded.program, program):
        assert found.lines() == wanted.lines() and found.digest() == wanted.digest()
    assert loaded.digest == digest and digest.hex() == card["digest"]
    assert len(tables) == len(loaded.tables) == 20 + 3
    state = loaded.model.state_dict()
    linears = [key for key in made.scales if key in state and state[key].ndim == 2]
    assert len(linears) > 10
    for key in linears:         # the float network is the integers times their scales: it can be trained on
        twin = program.tensors[key] * made.scales[key][:, None]
        assert np.allclose(state[key].numpy(), twin, rtol=2e-7, atol=0), key
        assert np.abs(twin - model.state_dict()[key].numpy()).max() <= np.abs(made.scales[key]).max()
    kept = {k.removeprefix("net.") for k in weights_of(path)}
    assert not kept & set(linears)


def weights_of(path):
    from safetensors import safe_open
    with safe_open(path, framework="numpy") as f:
        return [k for k in f.keys() if k.startswith("net.")]  # noqa: SIM118


def test_pictures_give_peaks_and_moments_and_with_them_8_bit_weights(photo):
    model = randomised(small("lalic-xs"))
    seen = calibrate(model, [torch.from_numpy(np.asarray(photo).copy())], [20.0, 80.0])
    assert all(np.isfinite(v) and v >= 0 for v in seen.peaks.values())
    taps = seen.moments["contexts.1.taps"]
    assert taps.shape == (72, 72) and np.allclose(taps, taps.T) and np.linalg.eigvalsh(taps).min() > -1e-9
    made = lower(model, seen)
    program = Program(made.lines, made.finish(), 20)
    linear = [program.tensors[op.tensors[0]] for op in program.ops if op.kind == "linear"]
    assert all(np.abs(w).max() == 127 and w.dtype == np.int8 for w in linear)
    assert {bits for bits in Torch(program).carriers} == {8}
    mixed = lower(model, seen, lambda name: 14 if name.endswith("taps") else 8)
    assert mixed.tensors["contexts.0.taps.weight"].max() > 127 >= mixed.tensors["h_s.head.proj.weight"].max()


def test_error_compensated_rounding_is_nearer_to_the_floats_on_inputs_like_those_seen():
    from linic.entropy.convert import round_weights
    rng = np.random.default_rng(0)
    weight, mixing = rng.normal(0, 1, (8, 24)), rng.normal(0, 1, (24, 24))
    x = rng.normal(0, 1, (500, 24)) @ mixing
    error = []
    for moments in (None, x.T @ x / len(x)):
        rounded, scale = round_weights(weight, 8, moments)
        assert np.abs(rounded).max() <= 127
        error.append((((rounded * scale[:, None] - weight) @ x.T) ** 2).mean())
    assert error[1] < 0.7 * error[0]


def test_without_torch_a_file_is_verified_and_the_symbols_are_the_encoders(tmp_path, photo):
    """Blocked in a process of its own: the normative part needs NumPy alone."""
    data = linic.encode(photo.crop((0, 0, 100, 70)), quality=40)
    (tmp_path / "x.linic").write_bytes(data)
    code = (f"import sys; sys.modules['torch'] = None\nfrom linic import codec, weights\n"
            f"program, tables, digest = weights.load_program('lalic-xs')\n"
            f"told = codec.verify(open({str(tmp_path / 'x.linic')!r}, 'rb').read())\n"
            f"print(told['latents'], told['symbols'], digest.hex(), len(tables))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    file = container.parse(data)
    program, tables, digest = weights.load_program("lalic-xs")
    (rows, columns), = file.cells()
    y_hat = codec._decode_tile(file, 0, tables, plan(program, Torch(program), 40, codec._size(rows, columns)))
    import hashlib
    assert out == [hashlib.sha256(codec._bytes(y_hat)).hexdigest(), str(2 * 2 * 16 * 256), digest.hex(), "176"]
