"""An error as the command line says it: where its last line is Python, the flags that do the same."""

from __future__ import annotations

import ast
import shlex

from atoll.errors import AtollError

_FLAGS = ("by", "clients", "folder", "held_out", "missing", "scale", "target", "task")
_FIRST = {"split": "clients", "load": "data"}
_NAMES = {("split", "by"): "split"}


def as_flags(error: AtollError) -> str:
    """The text of an error, with the line to write as flags where it was Python about data.

    Example:
        >>> print(as_flags(AtollError("Too many.", write="data.split(71, by=Dirichlet(0.3), min_rows=1)")))
        Too many.
        Write: --clients 71 --split 'Dirichlet(0.3)' --set min_rows=1
    """
    flags = _flags(error.write)
    return str(error) if flags is None else str(type(error)(error.given, error.required, error.why, flags))


def _flags(line: str) -> str | None:
    """`data.split(…)`, `load(…)` or a lone `word=value` as flags; None where it is something else."""
    try:
        tree = ast.parse(line if "(" in line.partition("=")[0] else f"alone({line})", mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.Call):
        return None
    name = tree.func.attr if isinstance(tree.func, ast.Attribute) else getattr(tree.func, "id", "")
    told = {word.arg: word.value for word in tree.keywords if word.arg}
    if tree.args and name in _FIRST:
        told = {_FIRST[name]: tree.args[0], **told}
    elif tree.args or name not in ("split", "load", "alone") or not told:
        return None
    words = []
    for key, node in told.items():
        value = str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)
        key = _NAMES.get((name, key), key)
        if key in _FLAGS or key in ("data", "split"):
            words.append(f"--{key.replace('_', '-')} {shlex.quote(value)}")
        elif key in ("seed", "min_rows"):
            words.append(f"--set {key}={shlex.quote(value)}")
        else:
            return None
    return " ".join(words)
