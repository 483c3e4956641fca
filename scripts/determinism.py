"""Do the same latents and bytes come out everywhere? Runs the cells of docs/determinism.md and prints its table.

    python scripts/determinism.py prepare --pictures FOLDER --out WORK       files and latents, once
    python scripts/determinism.py run --out WORK [--only TEXT]               every cell in a process of its own
    python scripts/determinism.py cell --out WORK [--threads N ...]          one cell, in this process
    python scripts/determinism.py pixels --out WORK                          how far pixels differ by float settings

A cell decodes every file's latents, codes the stored latents again, and compares both with what was prepared. Files of
another machine (copy WORK over) make the cells across machines.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

QUALITIES = (0, 25, 50, 75, 100)
X86 = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
# name -> (environment, arguments of `cell`)
CELLS: dict[str, tuple[dict[str, str], list[str]]] = {
    **{f"{c}, {t} thread{'s' * (t > 1)}": ({"LINIC_CARRIER": c}, ["--threads", str(t)])
       for c in ("native", "int8", "f32", "f64", "i64") for t in (1, 2, 4)},
    **{f"native, batch {b}": ({"LINIC_CARRIER": "native"}, ["--batch", str(b)]) for b in (3, 8)},
    **{f"native, {isa}, {t} thread{'s' * (t > 1)}": ({"LINIC_CARRIER": "native", "LINIC_ISA": isa},
                                                     ["--threads", str(t)])
       for isa in ("avx512vnni", "avx512", "avx2", "baseline") for t in (1, 4)},
    **{f"int8, batch {b}": ({"LINIC_CARRIER": "int8"}, ["--batch", str(b)]) for b in (3, 8)},
    **{f"f64, batch {b}": ({"LINIC_CARRIER": "f64"}, ["--batch", str(b)]) for b in (3, 8)},
    **{f"{c}, ATen {isa}": ({"LINIC_CARRIER": c, "ATEN_CPU_CAPABILITY": isa}, [])
       for isa in ("default", "avx2", "avx512") for c in ("int8", "f32", "f64")},
    **{f"{c}, oneDNN {isa}": ({"LINIC_CARRIER": c, "ONEDNN_MAX_CPU_ISA": isa}, [])
       for isa in ("SSE41", "AVX2", "AVX512_CORE", "ALL") for c in ("int8", "f32", "f64")},
    "the best here": ({}, []),
    "NumPy": ({}, ["--numpy", "--every", "5"]),       # `prepare` took all latents from it
    "NumPy, dispatch off": ({"NPY_DISABLE_CPU_FEATURES": X86}, ["--numpy", "--every", "5"]),
    "CUDA": ({}, ["--device", "cuda"]),
}


def prepare(args: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from linic import codec, container, picture, weights

    args.out.mkdir(parents=True, exist_ok=True)
    ready = codec.Codec(str(weights.find(args.model)), "cpu")
    digests: dict[str, str] = {}
    for path in sorted(args.pictures.glob("*.png")):
        with Image.open(path) as image:
            pixels = picture.pad(picture.to_array(image.convert("RGB")), ready.model.config.multiple)
            for quality in QUALITIES:
                name = f"{path.stem}-{quality}"
                data = ready.encode(image.convert("RGB"), quality)
                (args.out / f"{name}.linic").write_bytes(data)
                with torch.inference_mode():
                    z, y_q8 = ready.latents(pixels, quality)
                np.savez_compressed(args.out / f"{name}.npz", z=z.astype(np.int16), y_q8=y_q8)
                digests[name] = codec.verify(data, args.model)["latents"]
                assert container.parse(data).arithmetic == container.INTEGERS
        print(path.stem, flush=True)
    (args.out / "digests.json").write_text(json.dumps({"model": args.model, "digests": digests}, indent=1))


def cell(args: argparse.Namespace) -> None:
    from linic import container, weights
    from linic.codec import _decode_tile
    from linic.entropy.program import Numpy, plan
    from linic.entropy.walk import walk
    from linic.rangecoder import Encoder

    prepared = json.loads((args.out / "digests.json").read_text())
    program, tables, _ = weights.load_program(prepared["model"])
    backend: Any = Numpy(program)
    chosen = "NumPy"
    if not args.numpy:
        import torch

        from linic.entropy.fast import Torch
        torch.set_num_threads(args.threads)
        backend = Torch(program, args.device)
        chosen = f"{args.device} {backend.carriers}, torch {torch.__version__}"
    started, wrong, count = time.perf_counter(), [], 0
    names = [n for n in prepared["digests"] if n.endswith(tuple(f"-{q}" for q in QUALITIES))]
    for name in names[args.every // 2::args.every]:
        quality = int(name.rpartition("-")[2])
        file = container.parse((args.out / f"{name}.linic").read_bytes())
        (rows, columns), = file.cells()
        size = rows.stop - rows.start, columns.stop - columns.start
        if args.batch > 1:
            stored = [np.load(args.out / f"{n}.npz") for n in names if n.endswith(f"-{quality}")]
            like = np.load(args.out / f"{name}.npz")["z"].shape
            others = [s for s in stored if s["z"].shape == like][: args.batch - 1]
            own = np.load(args.out / f"{name}.npz")
            z, y_q8 = (np.stack([*(s[k] for s in others), own[k]]) for k in ("z", "y_q8"))
            y_hat = walk(plan(program, backend, quality, size, z, y_q8), Silent())[-1]
        else:
            y_hat = _decode_tile(file, 0, tables, plan(program, backend, quality, size))
            own, coder = np.load(args.out / f"{name}.npz"), Encoder(tables)
            walk(plan(program, backend, quality, size, own["z"], own["y_q8"]), coder)
            if coder.finish() != file.tiles[0].payload:
                wrong.append(f"{name}: other bytes")
        if hashlib.sha256(y_hat.astype("<i4").tobytes()).hexdigest() != prepared["digests"][name]:
            wrong.append(f"{name}: other latents")
        count += 1
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"files": count, "wrong": wrong, "ran": chosen, "seconds": seconds}))


# name -> environment; the first one is what the others are compared with
PIXELS = {
    "float32": {"LINIC_BF16": "0"},
    "float32, no native kernels": {"LINIC_BF16": "0", "LINIC_NO_NATIVE": "1"},
    "float32, ATen default, oneDNN SSE41": {"LINIC_BF16": "0", "ATEN_CPU_CAPABILITY": "default",
                                            "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "bf16": {"LINIC_BF16": "1"},
}


def pixels(args: argparse.Namespace) -> None:
    """Each setting decodes every file in a process of its own; differences in levels of 255."""
    files = sorted(args.out.glob("*.linic"))
    if args.into:
        import linic
        shown = [np.asarray(linic.decode(f.read_bytes(), device=args.device)) for f in files]
        np.savez(args.into, *shown)
        return
    first: list[np.ndarray] = []
    print("| setting | files | equal samples | largest difference | PSNR to the first, dB |\n|---|---|---|---|---|")
    for name, environment in PIXELS.items():
        into = args.out / "pixels.npz"
        subprocess.run([sys.executable, __file__, "pixels", "--out", str(args.out), "--into", str(into)],
                       env={**os.environ, **environment}, check=True)
        with np.load(into) as stored:
            shown = [stored[k].astype(np.int16) for k in stored.files]
        into.unlink()
        first = first or shown
        error = np.concatenate([(a - b).ravel() for a, b in zip(shown, first)])
        mse = float(np.square(error, dtype=np.float64).mean())
        psnr = "" if mse == 0 else f"{10 * np.log10(65025 / mse):.1f}"
        equal = 100 * (error == 0).mean()
        print(f"| {name} | {len(files)} | {equal:.3f} % | {np.abs(error).max()} | {psnr} |", flush=True)


class Silent:
    """A coder of nothing: the symbols that were wanted."""

    def code(self, index: np.ndarray, symbols: np.ndarray | None) -> np.ndarray:
        assert symbols is not None
        return symbols


def run(args: argparse.Namespace) -> None:
    path = args.out / "cells.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, (environment, arguments) in CELLS.items():
        if args.only not in name or (name in found and not args.again):
            continue
        result = subprocess.run([sys.executable, __file__, "cell", "--out", str(args.out), *arguments],
                                env={**os.environ, **environment}, capture_output=True, text=True)
        last = (result.stdout.strip().splitlines() or [""])[-1]
        error = (result.stderr.strip().splitlines() or ["no output"])[-1]
        found[name] = json.loads(last) if result.returncode == 0 else {"error": error[:200]}
        found[name]["machine"] = platform.machine()
        path.write_text(json.dumps(found, indent=1))
        print(name, found[name], flush=True)
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """A row a setting: the cells "carrier, setting" that were equal, and those that differed or did not run."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name in CELLS:
        carrier, _, setting = name.partition(", ")
        cell = found.get(name, {"error": "not run"})
        result = "not run" if "error" in cell else f"{cell['files']} files equal" if not cell["wrong"] \
            else f"**{len(cell['wrong'])} of {cell['files']} differ**"
        rows.setdefault((setting, result), []).append(carrier)
    lines = [f"| {setting or 'as it comes'} | {', '.join(c)} | {result} |" for (setting, result), c in rows.items()]
    return "\n".join(["| setting | carrier | result |", "|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(required=True)
    for name, do in (("prepare", prepare), ("run", run), ("cell", cell), ("pixels", pixels)):
        command = sub.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("--out", type=Path, required=True)
        if do is prepare:
            command.add_argument("--pictures", type=Path, required=True)
            command.add_argument("--model", default="lalic-xs")
        if do is run:
            command.add_argument("--only", default="", help="cells whose name has this in it")
            command.add_argument("--again", action="store_true", help="also those that were run before")
        if do is pixels:
            command.add_argument("--into", type=Path, help="decode here, write the pixels to this file, and stop")
            command.add_argument("--device", default="cpu")
        if do is cell:
            command.add_argument("--threads", type=int, default=1)
            command.add_argument("--batch", type=int, default=1)
            command.add_argument("--every", type=int, default=1, help="only every Nth file")
            command.add_argument("--device", default="cpu")
            command.add_argument("--numpy", action="store_true")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
