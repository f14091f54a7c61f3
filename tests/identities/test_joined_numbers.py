"""Numbers of several clients are joined only if they have one meaning: metrics, dtypes, missing marks of containers."""

import math

import numpy as np
import pytest
import torch
from problems import classification
from torch import nn

import atoll
from atoll.base.errors import UsageError
from atoll.base.names import RESERVED
from atoll.compute.loss import mse
from atoll.compute.metrics import Metric
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan

SIZES = (9, 5, 9, 3, 9, 5, 9)
DATA = classification(SIZES)


def reporting(metrics):
    """A loop that returns `metrics(client, round)` and trains nothing."""
    return Plan(Custom(lambda model, loader, ctx: metrics(ctx.client, ctx.round)), Mean(), max_failed=1.0)


def rounds(plan, count=1, **settings):
    training = atoll.rounds(nn.Linear(4, 3), DATA, plan, rounds=count, **settings)
    return list(training)


def scores(client, round):
    """Clients 0, 3 and 6 report an AUC; client 5 reports nothing."""
    auc = {"auc": np.float32(0.25 * client)} if client % 3 == 0 else {}
    return None if client == 5 else {"loss": torch.tensor(1.0 + client), **auc}


def test_a_metric_is_divided_by_the_rows_of_the_clients_that_returned_it():
    (report,) = rounds(reporting(scores))
    for name, clients in (("auc", [0, 3, 6]), ("loss", [0, 1, 2, 3, 4, 6])):
        values = [float(scores(i, 0)[name]) for i in clients]
        assert math.isclose(
            report.metrics[name], np.average(values, weights=[SIZES[i] for i in clients]), rel_tol=1e-12
        )


def test_versions_of_the_model_with_different_metrics_are_joined():
    """A round that closes with contributions of several versions: each metric covers the clients that returned it."""
    plan = Plan(Custom(lambda m, loader, ctx: {f"odd{ctx.round % 2}": 3.0}), Mean(), cohort=3, pace=Buffered(2))
    reports = rounds(plan, 8, fleet=Fleet(compute=HalfNormal()))
    odd = [{n: v for n, v in r.metrics.items() if n.startswith("odd")} for r in reports]
    assert {value for metrics in odd for value in metrics.values()} == {3.0}
    assert max(map(len, odd)) == 2  # a round with contributions of an even and of an odd version


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), torch.tensor(-math.inf)])
def test_a_metric_that_is_not_finite_fails_its_client(value):
    plan = reporting(lambda client, round: {"auc": value if client == 2 else 0.5})
    (report,) = rounds(plan)
    (failure,) = report.failures
    assert (failure.client, failure.stage) == (2, "local") and failure.cause.startswith("The metric 'auc' is ")
    assert report.arrived == 6 and report.metrics["auc"] == 0.5


