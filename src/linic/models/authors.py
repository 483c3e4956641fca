"""Checkpoints of the LALIC authors -> our parameters, for preset `lalic-authors`.

Their layout (names and shapes; CompressAI 1.2.6 underneath) is a fact, the mapping is ours. Differences: they keep key,
value and receptance apart, an unused copy of each merged shift, full 5x5 spatial kernels of which 13 taps are masked,
quantiles of z (we take the median, and find ranges by bisection), and aliases of h_a and h_s. The merged shift in a
file may be stale: it is ignored and formed again from its branches.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from linic.errors import WeightsError
from linic.models.checkerboard import TAPS
from linic.models.lalic import Lalic

_TRANSFORM = r"(g_a|g_s|h_a|h_s)\.(?:stages\.(\d+)\.)?(?:resample\.proj|head\.proj|blocks\.(\d+))\.(.*)"
_DENSITY = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}


def _block(rest: str) -> str:
    """spatial.kvr.weight -> the name inside their block (several separated by |)."""
    part, name = rest.split(".", 1)
    mix, norm, gamma = ("att", "ln1", "gamma1") if part == "spatial" else ("ffn", "ln2", "gamma2")
    names = {"gamma": gamma, "norm.weight": f"{norm}.weight", "norm.bias": f"{norm}.bias",
             "w": f"{mix}.decay", "u": f"{mix}.boost", "shift.alpha": f"{mix}.omni_shift.alpha",
             "shift.k1": f"{mix}.omni_shift.conv1x1.weight", "shift.k3": f"{mix}.omni_shift.conv3x3.weight",
             "shift.k5": f"{mix}.omni_shift.conv5x5.weight",
             "kvr.weight": "|".join(f"{mix}.{n}.weight" for n in ("key", "value", "receptance")),
             "kr.weight": f"{mix}.key.weight|{mix}.receptance.weight",
             "out.weight": f"{mix}.output.weight" if part == "spatial" else f"{mix}.value.weight"}
    return names[name]


def their_names(model: Lalic) -> dict[str, list[str]]:
    """Our parameter name -> theirs, several where ours stacks them."""
    depths = model.config.transform.depths
    starts: dict[str, list[int]] = {}  # number of each stage's resampling layer in their Sequential, then the head's
    for net, order in (("g_a", depths), ("g_s", depths[::-1]), ("h_a", model.config.hyper.depths),
                       ("h_s", model.config.hyper.depths)):
        at = [0]
        for depth in order:
            at.append(at[-1] + depth + 1)
        starts[net] = at
    out = {}
    for key in model.state_dict():
        if found := re.match(_TRANSFORM, key):
            net, stage, block, rest = found.groups()
            prefix = f"latent_codec.hyper.{net}" if net[0] == "h" else net
            first = starts[net][int(stage) if stage else -1]
            inner = f"{first}.{rest}" if block is None else None
            names = ([f"{prefix}.{inner}"] if inner else
                     [f"{prefix}.{first + 1 + int(block)}.{n}" for n in _block(rest).split("|")])
        elif found := re.match(r"contexts\.(\d+)\.channel\.(first\.proj|last|blocks\.(\d+))\.(.*)", key):
            k, what, block, rest = found.groups()
            prefix = f"latent_codec.y.channel_context.y{k}"
            names = ([f"{prefix}.{1 + int(block)}.{n}" for n in _block(rest).split("|")] if block is not None else
                     [f"{prefix}.{0 if what == 'first.proj' else model.config.context.depth + 1}.{rest}"])
        elif found := re.match(r"contexts\.(\d+)\.taps\.(.*)", key):
            names = [f"latent_codec.y.latent_codec.y{found[1]}.context_prediction.{found[2]}"]
        elif found := re.match(r"contexts\.(\d+)\.aggregate\.layers\.(\d+)\.(first|norm|kr|out)\.(.*)", key):
            prefix = f"latent_codec.y.latent_codec.y{found[1]}.entropy_parameters.{2 * int(found[2])}"
            inner_names = {"first": ["mix"], "norm": ["norm"], "kr": ["key", "receptance"], "out": ["value"]}[found[3]]
            names = [f"{prefix}.{n}.{found[4]}" for n in inner_names]
        elif found := re.match(r"density\.(matrices|biases|factors)\.(\d+)", key):
            names = [f"latent_codec.hyper.entropy_bottleneck.{_DENSITY[found[1]]}{found[2]}"]
        elif key == "density.median":
            names = ["latent_codec.hyper.entropy_bottleneck.quantiles"]
        else:
            raise WeightsError(f"{key} has no counterpart in the authors' checkpoints: not preset lalic-authors?")
        out[key] = names
    return out


def convert(checkpoint: Mapping[str, Tensor], model: Lalic) -> dict[str, Tensor]:
    """Their state dict -> ours. Raises WeightsError naming what is missing or has another shape."""
    theirs = {}
    for key, value in checkpoint.items():
        key = key.removeprefix("module.")
        key = re.sub(r"entropy_bottleneck\._?(matri|bias|factor)(?:ces|es|s)\.(\d)",
                     lambda m: f"entropy_bottleneck._{m[1]}{'x' if m[1] == 'matri' else ''}{m[2]}", key)
        theirs[key if not key.startswith(("h_a.", "h_s.")) else f"latent_codec.hyper.{key}"] = value
    out = {}
    for ours, names in their_names(model).items():
        try:
            value = torch.cat([theirs[n].float() for n in names]) if len(names) > 1 else theirs[names[0]].float()
        except KeyError as error:
            raise WeightsError(f"the checkpoint has no {error}") from None
        want = model.state_dict()[ours]
        if ours.endswith("taps.weight"):  # (2g, g, 5, 5) -> the 12 taps that are not masked, tap by tap
            value = torch.stack([value[:, :, i + 2, j + 2] for i, j in TAPS], 1)
        elif ".shift.k" in ours:  # (C, 1, n, n) -> (n, n, C)
            value = value[:, 0].permute(1, 2, 0)
        elif ours == "density.median":
            value = value[:, 0, 1]
        if value.numel() != want.numel():
            raise WeightsError(f"{names[0]} has {value.numel()} numbers, {tuple(want.shape)} are needed")
        out[ours] = value.reshape(want.shape).contiguous()
    return out


def their_parameter_count(model: Lalic, merged: bool = False) -> int:
    """Parameters as the authors' module counts them (66,133,045 for lalic-authors); `merged`: with each shift as one
    5x5 kernel instead of its branches and copy (65,415,893)."""
    count = 0
    for name, value in model.state_dict().items():
        channels = value.shape[-1]
        if ".shift." in name:
            if merged:
                count += 25 * channels if name.endswith("k5") else 0
            else:
                count += value.numel() + (25 * channels if name.endswith("k5") else 0)
        elif name.endswith("taps.weight"):
            count += value.numel() // 12 * 25
        elif name == "density.median":
            count += 3 * channels  # quantiles
        else:
            count += value.numel()
    return count
