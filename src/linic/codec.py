"""READ FIRST: encode beside decode. A picture's way through the rooms, and back.

    PIL image -> picture (array, metadata) -> padded tensor -> model: y, z -> entropy.walk over the model's plan
    -> rangecoder -> container -> bytes;      decode is the same read upwards.

y is rounded in steps of 1/256 before anything is coded (y_q8); from there to the last symbol everything is integers:
the model's normative program (entropy/program.py, steps.py), the same on every machine. Models imported from elsewhere
have none: their means and scales come from float64 networks, a file is safe on the machine that wrote it, and a
checksum of the latents turns a mismatch elsewhere into an error. Pictures above 2048x2048 are coded in tiles; the
transforms run on the whole.

Two families go this way. LALIC: y at 1/16 and z at 1/64 of the sides; faithful. MRT: y alone, at 1/32; it draws what
its few bytes do not say, so its pictures carry a note, and it may have two decoders, with a blend between them.
"""

import copy
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
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

    from linic.entropy.program import Program
    from linic.entropy.steps import StepProgram
    from linic.entropy.walk import Step
    from linic.models import Model
    from linic.rangecoder import Tables

DEFAULT_MODEL, DEFAULT_EXTREME = "lalic-xs", "mrt-xs"
AUTO = "auto"
DEFAULT_QUALITY = 50
# Bits per pixel below which MRT is taken where a rate is asked for. On Kodak lalic-xs begins at .122 (LPIPS(alex)
# .328), mrt-xs ends at .029 (.449): between them neither has files. Carried on, lalic-xs would have .468 at .05.
CROSSING_BPP = 0.06
MOST_CELLS = (container.TILE // container.CELL) ** 2     # of an integer tile: its sums hold 2^14 positions of y
TAGS = {"icc_profile": "ICCP", "exif": "EXIF", "xmp": "XMP_"}  # Pillow's name -> chunk


def encode(image: "Image.Image", quality: int | None = None, model: str | PathLike[str] = AUTO, device: str = "auto",
           profile: str | None = None, *, extreme: bool = False, bpp: float | None = None,
           size: int | None = None) -> bytes:
    """A picture (mode RGB or L, any size) -> the bytes of a linic file.

    quality: 0 (smallest) .. 100, whole numbers; 50 where nothing else is said. Instead of it bpp or size: the best
    quality whose file has at most that many bits per pixel, or bytes. model: name of an installed model, or path of a
    weight file; "auto" is `lalic-xs`, or `mrt-xs` where extreme (a picture that one recognises, in a few hundred bytes;
    its details are invented) or where bpp or size ask for less than LALIC can give.
    profile: "full" carries colour profile, EXIF and XMP along unchanged. "compact": a header of 8 bytes instead of 50,
    for RGB up to 2048x2048 and registered models; metadata is left behind, the picture turned and converted to sRGB so
    that it needs none. None: full, but for MRT compact where that is possible.
    Raises PictureError, UsageError (also where no quality is small enough), ModelMissing, WeightsError.
    """
    if extreme and model != AUTO:
        raise UsageError(f"extreme chooses the model: leave {str(model)!r} away, or take its own qualities")
    if bpp is None and size is None:
        chosen = model if model != AUTO else DEFAULT_EXTREME if extreme else DEFAULT_MODEL
        quality = DEFAULT_QUALITY if quality is None else quality
        return _ready(weights.find(chosen), device).encode(image, quality, profile)
    if quality is not None or None not in (bpp, size):
        raise UsageError("quality, bpp and size: one of them")
    if not 0 < (bpp if size is None else size) < math.inf:     # type: ignore[operator]
        raise UsageError(f"bpp {bpp}, size {size}: more than 0 are needed")
    return _within(image, int((bpp or 0) * image.width * image.height / 8) if size is None else size, model, extreme,
                   device, profile)


def _within(image: "Image.Image", most: int, model: str | PathLike[str], extreme: bool, device: str,
            profile: str | None) -> bytes:
    """The best file of at most so many bytes."""
    per_byte, smallest = 8 / max(image.width * image.height, 1), []
    for name in _candidates(model, extreme, most * per_byte):
        ready = _ready(_found(name, most * per_byte), device)
        data = _largest(partial(ready.encode, image, profile=profile), most)
        if len(data) <= most:
            return data
        smallest.append(f"{ready.name} needs {len(data)} ({len(data) * per_byte:.4f} bpp)")
    raise UsageError(f"at most {most} bytes ({most * per_byte:.4f} bpp) were asked for; {', '.join(smallest)}. "
                     "Metadata counts in a full file; profile compact leaves it behind")


def _candidates(model: str | PathLike[str], extreme: bool, bpp: float) -> list[str | PathLike[str]]:
    """The models that may meet a rate, the better first."""
    if model != AUTO:
        return [model]
    if extreme or bpp < CROSSING_BPP:
        return [DEFAULT_EXTREME]
    try:
        weights.find(DEFAULT_EXTREME)
    except ModelMissing:
        return [DEFAULT_MODEL]
    return [DEFAULT_MODEL, DEFAULT_EXTREME]     # flat pictures get far below what photographs need, others do not


def _found(name: str | PathLike[str], bpp: float) -> Path:
    try:
        return weights.find(name)
    except ModelMissing as error:
        if name != DEFAULT_EXTREME:
            raise
        raise ModelMissing(f"{bpp:.4f} bits per pixel are for models of the family MRT: {error}") from error


def _largest(encoded: Callable[[int], bytes], most: int) -> bytes:
    """The file of the best quality that has at most so many bytes; the smallest of all where none has."""
    best, low, high = encoded(0), 1, 100
    while low <= high and len(best) <= most:
        middle = (low + high) // 2
        data = encoded(middle)
        if len(data) <= most:
            best, low = data, middle + 1
        else:
            high = middle - 1
    return best


def decode(data: bytes, *, model: str | PathLike[str] | None = None, max_pixels: int | None = container.MAX_PIXELS,
           device: str = "auto", realism: float | None = None) -> "Image.Image":
    """The bytes of a linic file -> the picture, in its own mode and size, with its metadata in `info`; beside it, under
    "linic", a note where the picture needs one.

    The file names its model, which is looked for among the installed ones; `model` (name or path) is for one that is
    not installed. max_pixels: larger pictures are refused before any memory is taken (None: no limit);
    `lalic-xs` decodes in about 220 bytes a pixel. realism, for MRT alone: from 0, faithful, to 1, with the texture of
    the decoder that was tuned against a critic; 1 is the default where the model has one.
    Raises DecodeError (with the byte offset), ModelMissing, WeightsError, UsageError.
    """
    file = container.parse(data, max_pixels=max_pixels)
    return _ready(_path(file, model), device).decode(file, realism)


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
        **({"note": file.note} if file.note else {}),
    }


