"""LALIC: transform coding with Bi-RWKV blocks, and RWKV-SCCTX for the latents.

    x --g_a--> y --gain, Q--> y_hat --gain--> g_s --> x_hat          y at 1/16, M channels
               |               ^
               h_a             mean, scale <-- contexts (5 channel groups x 2 checkerboard halves)
               v                                  ^
               z --Q--> z_hat --h_s---------------'                  z at 1/64

Source: Feng et al., "Linear Attention Modeling for Learned Image Compression", CVPR 2025 (arXiv 2502.05741).
Layout [B, H, W, C] inside, [B, C, H, W] at `forward`. Everything that differs between presets is a `Config` field.

One model serves every rate. Quality q in 0..100 stands for lambda(q) = .0012 (.07/.0012)^(q/100), the weight of
255^2 MSE against bits per pixel; l = ln(lambda/.013). Gains scale y before rounding and after; rows depending on l are
added in every stage; contexts and means work in units of the channel's prior scale exp(s0 + l/2), so that one network
serves all rates.
"""

import math
from collections.abc import Generator, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.entropy import density
from linic.entropy.rounding import (
    LN_SCALE_MAX,
    LN_SCALE_MIN,
    bounded,
    gaussian_likelihood,
    ln_scale_at,
    scale_index,
)
from linic.entropy.walk import Step
from linic.kernels import pointwise
from linic.kernels.choice import fusible
from linic.models import ablations, checkerboard
from linic.models.blocks import Block, Down, Linear, Projection, QualityRow, Up, depth_to_space, space_to_depth
from linic.models.config import Config, Net, Style

LAMBDA_0, LAMBDA_LOW, LAMBDA_HIGH = 0.013, 0.0012, 0.07
SYMBOL_LIMIT, MEAN_LIMIT_Q8 = 16383, 65536
_T = TypeVar("_T", float, Tensor)


def quality_to_lambda(quality: _T) -> _T:
    """.0012 at 0, .07 at 100, log-linear between and beyond. Floats or tensors."""
    return LAMBDA_LOW * (LAMBDA_HIGH / LAMBDA_LOW) ** (quality / 100)


# --- transforms ---------------------------------------------------------------------------------------------------


class Wavelet(nn.Module):
    """Linear shortcut of a strided stage: orthonormal Haar bands, a gain for each band and channel, a projection.

    Down: (B, H, W, inputs) -> (B, H/f, W/f, outputs). Up: the transposed map, -> (B, Hf, Wf, outputs).
    Source: Li et al., "On Disentangled Training for Nonlinear Transform in Learned Image Compression" (ICLR 2025,
    arXiv 2501.13751). The paper holds the projection orthogonal by a penalty; ours is orthogonal at the start.
    """

    haar: Tensor

    def __init__(self, inputs: int, outputs: int, factor: int, up: bool):
        super().__init__()
        self.factor, self.up = factor, up
        fine, coarse = (outputs, inputs) if up else (inputs, outputs)
        self.proj = nn.Linear(factor**2 * fine, coarse, bias=False)
        nn.init.orthogonal_(self.proj.weight)
        self.gain = nn.Parameter(torch.ones(factor**2 * fine))
        self.register_buffer("haar", _haar(factor), persistent=False)

    def bands(self, weight: Tensor) -> Tensor:
        """(coarse, f^2 fine) over pixels -> the same over bands: rows times the transposed wavelet."""
        return torch.einsum("opc,qp->oqc", weight.unflatten(1, (self.factor**2, -1)), self.haar).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.proj.weight * self.gain).unflatten(1, (self.factor**2, -1))
        weight = torch.einsum("oqc,qp->opc", weight, self.haar).flatten(1)
        if self.up:
            return depth_to_space(F.linear(x, weight.T), self.factor)
        return F.linear(space_to_depth(x, self.factor), weight)


def _haar(n: int) -> Tensor:
    """Orthonormal wavelet of n x n pixels, n a power of 2: (n^2, n^2), the mean first."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.kron(h, torch.tensor([[1.0, 1.0]])),
                       torch.kron(torch.eye(len(h)), torch.tensor([[1.0, -1.0]]))])
        h = h / h.norm(dim=1, keepdim=True)
    return torch.kron(h, h)


class Stage(nn.Module):
    """Resample, add the quality's row, run the blocks. `shortcut`: parallel to all of it."""

    def __init__(self, resample: nn.Module, width: int, blocks: list[Block], rows: bool,
                 shortcut: Wavelet | None = None):
        super().__init__()
        self.resample, self.blocks, self.shortcut = resample, nn.ModuleList(blocks), shortcut
        self.width = width
        self.row = QualityRow(width) if rows else None

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        start = x
        x = self.resample(x)
        if self.row is not None:
            x = self.row(x, l)
        for block in self.blocks:
            x = block(x)
        return x if self.shortcut is None else x + self.shortcut(start)


