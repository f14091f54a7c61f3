"""Client memory of a user's loop: it is a function of the accepted contributions of its client."""

import pytest
import torch
from importable_parts import personal, remember
from problems import classification
from torch import nn

import atoll
from atoll.base.errors import UsageError
from atoll.base.random import Key, user_scope
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.net.engine import _memory_reads_weights
from atoll.net.terms import plan_text
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, TopK
from atoll.plan.local import Custom
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan

SIZES = (9, 5, 9, 3, 9, 5, 9)
DATA = classification(SIZES)
PLAN = Plan(Custom(remember, batch=4, memory=personal), Mean(), cohort=4, codec=ErrorFeedback(TopK(0.5)))


def net(seed=0):
    with user_scope(Key(seed)):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def rounds(plan, count, module=None, **settings):
    training = atoll.rounds(module or net(), DATA, plan, rounds=count, **settings)
    return training, list(training)


def memory(training):
    return training.memory.take(torch.arange(len(SIZES)))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) and t.dtype == b[n].dtype for n, t in a.items())


def visited(plan, count, **settings):
    """The memory of each client, and the number of its accepted contributions."""
    training, reports = rounds(plan, count, **settings)
    ids = torch.cat([r.clients["id"] for r in reports])
    return memory(training), torch.bincount(ids, minlength=len(SIZES)), reports


def count_visits(model, loader, ctx):
    ctx.memory["visits"] += 1
    return {"visits": float(ctx.memory["visits"])}


def visits(model):
    return {"visits": torch.zeros((), dtype=torch.int64)}


COUNT = Plan(Custom(count_visits, memory=visits), Mean(), cohort=4)


def test_memory_counts_the_accepted_contributions():
    kept, accepted, _ = visited(COUNT, 6)
    assert kept["local/visits"].tolist() == accepted.tolist() and len(set(accepted.tolist())) > 1


def test_a_lost_contribution_changes_no_memory():
    """Client 2 raises in round 1, after its loop has changed the memory; other contributions are lost on their way."""
    everyone = Plan(Custom(remember, batch=4, memory=personal), Mean(), max_failed=1.0)
    kept, accepted, reports = visited(everyone, 3)
    assert [f.client for r in reports for f in r.failures] == [2]
    assert kept["local/visits"].tolist() == accepted.tolist() == [3, 3, 2, 3, 3, 3, 3]
    lossy = Plan(COUNT.local, Mean(), cohort=4, max_failed=1.0, pace=Buffered(2))
    kept, accepted, reports = visited(lossy, 8, fleet=Fleet(HalfNormal(), dropout=0.3))
    assert kept["local/visits"].tolist() == accepted.tolist()
    assert sum(len(r.failures) for r in reports) > 0


def test_the_loop_reads_the_memory_of_its_own_client():
    """Momentum by hand: client i's memory after its n-th contribution is that of a loop that keeps it in a dict."""
    kept: dict[int, torch.Tensor] = {}
    outside: dict[int, torch.Tensor] = {}

    def train(model, loader, ctx):
        with torch.no_grad():
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
            theta = torch.cat([p.reshape(-1) for p in model.parameters()])
            kept[ctx.client] = ctx.memory["m"] = 0.5 * ctx.memory["m"] + theta * loss
            outside[ctx.client] = 0.5 * outside.get(ctx.client, torch.zeros_like(theta)) + theta * loss
            for p in model.parameters():
                p += 0.01 * ctx.memory["m"].norm()

    plan = Plan(Custom(train, memory=lambda model: {"m": torch.zeros(43)}), Mean(), cohort=3)
    training, _ = rounds(plan, 6)
    assert len(outside) > 3
    for client, m in outside.items():
        assert torch.equal(memory(training)["local/m"][client], m)


def test_chunks_change_no_bit():
    (one, _), (all_, _) = (rounds(PLAN, 4, chunk=chunk) for chunk in (1, None))
    assert same(memory(one), memory(all_)) and torch.equal(one.state.model.theta, all_.state.model.theta)


def test_a_loop_without_memory_has_the_bits_of_a_loop_that_ignores_it():
    (a, _), (b, _) = (rounds(Plan(Custom(passing, memory=make), Mean()), 2) for make in (None, visits))
    assert torch.equal(a.state.model.theta, b.state.model.theta)


def passing(model, loader, ctx):
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad + 1e-3 * torch.randn_like(p)


