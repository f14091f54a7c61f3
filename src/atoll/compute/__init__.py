"""Computation: a model as a vector, the task, the gradients of many clients, native code and devices.

Tests: tests/identities/test_numerics.py, tests/identities/test_models.py
"""
