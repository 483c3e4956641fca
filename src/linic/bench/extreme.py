"""Below .04 bits per pixel: our model and the classical codecs on the same pictures, in one run, by the same measures.

    run(pictures, judge, ours=Files("mrt-s"), anchors=Anchors(folder), out=folder)  ->  the content of extreme.json

A row is one codec, one picture, one rate: bytes of the file, bits per pixel, every measure of judge.py. Rows of
    linic       at each quality
    matched     linic once more, at the largest quality whose file is not larger than VVC's of the same picture and
                target (AVIF's where VVC was not decoded): what the comparison at equal bytes and the sheets are made of
    jpeg420, webp, avif420      at the best scale and quality that fit each target rate (rivals.py)
    vvc420      from its decoded pictures, at the targets that were kept
    jpegxl      recorded numbers of an earlier run, of the same pictures: no LPIPS
Rows are kept under OUT/rows.jsonl with a key of all that they depend on: a second run makes the missing ones alone, so
that new weights cost our rows only. Every .linic file stays under OUT/files. Raises UsageError and what codecs raise.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from linic.bench import rivals
from linic.bench.judge import KEYS, Judge
from linic.picture import read, to_array

QUALITIES = (0, 17, 33, 50, 67, 83, 100)                # of MRT: .004 .. .035 bpp in even steps of their logarithm
RATES = (0.008, 0.0118, 0.015, 0.025)                   # target bpp of the classical codecs
Row = dict[str, Any]
Made = tuple[Image.Image, Row] | None         # a decoded picture, and what is particular about it: at least `bytes`
Say = Callable[[str], None]


@dataclass
class Coded:
    bytes: int
    content: Any
    seconds: float
    payload: int | None = None      # bytes of the range coder; the others are header, checksum and metadata


class Ours(Protocol):
    """What is judged: whole files, or for development the estimate of a checkpoint (estimate.py)."""

    name: str
    identity: str       # changes with the weights
    estimated: bool

    def encode(self, image: Image.Image, quality: int) -> Coded: ...

    def decode(self, coded: Coded) -> Image.Image: ...

    def kept(self, coded: Coded, name: str) -> Coded:
        """As read back from a file of that name."""
        ...

    def read(self, name: str) -> Coded | None:
        """What `kept` wrote, maybe in an earlier run."""
        ...


class Files:
    estimated = False

    def __init__(self, model: str, device: str = "auto", folder: Path | None = None, realism: float | None = None):
        from linic import weights
        path = weights.find(model)
        self.model, self.device, self.name = model, device, path.name.partition(".safetensors")[0]
        # A model without a choice of decoders does not know the argument.
        self.choice = {} if realism is None else {"realism": realism}
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.folder = folder / f"{self.name}-{self.identity[:8]}" if folder else None
        if realism is not None:
            self.identity += f"-{realism:g}"        # files do not depend on it
        self.warm = False

    def encode(self, image: Image.Image, quality: int) -> Coded:
        import linic
        if not self.warm:       # times are those of a loaded model
            self.warm = True
            linic.encode(Image.new("RGB", (64, 64)), quality=quality, model=self.model, device=self.device)
        started = time.perf_counter()
        data = linic.encode(image, quality=quality, model=self.model, device=self.device)
        return Coded(len(data), data, time.perf_counter() - started, linic.info(data)["payload"])

    def decode(self, coded: Coded) -> Image.Image:
        import linic
        choice: Any = self.choice
        return linic.decode(coded.content, model=self.model, device=self.device, **choice)

    def kept(self, coded: Coded, name: str) -> Coded:
        if not self.folder:
            return coded
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.linic"
        path.write_bytes(coded.content)
        return Coded(path.stat().st_size, path.read_bytes(), coded.seconds, coded.payload)

    def read(self, name: str) -> Coded | None:
        path = self.folder / f"{name}.linic" if self.folder else None
        return Coded(path.stat().st_size, path.read_bytes(), 0) if path and path.is_file() else None


class Cache:
    """Rows by key, in a file of JSON lines that only grows; `known`: further files, or results with "rows", to read."""

    def __init__(self, path: Path, known: Iterable[Path] = ()):
        self.path, self.rows = path, dict[str, Row]()
        for source in [*known, path]:
            for row in _rows_in(source):
                self.rows[row["key"]] = row
        self.made = 0

    def row(self, key: str, make: Callable[[], Row | None]) -> Row | None:
        """None is kept too: what does not fit will not fit the next time."""
        if key not in self.rows:
            row = {"key": key, **(make() or {"none": True})}
            self.rows[key] = row
            self.made += 1
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        found = self.rows[key]
        return None if found.get("none") else found


def _rows_in(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    text = path.read_text()
    if path.suffix == ".json":
        return [row for row in json.loads(text).get("rows", []) if "key" in row]        # recorded ones have none
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:      # a run that was killed while it wrote
            continue
    return [row for row in rows if "key" in row]


def run(pictures: Sequence[Path], judge: Judge, *, ours: Ours | None = None, anchors: rivals.Anchors | None = None,
        out: Path, qualities: Sequence[int] = QUALITIES, rates: Sequence[float] = RATES, known: Iterable[Path] = (),
        say: Say = lambda line: None) -> dict[str, Any]:
    """-> {"rows": [...], "made": rows that were not there before, ...}"""
    cache, rows = Cache(out / "rows.jsonl", known), list[Row]()
    for path in pictures:
        started, before = time.perf_counter(), cache.made
        one = _Picture(path, judge, cache, anchors)
        fitted = {rate: one.classical(rivals.rate_name(rate)) for rate in rates}
        rows += [row for found in fitted.values() for row in found]
        if ours:
            rows += one.ours(ours, qualities, {rate: _reference(found) for rate, found in fitted.items()})
        say(f"{path.name}: {cache.made - before} new rows, {time.perf_counter() - started:.1f} s")
    return {"rows": [row for row in rows if row], "made": cache.made,
            "pictures": [path.name for path in pictures], "rates": list(rates),
            "qualities": list(qualities) if ours else [], "judge": judge.identity,
            "ours": {"name": ours.name, "identity": ours.identity, "estimated": ours.estimated} if ours else None,
            "settings": {c.name: {"settings": c.settings, "counted": c.counted} for c in rivals.codecs().values()}}


def _reference(rows: Sequence[Row]) -> Row | None:
    """What ours is held against at a rate: VVC, else AVIF, else the best there is."""
    order = {"vvc420": 0, "avif420": 1, "webp": 2, "jpeg420": 3}
    found = [row for row in rows if row["codec"] in order]
    return min(found, key=lambda row: order[row["codec"]], default=None)


def _file_name(path: Path, quality: int) -> str:
    return f"{path.stem}-q{quality:03d}"


def _fitted(found: rivals.Fitted | None) -> Made:
    if found is None:
        return None
    return found.picture, {"bytes": found.bytes, "scale": found.scale, "quality": found.quality}


class _Picture:
    """One picture's rows."""

    def __init__(self, path: Path, judge: Judge, cache: Cache, anchors: rivals.Anchors | None):
        self.path, self.judge, self.cache, self.anchors = path, judge, cache, anchors
        self.image = read(path)
        self.rgb = self.image.convert("RGB")
        self.original = to_array(self.image)
        self.digest = hashlib.sha256(str(self.image.size).encode() + self.original.tobytes()).hexdigest()
        self.pixels = self.image.width * self.image.height
        # Raises where a picture of that name is another one.
        self.is_anchors = anchors is not None and any(anchors.vvc_picture(rate, path.stem, self.rgb)
                                                      for rate in anchors.vvc)

    def _row(self, codec: str, rate: str, settings: str, make: Callable[[], Made]) -> Row | None:
        def made() -> Row | None:
            found = make()
            if found is None:
                return None
            picture, row = found
            measures = self.judge(self.original, to_array(picture))
            return {"codec": codec, "picture": self.path.name, "rate": rate, "width": self.image.width,
                    "height": self.image.height, "bpp": round(8 * row["bytes"] / self.pixels, 6), **row,
                    **{k: None if (v := measures[k]) is None else round(v, 5) for k in KEYS}}

        parts = [self.digest, codec, rate, settings, self.judge.identity]
        return self.cache.row(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20], made)

    def classical(self, rate: str) -> list[Row]:
        most, stem = int(float(rate) * self.pixels / 8), self.path.stem
        rows = []
        for codec in rivals.codecs().values():
            start = self.anchors.recorded(codec.name, rate, stem) if self.anchors else None
            begin = (int(start[0]), int(start[1])) if start else None

            def make(codec: rivals.Codec = codec, begin: tuple[int, int] | None = begin) -> Made:
                return _fitted(rivals.fit(self.rgb, codec, most, begin))

            rows.append(self._row(codec.name, rate, codec.settings, make))
        if self.anchors and rate in self.anchors.vvc:
            anchors = self.anchors

            def vvc() -> Made:
                return _fitted(anchors.vvc_picture(rate, stem, self.rgb))

            rows.append(self._row("vvc420", rate, "vvenc medium 4:2:0, decoded picture", vvc))
        if self.is_anchors:
            rows.append(self._recorded("jpegxl", rate, stem))
        return [row for row in rows if row]

    def _recorded(self, codec: str, rate: str, stem: str) -> Row | None:
        found = self.anchors.recorded(codec, rate, stem) if self.anchors else None
        if not found:
            return None
        scale, quality, size, psnr, ms_ssim, ssimulacra2 = found
        return {"codec": codec, "picture": self.path.name, "rate": rate, "width": self.image.width,
                "height": self.image.height, "bpp": round(8 * size / self.pixels, 6), "bytes": int(size),
                "scale": int(scale), "quality": quality, "psnr-rgb": psnr,
                "ms-ssim-rgb": ms_ssim, "ssimulacra2": ssimulacra2, "recorded": True}

    def ours(self, ours: Ours, qualities: Sequence[int], references: dict[float, Row | None]) -> list[Row]:
        coded: dict[int, Coded] = {}

        def encode(quality: int) -> Coded:
            if quality not in coded:
                coded[quality] = ours.encode(self.image, quality)
            return coded[quality]

        def at(quality: int, extra: Row) -> tuple[Image.Image, Row]:
            found = encode(quality)
            kept = ours.kept(found, _file_name(self.path, quality))
            started = time.perf_counter()
            picture = ours.decode(kept)
            return picture, {"bytes": kept.bytes, "payload": kept.payload, "quality": quality, **extra,
                             "encode_s": round(found.seconds, 3), "decode_s": round(time.perf_counter() - started, 3)}

        def matched(most: int) -> int | None:
            low, high = 0, 100
            if encode(low).bytes > most:
                return None
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if encode(middle).bytes <= most else (low, middle - 1)
            return low

        rows = [self._row("linic", f"q{q}", ours.identity, partial(at, q, {})) for q in qualities]
        for rate, reference in references.items():
            if reference:
                def make(reference: Row = reference) -> Made:
                    quality = matched(reference["bytes"])
                    extra = {"against": reference["codec"], "bytes_against": reference["bytes"]}
                    return None if quality is None else at(quality, extra)

                against = f"{ours.identity} {reference['codec']} {reference['bytes']}"
                rows.append(self._row("matched", rivals.rate_name(rate), against, make))
        return [row for row in rows if row]


