"""Order of clients, chunks, threads and workers changes no bit; two backends agree up to rounding (identity 4)."""

from unittest.mock import patch

import pytest
import torch
from architectures import KEY, MODELS, Transformer
from problems import classification, far, regression, run, seeded, task_of, threads, tokens
from quick_cases import by_turns, one_in
from torch import nn

from atoll import recipes
from atoll.base.random import Key
from atoll.compute.batches import ClientBatch
from atoll.engine.choose_backend import choose
from atoll.engine.chunks import chunks
from atoll.engine.inprocess import InProcessEngine
from atoll.models import build
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Cohort

# The memory address of a lane must not matter. Widths of 33 and 65 are included, which no vector register divides.
SIZES = (9, 5, 9, 3, 9, 5)


PLANS = {
    "mlp": Plan(Train(rules.adam(0.01), epochs=2, batch=4), Mean(), rules.adam(0.1)),
    "batch norm": Plan(Train(rules.sgd(0.1, momentum=0.9), epochs=2, batch=4), Mean()),
}
USUAL = Plan(Train(rules.sgd(0.1), epochs=1, batch=4), Mean(), rules.sgd(1.0, momentum=0.5))
DTYPES = by_turns(MODELS, [torch.float32, torch.float64])


class Shuffled(InProcessEngine):
    """Chunks arrive in another order, and clients of one size have another order inside a chunk."""

    def __init__(self, task, data, chunk=None, by=0):
        super().__init__(task, data, chunk)
        self.by = by

    def gather(self, plan, state, cohort, key):
        def shuffled(plan, task, data, ids, down, *limits):
            order = Key(self.by).permutation(len(down))
            parts = list(chunks(plan, task, data, ids.select(order), down[order], *limits))
            return iter([parts[i] for i in Key(self.by).fold("chunks").permutation(len(parts)).tolist()])

        with patch("atoll.engine.inprocess.chunks", shuffled):
            return super().gather(plan, state, cohort, key)


class Workers(InProcessEngine):
    """Each worker has a part of the cohort; their partial sums are merged, the last one first."""

    def __init__(self, task, data, chunk=None, workers=2):
        super().__init__(task, data, chunk)
        self.workers = workers

    def gather(self, plan, state, cohort, key):
        parts = [cohort.ids[w :: self.workers] for w in range(self.workers)]
        each = [super(Workers, self).gather(plan, state, Cohort(ids, cohort.chance), key) for ids in parts if len(ids)]
        first, *rest = reversed(each)
        partial = first.partials[state.round]
        for other in rest:
            partial = plan.aggregator.merge(partial, other.partials[state.round])
        return first._replace(
            partials={state.round: partial},
            arrived=torch.cat([g.arrived for g in each]).sort().values,
            memory=tuple(row for g in each for row in g.memory),
        )


def everything(state):
    """The bits of a state: θ, buffers, counters, the server's optimizer."""
    tensors = {"theta": state.model.theta, "buffers": state.model.buffers, **state.model.counters, **state.optimizer}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


def engines(task, data):
    yield from (InProcessEngine(task, data, chunk) for chunk in (1, 2))
    yield from (Shuffled(task, data, chunk, by=by) for by, chunk in enumerate((3,)))
    yield from (Workers(task, data, None, workers=workers) for workers in (2,))


@pytest.mark.parametrize(("name", "dtype"), one_in(3, DTYPES))
def test_chunks_order_and_workers_change_no_bit(name, dtype):
    make, data_of = MODELS[name]
    data = data_of(SIZES)
    task, plan = task_of(make(), data, "lanes", dtype), PLANS.get(name, USUAL)
    expected = everything(run(plan, InProcessEngine(task, data))[0])
    for engine in engines(task, data):
        assert everything(run(plan, engine)[0]) == expected, engine


NAMED = (recipes.fedlc, recipes.fedper, recipes.fedbn, recipes.fedrep)  # they need classes, or layers of a name
WITHOUT_CLASSES = [recipe for recipe in recipes.RECIPES if recipe not in NAMED]
LOCAL = (recipes.diloco, recipes.local_sgd, recipes.post_local_sgd)


@pytest.mark.usefixtures("known_secrets")
@pytest.mark.parametrize(("recipe", "body"), one_in(6, by_turns(WITHOUT_CLASSES, ["lanes", "loop"])))
def test_no_recipe_knows_an_order(recipe, body):
    data = regression(SIZES)
    task = task_of(seeded(nn.Linear, 3, 1), data, body)
    words = {"steps": 3, "batch": 4} if recipe in LOCAL else {}
    plan = recipe(**({"q": 1.0} if recipe is recipes.dp_fedavg else words))
    expected = everything(run(plan, InProcessEngine(task, data))[0])
    # Workers share a cohort. An asynchronous recipe opens its later rounds without a cohort.
    several = () if plan.pace.asynchronous else (Workers(task, data, 1, workers=3),)
    for engine in (Shuffled(task, data, 2, by=5), *several):
        assert everything(run(plan, engine)[0]) == expected


