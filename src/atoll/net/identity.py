"""Identities of a federation: its certificate authority, tokens, certificates of servers and clients, and TLS contexts.

    authority    an ECDSA P-256 key and a certificate of ten years, in the home of the server
    token        `atoll1.` and one base64url text: addresses, the hash of the authority, names, a secret, the expiry
    enrolment    the client fetches the authority, compares its hash, and sends the secret with a certificate request
    certificate  30 days for a client, 90 for a server; renewed after two thirds of that

The identity of a peer is the subject alternative name of its certificate. The authority writes
`urn:atoll:FEDERATION:NAME` into it. With certificates of an existing authority, only a name that
`atoll invite NAME --san VALUE` recorded is admitted; `net.store` has the records. Key files have mode 0600. A private
key is never part of an error, a `repr` or a message.

Tests: tests/faults/test_identity.py
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import ipaddress
import os
import re
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Meta

from atoll.base.errors import RunError, UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Line, literal
from atoll.net.wire import Digest, Name

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=90)
CLIENT_LIFE = timedelta(days=30)
# A new certificate is valid a little earlier, since clocks of two machines differ.
CLOCK_SLACK = timedelta(minutes=5)
MAX_TOKEN = 300

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
_NAME = re.compile(r"[a-z0-9-]{1,64}")


def check_name(name: str, kind: str) -> str:
    """Return a valid name of a client or a federation.

    Raises:
        UsageError: the name does not match `^[a-z0-9-]{1,64}$`.
    Example:
        >>> check_name("north-1", "client")
        'north-1'
    """
    if _NAME.fullmatch(name):
        return name
    repaired = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:64]
    raise UsageError(
        f"The name of a {kind} is {name!r}.",
        "1 to 64 of the characters a-z, 0-9 and -.",
        "names become parts of files and certificates.",
        Line(python=literal(repaired), shell=repaired),
    )


# 1. Tokens


class _Fields(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    addresses: Annotated[
        tuple[Annotated[str, Meta(min_length=3, max_length=200)], ...], Meta(min_length=1, max_length=8)
    ]
    authority: Digest
    federation: Name
    name: Name
    secret: Digest
    expires: Annotated[int, Meta(ge=0, le=1 << 40)]


_TOKENS = msgspec.msgpack.Decoder(_Fields)
_PREFIX = "atoll1."
_CHECK = 4


@dataclass(frozen=True)
class Token:
    """An invitation for one client. It is valid once, until it expires.

    Args:
        addresses: `host:port` of the server, in the order in which a client tries them.
        authority: the SHA-256 of the authority's certificate, 32 bytes.
        federation: the name of the federation.
        name: the name of the client.
        secret: 32 random bytes.
        expires: Unix seconds.
    Example:
        >>> token = Token(("atoll.example:4433",), bytes(32), "hospitals", "north", bytes(32), 2_000_000_000)
        >>> Token.read(token.text()) == token, token.text()[:7], "secret" in repr(token)
        (True, 'atoll1.', False)
    """

    addresses: tuple[str, ...]
    authority: bytes
    federation: str
    name: str
    secret: bytes = field(repr=False)
    expires: int

    def text(self) -> str:
        """The token as text, at most 300 characters.

        Raises:
            UsageError: the names and addresses are too long.
        """
        text = self._written()
        if not self.is_short:
            raise UsageError(
                f"The token of {self.name!r} has {len(text)} characters.",
                f"at most {MAX_TOKEN} characters.",
                "longer texts are cut when they are pasted; names and addresses make it long.",
            )
        return text

    @property
    def is_short(self) -> bool:
        """Whether the text has at most 300 characters."""
        return len(self._written()) <= MAX_TOKEN

    def _written(self) -> str:
        values = (self.addresses, self.authority, self.federation, self.name, self.secret, self.expires)
        body = msgspec.msgpack.encode(values)
        return _PREFIX + base64.urlsafe_b64encode(body + sha256(body).digest()[:_CHECK]).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> Token:
        """Read a token.

        Raises:
            UsageError: the text is no token, or it is cut or changed.
        """
        text = text.strip()
        if not text.startswith(_PREFIX):
            raise UsageError("The token does not begin with atoll1.", "the text that `atoll invite NAME` prints.")
        try:
            encoded = text.removeprefix(_PREFIX)
            if len(text) > MAX_TOKEN or not re.fullmatch(r"[A-Za-z0-9_-]+", encoded):
                raise ValueError
            data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            body, check = data[:-_CHECK], data[-_CHECK:]
            if sha256(body).digest()[:_CHECK] != check:
                raise ValueError
            found = _TOKENS.decode(body)
        except (ValueError, binascii.Error, msgspec.MsgspecError):
            raise UsageError(
                f"The token of {len(text)} characters is cut or changed.",
                "the whole text that `atoll invite NAME` prints.",
                "its check sum does not match.",
            ) from None
        return cls(found.addresses, found.authority, found.federation, found.name, found.secret, found.expires)


def new_token(addresses: Sequence[str], authority: bytes, federation: str, name: str, expires: int) -> Token:
    """An invitation with a new secret.

    Raises:
        UsageError: a name is not valid, or an address cannot be dialled.
    """
    check_name(name, "client")
    return Token(tuple(map(check_address, addresses)), authority, federation, name, secrets.token_bytes(32), expires)


def check_address(address: str) -> str:
    """Return an address that another machine can dial, as `host:port`; an IPv6 host stands in brackets.

    Raises:
        UsageError: the port is missing, or the host is the wildcard of a listening socket.
    Example:
        >>> check_address("[::1]:4433")
        '[::1]:4433'
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise UsageError(
            f"The address is {address!r}.", "HOST:PORT.", "sites dial this address.", "server.example.org:4433"
        )
    if host in ("0.0.0.0", "[::]", "*"):
        raise UsageError(
            f"The address is {address!r}.",
            "a host name or an address that sites can dial.",
            f"{host} means every address of this machine; other machines cannot dial it.",
            Line(shell=f"--address server.example.org:{port}"),
        )
    return address


