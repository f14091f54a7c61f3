"""Corrections of local training for unequal clients: `Train(..., correction=…)`.

| correction | pull | server |
|---|---|---|
| `Proximal(mu)` | a = θ, μ | |
| `Scaffold()` | s = c − cᵢ | c += Σ w Δcᵢ / Σ_all w |
| `Dynamic(alpha)` | a = θ, μ = α, s = −gᵢ | θ also moves by −h/α |
| `Normalised()` | | the mean of uᵢ/\\|aᵢ\\|, times the mean of \\|aᵢ\\| |
| `Extrapolated(eps)` | | the mean update times a factor ≥ 1 |
| `MimeLite(beta)` | s = βm | m ← βm + Σ p ∇Fᵢ(θ) |
| `Fair(q)` | | Σ w F^q u, divided by its curvature |
| `Calibrated(tau)` | y₀ = θ with a shifted output bias | |
| `Ditto(lam)` | of a second training: y₀ = vᵢ, a = θ, μ = lam | |

uᵢ = y₀ − yᵢ is the update of client i, w its weight. `Proximal(mu) >> Normalised()` and `Calibrated(tau) >> other` are
chains.

Tests: tests/identities/test_corrections.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.base.names import under, without_prefix
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.bounded_rows import combined, combined_and_added, quotients
from atoll.compute.layout import Entry, Layout
from atoll.compute.loss import cross_entropy, name_of_loss
from atoll.compute.task import Task
from atoll.plan.protocols import (
    Broadcast,
    Conflict,
    Correction,
    Declared,
    Finished,
    Pull,
    RoundInfo,
    Slots,
    StepFacts,
    Tensors,
    Total,
)

_LEAST_LOSS = 1e-10  # a client without a loss has a finite weight
_WITHOUT_OWN = "Train(sgd(0.1), epochs=1, batch=10)"
_WITHOUT_DECAY = "Train(sgd(0.1), epochs=1, batch=10, correction=Calibrated(1.0))"
Logits = Literal["log", "quarter"]


class CorrectionBase(Correction):
    """The base of the corrections here. `a >> b` is a chain."""

    def __rshift__(self, other: Correction) -> Chained:
        mine = self.parts or (self,)
        return Chained((*mine, *(other.parts or (other,))))


@dataclass(frozen=True, repr=False)
class Proximal(CorrectionBase):
    """FedProx: each step is pulled back to the model of the round.

    y ← y − lr·(∇ℓ(y) + mu·(y − θ))

    Args:
        mu: weight of the term (mu/2)·|y − θ|², ≥ 0; 0 is federated averaging.
    Raises:
        UsageError: mu is out of range, or lr·mu ≥ 2 with plain SGD; the plan raises the latter.
    Example:
        >>> Proximal(0.01)
        Proximal(0.01)

    Reference: Li et al., Federated Optimization in Heterogeneous Networks, 2020.
    """

    mu: float = bounded_number(least=0, example=0.01, why="a negative weight drives the clients apart.")

    def __post_init__(self) -> None:
        check_fields(self)

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull(anchor=broadcast.model.theta, mu=self.mu)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        return _diverges(self, "mu", self.mu, slots)


@dataclass(frozen=True, repr=False)
class Scaffold(CorrectionBase):
    """SCAFFOLD: control variates remove the drift of clients with different minima.

    y ← y − lr·(∇ℓ(y) − cᵢ + c),   cᵢ⁺ = cᵢ − c + uᵢ/(lr·|a|),   c⁺ = c + Σ w (cᵢ⁺ − cᵢ) / Σ_all w

    c and all cᵢ start at 0. |a| is the number of steps; with momentum it is the sum of the weights of the gradients.

    Args:
        sends: `"control"` sends cᵢ⁺ − cᵢ in addition to the update. `"update"` sends the update and one number: the
            server derives Σ w (cᵢ⁺ − cᵢ) from Σ w uᵢ, if all clients make the same number of steps.
    Raises:
        UsageError: raised by the plan: an optimizer other than SGD, an asynchronous pace, a lossy codec without error
            feedback, or `sends="update"` with epochs, a partial pace or a lossy codec.
    Example:
        >>> Scaffold()
        Scaffold()

    Reference: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, 2020, option II.
    """

    sends: Literal["control", "update"] = "control"
    needs_population = True
    needs_weights = True

    def __post_init__(self) -> None:
        _check_word(self, "sends", ("control", "update"), "Scaffold()")

    @property
    def needs_equal_steps(self) -> bool:
        """Whether all clients must make the same number of steps."""
        return self.sends == "update"

    def memory(self, layout: Layout) -> Tensors:
        return {"control": torch.zeros(layout.d, dtype=layout.dtype)}

    def server(self, layout: Layout) -> Tensors:
        return self.memory(layout)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        layout = task.layout
        if self.sends == "update":
            return {"reach": Declared(1, layout.dtype, "mean")}
        return {"control": Declared(layout.d, layout.dtype, "mean")}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull(shift=broadcast.shared["correction"]["control"], offset=memory["control"])

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        reach = facts.lr * _column(self, facts, update)
        if not facts.lr:  # a schedule that has ended: no step was made, and no gradient is known
            means = {"reach": reach} if self.sends == "update" else {"control": torch.zeros_like(update)}
            return Finished(means, memory=dict(memory))
        control = broadcast.shared["correction"]["control"]
        change, after = combined_and_added(update, 1.0 / reach, -control, memory["control"])
        means = {"reach": reach} if self.sends == "update" else {"control": change}
        return Finished(means, memory={"control": after})

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        control = server["control"]
        if self.sends == "update" and "reach" in total.means:
            reach = total.means["reach"] / total.weight
            if not reach.any():
                return total, server
            change = total.means["update"] / reach - total.weight * control
        elif "control" in total.means:
            change = total.means["control"]
        else:
            return total, server
        return total, {"control": control + (change / info.total_weight).to(control)}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from _synchronous(self, slots, "a control variate belongs to the model version that it corrects.")
        if self.sends == "update" and not slots.codec.lossless:
            why = "the server derives the control variates from the sum of updates."
            yield Conflict(f"{self!r} with {slots.codec!r}.", "a codec without loss.", why, "Identity()")
        if self.sends == "update" and slots.pace.partial:
            why = "a client that stops early makes fewer steps."
            yield Conflict(f"{self!r} with {slots.pace!r}.", "Sync() without partial work.", why, "Sync()")
        yield from _exact(self, slots)
        if self.sends == "update":
            yield from _of_the_round(self, slots)


@dataclass(frozen=True, repr=False)
class Dynamic(CorrectionBase):
    """FedDyn: a dynamic regularizer whose minimum over all clients is the minimum of the sum of their losses.

    y ← y − lr·(∇ℓ(y) − gᵢ + alpha·(y − θ)),   gᵢ⁺ = gᵢ + alpha·uᵢ,   h⁺ = h + alpha·Σ w uᵢ / Σ_all w,
    θ⁺ = θ − Σ w uᵢ / Σ w − h⁺/alpha

    Args:
        alpha: weight of the regularizer, > 0.
    Raises:
        UsageError: alpha is out of range; lr·alpha ≥ 2 with plain SGD, an asynchronous pace, or a lossy codec without
            error feedback; the plan raises the latter three.
    Example:
        >>> Dynamic(0.1)
        Dynamic(0.1)

    Reference: Acar et al., Federated Learning Based on Dynamic Regularization, 2021.
    """

    alpha: float = bounded_number(above=0, example=0.1, why="the server divides by it.")
    needs_population = True

    def __post_init__(self) -> None:
        check_fields(self)

    def memory(self, layout: Layout) -> Tensors:
        return {"gradient": torch.zeros(layout.d, dtype=layout.dtype)}

    def server(self, layout: Layout) -> Tensors:
        return {"_h": torch.zeros(layout.d, dtype=layout.dtype)}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull(anchor=broadcast.model.theta, mu=self.alpha, offset=memory["gradient"])

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        factors = update.new_full((len(update), 1), self.alpha)
        return Finished(memory={"gradient": combined(update, factors, memory["gradient"])})

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if "update" not in total.means:
            return total, server
        h = server["_h"] + (self.alpha / info.total_weight * total.means["update"]).to(server["_h"])
        update = total.means["update"] + total.weight / self.alpha * h
        return total._replace(means={**total.means, "update": update}), {"_h": h}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from _diverges(self, "alpha", self.alpha, slots)
        yield from _synchronous(
            self, slots, "the gradient of a client belongs to the model version that it started from."
        )
        yield from _exact(self, slots)
        yield from _mean_of_arrived(self, slots)
        yield from _of_the_round(self, slots)


@dataclass(frozen=True, repr=False)
class Normalised(CorrectionBase):
    """FedNova: clients that make more steps get no more weight than their rows.

    θ⁺ = θ − τ·Σ pᵢ uᵢ/|aᵢ|,   τ = Σ pᵢ |aᵢ|,   pᵢ = wᵢ/Σ w

    |aᵢ| is the sum of the weights of the gradients in uᵢ/lr: the number of steps for plain SGD, more with momentum,
    less with `Proximal`.

    Raises:
        UsageError: raised by the plan: the optimizer of the clients is not SGD, or `sends="model"` with an asynchronous
            pace.
    Example:
        >>> Proximal(0.1) >> Normalised()
        Proximal(0.1) >> Normalised()

    Reference: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, 2020.
    """

    needs_weights = True

    def declare(self, task: Task) -> Mapping[str, Declared]:
        return {"reach": Declared(1, task.layout.dtype, "mean")}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull()

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        weights = _column(self, facts, update)
        return Finished({"update": quotients(update, weights), "reach": weights}, memory=memory)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if "reach" not in total.means:
            return total, server
        update = total.means["update"] * (total.means["reach"] / total.weight)
        return total._replace(means={**total.means, "update": update}), server

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from _of_the_round(self, slots)
        if slots.pace.asynchronous and slots.local.sends == "model":
            why = "the server adds the change of θ since the client's start, and it would be multiplied by τ."
            given = f"{self!r} with sends='model' and {slots.pace!r}."
            yield Conflict(given, "clients that send updates, or Sync().", why, "Sync()")


@dataclass(frozen=True, repr=False)
class Extrapolated(CorrectionBase):
    """FedExP: the server's step is longer if the updates of the clients differ.

    θ⁺ = θ − η·ū,   η = max(1, Σ pᵢ|uᵢ|² / (2(|ū|² + eps))),   ū = Σ pᵢ uᵢ

    The mean of the last two iterates is evaluated and exported. If all updates are equal, η = 1.

    Args:
        eps: added to |ū|², ≥ 0.
    Raises:
        UsageError: eps is out of range; or the plan has an asynchronous pace, a server optimizer other than `sgd(1.0)`,
            or an aggregator that does not divide by the weight that arrived.
    Example:
        >>> Extrapolated(0.001)
        Extrapolated()

    Reference: Jhunjhunwala, Wang, Joshi, FedExP: Speeding Up Federated Averaging via Extrapolation, 2023.
    """

    eps: float = bounded_number(1e-3, least=0, why="it keeps the divisor away from 0.")

    def __post_init__(self) -> None:
        check_fields(self)

    def server(self, layout: Layout) -> Tensors:
        return {"_step": torch.zeros(layout.d, dtype=layout.dtype)}

    def declare(self, task: Task) -> Mapping[str, Declared]:
        return {"squares": Declared(1, task.layout.dtype, "mean")}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull()

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        return Finished({"squares": torch.linalg.vector_norm(update, dim=1, keepdim=True).square()}, memory=memory)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if "squares" not in total.means:
            return total, {"_step": torch.zeros_like(server["_step"])}
        mean = total.means["update"] / total.weight
        eta = total.means["squares"] / total.weight / (2 * (mean.square().sum() + self.eps))
        eta = eta.nan_to_num(nan=1.0).clamp(min=1.0)  # 0/0: all updates are 0
        update = total.means["update"] * eta
        return total._replace(means={**total.means, "update": update}), {"_step": (mean * eta).to(server["_step"])}

    def evaluated(self, theta: Tensor, server: Tensors) -> Tensor:
        return torch.add(theta, server["_step"], alpha=0.5)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from _synchronous(self, slots, "the length of the step is that of the updates of one round.")
        rule = slots.optimizer.step_rule(1.0)
        if rule is None or not rule.plain or slots.optimizer.lr != 1.0:
            why = "the correction sets the length of the server's step."
            yield Conflict(f"{self!r} with the server optimizer {slots.optimizer!r}.", "sgd(1.0).", why, "sgd(1.0)")
        yield from _mean_of_arrived(self, slots)
        yield from _of_the_round(self, slots)


@dataclass(frozen=True, repr=False)
class Calibrated(CorrectionBase):
    """Calibrated logits: a client trains with logits that are shifted by its class counts.

    z_c + tau·log n_c  (balanced softmax, `form="log"`)  or  z_c − tau·n_c^(−1/4)  (FedLC, `form="quarter"`)

    n_c is the number of rows of class c at the client, at least half a row. The shift is added to the start of the
    output bias and is no part of the update, so no backend does more work. Anchor and weight decay shift with it.

    Args:
        tau: strength of the shift, ≥ 0; 0 is federated averaging.
        form: `"log"` or `"quarter"`.
    Raises:
        UsageError: tau is out of range, or the last parameter of the model is no bias with one number for each class.
    Example:
        >>> Calibrated(1.0)
        Calibrated(1.0)

    Reference: Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, 2020; Zhang et al., Federated
        Learning with Label Distribution Skew via Logits Calibration, 2022.
    """

    tau: float = bounded_number(least=0, example=1.0, why="a negative strength favours the classes that a client has.")
    form: Logits = "log"
    reads_classes = True

    def __post_init__(self) -> None:
        check_fields(self)
        _check_word(self, "form", ("log", "quarter"), "Calibrated(1.0)")

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares nothing.

        Raises:
            UsageError: the loss is not the cross-entropy, or the output layer of the module is not known.
        """
        _check_output(self, task)
        return {}

    def conflicts(self, slots: Slots) -> Iterator[Conflict]:
        if slots.local.own:
            why = "the shift belongs to the output layer, which may be a part of the own part."
            yield Conflict(f"{self!r} with own={slots.local.own!r}.", "one of the two.", why, _WITHOUT_OWN)
        optimizer = slots.local.optimizer
        decays = optimizer is not None and "weight_decay=" in repr(optimizer)
        if optimizer is not None and decays and optimizer.step_rule(1.0) is None:
            why = "the weight decay of this optimizer would pull the shift of the logits to 0."
            yield Conflict(f"{self!r} with {optimizer!r}.", "no weight decay, or sgd.", why, _WITHOUT_DECAY)

    def server(self, layout: Layout) -> Tensors:
        return {"classes": torch.tensor(_output_bias(self, layout).shape[0])}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        theta = broadcast.model.theta
        if not self.tau:
            return Pull()
        counts = facts.classes(int(broadcast.shared["correction"]["classes"])).to(theta).clamp(min=0.5)
        shares = counts / counts.sum(1, keepdim=True)  # softmax does not change if a constant is added to all logits
        logits = shares.log() if self.form == "log" else -_power(counts, -0.25)
        shift = theta.new_zeros(len(counts), theta.shape[-1])
        shift[:, -counts.shape[1] :] = self.tau * logits
        return Pull(start=theta + shift, shift=shift * -facts.decay if facts.decay else None)


