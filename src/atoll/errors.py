"""Errors that say what was given, what is required, why, and the line to write instead.

AtollError              everything atoll raises on purpose
├── UsageError          what was asked for cannot be done; exit code 2, nothing was started
└── RunError            a run that had started could not go on; exit code 1, what was written stays
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AtollError(Exception):
    """An error in four parts: what was given, what is required, why, and what to write instead.

    Args:
        given: what was given: value, place, client, round.
        required: what is required of it; may be empty.
        why: the reason, in the mathematics or the mechanics; may be empty.
        write: the line to write instead; may be empty. Where it is an expression or a command, it works as it stands.
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
    """What was asked for cannot be done as it was written. Nothing was started; exit code 2."""

    exit_code = 2


class RunError(AtollError, RuntimeError):
    """A run that had started could not go on. The last good state is kept; exit code 1."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known name to `name`, or the first in order where none is close.

    Example:
        >>> did_you_mean("fedavgg", ["sgd", "fedavg"])
        'fedavg'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else (names[0] if names else "")


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageError:
    """A `UsageError` for a name that is in no table, with the nearest known one.

    Example:
        >>> print(unknown_name("model", "cn", ["cnn", "mlp"]))
        No model is called 'cn'.
        Required: one of cnn, mlp.
        Write: cnn
    """
    names = sorted(known)
    return UsageError(
        f"No {what} is called {name!r}.",
        f"one of {', '.join(names)}.",
        write=did_you_mean(name, names),
    )
