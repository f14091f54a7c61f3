"""Few digits that stand for all bits of a model."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from torch import Tensor

from atoll.rng import Key

BLOCK = 2048  # words that are added up together


@lru_cache
def _factors() -> npt.NDArray[np.uint64]:
    return Key(0).fold("fingerprint").hash(BLOCK).numpy().view(np.uint64) | np.uint64(1)


def fingerprint(theta: Tensor) -> str:
    """The same for the same bits; for others, other digits.

    Of θ's 32-bit words w, block by block of 2,048: SHA-256(length, s₀, s₁, …),  s = Σᵢ kᵢ wᵢ mod 2⁶⁴,  kᵢ fixed, odd

    A round is over sooner than SHA-256 has read a large model: the sums take a quarter of its time. Two models that
    differ in one word of a block have other sums, since an odd k has an inverse; others have the same by a chance of
    2⁻³² at most, were k drawn at random. No proof against who looks for two models that have them.

    Args:
        theta: of numbers of four or eight bytes, any shape, which does not enter.
    Returns:
        12 hex digits.
    Example:
        >>> import torch
        >>> zeros = torch.zeros(5000)
        >>> fingerprint(zeros), fingerprint(zeros) == fingerprint(-zeros)
        ('94c7c132348a', False)

    Reference: Lemire, Kaser, Strongly Universal String Hashing is Fast, 2014.
    """
    words = theta.detach().cpu().contiguous().view(-1).numpy().view("<u4")
    whole = len(words) // BLOCK * BLOCK
    told = sha256(len(words).to_bytes(8, "little"))
    for block in (words[:whole].reshape(-1, BLOCK), words[None, whole:]):
        factors = _factors()[: block.shape[1]]
        told.update(np.einsum("bi,i->b", block, factors, dtype=np.uint64, casting="unsafe").astype("<u8").data)
    return told.hexdigest()[:12]
