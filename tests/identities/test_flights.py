"""Asynchronous rounds: flights in progress, starts, staleness weights, and equal flights after a resume."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import classification, far, regression, run, seeded, task_of
from quick_cases import by_turns, one_in, only
from torch import nn

import atoll
from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.base.random import Key
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Each, Fleet, HalfNormal, Trace
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, Quantize, TopK
from atoll.plan.in_flight import Flight, split_repeats
from atoll.plan.local import Gradient, Train
from atoll.plan.pace import Bounded, Buffered, Sync, hinge, staleness_polynomial
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Sampler
from atoll.plan.registry import PARTS
from atoll.plan.round import bind, step
from atoll.plan.sampler import Everyone, Uniform, Weighted
from atoll.plan.state import State
from atoll.runs.checkpoint import state_from_tensors, state_to_tensors

SIZES = (9, 5, 5, 3, 7, 4, 8, 6)
KEEPING = Train(rules.adam(0.01), steps=2, batch=3, keep=("optimizer", "order"))
FLEETS = [None, Fleet(HalfNormal(), dropout=0.2, server="10 kB/s", uplink="2 kB/s")]
paces = st.one_of(
    st.builds(Buffered, st.integers(1, 7)),
    st.builds(Bounded, st.integers(0, 4)),
    st.builds(Sync, st.sampled_from([1.0, 1.5])),
)


def engine_of(fleet=None, chunk=None, sizes=SIZES, body="fused"):
    data = regression(sizes)
    module = seeded(nn.Linear, 3, 1)
    return InProcessEngine(task_of(module, data, body), data, chunk, fleet)


def first(plan, engine, seed=0):
    return State.first(plan, engine.task, seed, Memory(plan.memory(engine.task)))


def bits(state):
    kept = state.memory.take(torch.arange(len(SIZES)))
    named = {
        **state_to_tensors(replace(state, air=state.air._replace(clock=None))),
        **{f"kept/{n}": t for n, t in kept.items()},
    }
    return {n: t.numpy().tobytes() for n, t in named.items()}


def log(reports):
    return [(r.now, r.trips, r.clients["id"].tolist(), r.failures) for r in reports]


@pytest.mark.parametrize(
    ("cohort", "local", "fleet"), by_turns([Everyone(), Uniform(4), Weighted(3)], [Gradient(), KEEPING], FLEETS)
)
def test_bounded_0_is_sync_bit_for_bit(local, cohort, fleet):
    sync = Plan(local, Mean(), rules.sgd(0.05, momentum=0.5), cohort, max_failed=1)
    plans = (sync, replace(sync, pace=Bounded(0)))
    (a, reports), (b, others) = (run(plan, engine_of(fleet), 5) for plan in plans)
    same = [n for n in bits(a) if not n.startswith("air")]
    assert [bits(a)[n] for n in same] == [bits(b)[n] for n in same]
    assert [r.fingerprint for r in reports] == [r.fingerprint for r in others]


def by_hand(engine, k, durations, lr, rounds, staleness):
    """Asynchronous gradient descent as a list of events: the first to finish updates θ and restarts from it."""
    x, y = engine.data.rows.take(engine.data.order)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    y = y.reshape(-1)
    start, end = engine.data.offsets[:-1].tolist(), engine.data.offsets[1:].tolist()
    theta = engine.task.initial().theta
    work = [(d, i, i, theta, 0) for i, d in enumerate(durations)]  # time, order of start, client, θ, version
    number, buffer = len(work), []
    for t in range(rounds):
        while len(buffer) < k:
            work.sort()
            now, _, client, old, born = work.pop(0)
            rows = slice(start[client], end[client])
            gradient = 2 * x[rows].T @ (x[rows] @ old - y[rows]) / (end[client] - start[client])
            buffer.append((gradient * staleness(t - born), end[client] - start[client]))
            if len(buffer) < k:
                work.append((now + durations[client], number, client, theta, t))
                number += 1
        theta = theta - lr * sum(g * w for g, w in buffer) / sum(w for _, w in buffer)
        buffer = []
        work.append((now + durations[client], number, client, theta, t + 1))
        number += 1
    return theta


@pytest.mark.parametrize(
    ("staleness", "k"),
    by_turns([staleness_polynomial(0.5), staleness_polynomial(0), hinge(1.0, grace=1)], [1, 2, 5]),
    ids=repr,
)
def test_an_asynchronous_run_is_the_one_done_by_hand(k, staleness):
    """The durations have no common multiple. One client is faster by more than a whole buffer."""
    durations = (1.0, 2.3, 0.21, 1.7)
    engine = engine_of(Fleet(Each(durations)), sizes=SIZES[:4])
    plan = Plan(Gradient(), Mean(), rules.sgd(0.05), pace=Buffered(k, staleness=staleness))
    state, _ = run(plan, engine, 12)
    assert far(state.model.theta, by_hand(engine, k, durations, 0.05, 12, staleness)) < 1e-12


def test_one_at_a_time_and_three_rounds_late_halves_the_step():
    """Four workers of one speed under Buffered(1): (1 + 3)^−½."""
    engine = engine_of(sizes=SIZES[:4])
    whole, half = (
        Plan(Gradient(), Mean(), rules.sgd(0.1), pace=Buffered(1, staleness=staleness_polynomial(p)))
        for p in (0.0, 0.5)
    )
    state = first(half, engine)
    for _ in range(6):
        state, report = step(half, state, engine)
    assert report.clients["staleness"].tolist() == [3]
    (a, _), (b, _) = step(whole, state, engine), step(half, state, engine)
    before = state.model.theta
    assert far(b.model.theta - before, 0.5 * (a.model.theta - before)) < 1e-14


@dataclass(frozen=True)
class Only(Sampler):
    """A cohort of one certain client."""

    client: int

    def __call__(self, population, round, key):
        return Cohort(torch.tensor([self.client]), torch.ones((), dtype=torch.float64))


class Watched:
    """The participating clients, replayed from the reports' trips."""

    def __init__(self):
        self.spans = {}

    def take(self, trips):
        for trip in trips:
            self.spans.setdefault(trip.client, []).append((trip.start, trip.end))

    def overlap(self):
        for spans in self.spans.values():
            for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
                yield start < end


