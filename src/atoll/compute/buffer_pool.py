"""A pool of memory for large tensors, reused when no tensor refers to a piece any more.

The allocator returns freed memory to the system, and the system clears each new page on its first use. For a tensor of
some megabytes this can take longer than the work on it. During a training, large tensors therefore take their memory
from a pool.

Tests: tests/identities/test_shelf.py, tests/identities/test_exact.py
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atoll.compute import limits

_MOST = 32  # pieces in a pool
_ROOM = 2  # a piece serves a request of at least 1/_ROOM of its size


def _references(pieces: list[npt.NDArray[np.uint8]], i: int) -> int:
    return sys.getrefcount(pieces[i])


_UNUSED = _references(
    [np.empty(1, np.uint8)], 0
)  # references to an unused piece; measured, because it depends on the Python version

_POOL: ContextVar[BufferPool | None] = ContextVar("pool for large tensors", default=None)


class BufferPool:
    """Pieces of memory, each used by one tensor and its views at a time."""

    def __init__(self) -> None:
        # glibc returns free memory at the end of the heap to the system if it exceeds twice the largest piece freed so
        # far (at most 32 MB). Freeing this piece raises the limit, so memory that torch frees in one pass stays for the
        # next one. The piece is never written to, so it takes no pages.
        np.empty((32 << 20) - 8192, np.uint8)
        self._pieces: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def empty(self, size: int) -> Tensor:
        """A uint8 tensor of `size` bytes, not initialised.

        Args:
            size: bytes, at least 1.
        Returns:
            uint8 `[size]`. Its piece becomes free when the tensor and its views are gone.
        Example:
            >>> pool = BufferPool()
            >>> first = pool.empty(1 << 20)
            >>> address = first.data_ptr()
            >>> del first
            >>> pool.empty(1 << 20).data_ptr() == address
            True
        """
        with self._lock:
            for i, length in enumerate([piece.nbytes for piece in self._pieces]):
                if size <= length <= _ROOM * size and _references(self._pieces, i) == _UNUSED:
                    return torch.from_numpy(self._pieces[i])[:size]
            self._pieces = [*self._pieces[1 - _MOST :], np.empty(size, np.uint8)]
            return torch.from_numpy(self._pieces[-1])


@contextmanager
def use_pool(pool: BufferPool) -> Iterator[None]:
    """Let `empty` use this pool for large tensors inside the block.

    Args:
        pool: the pool.
    Example:
        >>> with use_pool(BufferPool()):
        ...     empty(torch.zeros(1), (2, 3)).shape
        torch.Size([2, 3])
    """
    before = _POOL.set(pool)
    try:
        yield
    finally:
        _POOL.reset(before)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, with memory from the pool if one is in use and the tensor is large.

    Args:
        like: its device and dtype are used; only CPU tensors use the pool.
        shape: of the result.
        dtype: of the result; None: that of `like`.
    Returns:
        A tensor of this shape, not initialised.
    Example:
        >>> empty(torch.zeros(1), (2, 3), torch.float64).dtype
        torch.float64
    """
    dtype, pool = dtype or like.dtype, _POOL.get()
    size = prod(shape) * dtype.itemsize
    if pool is None or size < limits.POOLED_BYTES or not like.is_cpu:
        return like.new_empty(shape, dtype=dtype)
    return pool.empty(size).view(dtype).view(shape)
