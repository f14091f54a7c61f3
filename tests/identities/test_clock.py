"""The virtual clock: laws of arrivals, of a shared link, of losses and of checkpoints, for any fleet."""

import math
import random

import pytest
import torch
from fleets import FLEETS, SIZES
from hypothesis import given
from hypothesis import strategies as st
from quick_cases import one_in

from atoll.base.errors import RunError, UsageError
from atoll.engine.simulation import samples
from atoll.engine.simulation.clock import Clock, Event, SimulatedTimes
from atoll.engine.simulation.fleet import Between, ByRows, Chance, Each, Fleet, HalfNormal, LogNormal, Trace, Windows


def ones(clients):
    return torch.ones(clients, dtype=torch.int64)


def rest(clock):
    events = []
    while event := clock.next():
        events.append(event)
    return events


def same(a, b):
    one, other = a.tensors(), b.tensors()
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name
        assert x.dtype == other[name].dtype


def test_one_second_and_links_for_nothing():
    clock = Clock(Fleet(), ones(3), 0)
    for number in (2, 0, 1):
        clock.start(number, number, 10**9, 10**9)
    assert rest(clock) == [Event(1.0, "arrive", number, number) for number in range(3)]
    assert clock.trips() == [SimulatedTimes(n, n, 0.0, 0.0, 1.0, 1.0, "arrive") for n in range(3)]
    assert (clock.trips(), clock.next(), clock.now, len(clock)) == ([], None, 1.0, 0)
    assert clock.available(1) and clock.next_change() == math.inf


def test_the_parts_of_a_flight_follow_one_another():
    clock = Clock(Fleet(Each((4.0,)), uplink="8 b/s", downlink=2, latency=0.5), ones(1), 0)
    clock.next(until=10.0)
    clock.start(0, 0, down=6, up=5, work=0.25)
    assert clock.next() == Event(20.0, "arrive", 0, 0)
    assert clock.trips() == [SimulatedTimes(0, 0, 10.0, 13.5, 14.5, 20.0, "arrive")]


def test_until_is_kept_to():
    clock = Clock(Fleet(), ones(2), 0)
    clock.start(0, 0, 0, 0)
    assert clock.next(until=0.5) is None and clock.now == 0.5
    clock.start(1, 1, 0, 0)
    assert clock.next(until=1.0) == Event(1.0, "arrive", 0, 0)
    assert clock.next(until=1.25) is None and clock.now == 1.25
    assert clock.next(until=9.0) == Event(1.5, "arrive", 1, 1)
    assert clock.next(until=9.0) is None and clock.now == 9.0


# The server's link


@given(st.integers(1, 50), st.integers(1, 10**9), st.floats(1, 1e9))
def test_equal_transfers_end_together(n, size, speed):
    clock = Clock(Fleet(0.0, server=speed), ones(n), 0)
    for number in range(n):
        clock.start(number, number, size, 0)
    events = rest(clock)
    assert {event.time for event in events} == {clock.now}
    assert [event.number for event in events] == list(range(n))
    assert clock.now == pytest.approx(n * size / speed, rel=1e-12)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 0.999)), min_size=1, max_size=30), st.booleans())
def test_the_link_never_idles_while_something_waits(transfers, upward):
    """If each transfer joins before the link is empty, all transfers are finished after (all bytes)/rate."""
    speed = 1000.0
    clock = Clock(Fleet(0.0, server=speed), ones(1), 0)
    whole = 0
    for number, (size, when) in enumerate(transfers):
        while clock.next(until=clock.now + max(whole / speed - clock.now, 0) * when):
            pass
        clock.start(number, 0, *((0, size) if upward else (size, 0)))
        whole += size
    rest(clock)
    assert clock.now == pytest.approx(whole / speed, rel=1e-9)


@given(FLEETS, st.integers(0, 4), st.integers(0, 10**4), st.integers(0, 10**4), st.integers(0, 10**5))
def test_a_single_flight_takes_the_predicted_time(fleet, client, down, up, number):
    clock = Clock(fleet, SIZES, 11)
    clock.start(number, client, down, up, work=2.0)
    predicted = clock.predict(client, down, up, work=2.0, number=number)
    event = clock.next()
    assert clock.fastest(down, up, work=2.0) <= predicted * (1 + 1e-12)
    if event.kind == "arrive":
        assert event.time == pytest.approx(predicted, rel=1e-9)
    else:
        assert event.time <= predicted


