"""Recipes: named algorithms. Each recipe is a function that returns a plan by one constructor call.

| recipe | cohort | local | aggregator | optimizer |
|---|---|---|---|---|
| `gd` | one client | `Gradient()` | `Mean()` | `sgd(lr)` |
| `sgd` | one client | `Gradient(batch)` | `Mean()` | `sgd(lr)` |
| `distributed_gd` | all | `Gradient()` | `Mean()` | `sgd(lr)` |
| `fedsgd` | a sample | `Gradient()` | `Mean()` | `sgd(lr)` |
| `fedavg` | a sample | `Train(sgd(lr), epochs, batch)` | `Mean()` | `sgd(1.0)` |
| `local_sgd` | all | `Train(sgd(lr), steps, batch)` | `Mean()` | `sgd(1.0)` |
| `fedavgm` | a sample | as `fedavg` | `Mean()` | `sgd(server_lr, momentum)` |
| `fedadam`, `fedyogi`, `fedadagrad` | a sample | as `fedavg` | `Mean()` | `adam`, `yogi`, `adagrad`, uncorrected |
| `diloco` | all | `Train(adamw(lr), steps, keep)` | `Mean()` | `sgd(0.7, momentum=0.9, nesterov=True)` |
| `post_local_sgd` | all | as `local_sgd`, one step per round at first | `Mean()` | `sgd(1.0)` |
| `dp_fedavg` | `Poisson(q)` | as `fedavg` | `Mean("equal", "expected")` | `sgd(server_lr)`, codec `Clip >> Noise` |
| `fedbuff` | n active clients | as `fedavg` | `Mean()` | `sgd(server_lr)`, pace `Buffered(k)` |
| `fedasync` | n active clients | as `fedavg`, `sends="model"` | `Mean()` | `sgd(alpha)`, pace `Buffered(1)` |
| `fedprox` | a sample | as `fedavg`, `correction=Proximal(mu)` | `Mean()` | `sgd(server_lr)` |
| `scaffold` | a sample | as `fedavg`, `correction=Scaffold()` | `Mean()` | `sgd(server_lr)` |
| `feddyn` | a sample | as `fedavg`, `correction=Dynamic(alpha)` | `Mean()` | `sgd(1.0)` |
| `fednova` | a sample | as `fedavg`, `correction=Normalised()` | `Mean()` | `sgd(server_lr)` |
| `fedexp` | a sample | as `fedavg`, `correction=Extrapolated(eps)` | `Mean()` | `sgd(1.0)` |
| `mimelite` | a sample | as `fedavg`, `correction=MimeLite(beta)` | `Mean()` | `sgd(server_lr)` |
| `qffl` | a sample | as `fedavg`, `correction=Fair(q)` | `Mean()` | `sgd(server_lr)` |
| `fedlc` | a sample | as `fedavg`, `correction=Calibrated(tau, form)` | `Mean()` | `sgd(server_lr)` |
| `newton` | all | `Newton(l2)` | `Mean()` | `sgd(1.0)` |
| `fedper` | a sample | as `fedavg`, `own=own` | `Mean()` | `sgd(server_lr)` |
| `fedbn` | a sample | as `fedavg`, `own="norms"` | `Mean()` | `sgd(server_lr)` |
| `fedrep` | a sample | as `fedavg`, `own=own, alternate=True` | `Mean()` | `sgd(server_lr)` |
| `ditto` | a sample | as `fedavg`, `correction=Ditto(lam)` | `Mean()` | `sgd(server_lr)` |

Parameters of the same name mean the same in every recipe. The type and the meaning of each shared parameter are
declared once, below; `help` of a recipe lists them.

Each recipe raises UsageError if an argument is out of range.

Tests: tests/surface/test_recipes.py, tests/identities/test_one_algorithm.py, tests/golden/test_golden.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, cast, get_origin, get_type_hints

from atoll.base.errors import UsageError
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip, Identity, Noise
from atoll.plan.formula import FEDAVG_RATE
from atoll.plan.local import (
    Calibrated,
    Ditto,
    Dynamic,
    Extrapolated,
    Fair,
    Gradient,
    MimeLite,
    Newton,
    Normalised,
    Proximal,
    Scaffold,
    Train,
)
from atoll.plan.local.correction import Logits
from atoll.plan.pace import Buffered, staleness_polynomial
from atoll.plan.plan import Plan
from atoll.plan.protocols import Correction, Sampler, Stage, SumKind
from atoll.plan.registry import read_part
from atoll.plan.sampler import Poisson
from atoll.plan.schedule import Schedule, hold

Own = tuple[str, ...]
F = TypeVar("F", bound=Callable[..., Any])

Rate = Annotated[float | Schedule, "learning rate of the clients, > 0; a number or a schedule."]
Epochs = Annotated[int, "passes over the rows of a client in a round, ≥ 1."]
Steps = Annotated[int | Schedule, "local steps in a round, ≥ 1; a number or a schedule."]
Batch = Annotated[int | None, "rows of a step, ≥ 1; None takes all rows of the client."]
Cohort = Annotated[
    Sampler | int | float | None,
    "clients of a round: None for all, an int for their number, a float for a fraction, or a sampler.",
]
ServerRate = Annotated[float | Schedule, "learning rate of the server, > 0; a number or a schedule."]
Staleness = Annotated[Callable[[int], float], "weight of an update that is s rounds late, a function of s."]


def _recipe(function: F) -> F:
    """A recipe whose docstring lists the meaning of its shared parameters. A recipe may describe one by itself.

    The error about a wrong argument has the call of the recipe with the argument corrected as its line.
    """

    @functools.wraps(function)
    def recipe(*args: Any, **words: Any) -> Any:
        try:
            return function(*args, **words)
        except (TypeError, UsageError) as error:
            _raise_as_text(function, args, words)
            raise error

    _describe(function)
    recipe.__doc__ = function.__doc__
    return cast("F", recipe)


def _raise_as_text(function: Callable[..., Any], args: tuple[Any, ...], words: Mapping[str, Any]) -> None:
    """Raise the error of the text of a call, whose line is the corrected text; nothing if the call has no text."""
    try:
        for value in (*args, *words.values()):
            read_part(repr(value))
    except UsageError:
        return
    given = [*map(repr, args), *(f"{name}={value!r}" for name, value in words.items())]
    read_part(f"{function.__name__}({', '.join(given)})", {function.__name__: function}, kind="recipe")


def _describe(function: Callable[..., Any]) -> None:
    """Add the meaning of the shared parameters to the docstring of a recipe."""
    doc = function.__doc__
    if doc is None:  # python -OO
        return
    hints = get_type_hints(function, include_extras=True)
    meaning = {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}
    lines = [f"        {name}: {text}\n" for name, text in meaning.items() if f"\n        {name}: " not in doc]
    if "    Args:\n" not in doc:
        mark = next(mark for mark in ("    Raises:", "    Example:", "    Reference:") if mark in doc)
        doc = doc.replace(mark, f"    Args:\n{mark}", 1)
    function.__doc__ = doc.replace("    Args:\n", "    Args:\n" + "".join(lines), 1)


@_recipe
def gd(lr: Rate = 0.1) -> Plan:
    """Gradient descent on one client that holds all rows.

    θ ← θ − lr ∇J(θ)

    Example:
        >>> gd(0.1)
        Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))

    Reference: Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847.
    """
    return Plan(Gradient(), Mean(), rules.sgd(lr))


@_recipe
def sgd(lr: Rate = 0.1, batch: Batch = 32) -> Plan:
    """Stochastic gradient descent on one client that holds all rows. Each round draws `batch` new rows B.

    θ ← θ − lr (1/|B|) Σ_{rows in B} ∇ℓ(θ)

    Example:
        >>> sgd(0.1)
        Plan(Gradient(32), aggregator=Mean(), optimizer=sgd(0.1))

    Reference: Robbins and Monro, A Stochastic Approximation Method, 1951.
    """
    return Plan(Gradient(batch), Mean(), rules.sgd(lr))


@_recipe
def distributed_gd(lr: Rate = 0.1, batch: Batch = None, sum: SumKind = "exact") -> Plan:
    """Distributed gradient descent with a parameter server: workers send gradients, the server adds them and steps.

    θ ← θ − lr Σ_k (n_k/n) ∇J_k(θ),  and the sum equals ∇J for any split of the rows

    Args:
        sum: `"exact"` or `"float"`, as for `Mean`.
    Example:
        >>> distributed_gd(0.1)
        Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))

    Reference: Li et al., Scaling Distributed Machine Learning with the Parameter Server, 2014.
    """
    return Plan(Gradient(batch), Mean(sum=sum), rules.sgd(lr))


@_recipe
def fedsgd(lr: Rate = 0.1, cohort: Cohort = None) -> Plan:
    """Federated gradient descent: each client of the cohort sends the gradient of all its rows.

    θ ← θ − lr Σᵢ nᵢ ∇Jᵢ(θ) / Σᵢ nᵢ,  i in the cohort

    Example:
        >>> fedsgd(0.1, cohort=10)
        Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1), cohort=Uniform(10))

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """
    return Plan(Gradient(), Mean(), rules.sgd(lr), cohort)


@_recipe
def fedavg(
    lr: Rate = FEDAVG_RATE, epochs: Epochs = 1, batch: Batch = 10, cohort: Cohort = None, server_lr: ServerRate = 1.0
) -> Plan:
    """Federated averaging: clients train locally, and the server averages their updates, weighted by rows.

    θ ← θ − server_lr Σᵢ nᵢ (θ − θᵢ) / Σᵢ nᵢ,  θᵢ the model of client i after local training

    Example:
        >>> fedavg(0.5, cohort=10)
        Plan(Train(sgd(0.5), epochs=1, batch=10), aggregator=Mean(), cohort=Uniform(10))

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), rules.sgd(server_lr), cohort)


