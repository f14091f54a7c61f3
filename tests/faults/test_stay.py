"""`atoll serve --stay`: clients enrol while no run is open, and runs that are handed over follow one another."""

import threading

import pytest
from network import eventually
from test_federation import client

from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.net.home import ServerHome
from atoll.net.spec import Server
from atoll.training.experiment import Experiment
from atoll.training.stay import HANDED, STAYS, hand_over, serve_runs

TEXTS = {"data": "digits", "report": "false", "model": "softmax", "clients": "2", "rounds": "1", "numerics": "fused"}


@pytest.mark.slow
def test_a_server_stays_between_runs_that_are_handed_to_it(tmp_path, capsys):
    home, events, runs, over = tmp_path / "server", [], [], threading.Event()
    spec, it = Server(str(home), drain=5.0), Experiment().with_settings(TEXTS)
    assert not hand_over(it, spec), "no server stays there"
    server = threading.Thread(
        target=serve_runs, args=(None, spec, runs.append), kwargs={"notify": events.append, "over": over}
    )
    server.start()
    try:
        assert eventually((home / STAYS).exists), events
        at = ServerHome.open(home, serve=False)
        tokens = [at.invite(name, None, None, 1).text() for name in ("a", "b")]
        at.close()
        seen = [[], []]
        joined = [
            client(token, tmp_path / name, seen[i]) for i, (name, token) in enumerate(zip("ab", tokens, strict=True))
        ]
        assert eventually(lambda: all((tmp_path / name / "site.json").exists() for name in "ab"))
        with pytest.raises(UsageError, match="rounds"):
            hand_over(it.override(rounds=-1), spec)
        words = [f"--{name}={text}" for name, text in TEXTS.items() if name != "report"]
        assert main(["serve", "--home", str(home), *words, "--set", "report=false"]) == 0
        assert "takes the run" in capsys.readouterr().err
        for thread, codes in joined:
            thread.join(60)
            assert codes["code"] == 0, (codes, events)
        assert eventually(lambda: len(runs) == 1 and (home / STAYS).exists())
        assert [run.rounds for run in runs] == [1] and not (home / HANDED).exists()
        addresses = [e["address"] for e in events if e["event"] == "listening"]
        assert len(addresses) == 3 and len(set(addresses)) == 1
    finally:
        over.set()
        server.join(60)
    assert not server.is_alive() and not (home / STAYS).exists()


def test_a_file_of_a_killed_server_takes_no_run(tmp_path):
    ServerHome.open(tmp_path / "server").close()
    (tmp_path / "server" / STAYS).touch()
    assert not hand_over(Experiment().with_settings(TEXTS), Server(str(tmp_path / "server")))
    assert not (tmp_path / "server" / HANDED).exists()
