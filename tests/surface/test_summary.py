"""The summary of a run: own rows first, intervals, and sentences about constants and local models."""

import io

import pytest

import atoll
from atoll.base.errors import UsageError
from atoll.base.intervals import wilson
from atoll.cli.output import outcome
from atoll.report import LiveTable
from atoll.runs.format import duration
from atoll.runs.summary import comparison, findings, interval_of

OWN = {"accuracy_median": 0.8, "accuracy_worst10": 0.5, "accuracy_min": 0.4, "accuracy_sd": 0.1}
FEDERATED = {"accuracy": 0.8, "accuracy_clients": 0.7, **OWN}


def test_own_rows_come_first():
    rows = {"local": {"accuracy": 0.6, "accuracy_clients": 0.9, **OWN}, "constant": {"accuracy": 0.5}}
    lines = comparison({**FEDERATED, "loss": 1.0}, rows, "accuracy")
    assert lines[0] == "accuracy of clients, each on its own held-out rows"
    titles = [line.split("  ")[0] for line in lines]
    assert titles[2:6] == ["federated", "local only", "", "all held-out rows"]
    assert titles[-3:] == ["federated", "local only", "constant"]
    assert "worst" not in "".join(lines[6:])


def test_a_value_has_its_interval():
    p, low, high, n = wilson(123, 148)
    row = {"accuracy": p, "samples": 1200, "steps": 30, "intervals": {"accuracy": [low, high, n]}}
    line = comparison({"accuracy": p}, {"federated": row})[1]
    assert line.split("   ")[1].strip() == "0.831 [0.763, 0.883] n=148"
    assert line.endswith("1,200      30")
    for hostile in ({"accuracy": "x"}, {"accuracy": [low, "high", n]}, {"accuracy": [low, high]}, [1], None):
        assert interval_of({"accuracy": p, "intervals": hostile}, "accuracy") is None


def test_no_better_than_a_constant_is_stated_for_all_rows_and_for_own_rows():
    equal = {"federated": FEDERATED, "constant": {"accuracy": 0.8}, "constant_clients": {"accuracy_clients": 0.7}}
    whole, own = findings(equal, "accuracy")
    assert "no better than the constant answer: accuracy 0.8000, constant 0.8000" in whole
    assert "constant answer of each client on its own rows" in own
    better = {"federated": FEDERATED, "constant": {"accuracy": 0.79}, "constant_clients": {"accuracy_clients": 0.69}}
    assert findings(better, "accuracy") == []
    lower = {"federated": {"rmse": 2.0}, "constant": {"rmse": 1.0}}
    assert len(findings(lower, "rmse")) == 1
    assert findings(lower, "margin") == []


def test_the_clients_for_which_federated_is_better():
    local = {"metric": "accuracy", "federated_better": 3, "compared": 4, "median_difference": 0.1}
    rows = {"federated": FEDERATED, "local": {**local, "worst_difference": -0.25}}
    (text,) = findings(rows, "accuracy")
    assert "3 of 4 clients on their own rows" in text and "0.1 in the median, -0.25 at worst" in text
    assert findings({"federated": FEDERATED, "local": local}, "accuracy") == []


def test_every_run_with_held_out_rows_has_its_constant():
    data = atoll.data.load("digits").split(clients=3)
    run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=1, out=None)
    assert list(run.baselines) == ["federated", "constant"]
    assert run.baselines["federated"]["accuracy"] == run.metrics["accuracy"]
    assert run.baselines["constant"]["accuracy"] < 0.2
    assert run.baselines["federated"]["samples"] == len(data.order)
    none = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=1, out=None, evaluate_every=0)
    assert none.baselines == {}


def test_a_metric_that_fails_for_a_constant_does_not_lose_the_run():
    def picky(output, y):
        if len(output) > 1 and bool((output == output[:1]).all()):
            raise ValueError("constant")
        return output.amax(-1)

    data = atoll.data.load("digits").split(clients=3)
    metric = atoll.Metric("largest", picky)
    run = atoll.train("mlp", data, atoll.recipes.fedavg(0.1), rounds=1, out=None, metrics=(metric,))
    assert run.status == "done" and any("constant answer was not evaluated" in note for note in run.notes)


