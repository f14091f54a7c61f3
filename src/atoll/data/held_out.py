"""Held-out rows: rules that choose them, and the assignment of held-out rows to clients.

A rule is a frozen dataclass. A call with the pool of rows and a key returns the held-out rows, bool `[rows]`. Rules use
all rows before the partition, so held-out rows and train rows do not depend on the partition.

Tests: tests/data/test_held_out.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atoll.base.errors import UsageError, unknown_name
from atoll.base.grammar import constructor, parse
from atoll.base.lines import Change, Line, Split, literal
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields, plain_number
from atoll.data.cells import code_of, is_number, name_of, number
from atoll.data.partition import in_groups, shuffled
from atoll.data.rows import Array

_FRACTION = "it is a fraction of the rows, and training needs the rest."
_WRITE = Split(options={"held_out": 0.2})


class HeldOutPool(NamedTuple):
    """The input of a rule: all rows of a data set, in the order of their numbers.

    Args:
        rows: the number of rows.
        labels: the class of each row, int64 `[rows]`; None if rows have no class.
        by: the natural client of each row, int64 `[rows]`; None if the data has no natural clients.
        column: reads a column by its name, `[rows]`: float64 with NaN for missing, or texts as objects with None. A
            column with a code, such as 007 or one of 17 digits, has texts.
    """

    rows: int
    labels: Tensor | None
    by: Tensor | None
    column: Callable[[str], Array]


@dataclass(frozen=True, repr=False)
class HeldOut:
    """The base of all rules. `rule(pool, key)` returns the held-out rows, bool `[rows]`.

    Example:
        >>> issubclass(Groups, HeldOut)
        True
    """

    def __call__(self, pool: HeldOutPool, key: Key) -> Tensor:
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that the rule reads; they are features only if the user lists them."""
        return ()

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return constructor(self)


@dataclass(frozen=True, repr=False)
class RandomRows(HeldOut):
    """Holds out a fraction of the rows, the same fraction of every class.

    Args:
        part: the fraction, in [0, 1).
    Example:
        >>> pool = HeldOutPool(10, torch.tensor([0] * 5 + [1] * 5), None, {}.get)
        >>> held = RandomRows(0.2)(pool, Key(0))
        >>> held[:5].sum().item(), held[5:].sum().item()
        (1, 1)
    """

    part: float = bounded_number(0.2, least=0, below=1, why=_FRACTION)

    def __call__(self, pool: HeldOutPool, key: Key) -> Tensor:
        return draw_held_out(pool.labels, pool.rows, self.part, key)


@dataclass(frozen=True, repr=False)
class PerClient(HeldOut):
    """Holds out a fraction of each natural client's rows, the same fraction of each class, to within one row.

    Args:
        part: the fraction, in (0, 1).
    Example:
        >>> pool = HeldOutPool(10, None, torch.tensor([0] * 5 + [1] * 5), {}.get)
        >>> held = PerClient(0.2)(pool, Key(0))
        >>> held[:5].sum().item(), held[5:].sum().item()
        (1, 1)
    """

    part: float = bounded_number(0.2, above=0, below=1, why=_FRACTION)

    def __call__(self, pool: HeldOutPool, key: Key) -> Tensor:
        if pool.by is None:
            raise UsageError(
                f"held_out={self}, and the data has no natural clients.",
                "a column that names the client of each row.",
                "the rule takes a part of the rows of each client.",
                Split(options={"held_out": self.part}),
            )
        group = pool.by
        if pool.labels is not None:
            group = group * (int(pool.labels.max()) + 1) + pool.labels
        return _each_part(group.unique(return_inverse=True)[1], self.part, key)


