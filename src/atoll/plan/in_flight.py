"""Who is at work: flights that have started and not yet arrived, across rounds.

A cohort is a number of clients at work, so a round starts only what is missing. Everything here is a function of the
plan, the seed and the order of arrivals. When somebody arrives is said by whoever drives it: a virtual clock, worker
processes, a network.
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
_client, _number = itemgetter(0), itemgetter(3)  # of a flight; half the time of its names
_new = tuple.__new__  # half the time of the constructor that NamedTuple writes, where every start passes


class Flight(NamedTuple):
    """A client at work: who, from which round's model, how often it had started in that round before, which start of
    the whole run this is, how many bytes it was sent, and the part of its work that it had time for."""

    client: int
    birth: int
    again: int
    number: int
    down: int = 0
    share: float = 1.0


class Air(NamedTuple):
    """What is in the air between two rounds, and what drawing the next start needs.

    Args:
        flights: started and not yet arrived, by number.
        target: how many are at work when nothing is missing.
        started: how many starts there have been.
        place: where in the stream of candidates the next draw is: block, offset.
        queue: that block, where it is drawn already.
        idle: those to start first, where the cohort is everyone.
        recent: (client, round) of each start after the birth of the oldest flight.
        known: the round whose model each client has last been sent, int64 `[C]`, −1 none; None where nobody asks.
        clock: what the engine keeps of time; the plan does not look into it.
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


