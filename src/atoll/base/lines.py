"""The line to write instead, in the last part of an error. It has a form for each door.

A door is the place at which a user wrote the refused value: Python code, the command line, or a settings file. A plain
text is valid at every door: a command, or a value of the grammar.

    Change("numerics", "loop")      Python  numerics="loop"    shell  --numerics loop    file  numerics = "loop"
    Part("Sync()", "pace")          Python  Sync()             shell  --set "plan.pace=Sync()"
    Split(71, by="Dirichlet(0.3)")  Python  data.split(71, by=Dirichlet(0.3))
    Load("digits")                  Python  atoll.data.load("digits")                  shell  --data digits
    Line(python="x = x[:, None]")   a form that is not listed is missing: the error has no last part at that door

Tests: tests/surface/test_lines.py
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol, get_args

Door = Literal["python", "shell", "file"]
DOORS: tuple[Door, ...] = get_args(Door)

# The settings without a flag of their own; `--set` reaches them.
SET_ONLY = frozenset(
    {"evaluate_every", "min_rows", "checkpoint_s", "report", "backend", "scale_target", "buffers", "draws", "plots"}
)


class Suggestion(Protocol):
    """A line with a form for each door."""

    def at(self, door: Door) -> str:
        """The form at a door; an empty text if there is none."""
        ...


Write = str | Suggestion


def form(write: Write, door: Door) -> str:
    """The text of a line at a door. A plain text is equal at every door.

    Example:
        >>> form("atoll lr", "shell"), form(Change("numerics", "loop"), "shell"), form(Line(python="x"), "shell")
        ('atoll lr', '--numerics loop', '')
    """
    return write if isinstance(write, str) else write.at(door)


def forms(write: Write) -> tuple[str, ...]:
    """The forms of a line at all doors, in the order of `DOORS`: a line as plain texts, for a message.

    Example:
        >>> Line(*forms(Change("chunk", 6)))
        Line(python='chunk=6', shell='--chunk 6', file='chunk = 6')
    """
    return tuple(form(write, door) for door in DOORS)


@dataclass(frozen=True)
class Line:
    """A line with stated forms. A door without a form has no line."""

    python: str = ""
    shell: str = ""
    file: str = ""

    def at(self, door: Door) -> str:
        return {"python": self.python, "shell": self.shell, "file": self.file}[door]


TRUST = Line("atoll.Experiment.read(path, trust=True)", "--trust")  # permits a text to import code


@dataclass(frozen=True)
class Change:
    """A setting with another value: `name=value`, `--name value` or `name = value`.

    Args:
        name: the key of the setting in files and flags. `plan.slot` names a slot of the plan or a field of a slot.
        value: a number, a text, a boolean, or a list of them. Parts and engines are texts.
    Example:
        >>> [Change("numerics", "loop").at(door) for door in DOORS]
        ['numerics="loop"', '--numerics loop', 'numerics = "loop"']
        >>> Change("min_rows", 1).at("shell"), [Change("plan.pace", "Sync()").at(door) for door in DOORS]
        ('--set min_rows=1', ['pace=Sync()', '--set "plan.pace=Sync()"', 'plan.pace = "Sync()"'])
    """

    name: str
    value: Any

    def at(self, door: Door) -> str:
        part = self.name.startswith("plan.")
        if door == "python":
            one = self.value[0] if isinstance(self.value, list) and len(self.value) == 1 else self.value
            return f"{self.name.rpartition('.')[2]}={one if part else literal(one)}"
        if door == "file":
            return f"{self.name} = {json.dumps(self.value, ensure_ascii=False)}"
        if isinstance(self.value, list):
            return " ".join(Change(self.name, each).at(door) for each in self.value)
        value = self.value if isinstance(self.value, str) else json.dumps(self.value)
        if part or self.name in SET_ONLY:
            return f"--set {quoted(f'{self.name}={value}')}"
        flag = f"--{self.name.replace('_', '-')}"
        if isinstance(self.value, bool):
            return flag if self.value else f"--no-{flag[2:]}"
        return f"{flag} {quoted(value)}"


@dataclass(frozen=True)
class Both:
    """Two lines that are needed together."""

    first: Write
    second: Write

    def at(self, door: Door) -> str:
        between = {"python": ", ", "shell": " ", "file": "\n"}[door]
        return between.join(filter(None, (form(self.first, door), form(self.second, door))))


@dataclass(frozen=True)
class Part:
    """A part of a plan, or another value of the grammar, to use instead.

    Args:
        text: the text of the part, a value of the grammar.
        slot: the slot of the plan, if it is known. The line of the shell and of a file then sets it.
        changes: the fields that the text changes, with the new values.
    """

    text: str
    slot: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def at(self, door: Door) -> str:
        if door == "python" or not self.slot or not self.text:
            return self.text
        return Change(f"plan.{self.slot}", self.text).at(door)


@dataclass(frozen=True)
class Text:
    """The whole text of a value of the grammar, with the refused place corrected."""

    text: str

    def at(self, door: Door) -> str:
        return self.text


@dataclass(frozen=True)
class Split:
    """A split of the data: a call of `data.split`, flags, or keys of a file.

    Args:
        clients: the number of clients, or None.
        by: the text of a partition, or an empty text.
        options: held_out, min_rows or seed.
    Example:
        >>> Split(71, "Dirichlet(0.3)", {"min_rows": 1}).at("python")
        'data.split(71, by=Dirichlet(0.3), min_rows=1)'
        >>> Split(71, "Dirichlet(0.3)", {"min_rows": 1}).at("shell")
        '--clients 71 --split "Dirichlet(0.3)" --set min_rows=1'
    """

    clients: int | None = None
    by: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, door: Door) -> str:
        if door == "python":
            words = [str(self.clients)] if self.clients is not None else []
            words += [f"by={self.by}"] if self.by else []
            return f"data.split({', '.join([*words, *(f'{n}={literal(v)}' for n, v in self.options.items())])})"
        known = {"clients": self.clients, "split": self.by or None, **self.options}
        return _changes({name: value for name, value in known.items() if value is not None}, door)


@dataclass(frozen=True)
class Load:
    """A data set by its name or path, with options: a call of `atoll.data.load`, flags, or keys of a file.

    Example:
        >>> [Load("heart", {"folder": "data"}).at(door) for door in ("python", "shell")]
        ['atoll.data.load("heart", folder="data")', '--data heart --folder data']
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, door: Door) -> str:
        if door == "python":
            words = [literal(self.name), *(f"{n}={literal(v)}" for n, v in self.options.items())]
            return f"atoll.data.load({', '.join(words)})"
        return _changes({"data": self.name, **self.options}, door)


