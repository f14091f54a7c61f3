"""Hostile peers of a server: every route without rights, HTTP and WebSocket messages that break the rules, slow peers.

Each case has its own answer, and the server goes on: at the end an honest client is present.
"""

import asyncio
import base64
import contextlib
import os
import socket
import ssl
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from cryptography import x509
from network import eventually
from quick_cases import only

from atoll.net import coordinator as co
from atoll.net import identity, wire
from atoll.net import server as servers
from atoll.net.client import BACKENDS, own_versions
from atoll.net.home import ServerHome
from atoll.net.server import Listener

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
WORK = b"w" * 16
SIZE = 100_000  # of the message of `WORK`, which belongs to client 0


class Peer:
    """A server without training, and the certificates of its clients."""

    def __init__(self, folder):
        self.folder = folder
        self.at = ServerHome.open(folder / "server")
        self.ca, key = folder / "server" / "ca.pem", identity.new_key()
        self.key = folder / "client.key"
        identity.write_key(self.key, key)
        self.request = identity.request_pem(key)
        self.coordinator = co.Coordinator(1, self.at.database.federation, own_versions(), co.Limits())
        self.net = Listener(self.at.path, self.at.database, self.at.authority, self.coordinator)
        self.certificates = {name: self.enrol(name) for name in ("honest", "other", "revoked")}
        self.at.database.revoke("revoked")
        host, _, port = self.net.start("127.0.0.1", 0).rpartition(":")
        self.place = host, int(port)
        self.blob = self.net.offer(b"terms")
        self.model = self.net.offer(b"model of client 0")
        self.net.handle(co.RunOpened("run", self.blob, True, False))
        lease, key = wire.Lease(0, 0), wire.WireKey("0", ())
        hashes = bytes(32), self.blob.hash, self.model
        work = wire.Work(
            WORK, "round", "train", 0, 0, 0, "Plan()", key, "loop", *hashes, (), None, None, 0, None, lease, None
        )
        self.net.handle(co.Assigned(0, work, SIZE, SIZE))

    def enrol(self, name, now=None, authority=None):
        der = (authority or self.at.authority).client(self.request, name, now or datetime.now(UTC))
        if authority is None:
            secret = sha256(name.encode()).digest()
            self.at.database.invite(name, secret, int(time.time()) + 3600)
            self.at.database.enrol(name, secret, self.request, int(time.time()), lambda: (der, identity.peer_of(der)))
        path = self.folder / f"{name}-{len(list(self.folder.iterdir()))}.pem"
        path.write_bytes(identity.certificate_pem(x509.load_der_x509_certificate(der)))
        return path

    def connect(self, certificate=None):
        """A TLS connection with this certificate."""
        context = identity.client_context(certificate, self.key if certificate else None, self.ca)
        raw = socket.create_connection(self.place, timeout=20)
        try:
            return context.wrap_socket(raw, server_hostname=self.place[0])
        except BaseException:
            raw.close()
            raise

    def answer(self, certificate, request, body=b""):
        """The status of an HTTP request; 0 if the server ends the connection without one."""
        try:
            with self.connect(certificate) as link:
                link.sendall(request + body)
                return int(link.recv(1 << 16).split(b" ")[1] or 0)
        except (OSError, IndexError):
            return 0

    def link(self, certificate):
        """An open WebSocket."""
        link = self.connect(certificate)
        key = base64.b64encode(os.urandom(16))
        link.sendall(b"GET /v1/link HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n")  # fmt: skip
        head = b""
        while b"\r\n\r\n" not in head:
            head += link.recv(1)
        assert head.startswith(b"HTTP/1.1 101")
        return link

    def noted(self):
        """The codes that the training has received so far."""
        found = []
        while not self.net.inbox.empty():
            action = self.net.inbox.get()
            found += [action.code] if isinstance(action, co.Noted) else []
        return found


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    it = Peer(tmp_path_factory.mktemp("hostile"))
    yield it
    # The server is as good as before: an honest client becomes present.
    try:
        with it.link(it.certificates["honest"]) as link:
            link.sendall(framed(hello()) + framed(wire.encode_frame(wire.Ready(it.blob.hash, 10, 0))))
            assert eventually(lambda: it.coordinator.present == (0,)), it.coordinator.status()
    finally:
        assert it.net.stop()
        it.at.close()


