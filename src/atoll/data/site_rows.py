"""The rows of one site of a federation, read and prepared by the `Input` that all sites share.

A site guesses nothing about its rows: columns, levels, classes and statistics are those of the `Input`. A row that does
not fit is refused by its number, because a level without a feature would be lost in silence.

Tests: tests/data/test_site_rows.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.names import with_noun
from atoll.base.random import Key
from atoll.data.arrays import arrays
from atoll.data.cells import Cells, cells_of, client_names
from atoll.data.clients import Clients
from atoll.data.files import is_table, read_table
from atoll.data.held_out import draw_held_out
from atoll.data.input import Input, TextColumn
from atoll.data.named import NAMED, load
from atoll.data.rows import IGNORED, Array, ArrayRows, PickedRows, intensities
from atoll.data.sources import Source

_TASKS = ("classification", "regression", "labels")


def site_rows(
    data: Any,
    given: Input,
    client: int = 0,
    *,
    held_out: float = 0.0,
    seed: int = 0,
    by: str | None = None,
    encoding: str | None = None,
    sheet: str | None = None,
    scaled: bool = True,
) -> Clients:
    """Read the rows of a site by an input.

    Held-out rows are drawn by a key of the client, so they do not depend on the rows of other sites.

    Args:
        data: the path of a table or of a folder of arrays, or the name of a data set; or a frame, a dict of columns,
            a pair `(x, y)`, or a `Source`.
        given: the input of the federation.
        client: the number of the site in the federation.
        held_out: the fraction of the rows of each class to hold out, in [0, 1).
        seed: the seed of the draw.
        by: the column that names the client of each row; None: that of the input. It is read only if the input scales
            each client by its own statistics.
        encoding, sheet: as in `csv`.
        scaled: whether missing numbers are filled and columns scaled by the statistics of the input.
    Returns:
        A federation in which only this client has rows. Its order is that of the data.
    Raises:
        UsageError: the data cannot be read, or a column, a level, a class or a row does not fit the input.
    Example:
        >>> table = {"age": [40, 60, 50], "ill": ["no", "yes", "no"]}
        >>> from atoll.data import frame
        >>> import pandas
        >>> given = frame(pandas.DataFrame(table), target="ill").split(1, held_out=0).input
        >>> site_rows({"age": [70.0], "ill": ["yes"]}, given, client=2).sizes.tolist()
        [0, 0, 1]
    """
    source = read_by_input(data, given, by, encoding, sheet)
    labels = source.rows.targets() if given.classes is not None else None
    held = draw_held_out(labels, len(source), held_out, Key(seed).fold("split").fold("site", client))
    rows = source.scaled_rows(given) if scaled else source.rows
    train, held_rows = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    offsets = torch.zeros(client + 2, dtype=torch.int64)
    offsets[-1] = len(train)
    owner = torch.full((len(held_rows),), client)
    return Clients(
        source.name,
        rows,
        train,
        offsets,
        PickedRows(rows, held_rows) if len(held_rows) else None,
        given.kind,
        given.classes,
        given.features,
        source.columns,
        notes=source.notes,
        input=given,
        held_owner=owner if len(held_rows) else None,
    )


def read_by_input(
    data: Any, given: Input, by: str | None = None, encoding: str | None = None, sheet: str | None = None
) -> Source:
    """Read data by the columns, levels and classes of an input. The features are not scaled.

    Args:
        data, given, by, encoding, sheet: as in `site_rows`.
    Raises:
        UsageError: as in `site_rows`.
    """
    by = (by or given.by) if given.clients else None
    if isinstance(data, (str, Path)) and str(data) not in NAMED and is_table(str(data)):
        table = read_table(data, lambda header: _wanted(given, by, header), encoding or "utf-8", sheet)
        return _of_cells(Path(data).name, table.columns, given, by)
    if isinstance(data, (str, Path)):
        data = load(data)
    if isinstance(data, tuple) and len(data) == 2:
        task = given.kind if given.kind in _TASKS else None
        data = arrays(data[0], data[1], task=task, missing="mean" if given.statistics is not None else None)
    if not isinstance(data, Source):
        cells = cells_of(data)
        _wanted(given, by, list(cells))
        return _of_cells("frame", cells, given, by)
    if given.columns and data.cells is not None:
        read = data.read_as(given)
        _refuse_levels(given, data.cells, given.values(data.cells).numbers)
        return read
    return _of_arrays(data, given)


def _wanted(given: Input, by: str | None, header: Sequence[str]) -> list[str]:
    """The columns of a table that are read.

    Raises:
        UsageError: a column is missing.
    """
    if not given.columns:
        raise UsageError(
            "The data is a table.", f"arrays of shape {given.features}, as the federation has.", "a table has one axis."
        )
    wanted = [*(column.name for column in given.columns), *given.target.names, *([by] if by else [])]
    absent = [name for name in wanted if name not in header]
    if absent:
        raise UsageError(
            f"The data have no column {', '.join(map(repr, absent))}.",
            f"the columns {', '.join(wanted)}, in any order.",
            "all sites of a federation have the same columns.",
        )
    return list(dict.fromkeys(wanted))


def _of_cells(name: str, cells: Mapping[str, Cells], given: Input, by: str | None) -> Source:
    """The rows of a table that have a target, and every value if the input drops incomplete rows."""
    values = structs.replace(given, missing="mean").values(cells).numbers
    each = [given.targets(cells[one]) for one in given.target.names]
    y = each[0] if len(each) == 1 and given.kind != "labels" else torch.stack(each, 1)
    _refuse_classes(given, cells, y)
    lacks = (y == IGNORED) if given.kind == "labels" else (y == -2) if given.classes is not None else y.isnan()
    empty = lacks if lacks.dim() == 1 else lacks.any(1)
    gaps = np.isnan(values).any(1) if given.missing == "drop" else np.zeros(len(values), dtype=bool)
    keep = ~(empty.numpy() | gaps)
    if not keep.any():
        raise UsageError(
            f"{name} has {with_noun(len(keep), 'row')}, and none is complete.", "at least one complete row."
        )
    _refuse_levels(given, cells, np.where(keep[:, None], values, 0.0))
    kept = torch.from_numpy(keep)
    names, codes = _clients(given, cells, by, keep)
    left = int((~keep).sum())
    return Source(
        name=name,
        rows=ArrayRows(given.expand(torch.from_numpy(values[keep])), y[kept], given.kind == "regression"),
        kind=given.kind,
        classes=given.classes,
        features=given.features,
        columns=given.names,
        by=codes,
        names=names,
        notes=(f"{with_noun(left, 'row')} without a target or another value: left out.",) if left else (),
        schema=given,
    )


def _refuse_classes(given: Input, cells: Mapping[str, Cells], y: Tensor) -> None:
    """Refuse a class that the input does not have."""
    if given.classes is None or not bool((y == -1).any()):
        return
    row = int((y == -1).nonzero()[0])
    name = given.target.names[0]
    raise UsageError(
        f"Column {name!r} contains {cells[name].strings()[row]!r} at row {row}.",
        f"one of the classes {', '.join(given.classes)}.",
        "the model of the federation has no output for another class.",
    )


def _refuse_levels(given: Input, cells: Mapping[str, Cells], values: Array) -> None:
    """Refuse a text that is no level of its column."""
    for place, column in enumerate(given.columns):
        if isinstance(column, TextColumn) and (values[:, place] == -1).any():
            row = int((values[:, place] == -1).argmax())
            raise UsageError(
                f"Column {column.name!r} contains {cells[column.name].strings()[row]!r} at row {row}.",
                f"one of {', '.join(column.levels[:20])}.",
                "the model of the federation has no feature for another text.",
            )


def _clients(
    given: Input, cells: Mapping[str, Cells], by: str | None, keep: Array
) -> tuple[tuple[str, ...] | None, Tensor | None]:
    """The names of the clients whose statistics scale the rows, and the client of each row."""
    if not given.clients:
        return None, None
    if by is None:
        raise UsageError(
            "The federation scales each client by its own statistics, and the data do not name a client.",
            "the column that names the client of each row.",
            write="atoll join --by site",
        )
    names = tuple(given.clients)
    each = client_names(cells[by])
    unknown = [text for text, used in zip(each, keep, strict=True) if used and text not in given.clients]
    if unknown:
        raise UsageError(
            f"Column {by!r} contains {unknown[0]!r} at row {each.index(unknown[0])}.",
            f"one of {', '.join(names)}.",
            "the input has no statistics of another client.",
        )
    return names, torch.tensor([names.index(text) for text, used in zip(each, keep, strict=True) if used])


def _of_arrays(data: Source, given: Input) -> Source:
    """Rows of arrays: the shape, the classes and the kind of numbers fit the input."""
    if intensities(data.rows) != given.intensities:
        kinds = ("floats", "uint8 intensities")
        raise UsageError(f"The features are {kinds[not given.intensities]}.", f"{kinds[given.intensities]}.")
    read = data.read_as(given)
    x = read.rows.take(torch.zeros(1, dtype=torch.int64))[0]
    if x.is_floating_point() == (given.tokens is not None):
        kinds = ("numbers", "token ids")
        raise UsageError(f"The features are {kinds[given.tokens is None]}.", f"{kinds[given.tokens is not None]}.")
    for piece in torch.arange(len(read)).split(4096) if given.tokens is not None else ():
        wrong = (read.rows.take(piece)[0] >= (given.tokens or 0)).flatten(1).any(1)
        if bool(wrong.any()):
            row = int(piece[int(wrong.nonzero()[0])])
            raise UsageError(
                f"Row {row} contains a token above {(given.tokens or 0) - 1}.", f"ids below {given.tokens}."
            )
    return replace(read, test=None)
