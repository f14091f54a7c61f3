"""Samplers: the stated selection probabilities are the actual ones.

A frequency over independent draws may be off by t if Bernstein's inequality gives at most 1e-9 for more. With fewer
than a hundred frequencies in a test, a correct sampler fails one once in ten million seeds.
"""

import itertools
import math
import time
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import classification, federation, run, seeded, task_of
from quick_cases import by_turns, one_in, only
from torch import nn

import atoll
from atoll import recipes
from atoll.base import grammar
from atoll.base.errors import RunError, UsageError
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.aggregate.mean import weights_by_chance
from atoll.plan.local import Gradient
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids, Population
from atoll.plan.registry import PARTS
from atoll.plan.sampler import Everyone, Fraction, Poisson, PowerOfChoice, RoundRobin, Uniform, Weighted
from atoll.testing import round_info

DRAWS = 500
SIZES = torch.tensor([1, 2, 3, 4, 10, 40])
SMALL = Population(6, SIZES)
SAMPLERS = [Everyone(), Uniform(2), Uniform(5), Poisson(0.3), Fraction(0.4), Weighted(1), Weighted(2), Weighted(4)]
SAMPLERS += [RoundRobin(2), RoundRobin(4)]
QUICK = [Everyone(), Uniform(5), Poisson(0.3), Fraction(0.4), Weighted(4), RoundRobin(4)]


def band(p, draws, alarm=1e-9):
    """The tolerance of a frequency of chance p: P(|f − p| ≥ t) ≤ 2 exp(−draws t² / (2 (p(1−p) + t/3)))."""
    a = math.log(2 / alarm) / draws
    return a / 3 + math.sqrt((a / 3) ** 2 + 2 * a * p * (1 - p))


def cohorts(sampler, population, draws, round=0):
    return [sampler(population, round, Key(seed).fold("cohort")) for seed in range(draws)]


@cache
def small(sampler, round=0):
    return cohorts(sampler, SMALL, DRAWS, round)


@pytest.mark.parametrize("sampler", one_in(2, only(QUICK, SAMPLERS)), ids=repr)
def test_chances_are_those_that_are_stated(sampler):
    for round in (0, 1) if isinstance(sampler, RoundRobin) else (0,):
        drawn = small(sampler, round)
        count = torch.cat([cohort.ids for cohort in drawn]).bincount(minlength=6)
        chance = drawn[0].chance.expand(6)
        for got, p in zip((count / DRAWS).tolist(), chance.tolist(), strict=True):
            assert abs(got - p) <= band(p, DRAWS)


@pytest.mark.parametrize("sampler", one_in(2, only(QUICK, SAMPLERS)), ids=repr)
def test_a_cohort_is_sorted_without_repetition_and_of_the_stated_size(sampler):
    for cohort in small(sampler)[:100]:
        assert cohort.ids.dtype == torch.int64 and cohort.chance.dtype == torch.float64
        assert cohort.ids.tolist() == sorted(set(cohort.ids.tolist()))
        assert all(0 <= i < 6 for i in cohort.ids.tolist())
        if not isinstance(sampler, Poisson):
            assert math.isclose(len(cohort.ids), cohort.chance.expand(6).sum())


def test_every_set_of_two_is_as_likely():
    sets = Counter(tuple(cohort.ids.tolist()) for cohort in small(Uniform(2)))
    assert set(sets) == set(itertools.combinations(range(6), 2))
    assert all(abs(n / DRAWS - 1 / 15) <= band(1 / 15, DRAWS) for n in sets.values())


def test_a_few_of_many_are_as_likely_as_each_other():
    """Fewer than a quarter: drawn one by one. No client, no position and no pair is preferred."""
    many = Population(40, torch.ones(40, dtype=torch.int64))
    drawn = torch.stack([cohort.ids for cohort in cohorts(Uniform(3), many, DRAWS)])
    assert ((drawn.flatten().bincount(minlength=40) / DRAWS - 3 / 40).abs() <= band(3 / 40, DRAWS)).all()
    together = ((drawn < 20).sum(1) == 3).double().mean()
    all_low = math.comb(20, 3) / math.comb(40, 3)
    assert abs(together - all_low) <= band(all_low, DRAWS)


