"""Weights & Biases: offline by default, for a later `wandb sync`.

Tests: tests/surface/test_track.py
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.track.tracking import Rows, RunFiles, refuse_missing


@dataclass(frozen=True)
class WandB:
    """Sends a run to Weights & Biases. It needs the extra `atoll[wandb]`.

    Args:
        project: the name of the project.
        mode: "offline" writes files, and no host is asked; "online" sends them.
        folder: the parent of wandb's files; None: the parent of the run folder.
        clients: whether values of single clients and the report are sent.
    Raises:
        UsageError: an unknown mode.
    Example:
        >>> WandB("digits").mode
        'offline'
    """

    project: str = "atoll"
    mode: Literal["offline", "online"] = "offline"
    folder: str | None = None
    clients: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            write = Line('WandB(mode="offline")', "--track wandb")
            raise UsageError(f"mode = {self.mode!r}.", 'mode "offline" or "online".', write=write)

    def check_tracker(self) -> None:
        """Refuse if wandb is not installed."""
        refuse_missing("wandb", "wandb")

    def open_session(self, files: RunFiles, known: str | None, first: int) -> WandBSession:
        """Open a run, or continue the known one. Offline, each part of a resumed run has its own folder and one id."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no report about errors to another host
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_machine_info=True)
        run = wandb.init(
            project=self.project,
            id=known or uuid.uuid4().hex[:8],
            resume="allow",
            mode=self.mode,
            dir=str(Path(self.folder) if self.folder is not None else files.path.parent),
            name=files.title,
            tags=[tag[:64] for tag in files.tags],
            config=files.parameters() if known is None else None,
            settings=settings,
        )
        return WandBSession(run)


class WandBSession:
    """An open run of Weights & Biases. An offline run cannot be read back, so the run folder counts rounds."""

    last: int | None = None

    def __init__(self, run: Any) -> None:
        self._run, self.id = run, str(run.id)

    def log(self, rows: Rows) -> None:
        """Add rounds; a round is a step."""
        for at, values in rows:
            self._run.log(dict(values), step=at)

    def close(self, status: str, files: RunFiles | None) -> None:
        """Send the files as an artifact, and end the run."""
        if files is not None and files.artifacts():
            import wandb

            artifact = wandb.Artifact(f"run-{self.id}", type="run")
            for file in files.artifacts():
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if status == "done" else 1)
