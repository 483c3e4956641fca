"""Hidden units that have stopped to work: counted at every evaluation, made anew by `revive`.

Adam moves weights at the same rate however small their gradients are. A block's last matrix begins at zero, so its
first gets next to no gradient, and moves all the same; where its inputs share a sign, as some features of pictures do,
the sums of all its units go below zero together. ReLU and its square have no gradient there: they never come back.
What prevents it: `optimiser.inputs`, a lower rate for sums of many inputs (docs/training-log.md has what it cost us).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linic.models.blocks import ChannelMix
from linic.models.mrt import Residual

EVER = 0.001        # of a picture's positions: a unit that works at fewer is dead
SILENT = -5.0       # SiLU: -.03 there, its slope -.03
LOST = 0.9          # of a layer's units: then the layer begins anew
Shares = dict[str, Tensor]


def _ends(layer: nn.Module) -> tuple[Any, Any, int]:
    """First and last weights of a layer, and how many hidden units they have."""
    if isinstance(layer, ChannelMix):
        return layer.kr, layer.out, layer.out.in_features
    assert isinstance(layer, Residual)
    return layer.conv1, layer.conv2, layer.conv1.out_channels


@contextmanager
def watched(model: nn.Module) -> Iterator[Shares]:
    """Fills {name of a layer: (units,) share of positions at which each works, the largest over the forward passes}."""
    shares: Shares = {}

    def look(name: str, layer: Any, x: Tensor) -> None:
        s, (first, _, units) = layer.norm(x), _ends(layer)
        if isinstance(layer, ChannelMix):
            works = first(s if layer.shift is None else layer.shift(s))[..., :units] > 0
        else:
            works = first(s) > SILENT
        share = works.flatten(0, -2).float().mean(0)
        shares[name] = torch.maximum(shares[name], share) if name in shares else share

    hooks = [layer.register_forward_pre_hook(lambda layer, args, name=name: look(name, layer, args[0]))
             for name, layer in model.named_modules() if isinstance(layer, (ChannelMix, Residual))]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def look(model: nn.Module, pictures: Sequence[Tensor], qualities: Sequence[float]) -> Shares:
    """pictures: (H, W, 3) uint8; what lies beyond a multiple of the sides is left out. The model comes back in its
    mode."""
    was_training, multiple = model.training, int(model.config.multiple)     # type: ignore[union-attr,arg-type]
    model.eval()
    try:
        with watched(model) as shares:
            for picture in pictures:
                height, width = (side // multiple * multiple for side in picture.shape[:2])
                x = picture[:height, :width].permute(2, 0, 1)[None].float() / 255
                for quality in qualities:
                    model(x.contiguous(memory_format=torch.channels_last),
                          torch.tensor([float(quality)], device=x.device))
    finally:
        model.train(was_training)
    return shares


def share(shares: Shares) -> float:
    """Of all units, those that are dead."""
    units = torch.cat([*shares.values()]) if shares else torch.ones(1)
    return (units < EVER).float().mean().item()


def by_layer(shares: Shares) -> dict[str, tuple[float, float]]:
    """{name of a layer: (its dead units' share, the share of positions at which a unit works on average)}."""
    return {name: (round((s < EVER).float().mean().item(), 4), round(s.mean().item(), 4)) for name, s in shares.items()}


@torch.no_grad()
def revive(model: nn.Module, fresh: nn.Module, shares: Shares, within: str = "") -> list[str]:
    """Gives dead units the first weights of `fresh`, a new model of the same shape, and no say yet: their last weights
    become zero. A layer that has lost nearly all begins anew. within: layers of that name alone. -> what was done."""
    done, layers, new = [], dict(model.named_modules()), dict(fresh.named_modules())
    for name, share in shares.items():
        dead = share < EVER
        count, layer = int(dead.sum()), layers[name]
        if not count or not name.startswith(within):
            continue
        done.append(f"{name}: {count} of {len(dead)} units")
        if count >= LOST * len(dead):
            layer.load_state_dict(new[name].state_dict())
        else:
            (first, last, units), (source, _, _) = _ends(layer), _ends(new[name])
            first.weight[:units][dead] = source.weight[:units][dead].to(first.weight)
            if first.bias is not None:
                first.bias[:units][dead] = source.bias[:units][dead].to(first.bias)
            last.weight[:, dead] = 0
    return done
