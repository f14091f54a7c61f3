"""Convert the docstrings of the package to reStructuredText for the manual.

A docstring has one line, paragraphs and equations, then `Args:`, `Returns:`, `Raises:`, `Example:` and `Reference:`.
Backticks mark code, tables are in Markdown, and all other characters are literal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from inventories import target

SECTION = re.compile(r"(Args|Returns|Raises|Example|References?):\s*(.*)")
ARGUMENT = re.compile(r"([\w, ]+|\*{0,2}\w+): (.*)")
WIDE = "\u2002" * 3


def plain(text: str) -> str:
    """Escape all markup except backticks, which mark code. A name of another library becomes a link to its manual.

    >>> print(plain("|θ*|, and `a_`"))
    \\|θ\\*\\|, and ``a_``
    >>> print(plain("a `nn.Module`"))
    a :py:obj:`nn.Module <torch.nn.Module>`
    """
    parts = re.split(r"`+([^`]+)`+", text)
    parts[::2] = (re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2])
    parts[1::2] = (f":py:obj:`{t} <{full}>`" if (full := target(t)) else f"``{t}``" for t in parts[1::2])
    return "".join(part if i % 2 == 0 else part + ("\\ " if follows(parts, i) else "") for i, part in enumerate(parts))


def follows(parts: list[str], i: int) -> bool:
    """Whether a letter or digit directly follows code. Then reStructuredText requires an escaped space between them."""
    return parts[i + 1][:1].isalnum()


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Split a docstring into (name, lines) pairs. The text before the first section has an empty name."""
    name, body = "", list[str]()
    for line in lines:
        found = SECTION.fullmatch(line) if not line.startswith(" ") else None
        if found:
            yield name, body
            name, body = found[1], [found[2]] if found[2] else []
        else:
            body.append(line)
    yield name, body


def prose(lines: list[str]) -> Iterator[str]:
    """Convert paragraphs. Indented lines become code blocks, equations keep their lines, tables become tables."""
    for empty, group in groupby(lines, key=lambda line: not line.strip()):
        block = list(group)
        if empty:
            continue
        # One line that begins with a norm, |x|, is not a table.
        if len(block) > 1 and all(line.startswith("|") and line.endswith("|") for line in block):
            yield from table(block)
        elif any(line.startswith("    ") for line in block):
            yield from (".. code-block:: text", "", *(f"   {line}" for line in block), "")
        elif any("  " in line.strip() for line in block):
            yield from (*(f"| {re.sub(' {2,}', WIDE, plain(line))}" for line in block), "")
        else:
            yield from (*map(plain, block), "")


def table(block: list[str]) -> Iterator[str]:
    """Convert a Markdown table."""
    yield from (".. list-table::", "   :header-rows: 1", "")
    for i, line in enumerate(block):
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if i != 1:
            yield from (f"   {'* -' if not at else '  -'} {plain(cell)}" for at, cell in enumerate(cells))
    yield ""


def entries(body: list[str]) -> Iterator[tuple[str, str]]:
    """The entries of a section, as (names, text) pairs."""
    edge = min((indent(line) for line in body if line.strip()), default=0)
    found: list[tuple[str, str]] = []
    for line in filter(str.strip, body):
        match = ARGUMENT.fullmatch(line.strip()) if indent(line) == edge else None
        if match:
            found.append((match[1], match[2]))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            found.append(("", line.strip()))
    yield from found


def rest(lines: list[str]) -> Iterator[str]:
    """Convert a whole docstring to reStructuredText."""
    for name, body in sections(lines):
        words = " ".join(map(str.strip, filter(str.strip, body)))
        match name:
            case "":
                yield from prose(body)
            case "Args":
                # A space would end the name. A space of zero width lets a long list of names wrap.
                named = ((names.replace(", ", ",\u200b"), text) for names, text in entries(body))
                yield from (f":param {names}: {plain(text)}" if names else plain(text) for names, text in named)
                yield ""
            case "Example":
                yield from (".. code-block:: pycon", "", *(f"   {line}" for line in body), "")
            case "Raises":
                yield from (
                    f":raises {error}: {plain(text)}" if error else plain(text) for error, text in entries(body)
                )
                yield ""
            case "Returns":
                yield from (f":returns: {plain(words)}", "")
            case _:
                yield from (f"*{name}:* {plain(words)}", "")


def process(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Convert the lines of a docstring in place. Sphinx calls this for each docstring."""
    lines[:] = list(rest(list(lines)))


def signature(app, what: str, name: str, thing: object, options: object, text: str | None, returned: str | None):
    """Shorten a signature. Sphinx calls this for each one. Protocols show none; a default factory is shown as `…`."""
    return ("" if text == "(*args, **kwargs)" else text and text.replace("<factory>", "…"), returned)
