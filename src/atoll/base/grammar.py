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
import inspect
import itertools
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from atoll.base.errors import AtollError, UsageError, did_you_mean, unknown_name
from atoll.base.lines import TRUST, Part, Text, example_call, literal
from atoll.base.names import load_from_user

LONGEST = 4096
DEEPEST = 16
# Python 3.11 counts the depth of a tree for all threads together: of two threads that parse, one can fail.
_ONE_PARSER = threading.RLock()
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
            arguments. Nothing outside the table was run. The line to write is the whole text with the wrong place
            corrected, if that is a value.
    Example:
        >>> parse("dict(rate=0.5, sizes=(1, 2))", {"dict": dict})
        {'rate': 0.5, 'sizes': (1, 2)}
    """
    if len(text) > LONGEST:
        raise UsageError(f"The value has {len(text)} characters.", f"at most {LONGEST}.")
    source, external = _without_code(text)
    try:
        tree = _tree(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{text!r} cannot be read: {error}.",
            "one value: a number, a text, or name(argument, word=argument).",
        ) from None
    return _Reader(text, source, names, names if inner is None else inner, external, trust, kind).read(tree, 0)


def arguments(text: str) -> tuple[str, list[str], dict[str, str]]:
    """The name of a call, and the texts of its arguments. Nothing is built.

    Raises:
        UsageError: the text is no call on one line.
    Example:
        >>> arguments("Plan(Gradient(), optimizer=sgd(0.1), codec=mine:Half() >> Cast('bf16'))")
        ('Plan', ['Gradient()'], {'optimizer': 'sgd(0.1)', 'codec': "mine:Half() >> Cast('bf16')"})
    """
    source, external = _without_code(text)
    try:
        tree = _tree(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or "\n" in source or len(text) > LONGEST:
        raise UsageError(f"{text!r:.80} is no call.", "name(argument, word=argument).")
    data = source.encode()

    def of(node: ast.expr) -> str:
        return _restored(data[node.col_offset : node.end_col_offset].decode(), external)

    return tree.func.id, [of(node) for node in tree.args], {w.arg: of(w.value) for w in tree.keywords if w.arg}


def _without_code(text: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """A text with a word in the place of each `module:name`, and the module and the name of each word."""
    external: dict[str, tuple[str, str]] = {}

    def stand_in(match: re.Match[str]) -> str:
        name = f"_external_{len(external)}"
        external[name] = (match[1], match[2])
        return name

    return _EXTERNAL.sub(stand_in, text.strip()), external


def _restored(text: str, external: Mapping[str, tuple[str, str]]) -> str:
    """A text with each `module:name` in its place again."""
    return re.sub(r"_external_\d+", lambda found: ":".join(external.get(found[0], (found[0],))), text)


@dataclasses.dataclass
class _Reader:
    text: str
    source: str  # the text, in which a word stands for each `module:name`
    names: Mapping[str, Callable[..., Any]]
    inner: Mapping[str, Callable[..., Any]]
    external: Mapping[str, tuple[str, str]]
    trust: bool
    kind: str
    repairs: bool = True

    def read(self, node: ast.expr, depth: int) -> Any:
        if depth > DEEPEST:
            raise UsageError(f"{self.text!r} is nested deeper than {DEEPEST}.", f"at most {DEEPEST} levels.")
        match node:
            case ast.Constant(value=str() as text):
                return _restored(text, self.external)  # a colon inside quotes does not name code
            case ast.Constant(value=bool() | int() | float() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=ast.Constant(value=int() | float() as number)):
                return -number if isinstance(op, ast.USub) else number
            case ast.Tuple(elts=items):
                return tuple(self.read(item, depth + 1) for item in items)
            case ast.List(elts=items):
                return [self.read(item, depth + 1) for item in items]
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return self._call(node, operator.rshift, [self.read(left, depth + 1), self.read(right, depth + 1)], {})
            case ast.Call(func=ast.Name(id=name), args=args, keywords=words):
                make = self._find(node.func, name, depth)
                if any(isinstance(a, ast.Starred) for a in args) or any(w.arg is None for w in words):
                    raise self._refusal("a starred argument")
                return self._call(
                    node,
                    make,
                    [self.read(a, depth + 1) for a in args],
                    {w.arg: self.read(w.value, depth + 1) for w in words if w.arg},
                )
            case ast.Name(id=name) if name in self.external:
                return self._import(name)
            case ast.Name(id=name):
                call = example_call(name, self._find(node, name, depth))
                error = UsageError(
                    f"{name} is the name of a constructor, in {self.text!r}.",
                    "a call.",
                    "a value is written as a call of its constructor.",
                    call,
                )
                raise self._corrected(error, [{node: call}] if call else [])
            case _:
                raise self._refusal(f"a {type(node).__name__.lower()}")

    def _find(self, node: ast.expr, name: str, depth: int) -> Callable[..., Any]:
        if name in self.external:
            found = self._import(name)
            if not callable(found):
                raise UsageError(f"{':'.join(self.external[name])} is not callable.", "a class or a function.")
            return found  # type: ignore[no-any-return]
        names = self.inner if depth else self.names
        if name not in names:
            near = did_you_mean(name, names)
            call = example_call(near, names[near]) if near else ""
            repairs: list[_Repair] = [{node: near}, {node: call}] if near else []
            raise self._corrected(unknown_name(self.kind, name, names, lambda _: call), repairs)
        return names[name]

    def _call(self, node: ast.expr, make: Callable[..., Any], args: list[Any], words: dict[str, Any]) -> Any:
        if missing := ", ".join(sorted(getattr(make, "__abstractmethods__", ()))):
            raise UsageError(
                f"{self.text!r}: the class {make.__name__} does not define {missing}.",
                f"a class that defines {missing}.",
                "its base declares each of these methods without a default.",
            )
        try:
            return make(*args, **words)
        except UsageError as error:
            raise self._corrected(error, _repairs(node, make, error)) from None
        except AtollError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            name = ">>" if make is operator.rshift else getattr(make, "__name__", "?")
            known = _arguments(make)
            wrong = next((word for word in words if known and word not in known), None)
            if wrong is None or not isinstance(node, ast.Call):
                required = f"the arguments of {name}{': ' + ', '.join(known) if known else ''}."
                raise UsageError(f"{self.text!r}: {error}.", required) from None
            keyword = next(w for w in node.keywords if w.arg == wrong)
            refusal = unknown_name(
                "argument", wrong, known, lambda _: "", _restored(ast.unparse(keyword.value), self.external)
            )
            refusal = UsageError(
                f"{self.text!r}: {name} has no argument {wrong!r}.", refusal.required, refusal.why, refusal.write
            )
            near = did_you_mean(wrong, known)
            raise self._corrected(
                refusal, [{keyword: f"{near}={ast.unparse(keyword.value)}"}] if near else []
            ) from None

    def _corrected(self, error: UsageError, repairs: Iterator[_Repair] | list[_Repair]) -> UsageError:
        """The error with the whole text as its line, corrected by the first repair that gives a value."""
        if self.repairs and "\n" not in self.source:
            for repair in repairs:
                source = _replaced(self.source, repair)
                try:
                    dataclasses.replace(self, source=source, repairs=False).read(_tree(source), 0)
                except (AtollError, SyntaxError):
                    continue
                return error.writing(Text(_restored(source, self.external)))
        return error

    def _import(self, name: str) -> Any:
        module, attribute = self.external[name]
        if not self.trust:
            raise UsageError(
                f"{module}:{attribute} names code outside atoll.",
                "a name of atoll's own table.",
                "the text was not typed at this machine, so it may not import code.",
                TRUST,
            )
        return load_from_user(f"{module}:{attribute}")

    def _refusal(self, subject: str) -> UsageError:
        return UsageError(
            f"{self.text!r} contains {subject}.",
            "constants, tuples, lists, calls of known names, and >>.",
            "a plan text is data: reading it must not run other code.",
        )


# A correction of a text: new words in the places of some nodes of its tree.
_Repair = Mapping[ast.expr | ast.keyword, str]


def _tree(source: str) -> ast.expr:
    with _ONE_PARSER:
        return ast.parse(source, mode="eval").body


def _replaced(source: str, repair: _Repair) -> str:
    """The text of one line with other words in the places of some nodes."""
    data = source.encode()  # the columns of `ast` count bytes
    for node, new in sorted(repair.items(), key=lambda item: -item[0].col_offset):
        data = data[: node.col_offset] + new.encode() + data[node.end_col_offset :]
    return data.decode()


def _repairs(node: ast.expr, make: Callable[..., Any], error: UsageError) -> Iterator[_Repair]:
    """The corrections of a refused call that the line of its error permits."""
    line = error.line
    try:
        instead = _tree(line)
    except (SyntaxError, ValueError):
        return  # the line is a command, or there is none
    names = [each.func.id for each in (node, instead) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)]
    if not isinstance(node, ast.Call) or (len(names) == 2 and names[0] == names[1]):
        yield {node: line}
        return
    if isinstance(error.write, Part) and error.write.changes:
        places = _places(node, make)
        if all(name in places for name in error.write.changes):
            yield {places[name]: literal(value) for name, value in error.write.changes.items()}
        for place, value in itertools.product(places.values(), error.write.changes.values()):
            yield {place: literal(value)}  # a recipe may pass its argument on by another name
    for place in (*node.args, *(word.value for word in node.keywords)):
        yield {place: line}


def _arguments(make: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        return []


def _places(node: ast.Call, make: Callable[..., Any]) -> dict[str, ast.expr]:
    """The places of the arguments of a call, by name."""
    return dict(zip(_arguments(make), node.args, strict=False)) | {w.arg: w.value for w in node.keywords if w.arg}
