"""Draw a run: the plots and the report page.

Tests: tests/surface/test_report.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atoll import runs
from atoll.base.errors import RunError

if TYPE_CHECKING:
    from atoll.data.clients import Clients


def draw(folder: Path, data: Clients | None = None) -> None:
    """Draw `plots/*.png` and `report.html` from the files of a run folder.

    Args:
        folder: a run folder. The run may still be in progress.
        data: the clients of the run, for their names and the section on their rows. None omits both.
    Raises:
        RunError: a file cannot be written. The files of an earlier report stay.
    """
    from atoll.report.clients import summarize
    from atoll.report.figures import DARK, LIGHT, png
    from atoll.report.page import Picture, page
    from atoll.report.plots import charts
    from atoll.report.run_data import RunData

    record = RunData.read(folder)
    federation = None if data is None else summarize(data)
    names = None if data is None else data.names
    try:
        (folder / "plots").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"The folder {folder / 'plots'} cannot be created: {error.strerror}.",
            "free disk space and permission to write.",
            "the report needs a folder for its plots. The run itself is complete.",
            f"atoll show {folder.name}",
        ) from error
    pictures = []
    for chart in charts(record, federation, names):
        light, dark = (png(chart.draw(theme)) for theme in (LIGHT, DARK))
        runs.write(folder / "plots" / f"{chart.name}.png", light)
        pictures.append(Picture(chart.name, chart.alt_text, chart.wide, light, dark))
    runs.write(folder / "report.html", page(record, federation, data, pictures).encode())
