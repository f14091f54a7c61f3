"""A plan describes an algorithm. It has one part for each slot of the formula that `round.py` computes.

Tests: tests/surface/test_contract.py, tests/identities/test_one_algorithm.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from atoll.base.concepts import part_for
from atoll.base.errors import UsageError
from atoll.base.grammar import Value
from atoll.base.markup import mimebundle, preformatted
from atoll.base.names import under
from atoll.base.validation import plain_fields, plain_number, repaired
from atoll.compute.task import Task
from atoll.plan.codec.stage import Identity
from atoll.plan.conflicts import check_part, check_plan
from atoll.plan.formula import formula
from atoll.plan.optimizer.rules import sgd
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
    """An algorithm: one part for each slot of this formula.

    cohort = sampler(clients, round)                     the clients that participate in the round
    gᵢ     = local(θ, dataᵢ)                             an update, uphill: a gradient, or θ − θᵢ after local steps
    mᵢ     = encode(gᵢ)                                  clip, compress
    total  = Σ_b s(b) · decode_sum_b( Σ_{i from b} lift(decode(mᵢ), wᵢ) )
    g      = finalize(server_update(total))              the codec's server part, then the mean or a robust rule
    θ⁺     = optimizer(θ, g, round)                      the server always descends

    b is the model version: the round whose θ client i started from. s(b) is its staleness weight, 1 in synchronous
    rounds. wᵢ is the weight of client i, usually the number of its training rows. `lift` multiplies by wᵢ and
    represents the product so that it can be added without rounding.

    Args:
        local: computes the contribution of a client from θ and the client's own rows.
        aggregator: combines the contributions: an exact sum, then a mean.
        optimizer: makes the step of the server.
        cohort: selects the clients of a round: a sampler, their number (int), their fraction (float), or None for all
            clients.
        codec: compresses an update on its way to the server.
        pace: decides when a round closes.
        downlink: compresses the change of the model on its way to the clients. The next change includes the error of
            this compression.
        max_failed: the largest fraction of a cohort that may fail before the run ends, in [0, 1].
    Raises:
        UsageError: a slot contains a value that is not a part of its kind, or two parts cannot be combined.
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
        plain_fields(self, "max_failed")
        if not isinstance(self.max_failed, (int, float)) or not 0 <= self.max_failed <= 1:
            raise UsageError(
                f"max_failed = {self.max_failed!r}.",
                "a fraction in [0, 1].",
                "it is the fraction of a cohort that may fail before the run ends.",
                repaired(self, max_failed=0.5),
            )
        object.__setattr__(self, "cohort", _sampler(self.cohort))
        check_plan(self)

    @property
    def sampler(self) -> Sampler:
        """The sampler that selects the cohort of a round."""
        return self.cohort  # type: ignore[return-value]

    @cached_property
    def releases(self) -> bool:
        """Whether the codec adds noise with a proof to the update, so that each round is a release of privacy."""
        event = self.codec.event(1.0)
        return event is not None and event.update

    @property
    def shows_clients(self) -> bool:
        """Whether the server receives values of single clients. A secure sum and noise hide them."""
        return self.aggregator.secure is None and not self.releases

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    def __str__(self) -> str:
        """The formula with its slots filled in."""
        parts = {
            "local": self.local,
            "aggregator": self.aggregator,
            "optimizer": self.optimizer,
            "cohort": self.sampler,
            "codec": self.codec,
            "pace": self.pace,
            "downlink": self.downlink,
        }
        return formula({slot: repr(part) for slot, part in parts.items()})

    def memory(self, task: Task) -> dict[str, Tensor]:
        """The memory of one client before its first round. The keys are `part/name`.

        Args:
            task: the model, loss and metrics; `task.start` is the model before the first round.
        """
        layout = self.local.server_layout(task.layout)
        return _joined({"local": self.local.first_memory(task), "codec": self.codec.memory(layout)})


def _sampler(cohort: Any) -> Sampler:
    cohort = plain_number(cohort)
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
        write=(part_for("cohort", cohort) if isinstance(cohort, str) else "") or "Uniform(10)",
    )


def _joined(parts: Mapping[str, Tensors]) -> dict[str, Tensor]:
    return {name: t for part, tensors in parts.items() for name, t in under(f"{part}/", tensors).items()}
