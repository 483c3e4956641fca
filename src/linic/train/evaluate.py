"""Rate and quality of a model on validation pictures: hard rounding, estimated bits, PSNR of 8-bit pictures.

No range coder and no header: a file is longer by well under 1 %. For choosing between weights, never for reports.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.bench.perceptual import Measures
from linic.train.loss import bits, extreme, ms_ssim, weigh
from linic.train.recipe import Loss

Row = dict[str, float]


@torch.no_grad()
def one(model: nn.Module, picture: Tensor, quality: float, loss: Loss, measures: Measures | None = None) -> Row:
    """picture (H, W, 3) uint8 on the model's device; mse is that of 8-bit values over 255^2. measures: for a model
    whose recipe has perceptual terms, of which the score holds LPIPS and VGG19n; LPIPS(alex) stands beside it and
    judges."""
    h, w, _ = picture.shape
    multiple: Any = model.config.multiple       # type: ignore[union-attr]
    x = picture.permute(2, 0, 1)[None].float() / 255
    x = F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate").contiguous(memory_format=torch.channels_last)
    out = model(x, torch.tensor([float(quality)], device=x.device))
    got, wanted = (out["x_hat"][:, :, :h, :w].clamp(0, 1) * 255).round(), (x[:, :, :h, :w] * 255).round()
    mse = (got - wanted).square().mean().item() / 65025
    if "bits" in out:
        bpp, row = out["bits"].item() / (h * w), {"quality": quality}
        row |= {"bpp": bpp, "psnr": -10 * math.log10(max(mse, 1e-10)), "loss": extreme(out["lambda"].item(), mse, bpp)}
        if measures and loss.perceptual:
            got, wanted = got / 255, wanted / 255
            row["lpips-alex"] = measures.lpips(got, wanted, "alex").item()
            row["lpips-squeeze"] = measures.lpips(got, wanted, "squeeze").item()
            row["vgg"] = measures.vgg(got, wanted, torch.bfloat16).item()
            row["loss"] += loss.perceptual.lpips * row["lpips-squeeze"] + loss.perceptual.vgg * row["vgg"]
        return row
    z = bits(out["likelihoods"]["z"]).item() / (h * w)
    bpp = bits(out["likelihoods"]["y"]).item() / (h * w) + z
    row = {"quality": quality, "bpp": bpp, "bpp_z": z, "psnr": -10 * math.log10(max(mse, 1e-10))}
    distortion = mse
    if loss.distortion == "ms-ssim":
        row["ms_ssim"] = ms_ssim(got / 255, wanted / 255).item()
        distortion = 1 - row["ms_ssim"]
    return {**row, "loss": float(weigh(loss, quality, distortion, bpp))}


def evaluate(model: nn.Module, pictures: Sequence[Tensor], qualities: Sequence[float], loss: Loss,
             stop: Callable[[], bool] = lambda: False, measures: Measures | None = None) -> list[Row] | None:
    """Means over the pictures, a row per quality. None: `stop` said so. The model comes back in its mode."""
    was_training, rows = model.training, []
    model.eval()
    try:
        for quality in qualities:
            found: list[Row] = []
            for picture in pictures:
                if stop():
                    return None
                found.append(one(model, picture, quality, loss, measures))
            rows.append({key: sum(f[key] for f in found) / len(found) for key in found[0]})
    finally:
        model.train(was_training)
    return rows


def score(rows: Sequence[Row]) -> float:
    """The mean loss of the qualities: what training lowers."""
    return sum(r["loss"] for r in rows) / len(rows)
