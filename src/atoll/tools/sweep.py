"""Train an experiment with several values of its settings, and choose the best: a grid, or proposals of Optuna.

    atoll sweep experiment.toml --over "plan.local.optimizer.lr=[0.01, 0.1, 1]" --confirm 3

The folder of a sweep has `sweep.toml`, `trials.jsonl` and the run folder of each trial. A run has the tag of its trial,
so the same command continues a sweep that was killed.

Tests: tests/surface/test_sweep.py
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

from atoll import runs
from atoll.base.errors import RunError, UsageError, unknown_name
from atoll.base.files import write_output
from atoll.base.lines import Change, Line, quoted
from atoll.base.markup import mimebundle, preformatted
from atoll.compute.metric_names import direction
from atoll.runs.format import format_number, label
from atoll.runs.labels import Labels
from atoll.runs.summary import grid
from atoll.training.experiment import Experiment
from atoll.training.setting_texts import read_toml, toml

EXAMPLE = "plan.local.optimizer.lr=log(1e-3, 1)"
OPTIMISTIC = "The best of {n} trials, chosen by the same held-out rows, is optimistic."
_RANGE = re.compile(r"(log|linear|int)\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*\)")
_OF_THE_SWEEP = {"seed": "--seeds 5", "out": "--out runs"}
Record = Callable[[float | None], None]


@dataclass(frozen=True)
class Range:
    """An interval of values of a setting: `log(1e-3, 1)`, `linear(0, 1)` or `int(1, 8)`, with both ends.

    Args:
        kind: "log", "linear" or "int".
        low, high: the ends, low < high; > 0 for "log", whole numbers for "int".
    """

    kind: str
    low: float
    high: float

    @property
    def ends(self) -> tuple[str, str]:
        """The texts of both ends."""
        whole = self.kind == "int"
        return (repr(int(self.low)), repr(int(self.high))) if whole else (repr(self.low), repr(self.high))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(self.ends)})"


Space = Mapping[str, tuple[str, ...] | Range]


@dataclass(frozen=True)
class SweepTrial:
    """The trainings with one choice of values.

    Args:
        number: the place of the trial in the order of proposals, from 0.
        settings: the text of each setting of the sweep.
        values: the metric after the last round, for each seed; None if the training diverged.
        runs: the names of the run folders.
    """

    number: int
    settings: Mapping[str, str]
    values: tuple[float | None, ...]
    runs: tuple[str, ...]

    @property
    def value(self) -> float | None:
        """The mean over seeds; None if a training diverged."""
        known = [v for v in self.values if v is not None]
        return fmean(known) if known and len(known) == len(self.values) else None


@dataclass(frozen=True, repr=False)
class Sweep:
    """The result of a sweep.

    Args:
        path: its folder.
        metric: the metric that chose.
        higher: whether larger values are better.
        trials: the finished trials, in the order of proposals.
        confirmed: the values of the best settings with new seeds; empty if none were requested.
        finished: whether all trials have ended; False after Ctrl-C.
    """

    path: Path
    metric: str
    higher: bool
    trials: tuple[SweepTrial, ...]
    confirmed: tuple[float | None, ...] = ()
    finished: bool = True

    @property
    def best_trial(self) -> SweepTrial | None:
        """The trial with the best mean value, the first of equal ones; None if every trial diverged."""
        known = [t for t in self.trials if t.value is not None]
        return max(known, key=lambda t: (t.value or 0.0) * (1 if self.higher else -1), default=None)

    @property
    def best(self) -> Mapping[str, str]:
        """The settings of the best trial; {} if there is none."""
        return self.best_trial.settings if self.best_trial else {}

    @property
    def value(self) -> float | None:
        """The value of the best trial: an optimistic one, because the same held-out rows chose it."""
        return self.best_trial.value if self.best_trial else None

    def text(self) -> str:
        """Format the trials as a table, best first, with the best settings and their confirmation."""
        keys = list(dict.fromkeys(k for t in self.trials for k in t.settings))
        order = sorted(self.trials, key=lambda t: (t.value is None, (t.value or 0.0) * (-1 if self.higher else 1)))
        rows = [["trial", *keys, label(self.metric), "run"]]
        for trial in order:
            value = "diverged" if trial.value is None else format_number(trial.value)
            rows.append([str(trial.number), *(_short(trial.settings[k]) for k in keys), value, trial.runs[0]])
        lines = ["", *grid(rows), ""]
        if self.best_trial:
            sets = " ".join(f"--set {quoted(f'{k}={v}')}" for k, v in self.best.items())
            seeds = len(self.best_trial.values)
            mean = f", mean of {seeds} seeds" if seeds > 1 else ""
            lines += [
                f"best       {label(self.metric)} {format_number(self.value)}{mean}, after the last round",
                f"           {OPTIMISTIC.format(n=len(self.trials))}",
            ]
            lines += [f"confirmed  {_spread(self.confirmed)}, new seeds also of the split"] if self.confirmed else []
            lines += [f"set        {sets}"]
        lines += [f"sweep      {self.path}"]
        return "\n".join(lines + ([] if self.finished else ["Interrupted. The same command continues it."]))

    def __repr__(self) -> str:
        return (
            f"Sweep({self.path.name!r}, trials={len(self.trials)}, best={dict(self.best)}, {self.metric}={self.value})"[
                :400
            ]
        )

    def _repr_html_(self) -> str:
        return preformatted(self.text())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    def values(self) -> dict[str, Any]:
        """The result as one JSON object."""
        trials = [asdict(t) | {"value": t.value} for t in self.trials]
        known = [v for v in self.confirmed if v is not None]
        confirmed = (
            {"values": list(self.confirmed), "mean": fmean(known) if known else None} if self.confirmed else None
        )
        if confirmed is not None:
            confirmed["sd"] = stdev(known) if len(known) > 1 else None
        best = dict(self.best) or None
        return {
            "best": best,
            "value": self.value,
            "metric": self.metric,
            "trials": trials,
            "confirmed": confirmed,
            "path": str(self.path),
        }


def _short(text: str) -> str:
    try:
        return text if len(text) < 8 else f"{float(text):.4g}"
    except ValueError:
        return text


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    diverged = f", {len(values) - len(known)} diverged" if len(known) < len(values) else ""
    sd = f" ± {format_number(stdev(known))}" if len(known) > 1 else ""
    return f"{format_number(fmean(known)) if known else 'no value'}{sd} with {len(values)} seeds{diverged}"


# the values to try


def read_space(over: Mapping[str, Any]) -> Space:
    """The values of each setting, from texts such as "[1, 2]" and "log(1e-3, 1)", or from lists.

    Raises:
        UsageError: no setting, an empty or reversed range, a logarithmic range from 0, or no such form.
    Example:
        >>> read_space({"rounds": "[1, 2]", "plan.local.optimizer.lr": "log(1e-3, 1)"})["rounds"]
        ('1', '2')
    """
    if not over:
        raise UsageError("A sweep over no setting.", "at least one setting.", write=_over(EXAMPLE))
    return {key.replace("-", "_"): _values(key, value) for key, value in over.items()}


def _over(text: str) -> Line:
    key, _, values = text.partition("=")
    return Line(python=f"over={{{key!r}: {values!r}}}", shell=f"--over {quoted(text)}")


def _values(key: str, value: Any) -> tuple[str, ...] | Range:
    if key in _OF_THE_SWEEP:
        write = Line(shell=_OF_THE_SWEEP[key])
        raise UsageError(f"--over {key}.", "another setting.", "the sweep itself sets it for each trial.", write)
    if not isinstance(value, str):
        texts = tuple(str(each).lower() if isinstance(each, bool) else str(each) for each in value)
    elif found := _RANGE.fullmatch(value.strip()):
        return _range(key, found.group(1), found.group(2), found.group(3))
    elif value.strip().startswith("[") and value.strip().endswith("]"):
        texts = tuple(_items(value.strip()[1:-1]))
    else:
        form = "a list [a, b], or log(low, high), linear(low, high), int(low, high)."
        raise UsageError(f"{key} = {value}.", form, write=_over(f"{key}=[{value}]"))
    if not texts or len(set(texts)) < len(texts):
        raise UsageError(f"{key} = {value}.", "at least one value, each once.", write=_over(EXAMPLE))
    return texts


def _items(text: str) -> Iterator[str]:
    """The items of a list: the text between commas that are in no bracket and no quotes."""
    depth, quote, item = 0, "", ""
    for letter in text:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            yield item.strip()
            item = ""
        else:
            item += letter
    if item.strip():
        yield item.strip()


def _range(key: str, kind: str, low: str, high: str) -> Range:
    given = f"{key} = {kind}({low}, {high})."
    try:
        ends = [float(low), float(high)]
    except ValueError:
        raise UsageError(given, "two numbers.", write=_over(f"{key}={kind}(1, 8)")) from None
    if kind == "int" and not all(end.is_integer() for end in ends):
        raise UsageError(given, "two whole numbers.", write=_over(f"{key}=int(1, 8)"))
    if kind == "log" and ends[0] <= 0:
        why = "the logarithm of 0 is not finite, and a negative number has none."
        raise UsageError(given, "two numbers > 0.", why, _over(f"{key}=log(1e-3, 1)"))
    if not (all(map(math.isfinite, ends)) and ends[0] < ends[1]):
        raise UsageError(
            given, "finite numbers, the first smaller than the second.", write=_over(f"{key}=log(1e-3, 1)")
        )
    return Range(kind, *ends)


# proposals


class Proposer(Protocol):
    """Proposes settings in a fixed order."""

    def ask(self) -> tuple[dict[str, str], Record]:
        """The settings of the next trial, and a function that receives its value."""
        ...


class _Grid:
    def __init__(self, space: Mapping[str, Sequence[str]]) -> None:
        self._left = itertools.product(*([(key, text) for text in texts] for key, texts in space.items()))

    def ask(self) -> tuple[dict[str, str], Record]:
        return dict(next(self._left)), lambda value: None


class _Optuna:
    """The tree-structured Parzen estimator of Optuna, seeded. Its state is rebuilt from the values of finished trials.

    Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011.
    """

    def __init__(self, space: Space, seed: int, higher: bool) -> None:
        try:
            import optuna
        except ImportError:
            needed = "lists of values, or Optuna."
            raise UsageError(
                "A range needs Optuna, which is not installed.", needed, write='pip install "atoll[sweep]"'
            ) from None
        self._space, self._failed = {k: _distribution(v) for k, v in space.items()}, optuna.trial.TrialState.FAIL
        shown = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed)
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if higher else "minimize")
        optuna.logging.set_verbosity(shown)

    def ask(self) -> tuple[dict[str, str], Record]:
        trial = self._study.ask(self._space)
        texts = {k: v if isinstance(v, str) else repr(v) for k, v in trial.params.items()}
        return {k: texts[k] for k in self._space}, partial(self._record, trial)

    def _record(self, trial: Any, value: float | None) -> None:
        self._study.tell(trial, value, state=None if value is not None else self._failed)


def _distribution(values: tuple[str, ...] | Range) -> Any:
    from optuna import distributions as of

    if not isinstance(values, Range):
        return of.CategoricalDistribution(values)
    if values.kind == "int":
        return of.IntDistribution(int(values.low), int(values.high))
    return of.FloatDistribution(values.low, values.high, log=values.kind == "log")


# the folder


@dataclass
class _Folder:
    """The folder of a sweep: the finished trainings in trials.jsonl, one a line."""

    path: Path

    def rows(self) -> dict[tuple[int, int, bool], dict[str, Any]]:
        """The finished trainings, by trial, seed and whether they confirm the best."""
        found = runs.read_rows(self.path / "trials.jsonl")
        return {(row["trial"], row["seed"], row["confirms"]): row for row in found}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, in one step."""
        all_rows = [*self.rows().values(), *rows]
        write_output(self.path / "trials.jsonl", "".join(json.dumps(row) + "\n" for row in all_rows).encode())

    def run_of(self, tag: str) -> Path | None:
        """The run with this tag, if it was begun. A run that was killed before it had a tag and a round is removed."""
        found = None
        for path in runs.list_runs(self.path):
            tags = Labels.read(path).tags
            if tag in tags:
                found = path
            elif not tags and not runs.is_locked(path) and not runs.read_rows(path / "metrics.jsonl"):
                shutil.rmtree(path)
        return found


