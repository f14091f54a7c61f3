"""A run on disk: its folder, its checkpoints, the fingerprint of a model, and the events that observers receive.

The names of this package are imported at their first use, so that commands about run folders start without torch.

Tests: tests/faults/test_folder.py, tests/surface/test_public.py
"""

from typing import TYPE_CHECKING

from atoll.base.names import lazy

if TYPE_CHECKING:
    from atoll.runs.checkpoint import state_from_tensors, state_to_tensors
    from atoll.runs.events import Observer, Run, TrainingView
    from atoll.runs.fingerprint import fingerprint
    from atoll.runs.folder import (
        Checkpoint,
        Commit,
        RunFolder,
        environment,
        find_run,
        is_locked,
        last_end,
        list_runs,
        read_environment,
        read_pointer,
        read_rows,
        rounds_to_run,
        write,
    )

__all__ = [
    "Checkpoint",
    "Commit",
    "Observer",
    "Run",
    "RunFolder",
    "TrainingView",
    "environment",
    "find_run",
    "fingerprint",
    "is_locked",
    "last_end",
    "list_runs",
    "read_environment",
    "read_pointer",
    "read_rows",
    "rounds_to_run",
    "state_from_tensors",
    "state_to_tensors",
    "write",
]

_MODULES = {
    "checkpoint": ("state_to_tensors", "state_from_tensors"),
    "events": ("Run", "TrainingView", "Observer"),
    "fingerprint": ("fingerprint",),
}
_HOMES = {name: "folder" for name in __all__} | {name: m for m, names in _MODULES.items() for name in names}

__getattr__, __dir__ = lazy(__name__, _HOMES)
