"""Which kernels and which rung (speed.py) are right on this device, and the fastest: measured before a run begins.

Trials run in a process of their own. One that raises, dies, hangs or poisons the device costs its time limit, and the
reason is printed; the run goes on with what is left. Compiled code stays in the compiler's cache on disk, so the run
does not pay for it twice.

    climb(recipe, device) -> Choice
"""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linic.kernels.choice import choose
from linic.train import speed
from linic.train.machine import settings
from linic.train.recipe import Recipe

OPERATORS = ("biwkv", "dwconv5")
KERNEL_ERROR = 2e-3             # relative to float64; TF32 alone is 3e-4
WORTH_IT = 1.15                 # crops/s that a doubled batch, with its fewer steps, must gain
START_SECONDS = 90.0            # a fresh process imports torch on a busy machine


@dataclass
class Choice:
    rungs: list[str] = field(default_factory=lambda: ["eager"])     # the right ones, fastest first
    batch: int = 1                                                  # times the recipe's
    backends: dict[str, str] = field(default_factory=dict)          # operator -> backend, where not the default


# --- the parent -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers one job at a time; a fresh one after each that went wrong."""

    def __init__(self, setup: Callable[..., Any], *args: Any):
        self.setup, self.args = setup, args
        self.process: Any = None

    def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer, or {"failed": reason}."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")      # a fork would inherit a used CUDA context
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.setup, *self.args))
            self.process.start()
            theirs.close()
            ready = self._answer(START_SECONDS)
            if "failed" in ready:
                return ready
        try:
            self.pipe.send(job)
        except OSError:
            self.close()
            return {"failed": "its process is gone"}
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            if self.pipe.poll(limit_s):
                answer: dict[str, Any] = self.pipe.recv()
                if answer.get("dead"):
                    self.close()
                return answer
            failed = f"abandoned after {limit_s:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            failed = f"its process died with exit code {self.process.exitcode}"
        self.close()
        return {"failed": failed}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def climb(recipe: Recipe, device: str, rungs: Sequence[str] | None = None, *, seconds: float = 8.0,
          limit_s: float = 40.0, total_s: float = 150.0, batches: Sequence[int] = (1, 2), setup: Any = None,
          say: Callable[[str], None] = print) -> Choice:
    """Every rung at the recipe's first phase, then the fastest at larger batches. `seconds`: of timing, after
    compilation; `limit_s`: of one trial, all in; `total_s`: no trial starts after it."""
    kind = torch.device(device).type
    rungs = rungs or speed.LADDER[kind]
    choice, start, phase = Choice(), time.monotonic(), recipe.phases[0]
    worker = Worker(setup or Trials, recipe, device, torch.get_num_threads())
    try:
        for operator in OPERATORS:
            _choose_backend(worker, operator, limit_s, choice, say)

        def trial(rung: str, times: int) -> float:
            """Crops/s; 0 where it is not to be used."""
            shape = f"{rung:<15} {phase.crop}x{phase.batch * times:<4}"
            if time.monotonic() - start > total_s:
                say(f"  {shape} not tried: the ladder's {total_s:.0f} s are over")
                return 0.0
            got = worker.ask({"rung": rung, "crop": phase.crop, "batch": phase.batch * times, "seconds": seconds,
                              "backends": choice.backends}, limit_s)
            if "failed" in got:
                say(f"  {shape} skipped: {got['failed']}")
            elif got["wrong"]:
                say(f"  {shape} rejected, wrong: {got['wrong']}")
            else:
                say(f"  {shape} {got['rate']:8.1f} crops/s  {got['gb']:6.1f} GB  ready in {got['ready_s']:.1f} s")
                return float(got["rate"])
            return 0.0

        rates = {rung: trial(rung, batches[0]) for rung in rungs}
        right = sorted((r for r in rates if rates[r]), key=lambda r: -rates[r])
        choice.rungs, choice.batch = [*right, *(["eager"] if "eager" not in right else [])], batches[0]
        best = rates[right[0]] if right else 0.0
        for times in batches[1:] if right else ():
            rate = trial(right[0], times)
            if rate > WORTH_IT * best:
                choice.batch, best = times, rate
    finally:
        worker.close()
    others = f"; kernels {choice.backends}" if choice.backends else ""
    say(f"ladder: {choice.rungs[0]}, batch x{choice.batch}, {time.monotonic() - start:.0f} s{others}")
    return choice