def test_a_lone_transfer_takes_the_slower_of_both_links():
    for own, server in ((10.0, 5.0), (5.0, 10.0)):
        clock = Clock(Fleet(0.0, uplink=own, server=server), ones(1), 0)
        clock.start(0, 0, 0, 100)
        assert clock.next().time == 20.0


def test_fastest_is_least_over_the_clients():
    clock = Clock(Fleet(Each((3, 2, 9)), uplink=Each((1, 2, 4)), latency=0.5), ones(3), 0)
    assert clock.fastest(7, 8) == min(clock.predict(c, 7, 8) for c in range(3)) == 7.0
    assert clock.fastest(7, 8, work=torch.tensor([1.0, 1.0, 0.0])) == 3.0
    assert Clock(Fleet(Between(2, 3, per="flight")), ones(3), 0).fastest(0, 0) == 2.0
    assert Clock(Fleet(ByRows(Between(2, 3, per="flight"))), torch.tensor([1, 3]), 0).fastest(0, 0) == 1.0


def fluid(joins, sizes, speed):
    """The end of each transfer by stepwise simulation: n transfers in progress run at speed/n each."""
    left, ends, now = {}, {}, 0.0
    waiting = sorted(range(len(joins)), key=joins.__getitem__)
    while waiting or left:
        join = joins[waiting[0]] if waiting else math.inf
        least = min(left, key=left.get, default=None)
        done = now + left[least] * len(left) / speed if left else math.inf
        then = min(join, done)
        for i in left:
            left[i] -= (then - now) * speed / len(left)
        now = then
        if join < done:
            first = waiting.pop(0)
            left[first] = sizes[first]
        else:
            del left[least]
            ends[least] = now
    return [ends[i] for i in range(len(joins))]


FLIGHT = st.tuples(st.floats(0, 10), st.integers(0, 4), st.integers(1, 10**4), st.integers(1, 10**4))


@given(st.lists(FLIGHT, min_size=1, max_size=25))
def test_shared_bandwidth_follows_the_fluid_model(flights):
    flights.sort()
    fleet = Fleet(Each((0.5, 1, 2, 0.1, 3)), uplink=Each((300, 900, 5000, 1e4, 1e5)), server=2000.0, latency=0.125)
    clock = Clock(fleet, SIZES, 0)
    ended = {}
    for number, (start, client, down, up) in enumerate(flights):
        while event := clock.next(until=start):
            ended[event.number] = event.time
        clock.start(number, client, down, up)
    ended |= {event.number: event.time for event in rest(clock)}

    starts, clients, down, up = zip(*flights, strict=True)
    loaded = [end + 0.125 for end in fluid(starts, down, 2000.0)]
    computed = [at + fleet.compute.values[c] for at, c in zip(loaded, clients, strict=True)]
    shared = fluid(computed, up, 2000.0)
    own = [at + b / fleet.uplink.values[c] for at, b, c in zip(computed, up, clients, strict=True)]
    for number, times in enumerate(zip(shared, own, strict=True)):
        assert ended[number] == pytest.approx(max(times) + 0.125, rel=1e-9)


def test_a_cancelled_transfer_frees_the_link_at_once():
    clock = Clock(Fleet(0.0, server=10.0), ones(2), 0)
    clock.start(0, 0, 100, 0)
    clock.start(1, 1, 100, 0)
    assert clock.next(until=10.0) is None  # half of each transfer is done
    clock.cancel(1)
    assert clock.next() == Event(15.0, "arrive", 0, 0)
    assert clock.next() is None
    assert clock.trips() == [
        SimulatedTimes(1, 1, 0.0, 10.0, 10.0, 10.0, "cancel"),
        SimulatedTimes(0, 0, 0.0, 15.0, 15.0, 15.0, "arrive"),
    ]


def test_ties_are_broken_by_the_ordinal_whatever_ends():
    clock = Clock(Fleet(Each((0.5, 1.0, 0.25)), server=100.0), ones(3), 0)
    for number, client, down, up in ((2, 1, 0, 0), (1, 2, 75, 0), (0, 0, 0, 50)):
        clock.start(number, client, down, up)
    assert rest(clock) == [Event(1.0, "arrive", number, client) for number, client in ((0, 0), (1, 2), (2, 1))]


