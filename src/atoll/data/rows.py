"""Storage of rows: arrays in memory, a memory-mapped file, a torch Dataset, or several of these in sequence.

Features are converted for the model: uint8 is an intensity and becomes float32 in [0, 1]; float32 and float64 are
unchanged; other integers are token ids and become int64. Rows in memory are checked for NaN and infinity once, when
the source is built. All other rows are checked batch by batch, when they are read.

Tests: tests/data/test_rows.py, tests/identities/test_numerics.py.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from atoll.base.errors import RunError, UsageError

Array = npt.NDArray[Any]


class Rows(Protocol):
    """Rows (x, y) that are numbered from 0. They are read by their numbers, and never all at once.

    take: reads the rows with these numbers, int64 `[...]`, and returns x `[..., *features]` and y `[...]`; y is
        `[..., *target]` if a row has several targets.
    targets: returns y of all rows, in the order of their numbers, without reading x if possible.
    """

    def __len__(self) -> int: ...
    def take(self, index: Tensor) -> tuple[Tensor, Tensor]: ...
    def targets(self) -> Tensor: ...


def numbers(x: Tensor) -> Tensor:
    """Convert stored features for the model: intensities to [0, 1], floats unchanged, integers to int64 token ids.

    Args:
        x: stored features, any shape and dtype.
    Example:
        >>> numbers(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    if x.dtype == torch.uint8:
        return x.float().div_(255)
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.float() if x.is_floating_point() or x.dtype == torch.bool else x.long()


def answers(y: Tensor, real: bool) -> Tensor:
    """Convert stored targets for the task: float numbers to predict, or int64 classes.

    Args:
        y: stored targets, any shape and dtype.
        real: whether integers are numbers to predict, not classes.
    Example:
        >>> answers(torch.tensor([2, 1], dtype=torch.uint8), real=False)
        tensor([2, 1])
    """
    if y.is_floating_point():
        return numbers(y)
    return y.double() if real else y.long()


def pieces(rows: Tensor, features: Sequence[int]) -> tuple[Tensor, ...]:
    """Split rows, or row numbers, into pieces of about 2¹⁸ numbers, which fit in memory for any size of the set.

    Args:
        rows: rows `[n, ...]`, or row numbers `[n]`.
        features: shape of one row's features.
    Example:
        >>> [len(piece) for piece in pieces(torch.arange(10_000), (8, 8))]
        [4096, 4096, 1808]
    """
    split: tuple[Tensor, ...] = rows.split(max(1, 2**18 // max(1, math.prod(features))))
    return split


def not_finite(x: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first NaN or infinity in `x`, or None; `x` is searched piece by piece.

    Args:
        x: any shape and dtype.
    Example:
        >>> not_finite(torch.tensor([[0.0, 1.0], [2.0, float("nan")]]))
        (1, 1)
    """
    # A finite sum proves that all terms are finite, in little time and without memory. Finite terms may overflow, so
    # an infinite sum proves nothing.
    if not x.is_floating_point() or math.isfinite(x.sum().item()):
        return None
    start = 0
    for piece in pieces(x, x.shape[1:]):
        bad = ~torch.isfinite(piece)
        if bad.any():
            first, *place = bad.nonzero()[0].tolist()
            return (start + first, *place)
        start += len(piece)
    return None


def place(row: int, within: tuple[int, ...]) -> str:
    """Format a position for an error: `row 3`, `row 3, column 1`, or `row 3, position (0, 4, 2)`.

    Example:
        >>> place(3, (1,))
        'row 3, column 1'
    """
    if not within:
        return f"row {row}"
    return f"row {row}, column {within[0]}" if len(within) == 1 else f"row {row}, position {within}"


def _checked(values: Tensor, index: Tensor, subject: str) -> Tensor:
    """Check values `[n, ...]` read from outside memory; the error names the row and the column."""
    bad = not_finite(values)
    if bad is not None:
        raise RunError(
            f"The {subject} contain {values[bad].item()} at {place(int(index[bad[0]]), bad[1:])}.",
            "finite numbers.",
            "one NaN makes every number of the model NaN.",
        )
    return values


def _pick(array: Tensor | Array, index: Tensor) -> Tensor:
    """Read rows `index` `[n]` of a tensor or of a memory-mapped file; of a file only these rows are read."""
    if isinstance(array, Tensor):
        return array.index_select(0, index if array.is_cpu else index.to(array.device))
    picked = np.asarray(array[index.numpy()])
    return torch.from_numpy(picked.astype(picked.dtype.newbyteorder("="), copy=False))


def _shaped(rows: Tensor, index: Tensor) -> Tensor:
    """Reshape rows read for the flat index to the shape of the index."""
    return rows.reshape(index.shape + rows.shape[1:])


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows of two arrays of equal length.

    Args:
        x: a tensor or an `np.memmap`, `[rows, *features]`.
        y: a tensor or an `np.memmap`, `[rows]` or `[rows, *target]`.
        real: whether y is a number to predict, not a class.
    Example:
        >>> rows = ArrayRows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0]))
        >>> rows.take(torch.tensor([2, 1]))
        (tensor([[3.],
                [2.]]), tensor([0, 1]))
    """

    x: Tensor | Array
    y: Tensor | Array
    real: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.reshape(-1)
        x, y = numbers(_pick(self.x, flat)), answers(_pick(self.y, flat), self.real)
        if not isinstance(self.x, Tensor):
            x = _checked(x, flat, "features")
        if not isinstance(self.y, Tensor):
            y = _checked(y, flat, "targets")
        return _shaped(x, index), _shaped(y, index)

    def targets(self) -> Tensor:
        y = self.y if isinstance(self.y, Tensor) else _pick(self.y, torch.arange(len(self)))
        return answers(y, self.real)


def pair(item: Any, row: int) -> tuple[Tensor, Tensor]:
    """Return one item of a Dataset as tensors (x, y).

    Raises:
        UsageError: the item is not a pair of tensors, arrays or numbers; the error names its row.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UsageError(
            f"Row {row} of the dataset is a {type(item).__name__}.",
            "a pair (x, y).",
            "training compares the model's output for x with y.",
        )
    try:
        x, y = (part if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part)) for part in item)
    except (TypeError, ValueError) as error:
        kinds = ", ".join(type(part).__name__ for part in item)
        raise UsageError(
            f"Row {row} of the dataset is ({kinds}).", "tensors, arrays or numbers.", str(error)
        ) from error
    return x.detach(), y.detach()


def _check_like_first(part: Tensor, first: Tensor, row: int) -> None:
    if (part.shape, part.dtype) != (first.shape, first.dtype):
        raise UsageError(
            f"Row {row} of the dataset has {part.dtype} {tuple(part.shape)}, "
            f"row 0 has {first.dtype} {tuple(first.shape)}.",
            "one shape and dtype for all rows.",
            "rows are stacked into batches.",
        )


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """Rows of a map-style torch Dataset: `__getitem__` is called when a row is needed, not earlier.

    Args:
        dataset: has `__len__`, and `__getitem__` that returns (x, y) with one shape for all rows.
        real: whether y is a number to predict, not a class.
    """

    dataset: Dataset[Any]
    real: bool = False

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def first(self) -> tuple[Tensor, Tensor]:
        """Row 0. All rows must have its shapes and dtypes."""
        return pair(self.dataset[0], 0)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.reshape(-1)
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for row in flat.tolist():
            for part, first, parts in zip(pair(self.dataset[row], row), self.first, (xs, ys), strict=True):
                _check_like_first(part, first, row)
                parts.append(part)
        x, y = (
            torch.stack(parts) if parts else first[None][:0] for parts, first in zip((xs, ys), self.first, strict=True)
        )
        x, y = _checked(numbers(x), flat, "features"), _checked(answers(y, self.real), flat, "targets")
        return _shaped(x, index), _shaped(y, index)

    def targets(self) -> Tensor:
        return self._targets

    @cached_property
    def _targets(self) -> Tensor:
        known = getattr(self.dataset, "targets", None)
        # torchvision's data sets list their labels, but a target_transform would change them.
        if known is None or len(known) != len(self) or getattr(self.dataset, "target_transform", None):
            known = torch.stack([pair(self.dataset[row], row)[1] for row in range(len(self))])
        return answers(torch.as_tensor(known), self.real)


@dataclass(frozen=True, eq=False)
class ConcatRows:
    """Concatenates rows objects: row 0 of the second follows the last row of the first.

    Args:
        parts: the rows objects, in order, with equal features.
    Example:
        >>> one = ArrayRows(torch.zeros(2, 1), torch.zeros(2))
        >>> two = ArrayRows(torch.ones(2, 1), torch.ones(2))
        >>> ConcatRows((one, two)).take(torch.tensor([3, 0]))[1]
        tensor([1., 0.])
    """

    parts: tuple[Rows, ...]

    @cached_property
    def starts(self) -> Tensor:
        return torch.tensor([0, *map(len, self.parts)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.reshape(-1)
        part = torch.searchsorted(self.starts, flat, right=True) - 1
        order = part.argsort(stable=True)
        used, counts = part[order].unique_consecutive(return_counts=True)
        pieces_of_part = [
            self.parts[p].take(flat[positions] - self.starts[p])
            for p, positions in zip(used.tolist(), order.split(counts.tolist()), strict=True)
        ] or [self.parts[0].take(flat)]
        back = order.argsort()
        x, y = (torch.cat(pieces)[back] for pieces in zip(*pieces_of_part, strict=True))
        return _shaped(x, index), _shaped(y, index)

    def targets(self) -> Tensor:
        return torch.cat([part.targets() for part in self.parts])


@dataclass(frozen=True, eq=False)
class PickedRows:
    """A selection of the rows of another rows object: row i is row `index[i]` of `rows`."""

    rows: Rows
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.take(self.index[index])

    def targets(self) -> Tensor:
        return self.rows.targets()[self.index]


def in_memory(rows: Rows) -> bool:
    """Return whether the rows are in one array in host memory, which can be read without a copy."""
    if isinstance(rows, PickedRows):
        return in_memory(rows.rows)
    plain = isinstance(rows, ArrayRows) and isinstance(rows.x, Tensor) and isinstance(rows.y, Tensor)
    return plain and rows.x.is_cpu and rows.x.is_contiguous()  # type: ignore[attr-defined]


def stored(rows: Rows, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the array that stores rows in memory, the positions in it of the rows `index`, and their targets.

    Args:
        rows: rows for which `in_memory` is true.
        index: the row numbers, int64 `[...]`.
    Raises:
        UsageError: the rows are not in one array in memory.
    Example:
        >>> array = ArrayRows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0]))
        >>> x, at, y = stored(PickedRows(array, torch.tensor([2, 1])), torch.tensor([1]))
        >>> x[at], y
        (tensor([[2.]]), tensor([1]))

    Raises:
        UsageError: the rows are not in memory, or a row number is outside them.
    """
    if isinstance(rows, PickedRows):
        return stored(rows.rows, rows.index[index])
    if not isinstance(rows, ArrayRows) or not isinstance(rows.x, Tensor) or not in_memory(rows):
        raise UsageError(f"The rows have type {type(rows).__name__}.", "rows of one array in memory.")
    try:
        return rows.x, index, answers(_pick(rows.y, index), rows.real)
    except IndexError as error:
        raise outside(index, len(rows.x)) from error


def outside(index: Tensor, rows: int) -> UsageError:
    """Build the error for row numbers, of which at least one is not in 0 … rows − 1.

    Args:
        index: row numbers, int64, any shape.
        rows: the number of rows.
    """
    wrong = index[(index < 0) | (index >= rows)]
    return UsageError(
        f"Row {int(wrong[0])} of a data set with {rows} rows.",
        f"row numbers from 0 to {rows - 1}.",
        "native code reads a row by its address, so another number would read foreign memory.",
    )


def on_device(rows: Rows, device: torch.device, room: float) -> Rows:
    """Move rows in memory to a device if they need at most `room` bytes; return all other rows unchanged.

    Args:
        rows: the rows to move.
        device: the target.
        room: the bytes of device memory that may be used.
    Example:
        >>> rows = PickedRows(ArrayRows(torch.ones(3, 1), torch.zeros(3)), torch.tensor([2, 0]))
        >>> on_device(rows, torch.device("meta"), room=8.0) is rows
        True
        >>> on_device(rows, torch.device("meta"), room=24.0).take(torch.tensor([1]))[0].device
        device(type='meta')
    """
    arrays = {id(t): t for t in _arrays(rows)}
    if not arrays or sum(t.numel() * t.element_size() for t in arrays.values()) > room:
        return rows
    moved: Rows = _with_tensors(rows, {i: t.to(device) for i, t in arrays.items()})
    return moved


def _arrays(rows: Any) -> list[Tensor]:
    """Return the tensors that store the rows; empty if the rows are not stored in tensors only."""
    match rows:
        case ArrayRows(x=Tensor() as x, y=Tensor() as y):
            return [x, y]
        case PickedRows():
            return _arrays(rows.rows)
        case ConcatRows() if all(map(_arrays, rows.parts)):
            return [t for part in rows.parts for t in _arrays(part)]
    return []


def _with_tensors(rows: Any, tensors: dict[int, Tensor]) -> Any:
    match rows:
        case ArrayRows():
            return replace(rows, x=tensors[id(rows.x)], y=tensors[id(rows.y)])
        case PickedRows():
            return replace(rows, rows=_with_tensors(rows.rows, tensors))
    return replace(rows, parts=tuple(_with_tensors(part, tensors) for part in rows.parts))


def spill(stream: Iterable[Any]) -> tuple[Array, Array]:
    """Write a stream of (x, y) to two temporary files and memory-map them; the files vanish with the arrays.

    Args:
        stream: a finite iterable dataset, one shape for all rows; it needs memory for one row.
    Returns:
        x and y as read-only `np.memmap`s, `[rows, ...]`, in the temporary folder (TMPDIR).
    Example:
        >>> x, y = spill((np.full(2, i), i % 2) for i in range(3))
        >>> x.tolist(), y.tolist()
        ([[0, 0], [1, 1], [2, 2]], [0, 1, 0])
    """
    with tempfile.TemporaryFile() as xs, tempfile.TemporaryFile() as ys:
        first: tuple[Tensor, ...] = ()
        count = 0
        for count, item in enumerate(stream, 1):
            row = [part if part.dtype == torch.uint8 else numbers(part) for part in pair(item, count - 1)]
            first = first or tuple(row)
            for part, like, file in zip(row, first, (xs, ys), strict=True):
                _check_like_first(part, like, count - 1)
                file.write(part.contiguous().numpy().tobytes())
        if not count:
            raise UsageError("The iterable dataset has no rows.", "at least one row (x, y).")
        mapped: list[Array] = []
        for like, file in zip(first, (xs, ys), strict=True):
            file.flush()
            mapped.append(np.memmap(file, like.numpy().dtype, "r", shape=(count, *like.shape)))
    return mapped[0], mapped[1]
