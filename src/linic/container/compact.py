"""Compact profile: 8 bytes (9 where a side exceeds 4096) and one tile's payload. docs/format.md, section 4.

Its CRC-16 covers latents, so parse cannot verify it: whoever decodes them compares `Image.checksum` with the tile's.
"""
from linic.container.image import COMPACT, INTEGERS, MODEL_CODES, VERSION, Image, Tile, check_size
from linic.errors import Damaged, Truncated, Unsupported, UsageError

FIRST = 0x8D
LARGE = 0x80                            # bit of the quality byte
SMALL_SIDE, LARGE_SIDE = 1 << 12, 1 << 16
CRC_BYTES = 2


def header(image: Image) -> bytes:
    """The bytes before the CRC-16, which covers them."""
    width, height = image.width, image.height
    large = max(width, height) > SMALL_SIDE
    sides = ((width - 1) << 16 | (height - 1)).to_bytes(4, "big") if large else (
        (width - 1) << 12 | (height - 1)).to_bytes(3, "big")
    return bytes([FIRST, image.model, image.tiles[0].quality | LARGE * large]) + sides


def build_compact(image: Image) -> bytes:
    for wrong, what in (
            (len(image.tiles) != 1 or (image.tiles_x, image.tiles_y) != (1, 1), "more tiles than one"),
            (image.metadata or image.unknown, "metadata"),
            (image.mode != "RGB", f"mode {image.mode}"),
            (image.model not in MODEL_CODES, f"the unregistered model code {image.model}"),
            (image.version != VERSION, f"another version than {VERSION}"),
            (image.arithmetic != INTEGERS, "another arithmetic than integers"),
            (not 1 <= min(image.width, image.height) <= max(image.width, image.height) <= LARGE_SIDE,
             f"a size of {image.width}x{image.height}")):
        if wrong:
            raise UsageError(f"the compact profile cannot say {what}: take the full one")
    tile = image.tiles[0]
    if not 0 <= tile.quality < LARGE or not 0 <= tile.checksum < 1 << 16:
        raise UsageError(f"quality {tile.quality} must be below 128, checksum {tile.checksum} below 65536")
    return header(image) + tile.checksum.to_bytes(CRC_BYTES, "big") + tile.payload


def sniff_compact(prefix: bytes) -> bool:
    return len(prefix) >= 8 and prefix[0] == FIRST and prefix[1] in MODEL_CODES


def parse_compact(data: bytes, max_pixels: int | None) -> Image:
    start = 9 if len(data) > 2 and data[2] & LARGE else 8
    if len(data) < start:
        raise Truncated(len(data), f"{len(data)} bytes, a compact header has {start}: fetch the file again")
    model, quality = data[1], data[2] & ~LARGE
    if model not in MODEL_CODES:
        raise Unsupported(1, f"model code {model} is not known to this linic: update it, or the file is no linic file")
    bits = 16 if data[2] & LARGE else 12
    sides = int.from_bytes(data[3:start - CRC_BYTES], "big")
    width, height = (sides >> bits) + 1, (sides & (1 << bits) - 1) + 1
    if data[2] & LARGE and max(width, height) <= SMALL_SIDE:
        raise Damaged(3, f"{width}x{height} is written the long way: fetch the file again")
    check_size(width, height, max_pixels, 3)
    tile = Tile(quality, data[start:], int.from_bytes(data[start - CRC_BYTES:start], "big"), start)
    return Image(width, height, [tile], model=model, arithmetic=INTEGERS, profile=COMPACT)
