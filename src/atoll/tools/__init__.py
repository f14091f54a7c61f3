"""Tools for the time before and after a run: learning rates, forecast, replay, comparison, export, installation check.

Tests: tests/surface/test_tools.py
"""
