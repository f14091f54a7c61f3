"""Local SGD and its family: steps that change by round, post-local SGD, DiLoCo and its outer gradients."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, far, regression, run, seeded, task_of
from quick_cases import by_turns
from torch import nn

from atoll import recipes
from atoll.base import grammar
from atoll.base.errors import RunError, UsageError
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Identity, Quantize
from atoll.plan.local import Gradient, Train
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS
from atoll.plan.round import step
from atoll.plan.schedule import Schedule, constant, cosine, exponential, hold, inverse, plateau, polynomial, warmup
from atoll.plan.schedule import step as stairs
from atoll.training import baselines

SIZES = (9, 5, 7, 4)
ADAM, KEEP = rules.adam(0.01), ("optimizer", "order")


def engine_of(body="lanes", sizes=SIZES):
    data = regression(sizes)
    return InProcessEngine(task_of(seeded(nn.Linear, 3, 1), data, body), data)


def bits(state):
    kept = state.memory.take(torch.arange(len(SIZES)))
    tensors = {"theta": state.model.theta, **state.optimizer, **kept}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


def in_turn(*lengths):
    """A schedule with the given values, one per round; the last value stays."""
    first, *rest = lengths
    return hold(first, rounds=1) >> in_turn(*rest) if rest else constant(first)


@pytest.mark.parametrize(("body", "keep"), by_turns(["lanes", "loop", "fused"], [(), ("order",), KEEP]))
def test_a_schedule_that_never_changes_is_its_number_bit_for_bit(body, keep):
    rule = rules.sgd(0.1) if body == "fused" else ADAM  # sgd: so that steps are part of the backward pass
    same = [Train(rule, steps=s, batch=3, keep=keep) for s in (3, hold(3, rounds=2) >> 3, cosine(3, rounds=9, end=3))]
    data = classification(SIZES, dtype=torch.float64) if body == "fused" else regression(SIZES)
    module = seeded(nn.Linear, 4, 3) if body == "fused" else seeded(nn.Linear, 3, 1)
    module = nn.Sequential(module)
    number, *schedules = [run(Plan(p, Mean()), InProcessEngine(task_of(module, data, body), data), 4)[0] for p in same]
    assert all(bits(number) == bits(other) for other in schedules)
    assert Train(rule, steps=constant(3), batch=3) == Train(rule, steps=3, batch=3)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([None, 1, 2, 4]), st.integers(0, 9))
def test_the_cut_of_steps_into_rounds_changes_no_bit_of_one_client(lengths, batch, seed):
    """Round boundaries do not change the order of a client's rows: θ is the same after the same number of steps."""
    part = Train(rules.sgd(0.05), steps=in_turn(*lengths), batch=batch, keep=("order",))
    cut, _ = run(Plan(part, Mean()), engine_of(sizes=(9,)), len(lengths), seed)
    whole, _ = run(Plan(replace(part, steps=sum(lengths)), Mean()), engine_of(sizes=(9,)), 1, seed)
    assert far(cut.model.theta, whole.model.theta) < 1e-12
    taken = [int(s.memory.take(torch.tensor([0]))["local/taken"]) for s in (cut, whole)]
    assert taken == [sum(lengths)] * 2


@pytest.mark.parametrize(("body", "switch"), by_turns(["lanes", "loop"], [1, 3]))
def test_post_local_sgd_switches_at_its_round_exactly(switch, body):
    """Before the switch the bits equal those of single steps, after it those of local SGD from the same state."""
    plan, engine = recipes.post_local_sgd(0.05, switch=switch, steps=4, batch=3), engine_of(body)
    before, after = (recipes.local_sgd(0.05, steps=n, batch=3) for n in (1, 4))
    state, _ = run(plan, engine, switch)
    other, _ = run(before, engine_of(body), switch)
    assert bits(state) == bits(other)
    for _ in range(2):
        state, _ = step(plan, state, engine)
        other, _ = step(after, other, engine)
    assert bits(state) == bits(other)
    assert bits(run(before, engine_of(body), switch + 2)[0]) != bits(state)


def test_before_it_switches_post_local_sgd_is_distributed_gradient_descent():
    post, gd = recipes.post_local_sgd(0.05, switch=4, steps=9, batch=None), recipes.distributed_gd(0.05)
    (a, reports), (b, _) = (run(plan, engine_of(), 4) for plan in (post, gd))
    assert far(a.model.theta, b.model.theta) < 1e-12
    assert [r.bytes_up for r in reports] == [reports[0].bytes_up] * 4


