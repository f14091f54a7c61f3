"""A short digest of all bits of a model.

Tests: tests/identities/test_digest.py
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from torch import Tensor

from atoll.base.random import Key

BLOCK = 2048  # 32-bit words in one sum


@lru_cache
def _factors() -> npt.NDArray[np.uint64]:
    return Key(0).fold("fingerprint").hash(BLOCK).numpy().view(np.uint64) | np.uint64(1)


def fingerprint(theta: Tensor) -> str:
    """A digest of the bits of θ, to compare models.

    SHA-256(length, s₀, s₁, …) with one sum for each block of 2,048 32-bit words w of θ:

        s = Σᵢ kᵢ wᵢ mod 2⁶⁴,   kᵢ fixed and odd

    SHA-256 of a large model takes longer than a round; the sums take a quarter of its time. If two models differ in one
    word of a block, the sums differ, because an odd k is invertible. For other differences and random k the sums are
    equal with probability at most 2⁻³². The digest does not resist an attacker: k is public.

    Args:
        theta: numbers of four or eight bytes, any shape; the shape is ignored.
    Returns:
        12 hexadecimal digits.
    Example:
        >>> import torch
        >>> zeros = torch.zeros(5000)
        >>> fingerprint(zeros), fingerprint(zeros) == fingerprint(-zeros)
        ('94c7c132348a', False)

    Reference: Lemire, Kaser, Strongly Universal String Hashing is Fast, 2014.
    """
    words = theta.detach().cpu().contiguous().view(-1).numpy().view("<u4")
    whole = len(words) // BLOCK * BLOCK
    digest = sha256(len(words).to_bytes(8, "little"))
    for block in (words[:whole].reshape(-1, BLOCK), words[None, whole:]):
        factors = _factors()[: block.shape[1]]
        digest.update(np.einsum("bi,i->b", block, factors, dtype=np.uint64, casting="unsafe").astype("<u8").data)
    return digest.hexdigest()[:12]
