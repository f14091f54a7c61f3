"""The cells of one column, as a file or a frame contains them. All doors read columns through this protocol.

A reader only splits a file into cells. `atoll.data.columns` decides what a column is, so every reader and every frame
follows the same rules. Texts are compared without surrounding blanks.

Tests: tests/data/test_files.py, tests/data/test_input.py.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from atoll.base.errors import UsageError
from atoll.base.lines import Change
from atoll.data.rows import Array

EPOCH = datetime.date(1970, 1, 1)
NUMBER_NA = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
TEXT_NA = frozenset({"", "?"})
COMMA = re.compile(r"[-+−]?\d+(\.\d{3})*,\d+")
GROUPED = re.compile(r"[-+−]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?")  # thousands, or a decimal comma
INTEGER = re.compile(r"[-+−]?\d+")
EXACT = 2**53  # from here on float64 does not contain every whole number
POINTS = re.compile(r"[-+−]?[1-9]\d{0,2}(\.\d{3})+")  # thousands, or a decimal point
_LEADING_ZERO = re.compile(r"[-+−]?0\d")
_FIRST = 100  # cells that are read as numbers before all cells are


class Missing(NamedTuple):
    """The texts of missing values.

    Args:
        texts: the missing texts, which hold for columns of numbers and of texts; a number among them, such as -9, also
            holds for its other texts and in a frame. None: in a column of numbers those of `NUMBER_NA`, in upper or
            lower case; in a column of texts the empty cell and "?".
    """

    texts: tuple[str, ...] | None = None

    def number(self, text: str) -> bool:
        """Whether a cell of a column of numbers is missing."""
        if self.texts is None:
            return text.lower() in NUMBER_NA
        known = _numbers(self.texts)
        return text == "" or text in self.texts or (bool(known) and is_number(text) and number(text) in known)

    def marked(self, values: Array) -> Array:
        """The numbers with NaN for those that are missing, float64 `[rows]`."""
        known = _numbers(self.texts or ())
        return np.where(np.isin(values, known), np.nan, values) if known else values

    def text(self, text: str) -> bool:
        """Whether a cell of a column of texts is missing."""
        return text in TEXT_NA if self.texts is None else text == "" or text in self.texts


class Texts(NamedTuple):
    """The distinct texts of a column, without surrounding blanks.

    Args:
        levels: the distinct texts, in the order of their first rows, or in the order that a frame defines.
        codes: the position in `levels` of each cell, int64 `[rows]`; −1 for a null of a frame.
        ordered: whether a frame defines the order.
    """

    levels: tuple[str, ...]
    codes: Array
    ordered: bool = False

    @property
    def counts(self) -> Array:
        """The number of rows of each level, int64 `[levels]`."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.levels))

    def first(self, level: int) -> int:
        """The first row of a level."""
        return int(np.argmax(self.codes == level))

    def map(self, values: Sequence[float]) -> Array:
        """The value of each cell's level, float64 `[rows]`, and NaN for a null."""
        table = np.append(np.asarray(values, dtype=np.float64), np.nan)
        found: Array = table[self.codes]
        return found


class Cells(Protocol):
    """One column of a table.

    numbers: the cells as float64 `[rows]` with NaN for missing; None if a cell is neither a number nor missing.
    texts: the distinct texts.
    strings: the cells as texts, to write them to a file.
    days: days since 1970-01-01, float64 `[rows]` with NaN for missing, if the container has dates; else None.
    """

    def __len__(self) -> int: ...
    def numbers(self, missing: Missing) -> Array | None: ...
    def texts(self) -> Texts: ...
    def strings(self) -> list[str]: ...
    def days(self) -> Array | None: ...


def name_of(value: Any) -> str:
    """Convert a label or client to its name; whole floats lose the decimal point.

    Example:
        >>> name_of(2.0), name_of(0.5), name_of("two")
        ('2', '0.5', 'two')
    """
    value = value.item() if isinstance(value, np.generic) else value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def number(text: str) -> float:
    """Read a number with a decimal point. A typographic minus is a minus; the code 1_0, which Python reads, is none.

    Raises:
        ValueError: the text is no number.
    Example:
        >>> number("−2.5"), number("1e3")
        (-2.5, 1000.0)
    """
    if "_" in text:
        raise ValueError(f"{text!r} is no number")
    return float(text.replace("−", "-"))


