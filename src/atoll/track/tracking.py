"""The protocol of a tracker, and the observer that sends it the rows of a run folder, each round once.

Tests: tests/surface/test_track.py
"""

from __future__ import annotations

import importlib.util
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from atoll.base.errors import AtollError, UsageError
from atoll.base.files import atomic_write
from atoll.base.grammar import parse
from atoll.base.lines import Line
from atoll.base.names import dotted
from atoll.runs.folder import last_end, read_environment, read_rows
from atoll.runs.labels import Labels
from atoll.runs.next_line import resume_line

if TYPE_CHECKING:
    from atoll.plan.round import Report
    from atoll.runs.events import Run, TrainingView

STATE = "trackers.json"
_FILES = ("config.toml", "input.json", "metrics.csv", "model.safetensors")
_OF_CLIENTS = ("clients.csv", "report.html")  # the page shows values of single clients
_TEXTS = ("round", "fingerprint")
_MOST = 500  # rows of one call
Rows = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class RunFiles:
    """The part of a run folder that a tracker receives.

    Args:
        path: the run folder.
        clients: whether values of single clients are sent, if the run has them.
    """

    path: Path
    clients: bool = False

    @property
    def title(self) -> str:
        """The title of the run, else the name of its folder."""
        return Labels.read(self.path).title or self.path.name

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the run."""
        return Labels.read(self.path).tags

    def parameters(self) -> dict[str, str]:
        """The settings of config.toml by dotted keys, and the plan."""
        config = dotted(tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8")))
        plan = read_environment(self.path).get("plan")
        return {name: str(value) for name, value in config.items()} | ({} if plan is None else {"plan": str(plan)})

    def artifacts(self) -> list[Path]:
        """The files of an ended run: settings, input, metrics and model; with `clients` also the report."""
        names = (*_FILES, *_OF_CLIENTS) if self.clients else _FILES
        return [self.path / name for name in names if (self.path / name).is_file()]

    def names(self) -> list[str] | None:
        """The names of natural clients; None if clients have numbers only."""
        starts = [row for row in read_rows(self.path / "events.jsonl") if row.get("event") == "start"]
        return starts[-1].get("names") if starts else None


class Session(Protocol):
    """An open run of a tracker."""

    @property
    def id(self) -> str:
        """The id of the run in the tracker, which continues it."""
        ...

    @property
    def last(self) -> int | None:
        """The last round that the tracker has, −1 for none; None if it cannot be read, and the run folder counts."""
        ...

    def log(self, rows: Rows) -> None:
        """Add rounds, each with its numbers by name. They are stored when the method returns."""
        ...

    def close(self, status: str, files: RunFiles | None) -> None:
        """End the run.

        Args:
            status: "done", "failed" or "interrupted".
            files: the files of an ended run; None: the training ended in an error.
        """
        ...


@runtime_checkable
class Tracker(Protocol):
    """A tracker as a value, for `observers=`.

    Attributes:
        clients: whether values of single clients are sent.
    """

    @property
    def clients(self) -> bool: ...

    def check_tracker(self) -> None:
        """Refuse a tracker whose package is not installed, before a run folder exists.

        Raises:
            UsageError: the package is missing.
        """
        ...

    def open_session(self, files: RunFiles, known: str | None, first: int) -> Session:
        """Open a run of the tracker.

        Args:
            files: the run.
            known: the id of the tracker's run that is continued; None: a new one.
            first: the first round that it has not received.
        """
        ...


def check_trackers(trackers: Sequence[Tracker], without_folder: bool) -> None:
    """Refuse trackers before a run folder exists.

    Args:
        trackers: the trackers.
        without_folder: whether the training writes no run folder.
    Raises:
        UsageError: a package is missing, or there will be no run folder.
    """
    for each in trackers:
        each.check_tracker()
    if trackers and without_folder:
        raise UsageError("A tracker and out = None.", "a run folder.", "a tracker reads it.", Line(python='out="runs"'))


def refuse_missing(package: str, extra: str) -> None:
    """Refuse if a package is not installed.

    Raises:
        UsageError: with the line that installs it.
    """
    if importlib.util.find_spec(package) is None:
        write = f"pip install 'atoll[{extra}]'"
        raise UsageError(
            f"A tracker that needs {package}, which is not installed.", f"the extra atoll[{extra}].", write=write
        )


class Tracking:
    """Sends the rounds of a run to a tracker; an observer. `trackers.json` in the run folder has the tracker's id.

    A resumed run continues the tracker's run. Rounds that it has already received are not sent again: the resumed
    training computes the same bits.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._key = f"{type(tracker).__name__}-{sha256(repr(tracker).encode()).hexdigest()[:8]}"
        self._session: Session | None = None
        self._offsets: dict[str, int] = {}
        self._sent = -1

    def start(self, training: TrainingView | None, path: Path | None) -> None:
        """Open the tracker's run, and send the rounds before a resumption.

        Raises:
            UsageError: there is no run folder, or the tracker does not start.
        """
        if path is None:
            raise UsageError(
                "A tracker without a run folder.", "a run folder.", "a tracker reads it.", Line('out="runs"')
            )
        self._files = RunFiles(path, self._tracker.clients)
        known = self._state().get(self._key, {})
        try:
            self._session = self._tracker.open_session(self._files, known.get("id"), int(known.get("sent", -1)) + 1)
            last = self._session.last
        except AtollError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"{type(self._tracker).__name__} does not start: {reason}", "a tracker that starts."
            ) from error
        self._sent = int(known.get("sent", -1)) if last is None else last
        self._record()
        self._names = self._files.names() if self._tracker.clients else None
        self._send()

    def round(self, report: Report) -> None:
        """Send the rows that were added to metrics.jsonl."""
        self._send()

    def end(self, run: Run) -> None:
        """Send the files of the run, and end the tracker's run."""
        self.finish(run.status)

    def finish(self, status: str) -> None:
        """Send the files of a run with this status, and end the tracker's run."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close(status, self._files)

    def close(self) -> None:
        """End the tracker's run after an error of the training."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close("failed", None)

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self._files.path / STATE).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _record(self) -> None:
        if self._session is not None:
            state = self._state() | {self._key: {"id": self._session.id, "sent": self._sent}}
            atomic_write(self._files.path / STATE, json.dumps(state).encode())

    def _send(self) -> None:
        if self._session is None:
            return
        rows = [(int(row["round"]), _numbers(row)) for row in self._added("metrics.jsonl")]
        own = (
            {int(row["round"]): self._of_clients(row) for row in self._added("clients.jsonl")}
            if self._tracker.clients
            else {}
        )
        new = [(at, {**values, **own.get(at, {})}) for at, values in rows if at > self._sent]
        for start in range(0, len(new), _MOST):
            self._session.log(new[start : start + _MOST])
            self._sent = new[min(start + _MOST, len(new)) - 1][0]
            if self._session.last is None:
                self._record()

    def _added(self, name: str) -> Iterator[dict[str, Any]]:
        """The complete rows of a log after those of the last call."""
        try:
            with open(self._files.path / name, "rb") as log:
                log.seek(self._offsets.get(name, 0))
                data = log.read()
        except FileNotFoundError:
            return
        lines = data[: data.rfind(b"\n") + 1]
        self._offsets[name] = self._offsets.get(name, 0) + len(lines)
        for line in lines.splitlines():
            yield json.loads(line)

    def _of_clients(self, row: Mapping[str, Any]) -> dict[str, float]:
        out = {}
        for name, values in row.items():
            for at, value in zip(row["id"], values, strict=True) if isinstance(values, list) and name != "id" else ():
                client = self._names[at] if self._names and at < len(self._names) else at
                if value is not None:
                    out[f"client/{client}/{name}"] = float(value)
        return out


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl."""
    numeric = {n: v for n, v in row.items() if n not in _TEXTS and isinstance(v, (int, float))}
    return {name: float(value) for name, value in numeric.items()}


def send_run(path: Path, to: Tracker) -> None:
    """Send an ended run to a tracker.

    Args:
        path: the run folder.
        to: the tracker.
    Raises:
        UsageError: the run has not ended, or the tracker does not start.
    """
    status = last_end(path).partition(":")[0]
    if not status:
        raise UsageError(f"{path.name} has not ended.", "a run that has ended.", write=resume_line(path))
    to.check_tracker()
    tracking = Tracking(to)
    tracking.start(None, path)
    tracking.finish(status)


def tracker(text: str) -> Tracker:
    """A tracker of a text such as "mlflow" or "WandB(mode='online')".

    Raises:
        UsageError: an unknown name, or an argument that is refused.
    Example:
        >>> tracker("tensorboard")
        TensorBoard(folder=None, clients=False)
    """
    from atoll.track import MLflow, TensorBoard, WandB

    names = {cls.__name__: cls for cls in (MLflow, TensorBoard, WandB)}
    short = {name.lower(): name for name in names}
    found: Tracker = parse(f"{short[text.lower()]}()" if text.lower() in short else text, names, kind="tracker")
    return found
