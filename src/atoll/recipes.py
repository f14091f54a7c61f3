"""Named algorithms: each is a constructor call, nothing else.

| recipe | cohort | local | aggregator | optimizer |
|---|---|---|---|---|
| `gd` | one client | `Gradient()` | `Mean()` | `sgd(lr)` |
| `sgd` | one client | `Gradient(batch)` | `Mean()` | `sgd(lr)` |
| `distributed_gd` | everyone | `Gradient()` | `Mean()` | `sgd(lr)` |
| `fedsgd` | some | `Gradient()` | `Mean()` | `sgd(lr)` |
| `fedavg` | some | `Train(sgd(lr), epochs, batch)` | `Mean()` | `sgd(1.0)` |
| `local_sgd` | everyone | `Train(sgd(lr), steps, batch)` | `Mean()` | `sgd(1.0)` |
| `fedavgm` | some | as `fedavg` | `Mean()` | `sgd(server_lr, momentum)` |
| `fedadam`, `fedyogi`, `fedadagrad` | some | as `fedavg` | `Mean()` | `adam`, `yogi`, `adagrad`, uncorrected |
| `diloco` | everyone | `Train(adamw(lr), steps, keep)` | `Mean()` | `sgd(0.7, momentum=0.9, nesterov=True)` |
| `post_local_sgd` | everyone | `local_sgd`'s, one step a round at first | `Mean()` | `sgd(1.0)` |
| `fedbuff` | some, all the time | as `fedavg` | `Mean()` | `sgd(server_lr)`, pace `Buffered(k)` |
| `fedasync` | some, all the time | as `fedavg`, sending its model | `Mean()` | `sgd(alpha)`, pace `Buffered(1)` |

Parameters of the same name mean the same in every recipe:

    lr          learning rate of the clients, > 0; a number or a schedule (`Rate`)
    epochs      passes over the rows of a client in a round, ≥ 1
    steps       local steps in a round, ≥ 1; a number or a schedule (`Steps`)
    batch       rows of a step, ≥ 1; None takes all rows of the client (`Batch`)
    cohort      clients of a round: None for all, an int for their number, a float for a fraction, or a sampler
    server_lr   learning rate of the server (`Rate`)
    staleness   weight of an update that is s rounds late, a function of s (`Staleness`)
"""

from __future__ import annotations

from collections.abc import Callable

from atoll.errors import UsageError
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Identity
from atoll.plan.local import Gradient, Train
from atoll.plan.pace import Buffered, staleness_polynomial
from atoll.plan.plan import Plan
from atoll.plan.protocols import Sampler, Stage, SumKind
from atoll.schedule import Schedule, hold

Rate = float | Schedule
Steps = int | Schedule
Staleness = Callable[[int], float]
Cohort = Sampler | int | float | None
Batch = int | None


def gd(lr: Rate = 0.1) -> Plan:
    """Gradient descent: θ ← θ − lr ∇J(θ), on one client that holds every row.

    Example:
        >>> gd(0.1)
        Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))

    Reference: Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847.
    """
    return Plan(Gradient(), Mean(), rules.sgd(lr))


def sgd(lr: Rate = 0.1, batch: int = 32) -> Plan:
    """Stochastic gradient descent: the gradient of `batch` rows drawn anew each round.

    Reference: Robbins and Monro, A Stochastic Approximation Method, 1951.
    """
    return Plan(Gradient(batch), Mean(), rules.sgd(lr))


def distributed_gd(lr: Rate = 0.1, batch: Batch = None, sum: SumKind = "exact") -> Plan:
    """Distributed gradient descent over a parameter server: workers send gradients, the server adds and updates.

    θ ← θ − lr Σ_k (n_k/n) ∇J_k(θ), which is ∇J for any split of the rows. With `batch`, each worker takes that many.
    """
    return Plan(Gradient(batch), Mean(sum=sum), rules.sgd(lr))


def fedsgd(lr: Rate = 0.1, cohort: Cohort = None) -> Plan:
    """Federated gradient descent: the clients at work send the gradient of all their rows.

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """
    return Plan(Gradient(), Mean(), rules.sgd(lr), cohort)


