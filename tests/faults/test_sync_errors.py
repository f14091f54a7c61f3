"""Errors of the disk under a real server: EIO at a sync ends the process, and the next start gives equal bits."""

import json
import shutil

import network
import pytest
from network import Federation, comparable
from test_federation import alone
from test_rehearsal import flags

SETTINGS = {"model": "softmax", "recipe": "fedavg(lr=0.5, batch=100)", "numerics": "fused", "rounds": 20}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the errors")
def test_an_error_of_a_sync_ends_the_server_and_loses_no_round(tmp_path, monkeypatch):
    plain = network.ATOLL
    settings = {**SETTINGS, "plan__codec": "ErrorFeedback(TopK(0.2))"}
    with Federation(tmp_path, *flags(**settings, clients=2), clients=2) as it:
        it.serve()
        it.invite()
        it.join(0)
        it.join(1)
        it.server.after_round(1)
        it.server.kill()
        broken = ["strace", "-f", "-qq", "-o", tmp_path / "trace", "-e", "trace=fdatasync"]
        broken += ["-e", "inject=fdatasync:error=EIO:when=14"]  # about nine syncs precede the first round
        monkeypatch.setattr(network, "ATOLL", [*broken, *plain])
        it.serve()
        monkeypatch.setattr(network, "ATOLL", plain)
        assert it.server.code() == 1 and "disk I/O error" in it.server.stderr(), it.server.stderr()
        it.serve()
        assert it.server.code() == 0, it.server.stderr()
        assert [it.clients[n].code() for n in (0, 1)] == [0, 0]
        assert comparable(it.path()) == comparable(alone(tmp_path, settings, 2).path)
        assert json.loads(it.run("verify", "--home", it.home, "--json"))["ok"]
