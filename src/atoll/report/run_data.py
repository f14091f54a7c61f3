"""The data of a run for reports, read from the files of its folder: rounds, failures, client results, outcome.

A log may be long, truncated or untrusted. Lines that cannot be parsed are skipped. Values that are no numbers count as
missing. Client results are kept for a bounded number of rounds. The parser is imported with the first line.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.base.names import COUNTS
from atoll.plan.formula import formula_of
from atoll.report.flight_rows import MOST_FLIGHTS, Tally, read_trips
from atoll.report.flight_rows import Row as FlightRow
from atoll.runs.confusion import Confusion
from atoll.runs.folder import read_rows
from atoll.runs.format import rises, spread
from atoll.runs.summary import ROWS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from atoll.report.flight_log import FlightLog, Numbers

Row = Mapping[str, Any]

OTHER = ("loss", "held_out_loss", "gradient_norm", "lr")
NUMBERS = {int, float}  # of JSON, in which a bool is no number
_SPREAD, _LAST = 80, 40
_BLOCK = 1 << 18  # bytes that are read at once: a line of a thousand clients has 20 kB
_MOST_READ = 8 << 20  # bytes of "clients" lines that are read at most


@dataclass(frozen=True)
class ClientRound:
    """The clients whose contributions arrived in one round: their ids and training losses, each `[arrived]`."""

    round: int
    ids: npt.NDArray[np.int64]
    loss: Numbers


@dataclass
class MissedContributions:
    """The missed contributions of one client: their number, the last round, and the count of each (stage, cause)."""

    count: int = 0
    last: int = 0
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Events:
    """The contents of events.jsonl, in a size that does not grow with the run."""

    began: str = ""
    ended: str = ""
    status: str = "unfinished"
    reason: str = ""
    stopped: bool = False  # whether the last line is the end of the run
    names: tuple[str, ...] | None = None
    wall: float | None = None
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[int, MissedContributions] = field(default_factory=dict)
    client_rows: list[tuple[int, list[int], list[float]]] = field(default_factory=list)  # round, ids, losses
    seen: dict[int, tuple[int, float | None, float | None]] = field(default_factory=dict)  # last round, loss, rows
    tally: Tally = field(default_factory=Tally)
    trips: list[FlightRow] = field(default_factory=list)

    @cached_property
    def clients(self) -> list[ClientRound]:
        """The results of clients, in the rounds that were kept."""
        import numpy as np

        return [
            ClientRound(at, np.array(ids, dtype=np.int64), np.array(loss, dtype=np.float64))
            for at, ids, loss in self.client_rows
        ]

    @cached_property
    def flights(self) -> FlightLog:
        """The flights that have ended."""
        from atoll.report.flight_log import FlightLog

        return FlightLog.of(self.trips)


@dataclass(frozen=True)
class RunData:
    """The data of a run, read from its folder.

    Args:
        name: the name of the folder.
        rows: the rows of metrics.jsonl, one per round, in order.
        config: the settings of config.toml without their tables; `{}` if the file is not valid TOML.
        config_text: the text of config.toml.
        environment: the contents of environment.json.
        events: the contents of events.jsonl.
        confusion: the table of confusion.csv; None if the run has none.
    """

    name: str
    rows: tuple[Row, ...]
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    events: Events
    confusion: Confusion | None = None

    @classmethod
    def read(cls, folder: Path, clients: bool = True) -> RunData:
        """Read a run folder; a missing file counts as empty.

        Args:
            folder: the run folder.
            clients: whether the events of clients are read, which are most of a long log.
        """
        log = folder / "metrics.jsonl"
        rows = read_rows(log) if log.is_file() else []
        text = _text(folder / "config.toml")
        return cls(
            (folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder).name,
            tuple(r for r in rows if isinstance(r, dict) and _is_round(r.get("round"))),
            _config(text),
            text,
            _object(_text(folder / "environment.json")),
            _events(folder / "events.jsonl", clients),
            Confusion.read(folder),
        )

    def series(self, name: str) -> tuple[Numbers, Numbers]:
        """The rounds in which a column has a number, and the numbers, float64 `[n]`; NaN and infinity are included."""
        import numpy as np

        rounds, values = self.numbers(name)
        return np.array(rounds, dtype=np.float64), np.array(values, dtype=np.float64)

    def numbers(self, name: str) -> tuple[list[int], list[float]]:
        """The rounds in which a column has a number, and the numbers."""
        if name not in self._numbers:
            rounds, values = self._rounds, list[Any](row.get(name) for row in self.rows)
            if not set(map(type, values)) <= NUMBERS:
                rounds = [t for t, v in zip(rounds, values, strict=True) if type(v) in NUMBERS]
                values = [v for v in values if type(v) in NUMBERS]
            self._numbers[name] = rounds, values
        return self._numbers[name]

    @cached_property
    def _rounds(self) -> list[int]:
        return [row["round"] for row in self.rows]

    @cached_property
    def _numbers(self) -> dict[str, tuple[list[int], list[float]]]:
        return {}

    def total(self, name: str) -> float:
        """The sum of the finite numbers of a column."""
        return math.fsum(filter(math.isfinite, self.numbers(name)[1]))

    def last(self, name: str) -> float | None:
        """The last number of a column; None if it has none."""
        return next((v for row in reversed(self.rows) if (v := _number(row.get(name))) is not None), None)

    @cached_property
    def named(self) -> dict[str, None]:
        """The names of all columns, in the order of the rows."""
        return dict.fromkeys(chain.from_iterable(self.rows))

    def has(self, name: str) -> bool:
        """Whether a column contains a number."""
        return name in self.named and any(type(row.get(name)) in NUMBERS for row in self.rows)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The measured columns that contain numbers, in reading order: losses, metrics, the rest."""
        there = [n for n in self.named if n not in COUNTS and self.has(n)]
        metrics = [n for n in there if n not in OTHER]
        first, after = [n for n in OTHER[:2] if n in there], [n for n in OTHER[2:] if n in there]
        return (*first, *metrics, *after)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The columns of task metrics, without losses, gradient norm and learning rate."""
        return tuple(n for n in self.columns if n not in OTHER)

    @property
    def judged(self) -> str:
        """The column of the selection metric, which determines the best round."""
        selection = self.events.about.get("selection")
        if isinstance(selection, str) and selection in self.columns:
            return selection
        found = [*self.metrics, "held_out_loss"]
        return next((n for n in found if n in self.columns), "loss")

    def best(self, name: str) -> Row | None:
        """The first row with the best finite value; None if there is none or the metric's direction is unknown."""
        about = self.events.about
        given = about.get("rising") if about.get("selection") == name else None
        rising = given if isinstance(given, bool) else rises(name)
        values = [] if rising is None else list(filter(math.isfinite, self.numbers(name)[1]))
        if not values:
            return None
        top = max(values) if rising else min(values)
        return next(row for row in self.rows if row.get(name) == top and type(row[name]) in NUMBERS)

    @property
    def formula(self) -> str:
        """The formula of the plan; a text that is no plan stays as it is."""
        text = str(self.environment.get("plan") or self.config.get("plan") or "")
        return formula_of(text) if text else ""

    @property
    def compared(self) -> dict[str, dict[str, Any]]:
        """The rows of the comparison by name: numbers, intervals, and the metric of a difference."""
        found = {name: _values(event) for name, event in self.events.baselines.items() if name in ROWS}
        last = {name: self.last(name) for name in self.columns}
        return {"federated": last | found.pop("federated", {}), **found}

    def baseline(self, name: str, metric: str) -> float | None:
        """The value of a metric of a baseline; None if it is missing."""
        return _number(self.events.baselines.get(name, {}).get(metric))


