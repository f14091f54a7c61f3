"""Training on another device: no operation mixes devices, none falls back to the host, and the numbers are equal."""

from dataclasses import replace

import pytest
import torch
from fake_device import FAR, FarTensor, far_device
from importable_parts import Masked, masked
from problems import classification, regression, run, seeded, task_of
from quick_cases import by_turns, one_in
from torch import nn

import atoll
from atoll import recipes, runs
from atoll.engine import inprocess
from atoll.engine.chunk_limit import chunk_size
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import codec as codecs
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import EF21, Cast, Eden, Entropy, ErrorFeedback, LowRank, Quantize, RandomK, Rotate, Sign, TopK
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.pace import Bounded, Buffered, staleness_polynomial
from atoll.plan.plan import Plan
from atoll.plan.sampler import Poisson, RoundRobin, Weighted
from atoll.plan.schedule import plateau
from atoll.tools.export import export
from atoll.tools.replay import replay
from atoll.training.experiment import Experiment

SIZES = (9, 9, 4, 4, 1)
BODIES = ("lanes", "loop", "fused")


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))


def norm():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3)))


def everything(state, count):
    return state.model, state.optimizer, state.server, state.memory.take(torch.arange(count)), state.sent


def same(a, b):
    """Whether two tensors are bit-identical, on any devices."""
    left, right = (torch.utils._pytree.tree_flatten(tree) for tree in (a, b))
    assert left[1] == right[1]
    for x, y in zip(left[0], right[0], strict=True):
        assert torch.equal(x.to("cpu"), y.to("cpu")) if isinstance(x, torch.Tensor) else x == y


def check(plan, module, data, body, dtype=torch.float32, rounds=2, **engine):
    """Two rounds on the CPU and two on the fake device are equal, and θ never leaves its device."""
    task = task_of(module, data, body, dtype)
    here, expected = run(plan, InProcessEngine(task, data, **engine), rounds)
    with far_device():
        there, found = run(plan, InProcessEngine(task.on(FAR), data, **engine), rounds)
        assert there.model.theta.device == FAR
        assert {t.device for t in there.model if isinstance(t, torch.Tensor)} == {FAR}
        same(everything(there, data.count), everything(here, data.count))
        for one, other in zip(found, expected, strict=True):
            assert (one.metrics, one.failures, one.arrived) == (other.metrics, other.failures, other.arrived)
            assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down)
            assert all(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in one.clients.values())
            same(dict(one.clients), dict(other.clients))


