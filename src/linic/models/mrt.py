"""MRT: mixed RWKV-Transformer for extreme compression, and RCM, the RWKV compression model of its latents.

    x --encoder--> y --gain, Q--> y_hat --gain--> decoder --> x_hat       y: one token of C channels a cell of 32 px
                         ^
                    mean, scale <-- RCM: causal RWKV over the tokens already coded

Source: "Mixed RWKV-Transformer" (arXiv 2511.06717), of which the abstract alone was to be had: RWKV across the whole
picture, Transformer inside a window, 1-D latents, an RWKV model for their rate. Every shape is ours; docs/mrt.md says
of each choice whether it is established, inferred or decided.
Layout [B, H, W, C] inside, [B, C, H, W] at `forward`. A frame is the picture's grid of cells.

One model serves every rate. Quality q in 0..100 stands for a target of .004 (.035/.004)^(q/100) bits per pixel and for
lambda = .35 / target, the weight of bits per pixel against 100 MSE (values in [0, 1]); l = ln(target/.0118). Gains,
scales and rows are polynomials in l; RCM works in units of each channel's deviation, so that one network serves all.

y_hat = mean + symbol: what is rounded is the distance to the predicted mean, with a dead zone (a symbol is only sent
where it moves the value by more than .6 of a step), but for channel 0, the mean of a cell, whose errors are seen.
"""

import math
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.entropy.rounding import bounded, laplace_bits, ln_scale_at, scale_index
from linic.models.blocks import Block, Linear, Projection, QualityRow, depth_to_space, space_to_depth
from linic.models.config import MrtConfig

TARGET_LOW, TARGET_HIGH, TARGET_MIDDLE = 0.004, 0.035, 0.0118
LAMBDA_TARGET = 0.35
CELL = 32                       # pixels
LN_SCALE_MIN, LN_SCALE_MAX = math.log(0.06), math.log(24.0)
DEAD_ZONE = 0.4                 # a distance d becomes floor(|d| + .4); channel 0 rounds at .5
MEAN_LIMIT = 256.0              # steps
KNOTS = 6                       # of the rate control, even over quality 0 .. 100
FIXED_POINT_PASSES = 100
_T = TypeVar("_T", float, Tensor)


def quality_to_target(quality: _T) -> _T:
    """Bits per pixel: .004 at 0, .035 at 100, log-linear between and beyond."""
    return TARGET_LOW * (TARGET_HIGH / TARGET_LOW) ** (quality / 100)


def quality_to_lambda(quality: _T) -> _T:
    return LAMBDA_TARGET / quality_to_target(quality)


# --- geometry: windows of the transforms, order of the tokens --------------------------------------------------------


