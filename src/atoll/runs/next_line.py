"""The lines that continue, load or repeat a run: commands of the shell, or Python for a run that a program started.

Tests: tests/surface/test_next_line.py
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.base.errors import UsageError
from atoll.base.lines import literal, quoted

_REPEATED = {"seed": 0, "dtype": "float32"}  # settings that a repetition needs if they differ from these defaults


def called(path: Path) -> str:
    """The shortest name that the commands accept for a run: its two words if it is in ./runs, else its path.

    Example:
        >>> called(Path("runs/2026-11-22-calm-reef")), called(Path("other/2026-11-22-calm-reef"))
        ('calm-reef', 'other/2026-11-22-calm-reef')
    """
    here = path.resolve().parent == Path("runs").resolve()
    return path.name[11:] if here and len(path.name) > 11 else near(path)


def near(path: Path) -> str:
    """A path relative to the working folder if it is inside it, else the path itself."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def program_of(folder: Path) -> dict[str, Any] | None:
    """The config.toml of a run that a Python program started; None for other runs and unreadable files."""
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if config.get("python") else None


def program_call(config: Mapping[str, Any], function: str = "atoll.train", /, **more: Any) -> str:
    """The call of a training with the model, data, plan and settings of a run that a program started.

    A model with a name is written. The data, the plan and other models are variables of the program.

    Args:
        config: the config.toml of the run.
        function: the function that is called.
        more: further arguments.
    Example:
        >>> program_call({"model": "softmax", "seed": 3, "dtype": "float32"}, resume="calm-reef")
        'atoll.train("softmax", data, plan, seed=3, resume="calm-reef")'
        >>> program_call({"model": "torch.nn:Linear", "loss": "mine:loss"}, "atoll.rounds")
        'atoll.rounds(model, data, plan, loss=loss)'
    """
    words = [model_name(config) or "model", "data", "plan"]
    words += [f"{n}={literal(config[n])}" for n, usual in _REPEATED.items() if config.get(n, usual) != usual]
    for name in ("loss", "metrics"):
        value = config.get(name)
        if value and isinstance(value, str | list):
            words.append(f"{name}={name if ':' in value else literal(value)}")
    return f"{function}({', '.join([*words, *(f'{name}={literal(value)}' for name, value in more.items())])})"


def resume_line(folder: Path, more: int | None = None, *, any_version: bool = False) -> str:
    """The line that continues a run.

    Args:
        folder: the run folder.
        more: the number of further rounds.
        any_version: whether the run of other versions is accepted.
    """
    config = program_of(folder)
    if config is None:
        flags = [f" --more {more}"] if more else []
        flags += [" --any-version"] if any_version else []
        return f"atoll resume {quoted(called(folder))}{''.join(flags)}"
    words: dict[str, Any] = {**({"more": more} if more else {}), **({"any_version": True} if any_version else {})}
    return program_call(config, resume=called(folder), **words)


def load_line(folder: Path) -> str:
    """The line that loads the model of an ended run."""
    config = program_of(folder)
    own = config is not None and not model_name(config)
    return f"atoll.load({literal(called(folder))}{', model' if own else ''})"


def model_name(config: Mapping[str, Any]) -> str:
    """The name of a model as Python writes it; an empty text for a model that is an object of the program."""
    name = str(config.get("model", "mlp"))
    return "" if ":" in name else literal(name)


def started_by_program(folder: Path, line: str) -> UsageError:
    """The refusal to build the training of a run that a program started.

    Args:
        folder: the run folder.
        line: the line of Python that the program runs instead.
    """
    return UsageError(
        f"{folder.resolve().name} was started from Python.",
        "an experiment that a file can describe.",
        "its model or its data are objects of the program that started it.",
        line,
    )
