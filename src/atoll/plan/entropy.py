"""Random numbers of the operating system, for noise that is released and must not be predictable.

Keyed randomness (`atoll.base.random`) draws the same numbers again for a replay or after a crash. Noise that protects
data must not be drawn twice, so it comes from an `EntropySource` that no seed determines.

Tests: tests/identities/test_entropy.py
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.plan.protocols import EntropySource

_MOST = 1 << 62


@dataclass(frozen=True)
class BytesEntropy:
    """Random numbers from a source of random bytes.

    A normal number is √(−2 ln u) cos(2πv) for independent uniform u in (0, 1] and v in [0, 1) of 53 bits each.

    Args:
        draw: `draw(n)` returns n random bytes.
    Example:
        >>> source = BytesEntropy(os.urandom)
        >>> source.normal((2, 3), torch.float32).shape
        torch.Size([2, 3])

    Reference: Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    """

    draw: Callable[[int], bytes]

    def _words(self, n: int) -> Tensor:
        """n independent uniform whole numbers in [0, 2⁶²), int64."""
        if not n:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(bytearray(self.draw(8 * n)), dtype=torch.int64) & (_MOST - 1)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Independent standard normal numbers, on the host."""
        words = (self._words(2 * prod(shape)) >> 9).to(torch.float64) * 2.0**-53
        u, v = words.chunk(2) if len(words) else (words, words)
        z = torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * math.pi * v)
        return z.reshape(tuple(shape)).to(dtype)

    def integers(self, shape: Sequence[int], high: int) -> Tensor:
        """Independent uniform whole numbers in [0, high), int64, on the host.

        Raises:
            UsageError: high is not in 1 … 2⁶².
        """
        if not 1 <= high <= _MOST:
            raise UsageError(f"integers(high={high!r}).", "1 to 2^62.", "a draw has 62 bits.", "integers((3,), 10)")
        limit = _MOST // high * high  # words from here on would favour small numbers
        out = self._words(prod(shape))
        while bool((high_words := out >= limit).any()):
            out[high_words] = self._words(int(high_words.sum()))
        return (out % high).reshape(tuple(shape))


_SOURCE: ContextVar[EntropySource | None] = ContextVar("entropy source", default=None)


@contextlib.contextmanager
def entropy_source(source: EntropySource) -> Iterator[None]:
    """Replace the source of entropy within a `with` block, for tests."""
    token = _SOURCE.set(source)
    try:
        yield
    finally:
        _SOURCE.reset(token)


def current_entropy(agree: Callable[[bytes], bytes]) -> EntropySource:
    """The source of entropy of a round: the operating system, unless `entropy_source` has set another.

    Args:
        agree: returns, in every process of a training, the bytes of its first process.
    """
    return _SOURCE.get() or BytesEntropy(lambda n: agree(os.urandom(n)))
