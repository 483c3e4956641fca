"""Arguments of `linic train`, and what it does with them. Imports torch only when it runs."""

import argparse
import json
import os
from pathlib import Path

from linic.errors import UsageError
from linic.train import recipe

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """"90s", "60m", "1.5h" -> seconds. A unit is asked for: 60 alone could be either."""
    try:
        value = float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"budget {text!r} is not a time: write 90s, 60m or 1.5h")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", type=Path, help="TOML file, such as recipes/lalic-xs.toml")
    add("--data", type=Path, required=True, help="training pictures: a folder (read recursively) or a tar shard")
    add("--valid", type=Path, help="validation pictures; they may not be among the training pictures")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe by dotted key: "
        "optimiser.lr=1e-3, phases.0.crop=64; may be given several times")
    add("--budget", metavar="TIME", help="wall-clock time: 90s, 60m, 1.5h; plans the schedule. Where the recipe counts "
        "steps it only ends this call, and --resume goes on")
    add("--out", type=Path, help="folder of the run (default: runs/<name of the recipe>)")
    add("--init", metavar="WEIGHTS", help="start from these weights: a name, a weight file or a checkpoint")
    add("--revive", action="store_true", help="give dead hidden units of --init new first weights (train/dead.py)")
    add("--resume", action="store_true", help="go on where a stopped run in --out stood")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--threads", type=int, help="CPU threads (default: all cores, fewer while other processes need them)")
    add("--speed", default="eager", metavar="RUNG", help="how steps run: a rung of speed.py, several joined by commas, "
        "or ladder: measure all (minutes) and take the fastest that is right (default: eager)")
    add("--end-file", type=Path, help="once this file exists, its number (seconds since 1970) ends the run")
    add("--cache", type=Path, help="folder of decoded pictures, to share between runs (default: <out>/pictures)")
    add("--measures", type=Path, help="folder with the networks of perceptual losses (MRT); default: LINIC_MEASURES")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    out, budget_s = args.out or Path("runs") / args.recipe.stem, seconds(args.budget) if args.budget else None
    chosen = recipe.load(args.recipe, dict(map(recipe.change, args.set)))
    from linic.train.loop import train

    result = train(chosen, data=args.data, valid=args.valid, out=out, budget_s=budget_s,
                   init=args.init, revive=args.revive, resume=args.resume, device=args.device, threads=args.threads,
                   end_file=args.end_file, cache=args.cache, measures=args.measures,
                   speed=args.speed.split(",") if "," in args.speed else args.speed)
    if os.environ.get("RANK", "0") != "0":      # of several processes the first reports
        return 0
    if args.json:
        print(json.dumps(result))
    else:
        best = result["best"]
        score = f", best score {best['score']:.4f} ({best['weights']}, step {best['step']})" if best else ""
        print(f"{out}  {result['state']}: {result['step']} steps, {result['crops']} crops, "
              f"{result['elapsed_s']:.0f} s, {result['skipped']} skipped{score}")
    return 0