@_recipe
def local_sgd(lr: Rate = 0.1, steps: Steps = 10, batch: Batch = 32) -> Plan:
    """Local SGD: each worker makes `steps` steps between two averages, and continues at its place in its rows.

    θ ← Σᵢ nᵢ θᵢ / Σᵢ nᵢ,  θᵢ from θ by `steps` steps of SGD

    Example:
        >>> local_sgd(0.1, steps=8)
        Plan(Train(sgd(0.1), steps=8, batch=32, keep=('order',)), aggregator=Mean())

    Reference: Stich, Local SGD Converges Fast and Communicates Little, 2019.
    """
    return Plan(Train(rules.sgd(lr), steps=steps, batch=batch, keep=("order",)), Mean(), rules.sgd(1.0))


@_recipe
def post_local_sgd(lr: Rate = 0.1, switch: int = 100, steps: Steps = 16, batch: Batch = 32) -> Plan:
    """Post-local SGD: one step per round, which is distributed SGD, for `switch` rounds; then local SGD.

    Args:
        switch: number of rounds with one step, ≥ 1.
        steps: local steps in a round after the switch; a number or a schedule.
    Example:
        >>> post_local_sgd(0.1, switch=50, steps=8).local
        Train(sgd(0.1), steps=hold(1.0, rounds=50) >> constant(8.0), batch=32, keep=('order',))

    Reference: Lin et al., Don't Use Large Mini-Batches, Use Local SGD, 2020.
    """
    return local_sgd(lr, hold(1, rounds=switch) >> steps, batch)


