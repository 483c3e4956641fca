"""`linic encode IN [OUT]`."""
import argparse
import time
from pathlib import Path

from linic.app.cli import common
from linic.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    common.add_files(parser, "a picture (PNG, JPEG, WebP, AVIF, ...)", "the .linic file")
    parser.add_argument("-q", "--quality", type=common.quality, default=50, metavar="Q",
                        help="0 smallest .. 100 best (default: 50)")
    parser.add_argument("--model", default="lalic-xs", metavar="NAME|PATH", help="default: lalic-xs")
    parser.add_argument("--compact", action="store_true", help="a header of 8 bytes instead of 50; no metadata")
    common.add_machine(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    output = common.choose_output(args, ".linic")
    import linic
    from linic.picture.files import FORMATS, read_bytes
    if Path(output).suffix.lower() in FORMATS:
        # `linic encode *.png` with two pictures would put the first over the second.
        raise UsageError(f"{output}: the output of encode is a .linic file, not a picture")
    common.use_threads(args)
    with common.about(args.input):
        image = read_bytes(common.read_input(args.input), common.shown(args.input))
        started = time.perf_counter()
        data = linic.encode(image, quality=args.quality, model=args.model, device=args.device,
                            profile="compact" if args.compact else "full")
        seconds = time.perf_counter() - started
    common.write_output(output, data)
    bpp = 8 * len(data) / (image.width * image.height)
    line = f"{output}  {len(data)} bytes  {bpp:.3f} bpp  q {args.quality}  {args.model}  {seconds:.2f} s"
    common.print_result(args, output, line, {
        "input": args.input, "output": output, "bytes": len(data), "bpp": bpp, "width": image.width,
        "height": image.height, "quality": args.quality, "model": args.model, "seconds": seconds,
    })
    return 0
