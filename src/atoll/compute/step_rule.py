"""The rule of a local step: gradient descent with momentum, weight decay and an affine pull, in every backend.

    g ← ∇ℓ(y) + λy + μ(y − a) + s − o ;  v ← βv + g ;  y ← y − lr·v,  with Nesterov's momentum y ← y − lr·(g + βv)

The backends compute κy + c with κ = λ + μ and c = s − o − μa, so an anchor and a shift together cost as much as one.

Tests: tests/identities/test_pull.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atoll.compute.buffer_pool import empty


class StepRule(NamedTuple):
    """The rule of the steps of K clients in one round.

    Args:
        lr: learning rate.
        momentum: β, in [0, 1). The velocity v starts at 0.
        nesterov: whether the momentum is Nesterov's.
        decay: λ, the weight decay, ≥ 0.
        mu: μ, the strength of the pull towards the anchor, ≥ 0.
        anchor: a, `[d]` for all clients or `[K, d]`; None: 0.
        shift: s, `[d]` for all clients or `[K, d]`; None: 0.
        offset: o, as s. It is apart from s so that a backend can read the vectors of clients where they are.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    decay: float = 0.0
    mu: float = 0.0
    anchor: Tensor | None = None
    shift: Tensor | None = None
    offset: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a step is y − lr·∇ℓ(y)."""
        return not self.momentum and not self.kappa and self.shift is None and self.offset is None

    @property
    def kappa(self) -> float:
        """κ = λ + μ, the factor of y."""
        return self.decay + self.mu

    def shifted(self) -> Tensor | None:
        """s − o, `[d]` or `[K, d]`; None if it is 0."""
        shift, offset = self.shift, self.offset
        if offset is None:
            return shift
        if shift is None:
            return torch.neg(offset, out=empty(offset, offset.shape))
        return torch.sub(shift, offset, out=empty(offset, torch.broadcast_shapes(shift.shape, offset.shape)))

    def constant(self) -> Tensor | None:
        """c = s − o − μa, `[d]` or `[K, d]`; None if it is 0."""
        if not self.mu or self.anchor is None:
            return self.shifted()
        if self.shift is None and self.offset is not None:  # one pass fewer
            out = empty(self.offset, torch.broadcast_shapes(self.offset.shape, self.anchor.shape))
            return torch.add(self.offset, self.anchor, alpha=self.mu, out=out).neg_()
        shift = self.shifted()
        if shift is None:
            return self.anchor * -self.mu
        out = empty(shift, torch.broadcast_shapes(shift.shape, self.anchor.shape))
        return torch.sub(shift, self.anchor, alpha=self.mu, out=out)

    def joined(self) -> StepRule:
        """The same rule with c as its only tensor, which is computed once for all steps."""
        if self.offset is None and (not self.mu or self.anchor is None):
            return self
        return self._replace(anchor=None, shift=self.constant(), offset=None)

    def pulled(self, g: Tensor, y: Tensor) -> Tensor:
        """The gradient of the first k clients with the pull, g + μ(y − a) + s − o, without weight decay.

        Args:
            g: the gradients `[k, d]`; they do not change.
            y: the models `[k, d]`.
        """
        constant = self.constant()
        if constant is not None and constant.dim() == 2:
            constant = constant[: len(g)]
        if not self.mu:
            return g if constant is None else g + constant
        pulled = torch.add(g, y, alpha=self.mu)
        return pulled if constant is None else pulled.add_(constant)

    def gradient_weights(self, steps: int) -> list[float]:
        """|a| after 0, 1, …, `steps` steps: y₀ − y_K = lr·Σ aₜ∇ℓ(yₜ) + …, and |a| = Σ aₜ.

        It is K for plain steps. A pull to the start reduces it, momentum increases it. Weight decay belongs to the
        gradient and does not change it.
        """
        weights, distance, velocity = [0.0], 0.0, 0.0
        for _ in range(steps):
            g = 1.0 - self.mu * self.lr * distance
            velocity = self.momentum * velocity + g
            distance += g + self.momentum * velocity if self.nesterov else velocity
            weights.append(distance)
        return weights
