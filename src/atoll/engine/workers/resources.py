"""Checks of the resources of a Ray actor. This module loads without torch and without Ray.

Tests: tests/parity/test_ray_alone.py, tests/surface/test_engines.py
"""

from __future__ import annotations

import importlib.util

from atoll.base.errors import UsageError
from atoll.base.lines import Both, Change, EngineChange

INSTALL_RAY = "pip install 'atoll[ray]'"


def check_installed() -> None:
    """Refuse an environment without Ray.

    Raises:
        UsageError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed.", "Ray 2.40 or newer.", "the engine trains in its actors.", INSTALL_RAY)


def check_actor(cpus: float, gpus: float, device: str = "auto") -> None:
    """Check the resources of one actor.

    Args:
        cpus: the number of cores, > 0 and finite.
        gpus: the number of GPUs, ≥ 0: a fraction of one GPU or a whole number.
        device: "auto", "cpu" or "cuda"; "cuda" needs `gpus` > 0.
    Raises:
        UsageError: a value is outside its range.
    """
    if not 0 < cpus < float("inf"):
        raise UsageError(f"cpus = {cpus}.", "cpus > 0 and finite.", "an actor needs a part of a core.", "Ray(cpus=1.0)")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise UsageError(
            f"gpus = {gpus}.",
            "a fraction of one GPU, or an integer.",
            "Ray gives an actor a part of one GPU, or whole GPUs.",
            "Ray(gpus=0.5)",
        )
    if device == "cuda" and not gpus:
        raise UsageError(
            "device = 'cuda' with actors that have no GPU.",
            "a GPU, or a part of one, for each actor.",
            "an actor sees only the GPUs that Ray gives it.",
            Both(Change("device", "cuda"), EngineChange("Ray(gpus=1)", "gpus", 1)),
        )