def _sweep_folder(parent: Path, name: str, facts: Mapping[str, Any], trials: int) -> _Folder:
    """The folder of a sweep with these facts: that of an earlier call of the same sweep, or a new one.

    Raises:
        UsageError: the settings or the data have changed under an unfinished sweep.
    """
    for number in itertools.count(1):
        folder = _Folder(parent / (f"sweep-{name}" if number == 1 else f"sweep-{name}-{number}"))
        recorded = read_toml(folder.path / "sweep.toml") if (folder.path / "sweep.toml").is_file() else None
        if recorded is None:
            with_trials = {"trials": trials, **facts}
            head = "# A sweep. The same command continues it.\n"
            write_output(
                folder.path / "sweep.toml",
                (head + "".join(f"{key} = {toml(value)}\n" for key, value in with_trials.items())).encode(),
            )
            return folder
        wanted = recorded.pop("trials")
        if recorded == dict(facts):
            return folder
        same = all(recorded.get(key) == facts[key] for key in ("over", "metric", "seeds"))
        done = sum(not row["confirms"] for row in folder.rows().values())
        if same and done < wanted * facts["seeds"]:
            what = "data" if recorded.get("settings") == facts["settings"] else "settings"
            raise UsageError(
                f"The {what} changed under the unfinished sweep {folder.path}.",
                f"the {what} with which it began, or another folder.",
                "trials of two experiments cannot be compared.",
                Line(python='out="other"', shell="--out other"),
            )
    raise StopIteration  # the count never ends


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            given = f"The sweep {path} is in progress in another process."
            raise UsageError(given, "one process for each sweep.", write=Line('out="other"', "--out other")) from None
        yield


