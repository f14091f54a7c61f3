"""User code is trained as plain autograd trains it, on every backend, or it is refused by name."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conformance.user_code import MODULES, PLAN, data_of, reference, tensors_of, typed
from parity import ranks
from parity.test_torchrun import environment, written
from problems import classification, far, run
from quick_cases import one_in
from torch import nn

import atoll
from atoll.base.random import Key, generator_states, user_scope
from atoll.compute.attributes import deep_copy
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.probe import Probe
from atoll.engine.workers import forkserver
from atoll.engine.workers.processes import ProcessesEngine
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom
from atoll.plan.plan import Plan


def name_of(case):
    return next(name for name, each in MODULES.items() if each is case)


def trained(case, data, dtype, numerics, rounds):
    """The tensors after some rounds; None if the backend is refused."""
    name = str(dtype).removeprefix("torch.")
    module = typed(case.make(), dtype)
    try:
        training = atoll.rounds(
            module, data, PLAN, rounds=rounds, dtype=name, numerics=numerics, loss=case.loss, metrics=()
        )
    except atoll.UsageError as error:
        if numerics in ("auto", "loop"):
            raise
        assert str(error)
        return None
    list(training)
    return tensors_of(training.model)


def distance(a, b):
    """The largest distance between the tensors of two modules; complex tensors and integers must be equal."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].is_floating_point() or torch.equal(a[name], b[name]), name
    return max(far(a[n], b[n]) for n in a if a[n].is_floating_point())


def joined(case, tensors):
    """The tensors that the server joins as the reference does."""
    return tensors if case.joined else {n: t for n, t in tensors.items() if not n.endswith(("_u", "_v"))}


def used(make):
    """A factory of modules after a forward and a backward pass of their own."""

    def again():
        module = make()
        x, y = classification((6,)).take(torch.arange(6))
        with user_scope(Key(1)):
            torch.nn.functional.cross_entropy(module(x), y).backward()
        return module

    return again


TRAINED = [c for c in MODULES.values() if not c.refused]


@pytest.mark.parametrize("case", one_in(5, TRAINED), ids=name_of)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_the_loop_equals_plain_autograd_and_other_backends_equal_the_loop(case):
    rounds = 2 if case.joined else 1
    data = data_of(case, torch.float32)
    loop = joined(case, trained(case, data, torch.float32, "loop", rounds))
    if not case.draws:
        assert distance(loop, joined(case, reference(case, data, rounds, torch.float32))) <= 1e-6
    for numerics in ("lanes", "auto"):
        other = trained(case, data, torch.float32, numerics, rounds)
        assert other is not None or numerics != "auto"
        if other is not None:
            assert not case.loop or numerics == "auto", numerics
            assert distance(joined(case, other), loop) <= 1e-6, numerics


@pytest.mark.parametrize("case", one_in(6, [c for c in TRAINED if not c.draws]), ids=name_of)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_the_loop_equals_plain_autograd_in_float64(case):
    rounds = 2 if case.joined else 1
    data = data_of(case, torch.float64)
    loop = joined(case, trained(case, data, torch.float64, "loop", rounds))
    assert distance(loop, joined(case, reference(case, data, rounds, torch.float64))) <= 1e-12


@pytest.mark.parametrize("case", one_in(9, [c for c in TRAINED if not c.draws]), ids=name_of)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_an_earlier_pass_of_the_module_changes_no_training(case):
    case, rounds = replace(case, make=used(case.make)), 2 if case.joined else 1
    data = data_of(case)
    loop = trained(case, data, torch.float32, "loop", rounds)
    assert distance(joined(case, loop), joined(case, reference(case, data, rounds, torch.float32))) <= 1e-6


@pytest.mark.parametrize("case", [c for c in MODULES.values() if c.refused], ids=name_of)
def test_other_code_is_refused_by_name(case):
    with pytest.raises(atoll.UsageError) as error:
        atoll.rounds(case.make(), data_of(case), PLAN, rounds=1, loss=case.loss, metrics=())
    assert case.refused in str(error.value)


