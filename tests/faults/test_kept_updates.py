"""`atoll serve --keep-updates`: `atoll verify` computes each model again from the updates, and finds a changed one."""

import json

import pytest
from test_federation import Hosted, client

from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.net.home import ServerHome
from atoll.net.spec import Server
from atoll.training.serve import _kept

ASYNC = {"plan__pace": "Buffered(1)", "recipe": "fedavg(lr=0.5, batch=50)"}
SYNC = {"recipe": "fedadam(lr=0.1, cohort=2, batch=100)", "plan__codec": "ErrorFeedback(TopK(0.1))"}


def verified(capsys, home):
    code = main(["verify", "--home", str(home), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SYNC, ASYNC])
def test_each_model_is_computed_again_from_its_updates(tmp_path, capsys, settings):
    settings = {"model": "softmax", "numerics": "fused", "rounds": 3, "clients": 3, **settings}
    server = Hosted(tmp_path / "server", settings, keep_updates=True)
    joined = [client(text, tmp_path / name, []) for name, text in zip("abc", server.tokens("a", "b", "c"), strict=True)]
    run = server.run()
    for thread, _ in joined:
        thread.join(30)
    at = ServerHome.open(tmp_path / "server", serve=False)
    at.database.record_rows(0, 7, 0, bytes(32))  # as a later run with other rows does
    at.close()
    code, found = verified(capsys, tmp_path / "server")
    assert code == 0 and found["ok"] and found["recomputed"] == {run.path.name: 3}, found
    at = ServerHome.open(tmp_path / "server", serve=False)
    accepted = [at.database.accepted(run.path.name, round) for round in range(3)]
    at.close()
    folder = tmp_path / "server" / "updates" / run.path.name
    assert {one.work.hex() for some in accepted for one in some} == {path.name for path in folder.iterdir()}
    changed = folder / accepted[1][0].work.hex()
    bytes_ = bytearray(changed.read_bytes())
    bytes_[-1] ^= 1
    changed.write_bytes(bytes_)
    code, found = verified(capsys, tmp_path / "server")
    assert (
        code == 1 and found["recomputed"] == {run.path.name: 1} and "differs from the audit chain" in found["faults"][0]
    )
    changed.unlink()
    code, found = verified(capsys, tmp_path / "server")
    assert code == 1 and "cannot be read" in found["faults"][0]


def test_a_run_keeps_all_updates_or_none():
    with pytest.raises(UsageError, match="began without it"):
        _kept(Server("home", keep_updates=True), {"seed": 3})
    assert _kept(Server("home"), {"keep_updates": True}).keep_updates


def test_a_restart_changes_the_limits_that_are_stated():
    """The cures of deploy.md, such as `--set net.max_rows=700`, act on an unfinished run; its clients stay."""
    began = {"max_rows": 550, "absent_s": 60.0, "clients": 3, "window": 1 << 20, "share": False}
    kept = _kept(Server("home", max_rows=700, lease_s=300.0), began)
    assert (kept.max_rows, kept.lease_s, kept.absent_s, kept.window, kept.share) == (700, 300.0, 60.0, 1 << 20, False)
    assert kept.clients == 3


def test_masked_updates_are_not_kept(tmp_path):
    secure = {"plan.codec": "Clip(1.0)", "plan.aggregator": "Mean(weights='equal', secure=True)"}
    server = Hosted(tmp_path / "server", {"model": "softmax", "clients": 5, **secure}, keep_updates=True)
    with pytest.raises(UsageError, match="--keep-updates with Mean"):
        server.run()
