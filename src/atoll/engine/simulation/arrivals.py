"""Who arrives in a round: flights on a virtual clock, and what is sent to those who start.

Tests: tests/identities/test_flights.py, tests/identities/test_clock.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from atoll.base.errors import RunError, UsageError
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model
from atoll.engine.simulation.clock import Clock
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.in_flight import Flight, InFlight, OpenRound
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Population
from atoll.plan.round import FlightTimes
from atoll.plan.state import State

_FATES = {"arrive": "arrived", "drop": "dropped", "cancel": "late"}
_PLAIN = Sync()
_STEPS = Fleet()  # without a fleet everybody takes as long as everybody else: arrivals come in the order of starts


class Arrivals(NamedTuple):
    """What came of the flights of a round.

    Args:
        arrived, dropped: in the order of their coming; `late` are no longer awaited.
        started: who started, in order.
        sent: bytes sent to all who started.
        air: what flies on.
        now: seconds of the run, where there is a fleet.
        trips: flights that ended, on the clock.
    """

    arrived: list[Flight]
    dropped: list[Flight]
    late: int
    started: int
    sent: int
    air: InFlight
    now: float | None
    trips: tuple[FlightTimes, ...]


class DownlinkBytes:
    """The bytes of what a client is sent when it starts: what it does not know yet of the model, and all the rest."""

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
        self.each = self._theta + self._rest  # what somebody is sent of whom nothing need be known

    def to(self, clients: list[int]) -> list[int]:
        """Bytes for each of these clients; from now on they know the model of this round."""
        if self.known is None:
            return [self.each] * len(clients)
        ids = torch.tensor(clients, dtype=torch.int64)
        known = self.known[ids]
        first, missed = known < 0, self._round - known
        theta = torch.full_like(known, self._theta)
        if self._sent is not None:
            # What is missing of the stream of deltas, where all of it is kept; else θ whole, which is then no longer.
            lengths = torch.tensor((0, *reversed(self._sent.deltas)), dtype=torch.int64).cumsum(0)
            held = ~first & (missed < len(lengths))
            theta = torch.where(held, lengths[missed.clamp(max=len(lengths) - 1)], theta)
        self.known[ids] = self._round
        return (theta + self._rest + torch.where(first, self._fixed, 0)).tolist()


def message_bytes(plan: Plan, layout: Layout) -> int:
    """The bytes of a client's message that can be known before it is computed: for a codec that does not entropy-code,
    and a local part that adds a loss and no sums of its own, all of them."""
    counters = sum(8 * e.size for e in layout.counters)
    return plan.codec.nbytes(layout) + (layout.b + 1) * layout.dtype.itemsize + counters + 16


def check_clock(
    plan: Plan, fleet: Fleet | None, population: Population, model: Model, layout: Layout, seed: int
) -> None:
    """Refuse a fleet of other clients, a trace with gaps, a deadline without a clock, and one that nobody can meet.

    Raises:
        UsageError: which, and what to write instead.
    """
    clock = None if fleet is None else Clock(fleet, population.sizes, seed)
    deadline = plan.pace.deadline_s
    if deadline is None:
        return
    if clock is None:
        raise UsageError(
            f"{plan.pace!r} without a clock.",
            "a fleet, whose virtual clock says when a deadline has come.",
            "in one process everybody arrives at once.",
            'fleet = "Fleet(HalfNormal())"',
        )
    down = nbytes({"theta": model.theta, "buffers": model.buffers, **model.counters, **model.fixed})
    quickest = clock.fastest(down, message_bytes(plan, layout))
    if quickest > deadline and not plan.pace.partial:
        raise UsageError(
            f"{plan.pace!r} with {fleet!r}.",
            f"at least {quickest:.4g} seconds, which the quickest client takes.",
            "a deadline that nobody can meet makes every round an empty one.",
            f"Sync(deadline_s={math.ceil(2 * quickest)})",
        )


def simulate_round(
    plan: Plan, state: State, population: Population, cohort: Cohort, fleet: Fleet | None, up: int
) -> Arrivals:
    """Start who is missing and wait, on the virtual clock, until the pace closes the round.

    Args:
        plan: whose pace closes the round.
        state: with what is in the air.
        population: all clients.
        cohort: who starts as the round opens.
        fleet: how long things take; None: everybody as long as everybody else.
        up: bytes of a message.
    Raises:
        RunError: nobody is in the air, and nobody will ever be there to start.
    """
    sending = DownlinkBytes(state, population.clients)
    if fleet is None and plan.pace == _PLAIN:
        return _at_once(state, cohort, sending)
    clock = clock_of(state, population, fleet or _STEPS)
    away = None if fleet is None or fleet.availability == 1.0 else lambda i: not clock.available(i)
    traffic = OpenRound(plan.pace, plan.sampler, state.seed, state.round, state.air, population, cohort, away)
    began, births, started, total = clock.now, dict[int, int](), 0, 0
    each = traffic.down = sending.each
    work = plan.local.relative_work(state.round)

    def start() -> None:
        nonlocal started, total
        begun = traffic.start_missing()
        started += len(begun)
        if sending.known is None:
            for flight in begun:
                clock.start(flight[3], flight[0], each, up, work)
            total += each * len(begun)
            return
        for flight, size in zip(begun, sending.to([f.client for f in begun]), strict=True):
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
            births[event.number] = flight.version
        elif plan.pace.partial:  # the deadline has come: only `Sync` has one
            _stop(clock, traffic)
        waits = traffic.goes_on(clock.now - began)
        if refills and waits:
            start()
    late = traffic.abandoned()
    births |= {flight.number: flight.version for flight in late}
    for flight in late:
        clock.cancel(flight.number)
    ended = () if fleet is None else clock.trips()
    return Arrivals(
        traffic.arrivals,
        traffic.failed,
        len(late),
        started,
        total,
        traffic.in_flight(sending.known, clock),
        None if fleet is None else clock.now,
        tuple(FlightTimes(*t[:2], births[t.number], *t[2:-1], _FATES[t.fate]) for t in ended),
    )


def _stop(clock: Clock, traffic: OpenRound) -> None:
    """Everybody stops computing and sends what there is; who has nothing is not awaited."""
    for number in traffic.in_the_air():
        share = clock.cut(number)
        if share:
            traffic.cut(number, share)
        else:
            traffic.abandon(number)


def _wait(clock: Clock) -> None:
    """Let time pass until somebody may be available again."""
    change = clock.next_change()
    if change == float("inf"):
        raise RunError(
            "Nobody of the fleet is available, and nobody ever will be.",
            "a client that can be started.",
            "a round would wait for ever.",
            'fleet = "Fleet(availability=1.0)"',
        )
    clock.next(until=change)


def _at_once(state: State, cohort: Cohort, sending: DownlinkBytes) -> Arrivals:
    """Everybody starts and arrives: what `Sync()` comes to where nobody asks for the time."""
    first, n = state.air.started, len(cohort.ids)
    clients = cohort.ids.tolist()
    sizes = sending.to(clients)
    who = enumerate(zip(clients, sizes, strict=True))
    arrived = [Flight(client, state.round, 0, first + i, down) for i, (client, down) in who]
    air = InFlight(target=n, started=first + n, known=sending.known)
    return Arrivals(arrived, [], 0, n, sum(sizes), air, None, ())


def clock_of(state: State, population: Population, fleet: Fleet) -> Clock:
    """The clock as the state left it, or as a checkpoint did, or a new one."""
    match state.air.clock:
        case None:
            return Clock(fleet, population.sizes, state.seed)
        case Clock() as clock:
            return clock.copy()
        case tensors:
            return Clock.of(fleet, population.sizes, state.seed, tensors)


def nbytes(tensors: Mapping[str, Any]) -> int:
    """The bytes of some tensors."""
    return sum([t.numel() * t.element_size() for t in tensors.values()])
