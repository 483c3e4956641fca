"""`linic bench kernels`: the operators against each other. `train`: the engine against plain torch. `entropy`: integers
against floats. `codec`: a picture, stage by stage."""
import argparse
import json
from pathlib import Path

from linic.app.cli import common
from linic.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["kernels", "train", "entropy", "codec"])
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
    entropy.add_argument("--model", default="lalic-xs", metavar="NAME|PATH", help="default: lalic-xs")
    entropy.add_argument("--float-weights", metavar="CHECKPOINT", help="the networks before their weights were rounded")


def run(args: argparse.Namespace) -> int:
    if args.what == "train":
        return _train(args)
    if args.what == "entropy":
        return _entropy(args)
    if args.what == "codec":
        return _codec(args)
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
    result = entropy.run(pictures_in(args.pictures), args.model, args.float_weights, args.repeats or 7)
    print(json.dumps(result) if args.json else entropy.table(result))
    return 0


def _codec(args: argparse.Namespace) -> int:
    if not args.pictures:
        raise UsageError("bench codec needs --pictures")
    from linic.bench import stages
    from linic.bench.evaluate import pictures_in
    common.use_threads(args)
    result = stages.run(pictures_in(args.pictures)[0], args.model, args.preset, args.device, args.repeats or 5)
    print(json.dumps(result) if args.json else stages.table(result))
    return 0
