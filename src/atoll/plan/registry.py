"""The table of names that a plan's text may call.

Tests: tests/surface/test_renamed.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.base.lines import Text
from atoll.plan import aggregate, codec, local, optimizer, pace, plan, sampler, schedule
from atoll.plan.formula import OLD, renamed

PARTS: Mapping[str, Callable[..., Any]] = {
    part.__name__: part
    for part in (
        plan.Plan,
        sampler.Everyone,
        sampler.Uniform,
        sampler.Fraction,
        sampler.Poisson,
        sampler.Weighted,
        sampler.RoundRobin,
        sampler.PowerOfChoice,
        local.Gradient,
        local.Train,
        local.Custom,
        local.Evaluate,
        local.Moments,
        local.Newton,
        *local.CORRECTIONS,
        *codec.CODECS,
        aggregate.Mean,
        aggregate.Masks,
        aggregate.Sum,
        aggregate.Combine,
        aggregate.Agnostic,
        *aggregate.ROBUST,
        aggregate.Attacked,
        *aggregate.ATTACKS,
        pace.Sync,
        pace.Buffered,
        pace.Bounded,
        pace.staleness_polynomial,
        pace.hinge,
        optimizer.sgd,
        optimizer.adam,
        optimizer.adamw,
        optimizer.adagrad,
        optimizer.rmsprop,
        optimizer.adadelta,
        optimizer.adamax,
        optimizer.nadam,
        optimizer.radam,
        optimizer.yogi,
        schedule.constant,
        schedule.step,
        schedule.exponential,
        schedule.inverse,
        schedule.inverse_sqrt,
        schedule.cosine,
        schedule.polynomial,
        schedule.warmup,
        schedule.hold,
        schedule.plateau,
    )
}


def read_part(
    text: str, names: Mapping[str, Callable[..., Any]] = PARTS, *, trust: bool = False, kind: str = "part"
) -> Any:
    """The part that a plan text describes.

    Args:
        text: the text of a part, with the present names of parts.
        names: the constructors that the outermost call may use; the arguments of this call may use all parts.
        trust: whether `module:name` may be imported.
        kind: the word for an outermost name in errors.
    Raises:
        UsageError: the text contains an old name, or it describes no part.
    Example:
        >>> read_part("sgd(0.1)")
        sgd(0.1)
    """
    now = renamed(text)
    if now != text:
        old = " and ".join(sorted({found[0] for found in OLD.finditer(text)}))
        raise UsageError(
            f"{text}: the name {old} is no longer in use.",
            f"the text {now}.",
            "parts are named by the terms of their papers.",
            Text(now),
        )
    return parse(text, names, inner=PARTS, trust=trust, kind=kind)
