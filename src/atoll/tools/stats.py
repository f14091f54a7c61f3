"""Statistics of the rows of all clients, from sums: no client shows a row.

    first gather    count, Σ x, smallest and largest value of each column
    second gather   Σ (x − mean)², products of columns, 256 bins from the smallest to the largest value

Means, deviations and correlations are those of the joined rows. Quantiles come from the bins, so they are right within
the width of one bin. The smallest and largest values are values of single rows.

Tests: tests/surface/test_stats.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Line
from atoll.base.random import Key
from atoll.compute.batches import ClientBatch
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.rows import IGNORED
from atoll.data.scale import LEVELS, ScaledRows, Sums, centred_sums, exact_total, mean_of
from atoll.data.sources import Source
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Contribution, Declared, Local, Tensors, Total
from atoll.plan.round import open_round
from atoll.plan.state import State
from atoll.runs.format import format_number, plain, whole
from atoll.runs.frames import frame_of_columns
from atoll.runs.summary import grid

BINS = 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_CORRELATED = 500  # columns: four matrices of this size for each client
_SHOWN = 20  # clients, and columns of correlations, on a terminal


@dataclass(frozen=True)
class ColumnStatistics:
    """The statistics of one column.

    Args:
        name: the name of the column; `column=level` for a level of a text, with 1 for its rows.
        count, missing: the number of rows with and without a value.
        mean, sd: mean and standard deviation (n − 1); NaN if undefined.
        low, high: the smallest and the largest value.
        quantiles: by probability, right within (high − low)/256.
        histogram: the number of values in each of 256 equal bins from low to high.
    """

    name: str
    count: int
    missing: int
    mean: float
    sd: float
    low: float
    high: float
    quantiles: Mapping[float, float]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """The statistics of all rows, as `describe` returns them.

    Args:
        rows: the number of rows.
        clients: the number of rows of each client by its name.
        columns: the statistics of each column: features, then numbers to predict.
        correlation: the correlation of each pair of columns over the rows that have both; None above 500 columns.
        classes: the number of rows of each class by client; None if the target is no class.
    """

    rows: int
    clients: Mapping[str, int]
    columns: tuple[ColumnStatistics, ...]
    correlation: tuple[tuple[float, ...], ...] | None
    classes: Mapping[str, Mapping[str, int]] | None

    def frame(self, backend: Literal["pandas", "polars", "pyarrow"] = "pandas") -> Any:
        """The columns as a data frame, one row for each column of the data."""
        return frame_of_columns(
            {name: [row[name] for row in self._rows()] for name in self._rows()[0]}, backend, "describe(data).frame()"
        )

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "column": c.name,
                "count": c.count,
                "missing": c.missing,
                "mean": c.mean,
                "sd": c.sd,
                "min": c.low,
                **{f"q{round(100 * q):02d}": value for q, value in c.quantiles.items()},
                "max": c.high,
            }
            for c in self.columns
        ]

    def values(self) -> dict[str, Any]:
        """The statistics as values of JSON."""
        columns = [{**row, "histogram": list(c.histogram)} for row, c in zip(self._rows(), self.columns, strict=True)]
        return {
            "rows": self.rows,
            "clients": dict(self.clients),
            "columns": columns,
            "correlation": self.correlation,
            "classes": self.classes,
        }

    def text(self) -> str:
        """The statistics as tables of text."""
        rows = self._rows()
        heads = list(rows[0])
        cells = [heads, *([plain(r["column"], 30), *(_cell(r[n]) for n in heads[1:])] for r in rows)]
        lines = [f"{whole(self.rows)} rows of {whole(len(self.clients))} clients", "", *grid(cells)]
        if self.correlation is not None and 1 < len(rows) <= _SHOWN:
            names = [plain(c.name, 10) for c in self.columns]
            table = [[name, *(_cell(v) for v in row)] for name, row in zip(names, self.correlation, strict=True)]
            lines += ["", "correlation", *grid([["", *names], *table])]
        if self.classes is not None:
            heads = ["client", *next(iter(self.classes.values()), {})]
            shown = list(self.classes.items())[:_SHOWN]
            lines += ["", *grid([heads, *([plain(n, 30), *map(whole, c.values())] for n, c in shown)])]
            left = len(self.classes) - len(shown)
            lines += [f"and {whole(left)} more clients"] if left else []
        return "\n".join(lines)


def describe(data: Clients | Source) -> Description:
    """Describe the rows of all clients, in the units of the user: as they are before columns are scaled.

    Args:
        data: the clients; or a data set, whose natural clients are taken, or one client if there are none.
    Raises:
        UsageError: rows are token ids, or dicts of tensors.
        RunError: a row cannot be read.
    Example:
        >>> import atoll
        >>> found = describe(atoll.data.load("wine").split(4, held_out=0))
        >>> found.rows, found.columns[0].name, round(found.columns[0].mean, 2)
        (178, 'alcohol', 13.0)
    """
    if isinstance(data, Source):
        data = data.split(None if data.by is not None else 1, held_out=0, min_rows=1)  # also clients with one row
    if isinstance(data.rows, ScaledRows):
        data = _unscaled(data)
    x, y = data.example
    if data.fields or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise UsageError(
            "The rows are token ids, or have several tensors.",
            "rows of numbers.",
            "the mean of ids describes nothing.",
            Line('atoll.data.load("wine").split(4)', "atoll stats wine"),
        )
    width = x.numel() + (y.numel() if data.classes is None else 0)
    classes = 0 if data.classes is None else len(data.classes)
    names = [str(n) for n in data.names] if data.names else [str(i) for i in range(data.count)]
    total, per_client = _gathered(_Gather(width, classes), data)
    mean = mean_of(_sums_of(total.sums))
    low, high = -_number(total.counters["low"]), _number(total.counters["high"])
    edges = (tuple(low.nan_to_num(posinf=0.0).tolist()), tuple(high.nan_to_num(neginf=0.0).tolist()))
    shape, _ = _gathered(_Gather(width, classes, tuple(mean.tolist()), *edges), data)
    counts = per_client.get("classes")
    return Description(
        len(data.order),
        dict(zip(names, data.sizes.tolist(), strict=True)),
        _columns(_names(data, x.numel(), width), len(data.order), mean, (low, high), shape.sums),
        _correlation(shape.sums, width),
        None
        if counts is None or data.classes is None
        else {n: dict(zip(data.classes, row, strict=True)) for n, row in zip(names, counts.tolist(), strict=True)},
    )


@dataclass(frozen=True, repr=False)
class _Gather(Local):
    """Sums over the numbers of the rows of each client. With bounds it is the second gather.

    Args:
        width: the numbers of a row: features, then targets if they are no classes.
        classes: the number of classes; 0: the targets are numbers.
        centre: the mean of each column; empty: 0.
        low, high: the smallest and the largest value of each column.
    """

    width: int
    classes: int
    centre: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the sums; a second gather has products and bins."""
        pairs = self.width**2 if self.width <= MOST_CORRELATED else 0
        lengths = dict.fromkeys(("present", *_LEVELS), self.width)
        if self.low:
            lengths |= {"bins": self.width * BINS, **(dict.fromkeys(_PAIRS, pairs) if pairs else {})}
        return {n: Declared(length, torch.float64, "sum") for n, length in lengths.items()}

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The sums of each client, one after another."""
        each = [self._of_client(lanes, k) for k in range(len(lanes.sizes))]
        found = {n: torch.stack([one[n] for one in each]) for n in each[0]}
        counters: dict[str, Tensor] = {n: found.pop(n) for n in ("low", "high") if n in found}
        facts = {"classes": lanes.class_counts(self.classes)} if self.classes else {}
        return Contribution({}, found, lanes.rows, counters, facts), {}

    def _of_client(self, lanes: ClientBatch, k: int) -> dict[str, Tensor]:
        parts = [self._numbers(x, y) for x, y in lanes.read(k)]
        centre = torch.tensor(self.centre or (0.0,) * self.width, dtype=torch.float64)
        sums = centred_sums(parts, centre)
        out = {"present": sums.present.double()}
        out |= {f"sum_{i}": sums.sum[i] for i in range(LEVELS)} | {f"square_{i}": sums.square[i] for i in range(LEVELS)}
        x = torch.cat(parts)
        there = ~x.isnan()
        if not self.low:
            ends = {"high": x.masked_fill(~there, -torch.inf), "low": (-x).masked_fill(~there, -torch.inf)}
            return out | {n: _ordered(t.amax(0)) for n, t in ends.items()}
        low, high = (torch.tensor(edge, dtype=torch.float64) for edge in (self.low, self.high))
        span = torch.where(high > low, high - low, 1.0)
        bins = ((x - low) / span * BINS).floor().nan_to_num().clamp(0, BINS - 1).long()
        cell = (bins + BINS * torch.arange(self.width))[there]
        out["bins"] = cell.bincount(minlength=self.width * BINS).double()
        if self.width <= MOST_CORRELATED:
            # In units of the range: an exact sum loses low bits of a vector whose numbers differ in size.
            x, m = torch.where(there, (x - centre) / span, 0.0), there.double()
            pairs = (m.T @ m, x.T @ m, x.square().T @ m, x.T @ x)
            out |= {n: t.flatten() for n, t in zip(_PAIRS, pairs, strict=True)}
        return out

    def _numbers(self, x: Tensor, y: Tensor) -> Tensor:
        """The numbers of rows, float64 `[n, width]`; NaN is missing."""
        numbers = [x.double().flatten(1)]
        if not self.classes:
            missing = torch.zeros_like(y, dtype=torch.bool) if y.is_floating_point() else y == IGNORED
            numbers.append(y.double().masked_fill(missing, torch.nan).reshape(len(y), -1))
        return torch.cat(numbers, 1)


_LEVELS = tuple(f"{name}_{i}" for name in ("sum", "square") for i in range(LEVELS))
_PAIRS = ("both", "first", "squares", "products")  # over rows with both columns: n, Σ xᵢ, Σ xᵢ², Σ xᵢxⱼ


def _ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of floats: the bits of a float64, of which those of a negative number are inverted."""
    bits = x.double().view(torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _number(ordered: Tensor) -> Tensor:
    """The inverse of `_ordered`."""
    bits = torch.where(ordered < 0, ordered ^ torch.iinfo(torch.int64).max, ordered)
    return bits.view(torch.float64)


def _gathered(part: _Gather, data: Clients) -> tuple[Total, Tensors]:
    """The total of a gather over all clients, and its columns for each client.

    Raises:
        RunError: the rows of a client cannot be read.
    """
    task = Task.of(nn.Linear(1, 1), "mse", ())
    engine, plan = InProcessEngine(task, data), Plan(part, Mean())
    try:
        opened = open_round(plan, State.first(plan, task, 0, Memory({})), engine)
        found = engine.gather(plan, opened.state, opened.cohort, opened.key)
    finally:
        engine.close()
    if found.failures:
        lost = found.failures[0]
        raise RunError(f"The rows of client {lost.client} cannot be read: {lost.cause}", "rows of all clients.")
    return Mean().total(found.partials[0]), found.facts


def _sums_of(sums: Tensors) -> Sums:
    levels = (torch.stack([sums[f"{name}_{i}"] for i in range(LEVELS)]) for name in ("sum", "square"))
    return Sums(sums["present"].long(), *levels)


def _names(data: Clients, features: int, width: int) -> list[str]:
    """The names of the columns: features, then targets."""
    it = data.described()
    names = list(it.names or data.columns or ())
    names = names if len(names) == features else [f"feature {i}" for i in range(features)]
    targets = it.target.names if len(it.target.names) == width - features else range(width - features)
    return names + [str(t) for t in targets][: width - features]


def _columns(
    names: Sequence[str], rows: int, mean: Tensor, ends: tuple[Tensor, Tensor], sums: Tensors
) -> tuple[ColumnStatistics, ...]:
    """The statistics of each column, from the sums of the second gather."""
    count = sums["present"].long()
    squares = exact_total(_sums_of(sums).square)
    sd = torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)
    bins = sums["bins"].long().reshape(len(names), BINS)
    out = []
    for i, name in enumerate(names):
        n, low, high = int(count[i]), float(ends[0][i]), float(ends[1][i])
        if not n:
            low = high = math.nan
        quantiles = {q: _quantile(bins[i], q, low, high) for q in QUANTILES}
        value = float(mean[i]) if n else math.nan
        histogram = tuple(bins[i].tolist())
        out.append(ColumnStatistics(name, n, rows - n, value, float(sd[i]), low, high, quantiles, histogram))
    return tuple(out)


