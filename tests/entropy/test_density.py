import pytest
import torch

from linic.entropy.density import Factorized, LogisticMixture
from linic.entropy.rounding import bounded, gaussian_likelihood, ln_scale_at, scale_index
from linic.rangecoder import Tables
from linic.rangecoder.tables import quantise


@pytest.mark.parametrize("kind", [LogisticMixture, Factorized])
def test_probabilities_of_all_integers_sum_to_one_and_match_the_likelihood(kind):
    torch.manual_seed(0)
    density = kind(4).double()
    z = torch.arange(-300, 301).double()[:, None].expand(-1, 4)
    p = density.likelihood(z)
    # The floor of 1e-9 a bin is all that may be too much.
    assert torch.allclose(p.sum(0), torch.ones(4, dtype=torch.float64), atol=1e-6)
    for c, (low, row) in enumerate(density.probabilities(4)):
        expected = p[300 + low : 300 + low + len(row) - 1, c]
        assert torch.allclose(torch.tensor(row[:-1], dtype=torch.float64), expected, atol=2e-9)
        assert row[-1] < 2**-22  # what the table leaves to its escape


@pytest.mark.parametrize("kind", [LogisticMixture, Factorized])
def test_tables_of_a_density_are_tables_of_the_coder(kind):
    rows = kind(3).double().probabilities(3)
    freqs = [quantise(p) for _, p in rows]
    tables = Tables([f for row in freqs for f in row], [len(f) for f in freqs], [low for low, _ in rows])
    assert len(tables) == 3


def test_a_bound_passes_the_gradient_that_leads_back_into_the_range():
    x = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    bounded(x, -1, 1).sum().backward()  # descent lowers x: only the value above the range may follow
    assert x.grad.tolist() == [0.0, 1.0, 1.0]
    x.grad = None
    (-bounded(x, -1, 1)).sum().backward()
    assert x.grad.tolist() == [-1.0, -1.0, 0.0]


def test_gaussian_likelihood_is_a_distribution_over_integers():
    d = torch.arange(-4000, 4001).double()
    for s in (0.11, 1.0, 30.0, 256.0):
        p = gaussian_likelihood(d, torch.full_like(d, s).log())
        assert p.sum().item() == pytest.approx(1, abs=1e-5)


def test_scale_indices_are_nearest_in_log_or_the_next_above():
    ln = torch.linspace(-3, 6.5, 2000, dtype=torch.float64)
    table = ln_scale_at(torch.arange(128).double(), 128)
    nearest = scale_index(ln, 128)
    inside = ln.clamp(table[0], table[-1])
    assert torch.equal(nearest.long(), (inside[:, None] - table).abs().argmin(1))
    up = scale_index(ln, 64, round_up=True).long()
    coarse = ln_scale_at(torch.arange(64).double(), 64)
    assert (coarse[up] >= ln - 1e-8).logical_or(up == 63).all()
    assert torch.equal(scale_index(coarse, 64, round_up=True).long(), torch.arange(64))
