"""Stop rules: when a run has done what it was asked to do, or can no longer.

    memory, outcome = rule.update(memory, report)        after each round; outcome is None while the run goes on

A rule is a value; what it remembers is a plain dict of numbers, saved with the run. Several rules stand side by side in
a tuple, and the first that is met ends the run: `(Rounds(100), Target("accuracy", 0.95))`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from atoll.errors import RunError, UsageError, did_you_mean
from atoll.fields import check, number, repaired
from atoll.grammar import constructor

Memory = dict[str, Any]

_HIGHER = {"accuracy", "auc", "recall", "precision", "f1", "r2", "score"}
_LOWER = {"loss", "error", "mse", "rmse", "mae", "perplexity", "norm"}


class Report(Protocol):
    """What a rule reads of a round."""

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
    """Why a run ended.

    Args:
        reason: a sentence for people.
        failed: whether the run could not go on: exit code 1; otherwise it is done: exit code 0.
        required, why, write: the other parts of an error, where it failed.
    """

    reason: str
    failed: bool = False
    required: str = ""
    why: str = ""
    write: str = ""

    def error(self) -> RunError:
        """The error that a failed run ends with."""
        return RunError(self.reason, self.required, self.why, self.write)


class Stop:
    """What every stop rule is; final classes derive from it."""

    def __post_init__(self) -> None:
        check(self)

    def __repr__(self) -> str:
        return constructor(self)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the metrics without which the rule can never be met."""
        return ()

    def init(self) -> Memory:
        """The memory before the first round: numbers, texts and None by name, as JSON has them."""
        return {}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
        """The memory after a round, and why the run ends, or None. `memory` is unchanged.

        A round whose report lacks the metric (nobody at work, no evaluation) leaves the memory as it was.
        """
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Rounds(Stop):
    """Stop after so many rounds, counted from the start of the run.

    Args:
        n: rounds, ≥ 1.
    Example:
        >>> Rounds(100)
        Rounds(100)
    """

    n: int = number(least=1, whole=True, example=100, why="a run makes at least one round.")

    def init(self) -> Memory:
        return {"done": 0}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
        done = memory["done"] + 1
        met = done >= self.n
        return {"done": done}, Outcome(f"{done} rounds are done.") if met else None


@dataclass(frozen=True, repr=False)
class Seconds(Stop):
    """Stop after so many seconds of rounds; the round that crosses the line is finished.

    Args:
        s: seconds, > 0; rounds before a resume count, pauses do not.
    Example:
        >>> Seconds(60)
        Seconds(60.0)
    """

    s: float = number(above=0, example=60.0, why="a round takes time.")

    def init(self) -> Memory:
        return {"seconds": 0.0}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
        spent = memory["seconds"] + report.seconds
        met = spent >= self.s
        return {"seconds": spent}, Outcome(f"{spent:.1f} s of {self.s:g} s are spent.") if met else None


@dataclass(frozen=True, repr=False)
class Bytes(Stop):
    """Stop after so many bytes, up and down together; the round that crosses the line is finished.

    Args:
        n: bytes, ≥ 1.
    Example:
        >>> Bytes(10**9)
        Bytes(1000000000)
    """

    n: int = number(least=1, whole=True, example=10**9, why="a round moves bytes.")

    def init(self) -> Memory:
        return {"bytes": 0}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
        moved = memory["bytes"] + report.bytes_up + report.bytes_down
        return {"bytes": moved}, Outcome(f"{moved:,} bytes are moved.") if moved >= self.n else None


