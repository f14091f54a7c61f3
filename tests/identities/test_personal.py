"""Personal models: the own part of a client stays in its memory, and every backend and order gives the same bits."""

from dataclasses import replace

import pytest
import torch
from problems import COMPILED, classification, far, run, seeded, task_of
from quick_cases import one_in, only
from torch import nn

from atoll.base.errors import UsageError
from atoll.compute.layout import Layout
from atoll.compute.model_state import split_of
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean, Median
from atoll.plan.codec import Clip, ErrorFeedback, LowRank, Noise, Quantize
from atoll.plan.local import Calibrated, Ditto, Evaluate, Proximal, Scaffold, Train
from atoll.plan.message import MessageForm
from atoll.plan.optimizer.rules import adam, adamw, sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.round import bind
from atoll.recipes import dp_fedavg, fedbn, fedper, fedrep

BODIES = ["lanes", "loop", "fused", COMPILED]
SIZES = (9, 7, 4)
HEAD = ("3.*",)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def normed():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def trained(plan, body="loop", make=mlp, rounds=2, chunk=None, dtype=torch.float64, sizes=SIZES):
    data = classification(sizes, (6,), dtype=dtype)
    engine = InProcessEngine(task_of(seeded(make), data, body, dtype), data, chunk=chunk)
    state, reports = run(plan, engine, rounds)
    memory = {n.partition("/")[2]: t for n, t in state.memory.take(torch.arange(len(sizes))).items()}
    return state, memory, reports, engine.task


def personal(plan, state, memory, task):
    return plan.local.personal(state.model, memory, task)


def local(**fields):
    return Plan(Train(sgd(0.3), epochs=2, batch=3, **fields), Mean())


def test_no_own_part_is_federated_averaging():
    plain, none = (trained(plan)[0].model.theta for plan in (local(), local(own=())))
    assert torch.equal(plain, none)


@pytest.mark.parametrize("body", BODIES)
def test_one_client_trains_its_whole_model(body):
    """One client with an own part: the shared and the own part together are local training of the whole model."""
    whole, *_ = trained(local(), sizes=(9,))
    plan = local(own=HEAD)
    state, memory, _, task = trained(plan, body, sizes=(9,))
    assert far(personal(plan, state, memory, task).theta[0], whole.model.theta) < 1e-12
    assert torch.equal(plan.local.whole(state.model, task).theta[-18:], task.start.theta[-18:])  # the server's head


PERSONAL = [local(own=HEAD), local(own=HEAD, alternate=True), local(correction=Ditto(0.5))]


@pytest.mark.parametrize("plan", only(PERSONAL[1:2], PERSONAL))
def test_backends_agree_and_chunks_change_no_bit(plan):
    wanted, *first = trained(plan)
    for body in BODIES:
        state, memory, *_ = trained(plan, body)
        assert far(state.model.theta, wanted.model.theta) < 1e-12
        assert all(far(memory[n], t) < 1e-12 for n, t in first[0].items())
        narrow, each, *_ = trained(plan, body, chunk=1)
        assert torch.equal(narrow.model.theta, state.model.theta)
        assert all(torch.equal(each[n], t) for n, t in memory.items())


def test_the_own_part_is_in_no_message():
    """The message and the state of the server have the lengths of the shared part."""
    for make, plan in ((mlp, fedper(0.1, own=HEAD)), (normed, fedbn(0.1)), (normed, fedbn(0.1).local)):
        plan = plan if isinstance(plan, Plan) else Plan(replace(plan, own=("1.*",)), Mean())
        state, _, reports, task = trained(plan, make=make)
        shared = plan.local.server_layout(task.layout)
        assert state.model.theta.shape == (shared.d,) and state.model.buffers.shape == (0,)
        assert state.model.counters == {} and shared.d < task.layout.d
        form = MessageForm.of(bind(plan, InProcessEngine(task, classification(SIZES, (6,)))), task)
        assert reports[0].bytes_up == form.longest * len(SIZES)
        assert form.longest == (shared.d + 1) * 8 + 16
        assert reports[0].bytes_down == shared.d * 8 * len(SIZES)


def test_norms_of_clients_differ_and_the_rest_is_shared():
    plan = fedbn(0.1, epochs=2)
    state, memory, _, task = trained(plan, make=normed)
    models = personal(plan, state, memory, task)
    assert task.layout.without("norms") == task.layout.without(("1.*",))
    layout = task.layout
    each, buffers = layout.params(models.theta), layout.buffers(models.buffers)
    assert torch.equal(each["0.weight"][0], each["0.weight"][1])
    assert not torch.equal(each["1.weight"][0], each["1.weight"][1])
    assert not torch.equal(buffers["1.running_mean"][0], buffers["1.running_mean"][1])
    assert models.counters["1.num_batches_tracked"].tolist() == [4, 4, 4]  # two rounds of two full batches


def test_alternate_trains_one_part_after_the_other():
    """FedRep by hand: the head on the start of the round, then the body below the trained head."""
    data = classification((9,), (6,), dtype=torch.float64)
    plan = Plan(Train(sgd(0.3), epochs=1, own=HEAD, alternate=True), Mean())  # full batches: the order has no effect
    state, memory, *_ = trained(plan, rounds=1, sizes=(9,))
    model = seeded(mlp).double()
    x, y = data.rows.take(torch.arange(9))
    for part in (model[3], model[1]):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(part.parameters()))
        with torch.no_grad():
            for p, g in zip(part.parameters(), grads, strict=True):
                p -= 0.3 * g
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert far(torch.cat((state.model.theta, memory["own.theta"][0])), flat) < 1e-12


