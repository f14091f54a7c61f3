"""Tables: CSV files and data frames.

Columns of numbers are unchanged. A column of texts becomes one column per level. Notes report all guesses.

Tests: tests/data/test_tabular.py.
"""

from __future__ import annotations

import csv as reader
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.base.errors import UsageError, unknown_name
from atoll.data.arrays import distinct, encode, name_of
from atoll.data.rows import Array, ArrayRows
from atoll.data.sources import Source

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
MOST_LEVELS = 100
WHOLE_CLASSES = 20


def csv(
    path: str | Path,
    *,
    target: str | None = None,
    by: str | None = None,
    task: str | None = None,
    missing: str | None = None,
    scale: str | None = None,
) -> Source:
    """Read a CSV file with a header line; separators are commas, semicolons, tabs or bars; it may be gzipped.

    Args:
        path: the file, in UTF-8.
        target: the column to predict; None: the last one.
        by: the column that names the client of each row; None: no natural clients.
        task: "classification" or "regression"; None: guessed from the target.
        missing: "mean" fills a missing number with the mean of the train rows, "drop" drops these rows; None:
            "mean".
        scale: "standard" (mean 0 and standard deviation 1 over the train rows), "client", or "none"; None:
            "standard".
    Returns:
        A source of float64 columns; a column of texts becomes one column per level. A missing number is an empty
        cell or one of ? NA N/A NaN null None.
    Raises:
        UsageError: no such file or column, a line of another length, an infinity, or a text column with more than
            100 levels.
    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "flats.csv")
        >>> _ = path.write_text("area,city,price\\n60,Oslo,3.5\\n80,Rome,3.0\\n?,Oslo,4.5\\n")
        >>> csv(path).columns
        ('area', 'city=Oslo', 'city=Rome')
    """
    header, lines, notes = _read(Path(path))
    cells = zip(*lines, strict=True) if lines else ((),) * len(header)
    columns = {name: column(texts) for name, texts in zip(header, cells, strict=True)}
    return table(Path(path).name, columns, target=target, by=by, task=task, missing=missing, scale=scale, notes=notes)


def frame(
    df: Any,
    *,
    target: str | None = None,
    by: str | None = None,
    task: str | None = None,
    missing: str | None = None,
    scale: str | None = None,
    name: str = "frame",
) -> Source:
    """Build a source from a pandas DataFrame, as `csv` does, with the dtypes of the columns.

    Args:
        df: the DataFrame; its index is ignored.
        target, by, task, missing, scale: as in `csv`.
        name: name in reports.
    Raises:
        UsageError: as in `csv`, or a column of dates.
    Example:
        >>> import pandas
        >>> frame(pandas.DataFrame({"a": [1, 2, 3], "ill": ["no", "yes", "no"]}), target="ill")
        Source('frame', classification, rows=3, features=(1,))
    """
    columns: dict[str, Array] = {}
    for place, label in enumerate(df.columns):
        series = df.iloc[:, place]
        kind = series.dtype.kind
        if kind in "Mm":
            raise UsageError(
                f"Column {label!r} contains {series.dtype}.",
                "numbers or texts.",
                "a model computes with numbers, and a date can be converted to a number in several ways.",
                f"df[{label!r}] = df[{label!r}].astype('int64')",
            )
        if kind in "biuf":
            values = series.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            absent = series.isna().to_numpy()
            texts = [None if is_absent else name_of(v) for v, is_absent in zip(series.tolist(), absent, strict=True)]
            values = np.array(texts, dtype=object)
        if str(label) in columns:
            raise _twice(str(label))
        columns[str(label)] = values
    return table(name, columns, target=target, by=by, task=task, missing=missing, scale=scale)