def load(name: str | PathLike[str] = DEFAULT_MODEL, pretrained: bool = True) -> "Model":
    """The torch module of a model, in eval mode. forward(x, quality) -> LALIC {"x_hat", "likelihoods": {"y", "z"}}, MRT
    {"x_hat", "bits", "lambda"}.

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
        from linic.models.blocks import merge_shifts

        loaded = weights.load(path)
        self.name, self.digest, self.tables = loaded.card["name"], loaded.digest, loaded.tables
        self.device = torch.device(device)
        self.model: Any = loaded.model.to(self.device).requires_grad_(False)
        self.mrt = self.model.config.family == "mrt"
        self.program = None
        if loaded.program:
            self.program = Torch(loaded.program, self.device)
            answer = weights.known_answer(loaded.program, self.tables, self.program)
            if answer != loaded.card.get("known_answer"):
                raise BackendMissing(f"integer arithmetic on {device} is not right here ({self.program.carriers}): "
                                     "files could not be trusted. Use another device, or LINIC_CARRIER=i64 and report "
                                     "this")
        both = [self.model]
        if loaded.adversarial:
            both.append(copy.deepcopy(self.model))
            both[1].load_state_dict(loaded.adversarial, strict=False)
        self.decoders = [_decoder(merge_shifts(model)) for model in both]
        self.model.set_bf16(_fast_bf16(self.device))
        for net in self.model.normative():
            net.double()

    def encode(self, image: "Image.Image", quality: int, profile: str | None = None) -> bytes:
        import numpy as np

        from linic import picture
        from linic.entropy.walk import walk
        from linic.rangecoder import Encoder

        if isinstance(quality, bool) or not isinstance(quality, (int, np.integer)) or not 0 <= quality <= 100:
            raise UsageError(f"quality is {quality!r}; whole numbers from 0 to 100 are possible")
        picture.check(image)
        code, kept = container.model_code(self.digest), {}
        if profile is None:
            compact = self.mrt and code and image.mode == "RGB" and max(container.tiling(*image.size)) == 1
            profile = container.COMPACT if compact else container.FULL
        if profile == container.COMPACT:
            image = picture.plain(image)
        else:
            kept = {TAGS[key]: value for key, value in picture.metadata(image).items()}
        pixels = picture.to_array(image)
        height, width = pixels.shape[:2]
        tiles_x, tiles_y = container.tiling(width, height)
        if self.mrt and profile == container.FULL:
            kept["TEXT"] = container.NOTE.encode()
        with _inference():
            z, y_q8 = self.latents(picture.pad(pixels, self.side), quality)
            arithmetic = container.INTEGERS if self.program else container.FLOAT64
            file = container.Image(width, height, [], image.mode, code,
                                   b"" if profile == container.COMPACT else self.digest, tiles_x, tiles_y, arithmetic,
                                   kept, profile=profile)
            for rows, columns in file.cells(self.side):
                coder, size = Encoder(self.tables), _size(rows, columns)
                part = None if z is None else z[rows, columns], y_q8[self._of_y(rows, columns)]
                y_hat_q8 = walk(self._plan(int(quality), size, *part), coder)
                file.tiles.append(container.Tile(int(quality), coder.finish()))
                file.tiles[-1].checksum = file.checksum(len(file.tiles) - 1, _bytes(y_hat_q8))
        return container.build(file)

    def latents(self, padded: "np.ndarray", quality: int) -> "tuple[np.ndarray | None, np.ndarray]":
        """Pixels (H, W, 3) uint8 -> what is to be coded: z (h, w, Nz), or None for MRT; y in steps of 1/256, int32."""
        import torch

        x = torch.from_numpy(padded).to(self.device)[None].float() / 255
        l = self._level(quality).float()
        y = self.model.analyse(x, l)
        z = None
        if not self.mrt:
            z = self.model.density.symbols(self.model.hyper_latent(y, l).double())[0].int().cpu().numpy()
        limit = 1 << 23  # far beyond any clamp that follows; keeps the conversion defined for any weights
        return z, torch.round(y[0] * 256).nan_to_num().clamp(-limit, limit).int().cpu().numpy()

    def decode(self, file: container.Image, realism: float | None = None) -> "Image.Image":
        import numpy as np
        import torch

        from linic import picture

        self._check_is_mine(file)
        blended = self._blend(realism)
        quality, config = _one_quality(file, self.mrt), self.model.config
        h, w = (-(-side // self.side) for side in (file.height, file.width))
        whole = self._of_y(slice(0, h), slice(0, w))
        y_hat = np.zeros((whole[0].stop, whole[1].stop, config.latents), np.int32)
        with _inference():
            for index, (rows, columns) in enumerate(file.cells(self.side)):
                part = _decode_tile(file, index, self.tables, self._plan(quality, _size(rows, columns)))
                y_hat[self._of_y(rows, columns)] = part
            self.model.load_state_dict(blended, strict=False)
            l = self._level(quality).float()
            x = self.model.synthesise(torch.from_numpy(y_hat).to(self.device)[None].float() / 256, l)[0]
            pixels = torch.round(x.float().clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
        image = picture.from_array(picture.crop(pixels, file.height, file.width), file.mode)
        if note := file.note or (container.NOTE if self.mrt else ""):
            image.info[picture.NOTE] = note
        return picture.attach(image, {key: file.metadata[tag] for key, tag in TAGS.items() if tag in file.metadata})

    def _check_is_mine(self, file: container.Image) -> None:
        if file.digest and file.digest != self.digest:
            raise ModelMissing(f"the file needs a model with digest {file.digest.hex()}, {self.name} has "
                               f"{self.digest.hex()}")
        if (file.arithmetic == container.INTEGERS) != bool(self.program):
            raise Damaged(0, f"the file says arithmetic {container.ARITHMETICS[file.arithmetic]}, which is not that of "
                          f"{self.name}: ask who wrote the file")

    def _blend(self, realism: float | None) -> "dict[str, Tensor]":
        """The decoder's weights: faithful at 0, adversarial at 1, on the line between them elsewhere. LALIC: none."""
        if not self.mrt:
            if realism is not None:
                raise UsageError(f"realism is of MRT's decoders; {self.name} has one, which invents nothing")
            return {}
        realism = float(len(self.decoders) - 1) if realism is None else realism
        if not 0 <= realism <= len(self.decoders) - 1:
            most = "0 to 1 are" if len(self.decoders) > 1 else f"{self.name} has the faithful decoder alone, only 0 is"
            raise UsageError(f"realism is {realism!r}; {most} possible")
        first, last = self.decoders[0], self.decoders[-1]
        return {key: first[key].lerp(last[key], realism) for key in first}

    # How y lies over the picture.

    @property
    def side(self) -> int:
        """Pixels a cell of the plan's grid: LALIC's z, MRT's y."""
        return _side(self.mrt)

    def _of_y(self, *cells: slice) -> tuple[slice, ...]:
        """The positions of y in these cells."""
        n = 1 if self.mrt else 4
        return tuple(slice(n * c.start, n * c.stop) for c in cells)

    def _plan(self, quality: int, size: tuple[int, int], z: "np.ndarray | None" = None,
              y_q8: "np.ndarray | None" = None) -> "Generator[Step, np.ndarray, np.ndarray]":
        if self.program:
            from linic.models.lower_mrt import rounding

            more = [rounding(self.model.config)] if self.mrt else []
            return _plan_of(self.program.program, self.program, quality, size, z, y_q8, *more)
        return self.model.plan(self._level(quality), size, z, y_q8)

    def _level(self, quality: int) -> "Tensor":
        import torch

        return self.model.level(torch.tensor([quality], dtype=torch.float64, device=self.device),
                                torch.zeros(1, dtype=torch.float64, device=self.device))


