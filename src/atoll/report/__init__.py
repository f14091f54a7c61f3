"""What people look at: the live table while a run goes, plots and one page when it has ended."""

from __future__ import annotations

from pathlib import Path

from atoll import runs
from atoll.data.clients import Clients
from atoll.errors import RunError
from atoll.report.live import LiveTable

__all__ = ["LiveTable", "draw"]


def draw(folder: Path, data: Clients | None = None) -> None:
    """Draw a run: `plots/*.png` and `report.html`, out of the files in its folder.

    Args:
        folder: a run's folder, ended or not.
        data: its clients, for who holds what; None leaves that out.
    Raises:
        RunError: a file could not be written. What was there is still there.
    """
    from atoll.report.canvas import DARK, LIGHT, png
    from atoll.report.federation import look
    from atoll.report.page import Picture, page
    from atoll.report.plots import charts
    from atoll.report.record import Record

    record = Record.read(folder)
    federation = None if data is None else look(data)
    names = None if data is None else data.names
    try:
        (folder / "plots").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder / 'plots'} could not be made: {error.strerror}.",
            "room on the disk, and the right to write.",
            "the run itself is whole; only its pictures are missing.",
            f"atoll show {folder.name}",
        ) from error
    pictures = []
    for chart in charts(record, federation, names):
        light, dark = (png(chart.draw(theme)) for theme in (LIGHT, DARK))
        runs.write(folder / "plots" / f"{chart.name}.png", light)
        pictures.append(Picture(chart.name, chart.says, chart.wide, light, dark))
    runs.write(folder / "report.html", page(record, federation, data, pictures).encode())