@dataclass(frozen=True, repr=False)
class Ditto(CorrectionBase):
    """Ditto: each client also trains a model of its own, which is pulled to the model of the round.

    v ← v − lr·(∇ℓ(v) + lam·(v − θ)),  from the v of the client's last round

    The update is that of federated averaging. v stays at the client, and begins with θ of its first round.

    Args:
        lam: weight of the term (lam/2)·|v − θ|², ≥ 0; 0 is training of each client by itself.
    Raises:
        UsageError: lam is out of range, or lr·lam ≥ 2 with plain SGD; the plan raises the latter.
    Example:
        >>> Ditto(0.1)
        Ditto(0.1)

    Reference: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, 2021.
    """

    lam: float = bounded_number(least=0, example=0.1, why="a negative weight drives v away from θ.")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def personal_mu(self) -> float | None:
        return self.lam

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull()

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        return _diverges(self, "lam", self.lam, slots)


@dataclass(frozen=True, repr=False)
class Fair(CorrectionBase):
    """q-FedAvg: clients with a large loss have more weight, so that the losses of clients differ less.

    θ⁺ = θ − Σ wᵢ Fᵢ^q uᵢ / Σ wᵢ (Fᵢ^q + q Fᵢ^(q−1) |uᵢ|²/lr),   Fᵢ = the mean loss of client i at θ, at least 1e-10

    The divisor bounds the curvature of Σ wᵢ Fᵢ^(q+1)/(q+1), so no learning rate is tuned for q. The loss takes a pass
    over the rows of the client, without gradients.

    Args:
        q: the weight of fairness, ≥ 0; 0 is federated averaging.
    Raises:
        UsageError: q is out of range; or the plan has an asynchronous pace, or an aggregator that does not divide by
            the weight that arrived.
    Example:
        >>> Fair(1.0)
        Fair(1.0)

    Reference: Li, Sanjabi, Beirami, Smith, Fair Resource Allocation in Federated Learning, 2020, Algorithm 2.
    """

    q: float = bounded_number(least=0, example=1.0, why="a negative weight favours clients with a small loss.")
    needs_loss = True

    def __post_init__(self) -> None:
        check_fields(self)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        return {"curvature": Declared(1, task.layout.dtype, "mean")}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull()

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        loss = _given(self, "loss", facts.loss).to(update)[:, None].clamp(min=_LEAST_LOSS)
        squares = torch.linalg.vector_norm(update, dim=1, keepdim=True).square()
        bend = (
            self.q * _power(loss, self.q - 1) * squares / facts.lr if facts.lr and self.q else torch.zeros_like(squares)
        )
        weight = _power(loss, self.q)
        return Finished({"update": weight * update, "curvature": weight + bend}, memory=memory)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if "curvature" not in total.means:
            return total, server
        update = total.means["update"] * (total.weight / total.means["curvature"])
        return total._replace(means={**total.means, "update": update}), server

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from _synchronous(self, slots, "the divisor is that of the updates of one round.")
        yield from _mean_of_arrived(self, slots)
        yield from _of_the_round(self, slots)


