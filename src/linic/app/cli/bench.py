"""`linic bench kernels`: the operators against each other."""
import argparse
import json

from linic.app.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["kernels"])
    parser.add_argument("--threads", type=common.positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=common.positive, default=7, metavar="N", help="runs a number is taken from")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from linic.bench import kernels
    rows = kernels.run(threads=args.threads, repeats=args.repeats, device=args.device)
    print(json.dumps(rows, default=str) if args.json else kernels.table(rows))
    return 0
