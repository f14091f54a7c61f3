"""HeldOutValues: over all rows and by client, from the same passes; intervals; class weights."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, federation, seeded
from torch import nn

import atoll
import atoll.training.rounds as training_rounds
from atoll.base.errors import UsageError
from atoll.compute.metrics import Metric
from atoll.compute.task import Task
from atoll.engine.check_answers import sum_lengths
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient
from atoll.plan.plan import Plan
from atoll.plan.state import State
from atoll.training.evaluation import class_weights, constant_answer, evaluate, over_clients

NAMES = ("accuracy", "balanced_accuracy", "auc", "log_loss", "confusion")


def evaluated(task, data, owner=None, owners=0):
    task, plan = replace(task, lengths=sum_lengths(task, data)), Plan(Gradient(), Mean())
    state = State.first(plan, task, 0, Memory(plan.memory(task)), None)
    return evaluate(state, InProcessEngine(task, data), owner, owners)


@settings(max_examples=settings().max_examples // 2)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(20, 60))
def test_all_rows_are_the_mean_of_the_clients_by_rows(seed, owners, rows):
    data = classification((rows,), (5,), 2, seed=seed % 1000)
    task = Task.of(seeded(nn.Linear, 5, 2), "cross_entropy", NAMES, torch.float64)
    owner = torch.randint(owners, (rows,), generator=torch.Generator().manual_seed(seed))
    found = evaluated(task, data, owner, owners)
    weights = found.clients["rows"].double()
    for name in ("held_out_loss", "accuracy", "log_loss"):
        mean = (found.clients[name].nan_to_num() * weights).sum() / weights.sum()
        assert float(mean) == pytest.approx(found.metrics[name], rel=1e-12)
    assert float(found.tables["confusion"].sum()) == rows
    alone = evaluated(task, data)
    assert alone.metrics.items() <= found.metrics.items()
    assert not alone.clients


def test_more_rows_than_one_pass_have_the_values_of_their_rows():
    """2,500 rows in three passes: each client's values equal those of a federation of its rows alone."""
    data = classification((2500,), (4,), 2)
    task = Task.of(seeded(nn.Linear, 4, 2), "cross_entropy", NAMES, torch.float64)
    owner = torch.arange(2500) % 3
    found = evaluated(task, data, owner, 4)
    for client in range(3):
        x, y = data.take(data.order[owner == client])
        mine = evaluated(task, federation(x, y, [len(y)]))
        for name in ("held_out_loss", "accuracy", "balanced_accuracy", "auc", "log_loss"):
            assert float(found.clients[name][client]) == pytest.approx(mine.metrics[name], rel=1e-12), name
    assert all(math.isnan(found.clients[name][3]) for name in ("accuracy", "auc", "held_out_loss"))


def test_intervals_of_proportions_means_and_areas():
    data = classification((300,), (4,), 2)
    task = Task.of(seeded(nn.Linear, 4, 2), "cross_entropy", ("accuracy", "auc", "log_loss"), torch.float64)
    found = evaluated(task, data)
    for name in ("accuracy", "auc", "log_loss", "held_out_loss"):
        low, high = found.intervals[name][1:3]
        assert low < found.metrics[name] < high, name
    assert found.intervals["accuracy"].rows == 300


def test_an_undefined_metric_is_absent():
    data = federation(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64), [6])
    task = Task.of(seeded(nn.Linear, 3, 2), "cross_entropy", ("auc", "accuracy"), torch.float64)
    assert evaluated(task, data).metrics.keys() == {"held_out_loss", "accuracy"}


def test_own_metrics_of_vectors_and_of_all_rows():
    spread = Metric(
        "spread",
        lambda o, y: torch.stack((y.double(), y.double() ** 2), 1),
        lambda t, n: float(t[1] / n - (t[0] / n) ** 2),
    )
    largest = Metric.whole("largest", lambda o, y: float(o.max()))
    data = classification((50,), (4,), 3)
    task = Task.of(seeded(nn.Linear, 4, 3), "cross_entropy", (spread, largest), torch.float64)
    found = evaluated(task, data, torch.arange(50) % 2, 2)
    _, y = data.take(data.order)
    assert found.metrics["spread"] == pytest.approx(float(y.double().var(correction=0)))
    assert found.metrics["largest"] == pytest.approx(float(found.clients["largest"].max()))


