"""Tables: CSV, Parquet and Excel files, and data frames.

Columns of numbers are unchanged. A column of texts becomes one column per level. Notes report all guesses, and one
error lists all columns that cannot be used.

Tests: tests/data/test_tabular.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Change, Line, Load, Split, Write, literal
from atoll.base.names import with_noun
from atoll.base.random import Key, user_scope
from atoll.base.validation import check_arguments
from atoll.data.arrays import TASKS, distinct, fixed_classes, several_labels
from atoll.data.cells import (
    NUMBER_NA,
    Cells,
    LevelCells,
    Missing,
    NumberCells,
    Texts,
    cells_of,
    code_of,
    coded,
    comma_number,
    frame_cells,
    is_number,
    loses_digits,
)
from atoll.data.columns import Rules, Typed, absent, feature, numbers_in_texts, picked, thousands_points, typed
from atoll.data.files import CellTable, read_table
from atoll.data.input import OTHER, Column, Input, InputTarget, TextColumn, yes_or_no
from atoll.data.rows import Array, ArrayRows
from atoll.data.sources import SCALES, TARGET_SCALES, Source

WHOLE_CLASSES = 20
Names = str | Sequence[str] | None
Door = Callable[[Mapping[str, Any]], Write]  # the line of the call that the user made, with these options
_SEVERAL = ("target", "columns", "drop", "keep", "na", "classes")
_CHOICES = {
    "task": ("task", TASKS),
    "missing": ("way with missing values", ("mean", "drop")),
    "decimal": ("decimal mark", (",", ".")),
    "scale": ("scale", SCALES),
    "scale_target": ("scale of the target", TARGET_SCALES),
}


class TableOptions(TypedDict, total=False):
    """The options of a table: arguments of `csv`, `frame` and `load`, and flags of `atoll run`."""

    target: Names
    by: str | None
    task: str | None
    missing: str | None
    scale: str | None
    columns: Names
    drop: Names
    keep: Names
    na: Names
    decimal: str | None
    dates: str | None
    max_levels: int | str | None
    classes: Names
    positive: str | None
    scale_target: str | None


@dataclass(frozen=True)
class Options:
    """The options of a table, checked.

    Args:
        target: the column or columns to predict; None: the last one.
        by: the column that names the client of each row; None: no natural clients.
        task: "classification", "regression", or "labels", several targets of 0 and 1; None: guessed from the target.
        missing: "mean" fills a missing number with the mean of the train rows, "drop" drops these rows; None: "mean".
        scale: "standard" (mean 0 and standard deviation 1 over the train rows), "client", or "none"; None: "standard".
        columns: the features; None: all other columns.
        drop: columns that are no features.
        keep: columns that are no features and that rules of held-out rows read, such as the patient.
        na: the texts of missing values. None: an empty cell or one of ? NA N/A NaN null None in a column of numbers; an
            empty cell or ? in a column of texts.
        decimal: "," or "." for the decimal mark; None: a comma is recognized if cells do not end at commas.
        dates: "drop" leaves columns of dates out; a format such as "%d.%m.%Y"; None: ISO dates.
        max_levels: the largest number of levels of a column of texts, 100 by default. "20,other" keeps the 20 most
            frequent levels, and collects the others in one.
        classes: the classes in order; None: the distinct values of the target.
        positive: the positive class of two; None: the last.
        scale_target: "standard" scales a number to predict for the loss, "none" does not; None: "standard" for one
            target, "none" for several.
    """

    target: Names = None
    by: str | None = None
    task: str | None = None
    missing: str | None = None
    scale: str | None = None
    columns: Names = None
    drop: Names = None
    keep: Names = None
    na: Names = None
    decimal: str | None = None
    dates: str | None = None
    max_levels: int | str | None = None
    classes: Names = None
    positive: str | None = None
    scale_target: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            right = value is None or isinstance(value, str)
            if f.name in _SEVERAL and isinstance(value, (list, tuple)):
                right = all(isinstance(each, str) for each in value)
            if f.name == "max_levels" and isinstance(value, int) and not isinstance(value, bool):
                right = True
            if not right:
                several = " or a list of texts" if f.name in _SEVERAL else ""
                raise UsageError(f"{f.name} = {value!r:.80}.", f"a text{several}.")
        for name, (word, known) in _CHOICES.items():
            if getattr(self, name) not in (None, *known):
                raise unknown_name(word, str(getattr(self, name)), known, partial(Change, name))
        self.levels  # noqa: B018  refuses a wrong number

    @classmethod
    def of(cls, options: Mapping[str, Any], *arguments: str) -> Options:
        """Build options from keyword arguments; an unknown name is refused.

        Args:
            options: the options.
            arguments: the function, and its other arguments, for the error.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                function, *others = arguments
                raise UsageError(
                    f"{function}(): got an unexpected keyword argument {name!r}.",
                    f"the arguments {', '.join(others)}, and the options {', '.join(known)}.",
                )
        return cls(**options)

    @property
    def levels(self) -> tuple[int, bool]:
        """The largest number of levels, and whether the others are collected."""
        number, _, rest = str(100 if self.max_levels is None else self.max_levels).partition(",")
        if not number.strip().isdigit() or int(number) < 1 or rest.strip() not in ("", OTHER):
            raise UsageError(
                f"max_levels = {self.max_levels!r}.",
                'a number ≥ 1, or such as "20,other".',
                write=Change("max_levels", "100"),
            )
        return int(number), bool(rest)

    def rules(self, mark: str) -> Rules:
        """The rules for columns."""
        na = None if self.na is None else tuple(name_list(self.na))
        largest, other = self.levels
        return Rules(Missing(na), self.decimal, mark == ",", mark not in ("", ","), self.dates, largest, other)

    def changed(self, **changes: Any) -> dict[str, Any]:
        """The options that were given, with some changes; lists are extended."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name, value in changes.items():
            old = name_list(given[name]) if name in given and name in ("drop", "na") else []
            given[name] = ",".join(dict.fromkeys([*old, *name_list(value)])) if name in ("drop", "na") else value
        return {name: value if isinstance(value, (str, int)) else ",".join(value) for name, value in given.items()}


def name_list(value: Names, known: Sequence[str] = ()) -> list[str]:
    """Names from a text with commas or from a sequence."""
    if value is None:
        return []
    if not isinstance(value, str):
        return [str(name) for name in value]
    return [value] if value in known else [name.strip() for name in value.split(",")]


@check_arguments
@user_scope(Key(0).fold("door"))
def csv(
    path: str | Path, *, encoding: str | None = None, sheet: str | None = None, **options: Unpack[TableOptions]
) -> Source:
    """Read a CSV file with a header line; separators are commas, semicolons, tabs or bars; it may be gzipped.

    Parquet and Excel files, a glob such as "part*.csv", and a folder of folders `column=NAME` are read too.

    Args:
        path: the file.
        encoding: the encoding of a text file; None: UTF-8.
        sheet: the sheet of an Excel file; None: the first.
        options: `Options` describes them: target, by, task, missing, scale, columns, drop, na, decimal, dates,
            max_levels, classes, positive, scale_target. With by="@file" each file is a client.
    Returns:
        A source of float64 columns; a column of texts becomes one column per level.
    Raises:
        UsageError: no such file or column, a line of another length, an infinity, or columns that cannot be used.
    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "flats.csv")
        >>> _ = path.write_text("area,city,price\\n60,Oslo,3.5\\n80,Rome,3.0\\n?,Oslo,4.5\\n")
        >>> csv(path).columns
        ('area', 'city=Oslo', 'city=Rome')
    """
    checked = Options.of(options, "csv", "path", "encoding", "sheet")
    about = {name: value for name, value in (("encoding", encoding), ("sheet", sheet)) if value is not None}
    read = read_table(path, lambda header: _wanted(header, checked), encoding or "utf-8", sheet)
    return from_cells(Path(path).name, read, checked, lambda given: Load(str(path), {**given, **about}))


@check_arguments
@user_scope(Key(0).fold("door"))
def frame(df: Any, *, name: str = "frame", **options: Unpack[TableOptions]) -> Source:
    """Build a source from a frame of pandas, polars or pyarrow, as `csv` does, with the dtypes of the columns.

    Args:
        df: the frame; its index is ignored.
        name: name in reports.
        options: as in `csv`.
    Raises:
        UsageError: as in `csv`.
    Example:
        >>> import pandas
        >>> frame(pandas.DataFrame({"a": [1, 2, 3], "ill": ["no", "yes", "no"]}), target="ill")
        Source('frame', classification, rows=3, features=(1,))
    """
    checked = Options.of(options, "frame", "df", "name")
    cells = frame_cells(df)
    wanted = _wanted(list(cells), checked)
    return from_cells(name, CellTable({column: cells[column] for column in wanted}), checked, _call("frame(df"))


def table(name: str, named: Mapping[str, Any], **options: Unpack[TableOptions]) -> Source:
    """Build a source from named columns, each `[rows]`: numbers with NaN for missing, or texts with None.

    Args:
        name: name in reports.
        named: the columns by name.
        options: as in `csv`.
    """
    return from_cells(
        name, CellTable(cells_of(named)), Options.of(options, "table", "name", "named"), _call("table(name, named")
    )


def _call(start: str) -> Door:
    """The line of a call with options."""

    def line(options: Mapping[str, Any]) -> Write:
        words = "".join(f", {name}={literal(value)}" for name, value in options.items())
        return Line(python=f"atoll.data.{start}{words})")

    return line


def _wanted(header: Sequence[str], options: Options) -> list[str]:
    """The columns of a file that are used, in its order.

    Raises:
        UsageError: an unknown column, or a target among the dropped columns.
    """
    drop = name_list(options.drop, header)
    targets = _targets(header, options, drop)
    chosen = name_list(options.columns, header)
    aside = name_list(options.keep, header)
    for name in (*targets, *drop, *chosen, *aside, *([options.by] if options.by else [])):
        if name not in header:
            key = "by" if name == options.by else "target" if name in targets else "drop" if name in drop else "columns"
            key = "keep" if name in aside else key
            given = name_list(getattr(options, key), header)
            error = unknown_name("column", name, header, partial(_with, key, given, name))
            raise error if error.write or key != "by" else _without_column(error)
    for name in drop:
        if name in targets:
            raise UsageError(f"The column {name!r} is the target and is dropped.", "a target.", "it is predicted.")
    both = [name for name in targets if name in chosen]
    if both:
        raise UsageError(
            f"The column {both[0]!r} is a target and a feature.", "features without it.", "it is predicted."
        )
    drop = [*drop, *(name for name in aside if name not in chosen)]
    features = [n for n in chosen or header if n not in (*drop, *targets, options.by) and not n.startswith("@")]
    if not features:
        raise UsageError(
            f"Of {with_noun(len(header), 'column')} no feature is left.",
            "a target, and at least one feature.",
            "a model predicts the target from features.",
        )
    kept = {*features, *targets, *aside, options.by}
    return [name for name in header if name in kept]


def _without_column(error: UsageError) -> UsageError:
    """Add the way without a column of the client, if no column has a similar name."""
    why = "without a column of the client, the split of the data makes clients."
    return UsageError(error.given, error.required, why, Split(10))


def _with(key: str, names: Sequence[str], wrong: str, near: str) -> Change:
    """The option with a name in place of a wrong one."""
    return Change(key, ",".join(near if name == wrong else name for name in names) if wrong in names else near)


def _targets(header: Sequence[str], options: Options, drop: Sequence[str] = ()) -> list[str]:
    """The targets; without the option the last column."""
    if options.target is not None:
        return name_list(options.target, header)
    others = [n for n in header if n != options.by and n not in drop and not n.startswith("@")]
    if options.columns is not None:
        chosen = name_list(options.columns, header)
        others = [n for n in others if n not in chosen] or others
    if not others:
        raise UsageError(f"The table has {with_noun(len(header), 'column')}.", "a target, and at least one feature.")
    return [others[-1]]


def from_cells(name: str, read: CellTable, options: Options, door: Door) -> Source:
    """Build a source from the cells of a table.

    Args:
        name: name in reports.
        read: the used columns.
        options: the options.
        door: the call that the user made, for errors.
    Raises:
        UsageError: columns that cannot be used, or no complete row.
    """
    rules, cells = options.rules(read.mark), read.columns
    targets = _targets(list(cells), options)
    chosen = name_list(options.columns, list(cells))
    aside = [column for column in name_list(options.keep, list(cells)) if column not in chosen]
    features = [column for column in cells if column not in (*targets, *aside, options.by)]
    if not features:
        raise UsageError(f"{name} has {with_noun(len(cells), 'column')}.", "a target, and at least one feature.")
    notes = list(read.notes)
    if options.target is None:
        notes.append(f"Target guessed: the last column, {targets[0]!r}.")
    found = {column: typed(column, cells[column], rules) for column in cells}
    raw = {column: numbers_in_texts(column, found[column], rules) for column in features}
    goals = {column: _goal(cells[column], found[column], options) for column in targets}
    _mark_thousands(raw, goals, cells, rules)
    _refuse_infinite({**raw, **goals})
    empty = np.any([absent(goal.cells, rules.missing) for goal in goals.values()], axis=0)
    keep, gap_notes = _usable_rows(empty, raw, goals, cells, rules, options)
    used = {column: Typed(picked(it.cells, keep), it.notes, it.fault, it.write) for column, it in raw.items()}
    described, level_notes = _describe(used, goals, rules, options, door)
    y, kind, classes, guessed = _target({c: picked(g.cells, keep) for c, g in goals.items()}, goals, options)
    by, clients = (None, None) if options.by is None else _clients(options.by, cells[options.by], keep)
    if options.columns is not None or options.drop is not None:
        notes.append(f"Features in use: {', '.join(column.name for column in described)}.")
    schema = _schema(described, kind, classes, targets, options)
    typed_cells = {column: it.cells for column, it in used.items()}
    others = {c: picked(it.cells, keep) for c, it in found.items() if c not in typed_cells}
    x = schema.expand(torch.from_numpy(schema.values(typed_cells).numbers))
    one = kind == "regression" and len(targets) == 1
    return Source(
        name=name,
        rows=ArrayRows(x, y, kind == "regression"),
        kind=kind,
        classes=classes,
        features=schema.features,
        columns=schema.names,
        by=by,
        names=clients,
        scale=options.scale or "standard",
        fill=bool(np.isnan(x.numpy()).any()),
        notes=(*notes, *gap_notes, *level_notes, *guessed),
        schema=schema,
        cells={**others, **typed_cells},
        codes={c: picked(cells[c], keep) for c, it in {**found, **raw}.items() if _are_texts(cells[c], it.cells)},
        listed=tuple(chosen),
        scale_target=options.scale_target or ("standard" if one else "none"),
    )


def _mark_thousands(raw: dict[str, Typed], goals: dict[str, Typed], cells: Mapping[str, Cells], rules: Rules) -> None:
    """Give columns of a table with decimal commas a fault if their points may separate thousands."""
    if not any(it.comma for it in (*raw.values(), *goals.values())):
        return
    for found in (raw, goals):
        for column, it in found.items():
            if isinstance(it.cells, NumberCells) and not it.comma and not isinstance(cells[column], NumberCells):
                found[column] = thousands_points(column, cells[column], rules) or it


def _schema(
    described: Sequence[Column], kind: str, classes: tuple[str, ...] | None, targets: Sequence[str], options: Options
) -> Input:
    positive = options.positive
    if positive is not None and (classes is None or len(classes) != 2 or positive not in classes):
        raise UsageError(
            f"positive = {positive!r}.",
            "one of two classes" + ("." if classes is None else f": {', '.join(classes)}."),
            "the other class is the negative one.",
        )
    width = sum(len(column.levels) if isinstance(column, TextColumn) else 1 for column in described)
    return Input(
        target=InputTarget(kind, tuple(targets), classes, positive),
        features=(width,),
        outputs=len(targets) if classes is None else len(classes),
        columns=tuple(described),
        by=options.by,
        missing=options.missing or "mean",
        na=None if options.na is None else tuple(name_list(options.na)),
    )


def _describe(
    used: Mapping[str, Typed], goals: Mapping[str, Typed], rules: Rules, options: Options, door: Door
) -> tuple[list[Column], list[str]]:
    """Describe all features; columns that cannot be used are refused in one error."""
    described: list[Column] = []
    notes: list[str] = []
    wrong = {column: goal for column, goal in goals.items() if goal.fault}
    for column, it in used.items():
        if it.fault:
            wrong[column] = it
            continue
        found, it = feature(column, it, rules)
        if it.fault:
            wrong[column] = it
        else:
            notes += it.notes
        if found is not None:
            described.append(found)
    if wrong:
        raise _unusable(wrong, options, door)
    if not described:
        raise UsageError(" ".join(notes), "at least one feature with different values.", "no other column is left.")
    return described, notes


def _unusable(wrong: Mapping[str, Typed], options: Options, door: Door) -> UsageError:
    changes: dict[str, str] = {}
    for it in wrong.values():
        for name, value in it.write.items():
            joined = name in ("drop", "na") and name in changes
            changes[name] = f"{changes[name]},{value}" if joined else value
    return UsageError(
        " ".join(it.fault for it in wrong.values()),
        "numbers, ISO dates, or a few different texts in each column.",
        "a wrong guess would change the meaning of a column.",
        door(options.changed(**changes)),
    )


def _refuse_infinite(columns: Mapping[str, Typed]) -> None:
    for name, it in columns.items():
        values = it.numbers
        if values is not None and np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            raise UsageError(
                f"Column {name!r} contains {values[row]} at row {row}.",
                "finite numbers; leave the cell empty if the number is missing.",
                "one infinity makes every number of the model NaN.",
            )


def _usable_rows(
    empty: Array,
    raw: Mapping[str, Typed],
    goals: Mapping[str, Typed],
    cells: Mapping[str, Cells],
    rules: Rules,
    options: Options,
) -> tuple[Array, tuple[str, ...]]:
    """Mark the usable rows, bool `[rows]`, and return notes about the others."""
    drops = options.missing == "drop"
    filled = [it for it in raw.values() if drops or it.numbers is not None]
    gaps = np.any([absent(it.cells, rules.missing) for it in filled], axis=0) if filled else np.zeros_like(empty)
    gaps = gaps & ~empty
    keep = ~(empty | gaps) if drops else ~empty
    if not keep.any():
        raise UsageError(
            f"Of {with_noun(len(keep), 'row')}, {empty.sum()} lack a target, {gaps.sum()} lack another value.",
            "at least one complete row.",
            "missing='drop' drops incomplete rows." if gaps.any() else "a row without a target has no loss.",
            Change("missing", "mean") if gaps.any() else "",
        )
    notes = []
    if empty.any():
        texts = ", ".join(
            f"{text!r} ({with_noun(count, 'row')})"
            for c in goals
            for text, count in _text_counts(cells[c].texts(), empty).items()
        )
        lost = with_noun(int(empty.sum()), "row without a target was", "rows without a target were")
        notes.append(f"{lost} left out{': ' if texts else ''}{texts}.")
    if gaps.any():
        action = "left out" if drops else "filled with the train rows' means"
        notes.append(f"{with_noun(int(gaps.sum()), 'row lacks', 'rows lack')} a value: {action}.")
    return keep, tuple(notes)


def _text_counts(texts: Texts, rows: Array) -> dict[str, int]:
    """The number of marked rows of each text."""
    codes = texts.codes[rows]
    counts = np.bincount(codes[codes >= 0], minlength=len(texts.levels)).tolist()
    return {text: count for text, count in zip(texts.levels, counts, strict=True) if count}


def _goal(cells: Cells, it: Typed, options: Options) -> Typed:
    """The converted cells of a target. For classes a column of numbers with a few texts is a column of texts."""
    if options.task == "classification" and isinstance(cells, LevelCells):
        return Typed(cells)
    if it.fault and options.task == "classification":
        return Typed(LevelCells(cells.texts()))
    classes = options.task == "classification" or (options.task is None and _few(it.numbers))
    if classes and isinstance(it.cells, NumberCells) and _are_codes(cells):
        texts = cells.texts()
        coded_again = coded([code_of(text) for text in texts.levels])
        return Typed(LevelCells(Texts(coded_again.levels, np.append(coded_again.codes, -1)[texts.codes])), it.notes)
    return it


def _few(values: Array | None) -> bool:
    """Whether numbers are a few whole numbers, NaN left out, and so classes."""
    if values is None:
        return False
    there = values[~np.isnan(values)]
    return bool((there == there.round()).all()) and len(np.unique(there)) <= WHOLE_CLASSES


def _target(
    cells: Mapping[str, Cells], goals: Mapping[str, Typed], options: Options
) -> tuple[torch.Tensor, str, tuple[str, ...] | None, tuple[str, ...]]:
    """Return y, the kind of task, the classes, and notes on guesses."""
    task = options.task
    if len(cells) > 1 or task == "labels":
        return _several_targets(cells, task)
    ((name, one),) = cells.items()
    notes: tuple[str, ...] = tuple(goals[name].notes)
    days = one.days()
    values = one.numbers(Missing()) if days is None else days
    truth = isinstance(one, NumberCells) and one.boolean
    if task == "regression" and values is None:
        raise UsageError(
            f"Column {name!r} contains texts, such as {one.texts().levels[0]!r}.",
            "numbers, for regression.",
            "a regression model predicts a number.",
            Change("task", "classification"),
        )
    few = values is None or _few(values)
    kind = task or ("classification" if few else "regression")
    if task is None:
        content = (
            "texts" if values is None else f"at most {WHOLE_CLASSES} different whole numbers" if few else "numbers"
        )
        notes = (*notes, f"Task guessed from {content} in column {name!r}: {kind}.")
    if kind == "regression" and values is not None:
        notes = (*notes, f"Predictions of the target {name!r} are in its own units.")
        if options.scale_target != "none":
            notes = (*notes, f"The loss is in units of the standard deviation of {name!r} over the train rows.")
        return torch.tensor(values), kind, None, notes
    texts = one.texts()
    if values is None or truth:
        _refuse_many_classes(name, texts)
        codes, classes = _text_classes(texts)
        notes += _odd_classes(name, texts, options)
    else:
        codes, classes = distinct(values, f"column {name!r}")
    if options.classes is not None:
        given = name_list(options.classes, classes)
        codes, classes = fixed_classes(codes, classes, given, f"column {name!r}", joined=True)
    if len(classes) == 1:
        notes = (*notes, f"All rows have the class {classes[0]!r} in column {name!r}: every answer is right.")
    return codes, kind, classes, notes


def _refuse_many_classes(name: str, texts: Texts) -> None:
    """Refuse a target in which most rows have a text of their own, such as numbers with some other texts."""
    there = [text for text, count in zip(texts.levels, texts.counts.tolist(), strict=True) if count]
    if len(there) <= max(WHOLE_CLASSES, len(texts.codes) / 2):
        return
    wrong = [text for text in there if not is_number(text) and comma_number(text) is None]
    raise UsageError(
        f"Column {name!r} has {len(there)} different texts in {len(texts.codes)} rows.",
        "classes that several rows share, or numbers.",
        "each text is a class, and a class needs rows to train on.",
        Change("na", ",".join(wrong)) if 0 < len(wrong) <= WHOLE_CLASSES else "",
    )


def _text_classes(texts: Texts) -> tuple[torch.Tensor, tuple[str, ...]]:
    order = [i for i, count in enumerate(texts.counts.tolist()) if count]
    if not texts.ordered:
        order.sort(key=lambda i: texts.levels[i])
    place = np.zeros(len(texts.levels), dtype=np.int64)
    place[order] = np.arange(len(order))
    return torch.from_numpy(place[texts.codes]), tuple(texts.levels[i] for i in order)


def _odd_classes(name: str, texts: Texts, options: Options) -> tuple[str, ...]:
    """Notes on classes whose text often means a missing value."""
    out = []
    for text, count in zip(texts.levels, texts.counts.tolist(), strict=True):
        if count and text.lower() in NUMBER_NA:
            line = ",".join([*name_list(options.na), text])
            out.append(
                f'Column {name!r}: {text!r} is a class ({with_noun(count, "row")}); na="{line}" leaves these rows out.'
            )
    return tuple(out)


def _several_targets(cells: Mapping[str, Cells], task: str | None) -> tuple[torch.Tensor, str, None, tuple[str, ...]]:
    if task == "labels":
        found = [
            several_labels(torch.from_numpy(yes_or_no(name, one)), f"Column {name!r}") for name, one in cells.items()
        ]
        return torch.cat(found, 1), "labels", None, (f"{len(cells)} labels of 0 and 1 for each row.",)
    columns = []
    for name, one in cells.items():
        days = one.days()
        values = one.numbers(Missing()) if days is None else days
        if values is None or task == "classification":
            raise UsageError(
                f"Column {name!r} is one of {len(cells)} targets.",
                "numbers, for regression.",
                "a model has one target of classes, several numbers, or several labels of 0 and 1.",
                Change("task", "labels") if task != "regression" and _all_labels(cells) else "",
            )
        columns.append(values)
    note = f"{len(cells)} targets: regression in their own units."
    return torch.from_numpy(np.stack(columns, 1)), "regression", None, (note,)


def _all_labels(cells: Mapping[str, Cells]) -> bool:
    """Whether all cells of all targets are 0, 1, true or false."""
    try:
        return all(np.isin(yes_or_no(name, one), (0.0, 1.0)).all() for name, one in cells.items())
    except UsageError:
        return False


def _are_codes(cells: Cells) -> bool:
    """Whether a text of a column of numbers is not the name of its number, such as 007."""
    return not isinstance(cells, NumberCells) and any(loses_digits(text) for text in cells.texts().levels)


def _are_texts(cells: Cells, typed: Cells) -> bool:
    """Whether a column that is read as whole numbers has codes. Fractions are none, and their texts are not read."""
    if not isinstance(typed, NumberCells) or isinstance(cells, NumberCells):
        return False
    values = typed.values[~np.isnan(typed.values)]
    return bool((values == np.round(values)).all()) and _are_codes(cells)


def _clients(name: str, cells: Cells, keep: Array) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the client of each used row, and the names of the clients."""
    values = cells.numbers(Missing())
    if values is None or (isinstance(cells, NumberCells) and cells.boolean) or _are_codes(cells):
        texts = cells.texts()
        table = np.array([None if Missing().text(t) else code_of(t) for t in texts.levels] + [None], dtype=object)
        values = table[texts.codes]
    elif not (np.isnan(values) | (values == values.round())).all():
        row = int((~np.isnan(values) & (values != values.round())).argmax())
        raise UsageError(
            f"Column {name!r} contains {values[row]} at row {row}.",
            "names or whole numbers in the column of clients.",
            "each different fraction would be a client.",
        )
    distinct(values, f"column {name!r}")  # so that an error gives the row in the whole table
    codes, names = distinct(values[keep], f"column {name!r}")
    if len(names) > 2 and len(names) > len(codes) / 2:
        raise UsageError(
            f"Column {name!r} has {len(names)} different values in {len(codes)} rows.",
            "a column that several rows share.",
            "each value is a client, and a client needs rows to train on.",
        )
    return codes, names
