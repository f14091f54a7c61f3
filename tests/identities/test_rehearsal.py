"""A rehearsal runs the real protocol of a secure sum, and changes no bit of the simulation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import atoll
from atoll.base.errors import RunError, UsageError
from atoll.base.random import Key
from atoll.cli import main
from atoll.data import IID
from atoll.plan import Plan
from atoll.plan.aggregate import Masks, Mean
from atoll.plan.aggregate.ring import grid_of, rounded
from atoll.plan.codec import AdaptiveClip, Clip, Noise, Rotate
from atoll.plan.codec.stage import flat_layout
from atoll.plan.local import Train
from atoll.plan.optimizer import sgd
from atoll.plan.round import enough
from atoll.plan.sampler import Everyone, Poisson, Uniform


@pytest.fixture(scope="module")
def digits():
    return atoll.data.load("digits").split(clients=12, by=atoll.data.Dirichlet(0.5))


def _plan(masks: Masks, **changes) -> Plan:
    slots = dict(
        local=Train(sgd(0.1), epochs=1, batch=10), aggregator=Mean(secure=masks), optimizer=sgd(1.0), cohort=Everyone()
    )
    return Plan(**{**slots, **changes})


def _theta(data, plan, engine: str, **settings) -> torch.Tensor:
    run = atoll.train("softmax", data, plan, out=None, engine=engine, **{"rounds": 2, "seed": 1, **settings})
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]), run


@pytest.mark.parametrize(
    ("masks", "settings"),
    [
        (Masks(bound=8.0, hybrid=False), {}),
        (Masks(bound=8.0, hybrid=False, ring=64), {"fleet": "Fleet(dropout=0.15)"}),
        (Masks(bound=8.0), {"rounds": 1}),
    ],
)
def test_a_rehearsal_changes_no_bit(digits, masks: Masks, settings) -> None:
    simulated, _ = _theta(digits, _plan(masks), "inprocess", **settings)
    rehearsed, run = _theta(digits, _plan(masks), "InProcess(rehearse=True)", **settings)
    torch.testing.assert_close(rehearsed, simulated, rtol=0, atol=0)
    assert all(report.arrived >= 9 for report in run.reports)


def test_a_cohort_of_few_has_no_update_in_both(digits) -> None:
    plan = _plan(Masks(bound=8.0, hybrid=False), cohort=Uniform(6))
    fleet = "Fleet(dropout=0.5)"
    simulated, first = _theta(digits, plan, "inprocess", fleet=fleet)
    rehearsed, second = _theta(digits, plan, "InProcess(rehearse=True)", fleet=fleet)
    torch.testing.assert_close(rehearsed, simulated, rtol=0, atol=0)
    assert [r.arrived for r in first.reports] == [r.arrived for r in second.reports]
    assert 0 in [r.arrived for r in first.reports]


def test_a_rehearsal_without_a_secure_sum_is_refused(digits) -> None:
    with pytest.raises(UsageError, match="A rehearsal with Mean"):
        _theta(digits, _plan(None), "InProcess(rehearse=True)")  # type: ignore[arg-type]


def test_a_threshold_that_protects_nothing_is_refused(digits) -> None:
    for threshold in (2, 8, 13):
        with pytest.raises(UsageError, match="threshold"):
            _theta(digits, _plan(Masks(bound=8.0, threshold=threshold)), "inprocess")


def _clipped(**changes) -> Plan:
    return _plan(
        Masks(hybrid=False), aggregator=Mean(weights="equal", secure=Masks(hybrid=False)), codec=Clip(1.0), **changes
    )


def test_a_clipped_plan_has_one_model_in_simulation_and_rehearsal(digits) -> None:
    simulated, _ = _theta(digits, _clipped(), "inprocess")
    for engine, settings in (("inprocess", {"chunk": 1}), ("InProcess(rehearse=True)", {})):
        other, _ = _theta(digits, _clipped(), engine, **settings)
        torch.testing.assert_close(other, simulated, rtol=0, atol=0)


@pytest.mark.slow
def test_a_clipped_plan_has_one_model_on_worker_processes(digits) -> None:
    simulated, _ = _theta(digits, _clipped(), "inprocess")
    processes, _ = _theta(digits, _clipped(), "Processes(workers=2)")
    torch.testing.assert_close(processes, simulated, rtol=0, atol=0)


_NOISED = {"aggregator": Mean(weights="equal", over="expected", secure=Masks(hybrid=False))}


def test_a_rehearsal_with_noise_changes_no_bit(digits) -> None:
    for codec in (Clip(1.0) >> Noise(1.0), AdaptiveClip() >> Noise(1.0)):
        plan = _plan(Masks(), **_NOISED, codec=codec)
        settings = {"randomness": "seed", "rounds": 1}
        simulated, _ = _theta(digits, plan, "inprocess", **settings)
        rehearsed, run = _theta(digits, plan, "InProcess(rehearse=True)", **settings)
        torch.testing.assert_close(rehearsed, simulated, rtol=0, atol=0)
        assert run.privacy["epsilon"] > 0


def test_noise_with_a_secure_sum_is_refused_without_a_proof(digits) -> None:
    noised = Clip(1.0) >> Noise(1.0)
    with pytest.raises(UsageError, match="a clip and noise as the codec"):
        _plan(Masks(), **_NOISED, codec=Clip(1.0) >> Rotate() >> Noise(1.0))
    with pytest.raises(UsageError, match="a finer grid"):
        rule = Mean(weights="equal", over="expected", secure=Masks(bits=12, hybrid=False))
        _theta(digits, _plan(Masks(), aggregator=rule, codec=noised), "inprocess")
    with pytest.raises(UsageError, match="one client could decide"):
        _theta(digits, _plan(Masks(), **_NOISED, codec=noised, cohort=Poisson(0.5)), "inprocess")
    with pytest.raises(UsageError, match="one client could decide"):
        _theta(digits, _plan(Masks(), **_NOISED, codec=noised, cohort=Uniform(5)), "inprocess")


def test_the_refusal_of_small_cohorts_names_the_clients_of_the_user_and_a_number_that_is_enough() -> None:
    plan = atoll.recipes.dp_fedavg(secure=True)
    with pytest.raises(UsageError, match=r"Poisson\(0.1\) of 20 clients: cohorts of 0 to 15") as caught:
        atoll.rounds("softmax", atoll.data.load("digits").split(20), plan, rounds=1)
    assert caught.value.line == "clients=640"
    enough = atoll.data.load("digits").split(640, IID(), min_rows=1)
    with atoll.rounds("softmax", enough, plan, rounds=1) as training:
        assert training.plan.releases


def test_rounding_enlarges_no_clipped_update_by_more_than_the_noise_covers() -> None:
    d, x = 4000, torch.randn(50, 4000, generator=torch.Generator().manual_seed(1))
    clip = Clip(0.5).bind(flat_layout(d))
    sent = clip.encode(x, {}, {}, Key(0).of(torch.arange(50)))[0]
    declared = clip.declare(flat_layout(d))["update"]
    for clients in (12, 1 << 13):  # 24 and 17 bits
        grid = grid_of(Masks(), declared, clients, 1, 1.0)
        moved = rounded(sent, grid, Key(0).of(torch.arange(50))).double() - sent.double()
        assert float(moved.abs().max()) <= 2.0**-grid.exponent
        assert float(moved.norm(dim=1).max()) <= math.sqrt(d) * 2.0**-grid.exponent <= 2.0**-11 * declared.bound


def test_a_round_of_few_ends_a_run_with_noise(digits) -> None:
    plan = _plan(Masks(), **_NOISED, codec=Clip(1.0) >> Noise(1.0))
    with pytest.raises(RunError, match="secure sum needs"):
        _theta(digits, plan, "inprocess", fleet="Fleet(dropout=0.8)")
    few = SimpleNamespace(arrived=torch.tensor([3]), started=9, void=True, failures=(), facts={}, _replace=dict)
    ended = enough(plan, SimpleNamespace(state=SimpleNamespace(round=2)), few)
    assert not len(ended["arrived"]) and ended["failures"][0].client == 3


def test_a_rehearsal_on_other_engines_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--rehearse", "--engine", "processes"]) == 2
    assert '--engine "InProcess(rehearse=True)"' in capsys.readouterr().err