@_recipe
def fedavgm(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    momentum: float = 0.9,
) -> Plan:
    """Federated averaging with momentum at the server.

    b ← momentum·b + g ;  θ ← θ − server_lr·b,  g the mean update of the clients

    Args:
        momentum: of the server, 0 ≤ momentum < 1.
    Example:
        >>> fedavgm(0.1, cohort=10).optimizer
        sgd(1.0, momentum=0.9)

    Reference: Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution, 2019.
    """
    return Plan(
        Train(rules.sgd(lr), epochs=epochs, batch=batch),
        Mean(),
        rules.sgd(server_lr, momentum=momentum),
        cohort,
    )


@_recipe
def fedadam(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-3,
) -> Plan:
    """Federated averaging with Adam at the server, without bias correction, as in the paper.

    m ← β₁m + (1 − β₁)g ;  v ← β₂v + (1 − β₂)g² ;  θ ← θ − server_lr·m / (√v + eps)

    Args:
        betas: (β₁, β₂) of the server, each in [0, 1).
        eps: τ of the paper, > 0.
    Example:
        >>> fedadam(0.1).optimizer
        adam(0.01, betas=(0.9, 0.99), eps=0.001, correct=False)

    Reference: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """
    server = rules.adam(server_lr, betas=betas, eps=eps, correct=False)
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), server, cohort)


