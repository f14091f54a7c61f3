"""Measured convergence equals theory (identity 7): on quadratics the rates are known in closed form.

    J(θ) = ½ Σ_j λ_j (θ_j − θ*_j)²,   μ = min λ,  L = max λ,  κ = L/μ

As a task: least squares over rows xⱼ = √(nλⱼ/2)·eⱼ, so that (1/n) Σ (x·θ − y)² is J.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import federation, run, task_of
from quick_cases import by_turns, one_in, only
from torch import nn

from atoll import recipes
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Sampler
from atoll.plan.round import bind, step
from atoll.plan.schedule import inverse
from atoll.plan.state import State


def bowl(*clients):
    """A federation with one quadratic per client, `(curvatures, minimum)`, and its task and data."""
    x, y = [], []
    for curvature, lowest in clients:
        root = (torch.tensor(curvature, dtype=torch.float64) * len(curvature) / 2).sqrt()
        x.append(torch.diag(root))
        y.append(root * torch.tensor(lowest, dtype=torch.float64))
    return federation(torch.cat(x), torch.cat(y), [len(c) for c, _ in clients])


def engine_of(data, body="lanes"):
    module = nn.Linear(data.features[0], 1, bias=False)
    nn.init.zeros_(module.weight)
    return InProcessEngine(task_of(module, data, body), data)


def path(plan, engine, rounds, start=None):
    """Return θ before the first round and after each round."""
    plan, model = bind(plan, engine), engine.task.initial()
    model = model if start is None else model._replace(theta=torch.tensor(start, dtype=torch.float64))
    state = State.first(plan, engine.task, 0, Memory(plan.memory(engine.task)), model)
    out = [state.model.theta]
    for _ in range(rounds):
        state, _ = step(plan, state, engine)
        out.append(state.model.theta)
    return torch.stack(out)


@given(st.floats(1.5, 300.0), st.floats(1e-3, 1e3), st.sampled_from(["lanes", "loop"]))
def test_gradient_descent_shrinks_the_error_by_kappa_minus_one_over_kappa_plus_one(kappa, low, body):
    """With lr = 2/(μ + L) both ends of the spectrum shrink by this factor per step; no direction shrinks slower."""
    engine = engine_of(bowl(([low, low * math.sqrt(kappa), low * kappa], [0.0, 0.0, 0.0])), body)
    errors = path(recipes.gd(2 / (low + low * kappa)), engine, 12, [1.0, 1.0, -1.0])
    rate = (kappa - 1) / (kappa + 1)
    for t, error in enumerate(errors.abs()):
        assert error[0] == pytest.approx(rate**t, rel=1e-10) and error[2] == pytest.approx(rate**t, rel=1e-10)
        assert error[1] <= rate**t * (1 + 1e-10)


def test_a_step_beyond_two_over_l_climbs():
    engine = engine_of(bowl(([0.1, 10.0], [0.0, 0.0])), "loop")
    below, beyond = (path(recipes.gd(lr), engine, 60, [1.0, 1.0]).norm(dim=1) for lr in (1.99 / 10, 2.01 / 10))
    assert below[-1] < 0.7 and beyond[-1] > 1.5


@pytest.mark.parametrize(("kappa", "body"), one_in(2, by_turns([10.0, 300.0], ["loop", "lanes"])))
def test_the_heavy_ball_has_the_rate_of_the_root_of_kappa(body, kappa):
    """With optimal momentum, error ~ t·((√κ−1)/(√κ+1))ᵗ. Polyak, 1964."""
    a, b = 1.0, math.sqrt(kappa)
    optimizer = rules.sgd((2 / (a + b)) ** 2, momentum=((b - a) / (b + a)) ** 2)
    rounds = int(12 * b)
    engine = engine_of(bowl(([1.0, 3.0, kappa], [0.0, 0.0, 0.0])), body)
    errors = path(Plan(Gradient(), Mean(), optimizer), engine, rounds, [1.0, 1.0, 1.0]).norm(dim=1)
    rate = (b - 1) / (b + 1)
    # A double root adds the factor t, so error/t falls at exactly this rate.
    half = rounds // 2
    measured = float((errors[-1] / rounds) / (errors[half] / half)) ** (1 / (rounds - half))
    assert measured == pytest.approx(rate, rel=0.01 / b)
    assert measured < (kappa - 1) / (kappa + 1)


def test_nesterov_needs_root_kappa_steps():
    """With lr = 1/L and momentum (√κ−1)/(√κ+1), J falls by at least the factor 1 − 1/√κ per step."""
    kappa = 100.0
    momentum = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    plan = Plan(Gradient(), Mean(), rules.sgd(1 / kappa, momentum=momentum, nesterov=True))
    errors = path(plan, engine_of(bowl(([1.0, 30.0, kappa], [0.0] * 3)), "loop"), 100, [1.0, 1.0, 1.0])
    heights = (torch.tensor([1.0, 30.0, kappa]) * errors.square()).sum(1) / 2
    bound = (1 - 1 / math.sqrt(kappa)) ** torch.arange(101) * (heights[0] + 0.5 * 3)
    assert (heights <= bound * (1 + 1e-9)).all()


CURVES = ([1.0, 4.0], [2.0, 0.5], [0.3, 3.0])
LOWS = ([1.0, -1.0], [0.0, 2.0], [-3.0, 0.5])


def fixed_point(lr, steps, weights):
    """Solve Σ wᵢ(I − Mᵢ)(θ − θᵢ*) = 0; `steps` local steps multiply a client's error by Mᵢ = (I − lr Λᵢ)^steps."""
    curves, lows = (torch.tensor(t, dtype=torch.float64) for t in (CURVES, LOWS))
    pull = torch.tensor(weights, dtype=torch.float64)[:, None] * (1 - (1 - lr * curves) ** steps)
    return (pull * lows).sum(0) / pull.sum(0)


