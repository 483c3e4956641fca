"""Blocks that LALIC and MRT share. Channels last everywhere: [B, H, W, C] contiguous.

Legend: C channels, T = H*W tokens, w decay, u boost, k key, v value, r receptance (gate).
Sources: LALIC (arXiv 2502.05741) sections 3.2-3.3, Vision-RWKV (arXiv 2403.02308) for BiWKV, Restore-RWKV for
Omni-Shift.

A block is *free* (g_a, g_s, h_a: floats, any precision) or *normative* (h_s, contexts: it steers the range coder and
will run in integers). Normative blocks keep, from the first training step, the ranges that the integers have: w in
[0, 8], u in [-3, 3], k in [-4.8, 4.8], gates and values clamped, 16-bit residual stream.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.entropy.rounding import bounded
from linic.kernels import biwkv, dwconv5, mix
from linic.kernels.choice import fusible
from linic.models.config import Style

CROP = 256  # side of the crop whose token count fixes T in free blocks


def space_to_depth(x: Tensor, f: int) -> Tensor:
    """(B, H, W, C) -> (B, H/f, W/f, f*f*C)"""
    b, h, w, c = x.shape
    return x.view(b, h // f, f, w // f, f, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // f, w // f, f * f * c)


def depth_to_space(x: Tensor, f: int) -> Tensor:
    """(B, H, W, f*f*C) -> (B, H*f, W*f, C)"""
    b, h, w, c = x.shape
    return x.view(b, h, w, f, f, c // (f * f)).permute(0, 1, 3, 2, 4, 5).reshape(b, h * f, w * f, c // (f * f))


class Linear(nn.Linear):
    """Linear of a block: operands in bf16 where `bf16` says so, master weights and the residual stream never."""

    bf16: Literal["never", "training", "always"] = "never"

    def in_bf16(self) -> bool:
        return self.bf16 == "always" or (self.bf16 == "training" and self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_bf16():
            bias = None if self.bias is None else self.bias.bfloat16()
            return F.linear(x.bfloat16(), self.weight.bfloat16(), bias)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Projection(Linear):
    """Linear between blocks: it gives back float32 where its operands are bf16."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_bf16():
            return super().forward(x)
        if fusible(x, self.weight):
            return mix.project(x, self.weight, self.bias)
        y = F.linear(x.bfloat16(), self.weight.bfloat16()).float()
        return y if self.bias is None else y + self.bias


class QualityRow(nn.Module):
    """Adds one row per quality: Linear([l, l^2]), zero at the start. l takes 101 values in use: a table at export."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, channels))

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        return x + (torch.stack([l, l * l], 1) @ self.weight)[:, None, None]


class OmniShift(nn.Module):
    """Depthwise identity + 1x1 + 3x3 + 5x5. All are linear, so they are one 5x5 kernel, exactly.

    The kernel is formed once a step in training; `merge()` forms it once for use.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([1.0, 0.3, 0.3, 0.3]))
        self.k1 = nn.Parameter(torch.empty(1, 1, channels).uniform_(-1, 1))
        self.k3 = nn.Parameter(torch.empty(3, 3, channels).uniform_(-1 / 3, 1 / 3))
        self.k5 = nn.Parameter(torch.empty(5, 5, channels).uniform_(-1 / 5, 1 / 5))

    def kernel(self) -> Tensor:
        """(25, C)"""
        identity, one, three, five = self.alpha.unbind()
        inner = F.pad(identity + one * self.k1, (0, 0, 1, 1, 1, 1)) + three * self.k3
        return (F.pad(inner, (0, 0, 1, 1, 1, 1)) + five * self.k5).reshape(25, -1)

    def forward(self, x: Tensor) -> Tensor:
        return dwconv5(x, self.kernel())


