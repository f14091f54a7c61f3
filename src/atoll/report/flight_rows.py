"""The lines of flights and of clients in the log of a run, as plain numbers. Loads without NumPy.

Tests: tests/surface/test_timeline.py, tests/surface/test_report.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = tuple[int, int, int, float, float, float, float, int]  # number, client, birth, four times, fate

FATES = ("arrived", "dropped", "late")
TIMES = ("start", "loaded", "computed", "end")
MOST_FLIGHTS = 50_000


@dataclass
class Tally:
    """Totals over the contributions in the log: bytes of each client, and the distribution of staleness.

    Args:
        up, down: the bytes that each client sent and received; the keys are client ids.
        staleness: the number of contributions of each staleness; the keys are the staleness in rounds.
        rounds: the number of rounds that were read.
        of: the number of rounds in the log.
    """

    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    rounds: int = 0
    of: int = 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Add one round; a column whose length differs from that of the ids is ignored."""
        ids = event.get("id")
        if not isinstance(ids, list):
            return
        self.rounds += 1
        for into, name in ((self.up, "bytes_up"), (self.down, "bytes_down")):
            for client, size in _pairs(ids, event.get(name)):
                into[client] = into.get(client, 0) + size
        self.staleness.update(late for _, late in _pairs(ids, event.get("staleness")))


def _pairs(ids: list[Any], values: Any) -> list[tuple[int, int]]:
    if not isinstance(values, list) or len(values) != len(ids):
        return []
    return [(i, v) for i, v in zip(ids, values, strict=True) if type(i) is int and type(v) is int and v >= 0]


def read_trips(event: Mapping[str, Any], room: int) -> list[Row]:
    """Read at most `room` flights from one line of the log; malformed entries are ignored."""
    columns: list[Any] = [event.get(name) for name in ("number", "client", "birth", *TIMES, "fate")]
    if not all(isinstance(c, list) for c in columns) or len(set(map(len, columns))) != 1:
        return []
    out: list[Row] = []
    for number, client, birth, start, loaded, computed, end, fate in zip(*columns, strict=True):
        if len(out) == room:
            break
        times = (start, loaded, computed, end)
        counts = all(type(v) is int and 0 <= v < 1 << 53 for v in (number, client, birth))
        if not counts or fate not in FATES or not all(isinstance(t, (int, float)) and 0 <= t < 1e16 for t in times):
            continue
        if start <= loaded <= computed <= end:
            out.append((number, client, birth, start, loaded, computed, end, FATES.index(fate)))
    return out
