"""Measure the prose of the project: private dialect per 1,000 words of docstrings, comments, errors and pages.

    python tests/surface/prose.py            the rate of each part and the files over their limit
    python tests/surface/prose.py PATH …     the rate of these files, with every sentence that has a marker
    python tests/surface/prose.py --check    exit status 1 if a limit is exceeded; `make check` runs this

A marker is a turn of phrase that readers stumble over. The rules behind the markers stand in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

MARKERS = re.compile(
    "|".join(
        (
            r"\b(?:somebody|nobody|whoever|everybody|anybody)\b",
            r"\bwho\b",
            r"\b(?:told|tell|tells|telling|said|says|say|heard|hears|hear|spoken|speaks|speak)\b",
            r"\bwhere (?:there|one|that|it|nobody|somebody|they|no|none|who|this|these|all)\b",
            r"\b(?:so|as) many\b|\bso much\b|\bso long\b",
            r"\bwhat\b",
            r"\b(?:comes|came|come) to\b|\bc[oa]mes? out\b",
            r"\b(?:beside|behind|aloft|anew|elsewhere|alike|apart|alone|aside)\b",
        )
    ),
    re.IGNORECASE,
)
WORD = re.compile(r"[A-Za-z']+")
PARTS = {  # part: (paths, markers per 1,000 words)
    "src": (("src/atoll",), 4.0),
    "docs": (("docs", "decisions", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"), 6.0),
    "tests": (("tests", "examples", "benchmarks"), 6.0),
}
PER_FILE = 10.0  # markers per 1,000 words of one file of more than SHORT words
SHORT = 200
_ERRORS = re.compile(r"(Error|Conflict|Clash)$")


class Piece(NamedTuple):
    """One stretch of prose: its line, its kind and its text."""

    line: int
    kind: str  # "docstring", "comment", "error" or "page"
    text: str


class File(NamedTuple):
    """The prose of one file: its markers, each with its piece, and the number of its words."""

    path: Path
    found: tuple[tuple[Piece, str], ...]
    words: int

    def markers(self, kind: str | None = None) -> list[tuple[Piece, str]]:
        """The markers, each with its piece; of one kind of prose or of all kinds."""
        return [(piece, marker) for piece, marker in self.found if kind in (None, piece.kind)]

    @property
    def rate(self) -> float:
        """Markers per 1,000 words."""
        return 1000 * len(self.found) / max(1, self.words)


def read(path: Path) -> File:
    """The prose of a file of Python, C or Markdown."""
    kinds = {".py": _python, ".c": _c, ".h": _c, ".md": _markdown}
    pieces = tuple(kinds[path.suffix](path.read_text(encoding="utf-8")))
    found = tuple((piece, match.group()) for piece in pieces for match in MARKERS.finditer(piece.text))
    return File(path, found, sum(len(WORD.findall(piece.text)) for piece in pieces))


def _without_doctests(text: str) -> str:
    return re.sub(r"^[ \t]*>>>.*?(?=^[ \t]*$|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)


def _python(text: str) -> Iterator[Piece]:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Piece(node.body[0].lineno, "docstring", _without_doctests(docstring))
    yield from _error_texts(tree)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Piece(token.start[0], "comment", token.string.lstrip("#! "))


def _error_texts(tree: ast.Module) -> Iterator[Piece]:
    """Literals inside raised errors, also those that reach an error through a local variable."""
    seen: set[int] = set()
    for scope in ast.walk(tree):
        if not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
            continue
        assigned: dict[str, list[ast.expr]] = {}
        nodes = list(ast.walk(scope))
        for node in nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    _pair(target, node.value, assigned)
        for node in nodes:
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _ERRORS.search(_name(node.func))):
                for literal in _literals(node, assigned):
                    if id(literal) not in seen:
                        seen.add(id(literal))
                        yield Piece(literal.lineno, "error", str(literal.value))


def _pair(target: ast.expr, value: ast.expr, assigned: dict[str, list[ast.expr]]) -> None:
    if isinstance(target, ast.Name):
        assigned.setdefault(target.id, []).append(value)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for each, part in zip(target.elts, value.elts, strict=True):
            _pair(each, part, assigned)


def _name(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _literals(node: ast.AST, assigned: dict[str, list[ast.expr]]) -> Iterator[ast.Constant]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each
        elif isinstance(each, ast.Name):
            for value in assigned.get(each.id, ()):
                if isinstance(value, (ast.Constant, ast.JoinedStr, ast.IfExp, ast.BinOp)):
                    yield from (c for c in ast.walk(value) if isinstance(c, ast.Constant) and isinstance(c.value, str))


def _c(text: str) -> Iterator[Piece]:
    for match in re.finditer(r"/\*(.*?)\*/|//([^\n]*)", text, re.DOTALL):
        yield Piece(text.count("\n", 0, match.start()) + 1, "comment", match.group(1) or match.group(2) or "")


def _markdown(text: str) -> Iterator[Piece]:
    blank = re.sub(r"^(```|~~~).*?^\1", lambda m: "\n" * m.group().count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for number, line in enumerate(blank.splitlines(), 1):
        yield Piece(number, "page", line)


@cache
def files(part: str) -> list[File]:
    """The files of a part of the project that hold prose."""
    paths: list[Path] = []
    for name in PARTS[part][0]:
        place = ROOT / name
        paths += [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".c", ".md"))
    skipped = {"_build", "__pycache__"}
    return [read(p) for p in paths if not skipped & set(p.parts) and p != Path(__file__).resolve()]


def problems() -> Iterator[str]:
    """One line for each limit that is exceeded."""
    for part, (_, limit) in PARTS.items():
        found = files(part)
        rate = 1000 * sum(len(f.markers()) for f in found) / max(1, sum(f.words for f in found))
        if rate > limit:
            yield f"{part}: {rate:.1f} markers per 1,000 words; at most {limit:g}"
        for file in found:
            name = file.path.relative_to(ROOT)
            if file.words > SHORT and file.rate > PER_FILE:
                yield f"{name}: {file.rate:.1f} markers per 1,000 words; at most {PER_FILE:g} in one file"
            if part == "src":
                for piece, marker in file.markers("error"):
                    yield f"{name}:{piece.line}: {marker!r} in an error sentence: {piece.text.strip()!r}"


def main() -> int:
    """Print rates and sentences; the exit status is 1 if a limit is exceeded and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    words = parser.parse_args()
    if words.paths:
        for path in words.paths:
            for file in map(read, sorted(path.rglob("*.py")) if path.is_dir() else [path]):
                print(f"{file.path}: {file.words} words, {file.rate:.1f} markers per 1,000")
                for piece, marker in file.markers():
                    print(f"  {piece.line} {piece.kind}: {marker!r} in {' '.join(piece.text.split())[:160]!r}")
        return 0
    for part in PARTS:
        found = files(part)
        total, markers = sum(f.words for f in found), sum(len(f.markers()) for f in found)
        print(f"{part}: {len(found)} files, {total} words, {1000 * markers / max(1, total):.1f} markers per 1,000")
    wrong = list(problems())
    print(*wrong, sep="\n")
    return 1 if wrong and words.check else 0


if __name__ == "__main__":
    sys.exit(main())
