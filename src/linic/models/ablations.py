"""The entropy models that LALIC's paper compares with: convolutional SCCTX (ELIC), and a wider one.

Presets name them: context.channel = "conv" | "conv-plus", context.aggregation = "conv". The structure of the paper's
"Conv Plus" is not public; ours is Conv SCCTX with more channels and says so here. Layout [B, H, W, C].
Source: He et al., "ELIC", CVPR 2022, section 3.2 (widths 224, 128 and 640, 512).
"""

import torch
from torch import Tensor, nn

from linic.models.blocks import Down


class ConvContext(nn.Module):
    """Three 5x5 convolutions over the groups before; features = 2g."""

    def __init__(self, before: int, group: int, wide: bool):
        super().__init__()
        a, b = (384, 256) if wide else (224, 128)
        self.features = 2 * group
        self.layers = nn.ModuleList([Down(before, a, 1, 5), Down(a, b, 1, 5), Down(b, 2 * group, 1, 5)])

    def forward(self, x: Tensor, l: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(x)))))


class ConvAggregation(nn.Module):
    """Three pointwise layers over [spatial | channel | hyper]; scales in the first half, means in the second."""

    def __init__(self, features: int, group: int):
        super().__init__()
        self.group = group
        widths = (2 * group + features, 640, 512, 2 * group)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def base(self, features: Tensor, l: Tensor) -> Tensor:
        return features

    def forward(self, base: Tensor, spatial: Tensor | None) -> tuple[Tensor, Tensor]:
        if spatial is None:
            spatial = base.new_zeros(*base.shape[:3], 2 * self.group)
        first, second, last = self.layers
        x = last(torch.relu(second(torch.relu(first(torch.cat([spatial, base], 3))))))
        scale, mean = x.split(self.group, 3)
        return mean, scale
