"""Several labels of 0 and 1 for each row: independent logistic regressions, from a table to predictions."""

import json
import math

import numpy as np
import pandas
import pytest
import torch
from sklearn.metrics import roc_auc_score

import atoll
from atoll.base.errors import UsageError
from atoll.base.lines import form
from atoll.cli.answer import answer
from atoll.compute.metrics import named_metric
from atoll.training.evaluation import constant_answer

NAMES = ["rain", "wind", "fog"]


def weather(rows=120, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    y = (x[:, :3] + 0.8 * rng.normal(size=(rows, 3)) > [0.2, 0.6, 1.0]).astype(int)
    return pandas.DataFrame(x, columns=list("abcd")).join(pandas.DataFrame(y, columns=NAMES))


@pytest.mark.slow
def test_labels_train_as_independent_logistic_regressions():
    """The loss is the mean over L labels, so the rate of each label is 1/L of that of its own regression."""
    table = weather()
    x, y = table[list("abcd")].to_numpy(), table[NAMES].to_numpy()
    held = np.arange(len(x)) % 4 == 0
    settings = {"rounds": 15, "dtype": "float64"}
    data = atoll.data.arrays(x, y, task="labels").split(3, held_out=held)
    both = atoll.rounds("logistic", data, atoll.recipes.gd(0.9), **settings)
    metrics = list(both)[-1].metrics
    weights, scores, right = [], [], []
    for label in range(3):
        one = atoll.data.arrays(x, y[:, label]).split(3, held_out=held)
        alone = atoll.rounds("logistic", one, atoll.recipes.gd(0.3), **settings)
        last = list(alone)[-1].metrics
        weights.append(torch.cat([p.detach().flatten() for p in alone.model.parameters()]))
        scores.append(last["auc"])
        right.append(last["accuracy"])
    weight, bias = (p.detach() for p in both.model.parameters())
    torch.testing.assert_close(torch.cat((weight, bias[:, None]), 1), torch.stack(weights), rtol=1e-10, atol=1e-12)
    assert metrics["auc"] == pytest.approx(sum(scores) / 3, rel=1e-12)
    assert metrics["accuracy"] == pytest.approx(sum(right) / 3, rel=1e-12)
    output = both.model(torch.tensor(x[held])).detach().numpy()
    assert metrics["auc"] == pytest.approx(roc_auc_score(y[held], output, average="macro"), rel=1e-12)


def test_the_constant_is_the_share_of_each_label():
    table = weather()
    data = atoll.data.frame(table, target=NAMES, task="labels").split(3, held_out=0.25)
    training = atoll.rounds("logistic", data, atoll.recipes.gd(0.9), rounds=1)
    found = constant_answer(training.task, data).metrics
    shares, held = data.rows.targets()[data.order].double().mean(0), data.held_out.targets().double()
    loss = -(held * shares.log() + (1 - held) * (1 - shares).log()).mean()
    assert found["held_out_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert found["auc"] == 0.5
    entropy = -(shares * shares.log() + (1 - shares) * (1 - shares).log()).mean()
    assert training._constant == pytest.approx(float(entropy), rel=1e-6)


@pytest.mark.slow
def test_from_a_csv_of_labels_to_columns_of_predictions(tmp_path, capsys):
    table, new = weather(), weather(40, 1)
    table["fog"] = table["fog"].map({0: "false", 1: "true"})
    table.to_csv(tmp_path / "train.csv", index=False)
    new.to_csv(tmp_path / "new.csv", index=False)
    words = ["run", "--data", str(tmp_path / "train.csv"), "--target", ",".join(NAMES), "--task", "labels"]
    words += ["--model", "logistic", "--clients", "3", "--rounds", "10", "--out", str(tmp_path / "runs"), "--json"]
    assert answer([*words, "--quiet", "--set", "report=false"]) == 0
    path = json.loads(capsys.readouterr().out.splitlines()[-1])["path"]
    out = tmp_path / "out.csv"
    assert answer(["predict", path, str(tmp_path / "new.csv"), "--to", str(out), "--proba", "--json"]) == 0
    metrics, rows = json.loads(capsys.readouterr().out)["metrics"], pandas.read_csv(out)
    added = [f"prediction={n}" for n in NAMES] + [f"p={n}" for n in NAMES]
    assert rows.columns.tolist() == [*"abcd", *NAMES, *added]
    guess, p = rows[added[:3]].to_numpy(), rows[added[3:]].to_numpy()
    assert set(np.unique(guess)) == {0, 1} and ((p > 0.5) == guess).all()
    right = (guess == new[NAMES].to_numpy()).mean()
    assert metrics["accuracy"] == pytest.approx(right, rel=1e-12) and right > 0.7
    assert metrics["auc"] == pytest.approx(roc_auc_score(new[NAMES], p), rel=1e-12)
    predictor = atoll.predictor(path)
    assert (predictor.predict(new) == guess).all()
    np.testing.assert_array_equal(predictor.predict_proba(new), p)
    assert predictor.score(new, new[NAMES].to_numpy()) == pytest.approx(metrics["accuracy"], rel=1e-12)
    assert predictor.evaluate(new, new[NAMES]).metrics == metrics


def test_several_numbers_have_a_column_each(tmp_path):
    table = weather().drop(columns=NAMES)
    table.to_csv(tmp_path / "t.csv", index=False)
    data = atoll.data.load(tmp_path / "t.csv", target=["c", "d"]).split(2)
    run = atoll.train("linear", data, atoll.recipes.gd(0.1), rounds=1, out=tmp_path, report=False)
    assert answer(["predict", str(run.path), str(tmp_path / "t.csv"), "--to", str(tmp_path / "o.csv"), "--json"]) == 0
    rows = pandas.read_csv(tmp_path / "o.csv")
    assert rows.columns[-2:].tolist() == ["prediction=c", "prediction=d"]
    np.testing.assert_array_equal(rows.iloc[:, -2:].to_numpy(), run.predictor.predict(table))


def test_wrong_labels_are_refused():
    x = torch.zeros(4, 2)
    for y, text in (([[0, 2]] * 4, "contains 2 at row 0"), ([[0, 1]] * 3 + [[-100, -100]], "no label at row 3")):
        with pytest.raises(UsageError, match=text):
            atoll.data.arrays(x, y, task="labels")
    table = weather().assign(rain="maybe")
    with pytest.raises(UsageError, match="'rain' contains 'maybe' at row 0"):
        atoll.data.frame(table, target=NAMES, task="labels")
    with pytest.raises(UsageError) as error:
        atoll.data.frame(weather(), target=NAMES, task="classification")
    assert form(error.value.write, "python") == 'task="labels"'
    data = atoll.data.arrays(x, [[0, 1], [1, 0]] * 2, task="labels").split(2, held_out=0)
    for model, instead in (("softmax", "logistic"), ("linear", "logistic")):
        with pytest.raises(UsageError) as error:
            atoll.rounds(model, data, atoll.recipes.gd(0.1), rounds=1)
        assert form(error.value.write, "python") == f'model="{instead}"'


def test_a_missing_label_does_not_count():
    y = torch.tensor([[1, -100], [0, 1], [-100, 0], [1, 1]])
    data = atoll.data.arrays(torch.zeros(4, 2), y, task="labels").split(1, held_out=0)
    report = atoll.rounds("logistic", data, atoll.recipes.gd(0.1), rounds=1).next()
    assert report.metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)
    data = atoll.data.dataset([(torch.zeros(2), row) for row in y], task="labels").split(1, held_out=0)
    report = atoll.rounds("logistic", data, atoll.recipes.gd(0.1), rounds=1).next()
    assert report.metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_a_missing_label_does_not_count_in_auc():
    y, output = torch.tensor([[1], [1], [0], [-100], [-100]]), torch.tensor([[2.0], [1.0], [0.0], [5.0], [6.0]])
    auc = named_metric("auc", labels=True)
    assert float(auc.over_rows(output, y)) == 1.0