@dataclass(frozen=True, repr=False)
class Groups(HeldOut):
    """Holds out whole groups: no value of the column is both in train rows and in held-out rows.

    A random order of the groups is cut into round(1 / part) folds of nearly equal numbers of rows. The folds are
    disjoint and cover all rows.

    Args:
        column: the column that names the group of each row, such as the patient.
        part: the fraction of the rows, in (0, 0.5].
        fold: the fold that is held out, in 0 … round(1 / part) − 1.
    Example:
        >>> pool = HeldOutPool(6, None, None, {"patient": np.array([1.0, 1, 2, 2, 3, 3])}.get)
        >>> Groups("patient", 1 / 3)(pool, Key(0)).view(3, 2).sum(1).sort().values.tolist()
        [0, 0, 2]
    """

    column: str
    part: float = bounded_number(0.2, above=0, most=0.5, why="a fold is one of at least two parts.")
    fold: int = bounded_number(0, least=0, whole=True)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold >= self.folds:
            raise UsageError(
                f"{self} names fold {self.fold}.",
                f"a fold below {self.folds}, which is round(1 / {self.part:g}).",
                write=f'Groups("{self.column}", {self.part:g}, fold={self.folds - 1})',
            )

    @property
    def folds(self) -> int:
        """The number of folds."""
        return round(1 / self.part)

    def __call__(self, pool: HeldOutPool, key: Key) -> Tensor:
        group = _codes(self, pool)
        count = int(group.max()) + 1
        if count < self.folds:
            raise UsageError(
                f"held_out={self}: the column {self.column!r} has {count} group{'s' if count != 1 else ''}.",
                f"at least {self.folds} groups, one for each fold.",
                "a group is never divided.",
                Change("held_out", f"Groups({self.column!r}, {1 / count:.3g})" if count > 1 else 0.2),
            )
        sizes, order = group.bincount(minlength=count), key.permutation(count)
        ends = sizes[order].cumsum(0).double()
        middle = ends - sizes[order].double() / 2
        fold = (middle / pool.rows * self.folds).floor().long().clamp(max=self.folds - 1)
        fold = _without_gaps(fold, self.folds)
        of_group = torch.empty_like(fold)
        of_group[order] = fold
        return of_group[group] == self.fold


@dataclass(frozen=True, repr=False)
class After(HeldOut):
    """Holds out the rows from a time on: all times of train rows are before all times of held-out rows.

    Args:
        column: the column of times: numbers, or ISO dates such as 2024-01-31.
        since: the first held-out time, a number or an ISO date; or a fraction in (0, 1) of the latest rows. Rows of
            equal times stay together, so the fraction is a lower bound.
    Example:
        >>> pool = HeldOutPool(5, None, None, {"year": np.array([2020.0, 2021, 2022, 2023, 2023])}.get)
        >>> After("year", 2022)(pool, Key(0)).tolist()
        [False, False, True, True, True]
        >>> After("year", 0.2)(pool, Key(0)).tolist()
        [False, False, False, True, True]
    """

    column: str
    since: Any = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.since, bool) or not isinstance(self.since, (int, float, str)):
            raise UsageError(
                f"{self} was given since = {self.since!r}.",
                "a number, an ISO date, or a fraction of the rows.",
                write=f'After("{self.column}", 0.2)',
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, pool: HeldOutPool, key: Key) -> Tensor:
        times = _times(self, pool)
        if isinstance(self.since, float) and 0 < self.since < 1:
            first = sorted(times)[min(pool.rows - 1, max(0, math.ceil((1 - self.since) * pool.rows)))]
            return torch.tensor([time >= first for time in times])
        since = _number_of(self.since)
        if since is None:
            raise UsageError(
                f"held_out={self}: {self.since!r} is no number and no ISO date.",
                "a number, or a date such as 2024-01-31.",
                write=f'After("{self.column}", 0.2)',
            )
        return torch.tensor([time >= since for time in times])


@dataclass(frozen=True, repr=False)
class Mask(HeldOut):
    """Holds out the rows in which a column has a value.

    Args:
        column: the column.
        value: the value; a number and its text are equal.
    Example:
        >>> pool = HeldOutPool(3, None, None, {"fold": np.array(["train", "test", "train"], object)}.get)
        >>> Mask("fold", "test")(pool, Key(0)).tolist()
        [False, True, False]
    """

    column: str
    value: Any = "test"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, pool: HeldOutPool, key: Key) -> Tensor:
        cells = [_text(v) for v in pool.column(self.column).tolist()]
        held = torch.tensor([cell == _text(self.value) for cell in cells])
        if not held.any():
            seen = sorted({c for c in cells if c is not None})
            raise UsageError(
                f"held_out={self}: no row of {self.column!r} has the value {self.value!r}.",
                f"a value that occurs: {', '.join(seen[:8])}{', …' if len(seen) > 8 else ''}.",
                write=Change("held_out", f"Mask({self.column!r}, {seen[-1]!r})" if seen else 0.2),
            )
        return held