FIXED = [
    pytest.param(steps, weights, body, marks=[] if (steps, body) == (3, "loop") else [pytest.mark.slow])
    for steps in (1, 3, 20)
    for weights, body in (("examples", "lanes"), ("equal", "loop"))
]


def rounds_for(lr, steps, share=(1, 1, 1)):
    """Return enough rounds for 12 digits: a round multiplies the error by the mean of (1 − lr λ)^steps."""
    left = (1 - lr * torch.tensor(CURVES)) ** steps
    slowest = float((torch.tensor(share)[:, None] * left).sum(0).max() / sum(share))
    return math.ceil(math.log(1e-12) / math.log(slowest)) + 3


@pytest.mark.parametrize(("steps", "weights", "body"), FIXED)
def test_fedavg_on_unequal_clients_reaches_its_own_fixed_point(body, weights, steps):
    """This is not the minimum of the mean: with many local steps it drifts to the mean of the clients' minima."""
    # Client 1 has three copies of its rows: three times the weight, the same quadratic.
    data = bowl(*zip(CURVES, LOWS, strict=True))
    order = torch.tensor([0, 1, 2, 3, 2, 3, 2, 3, 4, 5])
    data = federation(data.rows.x, data.rows.y, [2, 6, 2], order)
    share = (2, 6, 2) if weights == "examples" else (1, 1, 1)
    lr = 0.2
    plan = Plan(Train(rules.sgd(lr), steps=steps), Mean(weights=weights))
    expected = fixed_point(lr, steps, share)
    came = path(plan, engine_of(data, body), rounds_for(lr, steps, share))[-1]
    assert torch.allclose(came, expected, rtol=0, atol=1e-11)

    curves, lows, share = (torch.tensor(t, dtype=torch.float64) for t in (CURVES, LOWS, share))
    lowest = (share[:, None] * curves * lows).sum(0) / (share[:, None] * curves).sum(0)
    off = float((expected - lowest).norm())
    assert off < 1e-12 if steps == 1 else off > 0.01
    if steps == 20:
        mean_of_lows = (share[:, None] * lows).sum(0) / share.sum()
        assert (expected - mean_of_lows).norm() < 0.5 * (lowest - mean_of_lows).norm()


@pytest.mark.parametrize("steps", [1, 4])
def test_fedavg_approaches_its_fixed_point_at_the_rate_of_the_mean_map(steps):
    """Each round multiplies θ − θ∞ by Σ wᵢ (I − lr Λᵢ)^steps, coordinate by coordinate."""
    data = bowl(*zip(CURVES, LOWS, strict=True))
    lr = 0.1
    errors = path(Plan(Train(rules.sgd(lr), steps=steps), Mean()), engine_of(data), 8) - fixed_point(
        lr, steps, (1, 1, 1)
    )
    factor = ((1 - lr * torch.tensor(CURVES, dtype=torch.float64)) ** steps).mean(0)
    for before, after in itertools.pairwise(errors):
        assert torch.allclose(after, factor * before, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("server_lr", only([1.5], [0.7, 1.5]))
def test_the_servers_rate_scales_the_step_and_moves_no_fixed_point(server_lr):
    data = bowl(*zip(CURVES, LOWS, strict=True))
    plan = Plan(Train(rules.sgd(0.1), steps=5), Mean(), rules.sgd(server_lr))
    assert torch.allclose(
        path(plan, engine_of(data), rounds_for(0.1, 5) * 3 // 2)[-1], fixed_point(0.1, 5, (1, 1, 1)), rtol=0, atol=1e-11
    )


@pytest.mark.slow
def test_a_falling_local_rate_takes_the_drift_away():
    """The drift is proportional to lr: with lr = c/(t + t₀) FedAvg converges to the minimum of the mean."""
    data = bowl(*zip(CURVES, LOWS, strict=True))
    curves, lows = (torch.tensor(t, dtype=torch.float64) for t in (CURVES, LOWS))
    lowest = (curves * lows).sum(0) / curves.sum(0)
    constant, falling = (
        path(Plan(Train(rules.sgd(lr), steps=2), Mean()), engine_of(data), 150)[-1] for lr in (0.1, inverse(2.0, t0=20))
    )
    assert (falling - lowest).norm() < 0.2 * (constant - lowest).norm()


class Half(Sampler):
    """Alternate between the two halves of the clients, like an unlucky sampler."""

    def __call__(self, population, round, key):
        return Cohort(torch.arange(round % 2, population.clients, 2), torch.tensor(0.5))


def test_one_step_of_some_clients_has_the_mean_of_everyones():
    """The two halves of the clients make one step each from the same θ: their mean is the step of all clients."""
    clients = [(c, low) for c, low in zip((*CURVES, [1.0, 1.0]), (*LOWS, [0.2, 0.3]), strict=True)]
    data = bowl(*clients)
    engine, start = engine_of(data), torch.tensor([0.7, -0.4], dtype=torch.float64)
    steps = []
    for turn in (0, 1):
        plan = Plan(Gradient(), Mean(), rules.sgd(0.1), cohort=Half())
        state = State.first(plan, engine.task, 0, Memory({}), engine.task.initial()._replace(theta=start))
        state = State(turn, state.seed, state.model, state.optimizer, state.server, state.memory)
        steps.append(step(plan, state, engine)[0].model.theta)
    everyone = run(recipes.distributed_gd(0.1), engine, 1, init=start)[0].model.theta
    assert torch.allclose(sum(steps) / 2, everyone, rtol=1e-14)
