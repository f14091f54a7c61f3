"""Every public function takes a foreign value or refuses it: each call returns, or raises `UsageError`."""

import collections
import datetime
import decimal
import fractions
import inspect
import io
import pathlib
import types
import warnings

import numpy as np
import pytest
import torch
from quick_cases import only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import atoll
from atoll.base.errors import UsageError
from atoll.data import IID, Dirichlet
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Bounded, Buffered, Sync, hinge, staleness_polynomial
from atoll.plan.sampler import Fraction, Poisson, RoundRobin, Uniform, Weighted
from atoll.plan.schedule import constant, cosine
from atoll.training.stop import Diverged, Rounds

X = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
Y = np.arange(20) % 2
SOURCE = atoll.data.arrays(X, Y, by=np.arange(20) % 5)
DATA = SOURCE.split(5, IID())

FOREIGN = {
    "None": lambda: None,
    "true": lambda: True,
    "zero": lambda: 0,
    "negative": lambda: -1,
    "huge": lambda: 10**30,
    "float": lambda: 0.5,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "complex": lambda: 1 + 2j,
    "text": lambda: "forty-two",
    "empty text": lambda: "",
    "bytes": lambda: b"x",
    "list": list,
    "tuple of three": lambda: (X, Y, Y),
    "ragged": lambda: [[1.0], [1.0, 2.0]],
    "list of None": lambda: [None] * 20,
    "set": lambda: {1, 2},
    "dict": lambda: {"a": 1},
    "generator": lambda: (i for i in range(3)),
    "range": lambda: range(20),
    "function": lambda: lambda *a, **k: None,
    "class": lambda: object,
    "object": object,
    "module": lambda: types,
    "file": lambda: io.StringIO("a,b\n1,2\n"),
    "path": lambda: pathlib.Path("no/such/path"),
    "decimal": lambda: decimal.Decimal("1.5"),
    "fraction": lambda: fractions.Fraction(1, 3),
    "date": lambda: datetime.date(2026, 1, 1),
    "numpy integer": lambda: np.int64(3),
    "numpy float": lambda: np.float32(0.25),
    "numpy truth": lambda: np.True_,
    "zero-dimensional": lambda: np.array(3),
    "empty array": lambda: np.zeros((0, 4)),
    "masked": lambda: np.ma.array(X, mask=X > 1),
    "masked scalar": lambda: np.ma.masked,
    "object array": lambda: np.array([1, "a", None, {}], dtype=object),
    "longdouble": lambda: X.astype(np.longdouble),
    "dates": lambda: np.array(["2026-01-01", "NaT"], dtype="datetime64[D]"),
    "records": lambda: np.zeros(20, dtype=[("a", float), ("b", int)]),
    "sparse": lambda: torch.tensor(X).to_sparse(),
    "complex tensor": lambda: torch.zeros(20, 4, dtype=torch.complex64),
    "meta tensor": lambda: torch.zeros(20, 4, device="meta"),
    "scalar tensor": lambda: torch.tensor(2),
    "truth tensor": lambda: torch.tensor([True, False] * 10),
    "gradient": lambda: torch.zeros(20, 4, requires_grad=True),
    "loader": lambda: DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=5),
    "counter": lambda: collections.Counter("abc"),
    "module of torch": lambda: nn.Linear(4, 2),
}