def test_coins_are_thrown_one_by_one():
    heads = torch.zeros(DRAWS, 6)
    for row, cohort in zip(heads, small(Poisson(0.3)), strict=True):
        row[cohort.ids] = 1
    for i, j in itertools.combinations(range(6), 2):
        assert abs((heads[:, i] * heads[:, j]).mean() - 0.09) <= band(0.09, DRAWS)
    sizes = heads.sum(1).long().bincount(minlength=7)
    for n, got in enumerate((sizes / DRAWS).tolist()):
        p = math.comb(6, n) * 0.3**n * 0.7 ** (6 - n)
        assert abs(got - p) <= band(p, DRAWS)


@given(st.integers(1, 30), st.floats(0.001, 1.0))
def test_a_fraction_is_rounded_and_at_least_one(clients, q):
    population = Population(clients, torch.ones(clients, dtype=torch.int64))
    (cohort,) = cohorts(Fraction(q), population, 1)
    assert len(cohort.ids) == max(1, math.floor(q * clients + 0.5))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.data())
def test_large_clients_are_drawn_for_certain_and_the_rest_in_proportion(sizes, data):
    n, sizes = data.draw(st.integers(1, len(sizes))), torch.tensor(sizes)
    (cohort,) = cohorts(Weighted(n), Population(len(sizes), sizes), 1)
    chance = cohort.chance.expand(len(sizes))
    assert len(cohort.ids.unique()) == n and math.isclose(chance.sum(), n)
    certain = chance == 1
    assert certain[cohort.ids].sum() == certain.sum()
    rest = ~certain
    if rest.any():
        per_row = chance[rest] / sizes[rest]
        assert torch.allclose(per_row, per_row[0].expand_as(per_row), rtol=1e-12)
        assert (sizes[certain] * per_row[0] >= 1 - 1e-12).all()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_round_robin_takes_each_client_once_a_cycle(clients, n, lap):
    n = min(n, clients)
    population = Population(clients, torch.ones(clients, dtype=torch.int64))
    turns = -(-clients // n)
    worked = [
        RoundRobin(n)(population, lap * turns + t, Key(7).fold("round", lap * turns + t)).ids for t in range(turns)
    ]
    count = torch.cat(worked).bincount(minlength=clients)
    assert (count >= 1).all() and all(len(ids) == n for ids in worked)
    if clients % n == 0:
        assert (count == 1).all()


def starts(cohort):
    return Ids(cohort.ids, torch.zeros_like(cohort.ids))


def facts(cohort):
    return round_info(SMALL)._replace(chance=cohort.chance, cohort_size=len(cohort.ids))


G = torch.tensor([[1.0], [-1.0], [0.5], [1.0], [-0.5], [0.25]], dtype=torch.float64)


def updates(mean, sampler, draws):
    """The update of each draw: its clients send the rows of G. The aggregator knows the chances, as in a training."""
    mean = mean.bind(SMALL, small(sampler)[0].chance)
    for cohort in small(sampler)[:draws]:
        ids, partial = cohort.ids, mean.zero()
        if len(ids):
            partial = mean.fold(partial, Contribution({"update": G[ids]}, {}, SIZES[ids], {}, {}), starts(cohort))
        yield float(mean.finalize(mean.total(partial), facts(cohort)).means.get("update", 0.0))


def target(weights):
    """Σ wᵢgᵢ / Σ wᵢ over all clients: the documented target of `Mean`."""
    w = SIZES.double() if weights == "examples" else torch.ones(6, dtype=torch.float64)
    return float((w * G[:, 0]).sum() / w.sum())


def off(values, expected):
    """The distance of the mean of values from an expected value, in standard errors."""
    values = torch.tensor(values, dtype=torch.float64)
    error = max(float(values.std()) / math.sqrt(len(values)), 1e-12)
    return abs(float(values.mean()) - expected) / error


@pytest.mark.parametrize(("sampler", "weights"), one_in(3, by_turns(SAMPLERS, ["examples", "equal"])), ids=repr)
def test_over_expected_is_unbiased(sampler, weights):
    """E g = Σ wᵢgᵢ / Σ wᵢ for every sampler, also if the chances differ and one client is certain."""
    assert off([*updates(Mean(weights=weights, over="expected"), sampler, 200)], target(weights)) <= 3


@pytest.mark.parametrize("n", one_in(3, [2, 1, 4]))
def test_clients_drawn_by_rows_give_the_mean_of_the_rows(n):
    """Σ wᵢ/pᵢ is the same for every cohort of `Weighted`, so `over="arrived"` has the same bits as "expected"."""
    arrived, expected = ([*updates(Mean(over=over), Weighted(n), 200)] for over in ("arrived", "expected"))
    assert off(arrived, target("examples")) <= 3
    assert max(abs(a - b) for a, b in zip(arrived, expected, strict=True)) < 1e-15


@given(st.lists(st.integers(1, 500), min_size=2, max_size=12), st.data())
def test_weights_by_chance_are_in_proportion_to_the_quotients(sizes, data):
    sizes = torch.tensor(sizes)
    chance = Weighted(data.draw(st.integers(1, len(sizes) - 1)))(Population(len(sizes), sizes), 0, Key(0)).chance
    for weights, error in ((sizes, 1e-12), (torch.ones_like(sizes), 1e-4)):
        ratio = weights_by_chance(weights, chance) * chance / weights
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=error)


