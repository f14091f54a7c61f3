"""A server whose disk fails ends, and its sites stay: the next start continues the run."""

import errno
import os

from sites import Served, experiment
from test_arrivals import closed

from atoll.base.errors import RunError
from atoll.net.store import Database, StorageError
from atoll.runs.folder import RunFolder, last_end

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
    append = RunFolder._append

    def full(folder, name, row):
        if row.get("round") == 3:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise RunError("metrics.jsonl could not be written: the disk is full.", "space on the disk.") from error
        append(folder, name, row)

    monkeypatch.setattr(RunFolder, "_append", full)
    error = Served(tmp_path, None).wait()["server"]
    assert isinstance(error, RunError) and error.write.at("shell") == f"atoll serve --home {it.home}", error
    (path,) = (it.home / "runs").glob("2*")
    assert "interrupted: " in last_end(path) and "full" in last_end(path)
    monkeypatch.setattr(RunFolder, "_append", append)
    again = Served(tmp_path, None)
    run = again.wait()["server"]
    assert (run.status, run.rounds, len(run.reports)) == ("done", 4, 1), again.results
    results = it.wait()
    assert (results["north"], results["south"]) == (0, 0), results
    assert {"draining", "done"} >= {facts["code"] for facts in it.events["north"] if facts["event"] == "bye"}
