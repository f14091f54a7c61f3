"""From a table to a prediction: `atoll predict`, predictors, and the input of a run."""

import copy
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from quick_cases import by_turns
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.cli.answer import answer
from atoll.data import arrays, frame, load
from atoll.data.cells import Missing
from atoll.data.files import stream_table
from atoll.data.input import Input

PLAN = recipes.fedavg(lr=0.2, batch=None)


def mess(rows=240, seed=0):
    """A table with numbers, texts, dates, gaps and clients."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(5, 3, rows), rng.choice(["low", "mid", "high"], rows)
    days = pandas.Timestamp("2020-01-01") + pandas.to_timedelta(rng.integers(0, 900, rows), "D")
    score = a + 3 * (b == "high") + rng.normal(0, 1, rows)
    table = {"a": np.round(a, 4), "b": b, "day": days.astype(str), "id": [f"p{i}" for i in range(rows)]}
    df = pandas.DataFrame({**table, "site": rng.choice(["n", "s", "w"], rows), "ill": np.where(score > 6, "yes", "no")})
    df["price"] = np.round(1000 * score + 50_000, 2)
    df.loc[3, "a"] = np.nan
    df.loc[5, "b"] = None
    return df


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recorded run on a CSV file, with new rows in another file."""
    folder = tmp_path_factory.mktemp("predict")
    mess(200).drop(columns="price").to_csv(folder / "train.csv", index=False)
    new = mess(60, seed=1).drop(columns="price")
    new.loc[7, "b"] = "extreme"
    new[new.columns[::-1]].to_csv(folder / "new.csv", index=False)
    data = load(folder / "train.csv", target="ill", by="site").split()
    found = atoll.train("logistic", data, PLAN, rounds=30, out=folder / "runs", report=False)
    return folder, found


def test_the_command_answers_in_the_words_of_the_file(run, capsys):
    folder, found = run
    out = folder / "out.csv"
    words = ["predict", str(found.path), str(folder / "new.csv"), "--to", str(out), "--proba", "--json", "--overwrite"]
    assert answer(words) == 0
    printed = capsys.readouterr()
    answered, rows = json.loads(printed.out), list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0])[:3] == ["ill", "site", "id"] and list(rows[0])[-3:] == ["prediction", "p=no", "p=yes"]
    right = sum(row["prediction"] == row["ill"] for row in rows) / len(rows)
    assert abs(answered["metrics"]["accuracy"] - right) < 1e-9 and right > 0.8
    assert all(abs(float(row["p=no"]) + float(row["p=yes"]) - 1) < 1e-6 for row in rows)
    assert sum(client["rows"] for client in answered["clients"].values()) == answered["rows"] == 60
    assert "'b': 'extreme' is no level of the model (1 row)" in printed.err
    new = pandas.read_csv(folder / "new.csv", keep_default_na=False)
    assert found.predictor.predict(new).tolist() == [row["prediction"] for row in rows]
    assert found.predictor.predict_proba(new)[:, 1].tolist() == [float(row["p=yes"]) for row in rows]
    mine = found.predictor.evaluate(new, new["ill"], new["site"])
    assert (
        dict(mine.metrics) == answered["metrics"]
        and mine.clients["s"]["accuracy"] == answered["clients"]["s"]["accuracy"]
    )
    assert found.predictor.score(new, new["ill"]) == right
    blanks = found.predictor.evaluate(new, new["ill"] + " ", new["site"].where(new.index % 2 == 0, new["site"] + " "))
    assert blanks == mine and found.predictor.score(new, new["ill"] + " ") == right


def test_predictions_do_not_depend_on_batches_and_readers(run, monkeypatch, capsys):
    folder, found = run
    with_batches = []
    for rows in (60, 7, 16):
        monkeypatch.setattr("atoll.cli.predict.stream_table", lambda path, rows=rows: stream_table(path, rows=rows))
        assert answer(["predict", str(found.path), str(folder / "new.csv"), "--quiet"]) == 0
        with_batches.append(capsys.readouterr().out)
    assert with_batches[0] == with_batches[2]
    assert [line.rsplit(",", 1)[1] for line in with_batches[1].splitlines()] == [
        line.rsplit(",", 1)[1] for line in with_batches[0].splitlines()
    ]
    monkeypatch.setattr("atoll.cli.predict.stream_table", stream_table)
    monkeypatch.setattr("atoll.data.files._Csv._plain", lambda self: False)
    assert answer(["predict", str(found.path), str(folder / "new.csv"), "--quiet"]) == 0
    assert capsys.readouterr().out == with_batches[0]


