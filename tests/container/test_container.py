"""The file format: what is built is parsed, and every damaged file is refused with its place, in bounded time."""
import itertools
import random
import subprocess
import sys
import time
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linic.container import (
    COMPACT,
    FLOAT64,
    INTEGERS,
    MAX_PIXELS,
    METADATA,
    MODEL_CODES,
    NOTE,
    Image,
    Tile,
    build,
    parse,
    sniff,
    tiling,
)
from linic.container.full import SIGNATURE, read_varint, varint
from linic.errors import (
    Damaged,
    DecodeError,
    LimitExceeded,
    NotLinic,
    Truncated,
    Unsupported,
    UsageError,
)

DIGEST = bytes(range(8))
SMALL = Image(17, 5, [Tile(40, b"abc", 0x01020304)], model=1, digest=DIGEST)
RICH = Image(130, 70, [Tile(i, b"p" * i, i) for i in range(6)], "L", 0, DIGEST, 3, 2,
             metadata={"ICCP": b"profile", "TEXT": "näher".encode()}, unknown=[("noTE", b"later")])
TINY = Image(768, 512, [Tile(9, b"stream", 0xBEEF)], model=17, arithmetic=INTEGERS, profile=COMPACT)


def chunk(tag, body, length=None):
    covered = tag + (varint(len(body)) if length is None else length) + body
    return covered + crc32(covered).to_bytes(4, "big")


def head(version=1, mode=1, arithmetic=0, digest=DIGEST, numbers=(17, 5, 1, 1, 1), tail=b""):
    return chunk(b"HEAD", bytes([version, mode, arithmetic]) + digest + b"".join(map(varint, numbers)) + tail)


DATA = chunk(b"DATA", b"\x28abc\1\2\3\4")


# The promise


def test_golden_bytes_of_a_full_file():
    """If this fails, old files no longer decode: a new version is due, not a new number."""
    assert build(SMALL).hex() == (
        "8c4c4e430d0a1a0a" "48454144" "10" "010100" "0001020304050607" "11" "05" "01" "01" "01" "e3cfd8b0"
        "44415441" "08" "28" "616263" "01020304" "d0c59faf")


def test_golden_bytes_of_a_compact_file():
    assert build(TINY).hex() == "8d" "11" "09" "2ff1ff" "beef" + b"stream".hex()
    large = Image(4097, 2, [Tile(100, b"", 1)], model=18, arithmetic=INTEGERS, profile=COMPACT)
    assert build(large).hex() == "8d" "12" "e4" "10000001" "0001"
    assert parse(build(large)) == large


def test_checksums_are_crc32_of_the_latents_and_crc16_of_header_and_latents():
    assert SMALL.checksum(0, b"123456789") == 0xCBF43926
    assert replace(TINY).checksum(0, b"123456789") == crc16(bytes.fromhex("8d11092ff1ff") + b"123456789")
    assert crc16(b"123456789") == 0x29B1                      # the published check value of CRC-16/IBM-3740


def crc16(data):
    value = 0xFFFF
    for byte in data:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1 ^ 0x1021 if value & 0x8000 else value << 1) & 0xFFFF
    return value


# Round trips


