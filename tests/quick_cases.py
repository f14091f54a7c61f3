"""Selection of quick cases from tables of many similar cases. The others are slow; `make test-all` runs them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def only(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases. Cases that are not in `quick` are marked slow."""
    quick, cases = list(quick), list(cases)
    assert all(case in cases for case in quick), "a quick case that is none"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def one_in(n: int, cases: Iterable[Any]) -> list[Any]:
    """All cases. Of those that are not marked yet, every n-th is quick, from the first on; the others are slow."""
    rows, count = [], 0
    for case in cases:
        param = case if isinstance(case, type(pytest.param())) else pytest.param(case)
        if not param.marks:
            rows.append(param if count % n == 0 else pytest.param(*param.values, id=param.id, marks=pytest.mark.slow))
            count += 1
        else:
            rows.append(param)
    return rows


def by_turns(*tables: Iterable[Any]) -> list[Any]:
    """The product of the tables. The quick rows together contain every entry of every table.

    Their number is the length of the longest table.
    """
    lists: list[Sequence[Any]] = [list(table) for table in tables]
    quick = set()
    for row in range(max(map(len, lists))):
        places, laps = [], 0
        for entries in lists:
            places.append((row + laps) % len(entries))
            laps += row // len(entries)  # shifts tables of equal length, so that their pairs vary
        quick.add(tuple(places))
    rows = []
    for places in itertools.product(*(range(len(entries)) for entries in lists)):
        row = [entries[i] for entries, i in zip(lists, places, strict=True)]
        rows.append(pytest.param(*row, marks=[] if places in quick else [pytest.mark.slow]))
    return rows
