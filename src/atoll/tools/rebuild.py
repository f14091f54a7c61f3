"""A training made again from a run's folder: same model, data, plan and body, before its first round.

Tests: tests/surface/test_tools.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from atoll import runs
from atoll.base.errors import RunError, UsageError
from atoll.base.files import atomic_write
from atoll.engine.inprocess import InProcessEngine
from atoll.training.experiment import Experiment
from atoll.training.rounds import Training


def training_of(experiment: Experiment, **changes: Any) -> Training:
    """The training that an experiment describes, in this process, before its first round; nothing is written.

    Args:
        experiment: what was told.
        changes: fields of `Settings` to have otherwise.
    Raises:
        UsageError: its model, data and plan do not fit.
    """
    return experiment.training(engine="inprocess", **changes)


def local_engine(training: Training) -> InProcessEngine:
    """An engine in this process for the clients of a training; it computes the same bits as every engine."""
    return InProcessEngine(training.task, training.data, training.settings.chunk, training.fleet)


def training_in(folder: Path, *, trust: bool = False, start: bool = True) -> Training:
    """The training of a run's folder, before its first round, with the body it was computed by.

    Args:
        folder: of the run.
        trust: whether its config.toml may name code outside atoll.
        start: whether the numbers it started from are wanted, where `init` says that they are a file.
    Raises:
        UsageError: it was started from Python, or its data is no longer the same.
    """
    config = folder / "config.toml"
    if not config.is_file():
        raise UsageError(
            f"{folder} is not the folder of a run.", "a folder that holds a config.toml.", write="atoll runs"
        )
    experiment = Experiment.read(config, trust=trust, old_names=True)
    if not start:
        experiment = replace(experiment, init=None)
    about = runs.read_environment(folder)
    device = experiment.device if experiment.device != "auto" else about.get("device", "cpu")
    training = training_of(experiment, numerics=about.get("numerics", experiment.numerics), device=device)
    same_data(folder, training)
    return training


def same_data(folder: Path, training: Training) -> None:
    """Refuse data that is not what the run was trained on."""
    was, now = runs.read_environment(folder).get("data"), training.data.fingerprint()
    if was is not None and was != now:
        raise UsageError(
            f"{folder.name} was trained on data with fingerprint {was}; what is there now has {now}.",
            "the same rows and the same split.",
            "on other rows, other numbers come out.",
            f"atoll show {folder.name}",
        )


def write_output(file: Path, data: bytes) -> None:
    """Write a file that a user asked for, and make its folder.

    Raises:
        RunError: it could not be written; the old file is unchanged.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, data)
    except OSError as error:
        raise RunError(
            f"{file} could not be written: {error.strerror}.",
            "room on the disk, and the right to write.",
            write=f"df -h {file.parent}",
        ) from error
