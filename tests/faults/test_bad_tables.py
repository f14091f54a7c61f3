"""Wrong tables, metrics, weights and held-out rows are refused, and the line of each error mends the call.

If the error has a line, the test runs it: as a call, or as options of the same call.
"""

import numpy as np
import pandas
import pytest
import torch
from fake_engine import Fake, FakeEngine

import atoll
from atoll import Metric
from atoll.base.errors import AtollError, UsageError
from atoll.base.lines import forms
from atoll.cli.answer import answer
from atoll.compute import limits
from atoll.compute.metrics import Counts
from atoll.data import arrays, csv, federate, frame, load

PLAN = atoll.recipes.fedavg(0.1)
X, Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
NAN = float("nan")


def rows(*columns):
    """The text of a CSV file with 40 rows: the columns are functions of the number of the row."""
    return "\n".join(";".join(str(column(i)) for column in columns) for i in range(40))


FILES = {
    "plain": "u;v;prize;y\n" + rows(lambda i: i, lambda i: i % 7, lambda i: i % 5, lambda i: "ab"[i % 2]),
    "marks": "u;v;y\n" + rows(lambda i: i, lambda i: f"{i},5" if i % 2 else f"{i}.5", lambda i: "ab"[i % 2]),
    "formats": "u;v;y\n"
    + rows(lambda i: i, lambda i: "2024-01-02" if i % 2 else f"{i % 9 + 1}.1.2024", lambda i: "ab"[i % 2]),
    "german": "u;v;y\n" + rows(lambda i: i, lambda i: f"{i % 9 + 1}.1.2024", lambda i: "ab"[i % 2]),
    "soon": "u;v;y\n"
    + rows(lambda i: i, lambda i: "soon" if i == 7 else f"2024-01-{10 + i % 9}", lambda i: "ab"[i % 2]),
    "almost": "u;v;y\n" + rows(lambda i: i, lambda i: "?-" if i == 7 else i, lambda i: "ab"[i % 2]),
    "thousands": "u,v,y\n" + "\n".join(f'{i},"{i % 3 + 1},{i + 100}",{"ab"[i % 2]}' for i in range(40)),
    "certain": "u;v;y\n" + rows(lambda i: i, lambda i: f"1,{i + 100}.5" if i else 7, lambda i: "ab"[i % 2]),
    "gap": "u;v;y\n" + rows(lambda i: i, lambda i: "" if i == 7 else "ns"[i % 2], lambda i: "ab"[i % 2]),
    "quoted": "u,v,y\n" + "\n".join(f'{i},"{(i, f"{i}.5", f"{i},5")[i % 3]}",{"ab"[i % 2]}' for i in range(40)),
    "points": "u;v;y\n" + rows(lambda i: i, lambda i: f"{i}.5", lambda i: "ab"[i % 2]),
    "commas": "u;v;y\n" + rows(lambda i: i, lambda i: f"{i},5", lambda i: "ab"[i % 2]),
    "whole": "u;v;w;y\n"
    + rows(lambda i: i, lambda i: f"{i},5", lambda i: f"{i % 4 + 1}.{i + 100}", lambda i: "ab"[i % 2]),
    "answers": "u;y\n" + rows(lambda i: i, lambda i: f"{i},5" if i % 9 else "unknown"),
    "names": "u;v;y\n" + rows(lambda i: i, lambda i: f"p{i}", lambda i: "ab"[i % 2]),
}
TABLES = [
    ("plain", {"drop": "y"}, "'y' is the target and is dropped"),
    ("plain", {"drop": "u,v,prize"}, "no feature is left"),
    ("plain", {"columns": "v,price"}, "No column is called 'price'"),
    ("plain", {"drop": "price"}, "No column is called 'price'"),
    ("plain", {"classes": "a"}, "contains 'b' at row 1"),
    ("plain", {"positive": "c"}, "one of two classes: a, b"),
    ("marks", {}, "mixes decimal marks: '1,5' at row 1, '0.5' at row 0"),
    ("formats", {}, "such as '1.1.2024' at row 0. The formats differ: '2024-01-02'"),
    ("german", {}, "dates that are not ISO"),
    ("soon", {}, "contains dates, and 'soon' at row 7"),
    ("almost", {}, "numbers, except for 1 of 40 cells: '?-' at row 7"),
    ("thousands", {}, "a comma before three digits: '1,100' at row 0. If it separates thousands"),
    ("certain", {}, "'1,101.5' at row 1. If it separates thousands, remove it"),
    ("quoted", {}, "mixes decimal marks: '2,5' at row 2, '1.5' at row 1"),
    ("points", {"decimal": ","}, "contains '0.5' at row 0, and decimal=','"),
    ("commas", {"decimal": "."}, "contains '0,5' at row 0, and decimal='.'"),
    ("whole", {}, "a point before three digits, '1.100' at row 0, and other columns have decimal commas"),
    ("answers", {}, "has 36 different texts in 40 rows"),
    ("gap", {"by": "v"}, "column 'v' has no value at row 7"),
    ("names", {"by": "v"}, "40 different values in 40 rows"),
]


