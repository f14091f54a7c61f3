"""FedAsync: clients send their models, and the server mixes each into its own when it arrives."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import far, regression, run, seeded, task_of
from quick_cases import by_turns, one_in
from torch import nn

from atoll import recipes
from atoll.base import grammar
from atoll.base.errors import UsageError
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Each, Fleet, HalfNormal
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import EF21, ErrorFeedback, Quantize, TopK
from atoll.plan.local import Custom, Train
from atoll.plan.pace import Bounded, Buffered, Sync, hinge, staleness_polynomial
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS
from atoll.plan.round import bind, step
from atoll.plan.schedule import cosine
from atoll.plan.state import State
from atoll.runs.checkpoint import state_from_tensors, state_to_tensors

SIZES = (9, 5, 7, 4)
DURATIONS = (1.0, 2.3, 0.21, 1.7)
MODEL = Train(rules.sgd(0.1), epochs=1, sends="model")
LATE = [staleness_polynomial(0.5), staleness_polynomial(0), hinge(10.0, grace=1)]


def engine_of(durations=DURATIONS, fleet=None):
    data = regression(SIZES)
    fleet = fleet or Fleet(Each(durations))
    return InProcessEngine(task_of(seeded(nn.Linear, 3, 1), data, "fused"), data, None, fleet)


def trained(engine, client, theta, lr, steps):
    """θᵢ: some steps of gradient descent on all rows of a client."""
    data = engine.data
    x, y = data.take(data.client_rows(client))
    x, y = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y.reshape(-1)
    for _ in range(steps):
        theta = theta - lr * 2 * x.T @ (x @ theta - y) / len(x)
    return theta


def by_hand(engine, lr, steps, alpha, staleness, rounds, k=1):
    """Algorithm 1 as a list of events: the server mixes in the first arrival, and that client restarts from the result.

    x ← (1 − α s(τ)) x + α s(τ) xᵢ for one arrival at a time; for k arrivals the mean of the mixtures, weighted by rows.
    """
    theta, born = engine.task.initial().theta, [0] * len(DURATIONS)
    began = [theta] * len(DURATIONS)
    due = [(d, i) for i, d in enumerate(DURATIONS)]
    rows = engine.data.sizes.tolist()
    for t in range(rounds):
        came, again = [], None
        while len(came) < k:
            if again is not None:
                began[again], born[again] = theta, t
            due.sort()
            now, client = due.pop(0)
            came.append(
                (trained(engine, client, began[client], lr, steps), alpha(t) * staleness(t - born[client]), client)
            )
            due.append((now + DURATIONS[client], client))
            again = client
        whole = sum(rows[c] for *_, c in came)
        theta = sum(rows[c] / whole * ((1 - a) * theta + a * model) for model, a, c in came)
        began[again], born[again] = theta, t + 1
    return theta


@pytest.mark.parametrize(
    ("alpha", "staleness"), one_in(2, by_turns([0.6, 1.0, cosine(0.9, rounds=10, end=0.1)], LATE)), ids=repr
)
def test_fedasync_is_the_one_done_by_hand(alpha, staleness):
    plan = recipes.fedasync(0.05, epochs=2, batch=None, alpha=alpha, staleness=staleness)
    engine = engine_of()
    state, reports = run(plan, engine, 25)
    assert max(int(r.clients["staleness"]) for r in reports) > 3
    expected = by_hand(engine, 0.05, 2, alpha if callable(alpha) else lambda t: alpha, staleness, 25)
    assert far(state.model.theta, expected) < 1e-12
    other = replace(plan, local=replace(plan.local, sends="update"))
    assert far(run(other, engine_of(), 25)[0].model.theta, expected) > 1e-3


@pytest.mark.parametrize("k", one_in(2, [2, 5]))
def test_models_of_a_buffer_are_mixed_by_rows(k):
    plan = recipes.fedasync(0.05, epochs=2, batch=None, alpha=0.7)
    engine = engine_of()
    state, _ = run(replace(plan, pace=Buffered(k)), engine, 12)
    assert far(state.model.theta, by_hand(engine, 0.05, 2, lambda t: 0.7, staleness_polynomial(0.5), 12, k)) < 1e-12


def test_without_a_discount_alpha_1_gives_the_last_model():
    plan = recipes.fedasync(0.05, epochs=3, batch=None, alpha=1.0, staleness=staleness_polynomial(0))
    engine = engine_of()
    plan, state = bind(plan, engine), State.first(plan, engine.task, 0, Memory({}))
    for _ in range(15):
        births = {f.client: state.versions[f.version] for f in state.air.flights}
        before = state.broadcast
        state, report = step(plan, state, engine)
        client = int(report.clients["id"])
        began = births.get(client, before).model.theta
        assert far(state.model.theta, trained(engine, client, began, 0.05, 3)) < 1e-12


@settings(max_examples=6)
@given(st.sampled_from([Mean(), Mean(weights="equal"), Mean(sum="float"), Sum(weights="equal")]), st.integers(0, 99))
def test_without_lateness_models_and_updates_give_equal_bits(rule, seed):
    plans = [Plan(Train(rules.adam(0.01), epochs=1, batch=3, sends=s), rule, cohort=3) for s in ("update", "model")]
    (a, one), (b, other) = (run(plan, engine_of(), 3, seed) for plan in plans)
    assert a.model.theta.numpy().tobytes() == b.model.theta.numpy().tobytes()
    assert [r.fingerprint for r in one] == [r.fingerprint for r in other]
    assert [(r.bytes_up, r.metrics) for r in one] == [(r.bytes_up, r.metrics) for r in other]


@pytest.mark.parametrize("pace", [Sync(), Buffered(1, staleness_polynomial(0)), Bounded(2)], ids=repr)
def test_a_sent_model_is_trained_from_the_model_that_was_received(pace):
    """Under a compressed downlink clients start at θ̂, not θ. With α = 1 the new model is still the mean of theirs."""
    part = Train(rules.sgd(0.05), steps=2, sends="model")
    plan = Plan(part, Mean(), pace=pace, downlink=TopK(0.5))
    engine = engine_of()
    plan, state = bind(plan, engine), State.first(plan, engine.task, 0, Memory({}))
    apart = 0.0
    for _ in range(8):
        births = {f.client: state.versions[f.version].model.theta for f in state.air.flights}
        before = state.model.theta
        state, report = step(plan, state, engine)
        apart = max(apart, far(state.sent.theta, before))
        ids = report.clients["id"].tolist()
        rows = [int(engine.data.sizes[i]) for i in ids]
        models = [trained(engine, i, births.get(i, state.sent.theta), 0.05, 2) for i in ids]
        mean = sum(n * m for n, m in zip(rows, models, strict=True)) / sum(rows)
        assert far(state.model.theta, mean) < 1e-12
    assert apart > 1e-3


@pytest.mark.parametrize("codec", one_in(2, [ErrorFeedback(TopK(0.5)), Quantize(8)]), ids=repr)
def test_a_run_of_models_that_is_resumed_in_flight_ends_in_the_same_bits(codec):
    plan = replace(recipes.fedasync(0.05, batch=3, cohort=3), codec=codec, downlink=TopK(0.5))
    engine = engine_of(fleet=Fleet(HalfNormal(), dropout=0.1))
    plan = bind(plan, engine)
    state, _ = run(plan, engine, 9)
    saved, kept = state_to_tensors(state), state.memory.take(torch.arange(len(SIZES)))
    fresh = State.first(plan, engine.task, 0, Memory(plan.memory(engine.task)))
    again = state_from_tensors(saved, state.round, fresh)
    again.memory.put(torch.arange(len(SIZES)), kept)
    for _ in range(6):
        state, _ = step(plan, state, engine)
        again, _ = step(plan, again, engine)
    assert state.model.theta.numpy().tobytes() == again.model.theta.numpy().tobytes()


@dataclass(frozen=True, repr=False)
class Median(Mean):
    """An example of a rule that forms no sum."""

    linear = False


def halfway(model, loader, ctx):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def test_a_users_own_loop_may_send_its_model_too():
    """Each client halves its model. With α = 1 the server's model is then the sent model, for every staleness."""
    part = Custom(halfway, sends="model")
    plan = Plan(part, Mean(), pace=Buffered(1, staleness_polynomial(0)))
    engine = engine_of(durations=(1.0, 1.5, 2.2, 3.1))
    theta = engine.task.initial().theta
    state, _ = run(plan, engine, 1)
    assert far(state.model.theta, theta / 2) < 1e-12
    state, (*_, report) = run(plan, engine, 2)
    assert int(report.clients["staleness"]) == 1 and far(state.model.theta, theta / 2) < 1e-12


def test_it_reads_back():
    plan = recipes.fedasync(0.1, cohort=10, alpha=cosine(0.9, rounds=100, end=0.1), staleness=hinge(10, grace=4))
    assert grammar.parse(repr(plan), PARTS) == plan
    buffered = recipes.fedbuff(0.1, cohort=100, k=5, server_lr=0.7)
    assert grammar.parse(repr(buffered), PARTS) == buffered
    assert buffered.pace == Buffered(5) and buffered.local.sends == "update"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Train(rules.sgd(0.1), epochs=1, sends="models"),
        lambda: recipes.fedasync(0.1, alpha=0.0),
        lambda: recipes.fedasync(0.1, alpha=1.5),
        lambda: Plan(MODEL, Mean(), codec=EF21(TopK(0.1))),
        lambda: Plan(MODEL, Median()),
    ],
)
def test_invalid_values_are_refused_with_a_line_that_builds(make):
    with pytest.raises(UsageError) as refusal:
        make()
    names = {**PARTS, "fedasync": recipes.fedasync}
    assert grammar.parse(refusal.value.line, names) is not None
