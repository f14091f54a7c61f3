"""The cost in privacy of a plan: ε for a number of rounds, and the noise for an ε.

The events of a plan follow from its sampler (how often, and with what chance, a client takes part), its codec (the
deviation of the noise per unit of the largest update) and the relation of neighbours:

    add or remove, zero out    one client's contribution moves the sum by at most 1 clip
    replace one                by at most 2 clips

With `Noise(z, by="client")` each message is a release: the data of its client are replaced, and the client takes part
in each round in which it can.

Tests: tests/identities/test_account.py
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from atoll.base.errors import UsageError
from atoll.base.lines import Change, Part
from atoll.compute.discrete_gaussian import DISTANCE
from atoll.plan.codec import Chain, Noise
from atoll.plan.codec.privacy import noises_messages
from atoll.plan.conflicts import MISSED
from atoll.plan.plan import Plan
from atoll.plan.protocols import Selection
from atoll.privacy import accountant
from atoll.privacy.accountant import Releases

UNIT = "client"
NUMBERS = 2.0**34  # numbers of a release, at most


class Charge(NamedTuple):
    """The cost of one round.

    Args:
        noise, rate, fixed_size: as in `Releases`.
        rounds: the number by which the largest number of participations of a client grows.
        missed: the chance that the round has no sum, which is added to δ.
    """

    noise: float
    rate: float
    fixed_size: bool
    rounds: int
    missed: float = 0.0


@dataclass(frozen=True)
class Account:
    """The cost in privacy of some rounds of a plan.

    Args:
        epsilon, delta: (ε, δ) of all models and noised sums of these rounds.
        relation: the neighbouring populations.
        clients, rounds: the number of clients, and of rounds.
        releases: the releases as the accountant receives them.
        unit: the unit of protection.
    """

    epsilon: float
    delta: float
    relation: str
    clients: int
    rounds: int
    releases: Releases
    unit: str = UNIT

    @property
    def accountant(self) -> str:
        """The method that gives ε."""
        if self.releases.fixed_size:
            return "RDP without replacement"
        return "Gaussian" if self.releases.rate == 1 else "RDP and PLD"

    def text(self) -> str:
        """The account as one sentence."""
        return (
            f"ε = {self.epsilon:.4g} at δ = {self.delta:g} for each {self.unit} ({self.relation}) after {self.rounds} "
            f"rounds, by {self.accountant}"
        )


def account(plan: Plan, *, clients: int, rounds: int, delta: float | None = None) -> Account:
    """The cost in privacy of the first rounds of a plan.

    It covers the output of a trusted server: models and noised sums; with `Noise(z, by="client")` also each message of
    a client. It does not cover the log of the operator: ids, times and bytes of clients.

    Args:
        plan: a plan with `Noise`.
        clients: C, the number of clients, ≥ 1.
        rounds: the number of rounds, ≥ 0.
        delta: δ in (0, 1/C); None: the largest power of ten ≤ 1/(10 C).
    Raises:
        UsageError: the plan releases no sum with noise, or a number is out of range.
    Example:
        >>> from atoll.recipes import dp_fedavg
        >>> round(account(dp_fedavg(clip=0.5, noise=2.0, q=0.1), clients=1000, rounds=10, delta=1e-5).epsilon, 4)
        0.7985
    """
    delta = default_delta(clients) if delta is None else check_delta(delta, clients)
    selection = selection_of(plan, clients, rounds)
    releases = _releases(plan, selection)
    return Account(epsilon_of(releases, delta, _missed(plan)), delta, selection.relation, clients, rounds, releases)


def epsilon(plan: Plan, *, clients: int, rounds: int, delta: float | None = None) -> float:
    """ε of the first rounds of a plan; the arguments are those of `account`."""
    return account(plan, clients=clients, rounds=rounds, delta=delta).epsilon


def noise_for(plan: Plan, *, clients: int, rounds: int, epsilon: float, delta: float | None = None) -> float:
    """The least z, to four digits, with which the rounds of a plan cost at most ε.

    Args:
        plan: a plan with `Noise`, whose z is not used.
        clients, rounds, delta: as for `account`.
        epsilon: ε > 0.
    Returns:
        z, rounded up.
    Raises:
        UsageError: no z up to 1e6 is enough, for example because the noise of an adaptive clip costs more than ε.
    Example:
        >>> from atoll.recipes import dp_fedavg
        >>> noise_for(dp_fedavg(), clients=1000, rounds=10, delta=1e-5, epsilon=0.7985)
        2.0
    """
    delta = default_delta(clients) if delta is None else check_delta(delta, clients)
    selection = selection_of(plan, clients, rounds)

    def enough(z: float) -> bool:
        private = dataclasses.replace(plan, codec=with_noise(plan.codec, z))
        return epsilon_of(_releases(private, selection), delta, _missed(plan)) <= epsilon

    low, high = 1e-2, 1.0
    while not enough(high):
        low, high = high, 4 * high
        if high > 1e6:
            raise UsageError(
                f"ε = {epsilon:g} with {plan.codec!r}.",
                "a larger ε, or fewer rounds.",
                "no noise on the update is enough.",
                Change("budget", 4 * epsilon),
            )
    while high / low > 1 + 1e-5:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    digits = 3 - math.floor(math.log10(high))
    return float(math.ceil(high * 10**digits - 2e-3) / 10**digits)


def with_noise(codec: Any, z: float) -> Any:
    """A codec in which each `Noise` has the deviation z."""
    if isinstance(codec, Noise):
        return dataclasses.replace(codec, z=z)
    return Chain(tuple(with_noise(stage, z) for stage in codec.stages)) if isinstance(codec, Chain) else codec


def default_delta(clients: int) -> float:
    """The largest power of ten ≤ 1/(10 C).

    Example:
        >>> default_delta(1000), default_delta(101)
        (0.0001, 0.0001)
    """
    return float(f"1e-{len(str(clients - 1)) + 1 if clients > 1 else 1}")


def check_delta(delta: float, clients: int) -> float:
    """Refuse a δ outside (0, 1/C): with δ ≥ 1/C the release of one client's data would be allowed."""
    if not 0 < delta < 1 / clients:
        raise UsageError(
            f"delta = {delta!r} with {clients} clients.",
            f"above 0 and below 1/{clients}.",
            "with δ = 1/n a mechanism may publish all data of one client.",
            Change("delta", default_delta(clients)),
        )
    return delta


