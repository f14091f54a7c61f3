"""Compare a metric of two runs at equal cost: by bytes, by time, and at a value that both runs reach.

Tests: tests/surface/test_tools.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from typing import Any

from atoll.report.run_data import RunData
from atoll.runs.format import better, rises

CLOCK, SECONDS = "seconds of virtual time", "seconds of computing"


@dataclass(frozen=True)
class Curve:
    """A metric over the rounds in which it was measured, and the cost up to each of these rounds.

    Args:
        name: the name of the run.
        rounds, values: the rounds and the metric, `[measured]`.
        bytes: the bytes of all messages from the first round up to each of these rounds, `[measured]`.
        times: the virtual or computing time from the first round up to each of these rounds, in seconds, `[measured]`.
    """

    name: str
    rounds: tuple[float, ...]
    values: tuple[float, ...]
    bytes: tuple[float, ...]
    times: tuple[float, ...]

    @classmethod
    def of(cls, record: RunData, metric: str, time: str) -> Curve:
        """Build the curve from the rows of a run; `time` is `CLOCK` or `SECONDS`."""
        at = {row["round"]: i for i, row in enumerate(record.rows)}
        spent = list(accumulate(map(add, _amounts(record, "bytes_up"), _amounts(record, "bytes_down"))))
        clock = time == CLOCK
        each = _amounts(record, "clock" if clock else "seconds")
        times = list(accumulate(each, max if clock else add))
        rounds, values = record.numbers(metric)
        where = [at[t] for t in rounds]
        costs = (tuple(of[i] for i in where) for of in (spent, times))
        return cls(record.name, tuple(map(float, rounds)), tuple(map(float, values)), *costs)

    def at(self, rounds: Collection[float]) -> Curve:
        """The curve in some of its rounds."""
        keep = [i for i, t in enumerate(self.rounds) if t in rounds]
        parts = (tuple(of[i] for i in keep) for of in (self.rounds, self.values, self.bytes, self.times))
        return Curve(self.name, *parts)

    def best(self, rising: bool) -> float | None:
        """The best finite value; None if no value is finite."""
        return (max if rising else min)(filter(math.isfinite, self.values), default=None)

    def reaches(self, target: float, rising: bool) -> int | None:
        """The index of the first value that is at least as good as the target; None if no value is."""
        met = (i for i, v in enumerate(self.values) if (v >= target if rising else v <= target))
        return next(met, None)


@dataclass(frozen=True)
class MetricComparison:
    """One metric of two runs.

    Args:
        metric: the name of the metric.
        time: the kind of time: `CLOCK` if both runs have a virtual clock, else `SECONDS`.
        target: the value to reach. The default is the worse of the two best values, because both runs reach it.
        curves: the curves of the two runs.
    """

    metric: str
    time: str
    target: float
    curves: tuple[Curve, Curve]

    @property
    def rising(self) -> bool:
        """Whether a higher value is better."""
        return bool(rises(self.metric))

    @property
    def at(self) -> tuple[int | None, int | None]:
        """For each run, the index at which it reaches the target; None if it does not."""
        first, second = (curve.reaches(self.target, self.rising) for curve in self.curves)
        return first, second

    @classmethod
    def of(cls, a: RunData, b: RunData, target: float | None = None) -> MetricComparison | None:
        """Compare two runs by their selection metric; None if they share no metric with finite values."""
        shared = [n for n in (a.judged, b.judged, *a.columns) if n in a.columns and n in b.columns]
        clock = all(r.last("clock") is not None for r in (a, b))
        time = CLOCK if clock else SECONDS
        for metric in shared:
            rising = rises(metric)
            if rising is None:
                continue
            curves = Curve.of(a, metric, time), Curve.of(b, metric, time)
            best = [v for c in curves if (v := c.best(rising)) is not None]
            if len(best) == 2:
                worse = best[1] if better(best[0], best[1], rising) else best[0]
                return cls(metric, time, worse if target is None else target, curves)
        return None


def _amounts(record: RunData, name: str) -> Sequence[float]:
    """The numbers of a column, `[rows]`; 0 where a row has no finite number."""
    values: list[Any] = [row.get(name) for row in record.rows]
    if set(map(type, values)) <= {int, float} and all(map(math.isfinite, values)):
        return list(map(float, values))
    return [float(v) if type(v) in (int, float) and math.isfinite(v) else 0.0 for v in values]
