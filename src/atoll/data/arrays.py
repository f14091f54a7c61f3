"""Sources from data in the program: arrays, a torch Dataset, or one data set per client.

Tests: tests/data/test_rows.py, tests/data/test_split.py, tests/faults/test_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from atoll.base.errors import UsageError, unknown_name
from atoll.data.clients import Clients
from atoll.data.partition import ByColumn
from atoll.data.rows import (
    Array,
    ArrayRows,
    ConcatRows,
    DatasetRows,
    Rows,
    answers,
    not_finite,
    place,
    spill,
)
from atoll.data.sources import Source, unseen

TASKS = ("classification", "regression")
Pair = tuple[Any, Any]


class Targets(NamedTuple):
    """Encoded targets, the kind of task, the names of the classes, and notes on guesses."""

    y: Tensor | Array
    kind: str
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]


def _array(value: Any, subject: str) -> Array:
    """Convert to a numpy array of any dtype; share memory if possible, and keep a memory map a memory map."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return array
    try:
        return np.asanyarray(value)
    except ValueError as error:
        raise UsageError(f"{subject} is not an array: {error}.", "rows of one shape.") from None


def _numeric(value: Any, subject: str) -> Array:
    array = _array(value, subject)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise UsageError(
            f"{subject} is an array of {array.dtype}, shape {array.shape}.",
            "numbers, one entry per row.",
            "models compute with numbers.",
            "atoll.data.frame(df)",
        )
    return array


def tensor_of(array: Array) -> Tensor:
    """Convert an array to a tensor; share memory if torch can."""
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def _finite(tensor: Tensor, subject: str) -> Tensor:
    bad = not_finite(tensor)
    if bad is not None:
        raise UsageError(
            f"{subject} contains {tensor[bad].item()} at {place(bad[0], bad[1:])}.",
            "finite numbers.",
            "one NaN makes every number of the model NaN.",
            "keep = [bool(np.isfinite(x[i]).all() and np.isfinite(y[i]).all()) for i in range(len(x))]; "
            "x, y = x[keep], y[keep]",
        )
    return tensor


def _features(x: Any, subject: str) -> Tensor | Array:
    """Convert x to a tensor without NaN and infinity; a memory map is returned unchanged and unchecked."""
    array = _numeric(x, subject)
    if array.ndim < 2 or len(array) == 0:
        raise UsageError(
            f"{subject} has shape {array.shape}.",
            "[rows, features...], at least one row.",
            "the model takes one row at a time.",
            "x = x[:, None]" if array.ndim == 1 and len(array) else "",
        )
    return array if isinstance(array, np.memmap) else _finite(tensor_of(array), subject)


def _missing(values: Array) -> Array:
    """Mark the missing entries of an array of any dtype: None, NaN, or infinity."""
    if values.dtype.kind == "O":
        return np.array([v is None or v != v for v in values.tolist()], dtype=bool)
    return ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)


