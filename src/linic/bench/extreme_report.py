"""What people read of an extreme run: tables, comparisons at equal rate and at equal bytes, plots, contact sheets.

`result` is what `extreme.run` returns. Curves are means over the pictures, PCHIP over ln bpp between their points.
"""

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from linic.bench.anchors import Curve
from linic.bench.bdrate import bd_rate
from linic.bench.extreme import Ours, Row, mean_points, picture_of
from linic.bench.judge import COLUMNS, KEYS, NOTE
from linic.bench.report import canvas
from linic.bench.rivals import Anchors, grown
from linic.errors import BackendMissing, UsageError
from linic.picture import write_whole

READ_AT = (0.0113, 0.015, 0.0237)       # bpp at which curves are read; VVC's decoded pictures are about the outer two
READ = ("lpips-alex", "psnr-rgb", "ms-ssim-rgb")
BEYOND = 0.02                           # of the rate, that a curve may be read past its end
KODAK = 24
JUDGE = "lpips-alex"
COMPACT = 12            # bytes of a compact header and what else is no payload, at most
CLASSICAL = ("vvc420", "avif420", "webp", "jpegxl", "jpeg420")
LABELS = {"linic": "linic", "vvc420": "VVC", "avif420": "AVIF", "webp": "WebP", "jpeg420": "JPEG",
          "jpegxl": "JPEG XL (recorded)"}
PUBLISHED = {"StableCodec": "StableCodec", "MS-ILLM": "MS-ILLM", "MS-ILLM-noGAN": "MS-ILLM before its GAN",
             "VTM (DiffEIC table)": "VTM (DiffEIC's run)"}
# Never MRT's: none are public.
CHARTS = {"DLF": "DLF", "GLC (own figure)": "GLC", "GLC (as run by DLF authors, lower rates)": "GLC (DLF's run)",
          "OneDC": "OneDC"}
PUBLISHED_KEYS = {"lpips-alex": "lpips_alex", "psnr-rgb": "psnr", "ms-ssim-rgb": "ms_ssim"}


# --- numbers --------------------------------------------------------------------------------------------------------


def published(anchors: Anchors | None) -> dict[str, dict[str, Any]]:
    """{name: {"points": [{"bpp", "lpips-alex", ...}], "chart": read off a figure?, "source"}}, all on Kodak."""
    found = {}
    for names, where, chart in ((PUBLISHED, ("kodak",), False), (CHARTS, ("chart_readings", "kodak"), True)):
        table: dict[str, Any] = anchors.published if anchors else {}
        for part in where:
            table = table.get(part, {})
        for name, shown in names.items():
            if entry := table.get(name):
                points = [{"bpp": bpp, **{key: entry[theirs][i] for key, theirs in PUBLISHED_KEYS.items()
                                          if theirs in entry}} for i, bpp in enumerate(entry["bpp"])]
                found[shown] = {"points": points, "chart": chart, "source": entry.get("source", "")}
    return found


def at_rate(points: Sequence[Row], key: str, bpp: float) -> float | None:
    """The curve's value there; None beyond its ends."""
    curve = [(math.log(p["bpp"]), p[key]) for p in points if p.get(key) is not None and p.get("complete", True)]
    curve = [point for i, point in enumerate(curve) if not i or point[0] > curve[i - 1][0]]
    if not curve or not curve[0][0] - BEYOND <= math.log(bpp) <= curve[-1][0] + BEYOND:
        return None
    if len(curve) == 1:
        return float(curve[0][1])
    return float(_pchip(*zip(*curve))(math.log(bpp)))


def _pchip(x: Sequence[float], y: Sequence[float]) -> Any:
    try:
        from scipy.interpolate import PchipInterpolator
    except ImportError as error:
        raise BackendMissing("curves need scipy: pip install linic[bench]") from error
    return PchipInterpolator(x, y)