@given(paces, st.integers(1, 8), st.integers(0, 99), st.sampled_from([*FLEETS[1:], Fleet(HalfNormal(per="flight"))]))
def test_each_client_works_once_at_a_time_and_none_is_missing(pace, n, seed, fleet):
    asked = pace.cohort_size(n)
    if asked > len(SIZES):
        return
    plan = Plan(Gradient(batch=2), Mean(), rules.sgd(0.01), cohort=n, pace=pace, max_failed=1.0)
    engine, watched = engine_of(fleet), Watched()
    state = first(plan, engine, seed)
    for _ in range(8):
        state, report = step(plan, state, engine)
        watched.take(report.trips)
        busy = [f.client for f in state.air.flights]
        assert len(busy) == len(set(busy))
        assert report.arrived <= asked if pace.replaces_arrivals is False else report.arrived <= pace.k
        if isinstance(pace, Buffered):
            assert len(busy) == n - 1 and report.arrived == pace.k  # the last to arrive is replaced next round
        if isinstance(pace, Sync):
            assert not busy and report.arrived + report.late + len(report.failures) == asked
        assert set(state.versions) == {f.version for f in state.air.flights}
    assert not any(watched.overlap())


@given(st.integers(0, 4), st.integers(0, 99))
def test_ages_are_bounded(s, seed):
    """While the oldest flight is in progress, each client starts at most s times."""
    plan = Plan(Gradient(), Mean(), rules.sgd(0.01), pace=Bounded(s))
    engine = engine_of(Fleet(HalfNormal(per="flight")))
    state, starts = first(plan, engine, seed), []
    for t in range(8):
        before = {f.number for f in state.air.flights}
        state, report = step(plan, state, engine)
        starts += [(trip.client, trip.version) for trip in report.trips if trip.number not in before]
        begun = starts + [(f.client, f.version) for f in state.air.flights]
        oldest = min((f.version for f in state.air.flights), default=t)
        for client in range(len(SIZES)):
            assert sum(1 for c, birth in set(begun) if c == client and birth > oldest) <= s


@pytest.mark.parametrize(
    ("pace", "body"), one_in(2, by_turns([Sync(1.5), Buffered(3), Buffered(11), Bounded(2)], ["lanes", "loop"]))
)
def test_chunks_change_no_bit_and_no_event(pace, body):
    plan = Plan(KEEPING, Mean(), rules.sgd(0.5), cohort=5, codec=ErrorFeedback(TopK(0.5)), pace=pace, max_failed=1)
    (a, reports), (b, others) = (run(plan, engine_of(FLEETS[1], chunk, body=body), 6) for chunk in (None, 2))
    assert bits(a) == bits(b) and log(reports) == log(others)