def test_a_training_with_clients_drawn_by_rows_lands_on_the_mean_of_the_rows():
    """Case 27: from w = 0 a step of rate 0.5 on (w − t)² ends at the mean target of the cohort, here exactly 0.2."""
    sizes, targets = [80, 10, 10], [0.0, 1.0, 1.0]
    y = torch.cat([torch.full((n,), t) for n, t in zip(sizes, targets, strict=True)])
    data = federation(torch.ones(100, 1), y, sizes)
    net = seeded(nn.Linear, 1, 1, False)
    task = task_of(net, data, "loop", torch.float32)
    for weights, ends in (("examples", 0.2), ("equal", 2 / 3)):
        plan = Plan(Gradient(), Mean(weights=weights), sgd(0.5), cohort=Weighted(2))
        state, _ = run(plan, InProcessEngine(task, data), 1, init=torch.zeros(1))
        assert math.isclose(float(state.model.theta), ends, rel_tol=1e-6)


def test_a_sum_of_clients_drawn_by_rows_is_refused():
    with pytest.raises(UsageError, match="a sum does not divide by the probability") as caught:
        Plan(Gradient(), Sum(), cohort=Weighted(2))
    assert caught.value.write == "Mean()"


def test_chances_that_change_are_refused():
    mean = Mean().bind(SMALL, small(Weighted(2))[0].chance)
    partial = mean.fold(
        mean.zero(), Contribution({"update": G}, {}, SIZES, {}, {}), Ids(torch.arange(6), torch.zeros(6))
    )
    with pytest.raises(RunError, match="other chances in round 0"):
        mean.finalize(mean.total(partial), facts(small(Weighted(1))[0]))


def test_over_expected_divides_by_one_number_for_any_arrivals():
    """The influence of a client does not depend on the rest of the cohort. A bound on sensitivity needs this."""
    mean, g = Mean(over="expected"), torch.ones(6, 1, dtype=torch.float64)
    for cohort in cohorts(Poisson(0.5), SMALL, 50):
        if not len(cohort.ids):
            continue
        contribution = Contribution({"update": g[cohort.ids]}, {}, SIZES[cohort.ids], {}, {})
        total = mean.total(mean.fold(mean.zero(), contribution, starts(cohort)))
        got = mean.finalize(total, facts(cohort)).means["update"]
        assert math.isclose(float(got), int(SIZES[cohort.ids].sum()) / (0.5 * 60))


@pytest.mark.parametrize("make", [Uniform, Weighted, RoundRobin])
def test_a_cohort_larger_than_the_population_is_refused_with_a_line_that_works(make):
    with pytest.raises(UsageError, match="7 clients out of 6") as caught:
        make(7)(SMALL, 0, Key(0))
    assert len(grammar.parse(caught.value.line, PARTS)(SMALL, 0, Key(0)).ids) == 6


