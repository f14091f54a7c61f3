"""Flights and message sizes of clients, read from events.jsonl into a table of bounded size.

A flight is one training task of a client: download, computing, upload.

Tests: tests/surface/test_timeline.py.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atoll.report.flight_rows import Row

Numbers = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
MOST_LANES = 40


@dataclass(frozen=True)
class FlightLog:
    """Flights that have ended, in the order of their starts.

    Args:
        number: the index of the start, from 0, int64 `[flights]`.
        client: the id of the client, int64 `[flights]`.
        birth: the round of the model that the client started from, int64 `[flights]`.
        times: start, end of the download, end of computing, end; float64 `[4, flights]`, in seconds of virtual time,
            each at least as large as the previous one.
        fate: the outcome, int64 `[flights]`: 0 arrived, 1 dropped, 2 late (abandoned).
    """

    number: Whole
    client: Whole
    birth: Whole
    times: Numbers
    fate: Whole

    @classmethod
    def of(cls, rows: list[Row]) -> FlightLog:
        """Build the columns from rows of number, client, birth, four times and fate."""
        table = np.array(rows, dtype=np.float64).reshape(-1, 8)
        table = table[np.argsort(table[:, 0], kind="stable")]
        number, client, birth, fate = (table[:, at].astype(np.int64) for at in (0, 1, 2, 7))
        return cls(number, client, birth, table[:, 3:7].T, fate)

    def __len__(self) -> int:
        return len(self.number)

    @property
    def start(self) -> Numbers:
        found: Numbers = self.times[0]
        return found

    @property
    def end(self) -> Numbers:
        found: Numbers = self.times[3]
        return found

    def known(self) -> float:
        """The time up to which the table is complete. A flight in progress is missing, and its number is a gap."""
        missing = np.flatnonzero(self.number != np.arange(len(self)))
        return float(self.start[missing[0]] if len(missing) else self.start[-1])

    def window(self, closings: Numbers, flying: bool, flights: float = 24.0, rounds: int = 3) -> float:
        """The end of the part of the run that the timeline shows, in seconds.

        Args:
            closings: the times at which rounds closed, ascending.
            flying: whether some flights have not ended.
            flights: the length of this part, as a multiple of the median duration of a flight.
            rounds: the number of rounds that must close in this part.
        """
        last = float(self.end.max(initial=0.0))
        if flying and self.known() > last / 2:
            last = self.known()
        usual = flights * float(np.median(self.end - self.start))
        closed = float(closings[min(rounds, len(closings)) - 1]) if len(closings) else 0.0
        wanted = max(usual, closed)
        return last if wanted <= 0 or last <= 1.3 * wanted else wanted

    def among(self, until: float) -> FlightLog:
        """The flights that started before a time."""
        there = self.start < until
        number, client, birth, fate = (c[there] for c in (self.number, self.client, self.birth, self.fate))
        return FlightLog(number, client, birth, self.times[:, there], fate)

    def lanes(self) -> tuple[Whole, tuple[int, ...]]:
        """Assign each flight to a row of the timeline, so that flights in one row do not overlap.

        Returns:
            the rows, int64 `[flights]`, from 0, and the ids of the clients, one per row. With more than 40 clients the
            ids are `()`, and each flight takes the lowest free row.
        """
        clients = np.unique(self.client)
        if len(clients) <= MOST_LANES:
            return np.searchsorted(clients, self.client), tuple(clients.tolist())
        rows = np.empty(len(self), dtype=np.int64)
        free: list[int] = []
        busy: list[tuple[float, int]] = []
        for at in np.lexsort((self.number, self.start)):
            while busy and busy[0][0] <= self.start[at]:
                heapq.heappush(free, heapq.heappop(busy)[1])
            row = heapq.heappop(free) if free else len(busy)
            heapq.heappush(busy, (float(self.end[at]), row))
            rows[at] = row
        return rows, ()

    def at_work(self, until: float, rows: Whole, count: int, fate: int | None = 0) -> Numbers:
        """For each row, the fraction of the time up to `until` in which a flight of this fate runs; None: any fate."""
        there = np.ones(len(self), dtype=bool) if fate is None else self.fate == fate
        spent = np.minimum(self.end, until) - np.minimum(self.start, until)
        return np.bincount(rows[there], weights=spent[there], minlength=count) / until
