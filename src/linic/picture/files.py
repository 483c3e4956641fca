"""Picture files <-> Pillow images, and whole-file writing.

Raises PictureError with the path in front: missing, unreadable, damaged, animated, or of a mode linic does not take.
"""
import io
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from linic.errors import LinicError, PictureError, UnreadablePicture
from linic.picture.arrays import METADATA, NOTE, check, metadata

# Lossless where the format can be; the lossy ones as good as they usefully get.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".bmp": ("BMP", {}),
    ".ppm": ("PPM", {}),
    ".pgm": ("PPM", {}),
    ".jpg": ("JPEG", {"quality": 97, "subsampling": "4:4:4", "optimize": True}),
    ".jpeg": ("JPEG", {"quality": 97, "subsampling": "4:4:4", "optimize": True}),
    ".avif": ("AVIF", {"quality": 97, "subsampling": "4:4:4"}),
}
KEEPS = {
    "PNG": METADATA, "WEBP": METADATA, "JPEG": METADATA, "AVIF": METADATA,
    "TIFF": ("icc_profile",), "BMP": (), "PPM": (),
}


def read(path: str | os.PathLike[str], name: str | None = None) -> Image.Image:
    """A loaded image of a kind linic takes. Pillow's limit on pixels holds (PIL.Image.MAX_IMAGE_PIXELS, twice)."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PictureError(f"{name or path}: {(error.strerror or str(error)).lower()}") from error
    return read_bytes(data, name or str(path))


def read_bytes(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns at the limit and refuses at twice the limit; between them a picture is only large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            _check_still(image)
            check(image)
            image.load()
    except PictureError as error:
        raise PictureError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too many pixels: {error} "
                           "If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except UnidentifiedImageError:
        raise UnreadablePicture(f"{name}: not a picture that Pillow can read") from None
    # Pillow's readers raise all of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError) as error:
        raise UnreadablePicture(f"{name}: damaged or cut short: {error}") from error
    return image


def _check_still(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    # The first picture of an MPO is the photograph; the others are its previews and gain maps.
    if frames > 1 and image.format != "MPO":
        raise PictureError(f"{frames} frames; linic codes still pictures: extract one first")


def save(image: Image.Image, path: str | os.PathLike[str]) -> list[str]:
    """Write the format the suffix names, with the metadata it can carry. Returns the metadata it cannot."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise PictureError(f"{path}: unknown suffix {suffix!r}; known: {' '.join(FORMATS)}")
    data, lost = to_bytes(image, suffix)
    write_whole(path, data)
    return lost


def to_bytes(image: Image.Image, suffix: str = ".png") -> tuple[bytes, list[str]]:
    """A picture file in memory, and the names of the metadata its format cannot carry."""
    kind, options = FORMATS[suffix]
    kept = metadata(image)
    carried: dict[str, Any] = {key: value for key, value in kept.items() if key in KEEPS[kind]}
    if kind == "PNG" and not is_utf8(carried.get("xmp", b"")):
        del carried["xmp"]  # PNG's chunk for it holds UTF-8 alone
    lost = sorted(set(kept) - set(carried))
    if kind == "PNG":
        carried["pnginfo"] = PngImagePlugin.PngInfo()
        if "xmp" in carried:    # Pillow's PNG writer has no argument for it; this is the chunk its reader looks for
            carried["pnginfo"].add_itxt("XML:com.adobe.xmp", carried.pop("xmp").decode())
    if note := image.info.get(NOTE):
        if kind == "PNG":
            carried["pnginfo"].add_text("Comment", note)
        elif kind == "JPEG":
            carried["comment"] = note
        else:
            lost.append("the note")
    bare = image.copy()
    bare.info = {}  # else Pillow carries over what only happens to be there, a GIF comment for one
    out = io.BytesIO()
    try:
        bare.save(out, format=kind, **options, **carried)
    except (OSError, ValueError, KeyError) as error:
        raise PictureError(f"cannot write as {kind}: {error}") from error
    return out.getvalue(), lost


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the whole new one, never half."""
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)  # a device or a pipe must not be replaced by a file
            return
        beside = target.with_name(f".{target.name[:200]}.{uuid.uuid4().hex}.part")
        try:
            with open(beside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(beside, target.stat().st_mode & 0o777)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise LinicError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from error