@dataclass(frozen=True, repr=False)
class MimeLite(CorrectionBase):
    """MimeLite: clients use the momentum of the server in each step, and do not change it.

    y ← y − lr·(∇ℓ(y) + beta·m),   m⁺ = beta·m + Σ wᵢ ∇Fᵢ(θ) / Σ wᵢ

    m starts at 0. ∇Fᵢ(θ) is the gradient over all rows of client i, with its weight decay, and takes a pass over them;
    it is sent in addition to the update. With one step over all rows this is gradient descent with momentum. In the
    paper the gradients have the factor 1 − beta, so its learning rate is lr/(1 − beta).

    Args:
        beta: the momentum, in [0, 1); 0 is federated averaging.
    Raises:
        UsageError: beta is out of range; or the plan has an own part, clients with an optimizer other than SGD without
            momentum, or an asynchronous pace.
    Example:
        >>> MimeLite(0.9)
        MimeLite()

    Reference: Karimireddy et al., Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning, 2020.
    """

    beta: float = bounded_number(0.9, least=0, below=1, why="the momentum would grow without bound.")
    needs_gradient = True

    def __post_init__(self) -> None:
        check_fields(self)

    def server(self, layout: Layout) -> Tensors:
        return {"momentum": torch.zeros(layout.d, dtype=layout.dtype)}

    def declare(self, task: Task) -> Mapping[str, Declared]:
        return {"gradient": Declared(task.layout.d, task.layout.dtype, "mean")}

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        return Pull(shift=broadcast.shared["correction"]["momentum"] * self.beta if self.beta else None)

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        gradient = _given(self, "gradient", facts.gradient)
        return Finished({"gradient": torch.add(gradient, broadcast.model.theta, alpha=facts.decay)}, memory=memory)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if "gradient" not in total.means:
            return total, server
        mean, momentum = total.means["gradient"] / total.weight, server["momentum"]
        return total, {"momentum": (self.beta * momentum + mean).to(momentum)}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from _synchronous(self, slots, "the momentum is that of the model from which the clients start.")
        yield from _of_the_round(self, slots)
        if slots.local.own:
            why = "the momentum belongs to the shared part only."
            yield Conflict(f"{self!r} with own={slots.local.own!r}.", "one of the two.", why, _WITHOUT_OWN)
        rule = None if slots.local.optimizer is None else slots.local.optimizer.step_rule(1.0)
        if rule is None or rule.momentum:
            why = "the momentum of the server would be added to that of the clients."
            yield Conflict(f"{self!r} with {slots.local.optimizer!r}.", "sgd without momentum.", why, "sgd(0.1)")


