"""Show the progress of a training: as a table on a terminal, else as plain lines.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from atoll.plan.round import Report
from atoll.runs.format import better, client_name, duration, format_number, label, plain, size, spread, whole
from atoll.runs.next_line import called

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table

    from atoll.runs.events import Run, TrainingView

Cells = Mapping[str, str]


def without_terminal(file: IO[str], environ: Mapping[str, str]) -> bool:
    """Whether to write plain lines: `file` is no terminal, or CI, NO_COLOR or TERM=dumb is set."""
    ci = environ.get("CI", "").lower() not in ("", "0", "false")
    return not file.isatty() or ci or bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb"


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Args:
        key: the key of the cell in `Cells`.
        head: the heading.
        width: the smallest width, in characters.
        rank: on a narrow terminal the columns of lowest rank are dropped first.
    """

    key: str
    head: str
    width: int
    rank: int


def columns(training: TrainingView) -> tuple[Column, ...]:
    """The columns of a training. Its metrics are known before the first round."""
    names = [] if training.plan.releases else ["loss"]
    if training.evaluator is not None:
        names += ["held_out_loss", *(m.name for m in training.task.metrics)]
    else:
        names += ["gradient_norm"]
    names += ["epsilon"] if training.plan.releases else []
    measured = [Column(n, plain(label(n), 16), 10, 90 - at) for at, n in enumerate(names)]
    return (
        Column("round", "round", 5, 100),
        *measured,
        Column("clients", "clients", 7, 60),
        Column("failed", "failed", 6, 50),
        *_of_time(training),
        Column("up", "up", 7, 30),
        Column("down", "down", 7, 20),
        Column("seconds", "time", 7, 40),
    )


def _of_time(training: TrainingView) -> Iterator[Column]:
    """The columns for lateness, flights in progress, staleness and virtual time, if plan or fleet needs them."""
    pace = training.plan.pace
    if not pace.asynchronous and (pace.cohort_size(1000) > 1000 or pace.deadline_s is not None):
        yield Column("late", "late", 4, 48)
    if pace.asynchronous:
        yield Column("flying", "flying", 6, 44)
        yield Column("staleness", "staleness", 9, 46)
    if training.fleet is not None:
        yield Column("clock", "clock", 9, 55)


