"""`atoll serve --insecure`: loopback only, announced, and still for certificates of its own authority only."""

import base64
import http.client
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from test_federation import Hosted, client

from atoll.base.errors import RunError, UsageError
from atoll.net import identity, wire
from atoll.net.home import ServerHome
from atoll.net.join import join_federation
from atoll.net.spec import Server


def status(address, path, certificate=None):
    link = http.client.HTTPConnection(address, timeout=20)
    stated = {} if certificate is None else {wire.CERTIFICATE: base64.b64encode(certificate).decode()}
    link.request("GET", path, headers=stated)
    try:
        return link.getresponse().status
    finally:
        link.close()


@pytest.mark.slow
def test_a_run_without_tls_is_announced_and_for_its_own_certificates_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # no message takes the way over a proxy
    server = Hosted(tmp_path / "server", {"model": "softmax", "clients": 1, "rounds": 1}, insecure=True)
    server.wait("insecure")
    at = ServerHome.open(tmp_path / "server", serve=False)
    token = at.invite("site-0", None, None, 1)
    request, now = identity.request_pem(identity.new_key()), datetime.now(UTC)
    other = identity.Authority.new(at.authority.federation, now)
    stated = {
        "unknown": at.authority.client(request, "site-0", now),
        "other": other.client(request, "site-0", now),
        "expired": at.authority.client(request, "site-0", now - timedelta(days=90)),
        "authority": at.authority.certificate.public_bytes(serialization.Encoding.DER),
        "garbage": b"garbage",
    }
    assert token.addresses == (f"http://{server.address}",)
    with pytest.raises(UsageError, match="--insecure with the address"):
        at.invite("site-0", "10.0.0.5:4433", None, 1)
    at.close()
    path = f"/v1/blobs/{'0' * 64}"
    found = {name: status(server.address, path, der) for name, der in stated.items()}
    assert found == {"unknown": 403, "other": 401, "expired": 401, "authority": 403, "garbage": 401}
    assert status(server.address, path) == 401 and status(server.address, "/healthz") == 200
    with pytest.raises(RunError, match="has no TLS"):
        join_federation(replace(token, addresses=(server.address,)).text(), tmp_path / "with-tls", "digits", seat=True)
    thread, codes = client(token.text(), tmp_path / "site-0", [])
    assert server.run().rounds == 1
    thread.join(30)
    assert codes["code"] == 0
    own = x509.load_pem_x509_certificate((tmp_path / "site-0" / "certificate.pem").read_bytes())
    assert own.issuer == at.authority.certificate.subject


def test_no_server_and_no_client_is_insecure_beyond_this_machine(tmp_path):
    for address in ("http://10.0.0.5:4433", "http://server.example:4433", "http://[2001:db8::1]:1"):
        with pytest.raises(UsageError, match="--insecure with the address"):
            identity.url_of(address)
    assert identity.url_of("http://[::1]:1") == "http://[::1]:1"
    with pytest.raises(UsageError, match="--insecure with the address"):
        Hosted(tmp_path / "server", {"model": "softmax", "clients": 1}, insecure=True, listen="0.0.0.0:0")
    with pytest.raises(UsageError, match="--insecure with --cert"):
        Server("home", insecure=True, files=("a", "b", "c"))
