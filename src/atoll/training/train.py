"""`train` runs a training and writes its run folder; `load` reads the model of a run.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

import signal
import threading
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Unpack, cast

from atoll import runs
from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.compute.loss import name_of_loss
from atoll.data.clients import Clients
from atoll.plan.plan import Plan
from atoll.report.export import chart_formats
from atoll.report.progress import Mirror, Progress, progress_view
from atoll.runs.events import AnyObserver, Observer, Run, whole_observers
from atoll.track.tracking import Tracker, Tracking, check_trackers
from atoll.training.privacy import refuse_baselines
from atoll.training.recorder import Recorder, find_interrupted
from atoll.training.rounds import Training
from atoll.training.setting_texts import toml
from atoll.training.settings import Settings, SettingsDict, listed


@listed
def train(
    model: Any,
    data: Clients,
    plan: Plan | str,
    *,
    out: str | Path | None = "runs",
    baselines: bool = False,
    observers: Sequence[AnyObserver | Tracker] = (),
    progress: Progress = "auto",
    config: str | None = None,
    resume: str | Path | None = None,
    more: int | None = None,
    any_version: bool = False,
    checkpoint_s: float = 15.0,
    report: bool = True,
    plots: str = "",
    **settings: Unpack[SettingsDict],
) -> Run:
    """Train a model and write the run into a folder.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm, or its text, such as "fedavg(0.1)".
        out: the parent of the run folder; None writes no file.
        baselines: whether pooled and local-only models are trained for comparison.
        observers: are called at the start, after every round and at the end: objects with any of `start`, `round`
            and `end`, functions of a `Report`, or trackers such as `atoll.track.MLflow()`. With `out=None` the path
            that `start` receives is None, and a tracker is refused. An error of a tracker becomes a note of the run.
        progress: "table", "html", "none", or "auto": HTML in a notebook, a table on a terminal, else nothing. It is
            not part of the settings of the run.
        config: the text of config.toml; None: the text is made from the arguments.
        resume: a run to continue: its folder, its name, or "latest". Model, data and plan must equal those of the run.
            The default of `rounds` is the total of the run.
        more: the number of rounds beyond those that are done, instead of `rounds`, to continue a run.
        any_version: whether to continue a run that other versions of atoll, torch or NumPy wrote.
        checkpoint_s: the number of seconds between two checkpoints. The last round always writes a checkpoint.
        report: whether plots and report.html are drawn at the end.
        plots: further formats of the plots, such as "png,pdf"; they need the extra `atoll[plots]`.
        settings: the fields of `Settings`: rounds, seed, dtype, stop, engine, …
    Returns:
        The run: metrics, model, path.
    Raises:
        UsageError: model, data, plan and settings do not fit, or the folder belongs to another training.
        RunError: the training diverged or failed; the folder contains the last good state.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("digits").split(clients=10)
        >>> run = train("softmax", data, atoll.recipes.fedavg(lr=0.1), rounds=2, out=None)
        >>> run.rounds, sorted(run.metrics)
        (2, ['accuracy', 'balanced_accuracy', 'gradient_norm', 'held_out_loss', 'loss', 'lr'])
    """
    trackers = [each for each in observers if isinstance(each, Tracker)]
    view = progress_view(progress, observers)
    watching = whole_observers([each for each in observers if not isinstance(each, Tracker)])
    check_trackers(trackers, out is None and resume is None)
    formats = chart_formats(plots)
    resume = _run_of(resume, out, more)
    wanted: Mapping[str, Any] = settings if resume is None else settings_for_resume(resume, settings, more)
    training = Training(model, data, plan, Settings.from_kwargs(wanted))
    refuse_baselines(training, baselines)
    mirrors: list[Mirror] = []
    try:
        if not training.engine.primary:
            # The primary process writes and prints.
            out, resume, view, watching, baselines, trackers = None, None, None, (), False, []
        elif resume is None and out is not None:
            resume = find_interrupted(training, out)
        recorder = Recorder(
            training, out, config or python_config(model, data.name, plan, training.settings), checkpoint_s
        )
        recorder.begin(resume, any_version)
        mirrors = [] if view is None else [Mirror(view, recorder.note)]
        mirrors += [Mirror(Tracking(t), recorder.note, f"tracker {type(t).__name__}", True) for t in trackers]
        interrupted = run_rounds(training, recorder, (*watching, *mirrors))
    except BaseException as error:
        for mirror in mirrors:
            mirror.close()
        training.close_after(error)
        raise
    problem = _close(training, recorder)
    run = recorder.end(interrupted, baselines=baselines, report=report, formats=formats)
    for observer in (*watching, *mirrors):
        observer.end(run)
    if problem:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    outcome = training.outcome
    if outcome is not None and outcome.failed:
        raise outcome.error()
    return run


def _run_of(run: str | Path | None, out: str | Path | None, more: int | None) -> Path | None:
    """The run to continue, by its path or by its name in the parent of run folders; None if there is none."""
    if run is None:
        if more is not None:
            given = f"more = {more} without resume."
            raise UsageError(given, "a run to continue.", write=Line(python='resume="latest"'))
        return None
    path = Path(run)
    named = len(path.parts) == 1 and not path.exists()
    return runs.find_run(str(run), Path("runs" if out is None else out)) if named else path


def settings_for_resume(run: Path, settings: Mapping[str, Any], more: int | None = None) -> dict[str, Any]:
    """The settings of a resumed training.

    It keeps the total of rounds, the backend, the device and the precision of the run, unless they are set.
    """
    recorded = runs.read_environment(run)
    rounds = runs.rounds_to_run(run, settings.get("rounds"), more)
    rounds = recorded_rounds(run) if rounds is None else rounds
    settings = settings if rounds is None else {**settings, "rounds": rounds}
    return {"precision": recorded.get("precision", "full"), **settings, **recorded_backend(recorded, settings)}


def recorded_rounds(run: Path) -> int | None:
    """The total of rounds in the config.toml of a run; None if it has none."""
    try:
        value = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("rounds")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, int) else None


def recorded_backend(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The backend and the device of a run, each only if the settings leave it to atoll.

    Args:
        recorded: the environment.json of the run. Runs of older versions lack some keys.
        settings: the settings of the resumed training. A missing setting is "auto".
    Example:
        >>> recorded_backend({"numerics": "fused", "device": "cpu"}, {"numerics": "loop"})
        {'device': 'cpu'}
    """
    older = {"numerics": "auto", "device": "cpu"}
    return {n: recorded.get(n, value) for n, value in older.items() if settings.get(n, "auto") == "auto"}


