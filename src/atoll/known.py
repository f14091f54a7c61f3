"""What who writes a tensor knows of its numbers, told with it: nobody has to look for it again.

It holds for the numbers as they were written. A tensor that is made of them knows nothing, and where a number is
changed in place, which a tensor counts, what was told is forgotten.

    peaks   of rows [K, d] the largest |x| of each block of `BLOCK` numbers, [K, blocks(d)], of their dtype; NaN wins
    norm    √Σx², []
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

BLOCK = 4096  # numbers of a row side by side

What = Literal["peaks", "norm"]


def blocks(d: int) -> int:
    """How many blocks d numbers are."""
    return -(-d // BLOCK)


def tell(x: Tensor, what: What, value: Tensor) -> None:
    """Tell this of the numbers that the tensor has now."""
    held: Any = x
    held.known = {**_of(x), what: (x._version, value)}


def told(x: Tensor, what: What) -> Tensor | None:
    """What was told of these numbers, as long as they are as they were.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -3.0]])
        >>> tell(rows, "peaks", torch.tensor([[3.0]]))
        >>> told(rows, "peaks"), told(rows * 2, "peaks"), told(rows.mul_(2), "peaks")
        (tensor([[3.]]), None, None)
    """
    version, value = _of(x).get(what, (None, None))
    return value if version == x._version else None


def forget(x: Tensor) -> None:
    """Know nothing more of a tensor that was in the hands of who may write past torch, which counts no such change.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -3.0]])
        >>> tell(rows, "peaks", torch.tensor([[3.0]]))
        >>> forget(rows)
        >>> told(rows, "peaks")
    """
    held: Any = x
    held.known = {}


def norm(x: Tensor) -> Tensor:
    """√Σx², as it was told, or taken now.

    Example:
        >>> import torch
        >>> norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    value = told(x, "norm")
    return torch.linalg.vector_norm(x) if value is None else value


def _of(x: Tensor) -> dict[What, tuple[int, Tensor]]:
    return getattr(x, "known", {})