def hello():
    return wire.encode_frame(wire.Hello(wire.PROTOCOL, own_versions(), "", BACKENDS, None, None, ()))


def framed(body, head=0x82):
    """A masked WebSocket frame."""
    mask, n = os.urandom(4), len(body)
    size = bytes([0x80 | n]) if n < 126 else b"\xfe" + n.to_bytes(2, "big")
    return bytes([head]) + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(body))


def request(method, path, *headers):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


OWN = f"/v1/messages/{WORK.hex()}"
RANGE = f"Content-Range: bytes 0-{SIZE - 1}/{SIZE}"
GUARDED = ("/v1/link", f"/v1/blobs/{'0' * 64}", OWN, "/v1/renew")
PUBLIC = {("GET", "/healthz"): 200, ("HEAD", "/healthz"): 200, ("GET", "/v1/ca"): 200, ("HEAD", "/v1/ca"): 200}


@pytest.mark.parametrize(
    "credential", only(["none"], ["none", "revoked", "expired", "other authority", "other client"])
)
def test_every_route_and_verb_refuses_a_peer_without_rights(peer, credential):
    past = datetime.now(UTC) - timedelta(days=400)
    made = {
        "none": lambda: None,
        "revoked": lambda: peer.certificates["revoked"],
        "expired": lambda: peer.enrol("expired", past, peer.at.authority),
        "other authority": lambda: peer.enrol("honest", None, identity.Authority.new("other", datetime.now(UTC))),
        "other client": lambda: peer.certificates["other"],
    }
    certificate = made[credential]()
    # An upload of another client is unknown, a blob that only its work names too; its channel is not for sale.
    allowed = {"none": {401}, "revoked": {403}, "other client": {204, 404, 410, 411, 400, 426}}.get(credential, {0})
    # TLS ends the connection of a wrong certificate before it reads a request.
    verbs = {"none": METHODS, "expired": ("GET",), "other authority": ("GET",)}.get(credential, ("GET", "HEAD", "PUT"))
    paths = (*GUARDED, "/", "/v1/enrol/", "/metrics", "/v1/blobs/../ca.key", "/v1/messages/" + "g" * 32)
    for path in (*paths, f"/v1/blobs/{peer.model.hash.hex()}"):
        for method in verbs:
            if credential == "other client" and path in ("/v1/link", "/v1/renew"):
                continue
            status = peer.answer(certificate, request(method, path, "Content-Length: 0", RANGE, "Connection: close"))
            assert status in (404, 405) or status in allowed, (method, path, status)
            assert status != 204 or (method, path) == ("HEAD", OWN), "the length of another client's upload is 0"
    assert b"\0" not in WORK and peer.coordinator.announced(1, WORK) is None


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("PUT", OWN, RANGE, "Transfer-Encoding: chunked"), 411),
        (request("PUT", OWN, RANGE, "Content-Encoding: gzip", f"Content-Length: {SIZE}"), 415),
        (request("PUT", OWN, f"Content-Length: {SIZE}"), 400),
        (request("PUT", OWN, "Content-Range: bytes 5-3/2", "Content-Length: 10"), 400),
        (request("PUT", OWN, f"Content-Range: bytes 0-{2**70}/{2**70 + 1}", f"Content-Length: {2**70}"), (400, 410)),
        (request("PUT", OWN, RANGE, f"Content-Length: {SIZE}"), 410),  # it was not announced
        (request("PUT", OWN, RANGE, "Content-Length: 10", "Transfer-Encoding: chunked"), 400),
        (request("PUT", OWN, RANGE, "Content-Length: 10", "Content-Length: 11"), 400),
        (request("PUT", OWN, RANGE, "Content-Length: -1"), 400),
        (request("GET", "/v1/link", "X: " + "a" * 9000), 400),
        (request("GET", "/v1/link", *(f"X{i}: a" for i in range(200))), 400),
        (request("GET", "/" + "a" * 9000), 400),
        (request("POST", "/v1/renew", "Content-Length: 100000") + bytes(100_000), 413),
        (request("POST", "/v1/renew", "Content-Length: 3") + b"abc", 403),
        (b"\0" * 100 + b"\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    ],
    ids=str,
)
def test_a_request_that_breaks_the_rules_has_its_status(peer, sent, status):
    assert peer.answer(peer.certificates["honest"], sent) in (status if isinstance(status, tuple) else (status,))