@dataclass(frozen=True)
class EngineChange:
    """A field of the engine: a part of `engine=` in Python, and a setting of its own in flags and files.

    Example:
        >>> [EngineChange("Processes(2)", "workers", 2).at(door) for door in DOORS]
        ['engine="Processes(2)"', '--workers 2', 'workers = 2']
    """

    engine: str
    name: str
    value: Any

    def at(self, door: Door) -> str:
        return Change("engine", self.engine).at(door) if door == "python" else Change(self.name, self.value).at(door)


def _changes(values: Mapping[str, Any], door: Door) -> str:
    lines = [Change(name, value).at(door) for name, value in values.items()]
    return ("\n" if door == "file" else " ").join(lines)


def example_call(name: str, make: Callable[..., Any]) -> str:
    """A call that builds a value: the required numbers are the examples of their declarations; else an empty text.

    Args:
        name: the name under which a text may call the constructor.
        make: a function or a class; `bounded_number` declares a number with its example, and the metadata of another
            field have it as `example`.
    Example:
        >>> example_call("float", float), example_call("ord", ord)
        ('float()', '')
    """
    declared = {f.name: f for f in fields(make)} if is_dataclass(make) else {}
    required = [f for f in declared.values() if f.init and f.default is MISSING and f.default_factory is MISSING]
    needed = required or [f for f in declared.values() if "example" in f.metadata]  # one of several is required
    examples = [f.metadata.get("example", getattr(f.metadata.get("number"), "example", None)) for f in needed]
    if None in examples:
        return ""
    try:
        make(*examples)
    except (TypeError, ValueError):  # a UsageError is a ValueError
        return ""
    return f"{name}({', '.join(map(literal, examples))})"


def literal(value: Any) -> str:
    """A value as Python writes it, with double quotes where possible.

    Example:
        >>> literal("loop"), literal(0.1), literal('a "b"')
        ('"loop"', '0.1', '\\'a "b"\\'')
    """
    plain = isinstance(value, str) and value.isprintable() and not set(value) & {'"', "\\"}
    return f'"{value}"' if plain else repr(value)


def quoted(text: str) -> str:
    """A word of a POSIX shell, in double quotes if it needs quotes and contains no character that they leave special.

    Example:
        >>> quoted("loop"), quoted("Dirichlet(0.3)"), quoted("Cast('bf16')"), quoted('a "b"')
        ('loop', '"Dirichlet(0.3)"', '"Cast(\\'bf16\\')"', '\\'a "b"\\'')
    """
    plain = shlex.quote(text)
    return plain if plain == text or set(text) & set('"$`\\!') else f'"{text}"'
