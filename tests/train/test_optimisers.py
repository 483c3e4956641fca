"""SOAP and Muon: what they promise, and that they live in the loop as AdamW does."""
import dataclasses
import time
from functools import partial

import pytest
import torch
from torch import nn

from linic.errors import RecipeError
from linic.models import blocks
from linic.models.config import Style
from linic.train import checkpoint, optimisers, speed
from linic.train.recipe import Loss, Optimiser, Slower

O = Optimiser(1e-2, (0.9, 0.98), 0.0, 2.0)
KINDS = ["adamw", "soap", "muon"]


class Net(nn.Module):
    """A Linear, two of a block, and parameters that are no matrices of a Linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)
        self.block = blocks.Block(8, 2, Style(zero_init=False), spatial=False)
        self.kernel, self.gain = nn.Parameter(torch.randn(5, 5, 3)), nn.Parameter(torch.randn(2, 5))

    def loss(self, seed):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))
        y = self.second(self.block(self.first(x).view(1, 4, 5, 8))).view(20, 5) * self.gain.sum(0)
        return (y - x[:, :5] + self.kernel.mean()).square().mean()


def made(kind, net=None, **changes):
    net = net or Net()
    return net, optimisers.build(dataclasses.replace(O, kind=kind, **changes), net)


def steps(net, optimiser, seeds):
    for seed in seeds:
        optimiser.zero_grad()
        net.loss(seed).backward()
        optimiser.step()
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_what_has_many_inputs_moves_slower_in_proportion():
    net, optimiser = made("adamw", inputs=7)
    speed.Step(net, optimiser, 1.0, None).set_rate(1e-3)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert rates[id(net.first.weight)] == 1e-3 and rates[id(net.second.weight)] == pytest.approx(1e-3 * 7 / 8)
    assert rates[id(net.second.weight)] == rates[id(net.block.channel.kr.weight)]
    assert rates[id(net.kernel)] == rates[id(net.gain)] == rates[id(net.first.bias)] == 1e-3
    assert len(rates) == len(list(net.parameters()))


def test_what_a_recipe_names_moves_at_its_share_of_the_rate():
    slower = Slower(r"channel\.(kr|out)", 0.25), Slower("block", 0.5)
    net, optimiser = made("adamw", inputs=4, slower=slower)
    speed.Step(net, optimiser, 1.0, None).set_rate(1e-3)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert rates[id(net.block.channel.kr.weight)] == pytest.approx(1e-3 * 4 / 8 / 4)    # of the first that fits
    assert rates[id(net.block.channel.norm.weight)] == pytest.approx(5e-4)
    assert rates[id(net.gain)] == 1e-3
    for where, says in (("(", "no regular expression"), ("blok", "no parameter")):
        with pytest.raises(RecipeError, match=says):
            made("adamw", slower=(Slower(where, 0.5),))


def valley(optimiser_of):
    """|| A W B ||^2 after 200 steps. A, B have condition 100, both turned: no axis of W is an axis of the valley."""
    torch.manual_seed(0)
    stretch = torch.logspace(0, -2, 16)
    a, b = (torch.linalg.qr(torch.randn(16, 16))[0] * stretch @ torch.linalg.qr(torch.randn(16, 16))[0]
            for _ in range(2))
    w = nn.Parameter(torch.randn(16, 16))
    optimiser = optimiser_of([w])
    for _ in range(200):
        optimiser.zero_grad()
        loss = (a @ w @ b).square().sum()
        loss.backward()
        optimiser.step()
    return loss.item()


def test_soap_goes_down_an_ill_conditioned_valley_faster_than_adamw():
    rates = (0.01, 0.03, 0.1, 0.3)
    adam = min(valley(partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)) for lr in rates)
    soap = min(valley(partial(optimisers.Soap, lr=lr, betas=(0.9, 0.98))) for lr in rates)
    assert soap < 0.1 * adam


def test_each_kind_takes_its_matrices_and_adamw_the_rest():
    for kind, theirs in (("soap", {"first", "second", "block.channel.kr", "block.channel.out"}),
                         ("muon", {"block.channel.kr", "block.channel.out"})):
        net, optimiser = made(kind)
        names = {id(p): name for name, p in net.named_parameters()}
        assert {names[id(p)] for p in optimiser.param_groups[0]["params"]} == {f"{n}.weight" for n in theirs}
        everything = [id(p) for group in optimiser.param_groups for p in group["params"]]
        assert sorted(everything) == sorted(names)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_soap_is_adamw_where_the_basis_is_the_unit_matrix(decay):
    plain, soap = made("adamw", weight_decay=decay), made("soap", weight_decay=decay, largest=1)
    a, b = steps(*plain, range(30)), steps(*soap, range(30))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_a_side_that_is_too_long_has_no_basis():
    net, optimiser = made("soap", largest=6)
    steps(net, optimiser, [0])
    keys = {k for k in optimiser.state[net.first.weight] if k.startswith(("gram", "basis"))}
    assert keys == {"gram_1", "basis_1"}
    assert not [k for k in optimiser.state[net.kernel] if k.startswith("basis")]


@pytest.mark.parametrize("period", [1, 10])
def test_the_basis_stays_orthogonal_and_comes_to_turn_the_gradients_moments_diagonal(period):
    net, optimiser = made("soap", period=period, betas=(0.9, 0.9), lr=1e-5)
    steps(net, optimiser, range(60))
    s = optimiser.state[net.first.weight]
    q = s["basis_1"]
    assert torch.allclose(q.T @ q, torch.eye(6), atol=1e-5)
    turned = q.T @ s["gram_1"] @ q
    assert (turned - torch.diag(turned.diag())).norm() < 0.2 * turned.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimiser_goes_on_bit_for_bit(kind, tmp_path):
    whole = steps(*made(kind, period=4), range(15))
    net, optimiser = made(kind, period=4)
    steps(net, optimiser, range(7))
    checkpoint.save(tmp_path / "state.safetensors", checkpoint.optimiser_tensors(optimiser), {})
    weights = net.state_dict()
    net, optimiser = made(kind, period=4)
    net.load_state_dict(weights)
    checkpoint.restore_optimiser(optimiser, checkpoint.load(tmp_path / "state.safetensors")[0])
    resumed = steps(net, optimiser, range(7, 15))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_may_be_a_tensor_where_it_is_one(kind):
    numbers, tensors = made(kind), made(kind)
    for group in tensors[1].param_groups:
        if not group.get("fused"):                      # the fused AdamW takes one on a GPU only
            group["lr"] = torch.tensor(group["lr"])
    a, b = steps(*numbers, range(5)), steps(*tensors, range(5))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


class Picture(nn.Module):
    """What speed.Step trains: Linears and a block between pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 3, bias=False)
        self.block = blocks.Block(8, 2, Style(zero_init=False), spatial=False)

    def forward(self, x, quality):
        y = self.second(self.block(self.first(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return {"x_hat": y, "likelihoods": {k: torch.sigmoid(y) for k in "yz"}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(kind):
    net, optimiser = made(kind, Picture())
    step = speed.build("eager", net, optimiser, 2.0, Loss(0.35))
    x, quality = torch.rand(2, 3, 8, 8), torch.full((2,), 50.0)
    step(x, quality, 1e-3)
    before = step.snapshot()
    assert torch.isnan(step(x * float("nan"), quality, 1e-3)[0])
    assert all(torch.equal(t, before[id(t)]) for t in step._tensors())
    step(x, quality, 1e-3)
    assert not any(torch.equal(p, before[id(p)]) for p in net.parameters())


def test_a_rehearsal_leaves_no_trace_in_soap():
    """speed.py takes trial steps and sets what they made to zero."""
    x, quality, results = torch.rand(2, 3, 8, 8), torch.full((2,), 50.0), []
    for rehearse in (False, True):
        net, optimiser = made("soap", Picture(), period=2)
        step = speed.build("eager", net, optimiser, 2.0, Loss(0.35))
        if rehearse:
            step._rehearse(x, quality, 3)
        for _ in range(5):
            step(x, quality, 1e-3)
        results.append(net.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_a_torch_without_muon_is_told_of_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RecipeError, match=r"'muon', which torch .* does not have"):
        made("muon")


@pytest.mark.slow
def test_a_step_of_soap_or_muon_costs_less_than_the_gradient_it_uses():
    """Of lalic-xs at 8 crops of 128, in one thread."""
    from linic.models import build

    def seconds(do, times):
        start = time.process_time()
        for _ in range(times):
            do()
        return (time.process_time() - start) / times

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, x = build("lalic-xs").train(), torch.rand(8, 3, 128, 128)
        cost = {"gradient": seconds(lambda: model(x)["x_hat"].sum().backward(), 2)}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for kind in KINDS:
            optimiser = made(kind, model)[1]
            optimiser.step()
            cost[kind] = seconds(optimiser.step, 10)    # one turn of the basis among them
    finally:
        torch.set_num_threads(threads)
    print({k: f"{1e3 * v:.0f} ms" for k, v in cost.items()})
    assert max(cost["soap"], cost["muon"]) < cost["gradient"]
