"""Differential privacy: the loss of privacy of a sequence of noised releases.

Tests: tests/identities/test_accountant.py
"""