class Transform(nn.Module):
    """Stages, then a last resampling without blocks. (B, H, W, inputs) -> (B, H', W', outputs)."""

    def __init__(self, stages: list[Stage], head: nn.Module, shortcut: Wavelet | None = None):
        super().__init__()
        self.stages, self.head, self.shortcut = nn.ModuleList(stages), head, shortcut

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, l)
        return self.head(x) if self.shortcut is None else self.head(x) + self.shortcut(x)


def _shortcut(inputs: int, outputs: int, factor: int, net: Net, up: bool) -> Wavelet | None:
    return Wavelet(inputs, outputs, factor, up) if net.shortcut == "wavelet" and factor > 1 else None


def analysis(inputs: int, outputs: int, net: Net, style: Style, rows: bool, pixels: int = 1) -> Transform:
    """g_a, h_a. `pixels`: side of an input sample in pixels of the picture."""
    stages = []
    for i, width in enumerate(net.widths):
        pixels *= net.factors[i]
        blocks = [Block(width, net.hidden, style, spatial=net.spatial[i], pixels=pixels, index=j)
                  for j in range(net.depths[i])]
        stages.append(Stage(Down(inputs, width, net.factors[i], net.kernels[i]), width, blocks, rows,
                            _shortcut(inputs, width, net.factors[i], net, up=False)))
        inputs = width
    return Transform(stages, Down(inputs, outputs, net.factors[-1], net.kernels[-1]),
                     _shortcut(inputs, outputs, net.factors[-1], net, up=False))


def synthesis(inputs: int, outputs: int, net: Net, style: Style, rows: bool, pixels: int,
              normative: bool = False) -> Transform:
    """g_s, h_s: the mirror."""
    stages = []
    for i in reversed(range(len(net.widths))):
        width, factor = net.widths[i], net.factors[i + 1]
        pixels //= factor
        blocks = [Block(width, net.hidden, style, normative=normative, spatial=net.spatial[i], pixels=pixels, index=j)
                  for j in range(net.depths[i])]
        stages.append(Stage(Up(inputs, width, factor, net.kernels[i + 1]), width, blocks, rows,
                            _shortcut(inputs, width, factor, net, up=True)))
        inputs = width
    return Transform(stages, Up(inputs, outputs, net.factors[0], net.kernels[0]),
                     _shortcut(inputs, outputs, net.factors[0], net, up=True))


# --- entropy model: contexts and aggregation ----------------------------------------------------------------------


class LinearContext(nn.Module):
    """Channel context of our small presets: Linear, quality row, blocks without shift."""

    def __init__(self, config: Config, before: int):
        super().__init__()
        c = config.context
        self.first = Projection(before, c.width)
        self.row = QualityRow(c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.hidden, config.style, normative=True, shift=c.shift)
                                    for _ in range(c.depth))
        self.features = c.width

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        x = self.row(self.first(x), l)
        for block in self.blocks:
            x = block(x)
        return x


class RwkvContext(nn.Module):
    """Channel context of the paper: conv 3x3, full Bi-RWKV blocks with hidden ratio 8, conv 1x1 to 2g."""

    def __init__(self, config: Config, before: int, group: int):
        super().__init__()
        c = config.context
        self.first = Down(before, c.width, 1, 3)
        self.blocks = nn.ModuleList(
            Block(c.width, c.hidden, config.style, normative=True, shift=c.shift, index=i) for i in range(c.depth))
        self.last = Projection(c.width, 2 * group)
        self.features = 2 * group

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def gelu_of_bounded(x: Tensor) -> Tensor:
    return pointwise.gelu(x, 8) if fusible(x) else F.gelu(bounded(x, -8, 8))


