"""`linic models`: what is installed, without loading it; `show` prints a normative program, `add` installs a file."""
import argparse
import json
import sys

from linic.app.cli import common
from linic.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=["list", "show", "add"], default="list")
    parser.add_argument("model", nargs="?", metavar="NAME|PATH|URL", help="what to show or add")
    parser.add_argument("-v", "--verbose", action="store_true", help="with everything their cards say")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from linic import weights
    if (args.model is None) != (args.action == "list"):
        raise UsageError(f"linic models {args.action}: " + ("takes no model" if args.model else "which model?"))
    if args.action == "show":
        return show(args)
    if args.action == "add":
        card = weights.add(args.model)
        print(json.dumps(card) if args.json else f"{card['path']}  {card['name']} {card['digest']}")
        return 0
    found = weights.available()
    if args.json:
        print(json.dumps(found, default=str))
        return 0
    if args.verbose:
        from linic import kernels
        for operator, backends in kernels.backends().items():
            print(f"{operator}: " + ", ".join(f"{k}: {v}" for k, v in backends.items()))
    if not found:
        print("linic: no models installed", file=sys.stderr)
    for model in found:
        if "error" in model:
            print(f"linic: {model['error']}", file=sys.stderr)
            continue
        print(f"{model['name']:12}  {model['parameters'] / 1e6:6.2f} M parameters  {model['bytes'] / 1e6:6.1f} MB"
              f"  {model['path']}")
        if args.verbose:
            for key, value in model.items():
                if key not in ("name", "parameters", "bytes", "path"):
                    print(f"    {key}: {value}")
    return 0


def show(args: argparse.Namespace) -> int:
    """The program a line an operator, with shapes and ranges: what a decoder in another language has to run."""
    from linic import weights
    program, tables, digest = weights.load_program(args.model)
    if args.json:
        print(json.dumps({"digest": digest.hex(), "program": program.lines()}))
        return 0
    print(f"# digest {digest.hex()}, {len(tables)} tables, {len(program.ops)} operators")
    print(program)
    return 0
