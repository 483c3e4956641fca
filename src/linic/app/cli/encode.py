"""`linic encode IN [OUT]`."""
import argparse
import sys
import time
from pathlib import Path

from linic.app.cli import common
from linic.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    common.add_files(parser, "a picture (PNG, JPEG, WebP, AVIF, ...)", "the .linic file")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("-q", "--quality", type=common.quality, metavar="Q", help="0 smallest .. 100 best (default: 50)")
    rate.add_argument("--bpp", type=common.rate, metavar="X", help="the best file of at most X bits per pixel")
    rate.add_argument("--size", type=common.positive, metavar="BYTES", help="the best file of at most so many bytes")
    parser.add_argument("--extreme", action="store_true", help="a few hundred bytes: a picture that one recognises, "
                        "whose details are invented (model mrt-xs)")
    parser.add_argument("--model", default="auto", metavar="NAME|PATH", help="default: lalic-xs; mrt-xs with "
                        "--extreme, and where --bpp or --size ask for less than lalic-xs can give")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--compact", action="store_true", help="a header of 8 bytes instead of 50; metadata is left "
                      "behind, the picture turned and converted to sRGB (what MRT does unless --full)")
    form.add_argument("--full", action="store_true", help="keep colour profile, EXIF and XMP")
    common.add_machine(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    output = common.choose_output(args, ".linic")
    import linic
    from linic.picture import metadata
    from linic.picture.files import FORMATS, read_bytes
    if Path(output).suffix.lower() in FORMATS:
        # `linic encode *.png` with two pictures would put the first over the second.
        raise UsageError(f"{output}: the output of encode is a .linic file, not a picture")
    common.use_threads(args)
    with common.about(args.input):
        image = read_bytes(common.read_input(args.input), common.shown(args.input))
        started = time.perf_counter()
        profile = "compact" if args.compact else "full" if args.full else None
        data = linic.encode(image, quality=args.quality, model=args.model, device=args.device, profile=profile,
                            extreme=args.extreme, bpp=args.bpp, size=args.size)
        seconds = time.perf_counter() - started
    common.write_output(output, data)
    told, bpp = linic.info(data), 8 * len(data) / (image.width * image.height)
    left = {key: len(value) for key, value in metadata(image).items()} if told["profile"] == "compact" else {}
    if left and not args.compact:
        sizes = ", ".join(f"{key} {size} bytes" for key, size in left.items())
        print(f"{common.shown(args.input)}: left behind: {sizes}; --full keeps them", file=sys.stderr)
    quality, model = told["quality"][0], args.model if args.model != "auto" else common.model_of(told)
    line = f"{output}  {len(data)} bytes  {bpp:.{3 if bpp >= 0.1 else 4}f} bpp  q {quality}  {model}  {seconds:.2f} s"
    common.print_result(args, output, line, {
        "input": args.input, "output": output, "bytes": len(data), "bpp": bpp, "width": told["width"],
        "height": told["height"], "quality": quality, "model": model, "seconds": seconds,
    })
    return 0