def picture_of(row: Row, path: Path, ours: Ours | None, anchors: rivals.Anchors | None) -> Image.Image | None:
    """The decoded picture of a row, made once more; None for recorded ones."""
    image = read(path)
    if row["codec"] in ("linic", "matched"):
        if not ours:
            return None
        coded = ours.read(_file_name(path, row["quality"])) or ours.encode(image, row["quality"])
        return ours.decode(coded).convert("RGB")
    if row["codec"] == "vvc420":
        found = anchors.vvc_picture(row["rate"], path.stem, image.convert("RGB")) if anchors else None
    else:
        codec = rivals.codecs().get(row["codec"])
        found = rivals.decoded(codec, image.convert("RGB"), row["scale"], row["quality"]) if codec else None
    return found.picture if found else None


def mean_points(rows: Sequence[Row], codec: str, pictures: int) -> list[Row]:
    """The codec's means, one a rate, ascending. `complete`: over all pictures; others are no points of a curve."""
    points = []
    for rate in dict.fromkeys(row["rate"] for row in rows if row["codec"] == codec):
        found = [row for row in rows if row["codec"] == codec and row["rate"] == rate]
        point: Row = {"rate": rate, "pictures": len(found), "complete": len(found) == pictures}
        for key in ("bytes", "bpp", "payload", *KEYS, "encode_s", "decode_s"):
            values = [row[key] for row in found if row.get(key) is not None]
            # Fewer values than pictures would be the mean of another set; a side too short for a measure is one.
            point[key] = float(np.mean(values)) if len(values) == len(found) else None
        points.append(point)
    return sorted(points, key=lambda point: point["bpp"])
