"""The options that several commands share, each declared once.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from atoll.training.setting_texts import DATA, GROUP_NAMES, OUTPUT, RUNNING

if TYPE_CHECKING:
    from atoll.track.tracking import Tracker

GROUPS = {name: Group.create_ordered(name) for name in GROUP_NAMES}


def flag(group: str, help: str, name: str | None = None) -> Parameter:
    """A flag of an experiment or of a command. Its help text states the default."""
    return Parameter(name=name, group=GROUPS[group], help=help, show_default=False, negative_iterable="")


def switch(group: str, help: str, variable: str, name: str | None = None) -> Parameter:
    """A flag of a command that is off by default, and its environment variable."""
    return Parameter(
        name=name, group=GROUPS[group], help=help, negative="", env_var=variable, show_env_var=False, show_default=False
    )


Client = Annotated[
    str | None, flag(RUNNING, "Use the model of this client, by its name or number. Default: that of the server.")
]


@Parameter(name="*")
@dataclass(frozen=True)
class ClientOptions:
    """The options of a prediction that concern clients."""

    by: Annotated[str | None, flag(DATA, "The column of the client. Default: that of the run.")] = None
    client: Client = None


def trackers(texts: list[str] | None) -> tuple[Tracker, ...]:
    """The trackers of `--track`."""
    if not texts:
        return ()
    from atoll.track.tracking import tracker

    return tuple(tracker(text) for text in texts)


Out = Annotated[str | None, flag(OUTPUT, "The parent of run folders. Default: runs.")]
Json = Annotated[bool, switch(OUTPUT, "One JSON object on stdout.", "ATOLL_JSON", "--json")]
Lines = Annotated[bool, switch(OUTPUT, "One JSON object a line on stdout.", "ATOLL_JSON", "--json")]
Quiet = Annotated[bool, switch(OUTPUT, "No progress, only the result.", "ATOLL_QUIET")]
Track = Annotated[
    list[str] | None, switch(OUTPUT, "Send the run to mlflow, tensorboard or wandb. May be repeated.", "ATOLL_TRACK")
]
Trust = Annotated[
    bool, switch(RUNNING, "Import code that a found file or a run folder names as module:name.", "ATOLL_TRUST")
]
