"""The work of `run` and `resume`: train with a live table, and print the result.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.base.errors import Note, RunError
from atoll.cli import output

if TYPE_CHECKING:
    from atoll.runs.events import Observer, Run
    from atoll.track.tracking import Tracker
    from atoll.training.experiment import Experiment


@dataclass(frozen=True)
class Look:
    """The output of a command: `--json` prints one object on stdout, `--quiet` no progress on stderr.

    `title` and `tags` are the labels of each new run, `trackers` receive its rounds.
    """

    as_json: bool
    quiet: bool
    title: str | None = None
    tags: tuple[str, ...] = ()
    trackers: tuple[Tracker, ...] = ()

    @contextlib.contextmanager
    def observers(self) -> Iterator[list[Observer | Tracker]]:
        """The observers of a training. The terminal is restored at the end, also after an error."""
        from atoll.cli.ui import LabelWriter

        labels = LabelWriter(self.title, self.tags)
        if self.quiet:
            yield [labels, *self.trackers]
            return
        from atoll.report.live import LiveTable

        with LiveTable(plain=True if self.as_json else None, summary=self.as_json) as table, warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)  # the table prints each note
            yield [labels, table, *self.trackers]


def prints(it: Experiment) -> bool:
    """Whether this process prints: only the primary process of a training does."""
    return it.spec().primary


@dataclass
class _Ended:
    """Keeps the run that has ended; an `Observer`."""

    run: Run | None = None

    def end(self, run: Run) -> None:
        self.run = run


def run_training(it: Experiment, look: Look, **more: Any) -> int:
    """Train once and print the result. With `--json` that of a failed run, too, before its error."""
    ended = _Ended()
    try:
        run = _train(it, look, ended, **more)
    except RunError:
        if ended.run is not None and look.as_json and prints(it):
            output.print_json(output.outcome(ended.run))
        raise
    if not prints(it):
        pass
    elif look.as_json:
        output.print_json(output.outcome(run))
    else:
        print(run.summary())
    return 130 if run.status == "interrupted" else 0


def _train(it: Experiment, look: Look, *further: _Ended, **more: Any) -> Run:
    if not prints(it):
        return it.train(progress="none", **more)
    with look.observers() as observers:
        return it.train(observers=[*observers, *further], progress="none", **more)


def several(it: Experiment, seeds: int, look: Look) -> int:
    """Train with several seeds in sequence, and print mean ± sd of each metric."""
    done: list[tuple[int, Run]] = []
    for seed in range(it.seed, it.seed + seeds):
        run = _train(it.override(seed=seed), look)
        done.append((seed, run))
        if run.status == "interrupted":
            break
    if not prints(it):
        pass
    elif look.as_json:
        output.print_json(output.outcomes(done))
    else:
        print(output.seeds(done))
    return 130 if done[-1][1].status == "interrupted" else 0


def smoke(it: Experiment, look: Look) -> int:
    """Try each stage once in a temporary folder: a round, an evaluation, a checkpoint, resuming from it, the report."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="atoll-smoke-") as folder:
        it = it.override(out=folder, evaluate_every=1, rounds=1)
        first = _train(it, look)
        if first.status == "interrupted":
            return 130
        written = first.path or Path(folder)  # only the primary process writes
        stages = ["data, model and plan fit", "a round", "an evaluation", "a checkpoint", "the report"]
        stages += ["the baselines"] if it.baselines else []
        resumed = _train(it.override(rounds=2, baselines=False), look, resume=written)
        if resumed.status == "interrupted":
            return 130
        stages.append("resuming from the checkpoint")
        missing = [n for n in ("model.safetensors", "metrics.csv", "report.html") if not (written / n).is_file()]
        if missing and prints(it):
            raise RunError(
                f"The run wrote no {' and no '.join(missing)}.", "every file of a run.", write="atoll doctor"
            )
        stages.append("the files of a run")
    if not prints(it):
        pass
    elif look.as_json:
        output.print_json(output.outcome(resumed) | {"smoke": stages, "run": None, "path": None})
    else:
        print("\n".join(f"ok  {stage}" for stage in stages))
        print("The temporary folder was removed.  Next: the same command without --smoke.")
    return 0