def run_rounds(training: Training, recorder: Recorder, observers: Sequence[Observer]) -> bool:
    """Run the rounds. Returns whether Ctrl-C stopped the training."""
    try:
        path = recorder.path
        for observer in observers:
            observer.start(training, path)
    except BaseException as error:
        recorder.refuse(error)
        raise
    try:
        with _Interrupt(training.engine.interrupt) as interrupt:
            while training.outcome is None and not _asked(interrupt, training):
                row = recorder.round(training.next())
                for observer in observers:
                    observer.round(row)
    except BaseException as error:
        recorder.fail(error)
        raise
    return interrupt.asked


def _close(training: Training, recorder: Recorder) -> str:
    """Close the engine after the last round. An error becomes a note of the run, because its result is complete."""
    try:
        training.close()
    except Exception as error:
        problem = f"Closing the engine failed: {type(error).__name__}: {error}. The result of the run is complete."
        recorder.note(problem)
        return problem
    return ""


def python_config(
    model: Any, data: str, plan: Plan | str, settings: Settings, call: str = "train(model, data, plan, resume=...)"
) -> str:
    """Build the config.toml of a training that Python code started, from the settings that a file can store.

    Args:
        model, plan, settings: those of the training.
        data: the name of the data.
        call: the call of `atoll` that continues the run.
    """
    facts: dict[str, Any] = {
        "model": model if isinstance(model, str) else f"{type(model).__module__}:{type(model).__qualname__}",
        "data": data,
        "plan": plan if isinstance(plan, str) else repr(plan),
        "rounds": settings.rounds,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    if settings.loss is not None:
        facts["loss"] = name_of_loss(settings.loss)
    if settings.metrics is not None:
        facts["metrics"] = [m for m in cast("tuple[Any, ...]", settings.metrics) if isinstance(m, str)]
    lines = [f"# Started from Python. Resume with atoll.{call}", "python = true"]
    return "\n".join(lines + [f"{n} = {toml(v)}" for n, v in facts.items()]) + "\n"


def _asked(interrupt: _Interrupt, training: Training) -> bool:
    """Whether any process of the training received Ctrl-C. All processes end after the same round."""
    interrupt.asked = b"1" in training.engine.exchange(b"1" if interrupt.asked else b"0")
    return interrupt.asked


class _Interrupt:
    """Handles Ctrl-C in the main thread: the first ends the training after the round, the second at once."""

    def __init__(self, on_ask: Callable[[], None] = lambda: None) -> None:
        self.asked, self._on_ask = False, on_ask
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._on_ask()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
