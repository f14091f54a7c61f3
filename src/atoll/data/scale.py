"""Fills missing numbers and scales columns of all rows by statistics of the train rows.

Held-out rows are not part of the statistics; they are scaled by those of the train rows.

Tests: tests/data/test_tabular.py, tests/data/test_split.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


LEVELS = 3
_LEVEL_BITS = 50


class Sums(NamedTuple):
    """Sums over the numbers of some rows around a centre c.

    Args:
        present: how often a number is there, and no NaN, int64 `[*features]`.
        sum: Σ (x − c), float64 `[3, *features]`, its levels.
        square: Σ (x − c)², `[3, *features]`.
    """

    present: Tensor
    sum: Tensor
    square: Tensor


def centred_sums(parts: Iterable[Tensor], centre: Tensor) -> Sums:
    """Add the numbers of rows around a centre, and their squares, without the NaN.

    The rounding errors of the additions are added too, so that the error is near 2⁻¹⁰⁰ Σ |x − c|, and any division of
    the rows into parts gives the same `exact_total`, except near ties.

    A level has 50 bits below the largest number of its vector, and the next level has the rest. The exact sum of an
    aggregator loses no bit of such a vector, also if its features differ by many orders of magnitude.

    Args:
        parts: pieces of the rows, each `[n, *features]`.
        centre: c, float64 `[*features]`.
    Example:
        >>> parts = torch.tensor([[1e16], [1.0]]).double(), torch.tensor([[-1e16], [torch.nan]]).double()
        >>> s = centred_sums(parts, torch.zeros(1).double())
        >>> s.present.item(), exact_total(s.sum).item()
        (3, 1.0)

    Reference: Ogita, Rump and Oishi, Accurate Sum and Dot Product, 2005.
    """
    present = torch.zeros_like(centre, dtype=torch.int64)
    first, second = ((torch.zeros_like(centre), torch.zeros_like(centre)) for _ in range(2))
    for part in parts:
        x = part.double()
        there = ~x.isnan()
        x = torch.where(there, x - centre, 0.0)
        present = present + there.sum(0)
        first, second = _joined(first, _pair(x)), _joined(second, _pair(x * x))
    return Sums(present, _levels(*first), _levels(*second))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, and its rounding error. Reference: Knuth, The Art of Computer Programming 2, 4.2.2."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    high, error = _two_sum(a[0], b[0])
    return _two_sum(high, a[1] + b[1] + error)


def _pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over the first axis and its rounding error, by halving the rows."""
    high = x if len(x) else x.new_zeros(1, *x.shape[1:])
    low = torch.zeros_like(high)
    while len(high) > 1:
        if len(high) % 2:
            high, low = (torch.cat((t, t.new_zeros(1, *t.shape[1:]))) for t in (high, low))
        half = len(high) // 2
        high, error = _two_sum(high[:half], high[half:])
        low = low[:half] + low[half:] + error
    return _two_sum(high[0], low[0])


def _levels(high: Tensor, low: Tensor) -> Tensor:
    """The levels of a vector high + low, `[3, …]`."""
    out = []
    for _ in range(LEVELS):
        unit = torch.ldexp(high.new_ones(()), high.abs().max().frexp().exponent - _LEVEL_BITS)
        out.append((high / unit).round() * unit)
        high, low = _two_sum(high - out[-1], low)
    return torch.stack(out)


def exact_total(levels: Tensor) -> Tensor:
    """The sum over the first axis, correctly rounded.

    Args:
        levels: float64 `[n, …]`: the levels of a sum, or those of several sums, one after the other.
    """
    flat = levels.reshape(len(levels), -1).T.tolist()
    return torch.tensor(list(map(math.fsum, flat)), dtype=torch.float64).reshape(levels.shape[1:])


def mean_of(sums: Sums) -> Tensor:
    """The mean of the numbers, from sums around 0, float64 `[*features]`; 0 if there is no number."""
    return exact_total(sums.sum) / sums.present.clamp(min=1)


def deviation_of(sums: Sums, mean: Tensor) -> Tensor:
    """The standard deviation (n − 1) of the numbers, from sums around their mean; 1 if they do not vary."""
    sd = (exact_total(sums.square) / (sums.present - 1).clamp(min=1)).sqrt()
    return torch.where(sd <= 1e-12 * mean.abs(), 1.0, sd)


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
    own = (index,)
    if group is not None:
        each = group[index]
        own = index[each.argsort(stable=True)].split(each.bincount(minlength=int(group.max()) + 1).tolist())
    found = [moments_of(lambda: (rows.take(p)[0] for p in pieces(some, features)), features) for some in own]  # noqa: B023
    means, deviations = zip(*found, strict=True)
    return torch.stack(means), torch.stack(deviations)


def moments_of(parts: Callable[[], Iterable[Tensor]], features: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of the numbers of rows, as `moments`.

    Args:
        parts: returns pieces of the rows, `[n, *features]`. It is called twice.
        features: the shape of a row.
    Returns:
        mean and sd, float64 `[*features]`.
    """
    mean = mean_of(centred_sums(parts(), torch.zeros(tuple(features), dtype=torch.float64)))
    return mean, deviation_of(centred_sums(parts(), mean), mean)
