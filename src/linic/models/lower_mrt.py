"""MRT's RCM -> an integer step program (entropy/steps.py). Part of export; nothing here runs in use but `rounding`.

Reads like Rcm, CausalBlock and Mrt.predict (mrt.py), a line of program where they have a layer. Tables of a program:
rangecoder.tables.laplace_tables(scales(config)). Raises WeightsError for tokens and orders that only ablations have.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linic.entropy.convert import (
    ACTIVATION,
    BONUS_LIMIT,
    DECAY_LIMIT,
    OCTAVE,
    Builder,
    Floats,
    fit,
    requantisation,
)
from linic.entropy.operators import MEAN_LIMIT, QUALITIES, SYMBOL_LIMIT
from linic.entropy.steps import KINDS, OFFSETS, SEQUENCES
from linic.errors import WeightsError
from linic.models.config import MrtConfig
from linic.models.lowering import FEATURE_BITS, INDEX_BITS, MEAN_BITS, Lowering, Seen, numbers, watched
from linic.models.mrt import DEAD_ZONE, LN_SCALE_MAX, LN_SCALE_MIN, TARGET_MIDDLE, Mrt, quality_to_target
from linic.models.rcm import CausalBlock
from linic.rangecoder.tables import scale_table

LEVELS = [math.log(quality_to_target(float(q)) / TARGET_MIDDLE) for q in range(QUALITIES)]
SCALE_MIN, SCALE_MAX = "0.06", "24"         # mrt.LN_SCALE_MIN, LN_SCALE_MAX
# Linears whose weights keep 14 bits even where pictures were seen: what the features meet, and what means come out of.
WIDE = ("rcm.first", "rcm.linear", "rcm.mean", "rcm.scale")


def scales(config: MrtConfig) -> list[float]:
    """Of the Laplace tables."""
    return scale_table(config.scales, SCALE_MIN, SCALE_MAX)


def refused(config: MrtConfig) -> str:
    """Why the RCM of a configuration has no integer program, or ""."""
    if config.tokens != "cells":
        return f"its tokens are {config.tokens}, not cells"
    if config.order not in KINDS or config.rcm != "rwkv":
        return f"an ablation of RCM (order {config.order}, {config.rcm})"
    return ""


def rounding(config: MrtConfig) -> list[int]:
    """What steps.plan adds to distances, in 1/256: Mrt.round."""
    return [128] + [math.floor(256 * DEAD_ZONE)] * (config.latents - 1)


@torch.no_grad()
def calibrate(model: Mrt, pictures: Iterable[Tensor], qualities: Iterable[float] = (0.0, 33.0, 67.0, 100.0)) -> Seen:
    """pictures: (H, W, 3) uint8, sides multiples of 32."""
    model = copy.deepcopy(model).cpu().double().eval()
    model.set_bf16("off")
    known: list[tuple[Tensor, Tensor]] = []
    for picture in pictures:
        for quality in qualities:
            l = model.level(torch.tensor([float(quality)], dtype=torch.double), torch.zeros(1, dtype=torch.double))
            y = model.analyse(picture[None].cpu().double() / 255, l)
            known.append((model.quantise(y, l)[0], l))

    def run() -> None:
        for y_hat, l in known:
            model.predict(y_hat, l)

    modules: list[tuple[str, nn.Module, int]] = []
    for name, module in model.rcm.named_modules():
        if name:
            modules.append((f"rcm.{name}", module, 2 * model.config.rcm_width if name.endswith(".kr") else 0))
    return watched(modules, run)


def lower(model: Mrt, seen: Seen | None = None, weight_bits: Callable[[str], int] | None = None) -> Builder:
    """The program of a trained model. seen: of `calibrate`; without it units are coarser and weights have 14 bits.
    weight_bits: of a Linear, by its name."""
    return _LowerMrt(model, seen or Seen(), weight_bits or (lambda name: 14 if not seen or name in WIDE else 8)).build()


class _LowerMrt(Lowering):
    levels = LEVELS

    def __init__(self, model: Mrt, seen: Seen, weight_bits: Callable[[str], int]):
        if reason := refused(model.config):
            raise WeightsError(f"{model.config.name}: {reason}")
        super().__init__(model, seen, weight_bits)
        self.model, self.config = model, model.config
        self.neighbours = len(OFFSETS[self.config.order])

    def build(self) -> Builder:
        b, model, config, rcm = self.b, self.model, self.config, self.model.rcm
        levels = np.array(LEVELS)
        powers = np.stack([np.ones_like(levels), levels, levels * levels], 1)
        prior = powers @ numbers(model.prior)
        unit = np.exp(np.maximum(numbers(model.ln_deviation) + powers @ numbers(model.gain_enc), -1.0))
        kind = KINDS.index(config.order)
        b.line("order", "order", [], [], [kind, config.window * kind, config.latents], bits=0, largest=[0])
        f = self.features(unit)
        bits, limit = self.residual(rcm.first, config.rcm_width)
        x = self.product(f, rcm.first, bits, 1 << 20)
        x = self.row(x, rcm.row, "rcm.row", limit)
        blocks: Any = rcm.blocks
        for block in blocks:
            x = self.block(x, block, limit)
        x = self.normed(x, rcm.norm, "rcm.norm")
        mean = b.add(self.linear(x, rcm.mean, MEAN_BITS, 32 << MEAN_BITS),
                     self.product(f, rcm.linear, MEAN_BITS, 32 << MEAN_BITS), "rcm.sum", 16 << MEAN_BITS)
        mean_q8 = b.rescale(mean, "mean", unit, np.zeros((1, config.latents)), 8, MEAN_LIMIT)
        per_ln = (config.scales - 1) / (LN_SCALE_MAX - LN_SCALE_MIN)
        most = math.ceil(16 * per_ln) << INDEX_BITS
        part = (config.latents, per_ln * 2.0**INDEX_BITS, -most, most)
        scale = self.rounded(x, "rcm.scale", numbers(rcm.scale.weight), numbers(rcm.scale.bias), [part])
        b.bits[scale] = INDEX_BITS
        index = b.rescale(scale, "index", np.ones((1, config.latents)), (prior - LN_SCALE_MIN) * per_ln, 0,
                          config.scales - 1, low=0)
        b.line("code", "y", [mean_q8, index], [], [model.skip], bits=8, largest=self.largest())
        return b

    def largest(self) -> list[int]:
        return [MEAN_LIMIT + (SYMBOL_LIMIT << 8)] * self.config.latents

    def features(self, unit: Floats) -> str:
        """Values of all neighbours, then where they are known."""
        b, n = self.b, self.neighbours
        past = b.line("past", "past.y", ["y"], bits=8, largest=self.largest() * n)
        zero = np.zeros((1, n * self.config.latents))
        values = b.rescale(past, "past.values", np.tile(1 / unit, (1, n)), zero, FEATURE_BITS, ACTIVATION)
        one = 1 << FEATURE_BITS
        known = b.line("known", "past.known", ["y"], [], [one], bits=FEATURE_BITS, largest=[one] * n)
        return b.concat([values, known], "past")

    def product(self, f: str, module: nn.Linear, bits: int, limit: int) -> str:
        """A Linear of the features. Its columns have another order here, so its tensor another name: float weights are
        read back by name."""
        name, n, c = self.names[id(module)], self.neighbours, self.config.latents
        columns = np.arange(n * (c + 1)).reshape(n, c + 1)
        order = np.concatenate([columns[:, :c].reshape(-1), columns[:, c]])
        moments, weight_bits = self.seen.moments.get(name), self.weight_bits(name)
        if moments is not None:
            moments = moments[np.ix_(order, order)]
        return self.b.linear(f, f"{name}.past", numbers(module.weight)[:, order], numbers(module.bias),
                             [(module.out_features, 2.0**bits, -limit, limit)], weight_bits,
                             moments if weight_bits == 8 else None)

    def block(self, x: str, block: CausalBlock, limit: int) -> str:
        b, name, c = self.b, self.names[id(block)], block.out.in_features
        s = self.near(x, block.norm1, block.near1, f"{name}.1", block.kvr)
        k, v, r = self.keys_values(s, block.kvr, f"{name}.1", c)
        assert k is not None
        v = self.causal(k, v, f"{name}.wkv", block)
        y = self.linear(b.gate(r, v, f"{name}.1.gated"), block.out, b.bits[x], limit)
        x = b.add(x, y, f"{name}.1.sum", limit)
        s = self.near(x, block.norm2, block.near2, f"{name}.2", block.kr)
        squares, r = self.hidden(s, block.kr, f"{name}.2", 2 * c, c)
        y = self.linear(squares, block.last, b.bits[x], limit)
        return b.add(x, b.gate(r, y, f"{name}.2.gated"), f"{name}.2.sum", limit)

    def near(self, x: str, norm: nn.LayerNorm, weight: Tensor, name: str, reader: nn.Linear) -> str:
        b, x = self.b, self.normed(x, norm, name)
        c, largest = b.channels(x), b.largest[x]
        past = b.line("past", f"{name}.past", [x], bits=b.bits[x], largest=np.tile(largest, self.neighbours))
        taps = np.concatenate([np.ones((1, c)), numbers(weight)])
        scale = np.abs(taps).max(0) / 8191
        rounded = np.rint(taps / scale).astype(np.int16)
        bits = fit(self.peak(reader, "-"), 11)
        requant = requantisation(np.abs(rounded.astype(np.int64)).sum(0)[:, None], scale * 2.0 ** -b.bits[x],
                                 np.zeros(c), largest.max(keepdims=True), [2.0**bits] * c, [-ACTIVATION] * c,
                                 [ACTIVATION] * c)
        b.tensors[f"{name}.weight"], b.tensors[f"{name}.requant"] = rounded, requant
        return b.line("near", f"{name}.near", [x, past], [f"{name}.weight", f"{name}.requant"], bits=bits,
                      largest=[ACTIVATION] * c)

    def causal(self, k: str, v: str, name: str, block: CausalBlock) -> str:
        b, (w, u) = self.b, (numbers(t) for t in block.decay())
        b.tensors[f"{name}.decay"] = np.clip(np.rint(w * OCTAVE), 0, DECAY_LIMIT).astype(np.int32)
        b.tensors[f"{name}.bonus"] = np.clip(np.rint(u * OCTAVE), -BONUS_LIMIT, BONUS_LIMIT).astype(np.int32)
        return b.line("causal", name, [k, v], [f"{name}.decay", f"{name}.bonus", b.shared("exp")],
                      [block.kind % SEQUENCES[self.config.order]], bits=b.bits[v], largest=b.largest[v])
