"""MRT: mixed RWKV-Transformer for extreme compression. Its model of rates, RCM, is in rcm.py, geometry in tokens.py.

    x --encoder--> y --gain, Q--> y_hat --gain--> decoder --> x_hat       y: tokens of C channels
                         ^
                    mean, scale <-- RCM: causal RWKV over the tokens already coded

Tokens: "cells", one every 32 px; "frequencies" and "slots", some ordered ones a window.

Source: "Mixed RWKV-Transformer" (arXiv 2511.06717), of which the abstract alone was to be had: RWKV across the whole
picture, Transformer inside a window, 1-D latents, an RWKV model for their rate. Every shape is ours; docs/mrt.md says
of each choice whether it is established, inferred or decided.
Layout [B, H, W, C] inside, [B, C, H, W] at `forward`. A frame is what tokens.py knows of a picture's size.

One model serves every rate. Quality q in 0..100 stands for a target of .004 (.035/.004)^(q/100) bits per pixel and for
lambda = .35 / target, the weight of bits per pixel against 100 MSE (values in [0, 1]); l = ln(target/.0118). Gains,
scales and rows are polynomials in l; RCM works in units of each channel's deviation, so that one network serves all.

y_hat = mean + symbol: what is rounded is the distance to the predicted mean, with a dead zone (a symbol is only sent
where it moves the value by more than .6 of a step), but for channel 0, the mean of a cell, whose errors are seen.
"""

import math
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.entropy.rounding import bounded, laplace_bits, ln_scale_at, scale_index
from linic.models.blocks import (
    CROP,
    Block,
    Linear,
    OmniShift,
    Projection,
    QualityRow,
    depth_to_space,
    space_to_depth,
)
from linic.models.config import MrtConfig
from linic.models.rcm import CausalBlock, Rcm
from linic.models.tokens import (
    OFFSETS,
    PATCH,
    Order,
    Slots,
    from_frequencies,
    order,
    strongest,
    to_frequencies,
    windows,
)
from linic.models.tokens import slots as slots_of

__all__ = ["OFFSETS", "CausalBlock", "Mrt", "Order", "Rcm", "noise_of", "order", "quality_to_lambda",
           "quality_to_target"]

TARGET_LOW, TARGET_HIGH, TARGET_MIDDLE = 0.004, 0.035, 0.0118
LAMBDA_TARGET = 0.35
CELL = 32                       # pixels
LN_SCALE_MIN, LN_SCALE_MAX = math.log(0.06), math.log(24.0)
DEAD_ZONE = 0.4                 # a distance d becomes floor(|d| + .4); a cell's channel 0 rounds at .5
MEAN_LIMIT = 256.0              # steps
KNOTS = 6                       # of the rate control, even over quality 0 .. 100
FIXED_POINT_PASSES = 100
_T = TypeVar("_T", float, Tensor)


def quality_to_target(quality: _T) -> _T:
    """Bits per pixel: .004 at 0, .035 at 100, log-linear between and beyond."""
    return TARGET_LOW * (TARGET_HIGH / TARGET_LOW) ** (quality / 100)


def quality_to_lambda(quality: _T) -> _T:
    return LAMBDA_TARGET / quality_to_target(quality)


