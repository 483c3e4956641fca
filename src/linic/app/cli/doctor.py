"""`linic doctor`: what is here, and whether a picture survives the way to bytes and back."""
import argparse
import importlib.metadata
import json
import platform
import sys
import time
from functools import partial
from typing import Any

from linic.app.cli import common
from linic.errors import LinicError

PACKAGES = ["linic", "torch", "numpy", "pillow", "safetensors", "constriction", "triton", "pytorch-msssim", "scipy",
            "matplotlib"]
# A test card of smooth ramps, edges and texture: far worse than this is no decoded picture.
ENOUGH_DB, ENOUGH_EXTREME_DB = 20.0, 12.0       # one flat colour: 11.4


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME|PATH", help="default: lalic-xs, and mrt-xs where it is installed")
    common.add_machine(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    common.use_threads(args)
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version_of(name) for name in PACKAGES},
        "backends": asked(backends),
        "models": asked(models),
    }
    for model in [args.model] if args.model else defaults():
        more = "" if model in (args.model, "lalic-xs") else f" {model}"
        facts[f"exact{more}"] = asked(partial(exact, model))
        facts[f"round trip{more}"] = asked(partial(round_trip, model, args.device))
    good = not any(isinstance(v, dict) and "error" in v for v in facts.values())
    if args.json:
        print(json.dumps({**facts, "good": good}, default=str))
    else:
        for title, found in facts.items():
            print(f"{title}: {found}" if isinstance(found, str) else f"{title}:")
            for key, value in found.items() if isinstance(found, dict) else ():
                inner = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
                print(f"    {key:15} {inner}")
        print("all good" if good else "something is wrong: see the lines with 'error'")
    return 0 if good else 1


def asked(question: Any) -> dict[str, Any]:
    """A doctor reports what fails and goes on."""
    try:
        return question()
    except LinicError as error:
        return {"error": str(error)}
    except Exception as error:
        print(f"linic: {type(error).__name__}: {error}", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}"}


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def backends() -> dict[str, Any]:
    from linic import kernels
    return kernels.backends()


def models() -> dict[str, Any]:
    from linic import weights
    return {m["name"]: m.get("error", m["path"]) for m in weights.available()}


def defaults() -> list[str]:
    from linic import codec, weights
    here = {m["name"] for m in weights.available() if "error" not in m}
    return [codec.DEFAULT_MODEL, *({codec.DEFAULT_EXTREME} & here)]


def exact(model: str) -> dict[str, Any]:
    """The model's known answer by NumPy and by every carrier on every device, and which carrier runs."""
    from linic import weights
    from linic.entropy import carriers
    program, tables, digest = weights.load_program(model)
    wanted = weights.read_card(weights.find(model))["known_answer"]
    found: dict[str, Any] = {"digest": digest.hex()}
    found["numpy"] = verdict(weights.known_answer(program, tables), wanted)
    import torch

    from linic.entropy.fast import Torch
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for name in carriers.CARRIERS:
            try:
                answer = verdict(weights.known_answer(program, tables, Torch(program, device, name)), wanted)
            except LinicError as error:
                answer = f"not here ({error})"
            found[f"{device} {name}"] = answer
        found[f"{device} runs"] = "; ".join(f"{bits}-bit weights: {name} ({why})"
                                            for bits, (name, why) in Torch(program, device).carriers.items())
    if wrong := [k for k, v in found.items() if v == "WRONG"]:
        raise LinicError(f"another answer than the model's own from {', '.join(wrong)}: do not trust files made here")
    return found


def verdict(answer: str, wanted: str) -> str:
    return "equal" if answer == wanted else "WRONG"


def round_trip(model: str, device: str) -> dict[str, Any]:
    import linic
    from linic.bench.metrics import psnr
    from linic.picture import NOTE, to_array
    card = test_card()
    started = time.perf_counter()
    data = linic.encode(card, quality=60, model=model, device=device)
    again = linic.decode(data, model=model, device=device)
    db = psnr(to_array(card), to_array(again))
    enough = ENOUGH_EXTREME_DB if NOTE in again.info else ENOUGH_DB
    if db < enough:
        raise LinicError(f"the test card came back at {db:.1f} dB, {enough} are needed")
    seconds = time.perf_counter() - started
    return {"model": model, "bytes": len(data), "PSNR": f"{db:.1f} dB", "seconds": f"{seconds:.2f}"}


def test_card(width: int = 192, height: int = 128) -> Any:
    """Ramps of colour, a disc with a hard edge, stripes that grow finer: a picture without a file."""
    import numpy as np

    from linic.picture import from_array
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    card = np.stack([x, y, 1 - (x + y) / 2], axis=-1)
    card[(x - 0.3) ** 2 * (width / height) ** 2 + (y - 0.5) ** 2 < 0.06] = [0.9, 0.2, 0.1]
    stripes = 0.5 + 0.4 * np.sin(120 * x**2)
    card[y > 0.8] = stripes[y > 0.8][:, None]
    return from_array((255 * card + 0.5).astype(np.uint8))
