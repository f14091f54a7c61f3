"""The arrivals of a round: flights on a virtual clock, and the bytes sent to clients that start.

Tests: tests/identities/test_flights.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, Part
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.engine.simulation.clock import Clock
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.in_flight import Flight, InFlight, OpenRound
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import OPEN, Cohort, Declared, Population
from atoll.plan.round import FlightTimes
from atoll.plan.state import State

_OUTCOMES = {"arrive": "arrived", "drop": "dropped", "cancel": "late"}
_PLAIN = Sync()
_STEPS = Fleet()  # without a fleet all clients take the same time: arrivals have the order of starts


class Dropped(NamedTuple):
    """A flight that ended without a contribution because its client or its connection was lost.

    `stage` and `cause` are those of the failure that the report lists.
    """

    flight: Flight
    stage: str = "network"
    cause: str = "dropped out"


class Arrivals(NamedTuple):
    """The outcome of the flights of a round.

    Args:
        arrived: flights in the order of their ends.
        dropped: flights without a contribution, in the order of their ends.
        late: number of flights that are no longer awaited.
        started: number of starts.
        sent: bytes sent to all started clients.
        air: flights that continue after the round.
        now: seconds of the run; None without a fleet.
        trips: times of the flights that ended; () without a fleet.
    """

    arrived: list[Flight]
    dropped: list[Dropped]
    late: int
    started: int
    sent: int
    air: InFlight
    now: float | None
    trips: tuple[FlightTimes, ...]


class DownlinkBytes:
    """The bytes that a client is sent when it starts: the part of the model that it does not have yet, and the rest."""

    def __init__(self, state: State, clients: int) -> None:
        _, model, shared = state.broadcast
        self._round, self._sent = state.round, state.sent
        self._theta = nbytes({"theta": model.theta})
        self._rest = nbytes({"buffers": model.buffers, **model.counters}) + sum(map(nbytes, shared.values()))
        self._fixed = nbytes(model.fixed)
        self.known = state.air.known
        if self._sent is not None or self._fixed:
            first = torch.full((clients,), -1)
            self.known = first if self.known is None else self.known.clone()
        self.each = self._theta + self._rest  # bytes for a client, if they do not depend on the models it has received

    def to(self, clients: list[int]) -> list[int]:
        """Bytes for each of these clients. From now on they have the model of this round."""
        if self.known is None:
            return [self.each] * len(clients)
        ids = torch.tensor(clients, dtype=torch.int64)
        known = self.known[ids]
        first, missed = known < 0, self._round - known
        theta = torch.full_like(known, self._theta)
        if self._sent is not None:
            # The missing deltas, if all of them are stored; else the whole θ, which is then not longer.
            lengths = torch.tensor((0, *reversed(self._sent.deltas)), dtype=torch.int64).cumsum(0)
            held = ~first & (missed < len(lengths))
            theta = torch.where(held, lengths[missed.clamp(max=len(lengths) - 1)], theta)
        self.known[ids] = self._round
        return (theta + self._rest + torch.where(first, self._fixed, 0)).tolist()


def message_bytes(plan: Plan, task: Task) -> int:
    """The length of a client's message in bytes, as far as it is known before the computation.

    It is exact for a codec without entropy coding and a local part that declares each of its vectors.
    """
    layout, known = plan.local.server_layout(task.layout), ("update", "buffers", "loss", "rows", OPEN)
    further = {**plan.codec.declare(layout), **plan.aggregator.added()}
    if plan.releases:  # the payload, the sums of the codec, and the weight
        return plan.codec.nbytes(layout) + _length(further, ("update",)) + 8
    further |= plan.local.declare(task)
    counters = sum(8 * e.size for e in layout.counters if e.name not in layout.dropped)
    sent = layout.b if layout.sent is None else len(layout.sent)
    flags = len(layout.segment("buffers")) if sent else 0
    own = (sent + 1) * layout.dtype.itemsize + counters + flags + 16  # buffers, loss, weight and rows
    return plan.codec.nbytes(layout) + own + _length(further, known)


def _length(declared: Mapping[str, Declared], without: Collection[str]) -> int:
    """The bytes of declared vectors, without some names."""
    return sum(each.length * each.dtype.itemsize for name, each in declared.items() if name not in without)


def check_clock(plan: Plan, fleet: Fleet | None, population: Population, model: Model, task: Task, seed: int) -> None:
    """Refuse a fleet of other clients, a trace with gaps, a deadline without a clock, and one that is too short.

    Raises:
        UsageError: the case, and a line to write instead.
    """
    clock = None if fleet is None else Clock(fleet, population.sizes, seed)
    deadline = plan.pace.deadline_s
    if deadline is None:
        return
    if clock is None:
        raise UsageError(
            f"{plan.pace!r} without a clock.",
            "a fleet: its virtual clock measures the deadline.",
            "without a clock all clients of one process arrive at the same time.",
            Change("fleet", "Fleet(HalfNormal())"),
        )
    down = nbytes({"theta": model.theta, "buffers": model.buffers, **model.counters, **model.fixed})
    shortest = clock.fastest(down, message_bytes(plan, task))
    if shortest > deadline and not plan.pace.partial:
        raise UsageError(
            f"{plan.pace!r} with {fleet!r}.",
            f"at least {shortest:.4g} seconds, the time of the fastest client.",
            "no client can meet the deadline, so every round would be empty.",
            Part(f"Sync(deadline_s={math.ceil(2 * shortest)})", "pace"),
        )


def simulate_round(
    plan: Plan, state: State, population: Population, cohort: Cohort, fleet: Fleet | None, up: int
) -> Arrivals:
    """Start the missing clients, and advance the virtual clock until the pace closes the round.

    Args:
        plan: the algorithm; its pace closes the round.
        state: contains the clients in flight.
        population: all clients.
        cohort: the clients that start when the round opens.
        fleet: the durations; None: all clients take the same time.
        up: bytes of a message.
    Raises:
        RunError: no client is in flight, and none can ever start.
    """
    downlink = DownlinkBytes(state, population.clients)
    if fleet is None and plan.pace == _PLAIN:
        return _at_once(state, cohort, downlink)
    clock = clock_of(state, population, fleet or _STEPS)
    away = None if fleet is None or fleet.availability == 1.0 else lambda i: not clock.available(i)
    traffic = OpenRound(plan.pace, plan.sampler, state.seed, state.round, state.air, population, cohort, away)
    began, versions, started, total = clock.now, dict[int, int](), 0, 0
    each = traffic.down = downlink.each
    work = plan.local.relative_work(state.round)

    def start() -> None:
        nonlocal started, total
        begun = traffic.start_missing()
        started += len(begun)
        if downlink.known is None:
            for flight in begun:
                clock.start(flight[3], flight[0], each, up, work)
            total += each * len(begun)
            return
        for flight, size in zip(begun, downlink.to([f.client for f in begun]), strict=True):
            traffic.sent(flight, size)
            clock.start(flight.number, flight.client, size, up, work)
            total += size

    start()
    until = None if (deadline := plan.pace.deadline_s) is None else began + deadline
    while traffic.target and not traffic.flying and not traffic.arrived:
        _wait(clock)
        start()
    waits, refills = True, plan.pace.replaces_arrivals
    while waits and traffic.flying:
        event = clock.next(until if until is not None and clock.now < until else None)
        if event is not None:
            flight = traffic.arrive(event.number) if event.kind == "arrive" else traffic.fail(event.number)
            versions[event.number] = flight.version
        elif plan.pace.partial:  # the deadline is reached; only `Sync` has one
            _stop(clock, traffic)
        waits = traffic.goes_on(clock.now - began)
        if refills and waits:
            start()
    late = traffic.abandoned()
    versions |= {flight.number: flight.version for flight in late}
    for flight in late:
        clock.cancel(flight.number)
    ended = clock.trips() if fleet is not None else ()
    return Arrivals(
        traffic.arrivals,
        [Dropped(flight) for flight in traffic.failed],
        len(late),
        started,
        total,
        traffic.in_flight(downlink.known, clock),
        None if fleet is None else clock.now,
        tuple(FlightTimes(*t[:2], versions[t.number], *t[2:-1], _OUTCOMES[t.fate]) for t in ended),
    )


def _stop(clock: Clock, traffic: OpenRound) -> None:
    """At the deadline, clients send the work that they have done. A client without any is abandoned."""
    for number in traffic.in_the_air():
        share = clock.cut(number)
        if share:
            traffic.cut(number, share)
        else:
            traffic.abandon(number)


def _wait(clock: Clock) -> None:
    """Advance the clock to the next time at which a client may become available."""
    change = clock.next_change()
    if change == float("inf"):
        raise RunError(
            "No client of the fleet is available, now or later.",
            "a client that can start.",
            "the round would wait forever.",
            Change("fleet", "Fleet(availability=1.0)"),
        )
    clock.next(until=change)


def _at_once(state: State, cohort: Cohort, downlink: DownlinkBytes) -> Arrivals:
    """All clients start and arrive: the result of `Sync()` without a fleet."""
    first, n = state.air.started, len(cohort.ids)
    clients = cohort.ids.tolist()
    sizes = downlink.to(clients)
    places = enumerate(zip(clients, sizes, strict=True))
    arrived = [Flight(client, state.round, 0, first + i, down) for i, (client, down) in places]
    air = InFlight(target=n, started=first + n, known=downlink.known)
    return Arrivals(arrived, [], 0, n, sum(sizes), air, None, ())


def clock_of(state: State, population: Population, fleet: Fleet) -> Clock:
    """The clock of the state, as an object or as the tensors of a checkpoint; a new clock in the first round."""
    match state.air.clock:
        case None:
            return Clock(fleet, population.sizes, state.seed)
        case Clock() as clock:
            return clock.copy()
        case tensors:
            return Clock.of(fleet, population.sizes, state.seed, tensors)


def nbytes(tensors: Mapping[str, Any]) -> int:
    """The total size of tensors in bytes."""
    return sum([t.numel() * t.element_size() for t in tensors.values()])