@dataclass(frozen=True, repr=False)
class Chained(CorrectionBase):
    """Several corrections, one after another: `Proximal(mu) >> Normalised()` or `Calibrated(tau) >> other`.

    Args:
        chain: the corrections in the order in which they run.
    Raises:
        UsageError: another chain.
    """

    chain: tuple[Correction, ...]

    def __post_init__(self) -> None:
        rest = self.chain[1:] if isinstance(self.chain[0], Calibrated) else self.chain
        known = all(isinstance(part, CorrectionBase) and part.personal_mu is None for part in self.chain)
        pair = len(rest) == 2 and isinstance(rest[0], Proximal) and isinstance(rest[1], Normalised)
        if not known or not (pair or (len(rest) == 1 and not isinstance(rest[0], Calibrated))):
            raise UsageError(
                f"{self!r}.",
                "Proximal(mu) >> Normalised(), or Calibrated(tau) before another correction.",
                "other corrections change the same update in ways that exclude each other.",
                "Proximal(0.1) >> Normalised()",
            )

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.chain))

    @property
    def parts(self) -> tuple[Correction, ...]:
        return self.chain

    @property
    def needs_population(self) -> bool:
        return any(part.needs_population for part in self.chain)

    @property
    def needs_weights(self) -> bool:
        return any(part.needs_weights for part in self.chain)

    @property
    def needs_loss(self) -> bool:
        return any(part.needs_loss for part in self.chain)

    @property
    def needs_gradient(self) -> bool:
        return any(part.needs_gradient for part in self.chain)

    @property
    def needs_equal_steps(self) -> bool:
        return any(part.needs_equal_steps for part in self.chain)

    @property
    def reads_classes(self) -> bool:
        return any(part.reads_classes for part in self.chain)

    def _own(self, tensors: Tensors) -> Iterator[tuple[Correction, str, dict[str, Tensor]]]:
        for i, part in enumerate(self.chain):
            yield part, f"{i}.", without_prefix(tensors, f"{i}.")

    def memory(self, layout: Layout) -> Tensors:
        return {n: t for part, at, _ in self._own({}) for n, t in under(at, part.memory(layout)).items()}

    def server(self, layout: Layout) -> Tensors:
        return {n: t for part, at, _ in self._own({}) for n, t in under(at, part.server(layout)).items()}

    def declare(self, task: Task) -> Mapping[str, Declared]:
        return {n: d for part in self.chain for n, d in part.declare(task).items()}

    def evaluated(self, theta: Tensor, server: Tensors) -> Tensor:
        for part, _, own in self._own(server):
            theta = part.evaluated(theta, own)
        return theta

    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        theta, whole = broadcast.model.theta, Pull()
        for (part, _, own), shared in zip(self._own(memory), self._shared(broadcast), strict=True):
            one = part.pull(shared, own, facts)
            anchor = one.anchor
            if anchor is not None and whole.start is not None:
                anchor = anchor + (whole.start - theta)  # the anchor shifts with the start
            shift = whole.shift if one.shift is None else one.shift if whole.shift is None else whole.shift + one.shift
            start = whole.start if one.start is None else one.start
            offset = whole.offset if one.offset is None else one.offset  # at most one part of a chain has one
            whole = Pull(start, whole.anchor if anchor is None else anchor, shift, whole.mu + one.mu, offset)
        return whole

    def _shared(self, broadcast: Broadcast) -> Iterator[Broadcast]:
        for _, _, own in self._own(broadcast.shared["correction"]):
            yield broadcast._replace(shared={**broadcast.shared, "correction": own})

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        means, sums = dict[str, Tensor](), dict[str, Tensor]()
        per_client, after = dict[str, Tensor](), dict[str, Tensor]()
        for (part, at, own), shared in zip(self._own(memory), self._shared(broadcast), strict=True):
            one = part.finish(shared, own, means.get("update", update), facts)
            means, sums, per_client = {**means, **one.means}, {**sums, **one.sums}, {**per_client, **one.per_client}
            after |= under(at, one.memory)
        return Finished(means, sums, per_client, after)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        after: dict[str, Tensor] = {}
        for part, at, own in self._own(server):
            total, now = part.server_update(total, own, info, key)
            after |= under(at, now)
        return total, after

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        for part in self.chain:
            yield from part.conflicts(slots)


