"""The course of a correction in one round of local training: its pull, its results, and the checks of its plan.

Tests: tests/identities/test_pull.py, tests/identities/test_corrections.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.base.names import under, without_prefix
from atoll.base.validation import class_instead_of_value
from atoll.compute.model_state import Model
from atoll.compute.step_rule import StepRule
from atoll.plan.protocols import Broadcast, Conflict, Contribution, Correction, Pull, StepFacts, Tensors

if TYPE_CHECKING:
    from atoll.plan.local.train import Train

CORRECTION = "correction."  # the prefix of the names of a correction in memory and server state


class Correcting(NamedTuple):
    """A correction of K clients in one round, after its `pull`.

    Args:
        correction: the correction.
        broadcast: the broadcast; `shared["correction"]` is the public server state of the correction.
        memory: the client memory of the correction, tensors `[K, …]`.
        pull: the pull.
        facts: the facts of the steps, with |a| if the optimizer is SGD.
    """

    correction: Correction
    broadcast: Broadcast
    memory: Tensors
    pull: Pull
    facts: StepFacts

    @classmethod
    def of(
        cls, correction: Correction, broadcast: Broadcast, memory: Tensors, facts: StepFacts, rule: StepRule | None
    ) -> Correcting:
        """Compute the pull of K clients.

        Args:
            correction: the correction.
            broadcast: that of the local part.
            memory: the client memory of the local part.
            facts: the facts of the steps, without |a|.
            rule: the rule of the steps without the pull; None: the optimizer is not SGD.
        """
        shared = without_prefix(broadcast.shared.get("local", {}), CORRECTION)
        broadcast = broadcast._replace(shared={**broadcast.shared, "correction": shared})
        memory = without_prefix(memory, CORRECTION)
        pull = correction.pull(broadcast, memory, facts)
        if rule is not None and correction.needs_weights:
            most = int(facts.steps.max())
            table = torch.tensor(rule._replace(mu=pull.mu).gradient_weights(most), dtype=torch.float64)
            facts = facts._replace(weights=table.to(facts.steps.device)[facts.steps])
        return cls(correction, broadcast, memory, pull, facts)

    def finish(self, contribution: Contribution) -> tuple[Contribution, dict[str, Tensor]]:
        """The contribution with the results of the correction, and its client memory under prefixed names."""
        update = contribution.means["update"]
        means, sums, per_client, memory = self.correction.finish(self.broadcast, self.memory, update, self.facts)
        contribution = contribution._replace(
            means={**contribution.means, **means},
            sums={**contribution.sums, **sums},
            per_client={**contribution.per_client, **per_client},
        )
        return contribution, under(CORRECTION, memory)


def pulled_rule(pull: Pull, rule: StepRule) -> StepRule:
    """The rule of the steps with a pull."""
    anchor = pull.anchor if pull.mu else None
    return rule._replace(mu=pull.mu, anchor=anchor, shift=pull.shift, offset=pull.offset)


def pulled_start(pull: Pull, model: Model, lanes: int) -> Model:
    """The model from which K clients start: the given one, or one with y₀ as its parameters."""
    start = pull.start
    if start is None:
        return model
    if start.dim() == 1 and model.theta.dim() == 1:
        return model._replace(theta=start)
    return model.lanes(lanes)._replace(theta=start.expand(lanes, -1))


def require_correction(correction: Any) -> None:
    """Refuse a value that is not a correction."""
    if correction is None:
        return
    if isinstance(correction, type):
        raise class_instead_of_value("The correction of Train", correction)
    if not isinstance(correction, Correction):
        raise UsageError(
            f"Train(correction={correction!r}).",
            "a correction, of a class that inherits atoll.plan.protocols.Correction, or None.",
            "it states a pull of each local step.",
            Line(python="Train(sgd(0.1), epochs=1, batch=10, correction=Proximal(0.1))"),
        )


def conflicts_of_pull(local: Train, correction: Correction) -> Iterable[Conflict]:
    """Reasons to refuse the optimizer of the clients with a correction."""
    if correction.needs_weights and local.optimizer.step_rule(1.0) is None:
        why = "it divides by the sum of the weights of the gradients in an update, which is known for SGD only."
        yield Conflict(f"{correction!r} with {local.optimizer!r}.", "sgd without dampening.", why, "sgd(0.1)")
    if correction.needs_equal_steps and local.steps is None:
        why = "clients with more rows make more steps in a pass."
        yield Conflict(
            f"{correction!r} with epochs={local.epochs}.", "steps=…, equal for all clients.", why, "Scaffold()"
        )
    if correction.needs_weights and "optimizer" in local.keep:
        given = f"{correction!r} with keep={local.keep!r}."
        why = "the momentum of an earlier round adds gradients to the update that the correction cannot count."
        yield Conflict(given, "clients that do not keep their optimizer.", why, "Train(sgd(0.1), steps=10, batch=10)")
