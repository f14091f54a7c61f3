"""The operation of a server: metrics, logs, services, and the end by a signal."""

import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from network import Federation, eventually

from atoll.base.errors import UsageError
from atoll.cli.answer import answer
from atoll.cli.flags import ExperimentFlags
from atoll.cli.net_commands import Printer, _split
from atoll.net import coordinator, server, systemd, wire
from atoll.net.client import own_versions
from atoll.net.home import ServerHome
from atoll.net.metrics import Metrics, loopback

ROUND = {"event": "round", "round": 0, "bytes_up": 300, "bytes_down": 500, "failed": 1, "loss": 0.25, "accuracy": 0.5}


def fetched(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_metrics_count_events_and_contain_no_values():
    net = SimpleNamespace(present=frozenset({0, 3}), lag=0.5, lease_ages=lambda: (1.0, 7.5))
    metrics = Metrics("127.0.0.1:0")
    try:
        metrics.watch(net)
        for facts in (
            ROUND,
            {"event": "stages", "gather": 0.2, "step": 0.004, "commit": 0.02},
            {"event": "lost", "client": 1, "work": "00", "code": "absent", "reason": "x"},
            {"event": "noted", "client": 1, "code": "frame-long", "work": None},
            {"event": "present", "client": 1, "rows": 10},
        ):
            metrics.event(facts)
        found = fetched(metrics.address)
        with pytest.raises(UsageError, match="cannot listen"):
            Metrics(metrics.address)
    finally:
        metrics.close()
    expected = {
        "atoll_rounds_total": 1.0, 'atoll_bytes_total{direction="up"}': 300.0,
        'atoll_bytes_total{direction="down"}': 500.0,
        'atoll_failures_total{code="absent"}': 1.0, 'atoll_failures_total{code="frame-long"}': 1.0,
        "atoll_lost_contributions_total": 1.0, "atoll_present_clients": 2.0, "atoll_loop_lag_seconds": 0.5,
        "atoll_leases": 2.0, "atoll_lease_age_seconds": 7.5, 'atoll_stage_seconds_sum{stage="commit"}': 0.02,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert found["process_resident_memory_bytes"] > 1e6
    assert not [name for name in found if "loss" in name or "accuracy" in name]
    with pytest.raises(urllib.error.URLError):
        fetched(metrics.address)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9464", "10.0.0.1:9464", "example.org:9464", "127.0.0.1", "127.0.0.1:99999"]
)
def test_metrics_listen_on_the_loopback_interface_only(address):
    with pytest.raises(UsageError, match="--metrics"):
        loopback(address)


def test_a_log_has_one_object_an_event_and_escapes_the_texts_of_peers(capsys):
    log = Printer(True, ("round",), log=True)
    log({"event": "run", "run": "calm-bay"})
    log({"event": "lost", "client": 2, "work": "ab", "code": "failed", "reason": "\x1b[31mred\nline \u202e"})
    log(ROUND)
    out, err = capsys.readouterr()
    assert [json.loads(line)["round"] for line in out.splitlines()] == [0]
    rows = [json.loads(line) for line in err.splitlines()]
    assert [(r["event"], r["run"], r["round"], r["client"], r["work"]) for r in rows] == [
        ("run", "calm-bay", None, None, None),
        ("lost", "calm-bay", None, 2, "ab"),
        ("round", "calm-bay", 0, None, None),
    ]
    assert "\x1b" not in err and "\u202e" not in err and rows[1]["reason"].startswith("\x1b[31m")


def test_a_unit_runs_the_command_with_few_rights(capsys, tmp_path):
    words = ["--home", "/var/lib/atoll/north", "--data", "a b%1$x.csv", "--json"]
    assert answer(["service", "join", *words]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert line.endswith("-m atoll join --home /var/lib/atoll/north --data 'a b%%1$$x.csv' --json")
    assert {"Type=notify", "StateDirectory=atoll/north", "NoNewPrivileges=yes", "LimitCORE=0"} <= set(text.splitlines())
    if shutil.which("systemd-analyze"):
        path = tmp_path / "atoll-join-north.service"
        path.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("relay", ["--home", "/var/lib/atoll"], "service relay"),
        ("serve", [], "home"),
        ("serve", ["--home", "federation"], "home"),
        ("serve", ["--home", "/var/lib/../etc"], "home"),
        ("join", ["atoll1.abc", "--home", "/var/lib/atoll"], "token"),
        ("join", ["-", "--home", "/var/lib/atoll"], "token"),
        ("join", ["--home", "/var/lib/atoll", "--data", "a\nExecStartPre=x"], "line ends"),
    ],
)
def test_a_wrong_service_is_refused(command, words, message):
    with pytest.raises(UsageError, match=message):
        systemd.unit(command, words)


