"""Sources from data in the program: arrays, a torch Dataset, or one data set per client.

Tests: tests/data/test_rows.py, tests/data/test_split.py, tests/faults/test_bad_input.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from atoll.base.errors import ClientError, UsageError, unknown_name
from atoll.base.lines import Change, Line, literal
from atoll.base.names import with_noun
from atoll.base.random import Key, user_scope
from atoll.base.validation import check_arguments, plain_number
from atoll.data.cells import name_of
from atoll.data.clients import Clients
from atoll.data.fields import PackedRows, check_names, check_same_fields, check_tuple, pack_fields
from atoll.data.held_out import HeldOut
from atoll.data.partition import ByColumn
from atoll.data.rows import (
    IGNORED,
    Array,
    ArrayRows,
    CodedRows,
    ConcatRows,
    DatasetRows,
    Rows,
    answers,
    fields_of,
    label_notes,
    not_finite,
    numbers,
    place,
    spill,
    unlabelled,
)
from atoll.data.sources import Source, unseen

TASKS = ("classification", "regression", "labels")
Pair = tuple[Any, Any]
_LARGEST_WHOLE = 2**63 - 1


class Targets(NamedTuple):
    """Encoded targets, the kind of task, the names of the classes, and notes on guesses."""

    y: Tensor | Array
    kind: str
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]


def _array(value: Any, subject: str) -> Array:
    """Convert to a numpy array of any dtype; share memory if possible, and keep a memory map a memory map."""
    if isinstance(value, _Leveled):
        return value.labels
    if isinstance(value, DataLoader):
        raise _is_loader(subject)
    if isinstance(value, Tensor):
        return _array_of(value.detach(), subject)
    masked = isinstance(value, (list, tuple)) and any(isinstance(v, np.ma.MaskedArray) for v in value)
    if masked and any(v is np.ma.masked for v in value):
        raise _no_value(subject, np.array([next(i for i, v in enumerate(value) if v is np.ma.masked)]), "it is masked")
    try:
        if isinstance(value, (list, tuple)) and 0 < sum(isinstance(each, str) for each in value) < len(value):
            return np.array(value, dtype=object)  # otherwise NumPy would convert the numbers to texts
        array: Array = np.ma.asanyarray(value) if masked else np.asanyarray(value)
    except Exception as error:  # ValueError for ragged rows, or an error of the library of the value
        raise UsageError(
            f"{subject} is not an array: {str(error).rstrip('.')}.",
            "rows of one shape.",
            "rows are stacked into batches; pad sequences to one length, and pad labels with -100.",
        ) from None
    if isinstance(array, np.ma.MaskedArray):
        if array.mask.any():
            raise _no_value(subject, np.argwhere(np.ma.getmaskarray(array))[0], "it is masked")
        return np.asarray(array.data)
    return array


def _array_of(tensor: Tensor, subject: str) -> Array:
    """A dense tensor with values as an array."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = (
            "meta" if tensor.is_meta else "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else ""
        )
        given = f"{subject} is a {kind or str(tensor.layout)[6:]} tensor of shape {tuple(tensor.shape)}."
        write = Line(python="x.to_dense()") if not kind and not tensor.is_meta else ""
        raise UsageError(given, "a dense tensor with values.", "rows are read by their numbers.", write)
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _is_loader(subject: str) -> UsageError:
    """The error for a DataLoader in place of data."""
    return UsageError(
        f"{subject} is a DataLoader.",
        "the Dataset of the DataLoader.",
        "a training draws batches by itself, with keyed random numbers.",
        Line(python="atoll.data.dataset(loader.dataset)"),
    )


def _no_value(subject: str, at: Array, why: str) -> UsageError:
    """The error for a missing value at this index of an array."""
    row, *within = at.tolist() or [0]
    return UsageError(
        f"{subject} has no value at {place(row, tuple(within))}: {why}.",
        "a value for every row and column.",
        "a missing value cannot be guessed.",
    )