def cut(frame, at, value):
    return frame[:at] + value + frame[at + len(value) :]


def frames():
    good = hello()
    return {
        "frame-short": good[:8],
        "frame-magic": cut(good, 0, b"X"),
        "frame-protocol": cut(good, 4, b"\x63"),
        "frame-flags": cut(good, 6, b"\x01"),
        "frame-type": cut(good, 5, b"\xfe"),
        "frame-length": good + b"\0",
        "frame-field": cut(good, 12, b"\x90" + bytes(len(good) - 13)),
    }


@pytest.mark.parametrize("code", frames())
def test_a_frame_that_is_no_message_closes_its_channel_only(peer, code):
    peer.noted()
    with peer.link(peer.certificates["other"]) as link:
        link.sendall(framed(frames()[code]))
        got = b""
        with contextlib.suppress(OSError):
            while piece := link.recv(4096):
                got += piece
    assert b"frame" in got
    assert eventually(lambda: code in peer.noted()), code


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (lambda blob: framed(b"text", 0x81), "frame-type"),
        (lambda blob: framed(wire.encode_frame(wire.Ready(blob.hash, 10, 0))), "order"),
        (lambda blob: framed(hello()) * 2, "order"),
        (
            lambda blob: framed(hello()) + framed(wire.encode_frame(wire.Update(WORK, wire.Lease(1, 1), None, b""))),
            "order",
        ),
    ],
)
def test_messages_in_the_wrong_order_close_their_channel_only(peer, sent, code):
    peer.noted()
    with peer.link(peer.certificates["other"]) as link:
        link.sendall(sent(peer.blob))
        with contextlib.suppress(OSError):
            while link.recv(4096):
                pass
    assert eventually(lambda: code in peer.noted())


@pytest.mark.parametrize("rows", [0, (1 << 24) + 1, wire.MAX_ROWS])
def test_rows_beyond_the_limit_are_refused(peer, rows):
    with peer.link(peer.certificates["other"]) as link:
        link.sendall(framed(hello()) + framed(wire.encode_frame(wire.Ready(peer.blob.hash, rows, 0))))
        got = b""
        with contextlib.suppress(OSError):
            while piece := link.recv(4096):
                got += piece
    assert b"rows" in got and 1 not in peer.coordinator.present


@pytest.mark.parametrize("head", [0xC2, 0x92, 0x83])  # compressed, reserved bit, reserved opcode
def test_a_websocket_frame_that_breaks_the_protocol_ends_the_channel(peer, head):
    with peer.link(peer.certificates["other"]) as link:
        link.sendall(framed(hello(), head))
        link.settimeout(10)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while link.recv(4096):
                pass
    assert eventually(lambda: not [c for c in peer.coordinator.status() if c.client == 1 and c.stage != "away"])


def test_a_frame_beyond_128_kib_ends_the_channel_before_it_is_read(peer):
    with peer.link(peer.certificates["other"]) as link:
        link.sendall(b"\x82\xff" + (1 << 62).to_bytes(8, "big") + os.urandom(4))
        link.settimeout(10)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while link.recv(4096):
                pass