@pytest.mark.parametrize(
    ("pace", "cohort"), one_in(2, by_turns([Bounded(2), Sync(), Buffered(3), Buffered(11)], [5, None]))
)
def test_a_state_saved_in_flight_resumes_with_equal_bits(pace, cohort):
    plan = Plan(KEEPING, Mean(), rules.sgd(0.5), cohort, ErrorFeedback(TopK(0.5)), pace, Quantize(8), max_failed=1)
    engine = engine_of(FLEETS[1])
    plan = bind(plan, engine)
    state, _ = run(plan, engine, 4)
    saved = {n: t.clone() for n, t in state_to_tensors(state).items()}
    kept = state.memory.take(torch.arange(len(SIZES)))
    again = first(plan, engine)
    again = state_from_tensors(saved, state.round, again)
    again.memory.put(torch.arange(len(SIZES)), kept)
    for _ in range(5):
        state, report = step(plan, state, engine)
        again, other = step(plan, again, engine)
        assert (report.fingerprint, log([report])) == (other.fingerprint, log([other]))
    assert bits(state) == bits(again)


def test_a_run_that_is_resumed_in_flight_ends_in_the_same_bits(tmp_path):
    data = atoll.data.load("digits").split(clients=20)
    plan = atoll.recipes.fedavg(lr=0.1, batch=10)
    plan = replace(plan, cohort=8, pace=Buffered(3), codec=ErrorFeedback(TopK(0.1)), downlink=TopK(0.2))
    how = {"out": tmp_path, "report": False, "checkpoint_s": 0.0, "evaluate_every": 0}
    how["fleet"] = "Fleet(HalfNormal(), server='1 Mb/s', dropout=0.1)"
    whole = atoll.train("softmax", data, plan, rounds=9, **how)
    half = atoll.train("softmax", data, plan, rounds=4, **how)
    rest = atoll.train("softmax", data, plan, rounds=9, resume=half.path, **how)
    assert [r.fingerprint for r in (*half.reports, *rest.reports)] == [r.fingerprint for r in whole.reports]
    assert log((*half.reports, *rest.reports)) == log(whole.reports)


def test_client_memory_changes_once_for_each_arrival():
    """Twelve contributions from three clients in one round: each starts from the client's state after the last."""
    plan = Plan(KEEPING, Mean(), pace=Buffered(12))
    engine = engine_of(Fleet(Each((1.0, 0.4, 0.7))), sizes=SIZES[:3])
    state, reports = run(plan, engine, 4)
    arrivals = torch.zeros(3, dtype=torch.int64)
    for report in reports:
        arrivals += torch.bincount(report.clients["id"], minlength=3)
    assert arrivals.sum() == 48
    assert (state.memory.take(torch.arange(3))["local/taken"] == 2 * arrivals).all()


@pytest.mark.parametrize("local", [Gradient(batch=2), Train(rules.sgd(0.1), steps=1, batch=2)], ids=repr)
def test_a_second_start_in_one_round_draws_new_numbers(local):
    plan = Plan(local, Mean(), pace=Buffered(2))
    engine = engine_of(Fleet(Each((1.0,))), sizes=(30,))
    _, (report,) = run(plan, engine, 1)
    assert report.clients["id"].tolist() == [0, 0]
    assert report.clients["loss"][0] != report.clients["loss"][1]


def test_waves_keep_a_clients_order():
    flights = [Flight(c, 0, 0, n) for n, c in enumerate([3, 1, 3, 3, 1])]
    assert [[f.number for f in wave] for wave in split_repeats(reversed(flights))] == [[0, 1], [2, 4], [3]]


# time


@pytest.mark.slow
@pytest.mark.parametrize("pace", only([Buffered(1)], [Buffered(1), Bounded(5)]), ids=repr)
def test_a_straggler_costs_the_fast_ones_little(pace):
    """One of four workers takes five times as long: the three others reach nine tenths of their full throughput."""
    engine = engine_of(Fleet(Each((1.0, 1.0, 1.0, 5.0))), sizes=SIZES[:4])
    _, reports = run(Plan(Gradient(), Mean(), rules.sgd(0.01), pace=pace), engine, 100)
    fast = sum(int((r.clients["id"] < 3).sum()) for r in reports)
    assert fast / reports[-1].now >= 0.9 * 3


