"""A stand-in codec, so that the doors are tested without a network: a line of facts, then a lossless PNG."""
import json

import pytest
from PIL import Image

import linic
from linic.errors import Damaged, LimitExceeded, ModelMissing
from linic.picture.files import read_bytes, to_bytes

MAGIC = b"stand-in "


def encode(image, quality=None, model="auto", device="auto", profile=None, *, extreme=False, bpp=None, size=None):
    if model not in ("auto", "lalic-xs"):
        raise ModelMissing(f"no model {model!r}. Installed: lalic-xs")
    pixels = to_bytes(image)[0]
    head = {"quality": [50 if quality is None else quality], "width": image.width, "height": image.height,
            "profile": profile or "full", "payload": len(pixels), "model": "mrt-xs" if extreme else "lalic-xs",
            "asked": [bpp, size]}
    return MAGIC + json.dumps(head).encode() + b"\n" + pixels


def info(data):
    if not data.startswith(MAGIC):
        raise Damaged(0, "no signature")
    return json.loads(data[len(MAGIC):].split(b"\n", 1)[0])


def decode(data, *, model=None, max_pixels=1 << 28, device="auto", realism=None):
    head = info(data)
    if head["width"] * head["height"] > max_pixels:
        raise LimitExceeded(8, f"{head['width']}x{head['height']} is over the limit of {max_pixels} pixels")
    return read_bytes(data.split(b"\n", 1)[1], "inside")


@pytest.fixture
def stand_in(monkeypatch):
    for function in (encode, decode, info):
        monkeypatch.setattr(linic, function.__name__, function, raising=False)


@pytest.fixture
def photo(tmp_path):
    """A small picture file, 48x32."""
    path = tmp_path / "photo.png"
    Image.effect_noise((48, 32), 60).convert("RGB").save(path)
    return path
