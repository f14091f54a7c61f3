"""Tokens, certificates and TLS contexts: each wrong one is refused with its reason. Handshakes run in memory."""

import ssl
import stat
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.base.errors import RunError, UsageError
from atoll.net import identity as ids
from atoll.net.identity import Authority, Token

NOW = datetime.now(UTC)
TOKEN = Token(("atoll.example:4433", "10.0.0.7:4433"), bytes(range(32)), "hospitals", "north", bytes(32), 2_000_000_000)


# 1. Tokens


def test_a_token_reads_back_and_hides_its_secret():
    new = ids.new_token(["a.example:1"], bytes(32), "f", "north", 5)
    assert Token.read(f" {new.text()}\n") == new
    assert new.secret != ids.new_token(["a.example:1"], bytes(32), "f", "north", 5).secret and len(new.secret) == 32
    assert new.secret.hex() not in repr(new) and str(new.secret) not in repr(new)
    assert len(TOKEN.text()) <= ids.MAX_TOKEN


def test_every_cut_and_every_changed_character_is_refused():
    text = TOKEN.text()
    for wrong in [text[:end] for end in range(len(text))] + [text + "A", text + "!", "", "atoll2." + text[7:]]:
        with pytest.raises(UsageError, match="token"):
            Token.read(wrong)
    for at in range(7, len(text) - 1):
        with pytest.raises(UsageError, match="check sum"):
            Token.read(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])


@settings(max_examples=4 * settings().max_examples)
@given(st.text(max_size=50))
def test_random_tokens_raise_one_error(text):
    with pytest.raises(UsageError):
        Token.read("atoll1." + text)


def test_a_long_token_a_wrong_name_and_an_address_that_cannot_be_dialled():
    with pytest.raises(UsageError, match="300"):
        ids.new_token(["a.example:1"] * 8, bytes(32), "f" * 64, "n" * 64, 5).text()
    with pytest.raises(UsageError, match="north-1"):
        ids.new_token(["a.example:1"], bytes(32), "f", "North 1", 5)
    for address in ("0.0.0.0:1", "[::]:1", "*:1", "host", "host:", ":1", "host:0", "host:65536", "host:²"):
        with pytest.raises(UsageError):
            ids.check_address(address)


def test_an_identity_key_signs_its_own_enrolment_only():
    key, request = ed25519.Ed25519PrivateKey.generate(), ids.request_pem(ids.new_key())
    public, secret = key.public_key().public_bytes_raw(), ids.secret_hash(TOKEN.secret)
    proof = ids.prove_identity(key, "hospitals", "north", secret, request)
    ids.check_identity(proof, public, "hospitals", "north", secret, request)
    other = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    for wrong in (
        (proof, other, "hospitals", "north", secret, request),
        (proof, public, "hospital", "snorth", secret, request),
        (proof, public, "hospitals", "south", secret, request),
        (proof, public, "hospitals", "north", bytes(32), request),
        (proof, public, "hospitals", "north", secret, b""),
        (b"", public, "hospitals", "north", secret, request),
        (proof, b"\xff" * 32, "hospitals", "north", secret, request),
    ):
        with pytest.raises(UsageError, match="has not signed"):
            ids.check_identity(*wrong)


# 2. Certificates


@pytest.fixture(scope="module")
def authority():
    return Authority.new("hospitals", NOW)


def test_the_authority_and_its_certificates(authority):
    key = ids.new_key()
    server = authority.server(key, ["localhost", "127.0.0.1", "[::1]"], NOW)
    peer = ids.peer_of(server.public_bytes(serialization.Encoding.DER))
    assert peer.sans == ("DNS:localhost", "IP:127.0.0.1", "IP:::1")
    assert peer.expires == int((NOW + timedelta(days=90)).timestamp())
    client = authority.client(ids.request_pem(key), "north", NOW)
    peer = ids.peer_of(client)
    assert peer.sans == (ids.san_of("hospitals", "north"),)
    assert peer.expires == int((NOW + timedelta(days=30)).timestamp())
    certificate = x509.load_der_x509_certificate(client)
    assert peer.serial == f"{certificate.serial_number:x}"
    certificate.verify_directly_issued_by(authority.certificate)
    constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert constraints.ca and constraints.path_length == 0
    assert "PrivateKey" not in repr(authority)