def _number(value: Any) -> float | None:
    return float(value) if type(value) in NUMBERS else None


def _values(event: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an event, its intervals, and the name of its metric."""
    kinds = {"intervals": Mapping, "defined": Mapping, "metric": str}
    named = {n: event[n] for n, kind in kinds.items() if isinstance(event.get(n), kind)}
    return {n: number for n, v in event.items() if (number := _number(v)) is not None} | named


def _is_round(value: Any) -> bool:
    return type(value) is int


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text; {} for another text. NaN, which strict JSON lacks, takes the slower parser."""
    import msgspec

    try:
        found = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        try:
            found = json.loads(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return {}
    return found if isinstance(found, dict) else {}


def _config(text: str) -> dict[str, Any]:
    """The settings by name, without the TOML tables that contain them."""
    flat: dict[str, Any] = {}

    def walk(table: Mapping[str, Any]) -> None:
        for name, value in table.items():
            if isinstance(value, Mapping):
                walk(value)
            else:
                flat.setdefault(name, value)

    try:
        walk(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return {}
    return flat


def _events(path: Path, clients: bool = True) -> Events:
    """Read the log line by line. Lines of clients are first located; a bounded selection of them is then parsed.

    The newest line is parsed first, because the last values of a client are those of its newest round.
    """
    events, places, total, trips = Events(), list[tuple[int, int]](), 0, list[Any]()
    if not path.is_file():
        return events
    with open(path, "rb", buffering=_BLOCK) as file:
        at = 0
        for line in file:
            events.stopped = line.startswith(b'{"event": "stop"') and line.endswith(b"}\n")
            if line.startswith(b'{"event": "clients"'):
                places.append((len(line), at))
                total += len(line)
            elif line.startswith(b'{"event": "trips"'):
                if clients and (room := MOST_FLIGHTS - len(trips)) > 0:
                    trips += read_trips(_object(line), room)
            else:
                _event(events, _object(line))
            at += len(line)
        chosen = {*spread(len(places), _SPREAD), *range(max(0, len(places) - _LAST), len(places))}
        counted = range(0, len(places), -(-total // _MOST_READ) or 1)
        for n in sorted({*chosen, *counted} if clients else (), reverse=True):
            event = _object(os.pread(file.fileno(), *places[n]))
            if n % counted.step == 0:
                events.tally.add(event)
            given = _clients(event) if n in chosen else None
            if given is not None:
                events.client_rows.append(given)
            _see(events, event)
    events.client_rows.reverse()
    events.tally.of = len(places)
    events.trips = trips
    return events


def _see(events: Events, event: Mapping[str, Any]) -> None:
    """Record the round, the loss and the rows of each client that no newer round had; a column must fit the ids."""
    ids, at = event.get("id"), event.get("round")
    if not isinstance(ids, list) or not isinstance(at, int):
        return
    with contextlib.suppress(TypeError):  # an id of a damaged log may be a list
        if events.seen.keys() >= set(ids):
            return
    columns = [event.get(name) for name in ("loss", "rows")]
    fitting = [c if isinstance(c, list) and len(c) == len(ids) else [None] * len(ids) for c in columns]
    values = zip(ids, *fitting, strict=True)
    found = {i: (at, _number(loss), _number(rows)) for i, loss, rows in values if _is_round(i)}
    events.seen = found | events.seen


def _event(events: Events, event: Mapping[str, Any]) -> None:
    match event.get("event"):
        case "start":
            events.began = events.began or str(event.get("time", ""))
            events.about = dict(event)
            names = event.get("names")
            events.names = tuple(map(str, names)) if isinstance(names, list) else None
            notes = event.get("notes")
            events.notes = [str(n) for n in notes] if isinstance(notes, list) else []
        case "note" if len(events.notes) < 1000:
            events.notes.append(f"round {event.get('round')}: {event.get('text', '')}")
        case "stop":
            events.ended = str(event.get("time", ""))
            events.wall = _number(event.get("wall"))
            events.status, events.reason = str(event.get("status", "")), str(event.get("reason", ""))
        case "baseline":
            events.baselines[str(event.get("name", ""))] = dict(event)
        case "failure" if _is_round(event.get("client")):
            lost = events.lost.setdefault(event["client"], MissedContributions())
            lost.count += 1
            if _is_round(event.get("round")):
                lost.last = event["round"]
            if len(lost.causes) < 20:
                lost.causes[str(event.get("stage", "")), str(event.get("cause", ""))] += 1


def _clients(event: Mapping[str, Any]) -> tuple[int, list[int], list[float]] | None:
    ids, loss, at = event.get("id"), event.get("loss"), event.get("round")
    if not isinstance(ids, list) or not isinstance(loss, list) or len(ids) != len(loss) or not _is_round(at):
        return None
    if set(map(type, ids)) <= {int} and set(map(type, loss)) <= {float}:
        return event["round"], ids, loss
    good = [(i, v) for i, v in zip(ids, map(_number, loss), strict=True) if _is_round(i) and v is not None]
    return event["round"], [i for i, _ in good], [v for _, v in good]
