"""Noise over a network: the bits of a simulation, a charge before each round, and no count of arrivals in the model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from network import Federation
from test_federation import alone, federation
from test_rehearsal import flags, reference, rows_of
from test_secure_network import threads

import atoll
from atoll.base.errors import RunError, UsageError
from atoll.data.schema import Schema
from atoll.net.engine import ServerEngine
from atoll.net.spec import Server
from atoll.plan.pace import Sync
from atoll.training.privacy import CLIENTS_ROWS, NOT_PRIVATE, budget_of, check_clients
from atoll.training.settings import Settings

SETTINGS = {
    "model": "softmax",
    "recipe": "dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=0.5, batch=100)",
    "numerics": "fused",
    "rounds": 3,
    "seed": 4,
    "delta": 0.01,
    "randomness": "seed",
}


def ledger(path):
    return [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]


def test_noise_over_a_network_gives_the_bits_of_a_simulation_and_charges_each_round(tmp_path):
    served, events = federation(tmp_path, SETTINGS, 3)
    run = alone(tmp_path, SETTINGS, 3)
    assert (served.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    assert [report.bytes_up for report in served.reports] == [report.bytes_up for report in run.reports]
    charged = ledger(served.path)
    assert [row["round"] for row in charged] == [0, 1, 2] and charged[-1]["epsilon"] == served.metrics["epsilon"]
    assert [row["event"] for row in charged] == [row["event"] for row in ledger(run.path)]
    assert {NOT_PRIVATE, CLIENTS_ROWS} <= set(served.notes) and "loss" not in served.metrics
    sent = {event["bytes"] for each in events for event in each if event["event"] == "work"}
    assert sent == {4 * (64 * 10 + 10) + 8}


def test_an_open_run_is_refused_with_noise_and_rows_that_gave_the_input_are_known():
    digits, wine = (atoll.data.load(name).split(3) for name in ("digits", "wine"))
    with pytest.raises(UsageError) as caught:
        budget_of(atoll.recipes.dp_fedavg(), digits, Settings.from_kwargs({"engine": Server("home")}))
    assert "clients=100" in caught.value.line
    read = [Schema.of(data).without_clients().reads_rows for data in (digits, wine)]
    assert read == [False, True]  # `refuse_leaks` reads it
    with pytest.raises(RunError, match="has 4 clients"):
        check_clients(SimpleNamespace(clients=3), 4)


def test_a_deadline_is_allowed_with_noise_and_a_quorum_is_not():
    """A late client makes the sum smaller. A quorum lets the presence of a client decide which others count."""
    plan = atoll.recipes.dp_fedavg()
    assert replace(plan, pace=Sync(deadline_s=60)).releases
    for pace in (Sync(deadline_s=60, quorum=0.5), Sync(over_select=1.3), Sync(deadline_s=60, partial=True)):
        with pytest.raises(UsageError, match="Write: Sync"):
            replace(plan, pace=pace)


def test_an_attempt_after_a_masked_contribution_is_charged():
    charged, home = [], SimpleNamespace(database=SimpleNamespace(put=lambda *fact: None))
    engine = SimpleNamespace(_sums=SimpleNamespace(masked=False), charge=lambda: charged.append(1), home=home)
    for masked in (False, True, False):
        engine._sums.masked |= masked
        ServerEngine._begin_attempt(engine, "run 0 1")
    assert charged == [1]


@pytest.mark.slow
def test_noise_on_a_secure_sum_of_a_network_gives_the_bits_of_a_simulation(tmp_path):
    settings = {**SETTINGS, "recipe": "dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=1.0, batch=100, secure=True)"}
    served, run = federation(tmp_path, settings, 7)[0], alone(tmp_path, settings, 7)
    assert (served.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    assert len(ledger(served.path)) == 3 and [report.arrived for report in served.reports] == [7, 7, 7]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_round_whose_server_was_killed_after_the_shares_is_charged_and_releases_noise(tmp_path):
    """No client opens its masks in two attempts of a round. The round has no sum, by no decision of a client."""
    recipe = "dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=1.0, batch=100, secure=True)"
    settings = {**SETTINGS, "recipe": recipe, "data": "digits", "clients": 7, "split": "IID()", "report": "false"}
    with Federation(tmp_path, *flags(**settings), clients=7) as it:
        address = it.serve(failpoint="sum.8:1")
        it.invite()
        threads(it, 7)
        it.server.process.wait(110)
        assert it.serve() == address
        assert it.server.code() == 0, it.server.stderr()
        assert [row["arrived"] for row in rows_of(it.path())] == [0, 7, 7]
        assert [(row["round"], row["attempt"]) for row in ledger(it.path())] == [(0, 0), (0, 1), (1, 0), (2, 0)]
        events = [json.loads(line) for line in (it.path() / "events.jsonl").read_text().splitlines()]
        causes = [event["cause"] for event in events if event["event"] == "failure"]
        assert len(causes) == 7 and all(cause.startswith("replayed") for cause in causes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("randomness", ["seed", "system"])
def test_a_round_of_a_killed_server_is_charged_again(randomness, tmp_path):
    """With secrets of the system a restart draws another cohort. The state of a lost round does not count."""
    local = "Train(sgd(0.5), epochs=1, batch=100, correction=Ditto(0.1))"
    settings = {**SETTINGS, "data": "digits", "clients": 4, "split": "IID()", "report": "false", "plan__local": local}
    settings |= {"rounds": 5, "randomness": randomness}
    with Federation(tmp_path, *flags(**settings), clients=4) as it:
        address = it.serve(failpoint="commit.inserted:2")
        it.invite()
        clients = [it.join(client) for client in range(4)]
        it.server.process.wait(110)
        assert it.serve(failpoint="commit.inserted:2") == address
        it.server.process.wait(110)
        assert it.serve() == address
        assert [it.server.code(), *(client.code() for client in clients)] == [0] * 5, it.server.stderr()
        rows = rows_of(it.path())
        assert [row["round"] for row in rows] == list(range(5)) and all(row["failed"] == 0 for row in rows)
        charged = [(row["round"], row["attempt"]) for row in ledger(it.path())]
        assert charged == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 0)]
        assert json.loads(it.run("verify", "--home", it.home, "--json"))["ok"]
        if randomness == "seed":
            whole = reference(tmp_path, **settings)
            assert [row["fingerprint"] for row in rows] == [row["fingerprint"] for row in rows_of(whole)]
