"""The work of `predict`: read a file in batches, apply the model of a run, and write the predictions.

Tests: tests/surface/test_predict.py
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from atoll.base.errors import RunError, UsageError, unknown_name
from atoll.base.lines import Line
from atoll.base.names import with_noun
from atoll.cli import output
from atoll.compute.loss import cox
from atoll.data.cells import Cells, NumberCells, client_names
from atoll.data.files import RowBatch, Stream, needs, stream_table
from atoll.data.input import Input
from atoll.runs.format import format_number
from atoll.runs.predictor import PredictionScores, Predictor, ScoreSums

ARRAY_BYTES = 2**24  # of a batch of a folder of arrays


@dataclass(frozen=True)
class Request:
    """The arguments of `atoll predict`.

    Args:
        run: the run folder.
        data: the file, or a folder of arrays.
        to: the file to write; None: stdout.
        proba: whether the probability of each class is added.
        by: the column that names the client; None: that of the run.
        name: the name of the added column.
        as_json: whether one JSON object is printed instead of rows.
        quiet: whether metrics are not printed to stderr.
        overwrite: whether an existing file is replaced.
    """

    run: Path
    data: Path
    to: Path | None = None
    proba: bool = False
    by: str | None = None
    name: str = "prediction"
    as_json: bool = False
    quiet: bool = False
    overwrite: bool = False


@dataclass
class _Seen:
    """Counts over all batches: rows, unknown texts, and losses and metrics."""

    tally: ScoreSums
    rows: int = 0
    unknown: dict[tuple[str, str], int] = field(default_factory=dict)
    strangers: int = 0  # rows of clients without a model, if clients have models


def predict_file(predictor: Predictor, request: Request) -> int:
    """Predict all rows of a file, and print or write them."""
    stream = _open(request.data, predictor.input)
    added = _added(predictor, request, stream.header)
    seen = _Seen(ScoreSums(predictor))
    with _writer(request, [*stream.header, *added]) as writer:
        for batch in stream.batches:
            columns = _predict_batch(predictor, request, batch, seen)
            writer.write(batch, stream.header, dict(zip(added, columns, strict=True)))
        if not seen.rows:
            raise UsageError(f"{request.data} has 0 rows.", "at least one row.", write=f"head {request.data}")
    for (column, text), count in seen.unknown.items():
        print(
            f"Column {column!r}: {text!r} is no level of the model ({with_noun(count, 'row')}). All its columns are 0.",
            file=sys.stderr,
        )
    if seen.strangers:
        print(
            f"{with_noun(seen.strangers, 'row')} of unknown clients: they use the model of the server.", file=sys.stderr
        )
    result = seen.tally.result() if seen.tally.rows else None
    _report(request, seen, result)
    return 0


def _open(data: Path, input: Input) -> Stream:
    if data.is_dir():
        return _arrays(data, input)
    if not data.is_file():
        raise UsageError(f"There is no file {data}.", "a CSV, Parquet or Excel file, or a folder of arrays.")
    if not input.columns:
        raise UsageError(
            f"The model takes arrays of shape {input.features}.",
            "a folder with x.npy.",
            "a table has one axis.",
        )
    return stream_table(data)


def _arrays(folder: Path, input: Input) -> Stream:
    """Batches of a folder with x.npy, and y.npy as the target."""
    found = {name: folder / f"{name}.npy" for name in ("x", "y")}
    if not found["x"].is_file():
        raise UsageError(f"The folder {folder} has no x.npy.", "x.npy, and optionally y.npy.", write=f"ls {folder}")
    try:
        x = np.load(found["x"], mmap_mode="r", allow_pickle=False)
        y = np.load(found["y"], mmap_mode="r", allow_pickle=False) if found["y"].is_file() else None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{folder} cannot be read: {error}.", "arrays that NumPy wrote.") from None
    if y is not None and len(x) != len(y):
        raise UsageError(f"x.npy has {with_noun(len(x), 'row')}, y.npy has {len(y)}.", "the same number of rows.")
    size = max(1024, ARRAY_BYTES // max(1, x[:1].nbytes) // 1024 * 1024)

    def batches() -> Iterator[RowBatch]:
        for start in range(0, len(x), size):
            part = {"x": np.array(x[start : start + size])}
            yield RowBatch({}, part if y is None else {**part, "y": np.array(y[start : start + size])})

    return Stream((), batches())


def _added(predictor: Predictor, request: Request, header: Sequence[str]) -> list[str]:
    """The names of the columns that are added."""
    input = predictor.input
    targets = input.target.names
    one = predictor.loss is cox or not _several(input)  # a relative hazard, and not a time and an event
    names = [request.name] if one else [f"{request.name}={name}" for name in targets]
    if request.proba:
        classes = targets if input.kind == "labels" else input.classes
        if input.kind == "regression" or classes is None:
            raise UsageError("--proba was given for a model of numbers.", "a model of classes.")
        names += [f"p={name}" for name in classes]
    for name in names:
        if name in header:
            raise UsageError(
                f"The data already have a column {name!r}.",
                "another name for the predictions.",
                "each column needs its own name.",
                Line(shell="--as predicted") if name == request.name else "",
            )
    if request.by is not None and request.by not in header:
        raise unknown_name("column", request.by, header, lambda near: Line(shell=f"--by {near}"))
    return names


def _predict_batch(predictor: Predictor, request: Request, batch: RowBatch, seen: _Seen) -> list[Any]:
    """The added columns of a batch; counts are added to `seen`."""
    it = predictor.input
    if not batch.cells:
        arrays: dict[str, Any] = batch.arrow
        x = predictor.prepare(arrays["x"])
        clients, y = None, None if "y" not in arrays else predictor.targets(arrays["y"])
    else:
        values = it.values(batch.cells, seen.rows)
        for key, count in values.unknown.items():
            seen.unknown[key] = seen.unknown.get(key, 0) + count
        by = request.by or it.by
        clients = client_names(batch.cells[by]) if by is not None and by in batch.cells else None
        x = it.tensor(values.numbers, clients if it.clients else None)
        y = _target(it, batch.cells)
    if predictor.models is not None:
        names = [None] * len(x) if clients is None else clients
        known = {name: name is not None and predictor.models.owner(name) is not None for name in set(names)}
        seen.strangers += sum(not known[name] for name in names)
    out = predictor.output(x, clients)
    seen.rows += len(x)
    if y is not None:
        seen.tally.add(out, y, clients)
    words = predictor.words(out)
    columns: list[Any] = list(words.T) if _several(it) and words.ndim == 2 else [words]
    if request.proba:
        columns += list(it.probabilities(out).numpy().T)
    return columns


def _several(input: Input) -> bool:
    """Whether a row has several targets, with one column of predictions for each."""
    return input.kind == "labels" or len(input.target.names) > 1


def _target(it: Input, cells: dict[str, Cells]) -> torch.Tensor | None:
    names = it.target.names
    if any(name not in cells for name in names):
        return None
    each = [it.targets(cells[name]) for name in names]
    return each[0] if not _several(it) else torch.stack(each, 1)


def _report(request: Request, seen: _Seen, result: PredictionScores | None) -> None:
    """Print the metrics: as one JSON object, or as lines on stderr."""
    if result is not None and result.unseen:
        print(
            f"{with_noun(result.unseen, 'row has', 'rows have')} a class unseen in training, which counts as wrong.",
            file=sys.stderr,
        )
    if request.as_json:
        output.print_json(
            {
                "run": request.run.name,
                "rows": seen.rows,
                "metrics": None if result is None else dict(result.metrics),
                "clients": {} if result is None else {n: _whole_rows(v) for n, v in result.clients.items()},
                "to": None if request.to is None else str(request.to),
            }
        )
    elif result is not None and not request.quiet:
        print(_line("all rows", {"rows": result.rows, **result.metrics}), file=sys.stderr)
        for name, values in result.clients.items():
            print(_line(name, values), file=sys.stderr)


def _whole_rows(values: Any) -> dict[str, Any]:
    return {**values, "rows": int(values["rows"])}


def _line(name: str, values: Any) -> str:
    rest = "  ".join(f"{metric} {format_number(value)}" for metric, value in values.items() if metric != "rows")
    return f"{name}: {with_noun(int(values['rows']), 'row')}  {rest}"


class _Writer(Protocol):
    """Writes the rows of a batch with the added columns."""

    def write(self, batch: RowBatch, header: Sequence[str], added: dict[str, Any]) -> None: ...


class _Nothing:
    def write(self, batch: RowBatch, header: Sequence[str], added: dict[str, Any]) -> None: ...


class _CsvWriter:
    """Writes CSV. Rows that pyarrow read are written by pyarrow if no cell needs quotes."""

    def __init__(self, file: IO[str], names: Sequence[str]) -> None:
        self.file = file
        self.rows = csv.writer(file, lineterminator="\n")
        self.names = names

    def write(self, batch: RowBatch, header: Sequence[str], added: dict[str, Any]) -> None:
        if self.names:  # not earlier: rows that are refused leave no output
            self.rows.writerow(self.names)
            self.names = ()
        texts = {name: _strings(values) for name, values in added.items()}
        if header and batch.arrow is not None and self._by_arrow(batch.arrow, texts):
            return
        columns = [batch.cells[name].strings() for name in header]
        self.rows.writerows(zip(*columns, *texts.values(), strict=True))

    def _by_arrow(self, table: Any, texts: dict[str, list[str]]) -> bool:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        if any(kind != pa.string() for kind in table.schema.types):
            return False
        for name, values in texts.items():
            table = table.append_column(name, pa.array(values, pa.string()))
        options = arrow_csv.WriteOptions(include_header=False, quoting_style="none")
        buffer = io.BytesIO()
        try:
            arrow_csv.write_csv(table, buffer, options)
        except pa.ArrowInvalid:  # a cell needs quotes
            return False
        self.file.write(buffer.getvalue().decode())
        return True


class _ParquetWriter:
    """Writes Parquet: columns of a Parquet file keep their types, those of a text file are texts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def write(self, batch: RowBatch, header: Sequence[str], added: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = batch.arrow if header and batch.arrow is not None else pa.table(_typed(batch.cells))
        for name, values in added.items():
            numbers = values.dtype.kind in "fi" and values.ndim == 1
            kept = pa.array(values) if numbers else pa.array(_strings(values), pa.string())
            table = table.append_column(name, kept)
        if self.file is None:
            self.file = pq.ParquetWriter(self.path, table.schema)
        self.file.write_table(table)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _typed(cells: dict[str, Cells]) -> dict[str, Any]:
    return {n: c.values if isinstance(c, NumberCells) and not c.boolean else c.strings() for n, c in cells.items()}


def _strings(values: Any) -> list[str]:
    """Convert predictions to texts: numbers with all their digits."""
    if values.ndim > 1:
        return [" ".join(map(repr, row)) for row in values.tolist()]
    return list(map(repr, values.tolist())) if values.dtype.kind == "f" else [str(v) for v in values.tolist()]


@contextlib.contextmanager
def _writer(request: Request, names: Sequence[str]) -> Iterator[_Writer]:
    """The writer of the request. A file appears only when all rows are written."""
    to = request.to
    if to is None:
        yield _Nothing() if request.as_json else _CsvWriter(sys.stdout, names)
        return
    if to.suffix not in (".csv", ".parquet"):
        raise UsageError(
            f"--to {to}.",
            "a file that ends in .csv or .parquet.",
            write=Line(shell=f"--to {to.name.partition('.')[0]}.csv"),
        )
    if to.suffix == ".parquet":
        needs("pyarrow", to)
    if to.exists() and not request.overwrite:
        raise UsageError(
            f"{to} exists.", "a new file, or --overwrite.", "its content would be lost.", Line(shell="--overwrite")
        )
    new = to.with_name(to.name + ".new")
    try:
        if to.suffix == ".csv":
            with open(new, "w", encoding="utf-8", newline="") as file:
                yield _CsvWriter(file, names)
        else:
            with contextlib.closing(_ParquetWriter(new)) as parquet:
                yield parquet
        os.replace(new, to)
    except OSError as error:
        raise RunError(f"{to} could not be written: {error.strerror}.", "a folder with permission to write.") from error
    finally:
        new.unlink(missing_ok=True)
