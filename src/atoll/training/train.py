"""`train` runs a training and writes its run folder; `load` reads the model of a run.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Unpack

from atoll import runs
from atoll.data.clients import Clients
from atoll.plan.plan import Plan
from atoll.runs.events import Observer, Run
from atoll.training.recorder import Recorder, find_interrupted
from atoll.training.rounds import Training
from atoll.training.settings import Settings, SettingsDict, listed


@listed
def train(
    model: Any,
    data: Clients,
    plan: Plan,
    *,
    out: str | Path | None = "runs",
    baselines: bool = False,
    observers: Sequence[Observer] = (),
    config: str | None = None,
    resume: str | Path | None = None,
    any_version: bool = False,
    checkpoint_s: float = 15.0,
    report: bool = True,
    **settings: Unpack[SettingsDict],
) -> Run:
    """Train a model and write the run into a folder.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm.
        out: the parent of the run folder; None writes no file.
        baselines: whether pooled and local-only models are trained for comparison.
        observers: are called at the start, after every round and at the end.
        config: the text of config.toml; None: the text is made from the arguments.
        resume: the folder of a run to continue; model, data and plan must equal those of that run.
        any_version: whether to continue a run that other versions of atoll, torch or NumPy wrote.
        checkpoint_s: the number of seconds between two checkpoints. The last round always writes a checkpoint.
        report: whether plots and report.html are drawn at the end.
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
        (2, ['accuracy', 'gradient_norm', 'held_out_loss', 'loss', 'lr'])
    """
    wanted: Mapping[str, Any] = settings if resume is None else settings_for_resume(Path(resume), settings)
    training = Training(model, data, plan, Settings.from_kwargs(wanted))
    try:
        if not training.engine.primary:
            out, resume, observers, baselines = None, None, (), False  # the primary process writes and prints
        elif resume is None and out is not None:
            resume = find_interrupted(training, out)
        recorder = Recorder(training, out, config or _config(model, data, plan, training.settings), checkpoint_s)
        recorder.begin(resume, any_version)
        interrupted = run_rounds(training, recorder, observers)
    finally:
        training.close()
    run = recorder.end(interrupted, baselines=baselines, report=report)
    for observer in observers:
        observer.end(run)
    outcome = training.outcome
    if outcome is not None and outcome.failed:
        raise outcome.error()
    return run


def settings_for_resume(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resumed training. It keeps the run's backend, device and precision, unless they are set."""
    recorded = runs.read_environment(run)
    return {"precision": recorded.get("precision", "full"), **settings, **recorded_backend(recorded, settings)}


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
        with _Interrupt() as interrupt:
            while training.outcome is None and not _asked(interrupt, training):
                row = recorder.round(training.next())
                for observer in observers:
                    observer.round(row)
    except BaseException as error:
        recorder.fail(error)
        raise
    return interrupt.asked


def _config(model: Any, data: Clients, plan: Plan, settings: Settings) -> str:
    """Build the config.toml of a training that Python code started, from the settings that a file can store."""
    facts = {
        "model": model if isinstance(model, str) else f"{type(model).__module__}:{type(model).__qualname__}",
        "data": data.name,
        "plan": repr(plan),
        "rounds": settings.rounds,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    lines = ["# Started from Python. Resume with atoll.train(model, data, plan, resume=...)", "python = true"]
    return "\n".join(lines + [f"{n} = {json.dumps(v, ensure_ascii=False)}" for n, v in facts.items()]) + "\n"


def _asked(interrupt: _Interrupt, training: Training) -> bool:
    """Whether any process of the training received Ctrl-C. All processes end after the same round."""
    interrupt.asked = b"1" in training.engine.exchange(b"1" if interrupt.asked else b"0")
    return interrupt.asked


class _Interrupt:
    """Handles Ctrl-C in the main thread: the first ends the training after the round, the second at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
