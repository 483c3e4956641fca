"""What people read of an evaluation: a table, BD-rates with the anchor named, an RD plot, pictures side by side.

`result` is what `evaluate` returns, or any JSON of CompressAI's schema ("psnr" without suffix is taken too).
"""
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from linic.bench.anchors import Curve
from linic.bench.bdrate import bd_rate
from linic.bench.judge import COLUMNS as MEASURES
from linic.bench.judge import NOTE
from linic.errors import BackendMissing, UsageError
from linic.picture import write_whole

COLUMNS = [  # key in "results", heading, format
    ("quality", "quality", "d"), ("bpp", "bpp", ".4f"), ("psnr-rgb", "PSNR dB", ".2f"),
    ("ms-ssim-rgb", "MS-SSIM", ".4f"),
    *((c.key, c.heading, c.form) for c in MEASURES if c.key not in ("psnr-rgb", "ms-ssim-rgb")),
    ("encoding_time", "encode s", ".2f"), ("decoding_time", "decode s", ".2f"),
]


def curve(result: dict[str, Any]) -> Curve:
    """The means as a curve; qualities without a finite PSNR are left out."""
    means = result["results"]
    quality = means.get("psnr-rgb", means.get("psnr"))
    points = [(b, p) for b, p in zip(means["bpp"], quality) if b is not None and p is not None]
    return Curve(result["name"], tuple(b for b, _ in points), tuple(p for _, p in points))


def markdown(result: dict[str, Any], anchors: dict[str, Curve] | None = None, pictures: int | None = None) -> str:
    """`pictures`: over how many the anchors are means; the report says so where the result is over others."""
    lines = [f"# {result['name']}", "", result.get("description", ""), ""]
    lines += table(result)
    if "lpips-alex" in result["results"]:
        lines += ["", NOTE]
    if anchors:
        lines += ["", "BD-rate: size at equal PSNR, PCHIP of log rate over the common range, all points.", ""]
        ours = len({row["name"] for row in result.get("per_image", [])})
        if pictures and ours != pictures:
            lines += [f"**Not comparable: the anchors are means over {pictures} pictures, this result over {ours}.**",
                      ""]
        lines += bd_rates(curve(result), anchors)
    if result.get("machine"):
        lines += ["", "Machine: " + ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None)]
    if result.get("command"):
        lines += ["", f"Command: `{result['command']}`"]
    return "\n".join(lines) + "\n"


def table(result: dict[str, Any]) -> list[str]:
    means = result["results"]
    columns = [(means[key], head, form) for key, head, form in COLUMNS if key in means]
    rows = [[format(v, form) if v is not None else "-" for v in values] for values, _, form in columns]
    return [_line([head for _, head, _ in columns]), _line(["---:"] * len(columns)), *(_line(r) for r in zip(*rows))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def bd_rates(test: Curve, anchors: dict[str, Curve]) -> list[str]:
    lines = [_line(["anchor", "BD-rate", "common range", "anchor's source"]), _line(["---", "---:", "---:", "---"])]
    for anchor in anchors.values():
        try:
            found = bd_rate(test, anchor)
            cells = [f"{found.percent:+.2f} %", f"{found.low:.1f}-{found.high:.1f} dB"]
        except UsageError as error:
            cells = ["-", str(error)]
        lines.append(_line([anchor.name, *cells, anchor.source]))
    return lines


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Figure and axes, inches; without pyplot: no display and no global state. Raises BackendMissing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendMissing("the plot needs matplotlib: pip install linic[bench]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot(curves: Sequence[Curve], anchors: dict[str, Curve], path: str | Path, title: str = "") -> None:
    """PSNR over bpp as PNG; the rivals thin, ours thick."""
    figure, axes = canvas(8, 6)
    for rival in anchors.values():
        axes.plot(rival.bpp, rival.psnr, marker=".", linewidth=1, label=rival.name)
    for ours in curves:
        axes.plot(ours.bpp, ours.psnr, marker="o", linewidth=2.5, color="black", label=ours.name)
    shown = [c for c in curves if c.bpp] or list(anchors.values())
    if shown:
        # The anchors reach rates nobody looks at: the axes follow our own points.
        rates, dbs = [b for c in shown for b in c.bpp], [p for c in shown for p in c.psnr]
        axes.set_xlim(0, 1.1 * max(rates))
        axes.set_ylim(min(dbs) - 0.5, max(dbs) + 0.5)
    axes.set(xlabel="bits per pixel, whole file", ylabel="PSNR, dB (RGB)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_whole(path, drawn.getvalue())


def side_by_side(pictures: Sequence[tuple[str, Image.Image]], *, crop: tuple[int, int, int, int] | None = None,
                 columns: int = 2) -> Image.Image:
    """Labelled pictures in a grid at 1:1; `crop` (left, top, right, bottom) cuts the same window out of each."""
    if not pictures:
        raise UsageError("no pictures to put side by side")
    font = ImageFont.load_default(18)
    cut = [(label, (image.crop(crop) if crop else image).convert("RGB")) for label, image in pictures]
    width, height = max(i.width for _, i in cut), max(i.height for _, i in cut)
    gap, caption = 8, 28
    rows = -(-len(cut) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(cut):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + caption + gap)
        draw.text((x, y), label, fill="black", font=font)
        sheet.paste(image, (x, y + caption))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below one another."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for sheet, y in zip(sheets, np.cumsum([0] + [s.height for s in sheets])):
        whole.paste(sheet, (0, int(y)))
    return whole
