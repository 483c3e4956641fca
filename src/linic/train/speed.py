"""The training step as rungs of a ladder: the same mathematics, each rung faster and riskier than the one before.

    eager             one launch an operation: always right
    graph             the whole step as one CUDA graph: a step is 3-4 thousand launches, small batches wait for them
    compiled          blocks through torch.compile, elementwise passes fused
    compiled-graph    both
    compiled-all      the whole model through torch.compile, graph breaks allowed (minutes of compilation)
    safe              eager on the plain torch kernels: what a run that died is restarted with

`build(name, ...)` gives a Step; `differs` says whether it does what another does. ladder.py measures and chooses.
Nothing here waits for the device: numbers stay there until somebody reads them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from linic.errors import LinicError
from linic.train.loss import rate_distortion
from linic.train.perceptual import Perceptual
from linic.train.recipe import Loss
from linic.train.stage import Stage

SMALLEST = 256          # tokens of a picture: blocks with fewer are not worth their seconds of compilation
WARM_UPS = 3            # runs before a capture: handles, workspaces and lazy state must exist by then
# What bf16 sums in another order may do, with room: a wrong kernel or a missing term is off by far more.
TOLERANCES = {"loss": 0.01, "norm": 0.1, "update": 0.1, "gradient": 0.3}
SMALL_GRADIENT = 1e-3   # share of the whole gradient's norm


class Step:
    """Forward, backward, clip, AdamW. -> loss, bpp, loss.Terms.aside, PSNR, gradient norm: (5,), on the device, and the
    numbers of its stage, if it has one.

    A step whose loss or gradient is not finite changes nothing: the fused AdamW is told so on the device.
    """

    def __init__(self, model: nn.Module, optimiser: optim.Optimizer, clip: float, loss: Loss):
        self.model, self.optimiser, self.clip, self.loss = model, optimiser, clip, loss
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self.forward: Callable[..., Any] = model
        self.judge: Perceptual | None = None            # of this step, as is
        self.stage: Stage | None = None
        self.average: Callable[[list[Tensor]], None] | None = None      # over the processes of a run (ranks.py)
        state: Any = optimiser              # GradScaler's way to tell a fused optimiser
        state.found_inf, state.grad_scale = torch.zeros((), device=self.device), None
        self.found_inf: Tensor = state.found_inf
        # A number would be frozen into a captured graph.
        self.rates = [torch.zeros((), device=self.device) for _ in optimiser.param_groups]

    def __call__(self, x: Tensor, quality: Tensor, lr: float) -> Tensor:
        self.set_rate(lr)
        return self.run(x, quality)

    def set_rate(self, lr: float) -> None:
        on_gpu = self.device.type == "cuda"
        for group, rate in zip(self.optimiser.param_groups, self.rates):
            own = lr * group.get("share", 1.0)
            group["lr"], group["capturable"] = (rate.fill_(own), True) if on_gpu else (own, False)
        state: Any = self.optimiser
        state.found_inf = self.found_inf
        if self.stage:
            self.stage.set_rate(lr, self.found_inf)

    def run(self, x: Tensor, quality: Tensor) -> Tensor:
        stage, beside, more = self.stage, None, []
        if stage is None:
            terms = rate_distortion(self.forward(x, quality), x, quality, self.loss, self.judge)
        else:
            terms, beside, numbers_of_stage = stage.objective(self.forward, x, quality, self.loss, self.judge)
            stage.optimiser.zero_grad(set_to_none=True)
            more = [numbers_of_stage.detach()]
        loss = terms.loss.mean()
        self.optimiser.zero_grad(set_to_none=True)
        (loss if beside is None else loss + beside).backward()
        trained = [*self.params, *(stage.trained if stage else [])]
        with torch.no_grad():
            psnr = (-10 * torch.log10(terms.mse.clamp_min(1e-10))).mean()
            numbers = torch.stack([loss, terms.bpp.mean(), terms.aside.mean(), psnr])
            if self.average:
                self.average([numbers, *(p.grad for p in trained if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        finite = torch.isfinite(numbers[0]) & torch.isfinite(norm)
        if stage:
            finite = finite & torch.isfinite(nn.utils.clip_grad_norm_(stage.trained, self.clip))
            numbers[0] = torch.where(finite, numbers[0], torch.nan)     # so that whoever reads them knows
        self.found_inf.copy_(~finite)
        self.optimiser.step()
        if stage:
            stage.optimiser.step()
        return torch.cat([numbers, norm.detach()[None], *more])

    def prepare(self, x: Tensor, quality: Tensor) -> None:
        """Compilation and capture for inputs of this shape. Weights and optimiser are left as they were."""

    def _rehearse(self, x: Tensor, quality: Tensor, runs: int) -> None:
        before = self.snapshot()
        self.set_rate(0.0)
        for _ in range(runs):
            self.run(x, quality)
        self.restore(before)

    def _tensors(self) -> list[Tensor]:
        state = [v for entry in self.optimiser.state.values() for v in entry.values() if isinstance(v, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state]

    def snapshot(self) -> dict[int, Tensor]:
        return {id(t): t.detach().clone() for t in self._tensors()}

    @torch.no_grad()
    def restore(self, before: dict[int, Tensor]) -> None:
        for t in self._tensors():
            if id(t) in before:
                t.copy_(before[id(t)])
            else:
                t.zero_()                   # moments that did not exist yet start at zero


class Compiled(Step):
    """Blocks compiled for the time of a forward pass: evaluation, with its many sizes, never compiles."""

    backend = "inductor"

    def __init__(self, *args: Any):
        super().__init__(*args)
        from linic.models.blocks import Block

        _allow_recompiles()
        plain: Any = Block.forward
        fast = torch.compile(plain, fullgraph=True, dynamic=False, backend=self.backend)

        def block(this: Any, x: Tensor) -> Tensor:
            return (fast if x.shape[1] * x.shape[2] >= SMALLEST else plain)(this, x)

        def forward(x: Tensor, quality: Tensor) -> Any:
            # One code object for all blocks: those of equal shape share what was compiled.
            Block.forward = block       # type: ignore[method-assign,assignment]
            try:
                return self.model(x, quality)
            finally:
                Block.forward = plain   # type: ignore[method-assign]

        self.forward = forward

    def prepare(self, x: Tensor, quality: Tensor) -> None:
        self._rehearse(x, quality, 1)


class CompiledAll(Step):
    backend = "inductor"

    def __init__(self, *args: Any):
        super().__init__(*args)
        import torch._inductor.config as inductor

        _allow_recompiles()
        inductor.fallback_random = True     # the noise of eager, so that the two can be compared
        self.forward = torch.compile(self.model, dynamic=False, backend=self.backend)

    def prepare(self, x: Tensor, quality: Tensor) -> None:
        self._rehearse(x, quality, 1)


class Graph(Step):
    """One CUDA graph of `inner`'s step over inputs that stay where they are."""

    def __init__(self, inner: Step):
        super().__init__(inner.model, inner.optimiser, inner.clip, inner.loss)
        if not torch.cuda.is_available():
            raise LinicError("CUDA graphs need a CUDA device")
        self.forward = inner.forward
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, x: Tensor, quality: Tensor) -> None:
        self.graph = None
        self.optimiser.zero_grad(set_to_none=True)      # gradients lived in the old graph's memory
        self.x, self.quality = x.clone(), quality.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._rehearse(self.x, self.quality, WARM_UPS)
        torch.cuda.current_stream().wait_stream(aside)
        self.optimiser.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a shard that is read in the background may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.numbers = self.run(self.x, self.quality)
        self.graph = graph

    def __call__(self, x: Tensor, quality: Tensor, lr: float) -> Tensor:
        if self.graph is None or x.shape != self.x.shape:
            self.prepare(x, quality)
        assert self.graph is not None
        self.set_rate(lr)
        self.x.copy_(x)
        self.quality.copy_(quality)
        self.graph.replay()
        return self.numbers.clone()