def test_the_device_of_these_tests_can_fail():
    """The fake device refuses a tensor of the host, and it allows the operations that a GPU allows."""
    with far_device():
        x = torch.arange(6.0, device=FAR).view(2, 3)
        assert isinstance(x, FarTensor) and x.device == FAR
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.ones(2) @ x,
            lambda: torch.arange(4)[x[0].long()],
            lambda: torch.stack([x[0, 0], torch.zeros(())]),
            lambda: x.index_copy_(0, torch.tensor([0]), x[:1]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (x[torch.tensor([1])] * torch.tensor(2.0)).tolist() == [[6.0, 8.0, 10.0]]
        assert x.to("cpu").sum() == 15


RECIPES = {
    "gd": recipes.gd(0.1),
    "sgd": recipes.sgd(0.1, batch=4),
    "distributed_gd": recipes.distributed_gd(0.1),
    "fedsgd": recipes.fedsgd(0.1),
    "fedavg": recipes.fedavg(0.1, batch=4),
    "local_sgd": recipes.local_sgd(0.1, steps=3, batch=4),
    "fedavgm": recipes.fedavgm(0.1),
    "fedadam": recipes.fedadam(0.1),
    "fedyogi": recipes.fedyogi(0.1),
    "fedadagrad": recipes.fedadagrad(0.1),
    "diloco": recipes.diloco(steps=3),
    "post_local_sgd": recipes.post_local_sgd(0.1),
    "dp_fedavg": recipes.dp_fedavg(0.1, q=0.9),
    "fedbuff": recipes.fedbuff(0.1),
    "fedasync": recipes.fedasync(0.1),
    "fedprox": recipes.fedprox(0.1),
    "scaffold": recipes.scaffold(0.1),
    "feddyn": recipes.feddyn(0.1),
    "fednova": recipes.fednova(0.1),
    "fedexp": recipes.fedexp(0.1),
    "qffl": recipes.qffl(0.1),
    "mimelite": recipes.mimelite(0.1),
    "fedlc": recipes.fedlc(0.1),
    "newton": recipes.newton(0.1),
    "fedper": recipes.fedper(0.1, own=("2.*",)),
    "fedbn": recipes.fedper(0.1, own=("0.*",)),  # the model has no layer of normalisation
    "fedrep": recipes.fedrep(0.1, own=("2.*",)),
    "ditto": recipes.ditto(0.1),
}


def test_every_recipe_is_here():
    assert set(RECIPES) == {recipe.__name__ for recipe in recipes.RECIPES}


@pytest.mark.usefixtures("known_secrets")
@pytest.mark.parametrize(("name", "body"), one_in(8, by_turns(RECIPES, BODIES)))
def test_every_recipe(name, body):
    plan, data = RECIPES[name], classification(SIZES if name not in ("gd", "sgd") else (30,))
    check(plan, mlp() if name != "newton" else nn.Linear(4, 3), data, body)


@pytest.mark.parametrize("body", BODIES[:2])
def test_buffers_counters_and_dropout(body):
    """Batch norm's averages and its counter, batches of one length at a time, and a keyed mask."""
    plan = Plan(Train(rules.sgd(0.1), epochs=2, batch=4), Mean())
    check(plan, norm(), classification(SIZES), body)


CODECS = {
    "cast": Cast("fp16"),
    "quantize": Quantize(8),
    "rotate": Rotate() >> Quantize(4, bucket=256),
    "eden": Eden(2),
    "topk": TopK(0.2),
    "randomk": RandomK(0.2, unbiased=False),
    "sign": Sign(),
    "lowrank": LowRank(1),
    "entropy": Entropy(),
    "feedback": ErrorFeedback(TopK(0.2)),
    "shift": EF21(RandomK(0.3, unbiased=False)),
    "clip": codecs.Clip(1.0),
    "adaptive": codecs.AdaptiveClip(),
}


def test_every_codec_is_here():
    stages = {part.__name__ for part in vars(codecs).values() if isinstance(part, type)}
    tried = " ".join(map(repr, [*CODECS.values(), RECIPES["dp_fedavg"].codec]))
    assert {name for name in stages if f"{name}(" not in tried} <= {"Codec", "Identity", "Chain", "MessageError"}


@pytest.mark.parametrize("name", one_in(4, [name for name in CODECS if name != "entropy"]))
def test_every_codec(name):
    """Every codec on the uplink, and also on the downlink if it is allowed there."""
    both = {"downlink": CODECS[name]} if name not in ("feedback", "shift", "lowrank", "clip", "adaptive") else {}
    plan = Plan(Gradient(), Mean(), rules.sgd(0.5), codec=CODECS[name], **both)
    check(plan, mlp(), classification(SIZES), "lanes")


LOCALS = {
    "wide": Gradient(),  # 1,500 rows: two passes
    "keeps": Train(rules.adam(0.01), steps=3, batch=4, keep=("optimizer", "order")),
    "momentum": Train(rules.sgd(0.1, momentum=0.9), epochs=1, batch=None),
    "plateau": Train(rules.sgd(plateau(0.1)), steps=2, batch=4),
    "models": Train(rules.sgd(0.1), epochs=1, batch=4, sends="model"),
}


@pytest.mark.parametrize(("name", "body"), one_in(2, by_turns(LOCALS, BODIES)))
def test_local_parts(name, body):
    data = (
        regression((1500, 40, 3), dtype=torch.float32) if name == "wide" else regression((9, 9, 5), dtype=torch.float32)
    )
    pace = Buffered(2, staleness_polynomial(0.5)) if name == "models" else Bounded(1)
    check(Plan(LOCALS[name], Mean(), pace=pace), seeded(nn.Linear, 3, 1), data, body, rounds=4)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Gradient(), Mean(over="expected"), rules.adam(0.1), cohort=Poisson(0.3)),
        Plan(Gradient(), Sum("equal"), rules.sgd(plateau(0.1)), cohort=RoundRobin(3)),
        Plan(Gradient(), Mean(sum="float"), rules.sgd(0.1, momentum=0.9), cohort=Weighted(3)),
        Plan(Gradient(), Mean("equal"), rules.yogi(0.1)),
    ],
    ids=repr,
)
def test_rules_and_samplers(plan):
    check(plan, mlp(), classification(SIZES), "lanes", rounds=3)


def by_hand(model, loader, ctx):
    for x, y in loader:
        assert x.device == y.device == ctx.device
        loss = nn.functional.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return {"mine": float(loss.detach())}


@pytest.mark.parametrize("body", ["lanes", "loop"])
def test_rows_of_several_tensors(body):
    check(recipes.fedavg(0.1, batch=4), seeded(Masked), masked(classification(SIZES)), body)


