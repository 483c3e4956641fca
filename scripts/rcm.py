"""RCM against its rivals on the same symbols: what each way of predicting MRT's tokens costs, in equal CPU time.

    python scripts/rcm.py WEIGHTS --data PICTURES --valid OTHERS ... --seconds 150 --json OUT

The trained encoder of WEIGHTS (a checkpoint of an MRT with cells, or a weight file) gives y once; every rival learns to
predict the same integers, y with a dead zone, at all qualities, from its own fresh start with the linear predictor
fitted by least squares, for equal CPU time in one thread. Estimated bits on whole pictures of each folder of --valid.
Rounding is not around the mean here, as it is in files: with equal symbols for all, quality is equal by construction.
A difference below that of two seeds is none: `staggered` runs twice.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linic.entropy.rounding import bounded, laplace_bits
from linic.models import Mrt, build
from linic.models.mrt import LN_SCALE_MAX, LN_SCALE_MIN, MEAN_LIMIT
from linic.models.rcm import CausalBlock, Rcm
from linic.models.tokens import Order, cuts, order
from linic.train import data, recipe

CROP, CROPS, BATCH, RATE = 384, 500, 32, 2e-3
QUALITIES = (0.0, 25.0, 50.0, 75.0, 100.0)


def inside_windows(h: int, w: int, window: int) -> Order:
    """Lockstep windows whose tokens know nothing beyond their window's border."""
    found = Order(h, w, "windows", window)
    home = torch.full((h * w + 1,), -1)
    for i, (top, bottom) in enumerate(cuts(h, window)):
        for j, (left, right) in enumerate(cuts(w, window)):
            home[:-1].view(h, w)[top:bottom, left:right] = 1000 * i + j
    same = home[found.neighbours] == home[:-1, None]
    found.neighbours = torch.where(same, found.neighbours, h * w)
    return found


class NoMixing(CausalBlock):
    def mix(self, k: Tensor, v: Tensor, r: Tensor, sequence: Tensor) -> Tensor:
        return torch.sigmoid(r) * v


def predictors(model: Mrt) -> dict[str, tuple[Callable[[], Rcm | None], Callable[[int, int], Order]]]:
    """Name -> fresh RCM (None: nothing is predicted), order of a frame."""
    c = model.config

    def fresh(**changed: Any) -> Callable[[], Rcm]:
        return lambda: Rcm(dataclasses.replace(c, **changed))

    def plain() -> Rcm:
        made = Rcm(c)
        made.blocks = nn.ModuleList(NoMixing(c.rcm_width, len(b.near1), i)      # type: ignore[arg-type]
                                    for i, b in enumerate(made.blocks))
        return made

    def frame(kind: str) -> Callable[[int, int], Order]:
        return lambda h, w: order(h, w, kind, c.window)

    def fenced(h: int, w: int) -> Order:
        return inside_windows(h, w, c.window)

    return {
        "static prior": (lambda: None, frame("staggered")),
        "linear predictor alone": (fresh(rcm_depth=0), frame("staggered")),
        "staggered": (fresh(order="staggered"), frame("staggered")),
        "staggered, another seed": (fresh(order="staggered"), frame("staggered")),
        "staggered, without WKV": (plain, frame("staggered")),
        "staggered, causal Transformer": (fresh(rcm="attention"), frame("staggered")),
        "windows in lockstep": (fresh(order="windows"), frame("windows")),
        "windows, nothing across borders": (fresh(order="windows"), fenced),
        "windows, one-dimensional context": (fresh(order="sequence"), frame("sequence")),
    }


def rounded(y: Tensor) -> Tensor:
    kept = torch.sign(y) * torch.floor(y.abs() + 0.4)
    return torch.cat([torch.round(y[..., :1]), kept[..., 1:]], -1)


class Rival(nn.Module):
    """Bits of given symbols (B, h, w, C) at levels l (B,)."""

    def __init__(self, model: Mrt, rcm: Rcm | None, frame: Callable[[int, int], Order], linear_only: bool):
        super().__init__()
        self.rcm, self.frame, self.linear_only = rcm, frame, linear_only
        self.prior = nn.Parameter(model.prior.detach().clone() + torch.tensor([[0.5], [0.0], [0.0]]))
        self.model = [model]            # not a part: its weights are given

    def forward(self, symbols: Tensor, l: Tensor) -> Tensor:
        model = self.model[0]
        unit, prior = torch.exp(model.ln_unit(l)), model.at(self.prior, l)
        mean, scale = torch.zeros_like(symbols), torch.zeros_like(symbols)
        if self.rcm is not None:
            known = (symbols / unit).clamp(-16, 16).flatten(1, 2)
            frame = self.frame(*symbols.shape[1:3])
            if self.linear_only:
                mean = self.rcm.linear(self.rcm.features(known, frame)).view(symbols.shape)
            else:
                mean, scale = (t.view(symbols.shape) for t in self.rcm(known, l, frame))
            mean = (mean * unit).clamp(-MEAN_LIMIT, MEAN_LIMIT)
        return laplace_bits(symbols - mean, bounded(scale + prior, LN_SCALE_MIN, LN_SCALE_MAX)).sum((1, 2, 3))

    @torch.no_grad()
    def fit(self, y: Tensor) -> None:
        """The linear predictor by least squares, on latents before rounding."""
        if self.rcm is None:
            return
        known = (y / torch.exp(self.model[0].ln_deviation)).flatten(1, 2)
        f = self.rcm.features(known, self.frame(*y.shape[1:3])).flatten(0, 1).double()
        ridge = 1e-3 * len(f) * torch.eye(f.shape[1], dtype=torch.double)
        self.rcm.linear.weight.copy_(torch.linalg.solve(f.T @ f + ridge, f.T @ known.flatten(0, 1).double()).T)


