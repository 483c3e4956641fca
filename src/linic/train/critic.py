"""Phase C of MRT: the decoder alone, against a critic. The stream stays what it is, bit for bit.

    y_hat --decoder (trained)--> x_hat ---+
      |                                   +--> critic: is it the original?
      +---decoder as it was (faithful)----+    (sees the faithful picture beside either)

Encoder, gains and RCM are frozen; symbols are those of a file, but for a rare one (PASSES). The frozen decoder gives
the faithful picture: the condition says what is known, so that the critic asks for what belongs there and not for a
nice picture. At export both decoders become one weight file (one stream, two ways to draw it, and blends).

The critic sees pixels only: patches of 70 px (pix2pix, arXiv 1611.07004) under spectral norms, hinge loss. Against
learning the few training pictures by heart: DiffAugment (arXiv 2006.10738) without its holes, and LeCam (2104.03310).
Decoder's loss: that of its phase + rise * (weight * -verdict + matching * distance of the critic's features). Spectral
norms make a verdict's slope small, and it grows while the critic learns: with `share` the weight is such that, at the
picture, the gradient of the verdict has that share of the norm of all that is not the critic's.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from linic.entropy.rounding import laplace_bits
from linic.models import Mrt
from linic.train import recipe
from linic.train.loss import Terms, rate_distortion
from linic.train.perceptual import Perceptual
from linic.train.recipe import Loss
from linic.train.stage import Stage

LAYERS = ((1, 2), (2, 2), (4, 2), (8, 1))       # width in units of the first, stride
LECAM_FOLLOWS = 0.01                            # of the way, a step
SHIFT = 0.125                                   # of the side, at most
PASSES = 6          # towards what coding step by step gives; a file's symbols take as many as a frame has steps
MOST = 20.0         # a weight that keeps a share of the gradient: a verdict with no slope must not become all


class Patches(nn.Module):
    """(B, 6, H, W) -> what each layer gives, at last the verdicts on patches of 70 px, float32. Sides from 32. Products
    in bf16; their weights, and the norms these are divided by, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.layers, before = nn.ModuleList(), 6
        for times, stride in LAYERS:
            self.layers.append(spectral_norm(nn.Conv2d(before, width * times, 4, stride, 1)))
            before = width * times
        self.layers.append(spectral_norm(nn.Conv2d(before, 1, 4, 1, 1)))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        layer: Any
        for layer in self.layers:
            x = F.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16(), layer.stride, layer.padding)
            found.append(x.float())
            x = F.leaky_relu(x, 0.2)
        return found


