"""READ FIRST: encode beside decode. A picture's way through the rooms, and back.

    PIL image -> picture (array, metadata) -> padded tensor -> model: y, z -> entropy.walk over the model's plan
    -> rangecoder -> container -> bytes;      decode is the same read upwards.

y is rounded in steps of 1/256 before anything is coded (y_q8); from there to the last symbol everything is integers:
the model's normative program (entropy/program.py), the same on every machine. Models imported from elsewhere have none:
their means and scales come from float64 networks, a file is safe on the machine that wrote it, and a checksum of the
latents turns a mismatch elsewhere into an error. Pictures above 2048x2048 are coded in tiles; the transforms run on
the whole.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linic import container, weights
from linic.errors import (
    BackendMissing,
    Damaged,
    LatentsMismatch,
    LimitExceeded,
    ModelMissing,
    Unsupported,
    UsageError,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from linic.entropy.walk import Step
    from linic.models import Lalic
    from linic.rangecoder import Tables

DEFAULT_MODEL = "lalic-xs"
DEFAULT_QUALITY = 50
MOST_CELLS = (container.TILE // container.CELL) ** 2     # of an integer tile: its sums hold 2^14 positions of y
TAGS = {"icc_profile": "ICCP", "exif": "EXIF", "xmp": "XMP_"}  # Pillow's name -> chunk


def encode(image: "Image.Image", quality: int = DEFAULT_QUALITY, model: str | PathLike[str] = DEFAULT_MODEL,
           device: str = "auto", profile: str = container.FULL) -> bytes:
    """A picture (mode RGB or L, any size) -> the bytes of a linic file.

    quality: 0 (smallest) .. 100, whole numbers. model: name of an installed model, or path of a weight file.
    Colour profile, EXIF and XMP travel along unchanged. profile: "full", or "compact": a header of 8 bytes instead of
    50, for RGB up to 2048x2048 and registered models, metadata left behind.
    Raises PictureError, UsageError, ModelMissing, WeightsError.
    """
    return _ready(weights.find(model), device).encode(image, quality, profile)


def decode(data: bytes, *, model: str | PathLike[str] | None = None, max_pixels: int | None = container.MAX_PIXELS,
           device: str = "auto") -> "Image.Image":
    """The bytes of a linic file -> the picture, in its own mode and size, with its metadata in `info`.

    The file names its model, which is looked for among the installed ones; `model` (name or path) is for one that is
    not installed. max_pixels: larger pictures are refused before any memory is taken (None: no limit);
    `lalic-xs` decodes in about 220 bytes a pixel.
    Raises DecodeError (with the byte offset), ModelMissing, WeightsError.
    """
    file = container.parse(data, max_pixels=max_pixels)
    return _ready(_path(file, model), device).decode(file)


def info(data: bytes) -> dict[str, Any]:
    """What a file says of itself; nothing is decoded, and neither torch nor numpy are loaded. Raises DecodeError."""
    file = container.parse(data, max_pixels=None)
    return {
        "format": file.version, "profile": file.profile, "width": file.width, "height": file.height,
        "mode": file.mode, "model": file.model_name, "digest": file.digest.hex(),
        "arithmetic": container.ARITHMETICS[file.arithmetic], "quality": [t.quality for t in file.tiles],
        "tiles": [file.tiles_x, file.tiles_y], "bytes": len(data), "payload": sum(len(t.payload) for t in file.tiles),
        "bpp": round(8 * len(data) / (file.width * file.height), 4),
        "metadata": {tag: len(value) for tag, value in file.metadata.items()},
        "unknown": [tag for tag, _ in file.unknown],
    }


def load(name: str | PathLike[str] = DEFAULT_MODEL, pretrained: bool = True) -> "Lalic":
    """The torch module of a model, in eval mode: `forward(x, quality) -> {"x_hat", "likelihoods": {"y", "z"}}`.

    pretrained: with the weights installed under that name (or at that path); else a preset with fresh weights.
    """
    if pretrained:
        return weights.load(name).model
    from linic.models import build

    return build(str(name)).eval()


class Codec:
    """A model made ready for one device. Keeps no state between pictures; use one a thread."""

    def __init__(self, path: str, device: str):
        import torch

        from linic.entropy.fast import Torch
        from linic.entropy.program import known_answer
        from linic.models.blocks import merge_shifts

        loaded = weights.load(path)
        self.name, self.digest, self.tables = loaded.card["name"], loaded.digest, loaded.tables
        self.device = torch.device(device)
        self.model = loaded.model.to(self.device).requires_grad_(False)
        self.program = Torch(loaded.program, self.device) if loaded.program else None
        wanted = loaded.card.get("known_answer")
        if self.program and known_answer(self.program.program, self.tables, self.program) != wanted:
            raise BackendMissing(f"integer arithmetic on {device} is not right here ({self.program.carriers}): files "
                                 "could not be trusted. Use another device, or LINIC_CARRIER=i64 and report this")
        merge_shifts(self.model)
        self.model.set_bf16(_fast_bf16(self.device))
        for net in self.model.normative():
            net.double()

    def encode(self, image: "Image.Image", quality: int, profile: str = container.FULL) -> bytes:
        import numpy as np

        from linic import picture
        from linic.entropy.walk import walk
        from linic.rangecoder import Encoder

        if isinstance(quality, bool) or not isinstance(quality, (int, np.integer)) or not 0 <= quality <= 100:
            raise UsageError(f"quality is {quality!r}; whole numbers from 0 to 100 are possible")
        pixels = picture.to_array(image)
        height, width = pixels.shape[:2]
        with _inference():
            z, y_q8 = self.latents(picture.pad(pixels, self.model.config.multiple), quality)
            compact = profile == container.COMPACT
            kept = {} if compact else {TAGS[key]: value for key, value in picture.metadata(image).items()}
            tiles_x, tiles_y = container.tiling(width, height)
            arithmetic = container.INTEGERS if self.program else container.FLOAT64
            file = container.Image(width, height, [], image.mode, container.model_code(self.digest),
                                   b"" if compact else self.digest, tiles_x, tiles_y, arithmetic, kept,
                                   profile=profile)
            for rows, columns in file.cells():
                coder = Encoder(self.tables)
                part = y_q8[4 * rows.start:4 * rows.stop, 4 * columns.start:4 * columns.stop]
                y_hat_q8 = walk(self._plan(int(quality), _size(rows, columns), z[rows, columns], part), coder)
                file.tiles.append(container.Tile(int(quality), coder.finish()))
                file.tiles[-1].checksum = file.checksum(len(file.tiles) - 1, _bytes(y_hat_q8))
        return container.build(file)

    def latents(self, padded: "np.ndarray", quality: int) -> "tuple[np.ndarray, np.ndarray]":
        """Pixels (H, W, 3) uint8 -> what is to be coded: z (h, w, Nz), y in steps of 1/256 (H/16, W/16, M), int32."""
        import torch

        x = torch.from_numpy(padded).to(self.device)[None].float() / 255
        l = self._level(quality).float()
        y = self.model.analyse(x, l)
        z = self.model.density.symbols(self.model.hyper_latent(y, l).double())[0].int().cpu().numpy()
        limit = 1 << 23  # far beyond any clamp that follows; keeps the conversion defined for any weights
        return z, torch.round(y[0] * 256).nan_to_num().clamp(-limit, limit).int().cpu().numpy()

    def decode(self, file: container.Image) -> "Image.Image":
        import numpy as np
        import torch

        from linic import picture

        if file.digest and file.digest != self.digest:
            raise ModelMissing(f"the file needs a model with digest {file.digest.hex()}, {self.name} has "
                               f"{self.digest.hex()}")
        if (file.arithmetic == container.INTEGERS) != bool(self.program):
            raise Damaged(0, f"the file says arithmetic {container.ARITHMETICS[file.arithmetic]}, which is not that of "
                          f"{self.name}: ask who wrote the file")
        quality = _one_quality(file)
        side = self.model.config.multiple
        y_hat = np.zeros((-(-file.height // side) * 4, -(-file.width // side) * 4, self.model.config.latents), np.int32)
        with _inference():
            for index, (rows, columns) in enumerate(file.cells()):
                part = _decode_tile(file, index, self.tables, self._plan(quality, _size(rows, columns)))
                y_hat[4 * rows.start:4 * rows.stop, 4 * columns.start:4 * columns.stop] = part
            l = self._level(quality).float()
            x = self.model.synthesise(torch.from_numpy(y_hat).to(self.device)[None].float() / 256, l)[0]
            pixels = torch.round(x.float().clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
        image = picture.from_array(picture.crop(pixels, file.height, file.width), file.mode)
        return picture.attach(image, {key: file.metadata[tag] for key, tag in TAGS.items() if tag in file.metadata})

    def _plan(self, quality: int, z_size: tuple[int, int], z: "np.ndarray | None" = None,
              y_q8: "np.ndarray | None" = None) -> "Generator[Step, np.ndarray, np.ndarray]":
        from linic.entropy.program import plan

        if self.program:
            return plan(self.program.program, self.program, quality, z_size, z, y_q8)
        return self.model.plan(self._level(quality), z_size, z, y_q8)

    def _level(self, quality: int) -> "Tensor":
        import torch

        return self.model.level(torch.tensor([quality], dtype=torch.float64, device=self.device),
                                torch.zeros(1, dtype=torch.float64, device=self.device))


def _ready(path: Path, device: str) -> Codec:
    """Two models stay in memory; a weight file that was replaced is read again."""
    return _codec(str(path), path.stat().st_mtime_ns, _device(device))


@lru_cache(maxsize=2)
def _codec(path: str, written: int, device: str) -> Codec:
    return Codec(path, device)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}; auto, cpu and cuda are possible")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch sees no CUDA device here. Use --device cpu")
    return name


def _fast_bf16(device: Any) -> bool:
    """Whether bf16 products are faster than float32 here. LINIC_BF16=0 or 1 decides otherwise."""
    import os

    import torch

    if asked := os.environ.get("LINIC_BF16"):
        return asked != "0"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public question for it as of torch 2.13
    return bool(check and check())


def _one_quality(file: container.Image) -> int:
    """The quality of all tiles; also refuses tiles that no writer makes, before memory is taken for any."""
    if file.arithmetic == container.INTEGERS:
        for tile, (rows, columns) in zip(file.tiles, file.cells()):
            height, width = _size(rows, columns)
            if height * width > MOST_CELLS:
                raise LimitExceeded(tile.offset, f"a tile of {width * 64}x{height * 64} pixels; 2048x2048 can be coded "
                                                 "as one: ask who wrote the file")
    found = file.tiles[0].quality
    for tile in file.tiles:
        if tile.quality > 100:
            raise Damaged(tile.offset - 1, f"quality {tile.quality}; 0 to 100 exist")
        if tile.quality != found:
            raise Unsupported(tile.offset - 1, "tiles of different quality: written by a later linic; update yours")
    return found


def _size(rows: slice, columns: slice) -> tuple[int, int]:
    return rows.stop - rows.start, columns.stop - columns.start


def _decode_tile(file: container.Image, index: int, tables: "Tables",
                 plan: "Generator[Step, np.ndarray, np.ndarray]") -> "np.ndarray":
    """y_hat_q8 of a tile, proven to be the encoder's. Raises Damaged, LatentsMismatch."""
    from linic.entropy.walk import walk
    from linic.rangecoder import Decoder

    tile = file.tiles[index]
    coder = Decoder(tables, tile.payload)
    safe = file.arithmetic == container.INTEGERS
    try:
        y_hat_q8 = walk(plan, coder)
        coder.finish()
    except Damaged as error:
        hint = "Fetch the file again" + ("" if safe else ", or decode it on the machine that wrote it")
        raise Damaged(tile.offset + error.offset, f"the payload cannot be read to its end ({error}). {hint}") from error
    if file.checksum(index, _bytes(y_hat_q8)) != tile.checksum:
        why = ("the file is damaged: fetch it again" if safe else "its model computes in floats, which differ between "
               "machines: decode it on the one that wrote it")
        raise LatentsMismatch(tile.offset, f"the latents differ from the encoder's; {why}")
    return y_hat_q8


