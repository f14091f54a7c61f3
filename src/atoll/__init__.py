"""Gradient descent, distributed and federated learning as one formula, for PyTorch models.

    import atoll

    data = atoll.data.load("digits").split(clients=100, by=atoll.data.Dirichlet(0.3))
    run = atoll.train("mlp", data, atoll.recipes.fedavg(lr=0.5, batch=10), rounds=100)

The names of this module are the main public interface; further names are public in their modules. A name is imported
at its first use, so that `import atoll` is fast and `atoll --help` does not load torch.

Tests: tests/surface/test_public.py
"""

from __future__ import annotations

import importlib
import os
import sys

TYPE_CHECKING = False  # an import of typing would take a third of the time of `atoll --version`
if TYPE_CHECKING:
    from typing import Any

    from atoll import data, models, recipes, track
    from atoll.base.errors import AtollError, Note, RunError, UsageError
    from atoll.base.random import Key
    from atoll.compute.loss import Loss
    from atoll.compute.metrics import Metric
    from atoll.compute.task import Task
    from atoll.plan.plan import Plan
    from atoll.plan.round import Report, step
    from atoll.plan.state import State
    from atoll.runs.events import Observer, Run
    from atoll.tools.compare import compare
    from atoll.tools.stats import describe
    from atoll.tools.sweep import sweep
    from atoll.training.experiment import Experiment, load, predictor
    from atoll.training.rounds import rounds
    from atoll.training.serve import join, serve
    from atoll.training.settings import Settings
    from atoll.training.train import train

# Without this setting the bits of Intel MKL's matrix products depend on the address of a matrix, so the bits of a
# client would depend on its position in a batch. The speed is equal. MKL reads the variable before its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# The system maps new memory for every tensor of several megabytes, and its 4 KiB pages cost more than the writes. With
# this variable torch requests huge pages. Torch reads it before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

__all__ = [
    "AtollError",
    "Experiment",
    "Key",
    "Loss",
    "Metric",
    "Note",
    "Observer",
    "Plan",
    "Report",
    "Run",
    "RunError",
    "Settings",
    "State",
    "Task",
    "UsageError",
    "__version__",
    "compare",
    "data",
    "describe",
    "join",
    "load",
    "models",
    "predictor",
    "recipes",
    "rounds",
    "serve",
    "step",
    "sweep",
    "track",
    "train",
]

_MODULES = {"data", "models", "privacy", "recipes", "track"}
_WHERE = {
    "atoll.base.errors": ("AtollError", "Note", "RunError", "UsageError"),
    "atoll.plan.plan": ("Plan",),
    "atoll.plan.round": ("Report", "step"),
    "atoll.plan.state": ("State",),
    "atoll.base.random": ("Key",),
    "atoll.compute.loss": ("Loss",),
    "atoll.compute.metrics": ("Metric",),
    "atoll.compute.task": ("Task",),
    "atoll.runs.events": ("Observer", "Run"),
    "atoll.tools.stats": ("describe",),
    "atoll.tools.compare": ("compare",),
    "atoll.tools.sweep": ("sweep",),
    "atoll.training.experiment": ("Experiment", "load", "predictor"),
    "atoll.training.rounds": ("rounds",),
    "atoll.training.serve": ("join", "serve"),
    "atoll.training.settings": ("Settings",),
    "atoll.training.train": ("train",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = importlib.import_module(f"atoll.{name}")
    elif name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'atoll' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
