"""The training run: one loop for every family, planned from a wall-clock budget.

`train(recipe, data=..., valid=..., out=..., budget_s=...)` -> the final status. Progress = elapsed / budget steers
rate, crop and batch; steps are only counted. `end_file`: once it exists, its number (seconds since 1970) is the end.
Where the recipe has `schedule.steps`, progress = steps / those, and budget and end file only end this call.
Loading and the evaluation after the end come on top of the budget. SIGTERM and SIGINT finish the step, save and
return; `resume` goes on as if nothing had happened: bit for bit on a CPU with the same number of threads.
Under torchrun several processes make one run (ranks.py); a resumed one draws other crops in all but the first.
On a GPU nothing waits for the device but logging, saving and evaluating (speed.py); `speed` names the step's rung, or
"ladder" to measure them all first (ladder.py).
What lies in the run's folder: checkpoint.py. Raises UsageError, RecipeError; LinicError after 50 non-finite steps in
a row.
"""

import copy
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linic.bench.perceptual import FILES, Measures
from linic.errors import LinicError, RecipeError, UsageError
from linic.models import Mrt, MrtConfig, build, preset
from linic.models.blocks import CROP
from linic.train import checkpoint, data, dead, evaluate, flops, ladder, optimisers, ranks, speed
from linic.train import recipe as recipes
from linic.train.codes import Codes
from linic.train.critic import Critic
from linic.train.gates import Gates
from linic.train.loss import SMALLEST_SIDE
from linic.train.machine import Every, Neighbours, Stop, settings, time_limit
from linic.train.perceptual import Perceptual
from linic.train.ranks import Ranks
from linic.train.recipe import Phase, Quality, Recipe

Clock = Callable[[], float]
BAD_STEPS_IN_A_ROW = 50
PREPARATION_SECONDS = 60.0      # of one rung, at the start of a phase
AHEAD = 3                       # steps that may be queued on a GPU: more, and the wall clock no longer steers the run


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def draw_quality(quality: Quality | None, count: int, device: str) -> Tensor:
    """(count,) float32, even between the ends, a share `ends` at each. A model for one rate has one: 50."""
    if quality is None:
        return torch.full((count,), 50.0, device=device)
    low, high = quality.range
    beyond = quality.ends / (1 - 2 * quality.ends)
    u = (torch.rand(count, device=device) * (1 + 2 * beyond) - beyond).clamp(0, 1)
    return low + u * (high - low)


