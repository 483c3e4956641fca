"""MRT from a training checkpoint, in floats, with estimated bits: for development, never for reports.

Bits are those of `Mrt.code` in eval mode (exact sequential symbols, no coder) + HEADER bytes. Parts of the model can be
switched off at evaluation (`switched`): what a part earns after the others have got used to it, so an upper bound of
what a model trained without it would lose.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from linic.bench.extreme import Coded, Row
from linic.bench.extreme_report import READ_AT, at_rate
from linic.bench.judge import COLUMNS, Judge
from linic.entropy.rounding import laplace_bits
from linic.errors import UsageError
from linic.models import Mrt, build
from linic.models.mrt import LN_SCALE_MAX, LN_SCALE_MIN, Encoder
from linic.picture import crop, from_array, pad, read, to_array

HEADER = 10
QUALITIES = (0, 25, 33, 50, 58, 75, 100)


def load(path: Path, preset: str | None = None) -> Mrt:
    """A checkpoint of `linic train`; its preset stands in it unless it is named."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path}: not a checkpoint: {error}") from error
    model = build(preset or about.get("preset") or "mrt-xs")
    if not isinstance(model, Mrt):
        raise UsageError(f"{path}: estimates are for MRT, not for {model.config.name}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"{path}: not weights of {model.config.name}: {error}") from error
    return model.eval().requires_grad_(False)


class Estimated:
    """In the place of extreme.Files."""

    estimated = True

    def __init__(self, path: Path, preset: str | None = None):
        self.model = load(path, preset)
        self.name = f"{path.parent.name}/{path.stem}, estimated"
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    @torch.inference_mode()
    def encode(self, image: Image.Image, quality: int) -> Coded:
        started = time.perf_counter()
        x, l, frame = _inputs(self.model, image, quality)
        y_hat, bits = self.model.code(self.model.analyse(x, l, frame), l, frame)
        size = math.ceil(float(bits.sum()) / 8) + HEADER
        return Coded(size, (y_hat, l, frame, image.size, image.mode), time.perf_counter() - started)

    @torch.inference_mode()
    def decode(self, coded: Coded) -> Image.Image:
        y_hat, l, frame, (width, height), mode = coded.content
        x = self.model.synthesise(y_hat, l, frame)[0]
        return from_array(crop((x.float().clamp(0, 1) * 255).round().to(torch.uint8).numpy(), height, width), mode)

    def kept(self, coded: Coded, name: str) -> Coded:
        return coded

    def read(self, name: str) -> None:
        return None


def _inputs(model: Mrt, image: Image.Image, quality: int) -> tuple[Tensor, Tensor, Any]:
    """Pixels, level, frame."""
    x = torch.from_numpy(pad(to_array(image), model.config.multiple))[None].float() / 255
    return x, model.level(torch.tensor([float(quality)]), x), model.frame(x.shape[1], x.shape[2])


# --- parts switched off ----------------------------------------------------------------------------------------------

VARIANTS = ("all", "encoder at its start", "encoder RWKV off", "encoder Transformer off", "decoder RWKV off",
            "decoder Transformer off", "decoder pairs off", "pixel blocks off", "RCM network off", "static prior",
            "linear codec alone")       # all of it at its start, when every network is silent


@contextmanager
def switched(model: Mrt, variant: str, start: Mrt | None = None) -> Iterator[bool]:
    """The model without that part; yields whether that can be: the model has the part, and what it takes is there.
    Static scales are then set by `fit_scales`."""
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        if any(name in held for held in (vars(owner), owner._modules, owner._parameters, owner._buffers)):
            undo.append(partial(setattr, owner, name, getattr(owner, name)))
        else:
            undo.append(partial(delattr, owner, name))
        setattr(owner, name, value)

    there = True
    if variant == "encoder at its start":
        linear = start.encoder.linear if start and isinstance(start.encoder, Encoder) else None
        there = linear is not None
        if linear is not None:
            put(model, "analyse", lambda x, l, frame: linear(x - 0.5) * torch.exp(model.at(model.gain_enc, l, frame)))
    elif variant.endswith(("RWKV off", "Transformer off", "pairs off")):
        net: Any = model.encoder if variant.startswith("encoder") else model.decoder
        there = len(net.pairs) > 0
        for pair in net.pairs:
            if "Transformer" not in variant:
                put(pair, "rwkv", None)
            if "RWKV" not in variant:
                put(pair, "attention", None)
    elif variant == "pixel blocks off":
        put(model.decoder, "stages", nn.ModuleList(nn.ModuleList() for _ in model.decoder.stages))
    elif variant in ("RCM network off", "static prior"):
        there = model.config.tokens == "cells"      # whose channels are alike at every token
        put(model, "predict", Static(model, variant == "RCM network off"))
    elif variant == "linear codec alone":
        there = start is not None
        for held in (start._modules, start._parameters, start._buffers) if start else ():
            for name, value in held.items():
                put(model, name, value)
    elif variant != "all":
        raise UsageError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    try:
        yield there
    finally:
        for back in reversed(undo):
            back()


class Static:
    """In the place of `Mrt.predict`: RCM's linear predictor alone (or a mean of 0), one scale a channel."""

    def __init__(self, model: Mrt, linear: bool):
        self.model, self.linear = model, linear
        self.ln_scale: Tensor | None = None

    def __call__(self, y_hat: Tensor, l: Tensor, frame: Any = None) -> tuple[Tensor, Tensor]:
        m, mean = self.model, torch.zeros_like(y_hat)
        if self.linear:
            unit = torch.exp(m.ln_unit(l, frame))
            known = (y_hat / unit).clamp(-16, 16).flatten(1, 2)
            rcm: Any = m.rcm
            mean = rcm.linear(rcm.features(known, m.order(y_hat, frame))).clamp(-16, 16).view(y_hat.shape) * unit
        scale = m.at(m.prior, l, frame) if self.ln_scale is None else self.ln_scale.view(1, 1, 1, -1)
        return mean, scale.clamp(LN_SCALE_MIN, LN_SCALE_MAX).expand_as(y_hat).contiguous()


def fit_scales(model: Mrt, images: Sequence[Image.Image], quality: int) -> Tensor:
    """The best static scale of each channel on these very pictures at that quality: in the static prior's favour."""
    static: Any = model.predict
    # First with a scale at which every channel is coded.
    static.ln_scale = torch.zeros(model.config.latents)
    symbols = []
    for image in images:
        x, l, frame = _inputs(model, image, quality)
        symbols.append(model.quantise(model.analyse(x, l, frame), l, frame)[1].flatten(0, 2))
    every = torch.cat(symbols)
    grid = torch.linspace(LN_SCALE_MIN, LN_SCALE_MAX, 120)
    bits = torch.stack([laplace_bits(every, s.expand_as(every)).sum(0) for s in grid])
    return grid[bits.argmin(0)]


@torch.inference_mode()
def ablate(checkpoint: Path, pictures: Sequence[Path], judge: Judge, start: Path | None = None,
           qualities: Sequence[int] = QUALITIES, variants: Sequence[str] = VARIANTS,
           say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """-> {"checkpoint", "pictures", "curves": {variant: [means, one a quality]}}"""
    ours = Estimated(checkpoint)
    first = load(start) if start else None
    images = [read(path) for path in pictures]
    originals = [to_array(image) for image in images]
    collected: dict[tuple[str, int], list[Row]] = {}
    static: dict[tuple[str, int], Tensor] = {}
    for variant in variants:
        with switched(ours.model, variant, first) as there:
            for quality in qualities if there and isinstance(ours.model.predict, Static) else ():
                static[variant, quality] = fit_scales(ours.model, images, quality)
    for image, original in zip(images, originals):
        for variant in variants:            # one picture's versions together: see Judge
            with switched(ours.model, variant, first) as there:
                for quality in qualities if there else ():
                    if isinstance(ours.model.predict, Static):
                        ours.model.predict.ln_scale = static[variant, quality]
                    coded = ours.encode(image, quality)
                    row: Row = {"bytes": coded.bytes, "bpp": 8 * coded.bytes / (image.width * image.height)}
                    row |= judge(original, to_array(ours.decode(coded)))
                    collected.setdefault((variant, quality), []).append(row)
        say(f"{len(collected)} points")
    curves: dict[str, list[Row]] = {}
    for (variant, quality), rows in collected.items():
        means = {key: float(np.mean([r[key] for r in rows])) if all(r[key] is not None for r in rows) else None
                 for key in rows[0]}
        curves.setdefault(variant, []).append({"quality": quality, **means})
    return {"checkpoint": ours.name, "identity": ours.identity, "pictures": [p.name for p in pictures],
            "curves": curves}


def table(result: dict[str, Any]) -> str:
    """Markdown: the rate each variant gives, and its curve at equal rates against the whole model's."""
    keys = [c for c in COLUMNS if c.key in ("psnr-rgb", "ms-ssim-rgb", "lpips-alex", "lpips-squeeze")]
    lines = [f"# Parts switched off: {result['checkpoint']}", "",
             f"**ESTIMATED BITS, never for reports.** {len(result['pictures'])} pictures; bits + {HEADER} bytes. A "
             "part is switched off at evaluation, the others were trained with it.", "",
             "| variant | quality | bpp | " + " | ".join(c.heading for c in keys) + " |",
             "|---|" + "---:|" * (2 + len(keys))]
    for variant, points in result["curves"].items():
        for p in points:
            values = " | ".join("-" if p[c.key] is None else format(p[c.key], c.form) for c in keys)
            lines.append(f"| {variant} | {p['quality']} | {p['bpp']:.4f} | {values} |")
    lines += ["", "At equal rate, against all of it (dB; LPIPS(alex), above 0 is worse):", "",
              "| without | " + " | ".join(f"{b:g}: dB | LPIPS" for b in READ_AT) + " |",
              "|---|" + "---:|" * (2 * len(READ_AT))]
    whole = result["curves"].get("all", [])
    for variant, points in result["curves"].items():
        cells = []
        for bpp in READ_AT:
            for key, form in (("psnr-rgb", "+.2f"), ("lpips-alex", "+.4f")):
                a, b = at_rate(points, key, bpp), at_rate(whole, key, bpp)
                cells.append("-" if a is None or b is None else format(a - b, form))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
