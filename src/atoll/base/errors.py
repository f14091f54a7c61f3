"""Errors in four parts: the given value, the requirement, the reason, and the line to write instead.

AtollError              base class of all errors that atoll raises deliberately
├── UsageError          the request cannot be carried out; exit code 2, nothing was started
└── RunError            a run had started and could not continue; exit code 1, written files are kept

Tests: tests/faults/test_bad_input.py, tests/surface/test_cli.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AtollError(Exception):
    """An error in four parts: the given value, the requirement, the reason, and the line to write instead.

    Args:
        given: the value that was given, with its place, client and round.
        required: the requirement; may be empty.
        why: the mathematical or technical reason; may be empty.
        write: the line to write instead; may be empty. An expression or a command works without changes.
    Example:
        >>> print(AtollError("lr = -1.", "lr > 0.", "a step of negative length climbs.", "sgd(0.1)"))
        lr = -1.
        Required: lr > 0.   Why: a step of negative length climbs.
        Write: sgd(0.1)
    """

    exit_code = 1

    def __init__(self, given: str, required: str = "", why: str = "", write: str = "") -> None:
        self.given, self.required, self.why, self.write = given, required, why, write
        middle = "   ".join(f"{label}: {text}" for label, text in (("Required", required), ("Why", why)) if text)
        super().__init__("\n".join(filter(None, (given, middle, f"Write: {write}" if write else ""))))


class UsageError(AtollError, ValueError):
    """The request cannot be carried out as written. Nothing was started; exit code 2."""

    exit_code = 2


class RunError(AtollError, RuntimeError):
    """A run had started and could not continue. The last good state is kept; exit code 1."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name closest to `name`; if none is close, the first in alphabetical order.

    Args:
        name: the name that was given.
        known: the valid names.
    Returns:
        One of `known`; an empty text if `known` is empty.
    Example:
        >>> did_you_mean("fedavgg", ["sgd", "fedavg"])
        'fedavg'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else (names[0] if names else "")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the `UsageError` for an unknown name; it suggests the closest known name.

    Args:
        kind: the kind of thing that the name denotes, such as "model".
        name: the name that was given.
        known: the valid names.
    Example:
        >>> print(unknown_name("model", "cn", ["cnn", "mlp"]))
        No model is called 'cn'.
        Required: one of cnn, mlp.
        Write: cnn
    """
    names = sorted(known)
    return UsageError(
        f"No {kind} is called {name!r}.",
        f"one of {', '.join(names)}.",
        write=did_you_mean(name, names),
    )
