"""Training: settings, rounds, the recorder of a run, baselines and experiments.

The names of this package are imported at their first use, so that settings and the command line load without torch.
`atoll.train` and `atoll.rounds` are functions; here `train` and `rounds` are their modules.

Tests: tests/surface/test_public.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atoll.base.names import load

if TYPE_CHECKING:
    from atoll.runs.events import Observer, Run
    from atoll.training.experiment import Experiment
    from atoll.training.recorder import Recorder
    from atoll.training.rounds import Training
    from atoll.training.settings import Settings, SettingsDict

__all__ = ["Experiment", "Observer", "Recorder", "Run", "Settings", "SettingsDict", "Training"]

_HOME = {
    "Experiment": "atoll.training.experiment",
    "Recorder": "atoll.training.recorder",
    "Training": "atoll.training.rounds",
    "Settings": "atoll.training.settings",
    "SettingsDict": "atoll.training.settings",
    "Observer": "atoll.runs.events",
    "Run": "atoll.runs.events",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'atoll.training' has no attribute {name!r}", name=name)
    found = globals()[name] = load(f"{_HOME[name]}:{name}")
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
