"""A server and clients in one process, over TLS on loopback: bits, bytes, refusals and routes."""

import asyncio
import http.client
import json
import socket
import ssl
import threading
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from quick_cases import only

from atoll.base.errors import UsageError
from atoll.net import identity
from atoll.net.home import ServerHome
from atoll.net.join import join_federation
from atoll.net.server import _listening
from atoll.net.spec import Server
from atoll.training.experiment import Experiment
from atoll.training.serve import serve_run


class Hosted:
    """A server in a thread, and the events that it reports."""

    def __init__(self, home, settings, **spec):
        self.home, self.events, self.result = Path(home), [], None
        self._changed = threading.Condition()
        texts = {name.replace("__", "."): str(value) for name, value in settings.items()}
        self.experiment = Experiment().with_settings({"data": "digits", "report": "false", **texts})
        self.spec = Server(str(home), drain=5.0, **spec)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.address = self.wait("listening")["address"]
        if isinstance(self.result, BaseException):
            raise self.result

    def _run(self):
        try:
            self.result = serve_run(self.experiment, self.spec, notify=self._notify)
        except BaseException as error:
            self.result = error
            self._notify({"event": "listening", "address": "", "error": error})

    def _notify(self, facts):
        with self._changed:
            self.events.append(dict(facts))
            self._changed.notify_all()

    def wait(self, kind):
        with self._changed:
            assert self._changed.wait_for(lambda: any(e["event"] == kind for e in self.events), 60), self.events
            return next(e for e in self.events if e["event"] == kind)

    def tokens(self, *names):
        at = ServerHome.open(self.home, serve=False)
        try:
            return [at.invite(name, None, None, 1).text() for name in names]
        finally:
            at.close()

    def run(self):
        """The run, after its end."""
        self.thread.join(60)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result[0]


def client(token, home, events, **more):
    """A client in a thread."""
    codes = {}

    def work():
        try:
            codes["code"] = join_federation(token, home, "digits", seat=True, once=True, notify=events.append, **more)
        except BaseException as error:
            codes["code"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, codes


def federation(folder, settings, clients):
    """Serve to clients on this machine. Returns the run and the events of the clients."""
    server = Hosted(folder / "server", {**settings, "clients": clients})
    events = [[] for _ in range(clients)]
    tokens = server.tokens(*(f"site-{i}" for i in range(clients)))
    joined = [client(token, folder / f"site-{i}", events[i]) for i, token in enumerate(tokens)]
    for thread, codes in joined:
        thread.join(90)
        assert codes["code"] == 0, codes
    return server.run(), events


def alone(folder, settings, clients):
    texts = {name.replace("__", "."): str(value) for name, value in settings.items()}
    texts = {"data": "digits", "report": "false", "clients": str(clients), "out": str(folder / "alone"), **texts}
    return Experiment().with_settings(texts).train()


def rows(run):
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    names = ("round", "fingerprint", "arrived", "failed", "bytes_up", "bytes_down", "loss", "held_out_loss")
    return [[json.loads(line)[name] for name in names] for line in lines]


CASES = {
    "error feedback": {
        "model": "softmax",
        "recipe": "fedavg(lr=0.5, batch=50)",
        "plan__codec": "ErrorFeedback(TopK(0.1) >> Quantize(4, bucket=256))",
        "numerics": "fused",
    },
    "long messages": {"model": "mlp", "recipe": "fedavg(lr=0.5, batch=100)", "numerics": "fused"},
    "a cohort of some": {
        "model": "softmax",
        "recipe": "fedadam(lr=0.1, cohort=2)",
        "numerics": "fused",
        "split": "Dirichlet(0.3)",
    },
}


@pytest.mark.parametrize("case", only(["error feedback"], CASES))
def test_a_network_gives_the_bits_of_a_run(case, tmp_path):
    settings = {"rounds": 2, "seed": 4, **CASES[case]}
    served, events = federation(tmp_path, settings, 3)
    reference = alone(tmp_path, settings, 3)
    models = [(run.path / "model.safetensors").read_bytes() for run in (served, reference)]
    assert rows(served) == rows(reference)
    assert models[0] == models[1]
    sent = sum(event["bytes"] for each in events for event in each if event["event"] == "work")
    assert sent == served.bytes_up
    at = ServerHome.open(tmp_path / "server", serve=False)
    assert at.verify() == []
    at.close()


def _request(address, method, path, context, json_body=None):
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=30)
    try:
        connection.request(method, path, body=None if json_body is None else json.dumps(json_body))
        return connection.getresponse().status
    finally:
        connection.close()


