"""Optimisers a recipe can name: adamw; soap and muon for matrices, with AdamW for all else.

All step with `lr` as a number or a tensor, change nothing while `found_inf` is 1 (speed.py), and keep nothing but
tensors, so that a resumed run goes on bit for bit (checkpoint.optimiser_tensors).
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim

from linic.errors import RecipeError
from linic.models.blocks import Block
from linic.train.recipe import Optimiser


class Soap(optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner, for 2-D parameters.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321), algorithms 3 and 4.
    `period`: steps between two turns of the basis (one power iteration and a QR each). `largest`: a side longer than
    this keeps the unit basis; with both sides longer this is AdamW. Unlike algorithm 3, the first moment is kept in
    the eigenbasis and turned with it: two products a step fewer. The first step takes its basis from its own gradient.
    It reads `found_inf` and its own step count: waits for a GPU, and no CUDA graph. A step for lalic-xs takes .10 s of
    one CPU thread, where AdamW takes .005 (tests/train/test_optimisers.py).
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.95, 0.95),
                 weight_decay: float = 0.0, eps: float = 1e-8, period: int = 10, largest: int = 256):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps,
                                  "period": period, "largest": largest})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if _skipped(self):
            return None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group)

    def _update(self, p: Tensor, s: dict[str, Tensor], group: dict[str, Any]) -> None:
        (b1, b2), g = group["betas"], p.grad
        assert g is not None
        sides = [i for i in (0, 1) if p.shape[i] <= group["largest"]]
        if not s:
            s["step"] = torch.zeros(())
            s["exp_avg"], s["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            for i in sides:
                s[f"gram_{i}"] = p.new_zeros(p.shape[i], p.shape[i])
                s[f"basis_{i}"] = p.new_zeros(p.shape[i], p.shape[i])
        s["step"] += 1
        n = int(s["step"])
        for i in sides:
            s[f"gram_{i}"].lerp_(g @ g.T if i == 0 else g.T @ g, 1 - b2 if n > 1 else 1.0)
            if n == 1:
                s[f"basis_{i}"].copy_(torch.linalg.eigh(s[f"gram_{i}"])[1].flip(1))
        bases = [s.get(f"basis_{i}") for i in (0, 1)]
        g = _turn(g, *bases)
        s["exp_avg"].lerp_(g, 1 - b1)
        s["exp_avg_sq"].lerp_(g * g, 1 - b2)
        update = s["exp_avg"] / (s["exp_avg_sq"].sqrt() / (1 - b2**n) ** 0.5 + group["eps"]) / (1 - b1**n)
        update = _turn(update, *(None if q is None else q.T for q in bases))
        p.sub_((update + group["weight_decay"] * p) * group["lr"])
        if sides and n % group["period"] == 0:
            change: list[Tensor | None] = [None, None]
            for i in sides:
                old = s[f"basis_{i}"].clone()
                s[f"basis_{i}"].copy_(torch.linalg.qr(s[f"gram_{i}"] @ old)[0])
                change[i] = old.T @ s[f"basis_{i}"]
            s["exp_avg"].copy_(_turn(s["exp_avg"], *change))


def _turn(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left^T x right; None is the unit matrix."""
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def _skipped(optimiser: optim.Optimizer) -> bool:
    found: Tensor | None = getattr(optimiser, "found_inf", None)
    return found is not None and bool(found)


class Together(optim.Optimizer):
    """Optimisers for parts of the parameters as one: one list of groups, one state."""

    def __init__(self, parts: list[optim.Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:      # load_state_dict makes new groups and a new state
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        at = 0
        for part in self.parts:
            n = len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[at : at + n]
            at += n

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part in self.parts:
            if "found_inf" in vars(self):       # a fused optimiser skips by itself, on the device
                vars(part).update(found_inf=vars(self)["found_inf"], grad_scale=None)
            if part.defaults.get("fused") or not _skipped(part):
                part.step()


def build(o: Optimiser, model: nn.Module) -> optim.Optimizer:
    """Of a recipe, for the model's parameters that are trained. Raises RecipeError where this torch has no Muon, and
    where a name in `slower` is no parameter's.

    SOAP takes the weights of all Linears, Muon those of the blocks. A group of AdamW may have a `share` of the rate.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    blocks: list[nn.Module] = [m for m in model.modules() if isinstance(m, Block)]
    within = {"adamw": blocks[:0], "soap": [model], "muon": blocks}[o.kind]
    theirs = {id(m.weight) for part in within for m in part.modules() if isinstance(m, nn.Linear)}
    matrices = [p for p in params if id(p) in theirs]
    rest = [p for p in params if id(p) not in theirs]
    inputs = {id(m.weight): m.weight[0].numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    slower = _slower(o, model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in sorted(rest, key=lambda p: p.ndim <= 1):
        share = min(1.0, o.inputs / inputs.get(id(p), 1)) if o.inputs else 1.0
        share *= slower.get(id(p), 1.0)
        groups.setdefault((share, o.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    adamw = optim.AdamW([{"params": some, "weight_decay": decay, "share": share}
                         for (share, decay), some in groups.items()], o.lr, o.betas, fused=True)
    if not matrices:
        return adamw
    if o.kind == "soap":
        return Together([Soap(matrices, o.lr, o.betas, o.weight_decay, period=o.period, largest=o.largest), adamw])
    muon: Callable[..., optim.Optimizer] | None = getattr(optim, "Muon", None)
    if muon is None:
        raise RecipeError(f"optimiser.kind is 'muon', which torch {torch.__version__} does not have")
    # match_rms_adamw: an update as large as AdamW's, so that one rate fits both.
    return Together([muon(matrices, o.lr, o.weight_decay, adjust_lr_fn="match_rms_adamw"), adamw])


def _slower(o: Optimiser, model: nn.Module) -> dict[int, float]:
    """Shares of the rate by the parameters' ids."""
    found: dict[int, float] = {}
    names = dict(model.named_parameters())
    for x in o.slower:
        try:
            those = [p for name, p in names.items() if re.search(x.where, name)]
        except re.error as error:
            raise RecipeError(f"optimiser.slower {x.where!r} is no regular expression: {error}") from error
        if not those:
            raise RecipeError(f"optimiser.slower {x.where!r}: no parameter of the model has such a name, as "
                              f"{next(iter(names))} is one")
        for p in those:
            found.setdefault(id(p), x.share)
    return found
