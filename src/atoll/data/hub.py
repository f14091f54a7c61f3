"""Sources from a `datasets.Dataset` of Hugging Face. Its columns are read as Arrow batches, and no hub is asked.

Tests: tests/data/test_hub.py
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Line, Write
from atoll.base.validation import check_arguments
from atoll.data.arrays import arrays
from atoll.data.rows import IGNORED
from atoll.data.sources import Source

MASK = "attention_mask"
_BATCH = 4096  # rows


class _Lists(NamedTuple):
    """A column of lists: all numbers in a row, and the length of each list."""

    flat: Any
    lengths: Any


@check_arguments
def hf(
    ds: Any,
    x: str | Sequence[str] | None = None,
    y: str | None = "label",
    by: str | None = None,
    pad: Mapping[str, Any] | None = None,
    length: int | None = None,
    *,
    task: str | None = None,
    name: str = "hf",
) -> Source:
    """Build a source from a `datasets.Dataset`, or from a `DatasetDict`, whose `test` is held out.

    Tokenizing stays with the user: `ds.map(tokenizer)`. Each row has one width in the whole run.

    Args:
        ds: the data set, with columns of numbers or of lists of numbers.
        x: one column, which the model receives as a tensor; or several, which it receives by keyword. None: all
            columns of numbers except `y` and `by`, by keyword.
        y: the column of the target; a `ClassLabel` gives the classes their names. None with task="tokens".
        by: the column that names the client of each row.
        pad: the number that fills the end of shorter rows, by column, such as {"input_ids": 0}. A missing
            `attention_mask` is then made.
        length: the width of rows; longer rows are cut. None: that of the longest train row.
        task: as in `atoll.data.arrays`; "tokens": the target of a token is the next token, and padding has none.
        name: the name of the data set in reports.
    Returns:
        A source in memory.
    Raises:
        UsageError: a streamed data set, an unknown column, a column of texts, images or audio, rows of unequal length
            without `pad`, or a label that the data set hides.
    Example:
        >>> from datasets import Dataset  # doctest: +SKIP
        >>> ds = Dataset.from_dict({"input_ids": [[5, 7], [9]], "label": [0, 1]})  # doctest: +SKIP
        >>> hf(ds, pad={"input_ids": 0}).split(clients=1, held_out=0)  # doctest: +SKIP
    """
    parts = dict(ds) if isinstance(ds, Mapping) else {"train": ds}
    train, test = parts.get("train"), parts.get("test")
    if train is None:
        given = f"A DatasetDict with {', '.join(parts)}."
        raise UsageError(given, "a part called train.", write=Line(python='ds = {"train": ds, "test": test}'))
    for part in (train, test):
        _check_part(part)
    names = _columns(train, x, y if task != "tokens" else None, by)
    pads, notes = dict(pad or {}), list[str]()
    widths: dict[str, int] = {}
    if task == "tokens" and "input_ids" not in names:
        raise UsageError(
            'task = "tokens" without input_ids.', "a column input_ids.", write=Line(python='x=["input_ids"]')
        )
    read = [_read(part, names, pads, length, widths, notes) for part in (train, test) if part is not None]
    one = isinstance(x, str) and set(read[0]) == {x}
    made = []
    for part, columns in zip((p for p in (train, test) if p is not None), read, strict=True):
        target = _next_tokens(columns) if task == "tokens" else _target(part, y or "label")
        owners = () if by is None else (_scalars(part, by),)
        made.append((columns[x] if one and isinstance(x, str) else columns, target, *owners))
    label = None if task == "tokens" else getattr(train.features.get(y), "names", None)
    source = arrays(
        made[0][0],
        made[0][1],
        by=made[0][2] if by is not None else None,
        task=None if task == "tokens" else task,
        classes=label,
        test=made[1] if len(made) > 1 else None,
        name=name,
    )
    return replace(source, notes=(*source.notes, *notes))


def _check_part(part: Any) -> None:
    if part is None:
        return
    if not hasattr(part, "features") or not hasattr(part, "with_format"):
        missing = importlib.util.find_spec("datasets") is None
        write: Write = "pip install 'atoll[hf]'" if missing else Line(python="atoll.data.dataset(ds)")
        raise UsageError(f"{type(part).__name__} is no datasets.Dataset.", "a Dataset or a DatasetDict.", write=write)
    if not hasattr(part, "__len__"):
        raise UsageError(
            f"A streamed data set, {type(part).__name__}.",
            "a Dataset, whose rows have numbers.",
            "each client has its own rows, drawn by their number.",
            Line(python="ds = datasets.Dataset.from_generator(lambda: iter(ds))"),
        )


def _columns(train: Any, x: str | Sequence[str] | None, y: str | None, by: str | None) -> list[str]:
    """The columns of the features."""
    known = list(train.features)
    for column in (*([x] if isinstance(x, str) else x or ()), *filter(None, (y, by))):
        if column not in known:
            raise unknown_name("column", column, known, lambda near: Line(python=f'"{near}"'))
    if x is not None:
        return [x] if isinstance(x, str) else list(x)
    found = [n for n in known if n not in (y, by) and _is_number(train.features[n])]
    if not found:
        raise UsageError(f"No column of {', '.join(known)} has numbers.", "a column of numbers.", write=_TRANSFORM)
    return found


_TRANSFORM = Line(python='ds = ds.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])')


def _is_number(feature: Any) -> bool:
    """Whether a feature has numbers, or lists of numbers."""
    inner = getattr(feature, "feature", None)
    if isinstance(feature, list) and feature:
        inner = feature[0]
    if inner is not None:
        return _is_number(inner)
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "float", "bool"))


def _batches(part: Any, column: str) -> list[Any]:
    """The Arrow arrays of a column, in the order of the rows."""
    formatted = part.select_columns([column]).with_format("arrow")
    return [chunk for table in formatted.iter(batch_size=_BATCH) for chunk in table.column(column).chunks]


def _numpy(chunk: Any, column: str) -> Any:
    if chunk.null_count:
        write = Line(python=f'ds = ds.filter(lambda row: row["{column}"] is not None)')
        raise UsageError(
            f"The column {column} has {chunk.null_count} missing values.", "a value in each row.", write=write
        )
    return chunk.to_numpy(zero_copy_only=False)


def _scalars(part: Any, column: str) -> Any:
    return np.concatenate([_numpy(chunk, column) for chunk in _batches(part, column)])


def _read(
    part: Any, names: list[str], pads: dict[str, Any], length: int | None, widths: dict[str, int], notes: list[str]
) -> dict[str, Any]:
    """The columns as arrays `[rows, …]`. The first part, that of the train rows, decides the widths.

    Args:
        part: the rows.
        names: the columns.
        pads: the number that fills shorter rows.
        length: the width; None: the longest row of the train set.
        widths: by column; filled by the first part.
        notes: receives a note about rows that were cut.
    """
    out: dict[str, Any] = {}
    lengths = None
    for column in names:
        found = _lists(part, column)
        if not isinstance(found, _Lists):
            out[column] = found
            continue
        longest = int(found.lengths.max(initial=0))
        width = widths.setdefault(column, longest if length is None else length)
        if bool((found.lengths == width).all()):
            out[column] = found.flat.reshape(-1, width, *found.flat.shape[1:])
            continue
        fill = pads.get(column, 0 if column == MASK else None)
        if fill is None:
            raise UsageError(
                f"The rows of {column} have {int(found.lengths.min())} to {longest} values.",
                "a number that fills the end of shorter rows.",
                "rows of one run have one width.",
                Line(python=f'pad={{"{column}": 0}}'),
            )
        if cut := int((found.lengths > width).sum()):
            rows = "1 row of {} is" if cut == 1 else f"{cut} rows of {{}} are"
            notes.append(f"{rows.format(column)} longer than {width} and {'was' if cut == 1 else 'were'} cut.")
        out[column] = pad_lists(found.flat, found.lengths, width, fill)
        lengths = found.lengths if column != MASK else lengths
        lengths = np.minimum(lengths, width) if lengths is not None else None
    if pads and MASK not in names:  # also if the rows of one part need no padding: all parts have the same fields
        column = next(n for n in names if n in pads)
        width = out[column].shape[1]
        own = np.full(len(out[column]), width) if lengths is None else lengths
        out[MASK] = (np.arange(width) < own[:, None]).astype(np.int64)
    return out


def _lists(part: Any, column: str) -> Any:
    """A column of numbers as an array, or a column of lists as `_Lists`."""
    feature = part.features[column]
    if not _is_number(feature):
        raise UsageError(
            f"The column {column} has the type {type(feature).__name__}({getattr(feature, 'dtype', '')}).",
            "numbers, or lists of numbers.",
            "atoll reads tensors; texts, images and audio become tensors by a transform of yours.",
            _TRANSFORM,
        )
    chunks = _batches(part, column)
    if not hasattr(chunks[0], "flatten") or not hasattr(chunks[0].type, "value_type"):
        return np.concatenate([_numpy(chunk, column) for chunk in chunks])
    lengths = np.concatenate([_numpy(chunk.value_lengths(), column) for chunk in chunks])
    inner = [chunk.flatten() for chunk in chunks]
    if hasattr(inner[0].type, "value_type"):
        sizes = np.concatenate([_numpy(each.value_lengths(), column) for each in inner])
        if len(set(sizes.tolist())) > 1:
            raise UsageError(f"The inner lists of {column} differ in length.", "inner lists of one length.")
        flat = np.concatenate([_numpy(each.flatten(), column) for each in inner])
        return _Lists(flat.reshape(len(sizes), -1), lengths)
    return _Lists(np.concatenate([_numpy(each, column) for each in inner]), lengths)


def pad_lists(flat: Any, lengths: Any, width: int, fill: Any) -> Any:
    """Lists of several lengths as one array: longer ones are cut, shorter ones are filled.

    Args:
        flat: all numbers in a row, `[Σ lengths, …]`.
        lengths: `[rows]`.
        width: ≥ 0.
        fill: the number at the end of shorter lists.
    Example:
        >>> pad_lists(np.array([1, 2, 3, 4]), np.array([3, 1]), 2, 0).tolist()
        [[1, 2], [4, 0]]
    """
    out = np.full((len(lengths), width, *flat.shape[1:]), fill, dtype=flat.dtype)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = places < width
    out[rows[kept], places[kept]] = flat[kept]
    return out


def _target(part: Any, y: str) -> Any:
    """The target: names of classes, numbers, or classes by position, where padding is ignored."""
    if y not in part.features:
        known = list(part.features)
        raise unknown_name("column", y, known, lambda near: Line(python=f'y="{near}"'))
    feature = part.features[y]
    if not _is_number(feature):
        return _scalars(part, y)
    found = _lists(part, y)
    if isinstance(found, _Lists):
        return pad_lists(found.flat, found.lengths, int(found.lengths.max(initial=0)), IGNORED)
    names = getattr(feature, "names", None)
    if names is None:
        return found
    if int(found.min(initial=0)) < 0:
        hidden = int((found < 0).sum())
        write = Line(python=f'ds = ds.filter(lambda row: row["{y}"] >= 0)')
        raise UsageError(
            f"{hidden} rows have the label -1.", "a class for each row.", "the data set hides these labels.", write
        )
    return np.asarray(names, dtype=object)[found]


def _next_tokens(columns: Mapping[str, Any]) -> Any:
    """The next token of each position; the last one, and those of padding, are ignored."""
    ids = columns["input_ids"].astype(np.int64)
    out = np.full_like(ids, IGNORED)
    out[:, :-1] = ids[:, 1:]
    if MASK in columns:
        out[:, :-1][columns[MASK][:, 1:] == 0] = IGNORED
    return out
