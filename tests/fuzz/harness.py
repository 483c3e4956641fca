"""Damaged and hostile files, and what may become of them: something decoded, or a LinicError. Anything else is a crash.

Files are mutations of the golden ones of both families: of their bytes; of chunks and fields, with every CRC repaired,
so that what lies behind it is reached; or made-up symbols, well coded. Weight files are mutations of the golden models,
read without comparing digests (as if the forger had repaired them): a program that is accepted then runs, and every
register must keep within the bounds that `check` derived.
"""
import copy
import hashlib
import json
import random
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from linic import codec, container, weights
from linic.container.full import SIGNATURE, _chunk, _read_chunk
from linic.entropy.operators import WORD
from linic.entropy.program import Lines
from linic.entropy.steps import KINDS, Numpy, StepProgram
from linic.entropy.walk import walk
from linic.errors import DecodeError, LinicError, UsageError
from linic.rangecoder import Decoder, Encoder

FOLDER = Path(__file__).parents[1] / "golden"
CORPUS = Path(__file__).parent / "corpus"
MOST_PIXELS = 1 << 17
NUMBERS = [0, 1, 2, 3, 7, 63, 64, 65, 100, 101, 127, 128, 255, 256, 2047, 2048, 4096, 8191, 8192, 32767, 32768, 65535,
           65536, 1 << 20, 1 << 24, WORD, WORD + 1, (1 << 53) - 1, 1 << 53, 1 << 62, (1 << 63) - 1, 10**30]
HOSTILE: list[Any] = [*NUMBERS, *(-n for n in NUMBERS), None, True, 0.5, float("inf"), "", "y", "z", [], [[]], {}]


_load_program = weights.load_program


class Golden:
    """A golden model, its files and the SHA-256 of their latents."""

    def __init__(self, model: Path, files: str):
        paths, told = sorted(model.parent.glob(files)), json.loads((model.parent / "latents.json").read_text())
        self.path, self.files, self.latents = model, [p.read_bytes() for p in paths], {told[p.stem] for p in paths}
        self.loaded = self.program, self.tables, self.digest = _load_program(model)

    def __str__(self) -> str:
        return self.path.stem

    @cached_property
    def parts(self) -> tuple[dict[str, Any], bytes]:
        """Header and tensors of the model; the card unpacked."""
        data = self.path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size])
        header["__metadata__"] = json.loads(header["__metadata__"]["linic"])
        return header, data[8 + size:]


LALIC = Golden(FOLDER / "tiny.safetensors", "*.linic")
GOLDEN = (LALIC, *(Golden(FOLDER / f"mrt/{order}.safetensors", f"{order}-*.linic") for order in KINDS))


