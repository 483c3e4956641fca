import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from train_helpers import ROOT, FakeTrials, Tiny

from linic.errors import LinicError
from linic.kernels.dwconv5 import torch_form
from linic.models import blocks
from linic.models.config import Style
from linic.train import ladder, recipe, speed


def parts(model=None):
    model = (model or Tiny()).train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    return model, optimiser, 2.0, recipe.Loss(0.35)


def batch(n=2):
    torch.manual_seed(1)
    return torch.rand(n, 3, 64, 64), torch.full((n,), 50.0)


def test_a_step_that_is_not_finite_changes_nothing_on_the_device():
    model, optimiser, *_ = all_parts = parts()
    step, (x, quality) = speed.Step(*all_parts), batch()
    step(x, quality, 1e-3)
    before = step.snapshot()
    nowhere = float("nan")
    step.forward = lambda x, quality: {**model(x, quality), "x_hat": x * model.up.bias.sum() * nowhere}
    assert torch.isnan(step(x, quality, 1e-3)[0])
    assert all(torch.equal(t, before[id(t)]) for t in step._tensors())
    step.forward = model
    step(x, quality, 1e-3)
    assert not all(torch.equal(p, before[id(p)]) for p in model.parameters())
    assert {float(entry["step"]) for entry in optimiser.state.values()} == {2.0}


def test_a_comparison_sees_what_is_wrong_and_leaves_no_trace():
    class Bent(speed.Step):
        def run(self, x, quality):
            numbers = super().run(x, quality)
            with torch.no_grad():
                self.model.down.bias.grad.mul_(-1)
            return numbers

    all_parts, (x, quality) = parts(), batch()
    eager = speed.Step(*all_parts)
    before, noise = eager.snapshot(), torch.get_rng_state()
    assert speed.differs(speed.Step(*all_parts), eager, x, quality, 1e-3) == ""
    assert "gradient of down.bias is off by 2" in speed.differs(Bent(*all_parts), eager, x, quality, 1e-3)
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(t, before.get(id(t), torch.zeros(()))) or not t.any() for t in eager._tensors())


def test_a_graph_needs_a_gpu():
    with pytest.raises(LinicError, match="CUDA device"):
        speed.build("graph", *parts())


def test_a_graph_changes_nothing_but_by_its_replays(monkeypatch):
    """Everything around the capture; a stand-in for the capture itself runs the step and takes it back."""
    graphs = []

    class Recorded:
        def replay(self):
            graph.numbers.copy_(graph.run(graph.x, graph.quality))

    @contextmanager
    def capture(recorded, **_):
        before = graph.snapshot()
        yield
        graph.restore(before)
        graphs.append(recorded)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"is_available": lambda: True, "Stream": lambda: stream, "current_stream": lambda: stream,
                        "stream": lambda s: nullcontext(), "CUDAGraph": Recorded, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    all_parts = parts()
    graph, eager = speed.build("graph", *all_parts), speed.Step(*all_parts)
    for shape, count in ((2, 1), (3, 2)):
        assert speed.differs(graph, eager, *batch(shape), 1e-3) == "" and len(graphs) == count
        graph(*batch(shape), 1e-3)
    assert len(graphs) == 2
    graph(*batch(4), 1e-3)              # a shape that nobody announced
    assert len(graphs) == 3


class Blocks(Tiny):
    """A free block and a normative one around the convolutions."""

    def __init__(self):
        super().__init__()
        self.free = blocks.Block(8, 2, Style(zero_init=False), pixels=4)
        self.normative = blocks.Block(8, 2, Style(zero_init=False), normative=True, shift=False)

    def forward(self, x, quality):
        wide = x.permute(0, 2, 3, 1).repeat(1, 1, 1, 3)[..., :8]
        return super().forward(x + self.normative(self.free(wide))[..., :3].permute(0, 3, 1, 2), quality)


def test_blocks_compile_without_a_break_and_only_in_a_step(monkeypatch):
    monkeypatch.setattr(speed.Compiled, "backend", "aot_eager")     # no C++ compiler, a second instead of a minute
    plain = blocks.Block.forward
    model, *rest = parts(Blocks())
    x, quality = batch(1)
    for operator in ladder.OPERATORS:       # a backend that was taken out may not break compilation
        module = sys.modules[f"linic.kernels.{operator}"]
        monkeypatch.setattr(module, "choose", module.choose)
        ladder.use_backends({operator: "torch"}, "cpu")
    step = speed.build("compiled", model, *rest)
    assert speed.differs(step, speed.Step(model, *rest), x[..., :32, :32].repeat(1, 1, 2, 2), quality, 1e-3) == ""
    assert blocks.Block.forward is plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


def test_the_ladder_takes_the_fastest_that_is_right_and_says_what_became_of_the_others(xs):
    said: list[str] = []
    start = time.monotonic()
    choice = ladder.climb(xs, "cpu", ("eager", "wrong", "raises", "good", "dies", "slow"), seconds=0.1, limit_s=1.5,
                          setup=FakeTrials, say=said.append)
    assert choice == ladder.Choice(["good", "eager"], 2, {"biwkv": "torch"})
    text = "\n".join(said)
    assert "biwkv    native  error 3.0e-01: WRONG, not used" in text
    assert "wrong           128x8    rejected, wrong: loss of step 1 is 2" in text
    assert "raises          128x8    skipped: ValueError: no such instruction" in text and "much more" not in text
    assert "dies            128x8    skipped: its process died with exit code 17" in text
    assert "slow            128x8    skipped: abandoned after 2 s" in text
    assert "good            128x16       30.0 crops/s" in text
    assert time.monotonic() - start < 60


def test_a_trial_of_the_real_model_and_of_the_real_kernels(xs, monkeypatch):
    class Bent(speed.Step):
        def run(self, x, quality):
            return super().run(x, quality) * 1.05

    monkeypatch.setitem(speed.RUNGS, "bent", Bent)
    trials = ladder.Trials(xs, "cpu", 1)
    try:
        for operator in ladder.OPERATORS:
            name = trials({"default": operator})["name"]
            for backend in {name, "torch"}:
                got = trials({"kernel": operator, "backend": backend})
                assert got["error"] < 1e-5 and got["ms"] > 0
        job = {"crop": 64, "batch": 1, "seconds": 0.0, "backends": {}}
        assert trials({"rung": "eager", **job})["rate"] > 0
        assert "by the reference" in trials({"rung": "bent", **job})["wrong"]
    finally:
        trials.settings.__exit__(None, None, None)


def test_a_wrong_kernel_is_seen_and_another_can_be_chosen(monkeypatch):
    with monkeypatch.context() as m:
        right = torch_form.backward
        m.setattr(torch_form, "backward", lambda x, w, g: (torch_form.forward(g, w), right(x, w, g)[1]))
        assert ladder.check_kernel("dwconv5", "torch", "cpu", 0) > 0.1
    module = sys.modules["linic.kernels.dwconv5"]
    default = module.choose("dwconv5", "cpu", torch.float32, None)
    monkeypatch.setattr(module, "choose", module.choose)        # put back afterwards
    ladder.use_backends({"dwconv5": "torch"}, "cpu")
    assert module.choose("dwconv5", "cpu", torch.float32, None) == "torch"
    assert module.choose("dwconv5", "cpu", torch.float32, default) == default
    assert ladder.check_kernel("dwconv5", "torch", "cpu", 0) < 1e-5


def test_a_recipe_for_the_gpu_has_few_shapes():
    assert len({(p.crop, p.batch) for p in recipe.load(ROOT / "recipes" / "lalic-s.toml").phases}) <= 2