def test_a_loop_of_your_own(monkeypatch):
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))  # the fake device does not support it
    check(Plan(Custom(by_hand, batch=4), Mean()), mlp(), classification(SIZES), "loop")


@pytest.fixture
def far(monkeypatch):
    """A machine whose GPU is `FAR`."""
    monkeypatch.setattr("atoll.compute.device.resolve_device", lambda text, rank=None: FAR)
    with far_device():
        yield


@pytest.mark.parametrize(
    ("numerics", "resident"),
    [
        ("lanes", False),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (("fused", True), ("lanes", True), ("fused", False), ("loop", True))
        ),
    ],
)
def test_the_front_door(far, monkeypatch, tmp_path, numerics, resident):
    """Backend choice, rounds, evaluation, checkpoint, resume, baselines: on the device, with the CPU's bits."""
    free = (1 << 30) if resident else None
    monkeypatch.setattr("atoll.compute.device.free", lambda device: free)
    monkeypatch.setattr(inprocess, "free", lambda device: free)
    data = atoll.data.load("wine").split(clients=6)
    plan = Plan(Train(rules.adam(0.01), steps=2, batch=8, keep=("optimizer", "order")), Mean(), rules.adam(0.01))
    settings = {"numerics": numerics, "out": tmp_path, "report": False, "baselines": numerics == "lanes"}
    first = atoll.train("mlp", data, plan, rounds=1, **settings)
    whole = atoll.train("mlp", data, plan, rounds=2, resume=first.path, **settings)
    assert all(p.device.type == "cpu" for p in whole.model.parameters())
    about = runs.read_environment(whole.path)
    assert (about["device"], about["precision"], about["numerics"]) == ("meta", "full", numerics)
    monkeypatch.setattr("atoll.compute.device.resolve_device", lambda text, rank=None: torch.device("cpu"))
    expected = atoll.train("mlp", data, plan, rounds=2, **{**settings, "out": None})
    assert {n: v for n, v in whole.metrics.items()} == dict(expected.metrics)
    assert dict(whole.baselines) == dict(expected.baselines)
    same(dict(whole.model.state_dict()), dict(expected.model.state_dict()))


@pytest.mark.slow
def test_commands_that_read_a_run(far, monkeypatch, tmp_path):
    """Replay of one client's contribution, and export and evaluation of the model."""
    settings = {
        "clients": 6,
        "rounds": 2,
        "model": "softmax",
        "recipe": "fedavg(lr=0.1, batch=10)",
        "numerics": "lanes",
    }
    it = Experiment().override(**settings, out=str(tmp_path), report=False)
    path = it.train().path
    small = tmp_path / "small.safetensors"
    looks = [lambda: replay(path, 1, 2), lambda: export(path, "int8", small)]
    there = [look() for look in looks]
    monkeypatch.setattr("atoll.compute.device.resolve_device", lambda text, rank=None: torch.device("cpu"))
    for pair in zip(there, [look() for look in looks], strict=True):
        one, other = ({n: v for n, v in vars(seen).items() if n not in ("path", "seconds")} for seen in pair)
        assert one == other


def test_rows_that_fit_are_moved_once():
    data = atoll.data.load("digits").split(clients=6)
    need = sum(t.numel() * t.element_size() for t in (data.rows.x, data.rows.y))
    with far_device():
        assert data.on(FAR, need - 1) is data and data.on(torch.device("cpu"), 1 << 40) is data
        near = data.on(FAR, need)
        x, y = near.take(near.order[:3])
        assert x.device == y.device == FAR and near.held_out.rows.x is near.rows.x
        same((x, y), data.take(data.order[:3]))
        assert near.order is data.order


def test_chunks_fill_a_device():
    """A device with memory of its own determines the chunk size: half of its free memory."""
    data, plan = classification(SIZES), recipes.fedavg(0.1, batch=4)
    for body in ("lanes", "fused"):
        task = task_of(mlp(), data, body, torch.float32)
        sizes = [chunk_size(plan, task, data, 9, None, free) for free in (0, 10_000, 100_000, 1_000_000, 1 << 40)]
        assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] > 1024
        each = 6 * task.layout.d * 4
        assert sizes[2] * each <= 50_000 < (sizes[2] + 1) * (each + 4 * 4 * 4 + 200)
        assert chunk_size(plan, task, data, 9, 7, 1 << 40) == 7
        moments = replace(plan, local=replace(plan.local, optimizer=rules.adam(0.1)))
        assert chunk_size(moments, replace(task, numerics="loop"), data, 9, None, 1 << 40) == 1
