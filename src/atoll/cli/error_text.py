"""The text of an error at the command line: a last line of Python about settings or data becomes flags.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import ast
import shlex

from atoll.base.errors import AtollError
from atoll.training.experiment import key_of, settings
from atoll.training.settings import declared

_FIRST = {"split": "clients", "load": "data"}
_NAMES = {("split", "by"): "split"}


def as_flags(error: AtollError) -> str:
    """The text of an error, with flags as the line to write if that was Python about settings or data.

    Example:
        >>> print(as_flags(AtollError("Too many.", write="data.split(71, by=Dirichlet(0.3), min_rows=1)")))
        Too many.
        Write: --clients 71 --split 'Dirichlet(0.3)' --set min_rows=1
    """
    flags = _flags(error.write)
    return str(error) if flags is None else str(type(error)(error.given, error.required, error.why, flags))


def _flags(line: str) -> str | None:
    """`data.split(…)`, `load(…)` or `word=value` as flags; None for every other line."""
    try:
        tree = ast.parse(line if "(" in line.partition("=")[0] else f"setting({line})", mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.Call):
        return None
    name = tree.func.attr if isinstance(tree.func, ast.Attribute) else getattr(tree.func, "id", "")
    words = {word.arg: word.value for word in tree.keywords if word.arg}
    if tree.args and name in _FIRST:
        words = {_FIRST[name]: tree.args[0], **words}
    elif tree.args or name not in ("split", "load", "setting") or not words:
        return None
    known = {key_of(f.name): declared(f).flag for f in settings()}
    out = []
    for key, node in words.items():
        value = str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)
        key = _NAMES.get((name, key), key)
        if key not in known:
            return None
        quoted = shlex.quote(value)
        out.append(f"--{key.replace('_', '-')} {quoted}" if known[key] else f"--set {key}={quoted}")
    return " ".join(out)
