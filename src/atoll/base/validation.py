"""Number fields of frozen dataclasses with a range that the constructor checks.

    lr: float = bounded_number(above=0)  declares the field and its range
    check_fields(self)                   in __post_init__: converts every number and refuses values outside the range

The error repeats the whole constructor call, with each wrong number replaced by a valid one.

Tests: tests/faults/test_bad_input.py, tests/identities/test_schedule.py.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Complex, Real
from os import PathLike
from typing import Any, ParamSpec, TypeVar

from atoll.base.concepts import concept, part_for
from atoll.base.errors import RunError, UsageError, did_you_mean
from atoll.base.grammar import constructor
from atoll.base.lines import Line, Part, Write, example_call, form, literal

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def whole_number(raw: Any) -> int:
    """Read a whole number of Python, NumPy or torch: everything that has `__index__`, except truth values.

    Args:
        raw: the value that the user gave.
    Returns:
        A Python int, so that the text of a plan remains a text that can be read.
    Raises:
        ValueError: the value is not a whole number.
    Example:
        >>> import numpy as np
        >>> whole_number(np.int64(5))
        5
    """
    if _is_truth_value(raw) or _is_masked(raw):
        raise ValueError(f"{raw!r} is not a whole number")
    try:
        return operator.index(raw)
    except Exception as error:  # TypeError, or an error of the library of the value
        raise ValueError(f"{raw!r} is not a whole number") from error


def real_number(raw: Any) -> float:
    """Read a real number of Python, NumPy or torch, also NaN and infinity; truth values are refused.

    Args:
        raw: the value that the user gave: a number, or an array or a tensor without axes.
    Returns:
        A Python float.
    Raises:
        ValueError: the value is not a real number.
    Example:
        >>> import numpy as np, torch
        >>> real_number(np.float32(0.5)), real_number(torch.tensor(2))
        (0.5, 2.0)
    """
    wrong = _is_truth_value(raw) or _is_masked(raw) or isinstance(raw, (str, bytes, bytearray))
    if not wrong and not isinstance(raw, Real):
        # float() of a complex scalar of NumPy drops its imaginary part.
        wrong = isinstance(raw, Complex) or getattr(raw, "ndim", 0) != 0 or "complex" in str(getattr(raw, "dtype", ""))
    if wrong or not (hasattr(raw, "__float__") or hasattr(raw, "__index__")):
        raise ValueError(f"{raw!r} is not a real number")
    try:
        return float(raw)
    except Exception as error:  # TypeError, or an error of the library of the value
        raise ValueError(f"{raw!r} is not a real number") from error


def plain_number(raw: Any) -> Any:
    """Convert a number of NumPy, torch or another library to a Python int or float; return other values unchanged.

    Example:
        >>> import numpy as np
        >>> plain_number(np.int64(5)), plain_number(np.float32(0.5)), plain_number("5")
        (5, 0.5, '5')
    """
    if type(raw) in (int, float, bool, str) or raw is None:
        return raw
    for read in (whole_number, real_number):
        try:
            return read(raw)
        except ValueError:
            continue
    return raw


def plain_fields(value: Any, *names: str) -> None:
    """Convert numbers in fields of a frozen dataclass to Python numbers, in place; the checks that follow see these.

    Args:
        value: the instance.
        names: the names of the fields.
    """
    for name in names:
        object.__setattr__(value, name, plain_number(getattr(value, name)))


def _is_truth_value(raw: Any) -> bool:
    return isinstance(raw, bool) or str(getattr(raw, "dtype", "")) in ("bool", "torch.bool")


def _is_masked(raw: Any) -> bool:
    """Whether the value is a masked scalar of NumPy, whose number is a fill value."""
    mask, axes = getattr(raw, "mask", False), getattr(raw, "ndim", 1)
    return mask is not False and not callable(mask) and axes == 0 and bool(mask)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "Path": (PathLike,), "bool": (bool,), "int": (int,), "float": (int, float), "None": (type(None),)
}  # fmt: skip


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that checks its arguments against its annotations before it runs.

    Numbers and truth values of NumPy and torch become those of Python. Texts, paths and truth values are checked; the
    function checks the ranges of numbers. Annotations of other types are not checked.

    Args:
        function: the function; its module has `from __future__ import annotations`.
    Raises:
        UsageError: an unknown or a missing argument, or an argument of another type. The error names the argument.
    Example:
        >>> halve = check_arguments(lambda n: n / 2)
        >>> halve(m=3)
        Traceback (most recent call last):
        atoll.base.errors.UsageError: <lambda>(): missing a required argument: 'n'.
        Required: the arguments n.
    """
    signature = inspect.signature(function)
    rules = {
        name: str(p.annotation).split(" | ")
        for name, p in signature.parameters.items()
        if all(kind in _KINDS for kind in str(p.annotation).split(" | "))
    }

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            names = [name for name in signature.parameters if name != "self"]
            wrong = next((word for word in kwargs if word not in names), "")
            why, write = (_of_argument(wrong, kwargs[wrong], names) if wrong else None) or ("", "")
            raise UsageError(
                f"{function.__name__}(): {error}.", f"the arguments {', '.join(names)}.", why, write
            ) from None
        for name in bound.arguments.keys() & rules.keys():
            bound.arguments[name] = _of_kind(f"{function.__name__}({name}=…)", bound.arguments[name], rules[name])
        return function(*bound.args, **bound.kwargs)

    return call


