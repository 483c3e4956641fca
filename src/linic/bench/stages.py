"""Where the time of encoding and decoding goes: one picture, stage by stage, the best of several runs.

A preset without weights is timed with fresh ones: its networks cost what trained ones cost, its symbols mean nothing.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from linic import codec, container, picture, weights
from linic.entropy.operators import Ints
from linic.entropy.walk import walk
from linic.models import build
from linic.rangecoder import Decoder, Encoder

QUALITY = 50


class Timed:
    """A coder that counts its own seconds."""

    def __init__(self, coder: Any):
        self.coder, self.seconds = coder, 0.0

    def code(self, index: Ints, symbols: Ints | None) -> Ints:
        start = time.perf_counter()
        found: Ints = self.coder.code(index, symbols)
        self.seconds += time.perf_counter() - start
        return found


def run(path: Path, model: str | None = "lalic-xs", preset: str | None = None, device: str = "cpu",
        repeats: int = 5) -> dict[str, Any]:
    """-> {"encode": {stage: ms}, "decode": {stage: ms}, ...}. Raises UsageError, PictureError, ModelMissing."""
    with tempfile.TemporaryDirectory() as folder:
        name = model or ""
        if preset:
            torch.manual_seed(0)
            name = str(Path(folder) / f"{preset}.safetensors")
            weights.save(name, build(preset).eval(), {})
        ready = codec.Codec(name if preset else str(weights.find(name)), device)
    with Image.open(path) as file:
        image = file.convert("RGB")
        rows = [_once(ready, image) for _ in range(repeats + 1)]
    return {"model": preset or model, "weights": "fresh" if preset else "trained", "size": list(image.size),
            "device": device, "threads": torch.get_num_threads(), "quality": QUALITY,
            "arithmetic": container.ARITHMETICS[container.INTEGERS if ready.program else container.FLOAT64],
            "carriers": {str(k): v[0] for k, v in ready.program.carriers.items()} if ready.program else {},
            **{way: {stage: min(row[way][stage] for row in rows) for stage in rows[0][way]}
               for way in ("encode", "decode")}}


def _once(ready: codec.Codec, image: Image.Image) -> dict[str, dict[str, float]]:
    spent: dict[str, dict[str, float]] = {"encode": {}, "decode": {}}

    def timed(way: str, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[way][stage] = 1000 * (time.perf_counter() - start)
        return result

    with torch.inference_mode():
        pixels = timed("encode", "picture to array", lambda: picture.pad(picture.to_array(image), 64))
        z, y_q8 = timed("encode", "analysis (g_a, h_a)", lambda: ready.latents(pixels, QUALITY))
        size, encoder = (z.shape[0], z.shape[1]), Timed(Encoder(ready.tables))
        timed("encode", "entropy networks", lambda: walk(ready._plan(QUALITY, size, z, y_q8), encoder))
        payload = timed("encode", "range coder", encoder.coder.finish)
        decoder = Timed(Decoder(ready.tables, payload))
        y_hat = timed("decode", "entropy networks", lambda: walk(ready._plan(QUALITY, size), decoder))
        spent["decode"]["range coder"] = 0.0
        for way, coder in (("encode", encoder), ("decode", decoder)):
            spent[way]["range coder"] += 1000 * coder.seconds
            spent[way]["entropy networks"] -= 1000 * coder.seconds
        level = ready._level(QUALITY).float()
        x = timed("decode", "synthesis (g_s)", lambda: ready.model.synthesise(
            torch.from_numpy(y_hat).to(ready.device)[None].float() / 256, level)[0])
        timed("decode", "array to picture", lambda: picture.from_array(picture.crop(
            torch.round(x.float().clamp(0, 1) * 255).to(torch.uint8).cpu().numpy(), image.height, image.width), "RGB"))
    assert np.isfinite(list(spent["decode"].values())).all()
    for stages in spent.values():
        stages["in all"] = sum(stages.values())
    return spent


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    carriers = ", ".join(f"{bits}-bit weights: {name}" for bits, name in result["carriers"].items())
    lines = [f"{result['model']} ({result['weights']} weights), {result['size'][0]}x{result['size'][1]}, "
             f"{result['device']}, {result['threads']} threads, {result['arithmetic']} {carriers}", ""]
    for way in ("encode", "decode"):
        lines += [f"| {way} | ms |", "|---|---|", *(f"| {k} | {v:.1f} |" for k, v in result[way].items()), ""]
    return "\n".join(lines)
