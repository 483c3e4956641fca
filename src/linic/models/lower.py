"""LALIC's normative networks -> an integer program (entropy/program.py). Part of export; nothing here runs in use.

Reads like the networks themselves (blocks.py, lalic.py), a line of program where they have a layer. Units follow from
the bounds that the networks keep since their first training step; where they keep none, from the largest value seen on
real pictures (`calibrate`). Raises WeightsError for presets whose networks are not bounded, or are ablations.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linic.entropy.convert import ACTIVATION, GELU_BITS, Builder, Floats, fit
from linic.entropy.operators import MEAN_LIMIT, QUALITIES, SYMBOL_LIMIT, Z_LIMIT
from linic.entropy.rounding import LN_SCALE_MAX, LN_SCALE_MIN
from linic.errors import WeightsError
from linic.models.blocks import Block, ChannelMix, Down, OmniShift, SpatialMix, Up
from linic.models.config import Config
from linic.models.lalic import (
    LAMBDA_0,
    GroupContext,
    Lalic,
    LinearContext,
    MixAggregation,
    MixLayer,
    MlpAggregation,
    RwkvContext,
    Stage,
    quality_to_lambda,
)
from linic.models.lowering import FEATURE_BITS, INDEX_BITS, MEAN_BITS, RESIDUAL_BITS, Lowering, Seen, numbers, watched

LEVELS = [math.log(quality_to_lambda(float(q)) / LAMBDA_0) for q in range(QUALITIES)]


@torch.no_grad()
def calibrate(model: Lalic, pictures: Iterable[Tensor], qualities: Iterable[float] = (0.0, 33.0, 67.0, 100.0)) -> Seen:
    """pictures: (H, W, 3) uint8, sides multiples of config.multiple."""
    model = copy.deepcopy(model).double().eval()        # in float64 no fused kernel passes the layers by
    modules: list[tuple[str, nn.Module, int]] = []
    for name, module in model.named_modules():
        if name.startswith(("h_s", "contexts")):
            mix: Any = model.get_submodule(name.rpartition(".")[0])
            modules.append((name, module, mix.out.in_features if name.endswith(".kr") else 0))

    def run() -> None:
        for picture in pictures:
            x = picture.permute(2, 0, 1)[None].double() / 255
            for quality in qualities:
                model(x, torch.tensor([float(quality)]))

    return watched(modules, run)


def refused(config: Config) -> str:
    """Why the normative networks of a configuration have no integer program, or ""."""
    if config.style.bounds != "linic" or not config.variable_rate or config.linear_scale:
        return "its networks do not keep the bounds that integers need (style.bounds)"
    if config.context.channel in ("conv", "conv-plus") or config.context.aggregation == "conv":
        return "an ablation of the entropy model"
    return "" if config.style.scan == "row" else "a scan that only ablations have"


def can_lower(config: Config) -> bool:
    return not refused(config)


def lower(model: Lalic, seen: Seen | None = None, weight_bits: Callable[[str], int] | None = None) -> Builder:
    """The program of a trained model. seen: of `calibrate`; without it units are coarser and weights have 14 bits.
    weight_bits: of a Linear, by its name."""
    return _Lower(model, seen or Seen(), weight_bits or (lambda name: 8 if seen else 14)).build()


class _Lower(Lowering):
    levels = LEVELS

    def __init__(self, model: Lalic, seen: Seen, weight_bits: Callable[[str], int]):
        c = model.config
        if reason := refused(c):
            raise WeightsError(f"{c.name}: {reason}")
        super().__init__(model, seen, weight_bits)
        self.model, self.config = model, c

    def build(self) -> Builder:
        b, model, config = self.b, self.model, self.config
        z = b.line("symbols", "z", [], [], [config.hyper_latents], bits=0, largest=[Z_LIMIT] * config.hyper_latents)
        hyper = self.hyper(z)
        prior = model.ln_prior.double().numpy()[None] + 0.5 * np.array(LEVELS)[:, None]
        unit = np.exp(np.maximum(prior, -1.0))
        known: list[str] = []
        groups: list[str] = []
        at = 0
        nets: Any = model.contexts
        for k, (net, g) in enumerate(zip(nets, config.context.groups)):
            base = self.base(net, hyper, known, k)
            rows = slice(at, at + g)
            halves: list[str] = []
            for parity, half in enumerate(("anchors", "others")):
                name = f"{k}.{half}"
                spatial = self.spatial(net, halves[0], name, unit[:, rows]) if parity else None
                mean, scale = self.aggregate(net, b.simple("half", base, f"{name}.base", [parity]), spatial, name)
                mean_q8 = b.rescale(mean, f"{name}.mean", unit[:, rows], np.zeros((1, g)), 8, MEAN_LIMIT)
                index = b.rescale(scale, f"{name}.index", np.ones((1, g)),
                                  (prior[:, rows] - LN_SCALE_MIN) * self.index_per_ln(), 0, config.scales - 1, low=0)
                halves.append(b.line("code", f"{name}.y", [mean_q8, index], [], [at, parity, model.skip], bits=8,
                                     largest=[MEAN_LIMIT + (SYMBOL_LIMIT << 8)] * g))
            whole = b.line("join", f"{k}.y", halves, bits=8, largest=b.largest[halves[0]])
            groups.append(whole)
            if k + 1 < len(config.context.groups):
                known.append(self.context_input(whole, f"{k}.known", unit[:, rows]))
            at += g
        b.line("concat", "y", groups, bits=8, largest=np.concatenate([b.largest[g] for g in groups]))
        return b

    # Small things.

    def index_per_ln(self) -> float:
        return (self.config.scales - 1) / (LN_SCALE_MAX - LN_SCALE_MIN)

    def context_input(self, y: str, name: str, unit: Floats) -> str:
        return self.b.rescale(y, name, 1 / unit, np.zeros((1, unit.shape[1])), FEATURE_BITS, ACTIVATION)

    # Networks.

    def hyper(self, z: str) -> str:
        """h_s: z -> features of +-16."""
        net, x = self.model.h_s, z
        stages: Any = net.stages
        for i, stage in enumerate(stages):
            x = self.stage(x, stage, f"h_s.{i}")
        x = self.b.change_unit(x, "h_s.in", fit(self.peak(stages[-1]), FEATURE_BITS))
        return self.up(x, net.head, FEATURE_BITS, ACTIVATION)

    def stage(self, x: str, stage: Stage, name: str) -> str:
        bits, limit = self.residual(stage, stage.width)
        x = self.row(self.up(x, stage.resample, bits, limit), stage.row, f"{name}.row", limit)
        for block in stage.blocks:
            x = self.block(x, block, limit)
        return x

    def up(self, x: str, up: Any, bits: int, limit: int) -> str:
        assert isinstance(up, Up)
        f, name = up.factor, self.names[id(up)]
        if up.linear:
            x = self.linear(x, up.proj, bits, limit)
        else:
            conv: Any = up.proj
            weight = conv.weight.double().detach().numpy()          # (I, O, k, k), transposed
            pad, offsets, phases = weight.shape[2] // 2, [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], range(f)
            if f > 2:
                raise WeightsError(f"{name}: transposed convolutions of factor 2 can be lowered, not {f}")
            # Output f q + phase takes input q + d through tap phase + pad - f d.
            taps = np.zeros((f, f, weight.shape[1], 9, weight.shape[0]))
            for a in phases:
                for c in phases:
                    for n, (i, j) in enumerate(offsets):
                        ky, kx = a + pad - f * i, c + pad - f * j
                        if 0 <= ky < weight.shape[2] and 0 <= kx < weight.shape[3]:
                            taps[a, c, :, n] = weight[:, :, ky, kx].T
            x = self.b.simple("patches", x, f"{name}.patches", [v for o in offsets for v in o])
            rows = f * f * weight.shape[1]
            bias = np.tile(conv.bias.double().detach().numpy(), f * f)
            x = self.rounded(x, f"{name}.conv", taps.reshape(rows, -1), bias, [(rows, 2.0**bits, -limit, limit)])
        return self.b.simple("shuffle", x, f"{name}.shuffle", [f]) if f > 1 else x

    def block(self, x: str, block: Any, limit: int) -> str:
        assert isinstance(block, Block)
        if block.spatial is not None:
            x = self.spatial_mix(x, block.spatial, limit)
        return self.channel_mix(x, block.channel, limit)

    def shifted(self, x: str, mix: SpatialMix | ChannelMix | MixLayer, shift: nn.Module | None) -> str:
        name = self.names[id(mix)]
        x = self.normed(x, mix.norm, name)
        if shift is None:
            return x
        assert isinstance(shift, OmniShift)
        return self.b.depthwise(x, f"{name}.shift", numbers(shift.kernel()), fit(self.peak(shift), 11))

    def last(self, x: str, mix: SpatialMix | ChannelMix | MixLayer, bits: int, limit: int) -> str:
        """The Linear at a mix's end; the paper's layer scale goes into its rows."""
        gamma: Any = getattr(mix, "gamma", None)
        if gamma is None:
            return self.linear(x, mix.out, bits, limit)
        gamma = gamma.double().detach().numpy()
        y = self.linear(x, mix.out, bits, limit, weight=mix.out.weight.double().detach().numpy() * gamma[:, None])
        scale = self.b.scales[f"{self.names[id(mix.out)]}.weight"]      # gives the float Linear back, without gamma
        np.divide(scale, gamma, out=scale, where=gamma != 0)
        return y

    def spatial_mix(self, x: str, mix: SpatialMix, limit: int) -> str:
        b, name = self.b, self.names[id(mix)]
        s = self.shifted(x, mix, mix.shift)
        k, v, r = self.keys_values(s, mix.kvr, name, mix.out.in_features)
        if k is not None:
            v = b.biwkv(k, v, name, *map(numbers, mix.decay(1, mix.out.weight.new_zeros(1, mix.out.in_features))))
        y = self.last(b.gate(r, v, f"{name}.gated"), mix, b.bits[x], limit)
        return b.add(x, y, f"{name}.sum", limit)

    def channel_mix(self, x: str, mix: ChannelMix | MixLayer, limit: int) -> str:
        b, name = self.b, self.names[id(mix)]
        s = self.shifted(x, mix, getattr(mix, "shift", None))
        squares, r = self.hidden(s, mix.kr, name, mix.out.in_features, mix.out.out_features)
        y = self.last(squares, mix, b.bits[x], limit)
        return b.add(x, b.gate(r, y, f"{name}.gated"), f"{name}.sum", limit)

    def base(self, net: GroupContext, hyper: str, known: list[str], k: int) -> str:
        """What both halves of a group share."""
        b, features = self.b, hyper
        if net.channel is not None:
            x = self.channel_context(b.concat(known, f"{k}.before"), net.channel)
            bits = min(b.bits[hyper], fit(self.peak(net.channel), FEATURE_BITS))
            features = b.concat([b.change_unit(x, f"{k}.channel", bits), b.change_unit(hyper, f"{k}.hyper", bits)],
                                f"{k}.features")
        aggregate = net.aggregate
        if isinstance(aggregate, MlpAggregation):
            x = self.linear(features, aggregate.first, GELU_BITS, 1 << 20)
            return self.row(x, aggregate.row, f"{k}.row", 1 << 20)
        # The paper's first layer takes [spatial | channel | hyper]; its product splits into two.
        assert isinstance(aggregate, MixAggregation)
        first: Any = aggregate.layers[0]
        weight = first.first.weight.double().detach().numpy()[:, 2 * aggregate.group:]
        bits, _ = self.residual(first.first, weight.shape[0])
        return self.linear(features, first.first, bits, 1 << 20, weight=weight, name=f"{k}.first")

    def channel_context(self, x: str, net: nn.Module) -> str:
        name = self.names[id(net)]
        if isinstance(net, LinearContext):
            bits, limit = self.residual(net, net.features)
            x = self.row(self.linear(x, net.first, bits, limit), net.row, f"{name}.row", limit)
            for block in net.blocks:
                x = self.block(x, block, limit)
            return x
        assert isinstance(net, RwkvContext) and isinstance(net.first, Down)
        conv: Any = net.first.proj
        weight = conv.weight.double().detach().numpy()              # (O, I, 3, 3)
        bits, limit = self.residual(net.first, weight.shape[0])
        x = self.b.simple("patches", x, f"{name}.patches", [v for i in (-1, 0, 1) for j in (-1, 0, 1) for v in (i, j)])
        x = self.linear(x, conv, bits, limit, weight=weight.transpose(0, 2, 3, 1).reshape(len(weight), -1),
                        name=f"{name}.conv")
        for block in net.blocks:
            x = self.block(x, block, limit)
        x = self.b.change_unit(x, f"{name}.in", fit(self.peak(net.blocks[-1]), RESIDUAL_BITS))
        return self.linear(x, net.last, fit(self.peak(net.last), FEATURE_BITS), ACTIVATION)

    def spatial(self, net: GroupContext, anchors: str, name: str, unit: Floats) -> str:
        rows = self.b.simple("around", self.context_input(anchors, f"{name}.known", unit), f"{name}.around")
        return self.linear(rows, net.taps, FEATURE_BITS, ACTIVATION)

    def aggregate(self, net: GroupContext, base: str, spatial: str | None, name: str) -> tuple[str, str]:
        """-> mean in units of the prior scale, and 256 times the scale's index without the prior."""
        b, aggregate, per_ln = self.b, net.aggregate, self.index_per_ln()
        if isinstance(aggregate, MlpAggregation):
            limit, x = 8 << GELU_BITS, base
            if spatial is not None:
                y = self.linear(spatial, aggregate.spatial, GELU_BITS, 1 << 20)
                x = b.add(base, y, f"{name}.sum", limit)
            else:
                x = b.change_unit(base, f"{name}.clamped", GELU_BITS, limit)
            x = b.gelu(self.linear(b.gelu(x, f"{name}.gelu"), aggregate.middle, GELU_BITS, limit), f"{name}.gelu")
            mean = self.linear(x, aggregate.mean, MEAN_BITS, 16 << MEAN_BITS)
            width, scale = aggregate.scale.out_features, aggregate.scale
            limit = math.ceil(32 * per_ln) << INDEX_BITS
            part = (width, per_ln * 2.0**INDEX_BITS, -limit, limit)
            index = self.rounded(x, self.names[id(scale)], scale.weight.double().detach().numpy(),
                                 scale.bias.double().detach().numpy(), [part])
            b.bits[index] = INDEX_BITS
            return mean, index
        assert isinstance(aggregate, MixAggregation)
        layers: Any = list(aggregate.layers)
        x, g = base, aggregate.group
        for i, layer in enumerate(layers):
            bits, limit = self.residual(layer, layer.first.out_features)
            if i == 0:
                if spatial is not None:
                    weight = layer.first.weight.double().detach().numpy()[:, : 2 * g]
                    y = self.linear(spatial, layer.first, b.bits[base], 1 << 20, weight=weight, name=f"{name}.first",
                                    bias=False)
                    x = b.add(base, y, f"{name}.sum", limit)
                else:
                    x = b.change_unit(base, f"{name}.clamped", b.bits[base], limit)
            else:
                x = b.change_unit(x, f"{name}.in{i}", fit(self.peak(layers[i - 1]), RESIDUAL_BITS))
                x = self.linear(x, layer.first, bits, limit)
            x = self.channel_mix(x, layer, limit)
        ln = b.slice(x, f"{name}.scale", 0, g, b.bits[x])
        index = b.rescale(ln, f"{name}.ln", np.full((1, g), per_ln), np.zeros((1, g)), INDEX_BITS,
                          math.ceil(32 * per_ln) << INDEX_BITS)
        return b.slice(x, f"{name}.means", g, 2 * g, b.bits[x]), index
