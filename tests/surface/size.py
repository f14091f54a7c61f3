"""The size of the package: lines of code in `src`, without docstrings, comments and blank lines.

    python tests/surface/size.py [FOLDER]

A line counts if it holds a token of Python other than a comment or a docstring, or a character of C outside comments.
The program prints the number for Python, for C, and their sum.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# A text or a character first, so that "/*" within it begins no comment.
C_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|/\*.*?\*/|//[^\n]*', re.DOTALL)


def python_lines(text: str) -> int:
    """The lines of code of a Python source.

    Example:
        >>> python_lines("def f():\\n    'Two.'\\n\\n    # The number.\\n    return (  # both\\n        2\\n    )\\n")
        4
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def c_lines(text: str) -> int:
    """The lines of code of a C source.

    Example:
        >>> c_lines("/* one\\n   two */\\nint x = 1; // three\\n\\nchar *s = \\"/* no comment */\\";\\n")
        2
    """
    code = C_COMMENT.sub(lambda found: found[0] if found[0][0] in "\"'" else "\n" * found[0].count("\n"), text)
    return sum(bool(line.strip()) for line in code.splitlines())


def sizes(folder: Path) -> tuple[int, int]:
    """The lines of Python and of C below a folder."""
    python = sum(python_lines(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.py")))
    c = sum(c_lines(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.[ch]")))
    return python, c


if __name__ == "__main__":
    python, c = sizes(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
    print(f"{python} lines of Python, {c} of C, {python + c} in all")
