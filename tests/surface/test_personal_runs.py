"""Runs with models of clients: columns, selection, fine-tuning at each evaluation, and the module of a client."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from quick_cases import one_in
from sites import SITES, table

import atoll
from atoll.base.errors import UsageError
from atoll.base.lines import Change
from atoll.cli.predict import Request, predict_file
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip
from atoll.plan.local import Ditto, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.recipes import ditto, fedavg, fedper, fedrep
from atoll.tools.export import export, load_exported
from atoll.training.experiment import load, predictor
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


@pytest.mark.parametrize("plan", one_in(2, [fedper(0.1, own=OWN), ditto(0.1)]))
def test_a_resumed_run_has_the_bits_of_one_run(tmp_path, plan):
    whole = train(plan, rounds=2)
    first = train(plan, rounds=1, out=tmp_path, report=False)
    again = atoll.train("mlp", DATA, plan, resume=first.path, more=1, out=tmp_path, report=False, seed=1)
    assert again.reports[-1].fingerprint == whole.reports[-1].fingerprint
    for client in (0, 5):
        both = zip(again.personal(client).parameters(), whole.personal(client).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in both)


@pytest.mark.slow
def test_models_of_clients_beat_the_model_of_the_server():
    """Two labels for each client: the published gap is at least 8 points."""
    for plan in (fedper(0.1, own=OWN), fedrep(0.1, own=OWN), ditto(0.1)):
        metrics = train(plan, rounds=5, evaluate_every=5).metrics
        assert metrics["personal_accuracy"] > metrics["accuracy_clients"] + 0.08, plan


def test_a_secure_sum_covers_the_shared_part():
    """The sum is that of rounded updates, and the own part is not in it."""
    plan = dataclasses.replace(fedper(0.1, own=OWN), codec=Clip(10.0))
    plain, secure = train(plan), train(dataclasses.replace(plan, aggregator=Mean(secure=True)))
    both = zip(plain.personal(3).parameters(), secure.personal(3).parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in both)
    assert secure.bytes_up < train(fedavg(0.1)).bytes_up


def test_a_secure_sum_shows_values_of_single_clients_only_on_request():
    plan = Plan(Train(sgd(0.1), epochs=1, batch=10), Mean("equal", secure=True), codec=Clip(1.0))

    def columns(**settings):
        return [name for name in train(plan, rounds=1, **settings).metrics if name.endswith(("_min", "_worst10"))]

    named = atoll.data.federate({str(i): DATA.take(DATA.client_rows(i)) for i in range(6)}, held_out=0.3)
    run = atoll.train("mlp", named, plan, rounds=1, out=None)
    assert "held_out_loss" in run.metrics and not [name for name in run.metrics if name.endswith("_min")]
    assert not columns() and columns(evaluate="both")
    with pytest.raises(UsageError, match="only on request") as caught:
        train(plan, tune=Train(sgd(0.1), steps=1))
    assert caught.value.write == Change("evaluate", "both")


@pytest.mark.slow
def test_workers_evaluate_the_same_models():
    alone, workers = (train(fedper(0.1, own=OWN), engine=e) for e in ("inprocess", "Processes(workers=2)"))
    assert alone.metrics["personal_held_out_loss"] == workers.metrics["personal_held_out_loss"]


@pytest.mark.parametrize("plan", one_in(2, ["ditto(0.1)", "fedper(0.1, own=('fc2.*',))"]))
def test_a_table_is_predicted_by_the_models_of_its_clients(tmp_path, capsys, plan):
    whole = table(rows=60)
    whole.to_csv(tmp_path / "all.csv", index=False)
    data = atoll.data.csv(tmp_path / "all.csv", target="ill", by="site").split(held_out=0.2)
    run = atoll.train("mlp", data, plan, rounds=2, out=tmp_path, report=False)
    saved = predictor(run.path)
    for client, name in enumerate(SITES):
        mine = whole[whole.site == name]
        own = load(run.path, client=name)
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), run.personal(name).parameters(), strict=True))
        x = saved.prepare(mine)
        wanted = run.predictor.input.probabilities(own(x)).detach().numpy()
        for one in (saved, run.predictor, predictor(run.path, client=str(client))):
            np.testing.assert_array_equal(one.predict_proba(mine), wanted)
    both = whole.assign(site=["north", *["unknown"] * 59])
    server = saved.input.probabilities(run.model.eval()(saved.prepare(both))).detach().numpy()
    np.testing.assert_array_equal(saved.predict_proba(both)[1:], server[1:])
    both.to_csv(tmp_path / "new.csv", index=False)
    predict_file(saved, Request(run.path, tmp_path / "new.csv", as_json=True))
    shown = capsys.readouterr()
    assert "59 rows of unknown clients" in shown.err
    with pytest.raises(UsageError, match="west"):
        load(run.path, client="wets")
    with pytest.raises(UsageError, match="last"):
        load(run.path, client="west", best=True)
    found = export(run.path, "float32", client="south", training=atoll.rounds("mlp", data, plan, rounds=2))
    assert found.path.name == "client-1-float32.safetensors"
    own = dict(run.personal("south").state_dict())
    assert all(torch.equal(t, own[n]) for n, t in load_exported(found.path).items())
    assert found.before["accuracy"] == pytest.approx(float(run.reports[-1].clients["held_out_personal_accuracy"][1]))


def test_a_number_that_is_a_name_is_no_id(tmp_path):
    whole = table(rows=60)
    whole["site"] = whole.site.map(dict(zip(SITES, (10, 20, 30), strict=True)))
    whole.to_csv(tmp_path / "all.csv", index=False)
    data = atoll.data.csv(tmp_path / "all.csv", target="ill", by="site").split(held_out=0.2)
    run = atoll.train("mlp", data, "fedper(0.1, own=('fc2.*',))", rounds=1, out=None)
    x = run.predictor.prepare(whole)
    server = run.predictor.input.probabilities(run.model.eval()(x)).detach().numpy()
    np.testing.assert_array_equal(run.predictor.predict_proba(whole.assign(site=2)), server)  # another site
    assert torch.equal(run.personal(20).fc2.weight, run.personal("20").fc2.weight)
    with pytest.raises(UsageError, match="No client"):
        run.personal(2)


def test_refusals():
    with pytest.raises(UsageError, match="server"):
        train(fedavg(0.1), rounds=1).personal(0)
    for wrong in (6, -1, "six", True):
        with pytest.raises(UsageError, match="client"):
            train(fedper(0.1, own=OWN), rounds=1).personal(wrong)
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
