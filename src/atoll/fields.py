"""Fields of frozen dataclasses that know their range: what cannot work is refused where it is written.

    lr: float = number(above=0)          the range stands beside the name
    check(self)                          in __post_init__: reads every number, refuses what lies outside

A refusal shows the whole constructor again, with each wrong number replaced by one that works.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from atoll.errors import UsageError
from atoll.grammar import constructor


@dataclass(frozen=True)
class Number:
    """The numbers that a field takes; every bound is optional, and infinity is outside all of them."""

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
        """The number meant by `raw`, as the float or int that the field holds.

        Raises:
            ValueError: it is not a number of this range.
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


def number(
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
    """A dataclass field for a number within a range; `check` reads and refuses it.

    Args:
        default: the value where none is given; None makes the field optional.
        above, least, below, most: > above, ≥ least, < below, ≤ most; infinity and NaN are never inside.
        whole: an integer.
        size: 0 for one number, n for a tuple of n.
        also: a class whose values are taken as they are.
        example: a value inside, for the line that a refusal suggests; the default where there is one.
        why: why the bounds are what they are.
        kw_only: given by name alone.
    Returns:
        What `dataclasses.field` returns.
    """
    example = default if example is None and default is not MISSING else example
    rule = Number(above, least, below, most, whole, size, also, example, why)
    return field(default=default, kw_only=kw_only, metadata={"number": rule})


def check(value: Any) -> None:
    """Read every `number` field of a frozen dataclass into its type, every flag as a bool, or refuse them.

    Raises:
        UsageError: numbers outside their ranges, all of them named; the line to write keeps what was right.
    Example:
        >>> @dataclass(frozen=True)
        ... class Shrink:
        ...     by: float = number(above=0, below=1, example=0.5, why="only a factor below 1 shrinks.")
        ...     def __post_init__(self): check(self)
        >>> Shrink(2)
        Traceback (most recent call last):
        atoll.errors.UsageError: Shrink was given by = 2.
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
    """The constructor call of a value with some fields changed, for a refusal to suggest: it can be built.

    Where the change alone is refused for another reason, the line is the one which that refusal suggests.

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
