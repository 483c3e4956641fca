"""Pictures, tars, a clock, and a stand-in model with the interface of linic.models, for fast tests."""

import io
import json
import os
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


def picture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Smooth and random, unlike any other seed's."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, kind)
    return f.getvalue()


def write_tar(path: Path, items: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in items.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def card(origin: str) -> bytes:
    return json.dumps({"source": "a/b", "origin": origin}).encode()


class Tiny(nn.Module):
    """One strided convolution each way; rates under noise as the real models have them."""

    start_crops = 128, 64

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.config = SimpleNamespace(multiple=64, init="klt", variable_rate=True)
        self.down, self.up = nn.Conv2d(3, 8, 16, 16), nn.ConvTranspose2d(8, 3, 16, 16)
        self.ln_scale = nn.Parameter(torch.zeros(2, 8))
        self.register_buffer("started", torch.zeros(1))

    def init_klt(self, crops: Tensor) -> None:
        assert crops.shape[1:] == (64, 64, 3)
        assert crops.min() >= 0 and crops.max() <= 1
        self.started.fill_(len(crops))

    def set_bf16(self, on: bool) -> None:
        self.bf16 = on

    def forward(self, x: Tensor, quality: Tensor) -> dict[str, Any]:
        y = self.down(x - 0.5) * torch.exp(quality / 50)[:, None, None, None]
        y_hat = y + (torch.round(y) - y).detach()
        seen = y + torch.rand_like(y) - 0.5 if self.training else y_hat
        normal = torch.distributions.Normal(0.0, torch.exp(self.ln_scale[0])[None, :, None, None], validate_args=False)
        p = (normal.cdf(seen + 0.5) - normal.cdf(seen - 0.5)).clamp_min(1e-9)
        x_hat = self.up(y_hat / torch.exp(quality / 50)[:, None, None, None]) + 0.5
        return {"x_hat": x_hat, "likelihoods": {"y": p, "z": torch.sigmoid(self.ln_scale[1] + 3).expand(len(x), 8)}}


class Clock:
    """A second a look. `at`: calls by the number of the look."""

    def __init__(self, at: dict[int, Any] | None = None):
        self.looks, self.at = -1, at or {}

    def __call__(self) -> float:
        self.looks += 1
        self.at.get(self.looks, lambda: None)()
        return 1000.0 + self.looks


class FakeTrials:
    """What a ladder's process answers, without a model: rungs that behave as they are called."""

    def __init__(self, *_: Any):
        pass

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        if "default" in job:
            return {"name": "native"}
        if "kernel" in job:
            wrong = job["kernel"] == "biwkv" and job["backend"] == "native"
            return {"error": 0.3 if wrong else 1e-6, "ms": 1.0 if job["backend"] == "native" else 9.0}
        name = job["rung"]
        if name == "raises":
            raise ValueError("no such instruction\nand much more")
        if name == "dies":
            os._exit(17)
        if name == "slow":
            time.sleep(60)
        wrong = "loss of step 1 is 2, 1 by the reference" if name == "wrong" else ""
        rate = {"good": 20.0}.get(name, 10.0) * (1.5 if job["batch"] > 8 else 1)
        return {"wrong": wrong, "rate": 0.0 if wrong else rate, "gb": 0.0, "ready_s": 0.0}