def selection_of(plan: Plan, clients: int, rounds: int) -> Selection:
    """The proof of the sampler of a plan with noise.

    Raises:
        UsageError: the plan has no noise with a proof, or its sampler has none.
    """
    selection = plan.sampler.selection(clients, rounds)
    if not plan.releases or selection is None:
        raise UsageError(
            f"ε of a plan with {plan.codec!r} and {plan.sampler!r}.",
            "Clip(...) >> Noise(...), and a sampler with a proof.",
            "ε follows from the noise on the sum of clipped updates, and from the chance of a client.",
            Part("Clip(1.0) >> Noise(1.0)", "codec"),
        )
    if noises_messages(plan.codec):
        # The server knows the clients of a round, and any two inputs are neighbours.
        return selection._replace(relation="replace one", rate=1.0, fixed_size=False)
    return selection


def _releases(plan: Plan, selection: Selection) -> Releases:
    event = plan.codec.event(selection.cohort)
    noise = math.inf if event is None else event.noise
    moved = 2 if selection.relation == "replace one" else 1
    fixed = selection.fixed_size and selection.rate < 1
    return Releases(noise / moved, selection.rounds, selection.rate, fixed)


def _missed(plan: Plan) -> float:
    """The chance that a round has no sum, because its cohort is too large or too small for a secure sum."""
    return 0.0 if plan.aggregator.secure is None else 2 * MISSED


def charge_of(plan: Plan, clients: int, round: int, again: bool) -> Charge:
    """The cost of one round.

    Args:
        plan: a plan with noise.
        clients: C, the number of clients.
        round: the number of the round, from 0.
        again: whether the round was charged before: its clients take part once more.
    """
    after = selection_of(plan, clients, round + 1)
    count = 1 if again else after.rounds - selection_of(plan, clients, round).rounds
    releases = _releases(plan, after)
    return Charge(releases.noise, releases.rate, releases.fixed_size, count, _missed(plan))


def epsilon_of(releases: Releases, delta: float, missed: float = 0.0) -> float:
    """ε at δ, of which a part pays for the distance of the noise from its distribution, and for rounds without a sum.

    Args:
        releases: the releases.
        delta: δ in (0, 1).
        missed: the chance that a round has no sum.
    """
    count = releases.count
    return _charged(lambda rest: accountant.least_epsilon(releases, rest), count, delta, count * missed)


def composed(charges: Iterable[Charge], delta: float) -> float:
    """ε of several charges, also of different mechanisms with one relation of neighbours.

    Args:
        charges: the charges of all rounds.
        delta: δ in (0, 1).
    Example:
        >>> once = Charge(2.0, 0.1, False, 1)
        >>> round(composed([once] * 10, 1e-5), 4)
        0.7985
    """
    counts = Counter[tuple[float, float, bool]]()
    lost = 0.0
    for noise, rate, fixed, count, missed in charges:
        counts[noise, rate, fixed] += count
        lost += count * missed
    groups = [Releases(n, count, q, fixed) for (n, q, fixed), count in counts.items() if count]
    if not groups:
        return 0.0
    if len(groups) == 1:
        return epsilon_of(groups[0], delta, lost / max(1, groups[0].count))
    return _charged(lambda rest: accountant.composed_epsilon(groups, rest), sum(g.count for g in groups), delta, lost)


def _charged(at: Any, count: int, delta: float, missed: float) -> float:
    """ε(δ − share), with a share of δ that pays for (1 + e^ε) times the distance of what runs from what is proved."""
    distance = max(1, count) * NUMBERS * DISTANCE + missed
    for share in (2.0**-20, 2.0**-10, 2.0**-5, 0.5):
        found = float(at(delta * (1 - share)))
        if (1 + math.exp(min(found, 700))) * distance <= delta * share:
            return found
    return math.inf
