"""Large tensors in memory that is lent again once nobody refers to it.

What is freed goes back to the system, and what is new the system clears page by page when it is first written to: for a
tensor of some megabytes that can take longer than the work on it. While an engine works, memory comes from its shelf.
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

_LARGE = 1 << 20  # bytes from which on memory is kept
_MOST = 32  # pieces
_ROOM = 2  # times as large as what is asked for, at most


def _references(pieces: list[npt.NDArray[np.uint8]], i: int) -> int:
    return sys.getrefcount(pieces[i])


_NOBODY = _references([np.empty(1, np.uint8)], 0)  # to a piece that is not lent; counted, since Pythons differ

_SHELF: ContextVar[Shelf | None] = ContextVar("where large tensors get their memory", default=None)


class Shelf:
    """Pieces of memory, each lent to one tensor and its views at a time."""

    def __init__(self) -> None:
        # glibc gives back what is freed at the end of the heap, and keeps twice the largest piece that was ever freed,
        # of at most 32 MB. This one is never written to; after it what torch frees in a pass is there for the next.
        np.empty((32 << 20) - 8192, np.uint8)
        self._pieces: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def empty(self, size: int) -> Tensor:
        """So many bytes, as they are.

        Example:
            >>> shelf = Shelf()
            >>> once = shelf.empty(1 << 20)
            >>> where = once.data_ptr()
            >>> del once
            >>> shelf.empty(1 << 20).data_ptr() == where
            True
        """
        with self._lock:
            for i, length in enumerate([piece.nbytes for piece in self._pieces]):
                if size <= length <= _ROOM * size and _references(self._pieces, i) == _NOBODY:
                    return torch.from_numpy(self._pieces[i])[:size]
            self._pieces = [*self._pieces[1 - _MOST :], np.empty(size, np.uint8)]
            return torch.from_numpy(self._pieces[-1])


@contextmanager
def lent_from(shelf: Shelf) -> Iterator[None]:
    """Let large tensors take their memory from this shelf for a while."""
    before = _SHELF.set(shelf)
    try:
        yield
    finally:
        _SHELF.reset(before)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, in memory from the shelf where there is one and the tensor is large."""
    dtype, shelf = dtype or like.dtype, _SHELF.get()
    size = prod(shape) * dtype.itemsize
    if shelf is None or size < _LARGE or not like.is_cpu:
        return like.new_empty(shape, dtype=dtype)
    return shelf.empty(size).view(dtype).view(shape)
