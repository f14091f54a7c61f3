"""Entropy: its numbers follow their distributions, no seed determines those of the system, and a round passes it on."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from problems import run

from atoll.base.errors import UsageError
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Identity
from atoll.plan.entropy import BytesEntropy, current_entropy, entropy_source
from atoll.plan.local import Gradient
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.testing import known_entropy
from atoll.testing.local import clients, problem


@dataclass(frozen=True, repr=False)
class Noise(Identity):
    """Adds a normal number to each coordinate of the sum."""

    uses_entropy = True

    def server_update(self, total, server, info, key):
        noise = info.entropy.normal(total.means["update"].shape, torch.float64)
        return total._replace(means={**total.means, "update": total.means["update"] + noise}), server


PLAN = Plan(Gradient(), Mean(), sgd(0.1), codec=Noise())


def theta(seed=None):
    engine = InProcessEngine(replace(problem(), numerics="lanes"), clients())
    if seed is None:
        return run(PLAN, engine, 2)[0].model.theta
    with entropy_source(known_entropy(seed)):
        return run(PLAN, engine, 2)[0].model.theta


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    n = 1 << 20
    z = known_entropy(3).normal((n,), torch.float64)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / n)
        assert abs(float((z**power).mean()) - moment) < 6 * spread  # odds of a false alarm: 2e-9 each
    pairs = z.view(2, -1)
    assert abs(float((pairs[0] * pairs[1]).mean())) < 6 / math.sqrt(n / 2)
    assert z.isfinite().all() and known_entropy(3).normal((2, 3), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("high", [1, 2, 3, 10, 3 << 60])
def test_integers_are_uniform(high):
    n = 1 << 16
    drawn = known_entropy(high).integers((n,), high)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < high
    if 1 < high <= 10:
        counts = torch.bincount(drawn, minlength=high)
        assert float((counts - n / high).abs().max()) < 6 * math.sqrt(n / high)


@pytest.mark.parametrize("high", [0, -1, 2**62 + 1])
def test_a_range_without_numbers_is_refused(high):
    with pytest.raises(UsageError) as caught:
        known_entropy().integers((3,), high)
    assert "integers((3,), 10)" in caught.value.line


def test_the_same_bytes_give_the_same_numbers_and_other_bytes_others():
    for shape in ((0,), (), (7,), (2, 3)):
        a, b = (known_entropy(5).normal(shape, torch.float64) for _ in range(2))
        assert a.shape == torch.Size(shape) and a.equal(b)
    assert not known_entropy(5).normal((7,), torch.float64).equal(known_entropy(6).normal((7,), torch.float64))
    assert (
        not current_entropy(bytes).normal((7,), torch.float64).equal(current_entropy(bytes).normal((7,), torch.float64))
    )


def test_ranks_agree_on_the_bytes_of_the_first():
    sent = []

    def agree(value):
        sent.append(value)
        return b"\1" * len(value)

    drawn = current_entropy(agree).normal((4,), torch.float64)
    assert len(sent) == 1 and drawn.equal(BytesEntropy(lambda n: b"\1" * n).normal((4,), torch.float64))


def test_runs_with_known_entropy_are_equal_and_with_that_of_the_system_differ():
    assert theta(1).equal(theta(1)) and not theta(1).equal(theta(2)) and not theta().equal(theta())


def test_a_replay_of_a_part_that_uses_entropy_is_refused():
    from atoll.tools.replay import _refuse_entropy

    _refuse_entropy(Plan(Gradient(), Mean()), "run")
    with pytest.raises(UsageError) as caught:
        _refuse_entropy(PLAN, "run")
    assert "Noise()" in caught.value.given and caught.value.line == "atoll show run"


def test_a_downlink_with_noise_is_refused():
    with pytest.raises(UsageError, match="a codec without noise"):
        Plan(Gradient(), Mean(), downlink=Noise())
