"""linic: a learned image codec.

    data = linic.encode(image, quality=40)      PIL image -> bytes
    data = linic.encode(image, size=2000)       the best that fits; below .06 bits per pixel details are invented
    image = linic.decode(data)                  bytes -> PIL image

`import linic` loads neither torch nor numpy: names are looked up when first used. Start reading at codec.py.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linic.codec import decode, encode, info, load, verify
    from linic.errors import DecodeError, LinicError, ModelMissing, PictureError, UsageError, WeightsError

# Read when torch loads. libgomp's threads spin at every barrier, and a picture has thousands: beside one busy process
# .3 s of work took 8 s on two cores. After a short spin they now sleep, which costs a quiet machine nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
_HOME = {
    **dict.fromkeys(["encode", "decode", "info", "load", "verify"], "linic.codec"),
    **dict.fromkeys(["DecodeError", "LinicError", "ModelMissing", "PictureError", "UsageError", "WeightsError"],
                    "linic.errors"),
}
__all__ = ["DecodeError", "LinicError", "ModelMissing", "PictureError", "UsageError", "WeightsError", "__version__",
           "decode", "encode", "info", "load", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'linic' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