ROUTES = [
    ("GET", "/v1/link"),
    ("GET", "/v1/blobs/" + "0" * 64),
    ("PUT", "/v1/messages/" + "0" * 32),
    ("HEAD", "/v1/messages/" + "0" * 32),
    ("POST", "/v1/renew"),
]


def test_a_server_listens_at_all_addresses_of_its_host_that_this_machine_has(monkeypatch):
    there = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (at, 0)) for at in ("192.0.2.1", "127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: there)
    opened = asyncio.run(_listening("server.example", 0))
    try:
        places = [one.getsockname() for one in opened]
        assert [host for host, _ in places] == ["127.0.0.1", "127.0.0.2"] and len({port for _, port in places}) == 1
        opened[0].close()
        with pytest.raises(OSError, match="in use"):
            asyncio.run(_listening("server.example", places[1][1]))
        with socket.create_server(places[0]):
            pass  # the first address is free again
    finally:
        for one in opened:
            one.close()
    there[:] = there[:1]
    with pytest.raises(OSError, match="assign requested address"):
        asyncio.run(_listening("server.example", 0))


def test_no_route_admits_a_peer_without_a_valid_certificate(tmp_path):
    server = Hosted(tmp_path / "server", {"model": "softmax", "clients": 2, "rounds": 1})
    token, second = server.tokens("site-0", "site-1")
    ca = tmp_path / "server" / "ca.pem"
    anonymous = identity.client_context(None, None, ca)
    for method, path in ROUTES:
        assert _request(server.address, method, path, anonymous) == 401, path
    assert _request(server.address, "GET", "/v1/ca", anonymous) == 200
    assert _request(server.address, "GET", "/healthz", anonymous) == 200
    for method, path in (("GET", "/"), ("DELETE", "/v1/ca"), ("GET", "/v1/blobs/../ca.key"), ("PUT", "/v1/link")):
        assert _request(server.address, method, path, anonymous) in (404, 405), path
    wrong = identity.Token.read(token)
    for stated in (
        _enrolment(replace(wrong, secret=bytes(32))),
        _enrolment(wrong, ed25519.Ed25519PrivateKey.generate()),
    ):
        assert _request(server.address, "POST", "/v1/enrol", anonymous, stated) == 403
    other = identity.Authority.new("other", _now())
    (tmp_path / "other.pem").write_bytes(_client_of(other, tmp_path))
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.load_verify_locations(ca)
    stranger.load_cert_chain(tmp_path / "other.pem", tmp_path / "other.key")
    with pytest.raises(OSError):
        _request(server.address, "GET", "/v1/ca", stranger)
    first, codes = client(token, tmp_path / "site-0", [])
    server.wait("present")
    with pytest.raises(UsageError, match="has been used"):
        join_federation(token, tmp_path / "copy", "digits", seat=True, once=True)
    client(second, tmp_path / "site-1", [])
    server.run()
    first.join(30)
    assert codes["code"] == 0


def _enrolment(token, other=None):
    """The fields of an enrolment. `other` is an identity key that the proof does not use."""
    own, secret = ed25519.Ed25519PrivateKey.generate(), identity.secret_hash(token.secret)
    request = identity.request_pem(identity.new_key())
    return {
        "name": token.name,
        "secret": token.secret.hex(),
        "request": request.decode(),
        "identity": (other or own).public_key().public_bytes_raw().hex(),
        "proof": identity.prove_identity(own, token.federation, token.name, secret, request).hex(),
    }


def _now():
    from datetime import datetime

    return datetime.now(UTC)


def _client_of(authority, folder):
    from cryptography import x509

    key = identity.new_key()
    identity.write_key(folder / "other.key", key)
    der = authority.client(identity.request_pem(key), "site-0", _now())
    return identity.certificate_pem(x509.load_der_x509_certificate(der))


def test_a_run_without_its_clients_waits_and_a_changed_experiment_is_refused(tmp_path):
    server = Hosted(tmp_path / "server", {"model": "softmax", "clients": 1, "rounds": 2})
    with pytest.raises(UsageError, match="Another process"):
        serve_run(server.experiment, server.spec)
    (token,) = server.tokens("site-0")
    with pytest.raises(UsageError, match="at most 1"):
        server.tokens("site-1")
    client(token, tmp_path / "site-0", [])
    assert server.run().rounds == 2
    assert replace(server.spec, clients=1).clients == 1
