"""The progress of a training from Python: a table on a terminal, HTML in a notebook.

Tests: tests/surface/test_notebook.py
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from atoll.base.errors import Note, UsageError, unknown_name
from atoll.base.lines import Line
from atoll.base.markup import html_table
from atoll.report.live import Best, Cells, LiveTable, columns, without_terminal
from atoll.runs.format import duration, whole

if TYPE_CHECKING:
    from atoll.plan.round import Report
    from atoll.runs.events import Observer, Run, TrainingView

Progress = Literal["auto", "table", "html", "none"]
KINDS = ("auto", "table", "html", "none")
_EVERY = 0.25  # seconds between two updates of a notebook
Show = Callable[[str], None]


def progress_view(progress: str, observers: Sequence[Any]) -> Observer | None:
    """The view of a training; None if it has none.

    Args:
        progress: "table", "html", "none", or "auto": HTML in a notebook, the table on a terminal, else none.
        observers: the observers of the user. With a `LiveTable` among them, "auto" is "none".
    Raises:
        UsageError: an unknown name, or "html" outside a notebook without IPython.
    """
    if progress not in KINDS:
        raise unknown_name("progress", progress, KINDS, lambda near: Line(python=f'progress="{near}"'))
    if progress == "auto":
        shown = any(isinstance(each, LiveTable) for each in observers)
        progress = "none" if shown else "html" if _notebook() else "table" if _terminal() else "none"
    if progress == "none":
        return None
    return LiveTable() if progress == "table" else HtmlProgress(_display())


def _terminal() -> bool:
    return not without_terminal(sys.stderr, os.environ)


def _notebook() -> bool:
    """Whether the code runs in a Jupyter kernel (also of Colab and VS Code) or in a marimo notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell") or _in_marimo()


def _in_marimo() -> bool:
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def _display() -> Show:
    """A function that shows HTML in place of the HTML before it."""
    if _in_marimo():
        marimo: Any = sys.modules["marimo"]
        return lambda text: marimo.output.replace(marimo.Html(text))
    try:
        from IPython.display import HTML, display
    except ImportError:
        raise UsageError(
            'progress = "html", and IPython is not installed.', "a notebook.", write=Line(python='progress="table"')
        ) from None
    handle: list[Any] = []

    def show(text: str) -> None:
        if handle:
            handle[0].update(HTML(text))
        else:
            handle.append(display(HTML(text), display_id=True))

    return show


class HtmlProgress:
    """Shows the last rounds of a training as HTML, at most 4 times a second; an `Observer`.

    Args:
        show: a function that receives the HTML.
        most: the number of rounds; ≥ 1.
        clock: a function that returns seconds.
    """

    def __init__(self, show: Show, most: int = 12, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._recent: deque[Cells] = deque(maxlen=most)

    def start(self, training: TrainingView, path: Path | None) -> None:
        """Show the table without rounds."""
        self._training, self._columns = training, columns(training)[:12]
        measured = {"loss": False, "held_out_loss": False} | {m.name: m.higher_is_better for m in training.task.metrics}
        self._best = Best({c.key: measured[c.key] for c in self._columns if c.key in measured})
        self._began = self._shown = self._clock()
        self._first = training.state.round
        self._draw("")

    def round(self, report: Report) -> None:
        """Show a round, unless the last update is less than a quarter of a second ago."""
        self._recent.append(self._best.see(report))
        now = self._clock()
        if now - self._shown >= _EVERY:
            self._shown = now
            done, total = report.round + 1, self._training.settings.rounds
            left = (now - self._began) / max(1, done - self._first) * max(0, total - done)
            self._draw(f"{whole(done)} of {whole(total)} rounds, about {duration(left)} left")

    def end(self, run: Run) -> None:
        """Show the last rounds and the reason of the end."""
        self._draw(f"{run.status}: {run.reason}")

    def _draw(self, below: str) -> None:
        rows = [[c.head for c in self._columns]]
        for row in self._recent:
            marked = self._best.marked(row)
            rows.append([row.get(c.key, "") + ("*" if c.key in marked else "") for c in self._columns])
        self._show(html_table(f"training on {self._training.data.name}; * the best", rows, below))


@runtime_checkable
class Closes(Protocol):
    """A view with something to close."""

    def close(self) -> None: ...


class Mirror:
    """An observer whose errors do not reach the training: the first one becomes a note, and the view ends.

    Args:
        view: the observer.
        note: receives the text of the note.
        name: the name of the view in the note.
        must_start: whether an error at the start reaches the training, so that it is refused before round 0.
    """

    def __init__(
        self, view: Observer, note: Callable[[str], None], name: str = "progress view", must_start: bool = False
    ) -> None:
        self._view: Observer | None = view
        self._note, self._name, self._must_start = note, name, must_start

    def _call(self, act: Callable[[Observer], None]) -> None:
        if self._view is None:
            return
        view = self._view
        try:
            act(view)
        except Exception as error:
            self._view = None
            if isinstance(view, Closes):
                with contextlib.suppress(Exception):  # one note is enough
                    view.close()
            text = f"The {self._name} failed and ended: {type(error).__name__}: {error}"
            warnings.warn(Note(text), stacklevel=2)
            self._note(text)

    def start(self, training: TrainingView, path: Path | None) -> None:
        if self._must_start and self._view is not None:
            self._view.start(training, path)
        else:
            self._call(lambda view: view.start(training, path))

    def round(self, report: Report) -> None:
        self._call(lambda view: view.round(report))

    def end(self, run: Run) -> None:
        self._call(lambda view: view.end(run))

    def close(self) -> None:
        """Close the view after an error of the training: a table gives the terminal back, a tracker ends its run."""
        view = self._view
        if isinstance(view, Closes):
            self._call(lambda _: view.close())
