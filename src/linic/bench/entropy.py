"""What integers cost and gain: rate, precision and time of a model's normative program beside its float networks.

Rates are those of the frequency tables (no header, no termination), times the best of several walks over one picture
without a range coder. The float networks are the weight file's own, dequantised; `float_weights`, a checkpoint, puts
the networks as they were trained in their place, so that the rounding of weights counts as well.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from linic.entropy.fast import Torch
from linic.entropy.operators import Ints
from linic.entropy.program import Program, plan
from linic.entropy.rounding import LN_SCALE_MAX, LN_SCALE_MIN
from linic.entropy.walk import walk
from linic.errors import BackendMissing, UsageError
from linic.models import checkerboard
from linic.rangecoder import Encoder

QUALITIES = (0, 25, 50, 75, 100)


class Counter:
    """A coder that writes nothing and counts bits."""

    def __init__(self, tables: Any):
        self.tables, self.bits = tables, 0.0
        self.starts = np.concatenate([[0], np.cumsum(tables.lengths)])[:-1]
        self.costs = 24 - np.log2(tables.freqs.astype(np.float64))

    def code(self, index: Ints, symbols: Ints | None) -> Ints:
        assert symbols is not None
        entry, escape = symbols - self.tables.lows[index], self.tables.lengths[index] - 1
        outside = (entry < 0) | (entry >= escape)
        self.bits += float(self.costs[self.starts[index] + np.where(outside, escape, entry)].sum())
        beyond = np.where(entry < 0, -1 - entry, entry - escape)[outside]       # Exp-Golomb and a sign
        self.bits += float((2 * np.floor(np.log2(beyond + 1)) + 2).sum())
        return symbols


class Spy:
    """A backend that keeps every mean and index on its way to the coder."""

    def __init__(self, backend: Any):
        self.run, self.register, self._numpy = backend.run, backend.register, backend.numpy
        self.seen: list[Ints] = []

    def numpy(self, register: Any) -> Ints:
        found: Ints = self._numpy(register)
        self.seen.append(found)
        return found


class Silent:
    def code(self, index: Ints, symbols: Ints | None) -> Ints:
        assert symbols is not None
        return symbols


def run(pictures: Sequence[Path], model: str = "lalic-xs", float_weights: str | None = None, repeats: int = 5,
        carriers: Sequence[str] = ("native", "int8", "f64", "f32", "i64")) -> dict[str, Any]:
    """-> {"rate": [{quality, float_bits, integer_bits, percent, termination, coder}],
    "heads": [{group, mean, mean_rms, ln_scale, ln_scale_rms}], "ms": {name: milliseconds}}

    termination: bytes of a stream beyond what its intervals are worth; coder: bytes that these are worth beyond the
    tables; means of a picture. heads (dB, errors in symbols and nats) and ms: first picture, quality 50.
    Raises UsageError, ModelMissing, WeightsError."""
    from linic import codec, picture, weights

    loaded = weights.load(model)
    if loaded.program is None:
        raise UsageError(f"{model} has no integer program to measure")
    if not isinstance(loaded.program, Program):
        raise UsageError(f"{model}: bench entropy is for LALIC; for MRT, bench codec has the walk's time")
    ready = codec.Codec(str(weights.find(model)), "cpu")
    program, tables = Torch(loaded.program), loaded.tables
    floats: Any = loaded.model.eval()
    if float_weights:
        floats.load_state_dict(load_file(float_weights))
    double = copy.deepcopy(floats)
    for net in double.normative():
        net.double()
    rate = {q: [0.0, 0.0, 0.0, 0.0] for q in QUALITIES}
    ms: dict[str, float] = {}
    heads: list[dict[str, float]] = []
    with torch.inference_mode():
        for number, path in enumerate(pictures):
            with Image.open(path) as image:
                pixels = picture.pad(picture.to_array(image.convert("RGB")), ready.model.config.multiple)
            for quality in QUALITIES:
                z, y_q8 = ready.latents(pixels, quality)
                assert z is not None
                size = z.shape[0], z.shape[1]
                level = double.level(torch.tensor([float(quality)], dtype=torch.float64), torch.zeros(1).double())
                counts = Counter(tables), Counter(tables)
                walk(double.plan(level, size, z, y_q8), counts[0])
                coder = Encoder(tables)
                walk(plan(loaded.program, program, quality, size, z, y_q8), coder)
                walk(plan(loaded.program, program, quality, size, z, y_q8), counts[1])
                rate[quality][2] += len(coder.finish()) - coder.bits() / 8
                rate[quality][3] += (coder.bits() - counts[1].bits) / 8
                for i, counter in enumerate(counts):
                    rate[quality][i] += counter.bits
                if number == 0 and quality == 50:
                    heads = _heads(loaded.program, program, double, (level, size, z, y_q8))
                    ms = _times(loaded.program, double, floats, (level, size, z, y_q8), carriers, repeats)
    return {"model": model, "pictures": len(pictures), "float": float_weights or "dequantised", "ms": ms,
            "heads": heads, "threads": torch.get_num_threads(),
            "rate": [{"quality": q, "float_bits": a, "integer_bits": b, "percent": 100 * (b / a - 1),
                      "termination": end / len(pictures), "coder": coder / len(pictures)}
                     for q, (a, b, end, coder) in rate.items()]}


@torch.no_grad()
def _heads(program: Program, backend: Torch, model: Any, latents: tuple[Any, ...]) -> list[dict[str, float]]:
    """Signal to noise of what the program says of each group, the float networks being given the same contexts."""
    level, size, z, y_q8 = latents
    spy = Spy(backend)
    y_hat = walk(plan(program, spy, 50, size, z, y_q8), Silent())
    steps = model.parameters_in_order(torch.from_numpy(z)[None].double(), level)
    wanted = [next(steps)]
    groups = torch.from_numpy(y_hat)[None].double().div(256).split(model.config.context.groups, 3)
    for group in groups:
        for known in checkerboard.split(group.contiguous()):
            if len(wanted) < 2 * len(groups):
                wanted.append(steps.send(known))
    per_ln = (model.config.scales - 1) / (LN_SCALE_MAX - LN_SCALE_MIN)
    rows = []
    for k in range(len(groups)):
        errors: dict[str, list[Ints]] = {"mean": [], "ln_scale": []}
        truth: dict[str, list[Ints]] = {"mean": [], "ln_scale": []}
        for half in (2 * k, 2 * k + 1):
            mean, ln_scale = (t.numpy().ravel() for t in wanted[half])
            for name, true, got in (("mean", mean, spy.seen[2 * half].ravel() / 256),
                                    ("ln_scale", ln_scale, LN_SCALE_MIN + spy.seen[2 * half + 1].ravel() / per_ln)):
                errors[name].append(got - true)
                truth[name].append(true)
        row = {"group": float(k)}
        for name in errors:
            power = float(np.square(np.concatenate(errors[name])).mean())
            row |= {name: 10 * math.log10(float(np.concatenate(truth[name]).var()) / power), f"{name}_rms": power**0.5}
        rows.append(row)
    return rows


def _times(program: Program, double: Any, single: Any, latents: tuple[Any, ...], carriers: Sequence[str],
           repeats: int) -> dict[str, float]:
    """Milliseconds of each way, the best of `repeats`; interleaved, so that a busy moment hits all."""
    level, size, z, y_q8 = latents

    def integers(carrier: str) -> Callable[[], Any]:
        made = Torch(program, carrier=carrier)
        return lambda: walk(plan(program, made, 50, size, z, y_q8), Silent())

    ways: dict[str, Callable[[], Any]] = {
        "float64": lambda: walk(double.plan(level, size, z, y_q8), Silent()),
        "float32": lambda: walk(single.plan(level.float(), size, z, y_q8), Silent())}
    for name in carriers:
        with suppress(BackendMissing):
            ways[f"integers, {name}"] = integers(name)
    best = dict.fromkeys(ways, math.inf)
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    base = result["ms"]["float32"]
    rows = ["| entropy networks | ms | of float32 |", "|---|---|---|"]
    rows += [f"| {name} | {ms:.1f} | {ms / base:.2f} |" for name, ms in result["ms"].items()]
    rows += ["", "| quality | rate of integers against float | termination, bytes | the coder's own rounding, bytes |",
             "|---|---|---|---|"]
    rows += [f"| {r['quality']} | {r['percent']:+.3f} % | {r['termination']:.2f} | {r['coder']:.2f} |"
             for r in result["rate"]]
    rows += ["", "| group | mean, dB | error, symbols | ln scale, dB | error (its table's steps are .018) |",
             "|---|---|---|---|---|"]
    rows += [f"| {h['group']:.0f} | {h['mean']:.1f} | {h['mean_rms']:.4f} | {h['ln_scale']:.1f} | "
             f"{h['ln_scale_rms']:.4f} |" for h in result["heads"]]
    return "\n".join(rows)
