"""Paces with real arrivals over a network: flights survive a restart, and a site that was stopped works again."""

import json
import signal
import threading

import pytest
from network import Federation, eventually, rows_of
from sites import SITES, Served, experiment, write_tables

from atoll.data import csv
from atoll.net import server
from atoll.net.engine import ServerEngine
from atoll.net.site import Site

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
@pytest.mark.parametrize("pace", ["Buffered(4)", "Bounded(3)"])
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


# Paces on a clock: one site waits before each work until it is released.


def paced(folder, monkeypatch, pace, sites=SITES, **settings):
    """A closed run of sites in threads, of which west waits. Returns the run and the release."""
    release, compute = threading.Event(), Site.compute

    def waits(site, *args):
        if site.home.name == "west":
            assert release.wait(60)
        return compute(site, *args)

    monkeypatch.setattr(Site, "compute", waits)
    folder.mkdir(exist_ok=True)
    write_tables(folder)
    path = folder / "input.json"
    path.write_bytes(csv(folder / "all.csv", target="ill", by="site").split(held_out=0).described().encode())
    wanted = {"recipe": "fedavg(lr=0.2, batch=10)", "rounds": 3, "plan__pace": pace, "clients": len(sites)}
    it = Served(folder, experiment(**SET, **{**wanted, **settings}), schema=str(path))
    for name in sites:
        it.join(name, folder / f"{name}.csv")
    return it, release


def closed(it, count, seconds=30.0):
    """Whether this many rounds have ended within some seconds."""
    ended = lambda: [facts["event"] for facts in it.events["server"]].count("round") >= count  # noqa: E731
    return eventually(ended, seconds)


def reports(it):
    return it.wait()["server"].reports


def test_a_deadline_with_a_quorum_closes_each_round_without_the_late_site(tmp_path, monkeypatch):
    """The rounds have the bits of a run without that site: arrivals alone decide."""
    it, release = paced(tmp_path / "three", monkeypatch, "Sync(deadline_s=0.3, quorum=0.6)")
    ended = closed(it, 3)
    release.set()
    three = reports(it)
    assert ended and [report.arrived for report in three] == [2, 2, 2]
    assert all(report.seconds >= 0.3 and report.late == 1 for report in three)
    two = reports(paced(tmp_path / "two", monkeypatch, "Sync()", SITES[:2])[0])
    assert [report.fingerprint for report in three] == [report.fingerprint for report in two]


def test_a_round_waits_for_its_quorum_beyond_the_deadline(tmp_path, monkeypatch):
    it, release = paced(tmp_path, monkeypatch, "Sync(deadline_s=0.1, quorum=1.0)", rounds=1)
    assert not closed(it, 1, 0.6)
    release.set()
    (report,) = reports(it)
    assert report.arrived == 3 and report.seconds > 0.1


def test_a_round_that_starts_more_clients_ends_with_the_first(tmp_path, monkeypatch):
    recipe = "fedavg(lr=0.2, batch=10, cohort=2)"
    it, release = paced(tmp_path, monkeypatch, "Sync(over_select=1.5)", recipe=recipe)
    ended = closed(it, 3)
    release.set()
    assert ended and [(report.arrived, report.late) for report in reports(it)] == [(2, 1)] * 3


@pytest.mark.parametrize(("pace", "together"), [("Sync()", {3}), ("Buffered(1)", {1})])
def test_the_messages_of_a_round_are_folded_in_one_call_once_they_can_close_it(tmp_path, monkeypatch, pace, together):
    """A message waits for the others of its round, here without end, and no longer than the pace does."""
    counts, fold = [], ServerEngine._fold_some

    def counted(engine, group):
        counts.append(len(group))
        return fold(engine, group)

    monkeypatch.setattr(server, "COLLECT_S", 3600.0)
    monkeypatch.setattr(ServerEngine, "_fold_some", counted)
    it, release = paced(tmp_path, monkeypatch, pace, SITES if pace == "Sync()" else SITES[:1])
    release.set()
    assert len(reports(it)) == 3 and set(counts) == together