def test_alternate_freezes_any_optimizer():
    """Weight decay and momentum of AdamW leave the other part unchanged."""
    plan = Plan(Train(adamw(0.1, weight_decay=0.5), steps=1, batch=3, own=HEAD, alternate=True), Mean())
    state, memory, _, task = trained(plan, rounds=1, sizes=(9,))
    plain = Plan(replace(plan.local, alternate=False), Mean())
    _, other, *_ = trained(plain, rounds=1, sizes=(9,))
    assert memory["own.theta"].shape == other["own.theta"].shape
    assert not torch.equal(state.model.theta, task.start.theta[: len(state.model.theta)])


def test_ditto_without_a_pull_is_local_training():
    plan = local(correction=Ditto(0.0))
    state, memory, _, task = trained(plan)
    shared = trained(local())[0]
    assert torch.equal(state.model.theta, shared.model.theta)  # the update is that of federated averaging
    # A client alone trains from its own model. Its batches have the order of another draw, so they are full here.
    full = Plan(Train(sgd(0.3), epochs=2, correction=Ditto(0.0)), Mean())
    state, memory, _, task = trained(full)
    alone = trained(Plan(Train(sgd(0.3), epochs=2), Mean()), sizes=SIZES[:1])[0]
    assert far(personal(full, state, memory, task).theta[0], alone.model.theta) < 1e-12
    assert memory["personal.rounds"].tolist() == [2, 2, 2]


def test_a_client_without_a_round_has_the_model_of_the_server():
    plan = Plan(Train(sgd(0.3), epochs=1, batch=3, correction=Ditto(0.1)), Mean(), cohort=1)
    state, memory, _, task = trained(plan, rounds=1)
    models = personal(plan, state, memory, task)
    absent = [i for i, n in enumerate(memory["personal.rounds"].tolist()) if not n]
    assert len(absent) == 2 and all(torch.equal(models.theta[i], state.model.theta) for i in absent)


@pytest.mark.parametrize("correction", one_in(2, [Scaffold(), Proximal(0.1)]))
def test_a_correction_of_the_shared_part(correction):
    """Its vectors have the length of the shared part, and no pull of zero changes a bit."""
    plan = local(own=HEAD, correction=correction)
    for body in ("fused", COMPILED):
        state, memory, *_ = trained(plan, body)
        assert far(state.model.theta, trained(plan)[0].model.theta) < 1e-12
    assert all(t.shape[1:] in ((35,), (18,), (0,)) for t in memory.values())
    assert torch.equal(
        trained(local(own=HEAD, correction=Proximal(0.0)))[0].model.theta, trained(local(own=HEAD))[0].model.theta
    )


@pytest.mark.usefixtures("known_secrets")
@pytest.mark.parametrize(
    "parts",
    [
        {"codec": Quantize(8), "downlink": Quantize(8)},
        {"codec": ErrorFeedback(LowRank(1))},
        {"aggregator": Median()},
        {"codec": Clip(1.0) >> Noise(0.1), "aggregator": dp_fedavg().aggregator, "cohort": dp_fedavg(q=1.0).cohort},
        {"pace": Buffered(2)},
        {"optimizer": adam(0.01)},
    ],
    ids=lambda parts: "-".join(parts),
)
def test_an_own_part_works_with_every_slot(parts):
    """The other parts of a plan see a model of the shared part only."""
    plan = replace(local(own=HEAD), **parts)
    state, memory, reports, task = trained(plan, rounds=2)
    assert state.model.theta.shape == (35,) and len(reports) == 2
    assert not torch.equal(memory["own.theta"][0], task.start.theta[35:])
    assert not torch.equal(state.model.theta, task.start.theta[:35])


def test_split_and_join_are_inverse():
    layout = Layout.of(normed())
    split = split_of(layout, layout.without(("1.*", "3.bias")))
    task = task_of(normed(), classification(SIZES, (6,)), dtype=torch.float32)
    whole = task.initial().lanes(2)
    again = split.join(split.shared(whole), split.own(whole))
    assert torch.equal(again.theta, whole.theta) and torch.equal(again.buffers, whole.buffers)
    assert again.counters.keys() == whole.counters.keys()


def test_refusals():
    layout = Layout.of(mlp())
    for wrong in (("fc9.*",), ("3.*", "nothing"), ("*",), "norms"):
        with pytest.raises(UsageError, match="parameter of the model"):
            layout.without(wrong)
    for fields in ({"own": "fc2"}, {"own": (3,)}, {"alternate": True}, {"own": HEAD, "alternate": 1}):
        with pytest.raises(UsageError):
            local(**fields)
    for fields in (
        {"own": HEAD, "correction": Ditto(0.1)},
        {"own": HEAD, "correction": Calibrated(1.0)},
        {"own": HEAD, "alternate": True, "correction": Proximal(0.1)},
        {"own": HEAD, "alternate": True, "keep": ("optimizer",)},
        {"correction": Ditto(0.1), "keep": ("optimizer",)},
        {"correction": Ditto(10.0)},
    ):
        with pytest.raises(UsageError):
            local(**fields)
    with pytest.raises(UsageError, match="exclude"):
        Proximal(0.1) >> Ditto(0.1)
    for wrong in (local().local, "Train", 3):
        with pytest.raises(UsageError, match="models of clients"):
            Evaluate(wrong)
    assert fedrep(0.1, own=HEAD).local.examples_per_round(torch.tensor([7])).tolist() == [14]
