"""How much faster the engine trains than the same model written plainly, in one run: `linic bench train`.

Plain is what a competent person writes first: float32, eager, a DataLoader whose workers decode and cut the pictures,
Omni-Shift as three depthwise convolutions of the library in its usual layout, BiWKV in linear time in plain torch
(kernels/biwkv/torch_form.py with its own gradients), torch's AdamW. It keeps what costs nothing to write: the model,
its loss, clipping. It has no EMA, and its scale pools are one.

The two take turns, so that what a busy machine does to one, it does to both; medians of the rounds count.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from linic.errors import UsageError
from linic.kernels import native
from linic.models import blocks, build
from linic.train import data, ladder, loop
from linic.train.loss import rate_distortion
from linic.train.machine import settings
from linic.train.ranks import Ranks
from linic.train.recipe import Recipe

NEVER_ENDS = 1 << 40


class PlainShift(nn.Module):
    """Omni-Shift as the papers' code has it in training. (B, H, W, C) -> same."""

    def __init__(self, shift: blocks.OmniShift):
        super().__init__()
        self.alpha = shift.alpha
        self.convs = nn.ModuleList()
        for kernel in (shift.k1, shift.k3, shift.k5):
            size, _, c = kernel.shape
            conv = nn.Conv2d(c, c, size, padding=size // 2, groups=c, bias=False)
            conv.weight = nn.Parameter(kernel.detach().permute(2, 0, 1)[:, None].contiguous())
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        t = x.permute(0, 3, 1, 2).contiguous()
        y = self.alpha[0] * t
        for alpha, conv in zip(self.alpha[1:], self.convs):
            y = y + alpha * conv(t)
        return y.permute(0, 2, 3, 1).contiguous()


def plain(model: nn.Module) -> nn.Module:
    """In place; the same function of the same weights. To be run inside `plain_kernels`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, blocks.OmniShift):
                setattr(module, name, PlainShift(child))
    return model


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Blocks without our kernels, and products in full float32 on a GPU too."""
    seams: Any = blocks
    biwkv, lib, precision = seams.biwkv, native.lib, torch.get_float32_matmul_precision()
    seams.biwkv, native.lib = partial(biwkv, backend="torch"), None     # no library: nothing is fused
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        seams.biwkv, native.lib = biwkv, lib
        torch.set_float32_matmul_precision(precision)


class Pictures(Dataset[Tensor]):
    """Encoded pictures in memory -> random crops (3, size, size) in [0, 1]."""

    def __init__(self, folder: Path, size: int):
        self.size = size
        read = (content for source in data.find_sources(folder) for _, content, _ in source.read())
        self.files = [content for content in read if min(_size(content)) >= size]
        if not self.files:
            raise UsageError(f"{folder}: no picture there is as large as a crop of {size} pixels")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self.files[index])) as image:
            pixels = np.asarray(image.convert("RGB"))
        y, x = (int(torch.randint(n - self.size + 1, ())) for n in pixels.shape[:2])
        crop = torch.from_numpy(pixels[y:y + self.size, x:x + self.size].copy()).permute(2, 0, 1).float() / 255
        return crop.flip(2) if torch.rand(()) < 0.5 else crop


def _size(content: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except Exception:                   # Pillow's plugins raise almost anything on damaged data
        return 0, 0


class PlainTrainer:
    def __init__(self, recipe: Recipe, folder: Path, device: str, workers: int):
        self.recipe, self.device, phase, o = recipe, device, recipe.phases[0], recipe.optimiser
        self.model = plain(build(recipe.model.preset)).to(device).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), o.lr, o.betas, weight_decay=o.weight_decay)
        pictures = Pictures(folder, phase.crop)
        sampler = RandomSampler(pictures, replacement=True, num_samples=NEVER_ENDS)
        self.batches = iter(DataLoader(pictures, phase.batch, sampler=sampler, num_workers=workers,
                                       pin_memory=device.startswith("cuda")))

    def step(self) -> Tensor:
        """-> the loss, on the device."""
        x = next(self.batches).to(self.device, non_blocking=True)
        quality = loop.draw_quality(self.recipe.quality, len(x), self.device)
        loss = rate_distortion(self.model(x, quality), x, quality, self.recipe.loss).loss.mean()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip)
        self.optimiser.step()
        return loss.detach()


@dataclass(frozen=True)
class Comparison:
    """Crops a second, a number a round. `ratio`: median of engine / plain."""

    preset: str
    device: str
    crop: int
    batch: int
    threads: int
    workers: int
    engine_rounds: list[float]
    plain_rounds: list[float]
    engine: float
    plain: float
    ratio: float


def compare(recipe: Recipe, folder: str | Path, *, device: str = "cpu", speed: str = "eager", rounds: int = 5,
            seconds: float = 10.0, threads: int | None = None, workers: int | None = None) -> Comparison:
    """The first phase of a recipe, with fresh weights. `seconds`: of one turn. `workers`: of the plain one's loader; by
    default half of the cores where the CPU also trains, else all, at most 16. Raises UsageError."""
    folder, cores, phase = Path(folder), os.cpu_count() or 1, recipe.phases[0]
    if workers is None:
        workers = max(1, cores // 2) if device == "cpu" else min(cores, 16)
    with tempfile.TemporaryDirectory() as cache, settings(device, threads or torch.get_num_threads(), recipe.seed):
        naive = PlainTrainer(recipe, folder, device, workers)
        next(naive.batches)             # the workers are forked before there is much memory to share
        choice = (ladder.climb(recipe, device, say=loop.say) if speed == "ladder" else ladder.Choice([speed]))
        choice.batch = 1
        crops = data.Crops(data.Library(folder, Path(cache), device), recipe.data, recipe.seed, device)
        ours = loop.start(recipe, build(recipe.model.preset), crops, device, "", None, choice, Ranks())

        def turn(step: Callable[[], Any], least: float) -> float:
            """Crops a second. The first step is not counted: it may find batches that were made in the other's turn."""
            wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
            step()
            wait()
            start, n = time.perf_counter(), 0
            while not n or time.perf_counter() - start < least:
                step()
                n += 1
            wait()
            return n * phase.batch / (time.perf_counter() - start)

        def engine_step() -> None:
            ours.step(0.0)
            ours.queue.clear()

        results: list[tuple[float, float]] = []
        for i in range(rounds + 1):     # the first warms both up
            least = seconds if i else 0.0
            engine = turn(engine_step, least)
            with plain_kernels():
                results.append((engine, turn(naive.step, least)))
        used = torch.get_num_threads()
    engines, plains = (list(column) for column in zip(*results[1:]))
    return Comparison(recipe.model.preset, device, phase.crop, phase.batch, used, workers, engines, plains,
                      statistics.median(engines), statistics.median(plains),
                      statistics.median(e / p for e, p in zip(engines, plains)))


def table(c: Comparison) -> str:
    lines = [f"{c.preset}, crops of {c.crop}, batches of {c.batch}, {c.device}, {c.threads} threads, "
             f"{c.workers} loader processes for the plain one; crops a second, median of {len(c.engine_rounds)} rounds",
             *(f"{name:<7}{median:9.2f}   {min(rounds):.2f} .. {max(rounds):.2f}"
               for name, median, rounds in (("engine", c.engine, c.engine_rounds), ("plain", c.plain, c.plain_rounds))),
             f"ratio  {c.ratio:9.2f}"]
    return "\n".join(lines)
