"""Agnostic federated learning: the mean whose weights of clients are chosen against the model.

Tests: tests/identities/test_fairness.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.base.errors import RunError
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.layout import Layout
from atoll.plan.aggregate.rows import NO_FACTS, PartialRows, RowFacts, RowRule
from atoll.plan.protocols import Contribution, RoundInfo, Tensors, Total


@dataclass(frozen=True, repr=False)
class Agnostic(RowRule):
    """The mean with the weights of clients for which it is worst: min over θ, max over weights λ, of Σ λᵢ Fᵢ(θ).

    g = Σ λᵢ gᵢ / Σ λᵢ,   λ⁺ = the nearest point of the simplex to λ + lr·(F − F̄)

    The weights begin equal, and with equal losses they remain so: then g is the mean over clients. Fᵢ is the mean loss
    that client i reports for its training in the round, and F̄ their mean over the clients that arrived; the weights of
    other clients change by the projection only. Buffers have the same weights. It is no robust rule: a client that
    reports a large loss gets more weight.

    Args:
        lr: the step size of the weights, > 0, per unit of the loss.
    Raises:
        UsageError: lr is out of range; the plan refuses a secure sum, noise and asynchronous paces.
        RunError: a contribution has no loss.
    Example:
        >>> Agnostic(0.1)
        Agnostic(0.1)

    Reference: Mohri, Sivek, Suresh, Agnostic Federated Learning, 2019.
    """

    lr: float = bounded_number(above=0, example=0.1, why="the weights would never change.")
    by_client = True
    needs_population = True

    def __post_init__(self) -> None:
        check_fields(self)

    def server(self, layout: Layout) -> Tensors:
        """The weights of all clients; before the first round the length is 0."""
        return {"weights": torch.zeros(0, dtype=torch.float64)}

    def noted(self, contribution: Contribution) -> dict[str, Tensor]:
        """The mean loss of each client."""
        sums = contribution.sums
        if "loss" not in sums or "rows" not in sums:
            raise RunError(
                f"{self!r} and contributions without a loss.",
                "sums `loss` and `rows` of each client, as Train and Gradient report them.",
                "clients with a large loss get more weight.",
            )
        return {"loss": sums["loss"].double().reshape(-1) / sums["rows"].to(sums["loss"].device).reshape(-1)}

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        equal = torch.full((len(x),), 1.0 / len(x), dtype=torch.float64, device=x.device)
        known = facts.server.get("weights")
        if known is None or facts.client is None or not len(known):
            return equal
        own = known[facts.client.to(known.device)].to(x.device)
        return torch.where(own.sum() > 0, own / own.sum(), equal)

    def total(self, partial: PartialRows) -> Total:
        """The weighted sum, with the columns `loss` and `mixture`, the weight of each client, for the report."""
        total = super().total(partial)
        if not len(partial):
            return total
        client, loss = partial.matrix("client"), partial.matrix("noted/loss")
        weights = self.row_weights(loss[:, None], self._facts._replace(client=client))
        return total._replace(per_client={"id": client, "loss": loss, "mixture": weights})

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """The weights after a step towards the clients with a large loss."""
        if "loss" not in total.per_client:
            return server
        count, loss = info.population.clients, total.per_client["loss"]
        weights = server["weights"]
        if len(weights) != count:
            weights = torch.full((count,), 1.0 / count, dtype=torch.float64, device=loss.device)
        client = total.per_client["id"].to(weights.device)
        step = self.lr * (loss - loss.mean()).to(weights)
        return {"weights": onto_simplex(weights.index_add(0, client, step))}


def onto_simplex(x: Tensor) -> Tensor:
    """The point of {λ ≥ 0, Σ λ = 1} that is nearest to x, float64 `[C]`.

    Args:
        x: `[C]`.
    Example:
        >>> onto_simplex(torch.tensor([0.5, 0.9, -3.0]).double())
        tensor([0.3000, 0.7000, 0.0000], dtype=torch.float64)

    Reference: Duchi et al., Efficient Projections onto the l1-Ball for Learning in High Dimensions, 2008.
    """
    ordered = x.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(x) + 1, device=x.device)
    kept = int((ordered > excess).sum())
    return (x - excess[kept - 1]).clamp(min=0)