@_recipe
def fedyogi(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-3,
) -> Plan:
    """Federated averaging with Yogi at the server.

    m ← β₁m + (1 − β₁)g ;  v ← v − (1 − β₂)·g²·sign(v − g²) ;  θ ← θ − server_lr·m / (√v + eps)

    Args:
        betas: (β₁, β₂) of the server, each in [0, 1).
        eps: τ of the paper, > 0.
    Example:
        >>> fedyogi(0.1).optimizer
        yogi(0.01, betas=(0.9, 0.99))

    Reference: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """
    server = rules.yogi(server_lr, betas=betas, eps=eps)
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), server, cohort)


@_recipe
def fedadagrad(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 0.1,
    beta: float = 0.9,
    eps: float = 1e-3,
) -> Plan:
    """Federated averaging with Adagrad at the server.

    v ← v + g² ;  m ← beta·m + (1 − beta)·g ;  θ ← θ − server_lr·m / (√v + eps)

    Args:
        beta: momentum of the server, 0 ≤ beta < 1.
        eps: τ of the paper, > 0.
    Example:
        >>> fedadagrad(0.1).optimizer
        adagrad(0.1, eps=0.001, beta=0.9)

    Reference: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2.
    """
    server = rules.adagrad(server_lr, eps=eps, beta=beta)
    return Plan(Train(rules.sgd(lr), epochs=epochs, batch=batch), Mean(), server, cohort)


