"""The open round of an engine with real arrivals: worker processes or a network.

Tests: tests/identities/test_arrival_loop.py, tests/parity/test_processes.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from atoll.engine.simulation.arrivals import Arrivals, DownlinkBytes, Dropped
from atoll.plan.in_flight import Flight, OpenRound
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Population
from atoll.plan.state import State


class Landed(NamedTuple):
    """The end of a flight: it arrived, or its client was lost at `stage` for the reason `cause`."""

    number: int
    stage: str = ""
    cause: str = ""


Send = Callable[[Flight], None]
Receive = Callable[[float | None], Iterable[Landed]]


class ArrivalLoop:
    """Runs an open round: it starts the missing clients and accepts arrivals until the pace closes the round.

    Args:
        plan: the algorithm; its pace closes the round.
        state: contains the clients in flight.
        population: all clients.
        cohort: the clients that start when the round opens.
        send: sends the work of a flight to its client. For a flight of an earlier round it is called again, because the
            work may have been lost; it ignores work that is known.
        receive: waits for the ends of flights, at most the given number of seconds; None: without limit. It may return
            nothing, for example because a client has become able to start.
        clock: the time in seconds; it never decreases.
        away: returns whether a client cannot start now; None: each client can always start.
    """

    def __init__(
        self,
        plan: Plan,
        state: State,
        population: Population,
        cohort: Cohort,
        send: Send,
        receive: Receive,
        clock: Callable[[], float],
        away: Callable[[int], bool] | None = None,
    ) -> None:
        self._plan, self._send, self._receive, self._clock = plan, send, receive, clock
        self._downlink = DownlinkBytes(state, population.clients)
        self._round = OpenRound(plan.pace, plan.sampler, state.seed, state.round, state.air, population, cohort, away)
        self._before = state.air.flights
        self._dropped: list[Dropped] = []
        self._started = self._sent = 0

    @property
    def awaited(self) -> tuple[int, ...]:
        """The numbers of the flights that have not ended, ascending."""
        return self._round.in_the_air()

    @property
    def missing(self) -> int:
        """The number of arrivals, at least 1, before which the pace neither closes the round nor starts a client."""
        return 1 if self._plan.pace.asynchronous else max(1, self._round.wanted - self._round.arrived)

    def run(self) -> Arrivals:
        """Run the round until its pace closes it.

        Returns:
            The outcome of the flights. Flights that the round no longer awaits are counted as late.
        """
        began, traffic, pace = self._clock(), self._round, self._plan.pace
        for flight in self._before:
            self._send(flight)
        self._start()
        while traffic.target and not traffic.flying:
            self._land(self._receive(None))  # no client can start: wait until one can
            self._start()
        waits = True
        while waits and (traffic.flying or (pace.replaces_arrivals and traffic.target)):
            spent = self._clock() - began
            left = pace.deadline_s - spent if pace.deadline_s is not None and spent < pace.deadline_s else None
            self._land(self._receive(left))
            waits = traffic.goes_on(self._clock() - began)
            if waits and pace.replaces_arrivals:
                self._start()
        late = traffic.abandoned()
        air = traffic.in_flight(self._downlink.known, None)
        return Arrivals(traffic.arrivals, self._dropped, len(late), self._started, self._sent, air, None, ())

    def _land(self, ended: Iterable[Landed]) -> None:
        for number, stage, cause in ended:
            if cause:
                self._dropped.append(Dropped(self._round.fail(number), stage, cause))
            else:
                self._round.arrive(number)

    def _start(self) -> None:
        begun = self._round.start_missing()
        for flight, down in zip(begun, self._downlink.to([f.client for f in begun]), strict=True):
            self._send(self._round.sent(flight, down))
            self._sent += down
        self._started += len(begun)