def name_of(value: Any) -> str:
    """Convert a label or client to its name; whole floats lose the decimal point.

    Example:
        >>> name_of(2.0), name_of(0.5), name_of("two")
        ('2', '0.5', 'two')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def distinct(values: Any, subject: str) -> tuple[Tensor, tuple[str, ...]]:
    """Encode each value of a list by its position among the sorted distinct values.

    Args:
        values: labels or clients of any dtype, `[rows]`.
        subject: the name of the list in error messages.
    Returns:
        The codes, int64 `[rows]`, and the distinct values as text: row i has the value `names[codes[i]]`.
    Raises:
        UsageError: the list is not one-dimensional, or a value is missing.
    Example:
        >>> distinct(["b", "a", "b"], "by")
        (tensor([1, 0, 1]), ('a', 'b'))
    """
    array = _array(values, subject)
    if array.ndim != 1:
        raise UsageError(f"{subject} has shape {array.shape}.", "one value per row.")
    absent = _missing(array)
    if absent.any():
        raise UsageError(
            f"{subject} has no value at row {int(absent.argmax())}.",
            "a value for every row.",
            "it is the label or the client of the row, which cannot be guessed.",
        )
    found, codes = np.unique(array.astype(str) if array.dtype.kind == "O" else array, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(map(name_of, found.tolist()))


def _kind(task: str | None, real: bool, subject: str) -> tuple[str, tuple[str, ...]]:
    """Return the kind of task, and a note if it was guessed."""
    if task is None:
        kind = TASKS[real]
        return kind, (f"Task guessed from {subject}: {kind}.",)
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    return task, ()


def encode(y: Any, task: str | None, subject: str = "y") -> Targets:
    """Encode targets as classes 0, 1, … or as numbers.

    Args:
        y: labels of any type `[rows]`; numbers `[rows]` or `[rows, n]`; or classes 0, 1, …, `[rows, length]`.
        task: "classification", "regression", or None: regression if y has floats.
        subject: the name of the targets in error messages.
    Raises:
        UsageError: an unknown task, a missing label, or a target that is not a finite number.
    Example:
        >>> encode(["no", "yes", "no"], "classification").y
        tensor([0, 1, 0])
    """
    array = _array(y, subject)
    kind, notes = _kind(task, array.dtype.kind == "f", f"{subject} of {array.dtype}")
    if kind == "classification" and (array.ndim == 1 or array.shape[1:] == (1,)):
        codes, names = distinct(array.reshape(-1), subject)
        return Targets(codes, kind, names, notes)
    array = _numeric(array, subject)
    if isinstance(array, np.memmap) and array.ndim > 1:
        return Targets(array, kind, None, notes)
    return Targets(_finite(answers(tensor_of(array), kind == "regression"), subject), kind, None, notes)


def _encode_like(y: Any, targets: Targets, subject: str) -> Tensor | Array:
    """Encode the targets of test rows with the classes of the train rows."""
    if targets.classes is None:
        return encode(y, targets.kind, subject).y
    codes, names = distinct(_array(y, subject).reshape(-1), subject)
    known = {name: code for code, name in enumerate(targets.classes)}
    for code, name in enumerate(names):
        if name not in known:
            raise unseen(name, int((codes == code).nonzero()[0]))
    return torch.tensor([known[name] for name in names])[codes]


def _same_length(a: Tensor | Array, b: Tensor | Array, one: str, other: str) -> None:
    if len(a) != len(b):
        raise UsageError(
            f"{one} has {len(a)} rows, {other} has {len(b)}.",
            "the same number of rows.",
            "row i of one belongs to row i of the other.",
        )


def _same_features(features: Tensor | Array, first: Tensor | Array, whose: str) -> None:
    if features.shape[1:] != first.shape[1:]:
        raise UsageError(
            f"The rows of {whose} have shape {tuple(features.shape[1:])}.",
            f"{tuple(first.shape[1:])}, the shape of all others.",
            "one model takes all rows.",
        )


def arrays(
    x: Any,
    y: Any,
    *,
    by: Any = None,
    task: str | None = None,
    scale: str = "none",
    test: Pair | None = None,
    name: str = "arrays",
) -> Source:
    """Build a source from two arrays: tensors, numpy arrays, `np.memmap`s, or nested lists.

    Args:
        x: `[rows, *features]`: floats; uint8 intensities, which are scaled to [0, 1]; or other integers, which
            are token ids.
        y: labels of any type `[rows]`; numbers `[rows]` or `[rows, n]`; or classes 0, 1, …, `[rows, length]`.
        by: the natural client of each row, such as a hospital or a speaker; `[rows]`, of any type.
        task: "classification" or "regression"; None: regression if y has floats.
        scale: "none", "standard", or "client"; see `Source`.
        test: the test rows of the data set, as a pair (x, y).
        name: the name of the data set in reports.
    Returns:
        A source that shares memory with tensors and arrays, and reads an `np.memmap` batch by batch.
    Raises:
        UsageError: lengths or shapes differ, a number in memory is NaN or infinite (an `np.memmap` is checked
            when it is read), or a test label does not occur in the train rows.
    Example:
        >>> arrays(np.eye(4), ["cat", "dog", "cat", "dog"]).classes
        ('cat', 'dog')
    """
    features, targets = _features(x, "x"), encode(y, task)
    _same_length(features, targets.y, "x", "y")
    test_rows, real = None, targets.kind == "regression"
    if test is not None:
        test_rows = ArrayRows(_features(test[0], "the test x"), _encode_like(test[1], targets, "the test y"), real)
        _same_length(test_rows.x, test_rows.y, "the test x", "the test y")
        _same_features(test_rows.x, features, "the test x")
    source = Source(
        name=name,
        rows=ArrayRows(features, targets.y, real),
        kind=targets.kind,
        classes=targets.classes,
        features=tuple(features.shape[1:]),
        test=test_rows,
        notes=targets.notes,
    )
    return replace(_with_clients(source, by), scale=scale)


def _with_clients(source: Source, by: Any) -> Source:
    """Return the source with `by[i]` as the natural client of row i. If `by` is None, return the source unchanged."""
    if by is None:
        return source
    codes, names = distinct(by, "by")
    if len(codes) != len(source):
        raise UsageError(f"by has {len(codes)} entries for {len(source)} rows.", "one client per row.")
    return replace(source, by=codes, names=names)


def _as_arrays(part: Any) -> Pair | None:
    """Return (x, y) for data in arrays and for streams, which are read once; None for a Dataset that is read by row."""
    if isinstance(part, IterableDataset):
        return spill(part)
    if isinstance(part, TensorDataset):
        part = part.tensors
    if isinstance(part, tuple) and len(part) == 2:
        return part
    if hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        return None
    raise UsageError(
        f"The data has type {type(part).__name__}.",
        "a pair (x, y) or a torch Dataset.",
        write="atoll.data.arrays(x, y)",
    )


def _rows(part: Any, known: Pair | None, task: str | None, whose: str) -> Rows:
    """Return the rows of one part, without copying them."""
    real = task == "regression"
    if known is None:
        if not len(part):
            raise UsageError(f"{whose} has no rows.", "at least one row (x, y).")
        return DatasetRows(part, real)
    x, y = _features(known[0], f"x of {whose}"), _numeric(known[1], f"y of {whose}")
    _same_length(x, y, f"x of {whose}", "y")
    return ArrayRows(x, y if isinstance(y, np.memmap) else _finite(tensor_of(y), f"y of {whose}"), real)


def _in_place(rows: Rows, test: Rows | None, task: str | None, name: str) -> Source:
    """Build a source of rows that are not copied; their labels must be 0, 1, …, and are read once."""
    first = torch.zeros(1, dtype=torch.int64)
    x, y = rows.take(first)
    kind, notes = _kind(task, y.is_floating_point(), f"targets of {y.dtype}")
    if test is not None:
        _same_features(test.take(first)[0], x, "the test set")
    classes = None
    if kind == "classification" and y.dim() == 1:
        labels = rows.targets()
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise UsageError(
                f"The labels have type {labels.dtype}, the smallest is {labels.min().item()}.",
                "integers 0, 1, 2, ….",
                "a label is the index of its class in the model's output.",
                "task='regression'" if labels.is_floating_point() else "",
            )
        classes = tuple(map(str, range(int(labels.max()) + 1)))
    return Source(name, rows, kind, classes, tuple(x.shape[1:]), test=test, notes=notes)


def dataset(data: Any, *, by: Any = None, task: str | None = None, test: Any = None, name: str = "dataset") -> Source:
    """Build a source from a torch Dataset of pairs (x, y).

    A map-style Dataset is read with `__getitem__`, row by row, when a row is needed. Its labels are read once, from
    `data.targets` if that exists. An iterable Dataset is streamed once to a temporary file.

    Args:
        data: the Dataset; one shape for all rows, labels 0, 1, … or numbers.
        by: the natural client of each row, such as a hospital or a speaker; `[rows]`, of any type.
        task: "classification" or "regression"; None: regression if y is a float.
        test: the test rows of the data set, as a Dataset or a pair (x, y).
        name: the name of the data set in reports.
    Raises:
        UsageError: the Dataset is empty, a row is not a pair, or its shape differs from that of row 0.
    Example:
        >>> dataset([(torch.zeros(3), 0), (torch.ones(3), 1)])
        Source('dataset', classification, rows=2, features=(3,))
    """
    known, test_arrays = _as_arrays(data), None if test is None else _as_arrays(test)
    if known is not None and (test is None or test_arrays is not None):
        return arrays(*known, by=by, task=task, test=test_arrays, name=name)
    rows = _rows(data, known, task, "the dataset")
    test_rows = None if test is None else _rows(test, test_arrays, task, "the test set")
    return _with_clients(_in_place(rows, test_rows, task, name), by)


def federate(
    parts: Mapping[str, Any] | Sequence[Any],
    *,
    held_out: Any = 0.2,
    seed: int = 0,
    min_rows: int = 1,
    task: str | None = None,
    name: str = "federation",
) -> Clients:
    """Build a federation from one data set per client.

    Args:
        parts: one pair (x, y) or torch Dataset for each client: a list, or a dict whose keys are the clients' names.
        held_out: fraction of each class to hold out, in [0, 1); or the held-out rows: (x, y) or a Dataset.
        seed, min_rows: as in `Source.split`.
        task: "classification" or "regression"; None: regression if y has floats.
        name: the name of the data set in reports.
    Returns:
        One client for each part, in the order of `parts`. Arrays in memory are copied once into one array, so that one
        read returns the rows of many clients. Other data is not copied, and its labels must be 0, 1, ….
    Raises:
        UsageError: `parts` is empty, or the features of two parts differ in shape.
    Example:
        >>> north, south = (torch.zeros(4, 2), [0, 1, 0, 1]), (torch.ones(6, 2), [1, 0, 1, 0, 1, 0])
        >>> federate({"north": north, "south": south}, held_out=0).sizes.tolist()
        [4, 6]
    """
    names = tuple(map(str, parts if isinstance(parts, Mapping) else range(len(parts))))
    whole = list(parts.values() if isinstance(parts, Mapping) else parts)
    if not whole:
        raise UsageError("The federation has no clients.", "at least one (x, y) or Dataset.")
    known = list(map(_as_arrays, whole))
    drawn = isinstance(held_out, (int, float))
    held_out_arrays = None if drawn else _as_arrays(held_out)
    pairs = [pair for pair in known if pair is not None and not isinstance(pair[0], np.memmap)]
    if len(pairs) == len(names) and (drawn or held_out_arrays is not None):
        source, sizes = _one_array(names, pairs, held_out_arrays, task, name)
    else:
        rows = [
            _rows(part, pair, task, f"client {client}") for client, part, pair in zip(names, whole, known, strict=True)
        ]
        _check_same_features(names, [part.take(torch.zeros(1, dtype=torch.int64))[0] for part in rows])
        test = None if drawn else _rows(held_out, held_out_arrays, task, "the test set")
        source, sizes = _in_place(ConcatRows(tuple(rows)), test, task, name), list(map(len, rows))
    source = replace(source, by=torch.arange(len(names)).repeat_interleave(torch.tensor(sizes)), names=names)
    return source.split(by=ByColumn(), held_out=held_out if drawn else 0.2, seed=seed, min_rows=min_rows)


def _check_same_features(names: Sequence[str], xs: Sequence[Tensor | Array]) -> None:
    for client, x in zip(names, xs, strict=True):
        _same_features(x, xs[0], f"client {client}")


def _one_array(
    names: Sequence[str], pairs: Sequence[Pair], test: Pair | None, task: str | None, name: str
) -> tuple[Source, list[int]]:
    """Build a source with every client's rows in one array; return it with the clients' sizes."""
    xs = [torch.as_tensor(_features(x, f"x of client {client}")) for client, (x, _) in zip(names, pairs, strict=True)]
    ys = [_array(y, f"y of client {client}") for client, (_, y) in zip(names, pairs, strict=True)]
    _check_same_features(names, xs)
    for client, x, y in zip(names, xs, ys, strict=True):
        _same_length(x, y, f"x of client {client}", "y")
    return arrays(torch.cat(xs), np.concatenate(ys), task=task, test=test, name=name), list(map(len, xs))
