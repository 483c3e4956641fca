"""Distances of pictures by the features of frozen networks. (B, 3, H, W), RGB in [0, 1]; b is the reference.

    lpips(a, b)      (B,)      LPIPS v0.1 with AlexNet as published, or with SqueezeNet; 0 = equal, at most about 1
    vgg(a, b)        (B,)      VGG19n: squared distance of unit features, mean of relu1_1, 1_2, 2_1, 2_2, 3_1
    inception(x)     (B, 768)  Mixed_6e of Inception v3 (2015), mean over positions; `frechet` compares two sets

Differentiable in a; none in b or the weights. `dtype` is that of the networks, distances are summed in float32.
VGG19n and the Frechet distance of `inception` are our own yardsticks. The latter is NOT FID, which takes 2048 features
of a later layer and tens of thousands of pictures: compare its values only at equal counts and patch sizes.

Nothing is shipped: the weights (FILES) lie in a folder that the caller or LINIC_MEASURES names. The README beside them
says where they come from. Sources: Zhang et al. 2018 (arXiv 1801.03924) and richzhang/PerceptualSimilarity; Gatys et
al. 2016 for the VGG whose channels are scaled to unit mean; Heusel et al. 2017 (arXiv 1706.08500) for the distance of
two normal distributions. Raises UsageError for a missing folder or file, and for pictures that do not fit.
"""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from linic.errors import UsageError

Network = Literal["alex", "squeeze", "vgg", "inception"]
Weights = dict[str, Tensor]

FILES: dict[Network, tuple[str, ...]] = {
    "alex": ("alexnet_features.safetensors", "lpips_v0.1_alex.safetensors"),
    "squeeze": ("squeezenet1_1.safetensors", "lpips_v0.1_squeeze.safetensors"),
    "vgg": ("vgg19_normalised_relu3_1.safetensors",),
    "inception": ("inception_v3_2015_stem_to_5d.safetensors", "inception_v3_2015_6a_to_6e.safetensors"),
}
SMALLEST_SIDE = 32                      # below 31, AlexNet's second pooling has nothing left
LPIPS_MEAN = (-0.030, -0.088, -0.188)
LPIPS_DEVIATION = (0.458, 0.448, 0.450)


