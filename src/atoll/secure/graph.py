"""The graph of the clients that share secrets: each client has k neighbours, drawn by a public seed.

Each client draws the graph itself, so a server cannot choose the neighbours of a client.

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms


def _words(seed: bytes) -> Iterator[int]:
    """The little-endian 32-bit words of the ChaCha20 keystream of a seed, with counter and nonce 0."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    while True:
        yield from struct.unpack("<1024I", stream.update(bytes(4096)))


def permutation(seed: bytes, n: int) -> list[int]:
    """A uniform permutation of 0 .. n - 1 (Fisher and Yates) from a seed of 32 bytes."""
    order, words = list(range(n)), _words(seed)
    for i in range(n - 1, 0, -1):
        limit = (1 << 32) // (i + 1) * (i + 1)
        word = next(word for word in words if word < limit)
        j = word % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def neighbours(seed: bytes, n: int, k: int) -> list[tuple[int, ...]]:
    """The neighbours of each client in the k-regular graph of a seed.

    Position p of a permutation is joined to the positions p ± 1 .. k/2 modulo n. If k = n - 1, the graph is complete
    and the seed does not matter.

    Args:
        seed: 32 bytes.
        n: number of clients, at least 2.
        k: number of neighbours; even and below n - 1, or equal to n - 1.
    Returns:
        For each client 0 .. n - 1 its neighbours in ascending order.
    """
    if k == n - 1:
        return [tuple(j for j in range(n) if j != i) for i in range(n)]
    order = permutation(seed, n)
    result: list[tuple[int, ...]] = [()] * n
    for position, client in enumerate(order):
        steps = range(1, k // 2 + 1)
        around = [order[(position + s) % n] for s in steps] + [order[(position - s) % n] for s in steps]
        result[client] = tuple(sorted(around))
    return result