def _numeric(value: Any, subject: str) -> Array:
    array = _array(value, subject)
    if array.dtype.kind == "O" and array.size:
        absent = _missing(array.reshape(-1)).reshape(array.shape)
        if absent.any():
            at = np.argwhere(absent)[0]
            raise _no_value(subject, at, f"it is {array[tuple(at)]}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise UsageError(
            f"{subject} is an array of {array.dtype}.",
            "float64 at most.",
            "torch has no wider floats.",
            Line(python="x.astype(np.float64)"),
        )
    if array.dtype == np.uint64 and array.size and array.max() > _LARGEST_WHOLE:
        raise UsageError(f"{subject} contains {array.max()}.", f"whole numbers up to {_LARGEST_WHOLE}.")
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise UsageError(
            f"{subject} is an array of {array.dtype}, shape {array.shape}.",
            "numbers, one entry per row.",
            "models compute with numbers.",
            Line(python="atoll.data.frame(df)"),
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
            Line(
                python="keep = [bool(np.isfinite(x[i]).all() and np.isfinite(y[i]).all()) for i in range(len(x))]; "
                "x, y = x[keep], y[keep]"
            ),
        )
    return tensor


def _features(x: Any, subject: str, missing: str | None = None) -> Tensor | Array:
    """Convert x to a tensor without NaN and infinity; a memory map is returned unchanged and unchecked.

    Args:
        x: the features.
        subject: their name in errors.
        missing: "mean" or "drop" if NaN is a missing number; None: it is refused.
    """
    if missing not in (None, "mean", "drop"):
        raise unknown_name("way with missing values", missing, ("mean", "drop"), lambda near: Change("missing", near))
    array = _numeric(x, subject)
    if array.ndim < 2 or len(array) == 0:
        raise UsageError(
            f"{subject} has shape {array.shape}.",
            "[rows, features...], at least one row.",
            "the model takes one row at a time.",
            Line(python="x = x[:, None]") if array.ndim == 1 and len(array) else "",
        )
    if isinstance(array, np.memmap):
        return array
    tensor = tensor_of(array)
    _finite(
        tensor
        if missing is None or not tensor.is_floating_point()
        else tensor.nan_to_num(posinf=torch.inf, neginf=-torch.inf),
        subject,
    )
    return tensor


def _read(x: Any, subject: str, missing: str | None = None) -> PackedRows:
    """Convert x to a tensor, or to the words of several tensors.

    Args:
        x: an array, a dict of arrays, or words of a stream.
        subject: their name in errors.
        missing: as for `_features`.
    """
    if isinstance(x, PackedRows):
        return x
    if not isinstance(x, Mapping):
        if isinstance(x, tuple):
            check_tuple(x, subject, 2)
        return PackedRows(_features(x, subject, missing), ())
    check_names(x, subject)
    if missing is not None:
        raise UsageError(
            f"{subject} is a dict of arrays, and missing={missing!r}.",
            "arrays without missing numbers.",
            "a mean is known for the columns of one array.",
            Line(python="missing=None"),
        )
    parts = {name: _field(part, f"{subject}[{name!r}]") for name, part in x.items()}
    first = next(iter(parts))
    for name, part in parts.items():
        _same_length(part, parts[first], f"{subject}[{name!r}]", f"{subject}[{first!r}]")
    return pack_fields(parts, 1)


def _field(x: Any, subject: str) -> Tensor:
    """One array of a dict, `[rows]` or `[rows, *shape]`, without NaN and infinity."""
    array = _numeric(x, subject)
    if isinstance(array, np.memmap):
        raise UsageError(
            f"{subject} is a memory-mapped array in a dict.",
            "arrays in memory, or a Dataset whose items are pairs of a dict and a target.",
            "the arrays of a dict are copied into one.",
            Line(python="atoll.data.dataset(rows)"),
        )
    if not len(array):
        raise UsageError(f"{subject} has shape {array.shape}.", "at least one row.")
    tensor = _finite(tensor_of(array), subject)
    return tensor.float() if tensor.dtype == torch.uint8 and tensor.dim() < 3 else tensor


def _missing(values: Array) -> Array:
    """Mark the missing entries of an array of any dtype: None, NaN, infinity, or the missing mark of a container."""
    if values.dtype.kind == "O":
        return np.array([_is_missing(v) for v in values.tolist()], dtype=bool)
    if values.dtype.kind in "mM":
        return np.isnat(values)
    return ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)