def test_summaries_over_clients():
    values = torch.tensor([*range(20), torch.nan])
    found = over_clients("accuracy", values, True)
    assert found["accuracy_clients"] == 9.5
    assert (found["accuracy_worst10"], found["accuracy_min"]) == (0.5, 0.0)
    assert over_clients("loss", values, False)["loss_min"] == 19.0
    assert over_clients("loss", values[20:], False) == {}


def test_balanced_weights_give_each_class_the_same_total():
    counts = torch.tensor([90, 10])
    weights = class_weights("balanced", counts, ("no", "yes"))
    assert weights[0] * 90 == pytest.approx(weights[1] * 10) == pytest.approx(50)
    assert class_weights({"yes": 3}, counts, ("no", "yes")) == (1.0, 3.0)
    for bad in ({"maybe": 1}, {"yes": -1}, {"no": 0, "yes": 0}, "even", 3):
        with pytest.raises(UsageError, match="class_weight"):
            class_weights(bad, counts, ("no", "yes"))


@pytest.mark.parametrize(("model", "target"), [("logistic", "two"), ("softmax", "two"), ("linear", "number")])
def test_the_constant_answer_is_that_of_its_definition(model, target):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 3, generator=g), torch.rand(200, generator=g)
    y = (y < 0.2).long() if target == "two" else y.double() * 5
    data = atoll.data.arrays(x.numpy(), y.numpy()).split(4, held_out=0.25)
    training = atoll.rounds(model, data, atoll.recipes.fedavg(0.1), rounds=1)
    found = constant_answer(training.task, data).metrics
    train, held = data.rows.targets()[data.order].double(), data.held_out.targets().double()
    if target == "two":
        p = float(train.mean())
        loss = -(held * math.log(p) + (1 - held) * math.log(1 - p)).mean()
        assert found["accuracy"] == pytest.approx(float(1 - held.mean()))
        assert found["auc"] == 0.5
    else:
        loss = (held - train.mean()).square().mean()
        assert found["rmse"] == pytest.approx(math.sqrt(loss))
    assert found["held_out_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_clients_with_a_feature_shift_are_evaluated_on_their_own_view():
    """Each client's value is that of its rotated rows; the value of all rows is that of unrotated rows."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 1, 4, 4, generator=g), torch.arange(80) % 2
    source = atoll.data.arrays(x.numpy(), y.numpy())
    found = {}
    for name, by in (("plain", atoll.data.IID()), ("shift", atoll.data.FeatureShift(rotation=90))):
        data = source.split(4, by, held_out=0.5)
        training = atoll.rounds("softmax", data, atoll.recipes.fedavg(0.1), rounds=1, evaluate="both")
        found[name] = (data, training.task, training.state, training.values_of(training.state.model))
        training.close()
    data, task, state, values = found["shift"]
    pooled = evaluate(state, InProcessEngine(task, data.held())).metrics
    assert values.metrics["held_out_loss"] == pooled["held_out_loss"] == found["plain"][3].metrics["held_out_loss"]
    for client in range(4):
        mine = data.held_owner == client
        rows, targets = data.held_out.take(mine.nonzero()[:, 0])
        turned = torch.rot90(rows, client, (2, 3))
        own = evaluate(state, InProcessEngine(task, federation(turned, targets, [len(turned)]))).metrics
        assert float(values.clients["held_out_loss"][client]) == pytest.approx(own["held_out_loss"], rel=1e-6)
    assert values.metrics["held_out_loss_clients"] == pytest.approx(float(values.clients["held_out_loss"].mean()))


def named(clients=6, rows=12):
    """Natural clients with two classes."""
    g = torch.Generator().manual_seed(3)
    parts = {
        f"c{i}": (torch.randn(rows, 3, generator=g).numpy(), torch.arange(rows).numpy() % 2) for i in range(clients)
    }
    return atoll.data.federate(parts, held_out=0.25)


def test_report_and_log_have_the_values_of_each_client(tmp_path):
    """The columns of a report are aligned with its ids; a line of clients.jsonl has the same values."""
    plan = atoll.recipes.fedavg(0.1, cohort=3)
    run = atoll.train("logistic", named(), plan, rounds=4, evaluate_every=2, out=tmp_path, report=False)
    lines = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 3]
    assert not any(name.startswith("held_out") for name in run.reports[0].clients)
    for line in lines:
        columns = run.reports[line["round"]].clients
        at = columns["id"].tolist()
        assert len(at) == 3 and line["id"] == list(range(6))
        for name, column in (("held_out_loss", "held_out_loss"), ("accuracy", "held_out_accuracy")):
            assert columns[column].tolist() == pytest.approx([line[name][i] for i in at], rel=1e-5)
        assert columns["held_out_rows"].tolist() == [line["rows"][i] for i in at]
        weights = torch.tensor(line["rows"]).double()
        mean = float((torch.tensor(line["accuracy"]).double() * weights).sum() / weights.sum())
        assert mean == pytest.approx(run.reports[line["round"]].metrics["accuracy"], rel=1e-5)


def test_a_stopped_and_resumed_run_has_the_same_lines_of_clients(tmp_path):
    plan, more = atoll.recipes.fedavg(0.1), {"out": tmp_path, "report": False}
    whole = atoll.train("logistic", named(), plan, rounds=4, **more)
    half = atoll.train("logistic", named(), plan, rounds=2, **more)
    with open(half.path / "clients.jsonl", "a") as log:
        log.write('{"round": 2, "id": [0]}\n{"rou')  # a kill after the last checkpoint
    again = atoll.train("logistic", named(), plan, rounds=4, resume=half.path, **more)
    assert (again.path / "clients.jsonl").read_bytes() == (whole.path / "clients.jsonl").read_bytes()
    assert (again.path / "clients.csv").read_bytes() == (whole.path / "clients.csv").read_bytes()
    pooled = atoll.train("logistic", named(), plan, rounds=1, evaluate="pooled", **more)
    assert not (pooled.path / "clients.jsonl").exists()


def test_of_many_clients_a_sample_is_evaluated(monkeypatch, tmp_path):
    monkeypatch.setattr(training_rounds, "MOST_EVALUATED", 4)
    plan, few = atoll.recipes.fedavg(0.1), {"rounds": 1, "report": False, "out": tmp_path}
    run = atoll.train("logistic", named(), plan, baselines=True, **few)
    (line,) = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    assert len(line["id"]) == 4 and all(line["rows"])
    assert any("4 of 6 clients" in note for note in run.notes)
    assert run.reports[0].clients["held_out_accuracy"].isnan().sum() == 2
    assert run.baselines["local"]["compared"] == 4
    every = atoll.train("logistic", named(), plan, **few | {"out": None})
    monkeypatch.undo()
    full = atoll.train("logistic", named(), plan, **few | {"out": None})
    assert every.metrics["accuracy"] == full.metrics["accuracy"]
    sampled = full.reports[0].clients["held_out_accuracy"][line["id"]]
    assert line["accuracy"] == pytest.approx(sampled.tolist(), rel=1e-5)


@pytest.mark.slow
def test_balanced_weights_give_the_model_of_scikit_learn_and_find_more_positives():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 4))
    y = (x @ [1, 0.5, 0, -0.5] + rng.normal(size=1500) > 2.2).astype(int)
    data = atoll.data.arrays(x, y, scale="none").split(3)
    more = {"rounds": 300, "out": None, "dtype": "float64", "evaluate_every": 300, "metrics": ["recall"]}
    plan = atoll.recipes.distributed_gd(2.0)
    usual = atoll.train("logistic", data, plan, **more)
    balanced = atoll.train("logistic", data, plan, class_weight="balanced", **more)
    train = np.setdiff1d(np.arange(1500), data.held_out.index.numpy())
    theirs = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-10).fit(x[train], y[train])
    weight, bias = (p.detach().numpy().ravel() for p in balanced.model.parameters())
    assert np.abs(np.append(weight, bias) - np.append(theirs.coef_, theirs.intercept_)).max() < 1e-3
    assert balanced.metrics["recall"] > usual.metrics["recall"] + 0.5 and "constant" in balanced.summary()
