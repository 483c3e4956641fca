"""RCM becomes an integer program that says the same: how exactly, at what rate, and what a weight file reads back."""
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linic.entropy.fast import Torch
from linic.entropy.rounding import laplace_bits, ln_scale_at, scale_index
from linic.entropy.steps import StepProgram, order, plan
from linic.entropy.walk import walk
from linic.errors import WeightsError
from linic.models import build, preset
from linic.models.config import from_dict, to_dict
from linic.models.lower_mrt import calibrate, lower, refused, rounding, scales
from linic.models.mrt import LN_SCALE_MAX, LN_SCALE_MIN
from linic.rangecoder import Encoder
from linic.rangecoder.tables import laplace_tables

SPAN = LN_SCALE_MIN, LN_SCALE_MAX


def changed(**changes):
    return from_dict({**to_dict(preset("mrt-xs")), **changes})


def low_pass(count, h, w, seed):
    """Pictures of sorts: noise of several sizes. (N, H, W, 3) in [0, 1]"""
    made = torch.Generator().manual_seed(seed)
    parts = [F.interpolate(torch.randn(count, 3, h // side + 2, w // side + 2, generator=made), size=(h, w),
                           mode="bicubic") * strength
             for side, strength in ((128, 0.12), (32, 0.06), (8, 0.025), (4, 0.01))]
    return (sum(parts) + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module", params=["staggered", "windows"])
def model(request):
    """A start of training with every layer of RCM awake, in float64."""
    torch.manual_seed(0)
    made = build(changed(order=request.param)).eval()
    made.init_klt(low_pass(6, 256, 256, 1))
    with torch.no_grad():
        for p in made.rcm.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    return made.double()


@pytest.fixture(scope="module")
def seen(model):
    return calibrate(model, [(low_pass(1, 128, 256, 2)[0] * 255).byte()], [10.0, 90.0])


def program_of(model, *how):
    b = lower(model, *how)
    return StepProgram(b.lines, b.finish(), model.config.scales)


class Spy(Torch):
    """Keeps mean and index of every step."""

    def numpy(self, register):
        found = super().numpy(register)
        if found.ndim == 4:
            self.kept.append(found.copy())
        return found


def decibels(wanted, found):
    return 10 * np.log10((wanted**2).mean() / ((found - wanted) ** 2).mean())


@pytest.fixture(scope="module")
def tables():
    return laplace_tables(scales(preset("mrt-xs")))


def compared(model, program, tables, quality, seed):
    """-> bits of the integers; of the floats given the same tokens; of the floats by themselves; mean and ln scale of
    the integers and of the floats given the same tokens."""
    l = model.level(torch.tensor([quality], dtype=torch.double), torch.zeros(1, dtype=torch.double))
    spy, coder = Spy(program), Encoder(tables)
    with torch.no_grad():
        y = model.analyse(low_pass(1, 224, 320, seed).double(), l)
        h, w, c = y.shape[1:]
        spy.kept = []
        y_hat = walk(plan(program, spy, int(quality), (h, w), torch.round(y[0] * 256).int().numpy(),
                          rounding(model.config)), coder)
        mean, ln_scale = model.predict(torch.from_numpy(y_hat)[None].double() / 256, l)
        _, alone, alone_scale = model.quantise(y, l)
    index = scale_index(ln_scale, 128, span=SPAN)
    symbols = torch.where(index >= model.skip, model.round(y - mean), 0.0)
    bits = [torch.where(s > LN_SCALE_MIN + 1e-6, laplace_bits(a, s), 0.0).sum().item()
            for a, s in ((symbols, ln_scale_at(index, 128, span=SPAN)), (alone, alone_scale))]
    found = np.zeros((2, h * w, c))
    for places, *both in zip(order(program.kind, program.window, h, w), spy.kept[0::2], spy.kept[1::2]):
        found[:, places.tokens] = np.stack([x[0, 0] for x in both])
    return coder.bits(), *bits, found[0] / 256, found[1], *(x.reshape(-1, c).numpy() for x in (mean, ln_scale))


@pytest.mark.parametrize("bits", [8, 14])
def test_means_scales_and_rate_are_those_of_the_floats(model, seen, tables, bits):
    """Given the same tokens: then nothing but the integers' rounding tells them apart. By themselves they part where a
    value lies next to the edge of a dead zone: noise of .002 steps in y does the same to the floats, several percent to
    either side with weights as random as these."""
    program = program_of(model, seen, *([] if bits == 8 else [lambda name: 14]))
    parts = [compared(model, program, tables, quality, seed) for quality, seed in ((5.0, 3), (50.0, 4), (95.0, 5))]
    integer, given, alone = (sum(p[i] for p in parts) for i in range(3))
    mean, index, mean_twin, ln_twin = (np.concatenate([p[i] for p in parts]) for i in range(3, 7))
    assert integer > 1000 and integer < 1.005 * given and abs(integer / alone - 1) < 0.08
    assert decibels(mean_twin, mean) > 40
    inside = (index > 0) & (index < 127)            # what is clamped there has no scale to compare
    assert inside.mean() > 0.5 and np.ptp(index) > 20
    assert decibels(ln_twin[inside], index[inside] * (np.log(400) / 127) + LN_SCALE_MIN) > 32


def test_without_pictures_units_are_coarser_and_weights_have_14_bits(model, tables):
    program = program_of(model)
    linear = [program.tensors[op.tensors[0]] for op in program.ops if op.kind == "linear"]
    assert all(8000 < np.abs(w).max() <= 8191 for w in linear)
    integer, given, *_, mean, _, twin, _ = compared(model, program, tables, 60.0, 6)
    assert integer < 1.005 * given and decibels(twin, mean) > 40


def test_pictures_give_peaks_and_moments_and_with_them_8_bit_weights(model, seen):
    assert all(np.isfinite(v) and v >= 0 for v in seen.peaks.values())
    assert {"rcm.blocks.0.kvr-", "rcm.blocks.1.kr+", "rcm.norm"} <= {*seen.peaks}
    assert np.allclose(seen.moments["rcm.first"], seen.moments["rcm.first"].T)
    program = program_of(model, seen)
    linear = [op for op in program.ops if op.kind == "linear"]
    width = {op.out: np.abs(program.tensors[op.tensors[0]].astype(int)).max() for op in linear}
    assert width["rcm.blocks.0.kvr"] == width["rcm.blocks.1.last"] == 127 < width["rcm.mean"]
    assert {*Torch(program).carriers} == {8, 14}


def test_float_weights_can_be_read_back_by_their_names(model, seen):
    b = lower(model, seen)
    tensors, state = b.finish(), model.state_dict()
    back = [name for name in b.scales if name in state]
    assert len(back) == 4 * model.config.rcm_depth + 2 and not [n for n in tensors if n in state and n not in back]
    for name in back:
        assert tensors[name].shape == state[name].shape
        error = np.abs(tensors[name] * b.scales[name][:, None] - state[name].numpy())
        assert error.max() < 4 * b.scales[name].max()       # compensated rounding: more than half a step


def test_the_lines_name_the_order_and_the_quality_is_in_the_tables(model):
    program = program_of(model)
    assert program.kind == model.config.order and program.latents == model.config.latents
    assert (program.window == 8) == (program.kind == "windows")
    for level in (0, 100):
        l = model.level(torch.tensor([float(level)]).double(), torch.zeros(1).double())
        unit = torch.exp(model.ln_unit(l)).detach().numpy().ravel()
        op = program.ops[[op.out for op in program.ops].index("mean")]
        factor = program.tensors[op.tensors[0]][level] * 2.0 ** -(op.numbers[0] - 4)
        assert np.allclose(factor, unit, rtol=1e-6)


def test_what_has_no_integer_form_is_refused_with_a_reason():
    config = preset("mrt-xs")
    assert refused(config) == "" and "order sequence" in refused(dataclasses.replace(config, order="sequence"))
    assert "tokens are slots" in refused(dataclasses.replace(config, tokens="slots"))
    with torch.device("meta"):
        made = build(changed(rcm="attention"))
    with pytest.raises(WeightsError, match="mrt-xs: an ablation of RCM"):
        lower(made)


def test_scales_are_those_of_the_float_model():
    found = scales(preset("mrt-xs"))
    wanted = ln_scale_at(torch.arange(128).double(), 128, span=SPAN)
    assert np.allclose(np.log(found), wanted.numpy(), atol=1e-12)