@pytest.mark.parametrize("case", [c for c in MODULES.values() if c.draws], ids=name_of)
def test_draws_depend_on_the_seed_and_leave_the_generators(case):
    data, prints = data_of(case), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = generator_states()
        training = atoll.rounds(case.make(), data, PLAN, rounds=2, loss=case.loss, metrics=())
        prints.append([report.fingerprint for report in training])
        assert before == generator_states()
    assert prints[0] == prints[1]


@pytest.fixture(scope="module")
def nursery():
    """A fork server that has imported `torch.func` and the zoo, so that each of its workers starts fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "_START", f"import conformance.user_code; {forkserver._START}")
        server = forkserver.ForkServer()
        server.start()
    server.warm()
    yield server
    server.close()


# Worker processes get code by names that can be imported: no lambda, no class that torch makes, no object of C++.
NOT_SENT = {
    **dict.fromkeys(("weight norm", "spectral norm", "orthogonal"), "ParametrizedLinear"),
    **dict.fromkeys(("module hooks", "module backward hook"), "<lambda>"),
    "scripted": "torch.ScriptModule",
    "containers that are records": "collections.deque",
}


def bits(state):
    """All tensors of a model."""
    return [state.model.theta, state.model.buffers, *state.model.counters.values()]


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED, ids=name_of)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_worker_processes_give_the_bits_of_one_process_or_refuse_the_code(case, nursery):
    data, missing = data_of(case), NOT_SENT.get(name_of(case))
    task = choose(Task.of(case.make(), case.loss), data, PLAN).task
    if missing:
        with pytest.raises(atoll.UsageError, match=missing) as error:
            ProcessesEngine(task, data, workers=1, nursery=nursery)
        assert error.value.line in ('engine="inprocess"', 'atoll.train("my_module:make", data, plan)')
        return
    expected, _ = run(PLAN, InProcessEngine(task, data), 2)
    with ProcessesEngine(task, data, workers=1, nursery=nursery) as engine:
        found, _ = run(PLAN, engine, 2)
    assert all(torch.equal(a, b) for a, b in zip(bits(found), bits(expected), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::atoll.Note")
@pytest.mark.parametrize("name", ["weight norm", "containers that are records"])
def test_worker_processes_build_other_code_from_its_factory(name, nursery):
    """This is the line of the refusal: `atoll.train("my_module:make", data, plan)`."""
    case, made = MODULES[name], f"conformance.user_code:{name.partition(' ')[0]}_factory"
    data = data_of(case)
    task = choose(Task.of(case.make(), case.loss), data, PLAN).task
    expected, _ = run(PLAN, InProcessEngine(task, data), 2)
    with ProcessesEngine(task, data, workers=1, nursery=nursery, model=made) as engine:
        found, _ = run(PLAN, engine, 2)
    assert all(torch.equal(a, b) for a, b in zip(bits(found), bits(expected), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_ranks_give_the_bits_of_one_process(tmp_path):
    """Two ranks train the whole zoo; with the float sum their gradients are added within the backward pass."""
    line = [sys.executable, ranks.__file__, str(tmp_path), "forked", "zoo"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = json.loads(json.dumps(ranks.zoo(InProcessEngine)))
    for found in written(tmp_path, 2):
        assert found.keys() == expected.keys()
        for name, (exact, floats) in expected.items():
            assert found[name][0] == exact, name
            assert found[name][1] == pytest.approx(floats, rel=1e-5, abs=1e-6), name


def test_a_scope_restores_generators_and_modes():
    key = Key(3)
    with user_scope(key):
        expected = torch.rand(3), np.random.rand(), random.random()
    before = generator_states()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
            with user_scope(key):
                drawn = torch.rand(3), np.random.rand(), random.random()
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                assert not torch.is_autocast_enabled("cpu") and torch.get_default_dtype() == torch.float32
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.get_default_dtype() == torch.float64 and torch.empty(1).is_meta
    finally:
        torch.set_default_dtype(torch.float32)
    assert before == generator_states()
    assert torch.equal(drawn[0], expected[0]) and drawn[1:] == expected[1:]


def test_a_probe_reads_at_most_eight_rows_of_a_client_that_can_be_read_at_two_models():
    data = classification((20, 12, 5))

    class Broken:
        def __len__(self):
            return len(data.rows)

        def take(self, index):
            if bool((index < 20).any()):
                raise OSError("a lost disk")
            return data.rows.take(index)

        def targets(self):
            return data.rows.targets()

    task = replace(Task.of(torch.nn.Linear(4, 3), "cross_entropy"), numerics="loop")
    probe = Probe.read(task, replace(data, rows=Broken()))
    assert probe.client == 1 and len(probe.x) == 8
    first, second = probe.passes()
    assert not torch.equal(first.output, second.output) and first.loss.shape == (8,)
    assert probe.loss_rows(torch.zeros(8, 3)) == 8 and probe.loss_rows(torch.zeros(8, 100)) == 2


@pytest.mark.parametrize(("name", "draws"), [("plain", ()), ("draws", ("training", "evaluation"))])
def test_findings_state_the_observation(name, draws):
    case = MODULES[name]
    found = choose(Task.of(case.make(), case.loss), data_of(case), PLAN).task.findings
    assert found.draws == draws and found.output == (3,) and found.target == () and found.probed


class Silent(nn.Linear):
    """A model whose forward pass has no return statement."""

    def forward(self, x):
        super().forward(x)


def cut(module):
    """A module with a hook that returns a tensor of another shape."""
    module[0].register_forward_hook(lambda layer, given, output: output[:, :2])
    return module


def cut_gradient(module):
    """A module with a gradient hook that returns another shape."""
    module[0].weight.register_hook(lambda gradient: gradient[:1])
    return module


def two_layers():
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Silent(4, 3), "forward has no return statement"),
        (lambda: cut(two_layers()), "in_features=5, and its input has shape"),
        (lambda: cut_gradient(two_layers()), "has changed the size"),
    ],
)
def test_a_module_without_a_fitting_answer_is_refused(make, words):
    with pytest.raises(atoll.UsageError, match=words):
        atoll.rounds(make(), classification((9, 7, 5)), PLAN, rounds=1)


@pytest.mark.parametrize("answer", [{"loss": "low"}, {"pairs": [1, 2]}, 3])
def test_a_loop_returns_numbers_by_name(answer):
    plan = Plan(Custom(lambda model, loader, ctx: answer), Mean())
    with pytest.raises(atoll.UsageError, match="a dict of numbers by name") as error:
        atoll.rounds(two_layers(), classification((9, 7, 5)), plan, rounds=1).next()
    assert error.value.line == 'return {"loss": loss.item()}'


def test_rounds_and_more_are_two_requests(tmp_path):
    data = classification((9, 7, 5))
    run = atoll.train("softmax", data, PLAN, rounds=1, out=tmp_path, report=False)
    with pytest.raises(atoll.UsageError, match="rounds = 3 and more = 2"):
        atoll.train("softmax", data, PLAN, rounds=3, more=2, resume=run.path, out=tmp_path, report=False)


def test_a_copy_shares_no_container_with_the_module():
    """deep_copy makes the empty containers itself, since copy.deepcopy takes longer for them than for small tensors."""
    module = two_layers()
    module[0].seen = module[1].seen = set()  # one container stays one
    module[0].register_forward_hook(lambda *_: None)
    made = deep_copy(module, "The model")
    for mine, theirs in zip(module.modules(), made.modules(), strict=True):
        for name, value in vars(mine).items():
            assert type(vars(theirs)[name]) is type(value)
            assert vars(theirs)[name] is not value or not isinstance(value, (dict, set))
    assert made[0].seen is made[1].seen and len(made[0]._forward_hooks) == 1
    made[1].register_forward_hook(lambda *_: None)
    assert not module[1]._forward_hooks and not made[0]._forward_pre_hooks