RULES: Mapping[str, type[HeldOut]] = {rule.__name__: rule for rule in (PerClient, Groups, After, Mask)}


def held_out_rule(value: Any, rows: int) -> HeldOut | Tensor:
    """The rule of a `held_out` argument, or the rows themselves.

    Args:
        value: a fraction, a rule, the text of one, or a bool array `[rows]`.
        rows: the number of rows.
    Raises:
        UsageError: another value, or an array of another length.
    Example:
        >>> held_out_rule("Groups('patient', 0.2)", 10), held_out_rule(0.25, 10)
        (Groups('patient'), RandomRows(0.25))
    """
    if isinstance(value, str):
        value = parse(value, RULES, kind="rule")
    if isinstance(value, HeldOut):
        return value
    number = plain_number(value)
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return _fraction(number)
    try:
        mask = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except Exception:  # ValueError for ragged rows, or an error of the library of the value
        raise _no_rule(value) from None
    if mask.dtype != bool or mask.ndim != 1:
        raise _no_rule(value)
    if len(mask) != rows:
        raise UsageError(
            f"held_out is a bool array of {len(mask)} numbers, and the data has {rows} rows.",
            "one number for each row.",
            write=_WRITE,
        )
    return torch.from_numpy(mask.copy())


def check_sides(held: Tensor, given: object) -> Tensor:
    """Refuse held-out rows that are no rows, or all rows. Returns `held`, bool `[rows]`."""
    count = int(held.sum())
    if 0 < count < len(held):
        return held
    raise UsageError(
        f"held_out={given} holds out {count} of {len(held)} rows.",
        "at least one held-out row, and at least one train row.",
        "a model is trained on some rows and evaluated on others.",
        _WRITE,
    )


def draw_held_out(labels: Tensor | None, count: int, part: float, key: Key) -> Tensor:
    """Draw the held-out rows, bool `[count]`: the first rows of each class in the order of their hashes.

    Each class holds out the fraction `part` of its rows, to within one row, and keeps at least one train row. The
    total is round(part · count), unless a class has too few rows.

    Args:
        labels: class of each row, int64 `[count]`; None: one class.
        count: the number of rows.
        part: fraction to hold out, in [0, 1).
        key: key of the hashes.
    Example:
        >>> held = draw_held_out(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), 10, 0.2, Key(0))
        >>> held[:5].sum().item(), held[5:].sum().item()
        (1, 1)
    """
    return _each_part(torch.zeros(count, dtype=torch.int64) if labels is None else labels, part, key)


def deal_held_out(train: Tensor, owner: Tensor, held: Tensor, key: Key) -> Tensor:
    """Assign held-out rows to drawn clients: by class, in proportion to the clients' train rows.

    Args:
        train: the class of each train row, int64 `[n]`; zeros if rows have no class.
        owner: the client of each train row, int64 `[n]`.
        held: the class of each held-out row, int64 `[m]`.
        key: key of the order of the held-out rows.
    Returns:
        the client of each held-out row, int64 `[m]`.
    Example:
        >>> owner = torch.tensor([0, 0, 0, 1])
        >>> deal_held_out(torch.zeros(4).long(), owner, torch.zeros(8).long(), Key(0)).bincount().tolist()
        [6, 2]
    """
    classes = 1 + max(int(train.max()), int(held.max()) if len(held) else 0)
    by_class = owner[in_groups(owner)][in_groups(train[in_groups(owner)])]  # owners, sorted by class and then client
    counts = train.bincount(minlength=classes)
    first = counts.cumsum(0) - counts
    order, rank, sizes = shuffled(held, classes, key)
    of_row = held[order]
    at = ((rank.double() + 0.5) / sizes[of_row].double() * counts[of_row].double()).floor().long()
    out = torch.empty_like(held)
    out[order] = by_class[(first[of_row] + at.minimum(counts[of_row] - 1)).clamp(0, len(by_class) - 1)]
    return out


