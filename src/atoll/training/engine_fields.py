"""The flags, keys and variables that set a field of the engine.

Tests: tests/surface/test_lines.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class EngineField(NamedTuple):
    """A flag, key and ATOLL_ variable that sets the field of this name in the named engine.

    Args:
        text: the type of its value.
        default: the default that configurations of older runs contain; it is skipped there.
        help: one sentence; empty if the command line has no flag of this name.
    """

    text: Any
    default: Any
    help: str


ENGINE_FIELDS: Mapping[str, EngineField] = {
    "workers": EngineField(
        int | None, None, "Worker processes, default one for each core; ranks of torchrun; or actors on Ray."
    ),
    "backend": EngineField(str, "auto", ""),
    "address": EngineField(
        str | None, None, "Of the Ray cluster: host:port, or auto. Default: one of this machine, for the run."
    ),
    "cpus": EngineField(float, 1.0, "Cores of each actor on Ray. Default: 1."),
    "rehearse": EngineField(bool, False, "Run the protocol of a secure sum in this process, with real keys and masks."),
    "gpus": EngineField(float, 0.0, "GPUs of each actor on Ray, or a fraction of one. Default: 0."),
    "patience_s": EngineField(float, 60.0, "Seconds in which an actor on Ray must be placed and start. Default: 60."),
}


def is_old_default(key: str, value: Any) -> bool:
    """Whether a key of config.toml is a field of an engine with the default that older runs wrote for every engine."""
    known = ENGINE_FIELDS.get(key)
    return known is not None and type(value) is type(known.default) and value == known.default