# Draws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("started", "kept", "means"), [(100, 100, 3.44), pytest.param(130, 100, 1.49, marks=pytest.mark.slow)]
)
def test_the_cost_of_stragglers(started, kept, means):
    """Half-normal durations: the wait for `kept` of `started`, in mean durations, equals its exact expectation."""
    x = torch.linspace(0, 8, 100_001, dtype=torch.float64)
    f = torch.erf(x / math.sqrt(2))
    log_choose = [math.lgamma(started + 1) - math.lgamma(k + 1) - math.lgamma(started - k + 1) for k in range(kept)]
    less = sum(torch.exp(c + torch.xlogy(torch.tensor(k), f) + torch.xlogy(torch.tensor(started - k), 1 - f))
               for k, c in enumerate(log_choose))  # fmt: skip
    exact = float(torch.trapezoid(less, x)) / math.sqrt(2 / math.pi)
    assert exact == pytest.approx(means, abs=0.006)

    clock = Clock(Fleet(HalfNormal(per="flight")), ones(started), 5)
    rounds = []
    for round in range(400):
        begun = clock.now
        numbers = range(round * started, (round + 1) * started)
        for number in numbers:
            clock.start(number, number % started, 0, 0)
        arrived = {clock.next().number for _ in range(kept)}
        rounds.append((clock.now - begun) / math.sqrt(2 / math.pi))
        for number in set(numbers) - arrived:
            clock.cancel(number)
    waits = torch.tensor(rounds, dtype=torch.float64)
    # Five standard errors: one false alarm in two million runs.
    assert abs(float(waits.mean()) - exact) < 5 * float(waits.std()) / math.sqrt(len(rounds))