def fedavg(lr: Rate = 0.1, epochs: int = 1, batch: Batch = 10, cohort: Cohort = None, server_lr: Rate = 1.0) -> Plan:
    """Federated averaging: clients train locally, the server averages what they moved, weighted by rows.

    Example:
        >>> fedavg(0.5, cohort=10)
        Plan(Train(sgd(0.5), epochs=1, batch=10), aggregator=Mean(), cohort=Uniform(10))

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), rules.sgd(server_lr), cohort)


def local_sgd(lr: Rate = 0.1, steps: Steps = 10, batch: Batch = 32) -> Plan:
    """Local SGD: every worker makes `steps` steps between two averagings, and goes on through its rows where it was.

    Reference: Stich, Local SGD Converges Fast and Communicates Little, 2019.
    """
    return Plan(Train(rules.sgd(lr), steps=steps, batch=batch, keep=("order",)), Mean(), rules.sgd(1.0))


def post_local_sgd(lr: Rate = 0.1, switch: int = 100, steps: Steps = 16, batch: Batch = 32) -> Plan:
    """Post-local SGD: a step a round, which is distributed SGD, for `switch` rounds; local SGD from then on.

    Example:
        >>> post_local_sgd(0.1, switch=50, steps=8).local
        Train(sgd(0.1), steps=hold(1.0, rounds=50) >> constant(8.0), batch=32, keep=('order',))

    Reference: Lin et al., Don't Use Large Mini-Batches, Use Local SGD, 2020.
    """
    return local_sgd(lr, hold(1, rounds=switch) >> steps, batch)


def fedavgm(
    lr: Rate = 0.1,
    epochs: int = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: Rate = 1.0,
    momentum: float = 0.9,
) -> Plan:
    """Federated averaging with momentum at the server.

    Reference: Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution, 2019.
    """
    return Plan(
        Train(rules.sgd(lr), epochs=epochs, batch=batch),
        Mean(),
        rules.sgd(server_lr, momentum=momentum),
        cohort,
    )


def fedadam(
    lr: Rate = 0.1,
    epochs: int = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: Rate = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-3,
) -> Plan:
    """Adam at the server, as published: without bias correction.

    Reference: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """
    server = rules.adam(server_lr, betas=betas, eps=eps, correct=False)
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), server, cohort)


def fedyogi(
    lr: Rate = 0.1,
    epochs: int = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: Rate = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-3,
) -> Plan:
    """Yogi at the server.

    Reference: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """
    server = rules.yogi(server_lr, betas=betas, eps=eps)
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), server, cohort)


def fedadagrad(
    lr: Rate = 0.1,
    epochs: int = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: Rate = 0.1,
    beta: float = 0.9,
    eps: float = 1e-3,
) -> Plan:
    """Adagrad at the server, with momentum `beta`.

    Reference: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """
    server = rules.adagrad(server_lr, eps=eps, beta=beta)
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), server, cohort)


def diloco(
    lr: Rate = 1e-3,
    steps: Steps = 500,
    batch: Batch = 32,
    server_lr: Rate = 0.7,
    momentum: float = 0.9,
    codec: Stage = Identity(),
) -> Plan:
    """DiLoCo: workers make many AdamW steps and keep their optimizer; the server steps with Nesterov momentum.

    What a worker moved, the outer gradient, goes through `codec`: `Quantize(8)` sends a quarter of the bytes.

    Example:
        >>> from atoll.plan.codec import Quantize
        >>> diloco(codec=Quantize(8)).codec
        Quantize(8)

    Reference: Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023.
    """
    return Plan(
        Train(rules.adamw(lr), steps=steps, batch=batch, keep=("optimizer", "order")),
        Mean(),
        rules.sgd(server_lr, momentum=momentum, nesterov=True),
        codec=codec,
    )


def fedbuff(
    lr: Rate = 0.1,
    epochs: int = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    k: int = 10,
    server_lr: Rate = 1.0,
    staleness: Staleness = staleness_polynomial(0.5),
) -> Plan:
    """Buffered asynchrony: the server steps as soon as k updates are there; late ones count less.

    θ⁺ = θ − server_lr · Σ wᵢ s(τᵢ) (θ_birth − θᵢ) / Σ wᵢ,  over k arrivals, τ rounds after they began

    Example:
        >>> fedbuff(0.1, cohort=100).pace
        Buffered(10)

    Reference: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022.
    """
    local = Train(rules.sgd(lr), epochs=epochs, batch=batch)
    return Plan(local, Mean(), rules.sgd(server_lr), cohort, pace=Buffered(k, staleness))


def fedasync(
    lr: Rate = 0.1,
    epochs: int = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    alpha: Rate = 0.6,
    staleness: Staleness = staleness_polynomial(0.5),
) -> Plan:
    """Asynchronous federated optimization: whoever arrives is mixed into the model, the later the less.

    θ⁺ = (1 − α s(τ)) θ + α s(τ) θᵢ,  τ rounds after θᵢ began; without the paper's proximal term

    Args:
        alpha: α, in (0, 1], or a schedule of it.
        staleness: s: `staleness_polynomial(0.5)`, the paper's, or its `hinge(10, grace=4)`.
    Raises:
        UsageError: α is no share.
    Example:
        >>> fedasync(0.1, cohort=100)
        Plan(Train(sgd(0.1), epochs=1, batch=10, sends='model'), aggregator=Mean(), optimizer=sgd(0.6), \
cohort=Uniform(100), pace=Buffered(1))

    Reference: Xie, Koyejo, Gupta, Asynchronous Federated Optimization, 2019, Algorithm 1.
    """
    if not isinstance(alpha, Schedule) and not 0 < alpha <= 1:
        raise UsageError(
            f"fedasync(alpha={alpha!r}).",
            "a number in (0, 1], or a schedule.",
            "it is the share of the model that arrives.",
            "fedasync(0.1, alpha=0.6)",
        )
    local = Train(rules.sgd(lr), epochs=epochs, batch=batch, sends="model")
    return Plan(local, Mean(), rules.sgd(alpha), cohort, pace=Buffered(1, staleness))


RECIPES = (
    gd,
    sgd,
    distributed_gd,
    fedsgd,
    fedavg,
    local_sgd,
    post_local_sgd,
    fedavgm,
    fedadam,
    fedyogi,
    fedadagrad,
    diloco,
    fedbuff,
    fedasync,
)