def test_in_flight_a_client_makes_the_steps_of_the_round_it_began_in():
    lengths = (5, 1, 3, 2, 4, 1, 2)
    plan = Plan(Train(ADAM, steps=in_turn(*lengths), batch=2, keep=KEEP), Mean(), pace=Buffered(1))
    state, reports = run(plan, engine_of(), len(lengths) + 4)
    taken = torch.zeros(len(SIZES), dtype=torch.int64)
    for report in reports:
        births = report.round - report.clients["staleness"]
        taken[report.clients["id"]] += torch.tensor([(*lengths, *[2] * 9)[b] for b in births.tolist()])
    assert max(int(r.clients["staleness"].max()) for r in reports) >= 3
    kept = state.memory.take(torch.arange(len(SIZES)))
    assert kept["local/taken"].tolist() == kept["local/optimizer.step"].tolist() == taken.tolist()


def test_steps_are_rounded_to_the_nearest():
    part = Train(rules.sgd(0.1), steps=cosine(16, rounds=4, end=1))
    assert [part.steps_at(t) for t in range(6)] == [16, 14, 8, 3, 1, 1]


@pytest.mark.parametrize(
    "schedule", [hold(1, rounds=3) >> 8, warmup(3) >> (hold(8, rounds=2) >> 1), cosine(9, rounds=5, end=1)], ids=repr
)
def test_it_reads_back(schedule):
    plan = Plan(Train(rules.sgd(0.1), steps=schedule, batch=3, keep=("order",)), Mean())
    again = grammar.parse(repr(plan), PARTS)
    assert again == plan and hash(again) == hash(plan) and repr(again) == repr(plan)


REFUSED = [
    constant(0.4),
    cosine(10, rounds=5),
    cosine(10, rounds=5, end=0.4),
    stairs(64, every=5, factor=0.5),
    exponential(64, decay=0.99),
    inverse(64),
    polynomial(10, rounds=5),
    plateau(10, end=1),
    hold(1, rounds=5) >> 0.3,
    hold(0.3, rounds=5) >> 3,
    hold(3, rounds=5) >> (hold(2, rounds=5) >> (hold(0.3, rounds=5) >> 3)),
    hold(3, rounds=5) >> (warmup(9) >> 3),
    warmup(20) >> 4,
]


@pytest.mark.parametrize("schedule", REFUSED, ids=repr)
def test_a_schedule_that_comes_below_one_step_is_refused_with_a_line_that_builds(schedule):
    with pytest.raises(UsageError) as refusal:
        Train(rules.sgd(0.1), steps=schedule, batch=3)
    assert isinstance(grammar.parse(refusal.value.line, PARTS), Train)


@dataclass(frozen=True, repr=False)
class Dips(Schedule):
    """Four steps, except for round 2, which has none."""

    def __call__(self, t, memory=None):
        return 0.2 if t == 2 else 4.0


def test_a_schedule_that_dips_below_one_step_ends_the_run_there():
    plan, engine = Plan(Train(rules.sgd(0.1), steps=Dips(), batch=3), Mean()), engine_of()
    state, _ = run(plan, engine, 2)
    with pytest.raises(RunError, match=r"0.2 steps in round 2"):
        step(plan, state, engine)


def test_baselines_make_as_many_steps_as_the_schedule_says():
    """Two clients of equal size: the pooled baseline makes the steps of both, twice the number per round."""
    data = regression((8, 8))
    plan = Plan(Train(rules.sgd(0.05), steps=hold(1, rounds=2) >> 3, batch=4, keep=("order",)), Mean())
    pooled, share = baselines._gathered(plan, data.sizes, torch.ones(2, dtype=torch.float64))
    assert share == 1.0 and [pooled.local.steps_at(t) for t in range(4)] == [2, 2, 6, 6]


