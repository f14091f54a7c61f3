"""The flags of an experiment, made from the fields of `Experiment`, and the options that several commands share.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter

from atoll.engine import spec as engines
from atoll.errors import UsageError
from atoll.training.experiment import Experiment, key_of, settings, types
from atoll.training.setting_texts import kinds
from atoll.training.settings import DATA, METHOD, OUTPUT, RUNNING, TEXTS, declared

GROUPS = {name: Group.create_ordered(name) for name in (DATA, METHOD, RUNNING, OUTPUT)}
_ENGINE_HELP = {
    "workers": "Worker processes, default one for each core; ranks of torchrun; or actors on Ray.",
    "address": "Of the Ray cluster: host:port, or auto. Default: one of this machine, for the run.",
    "cpus": "Cores of each actor on Ray. Default: 1.",
    "gpus": "GPUs of each actor on Ray, or a fraction of one. Default: 0.",
}
T = TypeVar("T")
_SET_HELP = 'KEY=VALUE, any setting by its dotted key: "plan.pace=Sync()". May be repeated.'


def flag(group: str, help: str, name: str | None = None) -> Parameter:
    """A flag of an experiment, or of a command; its help names the default."""
    return Parameter(name=name, group=GROUPS[group], help=help, show_default=False, negative_iterable="")


def switch(group: str, help: str, variable: str, name: str | None = None) -> Parameter:
    """A flag of a command that is off by default, or the environment variable that stands for it."""
    return Parameter(
        name=name, group=GROUPS[group], help=help, negative="", env_var=variable, show_env_var=False, show_default=False
    )


Out = Annotated[str | None, flag(OUTPUT, "The parent of run folders. Default: runs.")]
Json = Annotated[bool, switch(OUTPUT, "One JSON object on stdout.", "ATOLL_JSON", "--json")]
Quiet = Annotated[bool, switch(OUTPUT, "No progress, only the result.", "ATOLL_QUIET")]
Trust = Annotated[
    bool, switch(RUNNING, "Import code that a found file or a run folder names as module:name.", "ATOLL_TRUST")
]


def _flags() -> list[tuple[str, Any, Any]]:
    """Name, type and default of each flag; None means that the flag is not given."""
    out: list[tuple[str, Any, Any]] = []
    for f in settings():
        rule = declared(f)
        if rule.flag:
            (kind,) = kinds(types()[f.name])
            kind = list[str] if kind == TEXTS else kind
            out.append((key_of(f.name), Annotated[kind | None, flag(rule.group, _help(rule.help, f.default))], None))
        if f.name == "engine":
            for name, help in _ENGINE_HELP.items():
                (kind,) = kinds(engines.SHORTHANDS[name])
                out.append((name, Annotated[kind | None, flag(RUNNING, help)], None))
    out.append(("settings", Annotated[list[str] | None, flag(RUNNING, _SET_HELP, "--set")], None))
    return out


def _help(help: str, default: Any) -> str:
    """The help text, with the default if it is a number or a word and the text does not state it."""
    stated = "Default" in help or default is None or default == () or isinstance(default, bool)
    return help if stated else f"{help} Default: {default}."


def _with_flags(cls: type[T]) -> type[T]:
    """A dataclass with a field for each flag."""
    cls.__annotations__ = {name: kind for name, kind, _ in _flags()}
    for name, _, default in _flags():
        setattr(cls, name, default)
    made: type[T] = Parameter(name="*")(dataclass(frozen=True)(cls))
    return made


@_with_flags
class ExperimentFlags:
    """The flags of an experiment as they were typed; a flag that is not given is None."""

    settings: list[str] | None

    def experiment(self, file: str | None, trust: bool) -> Experiment:
        """The experiment of the flags, `--set`, the environment and the file; the first that gives a value wins."""
        base = Experiment.read(file, trust=trust or None) if file else Experiment.found(trust=trust)
        flags = {name: getattr(self, name) for name, _, _ in _flags() if name != "settings"}
        return base.with_environment(os.environ).with_settings(pairs(self.settings or [])).told(**flags)


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
            raise UsageError(f"--set {text}", "KEY=VALUE.", write="--set rounds=10")
        out[key.strip()] = value.strip()
    return out
