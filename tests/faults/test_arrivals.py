"""Paces with real arrivals over a network: flights survive a restart, and a site that was stopped works again."""

import json
import signal

import pytest
from network import Federation, rows_of
from sites import SITES, write_tables

from atoll.data import csv

SET = {"model": "softmax", "numerics": "fused", "report": "false", "held_out": 0}


def federation(folder, *flags, **settings):
    write_tables(folder)
    path = folder / "input.json"
    path.write_bytes(csv(folder / "all.csv", target="ill", by="site").split(held_out=0).described().encode())
    words = [f"--set={name.replace('__', '.')}={value}" for name, value in {**SET, **settings}.items()]
    return Federation(folder, "--schema", path, *words, *flags, clients=3)


def join_all(it):
    for client, name in enumerate(SITES):
        it.join(client, data=(it.folder / f"{name}.csv",))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pace", ["Buffered(2)", "Bounded(3)"])
def test_flights_survive_kills_and_count_once(tmp_path, pace):
    with federation(tmp_path, recipe="fedavg(lr=0.2, batch=10)", plan__pace=pace, rounds=30, clients=3) as it:
        it.serve()
        it.invite()
        join_all(it)
        for round in (5, 12):
            it.server.after_round(round)
            it.server.kill()
            it.serve()
        it.server.after_round(16)
        it.clients[1].kill()
        it.join(1, token=False, data=(tmp_path / "south.csv",))
        assert it.server.code() == 0, it.server.stderr()
        rows = rows_of(it.path())
        assert [row["round"] for row in rows] == list(range(30))
        assert all(row["arrived"] >= 1 for row in rows)
        assert json.loads(it.run("verify", "--home", it.home, "--json"))["ok"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_that_was_stopped_is_named_and_works_in_the_next_round(tmp_path):
    """A stop of three leases in an open run: rounds go on without the site, and it takes part again afterwards."""
    flags = ("--min-clients", "2", "--set", "net.lease_s=1")
    with federation(tmp_path, *flags, recipe="fedavg(lr=0.2, batch=10)", rounds=100000) as it:
        it.serve()
        it.invite()
        join_all(it)
        whole = it.server.wait_for(lambda line: line.get("event") == "round" and line["arrived"] == 3)
        it.clients[2].process.send_signal(signal.SIGSTOP)
        less = it.server.wait_for(lambda line: line.get("event") == "round" and line["arrived"] == 2
                                  and line["round"] > whole["round"])  # fmt: skip
        it.server.after_round(less["round"] + 1)
        it.clients[2].process.send_signal(signal.SIGCONT)
        it.server.wait_for(lambda line: line.get("event") == "round" and line["arrived"] == 3
                           and line["round"] > less["round"])  # fmt: skip
        it.server.kill(signal.SIGTERM)
        runs = sorted((it.home / "runs").glob("2*"))
        events = (runs[-1] / "events.jsonl").read_text()
        assert '"client": 2' in events