@dataclass(frozen=True, repr=False)
class Tolerance(Stop):
    """Stop when training has converged: the update has all but vanished, or the training loss all but stands still.

    ‖g_t‖ ≤ gradient,   or   |ℓ_{t−1} − ℓ_t| ≤ loss · max(|ℓ_{t−1}|, |ℓ_t|, 1),   in `patience` rounds in a row

    Args:
        gradient: Euclidean norm of the round's update, ≥ 0, or None.
        loss: change of the mean training loss, relative above 1 and absolute below, ≥ 0, or None.
        patience: rounds in a row, ≥ 1; more than one where minibatches make the loss rough.
    Example:
        >>> Tolerance(gradient=1e-6)
        Tolerance(1e-06)
    """

    gradient: float | None = number(None, least=0, example=1e-6, why="a norm is not negative.")
    loss: float | None = number(None, least=0, example=1e-6, why="a change is measured without its sign.")
    patience: int = number(1, least=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient is None and self.loss is None:
            raise UsageError(
                repr(self),
                "a tolerance for the gradient or for the loss.",
                "without either it is never met.",
                repaired(self, gradient=1e-6),
            )

    @property
    def reads(self) -> tuple[str, ...]:
        names = {"gradient_norm": self.gradient, "loss": self.loss}
        return tuple(name for name, tolerance in names.items() if tolerance is not None)

    def init(self) -> Memory:
        return {"loss": None, "met": 0}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
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
    """Stop when a metric has reached a value.

    Args:
        metric: its name in the report.
        value: what to reach; up or down is known from the name (accuracy up, loss down). Or, for any name,
        above: reached from below, metric ≥ above; or
        below: reached from above, metric ≤ below. One of the three.
    Example:
        >>> Target("accuracy", 0.95), Target("margin", above=2)
        (Target('accuracy', value=0.95), Target('margin', above=2.0))
    """

    metric: str
    value: float | None = number(None, example=0.9)
    above: float | None = number(None, example=0.9, kw_only=True)
    below: float | None = number(None, example=0.1, kw_only=True)

    def __post_init__(self) -> None:
        _named(self, self.metric)
        super().__post_init__()
        given = [x for x in (self.value, self.above, self.below) if x is not None]
        known = direction(self.metric) is not None
        if len(given) != 1 or (self.value is not None and not known):
            aim = {"value": given[0] if given else 0.9} if known else {"above": given[0] if given else 0.9}
            raise UsageError(
                repr(self),
                "one of value, above and below; above or below where the name does not say which way is better.",
                f"better is {'higher' if direction(self.metric) == 1 else 'lower'} for {self.metric}."
                if known
                else f"nobody can tell from the name {self.metric!r} whether more of it is better.",
                repaired(self, **{"value": None, "above": None, "below": None, **aim}),
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.metric,)

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
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
    """Stop when a metric has not improved for so many rounds.

    An improvement is a value better than the best so far by more than min_delta.

    Args:
        metric: its name in the report.
        rounds: rounds since the best one, ≥ 1.
        min_delta: ≥ 0, in the units of the metric.
        better: "higher" or "lower", where the name does not say it.
    Example:
        >>> Patience("loss", 10)
        Patience('loss', rounds=10)
    """

    metric: str
    rounds: int = number(least=1, whole=True, example=10, why="the best round itself has no round since.")
    min_delta: float = number(0.0, least=0, why="a fall is no improvement.")
    better: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _named(self, self.metric)
        super().__post_init__()
        if self.better not in ("higher", "lower") and (self.better or direction(self.metric) is None):
            raise UsageError(
                repr(self),
                "better='higher' or better='lower'.",
                f"nobody can tell from the name {self.metric!r} whether more of it is better.",
                repaired(self, better="higher"),
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> Memory:
        return {"best": None, "since": None}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
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
    """End a run as failed when its training loss is not finite, or far above where it began.

    ℓ_t or ‖g_t‖ not finite,   or   ℓ_t > ℓ_0 + (factor − 1)·|ℓ_0| in `rounds` rounds in a row

    Args:
        factor: > 1; for a positive ℓ_0 the loss may be `factor` times as large.
        rounds: rounds in a row, ≥ 1.
    Example:
        >>> Diverged()
        Diverged()
    """

    factor: float = number(10.0, above=1, why="a loss is not below itself.")
    rounds: int = number(5, least=1, whole=True)

    def init(self) -> Memory:
        return {"first": None, "above": 0}

    def update(self, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
        for name in ("loss", "gradient_norm"):
            now = report.metrics.get(name)
            if now is not None and not math.isfinite(now):
                return dict(memory), self._failed(f"{name} = {now} in round {report.round}.")
        loss = report.metrics.get("loss")
        if loss is None:
            return dict(memory), None
        first = loss if memory["first"] is None else memory["first"]
        # At a loss of exactly 0 every rounding error would be infinitely many times as large.
        limit = first + (self.factor - 1) * max(abs(first), 1e-12)
        above = memory["above"] + 1 if loss > limit else 0
        after = {"first": first, "above": above}
        if above < self.rounds:
            return after, None
        return after, self._failed(
            f"loss = {loss:.4g} in round {report.round}: for {above} rounds above {limit:.4g}; "
            f"the first was {first:.4g}."
        )

    def _failed(self, reason: str) -> Outcome:
        return Outcome(
            f"The training diverged: {reason}",
            True,
            f"a finite loss, at most {self.factor:g} times the first.",
            "the usual cause is a learning rate lr that is too large: each step lands higher than it started.",
            "atoll lr",
        )


def direction(metric: str) -> int | None:
    """+1 where more of a metric is better, −1 where less is, None where its name does not say; the last word decides.

    Example:
        >>> direction("held_out_accuracy"), direction("loss"), direction("margin")
        (1, -1, None)
    """
    word = re.split(r"[^a-z0-9]+", metric.lower())[-1]
    return 1 if word in _HIGHER else -1 if word in _LOWER else None


def _named(rule: Any, metric: object) -> None:
    if not isinstance(metric, str) or not metric:
        raise UsageError(
            f"{type(rule).__name__} was given metric = {metric!r}.",
            "the name of a metric in the report.",
            write=repaired(rule, metric="loss"),
        )


Rules = Stop | Iterable["Rules"]


def each(rules: Rules) -> Iterator[tuple[str, Stop]]:
    """The rules one by one, each under a name of its own: its class, and a number where there are several."""
    seen: dict[str, int] = {}
    pending: list[Any] = [rules]
    while pending:
        rule = pending.pop(0)
        if isinstance(rule, (tuple, list)):
            pending[:0] = rule
            continue
        if isinstance(rule, type) or not hasattr(rule, "update"):
            raise UsageError(f"{rule!r} is no stop rule.", "a stop rule, or a tuple of them.", write="Rounds(100)")
        kind = type(rule).__name__
        seen[kind] = seen.get(kind, 0) + 1
        yield (kind if seen[kind] == 1 else f"{kind} {seen[kind]}"), rule


def update(rules: Rules, memory: Memory, report: Report) -> tuple[Memory, Outcome | None]:
    """The memory of all rules after a round, and why the run ends, or None: a failure first, else the first rule met.

    Args:
        rules: a rule, or a tuple of them.
        memory: what the last call returned; `{}` before the first round. A rule that is new to it begins afresh,
            and one whose numbers have changed goes on, so that a resumed run may be given other rules.
        report: of the round.
    Example:
        >>> from types import SimpleNamespace as Report
        >>> memory, rules = {}, (Rounds(2), Diverged())
        >>> for t in range(2):
        ...     memory, outcome = update(rules, memory, Report(round=t, metrics={"loss": 1.0}))
        >>> outcome.reason, memory
        ('2 rounds are done.', {'Rounds': {'done': 2}, 'Diverged': {'first': 1.0, 'above': 0}})
    """
    after: Memory = {}
    outcomes = []
    for name, rule in each(rules):
        after[name], outcome = rule.update(memory.get(name) or rule.init(), report)
        outcomes.append(outcome)
    met = [outcome for outcome in outcomes if outcome is not None]
    return after, min(met, key=lambda outcome: not outcome.failed, default=None)


def refuse_unknown(rules: Rules, metrics: Iterable[str]) -> None:
    """Refuse a rule that waits for a metric which no round will report.

    Args:
        rules: a rule, or a tuple of them.
        metrics: the names that reports will have.
    Raises:
        UsageError: with the same rule for the nearest name.
    """
    known = sorted(metrics)
    for _, rule in each(rules):
        for metric in getattr(rule, "reads", ()):
            if metric not in known:
                near = did_you_mean(metric, [n for n in known if direction(n) is not None] or ["loss"])
                raise UsageError(
                    f"{rule!r} waits for {metric!r}.",
                    f"a metric that is reported: {', '.join(known)}.",
                    "it would never be met.",
                    repaired(rule, metric=near) if hasattr(rule, "metric") else "Rounds(100)",
                )


RULES: dict[str, type[Stop]] = {c.__name__: c for c in (Rounds, Seconds, Bytes, Tolerance, Target, Patience, Diverged)}