def cuts(n: int, most: int, between: bool = False) -> list[tuple[int, int]]:
    """n positions in the fewest windows of at most `most`, sizes differing by at most 1. between: windows around the
    borders of those."""
    count = -(-n // most)
    edges = [i * n // count for i in range(count + 1)]
    if between:
        edges = [0, *((a + b) // 2 for a, b in zip(edges, edges[1:])), n]
    return [(a, b) for a, b in zip(edges, edges[1:]) if a < b]


@lru_cache(maxsize=256)
def windows(h: int, w: int, most: int, between: bool) -> list[tuple[int, int, Tensor]]:
    """The windows of a grid, those of equal size (a, b) together: (a, b, positions (n, a b) in row order)."""
    position = torch.arange(h * w).view(h, w)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for top, bottom in cuts(h, most, between):
        for left, right in cuts(w, most, between):
            found.setdefault((bottom - top, right - left), []).append(position[top:bottom, left:right].reshape(-1))
    return [(a, b, torch.stack(parts)) for (a, b), parts in found.items()]


# Neighbours that may be known when a token is coded. Staggered rows know those above up to two columns ahead.
OFFSETS = {
    "staggered": ((0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1), (-2, -1), (-2, 0), (-2, 1), (-2, 2)),
    "windows": ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1), (0, -2), (-2, 0), (0, 2), (2, 0)),
}


class Order:
    """In which step each token of a frame (h, w) is coded, and what it may look at.

    staggered: every row two columns behind the one above, the whole frame in w + 2 (h - 1) steps. Sequences: rows and
    columns, in turns. windows: all windows in lockstep, row order within a window. Sequences: the windows.
    step (h w,); neighbours (h w, offsets): position, or h w where not yet known; sequences: [(n, t) positions, h w
    where a sequence is shorter], one entry a kind.
    """

    def __init__(self, h: int, w: int, kind: str, window: int):
        self.count, none = h * w, h * w
        row, column = torch.arange(h)[:, None].expand(h, w), torch.arange(w)[None].expand(h, w)
        position = row * w + column
        if kind == "staggered":
            step = 2 * row + column
            self.sequences = [position, position.T.contiguous()]
        else:
            step, most = torch.empty(h, w, dtype=torch.long), max(b - a for a, b in cuts(w, window))
            parts = []
            for top, bottom in cuts(h, window):
                for left, right in cuts(w, window):
                    i, j = torch.arange(bottom - top)[:, None], torch.arange(right - left)[None]
                    step[top:bottom, left:right] = i * most + j
                    parts.append(position[top:bottom, left:right].reshape(-1))
            longest = max(map(len, parts))
            self.sequences = [torch.stack([F.pad(p, (0, longest - len(p)), value=none) for p in parts])]
        self.step = step.reshape(-1)
        found = []
        for i, j in OFFSETS[kind]:
            r, c = row + i, column + j
            n = r.clamp(0, h - 1) * w + c.clamp(0, w - 1)
            known = (r >= 0) & (r < h) & (c >= 0) & (c < w) & (self.step[n] < step)
            found.append(torch.where(known, n, none).reshape(-1))
        self.neighbours = torch.stack(found, 1)


@lru_cache(maxsize=256)
def order(h: int, w: int, kind: str, window: int) -> Order:
    return Order(h, w, kind, window)


# --- RCM ------------------------------------------------------------------------------------------------------------


class CausalBlock(nn.Module):
    """RWKV block over tokens in coding order: x + gate * out(WKV over the sequence so far), then a Channel Mix.

    Both mixes see, beside the token itself, its known neighbours, each channel weighed on its own: what Omni-Shift is
    to a picture. Bounds as in normative blocks (blocks.py): k +-4.8, v +-16, gates +-8, residual +-64.
    """

    def __init__(self, channels: int, neighbours: int, kind: int):
        super().__init__()
        self.kind = kind        # which of the order's sequences
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.near1 = nn.Parameter(torch.randn(neighbours, channels) * 0.2 / neighbours)
        self.near2 = nn.Parameter(torch.randn(neighbours, channels) * 0.2 / neighbours)
        self.kvr = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.kr = nn.Linear(channels, 3 * channels, bias=False)         # [hidden 2x | gate]
        self.last = nn.Linear(2 * channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.last.weight)
        self.w = nn.Parameter(torch.linspace(-3, 3, channels))
        self.u = nn.Parameter(torch.zeros(channels))

    def decay(self) -> tuple[Tensor, Tensor]:
        """Decay a token, in nats: .0005 .. .2231; bonus of the token itself."""
        return 0.2226 * torch.sigmoid(self.w) + 0.0005, 3 * torch.tanh(self.u / 3)

    def wkv(self, k: Tensor, v: Tensor, sequence: Tensor) -> Tensor:
        """k, v (B, T, C) -> causal weighted means of v along the sequences (n, t), (B, T, C)."""
        b, count, c = k.shape
        t = sequence.shape[1]
        e = F.pad(torch.exp(k), (0, 0, 0, 1))                                   # 0 where there is no token
        both = torch.stack([e * F.pad(v, (0, 0, 0, 1)), e], 1)                  # B, 2, T + 1, C
        both = both[:, :, sequence.reshape(-1)].view(-1, t, c)                  # B 2 n, t, C
        distance = torch.arange(t, device=k.device)[:, None] - torch.arange(t, device=k.device)[None] - 1
        w, u = self.decay()
        past = torch.exp(-distance.clamp_min(0) * w[:, None, None])
        weight = torch.where(distance >= 0, past, torch.where(distance == -1, torch.exp(u)[:, None, None], 0.0))
        sums = torch.bmm(weight, both.permute(2, 1, 0)).permute(2, 1, 0)        # over C: (t, t) x (t, B 2 n)
        num, den = sums.reshape(b, 2, -1, c).unbind(1)
        flat = sequence.reshape(-1)
        y = k.new_zeros(b, count + 1, c)
        y[:, flat] = num / den.clamp_min(1e-9)
        return y[:, :count]

    def forward(self, x: Tensor, order: Order) -> Tensor:
        """(B, T, C) -> same."""
        c = x.shape[2]
        s = near(self.norm1(x), self.near1, order)
        k, v, r = self.kvr(s).split(c, 2)
        k, v, r = bounded(k, -4.8, 4.8), bounded(v, -16, 16), bounded(r, -8, 8)
        sequence = order.sequences[self.kind % len(order.sequences)]
        x = (x + self.out(torch.sigmoid(r) * self.wkv(k, v, sequence))).clamp(-64, 64)
        k, r = self.kr(near(self.norm2(x), self.near2, order)).split((2 * c, c), 2)
        k = torch.relu(k).clamp(max=16)
        return (x + torch.sigmoid(bounded(r, -8, 8)) * self.last(k * k)).clamp(-64, 64)


def gather(x: Tensor, order: Order) -> Tensor:
    """(B, T, C) -> (B, T, offsets, C): the known neighbours, zeros for the others."""
    index = order.neighbours
    return F.pad(x, (0, 0, 0, 1))[:, index.reshape(-1)].view(len(x), *index.shape, x.shape[2])


def near(x: Tensor, weight: Tensor, order: Order) -> Tensor:
    return x + (gather(x, order) * weight).sum(2)


class Rcm(nn.Module):
    """Known tokens -> mean and ln scale of the next ones: a network, and beside it a linear predictor."""

    def __init__(self, config: MrtConfig):
        super().__init__()
        c, width, n = config.latents, config.rcm_width, len(OFFSETS[config.order])
        self.first = nn.Linear(n * (c + 1), width)
        self.linear = nn.Linear(n * (c + 1), c)
        self.row = QualityRow(width)
        self.blocks = nn.ModuleList(CausalBlock(width, n, i) for i in range(config.rcm_depth))
        self.norm = nn.LayerNorm(width)
        self.mean, self.scale = nn.Linear(width, c), nn.Linear(width, c)
        for part in (self.linear, self.mean, self.scale):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def features(self, known: Tensor, order: Order) -> Tensor:
        """(B, T, C) -> (B, T, offsets (C + 1)): each neighbour's values, then 1 where it is known."""
        return gather(F.pad(known, (0, 1), value=1.0), order).flatten(2)

    def forward(self, known: Tensor, l: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        """known (B, T, C), tokens in units of their deviation: row t of the result depends on rows coded before alone.
        -> mean in the same unit, ln scale relative to the prior."""
        f = self.features(known, order)
        x = self.row(self.first(f)[:, None], l)[:, 0].clamp(-64, 64)
        for block in self.blocks:
            x = block(x, order)
        x = self.norm(x)
        return (self.mean(x) + self.linear(f)).clamp(-16, 16), self.scale(x).clamp(-16, 16)


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
        y = self.norm1(x).reshape(b, h * w, c)
        parts = windows(h, w, window, self.between)
        if len(parts) == 1 and len(parts[0][2]) == 1:
            x = x + self.attend(y, h, w).view(x.shape)
        else:
            update = torch.empty_like(y, dtype=x.dtype)
            for p, q, index in parts:
                index = index.to(x.device)
                inside = y[:, index.reshape(-1)].view(-1, p * q, c)
                update[:, index.reshape(-1)] = self.attend(inside, p, q).reshape(b, -1, c).to(x.dtype)
            x = x + update.view(x.shape)
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))

    def attend(self, y: Tensor, h: int, w: int) -> Tensor:
        """(N, h w, C), a window each -> same."""
        n, t, c = y.shape
        y = y + self.position[:h, :w].reshape(t, c)
        q, k, v = self.qkv(y).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(z.float(), z.shape[-1:], g, 1e-6).to(v.dtype) for z, g in zip((q, k), self.gains))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Pair(nn.Module):
    """RWKV over the whole frame, by rows and columns in turns, then a Transformer inside windows."""

    def __init__(self, config: MrtConfig, index: int):
        super().__init__()
        c = config
        self.rwkv = Block(c.width, c.hidden, c.style, pixels=16, index=index) if c.rwkv else None
        self.attention = (Attention(c.width, c.heads, c.hidden, 2 * c.window, index % 2 == 1)
                          if c.transformer else None)

    def forward(self, x: Tensor, window: int) -> Tensor:
        if self.rwkv is not None:
            x = self.rwkv(x)
        return x if self.attention is None else self.attention(x, window)


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
    """x + conv(silu(conv(norm(x)))), dense 3x3: what draws the pixels, across all borders."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.LayerNorm(channels), Conv(channels, channels), Conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Encoder(nn.Module):
    """(B, H, W, 3) -> (B, H/32, W/32, C): four steps down, each a Linear over 4x4 or 2x2 positions."""

    def __init__(self, config: MrtConfig):
        super().__init__()
        c, (c4, c8) = config, config.stem
        self.to4 = Projection(48, c4)
        self.block4 = Block(c4, c.hidden, c.style, spatial=False, pixels=4)
        self.to8 = Projection(4 * c4, c8)
        self.block8 = Block(c8, c.hidden, c.style, pixels=8)
        self.to16, self.row = Projection(4 * c8, c.width), QualityRow(c.width)
        self.pairs = nn.ModuleList(Pair(c, i) for i in range(c.encoder_pairs))
        self.to32 = Projection(4 * c.width, c.latents)

    def forward(self, x: Tensor, l: Tensor, window: int) -> Tensor:
        x = self.block4(self.to4(space_to_depth(x, 4)))
        x = self.block8(self.to8(space_to_depth(x, 2)))
        x = self.row(self.to16(space_to_depth(x, 2)), l)
        for pair in self.pairs:
            x = pair(x, window)
        y: Tensor = self.to32(space_to_depth(x, 2))
        return y

    def steps(self) -> list[tuple[Any, int]]:
        return [(self.to4, 4), (self.to8, 2), (self.to16, 2), (self.to32, 2)]

    def linear(self, x: Tensor) -> Tensor:
        """The start: the same without blocks."""
        for step, factor in self.steps():
            x = step(space_to_depth(x, factor))
        return x


class Decoder(nn.Module):
    """(B, H/32, W/32, C) -> (B, H, W, 3): pairs at 1/16, then convolutions at 1/8, 1/4 and 1/2."""

    def __init__(self, config: MrtConfig):
        super().__init__()
        c, (p8, p4, p2) = config, config.pixels
        self.from32, self.row = Projection(c.latents, 4 * c.width), QualityRow(c.width)
        self.pairs = nn.ModuleList(Pair(c, i) for i in range(c.decoder_pairs))
        self.ups = nn.ModuleList([Projection(c.width, 4 * p8), Projection(p8, 4 * p4), Projection(p4, 4 * p2)])
        self.stages = nn.ModuleList(nn.ModuleList(Residual(width) for _ in range(depth))
                                    for width, depth in zip(c.pixels, c.pixel_depths))
        self.to_pixels = Conv(p2, 12)

    def forward(self, y: Tensor, l: Tensor, window: int) -> Tensor:
        x = self.row(depth_to_space(self.from32(y), 2), l)
        for pair in self.pairs:
            x = pair(x, window)
        blocks: Any
        for up, blocks in zip(self.ups, self.stages):
            x = depth_to_space(up(x), 2)
            for block in blocks:
                x = block(x)
        return depth_to_space(self.to_pixels(x), 2)


# --- the model ------------------------------------------------------------------------------------------------------


class Mrt(nn.Module):
    """forward(x, quality): x (B, 3, H, W) in [0, 1], H and W multiples of 32 -> {"x_hat", "bits", "lambda"}: the last two
    (B,).

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
        self.encoder, self.decoder, self.rcm = Encoder(config), Decoder(config), Rcm(config)
        # ln of gains and scales, polynomials in l: a row each of 1, l, l^2.
        step = torch.tensor([[-1.19], [0.49], [0.0]]).repeat(1, c)      # the best steps of the linear codec
        step[0, 0] += math.log(2)
        self.gain_enc, self.gain_dec = nn.Parameter(step), nn.Parameter(step.clone())
        self.prior = nn.Parameter(torch.zeros(3, c))
        self.register_buffer("ln_deviation", torch.zeros(c))            # of y at the start, not scaled; then fixed
        self.register_buffer("rate_control", torch.zeros(KNOTS))        # of training alone: ln of a factor of lambda

    def normative(self) -> list[nn.Module]:
        """What steers the range coder; `prior`, `gain_enc` and `ln_deviation` beside it."""
        return [self.rcm]

    def set_bf16(self, where: Literal["off", "free", "all"] | bool) -> None:
        """Where the operands of products are bf16: in blocks of the free nets ("free", True), in training also between
        them ("all"). Never where pixels, y or RCM's inputs are made."""
        inside = {m for net in (self.encoder, self.decoder) for part in net.modules()
                  if isinstance(part, (Block, Attention, Residual)) for m in part.modules()}
        ends = {self.encoder.to4, self.encoder.to32, self.decoder.from32, self.decoder.to_pixels}
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
        with torch.no_grad():
            error = torch.log(bpp.detach().clamp_min(1e-5) / quality_to_target(quality)).clamp(-1, 1)
            self.rate_control.add_(0.01 * (share * error[:, None]).sum(0)).clamp_(-2.5, 2.5)
        return now

    def at(self, polynomial: Tensor, l: Tensor) -> Tensor:
        """(3, C) at l (B,) -> (B, 1, 1, C)."""
        return (torch.stack([torch.ones_like(l), l, l * l], 1) @ polynomial.to(l.dtype))[:, None, None]

    def ln_unit(self, l: Tensor) -> Tensor:
        """Of contexts and means: y's deviation in steps, (B, 1, 1, C)."""
        return (self.ln_deviation.to(l.dtype) + self.at(self.gain_enc, l)).clamp_min(-1.0)

    def analyse(self, x: Tensor, l: Tensor) -> Tensor:
        """Picture (B, H, W, 3) -> y (B, H/32, W/32, C), in steps."""
        return self.encoder(x - 0.5, l, 2 * self.window()) * torch.exp(self.at(self.gain_enc, l))

    def synthesise(self, y_hat: Tensor, l: Tensor) -> Tensor:
        x: Tensor = self.decoder(y_hat * torch.exp(-self.at(self.gain_dec, l)), l, 2 * self.window()) + 0.5
        return x

    def window(self) -> int:
        """Cells. In training half of the steps have windows half as large: a crop holds several then."""
        small = self.training and bool(torch.rand(()) < 0.5)
        return self.config.window // 2 if small else self.config.window

    def order(self, y: Tensor) -> Order:
        return order(y.shape[1], y.shape[2], self.config.order, self.config.window)

    def predict(self, y_hat: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        """y_hat (B, h, w, C) -> mean in steps, ln scale: at each token from those coded before it."""
        unit = torch.exp(self.ln_unit(l))
        known = (y_hat / unit).clamp(-16, 16).flatten(1, 2)
        mean, scale = self.rcm(known, l, self.order(y_hat))
        ln_scale = bounded(scale.view(y_hat.shape) + self.at(self.prior, l), LN_SCALE_MIN, LN_SCALE_MAX)
        return (mean.view(y_hat.shape) * unit).clamp(-MEAN_LIMIT, MEAN_LIMIT), ln_scale

    def round(self, distance: Tensor) -> Tensor:
        if not self.dead_zone:
            return torch.round(distance)
        kept = torch.sign(distance) * torch.floor(distance.abs() + DEAD_ZONE)
        return torch.cat([torch.round(distance[..., :1]), kept[..., 1:]], -1)

    def quantise(self, y: Tensor, l: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As a file has it -> y_hat, symbols, ln scale on the table's grid."""
        y_hat = torch.round(y)
        for _ in range(FIXED_POINT_PASSES):
            mean, ln_scale = self.predict(y_hat, l)
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

    def code(self, y: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
        """-> y_hat (gradient of y), bits of each symbol."""
        if not self.training:
            y_hat, symbol, ln_scale = self.quantise(y, l)
            coded = ln_scale > LN_SCALE_MIN + 1e-6
            return y_hat, torch.where(coded, laplace_bits(symbol, ln_scale), 0.0)
        if self.noise:
            y_hat = y + torch.rand_like(y) - 0.5
            mean, ln_scale = self.predict(y_hat, l)
            noisy, symbol = y_hat - mean, torch.round((y - mean).detach())
        else:
            with torch.no_grad():       # one pass towards the fixed point: what the tokens before will about be
                mean, _ = self.predict(torch.round(y), l)
                known = mean + self.round(y - mean)
            mean, ln_scale = self.predict(y + (known - y).detach(), l)
            symbol = self.round((y - mean).detach())
            y_hat = y + (mean + symbol - y).detach()
            noisy = y - mean + torch.rand_like(y) - 0.5
        slope = laplace_bits(noisy, ln_scale.detach())          # for the encoder and the mean
        return y_hat, laplace_bits(symbol, ln_scale) + (slope - slope.detach())

    def forward(self, x: Tensor, quality: Tensor | None = None) -> dict[str, Any]:
        x = x.permute(0, 2, 3, 1).contiguous()
        l = self.level(quality, x)
        y_hat, each = self.code(self.analyse(x, l), l)
        bits = each.flatten(1).sum(1)
        quality = torch.full_like(l, 50.0) if quality is None else quality.to(l)
        return {"x_hat": self.synthesise(y_hat, l).permute(0, 3, 1, 2), "bits": bits,
                "lambda": self.steer(quality, bits / (x.shape[1] * x.shape[2]))}

    # The start.

    @torch.no_grad()
    def init_klt(self, crops: Tensor) -> None:
        """Start as a linear codec. crops (N, 256, 256, 3) in [0, 1].

        Encoder: principal axes of each scale in turn; decoder: their transposes; blocks are silent at the start. RCM's
        linear predictor by least squares, the scales by maximum likelihood at five rates.
        """
        from linic.models.lalic import principal_axes

        x = crops - 0.5
        corners = torch.cat([x[:, i:i + 64, j:j + 64] for i in (0, 128) for j in (64, 192)])
        d, c = self.decoder, self.config
        axes: list[Tensor] = []
        for step, factor in self.encoder.steps():
            rows = space_to_depth(corners, factor)
            axes.append(principal_axes(rows, step.out_features))
            _put(step, axes[-1])
            corners = step(rows)
        v4, v8, v16, v32 = axes
        ups: list[Any] = list(d.ups)
        _put(d.from32, _transposed(v32, c.width, c.width))
        _put(ups[0], _transposed(v16, c.stem[1], c.pixels[0]))
        _put(ups[1], _transposed(v8, c.stem[0], c.pixels[1]))
        # From 1/4 to 1/2: each of the 4 positions holds 2x2x3 pixels; the columns of v4 count (4, 4, 3).
        pixels = v4.T.reshape(2, 2, 2, 2, 3, -1).permute(0, 2, 1, 3, 4, 5).reshape(4, 12, -1)
        last = torch.zeros(4, c.pixels[2], len(v4))
        last[:, :12] = pixels
        _put(ups[2], last.view(4 * c.pixels[2], -1))
        d.to_pixels.weight.normal_(0, 1e-3)
        d.to_pixels.weight[:, :12] = 0
        d.to_pixels.weight[:, :12, 1, 1] = torch.eye(12)
        assert d.to_pixels.bias is not None
        d.to_pixels.bias.zero_()
        y = torch.cat([self.encoder.linear(part) for part in x.split(16)])
        self.ln_deviation.copy_(torch.log(y.flatten(0, 2).std(0) + 1e-6))
        self._init_rcm(y)

    def _init_rcm(self, y: Tensor) -> None:
        f = self.rcm.features((y / torch.exp(self.ln_deviation)).flatten(1, 2), self.order(y))
        f, wanted = f.flatten(0, 1).double(), (y / torch.exp(self.ln_deviation)).flatten(0, 2).double()
        ridge = 1e-3 * len(f) * torch.eye(f.shape[1], dtype=torch.double, device=f.device)
        self.rcm.linear.weight.copy_(torch.linalg.solve(f.T @ f + ridge, f.T @ wanted).T)
        levels = torch.tensor([-1.2, -0.6, 0.0, 0.6, 1.2], device=y.device)
        fitted = []
        for l in levels:
            each = l.expand(len(y))
            scaled = y * torch.exp(self.at(self.gain_enc, each))
            known = torch.round(scaled)
            for _ in range(4):          # towards the fixed point
                mean, _ = self.predict(known, each)
                known = mean + self.round(scaled - mean)
            mean, _ = self.predict(known, each)
            fitted.append(_best_ln_scale(self.round(scaled - mean).flatten(0, 2)))
        powers = torch.stack([torch.ones_like(levels), levels, levels**2], 1)
        self.prior.copy_(torch.linalg.lstsq(powers, torch.stack(fitted)).solution)


def _best_ln_scale(symbols: Tensor) -> Tensor:
    """Maximum likelihood Laplace scale of each channel. (N, C) -> (C,)"""
    grid = torch.linspace(LN_SCALE_MIN, math.log(6.0), 100, device=symbols.device)
    symbols = symbols[torch.randperm(len(symbols), device="cpu")[:8192].to(symbols.device)]
    bits = torch.stack([laplace_bits(symbols, s.expand_as(symbols)).sum(0) for s in grid])
    return grid[bits.argmin(0)]


def _put(linear: Any, weight: Tensor) -> None:
    linear.weight.normal_(0, 1e-3)
    linear.bias.zero_()
    linear.weight[: weight.shape[0], : weight.shape[1]] = weight


def _transposed(axes: Tensor, used: int, channels: int) -> Tensor:
    """Axes (n, 4 used) of a step down -> weights (4 channels, n) of the step up, to the first `used` channels."""
    out = torch.zeros(4, channels, len(axes), device=axes.device)
    out[:, :used] = axes.T.reshape(4, used, -1)
    return out.view(4 * channels, -1)
