"""`linic bench kernels`: the operators against each other. `train`: the engine against plain torch. `entropy`: integers
against floats. `codec`: a picture, stage by stage. `extreme`: below .04 bpp, against the classical codecs."""
import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from linic.app.cli import common
from linic.errors import UsageError

if TYPE_CHECKING:
    from linic.bench.judge import Judge


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["kernels", "train", "entropy", "codec", "extreme"])
    parser.add_argument("input", nargs="?", metavar="PICTURES", help="of extreme: a folder of pictures, or one")
    parser.add_argument("--threads", type=common.positive, metavar="N", help="CPU threads (default: 1; train: all)")
    parser.add_argument("--repeats", type=common.positive, metavar="N",
                        help="runs a number is taken from (default: 7; train: 5 rounds)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    common.add_json(parser)
    train = parser.add_argument_group("of train")
    train.add_argument("--recipe", type=Path, help="its first phase is timed")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    train.add_argument("--data", type=Path, help="pictures: a folder or a tar shard")
    train.add_argument("--speed", default="eager", help="how the engine's steps run: a rung, or ladder")
    train.add_argument("--seconds", type=common.positive, default=10, metavar="N", help="of one turn (default: 10)")
    train.add_argument("--workers", type=common.positive, metavar="N", help="loader processes of the plain one")

    entropy = parser.add_argument_group("of entropy and codec")
    entropy.add_argument("--pictures", type=Path, help="folder or picture; the first one is timed")
    entropy.add_argument("--preset", help="codec: of this preset with fresh weights, instead of a model")
    entropy.add_argument("--model", metavar="NAME|PATH", help="default: lalic-xs; extreme: the classical codecs alone")
    entropy.add_argument("--sizes", type=_sizes, metavar="WxH,...|all", help="codec: time and memory of the picture "
                         "scaled to each; all: 512x384 to 2048x1365")
    entropy.add_argument("--float-weights", metavar="CHECKPOINT", help="the networks before their weights were rounded")
    extreme = parser.add_argument_group("of extreme")
    extreme.add_argument("--out", type=Path, metavar="FOLDER", help="extreme.json, .md, plots, sheets; rows.jsonl and "
                         ".linic files, which a second run takes up")
    extreme.add_argument("--measures", type=Path, metavar="FOLDER", help="weights of perceptual networks")
    extreme.add_argument("--anchors", type=Path, metavar="FOLDER", help="VVC's pictures, recorded and published points")
    extreme.add_argument("-q", "--qualities", type=common.qualities, metavar="Q,Q,...",
                         help="of the model (default: 0,17,33,50,67,83,100)")
    extreme.add_argument("--rates", type=_rates, metavar="BPP,...", help="of the classical codecs "
                         "(default: 0.008,0.0118,0.015,0.025)")
    extreme.add_argument("--limit", type=common.positive, metavar="N", help="only the first N pictures")
    extreme.add_argument("--known", type=Path, action="append", default=[], metavar="JSON",
                         help="rows of an earlier extreme.json or rows.jsonl are not made again")
    extreme.add_argument("--realism", type=float, metavar="0..1", help="of a model with two decoders")
    extreme.add_argument("--estimated", type=Path, metavar="CHECKPOINT", help="instead of --model: an MRT checkpoint, "
                         "its bits ESTIMATED; for development, never for reports")
    extreme.add_argument("--ablate", action="store_true",
                         help="with --estimated: only its parts switched off, one by one")
    extreme.add_argument("--start", type=Path, metavar="CHECKPOINT", help="of --ablate: the weights of step 0")
    extreme.add_argument("--sheets", choices=["png", "jpg", "none"], default="png",
                         help="contact sheets of each rate (default: png)")


def _sizes(text: str) -> list[tuple[int, int]]:
    if text == "all":
        from linic.bench.stages import SIZES
        return list(SIZES)
    return [common.size(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < 8 for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not bits per pixel,...")
    return found


def run(args: argparse.Namespace) -> int:
    if args.what == "train":
        return _train(args)
    if args.what == "entropy":
        return _entropy(args)
    if args.what == "codec":
        return _codec(args)
    if args.what == "extreme":
        return _extreme(args)
    from linic.bench import kernels
    rows = kernels.run(threads=args.threads or 1, repeats=args.repeats or 7, device=args.device)
    print(json.dumps(rows, default=str) if args.json else kernels.table(rows))
    return 0


def _train(args: argparse.Namespace) -> int:
    if not (args.recipe and args.data):
        raise UsageError("bench train needs --recipe and --data")
    import dataclasses

    from linic.train import recipe
    chosen = recipe.load(args.recipe, dict(map(recipe.change, args.set)))
    from linic.train import plain
    result = plain.compare(chosen, args.data, device=args.device, speed=args.speed, rounds=args.repeats or 5,
                           seconds=args.seconds, threads=args.threads, workers=args.workers)
    print(json.dumps(dataclasses.asdict(result)) if args.json else plain.table(result))
    return 0


def _entropy(args: argparse.Namespace) -> int:
    if not args.pictures:
        raise UsageError("bench entropy needs --pictures")
    import torch

    from linic.bench import entropy
    from linic.bench.evaluate import pictures_in
    torch.set_num_threads(args.threads or 1)
    result = entropy.run(pictures_in(args.pictures), args.model or "lalic-xs", args.float_weights, args.repeats or 7)
    print(json.dumps(result) if args.json else entropy.table(result))
    return 0


def _codec(args: argparse.Namespace) -> int:
    if not args.pictures:
        raise UsageError("bench codec needs --pictures")
    from linic.bench import stages
    from linic.bench.evaluate import pictures_in
    common.use_threads(args)
    path, model = pictures_in(args.pictures)[0], args.model or "lalic-xs"
    if args.sizes:
        results = stages.sizes(path, args.sizes, model, args.preset, args.device, args.repeats or 2)
        print(json.dumps(results) if args.json else stages.size_table(results))
        return 0
    result = stages.run(path, model, args.preset, args.device, args.repeats or 5)
    print(json.dumps(result) if args.json else stages.table(result))
    return 0


def _extreme(args: argparse.Namespace) -> int:
    if not (args.input and args.out):
        raise UsageError("bench extreme needs PICTURES and --out FOLDER")
    if args.model and args.estimated:
        raise UsageError("--model and --estimated exclude each other")
    if (args.ablate or args.start) and not (args.estimated and args.ablate):
        raise UsageError("--ablate goes with --estimated, --start with --ablate")
    import torch

    from linic.bench import extreme, extreme_report, rivals
    from linic.bench.evaluate import machine, pictures_in
    from linic.bench.judge import Judge
    torch.set_num_threads(args.threads or 1)
    paths = pictures_in(args.input)[: args.limit]
    judge = Judge(args.measures)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.ablate:
        return _ablate(args, paths, judge)
    anchors = rivals.Anchors(args.anchors) if args.anchors else None
    ours: extreme.Ours | None = None
    if args.estimated:
        from linic.bench.estimate import Estimated
        ours = Estimated(args.estimated)
    elif args.model:
        ours = extreme.Files(args.model, args.device, args.out / "files", args.realism)
    result = extreme.run(paths, judge, ours=ours, anchors=anchors, out=args.out,
                         qualities=args.qualities or extreme.QUALITIES, rates=args.rates or extreme.RATES,
                         known=args.known, say=_say)
    result |= {"machine": machine(args.device), "command": _command(args)}
    extreme_report.write(result, {path.name: path for path in paths}, args.out, ours, anchors, args.sheets)
    print((args.out / "extreme.md").read_text() if not args.json else json.dumps(result))
    return 0


def _ablate(args: argparse.Namespace, paths: list[Path], judge: "Judge") -> int:
    from linic.bench import estimate
    result = estimate.ablate(args.estimated, paths, judge, args.start, args.qualities or estimate.QUALITIES, say=_say)
    common.write_output(str(args.out / "ablation.json"), (json.dumps(result, indent=1) + "\n").encode())
    common.write_output(str(args.out / "ablation.md"), estimate.table(result).encode())
    print(json.dumps(result) if args.json else estimate.table(result))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command(args: argparse.Namespace) -> str:
    """What to type to get this result again; paths of this machine stay out of reports."""
    parts = ["linic", "bench", "extreme", Path(args.input).name]
    for name in ("model", "estimated", "measures", "anchors", "limit", "realism"):
        if (value := getattr(args, name)) is not None:
            parts += [f"--{name}", Path(str(value)).name]
    if args.qualities:
        parts += ["-q", ",".join(map(str, args.qualities))]
    if args.rates:
        parts += ["--rates", ",".join(f"{rate:g}" for rate in args.rates)]
    return shlex.join([*parts, "--out", args.out.name])