def test_parquet_in_and_out(run, capsys):
    folder, found = run
    new = pandas.read_csv(folder / "new.csv")
    new.to_parquet(folder / "new.parquet")
    to = folder / "out.parquet"
    assert answer(["predict", str(found.path), str(folder / "new.parquet"), "--to", str(to), "--quiet"]) == 0
    back = pandas.read_parquet(to)
    assert back["a"].dtype == np.float64 and back["prediction"].tolist() == found.predictor.predict(new).tolist()
    assert answer(["predict", str(found.path), str(folder / "new.parquet"), "--to", str(to)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "dtype"), by_turns(["wine", "breast_cancer", "diabetes", "digits"], ["float32", "float64"])
)
def test_one_path_for_named_sets(name, dtype):
    source = load(name)
    data = source.split(3, seed=2)
    model = "linear" if data.kind == "regression" else "softmax"
    run = atoll.train(model, data, recipes.fedavg(0.1), rounds=2, out=None, dtype=dtype)
    held = data.held_out.index
    x, y = source.rows.take(held)
    if source.cells is not None:
        x = {name: np.asarray(cells.numbers(Missing()))[held] for name, cells in source.cells.items()}
    found = run.predictor.evaluate(x, y if data.classes is None else [data.classes[i] for i in y.tolist()])
    if data.kind == "regression":
        predicted = run.predictor.predict(x)
        rmse = float(np.sqrt(np.mean((predicted - y.numpy()) ** 2)))
        tolerance = 1e-6 if dtype == "float32" else 1e-12
        assert run.metrics["rmse"] == pytest.approx(rmse, rel=tolerance)
        assert run.metrics["rmse"] == pytest.approx(found.metrics["rmse"], rel=tolerance)
    else:
        assert found.metrics["accuracy"] == run.metrics["accuracy"]


@pytest.mark.parametrize("scale", ["standard", "client"])
def test_one_path_for_a_messy_table(scale):
    df = mess()
    data = frame(df, target="price", by="site", drop="ill", scale=scale).split(seed=1)
    run = atoll.train("linear", data, PLAN, rounds=20, out=None, dtype="float64")
    held = df.iloc[data.held_out.index.tolist()]
    predicted = run.predictor.predict(held, held["site"])
    rmse = np.sqrt(np.mean((predicted - held["price"]) ** 2))
    assert run.metrics["rmse"] == pytest.approx(rmse, rel=1e-12) and rmse < 3000
    if scale == "client":
        assert run.predictor.predict(held).tolist() == predicted.tolist()  # the column names the clients
        with pytest.raises(UsageError, match="The client 'x' is unknown"):
            run.predictor.predict(held, ["x"] * len(held))
        with pytest.raises(UsageError, match="do not name the client"):
            run.predictor.predict(held.drop(columns="site"))


def test_a_named_model_of_python_is_rebuilt_without_data(run, monkeypatch):
    folder, found = run
    monkeypatch.setattr("atoll.data.load", None)
    loaded = atoll.load(found.path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name])
    new = pandas.read_csv(folder / "new.csv")
    assert atoll.predictor(found.path).predict(new).tolist() == found.predictor.predict(new).tolist()
    x = found.predictor.prepare(new)
    assert x.dtype == torch.float32 and found.model(x).shape == (60, 1)


def test_another_model_needs_the_module(tmp_path):
    data = arrays(torch.randn(40, 3), torch.arange(40) % 2).split(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    run = atoll.train(net, data, PLAN, rounds=1, out=tmp_path, report=False)
    with pytest.raises(UsageError) as error:
        atoll.load(run.path)
    assert error.value.line == f"atoll.load({str(run.path)!r}, model)"
    x = torch.randn(5, 3)
    assert atoll.predictor(run.path, net).predict(x).tolist() == run.predictor.predict(x).tolist()
    with pytest.raises(UsageError, match=r"0\.weight: \(5, 3\), and not \(4, 3\)"):
        atoll.load(run.path, nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))