class _Leveled(NamedTuple):
    """Labels, and the order of their levels if their containers define one."""

    labels: Array
    levels: tuple[str, ...] | None


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, a masked scalar of NumPy, or a missing mark of pandas (`NA`, `NaT`)."""
    if value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and bool(value != value)


def levels_of(values: Any) -> tuple[str, ...] | None:
    """Return the levels of a container that defines their order, such as a pandas Categorical; else None.

    Example:
        >>> import pandas
        >>> levels_of(pandas.Categorical(["low", "high"], categories=["low", "mid", "high"]))
        ('low', 'mid', 'high')
    """
    if isinstance(values, _Leveled):
        return values.levels
    levels = getattr(getattr(values, "dtype", None), "categories", None)
    if levels is None or not isinstance(levels, Iterable):  # polars: a Categorical without an order of its own
        return None
    return tuple(name_of(level) for level in levels)


def distinct(values: Any, subject: str, order: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Encode each value of a list by its position among the distinct values.

    The order of the distinct values is that of the container, if it defines one. Otherwise numbers are sorted by value,
    and all other values as texts. The type of the container does not matter: the float 1.0 is the number 1.

    Args:
        values: labels or clients of any dtype, `[rows]`.
        subject: the name of the list in error messages.
        order: the order of the distinct values; None: as above.
    Returns:
        The codes, int64 `[rows]`, and the distinct values as text: row i has the value `names[codes[i]]`.
    Raises:
        UsageError: the list is not one-dimensional, or a value is missing.
    Example:
        >>> distinct(["b", "a", "b"], "by")
        (tensor([1, 0, 1]), ('a', 'b'))
        >>> distinct(np.array([10, 5.0, 5], dtype=object), "y")
        (tensor([1, 0, 0]), ('5', '10'))
    """
    order = levels_of(values) if order is None else order
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
    if array.dtype.kind == "O" and not all(isinstance(value, Number) for value in array.tolist()):
        array = np.array([name_of(value) for value in array.tolist()])
    found, codes = np.unique(array, return_inverse=True)
    names = tuple(map(name_of, found.tolist()))
    if order is not None:
        place = {name: position for position, name in enumerate(order)}
        sequence = sorted(range(len(names)), key=lambda i: place.get(names[i], len(place)))
        names, codes = tuple(names[i] for i in sequence), np.argsort(sequence)[codes]
    return torch.from_numpy(codes.astype(np.int64)), names


def fixed_classes(
    codes: Tensor, names: Sequence[str], classes: Sequence[str], subject: str, *, joined: bool = False
) -> tuple[Tensor, tuple[str, ...]]:
    """Encode labels by a fixed list of classes, of which some may have no row.

    Args:
        codes: the codes of the labels, int64 `[rows]`.
        names: the distinct labels.
        classes: the classes in order.
        subject: the name of the labels in error messages.
        joined: whether the option of the caller takes the classes as one text, with commas.
    Raises:
        UsageError: a label is no class, or a class occurs twice.
    Example:
        >>> fixed_classes(torch.tensor([0, 0]), ["yes"], ["no", "yes"], "y")
        (tensor([1, 1]), ('no', 'yes'))
    """
    classes = tuple(map(name_of, classes))
    place = {name: code for code, name in enumerate(classes)}
    new = [code for code, name in enumerate(names) if name not in place]
    if new or len(place) < len(classes):
        more = [*place, *(names[code] for code in new)]
        row = int((codes == new[0]).nonzero()[0]) if new else 0
        raise UsageError(
            f"{subject} contains {names[new[0]]!r} at row {row}." if new else f"classes = {list(classes)}.",
            f"one of the classes {', '.join(place)}." if new else "each class once.",
            "each label is one output of the model.",
            Change("classes", ",".join(more)) if joined else Line(python=f"classes={more}"),
        )
    return torch.tensor([place[name] for name in names], dtype=torch.int64)[codes], classes


def _kind(task: str | None, real: bool, subject: str) -> tuple[str, tuple[str, ...]]:
    """Return the kind of task, and a note if it was guessed."""
    if task is None:
        kind = TASKS[real]
        return kind, (f"Task guessed from {subject}: {kind}.",)
    if task not in TASKS:
        raise unknown_name("task", task, TASKS, lambda near: Change("task", near))
    return task, ()


def encode(y: Any, task: str | None, subject: str = "y", order: Sequence[str] | None = None) -> Targets:
    """Encode targets as classes 0, 1, … or as numbers.

    Args:
        y: labels of any type `[rows]`; numbers `[rows]` or `[rows, n]`; or classes 0, 1, …, `[rows, length]`.
        task: "classification", "regression", "labels", or None: regression if y has floats.
        subject: the name of the targets in error messages.
        order: the order of the classes; None: as in `distinct`.
    Raises:
        UsageError: an unknown task, a missing label, or a target that is not a finite number.
    Example:
        >>> encode(["no", "yes", "no"], "classification").y
        tensor([0, 1, 0])
    """
    order = levels_of(y) if order is None else order
    array = _array(y, subject)
    kind, notes = _kind(task, array.dtype.kind == "f", f"{subject} of {array.dtype}")
    if kind == "classification":
        _check_labelled(array, subject)
    if kind == "labels":
        y = _finite(tensor_of(_numeric(array, subject)), subject)
        return Targets(several_labels(y, subject), kind, None, notes)
    if kind == "classification" and (array.ndim == 1 or array.shape[1:] == (1,)):
        codes, names = distinct(array.reshape(-1), subject, order)
        return Targets(codes, kind, names, notes)
    array = _numeric(array, subject)
    if isinstance(array, np.memmap) and array.ndim > 1:
        return Targets(array, kind, None, notes)
    numbers = _finite(answers(tensor_of(array), kind == "regression"), subject)
    return Targets(numbers, kind, None, (*notes, *(one_hot(numbers, subject) if task is None else ())))


