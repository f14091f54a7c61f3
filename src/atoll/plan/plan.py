"""An algorithm as a value: a part in each slot of the formula that `round.py` computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from atoll.errors import UsageError
from atoll.fields import repaired
from atoll.grammar import Value
from atoll.layout import Layout
from atoll.names import under
from atoll.plan.codec.stage import Identity
from atoll.plan.conflicts import check, check_part
from atoll.plan.optimizer import sgd
from atoll.plan.pace import Sync
from atoll.plan.protocols import (
    Aggregator,
    Local,
    Optimizer,
    Pace,
    Sampler,
    Stage,
    Tensors,
)
from atoll.plan.sampler import Everyone, Uniform, fraction


@dataclass(frozen=True, repr=False)
class Plan(Value):
    """An algorithm, as a value: a part in each slot of the formula.

    θ⁺ = optimizer(θ, finalize(server_update(Σ wᵢ · decode(encode(local(θ, dataᵢ))))))

    Args:
        local: the computation of a client.
        aggregator: the combination of contributions.
        optimizer: the server's steps.
        cohort: the clients of a round: a sampler; None: all; an int: that number; a float: that fraction.
        codec: the compression of updates.
        pace: when a round closes.
        downlink: the compression of the model's change; the next change contains the error of the last one.
        max_failed: the largest fraction of a cohort that may fail before the run ends, in [0, 1].
    Raises:
        UsageError: a slot holds no part of its kind, or two parts exclude each other.
    Example:
        >>> from atoll.plan.local import Gradient
        >>> from atoll.plan.aggregate import Mean
        >>> Plan(Gradient(), Mean(), sgd(0.1))
        Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))
    """

    local: Local
    aggregator: Aggregator
    optimizer: Optimizer = field(default_factory=lambda: sgd(1.0))
    cohort: Sampler | int | float | None = field(default_factory=Everyone)
    codec: Stage = field(default_factory=Identity)
    pace: Pace = field(default_factory=Sync)
    downlink: Stage = field(default_factory=Identity)
    max_failed: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.max_failed, (int, float)) or not 0 <= self.max_failed <= 1:
            raise UsageError(
                f"max_failed = {self.max_failed!r}.",
                "a fraction in [0, 1].",
                "it is the fraction of a cohort that may fail before the run ends.",
                repaired(self, max_failed=0.5),
            )
        object.__setattr__(self, "cohort", _sampler(self.cohort))
        check(self)

    @property
    def sampler(self) -> Sampler:
        """The sampler of the cohort."""
        return self.cohort  # type: ignore[return-value]

    def __str__(self) -> str:
        """The formula with its slots filled in."""
        return "\n".join(
            (
                f"cohort = {self.sampler!r}",
                f"gᵢ     = {self.local!r}(θ, dataᵢ)",
                f"mᵢ     = {self.codec!r}(gᵢ)",
                f"g      = {self.aggregator!r}(mᵢ, wᵢ)          pace {self.pace!r}",
                f"θ⁺     = {self.optimizer!r}(θ, g, round)",
                *([] if self.downlink == Identity() else [f"θ̂⁺     = θ̂ + {self.downlink!r}(θ⁺ − θ̂)"]),
            )
        )

    def memory(self, layout: Layout) -> dict[str, Tensor]:
        """The memory of one client before its first round, by `part/name`."""
        return _joined({"local": self.local.memory(layout), "codec": self.codec.memory(layout)})


def _sampler(cohort: Any) -> Sampler:
    match cohort:
        case None:
            return Everyone()
        case bool():
            pass
        case int():
            return Uniform(cohort)
        case float():
            return fraction(cohort)
        case Sampler() if not isinstance(cohort, type):
            return cohort
        case _ if callable(cohort) and not isinstance(cohort, type):
            check_part("cohort", cohort)  # names the member that is missing
    raise UsageError(
        f"cohort = {cohort!r}.",
        "a sampler, a number of clients, a fraction of them, or None for everyone.",
        write="Uniform(10)",
    )


def _joined(parts: Mapping[str, Tensors]) -> dict[str, Tensor]:
    return {name: t for part, tensors in parts.items() for name, t in under(f"{part}/", tensors).items()}
