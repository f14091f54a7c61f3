"""What helps before and after a run: a rate, a replay, a comparison, an export, an examination of the machine.

Tests: tests/surface/test_tools.py
"""
