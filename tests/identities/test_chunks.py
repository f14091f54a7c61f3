"""A chunk is a pure function of its clients, and a caller of `gather` may keep contributions."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from problems import COMPILED, classification, run, seeded, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.model_state import Model
from atoll.engine.chunks import chunks, kept_from_tensors, kept_to_tensors
from atoll.engine.client_state import Memory
from atoll.engine.contribution import contribute_chunk
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, TopK
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Ids
from atoll.plan.round import bind, close_round, open_round
from atoll.plan.state import State

SIZES = (9, 9, 7, 5)
MORE = classification((*SIZES, 6, 4))
DATA = MORE.only(torch.arange(len(SIZES)))


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))


def sgd_loop(model, loader, ctx):
    for x, y in loader:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


LOCALS = {
    "gradient": (Gradient(batch=4), "lanes"),
    "train": (Train(sgd(0.1), epochs=2, batch=4), "lanes"),
    "adam": (Train(adam(0.1), steps=3, batch=4), "lanes"),
    "loop": (Train(sgd(0.1), epochs=2, batch=4), "loop"),
    "fused": (Train(sgd(0.1), epochs=2, batch=4), "fused"),
    "custom": (Custom(sgd_loop, batch=4), "loop"),
}


def ids_of(clients, repeat=0):
    return Ids(torch.tensor(clients), torch.full((len(clients),), repeat))


def chunk(local, body, clients, repeat=0, data=DATA, model=None, on_step=None):
    task = task_of(mlp(), data, body)
    plan = bind(Plan(local, Mean()), InProcessEngine(task, data))
    broadcast = Broadcast(0, model or task.initial(), {"local": {}, "codec": {}})
    return contribute_chunk(plan, task, data, broadcast, ids_of(clients, repeat), Key(3), {}, on_step)


def update(*args, **words):
    return chunk(*args, **words).decoded.means["update"]


@pytest.mark.parametrize("name", LOCALS)
def test_draws_of_a_further_start_do_not_depend_on_the_number_of_clients(name):
    local, body = LOCALS[name]
    first, again = (update(local, body, (0, 1), repeat) for repeat in (0, 1))
    assert torch.equal(again, update(local, body, (0, 1), 1, MORE))
    assert not torch.equal(first, again)
    assert not torch.equal(again, update(local, body, (0, 1), 2))


def test_lanes_of_a_chunk_may_mix_repeats():
    local, body = LOCALS["train"]
    task, data = task_of(mlp(), DATA, body), DATA
    plan = bind(Plan(local, Mean()), InProcessEngine(task, data))
    broadcast = Broadcast(0, task.initial(), {"local": {}, "codec": {}})
    ids = Ids(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    mixed = contribute_chunk(plan, task, data, broadcast, ids, Key(3), {}).decoded.means["update"]
    assert torch.equal(mixed[:1], update(local, body, (0,)))
    assert torch.equal(mixed[1:], update(local, body, (0, 1), 1))


@pytest.mark.parametrize("name", ["gradient", "train", "adam", "custom"])
def test_lanes_may_start_at_different_models(name):
    local, body = LOCALS[name]
    task = task_of(mlp(), DATA, body)
    first, other = task.initial(), task.initial()
    other = other._replace(theta=other.theta + 0.1)
    both = Model(torch.stack([first.theta, other.theta]), first.buffers.repeat(2, 1), {}, {})
    together = update(local, body, (0, 1), model=both)
    each = [update(local, body, (client,), model=model) for client, model in ((0, first), (1, other))]
    assert torch.equal(together, torch.cat(each))


@pytest.mark.parametrize("name", ["gradient", "train", "adam", "loop", "fused"])
def test_each_step_is_reported_with_its_loss(name):
    local, body = LOCALS[name]
    steps = []
    got = chunk(local, body, (0, 2), on_step=lambda *step: steps.append(step))
    counts = {"gradient": (1, 1), "adam": (3, 3)}.get(name, (6, 4))
    assert [sum(lane == k for lane, _, _ in steps) for k in (0, 1)] == list(counts)
    assert [s for lane, s, _ in steps if lane == 1] == list(range(counts[1]))
    if name == "gradient":
        rows = got.contribution.sums["rows"].double()
        wanted = got.contribution.sums["loss"].double() / rows
        assert torch.allclose(torch.tensor([loss for *_, loss in steps]).double(), wanted)


def opened(plan, task, data, **words):
    engine = InProcessEngine(task, data, **words)
    plan = bind(plan, engine)
    state = State.first(plan, task, 0, Memory(plan.memory(task)))
    return engine, open_round(plan, state, engine)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_kept_contributions_add_up_to_the_mean(chunk):
    data = DATA
    task = task_of(mlp(), data, "lanes", torch.float64)
    plan = Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), codec=ErrorFeedback(TopK(0.3)))
    engine, start = opened(plan, task, data, chunk=chunk)
    gathered = engine.gather(start.plan, start.state, start.cohort, start.key, keep=range(len(SIZES)))
    closed = close_round(start, gathered)
    assert [k.client for k in gathered.kept] == list(range(len(SIZES)))
    total = sum(k.decoded.weight * k.decoded.means["update"][0] for k in gathered.kept)
    torch.testing.assert_close(closed.total.means["update"], total)
    assert any(not torch.equal(k.contribution.means["update"], k.decoded.means["update"]) for k in gathered.kept)
    plain = close_round(start, engine.gather(start.plan, start.state, start.cohort, start.key))
    assert torch.equal(plain.state.model.theta, closed.state.model.theta)
    for a, b in zip(kept_from_tensors(kept_to_tensors(list(gathered.kept))), gathered.kept, strict=True):
        assert a[:3] == b[:3] and torch.equal(a.decoded.means["update"], b.decoded.means["update"])


def test_a_client_that_did_not_arrive_cannot_be_kept():
    data = DATA
    engine, start = opened(recipes.fedavg(0.1, cohort=2), task_of(mlp(), data), data)
    absent = next(i for i in range(len(SIZES)) if i not in start.cohort.ids.tolist())
    with pytest.raises(UsageError, match=f"no contribution of client {absent} arrived in round 0"):
        engine.gather(start.plan, start.state, start.cohort, start.key, keep=(absent,))


def test_every_start_of_a_client_is_kept():
    """One client is fast, and starts several times in a round."""
    data = DATA
    task = task_of(mlp(), data)
    plan = Plan(Gradient(batch=2), Mean(), sgd(0.1), cohort=3, pace=Buffered(6))
    engine, start = opened(plan, task, data, fleet=Fleet(HalfNormal()))
    gathered = engine.gather(start.plan, start.state, start.cohort, start.key, keep=(2,))
    assert [(k.client, k.repeat) for k in gathered.kept] == [(2, repeat) for repeat in range(3)]
    assert gathered.arrived.tolist().count(2) == 3


def test_a_plan_keeps_no_engine_data_or_model_alive():
    data = atoll.data.load("digits").split(clients=5)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    plan = recipes.fedavg(0.1)
    training = atoll.rounds(net, data, plan, rounds=2)
    bound_plan = training.plan
    reports = list(training)
    dead = [
        weakref.ref(thing) for thing in (training.engine, training.evaluator, training.data, training.task.module, net)
    ]
    del training, data, net
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
    assert len(reports) == 2 and bound_plan == plan


def test_a_round_that_is_run_twice_gives_the_same_state():
    data = DATA
    task = task_of(mlp(), data)
    engine, start = opened(recipes.fedavg(0.1), task, data)
    ends = [close_round(start, engine.gather(start.plan, start.state, start.cohort, start.key)) for _ in range(2)]
    assert torch.equal(ends[0].state.model.theta, ends[1].state.model.theta)
    assert torch.equal(ends[0].state.model.theta, run(recipes.fedavg(0.1), engine, 1)[0].model.theta)


@pytest.mark.parametrize("body", ["fused", "lanes", "loop", COMPILED])
@pytest.mark.parametrize("buffers", [False, True])
def test_clients_of_different_widths_share_a_chunk_with_equal_bits(body, buffers):
    """14 clients of 14 sizes are few chunks, and every bit is that of one client after the other."""
    data = classification(tuple(range(3, 45, 3)))
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), *([nn.BatchNorm1d(3)] if buffers else [])))
    if buffers and body in ("fused", "compiled"):
        return  # not among their layers
    task, plan = task_of(model, data, body), Plan(Gradient(), Mean())
    (together, reports), (alone, others) = (run(plan, InProcessEngine(task, data, chunk)) for chunk in (None, 1))
    assert torch.equal(together.model.theta, alone.model.theta)
    assert torch.equal(together.model.buffers, alone.model.buffers)
    assert [r.metrics for r in reports] == [r.metrics for r in others]
    ids, down = ids_of(range(data.count)), torch.zeros(data.count, dtype=torch.int64)
    cut = list(chunks(bind(plan, InProcessEngine(task, data)), task, data, ids, down, None))
    assert len(cut) == (data.count if body == "loop" else 1)
    steps = bind(Plan(Train(sgd(0.1), epochs=1, batch=None), Mean()), InProcessEngine(task, data))
    assert len(list(chunks(steps, task, data, ids, down, 99))) > 10  # the steps of `Train` need one width
