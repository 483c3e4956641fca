"""Which models are here: the folders that hold weight files, their cards, look-up by name and digest, installing.

A weight file is .safetensors, or the same compressed, .safetensors.gz: integers take a sixth less room.
Reads headers only and imports neither torch nor numpy, but for `add`, which checks all of a file first.
Raises ModelMissing, WeightsError.
"""

import gzip
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from linic.errors import ModelMissing, WeightsError

SHIPPED = Path(__file__).parent / "data"
HEADER_LIMIT = 1 << 22
FORMAT = 1
LARGEST = 256 << 20     # bytes of a file, uncompressed
SUFFIXES = (".safetensors", ".safetensors.gz")
GZIP = b"\x1f\x8b"
HOW_TO_GET = "`linic models add PATH|URL` installs one; LINIC_MODELS names further folders"


def folders() -> list[Path]:
    """Where weight files are looked for: LINIC_MODELS (a path list) first, then what `add` has brought, then the
    shipped ones."""
    named = [Path(p) for p in os.environ.get("LINIC_MODELS", "").split(os.pathsep) if p]
    return [*named, own_folder(), SHIPPED]


def own_folder() -> Path:
    """Of this user: $XDG_DATA_HOME/linic/models, by default ~/.local/share/linic/models."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "linic" / "models"


def add(source: str) -> dict[str, Any]:
    """Installs a weight file for this user, from a path or an http(s) address, after checking all of it; returns its
    card, with `path`. Raises UsageError, WeightsError."""
    from urllib.error import URLError
    from urllib.request import urlopen

    from linic.errors import UsageError

    folder = own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"new{os.getpid()}.tmp"
    try:
        with (urlopen(source, timeout=60) if source.startswith(("http://", "https://")) else open(source, "rb")) as f:
            data = f.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UsageError(f"{source}: larger than {LARGEST >> 20} MiB, no weight file of linic is")
        temporary.write_bytes(data)
        try:
            card = _checked(temporary)
        except WeightsError as error:
            raise WeightsError(str(error).replace(str(temporary), source)) from error
        path = folder / f"{card['name']}-{card['digest']}{SUFFIXES[data.startswith(GZIP)]}"
        os.replace(temporary, path)
    except (URLError, OSError) as error:
        raise UsageError(f"{source}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return {**card, "path": str(path)}


def _checked(path: Path) -> dict[str, Any]:
    """The card of a file that loads and whose program, if it has one, gives its known answer."""
    from linic.weights import known_answer, load

    loaded = load(path)
    card, program, tables = loaded.card, loaded.program, loaded.tables
    if program and known_answer(program, tables) != card.get("known_answer"):
        raise WeightsError(f"{path}: its program does not give the answer that its card states: damaged file")
    return card


def contents(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a weight file, uncompressed; the first `most`. Raises WeightsError."""
    try:
        with path.open("rb") as f:
            compressed = f.read(2) == GZIP
            f.seek(0)
            stream, found = gzip.GzipFile(fileobj=f) if compressed else f, bytearray()
            # By parts: read(n) takes memory for all of n at once.
            while part := stream.read(min(most - len(found), 1 << 20)):
                found += part
            return bytes(found)
    except (OSError, EOFError, zlib.error) as error:
        raise WeightsError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def whole(path: Path) -> bytes:
    """All of it. Raises WeightsError, also for what is too large to be one of ours."""
    data = contents(path, LARGEST + 1)
    if len(data) > LARGEST:
        raise WeightsError(f"{path}: more than {LARGEST >> 20} MiB uncompressed, no weight file of linic is")
    return data


def read_card(path: Path) -> dict[str, Any]:
    """The card of a weight file, out of its header alone. Raises WeightsError."""
    size = int.from_bytes(contents(path, 8), "little")
    header = contents(path, 8 + size)[8:] if size <= HEADER_LIMIT else b""
    try:
        if len(header) < size:
            raise WeightsError(f"{path}: not a safetensors file (its header claims {size} bytes)")
        metadata = json.loads(header).get("__metadata__", {})
        card = json.loads(metadata["linic"])
        if card["format"] != FORMAT:
            raise WeightsError(f"{path}: weight format {card['format']}; this linic reads {FORMAT}")
        # add() makes a path of the name.
        if not isinstance(card["config"], dict) or not re.fullmatch(r"\w[\w.-]{0,63}", card["name"]):
            raise WeightsError(f"{path}: a card without configuration, or its name is none")
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: no linic card in it. Weight files are made by `linic export`") from error
    return card


def available() -> list[dict[str, Any]]:
    """The card of every installed model, with `path` and `bytes`; a broken file has `error` instead of a card."""
    found: list[dict[str, Any]] = []
    for folder in folders():
        for path in sorted(p for suffix in SUFFIXES for p in folder.glob(f"*{suffix}")):
            name = path.name.partition(SUFFIXES[0])[0]
            entry: dict[str, Any] = {"name": name, "path": str(path), "bytes": path.stat().st_size}
            try:
                card = read_card(path)
                card.pop("program", None)   # long, and `linic models show` prints it
                entry = {**entry, **card}
            except WeightsError as error:
                entry["error"] = str(error)
            found.append(entry)
    return found


def find(name: str | os.PathLike[str]) -> Path:
    """The file of a model by name, or the path itself where it is one. Raises ModelMissing."""
    if os.sep in str(name) or str(name).endswith(SUFFIXES):
        if not Path(name).is_file():
            raise ModelMissing(f"no weight file {name}")
        return Path(name)
    models = [m for m in available() if "error" not in m]
    for model in models:
        if model["name"] == name:
            return Path(model["path"])
    raise ModelMissing(f"no model {str(name)!r}. Installed: {', '.join(m['name'] for m in models) or 'none'}. "
                       f"{HOW_TO_GET}")


def find_digest(digest: bytes, hint: str = "") -> Path:
    """The file of the model that wrote a picture. `hint`: the name that the picture's model code stands for."""
    models = [m for m in available() if "error" not in m]
    for model in models:
        if model.get("digest") == digest.hex():
            return Path(model["path"])
    raise ModelMissing(f"the file needs model {hint or 'unknown'} with digest {digest.hex()}. Installed: "
                       + (", ".join(f"{m['name']} {m.get('digest')}" for m in models) or "none")
                       + f". {HOW_TO_GET}")
