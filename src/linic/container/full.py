"""Full profile: signature, then chunks: HEAD first, metadata, DATA last. docs/format.md, sections 2 and 3.

Every length is compared with its limit and with the bytes that remain before anything is cut out or allocated.
"""
from typing import NamedTuple
from zlib import crc32

from linic.container.image import (
    ARITHMETICS,
    CELL,
    DIGEST_BYTES,
    MAX_MODEL_CODE,
    MAX_SIDE,
    MAX_TILES,
    METADATA,
    MODES,
    VERSION,
    Image,
    Tile,
    check_size,
)
from linic.errors import Damaged, Truncated, Unsupported, UsageError

SIGNATURE = b"\x8cLNC\r\n\x1a\n"
MAX_VARINT_BYTES = 5
CRC_BYTES = 4
RECORD_BYTES = 1 + CRC_BYTES            # a tile's quality and checksum, around its payload
HEAD_LIMIT = 64 + MAX_VARINT_BYTES * MAX_TILES
DATA_LIMIT = 1 << 31
UNKNOWN_LIMIT = 1 << 24
LIMITS = {"HEAD": HEAD_LIMIT, **METADATA, "DATA": DATA_LIMIT}        # every chunk of this version, in file order
ORDER = list(LIMITS)
RESERVED = ("ALPH",)
ANCILLARY_BIT = 0x20                    # of a tag's first byte: a lower-case letter may be skipped
MODE_CODES = {name: code for code, name in MODES.items()}


def varint(value: int) -> bytes:
    """Minimal LEB128."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, offset after it)."""
    value = 0
    for i in range(MAX_VARINT_BYTES):
        if at + i >= end:
            raise Truncated(at, "ends within a number: fetch the file again")
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if byte == 0 and i:
                raise Damaged(at, "a number is not in its shortest form: fetch the file again")
            return value, at + i + 1
    raise Damaged(at, f"a number of more than {MAX_VARINT_BYTES} bytes: fetch the file again")


# Build


def build_full(image: Image) -> bytes:
    _check(image)
    chunks = [("HEAD", _head(image)), *((tag, image.metadata[tag]) for tag in METADATA if tag in image.metadata),
              *image.unknown, ("DATA", b"".join(map(_record, image.tiles)))]
    return SIGNATURE + b"".join(_chunk(tag, body) for tag, body in chunks)


def _chunk(tag: str, body: bytes) -> bytes:
    limit = LIMITS.get(tag, UNKNOWN_LIMIT)
    if len(body) > limit:
        raise UsageError(f"chunk {tag} would have {len(body)} bytes, the limit is {limit}")
    covered = tag.encode("ascii") + varint(len(body)) + body
    return covered + crc32(covered).to_bytes(CRC_BYTES, "big")


def _head(image: Image) -> bytes:
    numbers = [image.width, image.height, image.model, image.tiles_x, image.tiles_y,
               *(len(tile.payload) for tile in image.tiles[:-1])]        # the last follows from DATA's length
    return (bytes([image.version, MODE_CODES[image.mode], image.arithmetic]) + image.digest
            + b"".join(map(varint, numbers)))


def _record(tile: Tile) -> bytes:
    return bytes([tile.quality]) + tile.payload + tile.checksum.to_bytes(CRC_BYTES, "big")