def table(
    name: str,
    columns: dict[str, Array],
    *,
    target: str | None = None,
    by: str | None = None,
    task: str | None = None,
    missing: str | None = None,
    scale: str | None = None,
    notes: tuple[str, ...] = (),
) -> Source:
    """Build a source from named columns, each `[rows]`: float64 with NaN for missing, or texts with None.

    Args:
        name: name in reports.
        columns: the columns by name.
        target, by, task, missing, scale: as in `csv`.
        notes: notes of the caller, which come first.
    """
    missing = missing or "mean"
    if missing not in ("mean", "drop"):
        raise unknown_name("way with missing values", missing, ("mean", "drop"))
    for wanted in filter(None, (target, by)):
        if wanted not in columns:
            raise unknown_name("column", wanted, columns)
    others = [column for column in columns if column not in (target, by)]
    if target is None and others:
        target = others.pop()
        notes = (*notes, f"Target guessed: the last column, {target!r}.")
    if target is None or not others:
        raise UsageError(f"{name} has {len(columns)} columns.", "a target, and at least one feature.")
    _refuse_infinite(columns)
    keep, gap_notes = _usable_rows(columns, others, target, missing)
    x, names, levels = _one_hot({column: columns[column][keep] for column in others})
    y, kind, classes, guessed = _target(columns[target][keep], target, task)
    codes, clients = None, None
    if by is not None:
        distinct(columns[by], f"column {by!r}")  # so that an error gives the row in the whole table
        codes, clients = distinct(columns[by][keep], f"column {by!r}")
    return Source(
        name=name,
        rows=ArrayRows(torch.from_numpy(x), y),
        kind=kind,
        classes=classes,
        features=(len(names),),
        columns=names,
        by=codes,
        names=clients,
        scale=scale or "standard",
        fill=bool(np.isnan(x).any()),
        notes=(*notes, *gap_notes, *levels, *guessed),
    )


def _usable_rows(
    columns: dict[str, Array], features: list[str], target: str, missing: str
) -> tuple[Array, tuple[str, ...]]:
    """Mark the usable rows, bool `[rows]`, and return notes about the others."""
    empty = _absent(columns[target])
    gaps = np.any([_absent(columns[feature]) for feature in features], axis=0) & ~empty
    keep = ~(empty | gaps) if missing == "drop" else ~empty
    if not keep.any():
        raise UsageError(
            f"Of {len(keep)} rows, {int(empty.sum())} have no target, {int(gaps.sum())} lack another value.",
            "at least one complete row.",
            "missing='drop' drops incomplete rows." if gaps.any() else "a row without a target has no loss.",
            "missing='mean'" if gaps.any() else "",
        )
    notes = []
    if empty.any():
        notes.append(f"{int(empty.sum())} rows without a target were left out.")
    if gaps.any():
        action = "left out" if missing == "drop" else "filled with the train rows' means"
        notes.append(f"{int(gaps.sum())} rows lack a value: {action}.")
    return keep, tuple(notes)


def _read(path: Path) -> tuple[list[str], list[list[str]], tuple[str, ...]]:
    """Return the header, the lines, all of equal length, and notes on guesses."""
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            mark = max(",;\t|", key=first.count)
            header = [name.strip() for name in next(reader.reader([first], delimiter=mark, strict=True), [])]
            table = reader.reader(file, delimiter=mark, strict=True)
            lines = []
            for line in table:
                if line and len(line) != len(header):
                    raise UsageError(
                        f"Line {table.line_num + 1} of {path} has {len(line)} cells.",
                        f"{len(header)} cells, the number in the header.",
                        "a cell's position determines its column.",
                        f"sed -n {table.line_num + 1}p {path}",
                    )
                if line:
                    lines.append(line)
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.", "the path of a CSV file.", write=f"ls {path.parent}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, reader.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "a CSV file in UTF-8.", write=f"file {path}") from error
    if not header or not lines:
        raise UsageError(f"{path} has {len(lines)} rows.", "a header line, and at least one row.", write=f"head {path}")
    for name in header:
        if header.count(name) > 1:
            raise _twice(name)
    if all(isinstance(v, float) for v in column(header).tolist()):
        raise UsageError(
            f"The first line of {path} contains only numbers.",
            "a header line with the names of the columns.",
            "otherwise the first row of data would be read as names.",
            f"sed -i 1i{mark.join(f'c{i}' for i in range(len(header)))} {path}",
        )
    return header, lines, () if mark == "," else (f"Cells guessed to end at {mark!r}.",)


