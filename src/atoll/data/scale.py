"""Fills missing numbers and scales columns of all rows by statistics of the train rows.

Held-out rows are not part of the statistics; they are scaled by those of the train rows.

Tests: tests/data/test_tabular.py, tests/data/test_split.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.data.rows import Rows, pieces


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Fills missing numbers and scales columns when rows are read: x ← (fill(x) − centre) / spread.

    Args:
        rows: the stored rows; NaN is a missing number.
        group: the index of each row in the first axis of the tables, int64 `[rows]`; None: 0 for all rows.
        fill, centre, spread: the tables, float64 `[groups, *features]`; spread > 0.
    """

    rows: Rows
    group: Tensor | None
    fill: Tensor
    centre: Tensor
    spread: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        fill, centre, spread = (
            (table[0] if self.group is None else table[self.group[index]]).to(x.dtype)
            for table in (self.fill, self.centre, self.spread)
        )
        return (torch.where(x.isnan(), fill, x) - centre) / spread, y

    def targets(self) -> Tensor:
        return self.rows.targets()


def moments(rows: Rows, index: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation (n − 1) of every feature over some rows, per group, without NaN.

    Two passes in float64, piece by piece, so that rows may be larger than memory.

    Args:
        rows: the rows, with float features.
        index: the numbers of the rows to use, int64 `[n]`.
        group: the group of each row, int64 `[rows]` in [0, groups); None: all rows are one group.
    Returns:
        mean and sd, float64 `[groups, *features]`. If a feature does not vary (one row, or a constant up to
        rounding), sd is 1, so that the division changes nothing. A feature without any number has mean 0.
    Example:
        >>> from atoll.data.rows import ArrayRows
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [float("nan"), 5.0]])
        >>> moments(ArrayRows(x, torch.zeros(3)), torch.arange(3))
        (tensor([[2., 5.]], dtype=torch.float64), tensor([[1.4142, 1.0000]], dtype=torch.float64))
    """
    features = rows.take(index[:1])[0].shape[1:]
    group = torch.zeros(len(rows), dtype=torch.int64) if group is None else group
    groups = int(group.max()) + 1
    total, count, square = (torch.zeros(groups, *features, dtype=torch.float64) for _ in range(3))
    for piece in pieces(index, features):
        x = rows.take(piece)[0].double()
        total.index_add_(0, group[piece], x.nan_to_num())
        count.index_add_(0, group[piece], (~x.isnan()).double())
    mean = total / count.clamp(min=1)
    for piece in pieces(index, features):
        x = rows.take(piece)[0].double()
        square.index_add_(0, group[piece], (x - mean[group[piece]]).nan_to_num() ** 2)
    sd = (square / (count - 1).clamp(min=1)).sqrt()
    return mean, torch.where(sd > 1e-12 * mean.abs(), sd, 1.0)


def scaled(
    rows: Rows, train: Tensor, others: Rows | None, group: Tensor | None, scale: str, fill: bool
) -> tuple[Rows, Rows | None]:
    """Fill and scale `rows`, and the set's own test rows, by the statistics of the train rows.

    Args:
        rows, others: the rows of the set, and its own test rows or None.
        train: the numbers of the rows that the statistics use, int64 `[n]`.
        group: natural client of each row, int64 `[rows]`; used if scale is "client".
        scale: "none", "standard" (over all train rows), or "client" (each natural client by its own train
            rows).
        fill: whether NaN is a missing number.
    Returns:
        The filled and scaled `rows` and `others`.
    """
    if scale == "none" and not fill:
        return rows, others
    group = group if scale == "client" else None
    mean, sd = moments(rows, train, group)
    centre, spread = (mean, sd) if scale != "none" else (torch.zeros_like(mean), torch.ones_like(sd))

    def view(some: Rows) -> Rows:
        return ScaledRows(some, group, mean, centre, spread)

    return view(rows), others and view(others)