def one_hot(y: Tensor, subject: str) -> tuple[str, ...]:
    """A note if targets `[rows, n]` that were not declared look like one-hot labels: 0 and 1, with one 1 in each row.

    Example:
        >>> one_hot(torch.eye(3), "y")[0]
        'y has the form of one-hot labels of 3 classes, and is taken as 3 numbers. y.argmax(1) gives the classes.'
    """
    if y.dim() != 2 or y.shape[1] < 3 or not bool(((y == 0) | (y == 1)).all()) or not bool((y.sum(1) == 1).all()):
        return ()
    text = f"{subject} has the form of one-hot labels of {y.shape[1]} classes, and is taken as {y.shape[1]} numbers."
    return (f"{text} y.argmax(1) gives the classes.",)


def several_labels(y: Tensor, subject: str) -> Tensor:
    """Return several labels for each row, int64 `[rows, n]`: 0, 1, or −100 for a missing label.

    Args:
        y: numbers `[rows]` or `[rows, n]`.
        subject: the name of the labels in error messages.
    Raises:
        UsageError: another number, or a row without any label.
    Example:
        >>> several_labels(torch.tensor([[1.0, 0.0]]), "y")
        tensor([[1, 0]])
    """
    other = ((y != 0) & (y != 1) & (y != IGNORED)).nonzero()
    if len(other):
        at = other[0].tolist()
        raise UsageError(
            f"{subject} contains {y[tuple(at)].item():g} at {place(at[0], tuple(at[1:]))}.",
            "0 or 1 for each label, or -100 for a missing label.",
            "task labels is several answers of yes or no for each row.",
            Change("task", "regression"),
        )
    labels = y.long().reshape(len(y), -1)
    _check_labelled(labels.numpy(), subject)
    return labels


