"""Virtual time: fleets, their traces, and the clock that orders arrivals.

Tests: tests/identities/test_clock.py, tests/identities/test_fleet.py
"""