# --- transforms -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Transformer block inside windows. `between`: windows around the borders of the others, so that no border stays
    one through the whole network."""

    def __init__(self, channels: int, heads: int, hidden: int, window: int, between: bool):
        super().__init__()
        self.heads, self.between = heads, between
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.position = nn.Parameter(torch.randn(window, window, channels) * 0.02)
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.out = Linear(channels, channels, bias=False)
        self.wide, self.narrow = Linear(channels, hidden * channels), Linear(hidden * channels, channels)
        for last in (self.out, self.narrow):
            nn.init.zeros_(last.weight)
        nn.init.zeros_(self.narrow.bias)
        self.gains = nn.Parameter(torch.ones(2, channels // heads))     # of queries and keys of length 1 a channel

    def forward(self, x: Tensor, window: int) -> Tensor:
        b, h, w, c = x.shape
        y, parts = self.norm1(x).reshape(b, h * w, c), windows(h, w, window, self.between, x.device)
        if len(parts) == 1 and len(parts[0].patches) == 1:
            return self.feed(x + self.attend(y + self.position[:h, :w].reshape(h * w, c)).view(x.shape))
        update = torch.empty_like(y, dtype=x.dtype)
        for p, q, index in parts:
            inside = y[:, index.reshape(-1)].view(-1, p * q, c) + self.position[:p, :q].reshape(p * q, c)
            update[:, index.reshape(-1)] = self.attend(inside).reshape(b, -1, c).to(x.dtype)
        return self.feed(x + update.view(x.shape))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))

    def attend(self, y: Tensor) -> Tensor:
        """(N, T, C), a window each -> same."""
        n, t, c = y.shape
        q, k, v = self.qkv(y).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(z.float(), z.shape[-1:], g.float(), 1e-6).to(v.dtype) for z, g in zip((q, k), self.gains))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class JointAttention(Attention):
    """The same over a window's patches and its latent tokens together."""

    def __init__(self, channels: int, heads: int, hidden: int, window: int, slots: int):
        super().__init__(channels, heads, hidden, window, False)
        self.slot = nn.Parameter(torch.randn(slots, channels) * 0.02)

    def both(self, x: Tensor, z: Tensor, frame: Slots) -> tuple[Tensor, Tensor]:
        """Patches (B, h, w, C), latents (B, windows * slots, C) -> same."""
        b, h, w, c = x.shape
        of_x, of_z = self.norm1(x).reshape(b, h * w, c), self.norm1(z)
        more_x, more_z = torch.zeros_like(x).view(b, h * w, c), torch.zeros_like(z)
        for p, q, patches, _, places, slots in frame.parts:
            n = len(patches)
            inside = torch.cat([
                of_x[:, patches.reshape(-1)].view(b * n, p * q, c) + self.position[:p, :q].reshape(p * q, c),
                of_z[:, places.reshape(-1)].view(b * n, -1, c) + self.slot[slots]], 1)
            update_x, update_z = self.attend(inside).to(x.dtype).split((p * q, len(slots)), 1)
            more_x[:, patches.reshape(-1)] = update_x.reshape(b, -1, c)
            more_z[:, places.reshape(-1)] = update_z.reshape(b, -1, c)
        return self.feed(x + more_x.view(x.shape)), self.feed(z + more_z)


class Pair(nn.Module):
    """RWKV over the whole frame, by rows and columns in turns, then a Transformer inside windows."""

    def __init__(self, config: MrtConfig, index: int):
        super().__init__()
        c = config
        self.rwkv = Block(c.width, c.hidden, c.style, pixels=16, index=index) if c.rwkv else None
        self.attention = (Attention(c.width, c.heads, c.mlp or c.hidden, 2 * c.window, index % 2 == 1)
                          if c.transformer else None)

    def forward(self, x: Tensor, window: int) -> Tensor:
        if self.rwkv is not None:
            x = self.rwkv(x)
        return x if self.attention is None else self.attention(x, window)


class SlotPair(nn.Module):
    """A pair for patches and latent tokens. RWKV: patches over the whole frame; each slot over the grid of windows,
    with the same matrices but neighbour weights of its own. Transformer: inside a window, over both."""

    def __init__(self, config: MrtConfig, index: int):
        super().__init__()
        c = config
        self.rwkv = Block(c.width, c.hidden, c.style, pixels=PATCH, index=index) if c.rwkv else None
        # Named as in `rwkv`, whose own they replace.
        self.shifts = nn.ModuleDict({part: nn.ModuleDict({"shift": OmniShift(c.width)})
                                     for part in ("spatial", "channel") if c.rwkv and c.style.shift})
        self.attention = (JointAttention(c.width, c.heads, c.mlp or c.hidden, 2 * c.window, c.slots)
                          if c.transformer else None)

    def forward(self, x: Tensor, z: Tensor, frame: Slots) -> tuple[Tensor, Tensor]:
        """Patches (B, h, w, C), latents (B, windows * slots, C), zeros where a slot has no token -> same."""
        if self.rwkv is not None:
            x, (b, _, c) = self.rwkv(x), z.shape
            z = z.view(b, *frame.grid, frame.most, c).permute(0, 3, 1, 2, 4).reshape(-1, *frame.grid, c)
            z = torch.func.functional_call(self.rwkv, dict(self.shifts.named_parameters()), (z,))
            z = z.view(b, frame.most, *frame.grid, c).permute(0, 2, 3, 1, 4).reshape(b, -1, c) * frame.present
        return (x, z) if self.attention is None else self.attention.both(x, z, frame)


class Conv(nn.Conv2d):
    """3x3 on channels-last features; operands in bf16 where `bf16` says so."""

    bf16: Literal["never", "training", "always"] = "never"

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.bf16 == "always" or (self.bf16 == "training" and self.training)
        kind = torch.bfloat16 if half else self.weight.dtype
        assert self.bias is not None
        weight = self.weight.to(kind, memory_format=torch.channels_last)
        return F.conv2d(x.to(kind).permute(0, 3, 1, 2), weight, self.bias.to(kind), padding=1).permute(0, 2, 3, 1)


