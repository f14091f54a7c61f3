"""`atoll sweep`: a grid, seeded proposals, the continuation of a killed sweep, confirmation, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

import atoll
from atoll import runs
from atoll.base.errors import RunError, UsageError
from atoll.cli import main
from atoll.runs.labels import Labels
from atoll.tools.sweep import Range, read_space
from atoll.training.experiment import Experiment

LR = "plan.local.optimizer.lr"
WINE = {"data": "wine", "model": "softmax", "clients": 5, "recipe": "fedavg(lr=0.1)", "rounds": 2, "report": False}


def wine(**more):
    return Experiment().override(**{**WINE, **more})


class Killed(BaseException):
    """Ends a sweep as a kill does: nothing is written after it."""


def killed_after(count):
    left = [count]

    def note(text):
        left[0] -= 1
        if not left[0]:
            raise Killed

    return note


def facts(found):
    return [(t.number, dict(t.settings), t.values) for t in found.trials], dict(found.best), found.value


def test_a_grid_equals_its_runs_and_continues_after_a_kill(tmp_path):
    over = {LR: [0.001, 0.1], "rounds": "[1]"}
    whole = atoll.sweep(wine(), over, out=tmp_path / "a", confirm=1)
    tried = [(t.settings[LR], t.settings["rounds"]) for t in whole.trials]
    assert tried == [("0.001", "1"), ("0.1", "1")]
    one = wine().override(rounds=1).with_settings({LR: "0.1"}).train(out=None, progress="none")
    assert whole.trials[1].values == (one.metrics["accuracy"],)
    assert whole.value == max(t.value for t in whole.trials if t.value is not None)
    new = wine(rounds=int(whole.best["rounds"]), seed=1).with_settings({LR: whole.best[LR]})
    assert len(whole.confirmed) == 1 and whole.confirmed[0] == new.train(out=None, progress="none").metrics["accuracy"]

    with pytest.raises(Killed):
        atoll.sweep(wine(), over, out=tmp_path / "b", note=killed_after(1))
    folder = tmp_path / "b" / "sweep-settings"
    lines = (folder / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 1
    (folder / "trials.jsonl").write_text(lines[0][:20])  # killed while it wrote
    shutil.copytree(runs.list_runs(folder)[0], folder / "begun")  # killed before its first round
    for name in ("labels.json", "metrics.jsonl"):
        (folder / "begun" / name).unlink()
    again = atoll.sweep(wine(), over, out=tmp_path / "b", confirm=1)
    assert facts(again) == facts(whole) and again.confirmed == whole.confirmed
    assert len(runs.list_runs(folder)) == 2 + 1  # no training twice, and none that did not begin
    tags = {tag for path in runs.list_runs(folder) for tag in Labels.read(path).tags}
    assert tags == {"trial-0-seed-0", "trial-1-seed-0", f"confirm-{whole.best_trial.number}-seed-1"}
    assert len(atoll.compare(folder, metric="accuracy").groups) == 2


def test_ctrl_c_before_the_first_round_of_a_trial(tmp_path, monkeypatch):
    def asked(interrupt, training):
        interrupt.asked = True
        return True

    with monkeypatch.context() as patch:
        patch.setattr("atoll.training.train._asked", asked)
        cut = atoll.sweep(wine(), {LR: [0.1]}, out=tmp_path)
    assert not cut.finished and not cut.trials and "The same command continues it" in cut.text()
    assert cut.values()["best"] is None
    whole = atoll.sweep(wine(), {LR: [0.1]}, out=tmp_path)
    assert whole.finished and len(whole.trials) == 1 and len(runs.list_runs(whole.path)) == 1


def test_a_diverged_trial_and_all_of_them(tmp_path):
    recipe = {"model": "linear", "data": "diabetes", "rounds": 2, "recipe": "fedavg(lr=0.01)"}
    found = atoll.sweep(wine(**recipe), {LR: [1e300, 0.01]}, out=tmp_path)
    assert found.trials[0].values == (None,) and found.best == {LR: "0.01"}
    assert "diverged" in found.text() and "optimistic" in found.text()
    with pytest.raises(RunError, match="All 1 trials"):
        atoll.sweep(wine(**recipe), {LR: [1e300]}, out=tmp_path / "all")


def test_the_command_its_json_and_a_changed_file(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in WINE.items()))
    words = ["sweep", str(file), "--over", f"{LR}=[0.05, 0.1]", "--seeds", "2", "--out", str(tmp_path), "--json"]
    assert main(words) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert {*found} >= {"best", "value", "trials", "confirmed", "path"} and found["path"].endswith("sweep-mine")
    assert len(found["trials"][0]["runs"]) == 2 and shown.err.count("trial") == 4
    trials = tmp_path / "sweep-mine" / "trials.jsonl"
    trials.write_text("".join(trials.read_text().splitlines(keepends=True)[:3]))
    file.write_text(file.read_text().replace("rounds = 2", "rounds = 3"))
    assert main(words) == 2
    assert "changed under the unfinished sweep" in capsys.readouterr().err


def test_proposals_follow_from_the_seed(tmp_path):
    pytest.importorskip("optuna", reason="the extra atoll[sweep] is not installed")
    over = {LR: "log(1e-3, 1)", "rounds": "int(1, 3)"}
    first = atoll.sweep(wine(), over, trials=3, out=tmp_path / "a")
    assert facts(atoll.sweep(wine(), over, trials=3, out=tmp_path / "b")) == facts(first)
    assert all(1e-3 <= float(t.settings[LR]) <= 1 and t.settings["rounds"] in "123" for t in first.trials)
    assert len({t.settings[LR] for t in first.trials}) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_train_in_processes(tmp_path):
    over = {LR: [0.05, 0.1, 1e300]}
    one = atoll.sweep(wine(), over, out=tmp_path / "a")
    assert facts(atoll.sweep(wine(), over, jobs=2, out=tmp_path / "b")) == facts(one)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("values", ["log(1e-3, 1)", [str(0.05 * (1 + i)) for i in range(20)]], ids=["optuna", "grid"])
def test_twenty_trials_killed_after_seven(tmp_path, values):
    if isinstance(values, str):
        pytest.importorskip("optuna", reason="the extra atoll[sweep] is not installed")
    whole = atoll.sweep(wine(rounds=3), {LR: values}, out=tmp_path / "a")
    out = tmp_path / "b"
    of = {**WINE, "rounds": 3}
    words = f"out={str(out)!r}, note=lambda line: print(line, flush=True)"
    code = f"import atoll; atoll.sweep(atoll.Experiment().override(**{of!r}), {{{LR!r}: {values!r}}}, {words})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(7):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    file = out / "sweep-settings" / "trials.jsonl"
    assert 7 <= len(runs.read_rows(file)) < 20
    again = atoll.sweep(wine(rounds=3), {LR: values}, out=out)
    assert facts(again) == facts(whole) and len(runs.list_runs(again.path)) == 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sampled_rate_is_as_good_as_a_grid_of_twelve(tmp_path):
    pytest.importorskip("optuna", reason="the extra atoll[sweep] is not installed")
    it = Experiment().override(data="digits", clients=20, rounds=15, report=False)
    rates = [10 ** (-3 + 3 * i / 11) for i in range(12)]
    best = atoll.sweep(it, {LR: rates}, out=tmp_path / "grid").value
    assert atoll.sweep(it, {LR: "log(1e-3, 1)"}, trials=12, out=tmp_path / "tpe").value > best - 0.01


def test_values():
    assert read_space({"recipe": "[fedavg(lr=0.1, batch=10), a:b('x,y')]"}) == {
        "recipe": ("fedavg(lr=0.1, batch=10)", "a:b('x,y')")
    }
    assert read_space({"held-out": "linear( 0.1, 5e-1 )"}) == {"held_out": Range("linear", 0.1, 0.5)}
    assert str(Range("int", 1, 8)) == "int(1, 8)"


@pytest.mark.parametrize(
    ("over", "words", "match"),
    [
        ({}, {}, "no setting"),
        ({"rounds": "[]"}, {}, "at least one value"),
        ({"rounds": "[1, 1]"}, {}, "each once"),
        ({LR: "log(0, 1)"}, {}, "> 0"),
        ({LR: "linear(1, 1)"}, {}, "smaller"),
        ({LR: "linear(1, nan)"}, {}, "finite"),
        ({LR: "log(a, 1)"}, {}, "two numbers"),
        ({"rounds": "int(1, 2.5)"}, {}, "whole"),
        ({"rounds": "1, 2"}, {}, "a list"),
        ({"seed": "[1, 2]"}, {}, "the sweep itself"),
        ({"round": "[1, 2]"}, {}, "rounds"),
        ({"plan.local.optimizer.lrr": "[1, 2]"}, {}, "lr"),
        ({LR: "[-1.0, 1.0]"}, {}, "lr"),
        ({LR: "[0.1]"}, {"trials": 0}, "trials"),
        ({LR: "[0.1]"}, {"metric": "acuracy"}, "accuracy"),
        # Its direction is known, so only the list of this experiment refuses it.
        ({LR: "[0.1]"}, {"metric": "auc"}, "No metric of the experiment is called 'auc'.*accuracy.*held_out_loss"),
        ({LR: "[0.1]"}, {"metric": "accuracy_worst10"}, "one of accuracy"),
    ],
)
def test_refusals(over, words, match, tmp_path):
    with pytest.raises(UsageError, match=f"(?s){match}"):
        atoll.sweep(wine(), over, out=tmp_path, **words)
    assert not runs.list_runs(tmp_path / "sweep-settings")


def test_a_metric_over_clients_chooses(tmp_path):
    found = atoll.sweep(wine(evaluate="clients", rounds=1), {LR: [0.1]}, metric="accuracy_worst10", out=tmp_path)
    assert found.higher and found.value is not None


def test_noise_needs_a_shared_ledger(tmp_path):
    it = wine(recipe="dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=0.5)", budget=50.0, delta=1e-5)
    with pytest.raises(UsageError, match="ledger"):
        atoll.sweep(it, {LR: [0.05, 0.1]}, out=tmp_path)
