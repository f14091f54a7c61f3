"""The front door: `train` goes through a training into a run folder; `rounds` does so in your own loop."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from atoll import runs
from atoll.data.clients import Clients
from atoll.engine.ranks import Ranks
from atoll.errors import UsageError
from atoll.plan.plan import Plan
from atoll.plan.round import Report
from atoll.recorder import Recorder, Run, begun, judged_by, row_of
from atoll.training import Rounds, Settings, judge, rounds

__all__ = [
    "Recorder",
    "Rounds",
    "Run",
    "Settings",
    "Watcher",
    "judge",
    "judged_by",
    "load",
    "rounds",
    "row_of",
    "train",
]


class Watcher(Protocol):
    """Somebody who is told of a run as it goes."""

    def start(self, training: Rounds, path: Path | None) -> None: ...
    def round(self, report: Report) -> None: ...
    def end(self, run: Run) -> None: ...


def train(
    model: Any,
    data: Clients,
    plan: Plan,
    *,
    out: str | Path | None = "runs",
    baselines: bool = False,
    watchers: Sequence[Watcher] = (),
    config: str | None = None,
    resume: str | Path | None = None,
    any_version: bool = False,
    checkpoint_s: float = 15.0,
    report: bool = True,
    **settings: Any,
) -> Run:
    """Train, and write the run down.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm.
        out: the parent of the run's folder; None writes nothing.
        baselines: also train pooled and local-only, and compare.
        watchers: told of every round.
        config: the text of config.toml; None writes one from the arguments.
        resume: a run folder to go on in; model, data and plan must be those it began with.
        any_version: go on although the run was written by other versions.
        checkpoint_s: seconds between two checkpoints; the last round is always one.
        report: whether plots and report.html are drawn at the end.
        settings: the fields of `Settings`: rounds, seed, dtype, stop, …
    Returns:
        The run: metrics, model, path.
    Raises:
        UsageError: model, data and plan do not fit, or the folder to go on in is of something else.
        RunError: the training diverged or could not go on; the folder holds the last good state.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("digits").split(clients=10)
        >>> run = train("softmax", data, atoll.recipes.fedavg(lr=0.1), rounds=2, out=None)
        >>> run.rounds, sorted(run.metrics)
        (2, ['accuracy', 'gradient_norm', 'held_out_loss', 'loss', 'lr'])
    """
    if resume is not None:
        settings = kept(Path(resume), settings)
    training = Rounds(model, data, plan, Settings.told(settings))
    ranks = training.ranks
    if ranks is not None and not ranks.first:
        out, resume, watchers, baselines = None, None, (), False  # rank 0 alone writes and speaks
    elif ranks is not None and resume is None and out is not None:
        resume = begun(training, out)
    recorder = Recorder(training, out, config or _config(model, data, plan, training.settings), checkpoint_s)
    recorder.begin(resume, any_version)
    interrupted = _walk(training, recorder, watchers)
    run = recorder.end(interrupted, baselines=baselines, report=report)
    for watcher in watchers:
        watcher.end(run)
    outcome = training.outcome
    if outcome is not None and outcome.failed:
        raise outcome.error()
    return run


def kept(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training that goes on: how it computes is what the run began with, where nobody says otherwise."""
    began, out = runs.read_environment(run), dict(settings)
    for name, before in (("numerics", "auto"), ("device", "cpu")):
        if out.get(name, "auto") == "auto":
            out[name] = began.get(name, before)
    return {"precision": began.get("precision", "full"), **out}


def _walk(training: Rounds, recorder: Recorder, watchers: Sequence[Watcher]) -> bool:
    """Go through the rounds; whether somebody asked to stop."""
    try:
        path = recorder.path
        for watcher in watchers:
            watcher.start(training, path)
        with _Interrupt() as interrupt:
            while training.outcome is None and not _asked(interrupt, training.ranks):
                row = recorder.round(training.next())
                for watcher in watchers:
                    watcher.round(row)
    except BaseException as error:
        recorder.fail(error)
        raise
    finally:
        training.close()
    return interrupt.asked


def _config(model: Any, data: Clients, plan: Plan, settings: Settings) -> str:
    """A config.toml for a training that was started from Python: what can be written of it."""
    told = {
        "model": model if isinstance(model, str) else f"{type(model).__module__}:{type(model).__qualname__}",
        "data": data.name,
        "plan": repr(plan),
        "rounds": settings.rounds,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    lines = ["# Started from Python: go on with atoll.train(model, data, plan, resume=...)", "python = true"]
    return "\n".join(lines + [f"{n} = {json.dumps(v, ensure_ascii=False)}" for n, v in told.items()]) + "\n"


def _asked(interrupt: _Interrupt, ranks: Ranks | None) -> bool:
    """Whether Ctrl-C was heard, at this rank or at another: all of them end after the same round."""
    if ranks is not None:
        interrupt.asked = bool(ranks.largest([torch.tensor(int(interrupt.asked))])[0])
    return interrupt.asked


class _Interrupt:
    """The first Ctrl-C asks to finish the round; the second stops now. Outside the main thread nothing is caught."""

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


def load(path: str | Path, model: Any = None, *, best: bool = False) -> nn.Module:
    """The model of a run, as a fresh module in evaluation mode.

    Args:
        path: a run's folder.
        model: the module it was trained as, where it was no name; None rebuilds it from config.toml.
        best: the best model instead of the last.
    """
    from atoll.experiment import Experiment

    folder = Path(path)
    file = folder / ("best.safetensors" if best else "model.safetensors")
    if not file.is_file():
        raise UsageError(f"{file} does not exist.", "a run that has ended.", write=f"atoll resume {folder.name}")
    module = Experiment.read(folder / "config.toml").module() if model is None else model
    module.load_state_dict(load_file(file))
    return module.eval()
