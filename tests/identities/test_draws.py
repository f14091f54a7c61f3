"""Draws of user code depend on keys only, and leave the generators and modes of the caller as they were."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from problems import classification, seeded
from quick_cases import only
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import atoll
from atoll import recipes
from atoll.base.random import GeneratorWatch, Key, generator_states, global_scope, mixed
from atoll.data.rows import DatasetRows
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom, Train
from atoll.plan.optimizer import sgd
from atoll.plan.plan import Plan


class Augmented(Dataset):
    """Rows with draws of torch, NumPy and Python, from row `first` on."""

    def __init__(self, first=0, rows=40):
        self.first, self.rows, self.reads = first, rows, 0

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        self.reads += 1
        x = torch.full((4,), i / 60)
        if i >= self.first:
            x = x + 0.3 * torch.randn(4) + 0.1 * np.random.rand() + 0.1 * random.random()
        return x, i % 3


def rough(output, y):
    return F.cross_entropy(output + 0.5 * torch.randn_like(output), y, reduction="none")


class Dropped(nn.Module):
    """GeneratorWatch in evaluation mode only."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x if self.training else F.dropout(x, 0.5, training=True))


def loop(model, loader, ctx):
    for x, y in [*loader, *loader]:
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def shake(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


PLANS = {
    "fedavg": recipes.fedavg(0.1, epochs=2, batch=4),
    "momentum": Plan(Train(sgd(0.1, momentum=0.9), epochs=2, batch=4), Mean(), sgd(1.0)),
    "custom": Plan(Custom(loop, batch=4), Mean(), sgd(1.0)),
}


def prints(data, plan, **settings):
    training = atoll.rounds("softmax", data, plan, rounds=2, **settings)
    return [(report.fingerprint, report.metrics.get("held_out_loss")) for report in training]


@pytest.mark.parametrize("name", only(["momentum"], PLANS))
def test_a_dataset_that_draws_gives_one_run_for_one_seed(name):
    plan = PLANS[name]
    found = []
    for seed in (1, 2):
        shake(seed)
        before = generator_states()
        data = atoll.data.dataset(Augmented()).split(3)
        found.append((data.fingerprint(), prints(data, plan)))
        assert generator_states() == before
    assert found[0] == found[1]
    assert found[0][1] != prints(data, plan, seed=1)


def test_backends_and_chunks_read_the_same_draws():
    data = atoll.data.dataset(Augmented()).split(3, atoll.data.Quantity(0.7))
    plan = PLANS["fedavg"]
    loop, lanes = (atoll.rounds("softmax", data, plan, rounds=2, numerics=n) for n in ("loop", "lanes"))
    list(loop), list(lanes)
    assert torch.allclose(loop.state.model.theta, lanes.state.model.theta, atol=1e-6)
    assert prints(data, plan, numerics="lanes", chunk=1) == prints(data, plan, numerics="lanes", chunk=3)
    auto = atoll.rounds("softmax", data, plan, rounds=2, numerics="auto")
    assert auto.task.numerics != "compiled"
    with pytest.raises(atoll.UsageError, match="draws random numbers"):
        atoll.rounds("softmax", data, plan, rounds=2, numerics="compiled")


def test_a_row_draws_again_in_each_pass_and_round_and_equally_when_it_is_read_for_the_split():
    from atoll.base.random import Key
    from atoll.compute.batches import ClientBatch

    data = atoll.data.dataset(Augmented()).split(3)
    places, ids = torch.arange(4)[None], torch.tensor([0])

    def read(round, lanes=None):
        lanes = lanes or ClientBatch(data, ids, torch.float32, key=Key(0).fold("round", round).of(ids))
        return lanes, lanes.take(lanes.places(places), (4,)).x

    lanes, first = read(0)
    _, again = read(0, lanes)
    assert not torch.equal(first, again) and not torch.equal(first, read(1)[1])
    assert torch.equal(first, read(0)[1])
    assert torch.equal(data.take(data.order[:4])[0], data.take(data.order[:4])[0])
    other = atoll.data.dataset(Augmented()).split(3, seed=1)
    assert not torch.equal(data.rows.take(torch.arange(4))[0], other.rows.take(torch.arange(4))[0])


def test_a_row_has_the_bits_of_generators_that_are_seeded_with_its_word():
    data, word, rows = Augmented(), Key(7).fold("rows").word(), [3, 0, 3, 21]
    x, y = DatasetRows(data).keyed(word).take(torch.tensor(rows))
    with global_scope(Key(0)):
        for row, ours in zip(rows, x, strict=True):
            own = mixed(word, row)
            torch.manual_seed(own >> 1), np.random.seed(own % 2**32), random.seed(own)
            assert torch.equal(data[row][0], ours)
    assert y.tolist() == [0, 0, 0, 0] and y.dtype == torch.int64
    y += 1  # changes no later reading
    assert DatasetRows(data).take(torch.tensor(rows))[1].tolist() == [0, 0, 0, 0]


def test_a_draw_that_was_missed_is_an_error_that_names_the_setting():
    data = atoll.data.dataset(Augmented(first=20)).split(3, held_out=0)
    shake(1)
    before = generator_states()
    training = atoll.rounds("softmax", data, PLANS["fedavg"], rounds=2)
    with pytest.raises(atoll.RunError, match="draws=True"):
        training.next()
    assert generator_states() == before and training.state.round == 0
    found = []
    for seed in (1, 2):
        shake(seed)
        before = generator_states()
        found.append(prints(data, PLANS["fedavg"], draws=True))
        assert generator_states() == before
    assert found[0] == found[1]


@pytest.mark.parametrize("setting", [{"loss": rough}, {}], ids=["loss", "evaluation"])
def test_an_evaluation_that_draws_gives_one_number(setting):
    data, found = classification((9, 5, 7)), []
    held = atoll.data.arrays(*data.rows.take(torch.arange(21))).split(3)
    for seed in (1, 2):
        shake(seed)
        before = generator_states()
        training = atoll.rounds(seeded(Dropped), held, PLANS["fedavg"], rounds=2, **setting)
        found.append([training.next().metrics["held_out_loss"], *(training.evaluate()["held_out_loss"] for _ in "123")])
        assert generator_states() == before
    assert found[0] == found[1] and len(set(found[0])) == 1


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "none": nullcontext,
}