def is_number(text: str) -> bool:
    """Whether a text is a number with a decimal point, NaN or an infinity."""
    try:
        number(text)
    except ValueError:
        return False
    return True


@cache
def _numbers(texts: tuple[str, ...]) -> tuple[float, ...]:
    """The numbers among some texts."""
    return tuple(number(text) for text in texts if is_number(text))


def loses_digits(text: str) -> bool:
    """Whether a number as float64 has another text: a code with leading zeros, or one with too many digits.

    Example:
        >>> loses_digits("007"), loses_digits("9007199254740993"), loses_digits("7.0")
        (True, True, False)
    """
    return is_number(text) and (bool(_LEADING_ZERO.match(text)) or EXACT <= abs(number(text)) < math.inf)


def code_of(text: str) -> str:
    """Convert the text of a client or a class to its name: a whole number loses the decimal point, a code stays.

    Example:
        >>> code_of("7.0"), code_of("007"), code_of("north")
        ('7', '007', 'north')
    """
    return name_of(number(text)) if is_number(text) and not loses_digits(text) else text


def client_names(cells: Cells) -> list[str]:
    """Return the name of the client in each cell."""
    texts = cells.texts()
    names = [*map(code_of, texts.levels), ""]
    return [names[code] for code in texts.codes.tolist()]


def coded(texts: Iterable[str | None]) -> Texts:
    """Encode texts; None is a null.

    Example:
        >>> coded(["b", " a", "b", None])
        Texts(levels=('b', 'a'), codes=array([ 0,  1,  0, -1]), ordered=False)
    """
    place: dict[str, int] = {}
    codes = [-1 if text is None else place.setdefault(text.strip(), len(place)) for text in texts]
    return Texts(tuple(place), np.array(codes, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class TextCells:
    """Cells of a text file: a list of texts."""

    cells: Sequence[str]

    def __len__(self) -> int:
        return len(self.cells)

    def numbers(self, missing: Missing) -> Array | None:
        try:
            return np.array([np.nan if missing.number(text := cell.strip()) else number(text) for cell in self.cells])
        except ValueError:
            return None

    def texts(self) -> Texts:
        return coded(self.cells)

    def strings(self) -> list[str]:
        return list(self.cells)

    def days(self) -> Array | None:
        return None


@dataclass(frozen=True, eq=False)
class ArrowCells:
    """Cells of a text file that pyarrow split: an array of strings. Results equal those of `TextCells`.

    pyarrow converts the cells if all of them are plain numbers. In all other cases the code for texts decides.
    """

    array: Any

    def __len__(self) -> int:
        return len(self.array)

    def numbers(self, missing: Missing) -> Array | None:
        import pyarrow as pa
        from pyarrow import compute

        try:
            return missing.marked(_to_numpy(self.array.cast(pa.float64())))
        except pa.ArrowInvalid:
            pass
        if TextCells(self.array.slice(0, _FIRST).to_pylist()).numbers(missing) is None:
            return None  # most columns of texts end here
        trimmed = compute.utf8_trim_whitespace(self.array)
        words = sorted(NUMBER_NA) if missing.texts is None else ["", *missing.texts]
        known = compute.utf8_lower(trimmed) if missing.texts is None else trimmed
        absent = compute.is_in(known, value_set=_arrow_texts(words))
        filled = compute.if_else(absent, _arrow_texts(["nan"])[0], trimmed)
        try:
            return missing.marked(_to_numpy(filled.cast(pa.float64())))
        except pa.ArrowInvalid:
            pass
        levels, codes = _encoded(filled)
        values = TextCells(levels).numbers(missing)  # Python reads some numbers that pyarrow does not, such as "+1"
        return None if values is None else values[codes]

    def texts(self) -> Texts:
        levels, codes = _encoded(self.array)
        stripped = coded(levels)
        return Texts(stripped.levels, stripped.codes[codes])

    def strings(self) -> list[str]:
        return list(self.array.to_pylist())

    def days(self) -> Array | None:
        return None


def _encoded(array: Any) -> tuple[list[str], Array]:
    """The distinct texts of an array of pyarrow, and the position of the text of each cell."""
    import pyarrow as pa

    chunked = array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])
    chunks = chunked.dictionary_encode().unify_dictionaries().chunks
    levels = chunks[0].dictionary.to_pylist() if chunks else []
    return levels, _to_numpy(pa.chunked_array([chunk.indices for chunk in chunks], pa.int32()))


