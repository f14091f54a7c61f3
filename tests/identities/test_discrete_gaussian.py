"""The discrete Gaussian: the table equals the definition, draws pass chi-square, joins have the right deviation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from problems import needs_native

from atoll.base.errors import UsageError
from atoll.base.random import SecretKey
from atoll.compute import discrete_gaussian as module
from atoll.compute.discrete_gaussian import _table, discrete_gaussian


@pytest.mark.parametrize("deviation", [64.0, 100.5, 1020.0])
def test_the_table_has_the_probabilities_of_the_definition(deviation):
    table = _table(deviation, 0)
    edges = [int(first) << 96 | rest for first, rest in zip(table.first, table.rest, strict=True)]
    found = np.array([float(Fraction(b - a, 2**128)) for a, b in zip(edges, [*edges[1:], 2**128], strict=True)])
    x = np.arange(-table.reach + 1, table.reach + 1)
    exact = np.exp(-(x**2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))  # the sum of all: Poisson
    assert np.allclose(found, exact, rtol=1e-12, atol=1e-30)
    assert edges[0] < 2 ** (128 - 110) and edges[-1] > 2**128 - 2 ** (128 - 110)
    assert all(a + b in (2**128, 2**128 - 1) for a, b in zip(edges, reversed(edges), strict=True))  # symmetric


def test_draws_pass_chi_square():
    n, deviation = 1 << 20, 64.0
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
    n = 1 << 20
    z = discrete_gaussian(SecretKey.of_seed(3), n, deviation).double() / deviation
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 6 * math.sqrt(spread / n)
    ordered = np.sort(z.numpy())
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered[:: n // 1024]])
    assert np.abs(normal - np.arange(0, n, n // 1024) / n).max() < 2.2 / math.sqrt(n)  # KS, chance 1e-4


class Fixed:
    """A key whose streams are given."""

    def __init__(self, *streams):
        self.streams = list(streams)

    def fold(self, name):
        return Fixed(*self.streams[1:])

    def keystream(self):
        return self

    def fill(self, out):
        out[:] = self.streams[0]

    def read(self, n):
        data, self.streams[0] = self.streams[0][:n], self.streams[0][n:]
        return data


@pytest.mark.parametrize("natively", [False, pytest.param(True, marks=needs_native)])
def test_a_tie_of_the_first_bits_is_decided_by_the_others(natively, monkeypatch):
    monkeypatch.setattr(module, "_NATIVE", natively)
    table = _table(64.0, 0)
    middle, twins = len(table.first) // 2 + 3, int(np.flatnonzero(np.diff(table.first.astype(int)) == 0)[-1])
    cases = [(middle, -1, middle), (middle, 0, middle + 1), (twins, -1, twins), (twins + 1, 0, twins + 2)]
    words = np.array([table.first[at] for at, _, _ in cases], "<u4").tobytes()
    rest = b"".join((table.rest[at] + step).to_bytes(16, "little") for at, step, _ in cases)
    out = np.full(len(cases), 5)
    module._Draws(table, Fixed(words, rest)).join(out)
    assert out.tolist() == [80 + count - table.reach for _, _, count in cases]  # x is the number of edges ≤ the draw


@needs_native
@pytest.mark.parametrize("deviation", [64.0, 1000.0, 2.0**54])
def test_native_code_draws_the_same(deviation, monkeypatch):
    assert module.present("noise") is not None
    found = []
    for natively in (True, False):
        monkeypatch.setattr(module, "_NATIVE", natively)
        found.append(discrete_gaussian(SecretKey.of_seed(9), (1 << 16) + 5, deviation))
    assert found[0].equal(found[1])


def test_the_same_key_draws_the_same_numbers_and_a_bad_deviation_is_refused():
    key = SecretKey.of_seed(5)
    assert discrete_gaussian(key, 9, 1e5).equal(discrete_gaussian(key, 9, 1e5))
    assert not discrete_gaussian(key.fold("a"), 9, 1e5).equal(discrete_gaussian(key.fold("b"), 9, 1e5))
    assert len(discrete_gaussian(key, 0, 64.0)) == 0
    for deviation in (63.9, 2.0**55, math.nan):
        with pytest.raises(UsageError):
            discrete_gaussian(key, 3, deviation)
