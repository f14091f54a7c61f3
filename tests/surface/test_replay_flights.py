"""Replay of a client's contribution under every pace, on a virtual clock, with memory and two-way compression."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from problems import needs_native
from quick_cases import only

import atoll.data
from atoll import recipes, rounds, train
from atoll.base.errors import UsageError
from atoll.plan.codec import ErrorFeedback, Quantize, TopK
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.runs.folder import read_rows
from atoll.tools.replay import replay

FLEET = "Fleet(Each((1, 1, 0.3, 4, 1, 2)), uplink='1 Mb/s')"
DROPPING = "Fleet(HalfNormal(), dropout=0.25)"
BASE = replace(recipes.fedavg(lr=0.3, batch=10, cohort=3), max_failed=1.0)
KEPT = replace(
    BASE,
    local=Train(sgd(0.3, momentum=0.9), steps=2, batch=8, keep=("optimizer", "order")),
    codec=ErrorFeedback(TopK(0.25)),
    downlink=TopK(0.5),
)
RUNS = {
    "everyone again": (replace(BASE, pace=Buffered(2)), None),
    "on a clock": (replace(BASE, pace=Buffered(2)), FLEET),
    "several times a round": (replace(KEPT, pace=Buffered(6)), FLEET),
    "by age": (replace(KEPT, cohort=None, pace=Bounded(3)), FLEET),
    "lost on the way": (replace(BASE, pace=Buffered(2), codec=Quantize(4)), DROPPING),
    "more than are wanted": (replace(KEPT, pace=Sync(over_select=1.6)), DROPPING),
    "more, and no clock": (replace(BASE, pace=Sync(over_select=1.6)), None),
    "until the deadline": (replace(BASE, pace=Sync(deadline_s=1.2)), FLEET),
    "what there is": (replace(BASE, pace=Sync(deadline_s=1.2, partial=True)), FLEET),
}
QUICK = ["several times a round", "until the deadline"]


@pytest.fixture(scope="module")
def data():
    return atoll.data.load("wine").split(6)


@pytest.fixture(scope="module", params=only(QUICK, RUNS))
def run(request, data, tmp_path_factory):
    plan, fleet = RUNS[request.param]
    out = tmp_path_factory.mktemp("runs")
    done = train("softmax", data, plan, rounds=5, out=out, report=False, fleet=fleet, checkpoint_s=1e9)
    (Path(done.path) / "checkpoint").rename(Path(done.path) / "kept")  # from the first round on
    return done, lambda: rounds("softmax", data, plan, rounds=5, fleet=fleet)


def events(path, name):
    return {e["round"]: e for e in read_rows(path / "events.jsonl") if e["event"] == name}


def test_replayed_losses_equal_the_recorded_losses(run):
    """Loss, rows, bytes and staleness of each contribution of a round equal the log, and shares sum to 1."""
    done, again = run
    rows = read_rows(done.path / "metrics.jsonl")
    clients = events(done.path, "clients")
    for t in (1, 3):
        reports, shares, seen = clients[t], [], Counter()
        for at, client in enumerate(reports["id"]):
            found = replay(done.path, t, client, training=again(), nth=seen[client])
            seen[client] += 1
            assert found.fingerprint == rows[t]["fingerprint"] and found.checked == t + 1
            if found.of == 1:  # with several, the log has no order
                assert found.metrics["loss"] == pytest.approx(reports["loss"][at], abs=2e-6)
                assert found.bytes_up == reports["bytes_up"][at] and found.bytes_down == reports["bytes_down"][at]
                assert found.round - found.birth == reports.get("staleness", [0] * 99)[at]
            assert found.failure == "" and f"client {client}" in found.text()
            shares.append(found.share)
        if shares and rows[t]["gradient_norm"]:
            assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert not seen or seen[found.client] == found.of


def test_a_client_without_an_update_is_named_with_its_rounds(run):
    done, again = run
    clients = events(done.path, "clients")
    trips = events(done.path, "trips")
    lost = {e["client"] for e in read_rows(done.path / "events.jsonl") if e["event"] == "failure"}
    for t, found in clients.items():
        ended = trips.get(t, {"client": (), "fate": ()})
        late = {c for c, fate in zip(ended["client"], ended["fate"], strict=True) if fate == "late"}
        absent = sorted(set(range(6)) - set(found["id"]) - late - lost)
        if not absent or (t not in trips and again().plan.pace.cohort_size(10) > 10):  # late clients are not in the log
            continue
        with pytest.raises(UsageError) as error:
            replay(done.path, t, absent[0], training=again())
        words = error.value.line.split()
        if "--round" in words:
            there = replay(done.path, int(words[4]), int(words[6]), training=again())
            assert there.fingerprint and there.losses
        return


def test_lost_and_late_clients_are_replayed_with_their_state(run):
    done, again = run
    for t, event in events(done.path, "trips").items():
        for client, fate in zip(event["client"], event["fate"], strict=True):
            if fate == "arrived":
                continue
            mine = [f for c, f in zip(event["client"], event["fate"], strict=True) if c == client]
            if len(mine) > 1:
                continue
            found = replay(done.path, t, client, training=again())
            assert {"dropped": "dropped out", "late": "the round closed"}[fate] in found.failure
            assert found.losses and found.share is None and found.update_norm
            return


def test_a_contribution_that_is_not_there(run):
    done, again = run
    reports = events(done.path, "clients")[1]
    client = reports["id"][0]
    with pytest.raises(UsageError, match="nth = 9") as error:
        replay(done.path, 1, client, training=again(), nth=9)
    words = error.value.line.split()
    found = replay(done.path, int(words[4]), int(words[6]), training=again(), nth=int(words[8]))
    assert found.of == int(words[8]) + 1


def test_from_a_checkpoint_in_flight(data, tmp_path):
    plan, fleet = RUNS["several times a round"]
    done = train("softmax", data, plan, rounds=5, out=tmp_path, report=False, fleet=fleet, checkpoint_s=0)
    cut = train("softmax", data, plan, rounds=6, out=tmp_path / "long", report=False, fleet=fleet, checkpoint_s=0)
    client = events(cut.path, "clients")[5]["id"][0]
    (cut.path / "checkpoint").rename(cut.path / "other")
    (done.path / "checkpoint").rename(cut.path / "checkpoint")
    near = replay(cut.path, 5, client, training=rounds("softmax", data, plan, rounds=6, fleet=fleet))
    (cut.path / "checkpoint").rename(cut.path / "again")
    far = replay(cut.path, 5, client, training=rounds("softmax", data, plan, rounds=6, fleet=fleet))
    assert (near.first, far.first) == (5, 0) and near.checked == 1
    assert (near.losses, near.update_norm, near.share) == (far.losses, far.update_norm, far.share)


@needs_native
def test_steps_in_native_code_are_observed(data, tmp_path):
    """The loss of every step equals that of fused layers, and the update equals that of the run."""
    losses = []
    for numerics in ("fused", "compiled"):
        done = train("softmax", data, BASE, rounds=2, out=tmp_path, report=False, numerics=numerics, evaluate_every=0)
        again = rounds("softmax", data, BASE, rounds=2, numerics=numerics, evaluate_every=0)
        client = events(done.path, "clients")[1]["id"][0]
        losses.append(replay(done.path, 1, client, training=again).losses)
    assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-5)
