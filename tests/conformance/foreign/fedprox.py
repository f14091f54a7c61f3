"""FedProx: an optimizer of clients that pulls each step back to the model of the round.

Tests: tests/conformance/test_foreign.py
"""

from dataclasses import dataclass

from atoll.base.validation import bounded_number
from atoll.plan.optimizer.base import OptimizerBase
from atoll.plan.protocols import Conflict
from atoll.plan.schedule import Schedule


@dataclass(frozen=True, repr=False)
class fedprox(OptimizerBase):
    """Gradient descent on a client's loss with a proximal term.

    θ ← θ − lr·(g + mu·(θ − θ₀)),  θ₀ the model at the start of the round

    Args:
        lr: learning rate, > 0, or a schedule of the round.
        mu: weight of the term (mu/2)·|θ − θ₀|², ≥ 0; 0 is plain gradient descent.
    Raises:
        UsageError: a number is out of range.
    Example:
        >>> fedprox(0.1, mu=0.01)
        fedprox(0.1, mu=0.01)

    Reference: Li et al., Federated Optimization in Heterogeneous Networks, 2020.
    """

    lr: float | Schedule = bounded_number(above=0, also=Schedule, example=0.1)
    mu: float = bounded_number(least=0, example=0.01)

    def per_coordinate(self):
        """The anchor θ₀, which starts as θ."""
        return {"anchor": None}

    def apply(self, block, g, lr):
        """One step of one block, in place."""
        pull = block.theta - block.slots["anchor"]
        block.theta.add_(g.add(pull, alpha=self.mu), alpha=-lr)

    def conflicts(self, slots):
        """A client that keeps its optimizer would keep the anchor of an earlier round."""
        if "optimizer" in slots.local.keep and slots.local.optimizer == self:
            given, required = f"{self!r} with keep={slots.local.keep!r}.", "clients that do not keep their optimizer."
            why = "a step is pulled back to the model of this round, and a kept anchor is that of an earlier one."
            yield Conflict(given, required, why, f"Train({self!r}, epochs=1, batch=10)")