class MlpAggregation(nn.Module):
    """Our small presets: one Linear over [channel | hyper] for both halves, plus one over the spatial context, GELU,
    Linear, GELU, then separate last layers for mean and ln scale (the mean wants more bits)."""

    def __init__(self, config: Config, features: int, group: int):
        super().__init__()
        d = config.context.width
        self.first, self.row = Projection(features, d), QualityRow(d)
        self.spatial = Projection(2 * group, d, bias=False)
        self.middle = Projection(d, d)
        self.mean, self.scale = nn.Linear(d, group), nn.Linear(d, group)
        for head in (self.mean, self.scale):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def base(self, features: Tensor, l: Tensor) -> Tensor:
        return self.row(self.first(features), l)

    def forward(self, base: Tensor, spatial: Tensor | None) -> tuple[Tensor, Tensor]:
        x = base if spatial is None else base + self.spatial(bounded(spatial, -16, 16))
        x = gelu_of_bounded(self.middle(gelu_of_bounded(x)))
        return self.mean(x).clamp(-16, 16), self.scale(x)


class MixLayer(nn.Module):
    """Linear, then a pointwise Channel Mix on its output (the paper's EntropyParametersBlock)."""

    def __init__(self, inputs: int, outputs: int, clamped: bool):
        super().__init__()
        self.clamped = clamped
        self.first, self.norm = Projection(inputs, outputs), nn.LayerNorm(outputs)
        self.kr = Linear(outputs, 3 * outputs, bias=False)  # [hidden 2x | gate]
        self.out = Linear(2 * outputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        k, r = self.kr(self.norm(x)).split((self.out.in_features, self.out.out_features), 3)
        k = torch.relu(k)
        if self.clamped:
            k, r = k.clamp(max=16), bounded(r, -8, 8)
        return x + torch.sigmoid(r) * self.out(k * k)


class MixAggregation(nn.Module):
    """The paper: three MixLayers over [spatial | channel | hyper]; scales in the first half, means in the second."""

    def __init__(self, features: int, group: int, clamped: bool):
        super().__init__()
        inputs, outputs = 2 * group + features, 2 * group
        # A linear ramp of widths in four points, rounded down; inner widths at least 256.
        inner = [max(256, inputs + (outputs - inputs) * i // 3) for i in (1, 2)]
        self.group = group
        self.layers = nn.Sequential(*(MixLayer(i, o, clamped)
                                      for i, o in zip((inputs, *inner), (*inner, outputs))))

    def base(self, features: Tensor, l: Tensor) -> Tensor:
        return features

    def forward(self, base: Tensor, spatial: Tensor | None) -> tuple[Tensor, Tensor]:
        if spatial is None:
            spatial = base.new_zeros(*base.shape[:3], 2 * self.group)
        scale, mean = self.layers(torch.cat([spatial, base], 3)).split(self.group, 3)
        return mean, scale


class GroupContext(nn.Module):
    """Means and scales of one group of latents: from the hyper features, the groups before, the anchors around."""

    aggregate: MlpAggregation | MixAggregation | ablations.ConvAggregation

    def __init__(self, config: Config, k: int):
        super().__init__()
        c, group, before = config.context, config.context.groups[k], sum(config.context.groups[:k])
        self.channel: LinearContext | RwkvContext | ablations.ConvContext | None = None
        features = config.hyper_features
        if k:
            if c.channel == "linear":
                self.channel = LinearContext(config, before)
            elif c.channel == "rwkv":
                self.channel = RwkvContext(config, before, group)
            else:
                self.channel = ablations.ConvContext(before, group, wide=c.channel == "conv-plus")
            features += self.channel.features
        self.taps = Projection(12 * group, 2 * group)  # the masked 5x5 convolution as rows
        if c.aggregation == "mlp":
            self.aggregate = MlpAggregation(config, features, group)
        elif c.aggregation == "mix":
            self.aggregate = MixAggregation(features, group, config.style.bounds == "linic")
        else:
            self.aggregate = ablations.ConvAggregation(features, group)

    def base(self, hyper: Tensor, before: list[Tensor], l: Tensor) -> Tensor:
        """What both halves share. before: the groups already known, each (B, H, W, g)."""
        if self.channel is not None:
            hyper = torch.cat([self.channel(torch.cat(before, 3), l), hyper], 3)
        return self.aggregate.base(hyper, l)

    def anchors(self, base: Tensor) -> tuple[Tensor, Tensor]:
        return self.aggregate(base, None)

    def others(self, base: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        return self.aggregate(base, self.taps(checkerboard.anchors_around(anchors)))


# --- the model ------------------------------------------------------------------------------------------------------


class Lalic(nn.Module):
    """forward(x, quality): x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> {"x_hat", "likelihoods": {"y", "z"}}.

    In training mode rates are those of noisy latents and gradients pass straight through the rounding; in eval mode
    latents are rounded, scales snapped to the table, and skipped positions cost nothing, as in a file.
    """

    ln_prior: Tensor
    start_crops = 1024, 64      # of init_klt: how many, and their side

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        m, style, rows = config.latents, config.style, config.variable_rate
        self.g_a = analysis(3, m, config.transform, style, rows)
        self.g_s = synthesis(m, 3, config.transform, style, rows, 16)
        self.h_a = analysis(m, config.hyper_latents, config.hyper, style, rows, 16)
        self.h_s = synthesis(config.hyper_latents, config.hyper_features, config.hyper, style, rows, 64, normative=True)
        self.contexts = nn.ModuleList(GroupContext(config, k) for k in range(len(config.context.groups)))
        self.density: density.Density = (density.LogisticMixture if config.density == "mixture"
                                         else density.Factorized)(config.hyper_latents)
        if config.variable_rate:
            # ln of the step that is best for an orthonormal transform: step^2 = 26 / lambda on the 0..255 scale.
            start = math.log(255 * math.sqrt(LAMBDA_0 / 26)) if config.init != "torch" else 0.0
            gains = [[start] * m, [0.5] * m]  # exponent at l = 0, slope over l
            self.gain_enc, self.gain_dec = nn.Parameter(torch.tensor(gains)), nn.Parameter(torch.tensor(gains))
            self.register_buffer("ln_prior", torch.zeros(m))  # ln of y's deviation at l = 0; fixed at the start

    # The nets whose results steer the range coder.
    def normative(self) -> Iterator[nn.Module]:
        yield from (self.h_s, self.contexts, self.density)

    @property
    def skip(self) -> int:
        """Scale indices below this are not coded: symbol 0."""
        return 0 if self.config.linear_scale else 1

    def set_bf16(self, where: Literal["off", "free", "all"] | bool) -> None:
        """Where the operands of products are bf16. "free" (True): in the blocks of the free nets, never for y.
        "all": in training also in the resampling between these blocks and in the normative nets, but for means and
        scales. Out of training the normative nets know no bf16: the range coder sees them."""
        free: list[Any] = [self.g_a, self.g_s, self.h_a]
        inside = {m for net in free for block in net.modules() if isinstance(block, Block) for m in block.modules()}
        ends = {end.proj for net in free for end in (net.stages[0].resample, net.head)}     # picture, y and z
        for module in self.modules():
            if isinstance(module, Linear):
                if module in inside:
                    module.bf16 = "always" if where and where != "off" else "never"
                else:
                    module.bf16 = "training" if where == "all" and module not in ends else "never"

    def level(self, quality: Tensor | None, like: Tensor) -> Tensor:
        """quality (B,) -> l (B,)."""
        if not self.config.variable_rate:
            return like.new_zeros(len(like))
        quality = like.new_full((len(like),), 50.0) if quality is None else quality.to(like.device, like.dtype)
        return torch.log(quality_to_lambda(quality) / LAMBDA_0)

    def units(self, l: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """ln of the prior scale and the unit of contexts and means, (B, 1, 1, M)."""
        if not self.config.variable_rate:
            return 0.0, 1.0
        prior = self.ln_prior.to(l.dtype) + 0.5 * l[:, None, None, None]
        return prior, torch.exp(prior.clamp_min(-1.0))

    def analyse(self, x: Tensor, l: Tensor) -> Tensor:
        """Picture (B, H, W, 3) -> y (B, H/16, W/16, M), scaled for rounding."""
        y = self.g_a(x - 0.5 if self.config.init != "torch" else x, l)
        if self.config.variable_rate:
            y = y * torch.exp(self.gain_enc[0] + self.gain_enc[1] * l[:, None, None, None])
        return y

    def synthesise(self, y_hat: Tensor, l: Tensor) -> Tensor:
        if self.config.variable_rate:
            y_hat = y_hat * torch.exp(-self.gain_dec[0] - self.gain_dec[1] * l[:, None, None, None])
        x = self.g_s(y_hat, l)
        return x + 0.5 if self.config.init != "torch" else x

    def hyper_latent(self, y: Tensor, l: Tensor) -> Tensor:
        """z (B, H/64, W/64, Nz), not rounded."""
        return self.h_a(y / self.units(l)[1], l)

    def parameters_in_order(self, z_hat: Tensor, l: Tensor) -> Generator[tuple[Tensor, Tensor], Tensor, None]:
        """The causal order, once for training and coding: yields (mean, ln scale) of a half of a group, each
        (B, H, W/2, g), and gets that half's y_hat back."""
        hyper = self.h_s(z_hat, l)
        if self.config.style.bounds == "linic":
            hyper = hyper.clamp(-16, 16)
        prior, unit = self.units(l)
        known: list[Tensor] = []
        at = 0
        nets: Any = self.contexts  # a ModuleList of GroupContext
        for net, g in zip(nets, self.config.context.groups):
            p = prior[..., at : at + g] if isinstance(prior, Tensor) else prior
            u = unit[..., at : at + g] if isinstance(unit, Tensor) else unit
            at += g
            base_a, base_o = checkerboard.split(net.base(hyper, known, l).contiguous())
            mean, scale = net.anchors(base_a)
            anchors = yield mean * u, self.ln_scale(scale, p)
            mean, scale = net.others(base_o, self.context_input(anchors, u))
            others = yield mean * u, self.ln_scale(scale, p)
            known.append(self.context_input(checkerboard.join(anchors, others), u))

    def ln_scale(self, head: Tensor, prior: Tensor | float) -> Tensor:
        if self.config.linear_scale:
            return torch.log(bounded(head, math.exp(LN_SCALE_MIN))).clamp(max=LN_SCALE_MAX)
        return bounded(head + prior, LN_SCALE_MIN).clamp(max=LN_SCALE_MAX)

    def context_input(self, y_hat: Tensor, unit: Tensor | float) -> Tensor:
        if not self.config.variable_rate:
            return y_hat
        return (y_hat.clamp(-256, 256) / unit).clamp(-16, 16)

    def round_y(self, y: Tensor, mean: Tensor, ln_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds around the mean. -> y_hat (gradient of y), likelihood."""
        symbol = torch.round((y - mean).detach())
        if self.training:
            likelihood = gaussian_likelihood(y - mean + torch.rand_like(y) - 0.5, ln_scale)
        else:
            index = scale_index(ln_scale, self.config.scales, self.config.linear_scale)
            coded = index >= self.skip
            symbol = torch.where(coded, symbol, 0.0)
            likelihood = gaussian_likelihood(symbol, ln_scale_at(index, self.config.scales))
            likelihood = torch.where(coded, likelihood, 1.0)
        return y + (symbol + mean - y).detach(), likelihood

    def forward(self, x: Tensor, quality: Tensor | None = None) -> dict[str, object]:
        """quality (B,), 0..100; None: 50. Source of the output's shape: CompressAI."""
        x = x.permute(0, 2, 3, 1).contiguous()
        l = self.level(quality, x)
        y = self.analyse(x, l)
        z = self.hyper_latent(y, l)
        z_hat = z + (self.density.symbols(z) + self.density.median - z).detach()
        z_likelihood = self.density.likelihood(z + torch.rand_like(z) - 0.5 if self.training else z_hat)
        walk, y_hats, likelihoods = self.parameters_in_order(z_hat, l), [], []
        mean, ln_scale = next(walk)
        groups = y.split(self.config.context.groups, 3)
        for k, group in enumerate(groups):
            anchors, others = checkerboard.split(group.contiguous())
            anchors, p_anchors = self.round_y(anchors, mean, ln_scale)
            others, p_others = self.round_y(others, *walk.send(anchors))
            if k + 1 < len(groups):
                mean, ln_scale = walk.send(others)
            y_hats.append(checkerboard.join(anchors, others))
            likelihoods.append(checkerboard.join(p_anchors, p_others))
        x_hat = self.synthesise(torch.cat(y_hats, 3), l)
        return {"x_hat": x_hat.permute(0, 3, 1, 2),
                "likelihoods": {"y": torch.cat(likelihoods, 3).permute(0, 3, 1, 2),
                                "z": z_likelihood.permute(0, 3, 1, 2)}}

    @torch.no_grad()
    def plan(self, l: Tensor, z_size: tuple[int, int], z: np.ndarray | None = None,
             y_q8: np.ndarray | None = None) -> Generator[Step, np.ndarray, np.ndarray]:
        """The coding plan of one picture (entropy/walk.py) in float64, for models without an integer program; the same
        steps as program.plan. Tables: the scales first, then one a channel of z.

        z (h, w, Nz) and y_q8 (H, W, M), integers, in the encoder; None in the decoder. y in steps of 1/256.
        Returns y_hat_q8 (H, W, M), int32. l is float64 here, and so are the normative nets.
        """
        scales, channels = self.config.scales, self.config.hyper_latents
        device = l.device
        table = np.tile(np.arange(scales, scales + channels, dtype=np.int32), z_size[0] * z_size[1])
        symbols = yield Step(table, None if z is None else z.reshape(-1).astype(np.int32))
        z_hat = torch.from_numpy(symbols.astype(np.float64)).to(device).view(1, *z_size, channels) + self.density.median
        walk, known, at = self.parameters_in_order(z_hat, l), [], 0
        mean, ln_scale = next(walk)
        for k, g in enumerate(self.config.context.groups):
            wanted = (None, None) if y_q8 is None else checkerboard.split(
                torch.from_numpy(y_q8[None, ..., at : at + g]).to(device).contiguous())
            at += g
            halves: list[Tensor] = []
            for half in (0, 1):
                mean_q8 = torch.round(mean * 256).clamp(-MEAN_LIMIT_Q8, MEAN_LIMIT_Q8).int()
                index = scale_index(ln_scale, scales, self.config.linear_scale).int()
                coded = index >= self.skip
                symbol = torch.zeros_like(index)
                want = wanted[half]
                if want is not None:
                    best = (want - mean_q8 + 128).bitwise_right_shift(8).clamp(-SYMBOL_LIMIT, SYMBOL_LIMIT)
                    symbols = yield Step(_flat(index[coded]), _flat(best[coded]))
                else:
                    symbols = yield Step(_flat(index[coded]), None)
                symbol[coded] = torch.from_numpy(symbols.astype(np.int32)).to(device)
                halves.append((symbol << 8) + mean_q8)
                if half == 0 or k + 1 < len(self.contexts):
                    mean, ln_scale = walk.send(halves[half].double() / 256)
            known.append(checkerboard.join(*halves))
        return torch.cat(known, 3)[0].cpu().numpy()

    @torch.no_grad()
    def init_klt(self, crops: Tensor) -> None:
        """Start as a hierarchical KLT codec. crops (N, 64, 64, 3) in [0, 1], a few hundred at random.

        The encoder's Linears become principal axes, the decoder's their transposes; blocks are silent at the start.
        The largest single effect of all that was measured (research notes, training recipe 4). With init "orthogonal"
        the axes are random. A shortcut takes half of its stage's axes.
        """
        t = crops - 0.5
        downs: list[Any] = [*self.g_a.stages, self.g_a]
        ups: list[Any] = [self.g_s, *reversed(self.g_s.stages)]
        for down, up in zip(downs, ups):
            narrow, widen = _resampling(down), _resampling(up)
            rows, n = space_to_depth(t, narrow.factor) if narrow.factor > 1 else t, narrow.proj.out_features
            axes = principal_axes(rows, n) if self.config.init == "klt" else _random_axes(rows.shape[-1], n).to(t)
            for shortcut in (down.shortcut, up.shortcut):
                if shortcut is not None:
                    shortcut.proj.weight.normal_(0, 1e-3)
                    shortcut.proj.weight[: len(axes)] = shortcut.bands(axes)
                    shortcut.gain.fill_(0.5)
            share = 1.0 if down.shortcut is None else 0.5
            for linear, weight in ((narrow.proj, share * axes), (widen.proj, share * axes.T)):
                linear.weight.normal_(0, 1e-3)
                linear.bias.zero_()
                linear.weight[: weight.shape[0], : weight.shape[1]] = weight
            t = narrow(t) if down.shortcut is None else narrow(t) + down.shortcut(t)
        deviation = t.reshape(-1, t.shape[-1]).std(0)
        self.ln_prior.copy_(torch.log(deviation * torch.exp(self.gain_enc[0]) + 1e-4))


def _flat(x: Tensor) -> np.ndarray:
    return x.reshape(-1).to(torch.int32).cpu().numpy()


def _resampling(part: Any) -> Any:
    return part.head if isinstance(part, Transform) else part.resample


def principal_axes(x: Tensor, rows: int) -> Tensor:
    """Eigenvectors of the covariance of (..., C), strongest first, at most `rows`: (n, C)."""
    x = x.reshape(-1, x.shape[-1]).double()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x / len(x))[1].flip(1).T
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)  # a sign that does not depend on LAPACK
    return axes[:rows].float()


def _random_axes(inputs: int, rows: int) -> Tensor:
    """Orthonormal rows, at most `rows` and `inputs`: (n, inputs)."""
    return nn.init.orthogonal_(torch.empty(min(rows, inputs), inputs))
