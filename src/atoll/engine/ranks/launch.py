"""How `torchrun` started this process: its environment variables, and the command that starts ranks. Loads no torch.

Tests: tests/parity/test_torchrun.py
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from atoll.base.errors import UsageError


def started(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment variables of `torchrun` are set."""
    return all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def command(ranks: int) -> str:
    """The command that starts this program with this number of ranks."""
    script, *words = sys.argv
    path = Path(script)
    ours = path.name == "atoll" or (path.name == "__main__.py" and path.parent.name == "atoll")
    return shlex.join(["torchrun", "--nproc-per-node", str(ranks), *(["-m", "atoll"] if ours else [script]), *words])


def job(environ: Mapping[str, str] = os.environ) -> str:
    """An identifier of one `torchrun` job, the same after its restarts: the run id, or host and parent process id."""
    import socket

    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()}:{os.getppid()}"


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """The number of times that `torchrun` has restarted the ranks."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def engine_of_launch(environ: Mapping[str, str] = os.environ) -> str:
    """The engine of a training that names none: torchrun if `torchrun` started several processes, else inprocess.

    Otherwise each process would train everything. Rank 0 prints one line about it.
    """
    if not environ.get("WORLD_SIZE", "1").isdecimal() or int(environ.get("WORLD_SIZE", "1")) < 2:
        return "inprocess"
    if environ.get("RANK", "0") == "0":
        _print_once(f"The engine is torchrun, because WORLD_SIZE is {environ['WORLD_SIZE']}.")
    return "torchrun"


@cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr)


def joined() -> bool:
    """Whether the program itself has joined a process group."""
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def check_launch(workers: int | None) -> None:
    """Refuse a process that torchrun did not start: it would wait for other ranks forever.

    Args:
        workers: required number of ranks; None accepts any number.
    Raises:
        UsageError: `torchrun` did not start this process, or it started another number of ranks.
    """
    if joined():
        return
    if not started():
        raise UsageError(
            "The engine torchrun in a process that torchrun did not start.",
            "the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets.",
            "the ranks find each other through them.",
            command(workers or 2),
        )
    if workers is not None and int(os.environ["WORLD_SIZE"]) != workers:
        raise other_size(workers, int(os.environ["WORLD_SIZE"]))


def other_size(workers: int, size: int) -> UsageError:
    """The error for ranks of another number than the workers."""
    return UsageError(
        f"workers = {workers}, and torchrun started {size} rank{'' if size == 1 else 's'}.",
        "equal numbers of workers and ranks.",
        "the ranks would wait forever for a rank that was not started.",
        command(workers),
    )
