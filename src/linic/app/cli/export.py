"""`linic export RUN -o FILE`: a training run -> a weight file that encode and decode can use."""
import argparse
import json
import os

from linic.app.cli import common
from linic.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="RUN", help="folder of a run, or one checkpoint")
    parser.add_argument("-o", "--out", required=True, metavar="FILE",
                        help="the weight file: .safetensors, or .safetensors.gz, a sixth smaller")
    parser.add_argument("--measure", metavar="DIR", help="code these pictures and write the result into the card")
    parser.add_argument("--adversarial", metavar="RUN", help="MRT: a run that tuned the decoder alone, as a second one")
    parser.add_argument("--about", type=field, action="append", default=[], metavar="KEY=TEXT",
                        help="a field for the card, such as data=...; may be repeated")
    parser.add_argument("--no-int8", dest="int8", action="store_false", help="keep all weights as float16")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if os.path.exists(args.out) and not args.force:
        raise UsageError(f"{args.out}: exists already; --force overwrites it")
    from linic.train.export import export
    card = export(args.input, args.out, measure=args.measure, about=dict(args.about), int8=args.int8,
                  adversarial=args.adversarial)
    size = os.path.getsize(args.out)
    if args.json:
        print(json.dumps({"output": args.out, "bytes": size, "card": card}))
    else:
        print(f"{args.out}  {size} bytes  {card['name']}  {card['parameters'] / 1e6:.2f} M parameters"
              f"  digest {card['digest']}")
    return 0


def field(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=TEXT")
    return key, value
