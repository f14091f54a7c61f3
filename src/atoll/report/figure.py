"""Compare a metric of any number of runs: one line for runs that differ only in the seed, with a band over the seeds.

    mean(t) = (1/n) Σᵢ yᵢ(t)        sd(t)² = Σᵢ (yᵢ(t) − mean(t))² / (n − 1)

Tests: tests/surface/test_figure.py
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atoll.base.markup import html_table, mimebundle
from atoll.report.comparison import Curve
from atoll.runs.format import format_number, label, rises
from atoll.runs.frames import Backend, frame_of_columns

if TYPE_CHECKING:
    from atoll.report.chart import Unit
    from atoll.report.export import Plot

X = Literal["round", "bytes", "seconds", "clock"]
Spread = Literal["sd", "range", "ci"]
AXES: dict[str, tuple[str, Unit]] = {
    "round": ("round", "count"),
    "bytes": ("up and down, all clients", "bytes"),
    "seconds": ("seconds of computing", "seconds"),
    "clock": ("seconds of virtual time", "seconds"),
}
SPREADS = {"sd": "± sd", "range": "smallest to largest", "ci": "95 % interval of the mean"}
TABLES = (".csv", ".tex", ".md")


def mean(values: Sequence[float]) -> float:
    """The mean, with one rounding; NaN if a value is NaN.

    Example:
        >>> mean([0.5, 1.0]), mean([1.0, float("inf")])
        (0.75, inf)
    """
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # beyond float64, or infinities of both signs
        return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of at least two values, with n − 1.

    Example:
        >>> deviation([1.0, 3.0])
        1.4142135623730951
    """
    middle = mean(values)
    return math.sqrt(mean([(v - middle) * (v - middle) for v in values]) * len(values) / (len(values) - 1))


