"""Views of a run: the live table during training, and the plots and the report page at its end.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py
"""

from atoll.report.draw import draw
from atoll.report.live import LiveTable

__all__ = ["LiveTable", "draw"]
