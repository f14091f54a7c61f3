"""Files that are replaced in one step, and the error for a file that does not exist.

Tests: tests/faults/test_folder.py
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from atoll.base.errors import RunError, UsageError, did_you_mean
from atoll.base.lines import Write


def atomic_write(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file in one step: write a second file, flush it to the disk, and rename it.

    After a crash the path holds the old bytes or the new ones. The folder must exist.

    Args:
        path: the file.
        data: its new content.
        mode: its permissions, from which the process's umask is subtracted.
    Raises:
        OSError: the file could not be written; the old one is unchanged.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder) / "a.json", b"{}")
        ...     (Path(folder) / "a.json").read_bytes()
        b'{}'
    """
    new = path.with_name(path.name + ".new")
    try:
        # A file that an earlier crash left could have other permissions.
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def no_such_file(path: Path, required: str, line: Callable[[str], Write]) -> UsageError:
    """The error for a path without a file. It suggests a similar file of the same folder, else a look at the folder.

    Args:
        path: the path that was given.
        required: the requirement, without a full stop.
        line: makes the line to write from the path of the similar file.
    Example:
        >>> print(no_such_file(Path("absent.csv"), "the path of a CSV file", str))
        There is no file absent.csv.
        Required: the path of a CSV file.
        Write: ls .
    """
    folder = next((each for each in path.parents if each.is_dir()), Path())
    near = did_you_mean(path.name, os.listdir(path.parent)) if folder == path.parent else ""
    write = line(str(path.with_name(near))) if near else f"ls {shlex.quote(str(folder))}"
    return UsageError(f"There is no file {path}.", f"{required}.", write=write)


def write_output(file: Path, data: bytes) -> None:
    """Write a file, and create its folder if necessary.

    Raises:
        RunError: the file cannot be written; the old file is unchanged.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, data)
    except OSError as error:
        raise RunError(
            f"{file} could not be written: {error.strerror}.",
            "free disk space, and write permission.",
            write=f"df -h {file.parent}",
        ) from error
