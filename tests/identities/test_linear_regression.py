"""Linear regression on the diabetes data: every way to run gradient descent agrees with its theory."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch

import atoll
from atoll.data import IID, load
from atoll.plan.plan import Plan
from atoll.plan.registry import read_part
from atoll.recipes import gd, sgd
from atoll.training.experiment import REGRESSION_RECIPE, Experiment, linear_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "linear_regression.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def data():
    return load("diabetes").split(1, IID(), held_out=0)


@pytest.fixture(scope="module")
def known(example, data):
    """θ*, μ and L."""
    return example["least_squares"](data)


def farthest(path, other):
    return float((path - other).norm(dim=1).max() / other[-1].norm())


def test_the_least_squares_solution_is_scikit_learns(data, known):
    from sklearn.linear_model import LinearRegression

    x, y = data.take(data.order)
    assert x.dtype == y.dtype == torch.float64 and len(x) == 442
    assert x.mean(0).abs().max() < 1e-12 and (x.std(0) - 1).abs().max() < 1e-12
    theirs = LinearRegression().fit(x.numpy(), y.numpy())
    best = torch.tensor([*theirs.coef_, theirs.intercept_])
    assert (known[0] - best).norm() / best.norm() < 1e-12


def test_the_default_converges_for_every_curvature_that_scaled_features_can_have():
    """The trace of the mean of x xᵀ bounds λ: Nesterov's iteration has both roots inside the unit circle."""
    for features in (1, 2, 5, 10, 100, 1000):
        rate = read_part(linear_recipe(features), {"Plan": Plan}).optimizer.lr
        left = 1 - 2 * rate * torch.linspace(1e-3, features + 1, 500, dtype=torch.float64)
        roots = torch.complex(1.9 * left, 0 * left) / 2
        step = torch.sqrt(roots.square() - 0.9 * left)
        assert max(float((roots + step).abs().max()), float((roots - step).abs().max())) < 1


def test_the_default_ends_at_least_squares_for_any_partition():
    from sklearn.linear_model import LinearRegression

    source = load("diabetes")
    x, y = source.rows.take(torch.arange(442))
    found = []
    for clients in (2, 5):
        it = Experiment(dataset="diabetes", model="linear", clients=clients, evaluate_every=100, dtype="float64")
        data, report = it.data(), [*it.training()][-1]
        found.append(report.metrics["r2"])
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    held = torch.zeros(442, dtype=torch.bool)
    held[data.held_out.index] = True
    theirs = LinearRegression().fit(x[~held], y[~held]).score(x[held], y[held])
    assert abs(found[0] - theirs) < 0.02
    assert (
        Experiment(dataset="diabetes", model="linear", overrides={"cohort": "2"}).resolved().recipe == REGRESSION_RECIPE
    )
    assert Experiment(dataset="diabetes", model="linear", scale="none").resolved().recipe == REGRESSION_RECIPE


@pytest.mark.slow
def test_a_run_that_stops_early_has_a_known_fraction_of_least_squares():
    """θ_T = Σ_λ (1 − (1 − 2ηλ)^T) θ*_λ over the eigenvectors of the mean of x xᵀ: the cause of decisions/0053."""
    source = load("diabetes")
    x, y = source.rows.take(torch.arange(442))
    data = source.split(1, IID())
    held = torch.zeros(442, dtype=torch.bool)
    held[data.held_out.index] = True
    scaled = (y - y[~held].mean()) / y[~held].std(correction=0)
    run = atoll.train("linear", data, gd(0.05), rounds=100, out=None, dtype="float64", evaluate_every=100)
    z = torch.cat((run.predictor.prepare(x), torch.ones(442, 1, dtype=torch.float64)), 1)
    values, vectors = torch.linalg.eigh(z[~held].T @ z[~held] / (~held).sum())
    best = vectors.T @ (z[~held].T @ scaled[~held]) / (~held).sum() / values
    theta = vectors @ ((1 - (1 - 0.1 * values) ** 100) * best)
    error = (z @ theta - scaled)[held].square().sum() / (y[held] - y[held].mean()).square().sum()
    assert run.metrics["r2"] == pytest.approx(float(1 - error * y[~held].var(correction=0)), abs=1e-9)
    assert run.metrics["r2"] == pytest.approx(0.3416, abs=1e-4)