@_recipe
def diloco(
    lr: Rate = 1e-3,
    steps: Steps = 500,
    batch: Batch = 32,
    server_lr: ServerRate = 0.7,
    momentum: float = 0.9,
    codec: Stage = Identity(),
) -> Plan:
    """DiLoCo: workers make many AdamW steps and keep their optimizer; the server steps with Nesterov momentum.

    Each worker sends its update θ − θᵢ, the outer gradient, compressed by `codec`. `Quantize(8)` sends a quarter of the
    bytes.

    Args:
        momentum: of the server, 0 < momentum < 1.
        codec: compresses the outer gradient.
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


@_recipe
def dp_fedavg(
    lr: Rate = 0.1,
    clip: float = 1.0,
    noise: float = 1.0,
    q: float = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    server_lr: ServerRate = 1.0,
    secure: bool = False,
) -> Plan:
    """Federated averaging with differential privacy for each client: clipped updates, noise on their sum.

    θ ← θ − server_lr (Σᵢ Δᵢ min(1, clip/|Δᵢ|) + N(0, (noise·clip)²)) / (q·C),  Δᵢ = θ − θᵢ,  C the number of clients

    Args:
        clip: the largest norm of an update, > 0.
        noise: the standard deviation of the noise in units of `clip`, > 0.
        q: the chance of each client to be in a round, in (0, 1]. The draw is secret.
        secure: whether the server receives only the sum of the updates, by a secure sum.
    Example:
        >>> dp_fedavg(0.5, clip=0.5, noise=2.0, q=0.1).codec
        Clip(0.5) >> Noise(2.0)

    Reference: McMahan et al., Learning Differentially Private Recurrent Language Models, 2018.
    """
    return Plan(
        Train(rules.sgd(lr), epochs=epochs, batch=batch),
        Mean(weights="equal", over="expected", secure=secure),
        rules.sgd(server_lr),
        Poisson(q),
        codec=Clip(clip) >> Noise(noise),
    )


@_recipe
def fedbuff(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    k: int = 10,
    server_lr: ServerRate = 1.0,
    staleness: Staleness = staleness_polynomial(0.5),
) -> Plan:
    """Buffered asynchronous averaging: the server steps when k updates have arrived. Late updates have less weight.

    θ⁺ = θ − server_lr · Σ wᵢ s(τᵢ) (θ_b − θᵢ) / Σ wᵢ,  over k arrivals; client i started from θ_b, τᵢ rounds earlier

    Args:
        cohort: number of clients that train at any time.
        k: updates per step of the server, ≥ 1.
        staleness: s, a function from rounds of lateness to a weight.
    Example:
        >>> fedbuff(0.1, cohort=100).pace
        Buffered(10)

    Reference: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022.
    """
    local = Train(rules.sgd(lr), epochs=epochs, batch=batch)
    return Plan(local, Mean(), rules.sgd(server_lr), cohort, pace=Buffered(k, staleness))


@_recipe
def fedasync(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    alpha: float | Schedule = 0.6,
    staleness: Staleness = staleness_polynomial(0.5),
) -> Plan:
    """Asynchronous federated optimization: each arriving model is mixed into θ. Late models have less weight.

    θ⁺ = (1 − α s(τ)) θ + α s(τ) θᵢ,  client i started τ rounds earlier; without the paper's proximal term

    Args:
        cohort: number of clients that train at any time.
        alpha: α, in (0, 1], or a schedule of it.
        staleness: s, such as the paper's `staleness_polynomial(0.5)` or `hinge(10, grace=4)`.
    Raises:
        UsageError: α is out of range.
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
            "it is the weight of the arriving model in the mixture.",
            "fedasync(0.1, alpha=0.6)",
        )
    local = Train(rules.sgd(lr), epochs=epochs, batch=batch, sends="model")
    return Plan(local, Mean(), rules.sgd(alpha), cohort, pace=Buffered(1, staleness))


@_recipe
def fedprox(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    mu: float = 0.01,
) -> Plan:
    """FedProx: federated averaging whose local steps are pulled back to the model of the round.

    y ← y − lr·(∇ℓ(y) + mu·(y − θ))

    Args:
        mu: weight of the proximal term, ≥ 0.
    Example:
        >>> fedprox(0.1, mu=0.1).local.correction
        Proximal(0.1)

    Reference: Li et al., Federated Optimization in Heterogeneous Networks, 2020.
    """
    return _corrected(Proximal(mu), rules.sgd(lr), epochs, batch, cohort, server_lr)


@_recipe
def scaffold(
    lr: Rate = 0.1, epochs: Epochs = 1, batch: Batch = 10, cohort: Cohort = None, server_lr: ServerRate = 1.0
) -> Plan:
    """SCAFFOLD: control variates remove the drift of clients with different minima.

    y ← y − lr·(∇ℓ(y) − cᵢ + c)

    Example:
        >>> scaffold(0.1)
        Plan(Train(sgd(0.1), epochs=1, batch=10, correction=Scaffold()), aggregator=Mean())

    Reference: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, 2020, option II.
    """
    return _corrected(Scaffold(), rules.sgd(lr), epochs, batch, cohort, server_lr)


@_recipe
def feddyn(lr: Rate = 0.1, epochs: Epochs = 1, batch: Batch = 10, cohort: Cohort = None, alpha: float = 0.1) -> Plan:
    """FedDyn: local losses with a dynamic regularizer, whose common minimum is that of the sum of the losses.

    y ← y − lr·(∇ℓ(y) − gᵢ + alpha·(y − θ)) ;  θ ← θ − Σ w uᵢ / Σ w − h/alpha

    Args:
        alpha: weight of the regularizer, > 0.
    Example:
        >>> feddyn(0.1, alpha=0.01).local.correction
        Dynamic(0.01)

    Reference: Acar et al., Federated Learning Based on Dynamic Regularization, 2021.
    """
    return _corrected(Dynamic(alpha), rules.sgd(lr), epochs, batch, cohort, 1.0)


