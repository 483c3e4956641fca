"""The causal recurrence beside its float twin, at its bounds, and on both backends."""
import numpy as np
import pytest
import torch

from linic.entropy.convert import table
from linic.entropy.fast import Torch
from linic.entropy.operators import OPERATORS, Op, Spec
from linic.errors import WeightsError

C, STEPS = 12, 72
OP = Op("recurrence", "y", (), ("decay", "bonus", "exp"), ())
RUN, CHECK = OPERATORS["recurrence"].run, OPERATORS["recurrence"].check


@pytest.fixture
def sequence():
    random = np.random.default_rng(0)
    k = random.normal(0, 2500, (STEPS, 1, 2, 3, C)).round().clip(-7091, 7091).astype(np.int64)
    v = random.integers(-8191, 8192, (STEPS, 1, 2, 3, C))
    return k, v, random.integers(1, 330, C), random.integers(-4432, 4432, C)


def interleaved(k, v, t):
    return [x for i in range(t + 1) for x in (k[i], v[i])]


def test_it_follows_the_float_recurrence_to_the_last_unit(sequence):
    k, v, decay, bonus = sequence
    nats = np.log(2) / 1024
    num = den = np.zeros(k.shape[1:])
    for t in range(STEPS):
        own = np.exp((k[t] + bonus) * nats)
        wanted = (num + own * v[t]) / (den + own)
        got = RUN(OP, 0, *interleaved(k, v, t), decay, bonus, table("exp"))
        assert np.abs(got - wanted).max() < 3, t
        fall, e = np.exp(-decay * nats), np.exp(k[t] * nats)
        num, den = fall * num + e * v[t], fall * den + e


def test_torch_gives_the_same_integers(sequence):
    k, v, decay, bonus = sequence
    backend = Torch.__new__(Torch)
    backend.device, backend._ready = torch.device("cpu"), {}
    backend.tensors = {"decay": torch.from_numpy(decay), "bonus": torch.from_numpy(bonus),
                       "exp": torch.from_numpy(table("exp"))}
    for t in (0, 1, 40, STEPS - 1):
        wanted = RUN(OP, 0, *interleaved(k, v, t), decay, bonus, table("exp"))
        got = backend._recurrence(OP, 0, *(torch.from_numpy(x).int() for x in interleaved(k, v, t)))
        assert np.array_equal(got.numpy(), wanted)


def test_a_constant_value_comes_back_whatever_the_keys(sequence):
    k, _, decay, bonus = sequence
    for value in (8191, -8192, 0):
        v = np.full_like(k, value)
        assert (RUN(OP, 0, *interleaved(k, v, STEPS - 1), decay, bonus, table("exp")) == value).all()


def spec(limit):
    return Spec(np.full(C, -limit), np.full(C, limit), 1)


@pytest.mark.parametrize("k, v, decay, bonus, exp, message", [
    (7091, 9000, 1, 0, None, "beyond 14 bits"),
    (1 << 21, 8191, 1, 0, None, "beyond 20"),
    (7091, 8191, -1, 0, None, "decay or bonus"),
    (7091, 8191, 1, 6000, None, "decay or bonus"),
    (7091, 8191, 1, 0, np.ones(10, np.int64), "table"),
    (7091, 8191, 1, 0, np.zeros(26157, np.int64), "table"),
])
def test_what_could_leave_the_range_is_refused(k, v, decay, bonus, exp, message):
    tensors = np.full(C, decay), np.full(C, bonus), table("exp").astype(np.int64) if exp is None else exp
    with pytest.raises(WeightsError, match=message):
        CHECK(OP, spec(k), spec(v), *tensors)
    good = np.full(C, 1), np.full(C, 0), table("exp").astype(np.int64)
    assert CHECK(OP, spec(7091), spec(8191), *good).high.max() == 8191
