"""The commands that look at runs: `runs`, `show`, `compare`. Their plain form is parsed here.

The parser of all commands, cyclopts, takes a third of the time of `atoll runs`. `plain_command` reads words such as
`show latest --json`; other words, mistakes and help are left to cyclopts.

Tests: tests/surface/test_fast_commands.py, tests/surface/test_cli.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from atoll.report.figure import X

# The numbers of runs that a command takes, and its flags with a text.
_PLAIN: dict[str, tuple[range, tuple[str, ...]]] = {
    "runs": (range(1), ("out",)),
    "show": (range(1, 2), ("out",)),
    "compare": (range(1, 1 << 30), ("out", "group", "metric")),
}
_VARIABLES = ("ATOLL_JSON", "ATOLL_FOLLOW")  # they set flags of these commands


def plain_command(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> partial[int] | None:
    """A command in its plain form: the names of runs, `--json`, and flags with a text; None for other words.

    Args:
        words: the words after `atoll`.
        environ: the variables of the environment.
    Example:
        >>> plain_command(["compare", "a", "b", "--group", "lr"], {}).keywords
        {'group': 'lr'}
        >>> plain_command(["show", "--help"], {}) is plain_command(["show", "a", "--group", "lr"], {}) is None
        True
    """
    if not words or words[0] not in _PLAIN or any(name in environ for name in _VARIABLES):
        return None
    commands: dict[str, Callable[..., int]] = {"runs": print_runs, "show": print_run, "compare": print_comparison}
    counts, texts = _PLAIN[words[0]]
    names: list[str] = []
    flags: dict[str, str | bool] = {}
    rest = iter(words[1:])
    for word in rest:
        if word and not word.startswith("-"):
            names.append(word)
            continue
        name, value = ("as_json", True) if word == "--json" else (word[2:], next(rest, ""))
        if name not in (*texts, "as_json") or name in flags or not value or str(value).startswith("-"):
            return None
        flags[name] = value
    return partial(commands[words[0]], *names, **flags) if len(names) in counts else None


def print_runs(*, out: str | None = None, as_json: bool = False) -> int:
    """Print the runs, oldest first."""
    from atoll import runs
    from atoll.cli import show

    parent = parent_of(out)
    found = [show.brief(path) for path in runs.list_runs(parent)]
    if as_json:
        from atoll.cli import output

        output.print_json(found)
    else:
        print(show.listing(found) if found else f"No runs in {parent} yet.  Write: atoll run")
    return 0


def print_run(
    run: str, *, why: bool = False, follow: bool = False, out: str | None = None, as_json: bool = False
) -> int:
    """Print a run in full, its backend, or its rounds when they are written."""
    from atoll.cli import output, show

    path = find(run, out)
    if follow:
        from atoll.cli.ui import follow_run

        return follow_run(path, as_json)
    if why:
        backend = show.backend(path)
        if as_json:
            output.print_json(backend)
        else:
            print(show.backend_text(backend))
    elif as_json:
        output.print_json(show.brief(path))
    else:
        print(show.record(path))
    return 0


def print_comparison(
    *run: str,
    metric: str | None = None,
    x: X | None = None,
    group: str | None = None,
    band: Literal["sd", "range", "ci"] | None = None,
    target: float | None = None,
    to: Path | None = None,
    table: Path | None = None,
    width: float = 3.3,
    out: str | None = None,
    as_json: bool = False,
) -> int:
    """Print the differences of two runs, or one metric of any number of runs."""
    from atoll.tools.compare import compare_pair, find_runs

    parent = parent_of(out)
    found = find_runs(run, parent)
    special = as_json or any(given is not None for given in (metric, x, group, band, table))
    if len(run) == len(found) == 2 and not special:
        print(compare_pair(found[0], found[1], to or parent, target).text())
        return 0
    from atoll.tools.compare import compare as compare_runs

    compared = compare_runs(*found, group=group, metric=metric, x=x or "round", target=target)
    files = [compared.save(file, band or "sd", width) for file in (to, table) if file is not None]
    if as_json:
        from atoll.cli import output

        output.print_json(compared.facts() | {"files": list(map(str, files))})
    else:
        print("\n".join([compared.text(), *(f"file    {file}" for file in files)]))
    return 0


def parent_of(out: str | None) -> Path:
    """The parent of run folders: as given, else of the environment and of the file in the working folder."""
    if out is not None:
        return Path(out)
    from atoll.training.experiment import Experiment

    return Path(Experiment.found().with_environment().out)


def find(run: str, out: str | None) -> Path:
    """The folder of a run."""
    from atoll import runs

    return runs.find_run(run, parent_of(out))
