"""Classical codecs, those of this Pillow: whole curves of the same pictures, and what they make of a few hundred bytes.

    measured(paths)                             ->  {"avif444_psnr": Curve, ...}: whole files, means over the pictures
    found = fit(image, CODECS["webp"], 579)     ->  Fitted(scale=8, quality=17, bytes=574, picture=...)

`fit`: the largest quality that fits, of a picture that was scaled down first.
Scale (1 to 1/8) and quality are chosen for each picture and target: quality by bisection, scale by hill climbing on
MS-SSIM over neighbouring scales, up again with Lanczos, as measured_extreme_kodak.json was made; `start` is a
known answer, which is only checked. Counted bytes leave out what a bare stream would not need (`count`), in the
rivals' favour.
VVC has no encoder here: `Anchors` reads its decoded pictures and the other recorded numbers from a folder.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from linic.bench import metrics
from linic.bench.anchors import Curve
from linic.errors import UsageError
from linic.picture import read

SCALES = (1, 2, 3, 4, 6, 8)
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Codec:
    name: str
    settings: str
    counted: str
    qualities: range
    encode: Callable[[Image.Image, int], bytes]
    count: Callable[[bytes], int]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    return min((_saved(image, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, progressive=p)
                for p in (False, True)), key=len)


def _webp(image: Image.Image, quality: int) -> bytes:
    return _saved(image, "WEBP", quality=quality, method=6)


def _avif(image: Image.Image, quality: int, subsampling: str = "4:2:0") -> bytes:
    return _saved(image, "AVIF", quality=quality, speed=6, subsampling=subsampling, advanced={"tune": "psnr"},
                  codec="aom", max_threads=1)


def _avif444(image: Image.Image, quality: int) -> bytes:
    return _avif(image, quality, "4:4:4")


def _saved(image: Image.Image, form: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def media_bytes(data: bytes) -> int:
    """Of an AVIF file: what its `mdat` boxes hold."""
    at, total = 0, 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at:at + 4]), data[at + 4:at + 8]
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8:at + 16]), 16
        size = size or len(data) - at
        if size < head:
            raise UsageError(f"not an AVIF file: a box of {size} bytes at {at}")
        total += size - head if kind == b"mdat" else 0
        at += size
    return total


def _version(feature: str) -> str:
    return f"Pillow {PIL.__version__}, {feature.removesuffix('_turbo')} {features.version(feature)}"


def codecs() -> dict[str, Codec]:
    """Those that this Pillow has."""
    found = [Codec("jpeg420", f"{_version('libjpeg_turbo')}, 4:2:0, optimize, the smaller of baseline and progressive",
                   "the whole file", range(1, 96), _jpeg, len)]
    if features.check("webp"):
        found.append(Codec("webp", f"{_version('webp')}, method 6", "the file less 20 bytes of RIFF headers",
                           range(0, 101), _webp, lambda data: len(data) - 20))
    if features.check("avif"):
        found.append(Codec("avif420", f"{_version('avif')}, libaom, speed 6, 4:2:0, tune=psnr, 1 thread",
                           "the AV1 payload, without ISOBMFF boxes", range(0, 101), _avif, media_bytes))
    return {codec.name: codec for codec in found}


# Of `measured`: names, qualities and settings as in data/anchors.json.
_WHOLE: dict[str, tuple[str, tuple[int, ...], Callable[[Image.Image, int], bytes]]] = {
    "jpeg420": ("jpeg420", (5, 10, 18, 30, 45, 62, 75, 85), _jpeg),
    "webp": ("webp", (0, 3, 10, 25, 45, 65, 80, 88), _webp),
    "avif444_psnr": ("avif420", (3, 8, 16, 26, 38, 50, 60), _avif444),
}


def measured(paths: Sequence[Path]) -> dict[str, Curve]:
    """Curves of the classical codecs that this Pillow has: whole files of these pictures, PSNR on RGB."""
    here = codecs()
    images = [read(path).convert("RGB") for path in paths]
    found = {}
    for name, (needed, qualities, encode) in _WHOLE.items():
        if needed not in here:
            continue
        points = np.array([[_point(image, encode(image, quality)) for image in images] for quality in qualities])
        bpp, psnr = points.mean(1).T.tolist()
        settings = here[needed].settings.replace("4:2:0", "4:4:4") if name == "avif444_psnr" else here[needed].settings
        found[name] = Curve(name, tuple(bpp), tuple(psnr), source=f"measured here from whole files: {settings}")
    return found


def _point(image: Image.Image, data: bytes) -> tuple[float, float]:
    back = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return 8 * len(data) / (image.width * image.height), metrics.psnr(np.asarray(image), back)


@dataclass(frozen=True)
class Fitted:
    scale: int
    quality: int
    bytes: int
    picture: Image.Image        # at full size


def shrunk(image: Image.Image, scale: int) -> Image.Image:
    size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
    return image if scale == 1 else image.resize(size, LANCZOS)


def decoded(codec: Codec, image: Image.Image, scale: int, quality: int) -> Fitted:
    data = codec.encode(shrunk(image, scale), quality)
    small = Image.open(io.BytesIO(data)).convert("RGB")
    return Fitted(scale, quality, codec.count(data), grown(small, image.size))


def grown(small: Image.Image, size: tuple[int, int]) -> Image.Image:
    return small if small.size == size else small.resize(size, LANCZOS)


def largest(codec: Codec, small: Image.Image, most: int) -> int | None:
    """The largest quality whose counted bytes are at most `most`; bytes are taken as rising with quality."""
    def fits(quality: int) -> bool:
        return codec.count(codec.encode(small, quality)) <= most

    low, high = codec.qualities.start, codec.qualities.stop - 1
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fit(image: Image.Image, codec: Codec, most: int, start: tuple[int, int] | None = None) -> Fitted | None:
    """start: (scale, quality) of an earlier search, taken where it fits. None: not even the smallest file does."""
    if start and start[0] in SCALES and start[1] in codec.qualities:
        found = decoded(codec, image, *start)
        if found.bytes <= most:
            return found
    tried: dict[int, tuple[float, Fitted | None]] = {}
    original = np.asarray(image)

    def at(index: int) -> float:
        if index not in tried:
            quality = largest(codec, shrunk(image, SCALES[index]), most)
            found = None if quality is None else decoded(codec, image, SCALES[index], quality)
            score = -1.0
            if found:
                picture = np.asarray(found.picture)
                similar = metrics.ms_ssim(original, picture)
                score = metrics.psnr(original, picture) / 100 if similar is None else similar
            tried[index] = score, found
        return tried[index][0]

    # From the smallest picture up: what fits nowhere is seen first.
    best = len(SCALES) - 1
    while True:
        nearby = [i for i in range(best - 2, best + 3) if 0 <= i < len(SCALES)]
        better = max(nearby, key=at)
        if at(better) <= at(best):
            return tried[best][1]
        best = better


def rate_name(bpp: float) -> str:
    """How a target rate is written: .025 is "0.025"."""
    return f"{bpp:g}"


class Anchors:
    """A folder with vvc_extreme/, measured_extreme_kodak.json and published_extreme.json; each may be missing."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self.folder = folder
        stored: dict[str, dict[str, dict[str, Any]]] = self._json("vvc_extreme/index.json").get("pictures", {})
        self.vvc = {rate_name(float(name)): (name, pictures) for name, pictures in stored.items()}
        self.measured: dict[str, dict[str, Any]] = self._json("measured_extreme_kodak.json").get("codecs", {})
        self.published: dict[str, Any] = self._json("published_extreme.json")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error

    def recorded(self, codec: str, target: str, stem: str) -> tuple[float, ...] | None:
        """(scale, quality, bytes, PSNR, MS-SSIM, SSIMULACRA2) of the best scale by MS-SSIM; target: "0.0118"."""
        row = self.measured.get(codec, {}).get("targets", {}).get(target, {})
        found = row.get("best_ms_ssim", {}).get("per_image", {}).get(stem)
        return tuple(found) if found else None

    def vvc_picture(self, target: str, stem: str, image: Image.Image) -> Fitted | None:
        """VVC's decoded picture at full size. Raises UsageError where `image` is not the one that was coded."""
        name, pictures = self.vvc.get(target, ("", {}))
        entry = pictures.get(stem)
        if not entry or (entry["width"], entry["height"]) != image.size:
            return None
        path = self.folder / "vvc_extreme" / name / f"{stem}.webp"
        with Image.open(path) as file:
            picture = grown(file.convert("RGB"), image.size)
        if abs(metrics.psnr(np.asarray(image), np.asarray(picture)) - entry["psnr"]) > 0.01:
            raise UsageError(f"{path}: not of this {stem}: its PSNR is not the recorded {entry['psnr']} dB")
        return Fitted(int(entry["scale"].partition("/")[2] or 1), entry["qp"], entry["stream_bytes"], picture)