def test_names_in_a_request_are_ignored(authority):
    key = ids.new_key()
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:atoll:hospitals:south")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(ids._subject("south"))
        .add_extension(name, critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    assert ids.peer_of(authority.client(request, "north", NOW)).sans == (ids.san_of("hospitals", "north"),)


def test_wrong_requests_are_refused(authority):
    weak = [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP224R1())]
    requests = [ids.request_pem(key) for key in weak]
    requests += [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", b"\xff" * 100]
    good = x509.load_pem_x509_csr(ids.request_pem(ids.new_key())).public_bytes(serialization.Encoding.DER)
    broken = bytearray(good)
    broken[-1] ^= 1  # the signature
    body = ssl.DER_cert_to_PEM_cert(bytes(broken)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    for request in [*requests, body.encode()]:
        with pytest.raises(UsageError, match="request"):
            authority.client(request, "north", NOW)


def test_renewal_is_due_after_two_thirds(authority):
    certificate = x509.load_der_x509_certificate(authority.client(ids.request_pem(ids.new_key()), "north", NOW))
    assert not ids.renewal_due(certificate, NOW + timedelta(days=19, hours=23))
    assert ids.renewal_due(certificate, NOW + timedelta(days=20, hours=1))


def test_a_wrong_clock_is_named_with_both_times(authority):
    certificate = authority.server(ids.new_key(), ["localhost"], NOW)
    ids.check_dates(certificate, NOW)
    for days, words in ((-1, "valid from"), (90, "expired at")):
        then = NOW + timedelta(days=days)
        with pytest.raises(UsageError, match=words) as error:
            ids.check_dates(certificate, then)
        assert f"{then:%Y-%m-%d %H:%M:%S}" in str(error.value)


def test_another_authority_is_refused(authority):
    pem = ids.certificate_pem(authority.certificate)
    assert ids.check_authority(pem, authority.fingerprint) == authority.certificate
    other = Authority.new("hospitals", NOW)
    for wrong in (ids.certificate_pem(other.certificate), b"", b"\xff" * 20, pem[:100]):
        with pytest.raises(RunError, match="Another certificate answers"):
            ids.check_authority(wrong, authority.fingerprint)


def test_key_files_are_private(tmp_path):
    key, path = ids.new_key(), tmp_path / "key.pem"
    path.with_name("key.pem.new").write_bytes(b"left by a crash, readable by all")
    ids.write_key(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ids.read_key(path).private_numbers() == key.private_numbers()
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        ids.read_key(path)
    for wrong in (b"", ids.key_pem(key)[:50], _pem(ed25519.Ed25519PrivateKey.generate())):
        path.write_bytes(wrong)
        path.chmod(0o600)
        with pytest.raises(UsageError, match="ECDSA"):
            ids.read_key(path)


def _pem(key):
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


# 3. Handshakes


class Files:
    """The files of one side: its certificate, key, and the authority that it trusts."""

    def __init__(self, folder, name, certificate, key, authority):
        self.certificate, self.key, self.authority = (folder / f"{name}.{kind}" for kind in ("crt", "key", "ca"))
        self.authority.write_bytes(ids.certificate_pem(authority))
        self.certificate.write_bytes(ids.certificate_pem(certificate))
        self.key.write_bytes(_pem(key))
        self.key.chmod(0o600)

    def server(self):
        return ids.server_context(self.certificate, self.key, self.authority)

    def client(self):
        return ids.client_context(self.certificate, self.key, self.authority)


def handshake(server, client, host="localhost"):
    """Handshake in memory, then one byte each way; the certificate of the client, or the error of one side."""
    a, b, c, d = (ssl.MemoryBIO() for _ in range(4))
    sides = [server.wrap_bio(a, b, server_side=True), client.wrap_bio(c, d, server_hostname=host)]
    for work in ("do_handshake", "write", "read"):
        open_sides = [0, 1]
        for _ in range(20):
            for i in list(open_sides):
                try:
                    getattr(sides[i], work)(*{"write": [b"x"], "read": [1]}.get(work, []))
                    open_sides.remove(i)
                except ssl.SSLWantReadError:
                    pass
                for source, sink in ((b, c), (d, a)):
                    if source.pending:
                        sink.write(source.read())
            if not open_sides:
                break
        assert not open_sides, "the handshake does not end"
    return sides[0].getpeercert(binary_form=True)


@pytest.fixture(scope="module")
def server(authority, tmp_path_factory):
    key = ids.new_key()
    certificate = authority.server(key, ["localhost"], NOW)
    return Files(tmp_path_factory.mktemp("server"), "server", certificate, key, authority.certificate)


def client_files(folder, authority, name="north", now=NOW, trusted=None, key=None):
    key = key or ids.new_key()
    certificate = x509.load_der_x509_certificate(authority.client(ids.request_pem(key), name, now))
    return Files(folder, name, certificate, key, (trusted or authority).certificate)


def test_a_client_of_the_federation_is_verified(server, authority, tmp_path):
    client = client_files(tmp_path, authority)
    assert ids.peer_of(handshake(server.server(), client.client())).sans == (ids.san_of("hospitals", "north"),)


def test_without_a_certificate_the_peer_is_empty(server):
    assert handshake(server.server(), ids.client_context(None, None, server.authority)) is None


def test_wrong_certificates_end_the_handshake(server, authority, tmp_path):
    other = Authority.new("hospitals", NOW)
    wrong = {
        "has expired": client_files(tmp_path, authority, "a", NOW - timedelta(days=31)),
        "not yet valid": client_files(tmp_path, authority, "b", NOW + timedelta(days=1)),
        "(certificate signature failure|unable to get local issuer)": client_files(
            tmp_path, other, "c", trusted=authority
        ),
        "unsuitable certificate purpose": server,  # made for servers
    }
    for reason, client in wrong.items():
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            handshake(server.server(), client.client())


def test_a_weak_or_self_signed_certificate_ends_the_handshake(server, authority, tmp_path):
    weak = rsa.generate_private_key(65537, 1024)
    builder = (
        ids._dated(NOW, ids.CLIENT_LIFE)
        .subject_name(ids._subject("north"))
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    files = Files(tmp_path, "weak", builder.public_key(weak.public_key()).sign(authority.key, hashes.SHA256()), weak,
                  authority.certificate)  # fmt: skip
    with pytest.raises(ssl.SSLError):
        handshake(server.server(), files.client())
    key = ids.new_key()
    own = builder.public_key(key.public_key()).sign(key, hashes.SHA256())
    with pytest.raises(ssl.SSLError):
        handshake(server.server(), Files(tmp_path, "own", own, key, authority.certificate).client())


def test_a_client_refuses_another_server_and_another_name(server, authority, tmp_path):
    client = client_files(tmp_path, authority)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"other\.example"):
        handshake(server.server(), client.client(), "other.example")
    other = Authority.new("hospitals", NOW)
    key = ids.new_key()
    foreign = Files(tmp_path, "foreign", other.server(key, ["localhost"], NOW), key, authority.certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(foreign.server(), client.client())
    # A client of the federation cannot act as its server.
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client_files(tmp_path, authority, "south").server(), client.client())


def test_older_tls_is_refused(server, authority, tmp_path):
    old = client_files(tmp_path, authority).client()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(server.server(), old)


def test_certificates_of_an_existing_authority_work(tmp_path):
    foreign = trustme.CA()
    foreign.cert_pem.write_to_path(tmp_path / "ca")
    for name, cert in (("server", foreign.issue_cert("localhost")), ("site", foreign.issue_cert("site.example"))):
        cert.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        (tmp_path / f"{name}.key").chmod(0o600)
        (tmp_path / f"{name}.crt").write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    server = ids.server_context(tmp_path / "server.crt", tmp_path / "server.key", tmp_path / "ca")
    client = ids.client_context(tmp_path / "site.crt", tmp_path / "site.key", tmp_path / "ca")
    assert "DNS:site.example" in ids.peer_of(handshake(server, client)).sans


def test_garbage_is_no_certificate():
    for wrong in (b"", b"\x30\x03\x02\x01\x01", b"\xff" * 50):
        with pytest.raises(UsageError):
            ids.peer_of(wrong)