def mended(call, options, text):
    """The result of the call after its error and the line of the error; None if the error has no line."""
    with pytest.raises(AtollError) as refused:
        call(**options)
    assert text in str(refused.value)
    line = forms(refused.value.write)[0]
    if not line or line.startswith("float"):
        return None
    changes = line.removeprefix("data.split(").removesuffix(")") if line.startswith("data.split") else line
    return eval(line) if line.startswith("atoll.") else call(**{**options, **eval(f"dict({changes})")})


@pytest.mark.parametrize(("name", "options", "text"), TABLES)
def test_tables(tmp_path, name, options, text):
    path = tmp_path / "t.csv"
    path.write_text(FILES[name])
    found = mended(lambda **words: csv(path, **words), {"target": "y", **options}, text)
    lineless = name in ("plain", "names", "gap") and not ("classes" in options or "price" in str(options))
    assert (found is None) == lineless
    assert found is None or (len(found) == (35 if name == "answers" else 40) and found.columns)


@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow"])
def test_a_nested_column_may_be_left_out(tmp_path, package, capsys):
    df = pandas.DataFrame({"u": np.arange(20.0), "l": [[1]] * 20, "y": ["a", "b"] * 10})
    df.to_parquet(tmp_path / "t.parquet")
    given = {
        "pandas": lambda: df,
        "polars": lambda: __import__("polars").read_parquet(tmp_path / "t.parquet"),
        "pyarrow": lambda: __import__("pyarrow").Table.from_pandas(df),
    }[package]()
    assert mended(lambda **words: frame(given, target="y", **words), {}, "Column 'l' contains").columns == ("u",)
    if package == "pyarrow":
        source = mended(lambda **words: load(tmp_path / "t.parquet", target="y", **words), {}, "Column 'l' contains")
        run = atoll.train("logistic", source.split(2), PLAN, rounds=1, out=tmp_path, report=False)
        to = tmp_path / "out.parquet"
        assert answer(["predict", str(run.path), str(tmp_path / "t.parquet"), "--to", str(to), "--quiet"]) == 0
        assert pandas.read_parquet(to)["l"].tolist() == [[1]] * 20
        assert answer(["predict", str(run.path), str(tmp_path / "t.parquet")]) == 2
        assert "Column 'l' contains" in capsys.readouterr().err


def train(data=None, model="softmax", **words):
    return atoll.train(model, arrays(X, Y).split(4) if data is None else data, PLAN, rounds=1, out=None, **words)


NUMBERS = arrays(X, X[:, 0] * 2.5, task="regression").split(4)
OWN_TESTS = arrays(X, Y, test=(X[:9], Y[:9]))
SETTINGS = [
    ({"metrics": [Metric("m", lambda o, y: o)]}, "has shape (4, 2)"),
    ({"metrics": [Metric("m", lambda o, y: o.sum())]}, "has shape ()"),
    ({"metrics": [Metric("m", lambda o, y: o[:, 0].to(torch.complex64))]}, "is complex (torch.complex64)"),
    ({"metrics": [Metric("m", lambda o, y: [1.0] * len(y))]}, "is a list"),
    ({"metrics": [Metric("m", lambda o, y: o[:, :, None], lambda t, n: 1.0)]}, "has shape (4, 2, 1)"),
    ({"metrics": [Metric("m", lambda o, y: Counts(y, 1), lambda t, n: 1.0)]}, "Counts with index (4,)"),
    ({"metrics": [Metric("m", lambda o, y: o, lambda t, n: 1 / 0)]}, "raised ZeroDivisionError"),
    ({"metrics": [Metric("m", lambda o, y: o, lambda t, n: "x")]}, "raised ValueError"),
    ({"metrics": [Metric.whole("m", lambda o, y: o.no_such)]}, "raised AttributeError"),
    ({"metrics": ["accuracy", "accuracy"]}, "called 'accuracy' twice"),
    ({"metrics": [Metric("loss", lambda o, y: o[:, 0])]}, "called 'loss'"),
    ({"metrics": ["accuracy", Metric("accuracy_min", lambda o, y: o[:, 0])]}, "called 'accuracy_min'"),
    ({"data": NUMBERS, "model": "linear", "metrics": ["f1"]}, "'f1' for a target of numbers"),
    ({"metrics": ["rmse"]}, "'rmse' for a target of classes"),
    ({"class_weight": {"0": -1, "1": 1}}, "weights of at least 0"),
    ({"class_weight": {"0": 0, "1": 0}}, "not all 0"),
    ({"class_weight": {"0": NAN, "1": 1}}, "weights of at least 0"),
    ({"class_weight": {"2": 1.0}}, "the classes 0, 1"),
    ({"data": NUMBERS, "model": "linear", "class_weight": "balanced"}, "with regression"),
    ({"class_weight": "balanced", "loss": lambda o, y: (o[:, 0] - y) ** 2}, "with a loss of your own"),
    ({"data": OWN_TESTS.split(4, held_out=0.0), "evaluate": "clients", "metrics": ["f1", "f1"]}, "twice"),
]


