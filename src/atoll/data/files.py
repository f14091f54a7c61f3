"""Files of tables: CSV, Parquet, Excel, a glob of such files, and a folder `site=NAME/part.parquet`.

A reader splits a file into cells and nothing else. A CSV file is split by pyarrow if it is installed. If pyarrow
refuses a file, the reader of Python reads it, so that results and errors do not depend on the installation.

Tests: tests/data/test_files.py.
"""

from __future__ import annotations

import contextlib
import csv as reader
import glob
import gzip
import importlib.util
import itertools
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from atoll.base.errors import UsageError, did_you_mean
from atoll.base.files import no_such_file
from atoll.base.lines import Change, Line, Load, Write
from atoll.base.names import with_noun
from atoll.data.cells import (
    ArrowCells,
    Cells,
    DayCells,
    LevelCells,
    NumberCells,
    TextCells,
    Texts,
    frame_cells,
    twice,
)

TABLES = (".csv", ".tsv", ".txt", ".gz", ".parquet", ".xlsx")
FILE = "@file"
_INDEX = re.compile(r"__index_level_\d+__")  # the name that pandas gives to an index without a name
BATCH = 65_536
Pick = Callable[[Sequence[str]], list[str]]


class CellTable(NamedTuple):
    """The cells of a file.

    Args:
        columns: the cells by column.
        notes: sentences about guesses.
        mark: the mark at which cells end; empty: the file has types.
    """

    columns: dict[str, Cells]
    notes: tuple[str, ...] = ()
    mark: str = ""


class RowBatch(NamedTuple):
    """Some rows of a file.

    Args:
        cells: the cells by column.
        arrow: the same rows as a table of pyarrow; None if pyarrow did not read them.
    """

    cells: dict[str, Cells]
    arrow: Any = None


class Stream(NamedTuple):
    """A file that is read batch by batch. All batches except the last have the same number of rows."""

    header: tuple[str, ...]
    batches: Iterator[RowBatch]


def is_table(text: str) -> bool:
    """Whether a text is the path of a table: a file, a glob, or a folder of Parquet files."""
    path = Path(text)
    if path.is_dir():
        return not (path / "x.npy").exists() and bool(_parts(path))
    return path.exists() or "*" in text or path.suffix in TABLES or os.sep in text


def read_table(path: str | Path, pick: Pick, encoding: str = "utf-8", sheet: str | None = None) -> CellTable:
    """Read the columns that `pick` selects from the header.

    Args:
        path: a file, a glob, or a folder of folders `column=NAME` with Parquet files.
        pick: returns the names of the columns to read.
        encoding: the encoding of a text file.
        sheet: the sheet of an Excel file; None: the first.
    Raises:
        UsageError: a file is missing or malformed, or the columns of two files differ.
    """
    files = _files(Path(path))
    if not files:
        raise UsageError(f"The folder {path} has no tables.", "a file, or a folder with Parquet or CSV files.")
    if len(files) == 1 and not files[0][1]:
        return _read(files[0][0], pick, encoding, sheet)
    tables = []
    for file, labels in files:
        extra = {**labels, FILE: file.stem}
        table = _read(file, _without(pick, extra), encoding, sheet)
        rows = len(next(iter(table.columns.values()))) if table.columns else 0
        for name in pick([*table.columns, *extra]):
            if name in extra:
                table.columns[name] = LevelCells(Texts((extra[name],), np.zeros(rows, dtype=np.int64)))
        tables.append(table)
    first = tables[0]
    for (file, _), table in zip(files, tables, strict=True):
        if set(table.columns) != set(first.columns):
            other = sorted(set(table.columns) ^ set(first.columns))
            raise UsageError(
                f"{file} and {files[0][0]} have different columns: {', '.join(map(repr, other))}.",
                "the same columns in every file, or --columns with features of all files.",
                "one model reads all files.",
            )
    columns = {name: _joined(name, [table.columns[name] for table in tables]) for name in first.columns}
    return CellTable(columns, (*first.notes, f"{len(files)} files were read."), first.mark)


