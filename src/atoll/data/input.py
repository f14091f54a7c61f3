"""The input of a model: the map from a user's row to the tensor, and from the model's output to the user's words.

    values = input.values(columns)        columns by name → float64 [rows, columns]: numbers and codes of levels
    x = input.expand(values)              a level becomes one column of 0 and 1 → [rows, features]
    x = input.standardize(x)              x ← (fill(x) − centre) / spread
    words = input.words(output)           names of classes, or numbers in the target's units

Training, prediction, evaluation and export use these steps. An input is data, never code. It is written to `input.json`
in the run folder, and decoded with caps on its size.

Tests: tests/data/test_input.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.data.cells import (
    EXACT,
    GROUPED,
    POINTS,
    Cells,
    Missing,
    NumberCells,
    Texts,
    cells_of,
    comma_number,
    comma_numbers,
    day_of,
    is_number,
    name_of,
    number,
    plain_numbers,
)
from atoll.data.rows import IGNORED, Array, numbers
from atoll.data.scale import standardize

FORMAT = 1
LARGEST_FILE = 64 * 2**20
LARGEST_ROW = 2**24
OTHER = "other"
ABSENT = "?"

Floats = tuple[float, ...]


class NumberColumn(msgspec.Struct, frozen=True, tag="number", tag_field="kind", forbid_unknown_fields=True):
    """A column of numbers.

    Args:
        name: the name of the column.
        fill: replaces a missing number.
        centre, spread: x ← (x − centre) / spread; spread > 0.
    """

    name: str
    fill: float = 0.0
    centre: float = 0.0
    spread: float = 1.0


class TextColumn(msgspec.Struct, frozen=True, tag="text", tag_field="kind", forbid_unknown_fields=True):
    """A column of texts. Each level becomes one column of 0 and 1; all of them are 0 for an unknown text.

    Args:
        name: the name of the column.
        levels: the levels in order. The level "?" is that of a missing text.
        centre, spread: of the column of each level; empty: 0 and 1.
        other: whether the last level collects all texts that are no level.
    """

    name: str
    levels: tuple[str, ...]
    centre: Floats = ()
    spread: Floats = ()
    other: bool = False


class DateColumn(msgspec.Struct, frozen=True, tag="date", tag_field="kind", forbid_unknown_fields=True):
    """A column of dates, read as days since 1970-01-01.

    Args:
        name: the name of the column.
        format: a format of `strptime`; empty: ISO dates.
        fill, centre, spread: as for a number.
    """

    name: str
    format: str = ""
    fill: float = 0.0
    centre: float = 0.0
    spread: float = 1.0


Column = NumberColumn | TextColumn | DateColumn


class Statistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers to fill, centre and scale all features, each one for each feature in the order of the tensor."""

    fill: Floats
    centre: Floats
    spread: Floats


class InputTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The target of a model.

    Args:
        kind: "classification", "regression", "tokens", or "labels".
        names: the columns of the target.
        classes: the names of the classes in the order of the model's outputs; None if there are none.
        positive: the positive class of two; None: the last.
        centre, spread: of each number to predict: y ← (y − centre) / spread; empty: 0 and 1.
    """

    kind: str
    names: tuple[str, ...] = ("y",)
    classes: tuple[str, ...] | None = None
    positive: str | None = None
    centre: Floats = ()
    spread: Floats = ()


class Values(NamedTuple):
    """The cells of a table as numbers.

    Args:
        numbers: float64 `[rows, columns]`: numbers with NaN for missing, and codes of levels, −1 for an unknown text.
        unknown: the number of rows of each unknown text, by column and text.
    """

    numbers: Array
    unknown: dict[tuple[str, str], int]


class Input(msgspec.Struct, frozen=True, kw_only=True, dict=True, forbid_unknown_fields=True):
    """The map from a user's row to the tensor, and from the model's output to the user's words.

    Args:
        target: names, classes and scale of the target.
        features: the shape of one row of the tensor.
        outputs: the number of outputs of the model for one row, or for one position of a sequence.
        columns: the columns of a table in order; empty for arrays.
        statistics: fill, centre and spread of an array that is scaled; None: it is not scaled.
        clients: statistics by the client's name, if each client is scaled by its own rows; they replace all others.
        by: the column that names the client of a row; None: there is none.
        dtype: the dtype of the tensor, "float32" or "float64".
        intensities: whether uint8 features are divided by 255.
        tokens: the number of tokens, if rows contain token ids; None: rows contain numbers.
        missing: "mean" fills a missing number, "drop" refuses its row.
        na: the texts of missing values; None: the default texts of `atoll.data.cells`.
        format: the version of this format.
        fields: name, dtype and shape of each tensor of a row, if a row is a dict of tensors.
    Raises:
        UsageError: the fields contradict each other.
    Example:
        >>> it = Input(
        ...     target=InputTarget("classification", classes=("no", "yes")), features=(3,), outputs=2,
        ...     columns=(NumberColumn("age", 50.0, 50.0, 10.0), TextColumn("sex", ("f", "m"))),
        ... )
        >>> it.prepare({"age": [60, None], "sex": ["m", "x"]})
        tensor([[1., 0., 1.],
                [0., 0., 0.]])
        >>> it.words(torch.tensor([[0.5, -0.5]])).tolist()
        ['no']
    """

    target: InputTarget
    features: tuple[int, ...]
    outputs: int
    columns: tuple[Column, ...] = ()
    statistics: Statistics | None = None
    clients: dict[str, Statistics] = {}
    by: str | None = None
    dtype: str = "float32"
    intensities: bool = False
    tokens: int | None = None
    missing: str = "mean"
    na: tuple[str, ...] | None = None
    format: int = FORMAT
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = _contradiction(self)
        if wrong:
            raise UsageError(f"The input is not valid: {wrong}.", "an input that `atoll run` wrote.")

    # names and sizes, as `atoll.models.Sized` reads them

    @property
    def kind(self) -> str:
        """The kind of task."""
        return self.target.kind

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes."""
        return self.target.classes

    @property
    def vocab(self) -> int | None:
        """The number of tokens."""
        return self.tokens

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features of a table: a column, or `column=level`."""
        each = (
            [f"{column.name}={level}" for level in column.levels] if isinstance(column, TextColumn) else [column.name]
            for column in self.columns
        )
        return tuple(name for names in each for name in names)

    @property
    def positive(self) -> str | None:
        """The positive class of two classes."""
        classes = self.target.classes
        return None if classes is None or len(classes) != 2 else self.target.positive or classes[-1]

    # rows to tensors

    def values(self, table: Mapping[str, Cells], first: int = 0) -> Values:
        """Convert the cells of a table to numbers. Columns are matched by name; other columns are ignored.

        Args:
            table: the cells by column.
            first: the number of the first row, for errors.
        Raises:
            UsageError: a column is missing, or a cell has another type than in training.
        """
        absent = [column.name for column in self.columns if column.name not in table]
        if absent:
            raise UsageError(
                f"The data have no column {', '.join(map(repr, absent))}.",
                f"the columns {', '.join(column.name for column in self.columns)}, in any order.",
                "the model was trained with them.",
            )
        rows = len(table[self.columns[0].name]) if self.columns else 0
        out = np.empty((rows, len(self.columns)))
        unknown: dict[tuple[str, str], int] = {}
        for place, column in enumerate(self.columns):
            cells = table[column.name]
            match column:
                case NumberColumn():
                    out[:, place] = self._numbers(column, cells, first)
                case DateColumn():
                    out[:, place] = self._days(column, cells, first)
                case TextColumn():
                    out[:, place], new = self._codes(column, cells.texts())
                    unknown |= {(column.name, text): count for text, count in new.items()}
        self._refuse_incomplete(out, first)
        return Values(out, unknown)

    def _refuse_incomplete(self, values: Array, first: int) -> None:
        if self.missing != "drop" or not np.isnan(values).any():
            return
        row, place = (int(i) for i in np.argwhere(np.isnan(values))[0])
        raise UsageError(
            f"Row {first + row} has no value in column {self.columns[place].name!r}.",
            "a value in every column of the model.",
            'the run was trained with missing="drop", so the model has no number to fill in.',
        )

    def _numbers(self, column: NumberColumn, cells: Cells, first: int) -> Array:
        name = column.name
        found = cells.numbers(Missing(self.na))
        if found is None and not len(cells):
            found = np.zeros(0)
        if found is None:
            texts = cells.texts()
            missing = Missing(self.na)
            values = plain_numbers(texts, missing)
            values = comma_numbers(texts, missing) if values is None else values
            if values is None:
                raise self._other_type(name, texts, first, "a number", _in_some_form)
            self._refuse_commas(column, texts, first)
            found = values
        elif not isinstance(cells, NumberCells):
            self._refuse_points(column, cells, found, first)
        if np.isinf(found).any():
            row = int(np.isinf(found).argmax())
            raise UsageError(
                f"Column {name!r} contains {found[row]} at row {first + row}.",
                "finite numbers.",
                "it has no prediction.",
            )
        return found

    def _usual(self, column: NumberColumn) -> tuple[float, float]:
        """The mean and the spread of a column over the train rows; if each client has its own, their means."""
        if not self.clients:
            return column.fill, column.spread
        place = self.names.index(column.name) if column.name in self.names else None
        if place is None:  # the target
            return column.fill, column.spread
        each = list(self.clients.values())
        return sum(s.fill[place] for s in each) / len(each), sum(s.spread[place] for s in each) / len(each)

    def _refuse_commas(self, column: NumberColumn, texts: Texts, first: int) -> None:
        """Refuse a comma before three digits if the number without it is nearer to the mean of the train rows."""
        mean, _ = self._usual(column)
        for code, text in enumerate(texts.levels):
            value = number(text.replace(",", "")) if GROUPED.fullmatch(text) else math.nan
            if abs(value - mean) < abs(value / 1000 - mean):
                raise _thousands(column.name, text, first + texts.first(code), mean)

    def _refuse_points(self, column: NumberColumn, cells: Cells, found: Array, first: int) -> None:
        """Refuse points before three digits if the numbers are far from the train rows, and without points are not."""
        mean, spread = self._usual(column)
        far = (np.abs(found - mean) > 3 * spread) & (np.abs(1000 * found - mean) <= 3 * spread)
        if not far.any():
            return
        texts = cells.texts()
        codes = np.unique(texts.codes[far]).tolist()
        if all(POINTS.fullmatch(texts.levels[code]) for code in codes):
            row = int(far.argmax())
            raise _thousands(column.name, texts.levels[texts.codes[row]], first + row, mean)

    def _other_type(self, name: str, texts: Texts, first: int, required: str, fits: Any) -> UsageError:
        missing = Missing(self.na)
        for code, text in enumerate(texts.levels):
            if not missing.number(text) and not fits(text):
                row = first + texts.first(code)
                return UsageError(
                    f"Column {name!r} contains {text!r} at row {row}.",
                    f"{required}, as in training.",
                    "the model has one feature for this column.",
                )
        return UsageError(f"Column {name!r} mixes two forms of numbers.", f"{required}, as in training.")

    def _days(self, column: DateColumn, cells: Cells, first: int) -> Array:
        days = cells.days()
        if days is not None:
            return days
        texts = cells.texts()
        missing = Missing(self.na)
        table = [math.nan if missing.number(text) else day_of(text, column.format or None) for text in texts.levels]
        if None in table:
            form = column.format or "ISO, such as 2024-01-31"
            fits = lambda text: day_of(text, column.format or None) is not None  # noqa: E731
            raise self._other_type(column.name, texts, first, f"a date ({form})", fits)
        return texts.map([math.nan if day is None else day for day in table])

    def _codes(self, column: TextColumn, texts: Texts) -> tuple[Array, dict[str, int]]:
        """Return the code of each cell, −1 for an unknown text, and the count of each unknown text."""
        place = {level: code for code, level in enumerate(column.levels)}
        last = len(column.levels) - 1 if column.other else -1
        missing = Missing(self.na)
        wanted = [ABSENT if missing.text(text) else text for text in texts.levels]
        null = math.nan if self.missing == "drop" else place.get(ABSENT, last)
        codes = [null if text == ABSENT else place.get(text, last) for text in wanted]
        unknown: dict[str, int] = {}
        for text, code, count in zip(wanted, codes, texts.counts.tolist(), strict=True):
            if code < 0 and count:
                unknown[text] = unknown.get(text, 0) + count
        nulls = int((texts.codes < 0).sum())
        if nulls and null < 0:
            unknown[ABSENT] = unknown.get(ABSENT, 0) + nulls
        return np.append(np.array(codes, dtype=np.float64), null)[texts.codes], unknown

    def expand(self, values: Tensor) -> Tensor:
        """Expand the codes of levels: one column of 0 and 1 for each level. Numbers are unchanged.

        Args:
            values: float64 `[rows, columns]`, as `values` returns them.
        Returns:
            float64 `[rows, features]`.
        """
        if not any(isinstance(column, TextColumn) for column in self.columns):
            return values
        parts = []
        for place, column in enumerate(self.columns):
            one = values[:, place : place + 1]
            if isinstance(column, TextColumn):
                levels = torch.arange(len(column.levels), dtype=values.dtype)
                one = (one == levels).to(values.dtype)
            parts.append(one)
        return torch.cat(parts, 1)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Fill, centre and spread of all clients, float64 `[clients, *features]`; of one client without `clients`."""
        if self.clients:
            return self._stack(list(self.clients.values()))
        if self.statistics is not None:
            return self._stack([self.statistics])
        if not self.columns:
            return None
        fill: list[float] = []
        centre: list[float] = []
        spread: list[float] = []
        for column in self.columns:
            if isinstance(column, TextColumn):
                width = len(column.levels)
                fill += [0.0] * width
                centre += column.centre or (0.0,) * width
                spread += column.spread or (1.0,) * width
            else:
                fill.append(column.fill)
                centre.append(column.centre)
                spread.append(column.spread)
        return self._stack([Statistics(tuple(fill), tuple(centre), tuple(spread))])

    def _stack(self, each: Sequence[Statistics]) -> tuple[Tensor, Tensor, Tensor]:
        fill, centre, spread = (
            torch.tensor([getattr(one, name) for one in each], dtype=torch.float64).reshape(-1, *self.features)
            for name in ("fill", "centre", "spread")
        )
        return fill, centre, spread

    def fitted(self, statistics: Statistics) -> Input:
        """Return the input with these statistics: in the columns of a table, or of the whole array."""
        if not self.columns:
            return structs.replace(self, statistics=statistics)
        fill, centre, spread = (list(values) for values in (statistics.fill, statistics.centre, statistics.spread))
        columns: list[Column] = []
        place = 0
        for column in self.columns:
            end = place + (len(column.levels) if isinstance(column, TextColumn) else 1)
            if isinstance(column, TextColumn):
                columns.append(
                    structs.replace(column, centre=tuple(centre[place:end]), spread=tuple(spread[place:end]))
                )
            else:
                columns.append(structs.replace(column, fill=fill[place], centre=centre[place], spread=spread[place]))
            place = end
        return structs.replace(self, columns=tuple(columns))

    def standardize(self, x: Tensor, clients: Sequence[str] | None = None) -> Tensor:
        """Fill missing numbers and scale features, in the dtype of `x`.

        Args:
            x: floats `[rows, *features]`.
            clients: the client of each row; required if each client is scaled by its own rows.
        Raises:
            UsageError: a client is unknown.
        """
        tables = self.tables
        if tables is None or not x.is_floating_point():
            return x
        if not self.clients:
            return standardize(x, *(table[0] for table in tables))
        return standardize(x, *(table[self._places(clients)] for table in tables))

    def _places(self, clients: Sequence[str] | None) -> Tensor:
        known = {name: place for place, name in enumerate(self.clients)}
        column = f"the column {self.by!r}" if self.by else "`clients=`, a name for each row"
        if clients is None:
            raise UsageError(
                "The data do not name the client of each row.", f"{column}.", "each client has its own statistics."
            )
        new = [name for name in dict.fromkeys(clients) if name not in known]
        if new:
            raise UsageError(
                f"The client {new[0]!r} is unknown.",
                f"one of {', '.join(known)}.",
                'the run was trained with scale="client", and a client without train rows has no statistics.',
            )
        return torch.tensor([known[name] for name in clients], dtype=torch.int64)

    def tensor(self, values: Array, clients: Sequence[str] | None = None) -> Tensor:
        """Convert values of a table, float64 `[rows, columns]`, to the tensor of the model in the run's dtype."""
        return self.standardize(self.expand(torch.from_numpy(values)), clients).to(_DTYPES[self.dtype])

    def prepare(self, table: Mapping[str, Any], clients: Sequence[str] | None = None) -> Tensor:
        """Convert a dict of columns to the tensor of the model, `[rows, *features]`."""
        return self.tensor(self.values(cells_of(table)).numbers, clients)

    def array(self, x: Tensor, clients: Sequence[str] | None = None) -> Tensor:
        """Convert an array of rows to the tensor of the model.

        Args:
            x: `[rows, *features]`: floats, uint8, or token ids, as in training.
        Raises:
            UsageError: another shape, or NaN.
        """
        self.refuse_fields("a predictor reads tables and single arrays.")
        if tuple(x.shape[1:]) != self.features:
            raise UsageError(f"The rows have shape {tuple(x.shape[1:])}.", f"{self.features}, the shape in training.")
        if self.tokens is not None:
            return x.long()
        x = numbers(x) if self.intensities or x.dtype != torch.uint8 else x.float()
        x = x if x.is_floating_point() else x.float()
        x = self.standardize(x, clients)
        if not bool(torch.isfinite(x).all()):
            row = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise UsageError(f"Row {row} contains NaN or infinity.", "finite numbers.", "it has no prediction.")
        return x.to(_DTYPES[self.dtype])

    # targets and outputs

    def refuse_fields(self, why: str) -> None:
        """Refuse rows of several tensors.

        Args:
            why: the reason of the caller.
        """
        if self.fields:
            raise UsageError(
                f"A row of this run has several tensors: {', '.join(self.fields)}.",
                "a call of the model itself.",
                why,
                Line(python="run.model(**tensors)"),
            )

    def scaled_target(self, y: Tensor) -> Tensor:
        """Convert numbers in the target's units to the units of the loss: (y − centre) / spread."""
        if not self.target.spread:
            return y
        centre, spread = (torch.tensor(v, dtype=y.dtype, device=y.device) for v in self._target_tables)
        return (y - centre) / spread

    def in_units(self, y: Tensor) -> Tensor:
        """Convert numbers in the units of the loss to the target's units: y · spread + centre."""
        if not self.target.spread:
            return y
        centre, spread = (torch.tensor(v, dtype=y.dtype, device=y.device) for v in self._target_tables)
        return y * spread + centre

    @property
    def _target_tables(self) -> tuple[Any, Any]:
        one = len(self.target.spread) == 1
        return (self.target.centre[0], self.target.spread[0]) if one else (self.target.centre, self.target.spread)

    def targets(self, cells: Cells) -> Tensor:
        """Convert the cells of the target: classes by name, or numbers.

        Args:
            cells: the cells of one target.
        Returns:
            Codes of classes, −1 for a class unseen in training and −2 for a missing target; numbers in the target's
            units, with NaN for a missing target; or a label 0 or 1, −100 if it is missing.
        Raises:
            UsageError: a cell is no number, if the model predicts numbers, or no label.
        """
        if self.target.kind == "labels":
            return torch.from_numpy(yes_or_no(self.target.names[0], cells)).nan_to_num(IGNORED).long()
        if self.target.classes is None:
            mean = self.target.centre[0] if len(self.target.centre) == 1 else 0.0
            spread = self.target.spread[0] if len(self.target.spread) == 1 else 1.0
            column = NumberColumn(self.target.names[0], fill=mean, spread=spread)
            return torch.from_numpy(self._numbers(column, cells, 0))
        place = {level: code for code, level in enumerate(self.target.classes)}
        texts = cells.texts()
        codes = np.array([*(self._class_of(text, place) for text in texts.levels), -2], dtype=np.int64)
        return torch.from_numpy(codes[texts.codes])

    def _class_of(self, text: str, place: Mapping[str, int]) -> int:
        """The code of a class. Numbers are compared by value: the cell 1.0 is class 1."""
        if text in place:
            return place[text]
        exact = is_number(text) and not abs(number(text)) >= EXACT
        value = name_of(number(text)) if exact else text
        if value in place:
            return place[value]
        return -2 if Missing(self.na).text(text) or value == "nan" else -1

    def probabilities(self, output: Tensor) -> Tensor:
        """Compute the probability of each class from logits: `[rows, classes]` in float64, which sum to 1.

        Args:
            output: logits `[rows, classes]`, or `[rows, 1]` of the second of two classes.
        Returns:
            The probabilities; of several labels for each row the probability of each label 1, `[rows, labels]`.
        Raises:
            UsageError: the model predicts numbers.
        """
        if self.target.kind == "labels":
            return output.double().reshape(output.shape[0], -1).sigmoid()
        if self.target.kind == "regression":
            raise UsageError("The model predicts numbers.", "a model of classes.", "a number has no probability.")
        logits = output.double()
        if self.target.classes is not None and len(self.target.classes) == 2 and output.shape[-1] == 1:
            logits = torch.cat((torch.zeros_like(logits), logits), -1)
        return torch.softmax(logits, -1)

    def words(self, output: Tensor) -> Array:
        """Convert outputs to predictions: names of classes `[rows]`, or numbers in the target's units.

        Args:
            output: the output of the model, `[rows, outputs]`.
        Returns:
            One prediction for each row; of several numbers or labels `[rows, targets]`.
        """
        if self.target.kind == "labels":
            labels: Array = (output.reshape(len(output), -1) > 0).long().numpy()
            return labels
        if self.target.kind == "regression":
            values = self.in_units(output.double().reshape(len(output), -1)).numpy()
            return values[:, 0] if values.shape[1] == 1 else values
        codes = (output.squeeze(-1) > 0).long() if output.shape[-1] == 1 else output.argmax(-1)
        places: Array = codes.numpy()
        return places if self.target.classes is None else np.array(self.target.classes, dtype=object)[places]

    # files

    def encode(self) -> bytes:
        """Write the input as JSON. Equal inputs give equal bytes."""
        made = msgspec.to_builtins(self)
        if not self.fields:  # bytes of inputs of before
            del made["fields"]
        return msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"

    @classmethod
    def decode(cls, data: bytes, place: str = "input.json") -> Input:
        """Read an input from JSON.

        Args:
            data: the bytes of the file.
            place: the file, for errors.
        Raises:
            UsageError: the bytes are too long, are no input, or have another format.
        """
        if len(data) > LARGEST_FILE:
            raise UsageError(f"{place} has {len(data):,} bytes.", f"at most {LARGEST_FILE:,} bytes.")
        try:
            version = msgspec.json.decode(data, type=_Version).format
            if version != FORMAT:
                raise UsageError(
                    f"{place} has format {version}.", f"format {FORMAT}.", "another version of atoll wrote it."
                )
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UsageError(f"{place} is damaged: {error}.", "the bytes that atoll wrote.") from None

    @classmethod
    def read(cls, path: str | Path) -> Input:
        """Read an input from a file, or from the folder of a run.

        Raises:
            UsageError: there is no such file, or it is damaged.
        """
        file = Path(path)
        file = file / "input.json" if file.is_dir() else file
        try:
            if file.stat().st_size > LARGEST_FILE:
                raise UsageError(f"{file} has {file.stat().st_size:,} bytes.", f"at most {LARGEST_FILE:,} bytes.")
            return cls.decode(file.read_bytes(), str(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}.", "the input.json of a run.") from None


class _Version(msgspec.Struct):
    format: int


_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def yes_or_no(name: str, cells: Cells) -> Array:
    """Convert the cells of a label: 0 or 1, false or true; NaN for a missing label, float64 `[rows]`.

    Args:
        name: the column.
        cells: its cells.
    Raises:
        UsageError: another text.
    Example:
        >>> yes_or_no("ill", cells_of({"ill": ["true", "0", ""]})["ill"]).tolist()
        [1.0, 0.0, nan]
    """
    found = cells.numbers(Missing())
    if found is not None:
        return found
    texts = cells.texts()
    known = {"false": 0.0, "true": 1.0, "0": 0.0, "1": 1.0}
    for code, text in enumerate(texts.levels):
        if text.lower() not in known and not Missing().number(text) and texts.counts[code]:
            raise UsageError(
                f"Column {name!r} contains {text!r} at row {texts.first(code)}.",
                "0 or 1, or false or true, in each label.",
                "a label is an answer of yes or no.",
            )
    return texts.map([known.get(text.lower(), math.nan) for text in texts.levels])


def _thousands(name: str, text: str, row: int, mean: float) -> UsageError:
    return UsageError(
        f"Column {name!r} contains {text!r} at row {row}.",
        "numbers without a mark between thousands.",
        f"the mean of the train rows is {mean:.6g}, so the mark seems to separate thousands.",
    )


def _in_some_form(text: str) -> bool:
    return is_number(text) or comma_number(text) is not None


def first_difference(one: Input, other: Input) -> str:
    """Describe the first difference of two inputs; empty if they are equal, apart from the dtype.

    Args:
        one: the input at hand.
        other: the required input.
    Example:
        >>> target = InputTarget("regression")
        >>> a, b = (Input(target=target, features=(1,), outputs=1, columns=(NumberColumn("a", c),)) for c in (0.0, 2.0))
        >>> first_difference(a, b)
        "column 'a': fill 0.0, and not 2.0"
    """
    for place, (a, b) in enumerate(zip(one.columns, other.columns, strict=False)):
        if a != b:
            return _column_difference(a, b, place)
    if len(one.columns) != len(other.columns):
        longer, more = (one, "more") if len(one.columns) > len(other.columns) else (other, "less")
        column = longer.columns[min(len(one.columns), len(other.columns))]
        return f"column {column.name!r} is one {more}"
    for name in one.target.__struct_fields__:
        a, b = getattr(one.target, name), getattr(other.target, name)
        if a != b:
            return f"the target: {name} {_short(a)}, and not {_short(b)}"
    for name in ("features", "outputs", "statistics", "by", "intensities", "tokens", "missing", "na"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            return f"{name}: {_short(a)}, and not {_short(b)}"
    if one.clients != other.clients:
        names = [n for n in {**one.clients, **other.clients} if one.clients.get(n) != other.clients.get(n)]
        return f"the statistics of client {names[0]!r}" if names else "the order of the clients"
    return ""


def _column_difference(a: Column, b: Column, place: int) -> str:
    if a.name != b.name:
        return f"column {place + 1} is {a.name!r}, and not {b.name!r}"
    if type(a) is not type(b):
        kinds = [type(column).__struct_config__.tag for column in (a, b)]
        return f"column {a.name!r} contains a {kinds[0]}, and not a {kinds[1]}"
    for name in a.__struct_fields__:
        if getattr(a, name) != getattr(b, name):
            return f"column {a.name!r}: {name} {_short(getattr(a, name))}, and not {_short(getattr(b, name))}"
    return f"column {a.name!r}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _contradiction(it: Input) -> str:
    """The first contradiction between the fields; empty if there is none."""
    names = [column.name for column in it.columns]
    if len(set(names)) < len(names):
        return "two columns have one name"
    size = math.prod(it.features)
    if size > LARGEST_ROW or any(n < 1 for n in it.features) or not 1 <= it.outputs <= LARGEST_ROW:
        return f"a row of shape {it.features} with {it.outputs} outputs"
    if it.columns and it.features != (len(it.names),):
        return f"{len(it.names)} features of the columns, and rows of shape {it.features}"
    if it.dtype not in _DTYPES or it.missing not in ("mean", "drop"):
        return f"dtype {it.dtype!r}, missing {it.missing!r}"
    for name, one in ((None, it.statistics), *it.clients.items()):
        if one is not None and {len(one.fill), len(one.centre), len(one.spread)} != {size}:
            return f"statistics of {'all rows' if name is None else repr(name)} for another number of features"
    spreads = [*it.target.spread, *(s for one in it.clients.values() for s in one.spread)]
    spreads += it.statistics.spread if it.statistics is not None else ()
    for column in it.columns:
        if isinstance(column, TextColumn):
            if len(set(column.levels)) < len(column.levels) or not column.levels:
                return f"the levels of column {column.name!r}"
            if {len(column.centre), len(column.spread)} - {0, len(column.levels)}:
                return f"the statistics of column {column.name!r} for another number of levels"
            spreads += column.spread
        else:
            spreads.append(column.spread)
    if any(not (math.isfinite(s) and s > 0) for s in spreads):
        return "a spread that is not above 0"
    classes = it.target.classes
    if classes is not None and (len(set(classes)) < len(classes) or not classes):
        return "two classes have one name"
    if it.target.positive is not None and it.target.positive not in (classes or ()):
        return f"the positive class {it.target.positive!r} is no class"
    if len(it.target.centre) != len(it.target.spread):
        return "the scale of the target"
    return ""
