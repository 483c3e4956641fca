"""MRT and RCM: presets, geometry, the linear start, causality, coding as a fixed point, sizes."""
import dataclasses
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from linic.entropy.rounding import scale_index
from linic.errors import UsageError
from linic.models import PRESETS, Mrt, build, preset
from linic.models import tokens as geometry
from linic.models.blocks import merge_shifts
from linic.models.config import from_dict, to_dict
from linic.models.mrt import (
    KNOTS,
    LN_SCALE_MAX,
    LN_SCALE_MIN,
    OFFSETS,
    Order,
    Rcm,
    noise_of,
    order,
    quality_to_lambda,
    quality_to_target,
)

MILLIONS = {    # docs/mrt.md
    "mrt": 70.6, "mrt-s": 15.3, "mrt-xs": 3.55, "ablation-mrt-no-rwkv": 2.51, "ablation-mrt-no-transformer": 2.51,
    "ablation-mrt-no-pairs": 1.48, "ablation-mrt-windows": 3.56, "ablation-mrt-encoder-pairs": 4.24,
    "ablation-mrt-rcm-1d": 3.53, "ablation-mrt-rcm-transformer": 3.55, "ablation-mrt-frequencies": 4.55,
    "ablation-mrt-slots": 4.38,
}
KINDS = {
    "staggered": {}, "windows": {"order": "windows"}, "sequence": {"order": "sequence"},
    "attention": {"rcm": "attention"},
    "frequencies": {"tokens": "frequencies", "order": "windows", "init": "dct", "encoder_pairs": 1},
    "slots": {"tokens": "slots", "order": "windows", "init": "torch", "encoder_pairs": 1},
    "slots alone": {"tokens": "slots", "order": "sequence", "init": "torch", "encoder_pairs": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(kind="staggered", **changes):
    """A model with few and narrow layers."""
    narrow = {"width": 32, "heads": 2, "stem": [8, 12], "pixels": [16, 12, 12], "pixel_depths": [1, 1, 1],
              "decoder_pairs": 2, "rcm_width": 32, "latents": 4, "slots": 16}
    return build(from_dict({**to_dict(preset("mrt-xs")), **narrow, **KINDS[kind], **changes}))


def randomised(kind="staggered", seed=0, std=0.1, **changes):
    """Weights that leave no layer silent."""
    torch.manual_seed(seed)
    model = small(kind, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)
        model.prior[0] += 0.5       # scales that are coded
    return model


def blurred(count, side=256, seed=0):
    """Noise with little colour and less of it the finer it is, as in pictures: (count, side, side, 3) in [0, 1]."""
    made, x = torch.Generator().manual_seed(seed), torch.zeros(count, 3, side, side)
    for octave in range(2, 7):
        grid = torch.rand(count, 4, 2**octave, 2**octave, generator=made) - 0.5
        grid = (0.8 * grid[:, :1] + 0.2 * grid[:, 1:]) * 0.6**(octave - 2)
        x += F.interpolate(grid, (side, side), mode="bicubic")
    return (x * 0.6 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


# --- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if "mrt" in name])
def test_every_preset_has_the_size_that_the_documentation_gives(name):
    config = preset(name)
    assert from_dict(to_dict(config)) == config
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=0.02)


def test_mrt_xs_keeps_its_names_and_shapes():
    with torch.device("meta"):
        state = build("mrt-xs").state_dict()
    text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in state.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2dc6d2a600400aff"


@pytest.mark.parametrize("changes, message", [
    ({"tokens": "slots", "init": "klt"}, "cannot start with init 'klt'"),
    ({"tokens": "slots", "init": "torch"}, "need order 'windows' or 'sequence'"),
    ({"tokens": "slots", "init": "torch", "order": "windows"}, "there is none"),
    ({**KINDS["slots"], "slots": 12}, "slots 12"),
    ({**KINDS["slots"], "tokens": "words"}, "'words' is none of"),
    ({"rcm": "attention", "rcm_width": 40}, "heads of 32 channels"),
    ({"grain": 17}, "grain 17 should be at most 16")])
def test_a_configuration_that_cannot_work_says_why(changes, message):
    with pytest.raises(UsageError, match=message):
        from_dict({**to_dict(preset("mrt-xs")), **changes})


def test_grain_is_fresh_in_training_and_always_the_same_in_use():
    model = randomised()
    y, l = torch.randn(1, 2, 3, 4), torch.zeros(1)
    with torch.no_grad():
        used = [model.eval().synthesise(y, l) for _ in range(2)]
        trained = [model.train().synthesise(y, l) for _ in range(2)]
        for name, p in model.named_parameters():
            if name.endswith(".grain"):
                p.zero_()
        bare = [model.eval().synthesise(y, l), model.train().synthesise(y, l)]
    assert torch.equal(*used) and torch.equal(*bare)
    assert (trained[0] - trained[1]).abs().max() > 1e-3 and (used[0] - bare[0]).abs().max() > 1e-3


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_noise_is_white_of_unit_variance_and_that_of_the_first_release(channels):
    noise = noise_of(torch.zeros(2, 64, 65, 7), channels, 2, fresh=False)
    assert noise.shape == (1, 64, 65, channels)
    assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(1, abs=0.02)
    flat = noise.flatten(0, 2).double()
    assert (flat[1:] * flat[:-1]).mean().abs() < 0.03 and (flat[65:] * flat[:-65]).mean().abs() < 0.03
    other = noise_of(torch.zeros(1, 64, 65, 7), channels, 1, fresh=False)
    assert (noise * other).mean().abs() < 0.03
    assert torch.round(noise.flatten()[:3] / math.sqrt(3) * 32768 + 32767.5).int().tolist() == [37654, 30013, 37125]


# --- geometry -------------------------------------------------------------------------------------------------------


def test_cuts_are_few_and_balanced():
    for n in range(1, 70):
        sizes = [b - a for a, b in geometry.cuts(n, 16)]
        assert sum(sizes) == n and len(sizes) == math.ceil(n / 16) and max(sizes) - min(sizes) <= 1
        between = geometry.cuts(n, 16, between=True)
        assert between[0][0] == 0 and between[-1][1] == n and all(a[1] == b[0] for a, b in zip(between, between[1:]))


@pytest.mark.parametrize("h, w", [(1, 1), (5, 6), (17, 33), (1, 40), (16, 16)])
@pytest.mark.parametrize("between", [False, True])
def test_windows_cover_every_position_once(h, w, between):
    parts = geometry.windows(h, w, 16, between)
    assert all(part.patches.shape[1] == part.a * part.b for part in parts)
    assert torch.equal(torch.cat([part.patches.reshape(-1) for part in parts]).sort().values, torch.arange(h * w))


@pytest.mark.parametrize("h, w, tokens", [(32, 48, 6 * 64), (1, 1, 4), (17, 16, 36 + 32), (1, 40, 16 - 4), (4, 4, 4)])
def test_windows_have_tokens_by_their_area(h, w, tokens):
    slots = geometry.slots(h, w, 64, 16, True)
    patches = torch.cat([part.patches.reshape(-1) for part in slots.parts]).sort().values
    assert torch.equal(patches, torch.arange(h * w))
    assert torch.equal(torch.cat([p.tokens.reshape(-1) for p in slots.parts]).sort().values, torch.arange(slots.count))
    for part in slots.parts:
        assert torch.equal(slots.place[part.tokens], part.places)
        assert torch.equal(slots.slot[part.tokens], part.slots.expand(len(part.tokens), -1))
        assert part.slots[0] == 0 and (part.slots.diff() > 0).all() and part.slots[-1] < 64
    assert slots.count == tokens == slots.present.sum()


def test_staggered_rows_need_few_steps_and_windows_as_many_as_a_window_has_cells():
    assert Order(16, 24, "staggered", 8).step.max() + 1 == 24 + 2 * 15
    assert Order(16, 24, "windows", 8).step.max() + 1 == 64
    assert geometry.slots(32, 48, 64, 16, True).step.max() + 1 == 64


@pytest.mark.parametrize("kind", ["staggered", "windows", "sequence"])
def test_neighbours_are_coded_earlier_and_sequences_run_in_coding_order(kind):
    o = Order(5, 6, kind, 4)
    step = torch.cat([o.step, torch.tensor([-1])])
    assert (step[o.neighbours] < o.step[:, None]).all()
    assert o.neighbours.shape[1] == geometry.neighbours("cells", kind) == len(OFFSETS.get(kind, (1, 2)))
    for sequence in o.sequences:
        assert torch.equal(sequence[sequence < 30].sort().values, torch.arange(30))
        assert all((o.step[row[row < 30]].diff() > 0).all() for row in sequence)


def test_tokens_see_the_last_coded_ones_of_adjacent_windows():
    slots = geometry.slots(17, 40, 64, 16, True)        # 2 x 3 windows of three sizes
    step = torch.cat([slots.step, torch.tensor([-1])])
    assert (step[slots.neighbours] < slots.step[:, None]).all()
    window = slots.place // 64
    for token in range(slots.count):
        for (i, j), seen in zip(geometry.ADJACENT, slots.neighbours[token, 2:]):
            r, c = window[token] // 3 + i, window[token] % 3 + j
            there = (window == r * 3 + c) & (slots.step < slots.step[token]) & (0 <= r < 2) & (0 <= c < 3)
            wanted = torch.where(there, slots.step, -1).argmax() if there.any() else slots.count
            assert seen == wanted


def test_geometry_made_for_use_serves_training_too():
    with torch.inference_mode():
        o, s = geometry.order(3, 3, "staggered", 8), geometry.slots(3, 3, 8, 16, True)
    assert not o.neighbours.is_inference() and not s.parts[0].patches.is_inference()


# --- cosine transforms ----------------------------------------------------------------------------------------------


def test_the_strongest_coefficients_are_distinct_and_begin_with_the_three_means():
    for a, b, count in [(16, 16, 1024), (1, 1, 64), (1, 16, 64), (9, 16, 576)]:
        found = geometry.strongest(a, b, count)
        assert len(set(found)) == count and {(0, 0, 0), (1, 0, 0), (2, 0, 0)} == set(found[:3])
        assert all(u < 16 * a and v < 16 * b for _, u, v in found)


@pytest.mark.parametrize("h, w", [(16, 16), (1, 1), (9, 14), (2, 16)])
def test_a_window_without_borders_gives_its_coefficients_back(h, w):
    slots = geometry.slots(h, w, 16, 16, True)
    y = torch.randn(2, slots.count, 4)
    x = geometry.from_frequencies(y, slots)
    assert x.shape == (2, 16 * h, 16 * w, 3)
    assert torch.allclose(geometry.to_frequencies(x, slots, 4), y, atol=1e-4)
    assert x.square().sum().item() == pytest.approx(y.square().sum().item(), rel=1e-4)


def test_windows_fade_into_each_other_and_a_flat_picture_stays_flat():
    slots = geometry.slots(17, 33, 16, 16, True)
    flat = torch.full((1, 17 * 16, 33 * 16, 3), 0.3)
    back = geometry.from_frequencies(geometry.to_frequencies(flat, slots, 4), slots)
    assert torch.allclose(back, flat, atol=1e-4)
    y = geometry.to_frequencies(flat, slots, 4)
    y[:, :8] += 3
    unfaded, edge = geometry.Slots(17, 33, 16, 16, True), 16 * geometry.cuts(33, 16)[0][1]
    unfaded.fades = [[mirror, torch.zeros_like(share)] for mirror, share in unfaded.fades]
    soft, hard = ((x[:, :, edge] - x[:, :, edge - 1]).abs().mean()
                  for x in (geometry.from_frequencies(y, s) for s in (slots, unfaded)))
    assert soft < 0.25 * hard


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started():
    models = {}
    for kind in ("staggered", "frequencies"):
        torch.manual_seed(0)
        models[kind] = small(kind, latents=12, width=48, pixels=[24, 16, 12]).eval()
        models[kind].init_klt(blurred(16))
    return models


@pytest.mark.parametrize("kind", ["staggered", "frequencies"])
def test_the_start_is_a_working_linear_codec(started, kind):
    model, x = started[kind], blurred(2, seed=1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        low, high = (model(x, torch.tensor([q, q])) for q in (0.0, 100.0))
    constant = (x - x.mean((2, 3), keepdim=True)).square().mean()
    errors = [(out["x_hat"] - x).square().mean() for out in (low, high)]
    assert errors[1] < errors[0] < 0.4 * constant
    rates = [(out["bits"] / 256**2).mean().item() for out in (low, high)]
    assert rates[0] == pytest.approx(0.004, rel=0.3)
    if kind == "staggered":     # so few coefficients do not reach the highest rate
        assert rates[1] == pytest.approx(0.035, rel=0.3)


def test_blocks_are_silent_at_the_start_and_the_linear_path_is_exact(started):
    l = torch.tensor([0.3])
    with torch.inference_mode():
        model, x = started["staggered"], blurred(1, seed=2)
        assert torch.equal(model.encoder(x - 0.5, l, 16), model.encoder.linear(x - 0.5))
        y, gain = model.analyse(x, l), torch.exp(model.at(model.gain_enc, l))
        lost = (x - 0.5).square().sum() - (y / gain).square().sum()    # orthonormal axes
        assert (model.synthesise(y, l) - x).square().sum().item() == pytest.approx(lost.item(), rel=0.2)
        model = started["frequencies"]
        x, frame = blurred(1, 512, seed=2), model.frame(512, 512)
        y, gain = model.analyse(x, l, frame), torch.exp(model.at(model.gain_enc, l, frame))
        found = geometry.to_frequencies(x - 0.5, frame, 12)
        assert torch.allclose((y / gain)[:, :, 0], found, atol=1e-4)
        assert torch.allclose(model.synthesise(y, l, frame), geometry.from_frequencies(found, frame) + 0.5, atol=1e-4)


# --- RCM ------------------------------------------------------------------------------------------------------------


def frame_of(model):
    """5 x 6 cells in windows of 4, or 2 x 2 windows of 8, 9 x 10 patches."""
    if model.cells:
        return order(5, 6, model.config.order, 4)
    return geometry.slots(17, 19, 16, 16, model.config.order == "windows")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_changes_nothing_but_predictions_of_later_steps(kind):
    model = randomised(kind, std=0.3).eval()
    frame, l = frame_of(model), torch.tensor([0.2])
    known = torch.randn(1, frame.count, 4)
    changed = known.repeat(frame.count, 1, 1)
    changed[torch.arange(frame.count), torch.arange(frame.count)] += 1.0
    before, after = (torch.cat(model.rcm(k, l, frame), 2) for k in (known, changed))
    moved = (after - before).abs().amax(2) > 1e-5                                   # changed token, prediction
    later = frame.step[None] > frame.step[:, None]
    assert not (moved & ~later).any()
    assert moved[frame.step < frame.step.max()].any(1).float().mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_quantising_at_once_is_coding_step_by_step(kind):
    model = randomised(kind, seed=3).double().eval()
    h, w = (5 * 32, 6 * 32) if model.cells else (17 * 16, 19 * 16)
    frame, l = model.frame(h, w), torch.tensor([-0.4], dtype=torch.double)
    y = 3 * torch.randn(1, 5, 6, 4) if model.cells else 3 * torch.randn(1, frame.count, 1, 4)
    y = y.double()
    y_hat, symbols, _ = model.quantise(y, l, frame)
    known, sent = torch.zeros_like(y).flatten(1, 2), torch.zeros_like(y).flatten(1, 2)
    for step in range(int(frame.step.max()) + 1):
        mean, scale = (t.flatten(1, 2) for t in model.predict(known.view(y.shape), l, frame))
        now = frame.step == step
        coded = scale_index(scale, model.config.scales, span=(LN_SCALE_MIN, LN_SCALE_MAX)) >= model.skip
        rounded = model.round((y.flatten(1, 2) - mean).view(y.shape)).flatten(1, 2)
        sent[:, now] = torch.where(coded, rounded, 0.0)[:, now]
        known[:, now] = mean[:, now] + sent[:, now]
    assert torch.allclose(known.view(y.shape), y_hat, atol=1e-3)
    assert torch.equal(sent.view(y.shape), symbols) and symbols.abs().max() > 1


# --- training and use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [True, False])
def test_gradients_reach_every_parameter(kind, noise):
    model = randomised(kind).train()
    model.noise = noise
    x = blurred(2, 288, seed=5).permute(0, 3, 1, 2)[..., :272 if not model.cells else 288]
    out = model(x, torch.tensor([20.0, 90.0]))
    (out["bits"].sum() / 1000 + (out["x_hat"] - x).square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_waits_for_no_device(kind):
    """On the meta device there is nothing to wait for: reading a value there is an error."""
    model = small(kind).to("meta").train()
    out = model(torch.empty(2, 3, 288, 288, device="meta"), torch.empty(2, device="meta"))
    assert out["x_hat"].device.type == out["bits"].device.type == out["lambda"].device.type == "meta"


@pytest.mark.parametrize("kind", ["staggered", "windows", "frequencies", "slots"])
@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (1, 40), (9, 17)])
@torch.inference_mode()
def test_any_number_of_cells_is_a_picture(kind, h, w):
    model = randomised(kind, window=4).eval()
    x = torch.rand(1, 3, h * model.config.multiple, w * model.config.multiple)
    out = model(x, torch.tensor([50.0]))
    assert out["x_hat"].shape == x.shape and out["bits"].shape == (1,)
    assert torch.isfinite(out["x_hat"]).all() and out["bits"].item() > 0


@pytest.mark.parametrize("kind", ["staggered", "frequencies"])
@torch.inference_mode()
def test_a_picture_is_coded_alike_alone_and_in_a_batch_and_with_merged_shifts(kind):
    model = randomised(kind).double().eval()
    x, quality = torch.rand(3, 3, 96, 288).double(), torch.tensor([0.0, 40.0, 100.0])
    together = model(x, quality)
    alone = merge_shifts(model)(x[1:2], quality[1:2])
    assert torch.allclose(together["x_hat"][1:2], alone["x_hat"], atol=1e-6)
    assert together["bits"][1].item() == pytest.approx(alone["bits"].item(), rel=1e-6)


def test_a_trained_step_of_bf16_keeps_shapes_and_float_outputs():
    for kind in ("staggered", "frequencies"):
        model = randomised(kind, std=0.02).train()
        model.set_bf16("all")
        out = model(torch.rand(1, 3, 288, 288), torch.tensor([50.0]))
        assert out["x_hat"].dtype == out["bits"].dtype == torch.float32
        out["x_hat"].sum().backward()


def test_lambda_moves_until_a_quality_has_its_rate():
    model, quality = small().train(), torch.tensor([0.0, 50.0, 100.0])
    target = quality_to_target(quality)
    assert torch.allclose(model.steer(quality, target), quality_to_lambda(quality))
    for _ in range(60):
        steered = model.steer(quality, target * torch.tensor([2.0, 0.5, 1.0]))
    factor = steered / quality_to_lambda(quality)
    assert factor[0] > 1.05 and factor[1] < 0.95 and factor[2] == pytest.approx(1.0, abs=1e-3)
    assert model.rate_control.shape == (KNOTS,)
    model.noise, before = True, model.rate_control.clone()
    model.steer(quality, 2 * target)        # rates of noisy latents say nothing
    assert torch.equal(model.rate_control, before)
    assert torch.equal(model.eval().steer(quality, target), quality_to_lambda(quality))


def test_rcm_alone_takes_the_kinds_of_neighbours_of_its_order():
    for kind in ("staggered", "windows"):
        config = dataclasses.replace(preset("mrt-xs"), order=kind)
        assert Rcm(config).first.in_features == 17 * len(OFFSETS[kind])
    assert isinstance(small(), Mrt)