def _without(pick: Pick, extra: dict[str, str]) -> Pick:
    """A choice of columns that knows the extra columns, and returns only columns of the file."""
    return lambda header: [name for name in pick([*header, *extra]) if name not in extra]


def stream_table(path: str | Path, encoding: str = "utf-8", sheet: str | None = None, rows: int = BATCH) -> Stream:
    """Open a file to read all of its columns in batches.

    Args:
        path: a CSV, Parquet or Excel file.
        encoding, sheet: as in `read_table`.
        rows: the largest number of rows of a batch.
    Raises:
        UsageError: as in `read_table`. A malformed line is found when its batch is read.
    """
    file = Path(path)
    if file.suffix == ".parquet":
        opened = _parquet(file)
        names = tuple(opened.schema_arrow.names)
        tables = _even(opened.iter_batches(rows), rows)
        return Stream(names, (RowBatch(frame_cells(table), table) for table in tables))
    if file.suffix == ".xlsx":
        cells = frame_cells(_excel(file, sheet))
        return Stream(tuple(cells), iter([RowBatch(cells)]))
    text = _Csv(file, encoding, convert=True)
    return Stream(tuple(text.header), text.batches(text.header, rows))


def _files(path: Path) -> list[tuple[Path, dict[str, str]]]:
    """The files of a path, each with the labels of its folders `column=NAME`."""
    if path.is_dir():
        return _parts(path)
    if "*" in str(path) and not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise UsageError(f"No file matches {path}.", "at least one file.", write=f"ls {path.parent}")
        return [(Path(name), _labels(Path(name))) for name in found]
    return [(path, {})]


def _parts(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    found = sorted(p for suffix in (".parquet", ".csv") for p in folder.glob(f"*=*/*{suffix}"))
    found = found or sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.csv"))
    return [(path, _labels(path)) for path in found]


def _labels(path: Path) -> dict[str, str]:
    name, equals, value = path.parent.name.partition("=")
    return {name: value} if equals else {}


def _read(path: Path, pick: Pick, encoding: str, sheet: str | None) -> CellTable:
    if not path.is_file():
        raise no_such_file(path, "the path of a CSV file", Load)
    if path.suffix == ".parquet":
        opened = _parquet(path)
        wanted = pick([n for n in opened.schema_arrow.names if not _INDEX.fullmatch(n)])
        return CellTable(frame_cells(opened.read(wanted).select(wanted)))
    if path.suffix == ".xlsx":
        cells = frame_cells(_excel(path, sheet))
        return CellTable({name: cells[name] for name in pick(list(cells))})
    text = _Csv(path, encoding)
    wanted = pick(text.header)
    batches = list(text.batches(wanted, None))
    if not batches:
        raise UsageError(f"{path} has 0 rows.", "a header line, and at least one row.", write=f"head {path}")
    columns = {name: _joined(name, [batch.cells[name] for batch in batches]) for name in wanted}
    return CellTable(columns, text.notes, text.mark)


def _joined(name: str, parts: Sequence[Cells]) -> Cells:
    """Concatenate the cells of one column."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, ArrowCells) for part in parts):
        import pyarrow as pa

        arrays = [part.array for part in cast("list[ArrowCells]", parts)]
        chunks = [c for a in arrays for c in (a.chunks if isinstance(a, pa.ChunkedArray) else [a])]
        return ArrowCells(pa.chunked_array(chunks, pa.string()))
    if all(isinstance(part, (TextCells, ArrowCells)) for part in parts):
        return TextCells([text for part in parts for text in part.strings()])
    if all(isinstance(part, NumberCells) for part in parts):
        numbers = cast("list[NumberCells]", parts)
        return NumberCells(np.concatenate([part.values for part in numbers]), all(part.boolean for part in numbers))
    if all(isinstance(part, DayCells) for part in parts):
        return DayCells(np.concatenate([part.values for part in cast("list[DayCells]", parts)]))
    if all(isinstance(part, LevelCells) for part in parts):
        place: dict[str, int] = {}
        codes = []
        for part in parts:
            texts = part.texts()
            table = np.array([*(place.setdefault(level, len(place)) for level in texts.levels), -1], dtype=np.int64)
            codes.append(table[texts.codes])
        return LevelCells(Texts(tuple(place), np.concatenate(codes)))
    raise UsageError(
        f"Column {name!r} contains texts in one file, and numbers or dates in another.",
        "the same type in every file.",
        "one model reads all files.",
    )


def needs(package: str, path: Path) -> None:
    """Refuse a file that a missing package reads or writes."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"{path} needs {package}, which is not installed.",
            "the extra `tables`.",
            write="pip install 'atoll[tables]'",
        )


