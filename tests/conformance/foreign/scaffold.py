"""SCAFFOLD: local training whose gradients are corrected by control variates.

Tests: tests/conformance/test_foreign.py
"""

from dataclasses import dataclass

import torch

from atoll.base.validation import bounded_number
from atoll.plan.local import Train
from atoll.plan.optimizer.base import OptimizerBase
from atoll.plan.protocols import Conflict, Declared, Local


@dataclass(frozen=True, repr=False)
class corrected(OptimizerBase):
    """Gradient descent with a correction that stays the same in all steps of a round.

    θ ← θ − lr·(g + correction)

    Args:
        lr: learning rate, > 0.
    Example:
        >>> corrected(0.1)
        corrected(0.1)
    """

    lr: float = bounded_number(above=0, example=0.1)

    def per_coordinate(self):
        """The correction, which the local part sets."""
        return {"correction": 0.0}

    def apply(self, block, g, lr):
        """One step of one block, in place."""
        block.theta.add_(g + block.slots["correction"], alpha=-lr)


@dataclass(frozen=True, repr=False)
class Scaffold(Local):
    """Local training with a control variate c of the server and one cᵢ of each client, all 0 at first.

    θᵢ ← θᵢ − lr·(g − cᵢ + c) for `steps` batches,   gᵢ = θ − θᵢ
    cᵢ⁺ = cᵢ − c + gᵢ / (steps·lr),   which is the mean of g over the steps
    c⁺ = c + Σ (cᵢ⁺ − cᵢ) / N,   N the number of all clients: c is the mean of all cᵢ

    Args:
        lr: learning rate of clients, > 0.
        steps: batches in a round, at least 1.
        batch: rows in a batch; None: all rows of the client.
    Raises:
        UsageError: a number is out of range; raised by the plan that contains the part.
    Example:
        >>> Scaffold(0.1, steps=5, batch=10)
        Scaffold(0.1, steps=5, batch=10)

    Reference: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, 2020, option II.
    """

    lr: float
    steps: int
    batch: int | None = None

    @property
    def train(self):
        """The training of a client; the state of its optimizer contains the correction."""
        return Train(corrected(self.lr), steps=self.steps, batch=self.batch, keep=("optimizer",))

    def padded_batch(self, rows):
        """The padded length of a client's batch."""
        return self.train.padded_batch(rows)

    def examples_per_round(self, sizes):
        """Rows that clients of these sizes process in a round."""
        return self.train.examples_per_round(sizes)

    def first_memory(self, task):
        """The control variate cᵢ of a client."""
        return self.server(task.layout)

    def server(self, layout):
        """The control variate c of the server, which every client receives."""
        return {"control": torch.zeros(layout.d, dtype=layout.dtype)}

    def declare(self, task):
        """The names of the training, and the change of a control variate."""
        return {**self.train.declare(task), "control": Declared(task.layout.d, task.layout.dtype, "sum")}

    def contribute(self, broadcast, lanes, memory, key, task):
        """The updates of K clients and the changes of their control variates."""
        mine, shared = memory["control"], broadcast.shared["local"]["control"]
        given, _ = self.train.contribute(broadcast, lanes, {"optimizer.correction": shared - mine}, key, task)
        change = given.means["update"] / (self.steps * self.lr) - shared
        return given._replace(sums={**given.sums, "control": change}), {"control": mine + change}

    def server_update(self, total, server, info, key):
        """c moves by the mean change over all clients. A client that did not participate has the change 0."""
        control, sums = server["control"], dict(total.sums)
        change = sums.pop("control", torch.zeros_like(control)) / info.population.clients
        return total._replace(sums=sums), {"control": control + change.to(control)}

    def conflicts(self, slots):
        """Those of the training, and unequal weights."""
        yield from self.train.conflicts(slots)
        if slots.aggregator.weights != "equal":
            why = "c is the mean of all control variates with equal weights, and the update must be the same mean."
            yield Conflict(f"{self!r} with {slots.aggregator!r}.", "equal weights.", why, 'Mean(weights="equal")')