def _choose_backend(worker: Worker, operator: str, limit_s: float, choice: Choice, say: Callable[[str], None]) -> None:
    """The fastest backend that is right."""
    found: dict[str, float] = {}
    default = worker.ask({"default": operator}, limit_s).get("name", "torch")
    for name in dict.fromkeys((default, "torch")):
        got = worker.ask({"kernel": operator, "backend": name}, limit_s)
        if "failed" in got:
            say(f"  {operator:<8} {name:<7} skipped: {got['failed']}")
        else:
            right = got["error"] < KERNEL_ERROR
            found.update({name: got["ms"]} if right else {})
            say(f"  {operator:<8} {name:<7} error {got['error']:.1e}{'' if right else ': WRONG, not used'}"
                f"  {got['ms']:.2f} ms")
    best = min(found, key=lambda n: found[n], default="torch")
    if best != default:
        choice.backends[operator] = best


def use_backends(backends: dict[str, str], device: str) -> None:
    """From now on, who asks for no backend of an operator gets these: the dispatcher chooses by what is installed,
    the ladder by what is right."""
    for operator, name in backends.items():
        module: Any = sys.modules[f"linic.kernels.{operator}"]      # the package's attribute is the function
        module.choose = partial(_chosen, name, torch.device(device).type)


def _chosen(name: str, kind: str, operator: str, device: str, dtype: torch.dtype, asked: str | None) -> str:
    return name if asked is None and device == kind else choose(operator, device, dtype, asked)


# --- the child ------------------------------------------------------------------------------------------------------


def _serve(pipe: Any, setup: Callable[..., Any], *args: Any) -> None:
    try:
        answer = setup(*args)
        pipe.send({"ready": True})
    except Exception as error:
        pipe.send({"failed": _reason(error), "dead": True})
        return
    while True:
        try:
            job = pipe.recv()
        except EOFError:                # the parent is gone
            return
        try:
            pipe.send(answer(job))
        except Exception as error:
            # After a CUDA error every later call fails as well: such a process answers no more.
            dead = torch.cuda.is_available() and torch.cuda.is_initialized()
            pipe.send({"failed": _reason(error), "dead": dead})


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


class Trials:
    """What the child does. Weights are fresh, with what starts silent set to noise: at the start of a real run the
    blocks give zero whatever their kernels do."""

    def __init__(self, recipe: Recipe, device: str, threads: int):
        self.recipe, self.device = recipe, device
        self.settings = settings(device, threads, recipe.seed)
        self.settings.__enter__()       # for the life of the process
        torch.zeros(1, device=device)
        self.model: nn.Module | None = None

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        if "default" in job:
            return {"name": choose(job["default"], torch.device(self.device).type, torch.float32, None)}
        if "kernel" in job:
            error = max(check_kernel(job["kernel"], job["backend"], self.device, shape) for shape in range(2))
            return {"error": error, "ms": 1e3 * time_kernel(job["kernel"], job["backend"], self.device)}
        use_backends(job["backends"], self.device)
        return self.rung(job["rung"], job["crop"], job["batch"], job["seconds"])

    def rung(self, name: str, crop: int, batch: int, seconds: float) -> dict[str, Any]:
        began, o = time.monotonic(), self.recipe.optimiser
        if self.model is None:
            from linic.models import build
            self.model = build(self.recipe.model.preset).to(self.device).train()
            self.model.set_bf16(self.recipe.model.bf16)
            with torch.no_grad():
                for p in self.model.parameters():
                    p.add_(0.01 * torch.randn_like(p) * (p == 0))
        optimiser = torch.optim.AdamW(self.model.parameters(), o.lr, o.betas, fused=True)
        x = nn.functional.interpolate(torch.rand(batch, 3, crop // 8, crop // 8, device=self.device), size=(crop, crop),
                                      mode="bilinear")
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)      # as the crops come
        quality = 100 * torch.rand(batch, device=self.device)
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        step, reference = (speed.build(n, self.model, optimiser, o.clip, self.recipe.loss)
                           for n in (name, "eager"))
        wrong = speed.differs(step, reference, x, quality, o.lr / 10)
        ready = time.monotonic() - began
        rate = 0.0 if wrong else batch / timed(partial(step, x, quality, 0.0), seconds, self.device)
        gb = torch.cuda.max_memory_allocated() / 1e9 if self.device.startswith("cuda") else 0.0
        return {"wrong": wrong, "rate": rate, "gb": gb, "ready_s": ready}


