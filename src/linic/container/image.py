"""What a linic file says, as data, and the numbers it says it with. Never renumber: files hold these numbers."""
from binascii import crc_hqx
from dataclasses import dataclass, field
from zlib import crc32

from linic.errors import LimitExceeded

VERSION = 0
FULL, COMPACT = "full", "compact"
MODES = {0: "L", 1: "RGB"}
ARITHMETICS = {0: "float64"}            # 1 is reserved for integer programs
MODEL_CODES = {1: "lalic-xs", 2: "lalic-s", 3: "lalic", 17: "mrt-xs", 18: "mrt-s", 19: "mrt"}
METADATA = {"ICCP": 1 << 22, "EXIF": 1 << 24, "XMP_": 1 << 24, "TEXT": 1 << 16}     # limits in bytes, in file order

DIGEST_BYTES = 8
CELL = 64                               # tile borders are multiples of it, so a tile has at least one
MAX_SIDE = 1 << 24
MAX_TILES = 1 << 16
MAX_MODEL_CODE = (1 << 16) - 1
MAX_PIXELS = 1 << 26                    # by default: a decoder of one piece takes about 220 bytes a pixel


def model_code(name: str) -> int:
    """The number of a registered model, 0 for any other: those are known by digest alone."""
    return {name: code for code, name in MODEL_CODES.items()}.get(name, 0)


@dataclass
class Tile:
    """quality: row of the model's table; checksum: CRC of y_hat in Q8 (Image.checksum), known after the payload;
    offset: where a parsed file has the payload, for messages."""

    quality: int
    payload: bytes
    checksum: int = 0
    offset: int = field(default=0, compare=False)


@dataclass
class Image:
    """tiles: row by row, tiles_x * tiles_y. model: code, 0 if none is registered. digest: of the normative part,
    empty in the compact profile. metadata: bytes by tag of METADATA. unknown: ancillary chunks of later versions."""

    width: int
    height: int
    tiles: list[Tile]
    mode: str = "RGB"
    model: int = 0
    digest: bytes = b""
    tiles_x: int = 1
    tiles_y: int = 1
    arithmetic: int = 0
    metadata: dict[str, bytes] = field(default_factory=dict)
    unknown: list[tuple[str, bytes]] = field(default_factory=list)
    profile: str = FULL
    version: int = VERSION

    @property
    def model_name(self) -> str | None:
        return MODEL_CODES.get(self.model)

    def checksum(self, tile: int, latents: bytes) -> int:
        """What tiles[tile].checksum must be. latents: y_hat in Q8, int32 little-endian by row, column, channel."""
        if self.profile == FULL:
            return crc32(latents)
        from linic.container.compact import header

        return crc_hqx(latents, crc_hqx(header(self), 0xFFFF))


def check_size(width: int, height: int, max_pixels: int | None, offset: int) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise LimitExceeded(offset, f"the picture is {width}x{height}, {width * height} pixels; {max_pixels} are "
                                    "allowed: raise max_pixels if you trust the file")
