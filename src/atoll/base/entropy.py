"""Secret random bytes: the secret of a round, and the streams that follow from a secret.

Keyed randomness (`atoll.base.random`) draws the same numbers again for a replay or after a crash. Noise that protects
data must not be predictable, so each round reads one secret of 32 bytes, and all secret numbers of the round follow
from it:

    key = HKDF-SHA256(secret, label),   stream = AES-256-CTR(key)

Tests: tests/identities/test_entropy.py
"""

from __future__ import annotations

import contextlib
import hmac
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

SECRET_BYTES = 32
_SALT = b"atoll/entropy/v1"


_ZEROS = bytes(1 << 16)


class Keystream:
    """The stream of a label, read piece by piece. Streams of different labels are independent.

    Args:
        secret: 32 bytes.
        label: the purpose of the stream.
    Example:
        >>> whole, pieces = Keystream(bytes(32), b"noise"), Keystream(bytes(32), b"noise")
        >>> whole.read(5) == pieces.read(2) + pieces.read(3)
        True

    Reference: RFC 5869; NIST SP 800-38A.
    """

    def __init__(self, secret: bytes, label: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        extracted = hmac.digest(_SALT, secret, "sha256")
        key = hmac.digest(extracted, label + b"\x01", "sha256")
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, out: memoryview) -> None:
        """Write the next bytes of the stream into a buffer of bytes."""
        for start in range(0, len(out), len(_ZEROS)):
            part = out[start : start + len(_ZEROS)]
            self._cipher.update_into(memoryview(_ZEROS)[: len(part)], part)

    def read(self, n: int) -> bytes:
        """The next n bytes; a stream has at most 2³⁶."""
        return self._cipher.update(bytes(n))


class SecretSource(Protocol):
    """A source of the secrets of rounds."""

    def round_secret(self, round: int) -> bytes:
        """The 32 secret bytes of a round."""
        ...


_SOURCE: ContextVar[SecretSource | None] = ContextVar("entropy source", default=None)


@contextlib.contextmanager
def entropy_source(source: SecretSource) -> Iterator[None]:
    """Replace the source of secrets within a `with` block: for tests, and for noise that follows the seed."""
    token = _SOURCE.set(source)
    try:
        yield
    finally:
        _SOURCE.reset(token)


def round_secret(round: int, agree: Callable[[bytes], bytes]) -> bytes:
    """The secret of a round: 32 bytes of the operating system, unless `entropy_source` has set another source.

    Args:
        round: the number of the round, from 0.
        agree: returns, in every process of a training, the bytes of its first process.
    """
    source = _SOURCE.get()
    return agree(os.urandom(SECRET_BYTES)) if source is None else source.round_secret(round)