@pytest.mark.slow
def test_a_peer_that_sends_nothing_or_too_slowly_is_disconnected(peer, monkeypatch):
    """A connection without TLS, TLS without a request, a head by bytes, and a body of an enrolment that never ends."""
    for name in ("HEAD_S", "BODY_S"):
        monkeypatch.setattr(servers, name, 0.3)
    head = request("POST", "/v1/enrol", "Content-Length: 100")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(peer.connect()) for _ in range(4)]
        opened[1].sendall(b"GET /heal")
        opened[2].sendall(head + b"{")
        opened[3].sendall(request("GET", "/healthz"))
        assert opened[3].recv(4096).startswith(b"HTTP/1.1 200")
        for link in opened[:3]:
            link.settimeout(10)
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while link.recv(4096):
                    pass
        opened[3].sendall(request("GET", "/healthz"))
        assert opened[3].recv(4096).startswith(b"HTTP/1.1 200"), "a connection with requests stays"


def test_the_number_of_connections_is_limited(peer, monkeypatch):
    monkeypatch.setattr(peer.net, "most", 8)
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            with contextlib.suppress(OSError):
                stack.enter_context(peer.connect())
        assert eventually(lambda: len(peer.net.connections) <= 8)
    assert eventually(lambda: peer.answer(None, request("GET", "/healthz")) == 200)


def test_a_download_that_is_not_read_delays_others_for_a_moment_only(peer, monkeypatch):
    """On a crowded server downloads take turns, and each returns its turn once."""
    for name, value in {"MANY": -1, "SENDING_S": 0.3}.items():
        monkeypatch.setattr(servers, name, value)
    turns = asyncio.Semaphore(1)
    monkeypatch.setattr(peer.net, "_sending", turns)
    monkeypatch.setattr(peer.coordinator, "may_read", lambda client, hash: True)
    me, large = peer.certificates["honest"], peer.net.offer(bytes(64 << 20))
    with peer.connect(me) as silent:
        silent.sendall(request("GET", f"/v1/blobs/{large.hash.hex()}"))
        assert eventually(turns.locked)
        assert peer.answer(me, request("GET", f"/v1/blobs/{peer.model.hash.hex()}")) == 200
    assert eventually(lambda: turns._value == 1)
    assert peer.answer(me, request("GET", f"/v1/blobs/{peer.model.hash.hex()}")) == 200
    assert eventually(lambda: turns._value == 1), "a turn was returned twice"
    peer.net.keep_blobs({peer.blob.hash, peer.model.hash})


def test_failed_enrolments_of_an_address_are_limited(peer):
    body = b'{"name": "honest", "secret": "%s", "request": "x", "identity": "%s", "proof": ""}' % (
        b"00" * 32,
        b"00" * 32,
    )
    peer.net._tries.clear()
    sent = request("POST", "/v1/enrol", f"Content-Length: {len(body)}") + body
    assert [peer.answer(None, sent) for _ in range(12)] == [403] * 10 + [429] * 2


def test_a_granted_upload_without_progress_ends_and_loses_its_bytes(peer, monkeypatch):
    monkeypatch.setattr(peer.coordinator, "limits", replace(peer.coordinator.limits, stall_s=0.2))
    me = peer.certificates["honest"]
    with peer.link(me) as link, peer.connect(me) as upload:
        link.sendall(framed(hello()) + framed(wire.encode_frame(wire.Ready(peer.blob.hash, 10, 0))))
        assert eventually(lambda: peer.coordinator.present == (0,))
        lease = wire.Lease(1, peer.coordinator._clients[0].works[WORK].lease)
        link.sendall(framed(wire.encode_frame(wire.Sent(WORK, lease, None, SIZE, bytes(32)))))
        assert eventually(lambda: peer.coordinator.announced(0, WORK))
        upload.sendall(request("PUT", OWN, RANGE, f"Content-Length: {SIZE}") + bytes(SIZE // 2))
        assert upload.recv(4096).startswith(b"HTTP/1.1 503")
    assert eventually(lambda: not peer.net._partial) and peer.coordinator.in_flight == 0