def least(values: Sequence[float]) -> float:
    """The smallest value; NaN if a value is NaN."""
    return math.nan if any(map(math.isnan, values)) else min(values)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over runs and its standard deviation, both NaN or None if unknown; `n` runs."""

    mean: float | None
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Estimate:
        """The mean if every run has a value; the standard deviation if there are two runs."""
        if any(v is None for v in values):
            return cls(None, None, len(values))
        each = [v for v in values if v is not None]
        return cls(mean(each), deviation(each) if len(each) > 1 else None, len(each))

    def text(self, joint: str = " ± ") -> str:
        """The mean in the digits that two significant digits of the standard deviation carry.

        Example:
            >>> Estimate(0.912345, 0.00421, 5).text(), Estimate(1234.5, 56.7, 3).text(), Estimate(0.5, None, 1).text()
            ('0.9123 ± 0.0042', '1234 ± 57', '0.5000')
        """
        if self.mean is None or self.sd is None or not math.isfinite(self.sd) or self.sd == 0:
            return format_number(self.mean)
        places = max(0, 1 - math.floor(math.log10(float(f"{self.sd:.1e}"))))
        if places > 8:
            return f"{self.mean:.3e}{joint}{self.sd:.1e}"
        return f"{self.mean:.{places}f}{joint}{self.sd:.{places}f}"


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs that form one line.

    Args:
        name: the settings in which the groups differ.
        runs: the names of the run folders.
        data: the fingerprints of the held-out rows of the runs; empty if they are unknown.
        curves: the metric of each run, in the rounds that all runs of the group have.
    """

    name: str
    runs: tuple[str, ...]
    data: frozenset[str]
    curves: tuple[Curve, ...]

    @property
    def by_round(self) -> list[tuple[float, ...]]:
        """The values of all runs in each round, `[rounds]` of `[runs]`."""
        return list(zip(*(c.values for c in self.curves), strict=True))

    @property
    def mean(self) -> list[float]:
        """The mean over the runs, `[rounds]`."""
        return list(map(mean, self.by_round))

    def x(self, axis: X) -> list[float]:
        """The mean over the runs of a cost, `[rounds]`."""
        costs = {"round": "rounds", "bytes": "bytes"}.get(axis, "times")
        return list(map(mean, zip(*(getattr(c, costs) for c in self.curves), strict=True)))

    def band(self, spread: Spread) -> tuple[list[float], list[float]] | None:
        """The low and the high end over the runs, each `[rounds]`; None for a single run."""
        values, n = self.by_round, len(self.curves)
        if n < 2:
            return None
        if spread == "range":
            return [least(v) for v in values], [-least([-y for y in v]) for v in values]
        factor = 1.0
        if spread == "ci":
            from scipy.special import stdtrit  # not at the start, which seldom needs it

            factor = float(stdtrit(n - 1, 0.975)) / math.sqrt(n)
        ends = [(m, factor * deviation(v)) for m, v in zip(self.mean, values, strict=True)]
        return [m - half for m, half in ends], [m + half for m, half in ends]

    @property
    def last(self) -> Estimate:
        """The metric after the last common round."""
        return Estimate.of([c.values[-1] for c in self.curves])

    def best(self, rising: bool | None) -> Estimate:
        """The best finite value of each run; unknown if no direction is better."""
        return Estimate.of([None if rising is None else c.best(rising) for c in self.curves])

    def rounds_to(self, target: float | None, rising: bool | None) -> Estimate:
        """The rounds until each run reaches the target; unknown if a run does not."""
        found: list[float | None] = []
        for c in self.curves:
            at = None if target is None or rising is None else c.reaches(target, rising)
            found.append(None if at is None else c.rounds[at] + 1)
        return Estimate.of(found)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """One metric of any number of runs.

    Args:
        metric: the name of the column of metrics.jsonl.
        x: the horizontal axis: "round", "bytes", "seconds" or "clock".
        groups: the lines.
        target: a value of the metric to reach; None: none was given.
        notes: facts that a reader of the figure must know.
    """

    metric: str
    x: X
    groups: tuple[SeedGroup, ...]
    target: float | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        names = ", ".join(g.name for g in self.groups)
        return f"Comparison({self.metric!r}, x={self.x!r}, {len(self.groups)} lines: {names}"[:398] + ")"

    def _repr_html_(self) -> str:
        return html_table("Comparison of runs", self._cells(" ± "), " ".join(self.notes))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    @property
    def same_rows(self) -> bool:
        """Whether all lines were evaluated on the same, known held-out rows, so that values may be ranked."""
        return len({g.data for g in self.groups}) == 1 and bool(self.groups[0].data)

    def frame(self, backend: Backend = "pandas") -> Any:
        """One row for each round of each line: line, n, x, mean, sd, low, high. Low and high are the range.

        Args:
            backend: the package of the frame.
        """
        rows: list[tuple[Any, ...]] = []
        for g in self.groups:
            n = len(g.curves)
            for t, x, values in zip(g.curves[0].rounds, g.x(self.x), g.by_round, strict=True):
                sd, high = deviation(values) if n > 1 else None, -least([-v for v in values])
                rows.append((g.name, n, int(t), x, mean(values), sd, least(values), high))
        names = ("line", "n", "round", "x", "mean", "sd", "low", "high")
        return frame_of_columns(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), backend, "frame()")

    def figure(self, band: Spread = "sd") -> Plot:
        """The lines, one panel for each set of held-out rows. A notebook shows it at the end of a cell.

        Args:
            band: "sd": mean ± standard deviation; "range": the smallest and the largest value; "ci": the 95 % interval
                of the mean by Student's t.
        Raises:
            UsageError: an unknown band, or more than 16 lines.
        """
        from atoll.report.export import Plot  # a table needs no charts
        from atoll.report.figure_drawing import figure_drawing

        return Plot(figure_drawing(self, band))

    def save(self, path: str | Path, band: Spread = "sd", width: float = 3.3) -> Path:
        """Write the figure (.svg, .pdf, .png) or the table (.csv, .tex, .md). Equal runs give equal bytes.

        Args:
            path: the file.
            band: as in `figure`.
            width: the width of the figure in inches, > 0.
        Returns:
            the path of the file.
        Raises:
            UsageError: an unknown suffix, or a PDF or PNG without the extra `atoll[plots]`.
        """
        from atoll.base.files import atomic_write

        file = Path(path)
        if file.suffix not in TABLES:
            return self.figure(band).save(file, width)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, self.table(file.suffix).encode())
        return file

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each line: its name, its runs, and the mean and the standard deviation of each number."""
        out = []
        for g in self.groups:
            row: dict[str, Any] = {"line": g.name, "n": len(g.curves), "runs": list(g.runs)}
            for name, it in self._estimates(g).items():
                row |= {name: it.mean, f"{name}_sd": it.sd}
            out.append(row)
        return out

    def facts(self) -> dict[str, Any]:
        """The comparison as values for JSON."""
        return {"metric": self.metric, "x": self.x, "lines": self.rows(), "notes": list(self.notes)}

    def _estimates(self, g: SeedGroup) -> dict[str, Estimate]:
        rising = rises(self.metric)
        found = {"last": g.last, "best": g.best(rising)}
        return found if self.target is None else {**found, "rounds": g.rounds_to(self.target, rising)}

    def _cells(self, joint: str) -> list[list[str]]:
        """The table as texts. * marks the best mean, unless the held-out rows differ or a run diverged."""
        goal = [] if self.target is None else [f"rounds to {format_number(self.target)}"]
        out = [["", "n", f"last {label(self.metric)}", "best", *goal]]
        rising = rises(self.metric)
        means = [g.last.mean for g in self.groups]
        good = [m for m in means if m is not None and math.isfinite(m)]
        ranked = self.same_rows and rising is not None and len(good) == len(means) > 1 and len(set(good)) > 1
        top = (max if rising else min)(good) if ranked else None
        for g in self.groups:
            last, *others = (it.text(joint) for it in self._estimates(g).values())
            mark = " *" if top is not None and g.last.mean == top else ""
            out.append([g.name, str(len(g.curves)), last + mark, *others])
        return out

    def table(self, suffix: str) -> str:
        """The table as the text of a file.

        Args:
            suffix: ".csv" with all digits, ".md", or ".tex", a tabular.
        """
        if suffix == ".csv":
            file = io.StringIO()
            rows = [{**row, "runs": " ".join(row["runs"])} for row in self.rows()]
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            return file.getvalue()
        if suffix == ".md":
            head, *body = ([cell.replace("|", r"\|") for cell in row] for row in self._cells(" ± "))
            return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]) + "\n"
        rows_of = [[_tex(cell) for cell in row] for row in self._cells(" ± ")]
        lines = [" & ".join(row) + r" \\" for row in rows_of]
        columns = "l" + "r" * (len(rows_of[0]) - 1)
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", lines[0], r"\hline", *lines[1:], r"\end{tabular}", ""])

    def text(self) -> str:
        """The notes and the table as text; * marks the best mean."""
        cells = self._cells(" ± ")
        wide = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in cells]
        return "\n".join([*self.notes, *([""] if self.notes else []), *lines])


def _tex(text: str) -> str:
    """A text of a table in TeX."""
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"} | {"–": "--", "*": r"$^{*}$"}
    return "".join(special.get(c, c) for c in text)