def digits():
    return atoll.data.load("digits").split(3)


@pytest.mark.parametrize("numerics", only(["loop"], ["loop", "lanes"]))
def test_global_modes_change_no_bit(numerics):
    def run():
        training = atoll.rounds("mlp", digits(), recipes.fedavg(0.1, batch=100), rounds=1, numerics=numerics)
        report = training.next()
        return report.fingerprint, report.metrics["held_out_loss"], training.evaluate()["held_out_loss"]

    expected = run()
    for mode in MODES.values():
        with mode():
            assert run() == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert run() == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_cheap_comparison_finds_the_draws_of_each_generator():
    for draw in (lambda: torch.rand(1), lambda: np.random.rand(), random.random):
        before, draws = generator_states(), GeneratorWatch()
        assert not draws.found()
        draw()
        assert draws.found()
        draws.restore()
        assert not draws.found() and generator_states() == before


def test_rows_without_draws_are_read_once_each_and_without_a_scope():
    dataset = Augmented(first=99)
    data = atoll.data.dataset(dataset).split(3, held_out=0)
    before = dataset.reads
    data.take(data.order)
    assert dataset.reads - before == 40


def learnt(case):
    """The fingerprints of a training."""
    model, made, loss, plan, seed = case
    settings = {"loss": loss, "draws": True} if loss else {}
    training = atoll.rounds(model, made(), PLANS[plan], rounds=2, seed=seed, **settings)
    return [report.fingerprint for report in training]


def augmented():
    return atoll.data.dataset(Augmented(rows=20)).split(2)


def test_trainings_in_threads_give_the_bits_of_trainings_one_after_another():
    kinds = [("mlp", augmented, None, "custom"), (Dropped(), augmented, rough, "momentum")]
    cases = [(*kind, seed) for seed in (1, 2) for kind in kinds]
    expected = [learnt(case) for case in cases]
    shake(5)
    before = generator_states()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(learnt, cases)) == expected
    assert generator_states() == before
