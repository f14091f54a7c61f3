"""Fairness: q-FedAvg and agnostic weights are their formulas, federated averaging in the degenerate cases, and fair."""

from dataclasses import replace

import pytest
import torch
from fairness import opposed_groups, rounds_to, slow_group, trained
from problems import classification, federation, regression, run, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Agnostic, Attacked, Bucketing, Mean, SignFlip
from atoll.plan.aggregate.agnostic import onto_simplex
from atoll.plan.codec import Clip, Noise
from atoll.plan.local import Calibrated, Fair, Gradient, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort
from atoll.plan.round import bind
from atoll.plan.sampler import PowerOfChoice, Uniform
from atoll.plan.state import State

WIDE = torch.float64


def engine_of(data, numerics="lanes", chunk=None):
    return InProcessEngine(task_of(nn.Linear(3, 1).double(), data, numerics), data, chunk)


def losses(theta, data):
    """The mean loss of each client of a linear regression at θ."""
    residuals = [(data.rows.x[rows] @ theta[:3] + theta[3] - data.rows.y[rows]) for rows in each(data)]
    return torch.stack([r.square().mean() for r in residuals])


def each(data):
    return [data.client_rows(i) for i in range(data.count)]


def opposed(ends=(0.0, 1.0, 4.0), sizes=(20, 9, 5)):
    """Clients of unequal sizes whose targets differ: y = end, at x with mean 0."""
    data = regression(sizes)
    y = torch.cat([torch.full((n,), end, dtype=WIDE) for n, end in zip(sizes, ends, strict=True)])
    return federation(0.1 * data.rows.x, y, sizes)


def test_without_fairness_it_is_federated_averaging_to_the_bit():
    engine = engine_of(regression((12, 9, 5)))
    fair, plain = (run(plan, engine)[0].model.theta for plan in (recipes.qffl(0.1, q=0.0), recipes.fedavg(0.1)))
    assert torch.equal(fair, plain)


@pytest.mark.parametrize("numerics", ["lanes", "loop"])
def test_a_round_of_qffl_is_its_formula(numerics):
    data, q, lr = regression((70, 9, 5)), 1.5, 0.1
    engine = engine_of(data, numerics, 2)
    theta = engine.task.initial().theta
    single = replace(recipes.fedavg(lr, epochs=2, batch=4), aggregator=Mean("equal"))
    updates = torch.stack([kept_update(single, engine, client) for client in range(3)])
    f, w = losses(theta, data), data.sizes.double()
    h = q * f ** (q - 1) * updates.square().sum(1) / lr + f**q
    want = theta - (w * f**q) @ updates / (w @ h)
    found = run(recipes.qffl(lr, epochs=2, batch=4, q=q), engine, 1)[0].model.theta
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def kept_update(plan, engine, client):
    """The update of one client in round 0."""
    plan = bind(plan, engine)
    state = State.first(plan, engine.task, 0, Memory(plan.memory(engine.task)))
    cohort = Cohort(torch.tensor([client]), torch.ones((), dtype=WIDE))
    return engine.gather(plan, state, cohort, state.key(), keep=[client]).kept[0].decoded.means["update"][0]


@pytest.mark.slow
def test_q_makes_losses_more_even():
    data = opposed()
    engine = engine_of(data)
    spread = []
    for q in (0.0, 2.0):
        plan = recipes.qffl(0.2, epochs=1, batch=None, q=q)
        spread.append(losses(run(plan, engine, 15)[0].model.theta, data))
    assert spread[0].max() > 1.1 * spread[1].max() and spread[0].std() > 1.1 * spread[1].std()


def test_agnostic_weights_of_equal_losses_are_the_mean_over_clients():
    one = regression((9,))
    data = federation(one.rows.x.repeat(3, 1), one.rows.y.repeat(3), (9, 9, 9))
    engine = engine_of(data)
    agnostic, mean = (run(Plan(Gradient(), rule, sgd(0.1)), engine, 4)[0] for rule in (Agnostic(1.0), Mean("equal")))
    torch.testing.assert_close(agnostic.model.theta, mean.model.theta, rtol=1e-14, atol=1e-14)
    assert torch.equal(agnostic.server["aggregator"]["weights"], torch.full((3,), 1 / 3, dtype=WIDE))