def test_a_resumed_run_has_the_bits_of_one_without_a_stop(tmp_path):
    """Client memory with which clients begin is part of the run: the resumed training has a model of other weights."""
    settings = {"report": False, "out": tmp_path}
    whole = atoll.train(net(), DATA, PLAN, rounds=6, **settings)
    part = atoll.train(net(), DATA, PLAN, rounds=2, **settings)
    end = atoll.train(net(seed=1), DATA, PLAN, rounds=6, resume=part.path, **settings)
    assert [dict(r.metrics) for r in end.reports] == [dict(r.metrics) for r in whole.reports[2:]]
    assert (end.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_clients_begin_with_the_first_model_of_the_run():
    """`init` replaces the weights of the module, also those that `memory(model)` reads."""
    start = {n: t + 1 for n, t in net().state_dict().items()}
    training, _ = rounds(PLAN, 1, init=start)
    assert torch.equal(training.memory.first["local/head"], start["2.bias"])
    module = net()
    module.load_state_dict(start)
    other, _ = rounds(PLAN, 1, module)
    assert same(memory(training), memory(other))


def test_a_resumed_loop_with_another_memory_is_refused(tmp_path):
    settings = {"report": False, "out": tmp_path}
    size = [2]
    local = Custom(count_visits, memory=lambda model: {"visits": torch.zeros(size[0])})
    plan = Plan(Custom(lambda m, loader, ctx: None, memory=local.memory), Mean())
    run = atoll.train(net(), DATA, plan, rounds=1, **settings)
    size[0] = 3
    with pytest.raises(UsageError, match=r"The saved client memory has 'local/visits', float32 \[2\]"):
        atoll.train(net(), DATA, plan, rounds=2, resume=run.path, **settings)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.update(new=torch.zeros(2)), r"ctx.memory\['new'\] as float32 \[2\]"),
        (lambda m: m.pop("v"), r"ctx.memory\['v'\] as NoneType"),
        (lambda m: m.update(v=torch.zeros(3)), r"\['v'\] as float32 \[3\].\nRequired: float32 \[2\]"),
        (lambda m: m.update(v=torch.zeros(2, dtype=torch.float64)), r"as float64 \[2\]"),
        (lambda m: m.update(v=[0.0, 0.0]), "as list"),
        (lambda m: m.update(v=torch.zeros(2).to_sparse()), r"as sparse_coo float32 \[2\]"),
    ],
)
def test_memory_of_another_name_shape_or_dtype_is_refused(change, words):
    def train(model, loader, ctx):
        change(ctx.memory)

    plan = Plan(Custom(train, memory=two), Mean(), cohort=2)
    with pytest.raises(UsageError, match=words):
        rounds(plan, 1)


def two(model):
    return {"v": torch.zeros(2)}


def test_another_dict_in_place_of_the_memory_fails():
    def train(model, loader, ctx):
        ctx.memory = {}

    with pytest.raises(atoll.RunError, match="cannot assign to field 'memory'"):
        rounds(Plan(Custom(train, memory=two), Mean()), 1)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda model: None, "returned None"),
        (lambda model: [torch.zeros(2)], "returned \\[tensor"),
        (lambda model: {"v": 0.0}, "returned 'v': 0.0"),
        (lambda model: {3: torch.zeros(2)}, "returned 3: tensor"),
        (lambda model: {"": torch.zeros(2)}, "returned '': tensor"),
        (lambda model: {"v": torch.zeros(2, dtype=torch.complex64)}, "returned 'v': tensor"),
        (lambda model: {"v": torch.zeros(2).to_sparse()}, "returned 'v': tensor"),
    ],
)
def test_first_memory_that_is_no_dict_of_tensors_is_refused(make, words):
    with pytest.raises(UsageError, match=f"memory\\(model\\) of Custom.*{words}"):
        rounds(Plan(Custom(passing, memory=make), Mean()), 1)


def test_memory_that_is_no_function_is_refused():
    with pytest.raises(UsageError, match=r"Custom\(memory=\{'v': 1\}\)"):
        Custom(passing, memory={"v": 1})


def test_the_first_memory_is_drawn_by_a_key_and_is_a_copy():
    """It does not depend on the global generator, and the loop cannot change it through the user's own tensor."""
    own = torch.zeros(2)
    plans = [Plan(Custom(passing, memory=lambda m: {"own": own, "drawn": torch.rand(3)}), Mean()) for _ in range(2)]
    (a, _), (b, _) = (rounds(plan, 1) for plan in plans)
    own += 1
    assert same(a.memory.first, b.memory.first) and a.memory.first["local/own"].tolist() == [0.0, 0.0]


def test_the_text_of_a_plan_names_both_functions():
    assert repr(PLAN.local) == "Custom(importable_parts:remember, batch=4, memory=importable_parts:personal)"


def test_a_network_refuses_a_loop_of_the_user():
    with pytest.raises(UsageError, match="no code travels") as caught:
        plan_text(COUNT)
    assert ":count_visits" in str(caught.value) and "Train(" in caught.value.line


def test_a_network_refuses_memory_that_depends_on_weights():
    """A site builds the model by name, with other weights."""
    training, _ = rounds(COUNT, 1)
    assert not _memory_reads_weights(COUNT, training.task)
    assert _memory_reads_weights(PLAN, training.task)
