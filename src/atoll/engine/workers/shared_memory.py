"""Arrays in memory that two processes map, and tensors as lists of arrays.

Tests: tests/parity/test_processes.py
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64  # bytes; a tensor starts at a multiple


Place = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, first byte


Arrays = list[np.ndarray[Any, Any]]


class SharedBlock:
    """A file with tensors that several processes map into memory.

    Args:
        path: the file.
        size: bytes of a new file, ≥ 0; None: the file exists.
    Raises:
        OSError: the file system is full.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = str(path)
        if size is not None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(
                    handle, 0, max(size, _ALIGN)
                )  # a sparse file on a full disk would kill the process at the write
            except OSError:
                os.unlink(self.path)
                raise
            finally:
                os.close(handle)
        self.size = os.stat(self.path).st_size
        self._bytes = torch.from_file(self.path, shared=True, size=self.size, dtype=torch.uint8)

    def write(self, tensors: Mapping[str, Tensor]) -> list[Place]:
        """Copy tensors into the block.

        Returns:
            The place of each tensor: name, dtype, shape, first byte.
        """
        places = list(_places(tensors))
        for (_, _, _, start), t in zip(places, tensors.values(), strict=True):
            if t.numel():
                self._bytes[start : start + t.numel() * t.element_size()].view(t.dtype).copy_(t.reshape(-1))
        return places

    def read(self, places: Iterable[Place]) -> dict[str, Tensor]:
        """The tensors at these places, as views of the shared memory."""
        out = {}
        for name, dtype, shape, start in places:
            kind: torch.dtype = getattr(torch, dtype)
            end = start + math.prod(shape) * kind.itemsize
            out[name] = self._bytes[start:end].view(kind).view(tuple(shape))
        return out


def _places(tensors: Mapping[str, Tensor]) -> Iterator[Place]:
    start = 0
    for name, t in tensors.items():
        yield name, str(t.dtype).removeprefix("torch."), tuple(t.shape), start
        start += -(-t.numel() * t.element_size() // _ALIGN) * _ALIGN


def block_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a block for these tensors, each aligned to 64 bytes."""
    return sum(-(-t.numel() * t.element_size() // _ALIGN) * _ALIGN for t in tensors.values())


def to_buffers(tensors: Mapping[str, Tensor]) -> tuple[list[Place], Arrays]:
    """Convert tensors to arrays of bytes.

    Returns:
        The place of each tensor: name, dtype, shape, index of its array; and the arrays, uint8.
    Example:
        >>> places, arrays = to_buffers({"a": torch.ones(2, 3), "b": torch.tensor(7)})
        >>> [(name, shape, len(arrays[k])) for name, _, shape, k in places]
        [('a', (2, 3), 24), ('b', (), 8)]
        >>> int(from_buffers(places, arrays)["b"])
        7
    """
    places: list[Place] = []
    arrays: Arrays = []
    for name, t in tensors.items():
        places.append((name, str(t.dtype).removeprefix("torch."), tuple(t.shape), len(arrays)))
        arrays.append(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return places, arrays


def from_buffers(places: Sequence[Place], arrays: Arrays) -> dict[str, Tensor]:
    """The inverse of `to_buffers`: tensors as views of the arrays. The caller must not write to them."""
    out = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        for name, dtype, shape, k in places:
            flat = torch.from_numpy(arrays[k])
            if flat.data_ptr() % _ALIGN or not len(flat):
                flat = flat.clone(memory_format=torch.contiguous_format)
            out[name] = flat.view(getattr(torch, dtype)).view(tuple(shape))
    return out


class SharedBlocks:
    """Blocks in a folder of shared memory, or on disk if shared memory is full.

    Args:
        folders: folders in order of preference; a block is made in the first one with enough space.
        name: the prefix of the file names.
    """

    def __init__(self, folders: tuple[str, ...], name: str) -> None:
        self._folders, self._name, self._made = folders, name, 0

    def block(self, size: int) -> SharedBlock:
        """Make a new block.

        Raises:
            OSError: all folders are full.
        """
        self._made += 1
        *some, last = (Path(folder) / f"{self._name}-{self._made}" for folder in self._folders)
        for path in some:
            try:
                return SharedBlock(path, size)
            except OSError:  # full: use the next folder
                continue
        return SharedBlock(last, size)

    def reuse_or_grow(self, block: SharedBlock | None, tensors: Mapping[str, Tensor]) -> SharedBlock:
        """Return the same block if the tensors fit into it. Otherwise remove its file and return a larger block."""
        need = block_bytes(tensors)
        if block is not None and block.size >= need:
            return block
        if block is not None:
            os.unlink(block.path)
        return self.block(need + need // 4)

    def remove(self) -> None:
        """Remove the files. A process that has mapped a file can still read it."""
        for folder in self._folders:
            for path in Path(folder).glob(f"{self._name}-*"):
                path.unlink(missing_ok=True)

    def path(self) -> Path:
        """A path for a new file on disk."""
        self._made += 1
        return Path(self._folders[-1]) / f"{self._name}-{self._made}"


def remove_folders(folders: Iterable[str]) -> None:
    """Remove folders of blocks. A process that has mapped a file can still read it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
