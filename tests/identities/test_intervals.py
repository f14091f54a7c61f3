"""Intervals: published values, limits, and coverage."""

import numpy as np
import pytest

from atoll.base.intervals import hanley_mcneil, normal, wilson


def test_published_values():
    assert wilson(123, 148).low == pytest.approx(0.7625, abs=5e-4)
    assert wilson(123, 148).high == pytest.approx(0.8830, abs=5e-4)
    # Hanley and McNeil, 1982, table: area .893 with 51 abnormal and 58 normal images has standard error .032
    found = hanley_mcneil(0.893, 51, 58)
    assert (found.high - found.low) / 2 / 1.959963984540054 == pytest.approx(0.032, abs=1e-3)


def test_the_ends_of_a_proportion_stay_in_its_range():
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0
    assert 0 < wilson(0, 20).high < 0.2


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_wilson_covers_the_truth(p):
    hits = np.random.default_rng(0).binomial(60, p, 2000)
    inside = [wilson(h, 60).low <= p <= wilson(h, 60).high for h in hits]
    assert 0.93 < np.mean(inside) < 0.98


def test_a_text_has_at_most_two_digits_of_the_half_width():
    assert str(wilson(123, 148)) == "0.831 [0.763, 0.883] n=148"
    assert str(normal(1234.5, 200.0, 16)) == "1234 [1137, 1332] n=16"
    assert str(normal(5.0, 0.0, 4)) == "5.000 [5.000, 5.000] n=4"