PLAIN = "http://"  # before an address without TLS


def plain_address(address: str) -> str:
    """An address without TLS, for a server with --insecure.

    Raises:
        UsageError: it is not an address of the loopback interface.
    Example:
        >>> plain_address("127.0.0.1:4433")
        'http://127.0.0.1:4433'
    """
    host = address.removeprefix(PLAIN).rpartition(":")[0].strip("[]")
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    if not local:
        raise UsageError(
            f"--insecure with the address {address}.",
            "an address of the loopback interface.",
            "without TLS everyone on the way reads and changes the messages.",
            Line(shell="--listen 127.0.0.1:0"),
        )
    return PLAIN + address.removeprefix(PLAIN)


def url_of(address: str) -> str:
    """The address of a server as the start of a URL. Without TLS it is one of the loopback interface.

    Example:
        >>> url_of("server.example.org:4433")
        'https://server.example.org:4433'
    """
    return plain_address(address) if address.startswith(PLAIN) else f"https://{address}"


# 2. Keys and certificates


def new_key() -> PrivateKey:
    """A new ECDSA P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """A private key as PEM, for `write_key`."""
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def write_key(path: Path, key: PrivateKey) -> None:
    """Write a private key with mode 0600, in one step.

    Raises:
        OSError: the file could not be written; the old one is unchanged.
    """
    atomic_write(path, key_pem(key), mode=0o600)


def read_key(path: Path) -> PrivateKey:
    """Read a private key of this machine.

    Raises:
        UsageError: other users can read the file, or it contains no ECDSA key.
    """
    check_private(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"The file {path} contains no ECDSA key without a password.", "a key in PEM form.")
    return key


def own_identity(path: Path) -> ed25519.Ed25519PrivateKey:
    """The identity key of a site, which names it in a secure sum. If the file does not exist, a new key is written.

    Raises:
        UsageError: other users can read the file, or it contains no Ed25519 key.
    """
    if not path.exists():
        made = ed25519.Ed25519PrivateKey.generate()
        kind = serialization.PrivateFormat.PKCS8
        pem = made.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
        atomic_write(path, pem, mode=0o600)
    check_private(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"The file {path} contains no Ed25519 key without a password.", "a key in PEM form.")
    return key


def identity_bytes(text: str) -> bytes:
    """A public identity key from its 64 hexadecimal digits.

    Raises:
        ValueError: the text has another form.
    """
    found = bytes.fromhex(text)
    if len(found) != 32:
        raise ValueError("an identity key has 64 hexadecimal digits")
    return found


def _enrolment(federation: str, name: str, secret: bytes, request: bytes, key: bytes) -> bytes:
    """The text that an identity key signs at an enrolment."""
    parts = (federation.encode(), name.encode(), secret, request, key)
    return b"atoll/enrol/v1" + b"".join(sha256(part).digest() for part in parts)


def prove_identity(key: ed25519.Ed25519PrivateKey, federation: str, name: str, secret: bytes, request: bytes) -> bytes:
    """The proof, 64 bytes, that a client which enrols has the private key of its identity.

    Args:
        key: the identity key.
        federation, name: the federation, and the name of the client.
        secret: the `secret_hash` of the token.
        request: the certificate request, as PEM.
    """
    public = key.public_key().public_bytes_raw()
    return key.sign(_enrolment(federation, name, secret, request, public))


def check_identity(proof: bytes, key: bytes, federation: str, name: str, secret: bytes, request: bytes) -> None:
    """Refuse an identity key whose owner is not the client that enrols. The arguments are those of `prove_identity`.

    Raises:
        UsageError: the proof is not a signature of this key for this enrolment.
    """
    try:
        text = _enrolment(federation, name, secret, request, key)
        ed25519.Ed25519PublicKey.from_public_bytes(key).verify(proof, text)
    except (InvalidSignature, ValueError):
        raise UsageError(
            f"The identity key of {name!r} has not signed its enrolment.",
            "the signature of the identity key that is sent.",
            "a client could else name the key of another one.",
        ) from None


def check_private(path: Path) -> None:
    """Refuse a key file that other users of this machine can read or write.

    Raises:
        UsageError: the mode of the file is not 0600 or less.
    """
    mode = os.stat(path).st_mode & 0o777
    if mode & 0o077:
        raise UsageError(
            f"The key {path} has mode {mode:04o}.",
            "mode 0600.",
            "other users of this machine can read the key.",
            f"chmod 600 {path}",
        )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_hash(certificate: x509.Certificate) -> bytes:
    """The SHA-256 of a certificate, 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def san_of(federation: str, name: str) -> str:
    """The subject alternative name of a client of atoll's own authority.

    Example:
        >>> san_of("hospitals", "north")
        'URI:urn:atoll:hospitals:north'
    """
    return f"URI:urn:atoll:{federation}:{name}"


