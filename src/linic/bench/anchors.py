"""The curves we compare with: `data/anchors.json`, published or measured from whole files, each with its source.

Sets: kodak, clic-professional, tecnick. bpp in bits a pixel, PSNR in dB on RGB, MS-SSIM in 0..1 where it is known.
"""
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from linic.errors import UsageError

# The curves are means over so many pictures; the mean of others is another number.
PICTURES = {"kodak": 24, "clic-professional": 41, "tecnick": 100}


@dataclass(frozen=True)
class Curve:
    name: str
    bpp: tuple[float, ...]
    psnr: tuple[float, ...]
    ms_ssim: tuple[float, ...] | None = None
    source: str = ""


@cache
def _data() -> dict[str, dict[str, dict]]:
    return json.loads((resources.files("linic.bench") / "data" / "anchors.json").read_text())


def sets() -> list[str]:
    return list(_data())


def load(name: str) -> dict[str, Curve]:
    """{"VTM-9.1": Curve, "LALIC": Curve, ...} on that set of pictures."""
    if name not in _data():
        raise UsageError(f"no anchors for {name!r}; known sets: {', '.join(sets())}")
    return {
        codec: Curve(codec, tuple(d["bpp"]), tuple(d["psnr"]), tuple(d["ms_ssim"]) if "ms_ssim" in d else None,
                     d["source"])
        for codec, d in _data()[name].items()
    }
