"""Weights over a narrow road: a checkpoint as bf16, in parts of a few MiB, with the SHA-256 of each part and the whole.

    split(checkpoint, folder) -> manifest          join(folder or manifest, out)

Half the bytes of float32, and what rounding loses is less than what a later int8 export does. joined files are
checkpoints of this loop, float32 again, bit for bit the bf16 values.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from linic.errors import UsageError
from linic.train import checkpoint

PART = 15 << 20
MOST = 60 << 20


def split(source: Path, folder: Path, part_bytes: int = PART, most_bytes: int = MOST) -> dict[str, Any]:
    """<stem>.json and <stem>-0.part, ... in `folder`."""
    tensors, about = checkpoint.load(source)
    halves = {k: t.bfloat16() if t.dtype == torch.float32 else t for k, t in tensors.items()}
    data = save(halves, {"format": checkpoint.FORMAT, "about": json.dumps(about)})
    if len(data) > most_bytes:
        raise UsageError(f"{source}: {len(data) >> 20} MiB in bf16, more than the {most_bytes >> 20} that may travel")
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []
    for at in range(0, len(data), part_bytes):
        path = folder / f"{source.stem}-{len(parts)}.part"
        path.write_bytes(data[at:at + part_bytes])
        parts.append({"name": path.name, "bytes": path.stat().st_size, "sha256": _sha(data[at:at + part_bytes])})
    manifest = {"about": about, "bytes": len(data), "sha256": _sha(data), "parts": parts}
    checkpoint.write_json(folder / f"{source.stem}.json", manifest)
    return manifest


def join(source: Path, out: Path) -> dict[str, Any]:
    """`source`: a manifest, or a folder that holds one. -> `about` of the checkpoint."""
    manifest, data = _manifest(source), b""
    folder = source if source.is_dir() else source.parent
    for part in manifest["parts"]:
        try:
            piece = (folder / part["name"]).read_bytes()
        except OSError as error:
            raise UsageError(f"{part['name']}: missing: {error}") from error
        if _sha(piece) != part["sha256"]:
            raise UsageError(f"{part['name']}: damaged: {len(piece)} bytes of {part['bytes']}, another SHA-256")
        data += piece
    if _sha(data) != manifest["sha256"]:
        raise UsageError(f"{source}: the parts are whole, but not of one file")
    tensors = {k: t.float() if t.dtype == torch.bfloat16 else t for k, t in load(data).items()}
    about: dict[str, Any] = manifest["about"]
    checkpoint.save(out, tensors, about)
    return about


def _manifest(source: Path) -> dict[str, Any]:
    found = [source] if source.is_file() else sorted(source.glob("*.json"))
    for path in found:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"parts", "sha256"} <= content.keys():
            return content
    raise UsageError(f"{source}: no manifest of parts there")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
