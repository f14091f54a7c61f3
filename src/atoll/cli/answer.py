"""Run one command: its words, its exit code and its errors.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from atoll.base.errors import AtollError, Note
from atoll.cli.look import plain_command


def answer(words: Sequence[str]) -> int:
    """Run one command. An error is printed to stderr and gives the exit code; a note is a line on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show, warnings.showwarning)
        return _answer(words)


def _show(usual: Callable[..., None], message: Warning | str, category: type[Warning], *more: Any) -> None:
    if issubclass(category, Note):
        print(f"note    {message}", file=sys.stderr)
    else:
        usual(message, category, *more)


def _answer(words: Sequence[str]) -> int:
    try:
        command = plain_command(words)
        code = _parsed(words) if command is None else _uncollected(command)
        sys.stdout.flush()
        return code
    except AtollError as error:
        return _refused(error)
    except KeyboardInterrupt:
        print("Stopped. Files that were written remain.  Write: atoll runs", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has closed it. Without this line the interpreter's last flush would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parsed(words: Sequence[str]) -> int:
    from atoll.cli.app import parsed_command

    return parsed_command(words)


def _uncollected(command: Callable[[], int]) -> int:
    """Run a command without the cycle collector: many rows are alive, in no cycle, and each pass looks at all."""
    collected = gc.isenabled()
    gc.disable()
    try:
        return command()
    finally:
        if collected:
            gc.enable()


def _refused(error: AtollError) -> int:
    """Print the four parts of the error; ATOLL_TRACEBACK=1 adds the traceback."""
    if os.environ.get("ATOLL_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    if "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":  # one rank per machine prints
        print(error.at("shell"), file=sys.stderr)
    return error.exit_code