def wide(name, dtype, body):
    """A round of a model that is wide enough for torch to use several threads, with 1 thread and with 2."""
    shape, sizes = ((64,), (40,) * 8) if name == "mlp" else ((1, 16, 16), (24,) * 4)
    data = tokens(sizes, 32) if name == "transformer" else classification(sizes, shape)
    module = Transformer() if name == "transformer" else build(name, shape, 3, "classification", KEY)
    task, plan = task_of(module, data, body, dtype), Plan(Train(rules.sgd(0.1), steps=2, batch=20), Mean())
    for n in (1, 2):
        with threads(n):
            yield run(plan, InProcessEngine(task, data), 1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_threads_change_no_bit(name, dtype):
    one, two = wide(name, dtype, "lanes")
    assert everything(one) == everything(two)


@pytest.mark.parametrize(
    ("case", "dtype"),
    one_in(2, by_turns([("mlp", "loop"), ("cnn", "loop"), ("cnn", "lanes")], [torch.float32, torch.float64])),
)
def test_threads_change_nothing_but_rounding(case, dtype):
    """torch splits a single matrix product and the weight gradient of a convolution by threads: bits differ."""
    name, body = case
    one, two = wide(name, dtype, body)
    assert far(one.model.theta, two.model.theta) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_the_numbers_of_clients_change_only_draws():
    """Full gradients draw no random numbers, so that client ids may be permuted."""
    data = regression(SIZES)
    task = task_of(seeded(nn.Linear, 3, 1), data)
    expected = everything(run(recipes.distributed_gd(0.1), InProcessEngine(task, data))[0])
    for seed in range(5):
        other = data.only(Key(seed).permutation(len(SIZES)))
        assert everything(run(recipes.distributed_gd(0.1), InProcessEngine(task, other))[0]) == expected


@pytest.mark.parametrize("name", ["mlp", "batch norm", "dropout"])
def test_other_clients_of_the_chunk_change_no_update(name):
    data = classification(SIZES)
    task, local = task_of(MODELS[name][0](), data), Train(rules.sgd(0.1), epochs=3, batch=4)
    broadcast = Broadcast(0, task.initial(), {})

    def given(*ids):
        index = torch.tensor(ids)
        lanes = ClientBatch(data, index, torch.float64)
        return local.contribute(broadcast, lanes, {}, KEY.of(index), task)[0].means["update"]

    alone = given(1)
    for beside in ((1, 5), (0, 1), (0, 2, 4, 1, 3), (0, 1, 5, 3)):
        assert torch.equal(given(*beside)[beside.index(1)], alone[0]), beside


def test_lanes_are_rejected_if_products_depend_on_memory(monkeypatch):
    data = classification(SIZES)
    task = task_of(MODELS["mlp"][0](), data)
    assert choose(task, data, USUAL).task.numerics == "lanes"
    monkeypatch.setattr("atoll.engine.choose_backend.matmul_is_position_independent", lambda device: False)
    choice = choose(task, data, USUAL)
    assert choice.task.numerics == "loop" and "MKL_CBWR" in choice.reason


@pytest.mark.parametrize(("name", "dtype"), one_in(2, DTYPES))
def test_lanes_are_the_loop_to_rounding(name, dtype):
    make, data_of = MODELS[name]
    data = data_of(SIZES)
    for plan in (USUAL, recipes.distributed_gd(0.1)):
        lanes, loop = (
            run(plan, InProcessEngine(task_of(make(), data, body, dtype), data), 1)[0].model
            for body in ("lanes", "loop")
        )
        close = 1e-5 if dtype == torch.float32 else 1e-12
        assert far(lanes.theta, loop.theta) < close and far(lanes.buffers, loop.buffers) < close
        assert lanes.counters.keys() == loop.counters.keys()
        assert all(torch.equal(lanes.counters[n], loop.counters[n]) for n in lanes.counters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_float_sum_is_the_exact_one_to_rounding(dtype):
    data = classification(SIZES)
    task = task_of(MODELS["mlp"][0](), data, "lanes", dtype)
    exact, fast = (
        run(Plan(USUAL.local, Mean(sum=how)), InProcessEngine(task, data))[0].model.theta for how in ("exact", "float")
    )
    assert far(fast, exact) < (1e-6 if dtype == torch.float32 else 1e-14)
