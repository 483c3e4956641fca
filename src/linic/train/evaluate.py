"""Rate and quality of a model on validation pictures: hard rounding, estimated bits, PSNR of 8-bit pictures.

No range coder and no header: a file is longer by well under 1 %. For choosing between weights, never for reports.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linic.models.lalic import quality_to_lambda
from linic.train.loss import bits, weigh

Row = dict[str, float]


@torch.no_grad()
def one(model: nn.Module, picture: Tensor, quality: float) -> tuple[float, float, float]:
    """picture (H, W, 3) uint8 on the model's device -> mse of 8-bit values over 255^2, bpp, bpp of z."""
    h, w, _ = picture.shape
    multiple: Any = model.config.multiple       # type: ignore[union-attr]
    x = picture.permute(2, 0, 1)[None].float() / 255
    x = F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate").contiguous(memory_format=torch.channels_last)
    out = model(x, torch.tensor([float(quality)], device=x.device))
    got = (out["x_hat"][0, :, :h, :w].clamp(0, 1) * 255).round()
    mse = (got - x[0, :, :h, :w] * 255).square().mean().item() / 65025
    z = bits(out["likelihoods"]["z"]).item() / (h * w)
    return mse, bits(out["likelihoods"]["y"]).item() / (h * w) + z, z


def evaluate(model: nn.Module, pictures: Sequence[Tensor], qualities: Sequence[float], exponent: float,
             stop: Callable[[], bool] = lambda: False) -> list[Row] | None:
    """Means over the pictures, a row per quality. None: `stop` said so. The model comes back in its mode."""
    was_training, rows = model.training, []
    model.eval()
    try:
        for quality in qualities:
            found: list[Row] = []
            for picture in pictures:
                if stop():
                    return None
                mse, bpp, z = one(model, picture, quality)
                psnr = -10 * torch.log10(torch.tensor(max(mse, 1e-10))).item()
                loss = weigh(quality_to_lambda(quality), mse, bpp, exponent)
                found.append({"quality": quality, "bpp": bpp, "bpp_z": z, "psnr": psnr, "loss": float(loss)})
            rows.append({key: sum(f[key] for f in found) / len(found) for key in found[0]})
    finally:
        model.train(was_training)
    return rows


def score(rows: Sequence[Row]) -> float:
    """The mean loss of the qualities: what training lowers."""
    return sum(r["loss"] for r in rows) / len(rows)