def _of_argument(word: str, value: Any, names: list[str]) -> tuple[str, Write] | None:
    """The reason and the line for an argument that a function does not have."""
    near = did_you_mean(word, names)
    return ("", Line(f"{near}={literal(value)}")) if near else concept(word, value)


def _of_kind(argument: str, raw: Any, kinds: list[str]) -> Any:
    """The value of an argument, as a Python value of one of these kinds. The function checks the ranges of numbers."""
    if {"int", "float"} & {*kinds}:
        return plain_number(raw)
    value = bool(raw) if "bool" in kinds and _is_truth_value(raw) and getattr(raw, "ndim", 0) == 0 else raw
    if not isinstance(value, tuple(t for kind in kinds for t in _KINDS[kind])):
        words = {"None": "None", "str": "a text", "Path": "a path", "bool": "True or False"}
        required = " or ".join(words[kind] for kind in kinds)
        raise UsageError(f"{argument} is {raw!r:.60}, a {type(raw).__name__}.", f"{required}.")
    return value


@dataclass(frozen=True)
class Number:
    """The range of a number field. Every bound is optional; infinity and NaN are never valid."""

    above: float | None
    least: float | None
    below: float | None
    most: float | None
    whole: bool
    size: int
    also: type | None
    example: Any
    why: str

    def read(self, raw: Any) -> Any:
        """Convert `raw` to the float or int that the field stores.

        Raises:
            ValueError: `raw` is not a number in this range.
        """
        if self.also is not None and isinstance(raw, self.also):
            return raw
        if self.size:
            if not isinstance(raw, (tuple, list)) or len(raw) != self.size:
                raise ValueError
            return tuple(map(self._one, raw))
        return self._one(raw)

    def _one(self, raw: Any) -> float | int:
        value = whole_number(raw) if self.whole else real_number(raw)  # 30.0 is refused, as in every other argument
        inside = (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )
        if not inside:
            raise ValueError
        return value

    def __str__(self) -> str:
        low = f"{self.above:g} < " if self.above is not None else f"{self.least:g} ≤ " if self.least is not None else ""
        high = f" < {self.below:g}" if self.below is not None else f" ≤ {self.most:g}" if self.most is not None else ""
        kind = "a whole number" if self.whole else "a finite number"
        text = f"{kind}, {low}it{high}" if low or high else kind
        if self.size:
            text = f"{self.size} of: {text}"
        return f"{text}; or a {self.also.__name__.lower()}" if self.also is not None else text


def bounded_number(
    default: Any = MISSING,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
    size: int = 0,
    also: type | None = None,
    example: Any = None,
    why: str = "",
    kw_only: bool = False,
) -> Any:
    """Declare a dataclass field for a number within a range; `check` validates it.

    Args:
        default: the default value; None makes the field optional.
        above, least, below, most: value > above, ≥ least, < below, ≤ most; infinity and NaN are never valid.
        whole: whether the value must be an integer.
        size: 0 for one number, n for a tuple of n numbers.
        also: a class whose instances are accepted without conversion.
        example: a valid value, which the error suggests; None: the default.
        why: the reason for the bounds.
        kw_only: whether the field is keyword-only.
    Returns:
        The result of `dataclasses.field`.
    """
    example = default if example is None and default is not MISSING else example
    rule = Number(above, least, below, most, whole, size, also, example, why)
    return field(default=default, kw_only=kw_only, metadata={"number": rule})