ROWS = SOURCE.rows
PLAN = atoll.recipes.fedavg(0.1)
FILE = "no-such.csv"
# A call that works, by keywords; each keyword is replaced by each foreign value in turn.
CALLS = {
    "arrays": (
        atoll.data.arrays,
        {"x": X, "y": Y, "by": Y, "task": None, "scale": "none", "test": (X, Y), "name": "a"},
    ),
    "dataset": (
        atoll.data.dataset,
        {"data": [(X[i], int(Y[i])) for i in range(20)], "by": Y, "task": None, "name": "d"},
    ),
    "dataset test": (atoll.data.dataset, {"data": (X, Y), "test": (X, Y)}),
    "federate": (
        atoll.data.federate,
        {"parts": [(X, Y), (X, Y)], "held_out": 0.2, "seed": 0, "min_rows": 1, "task": None, "name": "f"},
    ),
    "one part": (lambda part: atoll.data.federate([(X, Y), part]), {"part": (X, Y)}),
    "x of a part": (lambda x, y: atoll.data.federate([(X, Y), (x, y)]), {"x": X, "y": Y}),
    "one row": (lambda row: atoll.data.dataset([(X[0], 0), row]).rows.targets(), {"row": (X[1], 1)}),
    "x of a row": (lambda x, y: atoll.data.dataset([(x, y)] * 3), {"x": X[1], "y": 1}),
    "load": (atoll.data.load, {"name": "diabetes", "folder": None, "target": None, "by": None, "task": None}),
    "load table": (atoll.data.load, {"name": "diabetes", "missing": None, "scale": None}),
    "csv": (atoll.data.csv, {"path": FILE, "target": None, "by": None, "task": None, "missing": None, "scale": None}),
    "split": (SOURCE.split, {"clients": 5, "by": IID(), "held_out": 0.2, "seed": 0, "min_rows": 1}),
    "only": (DATA.only, {"ids": torch.tensor([1, 2])}),
    "client_rows": (DATA.client_rows, {"client": 1}),
    "Dirichlet": (Dirichlet, {"alpha": 0.5}),
    "Pathological": (atoll.data.Pathological, {"classes_per_client": 2}),
    "Shards": (atoll.data.Shards, {"shards_per_client": 2}),
    "Quantity": (atoll.data.Quantity, {"power": 1.0}),
    "FeatureShift": (atoll.data.FeatureShift, {"noise": 0.1, "rotation": 0.0}),
    "rounds": (atoll.rounds, {"model": "softmax", "data": DATA, "plan": PLAN}),
    "train": (atoll.train, {"model": "softmax", "data": 1, "plan": PLAN, "out": None}),
    "atoll.load": (atoll.load, {"path": "no/such/run", "model": None, "best": False}),
    "Settings": (
        atoll.Settings,
        {n: p.default for n, p in inspect.signature(atoll.Settings).parameters.items()},
    ),
    "Plan": (
        atoll.Plan,
        {
            **{"local": Gradient(), "aggregator": Mean(), "optimizer": sgd(0.1), "cohort": None, "codec": PLAN.codec},
            **{"pace": Sync(), "downlink": PLAN.downlink, "max_failed": 0.5},
        },
    ),
    "Metric": (atoll.Metric, {"name": "a", "sums": torch.sub}),
    "fedavg": (atoll.recipes.fedavg, {"lr": 0.1, "epochs": 1, "batch": 10, "cohort": None}),
    "distributed_gd": (atoll.recipes.distributed_gd, {"lr": 0.1}),
    "Gradient": (Gradient, {"batch": 3}),
    "Train": (Train, {"optimizer": sgd(0.1), "epochs": 1, "steps": None, "batch": 3, "keep": (), "sends": "update"}),
    "Custom": (Custom, {"fn": print, "batch": 3, "lr": 0.1, "sends": "update"}),
    "Mean": (Mean, {"weights": "equal", "over": "arrived", "sum": "exact", "max_weight": None}),
    "Uniform": (Uniform, {"n": 3}),
    "Weighted": (Weighted, {"n": 3}),
    "RoundRobin": (RoundRobin, {"n": 3}),
    "Fraction": (Fraction, {"q": 0.5}),
    "Poisson": (Poisson, {"q": 0.5}),
    "Sync": (Sync, {"over_select": 1.0, "quorum": 0.0, "deadline_s": None, "partial": False}),
    "Buffered": (Buffered, {"k": 3, "staleness": hinge(1.0)}),
    "Bounded": (Bounded, {"staleness": 3}),
    "hinge": (hinge, {"slope": 1.0, "grace": 2}),
    "staleness_polynomial": (staleness_polynomial, {"power": 1.0}),
    "sgd": (sgd, {"lr": 0.1, "momentum": 0.0, "nesterov": False}),
    "cosine": (cosine, {"lr": 0.1, "rounds": 10, "end": 0.0}),
    "constant": (constant, {"lr": 0.1}),
    "Rounds": (Rounds, {"n": 10}),
    "Diverged": (Diverged, {"factor": 10.0}),
    "Key": (atoll.Key, {"seed": 3}),
}


def attempts(name, whole):
    """The calls of a function: each argument with each value, or with a third of the values, and each value once."""
    call, given = CALLS[name]
    for i, argument in enumerate(given):
        for j, (kind, make) in enumerate(FOREIGN.items()):
            if whole or len(given) < 3 or (i + j) % 3 == 0:
                yield argument, kind, call, given, make


