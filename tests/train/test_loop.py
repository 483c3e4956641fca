import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from train_helpers import ROOT, Clock, Tiny, encoded, picture

from linic.errors import LinicError, RecipeError, UsageError
from linic.train import checkpoint, loop, machine, speed
from linic.train import recipe as recipes
from linic.train.loop import train


@pytest.fixture
def steps(monkeypatch):
    """Numbers and learning rate of every step of the test."""
    seen = []
    step = loop.Trainer.step

    def recorded(self, progress):
        numbers = step(self, progress)
        seen.append((progress, self.optimiser.param_groups[0]["lr"], numbers))
        return numbers

    monkeypatch.setattr(loop.Trainer, "step", recorded)
    return seen


def run(recipe, pictures, out, looks=13, model=None, clock=None, **more):
    """`looks` seconds of budget are `looks` - 1 steps."""
    return train(recipe, data=pictures, out=out, budget_s=looks, model=model or Tiny(), clock=clock or Clock(),
                 device="cpu", threads=1, cache=pictures.parent / "cache", **more)


def state_of(out):
    return checkpoint.load(out / "state.safetensors")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_leaves_weights_state_and_a_status(small, pictures, valid, tmp_path, capfd):
    out = tmp_path / "run"
    result = run(small, pictures, out, valid=valid)
    assert result["state"] == "done" and result["step"] == 12 and result["crops"] == 6 * 2 + 6 * 3
    written = json.loads((out / "status.json").read_text())
    assert written == {**result, "updated": written["updated"]}
    for name in ("raw", "ema", "best"):
        tensors, about = checkpoint.load(out / f"{name}.safetensors")
        assert tensors.keys() == Tiny().state_dict().keys() and about["preset"] == "lalic-xs"
    assert tensors["started"] == Tiny.start_crops[0]         # the start was called, and buffers reach every file
    judged = result["evaluations"]
    assert {e["weights"] for e in judged} == {"raw", "ema"} and len(judged[0]["points"]) == 2
    assert result["best"]["score"] == min(e["score"] for e in judged)
    said = capfd.readouterr().err
    assert all(word in said for word in ("crops/s", "loss", "bpp", "(z", "PSNR", "norm", "lr", "skipped", "valid, ema"))
    assert not list(out.glob("*.tmp")) and "trunk.safetensors" not in os.listdir(out)


def test_training_lowers_the_loss(small, pictures, tmp_path, steps):
    fast = dataclasses.replace(small, optimiser=dataclasses.replace(small.optimiser, lr=0.02))
    run(fast, pictures, tmp_path / "run", looks=60)
    losses = [numbers[0] for _, _, numbers in steps]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_run_cut_in_two_equals_an_uncut_one_step_for_step(small, pictures, valid, tmp_path, steps):
    run(small, pictures, tmp_path / "whole", valid=valid)
    whole, steps[:] = list(steps), []
    stopped = run(small, pictures, tmp_path / "cut", clock=Clock({7: terminate}), valid=valid)
    assert stopped["state"] == "stopped" and stopped["step"] == 6 == len(steps)
    run(small, pictures, tmp_path / "cut", clock=Clock(), resume=True, valid=valid)
    assert steps == whole and len(whole) == 12
    (a, about_a), (b, about_b) = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    same = ("step", "crops", "skipped", "elapsed_s", "rng")
    assert [about_a[k] for k in same] == [about_b[k] for k in same]


