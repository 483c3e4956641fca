"""All measures of a decoded picture against its original, under fixed names. Arrays uint8 (H, W, 3).

    judge = Judge(Path("data/weights"))
    judge(original, decoded)   ->   {"psnr-rgb": 22.8, "ms-ssim-rgb": .741, "lpips-alex": .703, ...}; None: not defined

Networks see 8-bit pictures, whole, without padding. What they make of an original is kept until another one comes: go
through a picture's versions together. VGG19n runs in bfloat16 (half the time; differs by .1 % from float32), as in
training; the rest in float32. Without a folder of weights: only what needs none.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linic.bench import metrics, structure
from linic.bench.perceptual import FILES, SMALLEST_SIDE, Measures, Network
from linic.bench.ssimulacra2 import ssimulacra2


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    form: str
    sign: int           # +1: more is better; -1: less; 0: 1 or 0 is best
    in_loss: bool       # MRT may have been trained on it


COLUMNS = (
    Column("psnr-rgb", "PSNR dB", ".2f", 1, True),
    Column("ms-ssim-rgb", "MS-SSIM", ".4f", 1, False),
    Column("ssimulacra2", "SSIMULACRA2", ".1f", 1, False),
    Column("lpips-alex", "LPIPS(alex)", ".4f", -1, False),
    Column("lpips-squeeze", "LPIPS(squeeze)", ".4f", -1, True),
    Column("vgg19n", "VGG19n", ".4f", -1, True),
    *(Column(f"seam{period}-ratio", f"seam {period}", ".3f", 0, False) for period in (256, 32, 16)),
    *(Column(f"ac{lag}-excess", f"lattice {lag}", "+.3f", 0, False) for lag in (16, 8, 4, 2)),
    Column("grad-ratio", "gradients", ".3f", 0, False),
)
KEYS = tuple(c.key for c in COLUMNS)
NETWORKS: dict[str, Network] = {"lpips-alex": "alex", "lpips-squeeze": "squeeze", "vgg19n": "vgg"}
NOTE = ("LPIPS(alex) is LPIPS v0.1 with AlexNet, the measure of the published rows; no model of linic is trained on "
        "it. LPIPS(squeeze), VGG19n and squared error may be in the training loss of MRT: read them as such. "
        "SSIMULACRA2 is far outside its trained range below 0: for order only. Seams, gradients (energy): ratio to the "
        "original's; lattice (autocorrelation of the second difference at so many pixels): difference from it.")
VERSION = 1             # to be raised when a number changes: cached rows are then made again


class Remembering(Measures):
    """Keeps the features of one reference."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.forget()

    def forget(self, reference: Tensor | None = None) -> None:
        self.reference, self.kept = reference, dict[tuple[Network, torch.dtype], list[Tensor]]()

    def taps(self, network: Network, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        if x is not self.reference:
            return super().taps(network, x, dtype)
        if (network, dtype) not in self.kept:
            self.kept[network, dtype] = super().taps(network, x, dtype)
        return self.kept[network, dtype]


class Judge:
    def __init__(self, folder: Path | None = None):
        self.networks = Remembering(folder) if folder else None
        if self.networks:
            for network in NETWORKS.values():
                self.networks.weights(network)      # what is missing shows now
        self._original: np.ndarray | None = None

    @cached_property
    def identity(self) -> str:
        """Of the numbers: same identity, same picture, same numbers."""
        found = hashlib.sha256(f"{VERSION}".encode())
        if self.networks:
            for network in NETWORKS.values():
                for name in FILES[network]:
                    found.update((self.networks.folder / name).read_bytes())
        return found.hexdigest()[:16]

    def __call__(self, original: np.ndarray, decoded: np.ndarray) -> dict[str, float | None]:
        row: dict[str, float | None] = dict.fromkeys(KEYS)
        row["psnr-rgb"] = metrics.psnr(original, decoded)
        row["ms-ssim-rgb"] = metrics.ms_ssim(original, decoded)
        row["ssimulacra2"] = ssimulacra2(original, decoded)
        side = min(original.shape[:2])
        with torch.inference_mode():
            if original is not self._original:
                self._original, self._before = original, _tensor(original)
                self._traces = structure.structure(self._before[0]) if side >= structure.SMALLEST_SIDE else {}
                if self.networks:
                    self.networks.forget(self._before)
            after = _tensor(decoded)
            if self._traces:
                row |= compare(structure.structure(after[0]), self._traces)
            if self.networks and side >= SMALLEST_SIDE:
                row["lpips-alex"] = float(self.networks.lpips(after, self._before, "alex"))
                row["lpips-squeeze"] = float(self.networks.lpips(after, self._before, "squeeze"))
                row["vgg19n"] = float(self.networks.vgg(after, self._before, torch.bfloat16))
        # JSON has no infinity: the PSNR of equal pictures is None.
        return {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}


def compare(decoded: dict[str, float], original: dict[str, float]) -> dict[str, float | None]:
    """Traces over the original's."""
    row: dict[str, float | None] = {}
    for key in KEYS:
        name, _, how = key.partition("-")
        if how == "ratio" and name in decoded:
            row[key] = decoded[name] / original[name] if original[name] else None
        elif how == "excess":
            row[key] = decoded[name] - original[name]
    return row


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
