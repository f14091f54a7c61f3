"""Ranks that `torchrun` started: the process group, and gradients reduced during the backward pass.

Tests: tests/parity/test_torchrun.py
"""
