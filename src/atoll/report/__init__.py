"""Views of a run: the live table during training, and the plots and the report page at its end.

The live table is imported at its first use, so that `atoll runs` starts without torch.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py
"""

from typing import TYPE_CHECKING

from atoll.base.names import lazy
from atoll.report.draw import draw

if TYPE_CHECKING:
    from atoll.report.live import LiveTable

__all__ = ["LiveTable", "draw"]

__getattr__, __dir__ = lazy(__name__, {"LiveTable": "live", "draw": "draw"})
