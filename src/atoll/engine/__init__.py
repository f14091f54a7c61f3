"""Engines: where the clients of a round are trained. The specs of this package load without torch.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

from atoll.engine.protocols import Engine, EngineSpec, RunOptions
from atoll.engine.spec import InProcess, Processes, Ray, Torchrun

__all__ = ["Engine", "EngineSpec", "InProcess", "Processes", "Ray", "RunOptions", "Torchrun"]
