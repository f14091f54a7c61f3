"""TensorBoard: the scalars of each round and the settings as text, in event files.

Tests: tests/surface/test_track.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.track.tracking import Rows, RunFiles, refuse_missing


@dataclass(frozen=True)
class TensorBoard:
    """Writes event files, which `tensorboard --logdir` reads. It needs the extra `atoll[tensorboard]`.

    Event files have no place for a model; it is in the run folder.

    Args:
        folder: the parent of the event files; None: the run folder.
        clients: whether values of single clients are written.
    Example:
        >>> TensorBoard("events")
        TensorBoard(folder='events', clients=False)
    """

    folder: str | None = None
    clients: bool = False

    def check_tracker(self) -> None:
        """Refuse if tensorboardX is not installed."""
        refuse_missing("tensorboardX", "tensorboard")

    def open_session(self, files: RunFiles, known: str | None, first: int) -> TensorBoardSession:
        """Open a new event file. TensorBoard drops rounds from `first` on of older files."""
        from tensorboardX import SummaryWriter

        home = files.path if self.folder is None else Path(self.folder) / files.path.name
        place = Path(known) if known is not None else home / "tensorboard"
        # The name of a file has seconds: without the round, a run that is resumed at once would replace its older file.
        purge = first if known is not None else None
        writer = SummaryWriter(str(place), purge_step=purge, filename_suffix=f".{first:08d}")
        if known is None:
            lines = [f"    {name} = {value}" for name, value in files.parameters().items()]
            writer.add_text("settings", "\n".join(lines))
            writer.flush()
        return TensorBoardSession(writer, str(place.resolve()))


class TensorBoardSession:
    """An open event file. Event files cannot be read without a further package, so the run folder counts rounds."""

    last: int | None = None

    def __init__(self, writer: Any, place: str) -> None:
        self._writer, self.id = writer, place

    def log(self, rows: Rows) -> None:
        """Add rounds."""
        for at, values in rows:
            for name, value in values.items():
                self._writer.add_scalar(name, value, at)
        self._writer.flush()

    def close(self, status: str, files: RunFiles | None) -> None:
        """Close the event file."""
        self._writer.close()
