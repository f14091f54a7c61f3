"""A run with noise: it ends at its budget, continues after a kill, and reads no row outside the accountant."""

import json
from dataclasses import replace

import pytest
import torch

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.cli.output import outcome
from atoll.data import IID
from atoll.plan.codec import Clip, Identity, Noise
from atoll.runs.summary import summary
from atoll.training.privacy import CLIENTS_ROWS, NOT_PRIVATE

PLAN = recipes.dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=0.1)
BYTES = {"bytes_up", "bytes_down"}
WORDS = {"rounds": 40, "budget": 0.8, "delta": 1e-5, "report": False, "numerics": "lanes"}


@pytest.fixture(scope="module")
def digits():
    return atoll.data.load("digits").split(1000, IID(), min_rows=1)


def ledger(run):
    return [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]


def test_the_run_ends_when_its_budget_is_spent(digits, tmp_path):
    runs = [atoll.train("softmax", digits, PLAN, out=tmp_path, **WORDS) for _ in range(2)]
    for run in runs:
        assert (run.rounds, run.status) == (10, "done") and run.reason == "budget ε = 0.8 is spent after 10 rounds"
        rows = ledger(run)
        assert [row["round"] for row in rows] == list(range(10)) and rows[-1]["epsilon"] == run.metrics["epsilon"]
        assert run.metrics["epsilon"] == pytest.approx(0.7985, abs=1e-4)
        found = outcome(run)
        assert (found["delta"], found["unit"]) == (1e-5, "client") and found["epsilon"] == run.metrics["epsilon"]
        assert "privacy ε = 0.7985 at δ = 1e-05 for each client (add or remove)" in summary(run)
        assert "the server's own" in summary(run)
        metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert all("epsilon" in row and "loss" not in row for row in metrics)
        events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
        assert run.baselines == {} and not any(e["event"] == "baseline" for e in events)
        columns = next(set(e) for e in events if e["event"] == "clients")
        assert columns == {"event", "time", "round", "id", "bytes_up", "bytes_down"}
    assert [r.fingerprint for r in runs[0].reports] != [r.fingerprint for r in runs[1].reports]


def test_noise_of_the_clients_is_charged_and_claimed_for_each_message(digits):
    local = replace(PLAN, codec=Clip(0.5) >> Noise(20.0, by="client"))
    run = atoll.train("softmax", digits, local, out=None, **WORDS)
    assert run.reason == "budget ε = 0.8 is spent after 4 rounds" and run.privacy["relation"] == "replace one"
    assert "each message of a client" in run.privacy["claim"] and set(run.reports[0].clients) == {"id", *BYTES}


def test_noise_that_follows_the_seed_is_equal_and_labelled(digits, tmp_path):
    first, second = (
        atoll.train("softmax", digits, PLAN, out=None, randomness="seed", **WORDS | {"rounds": 3}) for _ in range(2)
    )
    assert [r.fingerprint for r in first.reports] == [r.fingerprint for r in second.reports]
    assert NOT_PRIVATE in first.notes and outcome(first)["claim"] == NOT_PRIVATE and NOT_PRIVATE in summary(first)


def test_rounds_of_less_than_one_client_are_noted(digits):
    alone = "clients in expectation, so most rounds add noise alone"
    for q, few in ((0.0005, True), (0.01, False)):
        training = atoll.rounds("softmax", digits, f"dp_fedavg(q={q})", rounds=1)
        with training:
            assert any(alone in note for note in training.notes) is few


def test_held_out_rows_of_natural_clients_are_noted_and_evaluated_together():
    x = torch.arange(240.0).reshape(60, 4) / 240
    rows = {f"site {i}": (x, torch.arange(60) % 2) for i in range(6)}
    for held_out, noted in ((0.2, True), (0, False)):
        sites = atoll.data.federate(rows, held_out=held_out)
        with atoll.rounds("softmax", sites, PLAN, rounds=1, delta=1e-3) as training:
            assert (CLIENTS_ROWS in training.notes) is noted and not training.by_client


class Killed(Exception):
    pass


def test_after_a_kill_at_any_point_no_released_round_is_missing(digits, tmp_path, monkeypatch):
    from atoll.runs.folder import RunFolder

    words = WORDS | {"randomness": "seed", "rounds": 4, "budget": 3.0}
    whole = atoll.train("softmax", digits, PLAN, out=None, **words)
    for name in ("metric", "checkpoint", "event"):
        calls, method = [], getattr(RunFolder, name)

        def dying(self, *args, _method=method, _calls=calls, **more):
            _calls.append(1)
            if len(_calls) == 3:
                raise Killed
            return _method(self, *args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, name, dying)
            with pytest.raises(Killed):
                atoll.train("softmax", digits, PLAN, out=tmp_path / name, **words)
        (path,) = [p for p in (tmp_path / name).iterdir() if not p.is_symlink()]
        before = len((path / "ledger.jsonl").read_text().splitlines())
        rows = len((path / "metrics.jsonl").read_text().splitlines())
        assert before >= rows
        run = atoll.train("softmax", digits, PLAN, out=tmp_path / name, resume=path, **words)
        assert run.rounds == 4 and run.reports[-1].fingerprint == whole.reports[-1].fingerprint
        assert len(ledger(run)) >= max(4, before)


def test_a_run_cannot_continue_without_its_ledger(digits, tmp_path):
    run = atoll.train("softmax", digits, PLAN, out=tmp_path, **WORDS | {"rounds": 2})
    more = WORDS | {"rounds": 3, "resume": run.path, "out": tmp_path}
    file = run.path / "ledger.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text(rows[0])
    with pytest.raises(RunError, match="older than the checkpoint"):
        atoll.train("softmax", digits, PLAN, **more)
    file.unlink()
    with pytest.raises(RunError, match="is missing"):
        atoll.train("softmax", digits, PLAN, **more)
    file.write_text("".join(rows))
    assert len(ledger(atoll.train("softmax", digits, PLAN, **more))) == 3


