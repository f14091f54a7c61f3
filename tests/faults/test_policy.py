"""The policy of a site: each rule has its own code, nothing is computed before an approval, the ledger is complete."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType

import pandas
import pytest
from net_messages import work
from network import TICK, eventually
from sites import Served, experiment, table, write_tables

import atoll
from atoll.base.errors import RunError, UsageError
from atoll.data import csv
from atoll.net.home import ServerHome
from atoll.net.join import site_status
from atoll.net.policy import Policy, approve_plan, is_approved
from atoll.net.server import Listener
from atoll.net.site import check_kind
from atoll.net.terms import RefusedError, plan_text
from atoll.plan.aggregate import Masks, Mean
from atoll.plan.codec import Clip
from atoll.plan.local import Evaluate, Moments
from atoll.plan.plan import Plan
from atoll.recipes import ditto, dp_fedavg, fedavg

SETTINGS = {"model": "softmax", "recipe": "fedavg(lr=0.5, batch=10)", "numerics": "fused", "report": "false"}
PLAN = fedavg(0.5, cohort=4)
SECURE = replace(PLAN, codec=Clip(1.0), aggregator=Mean(weights="equal", secure=Masks(least=4)))
NOISY = dp_fedavg(0.5, 1.0, 2.0, 0.1)


@pytest.mark.parametrize(
    ("kind", "rows", "plan", "code"),
    [
        ("round", "train", PLAN, None),
        ("round", "held", PLAN, "part"),
        ("evaluate", "held", Plan(Evaluate(), Mean()), None),
        ("evaluate", "held", Plan(Evaluate(ditto(0.1).local), Mean()), None),
        ("evaluate", "held", PLAN, "part"),
        ("evaluate", "train", Plan(Evaluate(), Mean()), "part"),
        ("moments", "train", Plan(Moments((0.0,)), Mean()), None),
        ("moments", "train", PLAN, "part"),
        ("moments", "train", Plan(Moments((0.0,)), Mean("equal")), "part"),
        ("baseline", "train", PLAN, "part"),
    ],
)
def test_the_kind_of_a_work_is_that_of_its_plan(kind, rows, plan, code):
    """No server can pass a training as an evaluation, to which fewer rules of a policy apply."""
    if code is None:
        return check_kind(work(kind=kind, rows=rows), plan)
    with pytest.raises(RefusedError) as found:
        check_kind(work(kind=kind, rows=rows), plan)
    assert found.value.code == code


def code_of(policy, clients=10, plan=PLAN, made=MappingProxyType({}), **changes):
    """The code with which a policy refuses a work; None if it allows it."""
    try:
        policy.check_run("softmax", 40)
        policy.check_work(work(**{"plan": plan_text(plan), **changes}), plan, clients, made)
    except RefusedError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("rules", "changes", "code"),
    [
        ({}, {}, None),
        ({"models": ("mlp",)}, {}, "policy-model"),
        ({"models": ("softmax",)}, {}, None),
        ({"min_rows": 41}, {}, "policy-rows"),
        ({"parts": ("Train", "sgd", "Mean")}, {}, "policy-part"),
        ({"parts": ("Train", "sgd", "Mean", "Uniform", "constant")}, {}, None),
        ({"min_cohort": 5}, {}, "policy-cohort"),
        ({"min_cohort": 4}, {}, None),
        ({"min_cohort": 4}, {"clients": 3}, "policy-cohort"),
        ({"min_cohort": 4}, {"plan": fedavg(0.5), "clients": 4}, None),
        ({"secure": True}, {}, "policy-secure"),
        ({"secure": True, "min_threshold": 3}, {"plan": SECURE}, None),
        ({"min_threshold": 4}, {"plan": SECURE}, "policy-threshold"),
        ({"min_noise": 0.1}, {}, "policy-noise"),
        ({"min_noise": 2.1}, {"plan": NOISY}, "policy-noise"),
        ({"min_noise": 2.0, "max_epsilon": 0.7}, {"plan": NOISY, "clients": 1000}, None),
        ({"max_epsilon": 0.7}, {"plan": NOISY, "clients": 1000, "round": 9}, "policy-epsilon"),
        ({"max_epsilon": 9.0}, {}, "policy-noise"),
        ({"max_rounds": 3}, {"round": 3}, "policy-rounds"),
        ({"max_rounds": 3}, {"round": 2}, None),
        ({"per_client": False}, {"kind": "evaluate", "rows": "held"}, "policy-values"),
        ({"parts": ()}, {"kind": "evaluate", "rows": "held"}, None),
        ({"secure": True}, {"kind": "evaluate", "rows": "held"}, "policy-values"),
        ({"min_noise": 1.0}, {"kind": "evaluate", "rows": "held"}, "policy-values"),
        ({"max_epsilon": 1.0}, {"kind": "evaluate", "rows": "held"}, "policy-values"),
        ({"secure": True, "per_client": True}, {"kind": "evaluate", "rows": "held"}, None),
        ({"per_client": False}, {"plan": Plan(Moments((0.0,)), Mean())}, "policy-values"),
        ({"per_client": False}, {"plan": Plan(Evaluate(), Mean())}, "policy-values"),
        ({"per_client": False}, {"plan": Plan(Evaluate(ditto(0.1).local), Mean())}, "policy-values"),
        ({"max_rounds": 2}, {"made": {"a": "a", "b": "b"}, "round": 0}, "policy-rounds"),
        ({"max_rounds": 2}, {"made": {"a": "a", work().work.hex(): work().work.hex()}, "round": 0}, None),
        (
            {"max_epsilon": 0.7},
            {"plan": NOISY, "clients": 1000, "made": dict.fromkeys("abcdefghi", 0)},
            "policy-epsilon",
        ),
    ],
)
def test_each_rule_has_its_code(rules, changes, code):
    assert code_of(Policy(**rules), **changes) == code


def test_the_identities_of_a_policy_are_read_next_to_it(tmp_path):
    (tmp_path / "sites.txt").write_text(f"{'ab' * 32} oslo\n\n{'cd' * 32}\n")
    (tmp_path / "policy.toml").write_text('identities = "sites.txt"\nmin_cohort = 4\nmax_attempts = 1\n')
    policy = Policy.read(tmp_path / "policy.toml")
    assert policy.accepted() == {b"\xab" * 32, b"\xcd" * 32}
    assert (policy.floors.cohort, policy.floors.attempts, Policy().floors.cohort) == (4, 1, 5)
    (tmp_path / "sites.txt").write_text("oslo\n")
    with pytest.raises(UsageError, match="is not valid"):
        Policy.read(tmp_path / "policy.toml")


def test_a_plan_that_waits_for_approval_is_not_replaced(tmp_path):
    """A server that changes the plan after a person has read it would get its approval."""
    shown, other = work(plan="Plan(Gradient(), Mean())"), work(plan="Plan(Train(sgd(1.0)), Mean())")
    assert not is_approved(tmp_path, "run", shown) and not is_approved(tmp_path, "run", other)
    assert approve_plan(tmp_path)["plan"] == shown.plan
    assert is_approved(tmp_path, "run", shown) and not is_approved(tmp_path, "run", other)
    assert approve_plan(tmp_path)["plan"] == other.plan and is_approved(tmp_path, "run", other)


def at(hour, minute=0):
    return datetime(2026, 5, 4, hour, minute, tzinfo=UTC)


@pytest.mark.parametrize(
    ("rules", "now", "sent", "away"),
    [
        ({}, at(3), 10**12, None),
        ({"hours": "20:00-06:00"}, at(21), 0, None),
        ({"hours": "20:00-06:00"}, at(5, 59), 0, None),
        ({"hours": "20:00-06:00"}, at(6), 0, ("hours", 14 * 3600.0)),
        ({"hours": "08:00-18:00"}, at(18), 0, ("hours", 14 * 3600.0)),
        ({"bytes_per_day": 100}, at(23), 99, None),
        ({"bytes_per_day": 100}, at(23), 100, ("bytes", 3600.0)),
    ],
)
def test_a_site_is_absent_outside_its_hours_and_above_its_bytes(rules, now, sent, away):
    assert Policy(**rules).absence(now, sent) == away


@pytest.mark.parametrize("text", ['hours = "8-18"', "cohort = 3", 'max_rounds = "x"', "min_rows = 0", "models ="])
def test_a_wrong_policy_file_is_refused(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"policy\.toml"):
        Policy.read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        Policy.read(tmp_path / "none.toml")


def waits_for(it, text):
    """Whether the status of the server names this client within five seconds."""
    at = ServerHome.open(it.home, serve=False)
    try:
        return eventually(lambda: text in at.status()["why"], 5)
    finally:
        at.close()


def test_a_run_with_approval_a_complete_ledger_and_a_model_that_predicts(tmp_path):
    write_tables(tmp_path)
    given = csv(tmp_path / "all.csv", target="ill", by="site").split().described()
    (tmp_path / "input.json").write_bytes(given.encode())
    it = Served(tmp_path, experiment(**SETTINGS, clients=2, rounds=2), schema=str(tmp_path / "input.json"))
    it.join("north", tmp_path / "north.csv", policy=Policy(ask=True))
    it.join("south", tmp_path / "south.csv", policy=Policy(per_client=False))
    home = tmp_path / "north"
    assert eventually((home / "asked.json").exists)
    assert site_status(home)["asked"].startswith("Plan(")
    assert waits_for(it, "north (connected, computes)")
    assert not (home / "ledger.jsonl").exists()  # nothing is computed before the approval
    assert "Train" in approve_plan(home)["plan"]
    results = it.wait()
    assert results["north"] == results["south"] == 0, results
    run = results["server"]
    ledgers = {
        n: [json.loads(r) for r in (tmp_path / n / "ledger.jsonl").read_text().splitlines()]
        for n in it.events
        if n != "server"
    }
    assert [row["kind"] for row in ledgers["south"]] == ["round"] * 2
    assert [row["kind"] for row in ledgers["north"]] == ["round", "evaluate"] * 2
    sent = [row for rows in ledgers.values() for row in rows if row["kind"] == "round"]
    assert sum(row["bytes"] for rows in ledgers.values() for row in rows) == run.bytes_up
    database = ServerHome.open(it.home, serve=False)
    recent = database.database.recent(run.path.name)
    database.close()
    assert {hash.hex() for works in recent.values() for _, hash, _ in works} == {row["sha256"] for row in sent}
    clients = pandas.read_csv(run.path / "clients.csv")
    assert list(clients["rows"]) == [6, 0] and clients["accuracy"].isna().tolist() == [False, True]
    kept = atoll.predictor(home / "runs" / run.path.name)
    rows = table().drop(columns=["ill", "site"])
    assert list(kept.predict(rows)) == list(atoll.predictor(run.path).predict(rows))


def test_a_check_sends_nothing_and_a_refusal_names_its_rule(tmp_path, monkeypatch):
    write_tables(tmp_path)
    wakes = []
    monkeypatch.setattr(Listener, "_publish", lambda listener: wakes.append(listener))
    given = csv(tmp_path / "all.csv", target="ill", by="site").split().described()
    (tmp_path / "input.json").write_bytes(given.encode())
    it = Served(tmp_path, experiment(**SETTINGS, clients=1, rounds=2), schema=str(tmp_path / "input.json"))
    it.join("north", tmp_path / "north.csv", check=True)
    it._threads[-1].join(60)
    found = next(facts for facts in it.events["north"] if facts["event"] == "check")
    assert found["rows"] == 24 and found["held_out"] == 6 and found["vectors"][-1] == "update" and found["bytes"] > 0
    assert it.results["north"] == 0 and not (tmp_path / "north" / "ledger.jsonl").exists()
    before = len(wakes)
    TICK.wait(0.5)
    assert len(wakes) - before <= 3  # an idle loop sleeps
    assert not (tmp_path / "north" / "data.json").exists()  # the site may still correct its table
    it.join("north", tmp_path / "north.csv", policy=Policy(max_rounds=1))
    results = it.wait()
    assert isinstance(results["server"], RunError) and "policy-rounds" in str(results["server"])
