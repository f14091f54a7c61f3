"""Error feedback converges as in theory, in the training loop of the package.

    Jᵢ(θ) = ½ Σⱼ λᵢⱼ (θⱼ − aᵢⱼ)²,   J = mean of Jᵢ;   the clients' minima differ, so that no client's gradient
    vanishes at the minimum θ* of J

As a task: least squares over rows xⱼ = √(nλⱼ/2)·eⱼ, so that a client's (1/n) Σ (x·θ − y)² is its Jᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from problems import federation, task_of
from quick_cases import only
from torch import nn

from atoll.base.random import Key
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import EF21, Codec, Entropy, ErrorFeedback, Identity, Quantize, Sign, TopK
from atoll.plan.local import Gradient
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Local
from atoll.plan.round import bind, step
from atoll.plan.schedule import Schedule, inverse
from atoll.plan.state import State


class Bowls:
    """One quadratic per client with a minimum near 1, curvatures in [1 − bend/2, 1 + bend/2]."""

    def __init__(self, clients: int, d: int, spread: float = 1.0, bend: float = 1.0) -> None:
        key = Key(21).of(torch.arange(clients))
        lowest, curve = 1 + spread * key.fold("a").normal(d), 1 + bend * (key.fold("h").uniform(d) - 0.5)
        self.lowest, self.curve = lowest, curve
        self.best = (curve * lowest).sum(0) / curve.sum(0)
        root = (curve * d / 2).sqrt()
        data = federation(torch.diag_embed(root).view(-1, d), (root * lowest).flatten(), [d] * clients)
        module = nn.Linear(d, 1, bias=False)
        nn.init.zeros_(module.weight)
        self.engine = InProcessEngine(task_of(module, data, "fused"), data)

    def distances(
        self, codec: Codec, lr: float | Schedule, rounds: Sequence[int], cohort: float | None = None, lost: float = 0.0
    ) -> list[float]:
        """Compute |θ − θ*|/|θ₀ − θ*| after the given rounds, θ₀ = 0."""
        plan = Plan(Lossy(lost) if lost else Gradient(), Mean(), sgd(lr), cohort=cohort, codec=codec, max_failed=1.0)
        plan = bind(plan, self.engine)
        task, out, failed, asked = self.engine.task, [], 0, 0
        state = State.first(plan, task, 0, Memory(plan.memory(task)))
        for r in range(1, max(rounds) + 1):
            state, report = step(plan, state, self.engine)
            failed, asked = failed + len(report.failures), asked + report.cohort
            if r in rounds:
                out.append(float((state.model.theta - self.best).norm() / self.best.norm()))
        assert abs(failed / asked - lost) < 0.05
        return out

    def gap(self, distance: float) -> float:
        """Return the upper bound of J − J* for a distance."""
        return float(0.5 * self.curve.mean(0).max() * (distance * self.best.norm()) ** 2)


@dataclass(frozen=True, repr=False)
class Lossy(Local):
    """Full gradients, of which a fraction never arrives."""

    fraction: float

    def padded_batch(self, rows: int) -> int:
        return Gradient().padded_batch(rows)

    def contribute(self, broadcast, lanes, memory, key, task):
        contribution, after = Gradient().contribute(broadcast, lanes, memory, key, task)
        lost = Key(31).fold(broadcast.round).of(lanes.ids).uniform(1)[:, 0] < self.fraction
        update = torch.where(lost[:, None], math.nan, contribution.means["update"])
        return contribution._replace(means={**contribution.means, "update": update}), after


# ---- ErrorFeedback

ONE = {TopK(0.1): 300, TopK(0.2) >> Quantize(8): 300, Sign(): 600}


@pytest.mark.slow
@pytest.mark.parametrize("inner", ONE, ids=repr)
def test_feedback_reaches_the_optimum_of_one_client_at_a_constant_step(inner):
    """The gradient vanishes at θ*, and so does the stored error."""
    assert Bowls(1, 40).distances(ErrorFeedback(inner), 0.1, [ONE[inner]])[0] < 1e-6


@pytest.mark.slow  # the stall of plain top-k is also tested below
def test_top_k_stalls_and_error_feedback_does_not():
    """At a constant step, plain top-k stalls where the sent coordinates balance; with feedback the error is O(step)."""
    four = Bowls(4, 20)
    before, after = four.distances(TopK(0.2), 0.2, [100, 200])
    assert after > 0.2 and after > 0.95 * before
    (far,), (near,) = (four.distances(ErrorFeedback(TopK(0.2)), lr, [round(20 / lr)]) for lr in (0.2, 0.04))
    assert near < 0.35 * far and far < 0.5 * after


@pytest.mark.slow
@pytest.mark.parametrize("inner", [TopK(0.5), TopK(0.5) >> Quantize(8)], ids=repr)
def test_the_distance_of_unlike_clients_falls_with_a_falling_step(inner):
    """|θ − θ*| ~ γ ~ 1/t and J − J* ~ 1/t², below 1e-6; plain top-k stalls.

    θ stays at a distance of about γ ē from a path that reaches θ*, and the mean memory ē does not grow.
    """
    four = Bowls(4, 10, spread=0.1, bend=0.2)
    early, late = four.distances(ErrorFeedback(inner), inverse(4.0, t0=10), [75, 600])
    assert math.log(late / early, 8) == pytest.approx(-1, abs=0.35)
    assert four.gap(late) < 1e-6
    assert four.distances(inner, inverse(4.0, t0=10), [150])[0] > 20 * late


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_feedback_reaches_the_optimum_of_unlike_clients_at_a_falling_step():
    """The error falls to 1e-6 of |θ₀ − θ*|.

    The error is 0.4 · spread/t. Clients that differ by a hundredth of |θ₀ − θ*| need 4,000 rounds; clients that
    differ by all of it need 400,000.
    """
    four = Bowls(4, 10, spread=0.01, bend=0.2)
    assert four.distances(ErrorFeedback(TopK(0.5)), inverse(2.0, t0=5), [8000])[0] < 1e-6
    assert four.distances(TopK(0.5), inverse(2.0, t0=5), [1000])[0] > 1e-4


# ---- EF21

WAYS = {"all": (None, 0.0, 0.3, 150), "lost": (None, 0.3, 0.3, 200), "part": (0.25, 0.0, 0.1, 600)}


@pytest.mark.parametrize("inner", only([TopK(0.2) >> Quantize(8)], [TopK(0.2), TopK(0.2) >> Quantize(8)]), ids=repr)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_shift_reaches_the_optimum_of_unlike_clients_at_a_constant_step(inner, way):
    cohort, lost, lr, rounds = WAYS[way]
    assert Bowls(8, 20).distances(EF21(inner), lr, [rounds], cohort, lost)[0] < 1e-6


def test_a_shift_of_nothing_lost_is_plain_descent():
    four = Bowls(4, 20)
    plain, shifted = (four.distances(codec, 0.3, [30])[0] for codec in (Identity(), EF21(Identity())))
    assert shifted == pytest.approx(plain, rel=1e-9)


@pytest.mark.slow
def test_a_shift_falls_at_a_steady_rate():
    """The second forty rounds gain the same number of digits as the first; lossless compression changes nothing."""
    eight = Bowls(8, 20)
    plain, packed = (
        eight.distances(codec, 0.3, [40, 80, 120])
        for codec in (EF21(Identity() >> TopK(0.2)), EF21(Identity() >> TopK(0.2) >> Entropy()))
    )
    first, second = (math.log(b / a) for a, b in pairwise(plain))
    assert plain == packed
    assert second == pytest.approx(first, rel=0.25) and first < -2
