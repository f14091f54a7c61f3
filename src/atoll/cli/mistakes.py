"""Errors of the command line itself: an unknown command or flag, with the line to write instead.

Tests: tests/surface/test_mistakes.py
"""

from __future__ import annotations

from typing import get_args

from cyclopts import App, Argument, CycloptsError
from cyclopts.exceptions import (
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from atoll.base.concepts import concept, folded, is_concept
from atoll.base.errors import UsageError, did_you_mean
from atoll.base.lines import Change, Line, Write, quoted
from atoll.plan.formula import DEFAULTS


def usage_error(error: CycloptsError, app: App) -> UsageError:
    """The error of atoll for words that no command takes.

    Args:
        error: the error of the parser.
        app: the commands.
    """
    command = "".join(f" {word}" for word in error.command_chain or ())
    help_line = f"atoll{command} --help"
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        return _unknown_command(error.unused_tokens[0], app)
    if isinstance(error, UnknownOptionError):
        return _unknown_flag(error, help_line)
    if isinstance(error, MissingArgumentError) and error.argument is not None and error.argument.name == "RUN":
        help_line = f"atoll{command} latest" if command in (" show", " resume", " export") else help_line
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        unused = list(map(quoted, error.unused_tokens))
        words, tags = " ".join(unused), "".join(f" --add {word}" for word in unused)
        write = f"atoll tag latest{tags}" if command == " tag" else help_line
        return UsageError(f"{words} has no place in atoll{command}.", write=write)
    return UsageError(str(error).strip(), write=help_line)


def _unknown_command(name: str, app: App) -> UsageError:
    commands = [each for each in app if not each.startswith("-")]
    near = did_you_mean(name, commands)
    given = f"No command is called {name!r}."
    return UsageError(
        given, f"one of {', '.join(sorted(commands))}.", write=f"atoll {near}" if near else "atoll --help"
    )


def _unknown_flag(error: UnknownOptionError, help_line: str) -> UsageError:
    word, equals, value = (error.token.keyword or error.token.value).partition("=")
    words = list(error.unused_tokens or [])
    at = words.index(error.token.value) if error.token.value in words else 0  # words before it have a place
    following = words[at + 1 : at + 2]
    given = value if equals else next((each for each in following if not each.startswith("-")), None)
    flags = {name: each for each in error.argument_collection for name in each.names if name.startswith("--")}
    name = folded(word.lstrip("-"))
    near = did_you_mean(name, [each[2:] for each in flags])
    why, write = concept(name, given) or ("", help_line)
    if near and given is not None and not _takes(flags[f"--{near}"], given):
        near = ""
    if near:
        takes = given is not None and flags[f"--{near}"].token_count()[0] > 0
        why, write = "", Line(shell=f"--{near} {quoted(given)}" if takes and given is not None else f"--{near}")
    if not near and given is not None and (line := _positional(error, name, given)):
        why, write = "it has no flag: its place is after the command.", line
    if given is not None and (near == "recipe" or name in DEFAULTS):
        why, write = _part(name, near, given) or (why, write)
    return UsageError(f"No flag is called {word}.", why=why, write=write)


def _positional(error: UnknownOptionError, name: str, given: str) -> str:
    """The command with a value in its place, if the unknown flag has the name of an argument without a flag."""
    places = [each for each in error.argument_collection or () if not each.names[0].startswith(("-", "*"))]
    words = [given if each.names[0].lower() == name else "".join(t.value for t in each.tokens) for each in places]
    if given not in words or "" in words:
        return ""
    return " ".join(["atoll", *(error.command_chain or ()), *map(quoted, words)])


def _takes(flag: Argument, given: str) -> bool:
    """Whether a value may be one of a flag: a number of a flag such as `--clients`, any text of another flag."""
    kinds = {flag.hint, *get_args(flag.hint)}
    if str in kinds or not kinds & {int, float}:
        return True
    try:
        float(given)
    except ValueError:
        return False
    return True


def _part(name: str, near: str, given: str) -> tuple[str, Write] | None:
    """The line for the value of a flag that stands for the recipe or for a slot of the plan."""
    if is_concept(given):
        return concept(given)
    text = f"{given}()" if near and given.isidentifier() else given
    return "", Change(near or f"plan.{name}", text) if "(" in text else ""
