"""Follow the log of a run while it grows: complete lines by round, and a cut if a resumed run has truncated it.

Tests: tests/surface/test_follow.py
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from atoll.runs.folder import is_locked

_MOST_ROW = 1 << 20  # bytes of a row that is passed on whole


class _Row(msgspec.Struct):
    """The part of a row that a follower needs. Decoding it checks the syntax of the whole line."""

    round: int


_ROW = msgspec.json.Decoder(_Row)


@dataclass
class Follower:
    """The rows of a metrics.jsonl by their byte offsets. Each poll reads new bytes only.

    Args:
        file: the log. It may be missing.
        rounds: the round of each row.
        starts, ends: the offset of each row, and the offset after it.
        cuts: the first round to drop of each truncation that was seen.
    """

    file: Path
    rounds: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    _sums: list[int] = field(default_factory=list)
    _size: int = -1

    def poll(self) -> bool:
        """Read the bytes that were added. Returns whether rows were added or cut.

        A resumed run truncates the log and may write beyond its old end before the next poll. Therefore the last row is
        compared, too.
        """
        try:
            size = self.file.stat().st_size
        except OSError:  # a deleted run: the rows that were read remain
            return False
        if size == self._size:
            return False
        before, end = len(self.rounds), self.ends[-1] if self.ends else 0
        self._size = size
        if size < end or not self._last_is_there():
            self._rescan()
            return True
        self._read(end)
        return len(self.rounds) > before

    def _last_is_there(self) -> bool:
        if not self.ends:
            return True
        return zlib.crc32(self._bytes(self.starts[-1], self.ends[-1])) == self._sums[-1]

    def _bytes(self, start: int, end: int = -1) -> bytes:
        try:
            with open(self.file, "rb") as log:
                log.seek(start)
                return log.read(end - start if end >= 0 else -1)
        except OSError:
            return b""

    def _read(self, start: int) -> None:
        """Add the complete lines from an offset on."""
        *lines, _ = self._bytes(start).split(b"\n")  # the last part is empty, or half a line
        for line in lines:
            found, end = round_of(line), start + len(line) + 1
            if found is not None:
                self.rounds.append(found)
                self.starts.append(start)
                self.ends.append(end)
                self._sums.append(zlib.crc32(line + b"\n"))
            elif self.ends:  # a damaged line belongs to the row before it
                self.ends[-1], self._sums[-1] = end, zlib.crc32(line + b"\n", self._sums[-1])
            start = end

    def _rescan(self) -> None:
        """Read the whole log again, and record the first round that is no longer there or has another row."""
        old = list(zip(self.rounds, self.ends, self._sums, strict=True))
        self.rounds, self.starts, self.ends, self._sums = [], [], [], []
        self._read(0)
        new = list(zip(self.rounds, self.ends, self._sums, strict=True))
        same = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        if same < len(old):
            self.cuts.append(old[same][0])

    def after(self, round: int) -> int:
        """The index of the first row with a larger round."""
        return bisect_right(self.rounds, round)

    def rows(self, start: int, most: int) -> list[tuple[int, bytes]]:
        """The rows from an index on: at least one if there is one, and at most `most` bytes of further ones.

        A row that the file no longer has ends the list: the next poll records the cut.
        """
        if start >= len(self.rounds):
            return []
        first, found = self.starts[start], list[tuple[int, bytes]]()
        end = max(bisect_right(self.ends, first + most), start + 1)
        text = self._bytes(first, self.ends[end - 1])
        for n in range(start, end):
            line = text[self.starts[n] - first : self.ends[n] - first]
            if zlib.crc32(line) != self._sums[n]:
                break
            found.append((self.rounds[n], as_json(line)))
        return found

    def ended(self) -> bool:
        """Whether no process writes the run. Ask before a poll: the poll then reads its last rows."""
        return not is_locked(self.file.parent)


def round_of(line: bytes) -> int | None:
    """The round of a row of metrics.jsonl; None if the line is no row."""
    try:
        return _ROW.decode(line).round
    except msgspec.ValidationError:  # JSON without a round
        return None
    except (msgspec.DecodeError, RecursionError):
        row = _lenient(line)  # NaN and infinity, which strict JSON lacks
    found = row.get("round") if isinstance(row, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def as_json(line: bytes) -> bytes:
    """A row as strict JSON in one line: NaN and infinity become null, and a huge row is only its round.

    Example:
        >>> as_json(b'{"round": 1, "loss": NaN}')
        b'{"round":1,"loss":null}'
    """
    line = line.split(b"\n", 1)[0].strip()
    if len(line) > _MOST_ROW:
        return b'{"round":%d}' % (round_of(line) or 0)
    try:
        _ROW.decode(line)
    except (msgspec.DecodeError, RecursionError):
        pass
    else:
        if b"\r" not in line:  # which would end a line of a stream
            return line
    return json.dumps(_strict(_lenient(line)), separators=(",", ":")).encode()


def _lenient(line: bytes) -> Any:
    """The value of a JSON text that may contain NaN and infinity; None for another text."""
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _strict(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    return [_strict(each) for each in value] if isinstance(value, list) else value