def test_the_loop_of_a_server_reports_its_life(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "40000")
        at = ServerHome.open(tmp_path / "home")
        state = coordinator.Coordinator(1, at.database.federation, own_versions(), coordinator.Limits())
        net = server.Listener(at.path, at.database, at.authority, state)
        net.start("127.0.0.1", 0)
        try:
            assert [manager.recv(64) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        finally:
            assert net.stop()
            at.close()
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_s() is None
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("READY=1")


def test_a_run_that_diverges_ends_with_its_object(tmp_path):
    words = ["--data", "digits", "--model", "softmax", "--clients", "1", "--rounds", "9", "--set", "report=false"]
    with Federation(tmp_path, *words, "--recipe", "distributed_gd(1e6)", clients=1) as it:
        it.serve()
        it.invite()
        it.join(0)
        assert it.server.code() == 1
        last = it.server.lines[-2]
        assert last["status"] == "failed" and "diverged" in last["reason"] and Path(last["path"]).is_dir()
        assert "diverged" in it.server.stderr()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_drains_the_server_and_a_second_one_ends_it(tmp_path):
    words = ["--data", "digits", "--clients", "1", "--model", "softmax", "--rounds", "4000", "--set", "report=false"]
    with Federation(tmp_path, *words, clients=1) as it:
        it.serve("--log", "json")
        it.invite()
        it.join(0)
        it.server.after_round(1)
        it.server.kill(signal.SIGTERM)
        assert it.server.code() == 0, it.server.stderr()
        rows = [json.loads(line) for line in it.server.stderr().splitlines() if line.startswith("{")]
        assert {"listening", "present", "run", "round", "stages"} <= {row["event"] for row in rows}
        it.serve()
        assert it.server.after_round(2)
        it.clients[0].process.send_signal(signal.SIGSTOP)
        it.server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: it.server.process.poll() is None)
        it.server.process.send_signal(signal.SIGTERM)
        assert it.server.code() in (0, 130)


def test_the_flag_metrics_takes_names_and_one_address():
    made = ExperimentFlags(metrics=["accuracy", "127.0.0.1:9464"], settings=["net.absent_s=60", "seed=1"])
    net, address, own = _split(made)
    assert (net, address) == ({"net.absent_s": "60"}, "127.0.0.1:9464")
    assert (own.metrics, own.settings) == (["accuracy"], ["seed=1"])
    assert _split(ExperimentFlags(metrics=["site:score"]))[1:][0] is None
    with pytest.raises(UsageError, match="one address"):
        _split(ExperimentFlags(metrics=["127.0.0.1:1", "127.0.0.1:2"]))


def test_the_manual_has_every_code_with_a_cause_and_a_cure():
    """The codes of the messages, and those that the documents of `Failed` and `Noted` list."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.partition("## Codes")[2].splitlines()
        if line.startswith("| `")
    ]
    listed = {cells[0].strip("`") for cells in rows}
    assert all(len(cells) == 3 and all(cells) for cells in rows)
    kinds = (wire.RefusalCode, wire.LeaveCode, wire.DenialCode, wire.ReceiptCode, wire.ByeCode, wire.PlaceCode)
    known = {code for kind in kinds for code in get_args(kind)}
    for action in (coordinator.Failed, coordinator.Noted):
        text = re.sub(
            r"\(.*?\)|that of a `Refusal`|or frame-FAULT|\bor\b",
            "",
            action.__doc__.partition("The code is")[2],
            flags=re.S,
        )
        known |= set(re.findall(r"[a-z-]+", text))
    known |= SENT
    assert listed == known, (sorted(known - listed), sorted(listed - known))
    faults = re.findall(r"`([a-z]+)`", page.partition("noted as `frame-`")[2])
    assert set(get_args(wire.FrameFault)) <= set(faults)


def test_the_tests_of_the_table_of_faults_exist():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 30 and [name for name in named if f"def {name}(" not in sources] == []


ROOT = Path(__file__).parents[2]
# The literal codes in the source of the coordinator.
SENT = set(
    re.findall(r'(?:Noted\(c\.id, |(?:_fail|_absent)\(c, open, )"([a-z]+)"', Path(coordinator.__file__).read_text())
)