class Measures:
    """The networks of one folder on one device. A file is read when first needed, once in a process."""

    def __init__(self, folder: Path | None = None, device: torch.device | str = "cpu"):
        named = folder or os.environ.get("LINIC_MEASURES")
        if not named or not Path(named).is_dir():
            raise UsageError(f"weights of the measures: {f'{named} is no folder' if named else 'no folder is named'}. "
                             f"Pass one, or set LINIC_MEASURES, with {', '.join(sum(FILES.values(), ()))}")
        self.folder, self.device = Path(named), torch.device(device)

    def weights(self, network: Network, dtype: torch.dtype = torch.float32) -> Weights:
        """To call before a long run: what is missing shows now."""
        if missing := [name for name in FILES[network] if not (self.folder / name).is_file()]:
            raise UsageError(f"{self.folder}: {network} needs {' and '.join(missing)}, missing there")
        return _load(self.folder.resolve(), network, self.device, dtype)

    def taps(self, network: Network, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Activations of a network for x in [0, 1]: AlexNet 5, SqueezeNet 7, VGG 5, Inception 1."""
        x = x.float()
        if network in ("alex", "squeeze"):
            mean, deviation = (x.new_tensor(v).view(3, 1, 1) for v in (LPIPS_MEAN, LPIPS_DEVIATION))
            x = (2 * x - 1 - mean) / deviation
        elif network == "inception":
            x = 2 * x - 1
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        # The caller has chosen the dtype: no autocast, and float32 is not TF32.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.autocast(x.device.type, enabled=False), exact if dtype == torch.float32 else nullcontext():
            return TAPS[network](self.weights(network, dtype), x)

    def pairs(self, network: Network, a: Tensor, b: Tensor,
              dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        """The taps of both, float32."""
        _check(a, b)
        with torch.no_grad():
            of_b = self.taps(network, b, dtype)
        return [(f.float(), g.float()) for f, g in zip(self.taps(network, a, dtype), of_b)]

    def lpips(self, a: Tensor, b: Tensor, net: Literal["alex", "squeeze"] = "alex",
              dtype: torch.dtype = torch.float32) -> Tensor:
        def unit(f: Tensor) -> Tensor:
            # vector_norm: its gradient at a position without any activation is 0; that of sqrt(sum) is nan.
            return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)

        heads = self.weights(net)
        return torch.stack([((unit(f) - unit(g)).square() * heads[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
                            for i, (f, g) in enumerate(self.pairs(net, a, b, dtype))]).sum(0)

    def vgg(self, a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return unit_distance(self.pairs("vgg", a, b, dtype))

    @torch.no_grad()
    def inception(self, x: Tensor) -> Tensor:
        """`x`: patches of one size, which is changed to the network's 299 px without a filter, as for FID."""
        x = F.interpolate(x.float(), size=(299, 299), mode="bilinear", align_corners=False)
        return self.taps("inception", x)[0].mean((2, 3))


def unit_distance(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """VGG19n of taps."""
    def unit(f: Tensor) -> Tensor:
        return f / (f.square().sum(1, keepdim=True) + 1e-6).sqrt()

    return torch.stack([(unit(f) - unit(g)).square().sum(1).mean((1, 2)) for f, g in pairs]).mean(0)


def patches(picture: Tensor, side: int = 256, offset: int = 0) -> Tensor:
    """(3, H, W) -> (N, 3, side, side) side by side from (offset, offset); what is left at the end is dropped."""
    rows = picture[:, offset:, offset:].unfold(1, side, side).unfold(2, side, side)     # (3, n, m, side, side)
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Of two sets of features (N, C), (M, C), each taken as normal: |m - n|^2 + tr(A + B - 2 sqrt(AB)), means m, n."""
    def moments(f: Tensor) -> tuple[Tensor, Tensor]:
        mean = f.double().mean(0)
        return mean, torch.linalg.qr((f.double() - mean) / math.sqrt(len(f) - 1), mode="r").R     # covariance = R^T R

    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise UsageError(f"two sets of at least two features are needed, not {tuple(a.shape)} and {tuple(b.shape)}")
    (m, r), (n, s) = moments(a), moments(b)
    # tr sqrt(R^T R S^T S) = sum of the singular values of R S^T: no square root of a singular matrix is needed.
    common = torch.linalg.svdvals(r @ s.mT).sum()
    return float((m - n).square().sum() + r.square().sum() + s.square().sum() - 2 * common)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or min(a.shape[2:]) < SMALLEST_SIDE:
        raise UsageError(f"two batches (B, 3, H, W) of one shape, sides from {SMALLEST_SIDE}, are needed, "
                         f"not {tuple(a.shape)} and {tuple(b.shape)}")


@cache
def _load(folder: Path, network: Network, device: torch.device, dtype: torch.dtype) -> Weights:
    found: Weights = {}
    with torch.inference_mode(False):                   # kept for later calls, which may need a gradient in x
        for name in FILES[network]:
            try:
                tensors = load_file(folder / name)
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{folder / name}: cannot be read: {error}") from error
            for key, t in tensors.items():
                layout = torch.channels_last if t.dim() == 4 else torch.preserve_format
                found[key] = t.to(device, dtype, memory_format=layout)
    return found


def _conv(w: Weights, name: str, x: Tensor, stride: int = 1, padding: int | str = "same") -> Tensor:
    return F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding))


def _alex(w: Weights, x: Tensor) -> list[Tensor]:
    taps = [_conv(w, "features.0", x, 4, 2)]
    for layer in (3, 6, 8, 10):
        x = F.max_pool2d(taps[-1], 3, 2) if layer in (3, 6) else taps[-1]
        taps.append(_conv(w, f"features.{layer}", x))
    return taps                                             # 64, 192, 384, 256, 256 channels


def _squeeze(w: Weights, x: Tensor) -> list[Tensor]:
    taps = [_conv(w, "features.0", x, 2, 0)]
    for fires in ((3, 4), (6, 7), (9,), (10,), (11,), (12,)):
        x = F.max_pool2d(taps[-1], 3, 2, ceil_mode=True) if fires[0] in (3, 6, 9) else taps[-1]
        for layer in fires:
            thin = _conv(w, f"features.{layer}.squeeze", x)
            x = torch.cat([_conv(w, f"features.{layer}.{wide}", thin) for wide in ("expand1x1", "expand3x3")], 1)
        taps.append(x)
    return taps                                             # 64, 128, 256, 384, 384, 512, 512 channels


def _vgg(w: Weights, x: Tensor) -> list[Tensor]:
    x = F.conv2d(x, w["preprocess.weight"], w["preprocess.bias"])       # to BGR, 0..255, mean removed
    taps = []
    for name in ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1"):
        x = F.max_pool2d(x, 2) if name in ("conv2_1", "conv3_1") else x
        taps.append(x := _conv(w, name, x))
    return taps                                             # 64, 64, 128, 128, 256 channels


def _inception(w: Weights, x: Tensor) -> list[Tensor]:
    def chain(x: Tensor, prefix: str, count: int, **last: int) -> Tensor:
        for i in range(1, count):
            x = _conv(w, f"{prefix}_{i}.conv", x)
        return _conv(w, f"{prefix}_{count}.conv" if count > 1 else f"{prefix}.conv", x, **last)

    def mixed(x: Tensor, name: str, middle: str, double: str, convolutions: int) -> Tensor:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([chain(x, f"{name}.branch1x1", 1), chain(x, f"{name}.{middle}", convolutions // 2 + 1),
                          chain(x, f"{name}.{double}", convolutions), chain(pooled, f"{name}.branch_pool", 1)], 1)

    x = _conv(w, "Conv2d_1a_3x3.conv", x, 2, 0)
    x = _conv(w, "Conv2d_2a_3x3.conv", x, 1, 0)
    x = F.max_pool2d(_conv(w, "Conv2d_2b_3x3.conv", x), 3, 2)
    x = _conv(w, "Conv2d_3b_1x1.conv", x)
    x = F.max_pool2d(_conv(w, "Conv2d_4a_3x3.conv", x, 1, 0), 3, 2)                     # (B, 192, 35, 35)
    for letter in "bcd":
        x = mixed(x, f"Mixed_5{letter}", "branch5x5", "branch3x3dbl", 3)                # (B, 288, 35, 35)
    x = torch.cat([chain(x, "Mixed_6a.branch3x3", 1, stride=2, padding=0),
                   chain(x, "Mixed_6a.branch3x3dbl", 3, stride=2, padding=0), F.max_pool2d(x, 3, 2)], 1)
    for letter in "bcde":
        x = mixed(x, f"Mixed_6{letter}", "branch7x7", "branch7x7dbl", 5)                # (B, 768, 17, 17)
    return [x]


TAPS: dict[Network, Callable[[Weights, Tensor], list[Tensor]]] = {
    "alex": _alex, "squeeze": _squeeze, "vgg": _vgg, "inception": _inception}
