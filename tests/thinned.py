"""Which of many cases on the same path the quick run takes; the others are slow, and `make test-all` runs all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def only(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases, of which those that are not named quick are slow."""
    quick, cases = list(quick), list(cases)
    assert all(case in cases for case in quick), "a quick case that is none"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def by_turns(*tables: Iterable[Any]) -> list[Any]:
    """The product of the tables; quick are as many rows as the longest one has, with every entry of every table."""
    lists: list[Sequence[Any]] = [list(table) for table in tables]
    quick = set()
    for row in range(max(map(len, lists))):
        places, laps = [], 0
        for entries in lists:
            places.append((row + laps) % len(entries))
            laps += row // len(entries)  # two short tables are not turned in step for ever
        quick.add(tuple(places))
    rows = []
    for places in itertools.product(*(range(len(entries)) for entries in lists)):
        row = [entries[i] for entries, i in zip(lists, places, strict=True)]
        rows.append(pytest.param(*row, marks=[] if places in quick else [pytest.mark.slow]))
    return rows