def test_flights_are_lost_at_the_rate_and_all_along_their_work():
    n, p = 20_000, 0.2
    clock = Clock(Fleet(2.0, dropout=p), ones(n), 3)
    for number in range(n):
        clock.start(number, number, 0, 0)
    lost = [event.time for event in rest(clock) if event.kind == "drop"]
    assert abs(len(lost) / n - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert min(lost) < 0.02 and 1.98 < max(lost) < 2
    assert abs(sum(lost) / len(lost) - 1) < 5 * (2 / math.sqrt(12)) / math.sqrt(len(lost))
    fates = [trip.fate for trip in clock.trips()]
    assert fates.count("drop") == len(lost) and fates.count("arrive") == n - len(lost)


def test_blocks_do_not_show(monkeypatch):
    """The draw of a flight depends neither on its block nor on earlier draws that were dropped."""
    fleet = Fleet(HalfNormal(per="flight"), dropout=0.5)
    numbers = [0, 1, 4095, 4096, 10**6, 0, 4096, 10**12]
    whole = [Clock(fleet, ones(1), 9).compute_seconds(0, number) for number in numbers]
    monkeypatch.setattr(samples, "_BLOCK", 3)
    monkeypatch.setattr(samples, "_KEPT", 1)
    clock = Clock(fleet, ones(1), 9)
    assert [clock.compute_seconds(0, number) for number in numbers] == whole


def test_draws_keep_their_bits():
    """A checkpoint continues under a later version, so these numbers are part of its format."""
    clock = Clock(Fleet(HalfNormal(), uplink=LogNormal(2.0, per="flight"), dropout=0.5), ones(4), 7)
    for number in range(4):
        clock.start(number, number, 1, 1)
    events = rest(clock)
    assert [(event.number, event.kind) for event in events] == [(3, "drop"), (1, "arrive"), (2, "drop"), (0, "arrive")]
    assert [event.time for event in events] == pytest.approx(
        [0.5163094380523067, 0.9716058758248272, 1.0972412313942712, 1.8874462668487815], rel=1e-12
    )
    assert Clock(Fleet(availability=0.5), ones(8), 7).present().int().tolist() == [1, 0, 0, 0, 1, 0, 0, 0]


def test_a_client_keeps_its_speed_and_a_flight_has_its_own():
    clock = Clock(Fleet(HalfNormal(), latency=HalfNormal(per="flight")), ones(4), 7)
    assert clock.compute_seconds(2, 0) == clock.compute_seconds(2, 77)
    assert clock.predict(2, 0, 0, number=0) != clock.predict(2, 0, 0, number=1)
    other = Clock(Fleet(HalfNormal()), ones(4), 8)
    assert other.compute_seconds(2, 0) != clock.compute_seconds(2, 0)
    more = Clock(Fleet(HalfNormal()), ones(9), 7)
    assert more.compute_seconds(2, 0) == clock.compute_seconds(2, 0)


# Availability


@pytest.mark.parametrize("window", one_in(3, [1 / 3, 1.0, 0.1]))
def test_a_client_is_there_for_its_share_of_windows(window):
    clients, q, turns = 500, 0.3, 200
    clock = Clock(Fleet(availability=Chance(q, window)), ones(clients), 2)
    share = 0.0
    for turn in range(turns):
        there = clock.present()
        share += float(there.double().mean()) / turns
        assert clock.available(turn) == bool(there[turn])
        then = clock.next_change()
        assert then == pytest.approx((turn + 1) * window)
        clock.next(until=(clock.now + then) / 2)
        assert torch.equal(clock.present(), there)
        clock.next(until=math.nextafter(then, 0))
        assert torch.equal(clock.present(), there)
        clock.next(until=then)
    assert abs(share - q) < 5 * math.sqrt(q * (1 - q) / (clients * turns))


def test_a_plain_chance_is_one_of_windows_of_a_second():
    plain, said = (Clock(Fleet(availability=a), ones(64), 2) for a in (0.5, Chance(0.5, window=1.0)))
    assert torch.equal(plain.present(), said.present())
    assert 0 < int(plain.present().sum()) < 64


def test_no_edge_of_a_window_is_missed(tmp_path):
    """Edges without an exact binary fraction: each occurs once a period, and availability changes there."""
    path = tmp_path / "windows.csv"
    path.write_text("client,start,end\n0,0.1,0.2\n0,0.3,0.7\n1,0,0.1\n1,0.2,0.3\n")
    clock = Clock(Fleet(availability=Windows(str(path))), ones(2), 0)
    for i in range(4000):
        assert clock.now == pytest.approx(i // 4 * 0.7 + (0, 0.1, 0.2, 0.3)[i % 4], abs=1e-9)
        assert (clock.available(0), clock.available(1)) == (i % 2 == 1, i % 2 == 0)
        clock.next(until=clock.next_change())


# Order, copies, saving


@given(FLEETS, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5000)), max_size=12), st.randoms())
def test_the_order_of_starts_at_one_time_changes_no_bit(fleet, flights, mixed):
    numbered = list(enumerate(flights))
    clocks = []
    for _ in range(2):
        clock = Clock(fleet, SIZES, 3)
        clock.start(99, 0, 700, 700)
        clock.next(until=0.01)
        for number, (client, size) in numbered:
            clock.start(number, client, size, size)
        clocks.append(clock)
        mixed.shuffle(numbered)
    same(*clocks)
    assert rest(clocks[0]) == rest(clocks[1])
    assert clocks[0].trips() == clocks[1].trips()


START = st.tuples(st.just("start"), st.integers(0, 4), st.integers(0, 5000), st.sampled_from([0, 1, 40, 3000]))
OPERATIONS = st.lists(
    st.one_of(
        START,
        START,
        START,
        st.just(("next",)),
        st.tuples(st.just("until"), st.floats(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 100)),
        st.just(("trips",)),
    ),
    min_size=12,
    max_size=40,
)


def act(clock, number, operation):
    """Apply one operation to a clock and return its result."""
    match operation:
        case ("start", client, down, up):
            clock.start(number, client, down, up, work=1 + number / 8)
            return None
        case ("next",):
            return clock.next()
        case ("until", more):
            return clock.next(until=clock.now + more)
        case ("cancel", which):
            flying = clock.tensors()["flights"][:, 0].tolist()
            return flying and clock.cancel(flying[which % len(flying)])
        case ("trips",):
            return clock.trips()


@given(FLEETS, OPERATIONS, st.integers(1, 5))
def test_a_saved_clock_goes_on_with_the_same_bits(fleet, operations, every):
    clock = Clock(fleet, SIZES, 3)
    saved = clock.copy()
    for number, operation in enumerate(operations):
        if number % every == 0:
            saved = Clock.of(fleet, SIZES, 3, {name: x.clone() for name, x in saved.tensors().items()})
        assert act(clock, number, operation) == act(saved, number, operation)
        assert (clock.now, len(clock)) == (saved.now, len(saved))
    same(clock, saved)
    assert rest(clock) == rest(saved)
    assert clock.trips() == saved.trips()


