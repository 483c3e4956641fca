"""READ FIRST: encode beside decode. A picture's way through the rooms, and back.

    PIL image -> picture (array, metadata) -> padded tensor -> model: y, z -> entropy.walk over the model's plan
    -> rangecoder -> container -> bytes;      decode is the same read upwards.

y is rounded in steps of 1/256 before anything is coded (y_q8), so encoder and decoder do integer arithmetic on equal
numbers. In this version means and scales come from float64 networks: a file is safe on the machine that wrote it, and
a checksum of the latents turns a mismatch elsewhere into an error (format version 0, docs/format.md).
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linic import container, weights
from linic.errors import Damaged, LatentsMismatch, ModelMissing, Unsupported, UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from linic.models import Lalic

DEFAULT_MODEL = "lalic-xs"
DEFAULT_QUALITY = 50
TAGS = {"icc_profile": "ICCP", "exif": "EXIF", "xmp": "XMP_"}  # Pillow's name -> chunk


def encode(image: "Image.Image", quality: int = DEFAULT_QUALITY, model: str | PathLike[str] = DEFAULT_MODEL,
           device: str = "auto") -> bytes:
    """A picture (mode RGB or L, any size) -> the bytes of a linic file.

    quality: 0 (smallest) .. 100, whole numbers. model: name of an installed model, or path of a weight file.
    Colour profile, EXIF and XMP travel along unchanged. Raises PictureError, UsageError, ModelMissing, WeightsError.
    """
    return _ready(weights.find(model), device).encode(image, quality)


def decode(data: bytes, *, model: str | PathLike[str] | None = None, max_pixels: int | None = container.MAX_PIXELS,
           device: str = "auto") -> "Image.Image":
    """The bytes of a linic file -> the picture, in its own mode and size, with its metadata in `info`.

    The file names its model, which is looked for among the installed ones; `model` (name or path) is for one that is
    not installed. max_pixels: larger pictures are refused before any memory is taken (None: no limit);
    `lalic-xs` decodes in about 220 bytes a pixel.
    Raises DecodeError (with the byte offset), ModelMissing, WeightsError.
    """
    file = container.parse(data, max_pixels=max_pixels)
    if model is not None:
        path = weights.find(model)
    elif file.digest:
        path = weights.find_digest(file.digest, file.model_name or "")
    else:  # the compact profile has a registered code alone
        path = weights.find(file.model_name or "")
    return _ready(path, device).decode(file)


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

        from linic.models.blocks import merge_shifts

        loaded = weights.load(path)
        self.name, self.digest, self.tables = loaded.card["name"], loaded.digest, loaded.tables
        self.device = torch.device(device)
        self.model = loaded.model.to(self.device).requires_grad_(False)
        merge_shifts(self.model)
        self.model.set_bf16(_fast_bf16(self.device))
        for net in self.model.normative():
            net.double()

    def encode(self, image: "Image.Image", quality: int) -> bytes:
        import numpy as np
        import torch

        from linic import picture
        from linic.entropy.walk import walk
        from linic.rangecoder import Encoder

        if isinstance(quality, bool) or not isinstance(quality, (int, np.integer)) or not 0 <= quality <= 100:
            raise UsageError(f"quality is {quality!r}; whole numbers from 0 to 100 are possible")
        pixels = picture.to_array(image)
        height, width = pixels.shape[:2]
        padded = picture.pad(pixels, self.model.config.multiple)
        with _inference():
            x = torch.from_numpy(padded).to(self.device)[None].float() / 255
            l = self._level(quality).float()
            y = self.model.analyse(x, l)
            z = self.model.density.symbols(self.model.hyper_latent(y, l).double())[0].int()
            limit = 1 << 23  # far beyond any clamp that follows; keeps the conversion defined for any weights
            y_q8 = torch.round(y[0] * 256).nan_to_num().clamp(-limit, limit).int()
            coder = Encoder(self.tables)
            plan = self.model.plan(self._level(quality), (z.shape[0], z.shape[1]), z, y_q8)
            y_hat_q8 = walk(plan, coder).cpu().numpy()
        kept = {TAGS[key]: value for key, value in picture.metadata(image).items()}
        file = container.Image(width, height, [container.Tile(int(quality), coder.finish())], image.mode,
                               container.model_code(self.name), self.digest, metadata=kept)
        file.tiles[0].checksum = file.checksum(0, _bytes(y_hat_q8))
        return container.build(file)

    def decode(self, file: container.Image) -> "Image.Image":
        import torch

        from linic import picture
        from linic.entropy.walk import walk
        from linic.rangecoder import Decoder

        if file.digest and file.digest != self.digest:
            raise ModelMissing(f"the file needs a model with digest {file.digest.hex()}, {self.name} has "
                               f"{self.digest.hex()}")
        if len(file.tiles) != 1:
            raise Unsupported(0, f"{len(file.tiles)} tiles: written by a later linic; update yours")
        tile, side = file.tiles[0], self.model.config.multiple
        if tile.quality > 100:
            raise Damaged(tile.offset - 1, f"quality {tile.quality}; 0 to 100 exist")
        z_size = -(-file.height // side), -(-file.width // side)
        with _inference():
            coder = Decoder(self.tables, tile.payload)
            try:
                y_hat_q8 = walk(self.model.plan(self._level(tile.quality), z_size), coder)
                coder.finish()
            except Damaged as error:
                raise Damaged(tile.offset + error.offset, f"the payload cannot be read to its end ({error}). Fetch the "
                              "file again, or decode it on the machine that wrote it") from error
            if file.checksum(0, _bytes(y_hat_q8.cpu().numpy())) != tile.checksum:
                raise LatentsMismatch(tile.offset, "the latents differ from the encoder's. Files of format version 0 "
                                      "decode only where their networks compute alike: use the machine that wrote it")
            l = self._level(tile.quality).float()
            x = self.model.synthesise(y_hat_q8[None].float() / 256, l)[0]
            pixels = torch.round(x.float().clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
        image = picture.from_array(picture.crop(pixels, file.height, file.width), file.mode)
        return picture.attach(image, {key: file.metadata[tag] for key, tag in TAGS.items() if tag in file.metadata})

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
        # Version 0 promises nothing between devices: without a wish it is the CPU, on every machine.
        return "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}; auto, cpu and cuda are possible")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch sees no CUDA device here. Use --device cpu")
    return name


def _fast_bf16(device: Any) -> bool:
    """Whether bf16 products are faster than float32 here."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public question for it as of torch 2.13
    return bool(check and check())


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
