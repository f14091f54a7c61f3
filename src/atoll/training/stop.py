"""Stop rules: conditions that end a run, as finished or as failed.

    memory, outcome = rule.update(memory, report)        after each round; outcome is None while the run continues

A rule is a value. Its memory is a dict of numbers, texts and None, saved with the run. A tuple combines rules, and the
first rule that is met ends the run: `(Rounds(100), Target("accuracy", 0.95))`.

Tests: tests/identities/test_stop.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from atoll.base.errors import RunError, UsageError, did_you_mean
from atoll.base.grammar import constructor
from atoll.base.lines import Change, Line, example_call, form
from atoll.base.validation import bounded_number, check_fields, repaired
from atoll.compute.metric_names import direction

Memory = dict[str, Any]


class RoundMetrics(Protocol):
    """The properties of a round that rules read."""

    @property
    def round(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def seconds(self) -> float: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...


@dataclass(frozen=True)
class Outcome:
    """The reason for the end of a run.

    Args:
        reason: one sentence.
        failed: whether the run failed, with exit code 1; otherwise it finished, with exit code 0.
        required, why, write: the other parts of the error if the run failed.
    """

    reason: str
    failed: bool = False
    required: str = ""
    why: str = ""
    write: str = ""

    def error(self) -> RunError:
        """The error of a failed run."""
        return RunError(self.reason, self.required, self.why, self.write)


class Stop:
    """The base class of stop rules. Derive each rule directly from `Stop`, not from another rule."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return constructor(self)

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the metrics that the rule reads."""
        return ()

    def init(self) -> Memory:
        """The memory of the rule before the first round. Its values are numbers, texts or None, as in JSON."""
        return {}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        """Process the report of a round. The argument `memory` is not changed.

        If the report lacks the metric (no client participated, or no evaluation), the memory stays the same.

        Returns:
            The memory after the round, and the outcome if the run ends, else None.
        """
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Rounds(Stop):
    """Stop after n rounds, counted from the start of the run.

    Args:
        n: the number of rounds, ≥ 1.
    Example:
        >>> Rounds(100)
        Rounds(100)
    """

    n: int = bounded_number(least=1, whole=True, example=100, why="a run makes at least one round.")

    def init(self) -> Memory:
        return {"done": 0}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        done = memory["done"] + 1
        met = done >= self.n
        return {"done": done}, Outcome(f"Finished {done} round{'' if done == 1 else 's'}.") if met else None


@dataclass(frozen=True, repr=False)
class Seconds(Stop):
    """Stop at the end of the round in which the total duration of rounds reaches s seconds.

    Args:
        s: the number of seconds, > 0. Rounds before a resume count; the time between two rounds does not.
    Example:
        >>> Seconds(60)
        Seconds(60.0)
    """

    s: float = bounded_number(above=0, example=60.0, why="a round takes time.")

    def init(self) -> Memory:
        return {"seconds": 0.0}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        spent = memory["seconds"] + report.seconds
        met = spent >= self.s
        return {"seconds": spent}, Outcome(f"The rounds took {spent:.1f} s of {self.s:g} s.") if met else None


@dataclass(frozen=True, repr=False)
class Bytes(Stop):
    """Stop at the end of the round in which the total traffic reaches n bytes.

    Args:
        n: the number of bytes of all uploads and downloads together, ≥ 1.
    Example:
        >>> Bytes(10**9)
        Bytes(1000000000)
    """

    n: int = bounded_number(least=1, whole=True, example=10**9, why="every round transfers bytes.")

    def init(self) -> Memory:
        return {"bytes": 0}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        moved = memory["bytes"] + report.bytes_up + report.bytes_down
        return {"bytes": moved}, Outcome(f"Transferred {moved:,} bytes.") if moved >= self.n else None


@dataclass(frozen=True, repr=False)
class Tolerance(Stop):
    """Stop when training has converged: the update is small, or the training loss hardly changes.

    ‖g_t‖ ≤ gradient,   or   |ℓ_{t−1} − ℓ_t| ≤ loss · max(|ℓ_{t−1}|, |ℓ_t|, 1),   in `patience` consecutive rounds

    Args:
        gradient: the largest Euclidean norm of the round's update, ≥ 0; None: the norm is not checked.
        loss: the largest change of the mean training loss, relative for a loss above 1 and absolute below, ≥ 0; None:
            the loss is not checked.
        patience: the number of consecutive rounds in which this must hold, ≥ 1; use more than one if minibatches make
            the loss noisy.
    Raises:
        UsageError: a value is outside its range, or both tolerances are None.
    Example:
        >>> Tolerance(gradient=1e-6)
        Tolerance(1e-06)
    """

    gradient: float | None = bounded_number(None, least=0, example=1e-6, why="a norm is not negative.")
    loss: float | None = bounded_number(None, least=0, example=1e-6, why="the size of a change is not negative.")
    patience: int = bounded_number(1, least=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient is None and self.loss is None:
            raise UsageError(
                repr(self),
                "a tolerance for the gradient or for the loss.",
                "without a tolerance the rule is never met.",
                repaired(self, gradient=1e-6),
            )

    @property
    def reads(self) -> tuple[str, ...]:
        names = {"gradient_norm": self.gradient, "loss": self.loss}
        return tuple(name for name, tolerance in names.items() if tolerance is not None)

    def init(self) -> Memory:
        return {"loss": None, "met": 0}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        norm, loss, before = report.metrics.get("gradient_norm"), report.metrics.get("loss"), memory["loss"]
        if norm is None and loss is None:
            return dict(memory), None
        reason = ""
        if self.gradient is not None and norm is not None and norm <= self.gradient:
            reason = f"‖g‖ = {norm:.3g} ≤ {self.gradient:g} in round {report.round}."
        elif self.loss is not None and loss is not None and before is not None:
            change = abs(before - loss) / max(abs(before), abs(loss), 1.0)
            if change <= self.loss:
                reason = f"The loss changed by {change:.3g} ≤ {self.loss:g} in round {report.round}."
        met = memory["met"] + 1 if reason else 0
        after = {"loss": before if loss is None or not math.isfinite(loss) else loss, "met": met}
        return after, Outcome(reason) if met >= self.patience else None


@dataclass(frozen=True, repr=False)
class Target(Stop):
    """Stop when a metric has reached a value. Exactly one of `value`, `above` and `below` is set.

    Args:
        metric: the name of the metric in the report.
        value: the target; the direction follows from the name: metric ≥ value for accuracy, metric ≤ value for loss.
        above: the target for any name: metric ≥ above.
        below: the target for any name: metric ≤ below.
    Raises:
        UsageError: none or several targets are set, or `value` is set and the direction is unknown for this name.
    Example:
        >>> Target("accuracy", 0.95), Target("margin", above=2)
        (Target('accuracy', value=0.95), Target('margin', above=2.0))
    """

    metric: str
    value: float | None = bounded_number(None, example=0.9)
    above: float | None = bounded_number(None, example=0.9, kw_only=True)
    below: float | None = bounded_number(None, example=0.1, kw_only=True)

    def __post_init__(self) -> None:
        _named(self, self.metric)
        super().__post_init__()
        given = [x for x in (self.value, self.above, self.below) if x is not None]
        known = direction(self.metric) is not None
        if len(given) != 1 or (self.value is not None and not known):
            aim = {"value": given[0] if given else 0.9} if known else {"above": given[0] if given else 0.9}
            raise UsageError(
                repr(self),
                "one of value, above and below. For a name without a known direction, one of above and below.",
                f"{'higher' if direction(self.metric) == 1 else 'lower'} values of {self.metric} are better."
                if known
                else f"it is unknown whether higher values of {self.metric!r} are better.",
                repaired(self, **{"value": None, "above": None, "below": None, **aim}),
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.metric,)

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        now, up = report.metrics.get(self.metric), direction(self.metric) == 1
        above = self.above if self.value is None else self.value if up else None
        below = self.below if self.value is None else None if up else self.value
        if now is not None and above is not None and now >= above:
            return {}, Outcome(f"{self.metric} = {now:.4g} ≥ {above:g} in round {report.round}.")
        if now is not None and below is not None and now <= below:
            return {}, Outcome(f"{self.metric} = {now:.4g} ≤ {below:g} in round {report.round}.")
        return {}, None


@dataclass(frozen=True, repr=False)
class Patience(Stop):
    """Stop when a metric has not improved for a number of rounds.

    An improvement is a value that is better than the best so far by more than min_delta.

    Args:
        metric: the name of the metric in the report.
        rounds: the number of rounds since the best value, ≥ 1.
        min_delta: the smallest improvement, ≥ 0, in the unit of the metric.
        better: "higher" or "lower"; None: it follows from the name.
    Raises:
        UsageError: a value is outside its range, or `better` is None and the direction is unknown for this name.
    Example:
        >>> Patience("loss", 10)
        Patience('loss', rounds=10)
    """

    metric: str
    rounds: int = bounded_number(least=1, whole=True, example=10, why="rounds are counted after the best one.")
    min_delta: float = bounded_number(0.0, least=0, why="a worse value is not an improvement.")
    better: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _named(self, self.metric)
        super().__post_init__()
        if self.better not in ("higher", "lower") and (self.better or direction(self.metric) is None):
            raise UsageError(
                repr(self),
                "better='higher' or better='lower'.",
                f"it is unknown whether higher values of {self.metric!r} are better.",
                repaired(self, better="higher"),
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> Memory:
        return {"best": None, "since": None}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        now, best, since = report.metrics.get(self.metric), memory["best"], memory["since"]
        if now is None:
            return dict(memory), None
        up = direction(self.metric) == 1 if self.better is None else self.better == "higher"
        since = report.round if since is None else since
        gain = -math.inf if math.isnan(now) else math.inf if best is None else now - best if up else best - now
        if gain > self.min_delta:
            return {"best": now, "since": report.round}, None
        met = report.round - since >= self.rounds
        value = "" if best is None else f" ({best:.4g})"
        reason = f"{self.metric} has not improved since round {since}{value}."
        return {"best": best, "since": since}, Outcome(reason) if met else None


@dataclass(frozen=True, repr=False)
class Diverged(Stop):
    """End a run as failed when the training loss is not finite, or far above its reference r.

    ℓ_t or ‖g_t‖ not finite,   or   ℓ_t > r + (factor − 1)·|r| in `rounds` consecutive rounds or in the last round

    The reference is the larger of two losses on at most 1,024 train rows: that of the start model, and that of the best
    constant answer. If it is not known, it is the loss of the first round.

    Args:
        factor: the largest ratio of ℓ_t to a positive r, > 1.
        rounds: the number of consecutive rounds in which this must hold, ≥ 1.
    Example:
        >>> Diverged()
        Diverged()
    """

    factor: float = bounded_number(10.0, above=1, why="with factor = 1 every increase of the loss would end the run.")
    rounds: int = bounded_number(5, least=1, whole=True)

    def init(self) -> Memory:
        return {"first": None, "above": 0}

    def update(self, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
        for name in ("loss", "gradient_norm"):
            now = report.metrics.get(name)
            if now is not None and not math.isfinite(now):
                return dict(memory), self._failed(f"{name} = {now} in round {report.round}.")
        loss = report.metrics.get("loss")
        if loss is None:
            return dict(memory), None
        first = loss if memory["first"] is None else memory["first"]
        above = memory["above"] + 1 if self.exceeded(loss, first) else 0
        after = {**memory, "first": first, "above": above}
        if above < self.rounds:
            return after, None
        return after, self._failed(
            f"loss = {loss:.4g} in round {report.round}: for {above} rounds above {self._limit(first):.4g}; "
            f"the reference is {first:.4g}."
        )

    def exceeded(self, loss: float, reference: float) -> bool:
        """Whether a loss is above the limit that follows from the reference."""
        return loss > self._limit(reference)

    def _limit(self, reference: float) -> float:
        # If the reference is exactly 0, no multiple of it bounds a rounding error.
        return reference + (self.factor - 1) * max(abs(reference), 1e-12)

    def last_round(self, loss: float, reference: float, round: int) -> Outcome | None:
        """The outcome of a run whose last round has this loss; None if the loss is below the limit."""
        if not self.exceeded(loss, reference):
            return None
        return self._failed(
            f"loss = {loss:.4g} in round {round}, the last one, is above {self._limit(reference):.4g}; "
            f"the reference is {reference:.4g}."
        )

    def _failed(self, reason: str) -> Outcome:
        return Outcome(
            f"The training diverged: {reason}",
            True,
            f"a finite loss, at most {self.factor:g} times that of the start model or of a constant answer.",
            "the usual cause is a learning rate lr that is too large: each step then increases the loss.",
            "atoll lr",
        )


def _named(rule: Any, metric: object) -> None:
    if not isinstance(metric, str) or not metric:
        raise UsageError(
            f"{type(rule).__name__} has metric = {metric!r}.",
            "the name of a metric in the report.",
            write=repaired(rule, metric="loss"),
        )


Rules = Stop | Iterable["Rules"]


def each(rules: Rules) -> Iterator[tuple[str, Stop]]:
    """Yield each rule with a unique name: the name of its class, and a number from the second rule of a class on.

    Args:
        rules: a rule, or nested tuples and lists of rules.
    Raises:
        UsageError: an element is not a stop rule.
    """
    seen: dict[str, int] = {}
    pending: list[Any] = [rules]
    while pending:
        rule = pending.pop(0)
        if isinstance(rule, (tuple, list)):
            pending[:0] = rule
            continue
        if isinstance(rule, type) or not hasattr(rule, "update"):
            number = isinstance(rule, int) and not isinstance(rule, bool) and rule > 0
            text = f"Rounds({rule})" if number else ""
            text = example_call(rule.__name__, rule) if isinstance(rule, type) else text
            line = Line(text, *(form(Change("stop", [text]), door) for door in ("shell", "file")))
            given = f"{rule!r} is not a stop rule."
            raise UsageError(given, "a stop rule, or a tuple of them.", write=line if text else "")
        kind = type(rule).__name__
        seen[kind] = seen.get(kind, 0) + 1
        yield (kind if seen[kind] == 1 else f"{kind} {seen[kind]}"), rule


def update(rules: Rules, memory: Memory, report: RoundMetrics) -> tuple[Memory, Outcome | None]:
    """Update all rules with the report of a round.

    Args:
        rules: a rule, or a tuple of them.
        memory: the memory that the last call returned; `{}` before the first round. A rule without an entry starts from
            `init`. A rule with other parameters continues from its entry. So a resumed run may have other rules.
        report: the report of the round.
    Returns:
        The memory of all rules, with their names as keys; and the outcome of the first failed rule, else of the first
        rule that is met,
        else None.
    Example:
        >>> from types import SimpleNamespace as Report
        >>> memory, rules = {}, (Rounds(2), Diverged())
        >>> for t in range(2):
        ...     memory, outcome = update(rules, memory, Report(round=t, metrics={"loss": 1.0}))
        >>> outcome.reason, memory
        ('Finished 2 rounds.', {'Rounds': {'done': 2}, 'Diverged': {'first': 1.0, 'above': 0}})
    """
    after: Memory = {}
    outcomes = []
    for name, rule in each(rules):
        after[name], outcome = rule.update(memory.get(name) or rule.init(), report)
        outcomes.append(outcome)
    met = [outcome for outcome in outcomes if outcome is not None]
    return after, min(met, key=lambda outcome: not outcome.failed, default=None)


def refuse_unknown(rules: Rules, metrics: Iterable[str]) -> None:
    """Refuse a rule that needs a metric which no round will report.

    Args:
        rules: a rule, or a tuple of them.
        metrics: the names of the metrics in reports.
    Raises:
        UsageError: a metric is not reported; the error has the same rule for the nearest name.
    """
    known = sorted(metrics)
    for _, rule in each(rules):
        for metric in getattr(rule, "reads", ()):
            if metric not in known:
                named = [n for n in known if direction(n) is not None]
                near = did_you_mean(metric, named or ["loss"]) or next((n for n in named if metric and metric in n), "")
                raise UsageError(
                    f"{rule!r} needs the metric {metric!r}.",
                    f"a metric that is reported: {', '.join(known)}.",
                    "without the metric the rule would never be met.",
                    (repaired(rule, metric=near) if near else "") if hasattr(rule, "metric") else "Rounds(100)",
                )


RULES: dict[str, type[Stop]] = {c.__name__: c for c in (Rounds, Seconds, Bytes, Tolerance, Target, Patience, Diverged)}
