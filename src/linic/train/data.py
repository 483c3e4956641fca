"""Pictures of a folder or of tar shards -> uint8 pixels, decoded once -> random crops, made on the training device.

A source is one tar (webdataset: 000123.avif beside 000123.json, its card) or up to 256 loose files of a folder (cards
beside them count too). Its decoded pixels lie end to end in <cache>/<key>.u8, mapped to memory; <key>.json says where
each picture is. The key holds name, size and time of every file. An unreadable file is a warning that names it; no
picture at all is a UsageError. A JPEG is made smaller by its quality: a model learns artefacts as it learns all else.

Evaluation pictures never train: a picture within NEAR bits of a validation or report picture is refused.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

from linic.errors import UsageError
from linic.train import checkpoint, recipe

SUFFIXES = {".avif", ".jpg", ".jpeg", ".png", ".webp"}
LOOSE_FILES = 256               # of one source: an interrupted first decoding loses no more
LUMINANCE_SUM = 3688            # of the 64 numbers of the standard's example table (T.81, table K.1): quality 50
# Quality from which on -> scale at which the artefacts of a JPEG are gone.
JPEG_SCALES = ((94.5, 0.82), (90.5, 0.68), (86.5, 0.60), (81.5, 0.52), (73.5, 0.42), (0.0, 0.33))
LANCZOS = 3                     # source pixels on each side that up-scaling looks at
NEAR = 5                        # bits of 64

# dhash of the Kodak suite and of seven CLIC 2025 validation pictures (the hash of the eighth is that of any picture
# with a bright middle): they are for reports, so they neither train nor choose between weights.
REPORT = (
    0xd5d4c594919595e1, 0xe6662263213520f0, 0x3f8f472a6e696963, 0x1e3f7c68793b3c3c, 0x0c424974037a4aeb,
    0x80f0f808383c1c06, 0xa0b8b8bab8a989bd, 0x0c2a4acb8faa8eaa, 0xf0889a83b5cceacc, 0xce8e1d5bc6c507ca,
    0x88b2ba92308c83dc, 0xf0c09898989898dc, 0x6858602cd6b9c953, 0x64c0686cd2e6f8fc, 0x09b99599910b0725,
    0xfcbc9da69c9cbc5d, 0x716170d4d9e58986, 0xe3e91b1a862747da, 0x3de72d3d196141c8, 0x803061783c918b0f,
    0x3828747076f2cc34, 0x88a0acaccccae800, 0x6e6e6ce060e2c2c3, 0x08336959103058d9,
    0xc558e4ec56b45a52, 0xc3121f3313c68624, 0xd4de5a4a79b47d6e, 0xf183b7a7b0e0391f, 0xffcf27a7a7938bce,
    0xe4e4312d1575b311, 0x9ada2fb945570717,
)


def warn(message: str) -> None:
    print(f"linic: warning: {message}", file=sys.stderr, flush=True)


# --- files -> pixels ------------------------------------------------------------------------------------------------


def read_picture(file: Any, clean: bool = False) -> np.ndarray:
    """A path or a binary file -> (H, W, 3) uint8, upright; transparent pixels over white. `clean`: a JPEG is made
    smaller, so that its blocks and ringing vanish."""
    with Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits")
        scale = jpeg_scale(getattr(image, "quantization", None)) if clean else 1.0
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        rgb = upright.convert("RGB")
        if scale < 1:
            rgb = rgb.resize((max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))),
                             Image.Resampling.LANCZOS)
        return np.array(rgb)


def jpeg_scale(tables: dict[int, list[int]] | None) -> float:
    """By how much a picture with these quantisation tables has to shrink; 1: it is no JPEG."""
    if not tables:
        return 1.0
    percent = 100 * sum(tables[min(tables)]) / LUMINANCE_SUM         # the table against that of quality 50
    quality = 100 - percent / 2 if percent <= 100 else 5000 / percent
    return next(scale for least, scale in JPEG_SCALES if quality >= least)


def dhash(pixels: np.ndarray) -> int:
    """64 bits that survive resizing and recompression: is each of 8x8 brightness means above its left neighbour's?"""
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


