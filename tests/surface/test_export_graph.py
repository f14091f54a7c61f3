"""`atoll export --format pt2`: one graph from a user's rows to predictions, equal to the predictor."""

import importlib.util
import json

import numpy as np
import pandas
import pytest
import torch
from quick_cases import only

import atoll
from atoll.base.errors import UsageError
from atoll.cli.answer import answer
from atoll.data.cells import cells_of
from atoll.tools.graph import export_graph

PLAN = atoll.recipes.fedavg(lr=0.2, batch=None)


def mess(rows=160, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(5, 3, rows), rng.choice(["low", "mid", "high"], rows)
    days = pandas.Timestamp("2020-01-01") + pandas.to_timedelta(rng.integers(0, 900, rows), "D")
    score = a + 3 * (b == "high")
    table = pandas.DataFrame({"a": a, "b": b, "day": days.astype(str), "ill": np.where(score > 6, "yes", "no")})
    table["visits"] = rng.poisson(np.exp(0.1 * score))
    table["price"] = 1000 * score + 50_000
    table.loc[3, "a"] = np.nan
    return table


@pytest.mark.parametrize(
    ("target", "model", "options", "settings"),
    [
        ("ill", "logistic", {}, {}),
        pytest.param("ill", "mlp", {}, {"dtype": "float64"}, marks=pytest.mark.slow),
        pytest.param("price", "linear", {}, {}, marks=pytest.mark.slow),
        pytest.param(
            *("visits", "linear", {"task": "regression", "scale_target": "none"}, {"loss": "poisson"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_graph_equals_the_predictor(target, model, options, settings, tmp_path, capsys):
    others = [name for name in ("ill", "visits", "price") if name != target]
    source = atoll.data.frame(mess().drop(columns=others), target=target, **options)
    run = atoll.train(model, source.split(3), PLAN, rounds=3, out=tmp_path, report=False, **settings)
    assert answer(["export", str(run.path), "--format", "pt2"]) == 0
    assert "model.pt2" in capsys.readouterr().out
    extra = {"input.json": ""}
    program = torch.export.load(run.path / "model.pt2", extra_files=extra).module()
    assert [column["name"] for column in json.loads(extra["input.json"])["columns"]] == ["a", "b", "day"]
    new = mess(40, 1)
    new.loc[7, "b"] = "extreme"
    it = run.predictor.input
    for rows in (40, 3):
        some = new[:rows]
        values = torch.from_numpy(it.values(cells_of(some)).numbers)
        assert rows < 40 or float(values[7, 1]) == -1
        wanted = run.predictor.predict(some) if it.kind == "regression" else run.predictor.predict_proba(some)
        np.testing.assert_allclose(program(values).squeeze(-1).detach().numpy(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", only(["bytes"], ["digits", "bytes"]))
def test_the_graph_takes_arrays_as_in_training(name, tmp_path):
    if name == "digits":
        data = atoll.data.load("digits").split(3)
        x = data.rows.take(torch.arange(4))[0]
    else:
        x = torch.arange(40 * 16, dtype=torch.int64).reshape(40, 4, 4).remainder(256).to(torch.uint8)
        data = atoll.data.arrays(x, torch.arange(40) % 2, scale="standard").split(3)
    run = atoll.train("softmax", data, PLAN, rounds=2, out=tmp_path, report=False)
    export_graph(run.path, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    np.testing.assert_allclose(program(x).numpy(), run.predictor.predict_proba(x), rtol=1e-6, atol=1e-6)


def test_onnx_equals_the_predictor_or_names_its_libraries(tmp_path):
    data = atoll.data.frame(mess().drop(columns=["visits", "price"]), target="ill").split(3)
    run = atoll.train("logistic", data, PLAN, rounds=1, out=tmp_path, report=False)
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        with pytest.raises(UsageError, match="pip install onnx onnxscript"):
            export_graph(run.path, format="onnx")
        return
    export_graph(run.path, format="onnx")
    session = importlib.import_module("onnx.reference").ReferenceEvaluator(str(run.path / "model.onnx"))
    new = mess(9, 1)
    values = run.predictor.input.values(cells_of(new)).numbers
    np.testing.assert_allclose(session.run(None, {"values": values})[0], run.predictor.predict_proba(new), atol=1e-6)


def test_statistics_of_each_client_are_refused(tmp_path):
    x, by = torch.randn(40, 3), ["a", "b"] * 20
    data = atoll.data.arrays(x, torch.arange(40) % 2, by=by, scale="client").split()
    run = atoll.train("softmax", data, PLAN, rounds=1, out=tmp_path, report=False)
    with pytest.raises(UsageError, match="client of a row"):
        export_graph(run.path)


def test_labels_are_probabilities(tmp_path):
    y = np.stack([np.arange(40) % 2, np.arange(40) % 3 == 0], 1).astype(int)
    data = atoll.data.arrays(torch.randn(40, 3), y, task="labels").split(2)
    run = atoll.train("logistic", data, PLAN, rounds=1, out=tmp_path, report=False)
    export_graph(run.path)
    program, x = torch.export.load(run.path / "model.pt2").module(), torch.randn(7, 3)
    np.testing.assert_allclose(program(x).numpy(), run.predictor.predict_proba(x), rtol=1e-6, atol=1e-6)
