"""Optimizers: rules that move θ along an update. The update points uphill; every optimizer descends.

One object works on one θ `[d]` and on lanes `[K, d]`. The rules are the elementwise ones of `torch.optim`, whose own
code runs on views of the tensors here, and the three rules of Adaptive Federated Optimization. A plan contains the
values below; `OptimizerBase` defines their methods.

Tests: tests/identities/test_optimizer.py, tests/rates/test_rates.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.validation import bounded_number, repaired
from atoll.compute.step_rule import StepRule
from atoll.plan.optimizer.base import STEP, Counters, Inner, LaneGroup, OptimizerBase
from atoll.plan.schedule import Schedule


def _rate(example: float = 0.1) -> Any:
    return bounded_number(
        above=0,
        also=Schedule,
        example=example,
        why="a learning rate of 0 makes no step, and a negative one increases the loss.",
    )


def _betas() -> Any:
    return bounded_number((0.9, 0.999), least=0, below=1, size=2, why="with a factor of 1 the average never changes.")


def _average(default: float) -> Any:
    return bounded_number(default, least=0, below=1, why="with a factor of 1 the average never changes.")


def _eps(default: float) -> Any:
    return bounded_number(default, above=0, why="a coordinate whose update is 0 would be divided by 0.")


def _decay(default: float = 0.0) -> Any:
    return bounded_number(default, least=0, why="a negative decay makes the parameters grow.")


def _initial() -> Any:
    return bounded_number(0.0, least=0, why="it is a sum of squares.")


@dataclass(frozen=True, repr=False)
class sgd(OptimizerBase):
    """Gradient descent with optional momentum and weight decay: `torch.optim.SGD`.

    g ← g + weight_decay·θ ;  b ← momentum·b + (1 − dampening)·g, but b = g in the first step
    θ ← θ − lr·g without momentum, θ − lr·b with it, θ − lr·(g + momentum·b) with Nesterov's

    Args:
        lr: learning rate, > 0, or a schedule.
        momentum: the factor of the accumulated gradient, 0 ≤ momentum < 1.
        nesterov: whether to use Nesterov's momentum, which needs momentum > 0 and dampening = 0.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
        dampening: reduces the factor of the new gradient in the momentum, 0 ≤ dampening < 1.
    Raises:
        UsageError: a number is out of range; Nesterov's momentum without momentum or with dampening; or dampening
            without momentum.
    Example:
        >>> sgd(0.1, momentum=0.9, nesterov=True)
        sgd(0.1, momentum=0.9, nesterov=True)

    Reference: Robbins, Monro, A Stochastic Approximation Method, 1951; Sutskever et al., On the Importance of
        Initialization and Momentum in Deep Learning, 2013.
    """

    lr: float | Schedule = _rate()
    momentum: float = bounded_number(0.0, least=0, below=1, why="with a momentum of 1 or more the steps do not decay.")
    nesterov: bool = False
    weight_decay: float = _decay()
    dampening: float = _average(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise UsageError(
                repr(self),
                "momentum > 0 and dampening = 0 with nesterov=True.",
                "Nesterov's step continues along the undamped momentum, so there must be one.",
                repaired(self, momentum=self.momentum or 0.9, dampening=0.0),
            )
        if self.dampening and not self.momentum:
            raise UsageError(
                repr(self),
                "momentum > 0 with dampening.",
                "dampening scales the gradient that is added to the momentum.",
                repaired(self, dampening=0.0),
            )

    def per_coordinate(self) -> Mapping[str, float]:
        return {"momentum_buffer": 0.0} if self.momentum else {}

    def per_lane(self) -> Counters:
        return STEP if self.momentum else {}

    def step_rule(self, lr: float) -> StepRule | None:
        return None if self.dampening else StepRule(lr, self.momentum, self.nesterov, self.weight_decay)

    def in_place(self) -> bool:
        return not (self.weight_decay or self.nesterov)

    # Not by `torch.optim.SGD`: most local loops use SGD, and torch's bookkeeping would cost more than the step.
    def apply(self, block: LaneGroup, g: Tensor, lr: float) -> None:
        if self.weight_decay:
            g = g.add(block.theta, alpha=self.weight_decay)
        if self.momentum:
            buffer = block.slots["momentum_buffer"]
            if block.count == 0:
                buffer.copy_(g)
            else:
                buffer.mul_(self.momentum).add_(g, alpha=1 - self.dampening)
            g = g.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        block.theta.add_(g, alpha=-lr)


def _adaptive(
    block: LaneGroup, g: Tensor, lr: float, beta: float, eps: float, square: Callable[[Tensor, Tensor], Any]
) -> None:
    """m ← βm + (1 − β)g ; v ← square(v, g) ; θ ← θ − lr·m / (√v + τ): Reddi et al., Algorithm 2."""
    m, v = block.slots["exp_avg"], block.slots["exp_avg_sq"]
    m.mul_(beta).add_(g, alpha=1 - beta)
    square(v, g)
    block.theta.addcdiv_(m, v.sqrt().add_(eps), value=-lr)


@dataclass(frozen=True, repr=False)
class adam(OptimizerBase):
    """Adam: steps of size about lr in every coordinate. `torch.optim.Adam`, or FedAdam with `correct=False`.

    g ← g + weight_decay·θ ;  m ← β₁m + (1 − β₁)g ;  v ← β₂v + (1 − β₂)g²
    θ ← θ − lr·m̂ / (√v̂ + eps),  m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ);  with `correct=False` m̂ = m, v̂ = v

    Args:
        lr: learning rate, > 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        eps: a small number in the divisor, > 0; with `correct=False` it is τ of the paper, the degree of adaptivity.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
        correct: whether to correct the bias of the averages, which start at 0.
        initial: v before the first step, ≥ 0; only with `correct=False`. The bounds of the paper assume eps².
    Raises:
        UsageError: a number is out of range, or `initial` with `correct=True`.
    Example:
        >>> adam(0.01, eps=1e-3, correct=False)
        adam(0.01, eps=0.001, correct=False)

    Reference: Kingma, Ba, Adam, 2015; Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """

    lr: float | Schedule = _rate(0.01)
    betas: tuple[float, float] = _betas()
    eps: float = _eps(1e-8)
    weight_decay: float = _decay()
    correct: bool = True
    initial: float = _initial()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correct and self.initial:
            raise UsageError(
                repr(self),
                "initial = 0 with correct=True.",
                "the bias correction is right only for averages that start at 0.",
                repaired(self, correct=False),
            )

    def per_coordinate(self) -> Mapping[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": self.initial}

    def per_lane(self) -> Counters:
        return STEP if self.correct else {}

    def inner(self) -> Inner | None:
        words = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return (torch.optim.Adam, words) if self.correct else None

    def apply(self, block: LaneGroup, g: Tensor, lr: float) -> None:
        if self.weight_decay:
            g = g.add(block.theta, alpha=self.weight_decay)
        beta1, beta2 = self.betas
        _adaptive(block, g, lr, beta1, self.eps, lambda v, g: v.mul_(beta2).addcmul_(g, g, value=1 - beta2))


@dataclass(frozen=True, repr=False)
class adamw(OptimizerBase):
    """Adam with decoupled weight decay: `torch.optim.AdamW`.

    θ ← (1 − lr·weight_decay)·θ, then the step of Adam on g

    Args:
        lr: learning rate, > 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        eps: a small number in the divisor, > 0.
        weight_decay: the factor of lr·θ that is subtracted from θ in each step, ≥ 0.
    Example:
        >>> adamw(1e-3)
        adamw(0.001)

    Reference: Loshchilov, Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    lr: float | Schedule = _rate(0.01)
    betas: tuple[float, float] = _betas()
    eps: float = _eps(1e-8)
    weight_decay: float = _decay(0.01)

    _torch = torch.optim.AdamW
    _zeros = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, repr=False)
