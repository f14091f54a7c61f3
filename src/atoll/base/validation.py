"""Number fields of frozen dataclasses with a range that the constructor checks.

    lr: float = bounded_number(above=0)  declares the field and its range
    check_fields(self)                   in __post_init__: converts every number and refuses values outside the range

The error repeats the whole constructor call, with each wrong number replaced by a valid one.

Tests: tests/faults/test_bad_input.py, tests/identities/test_schedule.py.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from atoll.base.errors import UsageError
from atoll.base.grammar import constructor


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
        if isinstance(raw, bool) or not isinstance(raw, Real):
            raise ValueError
        value = float(raw)
        inside = (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )
        if not inside or (self.whole and not value.is_integer()):
            raise ValueError
        return int(value) if self.whole else value

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
        given = ", ".join(f"{name} = {getattr(value, name)!r}" for name in wrong)
        raise UsageError(
            f"{type(value).__name__} was given {given}.",
            "; ".join(f"{name}: {required}" for name, (_, required, _) in wrong.items()) + ".",
            " ".join(dict.fromkeys(why for _, _, why in wrong.values() if why)),
            repaired(value, **{name: example for name, (example, _, _) in wrong.items()}),
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
        return refusal.write
