"""`linic info FILE`: the header only; needs neither the model nor torch. With --verify: every symbol, on NumPy."""
import argparse
import json

from linic.app.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="FILE", help="a .linic file; - reads stdin")
    parser.add_argument("--verify", action="store_true", help="decode every symbol and compare the checksum (seconds)")
    parser.add_argument("--model", metavar="NAME|PATH", help="for --verify, when the file's model is not installed")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    import linic
    with common.about(args.input):
        data = common.read_input(args.input)
        facts = linic.info(data)
        if args.verify:
            facts["verified"] = linic.verify(data, args.model)
    if args.json:
        print(json.dumps(facts, default=printable))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key:{width}}  {printable(value)}")
    return 0


def printable(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value
