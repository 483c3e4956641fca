"""`linic decode IN [OUT]`."""
import argparse
import sys
import time
from pathlib import Path

from linic.app.cli import common
from linic.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    common.add_files(parser, "a .linic file", "the picture, PNG by default; its suffix names the format")
    parser.add_argument("--model", metavar="NAME|PATH", help="a model that is not installed (the file names its model)")
    parser.add_argument("--max-pixels", type=common.positive, metavar="N", help="refuse larger pictures")
    parser.add_argument("--realism", type=float, metavar="X", help="of an extreme file: 0 faithful .. 1 with all the "
                        "texture that its model can invent (default: 1, where the model has a decoder for it)")
    common.add_machine(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    output = common.choose_output(args, ".png")
    import linic
    from linic.picture.arrays import NOTE
    from linic.picture.files import FORMATS, to_bytes
    suffix = ".png" if output == "-" else Path(output).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"{output}: unknown suffix {suffix!r}; known: {' '.join(FORMATS)}")
    common.use_threads(args)
    limit = {"max_pixels": args.max_pixels} if args.max_pixels else {}
    with common.about(args.input):
        data = common.read_input(args.input)
        started = time.perf_counter()
        image = linic.decode(data, model=args.model, device=args.device, realism=args.realism, **limit)
        seconds = time.perf_counter() - started
    with common.about(output):
        written, lost = to_bytes(image, suffix)
    common.write_output(output, written)
    if lost:
        print(f"linic: {output}: {suffix[1:]} does not carry {', '.join(lost)}: left out", file=sys.stderr)
    if note := image.info.get(NOTE):
        print(f"linic: {output}: {note}", file=sys.stderr)
    line = f"{output}  {image.width}x{image.height}  {len(written)} bytes  {seconds:.2f} s"
    common.print_result(args, output, line, {
        "input": args.input, "output": output, "bytes": len(written), "width": image.width, "height": image.height,
        "mode": image.mode, "metadata_left_out": lost, "note": image.info.get(NOTE), "seconds": seconds,
    })
    return 0
