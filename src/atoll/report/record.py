"""What a run's folder tells: rounds, failures, what each client gave, how it ended. Only files are read.

A log may be long, cut off, or written by somebody else: lines that cannot be read are left out, values that are no
numbers count as missing, and of what clients gave only some rounds are kept.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atoll import runs
from atoll.errors import AtollError
from atoll.plan.names import read_part, renamed
from atoll.report.flights import MOST_FLIGHTS, Flights, Tally, read_trips
from atoll.report.text import better, rises, spread

Numbers = npt.NDArray[np.float64]
Row = Mapping[str, Any]

OTHER = ("loss", "held_out_loss", "gradient_norm", "lr")
_SPREAD, _LAST = 80, 40
_MOST_READ = 32 << 20  # bytes of the lines of clients that are read


@dataclass(frozen=True)
class ClientRound:
    """What clients gave in one round: ids, training loss and rows, each `[arrived]`."""

    round: int
    ids: npt.NDArray[np.int64]
    loss: Numbers


@dataclass
class Lost:
    """The contributions that one client did not give."""

    count: int = 0
    last: int = 0
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Events:
    """What stands in events.jsonl, in a size that does not grow with the run."""

    began: str = ""
    ended: str = ""
    status: str = "unfinished"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[int, Lost] = field(default_factory=dict)
    clients: list[ClientRound] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    flights: Flights = field(default_factory=lambda: Flights.of([]))


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    Args:
        name: of the folder.
        rows: one a round, in order.
        config: config.toml, flat; `{}` where it cannot be read.
        config_text: the same as it stands.
        environment: environment.json.
        events: events.jsonl.
    """

    name: str
    rows: tuple[Row, ...]
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    events: Events

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a run's folder; a file that is missing is an empty one."""
        rows = (r for r in runs.read_rows(folder / "metrics.jsonl") if isinstance(r, dict))
        text = _text(folder / "config.toml")
        return cls(
            folder.resolve().name,
            tuple(r for r in rows if _is_round(r.get("round"))),
            _config(text),
            text,
            _object(_text(folder / "environment.json")),
            _events(folder / "events.jsonl"),
        )

    def series(self, name: str) -> tuple[Numbers, Numbers]:
        """The rounds in which a column has a number, and the numbers; NaN and infinity are numbers here."""
        found = [(row["round"], v) for row in self.rows if (v := _number(row.get(name))) is not None]
        pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def total(self, name: str) -> float:
        """The sum of a column."""
        values = self.series(name)[1]
        return float(values[np.isfinite(values)].sum())

    def last(self, name: str) -> float | None:
        """The last number of a column."""
        values = self.series(name)[1]
        return float(values[-1]) if len(values) else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column with numbers that was measured, in the order of people: losses, metrics, the rest."""
        names = dict.fromkeys(n for row in self.rows for n in row)
        there = [n for n in names if n not in runs.COUNTS and any(_number(r.get(n)) is not None for r in self.rows)]
        metrics = [n for n in there if n not in OTHER]
        first, after = [n for n in OTHER[:2] if n in there], [n for n in OTHER[2:] if n in there]
        return (*first, *metrics, *after)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics beside the losses."""
        return tuple(n for n in self.columns if n not in OTHER)

    @property
    def judged(self) -> str:
        """The column that says which round is best."""
        found = [*self.metrics, "held_out_loss"]
        return next((n for n in found if n in self.columns), "loss")

    def best(self, name: str) -> Row | None:
        """The row with the best finite value, the earliest of equals; none where nobody knows what is better."""
        best, rising = None, rises(name)
        for row in self.rows if rising is not None else ():
            value = _number(row.get(name))
            if value is None or not math.isfinite(value):
                continue
            if best is None or better(value, best[name], bool(rising)):
                best = row
        return best

    @property
    def formula(self) -> str:
        """The plan's formula with its slots filled in; its text where it names code that is not ours to import."""
        text = str(self.environment.get("plan") or self.config.get("plan") or "")
        try:
            return str(read_part(renamed(text))) if text else ""
        except AtollError:
            return text

    def baseline(self, name: str, metric: str) -> float | None:
        """What a baseline reached in a metric."""
        return _number(self.events.baselines.get(name, {}).get(metric))


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def _is_round(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _config(text: str) -> dict[str, Any]:
    """Every setting by its own name, out of whichever table it stands in."""
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


def _events(path: Path) -> Events:
    """Read the log line by line; lines of clients are only found, and as many read afterwards as time allows."""
    events, places, total, trips = Events(), list[int](), 0, list[Any]()
    if not path.is_file():
        return events
    with open(path, "rb") as file:
        at = 0
        for line in file:
            if line.startswith(b'{"event": "clients"'):
                places.append(at)
                total += len(line)
            elif line.startswith(b'{"event": "trips"'):
                if (room := MOST_FLIGHTS - len(trips)) > 0:
                    trips += read_trips(_object(line.decode("utf-8", "replace")), room)
            else:
                _event(events, _object(line.decode("utf-8", "replace")))
            at += len(line)
        chosen = {*spread(len(places), _SPREAD), *range(max(0, len(places) - _LAST), len(places))}
        counted = range(0, len(places), -(-total // _MOST_READ) or 1)
        for n in sorted({*chosen, *counted}):
            file.seek(places[n])
            event = _object(file.readline().decode("utf-8", "replace"))
            if n % counted.step == 0:
                events.tally.add(event)
            given = _clients(event) if n in chosen else None
            if given is not None:
                events.clients.append(given)
    events.tally.of = len(places)
    events.flights = Flights.of(trips)
    return events


def _event(events: Events, event: Mapping[str, Any]) -> None:
    match event.get("event"):
        case "start":
            events.began = events.began or str(event.get("time", ""))
            events.about = dict(event)
            notes = event.get("notes")
            events.notes = [str(n) for n in notes] if isinstance(notes, list) else []
        case "note" if len(events.notes) < 1000:
            events.notes.append(f"round {event.get('round')}: {event.get('text', '')}")
        case "stop":
            events.ended = str(event.get("time", ""))
            events.status, events.reason = str(event.get("status", "")), str(event.get("reason", ""))
        case "baseline":
            events.baselines[str(event.get("name", ""))] = dict(event)
        case "failure" if _is_round(event.get("client")):
            lost = events.lost.setdefault(event["client"], Lost())
            lost.count += 1
            if _is_round(event.get("round")):
                lost.last = event["round"]
            if len(lost.causes) < 20:
                lost.causes[str(event.get("stage", "")), str(event.get("cause", ""))] += 1


def _clients(event: Mapping[str, Any]) -> ClientRound | None:
    ids, loss, at = event.get("id"), event.get("loss"), event.get("round")
    if not isinstance(ids, list) or not isinstance(loss, list) or len(ids) != len(loss) or not _is_round(at):
        return None
    good = [(i, v) for i, v in zip(ids, map(_number, loss), strict=True) if _is_round(i) and v is not None]
    return ClientRound(
        event["round"], np.array([i for i, _ in good], dtype=np.int64), np.array([v for _, v in good], dtype=float)
    )