def _check(image: Image) -> None:
    tags = [tag for tag, _ in image.unknown]
    for wrong, what in (
            (image.version != VERSION, f"version {image.version}: this linic writes {VERSION}"),
            (image.mode not in MODE_CODES, f"mode {image.mode}: there are {', '.join(MODE_CODES)}"),
            (image.arithmetic not in ARITHMETICS, f"arithmetic {image.arithmetic}"),
            (not all(1 <= side <= MAX_SIDE for side in (image.width, image.height)),
             f"a size of {image.width}x{image.height}: sides go from 1 to {MAX_SIDE}"),
            (len(image.digest) != DIGEST_BYTES, f"a digest of {len(image.digest)} bytes: it has {DIGEST_BYTES}"),
            (not 0 <= image.model <= MAX_MODEL_CODE, f"model code {image.model}: at most {MAX_MODEL_CODE}"),
            (_bad_tiles(image.width, image.height, image.tiles_x, image.tiles_y),
             f"{image.tiles_x}x{image.tiles_y} tiles for {image.width}x{image.height} pixels"),
            (len(image.tiles) != image.tiles_x * image.tiles_y,
             f"{len(image.tiles)} tiles where there are {image.tiles_x}x{image.tiles_y}"),
            (not all(0 <= t.quality <= 255 and 0 <= t.checksum < 1 << 32 for t in image.tiles),
             "a quality above 255 or a checksum above 32 bits"),
            (not set(image.metadata) <= set(METADATA), f"metadata {sorted(set(image.metadata) - set(METADATA))}"),
            (not _is_text(image.metadata.get("TEXT", b"")), "a TEXT that is not UTF-8"),
            (len(set(tags)) != len(tags) or any(not _may_skip(tag) for tag in tags), f"unknown chunks {tags}")):
        if wrong:
            raise UsageError(f"a file cannot say {what}")


# Parse


class Chunk(NamedTuple):
    tag: str
    start: int          # offset of the tag
    body: int           # offsets of the body's first byte and of the one after its last
    end: int


class Head(NamedTuple):
    image: Image        # without tiles
    lengths: list[int]  # of all payloads but the last


def parse_full(data: bytes, max_pixels: int | None) -> Image:
    chunk = _read_chunk(data, len(SIGNATURE))
    if chunk.tag != "HEAD":
        raise Damaged(chunk.start, f"chunk {chunk.tag} where HEAD must be: fetch the file again")
    image, lengths = _parse_head(data, chunk, max_pixels)
    seen = {"HEAD"}
    while chunk.tag != "DATA":
        chunk = _read_chunk(data, chunk.end + CRC_BYTES)
        _check_order(chunk, seen)
        seen.add(chunk.tag)
        if chunk.tag in METADATA:
            image.metadata[chunk.tag] = data[chunk.body:chunk.end]
        elif chunk.tag not in LIMITS:
            image.unknown.append((chunk.tag, data[chunk.body:chunk.end]))
        if chunk.tag == "TEXT" and not _is_text(image.metadata["TEXT"]):
            raise Damaged(chunk.body, "TEXT is not UTF-8: ask who wrote the file")
    rest = len(data) - chunk.end - CRC_BYTES
    if rest:
        raise Damaged(len(data) - rest, f"{rest} bytes after the end of the picture: cut them off")
    image.tiles = _parse_tiles(data, chunk, lengths)
    return image


def _read_chunk(data: bytes, start: int) -> Chunk:
    if len(data) - start < 4:
        raise Truncated(start, f"{len(data) - start} bytes left where a chunk must start: fetch the file again")
    raw = data[start:start + 4]
    if not raw.replace(b"_", b"").isalnum() or not raw[:1].isalpha():
        raise Damaged(start, f"{raw!r} is no chunk's tag: fetch the file again")
    tag = raw.decode("ascii")
    length, body = read_varint(data, start + 4, len(data))
    limit, remain = LIMITS.get(tag, UNKNOWN_LIMIT), len(data) - body - CRC_BYTES
    if length > limit:
        raise Damaged(start + 4, f"chunk {tag} claims {length} bytes, the format allows {limit}: fetch the file again")
    if length > remain:
        raise Truncated(start + 4, f"chunk {tag} claims {length} bytes, {max(remain, 0)} remain: fetch the file again")
    end = body + length
    if crc32(memoryview(data)[start:end]) != int.from_bytes(data[end:end + CRC_BYTES], "big"):
        raise Damaged(start, f"chunk {tag} is damaged (its checksum differs): fetch the file again")
    return Chunk(tag, start, body, end)


def _check_order(chunk: Chunk, seen: set[str]) -> None:
    tag = chunk.tag
    if tag in seen:
        raise Damaged(chunk.start, f"chunk {tag} comes twice: ask who wrote the file")
    if tag not in LIMITS and not _may_skip(tag):
        why = "is reserved" if tag in RESERVED else "is unknown"
        raise Unsupported(chunk.start, f"chunk {tag} {why} in version {VERSION} and may not be skipped: update linic")
    later = [known for known in ORDER[ORDER.index(tag):] if known in seen] if tag in LIMITS else []
    if later:
        raise Damaged(chunk.start, f"chunk {tag} comes after {later[0]}: ask who wrote the file")