def _check_labelled(labels: Array, subject: str) -> None:
    """Refuse a row whose labels are all −100, the mark of a place without a label; a memory map is checked later."""
    mapped = isinstance(labels, np.memmap) and labels.ndim > 1
    if labels.dtype.kind not in "iu" or not labels.ndim or mapped:
        return
    row = unlabelled(tensor_of(labels))
    if row is not None:
        raise UsageError(
            f"{subject} has no label at row {row}: each of its labels is -100.",
            "a label in each row.",
            "a row without a label has no loss.",
            Line(
                python="keep = [bool((np.asarray(y[i]) != -100).any()) for i in range(len(x))]; x, y = x[keep], y[keep]"
            ),
        )


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
    for values, subject in ((a, one), (b, other)):
        if not values.ndim:
            raise UsageError(f"{subject} is a single value.", "one value for each row.")
    if len(a) != len(b):
        raise UsageError(
            f"{one} has {with_noun(len(a), 'row')}, {other} has {len(b)}.",
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


@check_arguments
@user_scope(Key(0).fold("door"))
def arrays(
    x: Any,
    y: Any,
    *,
    by: Any = None,
    task: str | None = None,
    scale: str = "none",
    missing: str | None = None,
    classes: Sequence[str] | None = None,
    test: Pair | tuple[Any, Any, Any] | None = None,
    name: str = "arrays",
) -> Source:
    """Build a source from two arrays: tensors, numpy arrays, `np.memmap`s, or nested lists.

    Args:
        x: `[rows, *features]`: floats; uint8 intensities of images, which are scaled to [0, 1]; or other integers,
            which are token ids. Rows of one axis in uint8 are numbers. Or a dict of arrays, each `[rows, ...]`, which
            are copied once; the model receives each by its keyword.
        y: labels of any type `[rows]`; numbers `[rows]` or `[rows, n]`; or classes 0, 1, …, `[rows, length]`.
        by: the natural client of each row, such as a hospital or a speaker; `[rows]`, of any type.
        task: "classification", "regression" or "labels" (several labels 0 or 1 a row); None: regression for floats.
        scale: "none", "standard", or "client"; see `Source`.
        missing: "mean": NaN is a missing number, filled with the mean of the train rows; "drop": its row is left out;
            None: NaN is refused.
        classes: the classes in order; None: the distinct labels. A class may have no row.
        test: the test rows of the data set, as a pair (x, y), or (x, y, client of each row).
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
    (features, fields), targets = _read(x, "x", missing), encode(y, task)
    notes: tuple[str, ...] = ()
    _same_length(features, targets.y, "x", "y")
    _check_test(test)
    if classes is not None:
        targets = _with_classes(targets, classes)
    if missing == "drop":
        features, targets, by, notes = _complete(features, targets, by)
    stored, byte_notes = _flat_bytes(features)
    test_rows, real, test_by = None, targets.kind == "regression", None
    if test is not None:
        test_x, test_y, *rest = test
        test_words, test_fields = _read(test_x, "the test x", missing)
        check_same_fields(test_fields, fields, "A test row", "row 0")
        x_rows = _flat_bytes(test_words)[0]
        test_rows = ArrayRows(x_rows, _encode_like(test_y, targets, "the test y"), real, test_fields)
        _same_length(test_rows.x, test_rows.y, "the test x", "the test y")
        _same_features(test_rows.x, features, "the test x")
        test_by = rest[0] if rest else None
    source = Source(
        name=name,
        rows=ArrayRows(stored, targets.y, real, fields),
        kind=targets.kind,
        classes=targets.classes,
        features=tuple(features.shape[1:]),
        test=test_rows,
        fill=missing == "mean",
        notes=(*targets.notes, *notes, *byte_notes),
    )
    return replace(_with_clients(source, by, test_by), scale=scale)


def _check_test(test: Any) -> None:
    """Refuse test rows that are neither a pair nor a triple."""
    if test is not None and not (isinstance(test, (tuple, list)) and len(test) in (2, 3)):
        entries = f" with {len(test)} entries" if isinstance(test, (tuple, list)) else ""
        raise UsageError(
            f"test is a {type(test).__name__}{entries}.",
            "a pair (x, y), or (x, y, clients).",
            "rows have features and targets.",
        )


def _with_classes(targets: Targets, classes: Sequence[str]) -> Targets:
    """Return the targets encoded by a fixed list of classes."""
    if targets.classes is None or isinstance(targets.y, np.memmap):
        raise UsageError(
            f"classes was given for a target of {targets.kind} without a list of classes.", "one class for each row."
        )
    y, names = fixed_classes(torch.as_tensor(targets.y), targets.classes, classes, "y")
    return targets._replace(y=y, classes=names)


def _complete(x: Tensor | Array, targets: Targets, by: Any) -> tuple[Tensor | Array, Targets, Any, tuple[str, ...]]:
    """Leave out the rows with NaN."""
    keep = ~torch.as_tensor(np.asarray(x)).flatten(1).isnan().any(1)
    if bool(keep.all()):
        return x, targets, by, ()
    if not bool(keep.any()):
        raise UsageError("Every row lacks a number.", "at least one complete row.", write=Change("missing", "mean"))
    by = None if by is None else _array(by, "by")[keep.numpy()]
    note = f"{with_noun(int((~keep).sum()), 'row lacks', 'rows lack')} a value: left out."
    y = torch.as_tensor(np.asarray(targets.y))[keep]
    return torch.as_tensor(np.asarray(x))[keep], targets._replace(y=y), by, (note,)


def _flat_bytes(x: Tensor | Array) -> tuple[Tensor | Array, tuple[str, ...]]:
    """Convert uint8 rows of one axis to floats: they are numbers, not the intensities of an image."""
    if x.ndim != 2 or str(x.dtype).rpartition(".")[2] != "uint8":
        return x, ()
    note = "Rows of one axis in uint8 are numbers, and are not divided by 255."
    return torch.as_tensor(np.asarray(x)).float(), (note,)


def _with_clients(source: Source, by: Any, test_by: Any = None) -> Source:
    """Return the source with `by[i]` as the natural client of row i. If `by` is None, return the source unchanged.

    Args:
        source: the source.
        by: the client of each row.
        test_by: the client of each test row, if it is known.
    """
    if by is None:
        if test_by is not None:
            raise UsageError(
                "The test rows have clients, and the rows have none.", "`by=` with the client of each row."
            )
        return source
    codes, names = distinct(by, "by")
    if len(codes) != len(source):
        raise UsageError(f"by has {len(codes)} entries for {len(source)} rows.", "one client per row.")
    if test_by is not None:
        test_codes, test_names = distinct(test_by, "the clients of the test rows")
        new = [name for name in test_names if name not in names]
        if new or len(test_codes) != len(source.test or ()):
            raise UsageError(
                f"The client {new[0]!r} has only test rows."
                if new
                else f"{len(test_codes)} clients for the test rows.",
                "a client with train rows for each test row.",
            )
        source = replace(source, test_by=torch.tensor([names.index(name) for name in test_names])[test_codes])
    return replace(source, by=codes, names=names)


def _as_arrays(part: Any) -> Pair | None:
    """Return (x, y) for data in arrays and for streams, which are read once; None for a Dataset that is read by row."""
    if isinstance(part, DataLoader):
        raise _is_loader("The data")
    if isinstance(part, IterableDataset):
        return spill(part)
    if isinstance(part, TensorDataset):
        part = part.tensors
    if isinstance(part, tuple) and len(part) == 2:
        return part
    if hasattr(part, "__getitem__") and hasattr(part, "__len__") and getattr(part, "ndim", None) != 0:
        return None
    raise UsageError(
        f"The data has type {type(part).__name__}.",
        "a pair (x, y) or a torch Dataset.",
        write=Line(python="atoll.data.arrays(x, y)"),
    )


def _rows(part: Any, known: Pair | None, task: str | None, whose: str) -> Rows:
    """Return the rows of one part, without copying them."""
    real = task == "regression"
    if known is None:
        if not len(part):
            raise UsageError(f"{whose} has no rows.", "at least one row (x, y).")
        return DatasetRows(part, real)
    (x, fields), y = _read(known[0], f"x of {whose}"), _numeric(known[1], f"y of {whose}")
    if not real:
        _check_labelled(y, f"y of {whose}")
    _same_length(x, y, f"x of {whose}", "y")
    return ArrayRows(x, y if isinstance(y, np.memmap) else _finite(tensor_of(y), f"y of {whose}"), real, fields)


def _first(rows: Rows) -> tuple[Tensor, Tensor]:
    """x and y of row 0, `[1, ...]`, which sets the shape and the dtype of all rows."""
    try:
        return rows.take(torch.zeros(1, dtype=torch.int64))
    except ClientError as error:
        raise UsageError(error.given, error.required, error.why, error.write) from error


def _in_place(
    rows: Rows, test: Rows | None, task: str | None, name: str, classes: Sequence[str] | None = None
) -> Source:
    """Build a source of rows that are not copied; their labels must be numbers, and are read once."""
    x, y = _first(rows)
    kind, notes = _kind(task, y.is_floating_point(), f"targets of {y.dtype}")
    notes += one_hot(y, "The target") if task is None else ()
    if test is not None:
        check_same_fields(fields_of(test), fields_of(rows), "Row 0 of the test set", "row 0")
        _same_features(_first(test)[0], x, "the test set")
    fixed, classes = classes, None
    if kind == "labels":
        several_labels(rows.targets(), "The dataset")
    if kind == "classification" and y.dim() == 1:
        labels = rows.targets()
        _check_labelled(labels.numpy(), "The dataset")
        notes += label_notes(rows)
        known = labels.unique()
        boolean = isinstance(rows, DatasetRows) and rows.first[1].dtype == torch.bool
        classes = tuple(map(name_of, known.tolist()))
        if fixed is not None:
            fixed_classes(torch.arange(len(known)), classes, fixed, "y")
            known = torch.tensor([float(name) for name in fixed], dtype=known.dtype)
            classes = tuple(map(name_of, fixed))
        if known.is_floating_point() or classes != tuple(map(str, range(len(known)))):
            rows, test = CodedRows(rows, known), None if test is None else CodedRows(test, known)
        if boolean:
            classes = tuple(str(bool(label)) for label in known.tolist())
    return Source(name, rows, kind, classes, tuple(x.shape[1:]), test=test, notes=notes)


@check_arguments
@user_scope(Key(0).fold("door"))
def dataset(data: Any, *, by: Any = None, task: str | None = None, test: Any = None, name: str = "dataset") -> Source:
    """Build a source from a torch Dataset of pairs (x, y).

    A map-style Dataset is read with `__getitem__`, row by row, when a row is needed. Its labels are read once, from
    `data.targets` if that exists. An iterable Dataset is streamed once to a temporary file. If x is a dict of tensors,
    the model receives each tensor by its keyword.

    Args:
        data: the Dataset; one shape for all rows; a label is a number.
        by: the natural client of each row, such as a hospital or a speaker; `[rows]`, of any type.
        task: "classification", "regression" or "labels"; None: regression if y is a float.
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


@check_arguments
@user_scope(Key(0).fold("door"))
def federate(
    parts: Mapping[str, Any] | Iterable[Any],
    *,
    held_out: Any = 0.2,
    seed: int = 0,
    min_rows: int = 1,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    scale: str = "none",
    name: str = "federation",
) -> Clients:
    """Build a federation from one data set per client.

    Args:
        parts: one pair (x, y) or torch Dataset for each client: a list, a generator, or a dict whose keys are the
            clients' names.
        held_out: fraction of each class to hold out, in [0, 1); a rule, such as `PerClient(0.2)`; the held-out rows:
            (x, y) or a Dataset; or the held-out rows of each client, a dict with the names of the clients.
        seed, min_rows: as in `Source.split`.
        task: "classification", "regression" or "labels"; None: regression if y has floats.
        classes: the classes in order; None: the distinct labels of all clients. A class may have no row.
        scale: "none", "standard", or "client"; see `Source`.
        name: the name of the data set in reports.
    Returns:
        One client for each part, in the order of `parts`. Arrays in memory are copied once into one array, so that one
        read returns the rows of many clients. Other data is not copied, and its labels must be numbers.
    Raises:
        UsageError: `parts` is empty, the features of two parts differ in shape, or held-out rows name an unknown
            client.
    Example:
        >>> north, south = (torch.zeros(4, 2), [0, 1, 0, 1]), (torch.ones(6, 2), [1, 0, 1, 0, 1, 0])
        >>> federate({"north": north, "south": south}, held_out=0).sizes.tolist()
        [4, 6]
        >>> federate({"north": north, "south": south}, held_out={"north": north, "south": north})
        Clients('federation', clients=2, rows=10, held_out=8)
    """
    if isinstance(parts, DataLoader):
        raise _is_loader("The federation")
    if not isinstance(parts, Iterable) or isinstance(parts, (str, bytes, type)) or getattr(parts, "ndim", None) == 0:
        raise UsageError(f"The federation is a {type(parts).__name__}.", "one (x, y) or Dataset for each client.")
    whole = list(parts.values() if isinstance(parts, Mapping) else parts)
    names = tuple(map(str, parts if isinstance(parts, Mapping) else range(len(whole))))
    if not whole:
        raise UsageError("The federation has no clients.", "at least one (x, y) or Dataset.")
    held_out = plain_number(held_out)
    own = _held_out_by_name(names, held_out) if isinstance(held_out, Mapping) else {}
    owner = torch.tensor([*range(len(names)), *own])  # the client of each part, and then of each held-out part
    subjects = (*(f"client {each}" for each in names), *(f"the held-out rows of client {names[i]}" for i in own))
    drawn = isinstance(held_out, (int, float, str, HeldOut, Mapping))
    test = None if drawn else held_out
    source, sizes = _of_parts(subjects, [*whole, *own.values()], test, task, classes, name)
    by = owner.repeat_interleave(torch.tensor(sizes))
    rule = torch.arange(len(by)) >= sum(sizes[: len(names)]) if own else held_out if drawn else 0.2
    source = replace(source, by=by, names=names, scale=scale)
    return source.split(by=ByColumn(), held_out=rule, seed=seed, min_rows=min_rows)


def _held_out_by_name(names: Sequence[str], held_out: Mapping[Any, Any]) -> dict[int, Any]:
    """The held-out rows of each client, by its place."""
    given = {str(client): rows for client, rows in held_out.items()}
    for client in given:
        if client not in names:
            raise unknown_name("client", client, names, lambda near: Line(literal(near)))
    if not given:
        raise UsageError("held_out = {}.", "the held-out rows of at least one client.", write=Change("held_out", 0))
    return {place: given[client] for place, client in enumerate(names) if client in given}


def _of_parts(
    subjects: Sequence[str],
    parts: Sequence[Any],
    test: Any,
    task: str | None,
    classes: Sequence[str] | None,
    name: str,
) -> tuple[Source, list[int]]:
    """Build a source of all parts; return it with their sizes. Arrays in memory are joined in one array.

    Args:
        subjects: the name of each part in error messages.
        parts: a pair (x, y) or a Dataset each.
        test: the test rows of the data set; None: there are none.
        task, classes, name: as in `federate`.
    """
    known, test_pair = list(map(_as_arrays, parts)), None if test is None else _as_arrays(test)
    pairs = [pair for pair in known if pair is not None and not _mapped(pair[0])]
    if len(pairs) == len(parts) and (test is None or test_pair is not None):
        return _one_array(subjects, pairs, test_pair, task, classes, name)
    rows = [_rows(part, pair, task, subject) for subject, part, pair in zip(subjects, parts, known, strict=True)]
    firsts = [_first(part)[0] for part in rows]
    for subject, part in zip(subjects, rows, strict=True):
        check_same_fields(fields_of(part), fields_of(rows[0]), f"A row of {subject}", f"a row of {subjects[0]}")
    _check_same_features(subjects, firsts)
    joined, notes = _joined(subjects, firsts)
    tests = None if test is None else _rows(test, test_pair, task, "the test set")
    source = _in_place(ConcatRows(tuple(rows), joined), tests, task, name, classes)
    return replace(source, notes=(*source.notes, *notes)), list(map(len, rows))


def _mapped(x: Any) -> bool:
    """Whether features are in a file, which is not copied into memory."""
    return isinstance(x.words if isinstance(x, PackedRows) else x, np.memmap)


def _check_same_features(subjects: Sequence[str], xs: Sequence[Tensor | Array]) -> None:
    for subject, x in zip(subjects, xs, strict=True):
        _same_features(x, xs[0], subject)


def _one_array(
    subjects: Sequence[str],
    pairs: Sequence[Pair],
    test: Pair | None,
    task: str | None,
    classes: Sequence[str] | None,
    name: str,
) -> tuple[Source, list[int]]:
    """Build a source with the rows of all parts in one array; return it with the sizes of the parts."""
    read = [_read(x, f"x of {subject}") for subject, (x, _) in zip(subjects, pairs, strict=True)]
    fields = read[0].fields
    for subject, part in zip(subjects, read, strict=True):
        check_same_fields(part.fields, fields, f"A row of {subject}", f"a row of {subjects[0]}")
    taken = [_flat_bytes(part.words) for part in read]
    xs = [torch.as_tensor(x) for x, _ in taken]
    joined, notes = _joined(subjects, xs)
    notes = (*dict.fromkeys(note for _, some in taken for note in some), *notes)
    if joined is not None:  # joined as stored, intensities from 0 to 255 would stand next to numbers
        xs = [numbers(x).to(joined) for x in xs]
    ys = [_array(y, f"y of {subject}") for subject, (_, y) in zip(subjects, pairs, strict=True)]
    _check_same_features(subjects, xs)
    for subject, x, y in zip(subjects, xs, ys, strict=True):
        _same_length(x, y, f"x of {subject}", "y")
    levels = {levels_of(y) for _, y in pairs}
    try:
        joined_y = _concatenated(ys)
    except (TypeError, ValueError) as error:
        cause = str(error).rstrip(".")
        raise UsageError(f"The y of the clients cannot be joined: {cause}.", "y of one kind and shape.") from None
    targets = _Leveled(joined_y, levels.pop() if len(levels) == 1 else None)
    whole = PackedRows(torch.cat(xs), fields) if fields else torch.cat(xs)
    source = arrays(whole, targets, task=task, classes=classes, test=test, name=name)
    return replace(source, notes=(*source.notes, *notes)), list(map(len, xs))


def _concatenated(ys: Sequence[Array]) -> Array:
    """Concatenate targets. If some are texts and others are numbers, each keeps its type."""
    mixed = len({y.dtype.kind in "biuf" for y in ys}) > 1
    return np.concatenate([y.astype(object) for y in ys] if mixed else ys)


def _joined(subjects: Sequence[str], xs: Sequence[Tensor]) -> tuple[torch.dtype | None, tuple[str, ...]]:
    """The dtype in which features of different dtypes are joined, and a note; None if they have one dtype."""
    dtypes = [x.dtype for x in xs]
    if len(set(dtypes)) == 1:
        return None, ()
    joined = functools.reduce(torch.promote_types, [numbers(x[:1]).dtype for x in xs])
    firsts = {dtype: subject for subject, dtype in reversed(list(zip(subjects, dtypes, strict=True)))}
    each = ", ".join(f"{str(dtype)[6:]} (first in {firsts[dtype]})" for dtype in dict.fromkeys(dtypes))
    note = f"The features of the clients have the dtypes {each}. They are joined as {str(joined)[6:]}"
    return joined, (f"{note}, and uint8 is scaled to [0, 1]." if torch.uint8 in dtypes else f"{note}.",)