def _arrow_texts(texts: Sequence[str]) -> Any:
    """Texts as an array of pyarrow. `pyarrow.array` and `to_numpy` would import pandas, which takes half a second."""
    import pyarrow as pa

    data = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(data), pa.py_buffer(ends), pa.py_buffer(b"".join(data)))


def _to_numpy(array: Any) -> Array:
    """Convert numbers of pyarrow without nulls."""
    import pyarrow as pa

    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    found: Array = np.concatenate([np.zeros(0, array.type.to_pandas_dtype()), *map(np.from_dlpack, chunks)])
    return found


@dataclass(frozen=True, eq=False)
class NumberCells:
    """Cells of a column of numbers in a frame or array: float64 with NaN for missing.

    Args:
        values: the numbers, `[rows]`.
        boolean: whether the numbers are truth values. Their texts are False and True.
    """

    values: Array
    boolean: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def numbers(self, missing: Missing) -> Array | None:
        return self.values if self.boolean else missing.marked(self.values)

    def texts(self) -> Texts:
        levels, codes = np.unique(self.values, return_inverse=True)
        codes = np.where(np.isnan(self.values), -1, codes)
        texts = [str(bool(v)) if self.boolean else name_of(v) for v in levels.tolist() if v == v]
        return Texts(tuple(texts), codes.astype(np.int64), ordered=True)

    def strings(self) -> list[str]:
        if self.boolean:
            return [str(bool(v)) if v == v else "" for v in self.values.tolist()]
        return [name_of(v) if v == v else "" for v in self.values.tolist()]

    def days(self) -> Array | None:
        return None


@dataclass(frozen=True, eq=False)
class LevelCells:
    """Cells of a column of texts in a frame."""

    found: Texts

    def __len__(self) -> int:
        return len(self.found.codes)

    def numbers(self, missing: Missing) -> Array | None:
        return None

    def texts(self) -> Texts:
        return self.found

    def strings(self) -> list[str]:
        table = [*self.found.levels, ""]
        return [table[code] for code in self.found.codes.tolist()]

    def days(self) -> Array | None:
        return None


@dataclass(frozen=True, eq=False)
class DayCells:
    """Cells of a column of dates in a frame: days since 1970-01-01, float64 with NaN for missing."""

    values: Array

    def __len__(self) -> int:
        return len(self.values)

    def numbers(self, missing: Missing) -> Array | None:
        return None

    @cached_property
    def _texts(self) -> list[str | None]:
        return [None if day != day else date_text(day) for day in self.values.tolist()]

    def texts(self) -> Texts:
        return coded(self._texts)

    def strings(self) -> list[str]:
        return [text or "" for text in self._texts]

    def days(self) -> Array | None:
        return self.values


@dataclass(frozen=True, eq=False)
class NestedCells:
    """Cells of a column of lists or structures, which may be left out but not read.

    Args:
        name: the name of the column.
        type: its type.
        rows: the number of cells.
    """

    name: str
    type: str
    rows: int

    def __len__(self) -> int:
        return self.rows

    def _refused(self) -> UsageError:
        return UsageError(
            f"Column {self.name!r} contains {self.type}.",
            "a number or a text in each cell.",
            "a model reads one number or one level from a cell.",
            Change("drop", self.name),
        )

    def numbers(self, missing: Missing) -> Array | None:
        raise self._refused()

    def texts(self) -> Texts:
        raise self._refused()

    def strings(self) -> list[str]:
        raise self._refused()

    def days(self) -> Array | None:
        raise self._refused()