MILLION = Population(10**6, torch.arange(10**6) % 50 + 1)


@pytest.mark.parametrize(
    "sampler", [Uniform(100), Poisson(1e-4), Weighted(100), RoundRobin(100), Fraction(1e-4)], ids=repr
)
def test_a_million_clients_are_cheap(sampler):
    """At most a sort of a million numbers: one second of CPU time, while a loop in Python takes many."""
    began = time.process_time()
    cohort = sampler(MILLION, 3, Key(0))
    assert time.process_time() - began < 3.0
    assert 50 <= len(cohort.ids) <= 160 and len(cohort.ids.unique()) == len(cohort.ids)


def test_a_round_of_five_out_of_a_million_is_cheap():
    x = torch.randn(10**6, 2, generator=torch.Generator().manual_seed(0))
    data = federation(x, x.sum(1), [1] * 10**6)
    engine = InProcessEngine(task_of(seeded(nn.Linear, 2, 1), data, "lanes", torch.float32), data)
    plan = Plan(recipes.local_sgd(0.1, 3, 1).local, Mean(), cohort=5)
    began = time.process_time()
    state, reports = run(plan, engine, 2)
    assert time.process_time() - began < 5.0
    assert [report.arrived for report in reports] == [5, 5] and len(state.memory.touched()) <= 10


# PowerOfChoice


def test_the_largest_losses_of_the_candidates_are_selected():
    population, key = Population(9, torch.arange(1, 10)), Key(3)
    sampler, losses = PowerOfChoice(2, 5), torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0, 8.0])
    candidates = Weighted(5)(population, 0, key)
    cohort = sampler.with_memory({"loss": losses})(population, 0, key)
    best = candidates.ids[losses[candidates.ids].argsort(descending=True)[:2]].sort().values
    assert torch.equal(cohort.ids, best)
    torch.testing.assert_close(cohort.chance, candidates.chance * 2 / 5)
    same = PowerOfChoice(5, 5).with_memory({"loss": losses})(population, 0, key)
    assert torch.equal(same.ids, candidates.ids) and torch.equal(same.chance, candidates.chance)


def test_unknown_losses_are_the_largest_and_a_round_is_observed():
    sampler, population = PowerOfChoice(2, 3), Population(3, torch.tensor([5, 5, 5]))
    first = sampler.memory(population)
    found = sampler.observe(first, torch.tensor([0, 2]), {"loss": torch.tensor([0.5, torch.inf])})
    assert found["loss"].tolist() == [0.5, torch.inf, torch.inf]
    assert sampler.with_memory(found)(population, 1, Key(0)).ids.tolist() == [1, 2]
    assert sampler.observe(found, torch.tensor([], dtype=torch.int64), {}) is found
    with pytest.raises(RunError, match="report no loss"):
        sampler.observe(found, torch.tensor([1]), {"bytes": torch.tensor([1])})


def test_the_memory_of_a_sampler_is_resumed(tmp_path):
    data = classification((12, 9, 9, 7, 5))
    plan = replace(recipes.fedavg(0.1), cohort=PowerOfChoice(2, 4))
    whole = atoll.train("softmax", data, plan, rounds=6, out=None)
    half = atoll.train("softmax", data, plan, rounds=3, out=tmp_path, report=False)
    again = atoll.train("softmax", data, plan, rounds=6, resume=half.path, report=False)
    assert again.reports[-1].fingerprint == whole.reports[-1].fingerprint
    assert [r.clients["id"].tolist() for r in whole.reports[-3:]] == [
        r.clients["id"].tolist() for r in again.reports[-3:]
    ]


def test_refused_with_power_of_choice():
    plan = recipes.fedavg(0.1, cohort=PowerOfChoice(2, 4))
    for make, words in (
        (lambda: PowerOfChoice(3, 2), "at least n"),
        (lambda: replace(plan, aggregator=Mean("equal", secure=True)), "single clients"),
        (lambda: replace(plan, aggregator=Mean(over="expected")), "not known"),
        (lambda: replace(plan, pace=Buffered(2)), "Buffered"),
    ):
        with pytest.raises(UsageError, match=words):
            make()