def load(path: Path) -> Mrt:
    from safetensors import safe_open

    from linic import weights
    from linic.train import checkpoint
    with safe_open(path, "pt") as f:
        ours = "linic" in (f.metadata() or {})
    if ours:
        model = weights.load(path).model
    else:
        tensors, about = checkpoint.load(path)
        model = build(about["preset"]).eval()
        model.load_state_dict(tensors)
    assert isinstance(model, Mrt) and model.cells, "an MRT with cells is needed"
    return model.eval().requires_grad_(False)


@torch.no_grad()
def latents(model: Mrt, pictures: Tensor, l: Tensor) -> Tensor:
    """y without gains, (B, h, w, C)."""
    return model.analyse(pictures, l) * torch.exp(-model.at(model.gain_enc, l))


def train(rival: Rival, model: Mrt, y: dict[float, Tensor], seconds: float, seed: int) -> int:
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(rival.parameters(), RATE, (0.9, 0.98), weight_decay=0.0)
    start, steps = time.process_time(), 0
    qualities = list(y)
    while (done := (time.process_time() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, done / 0.05 + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))
        quality = qualities[int(torch.randint(len(qualities), ()))]
        rows = torch.randint(len(y[quality]), (BATCH,))
        l = model.level(torch.full((BATCH,), quality), y[quality])
        symbols = rounded(y[quality][rows] * torch.exp(model.at(model.gain_enc, l)))
        bpp = rival(symbols, l) / CROP**2 / (0.004 * 8.75 ** (quality / 100))     # relative to the target
        optimiser.zero_grad()
        bpp.mean().backward()
        nn.utils.clip_grad_norm_(rival.parameters(), 2.0)
        optimiser.step()
        steps += 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="training pictures")
    parser.add_argument("--valid", type=Path, nargs="+", required=True, help="folders of pictures to judge by")
    parser.add_argument("--cache", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--seconds", type=float, default=150, help="CPU time of each")
    parser.add_argument("--only", nargs="+", default=[], help="these rivals, beside the static prior")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = load(args.weights)
    pools = [recipe.Pool(scale, 0.25) for scale in (1.0, 0.8, 0.6667, 0.5714)]
    library = data.Library(args.data, args.cache, "cpu", ("non-commercial",))
    crops = data.Crops(library, recipe.Data(tuple(pools), transpose=0.0), 0, "cpu")
    y: dict[float, list[Tensor]] = {q: [] for q in QUALITIES}
    for _ in range(CROPS // 10):
        x = crops.batch(10, CROP)
        for q in QUALITIES:
            y[q].append(latents(model, x, model.level(torch.full((10,), q), x)))
    known = {q: torch.cat(parts) for q, parts in y.items()}
    judged: dict[str, list[tuple[int, dict[float, Tensor]]]] = {}
    for folder in args.valid:
        for path in sorted(folder.glob("*.png")):
            pixels = torch.from_numpy(data.read_picture(path))[None].float() / 255
            h, w = pixels.shape[1:3]
            x = nn.functional.pad(pixels.permute(0, 3, 1, 2), (0, -w % 32, 0, -h % 32), mode="replicate")
            x = x.permute(0, 2, 3, 1).contiguous()
            found = {q: latents(model, x, model.level(torch.tensor([q]), x)) for q in QUALITIES}
            judged.setdefault(folder.name, []).append((h * w, found))
    result: dict[str, Any] = {}
    for number, (name, (fresh, frame)) in enumerate(predictors(model).items()):
        if args.only and name not in ("static prior", *args.only):
            continue
        torch.manual_seed(number)
        rival = Rival(model, fresh(), frame, name == "linear predictor alone")
        rival.fit(known[50.0])
        steps = train(rival, model, known, args.seconds, number)
        rows: dict[str, dict[float, float]] = {}
        with torch.no_grad():
            for folder, pictures in judged.items():
                for q in QUALITIES:
                    l = model.level(torch.tensor([q]), pictures[0][1][q])
                    gain = torch.exp(model.at(model.gain_enc, l))
                    bits = [float(rival(rounded(found[q] * gain), l)) / pixels for pixels, found in pictures]
                    rows.setdefault(folder, {})[q] = sum(bits) / len(bits)
        result[name] = {"steps": steps, "bpp": rows}
        static = result["static prior"]["bpp"]
        line = "  ".join(f"{folder} " + " ".join(f"{100 * (b / static[folder][q] - 1):+.1f} %" for q, b in row.items())
                         for folder, row in rows.items())
        print(f"{name:34} {steps:6} steps  {line}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"seconds": args.seconds, "weights": args.weights.name,
                                             "qualities": QUALITIES, "rivals": result}, indent=1))


if __name__ == "__main__":
    main()
