"""What lower.py (LALIC) and lower_mrt.py share: what pictures do to a network, and the lines of its smallest parts.

Units of the integers follow from the bounds that normative networks keep since their first training step; where they
keep none, from the largest value seen on real pictures.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from linic.entropy.convert import ACTIVATION, GATE_BITS, OCTAVE, Builder, Floats, fit
from linic.models.blocks import QualityRow

RESIDUAL_BITS, FEATURE_BITS, INDEX_BITS, MEAN_BITS = 9, 9, 8, 12
# Peaks of the networks without pictures to measure them on: generous.
UNSEEN = 16.0


@dataclass
class Seen:
    """What real pictures did to the normative networks. peaks: the largest |output| of each module; "NAME-": |input|,
    of a Linear; "NAME+": the largest of a Channel Mix's hidden part, before its square. moments: the mean of x x^T over
    the inputs of each Linear."""

    peaks: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Floats] = field(default_factory=dict)


def watched(modules: Iterable[tuple[str, nn.Module, int]], run: Callable[[], None]) -> Seen:
    """What `run` does to the modules: name, module, channels of its hidden part or 0."""
    seen, rows, handles = Seen(), dict.fromkeys([""], 0), []

    def watch(name: str, hidden: int) -> Callable[..., None]:
        def peak(key: str, value: Tensor) -> None:
            seen.peaks[key] = max(seen.peaks.get(key, 0.0), value.max().item())

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                peak(name, output.abs())
            if hidden:
                peak(f"{name}+", output[..., :hidden])
            if isinstance(module, nn.Linear):
                x = inputs[0].reshape(-1, module.in_features)
                peak(f"{name}-", x.abs())
                seen.moments[name] = seen.moments.get(name, 0.0) + (x.T @ x).cpu().numpy()
                rows[name] = rows.get(name, 0) + len(x)
        return hook

    for name, module, hidden in modules:
        handles.append(module.register_forward_hook(watch(name, hidden)))
    run()
    for handle in handles:
        handle.remove()
    for name in seen.moments:
        seen.moments[name] /= rows[name]
    return seen


def numbers(tensor: Any) -> Floats:
    found: Floats = tensor.detach().double().cpu().numpy()
    return found


class Lowering:
    """levels: l of each quality."""

    levels: ClassVar[list[float]]

    def __init__(self, model: nn.Module, seen: Seen, weight_bits: Callable[[str], int]):
        self.seen, self.weight_bits, self.b = seen, weight_bits, Builder()
        self.names = {id(module): name for name, module in model.named_modules()}

    def peak(self, module: nn.Module, suffix: str = "") -> float:
        return self.seen.peaks.get(self.names[id(module)] + suffix, UNSEEN)

    def linear(self, x: str, module: Any, bits: int, limit: int, low: int | None = None, weight: Floats | None = None,
               name: str | None = None, bias: bool = True) -> str:
        """A Linear into units of 2^-bits, clamped."""
        name = name or self.names[id(module)]
        weight = numbers(module.weight) if weight is None else weight
        offset = numbers(module.bias) if bias and module.bias is not None else None
        part = (len(weight), 2.0**bits, -limit if low is None else low, limit)
        return self.rounded(x, name, weight, offset, [part])

    def rounded(self, x: str, name: str, weight: Floats, bias: Floats | None,
                parts: list[tuple[int, float, int, int]]) -> str:
        bits, moments = self.weight_bits(name), self.seen.moments.get(name)
        if moments is not None and moments.shape[0] != weight.shape[1]:
            moments = None      # a part of a Linear's columns
        return self.b.linear(x, name, weight, bias, parts, bits, moments if bits == 8 else None)

    def residual(self, x: nn.Module, channels: int) -> tuple[int, int]:
        """Unit and clamp of a residual stream: 2^-9 and +-64 wherever the sums of Norm allow it."""
        limit = min(32767, (1 << 23) // channels)
        return (RESIDUAL_BITS if limit == 32767 else fit(self.peak(x), RESIDUAL_BITS, limit)), limit

    def row(self, x: str, row: QualityRow | None, name: str, limit: int) -> str:
        if row is None:
            return x
        levels = np.array(self.levels)
        offset = np.stack([levels, levels * levels], 1) @ numbers(row.weight)
        return self.b.rescale(x, name, np.ones((1, offset.shape[1])), offset, self.b.bits[x], limit)

    def normed(self, x: str, norm: nn.LayerNorm, name: str) -> str:
        """LayerNorm with its gain and bias. (They cannot go into later weights: shifts pad with zeros.)"""
        x = self.b.norm(x, f"{name}.norm")
        gain, bias = numbers(norm.weight)[None], numbers(norm.bias)[None]
        return self.b.rescale(x, f"{name}.affine", gain, bias, fit(self.peak(norm), 11), ACTIVATION)

    def keys_values(self, s: str, kvr: nn.Linear, name: str, c: int) -> tuple[str | None, str, str]:
        """k (None where the Linear has none), v, r of a Spatial Mix."""
        key = kvr.out_features // c == 3
        parts = [(c, OCTAVE, -round(4.8 * OCTAVE), round(4.8 * OCTAVE))] if key else []
        parts += [(c, 2.0**FEATURE_BITS, -ACTIVATION, ACTIVATION), (c, 2.0**GATE_BITS, -2048, 2047)]
        made = self.rounded(s, self.names[id(kvr)], numbers(kvr.weight), None, parts)
        at = c * (len(parts) - 2)
        v = self.b.slice(made, f"{name}.v", at, at + c, FEATURE_BITS)
        r = self.b.slice(made, f"{name}.r", at + c, at + 2 * c, GATE_BITS)
        return self.b.slice(made, f"{name}.k", 0, c, 10) if key else None, v, r

    def hidden(self, s: str, kr: nn.Linear, name: str, hidden: int, c: int) -> tuple[str, str]:
        """relu(k)^2 and r of a Channel Mix."""
        bits = fit(min(self.peak(kr, "+"), 16.0 / 1.25), 12)
        parts = [(hidden, 2.0**bits, 0, min(ACTIVATION, 16 << bits)), (c, 2.0**GATE_BITS, -2048, 2047)]
        made = self.rounded(s, self.names[id(kr)], numbers(kr.weight), None, parts)
        k = self.b.slice(made, f"{name}.k", 0, hidden, bits)
        r = self.b.slice(made, f"{name}.r", hidden, hidden + c, GATE_BITS)
        return self.b.square(k, f"{name}.square"), r
