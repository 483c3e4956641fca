import dataclasses

import pytest
import torch
from mrt_helpers import WEIGHTS, load, needs_weights, small_mrt, smooth
from train_helpers import Clock, Tiny, encoded, picture

from linic.errors import RecipeError, UsageError
from linic.train import checkpoint, optimisers, recipe, speed
from linic.train.critic import Augmentation, Critic, Patches
from linic.train.loop import train

LR = 1e-3


@pytest.fixture
def phase_c():
    r = load("mrt-xs-critic", "critic.width=4", f"optimiser.lr={LR}")
    model = small_mrt().train()
    critic = Critic(r.critic, model, r.optimiser.lr)
    step = speed.Step(model, optimisers.build(r.optimiser, model), r.optimiser.clip, r.loss)
    step.stage, critic.progress = critic, 1.0
    return model, critic, step


def stream(model, x):
    was = model.training
    model.eval()
    with torch.no_grad():
        x = x.permute(0, 2, 3, 1).contiguous()
        l, frame = model.level(torch.full((len(x),), 70.0), x), model.frame(*x.shape[1:3])
        found = model.quantise(model.analyse(x, l, frame), l, frame)
    model.train(was)
    return found


def test_the_stream_stays_bit_for_bit_and_the_decoder_moves(phase_c):
    model, critic, step = phase_c
    x, quality = smooth(2, 128), torch.tensor([40.0, 90.0])
    before, weights = stream(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    faithful = {k: v.clone() for k, v in critic.faithful.state_dict().items()}
    for _ in range(3):
        numbers = step(x, quality, LR)
        assert torch.isfinite(numbers).all() and len(numbers) == 5 + len(critic.names)
    assert all(torch.equal(a, b) for a, b in zip(before, stream(model, x)))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert moved and all(k.startswith("decoder.") for k in moved)
    assert all(torch.equal(v, faithful[k]) for k, v in critic.faithful.state_dict().items())
    assert list(weights) == list(model.state_dict())            # a checkpoint of it is one of the whole model


def test_both_decoders_draw_the_same_at_the_start_and_the_symbols_are_nearly_those_of_a_file(phase_c):
    model, critic, _ = phase_c
    x, quality = smooth(2, 128, 1), torch.tensor([40.0, 90.0])
    for train_mode in (False, True):
        faithful, drawn, out = critic.decodes(x, quality, train_mode)
        assert torch.equal(faithful, drawn) and not faithful.requires_grad and drawn.requires_grad
    model.eval()
    assert torch.allclose(model(x, quality)["bits"], out["bits"], rtol=0.05)


def test_the_critic_learns_to_tell_decodes_from_originals(phase_c):
    """Decodes are smooth here, originals have grain; the decoder does not move."""
    model, critic, _ = phase_c
    faithful = smooth(4, 64)
    x, quality = (faithful + 0.2 * torch.randn(4, 3, 64, 64)).clamp(0, 1), torch.full((4,), 50.0)
    picture = faithful.clone().requires_grad_()
    critic.decodes = lambda *_: (faithful, picture, {"bits": torch.zeros(4), "lambda": torch.zeros(4)})
    rows = []
    for _ in range(150):
        _, beside, numbers = critic.objective(model, x, quality, recipe.Loss(), None)
        critic.optimiser.zero_grad()
        beside.backward()
        critic.set_rate(1e-3 * LR / critic.numbers.lr, torch.zeros(()))
        critic.optimiser.step()
        rows.append(numbers.tolist())
    right, hinge = ([sum(r[i] for r in part) / 10 for part in (rows[:10], rows[-10:])] for i in (4, 3))
    assert right[0] < 0.7 < 0.8 < right[1] and hinge[1] < 0.7 * hinge[0]


def test_the_verdict_and_the_features_reach_the_decoder_and_rise_with_progress(phase_c):
    model, critic, _ = phase_c
    x = smooth(2, 64)
    faithful, drawn, _ = critic.decodes(x, torch.full((2,), 50.0), True)
    verdict, matching = critic.against(drawn, x, faithful, Augmentation(x))
    for term in (verdict, matching):
        grads = torch.autograd.grad(term, list(model.decoder.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads)
    assert all(p.grad is None for p in critic.trained)
    losses = []
    for progress in (0.0, 1.0):
        critic.progress = progress
        torch.manual_seed(3)
        terms, _, _ = critic.objective(model, x, torch.full((2,), 50.0), recipe.Loss(), None)
        losses.append(float(terms.loss.mean().detach()))
    assert losses[0] != losses[1]


def test_a_share_keeps_the_verdicts_part_of_the_gradient_and_a_weight_stays(phase_c):
    model, critic, _ = phase_c
    x, quality, numbers = smooth(2, 64), torch.full((2,), 50.0), critic.numbers
    weights = []
    for share in (0.0, 1e-4, 2e-4):
        critic.numbers = dataclasses.replace(numbers, share=share, weight=0.5)
        torch.manual_seed(3)
        critic.lecam.zero_()
        weights.append(float(critic.objective(model, x, quality, recipe.Loss(), None)[2][2]))
    assert weights[0] == 0.5 and 0 < weights[1] < 10
    assert weights[2] == pytest.approx(2 * weights[1], rel=0.2)         # spectral norms turn with every pass


def test_the_gradient_of_a_step_is_that_of_the_sum_of_its_terms(phase_c):
    model, critic, _ = phase_c
    k = critic.numbers = dataclasses.replace(critic.numbers, share=0.0, weight=0.5)
    x, quality, loss = smooth(2, 64), torch.full((2,), 50.0), recipe.Loss()
    torch.manual_seed(3)
    terms, _, _ = critic.objective(model, x, quality, loss, None)
    found = torch.autograd.grad(terms.loss.mean(), model.decoder.to_pixels.weight)[0]
    torch.manual_seed(3)
    faithful, drawn, out = critic.decodes(x, quality, True)
    verdict, matching = critic.against(drawn, x, faithful, Augmentation(x))
    total = 100 * (drawn - x).square().mean() + k.matching * matching - k.weight * verdict
    wanted = torch.autograd.grad(total, model.decoder.to_pixels.weight)[0]
    assert (found - wanted).norm() < 0.05 * wanted.norm()        # spectral norms turn with the critic's own pass
    rate = (out["lambda"] * out["bits"]).mean() / 64**2
    assert float(terms.loss.mean().detach()) == pytest.approx(float((total + rate).detach()), rel=0.02)


def test_a_step_that_is_not_finite_changes_neither_decoder_nor_critic(phase_c):
    model, critic, step = phase_c
    x, quality = smooth(2, 64), torch.full((2,), 50.0)
    step(x, quality, LR)
    before = [p.detach().clone() for p in (*model.parameters(), *critic.trained)]
    lecam = critic.lecam.clone()
    assert torch.isnan(step(x * torch.nan, quality, LR)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *critic.trained)))
    assert torch.equal(lecam, critic.lecam)
    assert torch.isfinite(step(x, quality, LR)).all()


