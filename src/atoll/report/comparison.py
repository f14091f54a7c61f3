"""Compare a metric of two runs at equal cost: by bytes, by time, and at a value that both runs reach.

Tests: tests/surface/test_tools.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atoll.report.chart import Axis, Drawing, Mark, Panel, Points, ReferenceLine, Series, Unit, suits_log
from atoll.report.flight_log import Numbers
from atoll.report.run_data import RunData
from atoll.runs.format import better, format_number, label, plain, rises

CLOCK, SECONDS = "seconds of virtual time", "seconds of computing"


@dataclass(frozen=True)
class Curve:
    """A metric over the rounds in which it was measured, and the cost up to each of these rounds.

    Args:
        name: the name of the run.
        rounds, values: the rounds and the metric, float64 `[measured]`.
        bytes: the bytes of all messages from the first round up to each of these rounds, float64 `[measured]`.
        times: the virtual or computing time from the first round up to each of these rounds, in seconds, float64
            `[measured]`.
    """

    name: str
    rounds: Numbers
    values: Numbers
    bytes: Numbers
    times: Numbers

    @classmethod
    def of(cls, record: RunData, metric: str, time: str) -> Curve:
        """Build the curve from the rows of a run; `time` is `CLOCK` or `SECONDS`."""
        at = {row["round"]: i for i, row in enumerate(record.rows)}
        spent = np.cumsum([_amount(r.get("bytes_up")) + _amount(r.get("bytes_down")) for r in record.rows])
        clock = time == CLOCK
        each = np.array([_amount(r.get("clock" if clock else "seconds")) for r in record.rows])
        times = np.maximum.accumulate(each) if clock and len(each) else np.cumsum(each)
        rounds, values = record.series(metric)
        where = [at[int(t)] for t in rounds]
        return cls(record.name, rounds, values, spent[where], times[where])

    def best(self, rising: bool) -> float | None:
        """The best finite value; None if no value is finite."""
        good = self.values[np.isfinite(self.values)]
        return None if not len(good) else float(good.max() if rising else good.min())

    def reaches(self, target: float, rising: bool) -> int | None:
        """The index of the first value that is at least as good as the target; None if no value is."""
        with np.errstate(invalid="ignore"):
            found = np.flatnonzero(self.values >= target if rising else self.values <= target)
        return int(found[0]) if len(found) else None


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


def _amount(value: object) -> float:
    """The number in a cell of a row; 0 if the cell contains no finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else 0.0  # type: ignore[arg-type]


def comparison_drawing(found: MetricComparison) -> Drawing:
    """The metric by bytes and by time. A ring marks the point at which a run reaches the target."""
    name = _titled(found.metric)
    by_bytes = _panel(found, [c.bytes for c in found.curves], f"{name} by bytes", "up and down, all clients", "bytes")
    by_time = _panel(found, [c.times for c in found.curves], f"{name} by time", found.time, "seconds")
    names = " and ".join(c.name for c in found.curves)
    return Drawing("comparison", f"{name} of {names} by bytes and by time.", [[by_bytes, by_time]], True, 0.32)


def apart(costs: Sequence[Numbers]) -> bool:
    """Whether the costs differ by more than a factor of 8, so that a linear axis would squeeze one line."""
    ends = [float(c[-1]) for c in costs if len(c)]
    return len(ends) == 2 and min(ends) > 0 and max(ends) > 8 * min(ends)


def _panel(found: MetricComparison, costs: Sequence[Numbers], title: str, label: str, unit: Unit) -> Panel:
    marks: list[Mark] = [ReferenceLine(found.target, "soft")]
    for i, (curve, x, at) in enumerate(zip(found.curves, costs, found.at, strict=True)):
        marks.append(Series(x.tolist(), curve.values.tolist(), f"s{i}", curve.name))
        if at is not None:
            marks.append(Points([float(x[at])], [float(curve.values[at])], f"s{i}", "ring"))
    log = not found.rising and suits_log(*(c.values.tolist() for c in found.curves))
    far = apart(costs)
    axis = Axis(label, unit, log=far, low=None if far else 0.0)
    remark = f"dashed: {format_number(found.target)}"
    return Panel(marks, title, remark, axis, Axis(log=log), names="top")


def _titled(name: str) -> str:
    words = label(name)
    return plain(words[:1].upper() + words[1:], 40)
