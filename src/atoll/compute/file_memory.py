"""Memory in a file without a name, for tensors that are larger than the memory that they should take.

The system frees the file with the last tensor, or with the process, however it ends. The folder is that of `tempfile`,
which the variable TMPDIR sets.

Tests: tests/identities/test_robust.py
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from atoll.base.errors import RunError
from atoll.base.lines import Line


def in_file(shape: tuple[int, ...], dtype: torch.dtype, rows: Sequence[Tensor] = ()) -> tuple[Tensor, mmap.mmap]:
    """A tensor on the CPU whose memory is a file, and the pages of the file.

    Args:
        shape: the shape, with at least one number.
        dtype: the dtype.
        rows: the content, tensors on the CPU one after another. They are written without the pages of the process,
            which takes a third of the time of a copy into them. Without rows the tensor has zeros.
    Raises:
        RunError: the disk has too little space. On Linux the space is reserved here, so later writes cannot fail.
    Example:
        >>> x, pages = in_file((2, 3), torch.float32)
        >>> x[1] = 5
        >>> leave_memory([pages])
        >>> float(x.sum())
        15.0
    """
    size = prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
            for some in rows:
                file.write(some.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        folder = tempfile.gettempdir()
        raise RunError(
            f"{size / 1e9:.2g} GB for the updates of a round in {folder}: {error.strerror}.",
            f"that space on the disk of {folder}, which has {shutil.disk_usage(folder).free / 1e9:.2g} GB free.",
            "the rule needs the update of each client, and they exceed the memory for it.",
            Line(shell="export TMPDIR=/folder/on/a/larger/disk"),
        ) from error
    return torch.frombuffer(pages, dtype=dtype).view(shape), pages


def leave_memory(files: Iterable[mmap.mmap]) -> None:
    """Remove the pages of files from the memory of the process. Their numbers remain in the files."""
    for pages in files:
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
