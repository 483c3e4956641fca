"""`linic info FILE`: the header only; needs neither the model nor torch."""
import argparse
import json

from linic.app.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="FILE", help="a .linic file; - reads stdin")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    import linic
    with common.about(args.input):
        facts = linic.info(common.read_input(args.input))
    if args.json:
        print(json.dumps(facts, default=printable))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key:{width}}  {printable(value)}")
    return 0


def printable(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value
