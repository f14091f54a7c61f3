"""Foundations: errors, the grammar of texts, validation, keyed randomness, names and files.

Tests: tests/golden/test_rng.py, tests/surface/test_names.py
"""