def that_fit(all_columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into the width, with three spaces between them; the columns of lowest rank are dropped."""
    kept = list(all_columns)
    while len(kept) > 1 and sum(max(c.width, len(c.head)) + 3 for c in kept) > width:
        kept.remove(min(kept, key=lambda c: c.rank))
    return kept


def cells(report: Report) -> dict[str, str]:
    """The cells of a round. The keys are columns."""
    return {
        "round": str(report.round),
        **{name: format_number(value) for name, value in report.metrics.items()},
        "clients": f"{report.arrived}/{report.cohort}",
        "failed": str(len(report.failures)),
        "late": str(report.late),
        "flying": str(report.flying),
        "staleness": _staleness(report),
        "clock": "" if report.now is None else duration(report.now),
        "up": size(report.bytes_up),
        "down": size(report.bytes_down),
        "seconds": duration(report.seconds),
    }


def _staleness(report: Report) -> str:
    """The mean staleness of the contributions, in rounds."""
    late = report.clients.get("staleness")
    return f"{float(late.double().mean()):.2f}" if late is not None and len(late) else ""


@dataclass
class Best:
    """The best value of each metric so far, with its round and the cells of that round.

    Args:
        rising: for each metric, whether a higher value is better.
        value: for each metric, the best value so far.
        round: for each metric, the round of its best value.
        shown: for each metric, the cells of this round.
    Example:
        >>> best = Best({"loss": False})
        >>> for t, loss in enumerate([2.0, 1.0, float("nan"), 1.5]):
        ...     _ = best.see(Report(t, {"loss": loss}, 1, 1, (), 0, 0))
        >>> best.value["loss"], best.round["loss"]
        (1.0, 1)
    """

    rising: Mapping[str, bool]
    value: dict[str, float] = field(default_factory=dict)
    round: dict[str, int] = field(default_factory=dict)
    shown: dict[str, Cells] = field(default_factory=dict)

    def see(self, report: Report) -> Cells:
        """Update the best values with a round and return the cells of the round."""
        row = cells(report)
        for name, rising in self.rising.items():
            value = report.metrics.get(name, math.nan)
            if math.isfinite(value) and (name not in self.value or better(value, self.value[name], rising)):
                self.value[name], self.round[name], self.shown[name] = value, report.round, row
        return row

    def marked(self, row: Cells) -> set[str]:
        """The columns in which a round has the best value so far."""
        return {name for name, at in self.round.items() if str(at) == row["round"]}


def header(training: TrainingView, path: Path | None) -> list[tuple[str, str]]:
    """The lines above the table, as pairs of label and text: data, model, plan, numerics, device, run folder."""
    data, layout = training.data, training.task.layout
    held = "no held-out rows" if data.held_out is None else f"{whole(len(data.held_out))} held out"
    clients = f"{whole(data.count)} client{'s' if data.count != 1 else ''}"
    lines = [
        ("data", f"{data.name}: {whole(len(data.order))} rows on {clients}, {held}"),
        ("model", f"{whole(layout.d)} parameters, {str(layout.dtype).removeprefix('torch.')}"),
        *(("plan" if not at else "", line) for at, line in enumerate(str(training.plan).splitlines())),
        ("numerics", training.task.numerics),
    ]
    task = training.task
    if task.device.type != "cpu" or task.precision != "full":
        lines.append(("device", f"{task.device}, {task.precision} precision"))
    if path is not None:
        lines += [("run", str(path)), ("page", f"atoll ui {called(path)}")]
    if training.state.round:
        lines.append(("from", f"round {training.state.round}, the last checkpoint"))
    lines += [("note", note) for note in training.notes]
    return [(title, plain(text, 500)) for title, text in lines]


class LiveTable:
    """Show the progress of a training on stderr; an `Observer` for `atoll.train`.

    On a terminal the table shows the last rounds and is redrawn in place. It marks the best value of each metric. After
    the run a selection of its rounds stays visible. Without a terminal the output is plain lines: at most one a second,
    and fewer in long runs. Names of data and clients and error messages are printed as text. Their markup and control
    characters have no effect.

    Args:
        plain: True writes lines instead of a table. None decides by the terminal and the environment (CI, NO_COLOR,
            TERM).
        file: the output stream. None is `sys.stderr` at the start of the run.
        most: the number of rounds in the table, and of rounds that stay visible after the run; ≥ 1.
        summary: whether the last line has the reason, the time and the bytes. The command line prints them by itself.
        clock: a function that returns seconds; only differences count.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("digits").split(clients=3)
        >>> with LiveTable(plain=True) as table:
        ...     run = atoll.train("softmax", data, atoll.recipes.fedavg(), rounds=1, out=None, observers=[table])
    """

    def __init__(
        self,
        *,
        plain: bool | None = None,
        file: IO[str] | None = None,
        most: int = 12,
        summary: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plain, self._to, self.most, self.summary, self.clock = plain, file, most, summary, clock
        self._live: Live | None = None

    def __enter__(self) -> LiveTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self, training: TrainingView, path: Path | None) -> None:
        """Print the lines above the table and start the table."""
        self.close()
        self.training = training
        self.columns = columns(training)
        measured = {"loss": False, "held_out_loss": False} | {m.name: m.higher_is_better for m in training.task.metrics}
        self._judged = training.selection_metric[0]
        self.best = Best({c.key: measured[c.key] for c in self.columns if c.key in measured})
        self.recent: deque[Cells] = deque(maxlen=self.most)
        self.kept: list[Cells] = []
        self._every = 1
        self.done = training.state.round
        self.up, self.down = training.bytes_up, training.bytes_down
        self.failed = 0
        self.now: float | None = None
        self.failure = self.note = ""
        self._began = self._written = self.clock()
        self._ticks: deque[float] = deque([self._began], maxlen=21)
        self._printed: Cells = {}
        self.ended = ""
        self._wall: tuple[str, ...] = ()  # the wall time of the run, once it has ended
        self.file = self._to or sys.stderr
        self.plain = without_terminal(self.file, os.environ) if self._plain is None else self._plain
        if self.plain:
            self._write(*(f"{title:<9}{text}" for title, text in header(training, path)), "")
            self._write(_joined((c.head + " ", c) for c in self.columns))
        else:
            self._open(header(training, path))

    def round(self, report: Report) -> None:
        """Show a round."""
        row = self.best.see(report)
        first = not self.recent
        self.recent.append(row)
        self._keep(row)
        self.done = report.round + 1
        self.up += report.bytes_up
        self.down += report.bytes_down
        self.now = report.now
        if report.failures:
            self.failed += len(report.failures)
            client, at, stage, cause = report.failures[-1]
            who = client_name(client, self.training.data.names)
            self.failure = plain(f"{who} failed in round {at} ({stage}): {cause}")
        if report.notes:
            self.note = plain(f"round {report.round}: {' '.join(report.notes)}", 500)
        now = self.clock()
        self._ticks.append(now)
        wait = max(1.0, (now - self._began) / 100)
        if self.plain and (first or now - self._written >= wait or self.training.outcome is not None):
            self._line(row)
            self._written = now

    def end(self, run: Run) -> None:
        """Print the reason why the run ended.

        On a terminal, a table of some rounds stays on the screen: rounds at equal distances, the last round, and
        the round with the best value of each metric.
        """
        self._wall = (duration(run.wall),)
        self.ended = plain(run.reason if run.reason == run.status else f"{run.status}: {run.reason}", 500)
        if self.plain:
            if self.recent and self.recent[-1] is not self._printed:
                self._line(self.recent[-1])
            if self.summary:
                self._write("   ".join((self.ended, duration(run.wall), *self._totals())))
        self.close()

    def close(self) -> None:
        """Restore the terminal. This method may be called at any time and more than once."""
        live, self._live = self._live, None
        if live is not None:
            self.ended = self.ended or "stopped"
            live.stop()
            atexit.unregister(self.close)

    def _keep(self, row: Cells) -> None:
        """Keep every n-th round; n doubles as the run grows, so that at most `2 · most` rounds are kept."""
        if int(row["round"]) % self._every == 0:
            self.kept.append(row)
        if len(self.kept) > 2 * self.most:
            self._every *= 2
            self.kept = [k for k in self.kept if int(k["round"]) % self._every == 0]

    # Plain lines

    def _write(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self.file, flush=True)

    def _line(self, row: Cells) -> None:
        self._printed, marked = row, self.best.marked(row)
        self._write(_joined((row.get(c.key, "") + ("*" if c.key in marked else " "), c) for c in self.columns))
        for message in filter(None, (self.note, self.failure)):
            self._write(f"  {message}")
        self.note = self.failure = ""

    def _totals(self) -> list[str]:
        parts = [f"↑ {size(self.up)}", f"↓ {size(self.down)}"]
        if self.now is not None:
            parts.append(f"{duration(self.now)} of virtual time")
        name = self._judged
        if name in self.best.value:
            parts.append(f"best {label(name)} {format_number(self.best.value[name])} in round {self.best.round[name]}")
        if self.failed:
            parts.append(f"{whole(self.failed)} failed")
        return parts

    # On a terminal

    def _open(self, lines: Iterable[tuple[str, str]]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        # If stdout is redirected, prints of user code must stay on stdout and not appear in the table.
        console = Console(file=self.file, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._width, self._height = console.width, console.height
        head = Table.grid(padding=(0, 2))
        for title, text in lines:
            head.add_row(Text(title, style="dim"), Text(text))
        console.print(head, "")
        self._live = Live(
            console=console,
            get_renderable=self._drawn,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
        )
        atexit.register(self.close)  # an uncaught error must not leave the cursor hidden
        self._live.start()

    def _drawn(self) -> RenderableType:
        """Render the table and the lines under it. The drawing thread of rich calls this function periodically."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        under: list[RenderableType] = []
        if self.ended:
            style = "bold" if self.ended.startswith("done") else "bold yellow"
            totals = "   ".join((*self._wall, *self._totals()))
            under.append(Text.assemble((self.ended, style), "   ", totals))
        else:
            under += [self._progress(), Text("   ".join(self._totals()))]
        for message in filter(None, (self.note, self.failure)):
            under.append(Text(message, style="yellow", no_wrap=True, overflow="ellipsis"))
        shown = self._table(self._chosen() if self.ended else self._last())
        pad = Table.grid()
        pad.add_row("")
        return Group(shown, pad, *under)

    def _table(self, rows: Iterable[Cells]) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        shown = that_fit(self.columns, self._width)
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
        for column in shown:
            table.add_column(Text(f"{column.head} "), justify="right", no_wrap=True, min_width=column.width + 1)
        for row in rows:
            marked = self.best.marked(row)
            table.add_row(*(Text(*_cell(row, c.key, marked)) for c in shown))
        return table

    def _progress(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rounds, now = self.training.settings.rounds, self.clock()
        progress = f"{whole(self.done)} of {whole(rounds)} rounds   {duration(now - self._began)}"
        if self.training.outcome is not None:
            progress += "   finishing"
        elif len(self._ticks) > 1:
            each = (self._ticks[-1] - self._ticks[0]) / (len(self._ticks) - 1)
            left = max(0.0, each * (rounds - self.done) - (now - self._ticks[-1]))
            progress += f"   about {duration(left)} left"
        line = Table.grid(padding=(0, 2))
        line.add_row(ProgressBar(total=rounds, completed=min(self.done, rounds), width=24), Text(progress))
        return line

    def _last(self) -> list[Cells]:
        """The last rounds. If the best round is older, it comes first."""
        recent = list(self.recent)[-max(3, self._height - 9) :]
        at = self.best.round.get(self._judged)
        if at is None or not recent or at >= int(recent[0]["round"]):
            return recent
        return [self.best.shown[self._judged], *recent]

    def _chosen(self) -> list[Cells]:
        """A selection of rounds from the first to the last, including each round with a best value."""
        few = [self.kept[i] for i in spread(len(self.kept), self.most)] + list(self.recent)[-1:]
        by_round = {int(row["round"]): row for row in (*few, *self.best.shown.values())}
        return [by_round[at] for at in sorted(by_round)]


def _cell(row: Cells, key: str, marked: set[str]) -> tuple[str, str]:
    """The text and the style of a cell. A star marks the best value, so that the mark does not depend on colour."""
    text = row.get(key, "")
    return (f"{text}*", "bold green") if key in marked else (f"{text} ", "")


def _joined(parts: Iterable[tuple[str, Column]]) -> str:
    """Join cells into a line; each has the width of its column plus one character for the star."""
    return " ".join(text.rjust(max(c.width, len(c.head)) + 1) for text, c in parts).rstrip()
