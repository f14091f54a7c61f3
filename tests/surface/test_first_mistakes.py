"""Mistakes of a first part: a class without parentheses, a missing method, a part that raises."""

from dataclasses import dataclass, replace

import pytest
import torch
from problems import classification
from torch.utils.data import DataLoader, TensorDataset

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import parse
from atoll.engine import InProcess
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.spec import engine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Codec, ErrorFeedback, Identity, TopK
from atoll.plan.local import Train
from atoll.plan.optimizer import OptimizerBase, sgd
from atoll.plan.plan import Plan
from atoll.testing import Nonconformity, check_engine, check_sampler, check_schedule

DATA = classification((3, 4, 5))
PLAN = recipes.fedavg(0.1)


@dataclass(frozen=True, repr=False)
class Raising(Codec):
    def encode(self, x, memory, shared, key):
        raise ValueError("no code")


@dataclass(frozen=True, repr=False)
class Misspelled(Codec):
    def encod(self, x, memory, shared, key):
        return x, {}, {}, memory


@dataclass(frozen=True, repr=False)
class Stepless(OptimizerBase):
    lr: float = 0.1

    def apply(self, block, g, lr):
        raise KeyError("no step")


@pytest.mark.parametrize(
    ("make", "given", "write"),
    [
        (lambda: replace(PLAN, codec=Identity), "The slot codec of the plan is the class Identity", "Identity()"),
        (lambda: replace(PLAN, aggregator=Mean), "The slot aggregator of the plan is the class Mean", "Mean()"),
        (lambda: Identity() >> TopK, "A stage of a codec is the class TopK", "TopK(0.1)"),
        (lambda: ErrorFeedback(TopK), "The codec of ErrorFeedback is the class TopK", "TopK(0.1)"),
        (lambda: engine(InProcess), "engine is the class InProcess", "InProcess()"),
        (lambda: engine("fake_engine:Fake"), "engine is the class Fake", "fake_engine:Fake()"),
    ],
)
def test_a_class_instead_of_a_value(make, given, write):
    with pytest.raises(UsageError, match="add parentheses") as error:
        make()
    assert error.value.given.startswith(given) and error.value.write == write
    if not write:
        assert "TopK(fraction)" in error.value.required


def test_the_optimizer_of_train_is_a_class():
    if isinstance(sgd, type):
        with pytest.raises(UsageError, match=r"The optimizer of Train is the class sgd.*\n.*sgd\(lr\)"):
            Train(sgd, epochs=1)


def test_a_codec_without_encode_is_refused():
    """It must not train without compression."""
    with pytest.raises(TypeError, match="encode"):
        Misspelled()
    with pytest.raises(UsageError, match="the class Misspelled does not define encode") as error:
        parse("Misspelled()", {"Misspelled": Misspelled})
    assert error.value.required == "a class that defines encode."


def failing(plan):
    with pytest.raises(RunError) as error:
        atoll.rounds("softmax", DATA, plan, rounds=1).next()
    return error.value


def test_a_codec_that_raises_is_named_as_the_cause():
    error = failing(replace(PLAN, codec=Raising()))
    assert "at encode: ValueError: no code. It was raised in encode, test_first_mistakes.py:" in error.given
    assert error.why.endswith("so the cause is the codec of the plan.")


def test_an_optimizer_that_raises_is_among_the_causes():
    error = failing(Plan(Train(Stepless(), epochs=1), Mean()))
    assert "at local: KeyError: 'no step'. It was raised in apply, test_first_mistakes.py:" in error.given
    assert "the local part of the plan, with its optimizer" in error.why


def test_a_check_refuses_a_part_that_raises():
    class Sampling(atoll.plan.sampler.Uniform):
        def __call__(self, population, round, key):
            if round > 5:
                raise ZeroDivisionError("late")
            return super().__call__(population, round, key)

    for check, part in ((check_sampler, Sampling(2)), (check_schedule, 3)):
        with pytest.raises(Nonconformity):
            check(part)
    with pytest.raises(Nonconformity, match=r"raised ZeroDivisionError: late\. It was raised in __call__"):
        check_sampler(Sampling(2))
    with pytest.raises(Nonconformity, match="The engine raised AttributeError"):
        check_engine(lambda task, data: object())


def test_the_check_of_engines_closes_each():
    made, closed = [], []

    class Counting(InProcessEngine):
        def __init__(self, task, data):
            super().__init__(task, data)
            made.append(self)

        def close(self):
            closed.append(self)
            super().close()

        def gather(self, *args, **words):
            if len(made) > 4:
                raise OSError("enough")
            return super().gather(*args, **words)

    with pytest.raises(Nonconformity):
        check_engine(Counting)
    assert len(made) > 2 and set(map(id, made)) == set(map(id, closed)) and len(made) == len(closed)


ROWS = TensorDataset(torch.rand(40, 3), torch.arange(40) % 4)


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (ROWS, "atoll.data.dataset(data)"),
        (DataLoader(ROWS, batch_size=5), "atoll.data.dataset(data.dataset)"),
        (ROWS.tensors, "atoll.data.arrays(*data)"),
        (atoll.data.dataset(ROWS), "data"),
        ("wine", 'atoll.data.load("wine")'),
    ],
)
def test_data_of_torch_before_a_split(data, source):
    with pytest.raises(UsageError, match="clients: a data set that was split") as error:
        atoll.train("softmax", data, PLAN, rounds=1, out=None)
    assert error.value.line == f"{source}.split(10)"
    clients = eval(error.value.line, {"atoll": atoll, "data": data})
    assert atoll.train("softmax", clients, PLAN, rounds=1, out=None, progress="none").rounds == 1


def test_a_metric_of_two_classes_has_its_own_error():
    data = atoll.data.dataset(ROWS).split(2)
    with pytest.raises(UsageError) as error:
        atoll.train("softmax", data, PLAN, rounds=1, out=None, metrics=["f1"])
    assert error.value.given.startswith("The metric 'f1' was computed for 4 classes")
    assert error.value.line == 'metrics="macro_f1"'
