"""The confusion table of a run: how many held-out rows of each class were predicted as each class.

    counts[i][j] = number of rows of class i with the prediction j

The metric `confusion` computes it. The last evaluation of a run is written to confusion.csv.

Tests: tests/surface/test_confusion.py
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.runs.format import plain, whole

FILE = "confusion.csv"
MOST = 50  # classes of a table; a larger table is neither read nor shown
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Confusion:
    """A confusion table.

    Args:
        classes: the names of the classes.
        counts: the rows of each class, by predicted class: `counts[i][j]` has class i and prediction j.
    Example:
        >>> print(Confusion(("no", "yes"), ((5, 1), (2, 7))).text())
        class      no   yes
        no          5     1
        yes         2     7
        Rows: the class. Columns: the prediction.
    """

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, classes: Sequence[str] | None, table: Any) -> Confusion | None:
        """The table of a tensor `[C, C]` of counts; None for other shapes, and above `MOST` classes."""
        counts = table.tolist()
        square = classes is not None and len(counts) == len(classes) <= MOST and table.dim() == 2
        if not square or classes is None:
            return None
        return cls(tuple(map(str, classes)), tuple(tuple(map(round, row)) for row in counts))

    @classmethod
    def read(cls, folder: Path) -> Confusion | None:
        """Read the table of a run folder; None if it has none, or if the file is not a table."""
        file = folder / FILE
        if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
            return None
        rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8", errors="replace"))))
        try:
            classes = tuple(rows[0][1:])
            counts = tuple(tuple(map(int, row[1:])) for row in rows[1:])
        except (IndexError, ValueError):
            return None
        whole_table = len(counts) == len(classes) <= MOST and all(len(row) == len(classes) for row in counts)
        return cls(classes, counts) if whole_table else None

    def csv(self) -> str:
        """The table as CSV: the first column names the class, the others have one prediction each."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["class", *self.classes])
        table.writerows([name, *row] for name, row in zip(self.classes, self.counts, strict=True))
        return text.getvalue()

    def cells(self, width: int = 12) -> list[list[str]]:
        """The table as text cells, with its heads: names of classes have at most `width` letters, or 40 to differ."""
        heads = [plain(name, width) for name in self.classes]
        if len(set(heads)) < len(heads):
            heads = [plain(name, 40) for name in self.classes]
        rows = [[name, *map(whole, row)] for name, row in zip(heads, self.counts, strict=True)]
        return [["class", *heads], *rows]

    def text(self) -> str:
        """The table as lines of text."""
        cells = self.cells()
        width = max(5, *(len(cell) for row in cells for cell in row))
        lines = [row[0].ljust(width) + "".join(cell.rjust(width + 1) for cell in row[1:]) for row in cells]
        return "\n".join([*lines, "Rows: the class. Columns: the prediction."])
