"""The coefficients of a run of `newton`, with standard errors, test statistics, p-values and intervals.

In raw units a coefficient belongs to the column as the user has it; in scaled units to the column as the model receives
it. The table of a run is written to inference.csv. This module loads without torch.

Tests: tests/identities/test_inference.py
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.runs.format import format_number, plain

FILE = "inference.csv"
COLUMNS = ("coefficient", "se", "z", "p", "low", "high")
MOST = 4000  # rows of a table that is read
_SHOWN = 40  # rows of a table that fits on a terminal
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Inference:
    """A table of coefficients.

    Args:
        names: the name of each row: the column, with the class before it if there are several outputs.
        units: "raw" or "scaled", for each row.
        values: by `COLUMNS`: coefficient, standard error, statistic, p-value, and the ends of the 95 % interval. NaN if
            a value is undefined.
        statistic: "z", or "t" for a linear model with normal errors.
        notes: why values are undefined, or unreliable.
    Example:
        >>> values = {n: (v,) for n, v in zip(COLUMNS, (2.0, 0.5, 4.0, 6.3e-05, 1.02, 2.98))}
        >>> print(Inference(("age",), ("raw",), values).text())
        raw units   coefficient       se        z           p      low     high
        age              2.0000   0.5000   4.0000   6.300e-05   1.0200   2.9800
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]
    statistic: str = "z"
    notes: tuple[str, ...] = ()

    def frame(self, backend: Literal["pandas", "polars", "pyarrow"] = "pandas") -> Any:
        """The table as a data frame, one row for each coefficient and unit.

        Args:
            backend: "pandas", "polars" or "pyarrow".
        """
        from atoll.runs.frames import frame_of_columns  # it loads torch

        columns: dict[str, list[Any]] = {"name": [*self.names], "units": [*self.units]}
        columns |= {n: [None if v != v else v for v in self.values[n]] for n in COLUMNS}
        return frame_of_columns(columns, backend, f'run.inference.frame("{backend}")')

    def csv(self) -> str:
        """The table as CSV. An undefined value is an empty cell."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["name", "units", *(self.statistic if n == "z" else n for n in COLUMNS)])
        for i, name in enumerate(self.names):
            values = (self.values[n][i] for n in COLUMNS)
            table.writerow([name, self.units[i], *("" if v != v else repr(v) for v in values)])
        return text.getvalue()

    @classmethod
    def read(cls, folder: Path) -> Inference | None:
        """Read the table of a run folder; None if it has none, or if the file is no table."""
        file = folder / FILE
        if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
            return None
        try:
            head, *rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8", errors="replace"))))
            numbers = [[math.nan if not v else float(v) for v in row[2:]] for row in rows]
        except ValueError:
            return None
        if not 0 < len(rows) <= MOST or len(head) != 2 + len(COLUMNS) or any(len(n) != len(COLUMNS) for n in numbers):
            return None
        columns = {name: tuple(column) for name, column in zip(COLUMNS, zip(*numbers, strict=True), strict=True)}
        return cls(tuple(r[0] for r in rows), tuple(r[1] for r in rows), columns, "t" if head[4] == "t" else "z")

    def cells(self) -> list[list[str]]:
        """The rows in raw units, or in scaled units if there are no others, as text with a head."""
        units = "raw" if "raw" in self.units else "scaled"
        heads = [f"{units} units", *(self.statistic if n == "z" else n for n in COLUMNS)]
        places = [i for i, unit in enumerate(self.units) if unit == units]
        rows = [[plain(self.names[i], 40), *(_number(self.values[n][i]) for n in COLUMNS)] for i in places]
        return [heads, *rows]

    def text(self) -> str:
        """The table as lines of text, then the notes; for many rows only the name of the file."""
        cells = self.cells()
        if len(cells) > 1 + _SHOWN:
            return f"{len(cells) - 1} coefficients with standard errors: {FILE}"
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = []
        for row in cells:
            padded = [c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("   ".join(padded).rstrip())
        return "\n".join([*lines, *self.notes])


def _number(value: float) -> str:
    return "–" if value != value else format_number(value)
