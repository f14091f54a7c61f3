"""Training: settings, rounds, the recorder of a run, baselines and experiments.

The names of this package are imported at their first use, so that settings and the command line load without torch.
`atoll.train` and `atoll.rounds` are functions; here `train` and `rounds` are their modules.

Tests: tests/surface/test_public.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.base.names import lazy

if TYPE_CHECKING:
    from atoll.training.experiment import Experiment
    from atoll.training.recorder import Recorder
    from atoll.training.rounds import Training
    from atoll.training.settings import Settings, SettingsDict

__all__ = ["Experiment", "Recorder", "Settings", "SettingsDict", "Training"]

_HOMES = {
    "Experiment": "experiment",
    "Recorder": "recorder",
    "Training": "rounds",
    "Settings": "settings",
    "SettingsDict": "settings",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