@_recipe
def fednova(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    momentum: float = 0.0,
    mu: float = 0.0,
) -> Plan:
    """FedNova: federated averaging of normalised updates, so that more steps give no more weight.

    θ ← θ − server_lr·(Σ pᵢ |aᵢ|)·Σ pᵢ uᵢ/|aᵢ|

    Args:
        momentum: of the clients, 0 ≤ momentum < 1.
        mu: weight of a proximal term, ≥ 0.
    Example:
        >>> fednova(0.1).local.correction, fednova(0.1, mu=0.1).local.correction
        (Normalised(), Proximal(0.1) >> Normalised())

    Reference: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, 2020.
    """
    correction = Proximal(mu) >> Normalised() if mu else Normalised()
    return _corrected(correction, rules.sgd(lr, momentum=momentum), epochs, batch, cohort, server_lr)


@_recipe
def fedexp(lr: Rate = 0.1, epochs: Epochs = 1, batch: Batch = 10, cohort: Cohort = None, eps: float = 1e-3) -> Plan:
    """FedExP: federated averaging with a longer step of the server if the updates differ.

    θ ← θ − max(1, Σ pᵢ|uᵢ|² / (2(|ū|² + eps)))·ū,  ū the mean update

    Args:
        eps: added to |ū|², ≥ 0.
    Example:
        >>> fedexp(0.1).local.correction
        Extrapolated()

    Reference: Jhunjhunwala, Wang, Joshi, FedExP: Speeding Up Federated Averaging via Extrapolation, 2023.
    """
    return _corrected(Extrapolated(eps), rules.sgd(lr), epochs, batch, cohort, 1.0)


@_recipe
def qffl(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    q: float = 1.0,
) -> Plan:
    """q-FedAvg: federated averaging in which clients with a large loss have more weight.

    θ ← θ − Σ wᵢ Fᵢ^q uᵢ / Σ wᵢ (Fᵢ^q + q Fᵢ^(q−1) |uᵢ|²/lr),  Fᵢ the loss of client i at θ

    Args:
        q: the weight of fairness, ≥ 0; 0 is federated averaging.
    Example:
        >>> qffl(0.1).local.correction
        Fair(1.0)

    Reference: Li, Sanjabi, Beirami, Smith, Fair Resource Allocation in Federated Learning, 2020.
    """
    return _corrected(Fair(q), rules.sgd(lr), epochs, batch, cohort, server_lr)


@_recipe
def mimelite(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    beta: float = 0.9,
) -> Plan:
    """MimeLite: federated averaging in which clients use the momentum of the server in each step.

    y ← y − lr·(∇ℓ(y) + beta·m),  m the momentum of the gradients of the clients at θ

    Args:
        beta: the momentum, in [0, 1); 0 is federated averaging.
    Example:
        >>> mimelite(0.1).local.correction
        MimeLite()

    Reference: Karimireddy et al., Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning, 2020.
    """
    return _corrected(MimeLite(beta), rules.sgd(lr), epochs, batch, cohort, server_lr)


@_recipe
def fedlc(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    tau: float = 1.0,
    form: Logits = "quarter",
) -> Plan:
    """FedLC: federated averaging whose clients train with logits that are calibrated by their class counts.

    Args:
        tau: strength of the shift, ≥ 0.
        form: `"quarter"`, the shift −tau·n_c^(−1/4) of FedLC; or `"log"`, the shift tau·log n_c of balanced softmax.
    Example:
        >>> fedlc(0.1, form="log").local.correction
        Calibrated(1.0)

    Reference: Zhang et al., Federated Learning with Label Distribution Skew via Logits Calibration, 2022.
    """
    return _corrected(Calibrated(tau, form), rules.sgd(lr), epochs, batch, cohort, server_lr)


