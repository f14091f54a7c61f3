"""Errors in four parts: the given value, the requirement, the reason, and the line to write instead.

AtollError              base class of all errors that atoll raises deliberately
├── UsageError          the request cannot be carried out; exit code 2, nothing was started
└── RunError            a run had started and could not continue; exit code 1, written files are kept
    ├── ClientError     one client cannot contribute; the round continues without it
    └── FeatureError    columns of the rows depend on each other; the training adds their names

The line to write has a form for each door: Python, the command line, a settings file (`atoll.base.lines`).

Tests: tests/faults/test_bad_input.py, tests/surface/test_cli.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from atoll.base.lines import Door, Write, form


class AtollError(Exception):
    """An error in four parts: the given value, the requirement, the reason, and the line to write instead.

    Args:
        given: the value that was given, with its place, client and round.
        required: the requirement; may be empty.
        why: the mathematical or technical reason; may be empty.
        write: the line to write instead; may be empty. A plain text is valid at every door: a command, or a value of
            the grammar. `Change("numerics", "loop")` and the other values of `atoll.base.lines` have forms for Python,
            for the command line and for a settings file.
    Example:
        >>> print(AtollError("lr = -1.", "lr > 0.", "a step of negative length climbs.", "sgd(0.1)"))
        lr = -1.
        Required: lr > 0.   Why: a step of negative length climbs.
        Write: sgd(0.1)
    """

    exit_code = 1
    door: Door | None = None  # None: Python

    def __init__(self, given: str, required: str = "", why: str = "", write: Write = "") -> None:
        self.given, self.required, self.why, self.write = given, required, why, write
        super().__init__(given, required, why, write)

    @property
    def line(self) -> str:
        """The line to write instead, in its form at the door of the error; an empty text if there is none."""
        return form(self.write, self.door or "python")

    def at(self, door: Door) -> Self:
        """Set the door at which the refused value was written, if it is not set yet, and return the error.

        The command line and the reader of files call it. The default door is Python.
        """
        self.door = self.door or door
        return self

    def writing(self, write: Write) -> Self:
        """Replace the line to write instead, and return the error."""
        self.write = write
        self.args = (self.given, self.required, self.why, write)
        return self

    def __str__(self) -> str:
        middle = "   ".join(
            f"{label}: {text}" for label, text in (("Required", self.required), ("Why", self.why)) if text
        )
        line = self.line.replace("\n", "\n       ")
        return "\n".join(filter(None, (self.given, middle, f"Write: {line}" if line else "")))


class UsageError(AtollError, ValueError):
    """The request cannot be carried out as written. Nothing was started; exit code 2."""

    exit_code = 2


class RunError(AtollError, RuntimeError):
    """A run had started and could not continue. The last good state is kept; exit code 1."""

    exit_code = 1


class ClientError(RunError):
    """One client cannot contribute to this round, such as a client with an unreadable row. The round continues."""


class FeatureError(RunError):
    """An error about some parameters of a linear model, which the training calls by the names of their columns.

    Args:
        places: the positions of the parameters in θ.
        given: the first part of the error, with "{names}" in the place of the names.
        required, why, write: as for each error.
    """

    def __init__(
        self, places: tuple[int, ...], given: str, required: str = "", why: str = "", write: Write = ""
    ) -> None:
        super().__init__(
            given.replace("{names}", f"the parameters {', '.join(map(str, places))}"), required, why, write
        )
        self.places, self.template = places, given

    def named(self, names: Sequence[str]) -> RunError:
        """The error with the names of the columns.

        Args:
            names: the name of the column of each parameter.
        """
        found = ", ".join(dict.fromkeys(names[place] for place in self.places))
        return RunError(self.template.replace("{names}", found), self.required, self.why, self.write)


class Note(UserWarning):
    """A choice that atoll made for the user. It is also in `training.notes` and `run.notes`."""


SIMILAR = 0.75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name that a name means: the same name, its synonym, or a similar one; else an empty text.

    The similarity is that of `difflib.SequenceMatcher`, at least .75. Case, hyphens and underscores do not count. A
    foreign word with a line of its own, such as `median`, is not taken for a misspelled name.

    Args:
        name: the name that was given.
        known: the valid names.
    Example:
        >>> did_you_mean("fedavgg", ["sgd", "fedavg"]), did_you_mean("FedAvg", ["fedavg"]), did_you_mean("gd", ["sum"])
        ('fedavg', 'fedavg', '')
        >>> did_you_mean("batch_size", ["lr", "batch"]), did_you_mean("median", ["Mean"])
        ('batch', '')
    """
    import difflib  # not at the start of `atoll`, which seldom needs it

    from atoll.base.concepts import SYNONYMS, folded, is_concept, synonym

    names: dict[str, str] = {}
    for each in sorted(known):
        names.setdefault(folded(each), each)
    word = folded(name)
    if word in names:
        return names[word]
    if found := synonym(word, names.values()):
        return found
    if is_concept(word):
        return ""
    foreign = {word: found for word in SYNONYMS if (found := synonym(word, names.values()))}
    close = difflib.get_close_matches(word, {**foreign, **names}, n=1, cutoff=SIMILAR)
    return {**foreign, **names}[close[0]] if close else ""


def unknown_name(
    kind: str, name: str, known: Iterable[str], line: Callable[[str], Write] = str, value: object = None
) -> UsageError:
    """Build the `UsageError` for an unknown name. Its line has the known name, or the line of a foreign word.

    Args:
        kind: the kind of thing that the name denotes, such as "model".
        name: the name that was given.
        known: the valid names.
        line: makes the line to write from the known name.
        value: the value that was given under this name, if there is one.
    Example:
        >>> print(unknown_name("model", "cnnn", ["cnn", "mlp"]))
        No model is called 'cnnn'.
        Required: one of cnn, mlp.
        Write: cnn
    """
    from atoll.base.concepts import concept, own_model

    names = sorted(known)
    near = did_you_mean(name, names) if isinstance(name, str) else ""
    why, write = "", line(near) if near else ""
    if isinstance(name, str) and not near and kind not in ("column", "client"):  # these are names of the user
        why, write = concept(name.removeprefix("plan."), value) or (own_model(name) if kind == "model" else ("", ""))
    return UsageError(f"No {kind} is called {name!r}.", f"one of {', '.join(names)}.", why, write)


def place_of(error: BaseException) -> str:
    """The last place in the user's code that an error passed, such as "update, mine.py:12".

    Code of atoll, torch and NumPy is not the user's. The text is empty if no place is known.
    """
    import traceback

    known = [sys.modules.get(name) for name in ("atoll", "torch", "numpy")]
    packages = tuple(_folder(m.__file__) for m in known if m is not None and m.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(packages)]
    if not outside:
        return ""
    last = outside[-1]
    return f"{last.name}, {last.filename.removeprefix(_folder(last.filename))}:{last.lineno}"


def _folder(file: str) -> str:
    """The folder of a file with its separator. This module does not import `os`: the network's messages have no I/O."""
    return file[: max(file.rfind("/"), file.rfind("\\")) + 1]
