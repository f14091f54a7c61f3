"""The command line: `atoll run`, and the commands that read its runs.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a run failed, 2 the request was refused,
130 stopped by Ctrl-C. `atoll --version` and `atoll --help` do not load torch.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atoll import __version__


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        words: the words after `atoll`; None: those of `sys.argv`.
    Returns:
        0 done, 1 a run failed, 2 the request was refused, 130 stopped by Ctrl-C.
    Example:
        >>> main(["runs", "--out", "nowhere"])
        No runs in nowhere yet.  Write: atoll run
        0
    """
    given = list(sys.argv[1:] if words is None else words)
    if given in (["--version"], ["-V"]):
        print(__version__)
        return 0
    from atoll.cli.answer import answer

    return answer(given)
