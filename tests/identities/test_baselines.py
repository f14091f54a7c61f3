"""The baselines equal their definitions: one client with all rows, and each client trained by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quick_cases import only
from torch import nn

from atoll import recipes
from atoll.data import IID, Quantity, arrays, federate, load
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.plan import Plan
from atoll.plan.schedule import cosine, plateau
from atoll.training import baselines
from atoll.training.rounds import rounds

ALONE = Mean(weights="equal", sum="float")


@pytest.fixture(scope="module")
def digits():
    return load("digits").split(6, Quantity(1.3))


def few(data, rows=12, clients=3):
    """A few clients with a few rows each, so that training is quick."""
    some = data.only(torch.arange(clients))
    sizes = some.sizes.clamp(max=rows)
    order = torch.cat([some.client_rows(i)[:n] for i, n in enumerate(sizes.tolist())])
    return replace(some, order=order, offsets=torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0))))


def ran(model, data, plan, count=3, **settings):
    training = rounds(model, data, plan, rounds=count, **{"evaluate_every": 0, **settings})
    for _ in training:
        pass
    return training


def plain(values):
    """The numbers of a baseline, without its intervals."""
    return {n: v for n, v in values.items() if n != "intervals"}


def last(model, data, plan, count, **settings):
    """The metrics of plain training after a number of rounds."""
    *_, report = rounds(model, data, plan, rounds=count, **settings)
    return {n: report.metrics[n] for n in ("accuracy", "held_out_loss") if n in report.metrics}


def test_pooled_is_plain_training_on_all_rows(digits):
    part = Train(sgd(0.3, momentum=0.5), epochs=2, batch=20)
    found = baselines.pooled(ran("softmax", digits, Plan(part, Mean()), 2))
    alone = last("softmax", digits.pooled(), Plan(part, ALONE), 2, numerics="loop")
    assert {n: found[n] for n in alone} == alone
    federated = last("softmax", digits.pooled(), Plan(part, Mean()), 2)
    assert found["held_out_loss"] == pytest.approx(federated["held_out_loss"], rel=1e-5)
    assert found["samples"] == 2 * 2 * len(digits.order)


def test_pooled_gradient_descent_is_the_distributed_one(digits):
    training = ran("softmax", digits, recipes.distributed_gd(0.5), dtype="float64", evaluate_every=3)
    reports = plain(baselines.pooled(training))
    assert reports["held_out_loss"] == pytest.approx(training.evaluate()["held_out_loss"], rel=1e-12)
    summed = Plan(Gradient(), Sum(), sgd(0.5 / len(digits.order)))
    found = baselines.pooled(ran("softmax", digits, summed, dtype="float64"))
    assert plain(found) == pytest.approx(reports, rel=1e-12)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(Train(sgd(0.2), epochs=1, batch=5), Mean()), marks=pytest.mark.slow),
        Plan(Train(adam(0.01), steps=4, batch=5, keep=("optimizer", "order")), Mean(), adam(0.01)),
        pytest.param(Plan(Gradient(batch=7), Mean(), adam(cosine(0.05, rounds=3))), marks=pytest.mark.slow),
        Plan(Train(sgd(0.2), epochs=1, batch=5), Mean(), cohort=0.5),
    ],
    ids=range(4),
)
@pytest.mark.parametrize("normed", only([True], [False, True]), ids=["mlp", "batch norm"])
def test_lanes_are_each_client_alone_to_the_bit(digits, plan, normed):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    data = few(digits)
    training = ran(net if normed else "softmax", data, plan, 4, numerics="lanes")
    solo, ids = baselines._solo(plan), torch.arange(data.count)
    assert baselines._in_lanes(training, solo)
    turns = baselines._turns(baselines._chances(training), 4)
    together, finite = baselines._lanes(training, solo, ids, turns)
    assert finite.all()
    for i in ids.tolist():
        state, failed = baselines._train(training, training.engine, solo, turns[:, i], i)
        assert failed is None
        assert torch.equal(state.model.theta, together.theta[i])
        assert torch.equal(state.model.buffers, together.buffers[i])
        for name, counter in state.model.counters.items():
            assert torch.equal(counter, together.counters[name][i])


def test_the_only_client_alone_is_that_client_trained_by_itself(digits):
    plan = Plan(Train(sgd(0.2), epochs=1, batch=5), Mean())
    data = few(digits)
    first = data.only(torch.tensor([0]))
    training = ran("softmax", first, plan, numerics="lanes")
    same = ran("softmax", first, Plan(plan.local, ALONE), numerics="lanes")
    found, many = baselines.alone(training), baselines.alone(ran("softmax", data, plan, numerics="lanes"))
    model, _ = baselines._lanes(training, baselines._solo(plan), torch.tensor([0]), torch.ones(3, 1) > 0)
    assert torch.equal(model.theta[0], same.state.model.theta)
    each = same.evaluate()
    assert {n: found[n] for n in each} == each
    assert many["held_out_loss_models_min"] <= found["held_out_loss"] <= many["held_out_loss_models_max"]


def loop(model, loader, ctx):
    optimizer = torch.optim.SGD(model.parameters(), ctx.lr)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "part",
    [Custom(loop, batch=5, lr=0.2), Train(sgd(plateau(0.2, patience=0)), epochs=1, batch=5)],
    ids=["own", "plateau"],
)
def test_any_part_trains_alone(digits, part):
    found = baselines.compare_baselines(ran("softmax", few(digits), Plan(part, Mean()), 3))
    assert found["local"]["clients"] == 3
    assert found["local"]["held_out_loss"] < 2.302
    assert found["pooled"]["held_out_loss"] < found["local"]["held_out_loss"]


@pytest.mark.slow
def test_as_many_samples_as_the_federation(digits):
    data = few(digits, rows=40, clients=6)
    total = len(data.order)
    for plan, seen in [
        (Plan(Train(sgd(0.1), epochs=2, batch=10), Mean(), cohort=3), 4 * 2 * total / 2),
        (Plan(Train(sgd(0.1), steps=3, batch=8), Mean()), 4 * 3 * 8 * 6),
        (Plan(Gradient(batch=8), Mean(), sgd(0.1)), 4 * 8 * 6),
        (Plan(Gradient(), Mean(), sgd(0.1), cohort=3), 4 * total / 2),
    ]:
        found = baselines.compare_baselines(ran("softmax", data, plan, 4))
        assert found["pooled"]["samples"] == pytest.approx(seen, rel=0.03), plan
        assert found["local"]["samples"] * 6 == pytest.approx(seen, rel=0.03), plan


def test_many_clients_are_drawn(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_CLIENTS", 20)
    x = torch.arange(150.0)[:, None] / 150
    data = arrays(x, (x[:, 0] > 0.5).long(), task="classification").split(60, IID())
    found = baselines.alone(ran("softmax", data, recipes.fedavg(0.5, cohort=2), 2))
    assert (found["clients"], found["population"]) == (20, 60)
    assert found["accuracy_models_min"] <= found["accuracy"] <= found["accuracy_models_max"]


def test_a_diverged_baseline_is_evaluated_at_its_last_model(digits):
    data = few(digits, clients=2)
    training = ran("softmax", data, recipes.fedavg(0.1, batch=5), 2)
    training.plan = recipes.fedavg(1e38, batch=5)
    found = baselines.compare_baselines(training)
    assert found["pooled"]["diverged"] in (0, 1)
    assert found["local"]["diverged"] == 2
    assert all(isinstance(v, (int, float)) for values in found.values() for v in plain(values).values())


@pytest.fixture(scope="module")
def opposite():
    """40 natural clients, y = ±x + noise; half of them have the opposite slope."""
    g = np.random.default_rng(7)
    parts = {}
    for client in range(40):
        x = g.normal(size=(20, 1))
        parts[f"c{client:02}"] = (x, (1 if client % 2 else -1) * x[:, 0] + 0.3 * g.normal(size=20))
    return federate(parts, held_out=0.25)


@pytest.mark.slow
def test_the_winner_flips_between_all_rows_and_own_rows(opposite):
    """One model fits no client; a local model fits its client, and is far off for half of the others."""
    training = ran("linear", opposite, recipes.fedavg(0.3, batch=None), 6, evaluate_every=6, numerics="lanes")
    found = baselines.compare_baselines(training) | baselines.compare_constants(training)
    federated, local = found["federated"], found["local"]
    assert federated["rmse"] < 0.9 * local["rmse"]
    assert federated["rmse_clients"] > 1.5 * local["rmse_clients"]
    assert (local["metric"], local["compared"]) == ("rmse", 40)
    assert local["federated_better"] < 10
    assert local["worst_difference"] < local["median_difference"] < 0
    assert federated["rmse"] < 1.1 * found["constant"]["rmse"]
    assert federated["samples"] == 6 * len(opposite.order) == 40 * local["samples"]
    assert federated["steps"] == local["steps"] == 6


@pytest.mark.parametrize("numerics", only(["loop"], ["lanes", "loop"]))
def test_own_rows_of_a_local_model_are_those_of_its_client(opposite, numerics):
    data = opposite.only(range(4))
    training = ran("linear", data, recipes.fedavg(0.1, batch=None), 3, evaluate_every=1, numerics=numerics)
    own = []
    for i in range(4):
        alone = ran("linear", data.only([i]), recipes.fedavg(0.1, batch=None), 3, evaluate_every=1, numerics=numerics)
        mine = data.held_order[data.held_offsets[i] : data.held_offsets[i + 1]]
        x, y = (t.float() for t in data.held_out.take(mine))
        with torch.no_grad():
            own.append(float((alone.model(x).reshape(-1) - y).square().mean()))
    found = baselines.alone(training)
    assert found["held_out_loss_clients"] == pytest.approx(np.mean(own), rel=1e-5)
    assert found["held_out_loss_min"] == pytest.approx(max(own), rel=1e-5)


def test_constants_of_all_rows_and_of_each_client(opposite):
    """The loss of a constant is the variance of the held-out rows plus the squared distance of the means."""
    training = ran("linear", opposite, recipes.fedavg(0.1), 1, evaluate_every=1, dtype="float64")
    found = baselines.compare_constants(training)
    train, held = opposite.rows.targets()[opposite.order].double(), opposite.held_out.targets().double()
    assert found["constant"]["held_out_loss"] == pytest.approx(float((held - train.mean()).square().mean()), rel=1e-9)
    means = torch.stack([some.mean() for some in train.split(opposite.sizes.tolist())])
    errors = (held - means[opposite.held_owner]).square()
    each = torch.stack([errors[opposite.held_owner == i].mean() for i in range(40)])
    assert found["constant_clients"]["held_out_loss"] == pytest.approx(float(errors.mean()), rel=1e-9)
    assert found["constant_clients"]["held_out_loss_clients"] == pytest.approx(float(each.mean()), rel=1e-9)
    assert found["constant"]["intervals"]["held_out_loss"][2] == len(held)


def test_missing_held_out_rows_are_the_reason_to_skip():
    data = load("diabetes").split(3, held_out=0)
    found = baselines.compare_baselines(ran("linear", data, recipes.gd(0.1)))
    assert list(found) == ["skipped"]
    assert "held_out" in found["skipped"]["reason"]


def test_the_run_stays_as_it_was(digits):
    training = ran("mlp", few(digits), recipes.fedavg(0.2), 2, numerics="loop")
    before, again = training.state.model.theta.clone(), baselines.compare_baselines(training)
    assert torch.equal(training.state.model.theta, before)
    assert baselines.compare_baselines(training) == again