def diloco_by_hand(engine, rounds, steps, lr):
    """Each worker has an AdamW of torch that is never reset; the server has torch's SGD with Nesterov momentum."""
    theta = nn.Parameter(engine.task.initial().theta.clone())
    outer = torch.optim.SGD([theta], 0.7, momentum=0.9, nesterov=True)
    data, sizes = engine.data, engine.data.sizes.tolist()
    workers = [nn.Parameter(theta.detach().clone()) for _ in sizes]
    inner = [torch.optim.AdamW([w], lr) for w in workers]
    for _ in range(rounds):
        move = torch.zeros_like(theta)
        for i, (worker, rule) in enumerate(zip(workers, inner, strict=True)):
            x, y = data.take(data.client_rows(i))
            worker.data.copy_(theta.data)
            for _ in range(steps):
                rule.zero_grad()
                (x @ worker[:3] + worker[3] - y).square().mean().backward()
                rule.step()
            move += (theta - worker).detach() * sizes[i] / sum(sizes)
        theta.grad = move
        outer.step()
    return theta.detach()


def test_diloco_is_torchs_optimizers_worker_by_worker():
    engine = engine_of("loop")
    state, _ = run(recipes.diloco(0.05, steps=3, batch=None), engine, 6)
    assert far(state.model.theta, diloco_by_hand(engine, 6, 3, 0.05)) < 1e-12
    assert state.memory.take(torch.arange(4))["local/optimizer.step"].tolist() == [18] * 4


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 99))
def test_eight_bits_change_an_outer_gradient_by_no_more_than_their_step_and_nothing_else(seed):
    """In the first step all workers are equal, so θ differs by at most 1.9 · 0.7 levels of the largest number."""
    whole, coarse = (recipes.diloco(0.05, steps=3, batch=2, codec=c) for c in (Identity(), Quantize(8)))
    (a, _), (b, _) = (run(plan, engine_of(), 1, seed) for plan in (whole, coarse))
    kept = [s.memory.take(torch.arange(4)) for s in (a, b)]
    assert all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])
    largest = 3 * 3 * 0.05  # no AdamW step moves a number by more than a few lr
    assert 0 < float((a.model.theta - b.model.theta).abs().max()) <= 1.9 * 0.7 * largest / 127


@pytest.mark.slow
def test_outer_gradients_in_eight_bits_train_as_well_at_a_quarter_of_the_bytes():
    data = classification((40, 40, 40, 40), (20,), 4)
    module = nn.Sequential(seeded(nn.Linear, 20, 64), nn.ReLU(), seeded(nn.Linear, 64, 4))
    engines = [InProcessEngine(task_of(module, data, "loop", torch.float32), data) for _ in range(2)]
    plans = (recipes.diloco(0.01, 5, 8, 0.4, codec=c) for c in (Identity(), Quantize(8)))
    whole, coarse = (run(plan, engine, 12)[1] for plan, engine in zip(plans, engines, strict=True))
    first, last, other = (r.metrics["loss"] for r in (whole[0], whole[-1], coarse[-1]))
    assert last < 0.5 * first and abs(other - last) < 0.05 * first
    d = engines[0].layout.d
    beside = whole[0].bytes_up - 4 * 4 * d  # the fields other than the update: the loss, its rows, the weight
    assert coarse[0].bytes_up == 4 * Quantize(8).bind(engines[0].layout).nbytes(engines[0].layout) + beside
    assert coarse[0].bytes_up < 0.27 * whole[0].bytes_up


def test_one_step_a_round_by_the_schedule_of_a_gradient():
    """`Train(sgd(1), steps=1)` and `Gradient()` are both one step of the server, for every schedule of its rate."""
    rate = cosine(0.1, rounds=4, end=0.01)
    a, _ = run(Plan(Train(rules.sgd(rate), steps=hold(1, rounds=4) >> 3), Mean()), engine_of(), 4)
    b, _ = run(Plan(Gradient(), Mean(), rules.sgd(rate)), engine_of(), 4)
    assert far(a.model.theta, b.model.theta) < 1e-12


@pytest.mark.parametrize("pace", [Sync(), Sync(deadline_s=100), Bounded(0)], ids=str)
def test_a_round_of_more_steps_takes_as_many_times_longer_on_the_clock(pace):
    data = regression(SIZES)
    engine = InProcessEngine(task_of(seeded(nn.Linear, 3, 1), data), data, fleet=Fleet(compute=2.0))
    plan = Plan(Train(rules.sgd(0.1), steps=in_turn(2, 4, 1), batch=3), Mean(), pace=pace)
    _, reports = run(plan, engine, 4)
    assert [report.now for report in reports] == [2.0, 6.0, 7.0, 8.0]
