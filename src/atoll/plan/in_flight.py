"""Clients in flight: clients that have started, in this or an earlier round, and have not arrived.

The size of a cohort is a number of active clients, so a round starts clients only up to this number. The results depend
only on the plan, the seed and the order of arrivals. The caller decides when a client arrives: a virtual clock, worker
processes or a network.

Tests: tests/identities/test_flights.py, tests/identities/test_clock.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from atoll.base.random import Key
from atoll.plan.protocols import Cohort, Pace, Population, Sampler
from atoll.plan.sampler import Uniform

_BLOCK = 1024  # candidates drawn at once
_client, _number = itemgetter(0), itemgetter(3)  # of a flight; half the time of attribute access
_new = tuple.__new__  # half the time of the constructor of NamedTuple; it is called for every start


class Flight(NamedTuple):
    """A start of a client that has not yet arrived.

    Args:
        client: the id of the client.
        version: the model version: the round whose model the client started from.
        again: the number of earlier starts of this client in that round.
        number: the number of this start among all starts of the run, from 0.
        down: the number of bytes that the server sent to the client.
        share: the fraction of its work for which the client has time, in (0, 1].
    """

    client: int
    version: int
    again: int
    number: int
    down: int = 0
    share: float = 1.0


class InFlight(NamedTuple):
    """The clients in flight between two rounds, and the state of the random selection of further clients.

    Args:
        flights: the flights that have not arrived, in order of their numbers.
        target: the number of active clients in a full cohort.
        started: the number of starts in the run so far.
        place: (block, offset) of the next candidate. Candidates are drawn in blocks; the offset is the position in one.
        queue: the clients of this block; empty if it is not drawn yet.
        idle: the clients that start first, if the cohort contains all clients.
        recent: (client, round) of each start in a round after the one in which the oldest flight started.
        known: the round of the last model that the server sent to each client, int64 `[C]`, −1 if it has sent none;
            None if the downlink does not need it.
        clock: the state of the engine's clock. The plan does not read it.
    """

    flights: tuple[Flight, ...] = ()
    target: int = 0
    started: int = 0
    place: tuple[int, int] = (0, 0)
    queue: tuple[int, ...] = ()
    idle: tuple[int, ...] = ()
    recent: tuple[tuple[int, int], ...] = ()
    known: Tensor | None = None
    clock: Any = None


class OpenRound:
    """One open round: starts, arrivals and failures of clients, until the pace closes the round.

    Args:
        pace: decides when the round closes.
        sampler: draws the candidates.
        seed, round: the seed of the training, and the number of the round.
        air: the flights that started in earlier rounds.
        population: all clients.
        cohort: the clients that start when the round opens; empty if clients of earlier rounds are in flight.
        away: returns whether a client cannot start now; None: each client can always start.
    """

    def __init__(
        self,
        pace: Pace,
        sampler: Sampler,
        seed: int,
        round: int,
        air: InFlight,
        population: Population,
        cohort: Cohort,
        away: Callable[[int], bool] | None = None,
    ) -> None:
        self.pace = pace
        self.round = round
        self.arrivals: list[Flight] = []
        self.failed: list[Flight] = []
        self._abandoned: list[Flight] = []
        self.elapsed = 0.0
        self._sampler, self._seed, self._population, self._is_away = sampler, seed, population, away
        self._flights: dict[int, Flight] = dict(zip(map(_number, air.flights), air.flights, strict=True))
        self._busy: set[int] = set(map(_client, air.flights))
        self._opening = cohort.ids.tolist()
        self.target = air.target if air.flights else len(self._opening)
        self._everyone = self.target >= population.clients
        self._idle = list(air.idle) if air.flights else []
        self._recent = list(air.recent)
        self._repeats: dict[int, int] = {}
        self._started, (self._block, self._offset) = air.started, air.place
        self._queue = air.queue
        self._ages = pace.asynchronous and not pace.replaces_arrivals
        self._quick = pace.replaces_arrivals and away is None and not self._everyone
        self.down = 0  # bytes that each client is sent, if they are equal for all
        self.wanted = pace.required(self.target)

    # read by the pace

    @property
    def arrived(self) -> int:
        return len(self.arrivals)

    @property
    def flying(self) -> int:
        return len(self._flights)

    def starts(self) -> Iterable[int]:
        """For each arrived client, the number of its starts in rounds after that in which the oldest flight started."""
        counts = self._counts()
        return (counts[f.client] for f in self.arrivals)

    def goes_on(self, elapsed: float) -> bool:
        """Whether the pace waits for more arrivals, `elapsed` seconds after the round opened."""
        self.elapsed = elapsed
        return not self.pace.should_close(self)

    # starts

    def start_missing(self) -> list[Flight]:
        """Start the missing clients and return their flights."""
        started: list[Flight] = []
        if self._opening:
            opening, self._opening = self._opening, []
            for client in opening:
                if self._is_away is None or not self._is_away(client):
                    started.append(self._start(client))
                elif self._everyone:
                    self._idle.append(client)
        if self._quick and not started:
            return self._refill()
        counts = self._counts() if self._ages else None
        if self._everyone:
            waiting, self._idle = self._idle, []
            for client in sorted(waiting):
                must_wait = counts is not None and self._flights and not self.pace.may_start(counts[client])
                if must_wait or (self._is_away is not None and self._is_away(client)):
                    self._idle.append(client)
                else:
                    started.append(self._start(client))
            return started
        while len(self._flights) < self.target - self._done():
            client = self._draw(counts)
            if client is None:
                break
            started.append(self._start(client))
        return started

    def _refill(self) -> list[Flight]:
        """`start_missing` if each free candidate may start. It runs once per arrival, so its loop is inlined."""
        started, flights, busy, repeats = [], self._flights, self._busy, self._repeats
        for _ in range(2 * self._population.clients + 1):
            if len(flights) >= self.target:
                break
            while self._offset >= len(self._queue):
                self._next_block()
            client = self._queue[self._offset]
            self._offset += 1
            if client in busy:
                continue
            times, number = repeats.get(client, 0), self._started
            flight = _new(Flight, (client, self.round, times, number, self.down, 1.0))
            repeats[client] = times + 1
            self._started = number + 1
            flights[number] = flight
            busy.add(client)
            started.append(flight)
        return started

    def _done(self) -> int:
        """The number of clients of the cohort that arrived or failed and are not replaced until the round closes."""
        return 0 if self.pace.replaces_arrivals else len(self.arrivals) + len(self.failed)

    def _start(self, client: int) -> Flight:
        repeat = self._repeats.get(client, 0)
        self._repeats[client] = repeat + 1
        flight = Flight(client, self.round, repeat, self._started, self.down)
        self._started += 1
        if self._ages and self._flights:
            self._recent.append((client, self.round))
        self._flights[flight.number] = flight
        self._busy.add(client)
        return flight

    def _draw(self, counts: Counter[int] | None) -> int | None:
        """The next candidate that may start. Candidates are successive cohorts of the sampler, each in a random order.

        None if none of the next 2C + 1 candidates may start now, where C is the number of clients.
        """
        for _ in range(2 * self._population.clients + 1):
            while self._offset >= len(self._queue):
                self._next_block()
            client = self._queue[self._offset]
            self._offset += 1
            if client in self._busy or (self._is_away is not None and self._is_away(client)):
                continue
            if counts is None or not self._flights or self.pace.may_start(counts[client]):
                return client
        return None

    def _next_block(self) -> None:
        """Draw the next block of candidates. After a resume, draw the block that the saved state was in."""
        if self._queue:
            self._block, self._offset = self._block + 1, 0
        key = Key(self._seed).fold("stream", self._block)
        sampler = self._sampler
        if sampler.interchangeable:
            sampler = Uniform(min(self._population.clients, max(self.target, _BLOCK)))
        ids = sampler(self._population, self._block, key).ids
        self._queue = tuple(ids[key.fold("order").permutation(len(ids))].tolist())

    def _counts(self) -> Counter[int]:
        """For each client, the number of its starts in rounds after that in which the oldest flight started."""
        oldest = min((f.version for f in self._flights.values()), default=self.round)
        return Counter(client for client, version in self._recent if version > oldest)

    def sent(self, flight: Flight, down: int) -> Flight:
        """Record the number of bytes that the server sent to a client at its start. Returns the flight with it."""
        sent = self._flights[flight.number] = flight._replace(down=down)
        return sent

    def cut(self, number: int, share: float) -> None:
        """Record that a client stops after the fraction `share` of its work and sends the result."""
        self._flights[number] = self._flights[number]._replace(share=share)

    def in_the_air(self) -> tuple[int, ...]:
        """The numbers of the flights that have not arrived, ascending."""
        return tuple(self._flights)

    # arrivals

    def arrive(self, number: int) -> Flight:
        """Record that a contribution has arrived."""
        flight = self._land(number)
        self.arrivals.append(flight)
        return flight

    def fail(self, number: int) -> Flight:
        """Record that a flight has failed and will not arrive."""
        flight = self._land(number)
        self.failed.append(flight)
        return flight

    def _land(self, number: int) -> Flight:
        flight = self._flights.pop(number)
        self._busy.discard(flight.client)
        if self._everyone:
            self._idle.append(flight.client)
        return flight

    def abandon(self, number: int) -> None:
        """Stop waiting for a flight."""
        self._abandoned.append(self._land(number))

    def abandoned(self) -> tuple[Flight, ...]:
        """The flights that the training no longer waits for after the round has closed."""
        return (*self._abandoned, *(() if self.pace.asynchronous else self._flights.values()))

    def in_flight(self, known: Tensor | None, clock: Any) -> InFlight:
        """The clients in flight after the round has closed."""
        flights = tuple(self._flights.values()) if self.pace.asynchronous else ()
        recent: tuple[tuple[int, int], ...] = ()
        if self._ages and flights:
            oldest = min(f.version for f in flights)
            recent = tuple(r for r in self._recent if r[1] > oldest)
        idle, place = tuple(self._idle) if flights else (), (self._block, self._offset)
        return InFlight(flights, self.target, self._started, place, self._queue, idle, recent, known, clock)


def split_repeats(flights: Iterable[Flight]) -> Iterator[list[Flight]]:
    """Split flights into groups in which no client occurs twice. The flights of a client keep the order of its starts.

    Example:
        >>> first, second = Flight(3, 0, 0, 0), Flight(3, 0, 1, 5)
        >>> [len(group) for group in split_repeats([first, Flight(4, 0, 0, 1), second])]
        [2, 1]
    """
    rest = sorted(flights, key=lambda f: f.number)
    while rest:
        seen: set[int] = set()
        group: list[Flight] = []
        later: list[Flight] = []
        for flight in rest:
            (later if flight.client in seen else group).append(flight)
            seen.add(flight.client)
        yield group
        rest = later
