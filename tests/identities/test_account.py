"""The cost of a plan: the table of samplers, adaptive clips, the inverse, and the composition of charges."""

import math

import pytest
from quick_cases import one_in

from atoll import privacy, recipes
from atoll.base.errors import UsageError
from atoll.plan.aggregate import Mean
from atoll.plan.codec import AdaptiveClip, Clip, Noise, Rotate
from atoll.plan.local import Gradient
from atoll.plan.plan import Plan
from atoll.plan.sampler import Everyone, Fraction, Poisson, RoundRobin, Uniform
from atoll.privacy import accountant
from atoll.privacy.account import Charge, charge_of, composed, default_delta
from atoll.privacy.accountant import Releases

FAIR = Mean(weights="equal", over="expected")


def plan(cohort, z=2.0, codec=None):
    return Plan(Gradient(), FAIR, cohort=cohort, codec=codec or Clip(1.0) >> Noise(z))


@pytest.mark.parametrize(("cohort", "clients", "rounds", "relation", "releases"), [
    (Poisson(0.1), 1000, 50, "add or remove", Releases(2.0, 50, 0.1)),
    (Everyone(), 40, 7, "add or remove", Releases(2.0, 7)),
    (Uniform(10), 1000, 30, "replace one", Releases(1.0, 30, 0.01, True)),
    (Fraction(0.05), 1000, 30, "replace one", Releases(1.0, 30, 0.05, True)),
    (Uniform(40), 40, 7, "replace one", Releases(1.0, 7)),
    (RoundRobin(10), 40, 4, "zero out", Releases(2.0, 1)), (RoundRobin(10), 40, 5, "zero out", Releases(2.0, 2)),
    (RoundRobin(10), 45, 5, "zero out", Releases(2.0, 2)), (RoundRobin(10), 45, 6, "zero out", Releases(2.0, 4)),
])  # fmt: skip
def test_each_row_of_the_table_of_samplers(cohort, clients, rounds, relation, releases):
    found = privacy.account(plan(cohort), clients=clients, rounds=rounds, delta=1e-5)
    assert (found.relation, found.releases, found.unit) == (relation, releases, "client")
    assert found.epsilon == pytest.approx(accountant.least_epsilon(releases, 1e-5), rel=1e-5)
    assert relation in found.text() and found.accountant in found.text()
    charges = [charge_of(plan(cohort), clients, t, False) for t in range(rounds)]
    assert sum(c.rounds for c in charges) == releases.count and composed(charges, 1e-5) == found.epsilon


@pytest.mark.parametrize(("cohort", "clients", "count"), [
    (Poisson(0.1), 1000, 5), (Everyone(), 40, 5), (Uniform(10), 1000, 5), (RoundRobin(10), 40, 2),
    (RoundRobin(10), 45, 2),
])  # fmt: skip
def test_noise_of_the_clients_costs_each_message_without_amplification(cohort, clients, count):
    """Any two inputs of a client are neighbours: the sensitivity is 2, and the server knows the cohort."""
    local = plan(cohort, codec=Clip(1.0) >> Noise(4.0, by="client"))
    found = privacy.account(local, clients=clients, rounds=5, delta=1e-5)
    assert (found.relation, found.releases) == ("replace one", Releases(2.0, count))
    charges = [charge_of(local, clients, t, False) for t in range(5)]
    assert sum(c.rounds for c in charges) == count and composed(charges, 1e-5) == found.epsilon
    z = privacy.noise_for(local, clients=clients, rounds=5, delta=1e-5, epsilon=found.epsilon)
    assert z == pytest.approx(4.0, abs=2e-3)


def test_round_robin_takes_a_client_as_often_as_it_is_charged():
    import torch

    from atoll.base.random import Key
    from atoll.plan.protocols import Population

    for clients, n in ((40, 10), (45, 10), (7, 3)):
        taken = torch.zeros(clients, dtype=torch.int64)
        for t in range(20):
            ids = RoundRobin(n)(Population(clients, torch.ones(clients, dtype=torch.int64)), t, Key(3)).ids
            taken[ids] += 1
            assert int(taken.max()) <= RoundRobin(n).selection(clients, t + 1).rounds


def test_the_first_example_of_the_manual():
    it = recipes.dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=0.1)
    assert privacy.epsilon(it, clients=1000, rounds=10, delta=1e-5) == pytest.approx(0.7985, abs=1e-4)
    assert privacy.epsilon(it, clients=1000, rounds=11, delta=1e-5) == pytest.approx(0.8305, abs=1e-4)