def check_fields(value: Any) -> None:
    """Convert every `bounded_number` field of a frozen dataclass to its type, and refuse invalid numbers and flags.

    Args:
        value: the instance; its fields are replaced in place.
    Raises:
        UsageError: some fields are invalid. The error names all of them; its line keeps the valid fields.
    Example:
        >>> @dataclass(frozen=True)
        ... class Shrink:
        ...     by: float = bounded_number(above=0, below=1, example=0.5, why="only a factor below 1 shrinks.")
        ...     def __post_init__(self): check_fields(self)
        >>> Shrink(2)
        Traceback (most recent call last):
        atoll.base.errors.UsageError: Shrink was given by = 2.
        Required: by: a finite number, 0 < it < 1.   Why: only a factor below 1 shrinks.
        Write: Shrink(0.5)
    """
    wrong: dict[str, tuple[Any, str, str]] = {}
    for f in fields(value):
        raw, rule = getattr(value, f.name), f.metadata.get("number")
        if rule is None:
            if isinstance(f.default, bool) and not isinstance(raw, bool):
                wrong[f.name] = (f.default, "True or False", "")
        elif raw is not None or f.default is not None:
            try:
                object.__setattr__(value, f.name, rule.read(raw))
            except (ValueError, OverflowError):
                wrong[f.name] = (rule.example, str(rule), rule.why)
    if wrong:
        works = {name: example for name, (example, _, _) in wrong.items()}
        given = ", ".join(f"{name} = {getattr(value, name)!r}" for name in wrong)
        raise UsageError(
            f"{type(value).__name__} was given {given}.",
            "; ".join(f"{name}: {required}" for name, (_, required, _) in wrong.items()) + ".",
            " ".join(dict.fromkeys(why for _, _, why in wrong.values() if why)),
            Part(repaired(value, **works), changes=works),
        )


def repaired(value: Any, /, **changes: Any) -> str:
    """Return a valid constructor call with some fields changed, for the last part of an error.

    If the changed value is refused for another reason, return the line that this second error suggests.

    Args:
        value: an instance of a frozen dataclass.
        changes: the new values by field name.
    Example:
        >>> @dataclass(frozen=True)
        ... class Shrink:
        ...     by: float
        >>> repaired(Shrink(2.0), by=0.5)
        'Shrink(0.5)'
    """
    try:
        return constructor(replace(value, **changes))
    except UsageError as refusal:
        return form(refusal.write, "python")


def class_instead_of_value(place: str, kind: type, prefix: str = "") -> UsageError:
    """The error for a class in a place that requires a value of this class.

    Args:
        place: the place, as the beginning of a sentence.
        kind: the class.
        prefix: is written before the call in the line to write.
    Example:
        >>> print(class_instead_of_value("codec", dict))
        codec is the class dict, not a value of it.
        Required: a value: add parentheses.   Why: one value of this class is needed.
        Write: dict()
    """
    try:
        parameters = [str(p).split(":")[0] for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        parameters = []
    required = ", ".join(name for name in parameters if not name.startswith("*"))
    call = example_call(kind.__name__, kind) if kind.__module__.startswith("atoll") or not required else ""
    call = call or part_for("optimizer", kind) if kind.__module__.startswith("torch.optim") else call
    ours = "" if kind.__module__.startswith("torch.") else f", {kind.__name__}({required})" if required else ""
    return UsageError(
        f"{place} is the class {kind.__name__}, not a value of it.",
        f"a value: add parentheses{ours}.",
        "one value of this class is needed.",
        f"{prefix}{call}" if call else "",
    )


def required(value: T | None, fact: str) -> T:
    """A value that exists from a certain call on.

    Args:
        value: the value; None before that call.
        fact: its name, for the error.
    Raises:
        RunError: the value is None.
    Example:
        >>> required(3, "number of rows")
        3
    """
    if value is None:
        raise RunError(f"The {fact} is not known.", "a call in the order of the documentation.")
    return value
