"""Chunks <-> file bytes. The specification is docs/format.md; every number that a file holds is a constant here.

`build(image) -> bytes`, `parse(data) -> Image`, `sniff(prefix) -> bool`. Payloads go through unread: rangecoder and
the models decode them, and whoever has the latents compares `image.checksum(i, latents)` with the tile's.
Imports neither numpy nor torch: `linic info` needs this room alone.
Raises UsageError (build), NotLinic, Truncated, Damaged, Unsupported, LimitExceeded with the byte offset (parse).
"""
from linic.container.compact import FIRST, build_compact, parse_compact, sniff_compact
from linic.container.full import SIGNATURE, build_full, parse_full
from linic.container.image import (
    ARITHMETICS,
    CELL,
    COMPACT,
    FLOAT64,
    FROZEN,
    FULL,
    GENERATIVE,
    INTEGERS,
    MAX_PIXELS,
    METADATA,
    MODEL_CODES,
    MODES,
    NOTE,
    TILE,
    VERSION,
    Image,
    Tile,
    model_code,
    tiling,
)
from linic.errors import NotLinic, Truncated

__all__ = ["ARITHMETICS", "CELL", "COMPACT", "FLOAT64", "FROZEN", "FULL", "GENERATIVE", "INTEGERS", "MAX_PIXELS",
           "METADATA", "MODEL_CODES", "MODES", "NOTE", "TILE", "VERSION", "Image", "Tile", "build", "model_code",
           "parse", "sniff", "tiling"]


def build(image: Image) -> bytes:
    """The file that says `image`; the same image gives the same bytes. UsageError where a field cannot be said."""
    return build_compact(image) if image.profile == COMPACT else build_full(image)


def parse(data: bytes, *, max_pixels: int | None = MAX_PIXELS) -> Image:
    """Everything a file says, or a DecodeError. max_pixels bounds width * height (None: no bound)."""
    data = bytes(data)
    if data.startswith(SIGNATURE):
        return parse_full(data, max_pixels)
    if data[:1] == bytes([FIRST]):
        return parse_compact(data, max_pixels)
    if data and SIGNATURE.startswith(data):
        raise Truncated(len(data), "the file ends within its signature: fetch it again")
    raise NotLinic(0, _what_instead(data))


def sniff(prefix: bytes) -> bool:
    """Does a file that starts like this (8 bytes are needed) claim to be linic's?"""
    return prefix.startswith(SIGNATURE) or sniff_compact(prefix)


def _what_instead(data: bytes) -> str:
    if not data:
        return "the file is empty: fetch it again"
    if data[1:4] == SIGNATURE[1:4]:
        return "the signature is linic's but was altered, as a text-mode transfer does: copy the file as binary"
    return f"no linic file: it starts with {data[:8].hex(' ')}, not {SIGNATURE.hex(' ')} or {FIRST:02x}"
