"""A row of a published table, its measured result, and a file of results that a stopped command continues from."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import atoll
from atoll import runs
from atoll.data import Clients
from atoll.plan import Plan
from atoll.runs.events import Run

NONE = float("nan")


@dataclass(frozen=True)
class Cell:
    """A published value, and the distance that ours may have from it.

    Args:
        published: the value; NaN for none, then the distance is that from 0.
        sd: its published deviation; NaN for none.
        within: the allowed distance; None: the values stand next to each other without a demand.
        side: "both"; "least": ours may also be larger; "most": ours may also be smaller.
    """

    published: float = NONE
    sd: float = NONE
    within: float | None = None
    side: Literal["both", "least", "most"] = "both"

    def ok(self, ours: float) -> bool | None:
        """Whether our value is within the distance; None without a demand."""
        if self.within is None:
            return None
        apart = ours - (0.0 if missing(self.published) else self.published)
        return {"both": abs(apart), "least": -apart, "most": apart}[self.side] <= self.within


@dataclass(frozen=True)
class Result:
    """The result of a row with one seed.

    Args:
        cells: the value of each column; NaN: the run did not reach it.
        rounds: the rounds of the training.
        seconds: wall-clock time of the rounds.
        sent: the bytes that the clients sent.
        notes: sentences, such as a number that a rule chose.
    """

    cells: Mapping[str, float]
    rounds: int = 0
    seconds: float = 0.0
    sent: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A method of a table.

    Args:
        run: (seed, rounds or None, folder for its run folders or None) → the result.
        cells: the published values by column. Columns of a result without an entry are shown without one.
        absent: the set that is not available; `run` then trains on random images of the same shape.
    """

    run: Callable[[int, int | None, Path | None], Result]
    cells: Mapping[str, Cell] = field(default_factory=dict)
    absent: str = ""


Means = Mapping[tuple[str, str], float]


def _no_remarks(means: Means) -> list[str]:
    return []


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        rows: its methods by name.
        seeds: the default of `--seeds`.
        form: the format of a value.
        remarks: (mean of each row and column) → sentences below the table.
    """

    rows: Mapping[str, Row]
    seeds: str = "42"
    form: str = ".3f"
    remarks: Callable[[Means], list[str]] = _no_remarks


def trained(model: Any, data: Clients, plan: Plan, place: Path | None, **settings: Any) -> Run:
    """Train without a report. With a folder, a training that was stopped there continues."""
    words = {"progress": "none", "report": False, **settings}
    if place is None:
        return atoll.train(model, data, plan, out=None, **words)
    earlier = [run for run in runs.list_runs(place) if (run / "checkpoint").exists()] if place.is_dir() else []
    return atoll.train(model, data, plan, out=place, resume=earlier[-1] if earlier else None, **words)


class Results:
    """Results in a file with one JSON object a line: {"table", "row", "seed", "rounds", …}.

    Each result is appended when it is measured, so a command that was stopped continues with the next one.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Result] = {}
        for line in path.read_text().splitlines() if path is not None and path.exists() else ():
            try:
                found = json.loads(line)
                key, result = found.pop("key"), Result(**found.pop("result"))
            except (ValueError, TypeError, KeyError):
                continue  # the line of a command that was killed while it wrote
            self._known[json.dumps(key)] = result

    def measured(self, key: tuple[Any, ...], run: Callable[[Path | None], Result]) -> Result:
        """The result of a key: from the file, or measured now.

        Args:
            key: table, row, seed and rounds.
            run: (folder for run folders or None) → the result. The folder is removed when the result is in the file.
        """
        text = json.dumps(key)
        if text in self._known:
            return self._known[text]
        place = None if self.path is None else self.path.with_suffix(".runs") / "-".join(map(str, key))
        start = time.perf_counter()
        result = run(place)
        self._known[text] = result
        if self.path is not None:
            whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
            line = {"key": key, "result": asdict(result), "wall": round(time.perf_counter() - start, 1)}
            with self.path.open("a") as file:
                file.write(("" if whole else "\n") + json.dumps(line) + "\n")
            shutil.rmtree(place, ignore_errors=True)
        return result


def missing(value: float) -> bool:
    """Whether a value is NaN."""
    return math.isnan(value)
