"""The virtual clock: an event queue that returns the next arrival or dropout and its time.

    start ──download──▶ loaded ──compute──▶ computed ──upload──▶ end

A transfer passes through two links: the client's own link and the server's link. It ends when both have carried its
bytes. The server's link serves all n transfers of one direction at the same time, at rate/n each. It buffers the bytes
that a slower client link has not taken yet. So a single transfer takes max(bytes/own, bytes/server), and the server's
link is never idle while a transfer waits.

The key of every draw is (seed, client) or (seed, ordinal of the flight). Events at equal times are ordered by the
ordinal, so the order of calls does not matter.

Tests: tests/identities/test_clock.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.engine.simulation.fleet import Fleet
from atoll.engine.simulation.samples import Draws

_DOWN, _WORK, _UP, _ARRIVE, _DROP = range(5)
_FATES = ("arrive", "drop", "cancel")
_new = tuple.__new__  # twice as fast as the generated constructor; used in the inner loop


class Event(NamedTuple):
    """An event at the server: a flight arrived ("arrive") or was lost ("drop")."""

    time: float
    kind: str
    number: int
    client: int


class SimulatedTimes(NamedTuple):
    """The times of one ended flight, in seconds. `fate` is "arrive", "drop" or "cancel"."""

    number: int
    client: int
    start: float
    loaded: float
    computed: float
    end: float
    fate: str


class _Flight(NamedTuple):
    """A flight in progress. Immutable, since copies of a clock share flights."""

    time: float  # of the next event; in a pool: the end of the transfer on the client's own link
    number: int
    stage: int
    client: int
    start: float
    loaded: float
    computed: float
    target: float  # the value of the pool's `served` at which the transfer ends; see `_Pool`
    up: int
    work: float


class _Pool:
    """The server's link in one direction: processor sharing by virtual service.

    served(t) is the number of bytes that a transfer present since time 0 has received: d served/dt = rate/n. A transfer
    of b bytes that joins at time s ends when served reaches served(s) + b, whichever transfers join or leave meanwhile.
    So one heap suffices, and an event costs O(log n).

    Reference: Parekh, Gallager, A Generalized Processor Sharing Approach to Flow Control, 1993.
    """

    __slots__ = ("_at", "_due", "_heap", "_n", "_rate", "_served")

    def __init__(self, rate: float, served: float = 0.0, at: float = 0.0, inside: Iterable[_Flight] = ()) -> None:
        self._rate, self._served, self._at = rate, served, at
        self._heap = [(flight.target, flight.number, flight) for flight in inside]
        heapify(self._heap)
        self._n = len(self._heap)
        self._due: float | None = None  # cached until a transfer joins or leaves

    def copy(self) -> _Pool:
        other = _Pool(self._rate, self._served, self._at)
        other._heap, other._n = self._heap.copy(), self._n
        return other

    def _serve(self, now: float) -> None:
        if self._n:
            self._served += (now - self._at) * self._rate / self._n
        self._at = now
        self._due = None

    def target(self, now: float, size: int) -> float:
        """The value of `served` at which a transfer of `size` bytes ends if it joins now."""
        self._serve(now)
        return self._served + size

    def join(self, flight: _Flight) -> None:
        self._n += 1
        heappush(self._heap, (flight.target, flight.number, flight))

    def due(self, flights: Mapping[int, _Flight]) -> float:
        """The time at which the next transfer ends; infinity if no transfer is in progress.

        It is valid until a transfer joins or is cancelled, because these events change the rates of the others.
        """
        if self._due is None:
            heap = self._heap
            while heap and flights.get(heap[0][1]) is not heap[0][2]:
                heappop(heap)  # cancelled
            self._due = math.inf
            if heap:
                self._due = self._at + max(heap[0][0] - self._served, 0.0) * self._n / self._rate
        return self._due

    def pop(self, now: float) -> _Flight:
        """Remove the transfer that ends now and return it."""
        self._served, _, flight = heappop(self._heap)
        self._at, self._due = now, None
        self._n -= 1
        return flight

    def leave(self, now: float) -> None:
        """Cancel a transfer: the others share its part of the rate from now on."""
        self._serve(now)
        self._n -= 1

    def state(self) -> tuple[float, float]:
        return self._served, self._at


class Clock:
    """Simulated time of a fleet: flights start, arrive and drop.

    Args:
        fleet: durations, availability and dropout.
        sizes: the number of rows of each client, int64 `[C]`, ≥ 0.
        seed: the key of every draw.
    Raises:
        UsageError: values or a trace of the fleet are for another number of clients.
    Example:
        >>> from atoll.engine.simulation.fleet import Each
        >>> clock = Clock(Fleet(compute=Each((3, 1))), torch.tensor([10, 10]), seed=7)
        >>> clock.start(0, client=0, down=0, up=0)
        >>> clock.start(1, client=1, down=0, up=0)
        >>> clock.next()
        Event(time=1.0, kind='arrive', number=1, client=1)
    """

    def __init__(self, fleet: Fleet, sizes: Tensor, seed: int) -> None:
        self._begin(Draws(fleet, sizes, seed))

    def _begin(self, draws: Draws) -> None:
        self.now = 0.0
        self._draws = draws
        self._flights: dict[int, _Flight] = {}
        self._heap: list[_Flight] = []
        self._trips: list[SimulatedTimes] = []
        self._pools: tuple[_Pool, ...] = ()
        if draws.server is not None:
            self._pools = (_Pool(draws.server), _Pool(draws.server))

    def __len__(self) -> int:
        """The number of flights in progress."""
        return len(self._flights)

    def start(self, number: int, client: int, down: int, up: int, work: float = 1.0) -> None:
        """Start a flight now.

        Args:
            number: the ordinal of the flight, ≥ 0, not used before.
            client: the client's id, in [0, C).
            down, up: bytes of the download and the upload, ≥ 0.
            work: the factor of the compute time, ≥ 0 and finite; 1 is a full job.
        Raises:
            UsageError: the number is in flight, or a value is outside its range. No flight was started.
        """
        draws = self._draws
        if (
            not 0 <= client < draws.clients
            or number in self._flights
            or number < 0
            or down < 0
            or up < 0
            or not 0 <= work < math.inf
        ):
            raise self._refusal(number, client, down, up, work)
        now = self.now
        loaded = now + down / draws.down.at(client, number)
        if self._pools and down:
            pool = self._pools[0]
            target = pool.target(now, down)
            flight = _new(_Flight, (loaded, number, _DOWN, client, now, now, now, target, up, work))
            self._flights[number] = flight
            pool.join(flight)
        else:
            self._loaded(loaded, number, client, now, up, work)

    def _refusal(self, number: int, client: int, down: int, up: int, work: float) -> UsageError:
        twice = f"{number} is in flight. " if number in self._flights else ""
        return UsageError(
            f"start({number}, {client}, {down}, {up}, {work}) at {self.now:g} s. {twice}".rstrip(),
            f"a number ≥ 0 that is not in use, a client in [0, {self._draws.clients}), bytes ≥ 0, finite work ≥ 0.",
        )

    def _loaded(self, carried: float, number: int, client: int, start: float, up: int, work: float) -> None:
        """The links have carried a flight's download. After the latency, the client computes."""
        draws = self._draws
        wait = draws.latency.at(client, number)
        loaded = carried + wait
        seconds = draws.compute.at(client, number) * work
        moment = draws.lost.at(client, number)
        if moment < 1:
            end = loaded + moment * seconds
            flight = _new(_Flight, (end, number, _DROP, client, start, loaded, end, 0.0, up, work))
        else:
            computed = loaded + seconds
            if self._pools and up:
                flight = _new(_Flight, (computed, number, _WORK, client, start, loaded, computed, 0.0, up, work))
            else:
                end = computed + up / draws.up.at(client, number) + wait
                flight = _new(_Flight, (end, number, _ARRIVE, client, start, loaded, computed, 0.0, up, work))
        self._flights[number] = flight
        heappush(self._heap, flight)

    def _send(self, flight: _Flight) -> None:
        """A client has computed: its upload joins the server's link."""
        own = flight.time + flight.up / self._draws.up.at(flight.client, flight.number)
        pool = self._pools[1]
        flight = flight._replace(stage=_UP, target=pool.target(flight.time, flight.up), time=own)
        self._flights[flight.number] = flight
        pool.join(flight)

    def _served(self, which: int, now: float) -> None:
        """The server's link has carried a transfer. The client's own link may need longer."""
        flight = self._pools[which].pop(now)
        carried = max(now, flight.time)
        number, client = flight.number, flight.client
        if which == 0:
            self._loaded(carried, number, client, flight.start, flight.up, flight.work)
        else:
            flight = flight._replace(stage=_ARRIVE, time=carried + self._draws.latency.at(client, number))
            self._flights[number] = flight
            heappush(self._heap, flight)

    def next(self, until: float | None = None) -> Event | None:
        """Advance to the next arrival or drop, or to `until`.

        Args:
            until: seconds, ≥ `now`. Events at exactly this time are returned first. None: no limit.
        Returns:
            The event; `now` is then its time. None if `until` was reached, or if no flight is in progress.
        Raises:
            UsageError: `until` < `now`.
        """
        last = math.inf if until is None else until
        if not last >= self.now:
            raise UsageError(
                f"next(until={until}) at {self.now} s.", "until ≥ now.", "events before now have been returned already."
            )
        heap, flights = self._heap, self._flights
        while True:
            flight = heap[0] if heap else None
            if flight is not None and flights.get(flight[1]) is not flight:
                heappop(heap)  # cancelled, or already in its next stage
                continue
            due = math.inf if flight is None else flight[0]
            if self._pools:
                down, up = self._pools[0].due(flights), self._pools[1].due(flights)
                first = down if down <= up else up
                if first <= due and first <= last and first < math.inf:
                    self._served(int(up < down), first)
                    continue
            if flight is None or due > last:
                self.now = self.now if until is None else until
                return None
            heappop(heap)
            if flight.stage == _WORK:
                self._send(flight)
                continue
            self.now = due
            fate = _FATES[flight.stage - _ARRIVE]
            self._end(flight, due, fate)
            return _new(Event, (due, fate, flight.number, flight.client))

    def _end(self, flight: _Flight, end: float, fate: str) -> None:
        _, number, _, client, start, loaded, computed, _, _, _ = flight
        del self._flights[number]
        self._trips.append(_new(SimulatedTimes, (number, client, start, loaded, computed, end, fate)))

    def cancel(self, number: int) -> None:
        """End a flight now. Its transfer leaves the server's link at once.

        Raises:
            UsageError: no flight with this number is in progress.
        """
        flight = self._flights.get(number)
        if flight is None:
            raise UsageError(f"cancel({number}) at {self.now} s.", "the number of a flight in progress.")
        now = self.now
        if flight.stage in (_DOWN, _UP):
            self._pools[flight.stage == _UP].leave(now)
        loaded = now if flight.stage == _DOWN else min(flight.loaded, now)
        self._end(flight._replace(loaded=loaded, computed=max(loaded, min(flight.computed, now))), now, "cancel")

    def cut(self, number: int) -> float:
        """Stop the computation of a flight now and send the work done so far.

        Returns:
            The fraction of the work that is done: 0 before the computation, 1 if the upload has started. A flight that
            will be lost is still lost.
        """
        flight, now, draws = self._flights[number], self.now, self._draws
        if flight.stage == _DOWN or flight.loaded >= now:
            return 0.0
        if flight.stage not in (_WORK, _ARRIVE) or flight.computed <= now:
            return 1.0
        cut = flight._replace(time=now, computed=now)
        if flight.stage == _ARRIVE:
            wait = draws.latency.at(flight.client, number)
            cut = cut._replace(time=now + flight.up / draws.up.at(flight.client, number) + wait)
        self._flights[number] = cut
        heappush(self._heap, cut)
        return (now - flight.loaded) / (flight.computed - flight.loaded)

    def available(self, client: int) -> bool:
        """Whether a client is available now."""
        return self._draws.calendar.available(client, self.now)

    def present(self) -> Tensor:
        """Which clients are available now, bool `[C]`."""
        return self._draws.calendar.present(self.now)

    def next_change(self) -> float:
        """The first time after now at which availability can change; inf if it never changes."""
        return self._draws.calendar.next_change(self.now)

    def compute_seconds(self, client: int, number: int) -> float:
        """Seconds that a full job of this client takes in this flight."""
        return self._draws.compute.at(client, number)

    def predict(self, client: int, down: int, up: int, work: float = 1.0, number: int = 0) -> float:
        """Seconds of a flight that shares the server's link with no other flight and is not lost.

        max(down/own, down/server) + compute·work + max(up/own, up/server) + 2·latency

        Args:
            client: the client's id, in [0, C).
            down, up: bytes of the download and the upload, ≥ 0.
            work: the factor of the compute time.
            number: the ordinal of the flight.
        """
        draws = self._draws
        server = math.inf if draws.server is None else draws.server
        links = down / min(draws.down.at(client, number), server) + up / min(draws.up.at(client, number), server)
        return links + draws.compute.at(client, number) * work + 2 * draws.latency.at(client, number)

    def fastest(self, down: int, up: int, work: float | Tensor = 1.0) -> float:
        """A lower bound for the seconds of any flight of any client. A deadline must be longer than this.

        Args:
            down, up: bytes of the download and the upload, ≥ 0.
            work: the factor of the compute time: a number, or float `[C]`, one for each client.
        """
        draws = self._draws
        server = math.inf if draws.server is None else draws.server
        links = down / draws.down.extreme(1).clamp(max=server) + up / draws.up.extreme(1).clamp(max=server)
        return float((links + draws.compute.extreme(0) * work + 2 * draws.latency.extreme(0)).min())

    def trips(self) -> list[SimulatedTimes]:
        """Flights that ended since the last call, in order of their ends."""
        ended, self._trips = self._trips, []
        return ended

    def copy(self) -> Clock:
        """An independent copy of this clock."""
        other = object.__new__(Clock)
        other.now, other._draws = self.now, self._draws
        other._flights, other._heap, other._trips = self._flights.copy(), self._heap.copy(), self._trips.copy()
        other._pools = tuple(pool.copy() for pool in self._pools)
        return other

    def tensors(self) -> dict[str, Tensor]:
        """The state of the clock for a checkpoint, without rounding.

        Returns:
            now float64 `[]`; fleet int64 `[]`, a fingerprint; flights int64 `[F, 4]` and flight_times float64
            `[F, 6]`; links float64 `[0 or 2, 2]`; trips int64 `[T, 3]` and trip_times float64 `[T, 4]`.
        """
        flights = [self._flights[number] for number in sorted(self._flights)]
        trips = self._trips
        return {
            "now": torch.tensor(self.now, dtype=torch.float64),
            "fleet": torch.tensor(self._draws.fingerprint),
            "flights": _ints([(f.number, f.stage, f.client, f.up) for f in flights], 4),
            "flight_times": _floats([(f.time, f.start, f.loaded, f.computed, f.target, f.work) for f in flights], 6),
            "links": _floats([pool.state() for pool in self._pools], 2),
            "trips": _ints([(t.number, t.client, _FATES.index(t.fate)) for t in trips], 3),
            "trip_times": _floats([(t.start, t.loaded, t.computed, t.end) for t in trips], 4),
        }

    @classmethod
    def of(cls, fleet: Fleet, sizes: Tensor, seed: int, tensors: Mapping[str, Tensor]) -> Clock:
        """Restore a clock from its `tensors()`. It continues with the same bits.

        Args:
            fleet, sizes, seed: the arguments with which the saved clock was built.
            tensors: the result of `tensors()`.
        Raises:
            RunError: the clock was saved with another fleet, trace, population or seed.
        """
        clock = cls(fleet, sizes, seed)
        draws = clock._draws
        if int(tensors["fleet"]) != draws.fingerprint:
            raise RunError(
                f"The clock was not saved with {fleet!r}, {len(sizes)} clients and seed {seed}.",
                "the fleet, traces, rows and seed with which it was saved.",
                "flights in progress would arrive at other times.",
            )
        clock.now = float(tensors["now"])
        rows = zip(tensors["flights"].tolist(), tensors["flight_times"].tolist(), strict=True)
        for (number, stage, client, up), (time, start, loaded, computed, target, work) in rows:
            flight = _new(_Flight, (time, number, stage, client, start, loaded, computed, target, up, work))
            clock._flights[number] = flight
        flights = clock._flights.values()
        clock._heap = [flight for flight in flights if flight.stage not in (_DOWN, _UP)]
        heapify(clock._heap)
        if draws.server is not None:
            clock._pools = tuple(
                _Pool(draws.server, served, at, [flight for flight in flights if flight.stage == stage])
                for stage, (served, at) in zip((_DOWN, _UP), tensors["links"].tolist(), strict=True)
            )
        ended = zip(tensors["trips"].tolist(), tensors["trip_times"].tolist(), strict=True)
        clock._trips = [
            SimulatedTimes(number, client, start, loaded, computed, end, _FATES[fate])
            for (number, client, fate), (start, loaded, computed, end) in ended
        ]
        return clock


def _ints(rows: list[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)


def _floats(rows: list[tuple[float, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)