def timed(f: Callable[[], Any], seconds: float, device: str, at_once: int = 4) -> float:
    """Seconds a call, device waits included, the first calls not."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    f()
    wait()
    start, n = time.perf_counter(), 0
    while not n or time.perf_counter() - start < seconds:
        for _ in range(at_once if device.startswith("cuda") else 1):
            f()
            n += 1
        wait()
    return (time.perf_counter() - start) / n


def check_kernel(operator: str, backend: str, device: str, shape: int) -> float:
    """Largest relative error of value and gradients against float64, on fresh data."""
    function, reference, inputs = _kernel(operator, device, shape)
    rows, g = [], torch.empty(0)
    for f, dtype in ((partial(function, backend=backend), torch.float32), (reference, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = f(*_views(operator, leaves))
        g = g if len(g) else torch.randn_like(out)
        out.backward(g.to(dtype))
        rows.append([out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*rows)]
    return math.inf if any(math.isnan(e) for e in errors) else max(errors)


def time_kernel(operator: str, backend: str, device: str) -> float:
    """Seconds of a forward and backward pass at a training shape."""
    function, _, inputs = _kernel(operator, device, 2)
    leaves = [t.requires_grad_() for t in inputs]
    return timed(lambda: function(*_views(operator, leaves), backend=backend).sum().backward(), 0.2, device)


def _kernel(operator: str, device: str, shape: int) -> tuple[Any, Any, list[Tensor]]:
    """Operator, its definition, and inputs: two shapes to check (the definition is quadratic), one to time."""
    from linic import kernels
    from linic.kernels.biwkv.reference import biwkv
    from linic.kernels.dwconv5.reference import dwconv5

    gpu = device.startswith("cuda")
    if operator == "biwkv":
        b, t, c = ((2, 1024, 48), (3, 256, 320), (32, 1024, 192))[shape] if gpu else (2, 96, 16)
        kv = torch.randn(b, t, 2 * c)
        kv[..., :c] *= 3
        inputs = [32 * torch.rand(c) / 1024, torch.randn(c), kv]
    else:
        b, h, w, c = ((2, 32, 24, 48), (3, 16, 16, 320), (32, 64, 64, 96))[shape] if gpu else (2, 12, 9, 16)
        inputs = [torch.randn(b, h, w, c), torch.randn(25, c)]
    function, definition = (kernels.biwkv, biwkv) if operator == "biwkv" else (kernels.dwconv5, dwconv5)
    return function, definition, [t.to(device) for t in inputs]


def _views(operator: str, leaves: list[Tensor]) -> list[Tensor]:
    """k and v are slices of a wider tensor, as one product leaves them in the model."""
    return [*leaves[:2], *leaves[2].chunk(2, 2)] if operator == "biwkv" else leaves
