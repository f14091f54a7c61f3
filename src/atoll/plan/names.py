"""The table of names that a plan's text may call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from atoll import schedule
from atoll.plan import aggregate, codec, local, optimizer, pace, plan, sampler, stop


class polynomial:
    """In a text: with one number alone the factor of a late update, `(1 + s)^−power`; otherwise a schedule."""

    def __new__(cls, *args: Any, **words: Any) -> Any:
        late = (len(args) == 1 and not words) or set(words) == {"power"}
        return (pace.staleness_polynomial if late else schedule.polynomial)(*args, **words)


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
        local.Gradient,
        local.Train,
        local.Custom,
        local.Evaluate,
        *codec.CODECS,
        aggregate.Mean,
        aggregate.Sum,
        pace.Sync,
        pace.Buffered,
        pace.Bounded,
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
        polynomial,
        schedule.warmup,
        schedule.hold,
        schedule.plateau,
        stop.Rounds,
        stop.Tolerance,
        stop.Target,
        stop.Patience,
        stop.Seconds,
        stop.Bytes,
        stop.Diverged,
    )
}
