"""Fills missing numbers and scales columns of all rows by statistics of the train rows.

Held-out rows are not part of the statistics; they are scaled by those of the train rows.

Tests: tests/data/test_tabular.py, tests/data/test_split.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.data.rows import Rows, pieces


def standardize(x: Tensor, fill: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """Fill missing numbers and scale columns: x ← (fill(x) − centre) / spread, in the dtype of x.

    Args:
        x: floats `[rows, *features]`; NaN is a missing number.
        fill, centre, spread: `[*features]`, or `[rows, *features]`; spread > 0.
    Example:
        >>> standardize(torch.tensor([[3.0], [float("nan")]]), *torch.tensor([[1.0], [1.0], [2.0]]))
        tensor([[1.],
                [0.]])
    """
    fill, centre, spread = (table.to(x.device, x.dtype) for table in (fill, centre, spread))
    return (torch.where(x.isnan(), fill, x) - centre) / spread


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Fills missing numbers and scales columns when rows are read: x ← (fill(x) − centre) / spread.

    Args:
        rows: the stored rows; NaN is a missing number.
        group: the index of each row in the first axis of the tables, int64 `[rows]`; None: 0 for all rows.
        fill, centre, spread: the tables, float64 `[groups, *features]`, spread > 0; None: features are unchanged.
        target: centre and spread of the target, float64 `[2]` or `[2, targets]`; None: targets are unchanged.
    """

    rows: Rows
    group: Tensor | None = None
    fill: Tensor | None = None
    centre: Tensor | None = None
    spread: Tensor | None = None
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        if self.fill is not None and self.centre is not None and self.spread is not None:
            place = 0 if self.group is None else self.group[index]
            x = standardize(x, self.fill[place], self.centre[place], self.spread[place])
        return x, self._scaled(y)

    def targets(self) -> Tensor:
        return self._scaled(self.rows.targets())

    def _scaled(self, y: Tensor) -> Tensor:
        if self.target is None:
            return y
        centre, spread = self.target.to(y.device, y.dtype)
        scaled: Tensor = (y - centre) / spread
        return scaled


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