def trouble(call, given, argument, make):
    """The exception of a call with a foreign value, if it is no `UsageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**{**given, argument: make()})
    except UsageError as error:
        return "" if str(error) else "an empty error"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return ""


@pytest.mark.parametrize("whole", only([False], [False, True]), ids=["a third", "all"])
@pytest.mark.parametrize("name", CALLS)
def test_a_foreign_value_is_taken_or_refused(name, whole):
    bad = {
        (argument, kind): found
        for argument, kind, call, given, make in attempts(name, whole)
        if (found := trouble(call, given, argument, make))
    }
    assert not bad, "\n" + "\n".join(f"{a} = {k}: {t}" for (a, k), t in bad.items())


def test_the_calls_themselves_work():
    """A call that is refused for another reason would prove nothing."""
    for name, (call, given) in CALLS.items():
        if name not in ("csv", "train", "atoll.load"):  # they need a file or a run
            call(**given)


@pytest.mark.parametrize("five", [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)])
def test_a_whole_number_of_another_library_is_a_python_number(five):
    half = torch.tensor(0.5) if isinstance(five, torch.Tensor) else np.float32(0.5)
    for one, plain in (
        (atoll.recipes.fedavg(half, epochs=five, batch=five, cohort=five), atoll.recipes.fedavg(0.5, 5, 5, cohort=5)),
        (Sync(over_select=1 + half, deadline_s=five, quorum=half), Sync(over_select=1.5, deadline_s=5, quorum=0.5)),
        (Buffered(five, hinge(half, grace=five)), Buffered(5, hinge(0.5, grace=5))),
        (Custom(print, batch=five, lr=half), Custom(print, batch=5, lr=0.5)),
        (cosine(half, rounds=five), cosine(0.5, rounds=5)),
        (Fraction(half), Fraction(0.5)),
        (atoll.Settings(rounds=five, seed=five, chunk=five), atoll.Settings(rounds=5, seed=5, chunk=5)),
    ):
        assert repr(one) == repr(plain) and one == plain
    split = SOURCE.split(five, IID(), held_out=half, seed=five, min_rows=torch.tensor(1))
    assert torch.equal(split.order, SOURCE.split(5, IID(), held_out=0.5, seed=5, min_rows=1).order)


@pytest.mark.parametrize(
    "make",
    [
        lambda five: atoll.recipes.fedavg(0.1, batch=five),
        lambda five: Custom(print, batch=five),
        lambda five: Buffered(five),
        lambda five: cosine(0.5, rounds=five),
        lambda five: atoll.Settings(rounds=five),
        lambda five: atoll.Settings(engine=f"Processes({five})").spec,
        lambda five: SOURCE.split(five),
        lambda five: atoll.recipes.local_sgd(0.1, steps=five),
    ],
)
def test_a_whole_float_is_no_whole_number(make):
    make(5)
    for five in (5.0, np.float32(5)):
        with pytest.raises(UsageError):
            make(five)


def test_clients_are_selected_by_id_name_list_range_array_or_tensor():
    named = atoll.data.federate({"a": (X[:5], Y[:5]), "b": (X[5:], Y[5:]), "c": (X, Y)}, held_out=0)
    ways = ([1, 2], (np.int64(1), 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), ["b", "c"], ("b", 2))
    for ids in ways:
        some = named.only(ids)
        assert some.names == ("b", "c") and torch.equal(some.order, named.order[5:])
    for one in (1, "b", np.int8(1), torch.tensor(1)):
        assert named.only(one).names == ("b",)
    for wrong, words in (
        (3, "no client 3"),
        (-1, "no client -1"),
        ("d", "No client is called 'd'"),
        ([1, "b"], "twice"),
    ):
        with pytest.raises(UsageError, match=words):
            named.only(wrong)


def test_federate_takes_a_generator():
    data = atoll.data.federate(((X[i::2], Y[i::2]) for i in range(2)), held_out=0)
    assert data.count == 2 and torch.equal(data.order, torch.arange(20))


@pytest.mark.parametrize(
    "door", [atoll.data.arrays, atoll.data.dataset, atoll.data.federate, atoll.data.frame, atoll.load]
)
def test_an_unknown_keyword_lists_the_known_ones(door):
    with pytest.raises(UsageError, match=r"got an unexpected keyword argument 'clases'") as caught:
        door(*([X, Y] if door is atoll.data.arrays else [X]), clases=3)
    for name in inspect.signature(door).parameters:
        assert name in caught.value.required


def test_a_data_loader_is_refused_with_its_dataset():
    loader = FOREIGN["loader"]()
    for make in (atoll.data.dataset, atoll.data.federate, lambda d: atoll.data.arrays(d, Y)):
        with pytest.raises(UsageError, match="is a DataLoader") as caught:
            make(loader)
        assert caught.value.line == "atoll.data.dataset(loader.dataset)"
    assert len(atoll.data.dataset(loader.dataset)) == 20
    with pytest.raises(UsageError, match="test is a tuple with 4 entries"):
        atoll.data.arrays(X, Y, test=(X, Y, Y, Y))


def test_a_loader_has_the_rows_of_the_client_and_no_other_attribute_of_a_data_loader():
    seen = {}

    def train(model, loader, ctx):
        rows = loader.dataset
        xs, ys = map(torch.stack, zip(*(rows[i] for i in range(len(rows))), strict=True))
        assert torch.equal(rows[-1][0], xs[-1]) and not hasattr(loader, "sampler")
        with pytest.raises(IndexError):
            rows[len(rows)]
        assert sum(len(x) for x, _ in DataLoader(rows, batch_size=2)) == len(rows)
        seen[ctx.client] = (xs, ys, loader.batch_size, loader.rows, len(loader))

    for batch in (3, None):
        atoll.rounds("softmax", DATA, atoll.Plan(Custom(train, batch=batch), Mean()), rounds=1).next()
        for client, (xs, ys, size, rows, batches) in seen.items():
            x, y = DATA.take(DATA.client_rows(client))
            assert torch.equal(xs, x) and torch.equal(ys, y) and rows == len(x)
            assert (size, batches) == ((3, -(-rows // 3)) if batch else (rows, 1))
    plan = atoll.Plan(Custom(lambda model, loader, ctx: {"workers": loader.num_workers}), Mean())
    with pytest.raises(UsageError, match=r"loader.num_workers(.|\n)*loader.dataset, loader.batch_size, loader.rows"):
        atoll.rounds("softmax", DATA, plan, rounds=1).next()