def test_a_critic_of_width_64_has_the_parameters_and_the_reach_of_a_patch_gan():
    net = Patches(64)
    assert 2.7e6 < sum(p.numel() for p in net.parameters()) < 2.8e6
    small = Patches(4)
    x = torch.zeros(1, 6, 256, 256, requires_grad=True)
    verdicts = small(x)[-1]
    assert verdicts.shape[2:] == (30, 30)
    small(x)[-1][0, 0, 15, 15].backward()
    seen = (x.grad[0].abs().sum(0) > 0).nonzero()
    assert ((seen.max(0).values - seen.min(0).values + 1) <= 70).all()


def test_an_augmentation_is_one_for_all_that_is_made_of_a_picture_and_another_for_its_neighbour():
    x = smooth(3, 64)
    change = Augmentation(x)
    assert torch.equal(change(x), change(x)) and change(x).shape == x.shape
    same = change(x[:1].expand(3, -1, -1, -1))
    assert not torch.equal(same[0], same[1])
    torch.manual_seed(4)
    first = Augmentation(x)(x)
    torch.manual_seed(4)
    assert torch.equal(first, Augmentation(x)(x))


def folders(tmp_path, side):
    for folder, first in (("train", 0), ("valid", 100)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / f"{i}.png").write_bytes(encoded(picture(first + i, side, side)))
    return {"data": tmp_path / "train", "valid": tmp_path / "valid", "device": "cpu", "threads": 1}


@needs_weights
def test_a_run_of_phase_c_is_resumed_bit_for_bit_with_its_critic(tmp_path):
    given = {**folders(tmp_path, 128), "measures": WEIGHTS, "cache": tmp_path / "cache"}
    r = load("mrt-xs-critic", "phases=[{start = 0.0, crop = 96, batch = 1, perceptual = true}]", "critic.width=4",
             "evaluation.pictures=1", "evaluation.qualities=[50.0]")
    start = small_mrt()
    checkpoint.save(tmp_path / "b.safetensors", start.state_dict(), {"preset": "mrt-xs", "step": 5})
    init = tmp_path / "b.safetensors"

    def run(name, budget, **more):
        return train(r, out=tmp_path / name, budget_s=budget, clock=Clock(), model=small_mrt(1), **given, **more)

    by_steps = dataclasses.replace(r, schedule=dataclasses.replace(r.schedule, steps=6))
    r = by_steps
    whole = run("whole", None, init=init)
    assert (whole["state"], whole["step"], whole["skipped"]) == ("done", 6, 0)
    assert run("cut", 4, init=init)["state"] == "stopped"
    result = run("cut", None, resume=True)
    (a, _), (b, _) = (checkpoint.load(tmp_path / n / "state.safetensors") for n in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(k.startswith("critic/net") for k in a) and any(k.startswith("critic-optimiser/") for k in a)
    weights, about = checkpoint.load(tmp_path / "cut" / "ema.safetensors")
    assert weights.keys() == start.state_dict().keys() and about["preset"] == "mrt-xs"
    frozen = [k for k in weights if not k.startswith("decoder.")]
    assert all(torch.equal(weights[k], start.state_dict()[k]) for k in frozen)
    last = result["gates"][-1]["gates"]
    assert last["differ"]["value"] == 0 and last["differ"]["ok"] and "|verdict|" in last and "limit" not in last["gain"]
    assert "verdict" in result["last"]


def test_a_critic_needs_weights_that_have_been_trained_and_mrt(tmp_path):
    given = folders(tmp_path, 64)
    r = load("mrt-xs-critic")
    with pytest.raises(UsageError, match="pass --init"):
        train(r, out=tmp_path / "run", budget_s=3, **given)
    plain = dataclasses.replace(
        load("lalic-xs", "phases=[{start = 0.0, crop = 64, batch = 1}]"), critic=r.critic)
    checkpoint.save(tmp_path / "t.safetensors", Tiny().state_dict(), {"step": 1})
    with pytest.raises(RecipeError, match="for MRT"):
        train(plain, out=tmp_path / "run", budget_s=3, model=Tiny(), init=tmp_path / "t.safetensors", **given)