@pytest.mark.slow
def test_every_split_makes_the_same_steps(example, known):
    """gd, distributed_gd over 2, 7 and 442 workers, fedsgd of all over Quantity(1.5): iterates agree to 1e-12."""
    _, low, high = known
    ways = example["splits"](2 / (low + high))
    assert [len(clients.sizes) for _, clients in ways.values()] == [1, 2, 7, 442, 3]
    plain = [example["iterates"](plan, clients, 30) for plan, clients in ways.values()]
    assert max(farthest(path, plain[0]) for path in plain[1:]) < 1e-12


@pytest.mark.slow  # tests/rates measures the same rule
def test_momentum_brings_both_ends_to_least_squares(example, known):
    best, low, high = known
    ways = example["splits"](1.0)
    for plan, clients in (ways["gd, one place"], ways["distributed_gd, 442 workers"]):
        path = example["iterates"](example["with_momentum"](plan, low, high), clients, 220)
        assert (path[-1] - best).norm() / best.norm() < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plain_descent_brings_every_split_to_least_squares(example, known):
    best, low, high = known
    ways = example["splits"](2 / (low + high))
    paths = [example["iterates"](plan, clients, 3050) for plan, clients in ways.values()]
    for path in paths:
        assert (path[-1] - best).norm() / best.norm() < 1e-6
        assert farthest(path, paths[0]) < 1e-12


@pytest.mark.slow
def test_the_error_shrinks_as_the_condition_number_says(example, data, known):
    """In the flattest direction each step multiplies the error by (κ−1)/(κ+1); after a while it dominates."""
    best, low, high = known
    errors = (example["iterates"](gd(2 / (low + high)), data, 700) - best).norm(dim=1)
    measured = float(errors[-1] / errors[-201]) ** (1 / 200)
    assert measured == pytest.approx((high - low) / (high + low), rel=1e-6)


@pytest.mark.slow
def test_a_stochastic_step_is_the_true_one_in_the_mean(example, data, known):
    """At θ* the mean step is 0. Eleven coordinates within 6 standard errors: one false alarm in two million runs."""
    best = known[0]
    start = {"linear.weight": best[None, :-1], "linear.bias": best[-1:]}
    steps = torch.cat([example["iterates"](sgd(0.1), data, 1, seed=seed, init=start) for seed in range(100)]) - best
    assert (steps.mean(0) / (steps.std(0) / 100**0.5)).abs().max() < 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_a_falling_step_the_error_falls_as_one_over_t(example, data, known):
    """The mean over 20 seeds, from θ* on, over a factor of 5 in t + t₀; 800 seeds, 20 at a time, gave −1.00 ± .05."""
    best, low, _ = known
    lr = example["falling_step"](low)
    assert lr.c > 1 / (2 * low)
    errors = example["noise"](lr, data, best, rounds=1200, seeds=20)
    clock = torch.arange(1200, dtype=torch.float64) + lr.t0
    assert example["slope"](clock[30:], errors[30:]) == pytest.approx(-1, abs=0.15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_constant_step_stalls_at_a_floor_proportional_to_it(example, data, known):
    floors = [float(example["noise"](lr, data, known[0], 900, 5)[300:].mean()) for lr in (0.01, 0.02, 0.04)]
    for low, high in itertools.pairwise(floors):
        assert high / low == pytest.approx(2, rel=0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_example_prints_and_draws_its_results(example, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["linear_regression.py", "--out", str(picture)])
    example["main"]()
    printed = capsys.readouterr().out
    assert printed.count("stalls at") == 3 and "condition number κ = 470" in printed
    slope = float(printed.split("falls as t^")[1].split()[0])
    assert slope == pytest.approx(-1, abs=0.15)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000