@dataclass(frozen=True)
class Peer:
    """The facts of a verified certificate.

    Args:
        sans: its subject alternative names, as `URI:…`, `DNS:…`, `IP:…`, `EMAIL:…`.
        serial: its serial number, in hexadecimal digits.
        fingerprint: its SHA-256.
        expires: Unix seconds.
    """

    sans: tuple[str, ...]
    serial: str
    fingerprint: bytes
    expires: int


_SAN_KINDS = (
    (x509.UniformResourceIdentifier, "URI"),
    (x509.DNSName, "DNS"),
    (x509.IPAddress, "IP"),
    (x509.RFC822Name, "EMAIL"),
)


@lru_cache(4096)
def peer_of(der: bytes) -> Peer:
    """The facts of a peer's certificate, which TLS has verified. Each request asks for them.

    Raises:
        UsageError: the certificate cannot be read.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        sans = tuple(f"{label}:{n.value}" for n in names for kind, label in _SAN_KINDS if isinstance(n, kind))
    except x509.ExtensionNotFound:
        sans = ()
    except (ValueError, x509.DuplicateExtension):
        raise UsageError("The certificate of the peer cannot be read.", "an X.509 certificate.") from None
    expires = int(certificate.not_valid_after_utc.timestamp())
    return Peer(sans, f"{certificate.serial_number:x}", certificate_hash(certificate), expires)


def request_pem(key: PrivateKey) -> bytes:
    """A certificate request for a key, as PEM. It contains no name: the token or the channel decides the name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class Authority:
    """The certificate authority of a federation.

    Args:
        federation: the name of the federation.
        certificate: its certificate.
        key: its private key.
    Example:
        >>> authority = Authority.new("hospitals", datetime.now().astimezone())
        >>> key = new_key()
        >>> peer_of(authority.client(request_pem(key), "north", datetime.now().astimezone())).sans
        ('URI:urn:atoll:hospitals:north',)
    """

    federation: str
    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)

    def has_issued(self, der: bytes, now: datetime) -> bool:
        """Whether the authority has signed this certificate, and it is valid now."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc

    @classmethod
    def new(cls, federation: str, now: datetime) -> Authority:
        """A new authority, valid for ten years.

        Raises:
            UsageError: the name is not valid.
        """
        check_name(federation, "federation")
        key = new_key()
        name = _subject(f"atoll {federation}"[:64])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _dated(now, AUTHORITY_LIFE)
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(federation, certificate, key)

    @property
    def fingerprint(self) -> bytes:
        """The SHA-256 of the certificate, which tokens contain."""
        return certificate_hash(self.certificate)

    def server(self, key: PrivateKey, hosts: Sequence[str], now: datetime) -> x509.Certificate:
        """A certificate of 90 days for a server.

        Args:
            key: the key of the server.
            hosts: the host names and addresses that clients dial.
            now: the time.
        """
        names = [_host(host) for host in hosts]
        return self._sign(key.public_key(), "server", names, ExtendedKeyUsageOID.SERVER_AUTH, now, SERVER_LIFE)

    def client(self, request: bytes, name: str, now: datetime) -> bytes:
        """A certificate of 30 days for a client, as DER.

        Args:
            request: the certificate request, as PEM. Only its key is used.
            name: the name of the client, which the token or the channel proves.
            now: the time.
        Raises:
            UsageError: the request is not valid, or its key is weak.
        """
        public = _requested_key(request)
        names = [x509.UniformResourceIdentifier(san_of(self.federation, name).removeprefix("URI:"))]
        certificate = self._sign(public, name, names, ExtendedKeyUsageOID.CLIENT_AUTH, now, CLIENT_LIFE)
        return certificate.public_bytes(serialization.Encoding.DER)

    def _sign(
        self,
        public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
        name: str,
        names: Sequence[x509.GeneralName],
        purpose: x509.ObjectIdentifier,
        now: datetime,
        life: timedelta,
    ) -> x509.Certificate:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            _dated(now, life)
            .subject_name(_subject(name))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self.key, hashes.SHA256())
        )


def _dated(now: datetime, life: timedelta) -> x509.CertificateBuilder:
    # The lifetime counts from now, so that a renewal never loses the slack.
    begin, end = now - CLOCK_SLACK, now + life
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin.replace(microsecond=0))
        .not_valid_after(end.replace(microsecond=0))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii") if host else "")
    except (ValueError, UnicodeError):
        raise UsageError(f"The host name is {host!r}.", "a host name or an IP address.") from None


def _usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _requested_key(request: bytes) -> ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey:
    try:
        found = x509.load_pem_x509_csr(request)
        public = found.public_key()
        valid = found.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, x509.InvalidVersion):
        raise UsageError("The certificate request cannot be read.", "a PKCS 10 request in PEM form.") from None
    strong = isinstance(public, ed25519.Ed25519PublicKey) or (
        isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, (ec.SECP256R1, ec.SECP384R1))
    )
    if not valid:
        raise UsageError("The certificate request is not signed by its own key.", "a request of the owner of the key.")
    if not isinstance(public, (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)) or not strong:
        raise UsageError("The certificate request has another kind of key.", "ECDSA P-256 or P-384, or Ed25519.")
    return public


# 3. Dates


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of the lifetime of a certificate have passed."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3


def check_dates(certificate: x509.Certificate, now: datetime, write: str = "") -> None:
    """Refuse a certificate that is not valid at this time, before a handshake fails without a reason.

    Args:
        certificate: the own certificate of a client or a server.
        now: the time of this machine, in UTC.
        write: the command that replaces the certificate; may be empty.
    Raises:
        UsageError: the certificate is not yet valid or has expired; the error has both times.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"This machine's clock is {now:%Y-%m-%d %H:%M:%S} UTC."
    if now < begin:
        raise UsageError(
            f"The certificate is valid from {begin:%Y-%m-%d %H:%M:%S} UTC. {clock}",
            "a clock that is right.",
            "a certificate that is not yet valid ends the handshake.",
            "timedatectl set-ntp true",
        )
    if now >= end:
        raise UsageError(
            f"The certificate expired at {end:%Y-%m-%d %H:%M:%S} UTC. {clock}",
            "a certificate that is valid now.",
            "an expired certificate ends the handshake.",
            write,
        )


