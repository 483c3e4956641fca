"""What the commands share: naming the file an error is about, input and output, arguments. No numpy, no torch."""
import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linic.errors import LinicError, UsageError


@contextmanager
def about(path: str) -> Iterator[None]:
    """Errors raised inside are about this file."""
    try:
        yield
    except LinicError as error:
        if not hasattr(error, "where"):
            error.where = shown(path)  # type: ignore[attr-defined]
        raise


def shown(path: str) -> str:
    return "<stdin>" if path == "-" else path


def read_input(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def write_output(path: str, data: bytes) -> None:
    if path == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    from linic.picture.files import write_whole
    write_whole(path, data)


def choose_output(args: argparse.Namespace, suffix: str) -> str:
    """Where the result goes; refuses, before any work is done, what would be overwritten."""
    if args.output and args.out:
        raise UsageError("two outputs: give OUT or -o OUT, not both")
    output = args.output or args.out
    if not output:
        output = "-" if args.input == "-" else str(Path(args.input).with_suffix(suffix))
    if output == "-":
        if sys.stdout.isatty():
            raise UsageError("binary data is not written to a terminal: name a file, or redirect stdout")
        if args.json:
            raise UsageError("stdout cannot take both the file and --json")
        return output
    if os.path.exists(output):
        if args.input != "-" and os.path.exists(args.input) and os.path.samefile(args.input, output):
            raise UsageError(f"{output}: input and output are the same file")
        if not args.force and os.path.isfile(output):
            raise UsageError(f"{output}: exists already; --force overwrites it")
        if os.path.isdir(output):
            raise UsageError(f"{output}: is a folder; name a file")
    return output


def print_result(args: argparse.Namespace, output: str, line: str, facts: dict[str, Any]) -> None:
    """One line, or one JSON object; on stderr where stdout carries the file itself."""
    print(json.dumps(facts) if args.json else line, file=sys.stderr if output == "-" else sys.stdout)


def add_files(parser: argparse.ArgumentParser, what: str, into: str) -> None:
    parser.add_argument("input", metavar="IN", help=f"{what}; - reads stdin")
    parser.add_argument("output", metavar="OUT", nargs="?", help=f"{into}; - writes stdout (default: suffix replaced)")
    parser.add_argument("-o", dest="out", metavar="OUT", help="the same as OUT")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def use_threads(args: argparse.Namespace) -> None:
    if args.threads:
        import torch
        torch.set_num_threads(args.threads)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(n.isdecimal() and int(n) for n in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(parts[0]), int(parts[1])


def quality(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 100")
    return int(text)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits per pixel above 0")
    return value


def model_of(told: dict[str, Any]) -> str:
    """The name of the model that a file's `info` is about: registered, or installed here, or its digest."""
    if told["model"]:
        return str(told["model"])
    from linic import weights
    names = [m["name"] for m in weights.available() if m.get("digest") == told["digest"]]
    return names[0] if names else told["digest"]


def qualities(text: str) -> list[int]:
    """"0,25,50", or "0,10,...,100" for even steps."""
    parts = text.split(",")
    if "..." not in parts:
        return [quality(p) for p in parts]
    if len(parts) != 4 or parts[2] != "...":
        raise argparse.ArgumentTypeError(f"{text!r}: even steps are written 0,10,...,100")
    first, second, last = quality(parts[0]), quality(parts[1]), quality(parts[3])
    if not first < second <= last:
        raise argparse.ArgumentTypeError(f"{text!r}: the steps must go up")
    return list(range(first, last + 1, second - first))