def test_over_selection_and_deadlines_close_when_they_say():
    fleet = Fleet(Each((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)))
    plan = Plan(Gradient(), Mean(), rules.sgd(0.01), cohort=4, pace=Sync(over_select=2.0))
    _, (report,) = run(plan, engine_of(fleet), 1)
    assert (report.now, report.cohort, report.arrived, report.late) == (4.0, 8, 4, 4)
    found = {Sync(deadline_s=2.5): (2.5, 2), Sync(deadline_s=2.5, quorum=0.5): (4.0, 4), Sync(deadline_s=9): (8.0, 8)}
    for pace, expected in found.items():
        _, (report,) = run(Plan(Gradient(), Mean(), rules.sgd(0.01), pace=pace), engine_of(fleet), 1)
        assert (report.now, report.arrived) == expected
        assert report.late == 8 - report.arrived


def test_a_late_client_keeps_its_memory():
    plan = Plan(KEEPING, Mean(), pace=Sync(deadline_s=2.5))
    state, (report,) = run(plan, engine_of(Fleet(Each(tuple(map(float, range(1, 9)))))), 1)
    assert state.memory.touched().tolist() == report.clients["id"].tolist() == [0, 1]


# downlink


def test_the_downlink_moves_by_the_output_of_its_codec():
    """θ̂ moves by the codec's output for θ − θ̂, and a fine codec loses almost nothing."""
    plan = Plan(Gradient(), Mean(), rules.sgd(0.1), downlink=TopK(0.25))
    engine = engine_of()
    state, _ = run(plan, engine, 1)
    known, theta = state.sent.theta, state.model.theta
    after, _ = step(bind(plan, engine), state, engine)
    moved = after.sent.theta - known
    assert int((moved != 0).sum()) == 1  # a quarter of four
    largest = (theta - known).abs().argmax()
    assert far(moved[largest], (theta - known)[largest]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("codec", only([TopK(0.25)], [TopK(0.25), Quantize(8)]), ids=repr)
def test_a_compressed_downlink_reaches_least_squares(codec):
    """The downlink includes the lost part in later messages: at a constant step θ̂ reaches the optimum itself."""
    engine = engine_of(sizes=(6, 6, 6, 6))
    plan = Plan(Gradient(), Mean(), rules.sgd(0.2), downlink=codec)
    x, y = engine.data.rows.take(engine.data.order)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(x, y.reshape(-1, 1)).solution[:, 0]
    state, _ = run(plan, engine, 200)
    assert far(state.model.theta, best) < 1e-6


def test_a_client_that_missed_rounds_receives_the_difference_or_the_model():
    sizes = (4,) * 40
    data = regression(sizes, features=199)
    engine = InProcessEngine(task_of(seeded(nn.Linear, 199, 1), data), data)
    plan = Plan(Gradient(), Mean(), rules.sgd(0.001), cohort=10, downlink=TopK(0.1))
    plan = bind(plan, engine)
    state, known, deltas = first(plan, engine), {}, []
    whole = state.model.theta.numel() * 8
    for t in range(12):
        state, report = step(plan, state, engine)
        if t:
            payload, side, _, _ = plan.downlink.encode(state.sent.theta[None], {}, {}, Key(0))
            deltas.append(int(plan.downlink.sizes(payload, side)[0]))
        for client, down in zip(report.clients["id"].tolist(), report.clients["bytes_down"].tolist(), strict=True):
            missing = sum(deltas[known[client] :]) if client in known else whole
            assert down == min(whole, missing)
            known[client] = t
        assert sum(state.sent.deltas) <= whole
        assert report.bytes_down == int(report.clients["bytes_down"].sum())


# Refusals


REFUSED = [
    "Plan(Gradient(), Mean(over='expected'), cohort=5, pace=Buffered(2))",
    "Plan(Gradient(), Mean(over='expected'), cohort=5, pace=Sync(1.5))",
    "Plan(Gradient(), Mean(), cohort=Poisson(0.5), pace=Bounded(2))",
    "Plan(Gradient(), Mean(), cohort=Everyone(), pace=Sync(1.3))",
    "Plan(Gradient(), Mean(), pace=Sync(deadline_s=5, partial=True))",
    "Plan(Gradient(), Mean(), downlink=ErrorFeedback(TopK(0.1)))",
    "Plan(Gradient(), Mean(), downlink=ErrorFeedback(TopK(0.1)) >> Quantize(8))",
    "Plan(Gradient(), Mean(), downlink=LowRank(2))",
    "Plan(Gradient(), Mean(), downlink=ErrorFeedback(LowRank(2)) >> Entropy())",
    "Plan(Gradient(), Mean(), downlink=RandomK(0.1))",
    "Buffered(0)",
    "Buffered(2.5)",
    "Buffered(10, staleness=0.5)",
    "Bounded(-1)",
    "Sync(0.9)",
    "Sync(quorum=0.8)",
    "Sync(partial=True)",
    "Sync(deadline_s=0)",
    "Sync(deadline_s=5, quorum=1.5)",
    "hinge(-1.0)",
    "staleness_polynomial(-0.5)",
]


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_a_line_that_builds(text):
    with pytest.raises(UsageError) as refusal:
        parse(text, PARTS)
    parse(refusal.value.line, PARTS)  # of a plan: the whole plan, with another part


def test_a_deadline_needs_a_clock_and_a_client_that_can_meet_it():
    data = classification(SIZES)
    plan = Plan(Gradient(), Mean(), rules.sgd(0.1), pace=Sync(deadline_s=0.5))
    with pytest.raises(UsageError, match="without a clock"):
        atoll.rounds("softmax", data, plan, rounds=1)
    with pytest.raises(UsageError, match="no client can meet") as refusal:
        atoll.rounds("softmax", data, plan, rounds=1, fleet=Fleet())
    better = replace(plan, pace=parse(refusal.value.line, PARTS))
    assert atoll.rounds("softmax", data, better, rounds=1, fleet=Fleet()).next().arrived == len(SIZES)


def test_a_fleet_of_other_clients_is_refused_before_the_first_round(tmp_path):
    data, plan = classification(SIZES), Plan(Gradient(), Mean(), rules.sgd(0.1))
    with pytest.raises(UsageError, match="there are 8 clients"):
        atoll.train("softmax", data, plan, rounds=1, fleet=Fleet(Each((1.0, 2.0))), out=tmp_path)
    trace = tmp_path / "fleet.csv"
    trace.write_text("client,value\n0,1\n1,2\n3,4\n")
    with pytest.raises(UsageError):
        atoll.train("softmax", data, plan, rounds=1, fleet=Fleet(Trace(str(trace))), out=tmp_path)
    assert list(tmp_path.iterdir()) == [trace], "a run was begun"


def test_paces_read_back():
    for text in (
        "Buffered(10)",
        "Buffered(1, staleness=staleness_polynomial(1.0))",
        "Bounded(4)",
        "Sync(1.3, deadline_s=60)",
    ):
        assert repr(parse(text, PARTS)) == text
    assert parse("Buffered(10, staleness=staleness_polynomial(0.5))", PARTS) == Buffered(10)
    assert parse("sgd(polynomial(0.1, rounds=9))", PARTS).lr.rounds == 9


def test_at_the_deadline_a_client_sends_the_steps_that_it_has_made():
    """Ten steps in five seconds and a deadline after two: equal to four steps. A fast client makes all steps."""
    fleet = Fleet(Each((1.0, 5.0)))
    keeping = Train(rules.sgd(0.1), steps=10, batch=2, keep=("order",))
    pace = Sync(deadline_s=2.0, partial=True)
    state, (report,) = run(Plan(keeping, Mean(), pace=pace), engine_of(fleet, sizes=(4, 4)), 1)
    assert (report.now, report.arrived, report.late) == (2.0, 2, 0)
    assert state.memory.take(torch.arange(2))["local/taken"].tolist() == [10, 4]
    four = replace(keeping, steps=4)
    plans = [Plan(part, Mean(), cohort=Only(i)) for i, part in enumerate((keeping, four))]
    alone = [run(plan, engine_of(sizes=(4, 4)), 1)[0] for plan in plans]
    mean = sum(s.model.theta for s in alone) / 2
    assert far(state.model.theta, mean) < 1e-12


def test_a_client_that_has_not_begun_at_the_deadline_sends_nothing():
    fleet = Fleet(Each((1.0, 1.0)), downlink=Each((1e9, 1.0)))
    plan = Plan(Train(rules.sgd(0.1), steps=10, batch=2), Mean(), pace=Sync(deadline_s=0.5, partial=True))
    _, (report,) = run(plan, engine_of(fleet, sizes=(4, 4)), 1)
    assert (report.arrived, report.late, [t.outcome for t in report.trips]) == (1, 1, ["arrived", "late"])