def _parquet(path: Path) -> Any:
    needs("pyarrow", path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise no_such_file(path, "the path of a Parquet file", Load)
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "a Parquet file.", write=f"file {path}") from None


def _even(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Tables of pyarrow with `rows` rows each, except the last, from record batches of any length."""
    import pyarrow as pa

    waiting: list[Any] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= rows:
            table = pa.Table.from_batches(waiting)
            whole = count - count % rows
            for start in range(0, whole, rows):
                yield table.slice(start, rows)
            waiting, count = table.slice(whole).to_batches(), count - whole
    if count:
        yield pa.Table.from_batches(waiting)


def _excel(path: Path, sheet: str | None) -> Any:
    for package in ("pandas", "openpyxl"):
        needs(package, path)
    import pandas

    try:
        with pandas.ExcelFile(path, engine="openpyxl") as book:
            names = [str(name) for name in book.sheet_names]
            if sheet is not None and sheet not in names:
                near = did_you_mean(sheet, names)
                line = Change("sheet", near) if near else ""
                raise UsageError(f"{path} has no sheet {sheet!r}.", f"one of {', '.join(names)}.", write=line)
            name = names[0] if sheet is None else sheet  # dtype: pandas would read the text 007 as the number 7
            return pandas.read_excel(book, sheet_name=name, dtype=object, keep_default_na=False, na_values=[""])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read: {error}.", "an Excel file.", write=f"file {path}") from None


class _Csv:
    """A CSV file with its header and its separator.

    Args:
        path: the file, gzipped or not.
        encoding: its encoding.
        convert: whether the line of an error about the encoding is a command that converts the file, and no option.
    """

    def __init__(self, path: Path, encoding: str, convert: bool = False) -> None:
        self.convert = convert
        self.path, self.encoding = path, "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
        with self._errors(), self._text() as file:
            first = file.readline()
            self.mark = max(",;\t|", key=first.count)
            self.header = [name.strip() for name in next(reader.reader([first], delimiter=self.mark, strict=True), [])]
        self._check()

    @property
    def notes(self) -> tuple[str, ...]:
        """The guess of the separator, unless it is a comma."""
        return () if self.mark == "," else (f"Cells guessed to end at {self.mark!r}.",)

    def _check(self) -> None:
        path = self.path
        if not self.header:
            raise UsageError(f"{path} has 0 rows.", "a header line, and at least one row.", write=f"head {path}")
        for name in self.header:
            if self.header.count(name) > 1:
                raise twice(name)
        if all(_number(name) for name in self.header):
            names = self.mark.join(f"c{i}" for i in range(len(self.header)))
            raise UsageError(
                f"The first line of {path} contains only numbers.",
                "a header line with the names of the columns.",
                "otherwise the first row of data would be read as names.",
                f"sed -i 1i{names} {path}",
            )

    def _text(self) -> IO[str]:
        if self.path.suffix == ".gz":
            return cast("IO[str]", gzip.open(self.path, "rt", encoding=self.encoding, newline=""))
        return open(self.path, encoding=self.encoding, newline="")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of reading into a UsageError."""
        path = self.path
        try:
            yield
        except FileNotFoundError:
            raise no_such_file(path, "the path of a CSV file", Load) from None
        except LookupError:
            raise UsageError(
                f"encoding = {self.encoding!r} is unknown.", "an encoding.", write=Change("encoding", "latin-1")
            ) from None
        except UnicodeDecodeError as error:
            with open(path, "rb") as file:
                binary = b"\0" in file.read(4096) or path.suffix == ".gz"
            raise UsageError(
                f"{path} cannot be read: {error}.",
                "a CSV file in UTF-8, or its encoding.",
                "the bytes are no text." if binary else "another encoding would give other letters.",
                f"file {path}" if binary else self._other_encoding(),
            ) from None
        except (OSError, EOFError, zlib.error, reader.Error) as error:
            raise UsageError(
                f"{path} cannot be read: {error}.", "a CSV file in UTF-8.", write=f"file {path}"
            ) from error

    def _other_encoding(self) -> Write:
        if not self.convert:
            return Load(str(self.path), {"encoding": "latin-1"})
        new = self.path.with_stem(f"{self.path.stem}-utf8")
        return Line(shell=f"iconv -f latin1 -t utf-8 {shlex.quote(str(self.path))} -o {shlex.quote(str(new))}")

    def batches(self, wanted: Sequence[str], rows: int | None) -> Iterator[RowBatch]:
        """Read these columns, at most `rows` rows at a time; None: all rows at once."""
        done = 0
        if self._plain():
            try:
                for batch in self._by_arrow(wanted, rows):
                    yield batch
                    done += len(batch.arrow)
                return
            except _Refused:
                pass  # the reader of Python reads the file, or gives the error
        yield from self._by_python(wanted, rows, done)

    def _plain(self) -> bool:
        """Whether pyarrow may split the file."""
        return importlib.util.find_spec("pyarrow") is not None and len(self.header) > 1

    def _by_arrow(self, wanted: Sequence[str], rows: int | None) -> Iterator[RowBatch]:
        import pyarrow as pa
        from pyarrow import csv

        names = [str(place) for place in range(len(self.header))]
        used = [names[self.header.index(name)] for name in wanted]
        encoding = "utf8" if self.encoding == "utf-8-sig" else self.encoding
        # Small blocks stay in the cache: half the CPU time of blocks of 4 MiB. A block must contain a whole line.
        block = 2**18 * (1 + len(self.header) // 1000)
        options = (
            csv.ReadOptions(column_names=names, skip_rows=1, encoding=encoding, block_size=block, use_threads=False),
            csv.ParseOptions(delimiter=self.mark, newlines_in_values=True),
            csv.ConvertOptions(
                include_columns=used,
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=False,
                quoted_strings_can_be_null=False,
            ),
        )
        try:
            with pa.input_stream(str(self.path), compression="gzip" if self.path.suffix == ".gz" else None) as raw:
                whole = rows is None
                tables = [csv.read_csv(raw, *options)] if whole else _even(csv.open_csv(raw, *options), rows or BATCH)
                for table in tables:
                    named = table.rename_columns(list(wanted))
                    if len(named):
                        yield RowBatch({name: ArrowCells(named.column(name)) for name in wanted}, named)
        except (pa.ArrowException, OSError) as error:
            raise _Refused from error

    def _by_python(self, wanted: Sequence[str], rows: int | None, skip: int) -> Iterator[RowBatch]:
        places = [self.header.index(name) for name in wanted]
        with self._errors(), self._text() as file:
            file.readline()
            lines = itertools.islice(self._lines(file), skip, None)
            while batch := list(itertools.islice(lines, rows)):
                columns = list(zip(*batch, strict=True))
                yield RowBatch({name: TextCells(columns[place]) for name, place in zip(wanted, places, strict=True)})

    def _lines(self, file: IO[str]) -> Iterator[list[str]]:
        table = reader.reader(file, delimiter=self.mark, strict=True)
        for line in table:
            if line and len(line) != len(self.header):
                raise UsageError(
                    f"Line {table.line_num + 1} of {self.path} has {with_noun(len(line), 'cell')}.",
                    f"{len(self.header)} cells, the number in the header.",
                    "a cell's position determines its column.",
                    f"sed -n {table.line_num + 1}p {self.path}",
                )
            if line:
                yield line


class _Refused(Exception):
    """pyarrow cannot read a file."""


def _number(text: str) -> bool:
    if not text or text.lower() in ("?", "na", "nan"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
