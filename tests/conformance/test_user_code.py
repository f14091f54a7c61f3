"""User code is trained as plain autograd trains it, on every backend, or it is refused by name."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conformance.user_code import MODULES, PLAN, data_of, reference, tensors_of, typed
from problems import classification, far
from quick_cases import one_in

import atoll
from atoll.base.random import Key, generator_states, user_scope
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.probe import Probe

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


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


@pytest.mark.parametrize("case", TRAINED, ids=name_of)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_the_loop_equals_plain_autograd_and_other_backends_equal_the_loop(case):
    rounds = 2 if case.joined else 1
    for dtype, tolerance in TOLERANCE.items():
        data = data_of(case, dtype)
        loop = joined(case, trained(case, data, dtype, "loop", rounds))
        if not case.draws:
            assert distance(loop, joined(case, reference(case, data, rounds, dtype))) <= tolerance
        if dtype == torch.float32:
            for numerics in ("lanes", "auto"):
                other = trained(case, data, dtype, numerics, rounds)
                assert other is not None or numerics != "auto"
                if other is not None:
                    assert not case.loop or numerics == "auto", numerics
                    assert distance(joined(case, other), loop) <= tolerance, numerics


@pytest.mark.parametrize("case", one_in(2, [c for c in TRAINED if not c.draws]), ids=name_of)
@pytest.mark.filterwarnings("ignore::atoll.Note")
def test_a_module_after_a_pass_of_its_own_is_trained_alike(case):
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
def test_findings_state_what_was_observed(name, draws):
    case = MODULES[name]
    found = choose(Task.of(case.make(), case.loss), data_of(case), PLAN).task.findings
    assert found.draws == draws and found.output == (3,) and found.target == () and found.probed
