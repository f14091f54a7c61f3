"""Draw a run: the charts and the report.

Tests: tests/surface/test_report.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atoll import runs
from atoll.base.errors import RunError

if TYPE_CHECKING:
    from atoll.data.clients import Clients


def draw(folder: Path, data: Clients | None = None, formats: Sequence[str] = ()) -> None:
    """Draw `plots/*.svg` and `report.html` from the files of a run folder.

    Args:
        folder: a run folder. The run may still be in progress.
        data: the clients of the run, for the section on their rows. None omits it.
        formats: further file formats of the charts: "png", "pdf". They need the extra `atoll[plots]`.
    Raises:
        RunError: a file cannot be written. The files of an earlier report stay.
    """
    from atoll.report.page import page
    from atoll.report.page_data import page_data, removed
    from atoll.report.plots import charts
    from atoll.report.run_data import RunData
    from atoll.report.svg import svg

    record = RunData.read(folder)
    federation = None
    if data is not None and not removed(record):
        from atoll.report.clients import summarize

        federation = summarize(data)
    names = record.events.names if data is None else data.names
    try:
        (folder / "plots").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"The folder {folder / 'plots'} cannot be created: {error.strerror}.",
            "free disk space and permission to write.",
            "the report needs a folder for its plots. The run itself is complete.",
            f"atoll show {folder.name}",
        ) from error
    drawings = list(charts(record, federation, names))
    for drawing in drawings:
        runs.write(folder / "plots" / f"{drawing.name}.svg", svg(drawing).encode())
        for suffix in formats:
            from atoll.report.export import rendered

            runs.write(folder / "plots" / f"{drawing.name}.{suffix}", rendered(drawing, suffix))
    text = page(page_data(folder, record, report=True), record, drawings, federation)
    runs.write(folder / "report.html", text.encode("utf-8", "replace"))
