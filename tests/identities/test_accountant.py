"""Accountants: published values, exact limits, and an integer-order oracle without shared code."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_cases import one_in

from atoll.privacy.accountant import (
    Releases,
    gaussian_delta,
    gaussian_epsilon,
    least_epsilon,
    pld_epsilon,
    rdp,
    rdp_epsilon,
)


@pytest.mark.parametrize(
    ("sigma", "delta", "eps"),
    [
        (0.5, 1e-5, 9.997256),
        (1, 1e-5, 4.377178),
        (2, 1e-5, 1.993091),
        (4, 1e-5, 0.926342),
        (10, 1e-5, 0.340669),
        (1, 1e-6, 4.886554),
    ],
)
def test_the_gaussian_mechanism_is_exact(sigma, delta, eps):
    assert gaussian_epsilon(1 / sigma, delta) == pytest.approx(eps, abs=1e-6)
    assert least_epsilon(Releases(10 * sigma, 100), delta) == pytest.approx(eps, abs=1e-6)
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.12693674, abs=1e-8)


@pytest.mark.parametrize(
    ("order", "value"),
    [
        (1.5, 6.50070897e-4),
        (2.5, 1.08541806e-3),
        (5, 2.18075656e-3),
        (50, 2.38460375e-2),
        (100, 167.416308),
    ],
)
def test_divergences_equal_quadrature_with_30_digits(order, value):
    assert rdp(Releases(2.5, 50, 0.01), order) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("releases", "delta", "by_rdp", "by_pld"),
    [
        (Releases(1.3, 15 * 400, 150 / 60000), 1e-5, 0.7242234026, 0.640111),
        (Releases(1.0, 30 * 1000, 100 / 1e5), 1e-7, 1.4154988495, 1.098200),
        (Releases(1.5, 2250, 0.04), 1e-5, 7.32911117143, 6.768787),
        (Releases(0.7, 120, 0.01), 1e-5, 3.2391922, 2.4612381),
    ],
)
def test_sampled_releases_have_the_published_epsilon(releases, delta, by_rdp, by_pld):
    assert rdp_epsilon(releases, delta) == pytest.approx(by_rdp, rel=1e-6)
    assert pld_epsilon(releases, delta, by_rdp) == pytest.approx(by_pld, abs=5e-4)
    assert least_epsilon(releases, delta) == pld_epsilon(releases, delta, rdp_epsilon(releases, delta))


@pytest.mark.parametrize(
    ("q", "z", "count", "delta", "eps"),
    [(0.01, 1, 1000, 1e-5, 2.107753), (0.1, 1, 100, 1e-5, 7.972922), (0.01, 0.8, 500, 1e-6, 3.564631)],
)
def test_whole_orders_equal_the_published_values(q, z, count, delta, eps):
    assert rdp_epsilon(Releases(z, count, q), delta, range(2, 257)) == pytest.approx(eps, abs=1e-6)


def test_ten_rounds_fit_a_budget_that_eleven_exceed():
    """1,000 clients, q = .1, noise 2: the numbers of the first example of the manual."""
    assert least_epsilon(Releases(2.0, 10, 0.1), 1e-5) == pytest.approx(0.7985, abs=1e-4)
    assert least_epsilon(Releases(2.0, 11, 0.1), 1e-5) == pytest.approx(0.8305, abs=1e-4)


def test_a_fixed_number_of_clients_costs_more_than_independent_coins():
    """N = 1,000, m = 10, T = 1,000: noise 1 and 2 times the clip, sensitivity two clips."""
    assert least_epsilon(Releases(1 / 2, 1000, 0.01, fixed_size=True), 1e-5) == pytest.approx(20.99, abs=0.05)
    assert least_epsilon(Releases(2 / 2, 1000, 0.01, fixed_size=True), 1e-5) == pytest.approx(3.58, abs=0.05)


@settings(max_examples=settings().max_examples // 4)  # one example composes six distributions by FFT
@given(
    st.floats(1e-3, 0.9),
    st.floats(0.6, 8.0),
    st.integers(1, 400),
    st.sampled_from([1e-4, 1e-6, 1e-9]),
)
def test_epsilon_is_monotone_and_below_rdp(q, z, count, delta):
    base = least_epsilon(Releases(z, count, q), delta)
    assert base <= rdp_epsilon(Releases(z, count, q), delta)
    assert base <= least_epsilon(Releases(z, count), delta) * (1 + 1e-9) + 1e-4  # sampling never costs
    slack = 1e-3 + 1e-3 * base
    assert least_epsilon(Releases(z, 2 * count, q), delta) >= base - slack
    assert least_epsilon(Releases(1.2 * z, count, q), delta) <= base + slack
    assert least_epsilon(Releases(z, count, min(1.0, 1.1 * q)), delta) >= base - slack
    assert least_epsilon(Releases(z, count, q), delta * 10) <= base + slack


@pytest.mark.parametrize(
    ("q", "z", "count"), [pytest.param(0.2, 0.5, 3, marks=pytest.mark.slow), (0.3, 1.0, 2), (0.05, 1.0, 1)]
)
def test_the_loss_distribution_equals_a_direct_integral(q, z, count):
    """δ(ε) from samples of the exact privacy loss, within the error of 2 million draws."""
    delta = 0.15594 if count == 3 else 0.01
    eps = pld_epsilon(Releases(z, count, q), delta, 50.0)
    rng = np.random.default_rng(0)
    found = []
    for present in (True, False):
        x = rng.normal(0, z, (1_000_000, count))
        if present:
            x += rng.random(x.shape) < q
        loss = np.log1p(q * np.expm1((2 * x - 1) / (2 * z * z))).sum(1) * (1 if present else -1)
        found.append(np.maximum(0, -np.expm1(eps - loss)).mean())
    assert max(found) == pytest.approx(delta, rel=0.02)
    if count == 3:
        assert eps == pytest.approx(1.0, abs=2e-4)


def test_no_release_costs_nothing():
    assert least_epsilon(Releases(1.0, 0), 1e-5) == least_epsilon(Releases(1.0, 5, 0.0), 1e-5) == 0.0
    assert math.isfinite(least_epsilon(Releases(0.6, 2000, 1.0), 1e-9))
    assert least_epsilon(Releases(0.02, 60, 0.1), 1e-5) == rdp_epsilon(Releases(0.02, 60, 0.1), 1e-5)


ANSWERS = json.loads((Path(__file__).parents[1] / "golden" / "dp_accounting.json").read_text())


@pytest.mark.parametrize("first", one_in(4, range(4)))
def test_200_settings_have_the_divergences_of_dp_accounting(first):
    assert len(ANSWERS) == 200
    compared = [row for row in ANSWERS if row[4] > 0]  # it states 0 if the total variation is below δ
    assert len(compared) > 180
    for q, z, rounds, delta, by_rdp, _ in compared[first::4]:
        found = rdp_epsilon(Releases(z, rounds, q), delta, range(2, 257))
        assert found == pytest.approx(by_rdp, rel=1e-6, abs=1e-9), (q, z, rounds, delta)


@pytest.mark.slow
def test_settings_have_the_loss_distributions_of_dp_accounting():
    """On its grid of 1e-4 both are equal. Atoll's own grid gives at most 1e-4 more, and less if losses are small."""
    known = [row for row in ANSWERS if row[5] is not None]
    assert len(known) > 30
    for q, z, rounds, delta, by_rdp, by_pld in known:
        releases = Releases(z, rounds, q)
        found = least_epsilon(releases, delta)
        assert found <= min(by_rdp + 1e-6, by_pld + 1e-4)
        if q < 1:
            found = pld_epsilon(releases, delta, by_rdp, step=1e-4)
        assert found == pytest.approx(by_pld, abs=1e-4), (q, z, rounds, delta)
