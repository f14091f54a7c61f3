"""Facts that the producer of a tensor already knows, cached on the tensor so that consumers need not recompute them.

A fact holds for the numbers that the tensor had when it was cached. Torch counts in-place changes of a tensor; a fact
from before the last change is ignored. A tensor computed from another one has no facts.

    peaks   of rows [K, d]: the largest |x| of each block of `BLOCK` numbers, [K, blocks(d)], in their dtype, NaN if any
    norm    √Σx², []

Tests: tests/identities/test_exact.py, tests/identities/test_numerics.py
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

BLOCK = 4096  # adjacent numbers of a row

Fact = Literal["peaks", "norm"]


def blocks(d: int) -> int:
    """The number of blocks of a row of d numbers.

    Example:
        >>> blocks(4096), blocks(4097)
        (1, 2)
    """
    return -(-d // BLOCK)


def attach(x: Tensor, fact: Fact, value: Tensor) -> None:
    """Cache a fact about the numbers that the tensor has now.

    Args:
        x: the tensor.
        fact: the name of the fact.
        value: the fact; see the module for shape and dtype.
    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 4.0])
        >>> attach(x, "norm", torch.tensor(5.0))
        >>> lookup(x, "norm")
        tensor(5.)
    """
    holder: Any = x
    holder.known = {**_of(x), fact: (x._version, value)}


def lookup(x: Tensor, fact: Fact) -> Tensor | None:
    """A cached fact, or None if there is none or the numbers have changed since.

    Args:
        x: the tensor.
        fact: the name of the fact.
    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -3.0]])
        >>> attach(rows, "peaks", torch.tensor([[3.0]]))
        >>> lookup(rows, "peaks"), lookup(rows * 2, "peaks"), lookup(rows.mul_(2), "peaks")
        (tensor([[3.]]), None, None)
    """
    version, value = _of(x).get(fact, (None, None))
    return value if version == x._version else None


def drop(x: Tensor) -> None:
    """Drop all facts of a tensor.

    It is required after foreign code had access to the tensor: torch does not count writes through NumPy.

    Args:
        x: the tensor.
    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -3.0]])
        >>> attach(rows, "peaks", torch.tensor([[3.0]]))
        >>> drop(rows)
        >>> lookup(rows, "peaks")
    """
    holder: Any = x
    holder.known = {}


def norm(x: Tensor) -> Tensor:
    """√Σx²: the cached value, or computed now.

    Args:
        x: any shape.
    Returns:
        A tensor `[]` of the dtype of x.
    Example:
        >>> import torch
        >>> norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    value = lookup(x, "norm")
    return torch.linalg.vector_norm(x) if value is None else value


def _of(x: Tensor) -> dict[Fact, tuple[int, Tensor]]:
    return getattr(x, "known", {})
