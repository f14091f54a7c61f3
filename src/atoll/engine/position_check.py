"""Detection of elementwise operations whose bits depend on the position of a number in a tensor.

A kernel processes a tensor in vectors of up to 64 numbers, and the remainder one number at a time. For some functions
(sigmoid, SiLU, ELU, softplus) the two paths round differently, in 4 to 15 of 100 numbers. In lanes, the numbers of
several clients lie in one tensor. So the position of the remainder depends on the other clients of the chunk.

Tests: tests/conformance/test_bodies.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.base.random import Key

VECTOR = 64
# Numbers to try. A piece of 7 numbers has no full vector. With 4 differences in 100 numbers, a miss has chance 1e-5.
_TRIED = 7 * 42
# Selections, and operations that IEEE 754 rounds correctly: each kernel gives the same bits, so they are not tested.
EXACT = {"abs", "add", "clone", "div", "mul", "neg", "relu", "sqrt", "sub", "threshold_backward", "where"}
EXACT |= {"eq", "ge", "gt", "isnan", "le", "lt", "ne"}


class PositionCheck(TorchDispatchMode):
    """Test every elementwise operation of a pass at other positions. `position_dependent`: names of failing ones.

    An operation that is correctly rounded (`EXACT`) is not tested. An operation with a multiple of `VECTOR` results for
    each row is not tested, since no row starts inside a vector.

    Args:
        rows: the rows in the pass, ≥ 1.
    Example:
        >>> with PositionCheck(rows=3) as watch:
        ...     _ = torch.sigmoid(torch.linspace(-3, 3, 15)).exp()
        >>> sorted(watch.position_dependent)
        ['sigmoid']
    """

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.position_dependent: set[str] = set()
        self._tried: set[Any] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch must keep its compiler away from this mode.

        With True, torch imports the whole compiler. This is the slowest step before the first round, and atoll does not
        use torch's compiler here.
        """
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags
        floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
        if plain and floats and func not in self._tried and not _exact(func, args, kwargs):
            # NumPy's function: torch's one imports the modules for symbolic shapes, which takes half a second.
            size = math.prod(np.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor))))
            if size % (VECTOR * self.rows):
                self._tried.add(func)
                if not _same_anywhere(func, args, kwargs):
                    self.position_dependent.add(func.name().removeprefix("aten::").partition(".")[0])
        return func(*args, **kwargs)


def _exact(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether no kernel can round an operation differently; with `alpha` or a rounding mode it is two operations."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name not in EXACT or kwargs.keys() - {"out"} or (name in ("add", "sub") and len(args) > 2):
        return False
    kinds = {a.dtype for a in args if isinstance(a, Tensor)} - {torch.float32, torch.float64}
    return not any(kind.is_floating_point or kind.is_complex for kind in kinds)


def _same_anywhere(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation has the same bits on one long tensor and on pieces of 7 numbers."""
    tensors = torch.broadcast_tensors(*(a for a in args if isinstance(a, Tensor)))
    columns = iter([_spread(t, i) for i, t in enumerate(tensors)])
    wide = [next(columns) if isinstance(a, Tensor) else a for a in args]

    def over(start: int, end: int) -> Tensor:
        fresh = {n: a.new_empty(0) if isinstance(a, Tensor) else a for n, a in kwargs.items()}  # for `out=`
        part: Tensor = func(*(a[start:end].clone() if isinstance(a, Tensor) else a for a in wide), **fresh)
        return part.nan_to_num()

    try:
        whole = over(0, _TRIED)
        pieces = torch.cat([over(start, start + 7) for start in range(0, _TRIED, 7)])
    except (RuntimeError, TypeError, AttributeError):
        return True  # not a function of numbers only; the comparison of whole lanes covers it
    return torch.equal(whole, pieces)


def _spread(t: Tensor, i: int) -> Tensor:
    """`_TRIED` numbers similar to those of t: the numbers of t, repeated, each times a random factor in [1, 2)."""
    flat = t.detach().reshape(-1)[torch.arange(_TRIED, device=t.device) % t.numel()]
    if not flat.is_floating_point():
        return flat
    return flat * _factors(i).to(flat)


@cache
def _factors(i: int) -> Tensor:
    return 1 + Key(0).fold("spread", i).uniform(_TRIED, torch.float32)