def _quantile(bins: Tensor, q: float, low: float, high: float) -> float:
    """The q-quantile of values that are spread evenly in their bins; NaN without values."""
    below = bins.cumsum(0)
    place = q * float(below[-1])
    at = int(torch.searchsorted(below.double(), place).clamp(max=BINS - 1))
    inside = (place - float(below[at] - bins[at])) / max(1.0, float(bins[at]))
    return low + (at + inside) * (high - low) / BINS


def _correlation(sums: Tensors, width: int) -> tuple[tuple[float, ...], ...] | None:
    """Pearson's correlation of each pair of columns over the rows that have both; NaN if one of them is constant."""
    if "both" not in sums:
        return None
    both, first, squares, products = (sums[n].reshape(width, width) for n in _PAIRS)
    n = both.clamp(min=1)
    spread = squares - first.square() / n
    spread = torch.where(spread > 1e-12 * squares, spread, torch.nan)
    found = (products - first * first.T / n) / (spread * spread.T).sqrt()
    return tuple(tuple(row) for row in found.clamp(-1, 1).tolist())


def _cell(value: float) -> str:
    return "–" if value != value else whole(value) if isinstance(value, int) else format_number(value)


def _unscaled(data: Clients) -> Clients:
    """The clients with their rows as they are before columns are filled and scaled."""
    rows = data.rows.rows if isinstance(data.rows, ScaledRows) else data.rows
    made = replace(data, rows=rows)
    made.__dict__.pop("example", None)
    return made