@given(FLEETS, OPERATIONS, OPERATIONS)
def test_a_copy_leaves_the_other_alone(fleet, before, after):
    clock = Clock(fleet, SIZES, 3)
    for number, operation in enumerate(before):
        act(clock, number, operation)
    kept = Clock.of(fleet, SIZES, 3, clock.tensors())
    copy = clock.copy()
    for number, operation in enumerate(after):
        act(copy, len(before) + number, operation)
    rest(copy)
    copy.trips()
    same(clock, kept)
    assert rest(clock) == rest(kept)


@given(FLEETS, OPERATIONS, st.lists(st.floats(0, 1), max_size=3))
def test_looking_on_the_way_changes_nothing(fleet, operations, looks):
    one, other = Clock(fleet, SIZES, 3), Clock(fleet, SIZES, 3)
    for number, operation in enumerate(operations):
        if operation[0] != "next":
            act(one, number, operation)
            act(other, number, operation)
            continue
        event = one.next()
        for look in sorted(looks):
            then = other.now + (one.now - other.now) * look
            if then < one.now:
                assert other.next(until=then) is None
        assert other.next() == event
        same(one, other)


def test_every_flight_ends_once():
    order = random.Random(1)
    clock = Clock(Fleet(HalfNormal(per="flight"), server=500.0, dropout=0.2), ones(20), 3)
    arrived, cancelled = [], set()
    for number in range(500):
        clock.start(number, number % 20, order.randrange(100), order.randrange(100))
        if order.random() < 0.1:
            cancelled.add(number)
            clock.cancel(number)
        if len(clock) > 15:
            arrived.append(clock.next())
    arrived += rest(clock)
    assert sorted([event.number for event in arrived] + list(cancelled)) == list(range(500))
    assert [event.time for event in arrived] == sorted(event.time for event in arrived)
    for trip in clock.trips():
        assert trip.start <= trip.loaded <= trip.computed <= trip.end
        assert (trip.fate == "cancel") == (trip.number in cancelled)


# Bad input


@pytest.mark.parametrize("server", [None, 10.0])
@pytest.mark.parametrize(
    "flight", [(0, 0, 1, 1), (5, 2, 1, 1), (5, -1, 1, 1), (-1, 0, 1, 1), (5, 0, -1, 1), (5, 0, 1, -1),
               (5, 0, 1, 1, -1.0), (5, 0, 1, 1, math.nan), (5, 0, 1, 1, math.inf)]
)  # fmt: skip
def test_a_start_that_cannot_be_is_refused_and_nothing_began(flight, server):
    clock = Clock(Fleet(server=server), ones(2), 0)
    clock.start(0, 0, 1, 1)
    before = clock.copy()
    with pytest.raises(UsageError, match=r"^start\("):
        clock.start(*flight)
    same(clock, before)


def test_time_is_monotone_and_each_client_arrives_once():
    clock = Clock(Fleet(), ones(2), 0)
    clock.start(0, 0, 1, 1)
    clock.next()
    for until in (0.5, math.nan):
        with pytest.raises(UsageError, match=r"^next\("):
            clock.next(until=until)
    with pytest.raises(UsageError, match=r"^cancel\(0\)"):
        clock.cancel(0)
    assert clock.now == 1.0


def test_a_clock_of_something_else_is_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("client,value\n0,1\n1,2\n")
    fleet = Fleet(Trace(path))
    saved = Clock(fleet, ones(2), 7).tensors()
    Clock.of(fleet, ones(2), 7, saved)
    for other in ((Fleet(), ones(2), 7), (fleet, ones(2) + 1, 7), (fleet, ones(2), 8)):
        with pytest.raises(RunError, match="The clock was not saved with"):
            Clock.of(*other, saved)
    path.write_text("client,value\n0,1\n1,3\n")
    with pytest.raises(RunError, match="The clock was not saved with"):
        Clock.of(fleet, ones(2), 7, saved)


def test_a_clock_of_other_windows_is_refused(tmp_path):
    path = tmp_path / "windows.csv"
    path.write_text("client,start,end\n0,0,1\n")
    fleet = Fleet(availability=Windows(str(path)))
    saved = Clock(fleet, ones(1), 7).tensors()
    path.write_text("client,start,end\n0,0,2\n")
    with pytest.raises(RunError, match="The clock was not saved with"):
        Clock.of(fleet, ones(1), 7, saved)