class Residual(nn.Module):
    """x + conv(silu(conv(norm(x)))), dense 3x3: what draws the pixels, across all borders. With grain, noise joins
    before the silu, which opens or closes on it."""

    def __init__(self, channels: int, grain: int):
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.LayerNorm(channels), Conv(channels, channels), Conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)
        # Not zeros: there the loss is level in every direction.
        self.grain = nn.Parameter(torch.randn(grain, channels) * 0.03) if grain else None

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        y = self.conv1(self.norm(x))
        if self.grain is not None:
            y = y + noise.to(y.dtype) @ self.grain.to(y.dtype)
        return x + self.conv2(F.silu(y))


def noise_of(x: Tensor, channels: int, scale: int, fresh: bool) -> Tensor:
    """(B, H, W, C) -> (B or 1, H, W, channels) of uniform noise, variance 1. Fresh, or the same for every picture of
    that size, on every machine: what a decoder draws with it must not change from one decoding to the next."""
    b, h, w, _ = x.shape
    if fresh:
        return x.new_empty(b, h, w, channels).uniform_(-math.sqrt(3), math.sqrt(3))
    words = np.random.Philox(key=scale).random_raw(-(-h * w * channels // 4)).astype("<u8").view("<u2")
    uniform = (words[:h * w * channels].reshape(1, h, w, channels) - np.float32(32767.5)) / np.float32(32768)
    return torch.from_numpy(uniform).to(x) * math.sqrt(3)


class Stem(nn.Module):
    """(B, H, W, 3) -> (B, H/16, W/16, D): three steps down, each a Linear over 4x4 or 2x2 positions."""

    def __init__(self, config: MrtConfig):
        super().__init__()
        c, (c4, c8) = config, config.stem
        self.to4 = Projection(48, c4)
        self.block4 = Block(c4, c.hidden, c.style, spatial=False, pixels=4)
        self.to8 = Projection(4 * c4, c8)
        self.block8 = Block(c8, c.hidden, c.style, pixels=8)
        self.to16, self.row = Projection(4 * c8, c.width), QualityRow(c.width)

    def patches(self, x: Tensor, l: Tensor) -> Tensor:
        x = self.block4(self.to4(space_to_depth(x, 4)))
        x = self.block8(self.to8(space_to_depth(x, 2)))
        return self.row(self.to16(space_to_depth(x, 2)), l)

    def steps(self) -> list[tuple[Any, int]]:
        return [(self.to4, 4), (self.to8, 2), (self.to16, 2)]


class Encoder(Stem):
    """(B, H, W, 3) -> (B, H/32, W/32, C)."""

    def __init__(self, config: MrtConfig):
        super().__init__(config)
        self.pairs = nn.ModuleList(Pair(config, i) for i in range(config.encoder_pairs))
        self.to32 = Projection(4 * config.width, config.latents)

    def forward(self, x: Tensor, l: Tensor, window: int) -> Tensor:
        x = self.patches(x, l)
        for pair in self.pairs:
            x = pair(x, window)
        y: Tensor = self.to32(space_to_depth(x, 2))
        return y

    def steps(self) -> list[tuple[Any, int]]:
        return [*super().steps(), (self.to32, 2)]

    def linear(self, x: Tensor) -> Tensor:
        """The start: the same without blocks."""
        for step, factor in self.steps():
            x = step(space_to_depth(x, factor))
        return x


class Painter(nn.Module):
    """Features at 1/16 -> pixels: convolutions at 1/8, 1/4 and 1/2, across all borders."""

    def add_stages(self, config: MrtConfig) -> None:
        c, (p8, p4, p2) = config, config.pixels
        self.ups = nn.ModuleList([Projection(c.width, 4 * p8), Projection(p8, 4 * p4), Projection(p4, 4 * p2)])
        self.grain = c.grain
        self.stages = nn.ModuleList(nn.ModuleList(Residual(width, c.grain) for _ in range(depth))
                                    for width, depth in zip(c.pixels, c.pixel_depths))
        self.to_pixels = Conv(p2, 12)

    def paint(self, x: Tensor, quarter: Tensor | None = None) -> Tensor:
        """quarter: what joins the features at 1/4."""
        blocks: Any
        for scale, (up, blocks) in enumerate(zip(self.ups, self.stages)):
            x = depth_to_space(up(x), 2)
            if scale == 1 and quarter is not None:
                x = x + quarter
            noise = noise_of(x, self.grain, scale, fresh=self.training)
            for block in blocks:
                x = block(x, noise)
        return depth_to_space(self.to_pixels(x), 2)


class Decoder(Painter):
    """(B, H/32, W/32, C) -> (B, H, W, 3): pairs at 1/16, then the painter."""

    def __init__(self, config: MrtConfig):
        super().__init__()
        c = config
        self.from32, self.row = Projection(c.latents, 4 * c.width), QualityRow(c.width)
        self.pairs = nn.ModuleList(Pair(c, i) for i in range(c.decoder_pairs))
        self.add_stages(c)

    def forward(self, y: Tensor, l: Tensor, window: int) -> Tensor:
        x = self.row(depth_to_space(self.from32(y), 2), l)
        for pair in self.pairs:
            x = pair(x, window)
        return self.paint(x)


# --- the same for latent tokens of windows ("frequencies", "slots") --------------------------------------------------


class Grouped(nn.Module):
    """Linear with one matrix for each group of 8 slots. (B, windows * slots, inputs) -> (..., outputs)"""

    def __init__(self, slots: int, inputs: int, outputs: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(slots // 8, inputs, outputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        groups, inputs, _ = self.weight.shape
        x = x.view(len(x), -1, groups, 8, inputs)
        return torch.einsum("bngsi,gio->bngso", x, self.weight.to(x.dtype)).reshape(len(x), -1, self.weight.shape[2])


class SlotEncoder(Stem):
    """(B, H, W, 3) -> tokens (B, T, C) in units of their deviation: queries of each window that read its patches.

    frequencies: token k is the k-th group of the window's strongest cosine coefficients and what the network adds.
    """

    def __init__(self, config: MrtConfig):
        super().__init__(config)
        c = config
        self.anchored = c.tokens == "frequencies"
        self.start = Grouped(c.slots, c.latents, c.width, c.latents**-0.5) if self.anchored else None
        self.slot, self.slot_row = nn.Parameter(torch.randn(c.slots, c.width) * 0.02), QualityRow(c.width)
        self.pairs = nn.ModuleList(SlotPair(c, i) for i in range(c.encoder_pairs))
        self.norm = nn.LayerNorm(c.width)
        self.to_tokens = Grouped(c.slots, c.width, c.latents, 0.0 if self.anchored else c.width**-0.5)

    def forward(self, x: Tensor, l: Tensor, frame: Slots, deviation: Tensor) -> Tensor:
        """deviation (T, C)"""
        patches = self.patches(x, l)
        linear = to_frequencies(x, frame, deviation.shape[1]) / deviation if self.anchored else None
        z = latents(linear, self.start, self.slot, frame, len(x))
        z = self.slot_row(z[:, None], l)[:, 0] * frame.present
        for pair in self.pairs:
            patches, z = pair(patches, z, frame)
        y = self.to_tokens(self.norm(z))[:, frame.place]
        return y if linear is None else linear + y


class SlotDecoder(Painter):
    """The mirror: tokens (B, T, C) in units of their deviation -> (B, H, W, 3).

    frequencies: the picture that the tokens stand for as cosine coefficients, and what the network adds. The network
    sees that picture too, at 1/16 and at 1/4.
    """

    def __init__(self, config: MrtConfig):
        super().__init__()
        c = config
        self.start = Grouped(c.slots, c.latents, c.width, c.latents**-0.5)
        self.slot, self.slot_row = nn.Parameter(torch.randn(c.slots, c.width) * 0.02), QualityRow(c.width)
        self.patch, self.row = nn.Parameter(torch.randn(c.width) * 0.02), QualityRow(c.width)
        self.anchored = c.tokens == "frequencies"
        self.seen16 = Projection(3 * PATCH**2, c.width) if self.anchored else None
        self.seen4 = Projection(48, c.pixels[1]) if self.anchored else None
        self.pairs = nn.ModuleList(SlotPair(c, i) for i in range(c.decoder_pairs))
        self.add_stages(c)
        if self.anchored:
            for part in self.to_pixels.parameters():
                nn.init.zeros_(part)

    def forward(self, y: Tensor, l: Tensor, frame: Slots, deviation: Tensor) -> Tensor:
        z = latents(y, self.start, self.slot, frame, len(y))
        z = self.slot_row(z[:, None], l)[:, 0] * frame.present
        x = self.row(self.patch.expand(len(y), *frame.size, -1), l)
        linear = quarter = None
        if self.seen16 is not None and self.seen4 is not None:
            linear = from_frequencies(y * deviation, frame)
            x, quarter = x + self.seen16(space_to_depth(linear, PATCH)), self.seen4(space_to_depth(linear, 4))
        for pair in self.pairs:
            x, z = pair(x, z, frame)
        x = self.paint(x, quarter)
        return x if linear is None else linear + x


def latents(y: Tensor | None, start: Grouped | None, slot: Tensor, frame: Slots, batch: int) -> Tensor:
    """Tokens (B, T, C), or none -> their first features in places: (B, windows * slots, D)."""
    windows = frame.grid[0] * frame.grid[1]
    z = slot.repeat(windows, 1).expand(batch, -1, -1)
    if y is None or start is None:
        return z
    placed = y.new_zeros(batch, len(frame.present), y.shape[2])
    placed[:, frame.place] = y
    return z + start(placed)


# --- the model ------------------------------------------------------------------------------------------------------


class Mrt(nn.Module):
    """forward(x, quality): x (B, 3, H, W) in [0, 1], H and W multiples of config.multiple -> {"x_hat", "bits",
    "lambda"}: the last two (B,).

    y is (B, H/32, W/32, C), or, of tokens that are no cells, (B, T, 1, C). `frame` says where its tokens lie; cells
    need none, since y has the shape of their grid.

    In training mode the rate has the value of the rounded symbols and the gradient of noisy ones, and gradients pass
    straight through the rounding; with `noise` both paths see uniform noise instead. In eval mode means follow from
    what was coded before, as in a file: a fixed point of the causal RCM is what coding step by step gives.
    """

    ln_deviation: Tensor
    rate_control: Tensor
    start_crops = 160, 256      # of init_klt: how many, and their side
    noise = False               # train/loop.py: in the first phase of a run
    dead_zone = True            # in the last ones, and in use

    def __init__(self, config: MrtConfig):
        super().__init__()
        self.config = config
        c = config.latents
        self.cells = config.tokens == "cells"
        self.encoder: Encoder | SlotEncoder = Encoder(config) if self.cells else SlotEncoder(config)
        self.decoder: Decoder | SlotDecoder = Decoder(config) if self.cells else SlotDecoder(config)
        self.rcm = Rcm(config)
        # ln of gains and scales, polynomials in l: a row each of 1, l, l^2. Of each channel, or each slot's channels.
        each = (c,) if self.cells else (config.slots, c)
        step = torch.zeros(3, *each)
        step[0], step[1] = -1.19, 0.49                                  # the best steps of the linear codec
        if self.cells:
            step[0, 0] += math.log(2)
        self.gain_enc, self.gain_dec = nn.Parameter(step), nn.Parameter(torch.zeros_like(step))
        self.prior = nn.Parameter(torch.zeros(3, *each))
        # Of y at the start, not scaled; then fixed. Learned slots start with about a step.
        self.register_buffer("ln_deviation", torch.full(each, 1.19 if config.tokens == "slots" else 0.0))
        self.register_buffer("rate_control", torch.zeros(KNOTS))        # of training alone: ln of a factor of lambda

    def normative(self) -> list[nn.Module]:
        """What steers the range coder; `prior`, `gain_enc` and `ln_deviation` beside it."""
        return [self.rcm]

    def set_bf16(self, where: Literal["off", "free", "all"] | bool) -> None:
        """Where the operands of products are bf16: in blocks of the free nets ("free", True), in training also between
        them ("all"). Never where pixels, y or RCM's inputs are made."""
        inside = {m for net in (self.encoder, self.decoder) for part in net.modules()
                  if isinstance(part, (Block, Attention, Residual)) for m in part.modules()}
        e, d = self.encoder, self.decoder
        ends: list[nn.Module | None] = [e.to4, d.to_pixels]
        ends += [e.to32] if isinstance(e, Encoder) else []
        ends += [d.from32] if isinstance(d, Decoder) else [d.seen16, d.seen4]
        for module in self.modules():
            if isinstance(module, (Linear, Conv)):
                if module in inside:
                    module.bf16 = "always" if where and where != "off" else "never"
                else:
                    module.bf16 = "training" if where == "all" and module not in ends else "never"

    def level(self, quality: Tensor | None, like: Tensor) -> Tensor:
        """quality (B,) -> l (B,)."""
        quality = like.new_full((len(like),), 50.0) if quality is None else quality.to(like.device, like.dtype)
        return torch.log(quality_to_target(quality) / TARGET_MIDDLE)

    def steer(self, quality: Tensor, bpp: Tensor) -> Tensor:
        """lambda of each sample; in training one that moves until every quality has its target rate. (B,)"""
        if not self.training:
            return quality_to_lambda(quality)
        place = (quality / 100 * (KNOTS - 1)).clamp(0, KNOTS - 1)
        share = (1 - (place[:, None] - torch.arange(KNOTS, device=place.device)).abs()).clamp_min(0)    # linear
        now = quality_to_lambda(quality) * torch.exp(share @ self.rate_control)
        with torch.no_grad():       # noisy rates are not those of a file
            error = torch.log(bpp.detach().clamp_min(1e-5) / quality_to_target(quality)).clamp(-1, 1)
            gain = 0.0 if self.noise else 0.003
            self.rate_control.add_(gain * (share * error[:, None]).sum(0)).clamp_(-2.5, 2.5)
        return now

    def frame(self, height: int, width: int, device: torch.device | str = "cpu") -> Order | Slots:
        """Where the tokens of a picture of that many pixels lie."""
        c = self.config
        if self.cells:
            return order(height // CELL, width // CELL, c.order, c.window, device)
        return slots_of(height // PATCH, width // PATCH, c.slots, 2 * self.window(), c.order == "windows", device)

    def at(self, polynomial: Tensor, l: Tensor, frame: Order | Slots | None = None) -> Tensor:
        """(3, C) at l (B,) -> (B, 1, 1, C); (3, slots, C) at the tokens of a frame -> (B, T, 1, C)."""
        rows = polynomial[:, frame.slot].flatten(1) if isinstance(frame, Slots) else polynomial
        found = torch.stack([torch.ones_like(l), l, l * l], 1) @ rows.to(l.dtype)
        return found.view(len(l), -1, 1, polynomial.shape[-1])

    def deviation(self, frame: Order | Slots | None, like: Tensor) -> Tensor:
        """ln of y's deviation at the start, not scaled: (C,), or (T, 1, C)."""
        found = self.ln_deviation.to(like.dtype)
        return found[frame.slot][:, None] if isinstance(frame, Slots) else found

    def ln_unit(self, l: Tensor, frame: Order | Slots | None = None) -> Tensor:
        """Of contexts and means: y's deviation in steps, (B, 1, 1, C) or (B, T, 1, C)."""
        return (self.deviation(frame, l) + self.at(self.gain_enc, l, frame)).clamp_min(-1.0)

    def analyse(self, x: Tensor, l: Tensor, frame: Order | Slots | None = None) -> Tensor:
        """Picture (B, H, W, 3) -> y, in steps."""
        if isinstance(self.encoder, Encoder):
            y = self.encoder(x - 0.5, l, 2 * self.window())
        else:
            deviation = torch.exp(self.deviation(_slots(frame), x))
            y = self.encoder(x - 0.5, l, _slots(frame), deviation[:, 0])[:, :, None] * deviation
        return y * torch.exp(self.at(self.gain_enc, l, frame))

    def synthesise(self, y_hat: Tensor, l: Tensor, frame: Order | Slots | None = None) -> Tensor:
        y = y_hat * torch.exp(-self.at(self.gain_enc + self.gain_dec, l, frame))
        if isinstance(self.decoder, Decoder):
            x: Tensor = self.decoder(y, l, 2 * self.window())
        else:
            deviation = torch.exp(self.deviation(_slots(frame), y))
            x = self.decoder((y / deviation)[:, :, 0], l, _slots(frame), deviation[:, 0])
        return x + 0.5

    def window(self) -> int:
        """Cells. In training half of the steps have windows half as large: a crop holds several then. The one draw on
        the host, from torch's CPU generator: it waits for no device."""
        small = self.training and bool(torch.rand((), device="cpu") < 0.5)
        return self.config.window // 2 if small else self.config.window

    def order(self, y: Tensor, frame: Order | Slots | None = None) -> Order | Slots:
        """Of y (B, H/32, W/32, C), or the frame itself."""
        if frame is not None:
            return frame
        assert self.cells, "tokens of windows need the frame of their picture"
        return self.frame(CELL * y.shape[1], CELL * y.shape[2], y.device)

    def predict(self, y_hat: Tensor, l: Tensor, frame: Order | Slots | None = None) -> tuple[Tensor, Tensor]:
        """y_hat -> mean in steps, ln scale: at each token from those coded before it."""
        unit = torch.exp(self.ln_unit(l, frame))
        known = (y_hat / unit).clamp(-16, 16).flatten(1, 2)
        mean, scale = self.rcm(known, l, self.order(y_hat, frame))
        ln_scale = bounded(scale.view(y_hat.shape) + self.at(self.prior, l, frame), LN_SCALE_MIN, LN_SCALE_MAX)
        return (mean.view(y_hat.shape) * unit).clamp(-MEAN_LIMIT, MEAN_LIMIT), ln_scale

    def round(self, distance: Tensor) -> Tensor:
        if not self.dead_zone:
            return torch.round(distance)
        kept = torch.sign(distance) * torch.floor(distance.abs() + DEAD_ZONE)
        if not self.cells:      # a window's mean has steps of two grey levels
            return kept
        return torch.cat([torch.round(distance[..., :1]), kept[..., 1:]], -1)

    def quantise(self, y: Tensor, l: Tensor, frame: Order | Slots | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As a file has it -> y_hat, symbols, ln scale on the table's grid."""
        y_hat = torch.round(y)
        for _ in range(FIXED_POINT_PASSES):
            mean, ln_scale = self.predict(y_hat, l, frame)
            index = scale_index(ln_scale, self.config.scales, span=(LN_SCALE_MIN, LN_SCALE_MAX))
            symbol = torch.where(index >= self.skip, self.round(y - mean), 0.0)
            after = mean + symbol
            done = bool((after - y_hat).abs().max() < 1e-4)
            y_hat = after
            if done:
                break
        return y_hat, symbol, ln_scale_at(index, self.config.scales, span=(LN_SCALE_MIN, LN_SCALE_MAX))

    @property
    def skip(self) -> int:
        """Scale indices below this are not coded: symbol 0."""
        return 1

    def code(self, y: Tensor, l: Tensor, frame: Order | Slots | None = None) -> tuple[Tensor, Tensor]:
        """-> y_hat (gradient of y), bits of each symbol."""
        if not self.training:
            y_hat, symbol, ln_scale = self.quantise(y, l, frame)
            coded = ln_scale > LN_SCALE_MIN + 1e-6
            return y_hat, torch.where(coded, laplace_bits(symbol, ln_scale), 0.0)
        if self.noise:
            y_hat = y + torch.rand_like(y) - 0.5
            mean, ln_scale = self.predict(y_hat, l, frame)
            noisy, symbol = y_hat - mean, torch.round((y - mean).detach())
        else:
            with torch.no_grad():       # one pass towards the fixed point: what the tokens before will about be
                mean, _ = self.predict(torch.round(y), l, frame)
                known = mean + self.round(y - mean)
            mean, ln_scale = self.predict(y + (known - y).detach(), l, frame)
            symbol = self.round((y - mean).detach())
            y_hat = y + (mean + symbol - y).detach()
            noisy = y - mean + torch.rand_like(y) - 0.5
        slope = laplace_bits(noisy, ln_scale.detach())          # for the encoder and the mean
        return y_hat, laplace_bits(symbol, ln_scale) + (slope - slope.detach())

    def forward(self, x: Tensor, quality: Tensor | None = None) -> dict[str, Any]:
        x = x.permute(0, 2, 3, 1).contiguous()
        l, frame = self.level(quality, x), self.frame(x.shape[1], x.shape[2], x.device)
        y_hat, each = self.code(self.analyse(x, l, frame), l, frame)
        bits = each.flatten(1).sum(1)
        quality = torch.full_like(l, 50.0) if quality is None else quality.to(l)
        return {"x_hat": self.synthesise(y_hat, l, frame).permute(0, 3, 1, 2), "bits": bits,
                "lambda": self.steer(quality, bits / (x.shape[1] * x.shape[2]))}

    # The start.

    @torch.no_grad()
    def init_klt(self, crops: Tensor) -> None:
        """Start as a linear codec. crops (N, 256, 256, 3) in [0, 1].

        Encoder: principal axes of each scale in turn; decoder: their transposes, or the cosine transforms that are
        there already; blocks are silent at the start. RCM's linear predictor by least squares, the scales by maximum
        likelihood at five rates.
        """
        from linic.models.lalic import principal_axes

        x = crops - 0.5
        corners = torch.cat([x[:, i:i + 64, j:j + 64] for i in (0, 128) for j in (64, 192)])
        axes: list[Tensor] = []
        for step, factor in self.encoder.steps():
            rows = space_to_depth(corners, factor)
            axes.append(principal_axes(rows, step.out_features))
            _put(step, axes[-1])
            corners = step(rows)
        e, d, c = self.encoder, self.decoder, self.config
        if isinstance(e, Encoder) and isinstance(d, Decoder):
            _init_decoder(d, axes, c.width, c.stem)
            y = torch.cat([e.linear(part) for part in x.split(16)])
            self.ln_deviation.copy_(torch.log(y.flatten(0, 2).std(0) + 1e-6))
            self._init_rcm(y, None, None)
        elif c.tokens == "frequencies":
            frame = slots_of(CROP // PATCH, CROP // PATCH, c.slots, 2 * c.window, c.order == "windows", x.device)
            assert isinstance(frame, Slots) and frame.count == c.slots, "full windows are as large as the crops"
            y = torch.cat([to_frequencies(part, frame, c.latents) for part in x.split(16)])
            alike = _alike(c.slots * c.latents).to(x.device)
            power = y.square().mean(0).flatten() @ alike / alike.sum(0)
            self.ln_deviation.copy_(0.5 * torch.log(power + 1e-12).view(c.slots, c.latents))
            self._init_rcm(y[:, :, None], frame, alike)

    def _init_rcm(self, y: Tensor, frame: Slots | None, alike: Tensor | None) -> None:
        known = (y / torch.exp(self.deviation(frame, y))).flatten(1, 2)
        f = self.rcm.features(known, self.order(y, frame)).flatten(0, 1).double()
        ridge = 1e-3 * len(f) * torch.eye(f.shape[1], dtype=torch.double, device=f.device)
        self.rcm.linear.weight.copy_(torch.linalg.solve(f.T @ f + ridge, f.T @ known.flatten(0, 1).double()).T)
        # Gains until every quality has its target rate; scales at each.
        levels = torch.linspace(-1.2, 1.2, 5, device=y.device)
        powers = torch.stack([torch.ones_like(levels), levels, levels**2], 1)
        knots = torch.linspace(0, 100, KNOTS, device=y.device)
        knot_levels = torch.log(quality_to_target(knots) / TARGET_MIDDLE)
        for last in (False, False, True):
            scales, missing = [], []
            for l in levels:
                each = l.expand(len(y))
                scaled = y * torch.exp(self.at(self.gain_enc, each, frame))
                known = torch.round(scaled)
                for _ in range(4):          # towards the fixed point
                    mean, _ = self.predict(known, each, frame)
                    known = mean + self.round(scaled - mean)
                mean, _ = self.predict(known, each, frame)
                symbols = self.round(scaled - mean)
                scales.append(_best_ln_scale(symbols.flatten(0, 2) if frame is None else symbols.flatten(1), alike))
                bits = laplace_bits(symbols, scales[-1].view(symbols.shape[1:] if frame is not None else (-1,))).sum()
                target = TARGET_MIDDLE * torch.exp(l) * len(y) * self.start_crops[1] ** 2
                missing.append(torch.log(target / bits))
            if not last:        # a nat of gain makes about a nat of rate
                shift = torch.linalg.lstsq(powers, torch.stack(missing)[:, None]).solution
                self.gain_enc.add_(shift.view(3, *[1] * self.ln_deviation.dim()))
                # The best step goes with the square root of lambda.
                self.rate_control.sub_(2 * (shift[0] + shift[1] * knot_levels + shift[2] * knot_levels**2))
        found = torch.linalg.lstsq(powers, torch.stack(scales)).solution
        self.prior.copy_(found.view(self.prior.shape))


def _slots(frame: Order | Slots | None) -> Slots:
    assert isinstance(frame, Slots), "tokens of windows need the frame of their picture"
    return frame


def _best_ln_scale(symbols: Tensor, alike: Tensor | None = None) -> Tensor:
    """Maximum likelihood Laplace scale of each channel. (N, C) -> (C,). alike (C, C): whose symbols count for whom."""
    grid = torch.linspace(LN_SCALE_MIN, math.log(6.0), 100, device=symbols.device)
    symbols = symbols[torch.randperm(len(symbols), device="cpu")[:8192].to(symbols.device)]
    bits = torch.stack([laplace_bits(symbols, s.expand_as(symbols)).sum(0) for s in grid])
    return grid[(bits if alike is None else bits @ alike).argmin(0)]


def _alike(count: int) -> Tensor:
    """(count, count), 1 where coefficients of a full window have about the same power: neighbours in rank of the same
    kind, luma or chroma. A crop gives one sample of each, so that a coefficient alone would be fitted to few."""
    chroma = torch.tensor([plane > 0 for plane, _, _ in strongest(CROP // PATCH, CROP // PATCH, count)])
    rank = torch.where(chroma, chroma.cumsum(0), (~chroma).cumsum(0)) - 1.0
    near = (rank[:, None] - rank).abs() <= (rank / 8).clamp(max=16)
    return (near & (chroma[:, None] == chroma)).float()


def _init_decoder(d: Decoder, axes: list[Tensor], width: int, stem: tuple[int, ...]) -> None:
    v4, v8, v16, v32 = axes
    ups: list[Any] = list(d.ups)
    p8, p4, p2 = (up.out_features // 4 for up in ups)
    _put(d.from32, _transposed(v32, width, width))
    _put(ups[0], _transposed(v16, stem[1], p8))
    _put(ups[1], _transposed(v8, stem[0], p4))
    # From 1/4 to 1/2: each of the 4 positions holds 2x2x3 pixels; the columns of v4 count (4, 4, 3).
    pixels = v4.T.reshape(2, 2, 2, 2, 3, -1).permute(0, 2, 1, 3, 4, 5).reshape(4, 12, -1)
    last = torch.zeros(4, p2, len(v4))
    last[:, :12] = pixels
    _put(ups[2], last.view(4 * p2, -1))
    d.to_pixels.weight.normal_(0, 1e-3)
    d.to_pixels.weight[:, :12] = 0
    d.to_pixels.weight[:, :12, 1, 1] = torch.eye(12)
    assert d.to_pixels.bias is not None
    d.to_pixels.bias.zero_()


def _put(linear: Any, weight: Tensor) -> None:
    linear.weight.normal_(0, 1e-3)
    linear.bias.zero_()
    linear.weight[: weight.shape[0], : weight.shape[1]] = weight


def _transposed(axes: Tensor, used: int, channels: int) -> Tensor:
    """Axes (n, 4 used) of a step down -> weights (4 channels, n) of the step up, to the first `used` channels."""
    out = torch.zeros(4, channels, len(axes), device=axes.device)
    out[:, :used] = axes.T.reshape(4, used, -1)
    return out.view(4 * channels, -1)
