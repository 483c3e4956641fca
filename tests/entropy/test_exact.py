"""A normative layer of random weights becomes integers and agrees with its float twin."""
import numpy as np
import pytest
import torch

from linic.entropy.exact import ACTIVATION_HIGH, ACTIVATION_LOW, IntegerLinear
from linic.models import build


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(3)
    return build("lalic-xs").contexts[2].aggregate.first  # Linear 256 -> 96, normative


def test_a_normative_layer_converts_and_matches_its_float_twin(layer):
    unit_in, unit_out = 16 / 8192, 8 / 8192
    exact = IntegerLinear.from_float(layer.weight.detach().numpy(), layer.bias.detach().numpy(), unit_in, unit_out)
    x = np.random.default_rng(1).integers(-4096, 4096, (200, layer.in_features))
    twin = layer.double()(torch.from_numpy(x * unit_in)).detach().numpy() / unit_out
    inside = np.abs(twin) < 8000
    assert inside.mean() > 0.9
    error = (exact(x) - twin)[inside]
    assert np.sqrt((error**2).mean()) < 2.0  # in steps of 1/1024; rounding alone is 0.29, 14-bit weights add theirs
    assert 10 * np.log10((twin[inside] ** 2).mean() / (error**2).mean()) > 45


def test_the_float64_carrier_gives_the_integers_of_the_definition_at_the_ends_of_the_range(layer):
    exact = IntegerLinear.from_float(layer.weight.detach().numpy(), None, 16 / 8192, 8 / 8192)
    rng = np.random.default_rng(2)
    x = rng.integers(ACTIVATION_LOW, ACTIVATION_HIGH + 1, (300, layer.in_features))
    x[0], x[1], x[2] = ACTIVATION_LOW, ACTIVATION_HIGH, np.where(np.arange(x.shape[1]) % 2, -8192, 8191)
    assert np.array_equal(exact(x), exact.in_float64(x))


def test_a_layer_whose_accumulator_could_overflow_is_refused():
    with pytest.raises(ValueError, match="2\\^53"):
        IntegerLinear.from_float(np.ones((1, 200_000)), None, 1.0, 1.0)