def test_arrays_in_a_folder(tmp_path, capsys):
    x, y = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32), np.arange(50) % 3
    run = atoll.train("softmax", arrays(x, y).split(2), PLAN, rounds=1, out=tmp_path, report=False)
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new" / "x.npy", x[:9])
    np.save(tmp_path / "new" / "y.npy", y[:9])
    assert answer(["predict", str(run.path), str(tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["prediction", *run.predictor.predict(x[:9])]
    assert printed.err.startswith("all rows: 9 rows")


def test_resume_and_init_refuse_another_input(run, tmp_path):
    folder, found = run
    changed = pandas.read_csv(folder / "train.csv")
    changed["a"] = changed["a"] * 2
    data = frame(changed, target="ill", by="site").split()
    with pytest.raises(UsageError, match="column 'a': fill"):
        atoll.train("logistic", data, PLAN, rounds=31, out=tmp_path, resume=found.path)
    with pytest.raises(UsageError, match="column 'a': fill") as error:
        atoll.train("logistic", data, PLAN, rounds=1, out=None, init=found.path)
    assert f"input={str(found.path)!r}" in error.value.line
    same = frame(changed, target="ill", by="site").split(input=found.path)
    assert atoll.train("logistic", same, PLAN, rounds=1, out=None, init=found.path).rounds == 1


def test_a_run_of_before_gets_its_input_by_resume(run, tmp_path, capsys):
    folder, found = run
    old = shutil.copytree(found.path, tmp_path / "runs" / found.path.name)
    (old / "input.json").unlink()
    assert answer(["predict", str(old), str(folder / "new.csv")]) == 2
    assert f'Write: atoll.train("logistic", data, plan, resume="{old}")' in capsys.readouterr().err
    data = load(folder / "train.csv", target="ill", by="site").split()
    atoll.train("logistic", data, PLAN, rounds=30, resume=old, report=False)
    assert Input.read(old) == found.input


BAD = [
    (lambda df: df.drop(columns="a"), [], "no column 'a'"),
    (lambda df: df.assign(prediction=1), [], "already have a column 'prediction'"),
    (lambda df: df.assign(a="old"), [], "'old' at row 0"),
    (lambda df: df.iloc[:0], [], "has 0 rows"),
    (lambda df: df.assign(a=np.inf), [], "inf at row 0"),
    (lambda df: df, ["--by", "sit"], "Write: --by site"),
    (lambda df: df, ["--to", "x.csv.gz"], "Write: --to x.csv\n"),
    (lambda df: df, ["--to", "x.xlsx"], "ends in .csv or .parquet"),
]


@pytest.mark.parametrize(("change", "flags", "match"), BAD)
def test_bad_tables_are_refused(run, tmp_path, capsys, change, flags, match):
    folder, found = run
    change(pandas.read_csv(folder / "new.csv")).to_csv(tmp_path / "bad.csv", index=False)
    assert answer(["predict", str(found.path), str(tmp_path / "bad.csv"), *flags]) == 2
    written = capsys.readouterr()
    assert match in written.err and not written.out


def test_other_faults_of_a_run(run, tmp_path, capsys):
    folder, found = run
    twice = (folder / "new.csv").read_text().replace("site", "a", 1)
    (tmp_path / "twice.csv").write_text(twice)
    assert answer(["predict", str(found.path), str(tmp_path / "twice.csv")]) == 2
    assert "Two columns are called 'a'" in capsys.readouterr().err
    assert answer(["predict", str(found.path), str(tmp_path / "none.csv")]) == 2
    assert "no file" in capsys.readouterr().err
    broken = shutil.copytree(found.path, tmp_path / "broken")
    (broken / "input.json").write_bytes((broken / "input.json").read_bytes()[:-30])
    assert answer(["predict", str(broken), str(folder / "new.csv")]) == 2
    assert "input.json is damaged" in capsys.readouterr().err
    net = copy.deepcopy(found.model)
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    sick = atoll.runs.predictor.predictor_of(net, found.input, found.task.loss, found.task.metrics)
    with pytest.raises(UsageError, match="for row 0 is not finite"):
        sick.predict(pandas.read_csv(folder / "new.csv"))


def test_a_class_unseen_in_training_counts_as_wrong(run, tmp_path, capsys):
    folder, found = run
    df = pandas.read_csv(folder / "new.csv")
    df.loc[:9, "ill"] = "maybe"
    df.loc[10, "ill"] = ""
    df.to_csv(tmp_path / "new.csv", index=False)
    assert answer(["predict", str(found.path), str(tmp_path / "new.csv"), "--json"]) == 0
    printed = capsys.readouterr()
    found_words = found.predictor.predict(df)
    right = sum(a == b for a, b in zip(found_words, df["ill"], strict=True)) / 59
    assert json.loads(printed.out)["metrics"] == {"accuracy": pytest.approx(right, abs=1e-12)}
    assert "10 rows have a class unseen in training" in printed.err


def test_as_renames_the_prediction(run, tmp_path, capsys):
    folder, found = run
    pandas.read_csv(folder / "new.csv").assign(prediction=1).to_csv(tmp_path / "new.csv", index=False)
    assert answer(["predict", str(found.path), str(tmp_path / "new.csv"), "--as", "guess", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("prediction,guess")


def test_a_user_follows_the_lines_of_refusals(run, tmp_path, capsys, monkeypatch):
    """An existing file, a taken name, another encoding, and the best model of a gzipped file with another client."""
    folder, found = run
    new = pandas.read_csv(folder / "new.csv").assign(prediction="é")
    given, to = tmp_path / "new.csv", tmp_path / "out.csv"
    given.write_bytes(new.to_csv(index=False).encode("latin-1"))
    words, flags = ["predict", str(found.path), str(given), "--to", str(to), "--quiet"], []
    for wanted in ("iconv -f latin1 -t utf-8", "--as predicted", ""):
        assert answer([*words, *flags]) == (2 if wanted else 0)
        error = capsys.readouterr().err
        assert wanted in error
        if wanted.startswith("iconv"):
            given.write_bytes(given.read_bytes().decode("latin-1").encode())
        elif wanted:
            flags += error.split("Write: ")[1].split()
    first = to.read_text()
    assert first.splitlines()[0].endswith(",prediction,predicted") and answer([*words, *flags]) == 2
    assert answer([*words, *flags, capsys.readouterr().err.split("Write: ")[1].strip()]) == 0
    assert to.read_text() == first
    new.to_csv(tmp_path / "new.csv.gz", index=False)
    words[2] = str(tmp_path / "new.csv.gz")
    assert answer([*words[:3], "--as", "p", "--best", "--by", "b", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["clients"]) == set(new["b"].fillna("")) and printed["to"] is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert answer([*words[:3], "--as", "p", "--to", str(tmp_path / "x.parquet")]) == 2
    assert "pip install 'atoll[tables]'" in capsys.readouterr().err


def test_a_changed_input_is_refused_and_resume_writes_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mess(60).drop(columns="price").to_csv("t.csv", index=False)
    words = "run --data t.csv --target ill --by site --model logistic --rounds 1 --json --quiet --set report=false"
    assert answer([*words.split(), "--metrics", "auc,f1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"auc", "f1"} <= set(printed["metrics"])
    file = Path(printed["path"]) / "input.json"
    for changed, said in ((file.read_text().replace('"fill": ', '"fill": 1'), "was changed"), ("{", "is damaged")):
        file.write_text(changed)
        assert answer(["predict", "latest", "t.csv"]) == 2
        line = capsys.readouterr().err
        assert said in line and f"rm {file} && atoll resume" in line.replace(str(tmp_path) + "/", "")
        file.unlink()
        assert answer(["resume", *line.split("atoll resume ")[1].split(), "--quiet"]) == 0
        assert answer(["predict", "latest", "t.csv", "--json"]) == 0
        capsys.readouterr()


def test_incomplete_rows_of_a_model_without_a_fill(run):
    folder, _ = run
    data = load(folder / "train.csv", target="ill", by="site", missing="drop").split()
    found = atoll.train("logistic", data, PLAN, rounds=1, out=None).predictor
    new = pandas.read_csv(folder / "new.csv").iloc[8:12]
    for column in ("a", "b"):
        some = new.copy()
        some.loc[9, column] = None
        with pytest.raises(UsageError, match=f"Row 1 has no value in column '{column}'"):
            found.predict(some)
    assert found.predict(new.iloc[:0]).tolist() == []
    with pytest.raises(UsageError, match="The data have 0 rows"):
        found.evaluate(new.iloc[:0], [])
