"""Storage of rows: arrays in memory, a memory-mapped file, a torch Dataset, or several of these in sequence.

Features are converted for the model: uint8 is an intensity and becomes float32 in [0, 1]; float32 and float64 are
unchanged; other integers are token ids and become int64. Rows in memory are checked for NaN and infinity once, when
the source is built. All other rows are checked batch by batch, when they are read.

Tests: tests/data/test_rows.py, tests/identities/test_numerics.py.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from atoll.base.errors import ClientError, RunError, UsageError
from atoll.base.random import GeneratorWatch, Key, mixed, reseed, user_scope
from atoll.data.fields import PackedRows, RowField, as_stored, check_names, check_same_fields, check_tuple, pack_fields

Array = npt.NDArray[Any]
IGNORED = -100  # the label of a place that neither loss nor accuracy counts, as in torch's cross-entropy
_COMPARED = 32  # rows of a Dataset whose labels are compared with its attribute `targets`


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
        raise ClientError(
            f"The {subject} contain {values[bad].item()} at {place(int(index[bad[0]]), bad[1:])}.",
            "finite numbers.",
            "one NaN makes every number of the model NaN.",
        )
    return values


def unlabelled(y: Tensor) -> int | None:
    """Return the first row whose labels are all −100, or None.

    Args:
        y: labels `[n]` or `[n, …]`, or numbers to predict, which have no such mark.
    Example:
        >>> unlabelled(torch.tensor([[0, -100], [-100, -100]]))
        1
    """
    if y.is_floating_point() or not len(y):
        return None
    empty = (y == IGNORED).reshape(len(y), -1).all(1)
    return int(empty.nonzero()[0]) if bool(empty.any()) else None


def _labelled(y: Tensor, index: Tensor, real: bool) -> Tensor:
    """Check labels `[n, ...]` read from outside memory; the error names the row."""
    bad = None if real else unlabelled(y)
    if bad is not None:
        raise ClientError(
            f"All labels of row {int(index[bad])} are {IGNORED}.",
            "a label in each row.",
            "a row without a label has no loss.",
        )
    return y


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
        fields: the tensors of a row, if x contains their words, int32 `[rows, words]`; empty: a row is one tensor.
    Example:
        >>> rows = ArrayRows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0]))
        >>> rows.take(torch.tensor([2, 1]))
        (tensor([[3.],
                [2.]]), tensor([0, 1]))
    """

    x: Tensor | Array
    y: Tensor | Array
    real: bool = False
    fields: tuple[RowField, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.reshape(-1)
        x, y = _pick(self.x, flat), answers(_pick(self.y, flat), self.real)
        x = x if self.fields else numbers(x)
        if not isinstance(self.x, Tensor):
            x = _checked(x, flat, "features")
        if not isinstance(self.y, Tensor):
            y = _labelled(_checked(y, flat, "targets"), flat, self.real)
        return _shaped(x, index), _shaped(y, index)

    def targets(self) -> Tensor:
        y = self.y if isinstance(self.y, Tensor) else _pick(self.y, torch.arange(len(self)))
        return answers(y, self.real)


def pair(item: Any, row: int) -> tuple[Tensor | PackedRows, Tensor]:
    """Return one item of a Dataset as (x, y); x is packed if it is a dict of tensors.

    Raises:
        UsageError: the item is not a pair of tensors, arrays or numbers; the error names its row.
        ClientError: a tensor of the dict contains NaN or infinity.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UsageError(
            f"Row {row} of the dataset is a {type(item).__name__}.",
            "a pair (x, y).",
            "training compares the model's output for x with y.",
        )
    x, y = item
    if isinstance(x, Tensor):
        return _tensor(x, row, item), _tensor(y, row, item)
    if not isinstance(x, Mapping):
        check_tuple(x, f"x of row {row} of the dataset", 1)
        return _tensor(x, row, item), _tensor(y, row, item)
    check_names(x, f"x of row {row} of the dataset")
    tensors = {name: _tensor(part, row, item) for name, part in x.items()}
    for name, tensor in tensors.items():
        _checked(as_stored(tensor)[None], torch.tensor([row]), f"values of {name!r}")
    return pack_fields(tensors, 0), _tensor(y, row, item)


def _tensor(part: Any, row: int, item: Sequence[Any]) -> Tensor:
    """A value of an item of a Dataset as a tensor. The caller must not change it in place."""
    if type(part) is int and abs(part) < 1 << 63:
        return _whole(part)
    if isinstance(part, np.ma.MaskedArray) and part.mask.any():
        raise UsageError(
            f"Row {row} of the dataset has a masked value.",
            "a value for every feature and target.",
            "a missing value cannot be guessed.",
        )
    try:
        tensor = part if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part))
    except (TypeError, ValueError) as error:
        kinds = ", ".join(type(each).__name__ for each in item)
        raise UsageError(
            f"Row {row} of the dataset is ({kinds}).", "tensors, arrays or numbers.", str(error)
        ) from error
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise UsageError(
            f"Row {row} of the dataset has a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}.",
            "dense tensors of real numbers, with values.",
            "rows are stacked into batches.",
        )
    return tensor.detach() if tensor.requires_grad else tensor


@lru_cache(1024)
def _whole(number: int) -> Tensor:
    """A whole number as a tensor. It is kept, since a data set has few labels and torch takes 10 µs to make one."""
    return torch.tensor(number, device="cpu")


def _check_like_first(part: Tensor | PackedRows, first: Tensor | PackedRows, row: int) -> None:
    if isinstance(part, PackedRows) or isinstance(first, PackedRows):
        ours, theirs = (p.fields if isinstance(p, PackedRows) else () for p in (part, first))
        check_same_fields(ours, theirs, f"Row {row} of the dataset", "row 0")
        return
    if (part.shape, part.dtype) != (first.shape, first.dtype):
        raise UsageError(
            f"Row {row} of the dataset has {part.dtype} {tuple(part.shape)}, "
            f"row 0 has {first.dtype} {tuple(first.shape)}.",
            "one shape and dtype for all rows.",
            "rows are stacked into batches; pad sequences to one length, and pad labels with -100.",
        )


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """Rows of a map-style torch Dataset: `__getitem__` is called when a row is needed, not earlier.

    Args:
        dataset: has `__len__`, and `__getitem__` that returns (x, y) with one shape for all rows.
        real: whether y is a number to predict, not a class.
        word: the key of draws in `__getitem__`, an integer in [0, 2⁶⁴). A row draws the same numbers at each reading
            with the same word.
        forced: whether rows draw even if the first row does not.
        inside: whether the caller restores the generators after several readings.
    """

    dataset: Dataset[Any]
    real: bool = False
    word: int = Key(0).fold("rows").word()
    forced: bool = False
    inside: bool = False

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def first(self) -> tuple[Tensor | PackedRows, Tensor]:
        """Row 0. All rows must have its shapes and dtypes."""
        return self._observed[0]

    @property
    def draws(self) -> bool:
        """Whether reading a row draws from a global generator, as the reading of row 0 did."""
        if self.forced:
            return True
        try:
            return self._observed[1]
        except ClientError:
            return False

    @cached_property
    def _observed(self) -> tuple[tuple[Tensor | PackedRows, Tensor], bool]:
        """Row 0, and whether reading it drew."""
        with user_scope(Key(0)):
            reseed(mixed(self.word, 0))
            draws = GeneratorWatch()
            return self._read(0), draws.found()

    def keyed(self, word: int, forced: bool = False, inside: bool = False) -> DatasetRows:
        """The same rows with another key of their draws."""
        made = replace(self, word=word, forced=forced or self.forced, inside=inside)
        for name in ("_observed", "first", "_listed", "_differing", "_targets"):
            if name in vars(self):
                vars(made)[name] = vars(self)[name]
        return made

    def _scope(self) -> contextlib.AbstractContextManager[None]:
        """The scope of some readings: generators are restored at its end if rows draw."""
        return user_scope(Key(0)) if self.draws and not self.inside else contextlib.nullcontext()

    def _item(self, row: int, draws: bool) -> tuple[Tensor | PackedRows, Tensor]:
        """Read one row inside `_scope`, with its own draws if rows draw."""
        if draws:
            reseed(mixed(self.word, row))
        return self._read(row)

    def _read(self, row: int) -> tuple[Tensor | PackedRows, Tensor]:
        """Read one row.

        Raises:
            ClientError: `__getitem__` raised an error; the error names the row.
        """
        try:
            item = self.dataset[row]
        except MemoryError:
            raise
        except Exception as error:
            raise ClientError(
                f"Row {row} of the dataset raised {type(error).__name__}: {str(error).rstrip('.')}.",
                "a pair (x, y) for every row number below len(dataset).",
                "the client that holds the row cannot train without it.",
            ) from error
        return pair(item, row)

    def _like(self, item: tuple[Tensor | PackedRows, Tensor]) -> tuple[Tensor | PackedRows, Tensor]:
        """The row whose shapes and dtypes a batch must have: row 0, or the batch's own row if row 0 is unreadable."""
        try:
            return self.first
        except ClientError:
            return item

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.reshape(-1)
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        like: tuple[Tensor | PackedRows, Tensor] | None = None
        draws = self.draws
        with self._scope():
            for row in flat.tolist():
                item = self._item(row, draws)
                like = like or self._like(item)
                for part, first, parts in zip(item, like, (xs, ys), strict=True):
                    _check_like_first(part, first, row)
                    parts.append(_words(part))
        like = like or self.first
        x, y = (
            torch.stack(parts) if parts else _words(first)[None][:0]
            for parts, first in zip((xs, ys), like, strict=True)
        )
        x = x if isinstance(like[0], PackedRows) else _checked(numbers(x), flat, "features")
        y = _checked(answers(y, self.real), flat, "targets")
        self._check_unchanged(_labelled(y, flat, self.real), flat)
        return _shaped(x, index), _shaped(y, index)

    def targets(self) -> Tensor:
        return self._targets

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence if the attribute `targets` of the Dataset was read and has other labels than its rows."""
        if self._listed is None or self._differing is None:
            return ()
        row, label = self._differing
        return (
            f"The attribute targets of the dataset has {self._listed[row].tolist()} for row {row}, and __getitem__ "
            f"returns {label.tolist()}. All labels were read with __getitem__.",
        )

    @cached_property
    def _targets(self) -> Tensor:
        if self._listed is not None and self._differing is None:
            return self._listed
        with self._scope():
            targets = [self._target(row) for row in range(len(self))]
        for row, target in enumerate(targets):
            _check_like_first(target, targets[0], row)
        return torch.stack(targets)

    @cached_property
    def _listed(self) -> Tensor | None:
        """The attribute `targets` of the Dataset, if it lists one number for each row."""
        known = getattr(self.dataset, "targets", None)
        # torchvision's data sets list their labels, but a target_transform would change them.
        if known is None or getattr(self.dataset, "target_transform", None):
            return None
        try:
            listed = answers(torch.as_tensor(known), self.real)
        except (TypeError, ValueError, RuntimeError):
            return None
        return listed if listed.dim() and len(listed) == len(self) else None

    @cached_property
    def _differing(self) -> tuple[int, Tensor] | None:
        """Of some keyed rows, the first whose label differs from the listed one, and its label; None: no row."""
        rows = Key(0).fold("targets").distinct(min(_COMPARED, len(self)), len(self)).tolist()
        for row in rows:
            with contextlib.suppress(ClientError), self._scope():  # an unreadable row fails its client later
                y = self._target(row)
                if not torch.equal(y, self._listed[row]):  # type: ignore[index]
                    return row, y
        return None

    def _target(self, row: int) -> Tensor:
        return answers(self._item(row, self.draws)[1], self.real)

    def _check_unchanged(self, y: Tensor, index: Tensor) -> None:
        """Compare labels with those that the split has used, if they have been read."""
        known: Tensor | None = vars(self).get("_targets")
        if known is None or torch.equal(known[index], y):
            return
        at = int((known[index] != y).reshape(len(y), -1).any(1).nonzero()[0])
        raise RunError(
            f"Row {int(index[at])} of the dataset has the label {y[at].tolist()}, and "
            f"{'its attribute targets has' if known is self._listed else 'the first reading had'} "
            f"{known[index[at]].tolist()}.",
            "the same label at each reading.",
            "the classes, the split and the held-out rows follow the labels that were read first.",
        )


def _words(part: Tensor | PackedRows) -> Tensor:
    words: Tensor = part.words if isinstance(part, PackedRows) else part
    return words


def fields_of(rows: Any) -> tuple[RowField, ...]:
    """The tensors of a row, if rows are dicts of tensors; else empty.

    Example:
        >>> fields_of(ArrayRows(torch.zeros(1, 1), torch.zeros(1)))
        ()
    """
    match rows:
        case ArrayRows():
            return rows.fields
        case DatasetRows():
            with contextlib.suppress(ClientError):  # row 0 is unreadable
                return rows.first[0].fields if isinstance(rows.first[0], PackedRows) else ()
            return ()
        case ConcatRows():
            return next((fields for fields in map(fields_of, rows.parts) if fields), ())
    inner = _inside(rows)
    return () if inner is None else fields_of(inner)


def draws_in(rows: Any) -> bool:
    """Whether reading some of these rows draws from a global generator.

    Example:
        >>> draws_in(ArrayRows(torch.zeros(1, 1), torch.zeros(1)))
        False
    """
    match rows:
        case DatasetRows():
            return rows.draws
        case ConcatRows():
            return any(map(draws_in, rows.parts))
        case ArrayRows():
            return False
    inner = _inside(rows)
    return inner is not None and draws_in(inner)


def _inside(rows: Any) -> Any:
    """The rows that a dataclass wraps in its field `rows`; None for other objects."""
    return vars(rows).get("rows") if is_dataclass(rows) and not isinstance(rows, type) else None


def keyed(rows: Any, word: int | None, *, forced: bool = False, inside: bool = False) -> Any:
    """The same rows with another key of their draws; rows that do not draw are returned unchanged.

    Args:
        rows: rows, or a dataclass that wraps rows in a field `rows`.
        word: the key, an integer in [0, 2⁶⁴); None: the same key.
        forced: whether rows of a Dataset draw even if their first row does not.
        inside: whether the caller restores the generators.
    """
    match rows:
        case DatasetRows():
            return rows.keyed(rows.word if word is None else word, forced, inside)
        case ConcatRows():
            return replace(rows, parts=tuple(keyed(part, word, forced=forced, inside=inside) for part in rows.parts))
        case ArrayRows():
            return rows
    inner = _inside(rows)
    made = None if inner is None else keyed(inner, word, forced=forced, inside=inside)
    return rows if made is inner else replace(rows, rows=made)


@dataclass(frozen=True, eq=False)
class ConcatRows:
    """Concatenates rows objects: row 0 of the second follows the last row of the first.

    Args:
        parts: the rows objects, in order, with equal features.
        dtype: the dtype of the features of all parts; None: each part keeps its own, and all have the same.
    Example:
        >>> one = ArrayRows(torch.zeros(2, 1), torch.zeros(2))
        >>> two = ArrayRows(torch.ones(2, 1), torch.ones(2))
        >>> ConcatRows((one, two)).take(torch.tensor([3, 0]))[1]
        tensor([1., 0.])
    """

    parts: tuple[Rows, ...]
    dtype: torch.dtype | None = None

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
        return _shaped(x if self.dtype is None else x.to(self.dtype), index), _shaped(y, index)

    def targets(self) -> Tensor:
        return torch.cat([part.targets() for part in self.parts])

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all parts that are Datasets."""
        return tuple(dict.fromkeys(note for part in self.parts for note in label_notes(part)))


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Rows whose labels are any numbers: the target of a row is the position of its label among the known labels.

    Args:
        rows: the rows, with one number as the label of a row.
        known: the known labels in the order of their classes, `[classes]`.
    Example:
        >>> rows = ArrayRows(torch.zeros(3, 1), torch.tensor([5, 10, 5]))
        >>> CodedRows(rows, torch.tensor([0, 5, 10])).targets()
        tensor([1, 2, 1])
    """

    rows: Rows
    known: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        return x, self._code(y, index)

    def targets(self) -> Tensor:
        return self._code(self.rows.targets(), torch.arange(len(self)))

    def _code(self, y: Tensor, index: Tensor) -> Tensor:
        known, order = self.known.to(y.device, y.dtype).sort()
        place = torch.searchsorted(known, y.contiguous()).clamp(max=len(known) - 1)
        code = order[place]
        new = known[place] != y
        if new.any():
            raise UsageError(
                f"Row {int(index.reshape(-1)[new.reshape(-1).nonzero()[0]])} has label {y[new][0].item():g}, which no "
                "train row has.",
                f"one of the {len(known)} labels of the train rows.",
                "a model cannot learn a class without train rows.",
            )
        return code


@dataclass(frozen=True, eq=False)
class RelabelledRows:
    """Rows with other targets, one for each row."""

    rows: Rows
    y: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.take(index)[0], self.y[index]

    def targets(self) -> Tensor:
        return self.y


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


def intensities(rows: Rows) -> bool:
    """Return whether stored features are uint8 intensities, which are divided by 255 when they are read."""
    match rows:
        case ArrayRows():
            return str(rows.x.dtype).rpartition(".")[2] == "uint8"
        case DatasetRows():
            with contextlib.suppress(ClientError):  # row 0 is unreadable
                x = rows.first[0]
                return isinstance(x, Tensor) and x.dtype == torch.uint8
        case ConcatRows():
            return any(map(intensities, rows.parts))
        case PickedRows() | CodedRows() | RelabelledRows():
            return intensities(rows.rows)
    return False


def label_notes(rows: Rows) -> tuple[str, ...]:
    """The notes on the labels of rows; empty for rows that are not read from a Dataset."""
    return rows.notes if isinstance(rows, (DatasetRows, ConcatRows)) else ()


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


def spill(stream: Iterable[Any]) -> tuple[Array | PackedRows, Array]:
    """Write a stream of (x, y) to two temporary files and memory-map them; the files vanish with the arrays.

    Args:
        stream: a finite iterable dataset, one shape for all rows; it needs memory for one row.
    Returns:
        x and y as read-only `np.memmap`s, `[rows, ...]`, in the temporary folder (TMPDIR). If rows are dicts,
        x is packed.
    Example:
        >>> x, y = spill((np.full(2, i), i % 2) for i in range(3))
        >>> x.tolist(), y.tolist()
        ([[0, 0], [1, 1], [2, 2]], [0, 1, 0])
    """
    with tempfile.TemporaryFile() as xs, tempfile.TemporaryFile() as ys:
        first: tuple[Tensor | PackedRows, ...] = ()
        count = 0
        for count, item in enumerate(stream, 1):
            row = [
                p if isinstance(p, PackedRows) or p.dtype == torch.uint8 else numbers(p) for p in pair(item, count - 1)
            ]
            first = first or tuple(row)
            for part, like, file in zip(row, first, (xs, ys), strict=True):
                _check_like_first(part, like, count - 1)
                file.write(_words(part).contiguous().numpy().tobytes())
        if not count:
            raise UsageError("The iterable dataset has no rows.", "at least one row (x, y).")
        mapped: list[Array] = []
        for like, file in zip(first, (xs, ys), strict=True):
            file.flush()
            mapped.append(np.memmap(file, _words(like).numpy().dtype, "r", shape=(count, *like.shape)))
    x = first[0]
    return PackedRows(mapped[0], x.fields) if isinstance(x, PackedRows) else mapped[0], mapped[1]
