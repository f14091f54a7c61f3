"""The keys of one session: derivation, sharing, and the hybrid exchange.

    PRK = HMAC-SHA256(salt, input);   key = HKDF-Expand(PRK, info);   all numbers in `info` are big-endian

A mask key is the X25519 exchange of two mask keys, joined in hybrid mode with 32 bytes that ML-KEM-768 protects. So a
transcript does not open to a later quantum computer. The mask key follows from the shared seed `a`; the key of the
channels is independent of it, because `a` is revealed if the client drops out.

Papers: RFC 5869 (HKDF), RFC 7748 (X25519), FIPS 203 (ML-KEM).

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable
from hashlib import sha256
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from atoll.base.errors import UsageError

LABEL = b"atoll/secagg/v1/"
OfVector: TypeAlias = Callable[[str, int, int], bytes]  # (name, words, ring) -> key
_KEM_TEXT = 1088  # bytes of an ML-KEM-768 ciphertext


def hashed(*parts: bytes) -> bytes:
    """SHA-256 of the joined parts."""
    return sha256(b"".join(parts)).digest()


def extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract with SHA-256."""
    return hmac.digest(salt, secret, "sha256")


def expand(key: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-Expand with SHA-256: T(i) = HMAC(key, T(i - 1) ‖ info ‖ i).

    A server derives the keys of all pairs of lost clients, and the object of `cryptography` takes ten times as long.
    """
    block = out = b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([i]), "sha256")
        out += block
    return out[:length]


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """The X25519 exchange.

    Raises:
        ValueError: a key of wrong length or of low order, whose exchange is zero.
    """
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def kem_key(seed: bytes) -> MLKEM768PrivateKey:
    """The ML-KEM-768 key of a seed of 64 bytes.

    Raises:
        UsageError: the OpenSSL of `cryptography` has no ML-KEM.
    """
    try:
        return MLKEM768PrivateKey.from_seed_bytes(seed)
    except UnsupportedAlgorithm as error:
        raise UsageError(
            "Masks(hybrid=True) without ML-KEM-768.",
            "a version of cryptography with ML-KEM-768, as its wheels have since 50.",
            "without it a transcript opens to a later quantum computer.",
            "Masks(hybrid=False)",
        ) from error


def _vector(name: str, words: int, ring: int) -> bytes:
    encoded = name.encode()
    return struct.pack(">H", len(encoded)) + encoded + struct.pack(">QB", words, ring)


def pair_key(shared: bytes, low: int, high: int, name: str, words: int, ring: int) -> bytes:
    """The key of the mask that two clients add and subtract.

    Args:
        shared: `extract(sid, exchange)`, in hybrid mode `extract(sid, exchange ‖ r)`.
        low, high: the indices of the pair, low < high.
        name, words, ring: name and length of the vector, and 32 or 64 bits a word.
    """
    return expand(shared, LABEL + b"pair" + struct.pack(">II", low, high) + _vector(name, words, ring))


def self_key(sid: bytes, seed: bytes, index: int, name: str, words: int, ring: int) -> bytes:
    """The key of a client's own mask, from its seed b."""
    info = LABEL + b"self" + struct.pack(">II", index, index) + _vector(name, words, ring)
    return expand(extract(sid, seed), info)


def channel_key(sid: bytes, shared: bytes, sender: int, receiver: int) -> bytes:
    """The key of the boxes from one client to another, from the exchange of their channel keys."""
    return expand(extract(sid, shared), LABEL + b"chan" + struct.pack(">II", sender, receiver))


def wrap_key(sid: bytes, secret: bytes, low: int, high: int) -> bytes:
    """The key under which `low` wraps the pair's seed for `high`."""
    return expand(extract(sid, secret), b"wrap" + struct.pack(">II", low, high))


def commitment(context: bytes, fingerprint: bytes, seed: bytes) -> bytes:
    """The commitment to b that a client advertises; `context` is run ‖ round ‖ attempt."""
    return hashed(LABEL, b"bcommit", context, fingerprint, seed)


class MaskKeys:
    """What follows from the seed `a` of a client: its X25519 mask key and, in hybrid mode, its ML-KEM-768 mask key.

    The client makes it from its own seed, and the server from the rebuilt seed of a client that dropped out.
    """

    def __init__(self, seed: bytes, hybrid: bool) -> None:
        self._seed = seed
        root = extract(LABEL + b"seed", seed)
        self.exchange_key = X25519PrivateKey.from_private_bytes(expand(root, b"x25519"))
        self.public = self.exchange_key.public_key().public_bytes_raw()
        self.kem = kem_key(expand(root, b"mlkem768", 64)) if hybrid else None
        self.kem_public = self.kem.public_key().public_bytes_raw() if self.kem else b""

    def pair_seed(self, sid: bytes, high: int) -> bytes:
        """The 32 bytes r that this client, the lower of a pair, contributes in hybrid mode."""
        return expand(extract(sid, self._seed), b"pairseed" + struct.pack(">I", high))

    def __repr__(self) -> str:
        return "MaskKeys(...)"


def unwrap(wrap: bytes, keys: MaskKeys, sid: bytes, low: int, high: int) -> bytes:
    """The seed of a pair that `low` wrapped for `high`, whose mask keys are given.

    Raises:
        ValueError, InvalidTag: the wrap does not open.
    """
    if keys.kem is None:
        raise ValueError("Only the hybrid mode wraps a seed.")
    text, nonce, sealed = wrap[:_KEM_TEXT], wrap[_KEM_TEXT : _KEM_TEXT + 12], wrap[_KEM_TEXT + 12 :]
    key = wrap_key(sid, keys.kem.decapsulate(text), low, high)
    return ChaCha20Poly1305(key).decrypt(nonce, sealed, sid + b"wrap")


class Secrets:
    """The secrets of one client in one session. They stay in RAM and are never shown.

    Attributes:
        channel: the X25519 key of the channels, and `channel_kem` its ML-KEM-768 key in hybrid mode.
        a: seed of the mask keys; opened if the client drops out.
        b: seed of the self mask; opened if the client stays.
    """

    def __init__(self, hybrid: bool) -> None:
        self.channel = X25519PrivateKey.generate()
        self.channel_kem = kem_key(os.urandom(64)) if hybrid else None
        self.a, self.b = os.urandom(32), os.urandom(32)
        self.mask = MaskKeys(self.a, hybrid)

    def __repr__(self) -> str:
        return "Secrets(...)"