class Augmentation:
    """One random change of colour and place for each picture of a batch, the same for all that is made of it. Draws
    come from torch's CPU generator."""

    def __init__(self, like: Tensor):
        b, _, h, w = like.shape
        self.light, self.saturation, self.contrast = (
            (torch.rand(b, 1, 1, 1) * spread + least).to(like.device)
            for spread, least in ((1.0, -0.5), (2.0, 0.0), (1.0, 0.5)))
        self.shifts = [tuple(int(torch.randint(-round(n * SHIFT), round(n * SHIFT) + 1, ())) for n in (h, w))
                       for _ in range(b)]
        rows, columns = torch.arange(h)[:, None], torch.arange(w)
        inside = [(rows >= i) & (rows < h + i) & (columns >= j) & (columns < w + j) for i, j in self.shifts]
        self.inside = torch.stack(inside)[:, None].to(like.device)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> same; black where a picture has moved away."""
        x = x + self.light
        grey = x.mean(1, keepdim=True)
        x = grey + self.saturation * (x - grey)
        middle = x.mean((1, 2, 3), keepdim=True)
        x = middle + self.contrast * (x - middle)
        return torch.stack([t.roll(shift, (1, 2)) for t, shift in zip(x, self.shifts)]) * self.inside


class Critic(Stage):
    """`model` keeps its gradients in the decoder only from here on."""

    names = ("verdict", "matching", "weight", "critic", "right")

    def __init__(self, numbers: recipe.Critic, model: Mrt, lr: float):
        super().__init__()
        self.numbers, self.progress = numbers, 0.0
        self.model = (model,)                       # not a part of this module
        model.requires_grad_(False)
        model.decoder.requires_grad_(True)
        self.faithful = copy.deepcopy(model.decoder).eval().requires_grad_(False)
        self.net = Patches(numbers.width)
        self.lecam: Tensor
        self.register_buffer("lecam", torch.zeros(3))       # running: verdicts on originals, decodes; weight
        self.to(next(model.parameters()).device)
        self.equip(self.net.parameters(), lr, numbers.betas, numbers.lr / lr)

    def decodes(self, x: Tensor, quality: Tensor, train: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """-> faithful picture; picture of the decoder that is trained; bits and lambda."""
        model, was = self.model[0], self.model[0].training
        trained = model.decoder
        with torch.no_grad():
            model.eval()
            frame = model.frame(x.shape[2], x.shape[3], x.device)
            channels_last = x.permute(0, 2, 3, 1).contiguous()
            l = model.level(quality, channels_last)
            y_hat, bits = symbols(model, model.analyse(channels_last, l, frame), l, frame)
            out = {"bits": bits, "lambda": model.steer(quality, bits / (x.shape[2] * x.shape[3]))}
            model.train(train)
            draws = torch.get_rng_state()
            try:
                model.decoder = self.faithful
                faithful = model.synthesise(y_hat, l, frame)
            finally:
                model.decoder = trained
            torch.set_rng_state(draws)              # the same windows for both
        drawn = model.synthesise(y_hat, l, frame)
        model.train(was)
        return faithful.permute(0, 3, 1, 2), drawn.permute(0, 3, 1, 2), out

    def frozen(self, picture: Tensor, condition: Tensor) -> list[Tensor]:
        """`net` without a gradient in its weights."""
        self.net.requires_grad_(False).eval()
        found: list[Tensor] = self.net(_seen(picture, condition))
        self.net.requires_grad_(True).train()
        return found

    def against(self, x_hat: Tensor, x: Tensor, faithful: Tensor, change: Augmentation) -> tuple[Tensor, Tensor]:
        """-> mean verdict on x_hat; distance of the features of x_hat and x over their size."""
        condition = change(faithful)
        with torch.no_grad():
            theirs = self.frozen(change(x), condition)
        ours = self.frozen(change(x_hat), condition)
        return ours[-1].mean(), _apart(ours, theirs)

    def objective(self, forward: Callable[..., Any], x: Tensor, quality: Tensor, loss: Loss,
                  judge: Perceptual | None) -> tuple[Terms, Tensor | None, Tensor]:
        k = self.numbers
        faithful, drawn, out = self.decodes(x, quality, True)
        x_hat = drawn.detach().requires_grad_()     # gradients meet at the picture and go on together
        terms = rate_distortion({**out, "x_hat": x_hat}, x, quality, loss, judge)
        change = Augmentation(x)
        condition, changed = change(faithful), change(x_hat)
        pictures, twice = torch.cat([change(x), changed.detach()]), torch.cat([condition, condition])
        both = self.net(_seen(pictures, twice))                         # here the critic learns
        ours = self.frozen(changed, condition)                          # and here the decoder
        verdict, matching = ours[-1].mean(), _apart(ours, [f[:len(x)].detach() for f in both])
        rise = min(1.0, self.progress / k.rise) if k.rise else 1.0
        rest, = torch.autograd.grad(terms.loss.mean(), x_hat)
        push, = torch.autograd.grad(-verdict, x_hat, retain_graph=True)
        weight = rest.new_full((), k.weight)
        if k.share:
            weight = (k.share * rest.norm() / push.norm().clamp_min(1e-12)).clamp_max(MOST)
        pull, = torch.autograd.grad(matching, x_hat)
        slope = rest + rise * (weight * push + k.matching * pull)
        value = terms.loss.detach() + rise * (k.matching * matching - weight * verdict).detach()
        carrier = (drawn * slope).sum()             # has that slope, and no value
        terms = Terms(value + carrier - carrier.detach(), *_after_loss(terms))
        real, fake = both[-1].flatten(1).chunk(2)
        hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        beside = hinge + k.lecam * self._lecam(real, fake)
        return terms, beside, torch.stack([verdict, matching, rise * weight, hinge, right]).detach()

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """Verdicts may not run away from the running means of the other side's."""
        with torch.no_grad():
            now = torch.stack([real.mean(), fake.mean(), torch.ones_like(real.mean())])
            self.lecam.copy_(torch.where(torch.isfinite(now).all(), self.lecam.lerp(now, LECAM_FOLLOWS), self.lecam))
            of_real, of_fake = (self.lecam[:2] / self.lecam[2].clamp_min(1e-6)).unbind()
        return F.relu(real - of_fake).square().mean() + F.relu(of_real - fake).square().mean()


def symbols(model: Mrt, y: Tensor, l: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
    """-> y_hat, bits of each picture (B,)."""
    y_hat = torch.round(y)
    for _ in range(PASSES):
        mean, ln_scale = model.predict(y_hat, l, frame)
        symbol = model.round(y - mean)
        y_hat = mean + symbol
    return y_hat, laplace_bits(symbol, ln_scale).flatten(1).sum(1)


def _seen(picture: Tensor, condition: Tensor) -> Tensor:
    return 2 * torch.cat([picture, condition], 1).contiguous(memory_format=torch.channels_last) - 1


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Mean distance of features over their mean size, mean of the layers before the last."""
    return torch.stack([(f - g).abs().mean() / g.abs().mean().clamp_min(1e-6)
                        for f, g in zip(ours[:-1], theirs)]).mean()


def _after_loss(terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    return terms.mse, terms.bpp, terms.aside