CORRECTIONS = (Proximal, Scaffold, Dynamic, Normalised, Extrapolated, Calibrated, Ditto, Fair, MimeLite)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent of positive numbers. `torch.pow` rounds by the position of a number, so by the chunk of a client."""
    return (x.double().log() * exponent).exp().to(x)


def _column(part: Correction, facts: StepFacts, update: Tensor) -> Tensor:
    """|a| of each client, `[K, 1]`, in the dtype of the update."""
    return _given(part, "weights", facts.weights).to(update)[:, None]


def _given(part: Correction, name: str, fact: Tensor | None) -> Tensor:
    """A fact that the part needs. A local part that leaves it out would train another algorithm without an error."""
    if fact is None:
        raise UsageError(
            f"{part!r}.finish without facts.{name}.",
            f"StepFacts(..., {name}=…) from the local part.",
            f"{part!r} states `needs_{name}`, and Train gives it.",
            Line(python=f"Train(sgd(0.1), steps=10, batch=10, correction={part!r})"),
        )
    return fact


def _check_word(part: Any, name: str, words: tuple[str, ...], line: str) -> None:
    value = vars(part)[name]
    if value not in words:
        kind = type(part).__name__
        raise UsageError(f"{kind}({name}={value!r}).", f"{words[0]!r} or {words[1]!r}.", "", line)


def _check_output(part: Calibrated, task: Task) -> None:
    """Refuse a model whose output is not known to be its last layer, and another loss than the cross-entropy."""
    layers: list[nn.Module] = [task.module]
    while layers and isinstance(layers[-1], nn.Sequential):
        layers = list(layers[-1].children())
    known = bool(layers) and isinstance(layers[-1], (nn.Linear, nn.LazyLinear)) and layers[-1].bias is not None
    if known and isinstance(task.loss, cross_entropy):
        return
    output = type((layers or [task.module])[-1]).__name__
    raise UsageError(
        f"{part!r} with the loss {name_of_loss(task.loss)} and an output of {output}.",
        "cross_entropy, and an nn.Sequential that ends with an nn.Linear with a bias.",
        "the logits are shifted by a shift of this bias, and only then it is known to be the bias of the output.",
        Line(python="nn.Sequential(body, nn.Linear(64, 10))"),
    )


def _output_bias(part: Calibrated, layout: Layout) -> Entry:
    """The bias of the output layer: the last parameter of the model."""
    last = layout.segment("params")[-1]
    if last.name.rpartition(".")[2] == "bias" and len(last.shape) == 1 and last.shape[0] > 1:
        return last
    raise UsageError(
        f"{part!r} with a model whose last parameter is {last.name} of shape {tuple(last.shape)}.",
        "an output layer with a bias that has one number for each class, as the last layer of the model.",
        "the logits are shifted by a shift of this bias.",
        Line(python="nn.Linear(64, 10, bias=True)"),
    )


def _diverges(part: Correction, name: str, mu: float, slots: Slots) -> Iterator[Conflict]:
    """lr·μ ≥ 2 with plain SGD: the pull alone diverges."""
    if slots.local.optimizer is None:
        return
    schedule = slots.local.optimizer.schedule
    lr = schedule(0, schedule.init())
    rule = slots.local.optimizer.step_rule(lr)
    if rule is not None and rule.plain and lr * mu >= 2:
        why = "each step overshoots the anchor by more than its distance, so the clients diverge."
        largest = float(f"{1.9 / lr:.2g}")
        yield Conflict(
            f"{part!r} with {slots.local.optimizer!r}: lr·{name} = {lr * mu:.3g}.",
            f"lr·{name} < 2, so {name} < {2 / lr:.3g}.",
            why,
            f"{type(part).__name__}({largest!r})",
        )


def _synchronous(part: Correction, slots: Slots, why: str) -> Iterator[Conflict]:
    if slots.pace.asynchronous:
        yield Conflict(f"{part!r} with {slots.pace!r}.", "a pace without late updates.", why, "Sync()")


def _exact(part: Correction, slots: Slots) -> Iterator[Conflict]:
    """Client state that the server mirrors needs every update, if only later."""
    codec = slots.codec
    if not codec.lossless and not codec.corrects_error:
        required = "a codec without loss, or with error feedback."
        why = "the server's copy of the clients' state would drift away by the error of each message."
        yield Conflict(f"{part!r} with {codec!r}.", required, why, "Identity()")


def _of_the_round(part: Correction, slots: Slots) -> Iterator[Conflict]:
    """The server divides sums over the clients that arrived by their weight."""
    if slots.codec.averages_all_clients:
        why = "the codec adds the last updates of all clients, and the correction weighs those of this round."
        yield Conflict(f"{part!r} with {slots.codec!r}.", "a codec whose server keeps no updates.", why, "Identity()")


def _mean_of_arrived(part: Correction, slots: Slots) -> Iterator[Conflict]:
    if slots.aggregator.forms_sum or slots.aggregator.over != "arrived":
        why = "the server's step is made of the mean over the clients that arrived."
        yield Conflict(f"{part!r} with {slots.aggregator!r}.", "Mean().", why, "Mean()")
