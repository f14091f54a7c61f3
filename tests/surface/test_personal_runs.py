"""Runs with models of clients: columns, selection, fine-tuning at each evaluation, and the module of a client."""

import json

import numpy as np
import pytest
import torch

import atoll
from atoll.base.errors import UsageError
from atoll.plan.local import Ditto, Train
from atoll.plan.optimizer.rules import sgd
from atoll.recipes import ditto, fedavg, fedper
from atoll.training.stop import Target

OWN = ("fc2.*",)
DATA = atoll.data.load("digits").split(clients=6, by=atoll.data.Pathological(2), held_out=0.3)


def train(plan, **settings):
    return atoll.train("mlp", DATA, plan, **{"rounds": 2, "out": None, "seed": 1, **settings})


def measured(module, client):
    """The accuracy of a module on the held-out rows of a client."""
    rows = (DATA.held_owner == client).nonzero()[:, 0]
    x, y = DATA.held_out.take(rows)
    with torch.no_grad():
        return float((module.eval()(x.float()).argmax(1) == y).double().mean())


@pytest.mark.parametrize("plan", [fedper(0.1, own=OWN), ditto(0.1, lam=0.5)])
def test_the_columns_are_those_of_the_models_of_clients(plan):
    run = train(plan)
    each = [measured(run.personal(client), client) for client in range(6)]
    metrics = run.metrics
    assert metrics["personal_accuracy"] == pytest.approx(np.mean(each), rel=1e-12)
    assert metrics["personal_accuracy_min"] == metrics["personal_accuracy_worst10"] == pytest.approx(min(each))
    assert metrics["personal_accuracy_sd"] == pytest.approx(np.std(each), rel=1e-9)
    assert {
        "accuracy_clients",
        "personal_held_out_loss",
    } <= metrics.keys() and "personal_accuracy_median" not in metrics
    assert run.baselines["personal"]["accuracy_clients"] == metrics["personal_accuracy"]
    last = run.reports[-1].clients
    assert last["held_out_personal_accuracy"].tolist() == pytest.approx([each[i] for i in last["id"].tolist()])
    assert run.best["metric"] == ("personal_accuracy" if plan.local.own else "accuracy")
    assert "personal" in run.summary()


def test_tuning_changes_no_bit_and_is_training_of_each_client():
    plain, tuned = train(fedavg(0.1)), train(fedavg(0.1), tune=Train(sgd(0.05), epochs=2, batch=10))
    assert [r.fingerprint for r in plain.reports] == [r.fingerprint for r in tuned.reports]
    assert tuned.metrics["personal_accuracy"] > tuned.metrics["accuracy_clients"] + 0.05
    assert "personal_accuracy" not in plain.metrics and tuned.best["metric"] == "accuracy"
    # A step of rate 0 leaves the model of the server.
    still = train(fedavg(0.1), tune="Train(sgd(1e-30), steps=1)")
    assert still.metrics["personal_accuracy"] == pytest.approx(still.metrics["accuracy_clients"])
    one = train(fedavg(0.1), tune="Train(sgd(0.05), epochs=2, batch=10)", chunk=1)
    assert one.metrics["personal_held_out_loss"] == tuned.metrics["personal_held_out_loss"]


def test_the_selection_metric_stops_a_run(tmp_path):
    run = atoll.train(
        "mlp", DATA, fedper(0.1, own=OWN), rounds=30, stop=Target("personal_accuracy", 0.6), out=tmp_path, report=False
    )
    assert run.rounds < 30 and run.metrics["personal_accuracy"] >= 0.6
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["personal_accuracy"] == pytest.approx(run.metrics["personal_accuracy"])
    header = (run.path / "clients.csv").read_text().splitlines()[0]
    assert "personal_accuracy" in header


def test_workers_evaluate_the_same_models():
    alone, workers = (train(fedper(0.1, own=OWN), engine=e) for e in ("inprocess", "Processes(workers=2)"))
    assert alone.metrics["personal_held_out_loss"] == workers.metrics["personal_held_out_loss"]


def test_refusals():
    pooled = atoll.data.load("digits").split(clients=6)
    for data, settings in ((pooled, {}), (DATA, {"evaluate": "pooled"}), (DATA, {"evaluate_every": 0})):
        if data.held_owner is None or settings:
            with pytest.raises(UsageError, match="tune"):
                atoll.train("mlp", data, fedavg(0.1), out=None, tune=Train(sgd(0.1), epochs=1), **settings)
    for wrong in (5, "sgd(0.1)", Train(sgd(0.1), epochs=1, correction=Ditto(0.1)), Train(sgd(0.1), epochs=1, own=OWN)):
        with pytest.raises(UsageError, match="tune"):
            train(fedavg(0.1), tune=wrong)
    with pytest.raises(UsageError, match="personal_accuracy"):
        train(fedavg(0.1), stop=Target("personal_accuracy", 0.5))
