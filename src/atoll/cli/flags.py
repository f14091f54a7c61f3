"""The flags of an experiment, made from the fields of `Experiment`.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.cli.options import flag
from atoll.training.engine_fields import ENGINE_FIELDS
from atoll.training.experiment import Experiment, key_of, settings, types
from atoll.training.setting_texts import RUNNING, TEXTS, kinds
from atoll.training.settings import declared

T = TypeVar("T")
_SET_HELP = 'KEY=VALUE, any setting by its dotted key: "plan.pace=Sync()". May be repeated.'


def _flags() -> dict[str, Any]:
    """The type of each flag."""
    out: dict[str, Any] = {}
    for f in settings():
        rule = declared(f)
        if rule.flag:
            kind = reduce(or_, kinds(types()[f.name]))
            kind = list[str] if kind == TEXTS else kind
            out[key_of(f.name)] = Annotated[kind | None, flag(rule.group, _help(rule.help, f.default))]
        if f.name == "engine":
            for name, field in ENGINE_FIELDS.items():
                if field.help:
                    (kind,) = kinds(field.text)
                    out[name] = Annotated[kind | None, flag(RUNNING, field.help)]
    out["settings"] = Annotated[list[str] | None, flag(RUNNING, _SET_HELP, "--set")]
    return out


def _help(help: str, default: Any) -> str:
    """The help text, with the default if it is a number or a word and the text does not state it."""
    stated = "Default" in help or default is None or default == () or isinstance(default, bool)
    return help if stated else f"{help} Default: {default}."


def _with_flags(cls: type[T]) -> type[T]:
    """A dataclass with a field for each flag."""
    cls.__annotations__ = _flags()
    for name in cls.__annotations__:
        setattr(cls, name, None)
    made: type[T] = Parameter(name="*")(dataclass(repr=False, eq=False)(cls))  # each method takes time to compile
    return made


@_with_flags
class ExperimentFlags:
    """The flags of an experiment as they were typed; a flag that is not given is None."""

    settings: list[str] | None

    def experiment(self, file: str | None, trust: bool) -> Experiment:
        """The experiment of the flags, `--set`, the environment and the file; the first that gives a value wins."""
        base = Experiment.read(file, trust=trust or None) if file else Experiment.found(trust=trust)
        flags = {name: value for name, value in vars(self).items() if name != "settings"}
        return base.with_environment(os.environ).with_settings(pairs(self.settings or [])).override(**flags)

    def checked(self, file: str | None, trust: bool) -> Experiment:
        """The experiment, after the checks that need neither data nor torch."""
        it = self.experiment(file, trust)
        it.check()
        return it


def pairs(settings: list[str]) -> dict[str, str]:
    """KEY=VALUE texts as a dict.

    Example:
        >>> pairs(["rounds=3", "plan.pace=Sync()"])
        {'rounds': '3', 'plan.pace': 'Sync()'}
    """
    out = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}", "KEY=VALUE.", write=Line(shell="--set rounds=10"))
        out[key.strip()] = value.strip()
    return out
