"""Gradient descent, distributed gradient descent and federated averaging are one algorithm (identities 1, 2 and 3)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, far, federation, regression, run, seeded, task_of
from quick_cases import by_turns, only
from torch import nn

from atoll import recipes
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.local import Gradient, Train
from atoll.plan.plan import Plan

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}

dtypes = st.sampled_from(list(CLOSE))
bodies = st.sampled_from(["lanes", "loop"])
seeds = st.integers(0, 1000)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


MODELS = {
    "linear": (lambda: nn.Linear(4, 1), "mse"),
    "logistic": (lambda: nn.Linear(4, 1), "binary_cross_entropy"),
    "softmax": (lambda: nn.Linear(4, 3), "cross_entropy"),
    "mlp": (mlp, "cross_entropy"),
}


@st.composite
def problems(draw):
    """A model, all rows as one client, and the same rows split over clients in some way."""
    make, loss = MODELS[draw(st.sampled_from(list(MODELS)))]
    seed, dtype = draw(seeds), draw(dtypes)
    owners = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=2, max_size=30)))
    owners = owners.unique(return_inverse=True)[1]
    rows = [len(owners)]
    if loss == "mse":
        data = regression(rows, 4, seed, dtype)
    else:
        data = classification(rows, (4,), 2 if loss.startswith("binary") else 3, seed, dtype)
    split = federation(data.rows.x, data.rows.y, owners.bincount().tolist(), owners.argsort(stable=True))
    return (seeded(make, seed=seed), loss, dtype, draw(bodies)), data, split


def theta(problem, data, plan, rounds=2):
    module, loss, dtype, body = problem
    return run(plan, InProcessEngine(task_of(module, data, body, dtype, loss), data), rounds)[0].model.theta


SPLIT = [recipes.distributed_gd, recipes.fedsgd, lambda lr: recipes.distributed_gd(lr, sum="float")]


@given(problems(), st.sampled_from([0.01, 0.1]), st.sampled_from(SPLIT))
def test_gradient_descent_is_distributed_gradient_descent_for_any_split(drawn, lr, recipe):
    problem, data, split = drawn
    one = theta(problem, data, recipes.gd(lr))
    assert far(theta(problem, split, recipe(lr)), one) < CLOSE[one.dtype]


@given(problems())
def test_the_sum_is_the_mean_with_a_smaller_step(drawn):
    """Σ nᵢ gᵢ is the gradient of the summed loss: lr/n of it is a step of lr."""
    problem, data, split = drawn
    one = theta(problem, data, recipes.gd(0.1))
    summed = Plan(Gradient(), Sum(), rules.sgd(0.1 / len(data.order)))
    assert far(theta(problem, split, summed), one) < CLOSE[one.dtype]


ONE_STEP = [
    lambda lr: recipes.fedavg(lr, batch=None),
    lambda lr: recipes.fedavg(lr, batch=10**6),
    lambda lr: Plan(Train(rules.sgd(lr), steps=1), Mean()),
]


@given(problems(), st.sampled_from([0.01, 0.1]), st.sampled_from(ONE_STEP))
def test_fedavg_of_one_full_step_is_distributed_gradient_descent(drawn, lr, recipe):
    problem, _, split = drawn
    distributed = theta(problem, split, recipes.distributed_gd(lr))
    assert far(theta(problem, split, recipe(lr)), distributed) < CLOSE[distributed.dtype]


# The optimizer of atoll, and its counterpart in torch.
OPTIMIZERS = [
    (rules.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (rules.sgd(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
    (
        rules.sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    (rules.adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    (rules.adamw(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
]


def one_pass(key, epoch, rows, batch):
    """The batches of client 0 in one pass over its rows: row numbers in the keyed order."""
    return key.of(torch.tensor([0]), torch.tensor([epoch])).permutation(rows)[0].split(batch)


def by_hand(module, data, make, orders, dtype, fresh):
    """Local SGD as a plain loop: `orders` has, for each round, its batches of row numbers."""
    module = copy.deepcopy(module).to(dtype)
    optimizer = make(module.parameters())
    for batches in orders:
        if fresh:
            optimizer = make(module.parameters())
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(module(data.rows.x[rows].to(dtype)), data.rows.y[rows]).backward()
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("optimizer", only(OPTIMIZERS[:3:2], OPTIMIZERS), ids=lambda pair: repr(pair[0]))
@settings(max_examples=8)
@given(seeds, st.integers(2, 25), st.integers(1, 8), st.integers(1, 3), dtypes, bodies)
def test_fedavg_of_one_client_is_local_sgd(optimizer, seed, rows, batch, epochs, dtype, body):
    ours, theirs = optimizer
    data, module = classification([rows], seed=seed, dtype=dtype), seeded(mlp, seed=seed)
    plan = Plan(Train(ours, epochs=epochs, batch=batch), Mean())
    state, _ = run(plan, InProcessEngine(task_of(module, data, body, dtype), data), 2, seed)

    keys = [Key(seed).fold("round", r, "clients", "local", "order") for r in range(2)]
    orders = [[piece for e in range(epochs) for piece in one_pass(key, e, rows, batch)] for key in keys]
    assert far(state.model.theta, by_hand(module, data, theirs, orders, dtype, fresh=True)) < CLOSE[dtype]


@pytest.mark.parametrize("optimizer", only(OPTIMIZERS[1:4:2], OPTIMIZERS), ids=lambda pair: repr(pair[0]))
@settings(max_examples=8)
@given(seeds, st.integers(2, 25), st.integers(1, 8), st.integers(1, 7), dtypes, bodies)
def test_rounds_do_not_interrupt_kept_state(optimizer, seed, rows, batch, steps, dtype, body):
    """Three rounds of `steps` batches with `keep` equal one training of 3·steps: optimizer and order continue."""
    ours, theirs = optimizer
    data, module = classification([rows], seed=seed, dtype=dtype), seeded(mlp, seed=seed)
    plan = Plan(Train(ours, steps=steps, batch=batch, keep=("optimizer", "order")), Mean())
    state, _ = run(plan, InProcessEngine(task_of(module, data, body, dtype), data), 3, seed)

    key, batches, epoch = Key(seed).fold("kept order"), [], 0
    while len(batches) < 3 * steps:
        batches += one_pass(key, epoch, rows, batch)
        epoch += 1
    expected = by_hand(module, data, theirs, [batches[: 3 * steps]], dtype, fresh=False)
    assert far(state.model.theta, expected) < CLOSE[dtype]


@given(seeds, st.integers(2, 40), st.integers(1, 50), dtypes, bodies)
def test_sgd_takes_the_first_rows_of_a_keyed_order(seed, rows, batch, dtype, body):
    data, module = classification([rows], seed=seed, dtype=dtype), seeded(mlp, seed=seed)
    state, _ = run(recipes.sgd(0.1, batch), InProcessEngine(task_of(module, data, body, dtype), data), 3, seed)
    keys = [Key(seed).fold("round", r, "clients", "local", "order") for r in range(3)]
    orders = [[key.of(torch.tensor([0])).permutation(rows)[0, :batch]] for key in keys]
    expected = by_hand(module, data, lambda p: torch.optim.SGD(p, 0.1), orders, dtype, fresh=True)
    assert far(state.model.theta, expected) < CLOSE[dtype]


@pytest.mark.parametrize(("statistics", "body"), by_turns([True, False], ["lanes", "loop"]))
def test_a_large_client_in_many_passes_is_one_gradient(monkeypatch, body, statistics):
    """For any number of passes over the rows of a client, no pass is short of rows, and their mean is the gradient."""
    norm = nn.BatchNorm1d(6) if statistics else nn.Identity()
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)))
    for rows in (60, 64, 65, 66, 71, 73, 131):
        data = classification([rows, 9])
        whole = run(recipes.gd(0.1), InProcessEngine(task_of(module, data, body), data), 2)[0].model
        with monkeypatch.context() as patch:
            patch.setattr("atoll.compute.batches.ROWS", 8)
            pieces = run(recipes.gd(0.1), InProcessEngine(task_of(module, data, body), data), 2)[0].model
            assert pieces.theta.isfinite().all()
            if not statistics:
                assert far(pieces.theta, whole.theta) < 1e-12
