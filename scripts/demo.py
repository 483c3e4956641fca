"""`make demo`: the bundled photograph through the public API at several qualities; files and pictures in demo-out/."""
import argparse
import io
import time
from pathlib import Path

from PIL import Image

import linic
from linic.bench import metrics, report
from linic.picture import read, save, to_array

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"
QUALITIES = (0, 20, 40, 60, 80, 100)
SHOWN = (0, 40, 80)
EXTREME = (25, 75)  # a few hundred bytes: what they do not say is invented
RIVAL = 40  # beside it stands a JPEG of no more bytes
CROPS = [(330, 225, 632, 425), (60, 60, 362, 260)]  # fountain, bridge and water; clouds and trees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="lalic-xs", metavar="NAME|PATH")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--picture", type=Path, default=PHOTO)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    photo = read(args.picture)
    shown = [(f"original: {photo.width}x{photo.height}, PNG {args.picture.stat().st_size:,} bytes", photo)]
    crops = [("original", photo)]
    linic.decode(linic.encode(photo, quality=50, model=args.model))  # load the model before the clock runs

    print(f"{args.picture.name}, {photo.width}x{photo.height}, model {args.model}")
    print(f"{'quality':>7} {'bytes':>9} {'bpp':>7} {'PSNR':>9} {'MS-SSIM':>8} {'encode':>9} {'decode':>9}")
    linic.decode(linic.encode(photo, extreme=True))
    cases = [(False, q) for q in QUALITIES] + [(True, q) for q in EXTREME]
    for extreme, quality in cases:
        started = time.perf_counter()
        data = linic.encode(photo, quality=quality, **({"extreme": True} if extreme else {"model": args.model}))
        encoded = time.perf_counter()
        decoded = linic.decode(data)
        finished = time.perf_counter()
        name = f"photo-{'extreme-' * extreme}q{quality:03d}"
        (args.out / f"{name}.linic").write_bytes(data)
        save(decoded, args.out / f"{name}.png")
        before, after = to_array(photo), to_array(decoded)
        bpp = 8 * len(data) / (photo.width * photo.height)
        psnr, similarity = metrics.psnr(before, after), metrics.ms_ssim(before, after)
        alike = f"{similarity:.4f}" if similarity is not None else "-"
        print(f"{f'{quality} *' if extreme else quality:>7} {len(data):9,} {bpp:7.3f} {psnr:6.2f} dB {alike:>8} "
              f"{encoded - started:7.2f} s {finished - encoded:7.2f} s")
        if extreme or quality in SHOWN:
            label = f"linic, {'extreme, ' * extreme}q {quality}: {len(data):,} bytes"
            shown.append((f"{label}, {bpp:.3f} bpp, {psnr:.1f} dB", decoded))
            crops.append((label, decoded))
        if quality == RIVAL and not extreme:
            crops.append(jpeg_of_size(photo, len(data)))

    print("* extreme: a generative reconstruction, whose details are invented")
    sheets = [report.side_by_side(shown, columns=2)]
    sheets += [report.side_by_side(crops, crop=box, columns=len(crops)) for box in CROPS]
    report.stack(sheets).save(args.out / "side-by-side.png")
    print(f"files and pictures: {args.out}/   look at {args.out / 'side-by-side.png'}")


def jpeg_of_size(photo: Image.Image, size: int) -> tuple[str, Image.Image]:
    """The best JPEG (4:2:0, progressive) of at most so many bytes; where there is none, the smallest."""
    best = b""
    for quality in range(1, 96):
        out = io.BytesIO()
        photo.save(out, format="JPEG", quality=quality, optimize=True, progressive=True)
        if best and len(out.getvalue()) > size:
            break
        best = out.getvalue()
    return f"JPEG: {len(best):,} bytes", Image.open(io.BytesIO(best))


if __name__ == "__main__":
    main()
