"""Elementwise operations whose bits depend on where in a tensor a number lies.

A kernel works through a tensor by vectors of up to 64 numbers, and through what is left one by one. For some functions
(sigmoid, SiLU, ELU, softplus) the two round differently, in 4 to 15 of 100 numbers. In lanes a client's numbers lie
behind those of its neighbours: whether they are in a vector or left over then depends on who is computed beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.rng import Key

VECTOR = 64
_TRIED = 7 * 146  # numbers, in pieces of 7: nothing in them but what is left over


class Elementwise(TorchDispatchMode):
    """Tries every elementwise operation of a pass at other places; what differs is in `restless`.

    An operation that gives a multiple of `VECTOR` numbers for each row is left out: no row begins inside a vector.

    Args:
        rows: rows in the pass.
    Example:
        >>> with Elementwise(rows=3) as watch:
        ...     _ = torch.sigmoid(torch.linspace(-3, 3, 15)).exp()
        >>> sorted(watch.restless)
        ['sigmoid']
    """

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.restless: set[str] = set()
        self._tried: set[Any] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own question to a mode: to keep the compiler away from it, it would import all of the compiler.

        That takes longer than anything else before the first round, and nothing is compiled here.
        """
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags
        floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
        if plain and floats and func not in self._tried:
            # numpy's: torch's own imports what it computes symbolic shapes with, which takes half a second.
            size = math.prod(np.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor))))
            if size % (VECTOR * self.rows):
                self._tried.add(func)
                if not _same_anywhere(func, args, kwargs):
                    self.restless.add(func.name().removeprefix("aten::").partition(".")[0])
        return func(*args, **kwargs)


def _same_anywhere(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation gives the same bits for many numbers at once as for a few at a time."""
    tensors = torch.broadcast_tensors(*(a for a in args if isinstance(a, Tensor)))
    columns = iter([_spread(t, i) for i, t in enumerate(tensors)])
    wide = [next(columns) if isinstance(a, Tensor) else a for a in args]

    def over(start: int, end: int) -> Tensor:
        fresh = {n: a.new_empty(0) if isinstance(a, Tensor) else a for n, a in kwargs.items()}  # what goes to `out`
        part: Tensor = func(*(a[start:end].clone() if isinstance(a, Tensor) else a for a in wide), **fresh)
        return part.nan_to_num()

    try:
        whole = over(0, _TRIED)
        pieces = torch.cat([over(start, start + 7) for start in range(0, _TRIED, 7)])
    except (RuntimeError, TypeError, AttributeError):
        return True  # no function of numbers alone; the comparison of whole lanes has to do
    return torch.equal(whole, pieces)


def _spread(t: Tensor, i: int) -> Tensor:
    """Numbers like those of t, as many as are tried: its own, each times something between 1 and 2."""
    flat = t.detach().reshape(-1)[torch.arange(_TRIED, device=t.device) % t.numel()]
    if not flat.is_floating_point():
        return flat
    return flat * (1 + Key(0).fold("spread", i).uniform(_TRIED, torch.float32).to(flat))