class adagrad(OptimizerBase):
    """Adagrad: steps shrink as squared gradients add up. `torch.optim.Adagrad`, or FedAdagrad with `beta` > 0.

    g ← g + weight_decay·θ ;  v ← v + g² ;  m ← beta·m + (1 − beta)·g ;  θ ← θ − lr·m / (√v + eps)

    Args:
        lr: learning rate, > 0, or a schedule.
        eps: a small number in the divisor, > 0; with `beta` it is τ of the paper.
        beta: momentum, 0 ≤ beta < 1.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
        initial: v before the first step, ≥ 0.
    Example:
        >>> adagrad(0.1, beta=0.9)
        adagrad(0.1, beta=0.9)

    Reference: Duchi, Hazan, Singer, Adaptive Subgradient Methods, 2011; Reddi et al., Adaptive Federated Optimization,
        2021, Algorithm 2.
    """

    lr: float | Schedule = _rate()
    eps: float = _eps(1e-10)
    beta: float = _average(0.0)
    weight_decay: float = _decay()
    initial: float = _initial()

    def per_coordinate(self) -> Mapping[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": self.initial} if self.beta else {"sum": self.initial}

    def per_lane(self) -> Counters:
        return {} if self.beta else STEP

    def inner(self) -> Inner | None:
        return None if self.beta else (torch.optim.Adagrad, {"eps": self.eps, "weight_decay": self.weight_decay})

    def apply(self, block: LaneGroup, g: Tensor, lr: float) -> None:
        if self.weight_decay:
            g = g.add(block.theta, alpha=self.weight_decay)
        _adaptive(block, g, lr, self.beta, self.eps, lambda v, g: v.addcmul_(g, g))


@dataclass(frozen=True, repr=False)
class yogi(OptimizerBase):
    """Yogi: Adam whose v changes by a bounded amount, so one large update has a lasting effect. torch has no Yogi.

    g ← g + weight_decay·θ ;  m ← β₁m + (1 − β₁)g ;  v ← v − (1 − β₂)·g²·sign(v − g²)
    θ ← θ − lr·m / (√v + eps)

    As long as v < g² in every coordinate, yogi(lr, eps=τ) is adagrad(lr/√(1 − β₂), eps=τ/√(1 − β₂), beta=β₁).

    Args:
        lr: learning rate, > 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        eps: τ of the paper, > 0.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
        initial: v before the first step, ≥ 0. The bounds of the paper assume eps².
    Example:
        >>> yogi(0.01, betas=(0.9, 0.99))
        yogi(0.01, betas=(0.9, 0.99))

    Reference: Zaheer et al., Adaptive Methods for Nonconvex Optimization, 2018; Reddi et al., Adaptive Federated
        Optimization, 2021, Algorithm 2.
    """

    lr: float | Schedule = _rate(0.01)
    betas: tuple[float, float] = _betas()
    eps: float = _eps(1e-3)
    weight_decay: float = _decay()
    initial: float = _initial()

    def per_coordinate(self) -> Mapping[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": self.initial}

    def apply(self, block: LaneGroup, g: Tensor, lr: float) -> None:
        if self.weight_decay:
            g = g.add(block.theta, alpha=self.weight_decay)
        beta1, beta2 = self.betas

        def square(v: Tensor, g: Tensor) -> None:
            squares = g.square()
            v.addcmul_(squares, v.sub(squares).sign_(), value=beta2 - 1)

        _adaptive(block, g, lr, beta1, self.eps, square)


@dataclass(frozen=True, repr=False)
class rmsprop(OptimizerBase):
    """RMSprop: the gradient divided by the root of its recent mean square. `torch.optim.RMSprop`.

    g ← g + weight_decay·θ ;  v ← alpha·v + (1 − alpha)·g² ;  s = √v + eps, or √(v − ḡ²) + eps when centered
    θ ← θ − lr·g/s, or with momentum  b ← momentum·b + g/s ;  θ ← θ − lr·b

    Args:
        lr: learning rate, > 0, or a schedule.
        alpha: the factor of the running mean of g², 0 ≤ alpha < 1.
        eps: a small number in the divisor, > 0.
        momentum: the factor of the accumulated steps, 0 ≤ momentum < 1.
        centered: divide by the standard deviation; ḡ ← alpha·ḡ + (1 − alpha)·g.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
    Example:
        >>> rmsprop(0.01, momentum=0.9)
        rmsprop(0.01, momentum=0.9)

    Reference: Tieleman, Hinton, Neural Networks for Machine Learning, Lecture 6.5, 2012.
    """

    lr: float | Schedule = _rate(0.01)
    alpha: float = _average(0.99)
    eps: float = _eps(1e-8)
    momentum: float = bounded_number(0.0, least=0, below=1, why="with a momentum of 1 or more the steps do not decay.")
    centered: bool = False
    weight_decay: float = _decay()

    _torch = torch.optim.RMSprop

    def per_coordinate(self) -> Mapping[str, float]:
        names = ["square_avg", *["momentum_buffer"] * (self.momentum > 0), *["grad_avg"] * self.centered]
        return dict.fromkeys(names, 0.0)


@dataclass(frozen=True, repr=False)
class adadelta(OptimizerBase):
    """Adadelta: steps in the units of θ. `torch.optim.Adadelta`.

    g ← g + weight_decay·θ ;  v ← rho·v + (1 − rho)·g² ;  δ = g·√(u + eps)/√(v + eps)
    u ← rho·u + (1 − rho)·δ² ;  θ ← θ − lr·δ

    Args:
        lr: factor of the step, > 0, or a schedule; the paper uses 1.
        rho: the factor of both running means, 0 ≤ rho < 1.
        eps: a small number in the divisor, > 0.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
    Example:
        >>> adadelta(1)
        adadelta(1.0)

    Reference: Zeiler, ADADELTA, 2012.
    """

    lr: float | Schedule = _rate()
    rho: float = _average(0.9)
    eps: float = _eps(1e-6)
    weight_decay: float = _decay()

    _torch = torch.optim.Adadelta
    _zeros = ("square_avg", "acc_delta")


@dataclass(frozen=True, repr=False)
class adamax(OptimizerBase):
    """Adamax: Adam with the largest recent |g| in place of the root mean square. `torch.optim.Adamax`.

    g ← g + weight_decay·θ ;  m ← β₁m + (1 − β₁)g ;  u ← max(β₂u, |g| + eps) ;  θ ← θ − lr·m / ((1 − β₁ᵗ)·u)

    Args:
        lr: learning rate, > 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        eps: a small number in the divisor, > 0.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
    Example:
        >>> adamax(0.002)
        adamax(0.002)

    Reference: Kingma, Ba, Adam, 2015, Algorithm 2.
    """

    lr: float | Schedule = _rate(0.01)
    betas: tuple[float, float] = _betas()
    eps: float = _eps(1e-8)
    weight_decay: float = _decay()

    _torch = torch.optim.Adamax
    _zeros = ("exp_avg", "exp_inf")


@dataclass(frozen=True, repr=False)
class nadam(OptimizerBase):
    """NAdam: Adam with Nesterov's momentum. `torch.optim.NAdam`.

    μₜ = β₁·(1 − ½·0.96^(t·momentum_decay)) ;  m, v as Adam's
    θ ← θ − lr·( (1 − μₜ)·g/(1 − ∏ᵢ≤ₜ μᵢ) + μₜ₊₁·m/(1 − ∏ᵢ≤ₜ₊₁ μᵢ) ) / (√(v/(1 − β₂ᵗ)) + eps)

    Args:
        lr: learning rate, > 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        eps: a small number in the divisor, > 0.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
        momentum_decay: the rate at which the momentum factor μₜ approaches β₁, ≥ 0.
    Example:
        >>> nadam(0.002)
        nadam(0.002)

    Reference: Dozat, Incorporating Nesterov Momentum into Adam, 2016.
    """

    lr: float | Schedule = _rate(0.01)
    betas: tuple[float, float] = _betas()
    eps: float = _eps(1e-8)
    weight_decay: float = _decay()
    momentum_decay: float = bounded_number(4e-3, least=0, why="μ would grow past β₁.")

    _torch = torch.optim.NAdam
    _zeros = ("exp_avg", "exp_avg_sq")

    def per_lane(self) -> Counters:
        return {**STEP, "mu_product": (1.0, torch.float32)}


@dataclass(frozen=True, repr=False)
class radam(OptimizerBase):
    """RAdam: Adam that uses v only after its variance is small enough. `torch.optim.RAdam`.

    ρ∞ = 2/(1 − β₂) − 1 ;  ρₜ = ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ) ;  θ ← θ − lr·m̂·r/(√v + eps) if ρₜ > 5, else θ − lr·m̂
    r = √(1 − β₂ᵗ)·√( (ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ) )

    Args:
        lr: learning rate, > 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        eps: a small number in the divisor, > 0.
        weight_decay: the factor of θ that is added to the gradient, ≥ 0.
    Example:
        >>> radam(0.001)
        radam(0.001)

    Reference: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020.
    """

    lr: float | Schedule = _rate(0.01)
    betas: tuple[float, float] = _betas()
    eps: float = _eps(1e-8)
    weight_decay: float = _decay()

    _torch = torch.optim.RAdam
    _zeros = ("exp_avg", "exp_avg_sq")


OPTIMIZERS: dict[str, type[OptimizerBase]] = {
    c.__name__: c for c in (sgd, adam, adamw, adagrad, yogi, rmsprop, adadelta, adamax, nadam, radam)
}
