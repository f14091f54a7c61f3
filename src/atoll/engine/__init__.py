"""Engines: where the clients of a round are trained. The specs of this package load without torch.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

from atoll.engine.spec import Engine, EngineSpec, InProcess, Processes, Ray, RunOptions, Torchrun

__all__ = ["Engine", "EngineSpec", "InProcess", "Processes", "Ray", "RunOptions", "Torchrun"]