def _each_part(group: Tensor, part: float, key: Key) -> Tensor:
    """Hold out the fraction `part` of each group, to within one row; each group keeps a train row. bool `[rows]`."""
    order, rank, sizes = shuffled(group, int(group.max()) + 1, key)
    edge = (sizes.cumsum(0).double() * part).round().long()
    quota = edge.diff(prepend=edge.new_zeros(1)).minimum((sizes - 1).clamp(min=0))
    held = torch.zeros(len(group), dtype=torch.bool)
    held[order] = rank < quota[group[order]]
    return held


def _without_gaps(fold: Tensor, folds: int) -> Tensor:
    """Change ascending fold numbers so that no fold is empty, for at least `folds` groups."""
    at = torch.arange(len(fold))
    least = folds - (len(fold) - at)  # the groups that follow must fill the remaining folds
    fold, most = torch.maximum(fold, least), -1
    out = fold.tolist()
    for place, value in enumerate(out):
        most = out[place] = min(value, most + 1)
    return torch.tensor(out)


def _codes(rule: Groups, pool: HeldOutPool) -> Tensor:
    """The group of each row, int64 `[rows]`; a row without a group is refused."""
    cells = [_text(v) for v in pool.column(rule.column).tolist()]
    if None in cells:
        raise UsageError(
            f"held_out={rule}: row {cells.index(None)} has no value in {rule.column!r}.",
            "a group for every row.",
            "a row without a group could belong to a group of the other side.",
        )
    places = {name: at for at, name in enumerate(sorted(set(map(str, cells))))}
    return torch.tensor([places[str(cell)] for cell in cells])


def _times(rule: After, pool: HeldOutPool) -> list[float]:
    """The time of each row. Whole numbers are exact, also nanoseconds since 1970, which float64 would round."""
    cells = pool.column(rule.column).tolist()
    found = [_number_of(_plain(cell)) for cell in cells]
    times = [time for time in found if time is not None]
    if len(times) < len(found):
        row, groups = found.index(None), len({_text(cell) for cell in cells})
        raise UsageError(
            f"held_out={rule}: row {row} has {cells[row]!r} in {rule.column!r}.",
            "a number or an ISO date in every row.",
            "texts have no order in time.",
            Change("held_out", f"Groups({rule.column!r}, {max(0.2, 1 / groups):.3g})" if groups > 1 else 0.2),
        )
    return times


def _plain(cell: Any) -> Any:
    """The number of a text in a column of codes; other cells are unchanged."""
    if not isinstance(cell, str) or not is_number(cell):
        return cell
    return int(cell) if cell.isdecimal() else number(cell)


def _number_of(cell: Any) -> float | None:
    """A number, or the seconds of an ISO date since 1970; None for other cells."""
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return None if math.isnan(cell) else cell
    try:
        when = cell if isinstance(cell, datetime) else datetime.fromisoformat(str(cell))
    except ValueError:
        return None
    return (when.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()


def _text(value: Any) -> str | None:
    """The text of a cell; whole numbers lose the decimal point. None for a missing cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return code_of(value) if isinstance(value, str) else name_of(value)


def _fraction(value: float) -> RandomRows:
    if not 0 <= value < 1:
        raise UsageError(f"held_out={value!r}.", "0 ≤ held_out < 1.", _FRACTION, _WRITE)
    return RandomRows(float(value))


def _no_rule(value: object) -> UsageError:
    return UsageError(
        f"held_out={value!r:.60}.",
        f"a fraction in [0, 1), a bool array, or a rule: {', '.join(RULES)}.",
        write=_WRITE,
    )


def no_column(name: str, columns: Mapping[str, Any]) -> UsageError:
    """The error for a rule that names an unknown column."""
    return unknown_name("column", name, columns, lambda near: Line(literal(near)))