@_recipe
def newton(l2: float = 0.0) -> Plan:
    """Newton's method on the rows of all clients, for linear, logistic, softmax, Poisson and Cox models.

    θ ← θ − H⁻¹ g,   g = (1/n) Σ ∇ℓ + l2·w,   H = (1/n) Σ ∇²ℓ + l2·I on the weights w; biases are not penalized

    Args:
        l2: weight of the penalty (l2/2)·|w|², ≥ 0. scikit-learn's C is 1/(l2·n).
    Example:
        >>> newton(0.001)
        Plan(Newton(0.001), aggregator=Mean())

    Reference: Nocedal and Wright, Numerical Optimization, 2006, chapter 3.
    """
    return Plan(Newton(l2), Mean(), rules.sgd(1.0))


def _corrected(
    correction: Correction,
    clients: rules.sgd,
    epochs: int,
    batch: int | None,
    cohort: Sampler | int | float | None,
    server_lr: float | Schedule,
) -> Plan:
    """Federated averaging with a correction of the local steps."""
    local = Train(clients, epochs=epochs, batch=batch, correction=correction)
    return Plan(local, Mean(), rules.sgd(server_lr), cohort)


@_recipe
def fedper(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    own: Own = ("fc2.*",),
) -> Plan:
    """FedPer: federated averaging of the shared layers; each client keeps and trains its own layers.

    model of client i = (shared θ, own part of client i)

    Args:
        own: patterns of the names of the parameters and buffers that stay at the client.
    Example:
        >>> fedper(0.1, own=("4.*",))
        Plan(Train(sgd(0.1), epochs=1, batch=10, own=('4.*',)), aggregator=Mean())

    Reference: Arivazhagan et al., Federated Learning with Personalization Layers, 2019.
    """
    return Plan(Train(rules.sgd(lr), epochs, batch=batch, own=own), Mean(), rules.sgd(server_lr), cohort)


@_recipe
def fedbn(
    lr: Rate = 0.1, epochs: Epochs = 1, batch: Batch = 10, cohort: Cohort = None, server_lr: ServerRate = 1.0
) -> Plan:
    """FedBN: federated averaging of all layers except those of normalisation, which stay at each client.

    model of client i = (shared θ, norms of client i)

    Example:
        >>> fedbn(0.1)
        Plan(Train(sgd(0.1), epochs=1, batch=10, own='norms'), aggregator=Mean())

    Reference: Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, 2021.
    """
    return Plan(Train(rules.sgd(lr), epochs, batch=batch, own="norms"), Mean(), rules.sgd(server_lr), cohort)


@_recipe
def fedrep(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    own: Own = ("fc2.*",),
) -> Plan:
    """FedRep: each client trains its own layers first, and then the shared layers, whose update it sends.

    model of client i = (shared θ, own part of client i)

    Args:
        own: patterns of the names of the parameters and buffers that stay at the client.
    Example:
        >>> fedrep(0.1, own=("4.*",)).local.alternate
        True

    Reference: Collins et al., Exploiting Shared Representations for Personalized Federated Learning, 2021.
    """
    local = Train(rules.sgd(lr), epochs, batch=batch, own=own, alternate=True)
    return Plan(local, Mean(), rules.sgd(server_lr), cohort)


@_recipe
def ditto(
    lr: Rate = 0.1,
    epochs: Epochs = 1,
    batch: Batch = 10,
    cohort: Cohort = None,
    server_lr: ServerRate = 1.0,
    lam: float = 0.1,
) -> Plan:
    """Ditto: federated averaging, and a second training of each client of its own model, pulled to that of the round.

    v ← v − lr·(∇ℓ(v) + lam·(v − θ))

    Args:
        lam: weight of the pull, ≥ 0.
    Example:
        >>> ditto(0.1, lam=0.5).local.correction
        Ditto(0.5)

    Reference: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, 2021.
    """
    return _corrected(Ditto(lam), rules.sgd(lr), epochs, batch, cohort, server_lr)


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
    dp_fedavg,
    fedbuff,
    fedasync,
    fedprox,
    scaffold,
    feddyn,
    fednova,
    fedexp,
    qffl,
    mimelite,
    fedlc,
    newton,
    fedper,
    fedbn,
    fedrep,
    ditto,
)