@dataclass(frozen=True)
class Source:
    files: tuple[Path, ...]     # one tar, or loose pictures

    @property
    def name(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def key(self) -> str:
        """Changes with the content of the files, and with what Pillow can read here."""
        seen = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        text = repr(("linic-pictures 2", features.check("avif"), features.check("webp"), seen))
        return f"{self.files[0].stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def read(self) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """Name, file bytes and card of each picture."""
        if self.files[0].suffix.lower() != ".tar":
            for path in self.files:
                beside = path.with_suffix(".json")
                yield str(path), path.read_bytes(), _card(beside.read_bytes() if beside.is_file() else b"", beside)
            return
        path, members = self.files[0], {}
        try:
            with tarfile.open(path, "r:") as tar:         # plain tars only: members are read by offset
                for member in tar:
                    members[member.name] = member
        except (tarfile.TarError, EOFError) as error:   # a file cut short still gives what came before
            warn(f"{path}: {error} after {len(members)} entries")
        with open(path, "rb") as raw:
            def content(name: str) -> bytes:
                raw.seek(members[name].offset_data)
                return raw.read(members[name].size)

            for name in members:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and members[name].isfile():
                    card = f"{stem}.json"
                    text = content(card) if card in members else b""
                    yield f"{path}:{name}", content(name), _card(text, f"{path}:{card}")


def _card(text: bytes, where: Any) -> dict[str, Any]:
    try:
        card = json.loads(text or b"{}")
        return card if isinstance(card, dict) else {}
    except ValueError as error:
        warn(f"{where}: not a card: {error}")
        return {}


def find_sources(folder: Path) -> list[Source]:
    """Everything under the folder (or the one tar named). Hidden files and half-copied `.tmp` files are no pictures."""
    if folder.is_file():
        return [Source((folder,))]
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    tars = [Source((f,)) for f in files if f.suffix.lower() == ".tar"]
    loose = iter(f for f in files if f.suffix.lower() in SUFFIXES)
    groups = iter(lambda: tuple(islice(loose, LOOSE_FILES)), ())
    return tars + [Source(g) for g in groups]


@dataclass(frozen=True)
class Entry:
    """One picture in a cache file."""

    name: str
    offset: int
    height: int
    width: int
    hash: int
    origin: str | None


def decode(source: Source, cache: Path) -> tuple[Path, list[Entry]]:
    """The cache file of a source, decoded now if it is not there. What could not be read is said every time."""
    pixels, index = cache / f"{source.key()}.u8", cache / f"{source.key()}.json"
    if not index.exists() or not pixels.exists():
        print(f"decoding {source.name}", file=sys.stderr, flush=True)
        entries: list[Entry] = []
        failed: list[str] = []

        def decoded(item: tuple[str, bytes, dict[str, Any]]) -> tuple[str, np.ndarray | Exception, dict[str, Any]]:
            name, data, card = item
            try:
                return name, read_picture(io.BytesIO(data), clean=True), card
            except Exception as error:          # Pillow's plugins raise almost anything on damaged data
                return name, error, card

        def write(path: Path) -> None:
            at, items = 0, source.read()
            with open(path, "wb") as f, ThreadPoolExecutor(os.cpu_count()) as pool:
                while batch := list(islice(items, 32)):         # bounds the decoded pictures in memory
                    for name, array, card in pool.map(decoded, batch):
                        if isinstance(array, Exception):
                            failed.append(f"{name}: unreadable: {array}")
                            continue
                        f.write(array.tobytes())
                        origin = card.get("origin")
                        h, w, _ = array.shape
                        entries.append(Entry(name, at, h, w, dhash(array), str(origin) if origin else None))
                        at += array.size

        cache.mkdir(parents=True, exist_ok=True)
        checkpoint.replace(pixels, write)
        checkpoint.write_json(index, {"failed": failed, "pictures": [asdict(e) for e in entries]})
    content = json.loads(index.read_text(encoding="utf-8"))
    for message in content["failed"]:
        warn(message)
    return pixels, [Entry(**e) for e in content["pictures"]]


Window = tuple[str, int, int, int, int]         # of a picture: its name, y, x, height, width


@dataclass(frozen=True)
class Picture:
    entry: Entry
    shard: Tensor               # uint8, all pixels of its source

    def window(self, y: int, x: int, size: tuple[int, int]) -> Tensor:
        """(h, w, 3) view."""
        row = self.entry.width * 3
        return self.shard.as_strided((*size, 3), (row, 3, 1), self.entry.offset + y * row + x * 3)

    @property
    def pixels(self) -> Tensor:
        return self.window(0, 0, (self.entry.height, self.entry.width))


class Library:
    """All pictures under a folder but those of excluded origins. `refresh` takes in tars that arrived in it since."""

    def __init__(self, folder: Path, cache: Path, device: str = "cpu", exclude_origins: Sequence[str] = ()):
        self.folder, self.cache, self.device, self.exclude = Path(folder), cache, device, set(exclude_origins)
        self.excluded = 0
        self.arriving: dict[str, Future[Any]] = {}      # key of a source -> its decoding in the background
        self.shards: dict[str, list[Picture]] = {}      # key of a source -> its pictures
        if not self.folder.exists():
            raise UsageError(f"{folder}: no such folder")
        for source in find_sources(self.folder):
            self.shards[source.key()] = self._load(source)
        if not self.pictures:
            found = f"; {self.excluded} of excluded origins" if self.excluded else ""
            raise UsageError(f"{folder}: no pictures. Looked for {', '.join(sorted(SUFFIXES))} files, and for such "
                             f"files inside .tar files, in all folders below{found}")

    @property
    def pictures(self) -> list[Picture]:
        return [p for shard in self.shards.values() for p in shard]

    def windows_like(self, sizes: Sequence[tuple[int, int]], seed: int) -> list[Window]:
        """A window of a picture of its own for each size, smaller where no picture is as large."""
        rng, out = np.random.default_rng(seed), []
        pictures = [self.pictures[i] for i in rng.permutation(len(self.pictures))]
        for size in sizes[:len(pictures)]:
            entry = next((p.entry for p in pictures if p.entry.height >= size[0] and p.entry.width >= size[1]),
                         pictures[0].entry)
            pictures = [p for p in pictures if p.entry is not entry]
            height, width = min(size[0], entry.height), min(size[1], entry.width)
            out.append((entry.name, int(rng.integers(entry.height - height + 1)),
                        int(rng.integers(entry.width - width + 1)), height, width))
        return out

    def window(self, where: Window) -> Tensor | None:
        """(h, w, 3) uint8; None: the picture is gone."""
        name, y, x, *size = where
        return next((p.window(y, x, (size[0], size[1])) for p in self.pictures if p.entry.name == name), None)

    def _load(self, source: Source) -> list[Picture]:
        path, entries = decode(source, self.cache)
        size = path.stat().st_size
        shard = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
        shard = shard.to(self.device)
        kept = [Picture(e, shard) for e in entries if e.origin not in self.exclude]
        self.excluded += len(entries) - len(kept)
        return kept

    def refresh(self, refuse: Sequence[tuple[str, int]] = (), background: bool = False,
                only: Collection[str] | None = None) -> list[str]:
        """Names of the tars taken in. One that holds an evaluation picture (`refuse`: name, hash) stays out.
        `background`: decode in a thread, and take in at a later call what is ready: a GPU need not wait. `only`: what
        another process has taken in."""
        taken = []
        for path in sorted(self.folder.glob("*.tar")):
            source = Source((path,))
            if only is not None and str(path) not in only:
                continue
            try:
                if only is None and time.time() - path.stat().st_mtime < 5:     # may still be growing
                    continue
                key = source.key()
                if key in self.shards or (background and not self._ready(key, source)):
                    continue
                pictures = self._load(source)
            except OSError as error:
                warn(f"{path}: {error}")
                continue
            if same := duplicates(pictures, refuse):
                warn(f"{path} stays out: {same[0][0]} is the evaluation picture {same[0][1]}")
                pictures = []
            self.shards[key] = pictures
            taken += [str(path)] if pictures else []
        return taken

    def _ready(self, key: str, source: Source) -> bool:
        if key not in self.arriving:
            pool = ThreadPoolExecutor(1)
            self.arriving[key] = pool.submit(decode, source, self.cache)
            pool.shutdown(wait=False)
        if not self.arriving[key].done():
            return False
        if error := self.arriving[key].exception():
            warn(f"{source.name} stays out: {error}")
            self.shards[key] = []
        return not error


def report_hashes() -> list[tuple[str, int]]:
    return [(f"a report picture (Kodak, CLIC), number {i}", h) for i, h in enumerate(REPORT)]


def duplicates(pictures: Sequence[Picture], known: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """(picture, known name) of each pair whose hashes differ in at most NEAR bits."""
    ours = np.array([p.entry.hash for p in pictures], np.uint64)
    return [(pictures[int(i)].entry.name, name) for name, value in known
            for i in np.flatnonzero(np.bitwise_count(ours ^ np.uint64(value)) <= NEAR)]


def refuse_duplicates(folder: Path, pictures: Sequence[Picture], known: Sequence[tuple[str, int]]) -> None:
    if same := duplicates(pictures, known):
        shown = "; ".join(f"{a} looks like {b}" for a, b in same[:5])
        raise UsageError(f"{folder}: {len(same)} evaluation pictures, which may not train or choose: {shown}. "
                         "Take them out of the folder")


def validation_pictures(library: Library, count: int, smallest: int = 1) -> list[Picture]:
    """`count` of the folder, spread evenly over the names; lossless ones alone where there are any. `smallest`: side
    that a picture needs."""
    pictures = sorted((p for p in library.pictures if min(p.entry.height, p.entry.width) >= smallest),
                      key=lambda p: p.entry.name)
    if not pictures:
        raise UsageError(f"{library.folder}: no picture has {smallest} pixels on each side, which judging needs")
    lossless = [p for p in pictures if p.entry.name.lower().endswith(".png")]
    chosen = lossless or pictures
    return [chosen[i * len(chosen) // count] for i in range(count)] if count < len(chosen) else chosen


# --- pixels -> crops ------------------------------------------------------------------------------------------------


def area_matrix(n: int, m: int) -> Tensor:
    """(m, n): exact area means of n samples in m <= n equal parts, partly covered samples included."""
    edges = np.arange(m + 1) * (n / m)
    j = np.arange(n)
    covered = np.minimum(edges[1:, None], j + 1) - np.maximum(edges[:-1, None], j)
    return torch.tensor(covered.clip(0) / (n / m), dtype=torch.float32)


def lanczos_matrix(n: int, m: int) -> Tensor:
    """(m, n + 2 LANCZOS): m > n samples from the inner n; the margin keeps the crop's edges like its middle."""
    centre = (np.arange(m)[:, None] + 0.5) * (n / m) + LANCZOS
    d = np.arange(n + 2 * LANCZOS) + 0.5 - centre
    weight = np.where(abs(d) < LANCZOS, np.sinc(d) * np.sinc(d / LANCZOS), 0)
    return torch.tensor(weight / weight.sum(1, keepdims=True), dtype=torch.float32)


class Crops:
    """Random crops of a library. The same seed and library give the same crops."""

    def __init__(self, library: Library, data: recipe.Data, seed: int, device: str = "cpu",
                 batched: bool | None = None):
        self.library, self.data, self.device = library, data, device
        self.batched = device.startswith("cuda") if batched is None else batched
        self._pixels: Tensor | None = None              # of all pictures, where crops are gathered
        self.rng = np.random.default_rng(seed)
        self._large: dict[int, list[Picture]] = {}
        self._matrices: dict[tuple[int, int], Tensor] = {}
        shares = np.cumsum([p.share for p in data.pools])
        self._shares = shares / shares[-1]              # cumulative

    def refreshed(self) -> None:
        """The library has grown."""
        self._large.clear()
        self._pixels = None

    def large_enough(self, size: int) -> list[Picture]:
        """Pictures that hold a crop; UsageError if there is none."""
        if size not in self._large:
            kept = [p for p in self.library.pictures if min(p.entry.height, p.entry.width) >= size]
            if not kept:
                raise UsageError(f"{self.library.folder}: none of {len(self.library.pictures)} pictures is as large as "
                                 f"a crop of {size} pixels")
            self._large[size] = kept
        return self._large[size]

    def batch(self, count: int, size: int) -> Tensor:
        """(count, size, size, 3) float32 in [0, 1]."""
        pictures, rng = self.large_enough(size), self.rng
        groups: dict[int, list[tuple[Picture, int, int]]] = {}      # source pixels of a side -> picture, y, x
        for _ in range(count):
            picture = pictures[rng.integers(len(pictures))]
            n = round(size / self.data.pools[self._shares.searchsorted(rng.random(), "right")].scale)
            side = n if n >= size else n + 2 * LANCZOS
            if side > min(picture.entry.height, picture.entry.width):
                n = side = size                         # too small for that pool: as it is
            y = rng.integers(picture.entry.height - side + 1)
            x = rng.integers(picture.entry.width - side + 1)
            groups.setdefault(n, []).append((picture, int(y), int(x)))
        windows = self._gathered if self.batched else self._stacked
        t = torch.cat([self._resized(windows(some, n if n >= size else n + 2 * LANCZOS), n, size)
                       for n, some in groups.items()])
        t = torch.where(self._mask(rng.random(count) < self.data.flip), t.flip(2), t)
        t = torch.where(self._mask(rng.random(count) < self.data.transpose), t.transpose(1, 2), t)
        t = self._coloured(self._permuted(t))
        sides = np.repeat(list(groups), [len(some) for some in groups.values()])
        return self._noisy(t, sides).contiguous()

    def _stacked(self, some: list[tuple[Picture, int, int]], side: int) -> Tensor:
        return torch.stack([picture.window(y, x, (side, side)) for picture, y, x in some])

    def _gathered(self, some: list[tuple[Picture, int, int]], side: int) -> Tensor:
        """The same as one gather from all pictures end to end: on a GPU a launch a crop would be the longest part."""
        if self._pixels is None:
            shards = {id(p.shard): p.shard for p in self.library.pictures}
            self._pixels = torch.cat(list(shards.values()))
            starts = np.cumsum([0, *(len(s) for s in shards.values())])
            self._starts = dict(zip(shards, starts.tolist()))
        where = [(self._starts[id(p.shard)] + p.entry.offset + (y * p.entry.width + x) * 3, p.entry.width * 3)
                 for p, y, x in some]
        first, row = self._on_device(np.array(where, np.int64)).T[:, :, None, None]
        down = torch.arange(side, device=self.device)[:, None]
        along = torch.arange(3 * side, device=self.device)
        return self._pixels[first + row * down + along].view(len(some), side, side, 3)

    def _on_device(self, array: np.ndarray) -> Tensor:
        t = torch.from_numpy(array)
        # From pageable memory the host would wait for the whole queue of the device.
        return t.pin_memory().to(self.device, non_blocking=True) if self.device.startswith("cuda") else t

    def _resized(self, views: Tensor, n: int, size: int) -> Tensor:
        t = views.float() / 255
        if n == size:
            return t
        if (n, size) not in self._matrices:
            matrix = area_matrix(n, size) if n > size else lanczos_matrix(n, size)
            self._matrices[n, size] = matrix.to(self.device)
        r = self._matrices[n, size]
        return (r @ (t.permute(0, 3, 1, 2) @ r.T)).permute(0, 2, 3, 1).clamp(0, 1)

    def _mask(self, choice: np.ndarray) -> Tensor:
        return self._on_device(choice)[:, None, None, None]

    def _coloured(self, t: Tensor) -> Tensor:
        colour = self.data.colour
        if colour is None:
            return t
        some = self.rng.random(len(t)) < colour.share
        low, high = np.log(colour.gamma)
        gamma = np.exp(self.rng.uniform(low, high, (len(t), 1, 1, 1)))
        gains = self.rng.uniform(*colour.gains, (len(t), 1, 1, 3))
        power, factor = (self._on_device(a.astype(np.float32)) for a in (gamma, gains))
        return torch.where(self._mask(some), (t.pow(power) * factor).clamp(0, 1), t)

    def _permuted(self, t: Tensor) -> Tensor:
        if not self.data.permute:
            return t
        order = np.where(self.rng.random((len(t), 1)) < self.data.permute,
                         self.rng.permuted(np.tile(np.arange(3), (len(t), 1)), axis=1), np.arange(3))
        return t.gather(3, self._on_device(order)[:, None, None].expand_as(t))

    def _noisy(self, t: Tensor, sides: np.ndarray) -> Tensor:
        """`sides`: source pixels of each crop's side, which say its pool."""
        noise = self.data.noise
        if noise is None:
            return t
        some = self.rng.random(len(t)) < noise.share
        if noise.pools:
            some &= np.isin(sides, [round(t.shape[1] / scale) for scale in noise.pools])
        sigma = np.where(some, self.rng.uniform(*noise.sigma, len(t)) / 255, 0)
        # A seed of our own numbers: the same crops however often the model drew noise in between.
        source = torch.Generator(self.device).manual_seed(int(self.rng.integers(1 << 62)))
        normal = torch.empty_like(t).normal_(generator=source)
        return (t + self._mask(sigma.astype(np.float32)) * t.sqrt() * normal).clamp(0, 1)

    def reseed(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def state(self) -> dict[str, Any]:
        return dict(self.rng.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state


def check_crops(crops: Crops, sizes: Sequence[int]) -> list[str]:
    """A line per crop size that some pictures are too small for. UsageError where all are."""
    total = len(crops.library.pictures)
    lines = [(s, total - len(crops.large_enough(s))) for s in sorted(set(sizes))]
    return [f"{small} of {total} pictures are smaller than crops of {size} and are skipped there"
            for size, small in lines if small]
