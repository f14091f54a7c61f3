"""The rules that decide what a column of a table is: numbers, dates, texts, or unusable.

The rules are the same for every file and every frame. A guess, a missing text and a column that is left out give a
note. A column that cannot be used gives a fault; the caller lists all faults in one error.

Tests: tests/data/test_tabular.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from atoll.base.names import with_noun
from atoll.data.cells import (
    COMMA,
    GROUPED,
    NUMBER_NA,
    POINTS,
    Cells,
    DayCells,
    LevelCells,
    Missing,
    NumberCells,
    Texts,
    comma_number,
    comma_numbers,
    day_of,
    number,
    plain_numbers,
)
from atoll.data.input import ABSENT, OTHER, Column, DateColumn, NumberColumn, TextColumn
from atoll.data.rows import Array

ALMOST = 0.95  # share of cells from which a column counts as numbers or dates with wrong cells
ID_ROWS = 50  # rows from which a column of different texts is an id
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}([T ].*)?")
_DATE = re.compile(r"\d{1,4}([./-])\d{1,2}\1\d{1,4}")


@dataclass(frozen=True)
class Rules:
    """The options that decide what a column is.

    Args:
        missing: the texts of missing values.
        decimal: "." or "," for the decimal mark; None: a comma is recognized if cells do not end at commas.
        commas: whether cells end at commas.
        separated: whether cells end at other marks, so that a comma is no separator of cells.
        dates: None for ISO dates, "drop" to leave dates out, or a format of `strptime`.
        max_levels: the largest number of levels of a column of texts.
        other: whether further levels are collected in one level, "other".
    """

    missing: Missing = Missing()
    decimal: str | None = None
    commas: bool = False
    separated: bool = False
    dates: str | None = None
    max_levels: int = 100
    other: bool = False


@dataclass(frozen=True)
class Typed:
    """A column with its type.

    Args:
        cells: the cells, converted: numbers, days, or texts.
        notes: sentences about guesses.
        fault: why the column is unusable; empty if it is usable.
        write: the options that make the column usable.
        comma: whether the numbers have a decimal comma.
    """

    cells: Cells
    notes: tuple[str, ...] = ()
    fault: str = ""
    write: Mapping[str, str] = field(default_factory=dict)
    comma: bool = False

    @property
    def numbers(self) -> Array | None:
        """The numbers or days; None for texts."""
        days = self.cells.days()
        return self.cells.numbers(Missing()) if days is None else days


def typed(name: str, cells: Cells, rules: Rules) -> Typed:
    """Decide the type of a column and convert its cells.

    Args:
        name: the name of the column.
        cells: the cells as the file or frame contains them.
        rules: the options.
    Example:
        >>> from atoll.data.cells import TextCells
        >>> typed("a", TextCells(["1,5", "2,5"]), Rules()).numbers.tolist()
        [1.5, 2.5]
    """
    if cells.days() is not None:
        return Typed(cells, (_days_note(name),))
    found = cells.numbers(rules.missing) if rules.decimal != "," or isinstance(cells, NumberCells) else None
    if found is not None:
        return Typed(NumberCells(found, isinstance(cells, NumberCells) and cells.boolean))
    texts = cells.texts()
    if isinstance(cells, LevelCells) and texts.ordered:
        return Typed(cells)
    return (
        _dates(name, texts, rules)
        or _thousands(name, texts, rules)
        or _decimal_commas(name, texts, rules)
        or _almost(name, texts, rules)
        or Typed(LevelCells(texts))
    )


def numbers_in_texts(name: str, it: Typed, rules: Rules) -> Typed:
    """A feature whose texts in a frame are all numbers, as numbers. A categorical column keeps its levels.

    Args:
        name: the name of the column.
        it: the converted column.
        rules: the options.
    """
    if not isinstance(it.cells, LevelCells) or it.fault or it.cells.found.ordered or rules.decimal == ",":
        return it
    values = plain_numbers(it.cells.found, rules.missing)
    if values is None or np.isnan(values).all():
        return it
    note = f"Column {name!r} contains texts that are numbers, and is read as numbers; a categorical column has levels."
    return Typed(NumberCells(values), (*it.notes, note))


def _days_note(name: str) -> str:
    return f"Column {name!r} contains dates: days since 1970-01-01."


def _dates(name: str, texts: Texts, rules: Rules) -> Typed | None:
    """The column as dates; a fault for dates of an ambiguous or of several formats; None for other columns."""
    format = None if rules.dates in (None, "drop") else rules.dates
    there = [text for text in texts.levels if not rules.missing.number(text)]
    shaped = {text for text in there if _ISO.fullmatch(text) or _DATE.fullmatch(text)}
    cells = dict(zip(texts.levels, texts.counts.tolist(), strict=True))
    few = sum(cells[text] for text in shaped) < ALMOST * sum(cells[text] for text in there)
    if not there or (format is None and few):
        return None
    days = [math.nan if rules.missing.number(text) else day_of(text, format) for text in texts.levels]
    wrong = [text for text, day in zip(texts.levels, days, strict=True) if day is None]
    if not wrong:
        return Typed(DayCells(texts.map([math.nan if day is None else day for day in days])), (_days_note(name),))
    if few or rules.dates == "drop":
        return None
    text = next((t for t in wrong if t not in shaped), wrong[0])
    row = texts.first(texts.levels.index(text))
    if text not in shaped:
        given = f"Column {name!r} contains dates, and {text!r} at row {row}."
        return Typed(
            LevelCells(texts), fault=given, write={"na": _na(rules, texts, [t for t in wrong if t not in shaped])}
        )
    other = next((t for t in there if t not in wrong), "")
    several = f" The formats differ: {other!r}." if other else ""
    given = f"Column {name!r} contains dates that are not ISO, such as {text!r} at row {row}.{several}"
    return Typed(LevelCells(texts), fault=given, write={"drop": name} if several else {"dates": _format_of(text)})


def _format_of(text: str) -> str:
    """A format for a date; the reader must check the order of day and month."""
    mark = next(c for c in text if not c.isdigit())
    first, _, last = text.split(mark)
    if len(first) == 4:
        return f"%Y{mark}%m{mark}%d"
    year = "%Y" if len(last) == 4 else "%y"
    return f"%m/%d/{year}" if mark == "/" and int(text.split(mark)[1]) > 12 else f"%d{mark}%m{mark}{year}"


def _thousands(name: str, texts: Texts, rules: Rules) -> Typed | None:
    """A fault for numbers whose comma may separate thousands. In a file with other separators it is a decimal mark."""
    there = [i for i, text in enumerate(texts.levels) if not rules.missing.number(text)]
    commas = [i for i in there if "," in texts.levels[i]]
    if rules.decimal == "," or not commas or not all(GROUPED.fullmatch(texts.levels[i]) for i in commas):
        return None
    if not all(_is_number(texts.levels[i].replace(",", "")) for i in there):
        return None
    certain = [i for i in commas if not COMMA.fullmatch(texts.levels[i])]
    if rules.separated and not certain:
        return None
    at = (certain or commas)[0]
    given = f"Column {name!r} contains a comma before three digits: {texts.levels[at]!r} at row {texts.first(at)}. "
    given += "If it separates thousands, remove it, for example by pandas.read_csv(path, thousands=',')"
    given += "." if certain else "; decimal=',' reads it as a decimal mark."
    return Typed(LevelCells(texts), fault=given, write={"drop": name})


def _decimal_commas(name: str, texts: Texts, rules: Rules) -> Typed | None:
    """The column as numbers with a decimal comma; a fault for a decimal mark that is not that of the option, or two."""
    there = [text for text in texts.levels if not rules.missing.number(text)]
    commas = [text for text in there if COMMA.fullmatch(text)]
    points = [text for text in there if comma_number(text) is None and _is_number(text)]
    numbers = sum(comma_number(text) is not None or _is_number(text) for text in there)
    most = bool(there) and numbers >= ALMOST * len(there)

    def at(text: str) -> str:
        return f"{text!r} at row {texts.first(texts.levels.index(text))}"

    if most and commas and points:
        given = f"Column {name!r} mixes decimal marks: {at(commas[0])}, {at(points[0])}."
        return Typed(LevelCells(texts), fault=given, write={"drop": name})
    other = commas if rules.decimal == "." else points if rules.decimal == "," else []
    if most and other:
        given = f"Column {name!r} contains {at(other[0])}, and decimal={rules.decimal!r}."
        return Typed(LevelCells(texts), fault=given, write={"drop": name})
    values = comma_numbers(texts, rules.missing)
    unasked = rules.decimal is None and (rules.commas or not commas)
    if rules.decimal == "." or unasked or not there or values is None:
        return None
    note = (f"Column {name!r} contains numbers with a decimal comma.",) if commas else ()
    return Typed(NumberCells(values), note, comma=bool(commas))


def thousands_points(name: str, cells: Cells, rules: Rules) -> Typed | None:
    """A fault for a column of a table with decimal commas, whose points all stand before three digits.

    Args:
        name: the name of the column.
        cells: the cells as the file contains them.
        rules: the options.
    """
    texts = cells.texts()
    points = [text for text in texts.levels if "." in text and not rules.missing.number(text)]
    if not points or not all(POINTS.fullmatch(text) for text in points):
        return None
    at = texts.first(texts.levels.index(points[0]))
    given = f"Column {name!r} contains a point before three digits, {points[0]!r} at row {at}, and other columns have "
    given += "decimal commas. If it separates thousands, remove it."
    return Typed(LevelCells(texts), fault=given, write={"drop": name})


def _almost(name: str, texts: Texts, rules: Rules) -> Typed | None:
    """A fault for a column of numbers with some other texts, or of numbers with a comma; None for other columns."""
    there = [i for i, text in enumerate(texts.levels) if not rules.missing.number(text)]
    commas = [i for i in there if COMMA.fullmatch(texts.levels[i])]
    if rules.commas and commas and all(comma_number(texts.levels[i]) is not None for i in there):
        given = f"Column {name!r} contains numbers with a comma, such as {texts.levels[commas[0]]!r} at row "
        return Typed(LevelCells(texts), fault=f"{given}{texts.first(commas[0])}.", write={"decimal": ","})
    comma = rules.decimal == "," or (bool(commas) and not rules.commas)
    wrong = [
        i for i in there if not (_is_number(texts.levels[i]) or (comma and comma_number(texts.levels[i]) is not None))
    ]
    counts = texts.counts
    total, bad = int(counts[there].sum()), int(counts[wrong].sum())
    if not bad or total - bad < ALMOST * total:
        return None
    examples = ", ".join(f"{texts.levels[i]!r} at row {texts.first(i)}" for i in wrong[:3])
    given = f"Column {name!r} contains numbers, except for {bad} of {with_noun(total, 'cell')}: {examples}."
    return Typed(LevelCells(texts), fault=given, write={"na": _na(rules, texts, [texts.levels[i] for i in wrong])})


def _na(rules: Rules, texts: Texts, wrong: list[str]) -> str:
    """The option `na` that makes these texts missing too; it replaces the list, so that it repeats other texts."""
    known = [text for text in texts.levels if text and rules.missing.number(text)]
    return ",".join(dict.fromkeys([*known, *wrong]))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(number(text))
    except ValueError:
        return False


def picked(cells: Cells, keep: Array) -> Cells:
    """Return the marked cells of a converted column; levels without a row are left out.

    Args:
        cells: the converted cells.
        keep: bool `[rows]`.
    """
    match cells:
        case NumberCells():
            return cells if keep.all() else NumberCells(cells.values[keep], cells.boolean)
        case DayCells():
            return cells if keep.all() else DayCells(cells.values[keep])
    texts = cells.texts()
    codes = texts.codes[keep]
    used = np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(texts.levels)))
    place = np.full(len(texts.levels) + 1, -1, dtype=np.int64)
    place[used] = np.arange(len(used))
    return LevelCells(Texts(tuple(texts.levels[i] for i in used), place[codes], texts.ordered))


def absent(cells: Cells, missing: Missing) -> Array:
    """Mark the missing cells of a converted column, bool `[rows]`."""
    match cells:
        case NumberCells() | DayCells():
            return np.isnan(cells.values)
    texts = cells.texts()
    table = np.array([*(missing.text(text) for text in texts.levels), True])
    found: Array = table[texts.codes]
    return found


def feature(name: str, it: Typed, rules: Rules) -> tuple[Column | None, Typed]:
    """Describe a feature of the model; None if the column is constant or an id, which are left out.

    Args:
        name: the name of the column.
        it: the converted column, with the rows that are used.
        rules: the options.
    Returns:
        The description, and the column with notes or a fault.
    """
    numbers = it.numbers
    if numbers is not None:
        there = numbers[~np.isnan(numbers)]
        if not len(there) or (there == there[0]).all():
            return None, _left_out(it, f"Column {name!r} is constant and was left out.")
        days = it.cells.days() is not None
        if days and rules.dates == "drop":
            return None, _left_out(it, f"Column {name!r} contains dates and was left out.")
        format = rules.dates or ""
        return (DateColumn(name, format) if days else NumberColumn(name)), it
    return _levels(name, it, rules)


def _left_out(it: Typed, note: str) -> Typed:
    return Typed(it.cells, (note,))


def _levels(name: str, it: Typed, rules: Rules) -> tuple[Column | None, Typed]:
    texts = it.cells.texts()
    counts = texts.counts
    gaps = absent(it.cells, rules.missing)
    there = [i for i, text in enumerate(texts.levels) if not rules.missing.text(text) and counts[i]]
    rows = len(texts.codes)
    if len(there) + bool(gaps.any()) <= 1:
        return None, _left_out(it, f"Column {name!r} is constant and was left out.")
    if len(there) == rows and rows >= ID_ROWS:
        return None, _left_out(it, f"Column {name!r} has a different text in each of {rows} rows and was left out.")
    if not texts.ordered:
        there.sort(key=lambda i: texts.levels[i])
    collected = len(there) > rules.max_levels
    if collected and not rules.other:
        row = texts.first(there[0])
        given = f"Column {name!r} contains {len(there)} different texts, {texts.levels[there[0]]!r} at row {row}."
        return None, Typed(it.cells, it.notes, given, {"drop": name})
    notes = list(it.notes)
    if collected:
        frequent = set(sorted(there, key=lambda i: (-counts[i], texts.levels[i]))[: rules.max_levels])
        rest = int(sum(counts[i] for i in there if i not in frequent))
        there = [i for i in there if i in frequent]
        notes.append(f"Column {name!r}: {with_noun(rest, 'row')} with a rare text: the level {OTHER!r}.")
    levels = [texts.levels[i] for i in there] + ([ABSENT] if gaps.any() else [])
    words = {texts.levels[i]: int(counts[i]) for i in there if texts.levels[i].lower() in NUMBER_NA}
    if words:
        listed = ", ".join(f"{word!r} ({with_noun(count, 'row')})" for word, count in words.items())
        notes.append(f"Column {name!r}: {listed} counts as a level, not as missing.")
    if gaps.any():
        missing = with_noun(int(gaps.sum()), "missing cell has", "missing cells have")
        notes.append(f"Column {name!r}: {missing} the level {ABSENT!r}.")
    if collected:
        levels = [*(level for level in levels if level != OTHER), OTHER]
    notes.append(f"Column {name!r} contains texts: one column for each of {len(levels)} levels, found in all rows.")
    return TextColumn(name, tuple(levels), other=collected), Typed(it.cells, tuple(notes))
