"""A site behind a link with faults: cut, half closed, half open and slow connections change no bit of a run."""

import contextlib
import gc
import socket
import socketserver
import struct
import threading
import warnings
from typing import NamedTuple

import pytest
from aiohttp import web
from network import TICK
from sites import Served, experiment

from atoll.net import client, server
from atoll.net.home import ServerHome

SETTINGS = {
    "data": "digits",
    "clients": 2,
    "model": "mlp",
    "recipe": "fedavg(lr=0.5, batch=100)",
    "plan__codec": "ErrorFeedback(TopK(0.5))",
    "numerics": "fused",
    "report": "false",
    "rounds": 8,
}


class Fault(NamedTuple):
    """What happens to a connection after this many bytes: cut, half (the server sees its end), silent, or slow."""

    kind: str
    after: int = 0


class Link(socketserver.ThreadingTCPServer):
    """Passes connections on to a server. Connection n has the n-th fault; later ones have none."""

    allow_reuse_address = True  # server_close waits for all connections

    def __init__(self, faults):
        self.faults, self.happened, self.target, self.number = faults, [], "", 0
        super().__init__(("127.0.0.1", 0), Connection)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Connection(socketserver.BaseRequestHandler):
    def handle(self):
        link = self.server
        number, link.number = link.number, link.number + 1
        self.fault = link.faults[number] if number < len(link.faults) else Fault("none")
        self.passed, self.over = 0, threading.Event()
        host, _, port = link.target.rpartition(":")
        with socket.create_connection((host, int(port))) as other:
            back = threading.Thread(target=self.pump, args=(other, self.request, False), daemon=True)
            back.start()
            self.pump(self.request, other, True)
            back.join(60)

    def pump(self, one, other, up):
        try:
            while data := one.recv(1400 if self.fault.kind == "slow" else 1 << 14):
                self.passed += len(data)
                if self.fault.kind == "slow":
                    TICK.wait(0.0005)
                elif self.fault.kind != "none" and self.passed > self.fault.after and not self.happens(one, other, up):
                    return
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def happens(self, one, other, up):
        """Let the fault happen. Returns whether this direction still passes bytes."""
        if not self.over.is_set():
            self.over.set()
            self.server.happened.append(self.fault)
        if self.fault.kind == "cut":
            self.reset(one, other)
        elif self.fault.kind == "half" and up:
            other.shutdown(socket.SHUT_WR)
        elif self.fault.kind == "half":
            return True
        else:
            one.settimeout(3)
            with contextlib.suppress(TimeoutError):
                while one.recv(1 << 14):
                    pass  # silent: the bytes vanish, and both sides see an open connection; later it is cut
            self.reset(one, other)
        return False

    def reset(self, *links):
        for each in links:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


FAULTS = [
    *[Fault("slow")] * 2,  # the enrolment
    Fault("cut", 9_000),
    Fault("slow"),
    *[Fault(kind, after) for after in (15_000, 60_000, 110_000) for kind in ("cut", "half", "silent")],
]


def run(folder, **spec):
    """A closed run of two seats of digits, with messages of more than one frame."""
    return Served(folder, experiment(**SETTINGS), **spec)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a TLS shutdown without a peer
def test_faults_of_a_link_change_no_bit(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain")
    for name in ("north", "south"):
        plain.join(name, "digits", seat=True)
    expected = [report.fingerprint for report in plain.wait()["server"].reports]
    for module in (client, server):
        monkeypatch.setattr(module, "PING_S", 1.0)
    with Link(FAULTS) as link:
        it = run(tmp_path / "faults", lease_s=2.0)
        direct, link.target = it.address, it.address
        it.address = ":".join(map(str, link.server_address))
        it.join("north", "digits", seat=True)
        it.address = direct
        it.join("south", "digits", seat=True)
        results = it.wait(120)
    assert (results["north"], results["south"]) == (0, 0), results
    assert [report.fingerprint for report in results["server"].reports] == expected
    kinds = [fault.kind for fault in link.happened]
    assert {"cut", "half", "silent"} <= set(kinds) and len(kinds) >= 6, link.happened
    at = ServerHome.open(it.home, serve=False)
    name = results["server"].path.name
    assert at.verify() == [] and all(len(at.database.accepted(name, n)) == 2 for n in range(8))
    at.close()
    with warnings.catch_warnings():  # a TLS connection whose peer is gone has not ended with its loop
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(3):
            gc.collect()


def test_a_crowded_server_keeps_no_connection_of_a_long_upload(tmp_path, monkeypatch):
    for name, value in {"MANY": -1, "LONG": 0, "HASH_STEP": 1000, "SHORT_PIECE": 1000}.items():
        monkeypatch.setattr(server, name, value)
    ended, close = [], web.Response.force_close
    monkeypatch.setattr(web.Response, "force_close", lambda answer: ended.append(answer.status) or close(answer))
    large = {"model": "cnn", "plan__codec": "Identity()", "numerics": "loop", "recipe": "fedsgd(lr=0.1)", "rounds": 2}
    it = Served(tmp_path, experiment(**{**SETTINGS, **large}))
    for name in ("north", "south"):
        it.join(name, "digits", seat=True)
    results = it.wait()
    assert [report.arrived for report in results["server"].reports] == [2, 2] and ended == [200] * 4, results
