"""The title and the tags that a user gives to a run: `labels.json` in its folder. They change no fingerprint.

Tests: tests/surface/test_page_data.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from atoll.base.files import atomic_write

FILE = "labels.json"
_MOST = 1 << 20


@dataclass(frozen=True)
class Labels:
    """The labels of a run.

    Args:
        title: a line of text.
        tags: words, each once.
    Example:
        >>> Labels("first try", ("demo",)).changed(title=None, add=["slow"], remove=["demo"])
        Labels(title='first try', tags=('slow',))
    """

    title: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Labels:
        """Read the labels of a run folder; a missing or damaged file counts as empty."""
        file = folder / FILE
        try:
            found = json.loads(file.read_bytes()) if file.stat().st_size <= _MOST else {}
        except (OSError, ValueError):
            return cls()
        found = found if isinstance(found, dict) else {}
        tags = found.get("tags")
        return cls(str(found.get("title", "")), tuple(map(str, tags)) if isinstance(tags, list) else ())

    def changed(self, title: str | None, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Labels:
        """Other labels: with a title, with more tags, without some tags."""
        gone = set(remove)
        tags = dict.fromkeys(tag for tag in (*self.tags, *add) if tag not in gone)
        return Labels(self.title if title is None else title, tuple(tags))

    def write(self, folder: Path) -> None:
        """Replace the file in one step."""
        text = json.dumps({"title": self.title, "tags": list(self.tags)}, ensure_ascii=False)
        atomic_write(folder / FILE, text.encode("utf-8", "replace"))
