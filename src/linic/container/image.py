"""What a linic file says, as data, and the numbers it says it with. Never renumber: files hold these numbers."""
from binascii import crc_hqx
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from zlib import crc32

from linic.errors import LimitExceeded

VERSION = 1
FULL, COMPACT = "full", "compact"
MODES = {0: "L", 1: "RGB"}
FLOAT64, INTEGERS = 0, 1
ARITHMETICS = {FLOAT64: "float64", INTEGERS: "integers"}
MODEL_CODES = {1: "lalic-xs", 2: "lalic-s", 3: "lalic", 17: "mrt-xs", 18: "mrt-s", 19: "mrt"}
# The digest that a code stands for, for ever; without one it is not yet given.
FROZEN = {1: "4e71ec3cdb35cb75", 17: "c84f0f2585fc1daf"}
GENERATIVE = (17, 18, 19)               # codes whose models draw what the file does not say
NOTE = "generative reconstruction: must not be used as evidence"     # TEXT of their files, and of all that they become
METADATA = {"ICCP": 1 << 22, "EXIF": 1 << 24, "XMP_": 1 << 24, "TEXT": 1 << 16}     # limits in bytes, in file order

DIGEST_BYTES = 8
CELL = 64                               # tile borders are multiples of it, so a tile has at least one
TILE = 2048                             # pixels; larger pictures are coded in several
MAX_SIDE = 1 << 24
MAX_TILES = 1 << 16
MAX_MODEL_CODE = (1 << 16) - 1
MAX_PIXELS = 1 << 26                    # by default: a decoder of one piece takes about 220 bytes a pixel


def model_code(digest: bytes) -> int:
    """The number of a registered model, 0 for any other: those are known by digest alone."""
    return {frozen: code for code, frozen in FROZEN.items()}.get(digest.hex(), 0)


def tiling(width: int, height: int) -> tuple[int, int]:
    """The fewest tiles across and down of which none exceeds TILE."""
    found = []
    for side in (width, height):
        cells, most = -(-side // CELL), TILE // CELL
        found.append(next(n for n in range(-(-cells // most), cells + 1) if _largest(cells, n) <= most))
    return found[0], found[1]


def _largest(cells: int, n: int) -> int:
    return max(b - a for a, b in pairwise(i * cells // n for i in range(n + 1)))


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

    @property
    def note(self) -> str:
        """What whoever looks at the picture must know; often nothing."""
        return self.metadata.get("TEXT", b"").decode() or (NOTE if self.model in GENERATIVE else "")

    def cells(self, cell: int = CELL) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile, in cells of 64 pixels or of 32; of those none lies wholly outside."""
        rows, columns = ([slice(*cut) for cut in pairwise(
            min(i * -(-side // CELL) // n * (CELL // cell), -(-side // cell)) for i in range(n + 1))]
            for side, n in ((self.height, self.tiles_y), (self.width, self.tiles_x)))
        return product(rows, columns)

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