def date_text(day: float) -> str:
    """Format days since 1970-01-01 as an ISO date, with the time of day if it is not midnight.

    Example:
        >>> date_text(19723.0), date_text(0.5)
        ('2024-01-01', '1970-01-01T12:00:00')
    """
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(days=day)
    return moment.date().isoformat() if float(day).is_integer() else moment.isoformat()


def day_of(text: str, format: str | None) -> float | None:
    """Convert a date to days since 1970-01-01, UTC if it has an offset; None if the text is no date of this format.

    Args:
        text: the date.
        format: a format of `strptime`; None: an ISO date, with or without a time.
    Example:
        >>> day_of("2024-01-01", None), day_of("31.12.2023", "%d.%m.%Y"), day_of("soon", None)
        (19723.0, 19722.0, None)
    """
    try:
        iso = format is None
        moment = datetime.datetime.fromisoformat(text) if iso else datetime.datetime.strptime(text, format or "")
    except ValueError:
        return None
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    return (moment - datetime.datetime(1970, 1, 1)) / datetime.timedelta(days=1)


def comma_number(text: str) -> float | None:
    """Read a number with a decimal comma, or an integer; None for every other text.

    Example:
        >>> comma_number("1.234,5"), comma_number("7"), comma_number("1.5")
        (1234.5, 7.0, None)
    """
    if COMMA.fullmatch(text) or INTEGER.fullmatch(text):
        return number(text.replace(".", "").replace(",", "."))
    return None


def plain_numbers(texts: Texts, missing: Missing) -> Array | None:
    """Read a column of numbers with a decimal point, float64 with NaN for missing; None if another text occurs."""
    try:
        return texts.map([math.nan if missing.number(text) else number(text) for text in texts.levels])
    except ValueError:
        return None


def comma_numbers(texts: Texts, missing: Missing) -> Array | None:
    """Read a column of numbers with a decimal comma, float64 with NaN for missing; None if another text occurs."""
    table = [math.nan if missing.number(text) else comma_number(text) for text in texts.levels]
    return None if None in table else texts.map([math.nan if value is None else value for value in table])


def frame_cells(df: Any) -> dict[str, Cells]:
    """Return the columns of an eager frame: pandas, polars, pyarrow, or another that narwhals reads.

    Args:
        df: the frame; an index is ignored.
    Raises:
        UsageError: no frame, or two columns of one name.
    Example:
        >>> import pandas
        >>> frame_cells(pandas.DataFrame({"a": [1, 2], "b": ["x", None]}))["b"].strings()
        ['x', '']
    """
    import narwhals.stable.v2 as narwhals

    names = [str(name) for name in _labels(df)]
    for name in names:
        if names.count(name) > 1:
            raise twice(name)
    try:
        frame = narwhals.from_native(df, eager_only=True)
    except TypeError:
        raise UsageError(
            f"The table is a {type(df).__module__}.{type(df).__name__}.",
            "a frame in memory: pandas, polars or pyarrow; or a dict of columns, or an array.",
            "a lazy frame has no rows yet." if "Lazy" in type(df).__name__ else "",
            "df.collect()" if "Lazy" in type(df).__name__ else "",
        ) from None
    return {name: _series_cells(frame[column], name) for name, column in zip(names, frame.columns, strict=True)}


def _labels(df: Any) -> Iterable[Any]:
    found = getattr(df, "column_names", None)  # pyarrow
    return getattr(df, "columns", ()) if found is None else found


def _series_cells(series: Any, name: str) -> Cells:
    import narwhals.stable.v2 as nw

    dtype = series.dtype
    if dtype == nw.Boolean or dtype.is_numeric():
        if dtype.is_integer() and any(abs(int(end)) >= EXACT for end in (series.min(), series.max()) if not _null(end)):
            return LevelCells(coded([None if _null(value) else str(value) for value in series.to_list()]))
        return NumberCells(_floats(series.cast(nw.Float64)), boolean=dtype == nw.Boolean)
    if dtype in (nw.Date, nw.Datetime):
        return DayCells(_days(series))
    if isinstance(dtype, (nw.List, nw.Struct, nw.Array)):
        return NestedCells(name, str(dtype), len(series))
    found = [None if _null(value) else value for value in series.to_list()]
    nested = next((value for value in found if isinstance(value, (list, tuple, dict, set, np.ndarray))), None)
    if nested is not None:
        return NestedCells(name, f"a {type(nested).__name__} in some cells", len(found))
    if dtype == nw.Enum or (dtype == nw.Categorical and series.implementation.is_pandas_like()):
        known = series.cat.get_categories().to_list()
        texts = coded([None if value is None else name_of(value) for value in found])
        return LevelCells(_in_order(texts, [name_of(level) for level in known]))
    return boxed_cells(found)


