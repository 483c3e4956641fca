"""Gates of an MRT run: what a run that works has reached after five minutes, measured on the way, "ok" or "LOW".

Of at most four validation pictures (the first, cut to 512 px), the raw weights, and two qualities around .0118 bpp,
between which values are interpolated over the logarithm of the rate:

    psnr .0113, .0118   dB. Kodak has 22.4 at .0113 after three minutes; the limit is one for validation pictures
    gain                dB over the start, at .0118
    rcm                 bits of RCM below those of the best static prior, Laplace scales fitted to the very symbols
    differ              share of non-zero symbols that the encoder of the start, before the same RCM, does not send
    alex                LPIPS with AlexNet at .0118: judges, is in no loss
    drop                its relative drop since the start over that of LPIPS with SqueezeNet, which is in the loss: low
                        where the loss is fooled
    lattice             correlation of the second difference 16 px on, beyond the original's
    seam 256, seam 32   gradients across multiples of so many px over those elsewhere, over the original's same
    lpips : rest        norm of the gradient at the picture of LPIPS over those of VGG19n and WD together

A run with a critic has other gates: not one symbol may differ, and alex may not rise. Limits are those of a prototype
(docs/mrt.md); in the first minutes and before the perceptual phases some say LOW that will not later.
A look takes a few seconds of a CPU, and draws nothing from the run's random numbers.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linic.bench.perceptual import Measures
from linic.bench.structure import structure
from linic.entropy.rounding import laplace_bits
from linic.models import Mrt
from linic.models.mrt import LN_SCALE_MAX, LN_SCALE_MIN
from linic.train.critic import Augmentation, Critic
from linic.train.perceptual import SMALLEST_SIDE, Perceptual
from linic.train.recipe import Recipe

PICTURES, SIDE, MULTIPLE = 4, 512, 32
QUALITIES, MIDDLE = (35.0, 65.0), 50.0
KODAK_BPP, BPP = 0.0113, 0.0118
GRADIENT_SIDE = 256
# name -> limit, and whether values must stay below it.
LIMITS = {"psnr .0118": (21.3, False), "gain": (0.4, False), "rcm": (0.35, False), "differ": (0.4, False),
          "alex": (0.53, True), "drop": (0.55, False), "lattice": (0.05, True), "seam 256": (1.1, True),
          "seam 32": (1.1, True), "lpips : rest": (3.0, True)}
SCALES = 100                    # tried for a static prior

Found = dict[str, dict[str, Any]]


class Gates:
    """`start`: the weights with which the run began. `start_row`: what a look at them found, if it is known."""

    def __init__(self, recipe: Recipe, start: Mrt, pictures: Sequence[Tensor], measures: Measures | None,
                 judge: Perceptual | None, start_row: dict[str, float] | None = None):
        self.recipe, self.measures, self.judge = recipe, measures, judge
        self.pictures = [_cut(p) for p in pictures[:PICTURES] if min(p.shape[:2]) >= 2 * MULTIPLE]
        self.start = copy.deepcopy(start).eval().requires_grad_(False)
        self.originals = [_structure(x) for x in self.pictures]
        self.perceptual_from = min((p.start for p in recipe.phases if p.perceptual), default=math.inf)
        self.start_row = start_row or self._row(self.start)[0]

    @torch.no_grad()
    def _row(self, model: Mrt) -> tuple[dict[str, float], list[Tensor]]:
        """Values at BPP, and pictures as decoded at the higher quality."""
        was, rows, decoded = model.training, [], list[Tensor]()
        model.eval()
        for quality in QUALITIES:
            found, decoded = list[dict[str, float]](), []
            for x in self.pictures:
                out = model(x, torch.tensor([quality], device=x.device))
                x_hat = (out["x_hat"].clamp(0, 1) * 255).round() / 255
                mse = (x_hat - x).square().mean().item()
                row = {"ln bpp": math.log(max(out["bits"].item() / x[0, 0].numel(), 1e-6)),
                       "psnr": -10 * math.log10(max(mse, 1e-10))}
                for net in ("alex", "squeeze") if self.measures else ():
                    row[net] = self.measures.lpips(x_hat, x, net).item()    # type: ignore[union-attr]
                found.append(row)
                decoded.append(x_hat)
            rows.append({k: sum(r[k] for r in found) / len(found) for k in found[0]} if found else {})
        model.train(was)
        if not self.pictures:
            return {}, []
        values = {f"psnr {str(bpp)[1:]}": _between(rows, "psnr", bpp) for bpp in (KODAK_BPP, BPP)}
        return values | {net: _between(rows, net, BPP) for net in ("alex", "squeeze") if net in rows[0]}, decoded

    def look(self, model: Mrt, critic: Critic | None, progress: float) -> Found:
        """-> name -> value, and limit and verdict where there is one."""
        if not self.pictures:
            return {}
        row, decoded = self._row(model)
        first, looked = self.start_row, progress >= self.perceptual_from
        values = {k: v for k, v in row.items() if k != "squeeze"} | {"gain": row["psnr .0118"] - first["psnr .0118"]}
        values |= self._symbols(model)
        if "alex" in row and looked and critic is None:
            alex, squeeze = (1 - row[net] / first[net] for net in ("alex", "squeeze"))
            if squeeze > 0.05:
                values["drop"] = alex / squeeze
        ours = [_structure(x) for x in decoded]
        if lattice := [a["ac16"] - b["ac16"] for a, b in zip(ours, self.originals) if a and b]:
            values["lattice"] = sum(lattice) / len(lattice)
        for period in ("256", "32"):
            pairs = [(a[f"seam{period}"], b[f"seam{period}"]) for a, b in zip(ours, self.originals)
                     if f"seam{period}" in a and f"seam{period}" in b]
            if pairs:
                values[f"seam {period}"] = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
        if looked:
            values |= self._gradients(model, critic)
        limits = dict(LIMITS)
        if critic is not None:
            limits = {k: v for k, v in LIMITS.items() if k not in ("gain", "drop", "psnr .0118", "rcm")}
            limits |= {"differ": (0.0, True), "alex": (first.get("alex", math.inf), True)}
        elif not looked:
            limits.pop("alex")
        return {k: {"value": v, **_verdict(v, *limits[k])} if k in limits else {"value": v} for k, v in values.items()}

    @torch.no_grad()
    def _symbols(self, model: Mrt) -> dict[str, float]:
        was, differing, sent, rcm, plain, scales = model.training, 0, 0, 0.0, list[Tensor](), 0
        model.eval()
        for x in self.pictures:
            x = x.permute(0, 2, 3, 1).contiguous()
            l = model.level(torch.tensor([MIDDLE], device=x.device), x)
            frame = model.frame(x.shape[1], x.shape[2], x.device)
            gain = torch.exp(model.at(model.gain_enc, l, frame) - self.start.at(self.start.gain_enc, l, frame))
            y, then = model.analyse(x, l, frame), self.start.analyse(x, l, frame) * gain
            now, before = model.quantise(y, l, frame)[1], model.quantise(then, l, frame)[1]
            differing += int((now != before).sum())
            sent += int(((now != 0) | (before != 0)).sum())
            symbol = model.round(y)             # not moved by a mean: what a static prior would code
            mean, ln_scale = model.predict(symbol, l, frame)
            rcm += float(laplace_bits(symbol - mean, ln_scale).sum())
            plain.append(symbol.flatten(0, 2))
            scales = symbol.shape[-1]
        model.train(was)
        rows = torch.cat(plain)
        tried = torch.linspace(LN_SCALE_MIN, LN_SCALE_MAX, SCALES).tolist()
        static = torch.full((scales,), math.inf, device=rows.device)
        for ln_scale in tried:
            static = torch.minimum(static, laplace_bits(rows, torch.full_like(rows, ln_scale)).sum(0))
        return {"rcm": 1 - rcm / max(float(static.sum()), 1e-9), "differ": differing / max(sent, 1)}

    def _gradients(self, model: Mrt, critic: Critic | None) -> dict[str, float]:
        """Norms at a picture of each weighed term of the loss; pictures with a side below 96 px have none."""
        w, x = self.recipe.loss.perceptual, self.pictures[0][:, :, :GRADIENT_SIDE, :GRADIENT_SIDE]
        if self.judge is None or w is None or min(x.shape[2:]) < SMALLEST_SIDE:
            return {}
        quality, devices = torch.tensor([MIDDLE], device=x.device), [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            with torch.no_grad():
                was = model.training
                if critic:
                    faithful, x_hat, _ = critic.decodes(x, quality, False)
                else:
                    x_hat = model.eval()(x, quality)["x_hat"]
                    model.train(was)
            x_hat = x_hat.detach().requires_grad_()
            t = self.judge(x_hat, x)
            terms = {"mse": 100 * (x_hat - x).square().mean(), "lpips": w.lpips * t.lpips, "vgg": w.vgg * t.vgg,
                     "wd": w.wd * t.wd, "phase": w.phase * t.phase, "seam": w.seam * t.seam}
            if critic:
                verdict, matching = critic.against(x_hat, x, faithful, Augmentation(x))
                terms |= {"verdict": -critic.numbers.weight * verdict, "matching": critic.numbers.matching * matching}
            norms = {f"|{k}|": float(torch.autograd.grad(v, x_hat, retain_graph=True)[0].norm())
                     for k, v in terms.items()}
        rest = norms["|vgg|"] + norms["|wd|"]
        return norms | ({"lpips : rest": norms["|lpips|"] / rest} if rest else {})

    @staticmethod
    def lines(found: Found) -> list[str]:
        """For people."""
        said = [_said(name, **f) for name, f in found.items() if not name.startswith("|")]
        norms = [f"{name} {f['value']:.3g}" for name, f in found.items() if name.startswith("|")]
        lines = [("   gates  ", said), ("   gradients at the picture  ", norms)]
        return [head + "  ".join(parts) for head, parts in lines if parts]


def _said(name: str, value: float, limit: float | None = None, below: bool = False, ok: bool = True) -> str:
    text = f"{name} {value:.2f}" if abs(value) >= 10 else f"{name} {value:.3f}"
    return text if limit is None else f"{text} {'ok' if ok else 'LOW'} ({'<=' if below else '>='} {limit:.3g})"


def _verdict(value: float, limit: float, below: bool) -> dict[str, Any]:
    ok = value <= limit + 1e-9 if below else value >= limit - 1e-9      # False for nan
    return {"limit": limit, "below": below, "ok": ok}


def _between(rows: Sequence[dict[str, float]], name: str, bpp: float) -> float:
    a, b = rows
    span = b["ln bpp"] - a["ln bpp"]
    share = (math.log(bpp) - a["ln bpp"]) / span if span > 1e-3 else 0.5
    return a[name] + min(max(share, -1.0), 2.0) * (b[name] - a[name])


def _cut(picture: Tensor) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, h, w) in [0, 1], sides multiples of 32."""
    h, w = (min(n, SIDE) // MULTIPLE * MULTIPLE for n in picture.shape[:2])
    return picture[:h, :w].permute(2, 0, 1)[None].float().contiguous(memory_format=torch.channels_last) / 255


def _structure(x: Tensor) -> dict[str, float]:
    """Empty for a flat picture, which has none."""
    found = structure(x[0])
    return found if math.isfinite(found["ac16"]) else {}
