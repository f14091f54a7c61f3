"""Statistics of the train rows, and the rows as they are after filling and scaling by them.

Held-out rows take no part in the statistics: they are scaled by what the train rows said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.data.rows import Rows, pieces


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows with missing numbers filled and columns scaled: x ← (fill(x) − centre) / spread, as they are taken.

    Args:
        rows: the rows as they lie; NaN stands for a missing number.
        group: int64 `[rows]`, which line of the tables a row goes by; None: all by line 0.
        fill, centre, spread: float64 `[groups, *features]`; spread > 0.
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
    """Mean and standard deviation (n − 1) of every feature over some rows, group by group, NaN left out.

    Two passes in float64, piece by piece, so that rows may be larger than memory.

    Args:
        rows: float features.
        index: int64 `[n]`, the rows to look at.
        group: int64 `[rows]` in [0, groups), or None for one group of all.
    Returns:
        mean and sd, float64 `[groups, *features]`; where nothing varies (one row, or a constant up to
        rounding), sd is 1, so that dividing by it is harmless. A feature with no number at all has mean 0.
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
    """`rows`, and the set's own test rows, filled and scaled by the train rows' statistics.

    Args:
        rows, others: the set's rows and its test file's rows.
        train: int64 `[n]`, the rows whose statistics count.
        group: natural client of each row, int64 `[rows]`; used where scale is "client".
        scale: "none", "standard" (over all train rows), or "client" (each natural client by its own train
            rows).
        fill: whether NaN stands for a missing number.
    """
    if scale == "none" and not fill:
        return rows, others
    group = group if scale == "client" else None
    mean, sd = moments(rows, train, group)
    centre, spread = (mean, sd) if scale != "none" else (torch.zeros_like(mean), torch.ones_like(sd))

    def view(some: Rows) -> Rows:
        return ScaledRows(some, group, mean, centre, spread)

    return view(rows), others and view(others)