def walked(program: Lines, backend: Any, quality: int, coder: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """The latents of a picture of few cells, whatever the coder makes of it."""
    size = size or ((3, 5) if isinstance(program, StepProgram) else (1, 2))
    return walk(codec._plan_of(program, backend, quality, size), coder)


# Pictures


def picture(rng: random.Random, golden: Golden) -> tuple[bytes, bytes | None]:
    """A file that is probably wrong, or one that is right and its latents."""
    data = rng.choice(golden.files)
    kind = rng.random()
    if kind < 0.3:
        return mutated(rng, data), None
    if kind < 0.6 and data.startswith(SIGNATURE):
        return rechecked(rng, data), None
    return (refielded(rng, data), None) if kind < 0.95 else consistent(rng, golden)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Flips, other bytes, deletions, insertions, splices with another file of any model."""
    bad = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(bad) + 1), rng.randrange(6)
        if kind == 0 and at < len(bad):
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(bad):
            bad[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del bad[at:at + rng.choice((1, 1, 4, 64))]
        elif kind == 3:
            bad[at:at] = rng.randbytes(rng.choice((1, 1, 4, 64)))
        elif kind == 4:
            other = rng.choice(rng.choice(GOLDEN).files)
            start = rng.randrange(len(other))
            bad[at:at + rng.randrange(40)] = other[start:start + rng.randrange(40)]
        else:
            bad[at:at] = bad[at:at + rng.randrange(40)]
    return bytes(bad)


def rechecked(rng: random.Random, data: bytes) -> bytes:
    """Chunks with changed bodies, dropped, doubled, of other names; their CRCs right."""
    chunks, at = [], len(SIGNATURE)
    while at < len(data):
        chunk = _read_chunk(data, at)
        chunks.append((chunk.tag, data[chunk.body:chunk.end]))
        at = chunk.end + 4
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(chunks))
        tag, body = chunks[i]
        kind = rng.randrange(8)
        if kind < 5:
            chunks[i] = tag, mutated(rng, body) if body else b"\0"
        elif kind == 5:
            chunks.insert(rng.randrange(len(chunks) + 1), (rng.choice((tag, "TEXT", "ALPH", "exTR", "ICCP")), body))
        elif kind == 6 and len(chunks) > 1:
            del chunks[i]
        else:
            rng.shuffle(chunks)
    try:
        return SIGNATURE + b"".join(_chunk(tag, body) for tag, body in chunks)
    except UsageError:
        return data[:-1]


def refielded(rng: random.Random, data: bytes) -> bytes:
    """One or two fields changed, the file written anew around them."""
    image = container.parse(data)
    for _ in range(rng.choice((1, 1, 2))):
        field = rng.choice(("payload", "payload", "payload", "size", "quality", "checksum", "digest", "tiles", "head"))
        tile = rng.choice(image.tiles)
        if field == "payload":
            tile.payload = rng.choice((mutated(rng, tile.payload or b"\0"), rng.randbytes(rng.randrange(300)),
                                       tile.payload[:rng.randrange(len(tile.payload) + 1)]))
        elif field == "size":
            image.width, image.height = (max(1, rng.choice((side, rng.randrange(400), rng.choice(NUMBERS) % (1 << 24))))
                                         for side in (image.width, image.height))
        elif field == "quality":
            tile.quality = rng.choice((0, 1, 49, 100, 101, 127, 128, 255, rng.randrange(256)))
        elif field == "checksum":
            tile.checksum = rng.choice((0, tile.checksum ^ 1, rng.randrange(1 << 16), rng.randrange(1 << 32)))
        elif field == "digest" and image.digest:
            image.digest = rng.choice((bytes(8), image.digest[::-1]))
        elif field == "tiles":
            image.tiles_x, image.tiles_y = rng.choice(((1, 1), (2, 1), (1, 3), (2, 2)))
            image.tiles = [copy.copy(rng.choice(image.tiles)) for _ in range(image.tiles_x * image.tiles_y)]
        else:
            image.mode, image.arithmetic = rng.choice(("L", "RGB")), rng.choice((0, 1))
            image.model = rng.choice((0, 1, 2, 17, 65535))
    try:
        return container.build(image)
    except UsageError:
        return mutated(rng, data)


class Symbols:
    """Coder that writes made-up symbols, escapes among them."""

    def __init__(self, rng: random.Random, golden: Golden):
        self.rng, self.coder = np.random.default_rng(rng.randrange(1 << 32)), Encoder(golden.tables)
        self.scales = golden.program.scales

    def code(self, index: np.ndarray, symbols: Any) -> np.ndarray:
        limit = 255 if (index >= self.scales).any() else 16383
        made = (self.rng.standard_t(1, len(index)) * 4).clip(-limit, limit)
        return self.coder.code(index, made.astype(np.int32))


def consistent(rng: random.Random, golden: Golden) -> tuple[bytes, bytes]:
    """A file that is right, and its latents."""
    program, _, digest = golden.loaded
    width, height, quality = rng.randint(1, 140), rng.randint(1, 140), rng.randint(0, 100)
    image = container.Image(width, height, [], digest=digest, arithmetic=container.INTEGERS,
                            tiles_x=1 + (width > container.CELL and rng.random() < 0.3))
    found = []
    for rows, columns in image.cells(codec._side(isinstance(program, StepProgram))):
        coder, size = Symbols(rng, golden), codec._size(rows, columns)
        found.append(codec._bytes(walked(program, Numpy(program), quality, coder, size)))
        image.tiles.append(container.Tile(quality, coder.coder.finish()))
        image.tiles[-1].checksum = image.checksum(len(found) - 1, found[-1])
    return container.build(image), b"".join(found)


def consistent_with_wide_z(rng: random.Random) -> bytes:
    """Well coded, but z leaves -255..255: what a hostile writer can do and no plan of ours does."""
    program, tables, digest = LALIC.loaded
    coder = Encoder(tables)
    wide = rng.choices((-256, 256, 16383, -16383), k=program.z_channels)
    coder.code(np.arange(program.scales, program.scales + program.z_channels), wide)
    tile = container.Tile(50, coder.finish())
    return container.build(container.Image(9, 9, [tile], digest=digest, arithmetic=container.INTEGERS))


def check_picture(data: bytes, golden: Golden, latents: bytes | None = None) -> str:
    """What became of it, by this model. latents: of a file that is right, and must be decoded to them. Anything but a
    LinicError with its place inside the file goes through to the caller."""
    weights.load_program = lambda name: golden.loaded
    try:
        container.sniff(data[:8])
        codec.info(data)
        told = codec.verify(data, golden.path, max_pixels=MOST_PIXELS)
        found = told["latents"]
        if latents is not None:
            assert found == hashlib.sha256(latents).hexdigest()
            return "decoded: was right"
        if found in golden.latents:
            return "decoded to the golden latents"
        # Of several tiles each has its right checksum.
        return "decoded: golden tiles, repeated" if told["tiles"] > 1 else "decoded to OTHER latents"
    except LinicError as error:
        if isinstance(error, DecodeError) and not 0 <= error.offset <= len(data):
            raise AssertionError(f"offset {error.offset} in {len(data)} bytes") from error
        assert latents is None, f"a file that is right was refused: {error}"
        return type(error).__name__
    finally:
        weights.load_program = _load_program


# Weight files


def packed(header: dict[str, Any], tensors: bytes) -> bytes:
    card = header["__metadata__"]
    card = card if isinstance(card, str) else json.dumps(card)
    text = json.dumps({**header, "__metadata__": {"linic": card}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def weight_file(rng: random.Random, golden: Golden) -> bytes:
    header, tensors = copy.deepcopy(golden.parts)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        # What an earlier change has broken cannot always be changed again.
        with suppress(TypeError, KeyError, ValueError, IndexError, AttributeError, OverflowError):
            if kind < 0.45:
                change_line(rng, header["__metadata__"]["program"])
            elif kind < 0.75:
                tensors = change_tensor(rng, header, tensors)
            elif kind < 0.85:
                change_entry(rng, header)
            elif kind < 0.95:
                change_card(rng, header["__metadata__"])
            else:
                return mutated_weights(rng, packed(header, tensors))
    return packed(header, tensors)


def change_line(rng: random.Random, lines: list[Any]) -> None:
    i = rng.randrange(len(lines))
    if not isinstance(lines[i], list) or len(lines[i]) != 5 or rng.random() < 0.2:
        lines[i:i + 1] = rng.choice(([], [lines[i]] * 2, [lines[i], rng.choice(lines)], [rng.choice(HOSTILE)]))
        return
    line, kind = lines[i], rng.randrange(5)
    if kind == 0:
        line[0] = rng.choice((rng.choice(lines)[0] if isinstance(rng.choice(lines), list) else "y", "softmax"))
    elif kind == 1:
        line[1] = rng.choice(("y", "z", line[1] + "'" if isinstance(line[1], str) else "y"))
    elif line[kind]:
        at, other = rng.randrange(len(line[kind])), rng.choice(lines)
        found = other[kind] if isinstance(other, list) and len(other) == 5 and other[kind] else HOSTILE
        near = line[kind][at] + rng.choice((-1, 1, 5)) if type(line[kind][at]) is int else rng.choice(HOSTILE)
        line[kind][at] = rng.choice((rng.choice(found), rng.choice(found), near, rng.choice(HOSTILE)))
    else:
        line[kind].append(rng.choice(HOSTILE))


def change_tensor(rng: random.Random, header: dict[str, Any], tensors: bytes) -> bytes:
    """Some entries of an integer tensor become extremes, or all of them, or others' bytes."""
    names = [n for n in header if n.startswith(("int.", "tables."))]
    entry = header[rng.choice(names)]
    start, end = entry["data_offsets"]
    kind = np.dtype({"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "U32": "u4"}.get(entry["dtype"], "u1"))
    array = np.frombuffer(tensors[start:end], kind).copy()
    limit = np.iinfo(kind)
    value = rng.choice([v for v in HOSTILE if type(v) is int and limit.min <= v <= limit.max]
                       + [int(limit.min), int(limit.max)])
    where = rng.choice((slice(None), *(rng.randrange(len(array)) for _ in range(6))))
    array[where] = rng.choice((value, array[rng.randrange(len(array))], array[where] + rng.choice((-1, 1))))
    return tensors[:start] + array.tobytes() + tensors[end:]


def change_entry(rng: random.Random, header: dict[str, Any]) -> None:
    """Type, shape or place of a tensor."""
    names = [n for n in header if n.startswith(("int.", "tables."))]
    name = rng.choice(names)
    if not isinstance(header[name], dict):
        return
    kind = rng.randrange(5)
    if kind == 0:
        header[name]["dtype"] = rng.choice(("I8", "U8", "I16", "I32", "I64", "U32", "U64", "F16", "BF16", "F32", "F64",
                                            "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "X"))
    elif kind == 1:
        shape = header[name].get("shape")
        header[name]["shape"] = rng.choice(([], shape[::-1], [*shape, 1], [1, *shape], [int(np.prod(shape))],
                                            [rng.choice(HOSTILE)])) if isinstance(shape, list) else shape
    elif kind == 2:
        header[name] = copy.deepcopy(header[rng.choice(names)])
    elif kind == 3:
        header[f"int.{rng.randrange(9)}"] = header.pop(name)
    else:
        header[name] = rng.choice(HOSTILE)


def change_card(rng: random.Random, card: dict[str, Any]) -> None:
    place = rng.choice((card, card["config"])) if isinstance(card.get("config"), dict) else card
    key = rng.choice([*place])
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice((*HOSTILE, *place.values()))


def mutated_weights(rng: random.Random, data: bytes) -> bytes:
    """Bytes, in the header more often than behind it."""
    size = int.from_bytes(data[:8], "little") + 8
    cut = rng.choice((8, size, size, size))
    return mutated(rng, data[:cut]) + data[cut:]


class Bounded(Numpy):
    """The definition, which also holds every register against what `check` promised."""

    def __init__(self, program: Lines):
        super().__init__(program)
        self.specs = program.specs

    def run(self, op: Any, quality: int, inputs: Any) -> Any:
        result, spec = super().run(op, quality, inputs), self.specs[op.out]
        assert (result >= spec.low).all() and (result <= spec.high).all(), f"{op} leaves its bounds"
        assert result.shape[3] == spec.channels, f"{op} has other channels"
        return result


class Made:
    """Coder that hands out made-up symbols, the same for every backend."""

    def __init__(self, seed: int, scales: int):
        self.rng, self.scales = np.random.default_rng(seed), scales

    def code(self, index: np.ndarray, symbols: Any) -> np.ndarray:
        limit = 255 if (index >= self.scales).any() else 16383
        return (self.rng.standard_t(1, len(index)) * 50).clip(-limit, limit).astype(np.int32)


def check_weights(path: Path, seed: int, backends: Any = (), whole: bool = False) -> str:
    """Reads it as if its digest were right, and runs its program. whole: as `linic.load` does, floats too. backends:
    others, whose latents must be those of NumPy."""
    compare, weights._compare = weights._compare, lambda *_: None
    try:
        program, tables, _ = weights.load_program(path)
        y_hat = walked(program, Bounded(program), seed % 101, Made(seed, program.scales))
        for make in backends:
            other = walked(program, make(program), seed % 101, Made(seed, program.scales))
            assert np.array_equal(other, y_hat), f"{make} gives other latents"
        walked(program, Numpy(program), seed % 101, Decoder(tables, random.Random(seed).randbytes(99)))
        return "accepted"
    except LinicError as error:
        return type(error).__name__
    finally:
        if whole:
            check_whole(path)
        weights._compare = compare


def check_whole(path: Path) -> None:
    with suppress(LinicError):
        weights.load(path)
