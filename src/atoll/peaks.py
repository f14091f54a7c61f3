"""The largest numbers of a tensor's blocks, which who writes it knows: told with it, nobody has to look for them again.

They hold for the numbers as they were written. Any other tensor that is made of them has none, and where a number is
changed in place, which a tensor counts, they are forgotten.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

BLOCK = 4096  # numbers of a row side by side


def blocks(d: int) -> int:
    """How many blocks d numbers are."""
    return -(-d // BLOCK)


def tell(rows: Tensor, peaks: Tensor) -> None:
    """Tell the largest |x| of each block of rows `[K, d]`: `[K, blocks(d)]`, of their dtype; of NaN it is NaN."""
    held: Any = rows
    held.peaks = (rows._version, peaks)


def told(rows: Tensor) -> Tensor | None:
    """What was told of these rows, as long as they are as they were.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -3.0]])
        >>> tell(rows, torch.tensor([[3.0]]))
        >>> told(rows), told(rows * 2), told(rows.mul_(2))
        (tensor([[3.]]), None, None)
    """
    version, peaks = getattr(rows, "peaks", (None, None))
    return peaks if version == rows._version else None