def compare(test: Sequence[Row], anchor: Sequence[Row], key: str = JUDGE) -> dict[str, Any]:
    """Of two curves: {"percent": rate at equal quality, "low", "high": the interval of quality that both have, "share":
    of the smaller range; "difference": mean of test - anchor over ln bpp, "from", "to": the rates that both have}.
    What does not exist is absent."""
    found: dict[str, Any] = {}
    sign = next(column.sign for column in COLUMNS if column.key == key)
    curves = []
    for name, points in (("test", test), ("anchor", anchor)):
        best = [p for p in points if p.get(key) is not None and p.get("complete", True)]
        curves.append(Curve(name, tuple(p["bpp"] for p in best), tuple(sign * p[key] for p in best)))
    t, a = curves
    if min(len(t.bpp), len(a.bpp)) < 2:
        return found
    try:
        rate = bd_rate(t, a)
        span = min(max(c.psnr) - min(c.psnr) for c in curves)
        low, high = sorted((sign * rate.low, sign * rate.high))
        found |= {"percent": rate.percent, "low": low, "high": high, "share": (high - low) / span}
    except UsageError:
        pass                    # no quality in common
    low, high = (pick(math.log(b) for b in ends) for pick, ends in
                 ((max, (t.bpp[0], a.bpp[0])), (min, (t.bpp[-1], a.bpp[-1]))))
    if low < high:
        means = [float(_pchip([math.log(b) for b in c.bpp], c.psnr).integrate(low, high)) / (high - low)
                 for c in curves]
        found |= {"difference": sign * (means[0] - means[1]), "from": math.exp(low), "to": math.exp(high)}
    return found


def summary(result: dict[str, Any], anchors: Anchors | None = None) -> dict[str, Any]:
    """Curves, values at READ_AT, comparisons of LPIPS(alex), pairs at equal bytes, the worst three."""
    rows, pictures = result["rows"], len(result["pictures"])
    here = {row["codec"] for row in rows}
    curves = {codec: mean_points(rows, codec, pictures) for codec in ("linic", *CLASSICAL) if codec in here}
    whole = len(result["pictures"]) == KODAK and bool({"vvc420"} & here)
    known = published(anchors)
    read = {name: {f"{bpp:g}": {key: at_rate(points, key, bpp) for key in READ} for bpp in READ_AT}
            for name, points in [*curves.items(), *((name, entry["points"]) for name, entry in known.items())]}
    against = {}
    if "linic" in curves:
        against = {name: compare(curves["linic"], points) for name, points in curves.items() if name != "linic"}
        # Readings off a chart are too coarse for this.
        against |= {name: compare(curves["linic"], e["points"]) for name, e in known.items() if not e["chart"]} \
            if whole else {}
    return {"curves": curves, "read": read, "against": against, "pairs": pairs(rows), "published": known,
            "whole_kodak": whole}