def test_a_run_is_shown_in_at_most_400_characters_and_as_frames():
    data = atoll.data.load("digits").split(clients=3, by=atoll.data.Dirichlet(0.5))
    plan = atoll.recipes.fedavg(0.1, cohort=2)
    run = atoll.train("softmax", data, plan, rounds=4, evaluate_every=2, evaluate="both", out=None)
    assert len(repr(run)) <= 400 and "accuracy=" in repr(run)
    rounds, clients = run.frame(), run.frame("clients")
    assert rounds["round"].tolist() == [0, 1, 2, 3]
    assert rounds["accuracy"].isna().tolist() == [True, False, True, False]
    assert rounds["loss"].tolist() == [report.metrics["loss"] for report in run.reports]
    assert len(clients) == 8
    ids = [i for report in run.reports for i in report.clients["id"].tolist()]
    assert clients["id"].tolist() == ids
    assert clients["held_out_accuracy"].isna().tolist() == [True, True, False, False] * 2
    assert run.frame("rounds", "pyarrow")["round"].to_pylist() == [0, 1, 2, 3]
    assert run.frame("rounds", "polars")["loss"].to_list() == rounds["loss"].tolist()
    for wrong in ({"kind": "round"}, {"backend": "panda"}):
        with pytest.raises(UsageError, match="of a frame"):
            run.frame(**wrong)


def test_a_resumed_run_has_the_frames_of_all_rounds(tmp_path):
    data = atoll.data.load("digits").split(clients=3, by=atoll.data.Dirichlet(0.5))
    words = {"plan": atoll.recipes.fedavg(0.1, cohort=2), "evaluate_every": 2, "evaluate": "both", "report": False}
    whole = atoll.train("softmax", data, rounds=4, out=tmp_path / "whole", **words)
    first = atoll.train("softmax", data, rounds=2, out=tmp_path / "half", **words)
    again = atoll.train("softmax", data, rounds=4, resume=first.path, **words)
    assert len(again.reports) == 2 and again.frame()["round"].tolist() == [0, 1, 2, 3]
    kept = [name for name in whole.frame() if name != "seconds"]
    for backend in ("pandas", "polars", "pyarrow"):
        ours, theirs = (
            run.frame("rounds", backend)[kept] if backend != "pyarrow" else run.frame("rounds", backend).select(kept)
            for run in (again, whole)
        )
        assert ours.equals(theirs)
    ours, theirs = again.frame("clients"), whole.frame("clients")
    assert ours[["round", "id"]].equals(theirs[["round", "id"]])
    assert ours["loss"].to_numpy() == pytest.approx(theirs["loss"].to_numpy(), abs=1e-6)


def test_the_head_and_the_last_lines_name_the_page(tmp_path):
    data, table = atoll.data.load("digits").split(clients=3), LiveTable(plain=True, file=io.StringIO())
    made = {"rounds": 1, "out": tmp_path, "report": False, "observers": [table]}
    run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), **made)
    assert f"page     atoll ui {run.path}\n" in table.file.getvalue()
    assert f"page    atoll ui {run.path}\n" in run.summary()


def test_summary_is_the_text_of_the_command_and_has_the_notes():
    data = atoll.data.load("digits").split(clients=3)
    table = LiveTable(plain=True, file=io.StringIO())
    run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=2, out=None, observers=[table])
    text = run.summary()
    wall = duration(run.wall)
    assert f" of {wall}," in text and f"   {wall}   " in table.file.getvalue().splitlines()[-1]
    assert outcome(run)["wall"] == round(run.wall, 3)
    assert all(f"note    {note}" in text for note in run.notes) and run.notes
    assert f"in round {run.best['round']}" in text and "constant" in text and run.wall >= run.seconds
