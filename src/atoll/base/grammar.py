"""One grammar for a value as Python, as a flag, in a TOML file and on the wire.

    value  =  number | text | True | False | None | (value, …) | [value, …]
            | name(value, …, word=value, …) | value >> value

A text is parsed by `ast` and evaluated node by node. Only constructors from a table are called. A name outside
the table, `module:name(…)`, is imported only if the caller sets `trust`, that is, if a person at this machine
typed the text.

Tests: tests/conformance/test_parts.py, tests/faults/test_bad_input.py.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from atoll.base.errors import AtollError, UsageError, unknown_name
from atoll.base.names import load_from_user

LONGEST = 4096
DEEPEST = 16
_EXTERNAL = re.compile(r"(?<![\w.])([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def constructor(value: Any) -> str:
    """Return the constructor call that rebuilds a frozen dataclass.

    Fields with their default value are omitted. The first field is positional, all others are keywords.

    Args:
        value: an instance of a frozen dataclass.
    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Shrink:
        ...     by: float
        ...     times: int = 1
        >>> constructor(Shrink(0.5, times=2))
        'Shrink(0.5, times=2)'
    """
    words = []
    ordered = sorted((f for f in dataclasses.fields(value) if f.init), key=lambda f: bool(f.kw_only))
    for at, f in enumerate(ordered):
        given = getattr(value, f.name)
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if not required:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if type(given) is type(default) and given == default:
                continue
        bare = at == 0 and not f.kw_only
        words.append(_text(given) if bare else f"{f.name}={_text(given)}")
    return f"{type(value).__name__}({', '.join(words)})"


def _text(value: Any) -> str:
    """Return the text of a value; a function or class becomes `module:name`."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


class Value:
    """Base of frozen dataclasses: `repr` is the constructor call, which `parse` can read back."""

    def __repr__(self) -> str:
        return constructor(self)


def parse(
    text: str,
    names: Mapping[str, Callable[..., Any]],
    *,
    inner: Mapping[str, Callable[..., Any]] | None = None,
    trust: bool = False,
    kind: str = "part",
) -> Any:
    """Parse a text of the grammar and return its value.

    Args:
        text: at most 4096 characters, at most 16 calls deep.
        names: the constructors that the text may call.
        inner: the constructors that it may call as arguments; None: `names`.
        trust: whether `module:name` may import. Set it only for text that a person at this machine typed, or for a
            file that they named.
        kind: the word for a constructor in the error about an unknown name.
    Returns:
        The value that the constructors build.
    Raises:
        UsageError: the text is not a value of the grammar, uses an unknown name, or a constructor refused its
            arguments. Nothing outside the table was run.
    Example:
        >>> parse("dict(rate=0.5, sizes=(1, 2))", {"dict": dict})
        {'rate': 0.5, 'sizes': (1, 2)}
    """
    if len(text) > LONGEST:
        raise UsageError(f"The value has {len(text)} characters.", f"at most {LONGEST}.")
    external: dict[str, tuple[str, str]] = {}

    def stand_in(match: re.Match[str]) -> str:
        name = f"_external_{len(external)}"
        external[name] = (match[1], match[2])
        return name

    try:
        tree = ast.parse(_EXTERNAL.sub(stand_in, text.strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{text!r} cannot be read: {error}.",
            "one value: a number, a text, or name(argument, word=argument).",
            write=next(filter(None, map(_bare_call, names.values())), ""),
        ) from None
    return _Reader(text, names, names if inner is None else inner, external, trust, kind).read(tree, 0)


def _bare_call(make: Callable[..., Any]) -> str:
    """Return the call without arguments if it builds a value; otherwise an empty text."""
    try:
        make()
    except (AtollError, TypeError):
        return ""
    return f"{make.__name__}()"


@dataclasses.dataclass
class _Reader:
    text: str
    names: Mapping[str, Callable[..., Any]]
    inner: Mapping[str, Callable[..., Any]]
    external: Mapping[str, tuple[str, str]]
    trust: bool
    kind: str

    def read(self, node: ast.expr, depth: int) -> Any:
        if depth > DEEPEST:
            raise UsageError(f"{self.text!r} is nested deeper than {DEEPEST}.", f"at most {DEEPEST} levels.")
        match node:
            case ast.Constant(value=str() as text):
                return self._restored(text)
            case ast.Constant(value=bool() | int() | float() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=ast.Constant(value=int() | float() as number)):
                return -number if isinstance(op, ast.USub) else number
            case ast.Tuple(elts=items):
                return tuple(self.read(item, depth + 1) for item in items)
            case ast.List(elts=items):
                return [self.read(item, depth + 1) for item in items]
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return self._call(operator.rshift, [self.read(left, depth + 1), self.read(right, depth + 1)], {})
            case ast.Call(func=ast.Name(id=name), args=args, keywords=words):
                make = self._find(name, depth)
                if any(isinstance(a, ast.Starred) for a in args) or any(w.arg is None for w in words):
                    raise self._refusal("a starred argument")
                return self._call(
                    make,
                    [self.read(a, depth + 1) for a in args],
                    {w.arg: self.read(w.value, depth + 1) for w in words if w.arg},
                )
            case ast.Name(id=name) if name in self.external:
                return self._import(name)
            case ast.Name(id=name):
                made = self._find(name, depth)
                raise UsageError(
                    f"{name} is the name of a constructor, in {self.text!r}.",
                    "a call.",
                    "a value is written as a call of its constructor.",
                    _bare_call(made),
                )
            case _:
                raise self._refusal(f"a {type(node).__name__.lower()}")

    def _find(self, name: str, depth: int) -> Callable[..., Any]:
        if name in self.external:
            found = self._import(name)
            if not callable(found):
                raise UsageError(f"{':'.join(self.external[name])} is not callable.", "a class or a function.")
            return found  # type: ignore[no-any-return]
        names = self.inner if depth else self.names
        if name not in names:
            raise unknown_name(self.kind, name, names)
        return names[name]

    def _restored(self, text: str) -> str:
        """Restore a quoted text: a colon inside quotes does not name code."""
        return re.sub(r"_external_\d+", lambda found: ":".join(self.external.get(found[0], (found[0],))), text)

    def _call(self, make: Callable[..., Any], args: list[Any], words: dict[str, Any]) -> Any:
        try:
            return make(*args, **words)
        except AtollError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            name = ">>" if make is operator.rshift else getattr(make, "__name__", "?")
            raise UsageError(f"{self.text!r}: {error}.", f"the arguments of {name}.") from None

    def _import(self, name: str) -> Any:
        module, attribute = self.external[name]
        if not self.trust:
            raise UsageError(
                f"{module}:{attribute} names code outside atoll.",
                "a name of atoll's own table.",
                "the text was not typed at this machine, so it may not import code.",
                "--trust",
            )
        return load_from_user(f"{module}:{attribute}")

    def _refusal(self, subject: str) -> UsageError:
        return UsageError(
            f"{self.text!r} contains {subject}.",
            "constants, tuples, lists, calls of known names, and >>.",
            "a plan text is data: reading it must not run other code.",
        )