class MergedShift(nn.Module):
    """Omni-Shift ready for use: one depthwise 5x5."""

    def __init__(self, shift: OmniShift):
        super().__init__()
        self.weight = nn.Parameter(shift.kernel().detach().clone())

    def kernel(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return dwconv5(x, self.weight)


def merge_shifts(model: nn.Module) -> nn.Module:
    """Replaces every Omni-Shift by its merged form, in place. The result is for use, not for training."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, OmniShift):
                setattr(module, name, MergedShift(child))
    return model


def _norm(norm: nn.LayerNorm, shift: OmniShift | MergedShift | None) -> mix.Norm:
    return mix.Norm(norm.weight, norm.bias, None if shift is None else shift.kernel(), norm.eps)


class SpatialMix(nn.Module):
    """x + Wo(sigmoid(r) * BiWKV(k, v)): every position reads every other, in time linear in T.

    Free blocks decay per token as in a 256x256 crop, whatever the picture's size (`pixels`: side of a token in
    pixels); w/T of the picture costs 1 % of the loss on 768x512 after training on crops. Normative blocks keep w/T:
    the integer budget needs w <= 8 over the whole sequence.
    """

    def __init__(self, channels: int, style: Style, *, normative: bool, shift: bool, pixels: int, column: bool):
        super().__init__()
        self.normative, self.authors, self.column = normative, style.bounds == "authors", column
        self.attention, self.crop_tokens = style.attention, (CROP // pixels) ** 2
        self.norm = nn.LayerNorm(channels)
        self.shift = OmniShift(channels) if shift else None
        keyless = style.attention == "none"
        self.kvr = Linear(channels, (2 if keyless else 3) * channels, bias=False)
        self.out = Linear(channels, channels, bias=False)
        self.gamma = nn.Parameter(torch.ones(channels)) if style.layer_scale else None
        if style.zero_init:
            nn.init.zeros_(self.out.weight)
        if self.attention == "biwkv":
            # -3 .. 3, shuffled. From a list: on the meta device linspace imports sympy, a third of a second.
            order = torch.randperm(channels, device="cpu").tolist()
            spread = torch.tensor([6 * i / max(channels - 1, 1) - 3 for i in order])
            self.w = nn.Parameter(torch.randn(channels) if self.authors else spread)
            self.u = nn.Parameter(torch.randn(channels) if self.authors else torch.zeros(channels))
        self.limits = mix.Limits(4.8, 16, 8) if normative else mix.Limits(10, hard=False)

    def decay(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """w as the operator takes it (divided by T), and u."""
        if self.attention != "biwkv":
            zero = like.new_zeros(like.shape[-1])
            return zero, zero
        if self.authors:
            return self.w / tokens, self.u / tokens
        if self.normative:
            return 8 * torch.sigmoid(self.w) / tokens, 3 * torch.tanh(self.u / 3)
        return 32 * torch.sigmoid(self.w - 1) / self.crop_tokens, 6 * torch.tanh(self.u / 6)

    def attend(self, kvr: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """(B, T, 3C), decay and boost -> sigmoid(r) * BiWKV(k, v), (B, T, C)."""
        *key, v, r = kvr.split(len(w), 2)
        limits = self.limits
        if self.normative and not self.authors:
            v, r = bounded(v, -limits.v, limits.v), bounded(r, -limits.r, limits.r)
        wkv = v
        for k in key:  # one, but in the ablation without attention
            if not self.authors:
                k = bounded(k, -limits.k, limits.k) if limits.hard else limits.k * torch.tanh(k / limits.k)
            wkv = biwkv(w, u, k, v)
        return torch.sigmoid(r) * wkv

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        decay = self.decay(h * w, x)
        special = self.authors or self.column or self.attention != "biwkv" or self.gamma is not None
        if not special and fusible(x, self.kvr.weight):
            weights = _norm(self.norm, self.shift), self.kvr.weight, self.out.weight
            return mix.spatial_mix(x, *weights, *decay, self.limits, self.kvr.in_bf16(), self.attend)
        s = self.norm(x)
        if self.shift is not None:
            s = self.shift(s)
        if self.column:
            s = s.transpose(1, 2)
        y = self.out(self.attend(self.kvr(s.reshape(b, h * w, c)).to(x.dtype), *decay))  # B, T, C
        y = y.view(b, w, h, c).transpose(1, 2) if self.column else y.view(b, h, w, c)
        return x + (y if self.gamma is None else self.gamma * y)


class ChannelMix(nn.Module):
    """x + sigmoid(r) * Wv(relu(k)^2): squared-ReLU MLP with a gate, on shifted features."""

    def __init__(self, channels: int, hidden: int, style: Style, *, normative: bool, shift: bool):
        super().__init__()
        clamped = normative and style.bounds == "linic"
        self.limits = mix.Limits(16, r=8) if clamped else mix.Limits()
        self.norm = nn.LayerNorm(channels)
        self.shift = OmniShift(channels) if shift else None
        self.kr = Linear(channels, (hidden + 1) * channels, bias=False)  # [hidden | gate] in one product
        self.out = Linear(hidden * channels, channels, bias=False)
        self.gamma = nn.Parameter(torch.ones(channels)) if style.layer_scale else None
        if style.zero_init:
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        limits = self.limits
        if self.gamma is None and fusible(x, self.kr.weight):
            weights = _norm(self.norm, self.shift), self.kr.weight, self.out.weight
            return mix.channel_mix(x, *weights, limits, self.kr.in_bf16())
        s = self.norm(x)
        if self.shift is not None:
            s = self.shift(s)
        k, r = self.kr(s).split((self.out.in_features, self.out.out_features), 3)
        k = torch.relu(k)
        if limits.k < math.inf:
            k, r = k.clamp(max=limits.k), bounded(r, -limits.r, limits.r)
        y = torch.sigmoid(r) * self.out(k * k)
        return x + (y if self.gamma is None else self.gamma * y)


class Block(nn.Module):
    """Bi-RWKV block: Spatial Mix (where `spatial`), Channel Mix. (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int, style: Style, *, normative: bool = False, shift: bool = True,
                 spatial: bool = True, pixels: int = 16, index: int = 0):
        super().__init__()
        shift = shift and style.shift
        column = style.scan == "column" or (style.scan == "alternating" and index % 2 == 1)
        self.clamped = normative and style.bounds == "linic"
        self.spatial = SpatialMix(channels, style, normative=normative, shift=shift, pixels=pixels,
                                  column=column) if spatial else None
        self.channel = ChannelMix(channels, hidden, style, normative=normative, shift=shift)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial is not None:
            x = self.spatial(x)
        x = self.channel(x)
        return x.clamp(-64, 64) if self.clamped else x  # the 16-bit residual stream in steps of 1/512


class Down(nn.Module):
    """Down-sampling by `factor`: space-to-depth + Linear (kernel 1), or a strided convolution."""

    def __init__(self, inputs: int, outputs: int, factor: int, kernel: int):
        super().__init__()
        self.factor, self.linear = factor, kernel == 1
        self.proj: nn.Module = (Projection(inputs * factor * factor, outputs) if self.linear
                                else nn.Conv2d(inputs, outputs, kernel, factor, kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            return self.proj(space_to_depth(x, self.factor) if self.factor > 1 else x)
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Up(nn.Module):
    """Up-sampling by `factor`: Linear + depth-to-space (kernel 1), or a transposed convolution."""

    def __init__(self, inputs: int, outputs: int, factor: int, kernel: int):
        super().__init__()
        self.factor, self.linear = factor, kernel == 1
        self.proj: nn.Module = (Projection(inputs, outputs * factor * factor) if self.linear else
                                nn.ConvTranspose2d(inputs, outputs, kernel, factor, kernel // 2, factor - 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            return depth_to_space(self.proj(x), self.factor) if self.factor > 1 else self.proj(x)
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
