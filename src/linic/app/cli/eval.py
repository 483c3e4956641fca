"""`linic eval DIR`: whole files over a folder of pictures; table, BD-rates, JSON, plot."""
import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from linic.app.cli import common

MEASURED = "measured"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="DIR", help="a folder of pictures, or one picture")
    parser.add_argument("-q", "--qualities", type=common.qualities, default=list(range(0, 101, 10)), metavar="Q,Q,...",
                        help="e.g. 0,25,50 or 0,10,...,100 (default)")
    parser.add_argument("--model", default="lalic-xs", metavar="NAME|PATH", help="default: lalic-xs")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first N pictures")
    parser.add_argument("--tiles", type=common.size, metavar="WxH",
                        help="cut the pictures into tiles of that size, each a file of its own: does size matter?")
    parser.add_argument("--anchors", metavar="SET",
                        help="compare with known curves on the set: kodak, clic-professional or tecnick; or with those "
                             "of Pillow's JPEG, WebP and AVIF, measured on the same pictures: measured")
    parser.add_argument("--measures", type=Path, metavar="FOLDER",
                        help="weights of perceptual networks: adds LPIPS(alex), LPIPS(squeeze), VGG19n, SSIMULACRA2, "
                             "seams and lattices (about 3 s a 768x512 picture)")
    parser.add_argument("--json", metavar="OUT", help="the whole result as JSON; - writes stdout")
    parser.add_argument("--markdown", metavar="OUT", help="the report; - writes stdout (default)")
    parser.add_argument("--plot", metavar="OUT", help="PSNR over bpp as PNG")
    parser.add_argument("--keep", metavar="DIR", help="keep the .linic files there")
    common.add_machine(parser)


def run(args: argparse.Namespace) -> int:
    from linic.bench import anchors, report, rivals
    from linic.bench.evaluate import evaluate, pictures_in, tiles
    from linic.bench.judge import Judge
    curves = anchors.load(args.anchors) if args.anchors not in (None, MEASURED) else {}
    common.use_threads(args)
    judge = Judge(args.measures) if args.measures else None
    with common.about(args.input), tempfile.TemporaryDirectory() as folder:
        paths = pictures_in(args.input)[: args.limit]
        if args.tiles:
            width, height = args.tiles
            paths = tiles(paths, width, height, Path(folder))
        result = evaluate(paths, args.qualities, model=args.model, device=args.device, keep=args.keep,
                          command=command_of(args), progress=show if sys.stderr.isatty() else None, judge=judge)
        if args.anchors == MEASURED:
            curves = rivals.measured(paths)
            result["anchors"] = {name: dataclasses.asdict(curve) for name, curve in curves.items()}
    if args.json:
        common.write_output(args.json, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    if args.plot:
        report.plot([report.curve(result)], curves, args.plot, title=Path(args.input).name)
    text = report.markdown(result, curves, anchors.PICTURES.get(args.anchors))
    if args.markdown not in (None, "-"):
        common.write_output(args.markdown, text.encode())
    if args.markdown == "-" or (args.markdown is None and args.json != "-"):
        print(text, end="")
    return 0


def show(row: dict[str, Any]) -> None:
    psnr = "" if row["psnr-rgb"] is None else f"  {row['psnr-rgb']:.2f} dB"
    print(f"{row['name']}  q {row['quality']}  {row['bpp']:.4f} bpp{psnr}", file=sys.stderr)


def command_of(args: argparse.Namespace) -> str:
    """What to type to get this result again; paths of this machine stay out of reports."""
    qualities, model = ",".join(map(str, args.qualities)), Path(args.model).name
    parts = ["linic", "eval", Path(args.input).name, "-q", qualities, "--model", model]
    for name in ("limit", "threads"):
        if getattr(args, name):
            parts += [f"--{name}", str(getattr(args, name))]
    if args.tiles:
        parts += ["--tiles", "x".join(map(str, args.tiles))]
    if args.anchors:
        parts += ["--anchors", args.anchors]
    if args.measures:
        parts += ["--measures", args.measures.name]
    return shlex.join([*parts, "--device", args.device])
