import math

import pytest
import torch
from mrt_helpers import WEIGHTS, load, needs_weights, small_mrt, smooth

from linic.bench.perceptual import Measures
from linic.train.gates import Gates, _between
from linic.train.perceptual import Perceptual


def pictures(count=2, side=320):
    torch.manual_seed(9)
    x = smooth(count, side, 3) + 0.05 * torch.randn(count, 3, side, side)
    return list((255 * x.clamp(0, 1)).byte().permute(0, 2, 3, 1))


def test_a_model_that_has_not_moved_has_gained_nothing_and_sends_the_same_symbols():
    model = small_mrt().train()
    gates, noise = Gates(load("mrt-xs"), model, pictures(), None, None), torch.get_rng_state()
    found = gates.look(model, None, 0.0)
    assert torch.equal(noise, torch.get_rng_state()) and model.training
    assert found["gain"]["value"] == 0 and not found["gain"]["ok"]
    assert found["differ"]["value"] == 0 and not found["differ"]["ok"]
    assert found["rcm"]["value"] < 1 and math.isfinite(found["seam 256"]["value"])
    assert found["lattice"]["below"] and "alex" not in found and not any(k.startswith("|") for k in found)
    line, = gates.lines(found)
    assert "gain 0.000 LOW (>= 0.4)" in line and "psnr .0113" in line


def test_another_encoder_is_seen_in_the_symbols_and_other_gains_are_not_taken_for_it():
    model = small_mrt().train()
    gates = Gates(load("mrt-xs"), model, pictures(), None, None)
    with torch.no_grad():
        model.gain_enc[0] += 0.3
    assert gates.look(model, None, 0.0)["differ"]["value"] == pytest.approx(0, abs=0.02)
    with torch.no_grad():
        model.encoder.to32.weight[0] *= -1
    assert gates.look(model, None, 0.0)["differ"]["value"] > 0.3


def test_a_lattice_and_seams_are_seen():
    model = small_mrt()
    gates = Gates(load("mrt-xs"), model, pictures(), None, None)
    before = gates.look(model, None, 0.0)
    y, x = torch.meshgrid(torch.arange(320), torch.arange(320), indexing="ij")
    model.synthesise = lambda y_hat, l, frame=None: 0.5 + 0.1 * (((x % 16 == 0) | (y % 16 == 0)).float()
                                                                 )[None, :, :, None].expand(1, 320, 320, 3)
    after = gates.look(model, None, 0.0)
    assert after["lattice"]["value"] > max(0.3, before["lattice"]["value"]) and not after["lattice"]["ok"]
    assert not after["seam 32"]["ok"]


@needs_weights
def test_in_perceptual_phases_the_judge_and_the_gradients_of_the_terms_are_looked_at():
    r, measures = load("mrt-xs"), Measures(WEIGHTS)
    model = small_mrt()
    gates = Gates(r, model, pictures(1), measures, Perceptual(measures))
    assert {"alex", "squeeze"} <= gates.start_row.keys()
    early, late = gates.look(model, None, 0.0), gates.look(model, None, 0.5)
    assert "limit" not in early["alex"] and not any(k.startswith("|") for k in early)
    assert late["alex"]["limit"] == 0.53 and "drop" not in late             # squeeze has not fallen either
    for name in ("mse", "lpips", "vgg", "wd", "phase"):
        assert late[f"|{name}|"]["value"] > 0, name
    rest = late["|vgg|"]["value"] + late["|wd|"]["value"]
    assert late["lpips : rest"]["value"] == pytest.approx(late["|lpips|"]["value"] / rest)
    gates.start_row = {"psnr .0118": 10.0, "alex": 3.0, "squeeze": 2.0}
    assert gates.look(model, None, 0.5)["drop"]["value"] > 0
    assert len(gates.lines(late)) == 2


def test_pictures_that_are_too_small_have_no_gates():
    gates = Gates(load("mrt-xs"), small_mrt(), pictures(2, 48), None, None)
    assert gates.look(small_mrt(), None, 0.0) == {} and gates.lines({}) == []


def test_values_lie_between_the_qualities_over_the_logarithm_of_the_rate():
    rows = [{"ln bpp": math.log(0.005), "psnr": 20.0}, {"ln bpp": math.log(0.02), "psnr": 22.0}]
    assert _between(rows, "psnr", 0.01) == pytest.approx(21.0)
    assert _between(rows, "psnr", 0.04) == pytest.approx(23.0)
    assert _between([rows[0], rows[0]], "psnr", 0.01) == 20.0