def _decoder(model: Any) -> "dict[str, Tensor]":
    return {key: value.clone() for key, value in model.state_dict().items() if weights.second(key)}


def _side(mrt: bool) -> int:
    return 32 if mrt else 64


def _plan_of(program: "Program | StepProgram | Any", backend: Any, quality: int, size: tuple[int, int],
             z: "np.ndarray | None" = None, y_q8: "np.ndarray | None" = None,
             rounding: Sequence[int] = (128,)) -> "Generator[Step, np.ndarray, np.ndarray]":
    """The coding plan of a tile of so many cells. rounding: MRT's encoder's, see steps.plan."""
    from linic.entropy import program as programs
    from linic.entropy import steps

    if isinstance(program, steps.StepProgram):
        return steps.plan(program, backend, quality, size, y_q8, rounding)
    return programs.plan(program, backend, quality, size, z, y_q8)


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


def _one_quality(file: container.Image, mrt: bool) -> int:
    """The quality of all tiles; also refuses tiles that no writer makes, before memory is taken for any."""
    side = container.TILE // container.CELL
    if file.arithmetic == container.INTEGERS:
        for tile, (rows, columns) in zip(file.tiles, file.cells()):
            height, width = _size(rows, columns)
            if height * width > MOST_CELLS or (mrt and max(height, width) > side):
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

    from linic.entropy.steps import Numpy, StepProgram

    file = container.parse(data, max_pixels=max_pixels)
    if file.arithmetic != container.INTEGERS:
        raise Unsupported(0, "its model computes in floats: decode it to verify it")
    program, tables, digest = weights.load_program(_path(file, model))
    if file.digest and file.digest != digest:
        raise ModelMissing(f"the file needs a model with digest {file.digest.hex()}, this one has {digest.hex()}")
    mrt = isinstance(program, StepProgram)
    quality, backend, seen, count = _one_quality(file, mrt), Numpy(program), hashlib.sha256(), 0
    for index, (rows, columns) in enumerate(file.cells(_side(mrt))):
        y_hat = _decode_tile(file, index, tables, _plan_of(program, backend, quality, _size(rows, columns)))
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