@pytest.mark.parametrize(("options", "text"), SETTINGS)
def test_metrics_and_weights(options, text):
    found = mended(train, options, text)
    assert found is None or found.status == "done"


def test_auc_of_labels_is_a_mean_over_labels():
    data = arrays(X, (X[:, :2] > 0).float(), task="labels").split(2)
    assert 0 <= train(data, "logistic", metrics=["auc"]).metrics["auc"] <= 1


def test_a_metric_over_too_many_rows_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "WHOLE_METRIC_NUMBERS", 10)
    whole = Metric.whole("m", lambda o, y: 1.0)
    assert mended(train, {"metrics": [whole]}, "more than 10 outputs and targets, for m").status == "done"


def test_a_metric_over_all_rows_is_refused_if_the_rows_are_on_other_hosts(monkeypatch):
    monkeypatch.setattr(FakeEngine, "judges", True, raising=False)
    options = {"metrics": [Metric.whole("m", lambda o, y: 1.0)], "engine": Fake()}
    data = arrays(X, Y).split(4, held_out=0)
    assert mended(lambda **words: train(data, **words), options, "on other hosts").status == "done"


def test_clients_without_held_out_rows_are_counted_and_left_out():
    data = federate({"n": (X, Y), "s": (X, Y)}, held_out={"n": (X, Y)})
    run = train(data)
    assert "1 of 2 clients have no held-out rows." in run.notes
    assert run.metrics["accuracy_clients"] == run.metrics["accuracy"]
    assert mended(lambda **w: federate({"n": (X, Y)}, **w), {"held_out": {"w": (X, Y)}}, "No client is called") is None
    found = mended(lambda **w: federate({"n": (X, Y)}, **w), {"classes": ["0"]}, "contains '1' at row 1")
    assert found is not None and found.classes == ("0", "1")


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("Groups('g', 0.2)", "'g' has 1 group"),
        ("After('t', 0.2)", "row 0 has 'x' in 't'"),
        ("Mask('t', 'z')", "no row of 't' has the value 'z'"),
        ("Mask('nope', 'z')", "No column is called 'nope'"),
        ("After('u', 1000)", "holds out 0 of 40 rows"),
        ("PerClient(0.2)", "no natural clients"),
    ],
)
def test_held_out_rows(rule, text):
    df = pandas.DataFrame({"u": np.arange(40.0), "g": ["p"] * 40, "t": ["x", "y", "w", "v"] * 10, "y": ["a", "b"] * 20})
    found = mended(lambda **words: frame(df, target="y").split(clients=2, **words), {"held_out": rule}, text)
    assert (found is None) == ("nope" in rule) and (found is None or len(found.held_out) >= 8)


def test_clients_are_not_evaluated_without_held_out_rows():
    data = arrays(X, Y).split(4, held_out=0)
    found = mended(lambda **words: train(data, **words), {"evaluate": "clients"}, "no held-out row belongs to a client")
    assert found.status == "done"
    with pytest.raises(UsageError):
        train(data, evaluate="client")


def test_an_empty_file(tmp_path):
    (tmp_path / "t.csv").touch()
    with pytest.raises(UsageError, match="has 0 rows"):
        csv(tmp_path / "t.csv", target="y")