def test_runs_share_a_ledger(digits, tmp_path):
    shared = str(tmp_path / "shared.jsonl")
    first = atoll.train("softmax", digits, PLAN, out=tmp_path, ledger=shared, **WORDS | {"rounds": 6})
    second = atoll.train("softmax", digits, PLAN, out=tmp_path, ledger=shared, **WORDS)
    assert (first.rounds, second.rounds) == (6, 4) and "after 4 rounds" in second.reason
    assert len((tmp_path / "shared.jsonl").read_text().splitlines()) == 10
    assert not (second.path / "ledger.jsonl").exists()


class Foreign(Identity):
    """Noise of a user: it draws from the entropy, and states no event."""

    uses_entropy = True


def refusals(data):
    from atoll.plan.optimizer import sgd
    from atoll.training.stop import Target

    plain = recipes.fedavg(0.5)
    return [
        ({"class_weight": "balanced"}, PLAN, data, "class_weight="),
        ({"evaluate": "clients"}, PLAN, data, 'evaluate="pooled"'),
        ({"baselines": True}, PLAN, data, "baselines=False"),
        ({"stop": Target("loss", 0.1)}, PLAN, data, "Target("),
        ({"budget": 3.0}, plain, data, "Clip(1.0) >> Noise(1.0)"),
        ({"budget": 3.0}, replace(plain, codec=Clip(1.0) >> Foreign()), data, "Clip(1.0) >> Noise(1.0)"),
        ({"delta": 1e-5}, replace(plain, codec=Clip(1.0)), data, "Clip(1.0) >> Noise(1.0)"),
        ({"ledger": "x.jsonl", "randomness": "seed"}, PLAN, data, 'randomness="system"'),
        ({"delta": 0.01}, PLAN, data, "delta=0.0001"),
        ({"budget": -1.0}, PLAN, data, "budget="),
        ({"budget": "much"}, PLAN, data, "budget="),
        ({"randomness": "dice"}, PLAN, data, "randomness="),
        ({}, replace(PLAN, optimizer=sgd(1.0)), replace(data, reads_rows=True), "input.json"),
    ]


@pytest.mark.parametrize("at", range(13))
def test_rows_outside_the_accountant_are_refused_with_a_line(digits, at, tmp_path):
    words, plan, data, line = refusals(digits)[at]
    with pytest.raises(UsageError) as caught:
        atoll.train("softmax", data, plan, rounds=1, out=None, **words)
    assert line in caught.value.line


def test_a_table_needs_an_input_and_a_named_set_of_fixed_scale_does_not(digits, tmp_path):
    wine = atoll.data.load("wine").split(20, IID())
    assert wine.reads_rows and not digits.reads_rows
    path = tmp_path / "input.json"
    path.write_bytes(wine.input.encode())
    again = atoll.data.load("wine").split(20, IID(), input=path)
    assert not again.reads_rows
    run = atoll.train("softmax", again, recipes.dp_fedavg(q=0.5), rounds=1, out=None)
    assert run.metrics["epsilon"] > 0


def test_a_plan_without_noise_has_no_column_of_privacy(digits):
    run = atoll.train("softmax", digits, recipes.fedavg(0.5, cohort=10), rounds=1, out=None)
    assert run.privacy == {} and "epsilon" not in run.metrics and "epsilon" not in outcome(run)


def test_a_run_does_not_change_its_randomness(digits, tmp_path):
    """Rounds whose noise followed the seed stay public after a resume."""
    words = WORDS | {"rounds": 2, "randomness": "seed"}
    run = atoll.train("softmax", digits, PLAN, out=tmp_path, **words)
    with pytest.raises(UsageError, match="randomness"):
        atoll.train(
            "softmax", digits, PLAN, out=tmp_path, resume=run.path, **words | {"rounds": 3, "randomness": "system"}
        )


def test_epsilon_of_a_shared_ledger_is_that_of_ones_own_delta(digits, tmp_path):
    from atoll.privacy.ledger import Budget, Ledger

    shared = tmp_path / "shared.jsonl"
    for delta in (1e-9, 1e-5):
        atoll.train(
            "softmax",
            digits,
            PLAN,
            out=tmp_path,
            ledger=str(shared),
            **WORDS | {"rounds": 1, "delta": delta, "budget": None},
        )
    again = Budget(PLAN, digits.count, 1e-9, None, Ledger(shared))
    assert again.epsilon == pytest.approx(atoll.privacy.epsilon(PLAN, clients=digits.count, rounds=2, delta=1e-9))


def test_a_chain_in_a_chain_is_one_chain():
    from atoll.plan.codec import AdaptiveClip, Chain, LowRank, Noise

    nested = Chain((Chain((AdaptiveClip(start=1.0),)), Noise(1.0)))
    assert nested == AdaptiveClip(start=1.0) >> Noise(1.0)
    with pytest.raises(UsageError, match="not linear"):
        replace(recipes.fedavg(0.1), codec=LowRank(2) >> Clip(1.0))


def test_a_ledger_in_a_missing_folder_is_refused_before_the_run_folder(tmp_path):
    data = atoll.data.load("digits").split(20)
    plan = atoll.recipes.dp_fedavg(0.5, clip=0.5, noise=2.0, q=0.5)
    words = {"rounds": 1, "out": tmp_path / "runs", "progress": "none", "budget": 50.0}
    with pytest.raises(RunError, match="could not be written: No such file"):
        atoll.train("softmax", data, plan, ledger=str(tmp_path / "absent" / "l.jsonl"), **words)
    assert not list(tmp_path.iterdir())