def verify(data: bytes, model: str | PathLike[str] | None = None,
           max_pixels: int | None = container.MAX_PIXELS) -> dict[str, Any]:
    """Decodes every symbol of a file and compares the latents with the file's checksum, on NumPy alone: torch is not
    needed, nor are pixels made. -> {"symbols": positions of y, "latents": SHA-256 of y_hat, "tiles"}.

    Slower than decoding. Raises DecodeError, ModelMissing, WeightsError.
    """
    import hashlib

    from linic.entropy.program import Numpy, plan

    file = container.parse(data, max_pixels=max_pixels)
    if file.arithmetic != container.INTEGERS:
        raise Unsupported(0, "its model computes in floats: decode it to verify it")
    program, tables, digest = weights.load_program(_path(file, model))
    if file.digest and file.digest != digest:
        raise ModelMissing(f"the file needs a model with digest {file.digest.hex()}, this one has {digest.hex()}")
    quality, backend, seen, count = _one_quality(file), Numpy(program), hashlib.sha256(), 0
    for index, (rows, columns) in enumerate(file.cells()):
        y_hat = _decode_tile(file, index, tables, plan(program, backend, quality, _size(rows, columns)))
        seen.update(_bytes(y_hat))
        count += y_hat.size
    return {"symbols": count, "latents": seen.hexdigest(), "tiles": len(file.tiles)}


def _path(file: container.Image, model: str | PathLike[str] | None) -> Path:
    """The weight file that a picture needs; the compact profile has a registered code, which stands for a digest."""
    if model is not None:
        return weights.find(model)
    digest = file.digest or bytes.fromhex(container.FROZEN.get(file.model, ""))
    return weights.find_digest(digest, file.model_name or "")


def _bytes(y_hat_q8: "np.ndarray") -> bytes:
    return y_hat_q8.astype("<i4").tobytes()


@contextmanager
def _inference() -> Generator[None, None, None]:
    """No gradients, and the precision that the networks are meant to have whatever the process has set."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