def pairs(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each rate: ours at most as large as the other's file, picture by picture."""
    found = {}
    of = {(row["codec"], row["rate"], row["picture"]): row for row in rows}
    for rate in dict.fromkeys(row["rate"] for row in rows if row["codec"] == "matched"):
        both = [(row, of[row["against"], rate, row["picture"]]) for row in rows
                if row["codec"] == "matched" and row["rate"] == rate]
        judged = [(a, b) for a, b in both if a[JUDGE] is not None and b[JUDGE] is not None]
        there = {b["codec"] for _, b in both}
        missing = len({r["picture"] for r in rows if r["codec"] in there and r["rate"] == rate}) - len(both)
        found[rate] = {
            "against": sorted(there), "pictures": len(both), "too_large": missing,
            "bytes": [_mean(a["bytes"] for a, _ in both), _mean(b["bytes"] for _, b in both)],
            **{key: [_mean(r[key] for r in side) for side in zip(*both)] for key in KEYS
               if all(r[key] is not None for pair in both for r in pair)},
            "wins": sum(a[JUDGE] < b[JUDGE] for a, b in judged) if judged else None,
            "worst": [(a["picture"], a[JUDGE], b[JUDGE]) for a, b in sorted(judged, key=lambda p: -p[0][JUDGE])[:3]],
        }
    return found


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


# --- tables ---------------------------------------------------------------------------------------------------------

SHOWN = tuple(c for c in COLUMNS if c.key not in ("ac8-excess", "ac4-excess", "ac2-excess"))


def markdown(result: dict[str, Any], found: dict[str, Any]) -> str:
    ours, count = result["ours"], len(result["pictures"])
    lines = [f"# Below .04 bits per pixel: {ours['name'] if ours else 'classical codecs'}", "",
             f"{count} pictures, whole files, every measure by the same code in one run. {NOTE}", ""]
    if ours and ours["estimated"]:
        lines[2:2] = ["**ESTIMATED BITS of a checkpoint, not files: for development, never for reports.**", ""]
    over = [row["bytes"] - row["payload"] for row in result["rows"] if row.get("payload") is not None]
    if over:
        lines += [f"Of a file of linic {_mean(over):.0f} bytes are header, checksum and metadata, counted everywhere."
                  + (f" **More than {COMPACT}: a registered model has the compact header.**" if _mean(over) > COMPACT
                     else ""), ""]
    if times := [(r["encode_s"], r["decode_s"]) for r in result["rows"] if r["codec"] == "linic" and "encode_s" in r]:
        encode, decode = (_mean(side) for side in zip(*times))
        lines += [f"Encoding takes {encode:.2f} s a picture, decoding {decode:.2f} s (mean wall time of the rows of "
                  "linic, when they were made).", ""]
    lines += ["## Means over the pictures", ""]
    lines += _table(["codec", "target", "bytes", "bpp", *(c.heading for c in SHOWN)],
                    [[LABELS[codec], p["rate"] + ("" if p["complete"] else f" ({p['pictures']} of {count})"),
                      f"{p['bytes']:.0f}", f"{p['bpp']:.4f}", *(_cell(p[c.key], c.form) for c in SHOWN)]
                     for codec, points in found["curves"].items() for p in points])
    lines += ["", "Settings: " + "; ".join(f"{name}: {s['settings']}, counted: {s['counted']}"
                                           for name, s in result["settings"].items() if name in found["curves"])
              + ". Scale (1 to 1/8, Lanczos) and quality chosen for each picture by MS-SSIM; at most that target. "
              "vvc420: vvenc medium, 4:2:0, the same way. A row over fewer pictures is no point of a curve.", ""]
    lines += ["## At equal rate", "", "Read off the curves of means (PCHIP over ln bpp, at most 2 % past an end). "
              + ("" if found["whole_kodak"] else "**Published rows are means over all 24 Kodak pictures, these are "
                 "not: no comparison.** ")
              + "Names with * were published, with ** read off a chart (to about .003).", ""]
    for key in READ:
        column = next(c for c in COLUMNS if c.key == key)
        named = [(LABELS.get(name) or name + ("**" if found["published"][name]["chart"] else "*"), at)
                 for name, at in found["read"].items()]
        lines += _table([column.heading, *(f"{bpp:g} bpp" for bpp in READ_AT)],
                        [[name, *(_cell(at[f"{bpp:g}"][key], column.form) for bpp in READ_AT)] for name, at in named
                         if any(at[f"{bpp:g}"][key] is not None for bpp in READ_AT)])
        lines.append("")
    if found["against"]:
        lines += ["## linic against each, by LPIPS(alex)", "",
                  "Rate: BD-rate, size at equal LPIPS(alex) over the interval of it that both curves have, and how "
                  "much of the shorter range that is: under a third says little. Difference: mean of LPIPS(alex), ours "
                  "minus theirs, over the rates that both have; below 0 is ours better.", ""]
        lines += _table(["against", "rate", "interval", "share", "difference", "rates"],
                        [[LABELS.get(name) or name, *_compared(c)] for name, c in found["against"].items()])
        lines.append("")
    for rate, p in found["pairs"].items():
        lines += [f"## At equal bytes, target {rate} bpp: against {' and '.join(LABELS[c] for c in p['against'])}", "",
                  f"Each picture at the largest quality whose file is not larger. {p['pictures']} pictures"
                  + (f", {p['too_large']} more have no file so small" if p["too_large"] else "")
                  + (f"; ours better in LPIPS(alex) in {p['wins']}." if p["wins"] is not None else "."), ""]
        keys = [c for c in SHOWN if c.key in p]
        lines += _table(["", "bytes", *(c.heading for c in keys)],
                        [[who, f"{p['bytes'][i]:.0f}", *(_cell(p[c.key][i], c.form) for c in keys)]
                         for i, who in enumerate(("linic", "theirs"))])
        if p["worst"]:
            lines += ["", "Worst three of ours: " + ", ".join(f"{name} {a:.4f} (theirs {b:.4f})"
                                                            for name, a, b in p["worst"])]
        lines.append("")
    lines += ["Machine: " + ", ".join(f"{k} {v}" for k, v in result.get("machine", {}).items() if v is not None),
              "", f"Command: `{result.get('command', '')}`"]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)]), *(_line(row) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _compared(c: dict[str, Any]) -> list[str]:
    rate = ([f"{c['percent']:+.1f} %", f"{c['low']:.3f}-{c['high']:.3f}", f"{100 * c['share']:.0f} %"] if "percent" in c
            else ["-", "nothing in common", "-"])
    if "difference" not in c:
        return [*rate, "-", "none in common"]
    return [*rate, f"{c['difference']:+.4f}", f"{c['from']:.4f}-{c['to']:.4f}"]


def write(result: dict[str, Any], paths: dict[str, Path], out: Path, ours: Ours | None = None,
          anchors: Anchors | None = None, sheets: str = "png") -> None:
    """extreme.json, extreme.md, lpips-alex.png, psnr.png, and sheets; `paths`: of the pictures, by name."""
    found = summary(result, anchors)
    title = f"{len(result['pictures'])} pictures" + (", Kodak" if found["whole_kodak"] else "")
    if ours and ours.estimated:
        title += ", ESTIMATED BITS"
    write_whole(out / "extreme.json", json_text(result, found).encode())
    write_whole(out / "extreme.md", markdown(result, found).encode())
    for key, name in ((JUDGE, "lpips-alex"), ("psnr-rgb", "psnr")):
        plot(found, key, out / f"{name}.png", title)
    if sheets != "none" and ours:
        contact_sheets(result, paths, out, lambda row, path: picture_of(row, path, ours, anchors), sheets)


def json_text(result: dict[str, Any], found: dict[str, Any]) -> str:
    """Readable, and a line a row."""
    rows = ",\n  ".join(json.dumps(row, allow_nan=False, separators=(",", ":")) for row in result["rows"])
    rest = json.dumps({**result, "rows": [], **found}, indent=1, allow_nan=False)
    return rest.replace('"rows": []', f'"rows": [\n  {rows}\n ]', 1) + "\n"


# --- plots ----------------------------------------------------------------------------------------------------------


def plot(found: dict[str, Any], key: str, path: Path, title: str) -> None:
    """One measure over bpp on a logarithmic axis: ours thick, classical solid, published dashed, chart-read dotted."""
    figure, axes = canvas(10.5, 6.5)
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    column = next(c for c in COLUMNS if c.key == key)

    def draw(points: Sequence[Row], **style: Any) -> None:
        shown = [(p["bpp"], p[key]) for p in points if p.get(key) is not None and p.get("complete", True)
                 and p["bpp"] < 0.05]
        if shown:
            axes.plot(*zip(*shown), **style)

    for codec, points in found["curves"].items():
        ours = codec == "linic"
        draw(points, label=LABELS[codec], marker="o" if ours else "s", linewidth=3 if ours else 1.5,
             markersize=6 if ours else 4, **({"color": "black", "zorder": 5} if ours else {}))
    for name, entry in found["published"].items():
        label = f"{name} ({'read off a chart' if entry['chart'] else 'published'})"
        draw(entry["points"], label=label, marker="^" if entry["chart"] else "D", markerfacecolor="none", markersize=5,
             linewidth=1, linestyle=":" if entry["chart"] else "--")
    axes.set_xscale("log")
    axes.set_xlim(0.003, 0.05)
    ticks = [0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.035, 0.05]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    better = {1: "more is better", -1: "less is better", 0: ""}[column.sign]
    axes.set(xlabel="bits per pixel", ylabel=f"{column.heading} ({better})", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(fontsize=8, loc="outside right upper")     # inside it would hide curves
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_whole(path, drawn.getvalue())


# --- contact sheets -------------------------------------------------------------------------------------------------

GAP, CAPTION = 6, 20


def sheet(groups: Sequence[Sequence[tuple[str, Image.Image]]], longest: int = 384, beside: int = 2) -> Image.Image:
    """Groups of labelled pictures, `beside` groups in a line; pictures scaled down to `longest` pixels."""
    if not groups:
        raise UsageError("no pictures for a sheet")
    font = ImageFont.load_default(13)
    small = [[(label, _reduced(image, longest)) for label, image in group] for group in groups]
    count = max(map(len, small))
    width = max(image.width for group in small for _, image in group) + GAP
    lines = [small[i:i + beside] for i in range(0, len(small), beside)]
    heights = [max(image.height for group in line for _, image in group) + CAPTION + GAP for line in lines]
    whole = Image.new("RGB", (width * count * min(beside, len(small)) + GAP, sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(whole), GAP
    for line, height in zip(lines, heights):
        for i, group in enumerate(line):
            for j, (label, image) in enumerate(group):
                left = GAP + (i * count + j) * width
                draw.text((left, top), label, fill="black", font=font)
                whole.paste(image, (left, top + CAPTION))
        top += height
    return whole


def _reduced(image: Image.Image, longest: int) -> Image.Image:
    factor = min(1.0, longest / max(image.size))
    return grown(image.convert("RGB"), (max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def contact_sheets(result: dict[str, Any], paths: dict[str, Path], out: Path,
                   shown: Callable[[Row, Path], Image.Image | None], form: str = "png",
                   longest: int = 384) -> list[Path]:
    """sheet-RATE of each rate (original | ours | theirs at equal bytes), worst-RATE: its worst three, large."""
    rows, written = result["rows"], []
    of = {(row["codec"], row["rate"], row["picture"]): row for row in rows}
    for rate in dict.fromkeys(row["rate"] for row in rows if row["codec"] == "matched"):
        groups, badness = [], []
        for row in (r for r in rows if r["codec"] == "matched" and r["rate"] == rate):
            other, path = of[row["against"], rate, row["picture"]], paths[row["picture"]]
            with Image.open(path) as file:
                group = [(path.stem, file.convert("RGB"))]
            for name, one in (("linic", row), (LABELS[other["codec"]], other)):
                if (image := shown(one, path)) is not None:
                    judged = "" if one[JUDGE] is None else f"  LPIPS(alex) {one[JUDGE]:.3f}"
                    group.append((f"{name}  {one['bytes']} bytes{judged}", image))
            groups.append(group)
            badness.append(row[JUDGE] if row[JUDGE] is not None else -(row["psnr-rgb"] or 0))
        worst = sorted(range(len(groups)), key=lambda i: -badness[i])[:3]
        for name, chosen, size in (("sheet", groups, longest), ("worst", [groups[i] for i in worst], 768)):
            file_bytes = io.BytesIO()
            drawn = sheet(chosen, size, 1 if name == "worst" else 2)
            drawn.save(file_bytes, {"jpg": "JPEG", "png": "PNG"}[form], quality=90)
            written.append(out / f"{name}-{rate}.{form}")
            write_whole(written[-1], file_bytes.getvalue())
    return written
