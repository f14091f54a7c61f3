"""A server whose disk fails ends, and its sites stay: the next start continues the run."""

from sites import Served, experiment
from test_arrivals import closed

from atoll.net.store import Database, StorageError

SETTINGS = {"data": "digits", "clients": 2, "model": "softmax", "recipe": "fedavg(lr=0.5, batch=100)", "rounds": 4}


def test_the_sites_of_a_server_whose_disk_failed_connect_again(tmp_path, monkeypatch):
    commit, failed = Database.commit_round, []

    def breaks(store, round):
        if round.round == 2 and not failed:
            failed.append(StorageError("The disk of federation.db failed: disk I/O error.", "a disk that works."))
            store._failure = failed[0]
            raise failed[0]
        commit(store, round)

    monkeypatch.setattr(Database, "commit_round", breaks)
    it = Served(tmp_path, experiment(**SETTINGS, report="false", numerics="fused"))
    it.join("north", "digits", seat=True)
    it.join("south", "digits", seat=True)
    it._threads[0].join(30)
    assert it.results["server"] is failed[0] and closed(it, 2)
    again = Served(tmp_path, None)
    run = again.wait()["server"]
    assert (run.status, run.rounds, len(run.reports)) == ("done", 4, 2), again.results
    results = it.wait()
    assert (results["north"], results["south"]) == (0, 0), results
    assert {"draining", "done"} >= {facts["code"] for facts in it.events["north"] if facts["event"] == "bye"}