def _twice(name: str) -> UsageError:
    return UsageError(f"Two columns are called {name!r}.", "a different name for each column.")


def column(texts: Sequence[str]) -> Array:
    """Convert cells to float64 with NaN for missing if all others are numbers; else to texts with None for missing."""
    cells = [None if text.strip().lower() in MISSING else text.strip() for text in texts]
    try:
        return np.array([np.nan if cell is None else float(cell) for cell in cells])
    except ValueError:
        return np.array(cells, dtype=object)


def _absent(values: Array) -> Array:
    """Mark the missing values of a column."""
    return np.isnan(values) if values.dtype.kind == "f" else np.array([v is None for v in values], dtype=bool)


def _refuse_infinite(columns: dict[str, Array]) -> None:
    for name, values in columns.items():
        if values.dtype.kind == "f" and np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            raise UsageError(
                f"Column {name!r} contains {values[row]} at row {row}.",
                "finite numbers; leave the cell empty if the number is missing.",
                "one infinity makes every number of the model NaN.",
                f"df = df.drop(index={row})",
            )


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_hot(columns: dict[str, Array]) -> tuple[Array, tuple[str, ...], tuple[str, ...]]:
    """Return one float64 array `[rows, columns]`, the names of the columns, and notes.

    A level is a column of 0 and 1. A missing text is NaN in all its levels, so that it is filled with train means.
    """
    parts, names, notes = [], [], []
    for name, values in columns.items():
        if values.dtype.kind == "f":
            parts.append(values)
            names.append(name)
            continue
        absent = _absent(values)
        levels = sorted(set(values[~absent].tolist()))
        if len(levels) > MOST_LEVELS:
            non_numbers = [text for text in levels if not _number(text)]
            row = int(np.argmax(values == non_numbers[0])) if non_numbers else 0
            raise UsageError(
                f"Column {name!r} contains {len(levels)} different texts, {values[row]!r} at row {row}.",
                f"numbers, or at most {MOST_LEVELS} different texts.",
                "each text becomes a separate column.",
                f"df = df.drop(columns=[{name!r}])",
            )
        for level in levels:
            parts.append(np.where(absent, np.nan, (values == level).astype(np.float64)))
            names.append(f"{name}={level}")
        notes.append(f"Column {name!r} contains texts: one column for each of {len(levels)} levels, found in all rows.")
    return np.stack(parts, axis=1), tuple(names), tuple(notes)


def _target(values: Array, name: str, task: str | None) -> tuple[Any, str, tuple[str, ...] | None, tuple[str, ...]]:
    """Return y, the kind of task, the classes, and notes on guesses."""
    number = values.dtype.kind == "f"
    if task == "regression" and not number:
        raise UsageError(
            f"Column {name!r} contains texts, such as {values[0]!r}.",
            "numbers, for regression.",
            "a regression model predicts a number.",
            "task='classification'",
        )
    few = not number or (bool((values == values.round()).all()) and len(np.unique(values)) <= WHOLE_CLASSES)
    kind = task or ("classification" if few else "regression")
    content = "texts" if not number else f"at most {WHOLE_CLASSES} different whole numbers" if few else "numbers"
    y, kind, classes, notes = encode(values, kind, f"column {name!r}")
    if task is None:
        notes = (f"Task guessed from {content} in column {name!r}: {kind}.",)
    if kind == "regression":
        notes = (*notes, f"The target {name!r} stays in its own units.")
    return y, kind, classes, notes
