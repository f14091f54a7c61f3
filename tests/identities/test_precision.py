"""Products in bfloat16 on a float32 model: close to full precision, and as reproducible."""

from dataclasses import replace

import pytest
import torch
from architectures import MODELS
from problems import classification, run, seeded, task_of, tokens
from quick_cases import by_turns, one_in, only
from torch import nn

import atoll
from atoll import recipes, runs
from atoll.base.errors import UsageError
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.plan import Plan
from atoll.report.live import header

SIZES = (9, 5, 9, 3, 9, 5, 2, 7, 7)
USUAL = Plan(Train(rules.sgd(0.1), epochs=1, batch=4), Mean(), rules.sgd(1.0, momentum=0.5))


def _no_lstm() -> str:
    """The reason why torch has no LSTM in bfloat16 for this processor; empty if it has."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(3, 4)(torch.zeros(2, 1, 3))
    except RuntimeError as error:
        return f"torch on this processor: {error}".partition(".")[0]
    return ""


NO_LSTM = _no_lstm()


def models(name):
    """A model and its data, if this processor supports it in bfloat16."""
    if name == "lstm" and NO_LSTM:
        pytest.skip(NO_LSTM)
    return MODELS[name]


def bf16(task):
    return replace(task, precision="bf16")


@pytest.mark.slow
def test_digits_in_bfloat16_come_to_the_loss_of_float32():
    """Eight bits per product cost less than 0.2 % of the loss after ten rounds, and almost no accuracy."""
    data = atoll.data.load("digits").split(clients=20)
    ends = [
        atoll.train("mlp", data, recipes.fedavg(0.3, batch=10), rounds=10, out=None, precision=p, numerics="lanes")
        for p in ("full", "bf16")
    ]
    full, short = (run.metrics["held_out_loss"] for run in ends)
    assert full != short and abs(short - full) < 0.002 * full
    assert abs(ends[1].metrics["accuracy"] - ends[0].metrics["accuracy"]) <= 0.011  # four of 359 rows
    assert {p.dtype for p in ends[1].model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "body"), one_in(2, by_turns(MODELS, ["lanes", "loop"])))
def test_the_model_stays_in_float32(name, body):
    """θ, buffers, the server's optimizer and the loss are float32; so is the gradient, up to 8 bits."""
    make, make_data = models(name)
    module, data = make(), make_data(SIZES)
    task = task_of(module, data, body, torch.float32)
    plan = Plan(Train(rules.sgd(0.1), epochs=1, batch=4), Mean(), rules.adam(0.1))
    short, _ = run(plan, InProcessEngine(bf16(task), data))
    assert {t.dtype for t in (short.model.theta, short.model.buffers)} == {torch.float32}
    assert {t.dtype for t in short.optimizer.values() if t.dim()} == {torch.float32}
    data = make_data(tuple(n + 8 for n in SIZES))  # batch norm amplifies a small difference of two rows
    a, b = (run(Plan(Gradient(), Mean()), InProcessEngine(t, data), 1)[0].model for t in (bf16(task), task))
    step = b.theta - task.initial().theta
    # A product has eight bits; a ReLU or a pool may choose differently between two nearly equal numbers.
    assert 0 < float((a.theta - b.theta).norm() / step.norm()) < (2**-3 if name == "cnn" else 2**-5)
    assert a.buffers.shape == b.buffers.shape and torch.allclose(a.buffers, b.buffers, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", only(["batch norm"], MODELS))
def test_a_chunk_changes_no_bit(name):
    """If lanes in bfloat16 depend on other lanes, the start of a run detects it and chooses the loop."""
    make, make_data = models(name)
    data = make_data(SIZES)
    choice = choose(bf16(task_of(make(), data, dtype=torch.float32)), data, USUAL)
    assert choice.task.precision == "bf16" and choice.task.numerics in ("lanes", "loop")
    ends = [run(USUAL, InProcessEngine(choice.task, data, chunk))[0].model for chunk in (None, 1, 2, 5)]
    assert all(torch.equal(ends[0].theta, other.theta) for other in ends[1:]), choice
    assert all(torch.equal(ends[0].buffers, other.buffers) for other in ends[1:])


class Neighbourly(nn.Module):
    """In bfloat16 only, a lane's numbers depend on the number of lanes."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x)


def test_dependence_on_other_rows_in_bfloat16_is_found(monkeypatch):
    """The probe uses the precision of the run: a kernel that depends on other lanes only in bfloat16 excludes lanes."""
    data, gradient = classification(SIZES), Task._lanes_gradient

    def beside(self, model, batch, key):
        got = gradient(self, model, batch, key)
        return got._replace(grad=got.grad * (1 + 1e-3 * (len(got.grad) > 2))) if self.precision == "bf16" else got

    monkeypatch.setattr(Task, "_lanes_gradient", beside)
    task = task_of(seeded(Neighbourly), data, dtype=torch.float32)
    assert choose(task, data, USUAL).task.numerics == "lanes"
    choice = choose(bf16(task), data, USUAL)
    assert (choice.task.numerics, choice.reason) == ("loop", "a lane's bits would depend on its neighbours")


def test_it_is_written_down_and_kept(tmp_path):
    """A run is resumed in its precision; another precision is refused."""
    data, plan = atoll.data.load("digits").split(clients=5), recipes.fedavg(0.1)
    settings = {"out": tmp_path, "report": False}
    first = atoll.train("mlp", data, plan, rounds=1, precision="bf16", **settings)
    assert runs.read_environment(first.path)["precision"] == "bf16"
    with pytest.raises(UsageError, match=r"started with another precision: bf16. This training has full"):
        atoll.train("mlp", data, plan, rounds=2, resume=first.path, precision="full", **settings)
    ended = atoll.train("mlp", data, plan, rounds=2, resume=first.path, **settings)
    straight = atoll.train("mlp", data, plan, rounds=2, precision="bf16", out=None)
    assert all(torch.equal(a, b) for a, b in zip(ended.model.parameters(), straight.model.parameters(), strict=True))


def test_the_head_of_the_table_names_the_precision():
    data = atoll.data.load("digits").split(clients=5)
    full, short = (
        dict(header(atoll.rounds("softmax", data, recipes.fedavg(0.1), precision=p, device="cpu"), None))
        for p in ("full", "bf16")
    )
    assert "device" not in full and short["device"] == "cpu, bf16 precision"


def test_tokens_and_outputs_that_are_no_floats_stay():
    data = tokens(SIZES)
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)))
    state, (report,) = run(USUAL, InProcessEngine(bf16(task_of(model, data, "lanes", torch.float32)), data), 1)
    assert state.model.theta.dtype == torch.float32 and not report.failures


def by_hand(model, loader, ctx):
    return None


@pytest.mark.parametrize(
    ("settings", "given", "write"),
    [
        ({"precision": "fp16"}, "precision = 'fp16'", "--precision full"),
        ({"precision": "bf16", "dtype": "float64"}, "dtype = 'float64'", "--dtype float32"),
        ({"precision": "bf16", "numerics": "fused"}, "numerics = 'fused'", "--numerics auto"),
    ],
)
def test_refused(settings, given, write):
    data = atoll.data.load("digits").split(clients=5)
    with pytest.raises(UsageError) as refusal:
        atoll.rounds("mlp", data, recipes.fedavg(0.1), **settings)
    assert given in refusal.value.given and refusal.value.at("shell").line == write
    name, value = write.removeprefix("--").replace("=", " ").replace("'", "").split()
    atoll.rounds("mlp", data, recipes.fedavg(0.1), **{**settings, name: value})


def test_a_loop_of_your_own_computes_as_it_is_written():
    data = atoll.data.load("digits").split(clients=5)
    with pytest.raises(UsageError, match=r"torch\.autocast belongs in there") as refusal:
        atoll.rounds("mlp", data, Plan(Custom(by_hand), Mean()), precision="bf16")
    assert refusal.value.at("shell").line == "--precision full"


class Picky(nn.Linear):
    """A layer that does not run in bfloat16, as torch's LSTM on processors without it."""

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive descriptor")
        return super().forward(x)


def test_a_model_that_fails_in_bfloat16_alone_is_refused_with_the_line():
    data = classification((9, 7), shape=(4,))
    task = Task.of(seeded(Picky, 4, 3), "cross_entropy")
    with pytest.raises(UsageError, match="in which the model fails: RuntimeError: could not create") as caught:
        choose(bf16(task), data, USUAL)
    assert caught.value.at("shell").line == "--precision full"
    assert choose(task, data, USUAL).task.precision == "full"
