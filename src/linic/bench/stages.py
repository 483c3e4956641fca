"""Where the time of encoding and decoding goes: one picture, stage by stage, the best of several runs.

A preset without weights is timed with fresh ones: its networks cost what trained ones cost, its symbols mean nothing.
`sizes` does so for several sizes of one picture, each in a process of its own, whose peak memory is then that size's.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
SIZES = ((512, 384), (768, 512), (1536, 1024), (2048, 1365))


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
        repeats: int = 5, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """-> {"encode": {stage: ms}, "decode": {stage: ms}, "memory": {"loaded", "encode", "decode": MiB}, ...}. size: the
    picture is scaled to it. Memory: peaks of the whole process, where the system tells; meaningful in a fresh one.
    Raises UsageError, PictureError, ModelMissing."""
    with tempfile.TemporaryDirectory() as folder:
        name = model or ""
        if preset:
            torch.manual_seed(0)
            name = str(Path(folder) / f"{preset}.safetensors")
            weights.save(name, build(preset).eval(), {})
        ready = codec.Codec(name if preset else str(weights.find(name)), device)
    with Image.open(path) as file:
        image = file.convert("RGB")
    image = image.resize(size, Image.Resampling.LANCZOS) if size else image
    memory: dict[str, float | None] = {"loaded": _peak()}
    rows = [_once(ready, image, memory) for _ in range(repeats + 1)]
    return {"model": preset or model, "weights": "fresh" if preset else "trained", "size": list(image.size),
            "device": device, "threads": torch.get_num_threads(), "quality": QUALITY,
            "arithmetic": container.ARITHMETICS[container.INTEGERS if ready.program else container.FLOAT64],
            "carriers": {str(k): v[0] for k, v in ready.program.carriers.items()} if ready.program else {},
            "memory": memory,
            **{way: {stage: min(row[way][stage] for row in rows) for stage in rows[0][way]}
               for way in ("encode", "decode")}}


def sizes(path: Path, wanted: Sequence[tuple[int, int]] = SIZES, model: str | None = "lalic-xs",
          preset: str | None = None, device: str = "cpu", repeats: int = 2) -> list[dict[str, Any]]:
    """`run` at each size."""
    results = []
    for size in wanted:
        # One worker a size: spawned, so that nothing of this process counts.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            results.append(pool.submit(_run_alone, path, model, preset, device, repeats, size,
                                       torch.get_num_threads()).result())
    return results


def _run_alone(path: Path, model: str | None, preset: str | None, device: str, repeats: int, size: tuple[int, int],
               threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return run(path, model, preset, device, repeats, size)


def _peak() -> float | None:
    """MiB of this process at most since the last call; None where the system does not tell (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        Path("/proc/self/clear_refs").write_text("5")       # the peak starts again from now
    except OSError:
        return None
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else None


def _once(ready: codec.Codec, image: Image.Image, memory: dict[str, float | None]) -> dict[str, dict[str, float]]:
    spent: dict[str, dict[str, float]] = {"encode": {}, "decode": {}}

    def timed(way: str, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[way][stage] = 1000 * (time.perf_counter() - start)
        return result

    with torch.inference_mode():
        pixels = timed("encode", "picture to array", lambda: picture.pad(picture.to_array(image), ready.side))
        z, y_q8 = timed("encode", "analysis", lambda: ready.latents(pixels, QUALITY))
        size, encoder = (pixels.shape[0] // ready.side, pixels.shape[1] // ready.side), Timed(Encoder(ready.tables))
        timed("encode", "entropy networks", lambda: walk(ready._plan(QUALITY, size, z, y_q8), encoder))
        payload = timed("encode", "range coder", encoder.coder.finish)
        memory["encode"] = _most(memory.get("encode"), _peak())
        decoder = Timed(Decoder(ready.tables, payload))
        y_hat = timed("decode", "entropy networks", lambda: walk(ready._plan(QUALITY, size), decoder))
        spent["decode"]["range coder"] = 0.0
        for way, coder in (("encode", encoder), ("decode", decoder)):
            spent[way]["range coder"] += 1000 * coder.seconds
            spent[way]["entropy networks"] -= 1000 * coder.seconds
        level = ready._level(QUALITY).float()
        x = timed("decode", "synthesis", lambda: ready.model.synthesise(
            torch.from_numpy(y_hat).to(ready.device)[None].float() / 256, level)[0])
        timed("decode", "array to picture", lambda: picture.from_array(picture.crop(
            torch.round(x.float().clamp(0, 1) * 255).to(torch.uint8).cpu().numpy(), image.height, image.width), "RGB"))
        memory["decode"] = _most(memory.get("decode"), _peak())
    assert np.isfinite(list(spent["decode"].values())).all()
    for stages in spent.values():
        stages["in all"] = sum(stages.values())
    return spent


def _most(a: float | None, b: float | None) -> float | None:
    return max(a, b) if a is not None and b is not None else b


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    carriers = ", ".join(f"{bits}-bit weights: {name}" for bits, name in result["carriers"].items())
    lines = [f"{result['model']} ({result['weights']} weights), {result['size'][0]}x{result['size'][1]}, "
             f"{result['device']}, {result['threads']} threads, {result['arithmetic']} {carriers}", ""]
    for way in ("encode", "decode"):
        lines += [f"| {way} | ms |", "|---|---|", *(f"| {k} | {v:.1f} |" for k, v in result[way].items()), ""]
    return "\n".join(lines)


def size_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a size; `power` p where time grows as pixels^p from one size to the next: 1 is linear."""
    first = results[0]
    lines = [f"{first['model']} ({first['weights']} weights), {first['device']}, {first['threads']} threads, "
             f"{first['arithmetic']}; ms; peak MiB of the process ({_mib(first['memory'].get('loaded'))} loaded)", ""]
    columns = [(way, stage) for way in ("encode", "decode") for stage in first[way]]
    lines += ["| size | " + " | ".join(f"{way}: {stage}" for way, stage in columns)
              + " | encode MiB | decode MiB | decode ms a megapixel | power |",
              "|---|" + "---:|" * (len(columns) + 4)]
    for i, result in enumerate(results):
        pixels, decode = math.prod(result["size"]), result["decode"]["in all"]
        before = results[i - 1]
        power = "" if not i else format(math.log(decode / before["decode"]["in all"])
                                        / math.log(pixels / math.prod(before["size"])), ".2f")
        lines.append(f"| {result['size'][0]}x{result['size'][1]} | "
                     + " | ".join(f"{result[way][stage]:.1f}" for way, stage in columns)
                     + f" | {_mib(result['memory'].get('encode'))} | {_mib(result['memory'].get('decode'))}"
                     + f" | {1e6 * decode / pixels:.0f} | {power} |")
    return "\n".join(lines)


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
