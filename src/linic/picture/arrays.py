"""Pillow images <-> arrays: modes, grey, metadata, padding.

Takes modes RGB and L, 8 bits a channel, without transparency. Raises PictureError for the rest, naming the mode.
"""
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from linic.errors import PictureError

METADATA = ("icc_profile", "exif", "xmp")
NOTE = "linic"          # key of `info`: a sentence that whoever looks at the picture must know

_ALPHA = "transparency would be lost: paste it on a background, or drop it with image.convert({0!r})"
_DEEP = "more than 8 bits a sample would be lost: scale the values to 0..255 and convert to 'L' or 'RGB' yourself"
HOW_TO_CONVERT = {
    "1": "convert it with image.convert('L')",
    "P": "convert it with image.convert('RGB')",
    "CMYK": "convert it with its colour profile (PIL.ImageCms), or roughly with image.convert('RGB')",
    "YCbCr": "convert it with image.convert('RGB')",
    "LAB": "convert it with PIL.ImageCms",
    "HSV": "convert it with image.convert('RGB')",
    "RGBX": "convert it with image.convert('RGB')",
    **dict.fromkeys(["RGBA", "RGBa", "PA"], _ALPHA.format("RGB")),
    **dict.fromkeys(["LA", "La"], _ALPHA.format("L")),
    **dict.fromkeys(["I", "F", "I;16", "I;16L", "I;16B", "I;16N"], _DEEP),
}


def check(image: Image.Image) -> None:
    """Refuse what would have to be changed. Nothing is decoded yet: reading the header is enough."""
    if image.mode not in ("RGB", "L"):
        how = HOW_TO_CONVERT.get(image.mode, "convert it to 'RGB' or 'L'")
        raise PictureError(f"mode {image.mode} is not taken (RGB and L are); {how}")
    # Pillow opens 16-bit colour as mode RGB and drops the low bytes while loading; only the raw mode tells.
    tiles = getattr(image, "tile", [])
    args = tiles[0].args if tiles else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    if ";16" in str(raw):
        raise PictureError(f"16 bits a sample (raw mode {raw}); {_DEEP}")
    if "transparency" in image.info:
        how = _ALPHA.format(image.mode)
        raise PictureError(f"mode {image.mode} with a transparent colour is not taken; {how} "
                           "and del image.info['transparency']")
    if min(image.size) < 1:
        raise PictureError(f"a picture of {image.width}x{image.height} has no pixels")


def to_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Grey is repeated into three channels; `image.mode` is what `from_array` needs to undo it."""
    check(image)
    array = np.array(image, dtype=np.uint8)
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


def from_array(array: np.ndarray, mode: str = "RGB") -> Image.Image:
    """uint8 (H, W, 3) -> image of that mode. Grey is the rounded mean of the three channels."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise PictureError(f"an array of uint8 (H, W, 3) is needed, not {array.dtype} {array.shape}")
    if mode == "RGB":
        return Image.fromarray(np.ascontiguousarray(array))
    if mode == "L":
        # The sum of three is never halfway between multiples of 3, so adding 1 rounds exactly.
        return Image.fromarray(((array.astype(np.uint16).sum(axis=2) + 1) // 3).astype(np.uint8))
    raise PictureError(f"mode {mode!r} is not made (RGB and L are)")


def metadata(image: Image.Image) -> dict[str, bytes]:
    """The colour profile, EXIF and XMP, byte for byte as the file had them."""
    image.load()  # PNG may carry EXIF and XMP behind the pixels.
    found = {}
    for key in METADATA:
        value = image.info.get(key)
        if isinstance(value, str):
            value = value.encode()
        if value:
            found[key] = bytes(value)
    return found


def plain(image: Image.Image) -> Image.Image:
    """The picture that needs no metadata to be shown right: turned as its EXIF says, its colours converted to sRGB."""
    kept, image = metadata(image), ImageOps.exif_transpose(image)
    if profile := kept.get("icc_profile"):
        try:
            image = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(BytesIO(profile)),
                                              ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError) as error:
            raise PictureError(f"its colour profile cannot be applied ({error}): take the full profile, which keeps "
                               "it, or remove it") from error
    return image


def attach(image: Image.Image, kept: dict[str, bytes]) -> Image.Image:
    """The reverse of `metadata`: the same image, carrying these bytes where `save` finds them."""
    unknown = sorted(set(kept) - set(METADATA))
    if unknown:
        raise PictureError(f"unknown metadata {', '.join(unknown)}; known: {', '.join(METADATA)}")
    image.info.update(kept)
    return image


def pad(array: np.ndarray, multiple: int = 64) -> np.ndarray:
    """(H, W, ...) -> height and width rounded up to a multiple; the last row and column are repeated."""
    height, width = array.shape[:2]
    border = [(0, -height % multiple), (0, -width % multiple)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, border, mode="edge")


def crop(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Undo `pad`: the top left height x width."""
    if array.shape[0] < height or array.shape[1] < width:
        raise PictureError(f"cannot crop {array.shape[1]}x{array.shape[0]} to {width}x{height}")
    return array[:height, :width]
