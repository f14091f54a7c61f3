"""The ledger of a site: every message that it has sent, in the order of the messages.

    ledger.jsonl    one row for each message. `previous` is the SHA-256 of the row before it
    ledger.head     the number of rows, and the SHA-256 of the last row

A row is on disk before its message leaves the site: the policy counts rounds and bytes by these rows. The head is
written after the sync of its row and is not synced itself, so after a loss of power it may lag behind the ledger. It
never runs ahead, so a ledger with fewer rows than its head has lost rows. The last line is removed if a kill has cut
it: its message was not sent.

After an error of the disk the ledger takes no further row: the content of the disk is unknown. The process has to end.

Tests: tests/faults/test_site_ledger.py
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll.base.errors import RunError
from atoll.base.files import atomic_write

START = "0" * 64  # `previous` of the first row
_HEAD = re.compile(rb"(\d{16}) ([0-9a-f]{64})\n")


class SiteLedger:
    """The ledger in the home of a site, open for further rows.

    Args:
        home: the folder of the site.
    Attributes:
        rows: the rows that the file had when it was opened.
    Raises:
        RunError: rows were removed, changed or exchanged.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SiteLedger(Path(folder)).append({"round": 0})
        ...     [row["round"] for row in SiteLedger(Path(folder)).rows]
        [0]
    """

    def __init__(self, home: Path) -> None:
        self._path, self._head, self._failed = home / "ledger.jsonl", home / "ledger.head", False
        self._files: tuple[int, int] | None = None  # descriptors of both files, from the first further row
        self.rows, self._last, length = _read(self._path, self._head)
        self._count = len(self.rows)
        if self._path.exists() and length < self._path.stat().st_size:
            os.truncate(self._path, length)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. It is on disk when the method returns.

        Raises:
            RunError: the row could not be written; the message must not be sent.
        """
        line = json.dumps({**row, "previous": self._last}, ensure_ascii=False).encode()
        try:
            if self._failed:
                raise OSError("an earlier row could not be written")
            self._write(line)
        except OSError as error:
            self._failed = True
            raise RunError(
                f"The ledger {self._path} could not be written: {error.strerror or error}.",
                "a disk that works, with free space.",
                "no message leaves the site before its row is on disk.",
            ) from error

    def _write(self, line: bytes) -> None:
        if self._files is None:
            self._files = self._opened()
        ledger, head = self._files
        if os.write(ledger, line + b"\n") <= len(line):
            raise OSError("the disk took a part of the row")
        os.fsync(ledger)
        self._count, self._last = self._count + 1, sha256(line).hexdigest()
        # In place: one sector holds the old bytes or the new ones.
        os.pwrite(head, b"%016d %s\n" % (self._count, self._last.encode()), 0)

    def _opened(self) -> tuple[int, int]:
        """Open descriptors of both files."""
        if not self._head.exists():
            atomic_write(self._path, b"", 0o600)
            atomic_write(self._head, b"%016d %s\n" % (0, START.encode()), 0o600)
        ledger = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        weakref.finalize(self, os.close, ledger)
        head = os.open(self._head, os.O_WRONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, head)
        return ledger, head


def ledger_rows(home: Path) -> list[dict[str, Any]]:
    """The rows of the ledger of a site, which may be writing.

    Raises:
        RunError: rows were removed, changed or exchanged.
    """
    return _read(home / "ledger.jsonl", home / "ledger.head")[0]


def _read(path: Path, at: Path) -> tuple[list[dict[str, Any]], str, int]:
    """The rows, the SHA-256 of the last one, and the length of the whole lines in bytes."""
    head = at.read_bytes() if at.exists() else None  # before the rows: a site that writes adds the row first
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    known = re.fullmatch(_HEAD, b"%016d %s\n" % (0, START.encode()) if head is None else head)
    rows: list[dict[str, Any]] = []
    last, found = START, {0: START}
    for line in whole.splitlines():
        row = _row(line)
        if row.get("previous") != last:
            raise _damaged(path, f"row {len(rows) + 1} does not continue the row before it")
        rows.append(row)
        last = found[len(rows)] = sha256(line).hexdigest()
    if known is None:
        raise _damaged(path, f"{at.name} cannot be read")
    count = int(known[1])
    if found.get(count) != known[2].decode() or (head is None and rows):
        raise _damaged(path, f"it has {len(rows)} rows, and {at.name} names {count if head is not None else 'none'}")
    return rows, last, len(whole)


def _row(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _damaged(path: Path, fault: str) -> RunError:
    return RunError(
        f"The ledger {path} is damaged: {fault}.",
        "the ledger that the site has written.",
        "the policy counts rounds and bytes by it. A site without its ledger joins from a new folder with a new token.",
    )