class Trainer:
    """Model, EMA, optimiser, crops and counters: all that a step changes and a resumed run needs."""

    def __init__(self, recipe: Recipe, model: nn.Module, crops: data.Crops, device: str,
                 choice: ladder.Choice | None = None, us: Ranks | None = None):
        self.recipe, self.crops, self.device = recipe, crops, device
        self.choice, self.us = choice or ladder.Choice(), us or Ranks()
        net: Any = model.to(device).train()
        self.model = net
        self.critic = Critic(recipe.critic, net, recipe.optimiser.lr) if recipe.critic else None
        self.codes: Codes | None = None
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.extreme = isinstance(model, Mrt)
        self.judge: Perceptual | None = None        # where the recipe has perceptual phases
        self.gated: list[dict[str, Any]] = []       # what the gates said
        self.start_row: dict[str, float] | None = None      # what they measured at the start
        self.optimiser = optimisers.build(recipe.optimiser, self.model)
        self.queued = device.startswith("cuda")     # results are read when somebody asks: `drain`
        self.queue: list[tuple[Tensor, int]] = []   # numbers and crops of steps not read yet
        self.events: deque[Any] = deque()
        self.fast: speed.Step | None = None         # for inputs of shape `shape`
        self.shape: torch.Size | None = None
        self.lr = 0.0
        self.step_count = self.crop_count = self.skipped = self.bad_in_a_row = 0
        self.elapsed_s = self.cpu_s = 0.0
        self.pixels = 0                             # trained on in this call
        self.best: dict[str, Any] | None = None
        self.evaluations: list[dict[str, Any]] = []
        self.seen: list[data.Window] = []           # parts of training pictures, to judge by beside the others

    def step(self, progress: float) -> list[float] | None:
        """loss, bpp, an aside (loss.Terms), PSNR, gradient norm of one step, numbers of its stage; None: something was
        not finite, nothing changed. On a GPU always None: see `drain`."""
        r, phase = self.recipe, self.recipe.phase_at(progress)
        self.lr = r.optimiser.lr * r.schedule.factor(progress)
        if self.extreme:
            self.model.noise, self.model.dead_zone = phase.rounding == "noise", phase.rounding == "dead-zone"
        batch = phase.batch * self.choice.batch
        x = self.crops.batch(batch // self.us.count, phase.crop).permute(0, 3, 1, 2)
        quality = draw_quality(r.quality, len(x), self.device)
        if self.fast is None or x.shape != self.shape:
            self.fast, self.shape = self._fastest(x, quality), x.shape
            self.fast.average = self.us.average if self.us.count > 1 else None
        self.fast.judge, self.fast.stage = self.judge if phase.perceptual else None, self.stage(phase, progress)
        self.queue.append((self.fast(x, quality, self.lr), batch))
        self.step_count += 1
        self.crop_count += batch
        self.pixels += batch * phase.crop**2
        rows = [] if self.queued else self.drain()
        if (rows or self.queued) and self.step_count % r.ema.every == 0:
            self._follow(self.step_count // r.ema.every)
        if self.queued:
            self._wait_for_an_older_step()
        return rows[0] if rows else None

    def stage(self, phase: Phase, progress: float) -> Codes | Critic | None:
        if self.critic:
            self.critic.progress = progress
            return self.critic
        if self.codes is None:
            return None
        self.codes.first = phase.stage == "codes"
        return self.codes if self.codes.first or self.codes.numbers.later else None

    def _fastest(self, x: Tensor, quality: Tensor) -> speed.Step:
        """The first rung that does here, with these weights and this batch, what eager does."""
        o = self.recipe.optimiser
        parts = self.model, self.optimiser, o.clip, self.recipe.loss
        eager = speed.build("eager", *parts)
        for name in self.choice.rungs:
            if name in ("eager", "safe"):
                break
            start = time.monotonic()
            try:
                with time_limit(PREPARATION_SECONDS):
                    step = speed.build(name, *parts)
                    problem = speed.differs(step, eager, x, quality, max(self.lr, o.lr / 10))
            except Exception as error:      # whatever a compiler raises: the run goes on without it
                problem = f"{type(error).__name__}: {str(error)[:500]}"
            if not self.us.any(bool(problem)):
                say(f"{name} agrees with eager at {tuple(x.shape)}, ready in {time.monotonic() - start:.1f} s")
                return step
            say(f"{name} left out at {tuple(x.shape)}: {problem or 'another process says so'}")
        return eager

    def _wait_for_an_older_step(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > AHEAD:
            self.events.popleft().synchronize()

    def drain(self) -> list[list[float]]:
        """Numbers of the steps since the last call, those that were not finite left out: one wait for the device."""
        queue, self.queue, rows = self.queue, [], []
        values = iter(torch.cat([n for n, _ in queue]).tolist() if queue else [])
        for row, crops in queue:        # as long as their stages make them
            numbers = list(itertools.islice(values, len(row)))
            if math.isfinite(numbers[0]) and math.isfinite(numbers[4]):
                rows.append(numbers)
                self.bad_in_a_row = 0
                continue
            self.step_count -= 1
            self.crop_count -= crops
            self.skipped += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
                raise LinicError(f"{self.bad_in_a_row} steps in a row, after step {self.step_count}, gave a loss or "
                                 "gradient that is not finite: lower optimiser.lr, or start from an earlier checkpoint")
        return rows

    @torch.no_grad()
    def _follow(self, n: int) -> None:
        keep = min(self.recipe.ema.decay, (n + 1) / (n + 10))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - keep)
        for ours, theirs in zip(self.ema.buffers(), self.model.buffers()):
            ours.copy_(theirs)

    def rng_tensors(self) -> dict[str, Tensor]:
        out = {"cpu": torch.get_rng_state()}
        if self.device.startswith("cuda"):
            out["cuda"] = torch.cuda.get_rng_state(self.device)
        return out

    def stages(self) -> list[tuple[str, Codes | Critic]]:
        found: list[tuple[str, Codes | Critic | None]] = [("critic", self.critic), ("codes", self.codes)]
        return [(name, stage) for name, stage in found if stage]

    def save(self, out: Path) -> None:
        raw, ema, preset = self.model.state_dict(), self.ema.state_dict(), self.recipe.model.preset
        about = {"preset": preset, "step": self.step_count}
        state = {**checkpoint.prefixed("raw", raw), **checkpoint.prefixed("ema", ema),
                 **checkpoint.prefixed("optimiser", checkpoint.optimiser_tensors(self.optimiser)),
                 **checkpoint.prefixed("rng", self.rng_tensors())}
        for name, stage in self.stages():
            state |= stage.tensors(name)
        checkpoint.save(out / "state.safetensors", state, {
            **about, "recipe": asdict(self.recipe), "crops": self.crop_count, "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row, "elapsed_s": self.elapsed_s, "cpu_s": self.cpu_s, "best": self.best,
            "evaluations": self.evaluations, "gates": self.gated, "start_row": self.start_row, "seen": self.seen,
            "rng": self.crops.state()})
        checkpoint.save(out / "raw.safetensors", raw, {**about, "weights": "raw"})
        checkpoint.save(out / "ema.safetensors", ema, {**about, "weights": "ema"})

    def restore(self, path: Path) -> None:
        tensors, about = checkpoint.load(path)
        same = checkpoint.json_like(asdict(self.recipe))
        if about.get("recipe") != same:
            keys = [k for k in same if same[k] != about.get("recipe", {}).get(k)]
            raise UsageError(f"{path}: the run was started with another recipe (differs in {', '.join(keys)}). Use the "
                             "same, or start a new run with --init")
        self.model.load_state_dict(checkpoint.under("raw", tensors))
        self.ema.load_state_dict(checkpoint.under("ema", tensors))
        checkpoint.restore_optimiser(self.optimiser, checkpoint.under("optimiser", tensors))
        self.step_count, self.crop_count, self.skipped = about["step"], about["crops"], about["skipped"]
        self.bad_in_a_row, self.elapsed_s, self.cpu_s = about["bad_in_a_row"], about["elapsed_s"], about["cpu_s"]
        for name, stage in self.stages():
            stage.restore(name, tensors)
        self.best, self.evaluations = about["best"], about["evaluations"]
        self.gated, self.start_row = about.get("gates", []), about.get("start_row")
        self.seen = [tuple(w) for w in about.get("seen", [])]
        if not self.us.first:           # the saved numbers are the first one's
            torch.manual_seed(self.recipe.seed + self.us.rank + self.step_count)
            self.crops.reseed(self.recipe.seed + self.us.rank + self.step_count)
            return
        rng = checkpoint.under("rng", tensors)
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.startswith("cuda"):
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.crops.restore(about["rng"])


class Run:
    """Time, files and lines around a Trainer."""

    def __init__(self, trainer: Trainer, out: Path, pictures: list[Tensor], refuse: list[tuple[str, int]],
                 end_file: Path | None, about: dict[str, Any], clock: Clock):
        self.trainer, self.out, self.pictures, self.refuse = trainer, out, pictures, refuse
        self.end_file, self.about, self.clock = end_file, about, clock
        self.us, self.steps = trainer.us, trainer.recipe.schedule.steps
        self.stop = Stop()
        self.must_stop = False                  # what all processes agree on
        self.gates: Gates | None = None
        self.pixel_flops = flops.of_pixel(trainer.model, trainer.recipe.phases[0].crop, trainer.recipe.loss)
        self.peak = flops.peak(trainer.device) * self.us.count
        self.seen = [w for w in map(trainer.crops.library.window, trainer.seen) if w is not None]
        self.progress = 0.0
        self.last: dict[str, float] = {}        # of the newest progress line
        self.rows: list[list[float]] = []       # steps since then
        self.paused_s = 0.0                     # saving and evaluating since then
        self.crops_at, self.pixels_at = trainer.crop_count, trainer.pixels

    def _now(self) -> float:
        now, self.must_stop = self.us.time_and_stop(self.clock(), self.stop.asked)
        return now

    def go(self, budget_s: float) -> str:
        """Steps until the end or a signal. -> "done" or "stopped"."""
        t, i = self.trainer, self.trainer.recipe.intervals
        now = self.logged_at = self._now()
        self.start = now - t.elapsed_s
        self.end = self._asked_end() or (now if self.steps else self.start) + budget_s
        self.anchor = self.start, 0.0           # progress grows linearly from here to 1 at the end
        cpu_start = time.process_time() - t.cpu_s
        look, log = Every(5, now), Every(i.log_seconds, now)
        save, judge = Every(i.save_seconds, now), Every(i.evaluate_seconds, now)
        gate = Every(i.gate_seconds or math.inf, now)
        neighbours = Neighbours(torch.get_num_threads()) if self.about["threads_may_change"] else None
        decay_start, trunk = t.recipe.schedule.decay_start, self.out / "trunk.safetensors"
        kept = self.us.told(trunk.exists())
        self.write_status("running")
        while True:
            now = self._now()
            self.progress = self._progress_at(now)
            if now >= self.end or self.must_stop or self.progress >= 1:
                break
            if self.progress >= decay_start and not kept:
                kept = True
                self._collect()
                about = {"preset": t.recipe.model.preset, "step": t.step_count, "weights": "trunk"}
                if self.us.first:
                    checkpoint.save(trunk, t.model.state_dict(), about)
            numbers = t.step(self.progress)
            t.elapsed_s, t.cpu_s = now - self.start, time.process_time() - cpu_start
            self.rows += [numbers] if numbers else []
            if look(now):
                self._read_end(now)
                if neighbours:
                    torch.set_num_threads(neighbours.look())
            if log(now):
                self._log(now)
            pause = time.perf_counter()
            if judge(now):
                self._collect()
                self.evaluate()
                gate.last = -math.inf
            if gate(now):
                self._collect()
                self.look_at_gates()
                self.write_status("running")
            if save(now):
                self._collect()
                self.save()
                self.write_status("running")
            self.paused_s += time.perf_counter() - pause
        self._collect()
        if self.rows:
            self._log(now)
        if self.progress < 1:
            say("stopped by a signal" if self.must_stop else
                f"the time is over at step {t.step_count} of {self.steps}: --resume goes on")
            return "stopped"
        self.progress = 1.0
        return "done"

    def _progress_at(self, now: float) -> float:
        if self.steps:
            return self.trainer.step_count / self.steps
        if now >= self.end:
            return 1.0
        since, done = self.anchor
        return max(0.0, done + (1 - done) * (now - since) / max(self.end - since, 1e-3))

    def _asked_end(self) -> float | None:
        end = math.nan
        try:
            if self.us.first and self.end_file:
                end = float(self.end_file.read_text())
        except (OSError, ValueError):           # not there, or half written: the next look will do
            pass
        end = self.us.told(end)
        return end if math.isfinite(end) else None

    def _read_end(self, now: float) -> None:
        """An end that moves before the decay plans the whole run anew. Later, or when the decay would be jumped into,
        the rate falls from where it stands: a jump up would undo the decay, a jump down would waste it."""
        end = self._asked_end()
        if end is None or end == self.end:
            return
        before, decay = self._progress_at(now), self.trainer.recipe.schedule.decay_start
        self.end = end
        if before >= decay:
            self.anchor = now, before
        elif self._progress_at(now) >= decay:
            self.anchor = now, decay

    def _collect(self) -> None:
        self.rows += self.trainer.drain()

    def _log(self, now: float) -> None:
        t, phase = self.trainer, self.trainer.recipe.phase_at(self.progress)
        self._collect()
        seconds = max(now - self.logged_at - self.paused_s, 1e-3)
        rate = (t.crop_count - self.crops_at) / seconds
        mfu = self.pixel_flops * (t.pixels - self.pixels_at) / seconds / self.peak
        means = [sum(c) / len(self.rows) for c in zip(*self.rows)] or [math.nan] * 5
        aside, sign = ("lpips", "LPIPS-squeeze") if t.extreme else ("bpp_z", "z")
        stage = t.stage(phase, self.progress)
        more = dict(zip(stage.names, means[5:])) if stage else {}
        self.last = dict(zip(("loss", "bpp", aside, "psnr", "norm"), means), crops_per_s=rate,
                         lr=t.lr, mfu=mfu, **more)
        say(f"{t.elapsed_s / 60:6.1f} min  {100 * self.progress:5.1f} %  step {t.step_count}"
            f"  crop {phase.crop}x{phase.batch * t.choice.batch}"
            f"  {rate:.1f} crops/s  MFU {'unknown' if math.isnan(mfu) else f'{100 * mfu:.0f} %'}"
            f"  loss {means[0]:.4f}  bpp {means[1]:.4f} ({sign} {means[2]:.4f})  PSNR {means[3]:.2f}"
            f"  norm {means[4]:.2f}{''.join(f'  {k} {v:.3f}' for k, v in more.items())}  lr {self.last['lr']:.2e}"
            f"  skipped {t.skipped}  threads {torch.get_num_threads()}")
        self.rows, self.paused_s, self.logged_at = [], 0.0, now
        self.crops_at, self.pixels_at = t.crop_count, t.pixels
        self.write_status("running")
        self._take_in_shards()

    def _take_in_shards(self) -> None:
        t = self.trainer
        new = t.crops.library.refresh(self.refuse, background=t.queued) if self.us.first else []
        new = self.us.told(new)                 # decoded by now
        if not self.us.first and new:
            t.crops.library.refresh(self.refuse, only=new)
        if new:
            t.crops.refreshed()
            say(f"further shards: {', '.join(new)}")

    def save(self) -> None:
        if self.us.first:
            self.trainer.save(self.out)

    def evaluate(self) -> None:
        """Raw and EMA weights on the validation pictures; the better of all so far is kept. The raw ones also on parts
        of training pictures: what grows between the two is learned by heart."""
        if not self.us.first:
            return
        t, e = self.trainer, self.trainer.recipe.evaluation
        judge = partial(evaluate.evaluate, qualities=e.qualities, loss=t.recipe.loss, stop=lambda: self.stop.asked,
                        measures=t.judge.measures if t.judge else None)
        for name, model in (("raw", t.model), ("ema", t.ema)) if self.pictures else ():
            rows = judge(model, self.pictures)
            if rows is None:
                return
            score = evaluate.score(rows)
            about: dict[str, Any] = {"weights": name, "step": t.step_count, "elapsed_s": round(t.elapsed_s, 1),
                                     "score": score}
            seen = judge(model, self.seen) if name == "raw" else []
            if seen is None:
                return
            layers = {}
            if name == "raw" and self.seen:
                units = dead.look(model, self.seen[:2], e.qualities[::2])
                about["dead"], layers = round(dead.share(units), 4), {"units": dead.by_layer(units)}
            gap = self._gap(score, evaluate.score(seen)) if seen else {}
            t.evaluations.append({**about, **gap, "points": rows, **layers})
            points = "  ".join(f"q{r['quality']:g} {r['bpp']:.4f}/{r['psnr']:.2f}" for r in rows)
            better = score < (t.best["score"] if t.best else math.inf)      # False for nan
            said = f"  training crops {gap['seen_score']:.4f}, gap {100 * gap['gap']:+.1f} %" if gap else ""
            said += f"  dead units {100 * about['dead']:.0f} %" if "dead" in about else ""
            say(f"   valid, {name}  score {score:.4f}{' *' if better else '  '}  bpp/PSNR {points}{said}")
            if better:
                t.best = about
                about = {"preset": t.recipe.model.preset, **about}
                checkpoint.save(self.out / "best.safetensors", model.state_dict(), about)

    def look_at_gates(self) -> None:
        """After an evaluation, and between: does the run do what such a run does?"""
        t = self.trainer
        if self.gates is None or not self.us.first or self.stop.asked:
            return
        found = self.gates.look(t.model, t.critic, self.progress)
        t.gated.append({"step": t.step_count, "elapsed_s": round(t.elapsed_s, 1), "gates": found})
        for line in self.gates.lines(found):
            say(line)

    def _gap(self, score: float, seen: float) -> dict[str, float]:
        """How much the loss of what was never seen has grown over that of training pictures since the first look."""
        first = next((e["score"] / e["seen_score"] for e in self.trainer.evaluations
                      if math.isfinite(e.get("gap", math.nan))), score / seen)
        return {"seen_score": seen, "gap": score / seen / first - 1}

    def status(self, state: str) -> dict[str, Any]:
        t = self.trainer
        gaps = [e["gap"] for e in t.evaluations if "gap" in e]
        return {"state": state, "progress": round(self.progress, 5), "elapsed_s": round(t.elapsed_s, 1),
                "cpu_s": round(t.cpu_s, 1), "step": t.step_count, "crops": t.crop_count, "skipped": t.skipped,
                "last": self.last, "best": t.best, "gap": gaps[-1] if gaps else None,
                **({"gates": t.gated} if self.gates else {}), **self.about,
                "pixel_flops": self.pixel_flops, "peak_flops": self.peak,
                "pictures": len(t.crops.library.pictures), "updated": round(time.time()),
                "recipe": asdict(t.recipe), "evaluations": t.evaluations}

    def write_status(self, state: str) -> None:
        if self.us.first:
            checkpoint.write_json(self.out / "status.json", checkpoint.json_like(self.status(state)))


def train(recipe: str | Path | Recipe, *, data: str | Path, out: str | Path, budget_s: float | None = None,
          valid: str | Path | None = None, init: str | Path | None = None, resume: bool = False, device: str = "auto",
          threads: int | None = None, end_file: str | Path | None = None, cache: str | Path | None = None,
          clock: Clock = time.time, model: nn.Module | None = None,
          speed: str | Sequence[str] = "eager", measures: str | Path | None = None,
          revive: bool = False) -> dict[str, Any]:
    """`budget_s` may be left out where the recipe counts steps. `revive`: dead units of `init` (dead.py). `clock`:
    seconds since 1970. `model`: instead of the recipe's preset (tests). `speed`: a rung, "ladder" or the rungs of one.
    `measures`: folder of the networks of perceptual phases, codes and gates (bench/perceptual.py)."""
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    out, state = Path(out), Path(out) / "state.safetensors"
    going_on = resume and state.exists()
    if not going_on and {p.stem for p in out.glob("*.safetensors")} - {"start", "codes"}:     # those know nothing yet
        raise UsageError(f"{out} holds weights of a run: pass --resume to go on with it, or another --out")
    if going_on and init:
        raise UsageError("--init starts a run, --resume goes on with one: pass only one of them")
    if revive and not init:
        raise UsageError("--revive is for the weights of --init")
    if budget_s is None and not recipe.schedule.steps:
        raise UsageError("a budget is needed (--budget 60m): the recipe has no schedule.steps that would end the run")
    device = _device(device)
    if recipe.critic and not going_on and not init:
        raise UsageError("a recipe with [critic] trains the decoder of weights that have been trained: pass --init")
    networks, judge = networks_of(recipe, measures, device)
    with (ranks.joined(device) as us, us.quiet(),
          settings(device, threads or torch.get_num_threads(), recipe.seed + us.rank)):
        _check_share(recipe, us)
        with us.first_goes_first():
            crops, pictures, refuse = _pictures(recipe, Path(data), Path(valid) if valid else None,
                                                Path(cache or out / "pictures"), device, us)
        if model is None:
            model = build(recipe.model.preset)
        trainer = start(recipe, model, crops, device, str(init or ""), state if going_on else None,
                        _choice(recipe, device, speed, us), us, networks, out, revive)
        trainer.judge = judge
        if not trainer.seen:
            sizes = [(int(p.shape[0]), int(p.shape[1])) for p in pictures]
            trainer.seen = crops.library.windows_like(sizes, recipe.seed)
        out.mkdir(parents=True, exist_ok=True)
        if resume and not going_on:
            say(f"{out}: nothing to resume, a new run starts")
        about = {"preset": recipe.model.preset, "init": str(init or ""), "device": device, "torch": torch.__version__,
                 "processes": us.count, "budget_s": budget_s, "speed": asdict(trainer.choice),
                 "threads_may_change": not threads and device == "cpu" and Neighbours.useful(torch.get_num_threads())}
        run = Run(trainer, out, pictures, refuse, Path(end_file) if end_file else None, about, clock)
        state_name = "failed"
        if trainer.extreme and pictures and us.first:
            run.gates = gates_of(trainer, out, pictures, networks, going_on)
        try:
            with run.stop.listening():
                state_name = run.go(math.inf if budget_s is None else budget_s)
                run.save()              # first: who ends the machine's lease does not wait for an evaluation
                run.write_status(state_name)
                if state_name == "done":
                    run.evaluate()
                    run.look_at_gates()
                    run.save()
        except LinicError:
            run.save()                  # the weights before the trouble are good
            raise
        finally:
            run.write_status(state_name)
        us.any(False)                   # nobody leaves while the first evaluates
    return checkpoint.json_like(run.status(state_name))


def networks_of(recipe: Recipe, folder: str | Path | None, device: str) -> tuple[Measures | None, Perceptual | None]:
    """Frozen networks, for what the recipe asks for and for its gates; the perceptual terms, where it has them. Raises
    UsageError at once for what will be missing later."""
    needed = recipe.codes is not None or any(p.perceptual for p in recipe.phases)
    try:
        networks = Measures(Path(folder) if folder else None, device)
    except UsageError:
        if needed or folder:
            raise
        return None, None
    if recipe.codes:
        for network in ("squeeze", "vgg"):
            networks.weights(network, torch.bfloat16)
    w = recipe.loss.perceptual
    asked = w is not None and any(p.perceptual for p in recipe.phases)
    return networks, Perceptual(networks, w.count, w.window) if w and asked else None


def gates_of(t: Trainer, out: Path, pictures: list[Tensor], networks: Measures | None, going_on: bool) -> Gates:
    """Beside them lies start.safetensors: the weights with which the run began."""
    file = out / "start.safetensors"
    if going_on and file.exists():
        start = copy.deepcopy(t.model)
        checkpoint.take_over(start, checkpoint.load(file)[0], str(file))
    else:
        start = t.model
        checkpoint.save(file, start.state_dict(), {"preset": t.recipe.model.preset, "step": 0, "weights": "start"})
    if networks and not all((networks.folder / name).is_file() for n in ("alex", "squeeze") for name in FILES[n]):
        networks = None
    gates = Gates(t.recipe, start, pictures, networks, t.judge, t.start_row)
    t.start_row = gates.start_row
    return gates


def _device(name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"no CUDA device for --device {name}. Pass --device cpu, or install a torch build with CUDA")
    number, processes = ranks.here()
    return f"cuda:{number}" if name == "cuda" and processes > 1 else name


def _check_share(recipe: Recipe, us: Ranks) -> None:
    for phase in recipe.phases:
        if phase.batch % us.count:
            raise RecipeError(f"phases: a batch of {phase.batch} cannot be shared by {us.count} processes")


def _choice(recipe: Recipe, device: str, asked: str | Sequence[str], us: Ranks) -> ladder.Choice:
    if unknown := {asked} - {"ladder", *speed.RUNGS} if isinstance(asked, str) else set(asked) - set(speed.RUNGS):
        raise UsageError(f"no rung {unknown.pop()!r}. Rungs: {', '.join(speed.RUNGS)}; or ladder, to measure them")
    if us.count > 1:
        if asked == "ladder":
            asked = [r for r in speed.LADDER[torch.device(device).type] if "graph" not in r]
        elif any("graph" in r for r in ([asked] if isinstance(asked, str) else asked)):
            raise UsageError("a CUDA graph holds no exchange between processes: leave the graph rungs out of --speed")
    if isinstance(preset(recipe.model.preset), MrtConfig):
        # Windows, crops of the perceptual terms and lookups by tensors on the CPU are drawn or made anew in every step.
        if asked == "ladder":
            asked = [r for r in speed.LADDER[torch.device(device).type] if "graph" not in r]
        elif any("graph" in r for r in ([asked] if isinstance(asked, str) else asked)):
            raise UsageError("a step of MRT draws its windows anew, which a CUDA graph does not: leave the graph rungs "
                             "out of --speed")
        if recipe.critic:
            asked = "safe" if asked == "safe" else "eager"
    if asked == "ladder" or not isinstance(asked, str):
        seconds = 8.0 if device.startswith("cuda") else 1.0     # a CPU has one rung: nothing hangs on its number
        rungs = None if asked == "ladder" else asked
        return us.told(ladder.climb(recipe, device, rungs, seconds=seconds, say=say) if us.first else None)
    choice = ladder.Choice([asked])
    if asked == "safe":
        choice.backends = dict.fromkeys(ladder.OPERATORS, "torch")
    return choice


def _pictures(recipe: Recipe, folder: Path, valid: Path | None, cache: Path, device: str,
              us: Ranks) -> tuple[data.Crops, list[Tensor], list[tuple[str, int]]]:
    """Crops to train on, pictures to judge by, and the hashes that later shards may not hold."""
    library = data.Library(folder, cache, device, recipe.data.exclude_origins)
    refuse, judged = data.report_hashes(), []
    if valid:
        judging = data.Library(valid, cache, device)
        data.refuse_duplicates(valid, judging.pictures, refuse)
        smallest = SMALLEST_SIDE if recipe.loss.distortion == "ms-ssim" else 1
        judged = [p.pixels for p in data.validation_pictures(judging, recipe.evaluation.pictures, smallest)]
        refuse = refuse + [(p.entry.name, p.entry.hash) for p in judging.pictures]
    data.refuse_duplicates(folder, library.pictures, refuse)
    crops = data.Crops(library, recipe.data, recipe.seed + us.rank, device)
    say(f"{len(library.pictures)} pictures, {library.excluded} of excluded origins left out; {len(judged)} to judge by")
    for line in data.check_crops(crops, [p.crop for p in recipe.phases]):
        say(line)
    return crops, judged, refuse


def _revive(model: Any, crops: data.Crops, within: str) -> None:
    seen = dead.look(model, [*(crops.batch(8, CROP) * 255).byte()], (5.0, 50.0, 95.0))
    for line in dead.revive(model, build(model.config), seen, within):
        say(f"revived {line}")


def start(recipe: Recipe, model: Any, crops: data.Crops, device: str, init: str, state: Path | None,
          choice: ladder.Choice, us: Ranks, networks: Measures | None = None, out: Path | None = None,
          revive: bool = False) -> Trainer:
    config: Any = model.config
    for phase in recipe.phases:
        if phase.crop % config.multiple:
            raise RecipeError(f"phases: crop {phase.crop} is no multiple of {config.multiple}, "
                              f"as {recipe.model.preset} needs")
        if recipe.loss.distortion == "ms-ssim" and phase.crop < SMALLEST_SIDE:
            raise RecipeError(f"phases: crop {phase.crop} is too small for MS-SSIM: five scales need {SMALLEST_SIDE}")
    if getattr(config, "variable_rate", True) == (recipe.quality is None):
        raise RecipeError(f"preset {recipe.model.preset} is for " + (
            "every rate: it needs [quality] instead of loss.lambda" if recipe.quality is None else
            "one rate: it needs loss.lambda instead of [quality]"))
    if init:
        missing, extra = checkpoint.initialise(model, init, say)
        if missing or extra:
            say(f"{init}: not in it: {', '.join(missing) or 'nothing'}; not used: {', '.join(extra) or 'nothing'}")
        if revive:
            _revive(model, crops, "decoder." if recipe.critic else "")
    elif state is None and getattr(config, "init", "torch") != "torch":
        number, side = model.start_crops
        model.to(device).init_klt(torch.cat([crops.batch(32, side) for _ in range(number // 32)]))
    model.set_bf16(recipe.model.bf16)
    ladder.use_backends(choice.backends, device)
    us.same(list(model.to(device).state_dict().values()))
    if (recipe.codes or recipe.critic) and not isinstance(model, Mrt):
        raise RecipeError(f"[codes] and [critic] are for MRT, and {recipe.model.preset} is none")
    trainer = Trainer(recipe, model, crops, device, choice, us)
    if recipe.codes and networks:
        trainer.codes = Codes(recipe.codes, model, networks, recipe.optimiser.lr, recipe.optimiser.betas)
        if state is None:
            trainer.codes.prepare(crops, recipe.seed, out / "codes.safetensors" if out and us.first else None)
    for _, stage in trainer.stages():
        us.same(list(stage.state_dict().values()))
    if state is not None:
        trainer.restore(state)
    return trainer