def test_the_first_signal_stops_gently_and_the_handlers_come_back(small, pictures, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    clock = Clock({3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    assert run(small, pictures, tmp_path / "run", clock=clock)["state"] == "stopped"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"


class Moody(Tiny):
    """Not finite in the steps listed."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x, quality):
        out = super().forward(x, quality)
        self.calls += 1
        if self.training and self.calls in self.bad:
            out["x_hat"] = out["x_hat"] * float("nan")
        return out


def test_steps_that_are_not_finite_are_skipped_and_counted(small, pictures, tmp_path, steps):
    result = run(small, pictures, tmp_path / "run", model=Moody({3, 4, 9}))
    assert (result["step"], result["skipped"]) == (9, 3)
    assert [i + 1 for i, (_, _, numbers) in enumerate(steps) if numbers is None] == [3, 4, 9]
    assert all(torch.isfinite(t.float()).all() for t in state_of(tmp_path / "run")[0].values())


def test_fifty_such_steps_in_a_row_end_the_run_with_the_good_weights_saved(small, pictures, tmp_path):
    with pytest.raises(LinicError, match="50 steps in a row, after step 4, gave a loss"):
        run(small, pictures, tmp_path / "run", looks=100, model=Moody(set(range(5, 100))))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    tensors, about = checkpoint.load(tmp_path / "run" / "raw.safetensors")
    assert about["step"] == 4 and all(torch.isfinite(t).all() for t in tensors.values())


def test_a_crash_while_saving_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "raw.safetensors"
    checkpoint.save(path, {"w": torch.ones(3)}, {"step": 1})

    def crash(tensors, beside, metadata):
        beside.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"w": torch.zeros(3)}, {"step": 2})
    tensors, about = checkpoint.load(path)
    assert torch.equal(tensors["w"], torch.ones(3)) and about == {"step": 1}
    monkeypatch.undo()
    checkpoint.save(path, {"w": torch.zeros(3)}, {"step": 2})       # what lies beside does not disturb the next time
    assert checkpoint.load(path)[1] == {"step": 2}


def test_state_is_saved_on_the_way(small, pictures, tmp_path, monkeypatch):
    saved = []
    save = loop.Trainer.save
    monkeypatch.setattr(loop.Trainer, "save", lambda self, out: (saved.append(self.step_count), save(self, out)))
    run(small, pictures, tmp_path / "run")
    assert saved == [5, 10, 12, 12]


def test_a_linear_schedule_keeps_the_trunk_from_before_the_decay(small, pictures, tmp_path, steps):
    recipe = dataclasses.replace(small, schedule=recipes.Schedule("linear", 0.0, 0.5))
    run(recipe, pictures, tmp_path / "run", looks=10)
    assert checkpoint.load(tmp_path / "run" / "trunk.safetensors")[1] == {
        "preset": "lalic-xs", "step": 4, "weights": "trunk"}
    assert [lr / 2e-3 for _, lr, _ in steps] == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def by_steps(recipe, count):
    schedule = recipes.Schedule("steps", 0.0, milestones=(0.5, 0.75), steps=count)
    return dataclasses.replace(recipe, schedule=schedule)


def test_a_recipe_that_counts_steps_needs_no_budget_and_drops_its_rate(small, pictures, tmp_path, steps):
    result = run(by_steps(small, 8), pictures, tmp_path / "run", looks=None)
    assert (result["state"], result["step"], result["progress"], result["budget_s"]) == ("done", 8, 1.0, None)
    assert [p for p, *_ in steps] == [i / 8 for i in range(8)]
    assert [lr / 2e-3 for _, lr, _ in steps] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert checkpoint.load(tmp_path / "run" / "trunk.safetensors")[1]["step"] == 4
    with pytest.raises(UsageError, match=r"a budget is needed \(--budget 60m\)"):
        run(small, pictures, tmp_path / "other", looks=None)


def test_a_run_by_steps_in_several_calls_equals_one(small, pictures, tmp_path, steps, capfd):
    run(by_steps(small, 8), pictures, tmp_path / "whole", looks=None)
    whole, steps[:] = list(steps), []
    for state in ("stopped", "stopped", "done"):
        assert run(by_steps(small, 8), pictures, tmp_path / "cut", looks=4, resume=True)["state"] == state
    assert "the time is over at step 3 of 8: --resume goes on" in capfd.readouterr().err
    assert steps == whole
    (a, _), (b, _) = (checkpoint.load(tmp_path / x / "raw.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_gap_to_training_pictures_is_measured_from_the_first_evaluation_on(small, pictures, valid, tmp_path, capfd):
    fast = dataclasses.replace(small, optimiser=dataclasses.replace(small.optimiser, lr=0.02))
    result = run(fast, pictures, tmp_path / "run", looks=20, valid=valid)
    rows = [e for e in result["evaluations"] if e["weights"] == "raw"]
    assert len(rows) > 2 and rows[0]["gap"] == 0 and result["gap"] == rows[-1]["gap"] != 0
    first, last = (r["score"] / r["seen_score"] for r in (rows[0], rows[-1]))
    assert result["gap"] == pytest.approx(last / first - 1)
    assert f"gap {100 * result['gap']:+.1f} %" in capfd.readouterr().err
    assert not any("gap" in e for e in result["evaluations"] if e["weights"] == "ema")
    seen = state_of(tmp_path / "run")[1]["seen"]
    assert len(seen) == 2 and [w[3:] for w in seen] == [[70, 100], [70, 100]]


def test_the_share_of_the_devices_arithmetic_is_reported(small, pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loop.flops, "of_pixel", lambda *_: 1e6)
    monkeypatch.setattr(loop.flops, "peak", lambda device: 1e11)
    result = run(small, pictures, tmp_path / "run", looks=4)
    rate = result["last"]["crops_per_s"]
    assert result["last"]["mfu"] == pytest.approx(1e6 * 64**2 * rate / 1e11)
    assert f"MFU {100 * result['last']['mfu']:.0f} %" in capfd.readouterr().err
    monkeypatch.setattr(loop.flops, "peak", lambda device: float("nan"))
    assert run(small, pictures, tmp_path / "unknown", looks=4)["last"]["mfu"] is None
    assert "MFU unknown" in capfd.readouterr().err


def test_a_model_for_one_rate_and_one_for_every_rate_want_their_own_recipe(small, pictures, tmp_path):
    one_rate = Tiny()
    one_rate.config.variable_rate = False
    with pytest.raises(RecipeError, match=r"lalic-xs is for one rate: it needs loss\.lambda instead of \[quality\]"):
        run(small, pictures, tmp_path / "run", model=one_rate)
    fixed = dataclasses.replace(small, quality=None, loss=recipes.Loss(lambda_=0.01))
    with pytest.raises(RecipeError, match=r"lalic-xs is for every rate: it needs \[quality\] instead of loss\.lambda"):
        run(fixed, pictures, tmp_path / "run")
    assert run(fixed, pictures, tmp_path / "run", model=one_rate)["step"] == 12
    similar = dataclasses.replace(small, loss=recipes.Loss(distortion="ms-ssim"))
    with pytest.raises(RecipeError, match="crop 64 is too small for MS-SSIM: five scales need 176"):
        run(similar, pictures, tmp_path / "other")


def test_an_end_file_moves_the_end(small, pictures, tmp_path, steps):
    end = tmp_path / "end"
    clock = Clock({2: lambda: end.write_text("not yet a number"), 8: lambda: end.write_text("1020")})
    result = run(small, pictures, tmp_path / "run", looks=1000, clock=clock, end_file=end)
    assert result["state"] == "done" and result["step"] == 19
    assert steps[8][0] == pytest.approx(0.009) and steps[10][0] == pytest.approx(11 / 20)


@pytest.mark.parametrize("looks, end, factors", [
    (1000, 1015, [1, 1, 0.8, 0.6]),             # read at second 10: two thirds are done at once, yet it falls from 1
    (20, 1030, [1, 1, 0.95, 0.9]),              # the decay is about to begin: so it does, slower
    (16, 1030, [0.875, 0.75, 0.7125, 0.675]),   # it has begun: it never rises again
], ids=["early", "at the decay", "late"])
def test_an_end_that_moves_makes_no_jump_in_the_rate(small, pictures, tmp_path, steps, looks, end, factors):
    recipe = dataclasses.replace(small, schedule=recipes.Schedule("linear", 0.0, 0.5))
    file = tmp_path / "end"
    clock = Clock({9: lambda: file.write_text(str(end))})
    run(recipe, pictures, tmp_path / "run", looks=looks, clock=clock, end_file=file)
    rates = [lr / 2e-3 for _, lr, _ in steps]
    assert rates[8:12] == pytest.approx(factors, abs=1e-6)
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.25
    assert len(steps) == end - 1000 - 1
    assert checkpoint.load(tmp_path / "run" / "trunk.safetensors")[1]["step"] <= 11


def test_a_resumed_run_follows_the_end_file_and_not_what_is_left_as_its_budget(small, pictures, tmp_path, steps):
    end = tmp_path / "end"
    end.write_text("1020")
    recipe = dataclasses.replace(small, schedule=recipes.Schedule("linear", 0.0, 0.5))
    run(recipe, pictures, tmp_path / "run", looks=20, clock=Clock({9: terminate}), end_file=end)
    run(recipe, pictures, tmp_path / "run", looks=11, clock=Clock(), end_file=end, resume=True)
    assert [lr / 2e-3 for _, lr, _ in steps[8:11]] == pytest.approx([1, 1, 1])
    assert all(b[1] <= a[1] for a, b in zip(steps, steps[1:])) and steps[-1][1] < 3e-4


def test_queued_steps_end_where_those_read_one_by_one_end(small, pictures, tmp_path, steps, monkeypatch):
    run(small, pictures, tmp_path / "a", model=Moody({3, 4, 9}))
    init = loop.Trainer.__init__

    def queued(self, *args):
        init(self, *args)
        self.queued, self._wait_for_an_older_step = True, lambda: None

    monkeypatch.setattr(loop.Trainer, "__init__", queued)
    result = run(dataclasses.replace(small, ema=recipes.Ema(0.9, 1)), pictures, tmp_path / "b",
                 model=Moody({3, 4, 9}))
    assert [n for _, _, n in steps[12:]] == [None] * 12
    assert (result["step"], result["skipped"], result["crops"]) == (9, 3, 4 * 2 + 5 * 3)
    (a, about), (b, other) = (checkpoint.load(tmp_path / x / "raw.safetensors") for x in "ab")
    assert about == other and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(LinicError, match="50 steps in a row"):
        run(small, pictures, tmp_path / "c", looks=100, model=Moody(set(range(5, 100))))


def test_a_rung_that_fails_or_lies_is_left_out_of_the_run(small, pictures, tmp_path, monkeypatch, capfd):
    class Fails(speed.Step):
        calls = 0

        def run(self, x, quality):
            super().run(x, quality)
            Fails.calls += 1
            if Fails.calls == 2:
                raise RuntimeError("no compiler here")
            return super().run(x, quality)

    class Lies(speed.Step):
        def run(self, x, quality):
            return super().run(x, quality) * 2

    monkeypatch.setattr(loop, "PREPARATION_SECONDS", 1.0)
    monkeypatch.setitem(speed.RUNGS, "compiled-all", lambda *parts: time.sleep(60))
    monkeypatch.setitem(speed.RUNGS, "compiled", Fails)
    monkeypatch.setitem(speed.RUNGS, "graph", Lies)
    run(small, pictures, tmp_path / "plain")
    for name in ("compiled", "graph", "compiled-all"):
        result = run(small, pictures, tmp_path / name, speed=name)
        assert result["step"] == 12 and result["speed"]["rungs"] == [name]
        (a, _), (b, _) = (checkpoint.load(tmp_path / x / "raw.safetensors") for x in ("plain", name))
        assert all(torch.equal(a[k], b[k]) for k in a)          # the comparison left no trace
    said = capfd.readouterr().err
    assert "compiled left out at (2, 3, 64, 64): RuntimeError: no compiler here" in said
    assert "graph left out at (2, 3, 64, 64): loss of step 1 is" in said
    assert "compiled-all left out at (2, 3, 64, 64): TimeoutError: abandoned after 1 s" in said
    with pytest.raises(UsageError, match=r"no rung 'fast'\. Rungs: eager, safe, graph"):
        run(small, pictures, tmp_path / "d", speed="fast")


def test_graphs_are_left_out_for_mrt_and_compilers_for_a_critic(monkeypatch):
    asked = []
    monkeypatch.setattr(loop.ladder, "climb", lambda recipe, device, rungs, **_: asked.append(rungs))
    mrt, critic = (recipes.load(ROOT / "recipes" / f"mrt-s{name}.toml") for name in ("", "-critic"))
    alone = loop.Ranks()
    loop._choice(mrt, "cuda:0", "ladder", alone)
    assert asked == [["eager", "compiled"]]
    with pytest.raises(UsageError, match="MRT draws its windows anew"):
        loop._choice(mrt, "cuda:0", "graph", alone)
    assert loop._choice(critic, "cuda:0", "ladder", alone).rungs == ["eager"] and len(asked) == 1


def test_numbers_of_steps_with_and_without_a_stage_are_read_from_one_queue(small, pictures):
    crops = loop.data.Crops(loop.data.Library(pictures, pictures.parent / "cache"), small.data, 0)
    trainer = loop.Trainer(small, Tiny(), crops, "cpu")
    trainer.queue = [(torch.arange(float(n)), 2) for n in (5, 9, 5)]
    assert [len(row) for row in trainer.drain()] == [5, 9, 5]


def test_a_run_is_not_overwritten_by_another(small, pictures, tmp_path):
    run(small, pictures, tmp_path / "run", looks=3)
    with pytest.raises(UsageError, match="holds weights of a run: pass --resume"):
        run(small, pictures, tmp_path / "run")


def test_a_run_goes_on_with_its_own_recipe_only(small, pictures, tmp_path):
    run(small, pictures, tmp_path / "run", looks=3)
    with pytest.raises(UsageError, match=r"another recipe \(differs in seed, ema\)"):
        run(dataclasses.replace(small, seed=1, ema=recipes.Ema(0.5, 1)), pictures, tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="only one of them"):
        run(small, pictures, tmp_path / "run", resume=True, init="x")


def test_init_starts_from_a_checkpoint_and_refuses_strangers(small, pictures, tmp_path):
    run(small, pictures, tmp_path / "a", looks=3)
    start = tmp_path / "a" / "ema.safetensors"
    run(dataclasses.replace(small, optimiser=dataclasses.replace(small.optimiser, lr=1e-12)), pictures, tmp_path / "b",
        looks=3, init=start)
    old, new = checkpoint.load(start)[0], checkpoint.load(tmp_path / "b" / "raw.safetensors")[0]
    assert all(torch.allclose(old[k], new[k], atol=1e-8) for k in old)
    checkpoint.save(tmp_path / "shape.safetensors", {"down.weight": torch.ones(2, 3)}, {"step": 0})
    with pytest.raises(UsageError, match=r"down.weight has shape \(2, 3\), the model's has \(8, 3, 16, 16\)"):
        run(small, pictures, tmp_path / "c", init=tmp_path / "shape.safetensors")
    checkpoint.save(tmp_path / "names.safetensors", {"other": torch.ones(2)}, {"step": 0})
    with pytest.raises(UsageError, match="no tensor has a name of this model"):
        run(small, pictures, tmp_path / "c", init=tmp_path / "names.safetensors")


def test_init_knows_what_the_weights_room_knows(small, pictures, tmp_path, monkeypatch):
    from linic import weights

    asked, start = [], Tiny()
    nn.init.constant_(start.ln_scale, 0.75)
    monkeypatch.setattr(weights, "load", lambda name: (asked.append(name), SimpleNamespace(model=start))[1])
    recipe = dataclasses.replace(small, optimiser=dataclasses.replace(small.optimiser, lr=1e-12))
    run(recipe, pictures, tmp_path / "run", looks=2, init="lalic-xs")
    assert asked == ["lalic-xs"]
    assert torch.allclose(checkpoint.load(tmp_path / "run" / "raw.safetensors")[0]["ln_scale"], start.ln_scale)


def test_evaluation_pictures_may_not_train(small, pictures, valid, tmp_path):
    (pictures / "found.jpg").write_bytes(encoded(picture(101, 70, 100), "jpeg"))
    with pytest.raises(UsageError, match=r"found\.jpg looks like .*101\.png"):
        run(small, pictures, tmp_path / "run", valid=valid)


def test_a_crop_that_the_model_cannot_take_is_a_recipe_error(small, pictures, tmp_path):
    with pytest.raises(RecipeError, match="crop 72 is no multiple of 64"):
        run(dataclasses.replace(small, phases=(recipes.Phase(0.0, 72, 2),)), pictures, tmp_path / "run")


def test_global_settings_of_torch_come_back(small, pictures, tmp_path):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    run(small, pictures, tmp_path / "run", looks=2)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert torch.tensor([1e-40]).mul(1.0).item() != 0


def test_one_thread_is_used_while_a_neighbour_is_busy(monkeypatch):
    samples = iter([(0.0, 0.0, 0.0), (5.0, 10.0, 9.9), (10.0, 20.0, 15.0), (15.0, 26.5, 20.0), (20.0, 31.6, 25.0)])
    monkeypatch.setattr(machine.Neighbours, "_sample", lambda self: next(samples))
    neighbours = machine.Neighbours(2)
    # others took .02, 1.0, .3 and .02 cores
    assert [neighbours.look() for _ in range(4)] == [2, 1, 1, 2]


def test_the_door_sets_the_spin_count_and_does_not_import_torch():
    code = ("import os, sys, linic.train.command as c, argparse; c.add_arguments(argparse.ArgumentParser());"
            "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)")
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    env["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "False"]


def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", "linic.train", "x.toml", "--data", str(tmp_path), "--budget", "soon"],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("linic: budget 'soon' is not a time")
