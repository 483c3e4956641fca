"""`linic models`: what is installed, without loading it."""
import argparse
import json
import sys

from linic.app.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="with everything their cards say")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from linic import weights
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