def _allow_recompiles() -> None:
    import torch._dynamo.config as dynamo
    dynamo.recompile_limit = 256            # widths x scales x crop sizes, all of one code object
    dynamo.accumulated_recompile_limit = 1024


RUNGS: dict[str, Callable[..., Step]] = {
    "eager": Step,
    "safe": Step,
    "graph": lambda *a: Graph(Step(*a)),
    "compiled": Compiled,
    "compiled-graph": lambda *a: Graph(Compiled(*a)),
    "compiled-all": CompiledAll,
}
# In the order in which they are tried: what needs no compilation first.
LADDER = {"cpu": ("eager",), "cuda": ("eager", "graph", "compiled", "compiled-graph")}


def build(name: str, model: nn.Module, optimiser: optim.Optimizer, clip: float, loss: Loss) -> Step:
    return RUNGS[name](model, optimiser, clip, loss)


def differs(step: Step, reference: Step, x: Tensor, quality: Tensor, lr: float) -> str:
    """Why `step` is not what `reference` is; "" if it is. Both take two steps from here, with the same noise; then
    everything is put back. Errors of `step` are the caller's."""
    devices = [x.device] if x.device.type == "cuda" else []
    before = reference.snapshot()
    rows, gradients = [], []
    with torch.random.fork_rng(devices):
        for each in (reference, step):
            try:
                each.prepare(x, quality)
                torch.manual_seed(0)
                first = each(x, quality, lr)
                gradients.append([None if p.grad is None else p.grad.clone() for p in each.params])
                numbers = torch.stack([first, each(x, quality, lr)])[:, [0, 4]]
                update = sum((p.detach() - before[id(p)]).double().square().sum() for p in each.params)
                rows.append([*numbers.flatten().tolist(), float(update) ** 0.5])
            finally:                    # also after an error: the weights are those of a run
                each.restore(before)
    names = ("loss of step 1", "norm of step 1", "loss of step 2", "norm of step 2", "update")
    for name, wanted, got in zip(names, *rows):
        if not abs(got - wanted) <= TOLERANCES[name.split()[0]] * abs(wanted):      # so that NaN differs
            return f"{name} is {got:.6g}, {wanted:.6g} by the reference"
    worst, name = gradient_error(reference.model, *gradients)
    return f"gradient of {name} is off by {worst:.2g} of the reference" if worst > TOLERANCES["gradient"] else ""


def gradient_error(model: nn.Module, wanted: list[Tensor | None], got: list[Tensor | None]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and its name. Those that hardly count in the whole are
    measured against a part of it: they are sums that cancel."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    whole = torch.stack([g.norm() for g in wanted if g is not None]).norm()
    errors = [(name, torch.tensor(0.0 if a is b else torch.inf) if a is None or b is None
               else (a - b).norm().cpu() / torch.maximum(a.norm(), SMALL_GRADIENT * whole).cpu())
              for name, a, b in zip(names, wanted, got)]
    found = [(float(e.nan_to_num(torch.inf)), name) for name, e in errors]
    return max(found)