def check_authority(pem: bytes, expected: bytes) -> x509.Certificate:
    """The certificate of the authority that a client has fetched, if it is the one of its token.

    Args:
        pem: the bytes that the server sent, not yet trusted.
        expected: the SHA-256 in the token.
    Raises:
        RunError: another certificate answers.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
    except ValueError:
        found = None
    if found is None or not hmac.compare_digest(certificate_hash(found), expected):
        raise RunError(
            "Another certificate answers at the address of the token.",
            "the authority of the federation that made the token.",
            "a proxy opens TLS, the address belongs to another server, or the federation was made again.",
        )
    return found


def secret_hash(secret: bytes) -> bytes:
    """The hash of the secret of a token, which the database stores; 32 bytes."""
    return sha256(b"atoll/token/v1" + secret).digest()


# 4. TLS


class Files(NamedTuple):
    """The files of an identity: its certificate with the chain, its key, and the authority of the other side."""

    certificate: str
    key: str
    authority: str

    @classmethod
    def read(cls, certificate: str | Path | None, key: str | Path | None, authority: str | Path | None) -> Files | None:
        """The files of `--cert`, `--key` and `--ca`; None without them.

        Raises:
            UsageError: one of them is missing or has another content, or the certificate is not valid now.
        """
        given = (certificate, key, authority)
        if all(file is None for file in given):
            return None
        if None in given:
            raise UsageError(
                "Some of --cert, --key and --ca.",
                "all three, or none.",
                "an identity of an institution has a certificate, its key, and the authority of the other side.",
                Line(shell="--cert site.pem --key site.key --ca ca.pem"),
            )
        it = cls(*(str(Path(str(file)).resolve()) for file in given))
        try:
            found = x509.load_pem_x509_certificate(Path(it.certificate).read_bytes())
            client_context(Path(it.certificate), Path(it.key), Path(it.authority))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The files {', '.join(it)} give no identity: {error}.",
                "PEM files of a certificate, of its key without a password, and of the authority.",
            ) from None
        check_dates(found, datetime.now(UTC))
        return it


def server_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """The TLS context of a server: TLS 1.3, and a certificate of the client that is verified if it is sent.

    The routes of enrolment need no certificate, so one port serves both. Every other route checks for a peer.

    Args:
        certificate, key: the files of the server.
        authority: the file with the authority of clients.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    # Without tickets each connection proves its key again.
    context.num_tickets = 0
    return _strict(context, certificate, key, authority)


def client_context(certificate: Path | None, key: Path | None, authority: Path) -> ssl.SSLContext:
    """The TLS context of a client, which trusts only this authority; without a certificate for the enrolment.

    Args:
        certificate, key: the files of the client; None before its enrolment.
        authority: the file with the authority of the server.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _strict(context, certificate, key, authority)


def _strict(context: ssl.SSLContext, certificate: Path | None, key: Path | None, authority: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    # Keys of at least 112 bits and no SHA-1, also where the system's default is weaker.
    context.set_ciphers("DEFAULT:@SECLEVEL=2")
    context.load_verify_locations(authority)
    if certificate is not None and key is not None:
        check_private(key)
        context.load_cert_chain(certificate, key)
    return context