def test_agnostic_training_ends_at_the_minimax_point():
    """The largest loss is that of two clients: between 0 and 4 it is least at 2, and the client at 1 has no weight."""
    data = opposed()
    engine = engine_of(data)
    state, reports = run(Plan(Gradient(), Agnostic(0.01), sgd(0.3)), engine, 40)
    found = losses(state.model.theta, data)
    mean = losses(run(Plan(Gradient(), Mean("equal"), sgd(0.3)), engine, 40)[0].model.theta, data)
    assert float(found[0]) == pytest.approx(float(found[2]), rel=0.05)
    assert found.max() < 0.9 * mean.max()
    weights = state.server["aggregator"]["weights"]
    assert float(weights.sum()) == pytest.approx(1) and float(weights[1]) < 0.1
    assert reports[-1].clients["mixture"].tolist() == pytest.approx(weights.tolist(), abs=0.02)


@pytest.mark.slow
def test_fair_weights_raise_the_worst_accuracy():
    """benchmarks/fairness.py has five seeds."""
    data, words = opposed_groups(0), {"epochs": 1, "batch": 50}
    plain = recipes.fedavg(0.3, **words)
    fair, agnostic = recipes.qffl(0.3, q=5.0, **words), replace(plain, aggregator=Agnostic(0.1))
    mean, fair, agnostic = (trained(data, plan, 12).metrics for plan in (plain, fair, agnostic))
    assert fair["accuracy_worst10"] > mean["accuracy_worst10"] + 0.05
    assert fair["accuracy_sd"] < 0.8 * mean["accuracy_sd"]
    assert agnostic["accuracy_min"] > mean["accuracy_min"] + 0.05


@pytest.mark.slow
def test_selection_by_loss_needs_fewer_rounds():
    uniform, by_loss = (
        rounds_to(trained(slow_group(1), recipes.fedavg(0.3, epochs=1, batch=10, cohort=cohort), 20), 0.12)
        for cohort in (Uniform(3), PowerOfChoice(3, 9))
    )
    assert by_loss < 0.9 * uniform


def test_the_projection_is_the_nearest_point():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=WIDE)
    some = torch.distributions.Dirichlet(torch.ones(6, dtype=WIDE)).sample((200,))
    for row in x:
        point = onto_simplex(row)
        assert float(point.sum()) == pytest.approx(1) and bool((point >= 0).all())
        assert bool(((some - row).norm(dim=1) >= (point - row).norm() - 1e-12).all())
    torch.testing.assert_close(onto_simplex(some[0]), some[0])


def test_chunks_and_a_resumed_run_change_no_bit(tmp_path):
    data = classification((12, 9, 9, 7, 5))
    for plan in (
        Plan(recipes.fedavg(0.1).local, Agnostic(0.5), cohort=4),
        Plan(Train(sgd(0.1), epochs=1, batch=4, correction=Calibrated(0.5) >> Fair(1.0)), Mean(), cohort=4),
    ):
        whole = atoll.train("softmax", data, plan, rounds=3, out=None, chunk=1)
        half = atoll.train("softmax", data, plan, rounds=2, out=tmp_path, report=False)
        again = atoll.train("softmax", data, plan, rounds=3, resume=half.path, report=False)
        assert again.reports[-1].fingerprint == whole.reports[-1].fingerprint


def test_refusals():
    local = recipes.fedavg(0.1).local
    clipped = Clip(1.0) >> Noise(1.0)
    for make, words in (
        (lambda: recipes.qffl(0.1, q=-1.0), "q"),
        (lambda: Agnostic(0.0), "lr"),
        (lambda: Bucketing(2, Agnostic(0.1)), "sees rows only"),
        (lambda: Attacked(Agnostic(0.1), SignFlip()), "reads updates only"),
        (lambda: replace(recipes.qffl(0.1), pace=Buffered(2)), "Buffered"),
        (lambda: replace(recipes.qffl(0.1), aggregator=Mean("equal", over="expected")), "expected"),
        (lambda: Plan(local, Agnostic(0.1), pace=Buffered(2)), "Buffered"),
        (lambda: Plan(local, Agnostic(0.1), codec=clipped), "linear"),
    ):
        with pytest.raises(UsageError, match=words):
            make()
