"""Corrections for unequal clients: the theorem of each paper on least squares, degenerate cases, and refusals."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from fedprox import fedprox as foreign_fedprox
from problems import COMPILED, classification, far, federation, run, seeded, task_of
from quick_cases import by_turns, one_in
from scaffold import Scaffold as ForeignScaffold
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, Identity, TopK
from atoll.plan.local import (
    CORRECTIONS,
    Calibrated,
    Dynamic,
    Extrapolated,
    Fair,
    MimeLite,
    Normalised,
    Proximal,
    Scaffold,
    Train,
    correction,
)
from atoll.plan.optimizer.rules import adam, adamw, sgd
from atoll.plan.pace import Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, StepFacts
from atoll.plan.registry import read_part
from atoll.plan.sampler import Weighted
from atoll.plan.schedule import cosine
from atoll.training.experiment import Experiment

D, LR, STEPS = 3, 0.05, 10
WIDE = torch.float64


@cache
def clients(few=17, many=18):
    """Twenty clients of least squares with different curvatures and minima, and few or many rows by turns."""
    key, sizes = Key(11), [many if i % 2 else few for i in range(20)]
    xs, ys = [], []
    for i, n in enumerate(sizes):
        own = key.fold(i)
        scale = 0.8 + 0.6 * own.fold("scale").uniform(D, WIDE)
        q = torch.linalg.qr(own.fold("x").normal(n * D).reshape(n, D)).Q
        xs.append(n**0.5 * q * scale)
        ys.append(xs[-1] @ (1 + 9 * (scale - 1) * own.fold("w").normal(D)))
    return federation(torch.cat(xs), torch.cat(ys), sizes)


def parts(data):
    """H, the minimum and the weight of each client: ℓᵢ(θ) = ½ (θ − x*)ᵀ H (θ − x*) + const."""
    x, y, weights = data.rows.x, data.rows.y, data.sizes.double() / data.sizes.sum()
    rows = [slice(a, b) for a, b in itertools.pairwise(data.offsets.tolist())]
    curvatures = torch.stack([2 * x[s].T @ x[s] / len(x[s]) for s in rows])
    minima = torch.stack([torch.linalg.lstsq(x[s], y[s, None]).solution[:, 0] for s in rows])
    return curvatures, minima, weights


def optimum(data=None, times=1):
    """The minimum of Σ w ℓ, with the weights w times some factors."""
    h, minima, w = parts(data or clients())
    w = w * times
    return torch.linalg.solve((w[:, None, None] * h).sum(0), (w[:, None, None] * h @ minima[..., None]).sum(0))[:, 0]


def fixed_point(mu=0.0):
    """θ = Σ w y_K(θ), with y_K after K steps against H(y − x*) + μ(y − θ)."""
    h, minima, w = parts(clients())
    eye = torch.eye(D, dtype=WIDE)
    b = h + mu * eye
    power = torch.linalg.matrix_power(eye - LR * b, STEPS)
    # y_K = P θ + (I − P) B⁻¹ (H x* + μ θ)
    of_theta = power + (eye - power) @ torch.linalg.inv(b) * mu
    constant = ((eye - power) @ torch.linalg.solve(b, h @ minima[..., None]))[..., 0]
    left = eye - (w[:, None, None] * of_theta).sum(0)
    return torch.linalg.solve(left, (w[:, None] * constant).sum(0))


def theta(correction=None, rounds=45, cohort=None, server=1.0, momentum=0.0, fleet=None, numerics="fused", **more):
    data = clients()
    local = Train(sgd(LR, momentum=momentum), **{"steps": STEPS, **more}, correction=correction)
    task = task_of(seeded(lambda: nn.Linear(D, 1, bias=False)), data, numerics, WIDE)
    state, _ = run(Plan(local, Mean(), sgd(server), cohort), InProcessEngine(task, data, fleet=fleet), rounds)
    return state.model.theta


def off(found, want=None):
    want = optimum() if want is None else want
    return float((found - want).norm() / want.norm())


# theorems


@pytest.mark.slow
def test_fedavg_has_the_bias_of_its_closed_form():
    found = theta()
    assert off(found) > 0.05 and off(found, fixed_point()) < 1e-6


def test_fedprox_has_its_closed_form():
    found = theta(Proximal(1.5))
    assert off(found, fixed_point(1.5)) < 1e-6 and off(found) > 1e-3


@pytest.mark.parametrize("correction", one_in(2, [Scaffold(), Scaffold("update")]))
def test_scaffold_reaches_the_optimum(correction):
    assert off(theta(correction)) < 1e-10


@pytest.mark.slow
def test_scaffold_reaches_the_optimum_with_lost_messages():
    assert off(theta(Scaffold(), fleet=Fleet(dropout=0.3), rounds=70)) < 1e-10


@pytest.mark.slow
def test_scaffold_reaches_the_optimum_with_momentum():
    assert off(theta(Scaffold(), momentum=0.3, rounds=45)) < 1e-10


@pytest.mark.slow
def test_scaffold_with_some_clients():
    assert off(theta(Scaffold(), rounds=500, cohort=2)) < 1e-4
    assert off(theta(Scaffold(), rounds=600, cohort=2, server=0.3)) < 1e-6


def test_feddyn_reaches_the_optimum():
    assert off(theta(Dynamic(1.0))) < 1e-4


def test_feddyn_has_the_digits_of_float64():
    """gᵢ ← gᵢ − α(θᵢ − θ) at the clients, h ← h + α Σ w u at the server, θ ← θ − Σ w u − h/α, with u = θ − θᵢ."""
    (curvatures, minima, w), alpha = parts(clients()), 0.5
    start = next(seeded(lambda: nn.Linear(D, 1, bias=False)).parameters())
    at, linear, h = start.detach()[0].double(), torch.zeros(len(w), D, dtype=WIDE), torch.zeros(D, dtype=WIDE)
    for _ in range(4):
        y = at.expand(len(w), D)
        for _ in range(STEPS):
            gradient = (curvatures @ (y - minima)[..., None])[..., 0]
            y = y - LR * (gradient - linear + alpha * (y - at))
        u = at - y
        linear, mean = linear + alpha * u, w @ u
        h = h + alpha * mean
        at = at - mean - h / alpha
    assert off(theta(Dynamic(alpha), rounds=4), at) < 1e-12


@pytest.mark.slow
def test_feddyn_with_some_clients():
    assert off(theta(Dynamic(1.0), rounds=600, cohort=4)) < 1e-6


def test_fednova_minimises_the_objective_and_fedavg_another_one():
    """With lr → 0 FedAvg weighs the gradient of a client by its number of steps: 10 rows make one, 20 rows two."""
    data = clients(10, 20)
    best, other = optimum(data), optimum(data, 1 + torch.arange(20) % 2)
    task = task_of(seeded(lambda: nn.Linear(D, 1, bias=False)), data, "fused", WIDE)

    def found(correction, lr):
        plan = Plan(Train(sgd(lr), epochs=1, batch=10, correction=correction), Mean())
        return run(plan, InProcessEngine(task, data), 50, init=other if correction else best)[0].model.theta

    apart = off(other, best)
    assert apart > 0.02 and off(found(Normalised(), 0.05), best) < 0.2 * apart
    assert off(found(None, 0.05), other) < 0.2 * apart


@pytest.mark.slow
def test_fednova_reaches_the_optimum_as_the_rate_falls():
    """The distance to the optimum falls with the rate; that of FedAvg to the optimum of other weights does too."""
    data = clients(10, 20)
    best, other = optimum(data), optimum(data, 1 + torch.arange(20) % 2)
    task = task_of(seeded(lambda: nn.Linear(D, 1, bias=False)), data, "fused", WIDE)

    def distance(correction, lr, target):
        plan = Plan(Train(sgd(lr), epochs=1, batch=10, correction=correction), Mean())
        state, _ = run(plan, InProcessEngine(task, data), round(8 / lr), init=other if correction else best)
        return off(state.model.theta, target)

    for one, target in ((Normalised(), best), (None, other)):
        coarse, fine = (distance(one, lr, target) for lr in (0.05, 0.005))
        assert fine < 0.2 * coarse, (one, coarse, fine)


def test_fedexp_of_equal_updates_is_fedavg_bit_for_bit():
    data = federation(
        *(t.repeat(3, *[1] * (t.dim() - 1)) for t in (clients().rows.x[:6], clients().rows.y[:6])), (6, 6, 6)
    )
    task = task_of(seeded(lambda: nn.Linear(D, 1)), data, "fused", WIDE)
    exp, avg = (
        run(Plan(Train(sgd(LR), steps=3, correction=c), Mean()), InProcessEngine(task, data), 3)[0].model.theta
        for c in (Extrapolated(), None)
    )
    assert torch.equal(exp, avg)


def test_fedexp_steps_by_its_formula_and_evaluates_a_mean():
    data = clients()
    task = task_of(seeded(lambda: nn.Linear(D, 1, bias=False)), data, "fused", WIDE)
    plan = Plan(Train(sgd(LR), steps=STEPS, correction=Extrapolated(1e-3)), Mean())
    engine = InProcessEngine(task, data)
    first = task.initial().theta
    avg = first - run(replace(plan, local=replace(plan.local, correction=None)), engine, 1)[0].model.theta
    h, minima, w = parts(clients())
    power = torch.linalg.matrix_power(torch.eye(D, dtype=WIDE) - LR * h, STEPS)
    each = first - (minima + (power @ (first - minima)[..., None])[..., 0])
    eta = max(1.0, float((w * each.square().sum(1)).sum() / (2 * (avg.square().sum() + 1e-3))))
    state = run(plan, engine, 1)[0]
    assert eta > 1 and far(state.model.theta, first - eta * avg) < 1e-12
    assert far(plan.local.evaluated(state.model.theta, state.server["local"]), first - eta * avg / 2) < 1e-12
    run_ = atoll.train("softmax", classification((9, 9, 9)), recipes.fedexp(0.1), rounds=1, out=None)
    assert torch.isfinite(next(run_.model.parameters())).all()


# equality with parts from outside the package, and degenerate cases


def test_equals_the_foreign_parts():
    data = clients()
    task = task_of(seeded(lambda: nn.Linear(D, 1, bias=False)), data, "fused", WIDE)

    def found(local, rounds=5):
        return run(Plan(local, Mean("equal"), cohort=7), InProcessEngine(task, data), rounds)[0].model.theta

    ours = found(Train(sgd(LR), steps=5, batch=4, correction=Scaffold()))
    assert far(ours, found(ForeignScaffold(LR, steps=5, batch=4))) < 1e-12
    ours = found(Train(sgd(LR), epochs=2, batch=4, correction=Proximal(0.7)))
    assert far(ours, found(Train(foreign_fedprox(LR, mu=0.7), epochs=2, batch=4))) < 1e-12


BODIES = ["lanes", "loop", "fused", COMPILED]


def trained(plan, numerics="fused", rounds=3, data=None, dtype=WIDE, **engine):
    data = data or classification((12, 10, 7, 7, 3), dtype=dtype)
    task = task_of(seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))), data, numerics, dtype)
    return run(plan, InProcessEngine(task, data, **engine), rounds)[0].model.theta


@pytest.mark.parametrize("numerics", one_in(2, ["loop", "lanes", "fused", COMPILED]))
def test_degenerate_cases_are_fedavg(numerics):
    plain = trained(recipes.fedavg(0.1, batch=4), numerics)
    assert torch.equal(trained(recipes.fedprox(0.1, batch=4, mu=0), numerics), plain)
    assert torch.equal(trained(recipes.fedlc(0.1, batch=4, tau=0), numerics), plain)
    equal = Train(sgd(0.1), steps=4, batch=4)
    plan = Plan(equal, Mean())
    nova = trained(replace(plan, local=replace(equal, correction=Normalised())), numerics)
    assert far(nova, trained(plan, numerics)) < 1e-12
    alone = classification((12,), dtype=WIDE)
    one = (trained(r(0.1, batch=4), numerics, data=alone) for r in (recipes.scaffold, recipes.fedavg))
    assert far(*one) < 1e-12


@pytest.mark.parametrize("numerics", ["lanes", "loop"])
def test_calibration_is_a_shift_of_the_logits(numerics):
    """Balanced softmax and FedLC by a loss that shifts the logits itself, for the same update."""
    data = classification((12,), dtype=WIDE)
    counts = data.rows.y.bincount(minlength=3).to(WIDE)
    task = task_of(seeded(lambda: nn.Linear(4, 3)), data, numerics, WIDE)
    for form, shift in (("log", 0.7 * counts.log()), ("quarter", -0.7 * counts.pow(-0.25))):

        def loss(z, y, shift=shift):
            return nn.functional.cross_entropy(z + shift, y, reduction="none")

        optimizer = sgd(0.1, momentum=0.5, weight_decay=0.1)
        shifted = replace(task, loss=loss)
        local = Train(optimizer, epochs=2, batch=5)
        want = run(Plan(local, Mean()), InProcessEngine(shifted, data), 2)[0].model.theta
        ours = Plan(replace(local, correction=Calibrated(0.7, form)), Mean())
        assert far(run(ours, InProcessEngine(task, data), 2)[0].model.theta, want) < 1e-12


def test_calibration_chained_shifts_the_anchor():
    data = classification((12, 9), dtype=WIDE)
    data.rows.y[:12].clamp_(max=1)  # the first client has no row of the last class, and half a row is counted
    task = task_of(seeded(lambda: nn.Linear(4, 3)), data, "lanes", WIDE)
    counts = torch.stack([y.bincount(minlength=3) for y in data.rows.y.split([12, 9])]).to(WIDE).clamp(min=0.5)
    for k in range(2):

        def loss(z, y, k=k):
            return nn.functional.cross_entropy(z + counts[k].log(), y, reduction="none")

        one = federation(data.rows.x.split([12, 9])[k], data.rows.y.split([12, 9])[k], [(12, 9)[k]])
        proximal = Plan(Train(sgd(0.1), steps=4, batch=None, correction=Proximal(0.8)), Mean())
        want = run(proximal, InProcessEngine(replace(task, loss=loss), one), 1)[0].model.theta
        ours = Plan(replace(proximal.local, correction=Calibrated(1.0) >> Proximal(0.8)), Mean())
        assert far(run(ours, InProcessEngine(task, one), 1)[0].model.theta, want) < 1e-12


# the same bits, and other parts

PLANS = {
    "fedprox": recipes.fedprox(0.1, batch=4, cohort=4, mu=0.5),
    "scaffold": recipes.scaffold(0.1, batch=4, cohort=4),
    "scaffold-update": Plan(Train(sgd(0.1), steps=4, batch=4, correction=Scaffold("update")), Mean(), cohort=4),
    "feddyn": recipes.feddyn(0.1, batch=4, cohort=4),
    "fednova": recipes.fednova(0.1, batch=4, cohort=4, momentum=0.9, mu=0.5),
    "fedexp": recipes.fedexp(0.1, batch=4, cohort=4),
    "qffl": recipes.qffl(0.1, batch=4, cohort=4),
    "fedlc": recipes.fedlc(0.1, batch=4, cohort=4),
    "chain": Plan(Train(sgd(0.1), epochs=1, batch=4, correction=Calibrated(1.0) >> Scaffold()), Mean(), cohort=4),
}


def test_a_power_does_not_depend_on_the_position_of_a_client():
    """`torch.pow` rounds the last numbers of a tensor in another way than the first ones."""
    losses = Key(5).uniform(401, torch.float32) * 9 + 0.1
    for exponent in (-0.25, 0.7, 1.5, 4.0):
        whole = correction._power(losses, exponent)
        assert torch.equal(whole, torch.cat([correction._power(part, exponent) for part in losses.split(7)]))
        assert torch.allclose(whole, losses.double().pow(exponent).float(), rtol=1e-6)


@pytest.mark.parametrize(("name", "numerics"), one_in(4, by_turns(PLANS, ["lanes", "loop", "fused", "compiled"])))
def test_chunks_change_no_bit_and_backends_agree(name, numerics):
    plan = PLANS[name]
    found = trained(plan, numerics, dtype=torch.float32)
    assert torch.equal(found, trained(plan, numerics, dtype=torch.float32, chunk=1))
    assert far(found, trained(plan, "loop", dtype=torch.float32)) < 1e-5
    assert read_part(repr(plan.local)) == plan.local


def test_a_resumed_run_has_the_same_bits(tmp_path):
    data = classification((12, 10, 7, 7, 3))
    for name in ("scaffold", "feddyn", "chain"):
        whole = atoll.train("softmax", data, PLANS[name], rounds=4, out=None, numerics="fused")
        half = atoll.train("softmax", data, PLANS[name], rounds=2, out=tmp_path / name, numerics="fused", report=False)
        where = {"out": tmp_path / name, "resume": half.path, "report": False}
        more = atoll.train("softmax", data, PLANS[name], rounds=4, numerics="fused", **where)
        assert more.reports[-1].fingerprint == whole.reports[-1].fingerprint


@pytest.mark.parametrize(
    "correction", one_in(2, [Proximal(0.1), Scaffold(), Dynamic(0.5), Normalised(), Extrapolated()])
)
def test_with_other_parts(correction):
    for local in (
        Train(sgd(0.1), steps=3, batch=4, sends="model", correction=correction),
        Train(sgd(0.1), steps=3, batch=4, keep=("order",), correction=correction),
    ):
        assert torch.isfinite(trained(Plan(local, Mean(), cohort=4), rounds=2)).all()
    for codec in (ErrorFeedback(TopK(0.3)),):
        local = Train(sgd(0.1), epochs=1, batch=4, correction=correction)
        assert torch.isfinite(trained(Plan(local, Mean(), codec=codec), rounds=2)).all()
    partial = Plan(
        Train(sgd(0.1), epochs=1, batch=1, correction=correction), Mean(), pace=Sync(deadline_s=1.0, partial=True)
    )
    assert torch.isfinite(trained(partial, rounds=2, fleet=Fleet(compute=0.2))).all()


def plan_with(
    correction, optimizer=sgd(0.1), server=sgd(1.0), aggregator=Mean(), codec=Identity(), pace=Sync(), **more
):
    more = {"epochs": 1, "batch": 4} | more
    return Plan(Train(optimizer, **more, correction=correction), aggregator, server, codec=codec, pace=pace)


REFUSED = [
    (lambda: Proximal(-0.1), "mu"),
    (lambda: Dynamic(0.0), "alpha"),
    (lambda: Calibrated(1.0, form="half"), "quarter"),
    (lambda: Scaffold("all"), "update"),
    (lambda: read_part("Gradient(correction=Proximal(0.1))"), "correction"),
    (lambda: read_part("Custom('my:step', correction=Proximal(0.1))"), "correction"),
    (lambda: Scaffold() >> Normalised(), "Scaffold"),
    (lambda: Proximal(0.1) >> Scaffold(), "Proximal"),
    (lambda: Calibrated(0.1) >> Calibrated(0.1), "Calibrated"),
    (lambda: plan_with(Proximal(20.0)), "mu < 20"),
    (lambda: plan_with(Dynamic(21.0)), "alpha < 20"),
    (lambda: plan_with(Scaffold(), pace=Buffered(2)), "Buffered"),
    (lambda: plan_with(Dynamic(0.1), pace=Buffered(2)), "Buffered"),
    (lambda: plan_with(Scaffold(), codec=TopK(0.1)), "TopK"),
    (lambda: plan_with(Dynamic(0.1), codec=TopK(0.1)), "TopK"),
    (lambda: plan_with(Scaffold(), adamw(0.1)), "adamw"),
    (lambda: plan_with(Normalised(), adamw(0.1)), "adamw"),
    (lambda: plan_with(Normalised(), sgd(0.1, momentum=0.5), keep=("optimizer",)), "keep"),
    (lambda: plan_with(Scaffold("update")), "epochs"),
    (lambda: plan_with(Scaffold("update"), steps=3, epochs=None, codec=ErrorFeedback(TopK(0.5))), "loss"),
    (lambda: plan_with(Extrapolated(), server=adam(0.1)), "adam"),
    (lambda: plan_with(Extrapolated(), aggregator=Mean(over="expected")), "expected"),
    (lambda: plan_with(Calibrated(0.1) >> Scaffold(), pace=Buffered(2)), "Buffered"),
    (lambda: plan_with(Normalised(), sends="model", pace=Buffered(2)), "sends='model'"),
    (lambda: plan_with(Proximal(0.1) >> Normalised(), sends="model", pace=Buffered(2)), "sends='model'"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals(number):
    make, says = REFUSED[number]
    with pytest.raises(UsageError, match=says):
        make()


def test_a_model_without_an_output_bias_is_refused():
    data = classification((9, 9, 9, 9))
    task = task_of(nn.Linear(4, 3, bias=False), data, "fused", torch.float32)
    with pytest.raises(UsageError, match="bias"):
        run(PLANS["fedlc"], InProcessEngine(task, data))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_mimelite_with_one_step_is_gradient_descent_with_momentum(decay):
    """Of clients of unequal numbers of rows, and of one client."""
    data = clients(3, 40)
    local = Train(sgd(LR, weight_decay=decay), steps=1, batch=None, correction=MimeLite(0.8))
    for some in (data, federation(data.rows.x, data.rows.y, (len(data.rows),))):
        task = task_of(nn.Linear(D, 1, bias=False).double(), some, "loop")
        theta = task.initial().theta.clone().requires_grad_()
        found = run(Plan(local, Mean()), InProcessEngine(task, some), 12)[0].model.theta
        descent = torch.optim.SGD([theta], lr=LR, momentum=0.8, weight_decay=decay)
        for _ in range(12):
            descent.zero_grad()
            (data.rows.x @ theta - data.rows.y).square().mean().backward()
            descent.step()
        torch.testing.assert_close(found, theta.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("numerics", one_in(2, ["lanes", "loop", *COMPILED]))
def test_mimelite_is_its_formula(numerics):
    """The momentum of the server is the shift of each of several steps, and remains during them."""
    data, beta = clients(), 0.7
    h, minima, w = parts(data)
    task = task_of(nn.Linear(D, 1, bias=False).double(), data, numerics)
    local = Train(sgd(LR), epochs=STEPS, batch=None, correction=MimeLite(beta))
    found = run(Plan(local, Mean()), InProcessEngine(task, data, 3), 3)[0].model.theta
    theta, momentum = task.initial().theta, torch.zeros(D, dtype=WIDE)
    for _ in range(3):
        y = theta.expand(len(w), D)
        for _ in range(STEPS):
            y = y - LR * ((h @ (y - minima)[..., None])[..., 0] + beta * momentum)
        momentum = beta * momentum + w @ (h @ (theta - minima)[..., None])[..., 0]
        theta = w @ y
    torch.testing.assert_close(found, theta, rtol=1e-10, atol=1e-11)
    plain = run(Plan(replace(local, correction=None), Mean()), InProcessEngine(task, data), 2)[0].model.theta
    zero = run(Plan(replace(local, correction=MimeLite(0.0)), Mean()), InProcessEngine(task, data), 2)[0].model.theta
    assert torch.equal(plain, zero)


def test_mimelite_refuses_momentum_of_clients_and_own_parts():
    for words, says in (
        ({"optimizer": sgd(0.1, momentum=0.9)}, "without momentum"),
        ({"optimizer": adam(0.1)}, "without momentum"),
        ({"own": ("*bias",)}, "one of the two"),
    ):
        with pytest.raises(UsageError, match=says):
            Plan(replace(recipes.mimelite(0.1).local, **words), Mean())
    with pytest.raises(UsageError, match="beta"):
        MimeLite(1.0)


@pytest.mark.parametrize(
    ("correction", "fact"),
    [(Fair(1.0), "loss"), (MimeLite(0.9), "gradient"), (Normalised(), "weights"), (Scaffold(), "weights")],
    ids=repr,
)
def test_a_fact_that_a_local_part_leaves_out_is_refused(correction, fact):
    task, ones = task_of(seeded(nn.Linear, 5, 3), classification((9, 9)), "loop"), torch.ones(2)
    broadcast = Broadcast(0, task.initial(), {"correction": correction.server(task.layout)})
    memory = {name: tensor.expand(2, -1) for name, tensor in correction.memory(task.layout).items()}
    facts = StepFacts(0.1, 0.0, ones.long(), ones.long(), None, lambda classes: torch.ones(2, classes).long())
    with pytest.raises(UsageError, match=f"without facts.{fact}"):
        correction.finish(broadcast, memory, torch.ones(2, task.layout.d), facts)


def test_every_correction_is_in_the_grammar_and_is_one_call():
    names = {
        "fedprox": Proximal,
        "scaffold": Scaffold,
        "feddyn": Dynamic,
        "fednova": Normalised,
        "fedexp": Extrapolated,
        "qffl": Fair,
        "mimelite": MimeLite,
    }
    for name, kind in {**names, "fedlc": Calibrated}.items():
        correction = Experiment().override(recipe=f"{name}(0.1)").plan().local.correction
        assert isinstance(correction, kind) and kind in CORRECTIONS


def test_scaffold_sends_two_vectors_or_one():
    data = classification((12, 9, 9), dtype=WIDE)
    task = task_of(seeded(lambda: nn.Linear(4, 3)), data, "fused", WIDE)

    def sent(correction):
        plan = Plan(Train(sgd(0.1), steps=3, batch=4, correction=correction), Mean())
        return run(plan, InProcessEngine(task, data), 1)[1][0].bytes_up / 3

    plain = sent(None)
    assert sent(Scaffold()) == plain + 15 * 8 and sent(Scaffold("update")) == plain + 8


def test_a_note_states_that_clients_lack_classes():
    data = atoll.data.load("digits").split(5, atoll.data.Pathological(2))
    for recipe, count in (("fedlc(0.1)", 1), ("fedprox(0.1)", 0)):
        with atoll.rounds("softmax", data, recipe, rounds=1) as training:
            assert sum("5 of 5 clients have no row of some class" in note for note in training.notes) == count


def test_unequal_chances_are_refused():
    data = atoll.data.load("digits").split(6, atoll.data.Dirichlet(0.3))
    for recipe in (recipes.scaffold, recipes.feddyn):
        with pytest.raises(UsageError, match="the same chance"):
            atoll.rounds("softmax", data, replace(recipe(0.1), cohort=Weighted(2)), rounds=1)


def test_a_rate_that_ends_at_zero_ends_no_run():
    data = atoll.data.load("digits").split(4)
    run = atoll.train("softmax", data, recipes.scaffold(cosine(0.1, rounds=2)), rounds=4, out=None)
    assert run.rounds == 4 and run.status == "done"


def test_calibrated_refuses_an_output_that_it_does_not_know():
    class Registered(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(32, 10), nn.Linear(64, 32)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    data = atoll.data.load("digits").split(3)
    with pytest.raises(UsageError, match=r"ends with an nn\.Linear"):
        atoll.train(Registered(), data, recipes.fedlc(0.1), rounds=1, out=None)
    with pytest.raises(UsageError, match="no weight decay"):
        replace(
            recipes.fedlc(0.1),
            local=Train(adamw(0.1, weight_decay=0.1), epochs=1, batch=10, correction=Calibrated(1.0)),
        )


def test_a_client_alone_has_no_correction():
    data = atoll.data.load("digits").split(5)
    words = {"rounds": 1, "baselines": True, "out": None, "numerics": "lanes", "report": False}
    plain, corrected = (atoll.train("softmax", data, plan(0.1), **words) for plan in (recipes.fedavg, recipes.fednova))
    assert corrected.baselines["local"]["accuracy"] == plain.baselines["local"]["accuracy"]


def test_steps_of_all_rows():
    data = atoll.data.load("digits").split(4)
    run = atoll.train("softmax", data, Plan(Train(sgd(0.1), steps=3), Mean()), rounds=1, out=None)
    assert run.rounds == 1