def _may_skip(tag: str) -> bool:
    raw = tag.encode("ascii", "replace")
    return (len(raw) == 4 and raw.replace(b"_", b"").isalnum() and raw[:1].isalpha()
            and bool(raw[0] & ANCILLARY_BIT))


def _parse_head(data: bytes, chunk: Chunk, max_pixels: int | None) -> Head:
    fixed = 3 + DIGEST_BYTES
    at, end = chunk.body, chunk.end
    if end > at and data[at] != VERSION:
        raise Unsupported(at, f"version {data[at]}; this linic reads version {VERSION}: update it")
    if end - at < fixed:
        raise Truncated(at, f"HEAD has {end - at} bytes, fewer than {fixed}: ask who wrote the file")
    mode, arithmetic = data[at + 1], data[at + 2]
    if mode not in MODES:
        raise Unsupported(at + 1, f"mode {mode}; this linic reads {MODES}: update it")
    if arithmetic not in ARITHMETICS:
        raise Unsupported(at + 2, f"arithmetic {arithmetic}; this linic has {ARITHMETICS}: update it")
    image = Image(0, 0, [], mode=MODES[mode], arithmetic=arithmetic, digest=data[at + 3:at + fixed])
    at = sides = at + fixed
    image.width, at = _bounded("width", data, at, end, 1, MAX_SIDE)
    image.height, at = _bounded("height", data, at, end, 1, MAX_SIDE)
    check_size(image.width, image.height, max_pixels, sides)
    image.model, at = _bounded("model code", data, at, end, 0, MAX_MODEL_CODE)
    grid = at
    image.tiles_x, at = _bounded("tiles across", data, at, end, 1, MAX_TILES)
    image.tiles_y, at = _bounded("tiles down", data, at, end, 1, MAX_TILES)
    others = image.tiles_x * image.tiles_y - 1
    if _bad_tiles(image.width, image.height, image.tiles_x, image.tiles_y):
        raise Damaged(grid, f"{image.tiles_x}x{image.tiles_y} tiles do not fit {image.width}x{image.height} pixels: "
                            "ask who wrote the file")
    if others > end - at:
        raise Truncated(at, f"HEAD ends before the lengths of {others} tiles: ask who wrote the file")
    lengths = []
    for _ in range(others):
        length, at = read_varint(data, at, end)
        lengths.append(length)
    if at != end:
        raise Damaged(at, f"{end - at} bytes too many in HEAD: ask who wrote the file")
    return Head(image, lengths)


def _bounded(name: str, data: bytes, at: int, end: int, least: int, most: int) -> tuple[int, int]:
    value, after = read_varint(data, at, end)
    if not least <= value <= most:
        raise Damaged(at, f"{name} is {value}, must be from {least} to {most}: ask who wrote the file")
    return value, after


def _bad_tiles(width: int, height: int, tiles_x: int, tiles_y: int) -> bool:
    return not (1 <= tiles_x <= -(-width // CELL) and 1 <= tiles_y <= -(-height // CELL)
                and tiles_x * tiles_y <= MAX_TILES)


def _parse_tiles(data: bytes, chunk: Chunk, lengths: list[int]) -> list[Tile]:
    last = chunk.end - chunk.body - sum(lengths) - RECORD_BYTES * (len(lengths) + 1)
    if last < 0:
        raise Damaged(chunk.body, f"DATA is {-last} bytes shorter than its tiles: ask who wrote the file")
    tiles, at = [], chunk.body
    for length in [*lengths, last]:
        crc = at + 1 + length
        checksum = int.from_bytes(data[crc:crc + CRC_BYTES], "big")
        tiles.append(Tile(data[at], data[at + 1:crc], checksum, at + 1))
        at = crc + CRC_BYTES
    return tiles


def _is_text(body: bytes) -> bool:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
