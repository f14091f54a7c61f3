"""The commands of a network: their errors name the line to write, and the core imports no network."""

import io
import json
import subprocess
import sys

import pytest

from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.net.home import ServerHome
from atoll.net.spec import Server


def run(capsys, *words):
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_an_invitation_works_without_a_running_server(capsys, tmp_path):
    home = tmp_path / "hospitals"
    assert run(capsys, "invite", "north", "--home", home)[0] == 2
    code, out, _ = run(capsys, "invite", "north", "south", "--home", home, "--address", "127.0.0.1:4433", "--json")
    tokens = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [t["name"] for t in tokens] == ["north", "south"]
    assert all(t["token"].startswith("atoll1.") and len(t["token"]) <= 300 for t in tokens)
    code, out, _ = run(capsys, "status", "--home", home, "--json")
    assert [c["state"] for c in json.loads(out)["clients"]] == ["invited", "invited"]
    assert run(capsys, "revoke", "north", "--home", home)[0] == 0
    assert json.loads(run(capsys, "status", "--home", home, "--json")[1])["clients"][0]["state"] == "revoked"
    assert run(capsys, "verify", "--home", home, "--json")[0] == 0


def test_a_token_names_each_host_that_the_server_was_given(tmp_path):
    at = ServerHome.open(tmp_path / "hospitals", serve=False)
    try:
        at.database.put("address", "10.0.0.5:4433")
        at.database.put("hosts", json.dumps(["a.example", "::5"]))
        assert at.invite("north", None, None, 1).addresses == ("10.0.0.5:4433", "a.example:4433", "[::5]:4433")
        at.database.put("address", "0.0.0.0:4433")
        assert at.invite("north", None, None, 1).addresses == ("a.example:4433", "[::5]:4433")
        at.database.put("hosts", json.dumps([name * 50 for name in "abcd"]))
        token = at.invite("north", None, None, 1)
        assert len(token.text()) <= 300 and token.addresses[0] == "a" * 50 + ":4433" and len(token.addresses) < 4
        assert at.invite("north", "b.example:1", None, 1).addresses == ("b.example:1",)
    finally:
        at.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("invite", "North", "--home", "HOME", "--address", "a:1"), "north"),
        (("invite", "n", "--home", "HOME", "--address", "0.0.0.0:1"), "dial"),
        (("join", "atoll1.x", "--home", "HOME", "--data", "digits"), "cut or changed"),
        (("join", "--home", "HOME", "--data", "digits"), "not enrolled"),
        (("join", "-", "--home", "HOME", "--data", "digits"), "atoll1."),
        (("join", "--hom=HOME", "--home", "HOME", "--data", "digits"), "Unknown option: --hom="),
        (("status", "--home", "HOME/none"), "federation.db"),
        (("revoke", "x", "--home", "HOME/none"), "federation.db"),
        (("serve", "--home", "HOME", "--listen", "here"), "HOST:PORT"),
        (("serve", "--home", "HOME", "--set", "net.absent=1"), "net.absent_s"),
        (("serve", "--home", "HOME", "--window", "many"), "256MiB"),
        (("serve", "--home", "HOME", "--data", "digits", "--baselines"), "baselines"),
    ],
)
def test_a_wrong_command_is_refused(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("sys.stdin", io.StringIO("no token\n"))
    code, _, err = run(capsys, *(word.replace("HOME", str(tmp_path / "home")) for word in words))
    assert code == 2 and message in err, err


def test_the_settings_of_a_server_have_ranges():
    for wrong in ({"clients": 0}, {"min_clients": 0}, {"lease_s": 0.0}, {"absent_s": -1.0}):
        with pytest.raises(UsageError):
            Server("home", **wrong)


def test_the_core_imports_no_network():
    code = "import atoll, atoll.cli.app, sys; print([m for m in ('aiohttp', 'cryptography') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_home_with_runs_never_starts_the_demo(tmp_path, monkeypatch):
    from atoll.net.spec import Server
    from atoll.training.serve import serve_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "runs" / "one").mkdir(parents=True)
    (tmp_path / "home" / "runs" / "one" / "config.toml").write_text('data = "wine"\n')
    with pytest.raises(UsageError, match="has no unfinished run"):
        serve_run(None, Server(tmp_path / "home"))


def test_the_table_of_a_status_has_dates():
    from atoll.cli.net_commands import _table

    shown = _table({"time": 1.5, "end": None, "clients": [{"client": 0, "seen": 86400.0}, {"client": 1, "seen": None}]})
    assert "1970-01-01 00:00:01+00:00" in shown and "1970-01-02 00:00:00+00:00" in shown
