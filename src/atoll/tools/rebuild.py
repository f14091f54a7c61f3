"""A training built from a run folder: the same model, data, plan and backend, before the first round.

Tests: tests/surface/test_tools.py, tests/surface/test_replay_flights.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from atoll import runs
from atoll.base.errors import UsageError
from atoll.engine.inprocess import InProcessEngine
from atoll.runs.next_line import program_call, program_of, started_by_program
from atoll.training.experiment import Experiment
from atoll.training.rounds import Training


def training_of(experiment: Experiment, **changes: Any) -> Training:
    """The training of an experiment, in this process, before its first round; no file is written.

    Args:
        experiment: the settings.
        changes: fields of `Settings` with other values.
    Raises:
        UsageError: model, data and plan do not fit.
    """
    return experiment.training(engine="inprocess", **changes)


def local_engine(training: Training) -> InProcessEngine:
    """An engine in this process for the clients of a training; it computes the same bits as every engine."""
    return InProcessEngine(training.task, training.data, training.settings.chunk, training.fleet)


def training_in(
    folder: Path, from_python: Callable[[str], str], *, trust: bool = False, start: bool = True
) -> Training:
    """The training of a run folder, before its first round, with the backend and the device of the run.

    Args:
        folder: the run folder.
        from_python: makes the line of Python for a run that a program started, from the text of its training.
        trust: whether its config.toml may name code outside atoll.
        start: whether the initial model is loaded if `init` names a file.
    Raises:
        UsageError: the run was started from Python, or its data have changed.
    """
    config = folder / "config.toml"
    if not config.is_file():
        raise UsageError(
            f"{folder} is not the folder of a run.", "a folder that contains a config.toml.", write="atoll runs"
        )
    program = program_of(folder)
    if program is not None:
        raise started_by_program(folder, from_python(program_call(program, "atoll.rounds")))
    experiment = Experiment.read(config, trust=trust, old_names=True)
    if not start:
        experiment = replace(experiment, init=None)
    about = runs.read_environment(folder)
    device = experiment.device if experiment.device != "auto" else about.get("device", "cpu")
    training = training_of(experiment, numerics=about.get("numerics", experiment.numerics), device=device)
    same_data(folder, training)
    return training


def same_data(folder: Path, training: Training) -> None:
    """Refuse data that differ from the data of the run."""
    recorded, current = runs.read_environment(folder).get("data"), training.data.fingerprint()
    if recorded is not None and recorded != current:
        raise UsageError(
            f"{folder.name} was trained on data with fingerprint {recorded}. The current data have {current}.",
            "the same rows and the same split.",
            "other rows give other results.",
            f"atoll show {folder.name}",
        )
