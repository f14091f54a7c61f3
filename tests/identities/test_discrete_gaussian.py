"""The discrete Gaussian: the table equals the definition, draws pass chi-square, joins have the right deviation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from atoll.base.errors import UsageError
from atoll.base.random import SecretKey
from atoll.compute import discrete_gaussian as module
from atoll.compute.discrete_gaussian import _table, discrete_gaussian


@pytest.mark.parametrize("deviation", [64.0, 100.5, 515.0])
def test_the_table_has_the_probabilities_of_the_definition(deviation):
    table = _table(deviation, 0)
    edges = [int(h) << 64 | int(low) for h, low in zip(table.high, table.low, strict=True)]
    found = np.array([float(Fraction(b - a, 2**128)) for a, b in zip(edges, [*edges[1:], 2**128], strict=True)])
    x = np.arange(-table.reach + 1, table.reach + 1)
    exact = np.exp(-(x**2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))  # the sum of all: Poisson
    assert np.allclose(found, exact, rtol=1e-12, atol=1e-30)
    assert edges[0] < 2 ** (128 - 110) and edges[-1] > 2**128 - 2 ** (128 - 110)
    assert all(a + b in (2**128, 2**128 - 1) for a, b in zip(edges, reversed(edges), strict=True))  # symmetric


def test_draws_pass_chi_square():
    n, deviation = 1 << 18, 64.0
    x = discrete_gaussian(SecretKey.of_seed(1), n, deviation).numpy()
    cells = np.arange(-256, 257)
    counts = np.bincount(np.clip(x, -256, 256) + 256, minlength=513)
    expected = np.exp(-(cells**2) / (2 * deviation**2))
    expected *= n / expected.sum()
    keep = expected > 5
    statistic = float(((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum())
    assert abs(statistic - keep.sum()) < 6 * math.sqrt(2 * keep.sum())


@pytest.mark.parametrize("deviation", [1024.0, 3.7e5, 2.0**40])
def test_joined_draws_have_the_normal_moments_and_distribution(deviation):
    n = 1 << 18
    z = discrete_gaussian(SecretKey.of_seed(3), n, deviation).double() / deviation
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 6 * math.sqrt(spread / n)
    ordered = np.sort(z.numpy())
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered[:: n // 1024]])
    assert np.abs(normal - np.arange(0, n, n // 1024) / n).max() < 2.2 / math.sqrt(n)  # KS, chance 1e-4


def test_a_tie_of_the_upper_words_is_decided_by_the_second_word(monkeypatch):
    table = _table(64.0, 0)
    at = len(table.high) // 2 + 3

    class Fixed:
        def __init__(self, second):
            self.data = int(table.high[at]).to_bytes(8, "little"), second.to_bytes(8, "little")

        def bytes(self, n):
            return self.data[0]

        def fold(self, name):
            self.data = self.data[1:]
            return self

    edge = int(table.low[at])
    below, on = (int(module._draw(table, Fixed(second), 1)[0]) for second in (edge - 1, edge))
    assert (below, on) == (at - table.reach, at + 1 - table.reach)  # x is the number of edges ≤ the word


def test_the_same_key_draws_the_same_numbers_and_a_bad_deviation_is_refused():
    key = SecretKey.of_seed(5)
    assert discrete_gaussian(key, 9, 1e5).equal(discrete_gaussian(key, 9, 1e5))
    assert not discrete_gaussian(key.fold("a"), 9, 1e5).equal(discrete_gaussian(key.fold("b"), 9, 1e5))
    assert len(discrete_gaussian(key, 0, 64.0)) == 0
    for deviation in (63.9, 2.0**55, math.nan):
        with pytest.raises(UsageError):
            discrete_gaussian(key, 3, deviation)