# the trainings


@dataclass(frozen=True)
class _Task:
    """One training of a sweep."""

    trial: int
    seed: int
    settings: Mapping[str, str]
    confirms: bool = False

    @property
    def key(self) -> tuple[int, int, bool]:
        return self.trial, self.seed, self.confirms

    @property
    def tag(self) -> str:
        return f"{'confirm' if self.confirms else 'trial'}-{self.trial}-seed-{self.seed}"

    def row(self, status: str, run: str, value: float | None) -> dict[str, Any]:
        value = None if value is None or not math.isfinite(value) else value
        about = {"trial": self.trial, "seed": self.seed, "confirms": self.confirms, "settings": dict(self.settings)}
        return {**about, "run": run, "status": status, "value": value}


@dataclass
class _Begun:
    """An observer that tags a run when its folder exists."""

    tag: str
    path: Path | None = None

    def start(self, training: Any, path: Path | None) -> None:
        self.path = path
        if path is not None:
            Labels.read(path).changed(None, [self.tag]).write(path)


def _metric_line(near: str) -> Line:
    return Line(python=f'metric="{near}"', shell=f"--metric {near}")


@dataclass(frozen=True)
class _Trainer:
    """Trains tasks: one in this process, or several at a time in processes of their own."""

    experiment: Experiment
    folder: _Folder
    metric: str
    jobs: int

    def train(self, tasks: Sequence[_Task]) -> list[dict[str, Any]]:
        """The rows of tasks, in their order. A task with a status of "interrupted" was stopped by Ctrl-C."""
        if self.jobs == 1:
            return [self._here(task) for task in tasks]
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self._process, tasks))

    def _of(self, task: _Task) -> Experiment:
        it = self.experiment.with_settings(task.settings, "--over")
        return it.override(seed=task.seed, out=str(self.folder.path))

    def _here(self, task: _Task) -> dict[str, Any]:
        begun = _Begun(task.tag)
        before = self.folder.run_of(task.tag)
        more: dict[str, Any] = {} if before is None else {"resume": before}
        try:
            run = self._of(task).train(observers=(begun,), progress="none", report=False, **more)
        except RunError:
            if begun.path is None or not runs.last_end(begun.path).startswith("failed"):
                raise
            return task.row("failed", begun.path.name, None)
        return task.row(run.status, run.path.name if run.path else "", self._value(run.status, run.metrics))

    def _value(self, status: str, metrics: Mapping[str, float]) -> float | None:
        """The metric of an ended run; None for one that Ctrl-C stopped, perhaps before its first evaluation."""
        if status == "interrupted":
            return None
        if self.metric not in metrics:
            raise unknown_name("metric", self.metric, metrics, _metric_line)
        return metrics[self.metric]

    def _process(self, task: _Task) -> dict[str, Any]:
        """Train a task by the command line in another process."""
        it = self._of(task)
        before = self.folder.run_of(task.tag)
        with tempfile.TemporaryDirectory(prefix="atoll-sweep-") as folder:
            config = Path(folder) / "config.toml"
            config.write_text(it.override(report=False).toml(), encoding="utf-8")
            words = ["run", str(config), "--tag", task.tag] if before is None else ["resume", str(before)]
            words += ["--json", "--quiet", *([] if it.untrusted else ["--trust"])]
            # The file has the settings of the environment already.
            environ = {n: v for n, v in os.environ.items() if n == "ATOLL_DATA" or not n.startswith("ATOLL_")}
            environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
            done = subprocess.run([sys.executable, "-m", "atoll", *words], capture_output=True, text=True, env=environ)
        path = self.folder.run_of(task.tag)
        if done.returncode in (0, 130):
            found = json.loads(done.stdout)
            return task.row(found["status"], found["run"], self._value(found["status"], found["metrics"]))
        if path is None or not runs.last_end(path).startswith("failed"):
            raise RunError(f"Trial {task.trial} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
        return task.row("failed", path.name, None)


def sweep(
    experiment: Experiment | str | Path,
    over: Mapping[str, Any],
    *,
    trials: int = 20,
    seeds: int = 1,
    metric: str | None = None,
    confirm: int = 0,
    jobs: int = 1,
    out: str | Path | None = None,
    name: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Train an experiment with several values of its settings, and choose the best mean value after the last round.

    If all values are lists, every combination is a trial. Otherwise Optuna proposes `trials` trials, seeded by the seed
    of the experiment. The same call continues a sweep that was killed, with the same trials and the same best.

    Args:
        experiment: the experiment, or the path of its TOML file.
        over: the values of each setting: a list, or the text "[a, b]", "log(low, high)", "linear(low, high)" or
            "int(low, high)". The keys are those of `--set`.
        trials: the number of proposals, ≥ 1; a grid does not use it.
        seeds: the number of seeds of each trial, ≥ 1, from that of the experiment.
        metric: the name of the metric that chooses; None: the first metric of the held-out rows.
        confirm: the number of new seeds, also of the split, with which the best settings are trained again; ≥ 0.
        jobs: the number of trainings at a time, ≥ 1. With several, each is a process of its own, and this number of
            proposals is made at a time.
        out: the parent of the folder of the sweep; None: that of the experiment.
        name: the end of the name of its folder; None: that of the file.
        note: receives a line about each training.
    Returns:
        The trials and the best of them.
    Raises:
        UsageError: an unknown setting, an empty range, a changed experiment under an unfinished sweep, a budget of
            privacy without a shared ledger, or Optuna is needed and not installed.
        RunError: every trial diverged.
    Example:
        >>> import tempfile
        >>> it = Experiment().override(data="wine", model="softmax", clients=5, rounds=2, recipe="fedavg(lr=0.1)")
        >>> found = sweep(it, {"plan.local.optimizer.lr": [0.01, 0.1]}, out=tempfile.mkdtemp())
        >>> len(found.trials), sorted(found.best)
        (2, ['plan.local.optimizer.lr'])
    """
    it = experiment if isinstance(experiment, Experiment) else Experiment.read(experiment)
    stem = name or ("settings" if isinstance(experiment, Experiment) else Path(experiment).stem)
    _check_counts(trials=(trials, 1), seeds=(seeds, 1), jobs=(jobs, 1), confirm=(confirm, 0))
    space = read_space(over)
    total = _check_space(it, space, trials)
    metric, higher, facts = _facts(it, space, metric, seeds)
    folder = _sweep_folder(Path(out if out is not None else it.out), stem, facts, total)
    lists = {key: values for key, values in space.items() if not isinstance(values, Range)}
    with _locked(folder.path):
        proposer: Proposer = _Grid(lists) if len(lists) == len(space) else _Optuna(space, it.seed, higher)
        trainer = _Trainer(it, folder, metric, jobs)
        found = Sweep(folder.path, metric, higher, *_run_trials(trainer, proposer, total, seeds, note))
        if found.finished and found.best_trial is None:
            raise RunError(f"All {total} trials diverged.", "at least one that does not.", write="atoll lr")
        if not found.finished or not confirm or found.best_trial is None:
            return found
        best, first = found.best_trial, it.seed + seeds
        tasks = [_Task(best.number, seed, best.settings, True) for seed in range(first, first + confirm)]
        rows = _finish(trainer, tasks, note)
    values = tuple(row["value"] for row in rows if row["status"] != "interrupted")
    return replace(found, confirmed=values, finished=len(values) == confirm)


def _check_counts(**given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            write = Line(python=f"{name}={least + 1}", shell=f"--{name} {least + 1}")
            raise UsageError(f"{name} = {value!r}.", f"an integer, at least {least}.", write=write)


def _check_space(it: Experiment, space: Space, trials: int) -> int:
    """The number of trials, after a check of the settings: each combination of lists, and both ends of ranges."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "A sweep under torchrun.", "one process.", "every rank would sweep.", Line(shell="atoll sweep")
        )
    it.check()
    texts = {key: values.ends if isinstance(values, Range) else values for key, values in space.items()}
    for combination in itertools.product(*texts.values()):
        tried = it.with_settings(dict(zip(texts, combination, strict=True)), "--over")
        tried.check()
        if tried.plan().releases and it.ledger is None:
            raise UsageError(
                "A sweep of a plan with noise, without a ledger.",
                "a ledger that all trials share.",
                "each trial trains with the rows of the same clients, so their ε add up.",
                Change("ledger", "ledger.jsonl"),
            )
    return trials if any(isinstance(v, Range) for v in space.values()) else math.prod(map(len, texts.values()))


def _facts(it: Experiment, space: Space, metric: str | None, seeds: int) -> tuple[str, bool, dict[str, Any]]:
    """The metric, whether larger values are better, and the facts that an unfinished sweep must share."""
    first = {key: values.ends[0] if isinstance(values, Range) else values[0] for key, values in space.items()}
    training = it.with_settings(first, "--over").training(engine="inprocess")
    training.close()
    usual, higher = training.selection_metric
    known = {m.name: m.higher_is_better for m in training.task.metrics} | {usual: higher}
    if metric is not None and metric not in known:
        names, sign = training.metric_names, direction(metric)
        if names is not None and metric not in names:
            raise unknown_name("metric of the experiment", metric, names, _metric_line)
        if sign is None:
            raise unknown_name("metric with a known better direction", metric, known, _metric_line)
        known[metric] = sign > 0
    chosen = metric or usual
    over = [f"{k}={v if isinstance(v, Range) else f'[{_joined(v)}]'}" for k, v in space.items()]
    settings = sha256(it.override(out="").toml().encode()).hexdigest()
    facts = {
        "over": over,
        "metric": chosen,
        "seeds": seeds,
        "settings": settings,
        "data": str(training.data.fingerprint()),
    }
    return chosen, known[chosen], facts


def _joined(texts: Sequence[str]) -> str:
    return ", ".join(texts)


def _run_trials(
    trainer: _Trainer, proposer: Proposer, total: int, seeds: int, note: Callable[[str], None]
) -> tuple[tuple[SweepTrial, ...], tuple[()], bool]:
    """The finished trials, and whether all have ended. Proposals are made in batches of `jobs`."""
    trials: list[SweepTrial] = []
    while len(trials) < total:
        first, size = len(trials), min(trainer.jobs, total - len(trials))
        asked = [proposer.ask() for _ in range(size)]
        base = trainer.experiment.seed
        tasks = [_Task(first + i, base + s, settings) for i, (settings, _) in enumerate(asked) for s in range(seeds)]
        rows = _finish(trainer, tasks, note)
        if len(rows) < len(tasks) or any(row["status"] == "interrupted" for row in rows):
            return tuple(trials), (), False
        for i, (settings, record) in enumerate(asked):
            its = rows[i * seeds : (i + 1) * seeds]
            names = tuple(row["run"] for row in its)
            trials.append(SweepTrial(first + i, settings, tuple(row["value"] for row in its), names))
            record(trials[-1].value)
    return tuple(trials), (), True


def _finish(trainer: _Trainer, tasks: Sequence[_Task], note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of tasks: the recorded ones, and those that are trained now, up to an interrupted one.

    Raises:
        UsageError: a recorded trial has other settings than the proposal, as after an update of Optuna.
    """
    known = trainer.folder.rows()
    for task in tasks:
        if task.key in known and known[task.key]["settings"] != dict(task.settings):
            raise UsageError(
                f"Trial {task.trial} of {trainer.folder.path} has other settings than its proposal now.",
                "the version of Optuna with which the sweep began, or another folder.",
                write=Line(python='out="other"', shell="--out other"),
            )
    missing = [task for task in tasks if task.key not in known]
    size = trainer.jobs
    for batch in (missing[i : i + size] for i in range(0, len(missing), size)):
        rows = trainer.train(batch)
        done = [row for row in rows if row["status"] != "interrupted"]
        trainer.folder.add(done)
        for row in done:
            known[row["trial"], row["seed"], row["confirms"]] = row
            value = "diverged" if row["value"] is None else format_number(row["value"])
            texts = "  ".join(f"{k}={_short(v)}" for k, v in row["settings"].items())
            note(f"{'confirm' if row['confirms'] else 'trial'} {row['trial']}  seed {row['seed']}  {texts}  {value}")
        if len(done) < len(rows):
            break
    return [known[task.key] for task in tasks if task.key in known]
