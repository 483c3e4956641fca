"""A folder of pictures through the codec, by whole files: encode -> file -> decode -> measures.

Nothing is estimated: bpp is 8 x bytes of the file on disk / pixels, and the decoder sees only that file. Times are
wall seconds of encode() and decode() with the model loaded and warm, file access left out. The result is CompressAI's
JSON schema with more beside it: {"name", "description", "results": {"psnr-rgb": [one entry a quality], ...},
"per_image": [...], "machine": {...}, "command": "..."}. Raises UsageError, PictureError and what the codec raises.
"""
import itertools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from linic.bench import metrics
from linic.bench.judge import KEYS, Judge
from linic.errors import UsageError
from linic.picture import read, to_array

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
MEASURES = ("psnr-rgb", "ms-ssim-rgb", "bpp", "bpp_payload", "encoding_time", "decoding_time")

Row = dict[str, Any]
AnyPath = str | os.PathLike[str]


def pictures_in(folder: AnyPath) -> list[Path]:
    """The pictures of a folder by name, without those below it; or the one picture named."""
    path = Path(folder)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f"{folder}: no pictures in it ({' '.join(sorted(SUFFIXES))})")
    return found


def tiles(paths: Sequence[Path], width: int, height: int, folder: Path) -> list[Path]:
    """The pictures cut into whole tiles, as PNGs in `folder`: what does not fill one is left out, evenly on both sides.
    A picture smaller than a tile stays as it is."""
    cut = []
    for path in paths:
        image = read(path)
        columns, rows = image.width // width, image.height // height
        left, top = (image.width - columns * width) // 2, (image.height - rows * height) // 2
        for y, x in itertools.product(range(rows), range(columns)):
            tile = folder / f"{path.name}-{y}-{x}.png"
            corner = left + x * width, top + y * height
            image.crop((*corner, corner[0] + width, corner[1] + height)).save(tile)
            cut.append(tile)
        if not (rows and columns):
            cut.append(path)
    return cut


def evaluate(pictures: AnyPath | Iterable[AnyPath], qualities: Sequence[int], *, model: str = "lalic-xs",
             device: str = "auto", keep: AnyPath | None = None, command: str = "",
             progress: Callable[[Row], None] | None = None, judge: Judge | None = None) -> dict[str, Any]:
    """pictures: a folder, or the files themselves. keep: a folder that receives every .linic file. judge: brings the
    measures of judge.py."""
    names = pictures_in(pictures) if isinstance(pictures, (str, os.PathLike)) else [Path(p) for p in pictures]
    if not names or not qualities:
        raise UsageError("at least one picture and one quality are needed")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _warm_up(names[0], qualities[0], model, device)
        for path in names:
            for quality in qualities:
                row = measure(path, quality, folder / f"{path.name}-q{quality:03d}.linic", model, device, judge)
                rows.append(row)
                if progress:
                    progress(row)
    measured = [*MEASURES, *(key for key in KEYS if judge and key not in MEASURES)]
    results = {"quality": list(qualities), **{key: means(rows, key, qualities) for key in measured}}
    for row in rows:
        # JSON has no infinity: the PSNR of a picture that came back unchanged is null.
        row["psnr-rgb"] = row["psnr-rgb"] if math.isfinite(row["psnr-rgb"] or 0) else None
    return {
        "name": Path(model).name,       # paths of this machine stay out of reports
        "description": f"linic, whole files, {len(names)} pictures",
        "results": results,
        "per_image": rows,
        "machine": machine(device),
        "command": command,
    }


def _warm_up(path: Path, quality: int, model: str, device: str) -> None:
    import linic
    linic.decode(linic.encode(read(path), quality=quality, model=model, device=device), model=model, device=device)


def measure(path: Path, quality: int, file: Path, model: str, device: str, judge: Judge | None = None) -> Row:
    import linic
    image = read(path)
    started = time.perf_counter()
    data = linic.encode(image, quality=quality, model=model, device=device)
    encoded = time.perf_counter()
    file.write_bytes(data)
    size = file.stat().st_size
    data = file.read_bytes()
    decoding = time.perf_counter()
    decoded = linic.decode(data, model=model, device=device)
    finished = time.perf_counter()
    if (decoded.size, decoded.mode) != (image.size, image.mode):
        raise UsageError(f"{path}: came back as {decoded.mode} {decoded.size}, was {image.mode} {image.size}")
    before, after = to_array(image), to_array(decoded)
    pixels = image.width * image.height
    return {
        "name": path.name, "width": image.width, "height": image.height, "quality": quality, "bytes": size,
        "bpp": 8 * size / pixels,
        # What the range coder wrote: without header, checksums and metadata.
        "bpp_payload": 8 * linic.info(data)["payload"] / pixels,
        **(judge(before, after) if judge else {"psnr-rgb": metrics.psnr(before, after),
                                               "ms-ssim-rgb": metrics.ms_ssim(before, after)}),
        "encoding_time": encoded - started,
        "decoding_time": finished - decoding,
    }


def means(rows: Sequence[Row], key: str, qualities: Sequence[int]) -> list[float | None]:
    """One mean a quality, over the pictures that have the measure. An infinite PSNR stays out of JSON: None."""
    result: list[float | None] = []
    for quality in qualities:
        values = [r[key] for r in rows if r["quality"] == quality and r[key] is not None]
        mean = sum(values) / len(values) if values else math.nan
        result.append(mean if math.isfinite(mean) else None)
    return result


def machine(device: str = "auto") -> dict[str, Any]:
    """What a reader of the times must know."""
    import torch
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