class Traffic:
    """One open round: who starts, arrives and fails, until the pace closes it.

    Args:
        pace: decides when the round closes.
        sampler: draws the candidates.
        seed, round: of the training.
        air: flights that started in earlier rounds.
        population: all clients.
        cohort: those who start as the round opens, where nothing is in the air; empty otherwise.
        away: whether a client cannot be started now; None: everybody always can.
    """

    def __init__(
        self,
        pace: Pace,
        sampler: Sampler,
        seed: int,
        round: int,
        air: Air,
        population: Population,
        cohort: Cohort,
        away: Callable[[int], bool] | None = None,
    ) -> None:
        self.pace = pace
        self.round = round
        self.arrivals: list[Flight] = []
        self.failed: list[Flight] = []
        self._left: list[Flight] = []
        self.elapsed = 0.0
        self._sampler, self._seed, self._population, self._away = sampler, seed, population, away
        self._air: dict[int, Flight] = dict(zip(map(_number, air.flights), air.flights, strict=True))
        self._busy: set[int] = set(map(_client, air.flights))
        self._opening = cohort.ids.tolist()
        self.target = air.target if air.flights else len(self._opening)
        self._everyone = self.target >= population.clients
        self._idle = list(air.idle) if air.flights else []
        self._recent = list(air.recent)
        self._again: dict[int, int] = {}
        self._started, (self._block, self._offset) = air.started, air.place
        self._queue = air.queue
        self._ages = pace.asynchronous and not pace.replaces_arrivals
        self._quick = pace.replaces_arrivals and away is None and not self._everyone
        self.down = 0  # bytes that each is sent, where it is the same for all
        self.wanted = pace.required(self.target)

    # what a pace sees

    @property
    def arrived(self) -> int:
        return len(self.arrivals)

    @property
    def flying(self) -> int:
        return len(self._air)

    def starts(self) -> Iterable[int]:
        """How often each arrived client has started while the oldest flight has been in the air."""
        counts = self._counts()
        return (counts[f.client] for f in self.arrivals)

    def goes_on(self, elapsed: float) -> bool:
        """Whether the pace waits for more, so many seconds after the round opened."""
        self.elapsed = elapsed
        return not self.pace.should_close(self)

    # who starts

    def fill(self) -> list[Flight]:
        """Start those who are missing; they are in the air from now on."""
        begun: list[Flight] = []
        if self._opening:
            opening, self._opening = self._opening, []
            for client in opening:
                if self._away is None or not self._away(client):
                    begun.append(self._start(client))
                elif self._everyone:
                    self._idle.append(client)
        if self._quick and not begun:
            return self._refill()
        counts = self._counts() if self._ages else None
        if self._everyone:
            waiting, self._idle = self._idle, []
            for client in sorted(waiting):
                late = counts is not None and self._air and not self.pace.may_start(counts[client])
                if late or (self._away is not None and self._away(client)):
                    self._idle.append(client)
                else:
                    begun.append(self._start(client))
            return begun
        while len(self._air) < self.target - self._done():
            client = self._draw(counts)
            if client is None:
                break
            begun.append(self._start(client))
        return begun

    def _refill(self) -> list[Flight]:
        """`fill` where all that is asked of a candidate is that it is free: once for each arrival, so written out."""
        begun, air, busy, again = [], self._air, self._busy, self._again
        for _ in range(2 * self._population.clients + 1):
            if len(air) >= self.target:
                break
            while self._offset >= len(self._queue):
                self._next_block()
            client = self._queue[self._offset]
            self._offset += 1
            if client in busy:
                continue
            times, number = again.get(client, 0), self._started
            flight = _new(Flight, (client, self.round, times, number, self.down, 1.0))
            again[client] = times + 1
            self._started = number + 1
            air[number] = flight
            busy.add(client)
            begun.append(flight)
        return begun

    def _done(self) -> int:
        """Places of the cohort that stay empty until the round closes: those of whoever arrived or failed in it."""
        return 0 if self.pace.replaces_arrivals else len(self.arrivals) + len(self.failed)

    def _start(self, client: int) -> Flight:
        again = self._again.get(client, 0)
        self._again[client] = again + 1
        flight = Flight(client, self.round, again, self._started, self.down)
        self._started += 1
        if self._ages and self._air:
            self._recent.append((client, self.round))
        self._air[flight.number] = flight
        self._busy.add(client)
        return flight

    def _draw(self, counts: Counter[int] | None) -> int | None:
        """The next candidate who is free: the sampler's own cohorts, one after the other, in a keyed order.

        None where a whole population was passed over: nobody can start now.
        """
        for _ in range(2 * self._population.clients + 1):
            while self._offset >= len(self._queue):
                self._next_block()
            client = self._queue[self._offset]
            self._offset += 1
            if client in self._busy or (self._away is not None and self._away(client)):
                continue
            if counts is None or not self._air or self.pace.may_start(counts[client]):
                return client
        return None

    def _next_block(self) -> None:
        """Draw another block of candidates, or the one whose place a state remembers."""
        if self._queue:
            self._block, self._offset = self._block + 1, 0
        key = Key(self._seed).fold("stream", self._block)
        sampler = self._sampler
        if sampler.interchangeable:
            sampler = Uniform(min(self._population.clients, max(self.target, _BLOCK)))
        ids = sampler(self._population, self._block, key).ids
        self._queue = tuple(ids[key.fold("order").permutation(len(ids))].tolist())

    def _counts(self) -> Counter[int]:
        """How often each client has started since the oldest flight in the air did."""
        oldest = min((f.birth for f in self._air.values()), default=self.round)
        return Counter(client for client, birth in self._recent if birth > oldest)

    def sent(self, flight: Flight, down: int) -> None:
        """A flight was sent so many bytes when it started."""
        self._air[flight.number] = flight._replace(down=down)

    def cut(self, number: int, share: float) -> None:
        """A flight stops its work here, and sends what it has."""
        self._air[number] = self._air[number]._replace(share=share)

    def in_the_air(self) -> tuple[int, ...]:
        """The numbers of the flights that have not come back, rising."""
        return tuple(self._air)

    # who comes back

    def arrive(self, number: int) -> Flight:
        """A contribution is here."""
        flight = self._land(number)
        self.arrivals.append(flight)
        return flight

    def fail(self, number: int) -> Flight:
        """A flight will not arrive."""
        flight = self._land(number)
        self.failed.append(flight)
        return flight

    def _land(self, number: int) -> Flight:
        flight = self._air.pop(number)
        self._busy.discard(flight.client)
        if self._everyone:
            self._idle.append(flight.client)
        return flight

    def leave(self, number: int) -> None:
        """A flight is no longer awaited."""
        self._left.append(self._land(number))

    def late(self) -> tuple[Flight, ...]:
        """Those who are not awaited once the round has closed."""
        return (*self._left, *(() if self.pace.asynchronous else self._air.values()))

    def after(self, known: Tensor | None, clock: Any) -> Air:
        """What is in the air once the round has closed."""
        flights = tuple(self._air.values()) if self.pace.asynchronous else ()
        recent: tuple[tuple[int, int], ...] = ()
        if self._ages and flights:
            oldest = min(f.birth for f in flights)
            recent = tuple(r for r in self._recent if r[1] > oldest)
        idle, place = tuple(self._idle) if flights else (), (self._block, self._offset)
        return Air(flights, self.target, self._started, place, self._queue, idle, recent, known, clock)


def waves(flights: Iterable[Flight]) -> Iterator[list[Flight]]:
    """Flights in groups in which nobody stands twice, each client's own in the order of its starts.

    Example:
        >>> first, second = Flight(3, 0, 0, 0), Flight(3, 0, 1, 5)
        >>> [len(wave) for wave in waves([first, Flight(4, 0, 0, 1), second])]
        [2, 1]
    """
    rest = sorted(flights, key=lambda f: f.number)
    while rest:
        seen: set[int] = set()
        wave: list[Flight] = []
        later: list[Flight] = []
        for flight in rest:
            (later if flight.client in seen else wave).append(flight)
            seen.add(flight.client)
        yield wave
        rest = later
