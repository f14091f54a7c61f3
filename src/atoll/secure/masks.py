"""Masks: the keystreams of AES-256 in counter mode, added to a vector of ring words.

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_BLOCK = 1 << 18  # bytes of a block: the words, the zeros and one keystream stay in the second-level cache


def masked(
    words: NDArray[np.unsignedinteger], keys: Sequence[bytes], signs: Sequence[int]
) -> NDArray[np.unsignedinteger]:
    """Add the keystreams of the keys to a vector: y_j = x_j + Σ_i sign_i PRG(key_i)_j mod 2^32 or 2^64.

    Args:
        words: `uint32` or `uint64`, shape `(m,)`. It is not changed.
        keys: keys of 32 bytes, each used for this one vector only.
        signs: +1 or -1 for each key.
    Returns:
        A new vector of the same dtype and shape.
    Example:
        >>> x = np.arange(4, dtype=np.uint32)
        >>> masked(masked(x, [bytes(32)], [1]), [bytes(32)], [-1])
        array([0, 1, 2, 3], dtype=uint32)
    """
    if words.dtype not in (np.uint32, np.uint64) or words.ndim != 1:
        raise ValueError("Words of a ring are uint32 or uint64, in one axis.")
    if len(keys) != len(signs) or any(sign not in (1, -1) for sign in signs):
        raise ValueError("One sign, +1 or -1, for each key.")
    result = words.astype(words.dtype.newbyteorder("<"), copy=True)
    # The IV is 0: each key has exactly one stream. The order of the sum does not matter in a ring.
    counter = modes.CTR(bytes(16))
    streams = [Cipher(algorithms.AES256(bytes(key)), counter).encryptor() for key in keys]
    step = _BLOCK // result.itemsize
    zeros, block = bytes(_BLOCK), np.empty(step, dtype=result.dtype)
    for first in range(0, len(result), step):
        part = result[first : first + step]
        length = part.nbytes
        out, mask, blank = block.data.cast("B")[:length], block[: len(part)], memoryview(zeros)[:length]
        for stream, sign in zip(streams, signs, strict=True):
            stream.update_into(blank, out)
            if sign > 0:
                np.add(part, mask, out=part)
            else:
                np.subtract(part, mask, out=part)
    return result
