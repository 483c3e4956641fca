import pytest
import torch
import torch.nn.functional as F

from linic.models import checkerboard as cb


@pytest.mark.parametrize("h, w", [(2, 2), (4, 4), (4, 12), (8, 6)])
def test_split_and_join_are_inverse_and_anchors_have_an_even_sum(h, w):
    x = (torch.arange(h)[:, None] + torch.arange(w)).float()[None, :, :, None]
    anchors, others = cb.split(x)
    assert (anchors % 2 == 0).all() and (others % 2 == 1).all()
    y = torch.randn(2, h, w, 3)
    assert torch.equal(cb.join(*cb.split(y)), y)


@pytest.mark.parametrize("h, w", [(2, 2), (4, 4), (6, 10)])
def test_rows_of_anchors_are_a_masked_convolution(h, w):
    torch.manual_seed(h)
    y, weight = torch.randn(2, h, w, 3), torch.randn(5, 3, 5, 5)
    mask = torch.tensor([[(i + j) % 2 for j in range(5)] for i in range(5)])
    anchors, _ = cb.split(y)
    only = cb.join(anchors, torch.zeros_like(anchors))
    full = F.conv2d(only.permute(0, 3, 1, 2), weight * mask, padding=2).permute(0, 2, 3, 1)
    rows = torch.stack([weight[:, :, i + 2, j + 2] for i, j in cb.TAPS], 1).reshape(5, -1)
    assert torch.allclose(F.linear(cb.anchors_around(anchors), rows), cb.split(full.contiguous())[1], atol=1e-4)
