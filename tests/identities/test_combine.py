"""`Combine`: a user's function of all updates. The weighted mean equals `Mean`; chunk and order change no bit."""

import os

import pytest
import torch
from problems import classification, run, seeded, task_of
from quick_cases import one_in
from torch import nn

from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import parse
from atoll.compute import device
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Combine, Mean
from atoll.plan.aggregate import rows as rows_module
from atoll.plan.codec import Identity
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer import adam, sgd
from atoll.plan.pace import Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids, Population
from atoll.plan.registry import PARTS
from atoll.plan.sampler import Uniform, Weighted
from atoll.testing import check_aggregator, round_info

SIZES = (9, 5, 9, 3, 9, 5)
LOCAL = Train(sgd(0.1, momentum=0.5), epochs=2, batch=4)


def weighted(updates, weights):
    return weights @ updates / weights.sum()


def equal_mean(updates, weights):
    return updates.mean(0)


def median(updates, weights):
    ordered = updates.sort(0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def trained(rule, chunk=None, rounds=3, dtype=torch.float64, **slots):
    """The state and reports of a model with batch norm, so that buffers and counters are aggregated too."""
    data = classification(SIZES, dtype=dtype)
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    engine = InProcessEngine(task_of(module, data, "lanes", dtype), data, chunk)
    return run(Plan(LOCAL, rule, **slots), engine, rounds)


def given(rows, clients, repeats=None, weight=None):
    """The contribution of clients with these updates, and their starts."""
    n = len(rows)
    ids = Ids(torch.tensor(clients), torch.tensor(repeats or [0] * n))
    weight = torch.tensor(weight or [2] * n)
    return Contribution({"update": rows}, {"rows": weight}, weight, {}, {}), ids


def aggregated(rule, rows):
    total = rule.total(rule.fold(rule.zero(), *given(rows, list(range(len(rows))))))
    return rule.finalize(total, round_info()).means["update"]


@pytest.mark.parametrize(
    ("fn", "weights", "slots"),
    [
        (weighted, "examples", {"optimizer": adam(0.05, eps=1e-3)}),
        (equal_mean, "equal", {"optimizer": sgd(1.0, momentum=0.9), "cohort": 4}),
        (weighted, "examples", {"cohort": Weighted(3)}),
    ],
)
def test_the_weighted_mean_is_mean(fn, weights, slots):
    ours, our_reports = trained(Combine(fn, weights), **slots)
    theirs, their_reports = trained(Mean(weights), **slots)
    assert (ours.model.theta - theirs.model.theta).abs().max() < 1e-12
    assert (ours.model.buffers - theirs.model.buffers).abs().max() < 1e-12
    assert all(torch.equal(t, theirs.model.counters[n]) for n, t in ours.model.counters.items())
    for mine, other in zip(our_reports, their_reports, strict=True):
        assert mine.metrics == pytest.approx(other.metrics, rel=1e-10)
        assert (mine.arrived, mine.bytes_up) == (other.arrived, other.bytes_up)


@pytest.mark.parametrize("dtype", one_in(2, [torch.float32, torch.float64]))
def test_chunks_change_no_bit(dtype):
    states = [trained(Combine(median), chunk, 2, dtype)[0].model for chunk in (1, 3, None)]
    for state in states[1:]:
        assert torch.equal(state.theta, states[0].theta)
        assert torch.equal(state.buffers, states[0].buffers)


@pytest.mark.parametrize("rule", [Combine(weighted), Combine(median, weights="equal")], ids=["mean", "median"])
def test_the_contract(rule):
    """Order, grouping, processes and the wire change no bit."""
    check_aggregator(rule)


def test_rows_are_in_the_order_of_client_and_repeat():
    seen = []

    def look(updates, weights):
        assert updates.dtype == weights.dtype == torch.float64
        seen.append((updates[:, 0].tolist(), weights.tolist()))
        return updates[0]

    rule, rows = Combine(look), torch.tensor([[70.0], [21.0], [20.0], [30.0]])
    partial = rule.fold(rule.zero(), *given(rows, [7, 2, 2, 3], [0, 1, 0, 0], [5, 6, 7, 8]))
    rule.total(rule.merge(partial, rule.fold(rule.zero(), *given(torch.tensor([[10.0]]), [1], [0], [9]))))
    assert seen == [([10.0, 20.0, 21.0, 30.0, 70.0], [9.0, 7.0, 6.0, 8.0, 5.0])]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_the_median_of_each_coordinate(n):
    rows = torch.randn(n, 9, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    ours = aggregated(Combine(median), rows)
    columns = [sorted(column) for column in rows.T.tolist()]
    middle = [(column[(n - 1) // 2] + column[n // 2]) / 2 for column in columns]
    torch.testing.assert_close(ours, torch.tensor(middle, dtype=torch.float64), rtol=1e-15, atol=0)
    far = torch.cat([rows, torch.full((n - 1, 9), 1e9, dtype=torch.float64)])
    assert aggregated(Combine(median), far).max() <= rows.max()


def test_a_round_without_contributions_has_no_update():
    rule = Combine(median)
    assert rule.finalize(rule.total(rule.zero()), round_info()).means == {}


def test_draws_depend_on_no_generator():
    rule, rows = Combine(lambda updates, weights: torch.rand_like(updates[0])), torch.zeros(3, 5)
    before = torch.get_rng_state()
    first = aggregated(rule, rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(aggregated(rule, rows), first)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda u, w: u.copy_(u.flip(0))[0].clone(), "argument updates in"),
        (lambda u, w: u.sub_(u.mean(0)).sum(0), "argument updates in"),
        (lambda u, w: u.numpy().sort(axis=0) or u[1], "argument updates in"),
        (lambda u, w: w.div_(w.sum()) @ u, "argument weights in"),
        (lambda u, w: u.mean(0) * float("nan"), "5 of 5 numbers that are NaN"),
        (lambda u, w: u, r"shape \[3, 5\]"),
        (lambda u, w: u.mean(), r"shape \[\]"),
        (lambda u, w: u.median(0).indices, "int64"),
        (lambda u, w: u.median(0), "returned a median"),
        (lambda u, w: None, "returned a NoneType"),
        (lambda u, w: u @ torch.ones(7), r"raised RuntimeError.*test_combine\.py:\d+"),
    ],
)
def test_wrong_functions(fn, words):
    rows = torch.arange(15, dtype=torch.float32).flip(0).reshape(3, 5)
    with pytest.raises(RunError, match=words):
        aggregated(Combine(fn), rows)


def test_memory(monkeypatch):
    """More than half of the free memory is refused at the first contribution, by the expected cohort."""
    monkeypatch.setattr(rows_module, "available", lambda device: 1000)
    aggregated(Combine(median), torch.ones(12, 5))
    with pytest.raises(UsageError, match="13 updates of 5 numbers") as error:
        aggregated(Combine(median), torch.ones(13, 5))
    assert parse(error.value.line, PARTS) == Uniform(12)
    population, half = Population(40, torch.full((40,), 3)), torch.tensor(0.5, dtype=torch.float64)
    rule = Combine(median).bind(population, half)
    with pytest.raises(UsageError, match="20 updates of 5 numbers"):
        rule.fold(rule.zero(), *given(torch.ones(1, 5), [0]))
    monkeypatch.undo()
    free = device.available(torch.device("cpu"))
    if free is not None:
        assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Summed(Identity):
    """A codec that decodes the sum."""

    per_sum = True


@pytest.mark.parametrize(("slot", "part", "other"), [("pace", Buffered(3), Sync()), ("codec", Summed(), Identity())])
def test_sums_are_refused(slot, part, other):
    with pytest.raises(UsageError, match="the rule takes the update of each client") as error:
        Plan(Gradient(), Combine(median), **{slot: part})
    assert parse(error.value.line, PARTS) == other


def test_text():
    plan = Plan(Gradient(), Combine(median, weights="equal"), sgd(0.1))
    assert f"Combine({__name__}:median, weights='equal')" in repr(plan)
    assert parse(repr(plan), PARTS, trust=True) == plan
    with pytest.raises(UsageError):
        parse(repr(plan), PARTS)
    for wrong in (lambda: Combine("median"), lambda: Combine(median, weights="rows")):
        with pytest.raises(UsageError):
            wrong()