def test_the_count_of_an_adaptive_clip_costs():
    fixed, adaptive = plan(Everyone()), plan(Everyone(), codec=AdaptiveClip(count=3.0) >> Noise(2.0))
    both = accountant.least_epsilon(Releases((1 / 4 + 1 / 36) ** -0.5, 5), 1e-5)
    assert privacy.epsilon(adaptive, clients=50, rounds=5, delta=1e-5) == pytest.approx(both, rel=1e-5)
    assert privacy.epsilon(fixed, clients=50, rounds=5, delta=1e-5) < both


def test_a_rotation_and_the_clip_change_no_cost():
    same = [Clip(1.0) >> Noise(2.0), Clip(9.0) >> Rotate() >> Noise(2.0)]
    first, second = (privacy.epsilon(plan(Everyone(), codec=c), clients=50, rounds=5, delta=1e-5) for c in same)
    assert first == second


@pytest.mark.parametrize("cohort", one_in(2, [Uniform(10), Poisson(0.2), Everyone(), RoundRobin(5)]))
def test_noise_for_inverts_epsilon(cohort):
    words = {"clients": 100, "rounds": 12, "delta": 1e-4}
    z = privacy.noise_for(plan(cohort, z=9.0), epsilon=2.0, **words)
    assert privacy.epsilon(plan(cohort, z=z), **words) <= 2.0 + 1e-9
    assert privacy.epsilon(plan(cohort, z=0.995 * z), **words) > 2.0


def test_charges_add_up_and_a_repeated_round_counts_again():
    once = charge_of(plan(RoundRobin(10)), 40, 1, False)
    assert once.rounds == 0 and charge_of(plan(RoundRobin(10)), 40, 1, True).rounds == 1
    groups = [Charge(2.0, 0.1, False, 1)] * 10 + [Charge(1.5, 0.05, False, 1)] * 10
    whole = composed(groups, 1e-5)
    assert composed(groups[:10], 1e-5) < whole <= composed(groups[:10], 1e-5) + composed(groups[10:], 1e-5) + 1
    same = [Charge(2.0, 0.1, False, 1)] * 10 + [Charge(2.0 + 1e-12, 0.1, False, 1)] * 10
    rdp = accountant.rdp_epsilon(Releases(2.0, 20, 0.1), 1e-5)
    assert composed(same, 1e-5) == pytest.approx(rdp, rel=1e-5)
    assert composed([], 1e-5) == 0.0


def test_a_secure_sum_costs_the_chance_of_a_round_without_a_sum():
    words = {"clients": 1000, "rounds": 10, "delta": 1e-5}
    open, secure = (recipes.dp_fedavg(0.5, clip=0.5, noise=2.0, q=0.1, secure=flag) for flag in (False, True))
    assert 0 < privacy.epsilon(secure, **words) - privacy.epsilon(open, **words) < 1e-3
    charges = [charge_of(secure, 1000, t, False) for t in range(10)]
    assert composed(charges, 1e-5) == pytest.approx(privacy.epsilon(secure, **words), rel=1e-9)
    # δ = 2⁻³⁷ is less than the chance that one of ten rounds has no sum.
    assert privacy.epsilon(secure, **{**words, "delta": 2.0**-37}) == math.inf


def test_the_default_delta_is_a_power_of_ten():
    assert [default_delta(n) for n in (1, 10, 11, 100, 1000)] == [0.1, 0.01, 0.001, 0.001, 0.0001]
    assert all(default_delta(n) <= 1 / (10 * n) < 10 * default_delta(n) + 1e-15 for n in range(1, 300))


@pytest.mark.parametrize("delta", [0.0, -1.0, 0.01, 1.0])
def test_a_delta_of_one_client_or_more_is_refused(delta):
    with pytest.raises(UsageError, match="below 1/100"):
        privacy.epsilon(plan(Everyone()), clients=100, rounds=1, delta=delta)


def test_a_plan_without_noise_has_no_epsilon():
    for codec in (Clip(1.0), AdaptiveClip()):
        with pytest.raises(UsageError, match="Noise"):
            privacy.epsilon(plan(Everyone(), codec=codec), clients=100, rounds=1)
    with pytest.raises(UsageError, match="a larger ε"):
        adaptive = plan(Everyone(), codec=AdaptiveClip(count=0.5) >> Noise(1.0))
        privacy.noise_for(adaptive, clients=100, rounds=10, epsilon=0.1)