def boxed_cells(values: Sequence[Any]) -> Cells:
    """Return the cells of a list of Python objects: numbers, dates, or texts; None is missing.

    Numbers with texts between them, as a sheet with the cell NA has, are read by the rules of a text file.
    """
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, (bool, np.bool_)) for value in there):
        return NumberCells(np.array([np.nan if v is None else float(v) for v in values]), boolean=True)
    whole = [abs(int(value)) for value in there if isinstance(value, (int, np.integer))]
    if max(whole, default=0) >= EXACT:
        return LevelCells(coded([None if value is None else name_of(value) for value in values]))
    if all(isinstance(value, (int, float, np.number)) for value in there):
        return NumberCells(np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64))
    if all(isinstance(value, datetime.date) for value in there):
        days = [None if v is None else day_of(v.isoformat(), None) for v in values]
        return DayCells(np.array([np.nan if day is None else day for day in days]))
    texts = [None if value is None else name_of(value) for value in values]
    if any(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in there):
        return TextCells(["" if text is None else text for text in texts])
    return LevelCells(coded(texts))


def _in_order(texts: Texts, order: Sequence[str]) -> Texts:
    """Return the texts with their levels in an order; levels without a row are left out."""
    place = {level: i for i, level in enumerate(order)}
    sequence = sorted(range(len(texts.levels)), key=lambda i: place.get(texts.levels[i], len(place)))
    rank = np.append(np.argsort(sequence), -1).astype(np.int64)
    return Texts(tuple(texts.levels[i] for i in sequence), rank[texts.codes], ordered=True)


def _null(value: Any) -> bool:
    """Whether a cell is null: None, NaN, or pandas' NA."""
    return (
        value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def _floats(series: Any) -> Array:
    values = series.to_list() if series.null_count() else series.to_numpy()
    return np.array([np.nan if _null(v) else v for v in values] if isinstance(values, list) else values, np.float64)


def _days(series: Any) -> Array:
    days = []
    for value in series.to_list():
        if _null(value):
            days.append(np.nan)
            continue
        day = day_of(value.isoformat(), None)
        days.append(np.nan if day is None else day)
    return np.array(days, dtype=np.float64)


def cells_of(table: Any) -> dict[str, Cells]:
    """Return the columns of a frame or of a dict of columns.

    Args:
        table: an eager frame, or a dict from names to columns of equal length: lists or arrays.
    Raises:
        UsageError: columns of different lengths, or another type.
    Example:
        >>> cells_of({"a": [1, 2.5]})["a"].numbers(Missing()).tolist()
        [1.0, 2.5]
    """
    if not isinstance(table, Mapping):
        return frame_cells(table)
    out: dict[str, Cells] = {}
    for name, column in table.items():
        array = np.asarray(column) if not isinstance(column, (list, tuple)) else np.array(column, dtype=object)
        if array.ndim != 1:
            raise UsageError(f"Column {name!r} has shape {array.shape}.", "one value for each row.")
        if array.dtype.kind in "bf" or (array.dtype.kind in "iu" and not (np.abs(array.astype(float)) >= EXACT).any()):
            out[str(name)] = NumberCells(array.astype(np.float64), boolean=array.dtype.kind == "b")
        else:
            out[str(name)] = boxed_cells([None if _null(v) else v for v in array.tolist()])
    lengths = {len(cells) for cells in out.values()}
    if len(lengths) > 1:
        raise UsageError(f"The columns have {', '.join(map(str, sorted(lengths)))} rows.", "columns of equal length.")
    return out


def twice(name: str) -> UsageError:
    """Build the error for two columns of one name."""
    return UsageError(f"Two columns are called {name!r}.", "a different name for each column.")
