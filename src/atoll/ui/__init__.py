"""The server of the page: it reads run folders and never a training. Only this package and `net` import aiohttp.

Tests: tests/surface/test_ui.py
"""