@st.composite
def images(draw):
    width, height = draw(st.integers(1, 1 << 24) | st.integers(1, 300)), draw(st.integers(1, 300))
    across, down = draw(st.integers(1, min(4, -(-width // 64)))), draw(st.integers(1, min(4, -(-height // 64))))
    tiles = [Tile(draw(st.integers(0, 255)), draw(st.binary(max_size=300)), draw(st.integers(0, (1 << 32) - 1)))
             for _ in range(across * down)]
    metadata = draw(st.dictionaries(st.sampled_from(["ICCP", "EXIF", "XMP_"]), st.binary(max_size=200)))
    if draw(st.booleans()):
        metadata["TEXT"] = draw(st.text(max_size=50)).encode()
    unknown = draw(st.dictionaries(st.sampled_from(["abcd", "x_99"]), st.binary(max_size=20)))
    return Image(width, height, tiles, draw(st.sampled_from(["RGB", "L"])), draw(st.integers(0, 65535)),
                 draw(st.binary(min_size=8, max_size=8)), across, down, draw(st.sampled_from([FLOAT64, INTEGERS])),
                 metadata=metadata, unknown=[*unknown.items()])


@settings(max_examples=300, deadline=None)
@given(images())
def test_what_was_built_is_parsed_and_little_is_added(image):
    data = build(image)
    assert sniff(data[:8]) and parse(data, max_pixels=None) == image
    content = [t.payload for t in image.tiles] + [*image.metadata.values()] + [b for _, b in image.unknown]
    chunks = len(image.metadata) + len(image.unknown)
    assert len(data) - sum(map(len, content)) <= 64 + 16 * (len(image.tiles) - 1) + 13 * chunks


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 65536), st.integers(1, 65536), st.integers(0, 127), st.binary(max_size=50),
       st.integers(0, 65535), st.sampled_from(sorted(MODEL_CODES)))
def test_a_compact_file_has_eight_bytes_beside_its_payload_nine_when_large(w, h, quality, payload, checksum, model):
    image = Image(w, h, [Tile(quality, payload, checksum)], model=model, arithmetic=INTEGERS, profile=COMPACT)
    data = build(image)
    assert len(data) == len(payload) + (9 if max(w, h) > 4096 else 8)
    assert sniff(data) == (len(data) >= 8) and parse(data, max_pixels=None) == image


@given(st.integers(0, (1 << 35) - 1))
def test_numbers_are_written_in_their_shortest_form(value):
    written = varint(value)
    assert read_varint(written, 0, len(written)) == (value, len(written)) and len(written) <= 5


@pytest.mark.parametrize("size", [(768, 512), (1 << 24, 1 << 24)])
def test_overhead_of_one_tile_is_at_most_64_bytes(size):
    payload = bytes(1 << 21)
    image = Image(*size, [Tile(255, payload, 0xFFFFFFFF)], model=65535, digest=DIGEST)
    assert len(build(image)) - len(payload) <= 58


def test_many_tiles_cost_at_most_16_bytes_each():
    tiles = [Tile(0, bytes(20_000), 0)] * 100
    image = Image(20_480, 20_480, tiles, digest=DIGEST, tiles_x=10, tiles_y=10)
    assert len(build(image)) - 100 * 20_000 <= 64 + 16 * 99
    assert parse(build(image), max_pixels=None) == image


# Damage


@pytest.mark.parametrize("image", [SMALL, RICH], ids=["small", "rich"])
def test_a_full_file_cut_anywhere_is_refused_with_an_offset_inside_it(image):
    data = build(image)
    for end in range(len(data)):
        with pytest.raises(DecodeError) as caught:
            parse(data[:end])
        assert 0 <= caught.value.offset <= end


@pytest.mark.parametrize("image", [SMALL, RICH], ids=["small", "rich"])
@pytest.mark.parametrize("mask", [0xFF, 0x01, 0x20, 0x80])
def test_a_full_file_with_one_byte_changed_is_refused(image, mask):
    data = build(image)
    for at in range(len(data)):
        with pytest.raises(DecodeError) as caught:
            parse(data[:at] + bytes([data[at] ^ mask]) + data[at + 1:])
        assert 0 <= caught.value.offset <= len(data)


@pytest.mark.parametrize("bit", range(8 * 8))
def test_a_compact_header_with_one_bit_flipped_says_something_else_or_is_refused(bit):
    data = bytearray(build(TINY))
    data[bit // 8] ^= 1 << bit % 8
    try:
        assert parse(bytes(data)) != TINY                     # the CRC-16 over header and latents then tells
    except DecodeError as error:
        assert error.offset <= len(data)


def test_two_thousand_mutations_give_an_error_or_an_image_in_a_few_seconds():
    chance, started = random.Random(7), time.monotonic()
    files = [build(SMALL), build(RICH), build(TINY)]
    for _ in range(2000):
        data = bytearray(chance.choice(files))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            change = chance.choice(["set", "cut", "insert", "double"])
            if change == "set" and at < len(data):
                data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            elif change == "cut":
                del data[at:at + chance.randint(1, 8)]
            elif change == "insert":
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            else:
                data += data[at:at + 40]
        check_any(bytes(data))
    assert time.monotonic() - started < 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=30), st.sampled_from([b"", SIGNATURE, b"\x8d\x01"]))
def test_any_bytes_even_with_right_checksums_give_an_error_or_an_image(body, data, start):
    """Checksums that are right let the fuzzer through to the fields behind them."""
    check_any(start + body)
    check_any(SIGNATURE + chunk(b"HEAD", body) + chunk(b"DATA", data))
    check_any(SIGNATURE + chunk(b"HEAD", b"\0\1\0" + DIGEST + body) + chunk(b"DATA", data))


def check_any(data):
    try:
        image = parse(data)
    except DecodeError as error:
        assert 0 <= error.offset <= len(data)
    else:
        assert image.width * image.height <= MAX_PIXELS and build(image) is not None


# One test an error

FULL_ERRORS = {
    "empty": (b"", NotLinic, "empty"),
    "png": (b"\x89PNG\r\n\x1a\n....", NotLinic, "no linic file"),
    "text mode": (SIGNATURE.replace(b"\r\n", b"\n") + head(), NotLinic, "text-mode"),
    "half a signature": (SIGNATURE[:5], Truncated, "signature"),
    "no chunk": (SIGNATURE, Truncated, "0 bytes left"),
    "no tag": (SIGNATURE + b"1234" + bytes(20), Damaged, "no chunk's tag"),
    "HEAD not first": (SIGNATURE + DATA, Damaged, "DATA where HEAD must be"),
    "HEAD twice": (SIGNATURE + head() + head() + DATA, Damaged, "HEAD comes twice"),
    "wrong order": (SIGNATURE + head() + chunk(b"EXIF", b"e") + chunk(b"ICCP", b"i") + DATA, Damaged, "after EXIF"),
    "metadata twice": (SIGNATURE + head() + chunk(b"EXIF", b"") * 2 + DATA, Damaged, "EXIF comes twice"),
    "ancillary twice": (SIGNATURE + head() + chunk(b"exTR", b"") * 2 + DATA, Damaged, "exTR comes twice"),
    "unknown critical": (SIGNATURE + head() + chunk(b"MESH", b"") + DATA, Unsupported, "MESH is unknown"),
    "alpha": (SIGNATURE + head() + chunk(b"ALPH", b"") + DATA, Unsupported, "ALPH is reserved"),
    "no DATA": (SIGNATURE + head(), Truncated, "0 bytes left"),
    "bytes after": (SIGNATURE + head() + DATA + b"more", Damaged, "4 bytes after the end"),
    "checksum": (SIGNATURE + head()[:-1] + b"?" + DATA, Damaged, "HEAD is damaged"),
    "long number": (SIGNATURE + chunk(b"HEAD", b"", b"\x80\0"), Damaged, "shortest form"),
    "endless number": (SIGNATURE + b"HEAD" + b"\xff" * 9, Damaged, "more than 5 bytes"),
    "cut number": (SIGNATURE + b"HEAD\xff", Truncated, "within a number"),
    "length beyond the file": (SIGNATURE + b"HEAD\x40" + bytes(9), Truncated, "claims 64 bytes, 5 remain"),
    "length beyond the limit": (SIGNATURE + b"HEAD" + varint(1 << 20), Damaged, "the format allows 327744"),
    "ancillary beyond the limit": (SIGNATURE + head() + b"exTR" + varint(1 << 25), Damaged, "the format allows"),
    "short HEAD": (SIGNATURE + chunk(b"HEAD", b"\1\1\0") + DATA, Truncated, "HEAD has 3 bytes"),
    "newer version": (SIGNATURE + head(version=2) + DATA, Unsupported, "version 2; this linic reads version 1"),
    "mode": (SIGNATURE + head(mode=2) + DATA, Unsupported, "mode 2"),
    "arithmetic": (SIGNATURE + head(arithmetic=2) + DATA, Unsupported, "arithmetic 2"),
    "no width": (SIGNATURE + head(numbers=(0, 5, 1, 1, 1)) + DATA, Damaged, "width is 0"),
    "no height": (SIGNATURE + head(numbers=(5, 0, 1, 1, 1)) + DATA, Damaged, "height is 0"),
    "wide": (SIGNATURE + head(numbers=((1 << 24) + 1, 1, 1, 1, 1)) + DATA, Damaged, "width is 16777217"),
    "many pixels": (SIGNATURE + head(numbers=(1 << 20, 1 << 20, 1, 1, 1)) + DATA, LimitExceeded, "raise max_pixels"),
    "model code": (SIGNATURE + head(numbers=(17, 5, 65536, 1, 1)) + DATA, Damaged, "model code is 65536"),
    "no tiles": (SIGNATURE + head(numbers=(17, 5, 1, 0, 1)) + DATA, Damaged, "tiles across is 0"),
    "narrow tiles": (SIGNATURE + head(numbers=(17, 5, 1, 2, 1, 0)) + DATA, Damaged, "do not fit 17x5"),
    "no lengths": (SIGNATURE + head(numbers=(200, 200, 1, 2, 2)) + DATA, Truncated, "lengths of 3 tiles"),
    "HEAD too long": (SIGNATURE + head(tail=b"\0") + DATA, Damaged, "1 bytes too many"),
    "DATA too short": (SIGNATURE + head(numbers=(65, 5, 1, 2, 1, 9)) + DATA, Damaged, "DATA is 11 bytes shorter"),
    "text": (SIGNATURE + head() + chunk(b"TEXT", b"\xff") + DATA, Damaged, "not UTF-8"),
    "compact: cut": (b"\x8d\x01\x00\x00\x00\x00\x00", Truncated, "a compact header has 8"),
    "compact: large, cut": (b"\x8d\x01\x80\x00\x00\x00\x00\x00", Truncated, "a compact header has 9"),
    "compact: model": (b"\x8d\x00" + bytes(9), Unsupported, "model code 0 is not known"),
    "compact: long way": (b"\x8d\x01\x80" + bytes(9), Damaged, "the long way"),
    "compact: pixels": (b"\x8d\x01\x80" + b"\xff" * 9, LimitExceeded, "65536x65536"),
}


@pytest.mark.parametrize("case", FULL_ERRORS)
def test_each_fault_has_its_error_and_says_so(case):
    data, kind, message = FULL_ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        parse(data)
    assert type(caught.value) is kind and 0 <= caught.value.offset <= len(data)


@pytest.mark.parametrize(
    "change, message",
    [({"version": 0}, "version 0"), ({"mode": "RGBA"}, "mode RGBA"), ({"arithmetic": 2}, "arithmetic 2"),
     ({"width": 0}, "size of 0x5"), ({"height": (1 << 24) + 1}, "size of 17x16777217"), ({"digest": b""}, "digest"),
     ({"model": -1}, "model code -1"), ({"tiles_x": 2}, "2x1 tiles for"), ({"tiles": []}, "0 tiles where"),
     ({"tiles": [Tile(256, b"")]}, "quality above"), ({"tiles": [Tile(0, b"", 1 << 32)]}, "quality above"),
     ({"metadata": {"ALPH": b""}}, "metadata .'ALPH'"), ({"metadata": {"TEXT": b"\xff"}}, "UTF-8"),
     ({"metadata": {"TEXT": bytes(65537)}}, "the limit is 65536"), ({"unknown": [("MESH", b"")]}, "unknown chunks"),
     ({"unknown": [("exTR", b""), ("exTR", b"")]}, "unknown chunks")])
def test_a_full_file_that_cannot_be_said_is_not_built(change, message):
    with pytest.raises(UsageError, match=message):
        build(replace(SMALL, **change))


@pytest.mark.parametrize(
    "change, message",
    [({"tiles": [Tile(0, b"")] * 2}, "more tiles"), ({"metadata": {"EXIF": b""}}, "metadata"),
     ({"mode": "L"}, "mode L"),
     ({"model": 4}, "unregistered model code 4"), ({"width": 65537}, "65537x512"), ({"height": 0}, "768x0"),
     ({"tiles": [Tile(128, b"")]}, "quality 128"), ({"tiles": [Tile(0, b"", 65536)]}, "checksum 65536"),
     ({"arithmetic": FLOAT64}, "arithmetic")])
def test_a_compact_file_that_cannot_be_said_is_not_built(change, message):
    with pytest.raises(UsageError, match=message):
        build(replace(TINY, **change))


# The rest


def test_unknown_ancillary_chunks_are_kept_for_info():
    image = parse(SIGNATURE + head() + chunk(b"exTR", b"1") + chunk(b"EXIF", b"e") + chunk(b"zz_9", b"") + DATA)
    assert image.unknown == [("exTR", b"1"), ("zz_9", b"")] and image.metadata == {"EXIF": b"e"}


def test_the_pixel_limit_is_the_callers():
    data = build(SMALL)
    assert parse(data, max_pixels=85).width == 17
    with pytest.raises(LimitExceeded, match="17x5, 85 pixels; 84 are allowed"):
        parse(data, max_pixels=84)


def test_sniffing_takes_linic_files_only():
    assert sniff(build(SMALL)[:8]) and sniff(build(TINY)[:16])
    for other in (b"", b"\x8d", b"\x8d\x05345678", b"\x89PNG\r\n\x1a\n", SIGNATURE[:7]):
        assert not sniff(other)


def test_models_have_the_numbers_that_files_hold():
    assert MODEL_CODES == {1: "lalic-xs", 2: "lalic-s", 3: "lalic", 17: "mrt-xs", 18: "mrt-s", 19: "mrt"}
    assert parse(build(SMALL)).model_name == "lalic-xs" and RICH.model_name is None
    assert list(METADATA) == ["ICCP", "EXIF", "XMP_", "TEXT"]


def test_a_picture_whose_details_are_invented_says_so_by_its_model_code_or_its_text():
    assert TINY.note == parse(build(TINY)).note == NOTE and "must not be used as evidence" in NOTE
    assert {name for code, name in MODEL_CODES.items() if replace(TINY, model=code).note} == {"mrt-xs", "mrt-s", "mrt"}
    assert SMALL.note == "" and RICH.note == "näher"
    assert replace(SMALL, metadata={"TEXT": NOTE.encode()}).note == NOTE


@pytest.mark.parametrize("size", [(1, 1), (33, 31), (2100, 40), (2112, 4100), (2080, 2081), (8704, 4992)])
def test_tiles_in_cells_of_32_pixels_cover_each_once_and_are_those_in_cells_of_64(size):
    across, down = tiling(*size)
    image = replace(SMALL, width=size[0], height=size[1], tiles_x=across, tiles_y=down)
    covered = set()
    for coarse, fine in zip(image.cells(), image.cells(32), strict=True):
        for c, f, side in zip(coarse, fine, reversed(size)):
            assert f.start == 2 * c.start and f.stop == min(2 * c.stop, -(-side // 32)) and 0 < f.stop - f.start <= 64
        cells = set(itertools.product(*(range(f.start, f.stop) for f in fine)))
        assert not cells & covered
        covered |= cells
    assert len(covered) == -(-size[0] // 32) * -(-size[1] // 32)


def test_a_megabyte_of_tiny_chunks_or_tiles_is_parsed_within_seconds():
    started = time.monotonic()
    names = [b"a" + bytes(name) for name in itertools.product(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ", repeat=3)]
    image = parse(SIGNATURE + head() + b"".join(chunk(name, b"") for name in names) + DATA)
    assert len(image.unknown) == len(names) > 70_000
    tiles = [Tile(0, b"", 0)] * (1 << 16)
    image = Image(16384, 16384, tiles, digest=DIGEST, tiles_x=256, tiles_y=256)
    assert len(parse(build(image), max_pixels=None).tiles) == 1 << 16
    assert time.monotonic() - started < 10


def test_the_room_imports_neither_numpy_nor_torch_nor_the_coder():
    code = ("import sys, linic.container;"
            "bad = {'numpy', 'torch', 'constriction', 'linic.rangecoder'} & set(sys.modules);"
            "sys.exit(str(bad) if bad else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size, tiles", [((1, 1), (1, 1)), ((2048, 2048), (1, 1)), ((2049, 64), (2, 1)),
                                         ((8704, 4992), (5, 3)), ((4096, 4097), (2, 3))])
def test_tiles_are_the_fewest_that_keep_to_the_limit_and_cover_everything(size, tiles):
    assert tiling(*size) == tiles
    image = replace(SMALL, width=size[0], height=size[1], tiles_x=tiles[0], tiles_y=tiles[1])
    covered = set()
    for rows, columns in image.cells():
        cells = set(itertools.product(range(rows.start, rows.stop), range(columns.start, columns.stop)))
        assert cells and not cells & covered and rows.stop - rows.start <= 32 and columns.stop - columns.start <= 32
        covered |= cells
    assert len(covered) == -(-size[0] // 64) * -(-size[1] // 64)
