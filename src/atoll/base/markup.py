"""Results as HTML for notebooks: escaped text in plain elements, without script, of bounded size.

Tests: tests/surface/test_notebook.py
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Protocol

_MOST = 20_000  # characters of a text: escaped, they stay under 60 kB except for texts that are mostly markup
_MOST_BYTES = 60_000


class HasHtml(Protocol):
    """An object with a form for notebooks."""

    def _repr_html_(self) -> str: ...


def preformatted(text: str) -> str:
    """A text with its lines, as HTML; a long one is cut.

    Example:
        >>> preformatted("a < b")
        '<pre>a &lt; b</pre>'
    """
    return f"<pre>{_escaped(text, _MOST)}</pre>"


def html_table(caption: str, rows: Sequence[Sequence[str]], more: str = "") -> str:
    """A table of texts: its first row has the heads, its first column the names.

    Args:
        caption: the text above the table.
        rows: the cells. Rows that would exceed 60 kB are left out.
        more: a text below the table.
    Example:
        >>> html_table("a", [["x"], ["1"]])
        '<table><caption>a</caption><tr><th scope="col">x</th></tr><tr><th scope="row">1</th></tr></table>'
    """
    made = [f"<caption>{_escaped(caption, 500)}</caption>"]
    room = _MOST_BYTES - 5000
    for at, row in enumerate(rows):
        names = [f'<th scope="{"row" if at else "col"}">' if not i or not at else "<td>" for i in range(len(row))]
        cells = "".join(f"{a}{_escaped(c, 300)}</{a[1:3]}>" for a, c in zip(names, row, strict=True))
        room -= len(cells.encode())
        if room < 0:
            break
        made.append(f"<tr>{cells}</tr>")
    below = f"<p>{_escaped(more, 500)}</p>" if more else ""
    return f"<table>{''.join(made)}</table>{below}"


def mimebundle(shown: HasHtml) -> dict[str, str]:
    """The forms of an object that a notebook chooses from."""
    return {"text/plain": repr(shown), "text/html": shown._repr_html_()}


def _escaped(text: Any, most: int) -> str:
    line = "".join(c if c.isprintable() or c == "\n" else "·" for c in str(text)[:most])
    made = html.escape(line)
    return made if len(made.encode()) <= _MOST_BYTES - 5000 else html.escape(line[: most // 6])
