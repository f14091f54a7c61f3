"""Files that are replaced in one step.

Tests: tests/faults/test_folder.py
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file in one step: write a second file, flush it to the disk, and rename it.

    After a crash the path holds the old bytes or the new ones. The folder must exist.

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
        with open(new, "wb") as file:
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