@pytest.mark.parametrize(
    "metrics, words",
    [
        (7, "returned int"),
        ({"auc": "0.5"}, "the metric 'auc' = '0.5', a str"),
        ({"auc": None}, "a NoneType"),
        ({"auc": [1.0]}, "a list"),
        ({"auc": torch.ones(2)}, "a Tensor"),
        ({"auc": 1j}, "a complex"),
        ({3: 1.0}, "a metric named 3"),
        ({"lr": 1.0, "training_lr": 2.0}, "'training_lr' twice"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(metrics, words):
    with pytest.raises(UsageError, match=words):
        rounds(reporting(lambda client, round: metrics))


def test_a_reserved_name_becomes_a_name_of_training():
    given = dict(zip(RESERVED, map(float, range(len(RESERVED))), strict=True)) | {"rows/auc": 0.5}
    plain, named = (rounds(reporting(lambda c, r, m=m: m), 2) for m in ({}, given))
    for before, after in zip(plain, named, strict=True):
        own = {n: v for n, v in after.metrics.items() if not n.startswith("training_")}
        assert own == dict(before.metrics) and (before.round, before.cohort) == (after.round, after.cohort)
        assert {name: after.metrics[f"training_{name}"] for name in given} == given


@pytest.mark.parametrize("names", [["lr"], ["loss"], ["round"], ["mine", "mine"]])
def test_a_declared_metric_with_a_reserved_or_repeated_name_is_refused(names):
    with pytest.raises(UsageError, match=f"A metric is called {names[-1]!r}"):
        rounds(reporting(lambda c, r: None), metrics=[Metric(n, mse) for n in names])


PARTS = {
    "raw": np.arange(20 * 4, dtype=np.uint8).reshape(20, 4) * 3,
    "ready": np.linspace(0, 1, 80, dtype=np.float32).reshape(20, 4),
    "whole": np.arange(80).reshape(20, 4),
}
LABELS = np.arange(20) % 2


@pytest.mark.parametrize("as_dataset", [False, True])
def test_parts_of_different_dtypes_are_converted_as_each_alone_would_be(as_dataset):
    def part(name):
        pairs = list(zip(map(torch.from_numpy, PARTS[name]), LABELS.tolist(), strict=True))
        return pairs if as_dataset else (PARTS[name], LABELS)

    data = atoll.data.federate({name: part(name) for name in PARTS}, held_out=0)
    for client, name in enumerate(PARTS):
        alone = atoll.data.federate({name: part(name)}, held_out=0)
        (x, y), (expected, targets) = (d.take(d.client_rows(c)) for d, c in ((data, client), (alone, 0)))
        assert x.dtype == torch.float32 and torch.equal(x, expected.float()) and torch.equal(y, targets)
    assert any("joined as float32" in note for note in data.notes)
    assert not any("joined" in note for note in alone.notes)


def masked(x):
    return np.ma.masked_greater(x, 900)


X = np.r_[np.zeros((5, 2)), [[0.0, 999.0]]]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: atoll.data.arrays(masked(X), np.arange(6) % 2), "x has no value at row 5, column 1"),
        (lambda: atoll.data.arrays(masked(X.astype(int)), np.arange(6) % 2), "row 5, column 1"),
        (lambda: atoll.data.arrays([masked(row) for row in X], np.arange(6) % 2), "row 5, column 1"),
        (lambda: atoll.data.arrays(X, masked(np.array([0, 1, 0, 999, 1, 0]))), "y has no value at row 3"),
        (lambda: atoll.data.arrays(X, [0, 1, np.ma.masked, 1, 1, 0]), "row 2"),
        (
            lambda: atoll.data.arrays(X, np.arange(6) % 2, by=masked(np.array([0, 1, 0, 999, 1, 0]))),
            "by has no value at row 3",
        ),
        (lambda: atoll.data.federate([(X, X[:, 0]), (masked(X), X[:, 0])]), "x of client 1 has no value at row 5"),
        (lambda: atoll.data.dataset([(masked(row), 0) for row in X[::-1]]), "Row 0 of the dataset has a masked value"),
        (lambda: atoll.data.arrays(X, X[:, 0], test=(masked(X), X[:, 0])), "the test x has no value at row 5"),
    ],
)
def test_a_masked_value_is_missing(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_a_mask_that_masks_nothing_changes_nothing():
    source = atoll.data.arrays(np.ma.array(X), np.ma.array(np.arange(6) % 2))
    assert torch.equal(source.rows.take(torch.arange(6))[0], torch.from_numpy(X))


def test_missing_marks_of_pandas_and_arrow_are_missing():
    pd, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    y = np.arange(4) % 2
    column = pd.array([1, 2, None, 4], dtype="Int64")
    for make, words in (
        (lambda: atoll.data.arrays(pd.DataFrame({"a": column, "b": 1.0}), y), "x has no value at row 2, column 0"),
        (
            lambda: atoll.data.arrays(np.eye(4), pd.array(["a", None, "b", "a"], dtype="string")),
            "y has no value at row 1",
        ),
        (lambda: atoll.data.arrays(np.eye(4), y, by=pd.array(["a", "b", None, "a"])), "by has no value at row 2"),
        (lambda: atoll.data.arrays(np.eye(4), pa.array(["a", None, "b", "a"])), "y has no value at row 1"),
        (lambda: atoll.data.arrays(pa.table({"a": [1, None, 2, 3]}), y), "nan at row 1, column 0"),
    ):
        with pytest.raises(UsageError, match=words):
            make()
    for dtype in ("Int64", "float[pyarrow]"):
        frame = pd.DataFrame({"a": pd.array([1, 2, None, 4], dtype=dtype), "y": y})
        data = atoll.data.frame(frame, target="y", missing="mean").split(1, held_out=0)
        assert not data.take(data.order)[0].isnan().any()
