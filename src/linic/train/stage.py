"""What a step trains for where it is not the model's own loss, and the networks that are trained along with it.

Such networks (heads that predict codes, a critic) belong to a run and to nothing that is shipped: their weights and
their optimiser's moments travel in state.safetensors only.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim

from linic.train import checkpoint
from linic.train.loss import Terms
from linic.train.perceptual import Perceptual
from linic.train.recipe import Loss


class Stage(nn.Module):
    """`names`: of the numbers that `objective` gives beside the loss, for the progress line."""

    names: tuple[str, ...] = ()
    optimiser: optim.Optimizer
    trained: list[nn.Parameter]

    def equip(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], share: float) -> None:
        """AdamW for them. share: its rate over that of the model."""
        self.trained, self.share = list(parameters), share
        self.optimiser = optim.AdamW(self.trained, lr * share, betas, weight_decay=0.0, fused=True)

    def objective(self, forward: Callable[..., Any], x: Tensor, quality: Tensor, loss: Loss,
                  judge: Perceptual | None) -> tuple[Terms, Tensor | None, Tensor]:
        """-> terms of the model's loss; a loss of these networks alone, if they have one; numbers (n,)."""
        raise NotImplementedError

    def set_rate(self, lr: float, found_inf: Tensor) -> None:
        on_gpu = found_inf.device.type == "cuda"
        for group in self.optimiser.param_groups:
            group["lr"] = torch.full((), lr * self.share, device=found_inf.device) if on_gpu else lr * self.share
            group["capturable"] = on_gpu
        state: Any = self.optimiser                 # as in speed.py: a fused optimiser skips by itself
        state.found_inf, state.grad_scale = found_inf, None

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {**checkpoint.prefixed(name, self.state_dict()),
                **checkpoint.prefixed(f"{name}-optimiser", checkpoint.optimiser_tensors(self.optimiser))}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(checkpoint.under(name, tensors))
        checkpoint.restore_optimiser(self.optimiser, checkpoint.under(f"{name}-optimiser", tensors))
