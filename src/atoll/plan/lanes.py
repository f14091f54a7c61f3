"""The rows of K clients side by side, and gradients over them: what local parts are written on.

A client's rows are addressed by position, 0 … n−1, in its own order. A batch of K clients is padded to one width, which
depends on each client's own size alone, so that neither neighbours nor their number can change a client's bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from atoll.data.clients import Clients
from atoll.rng import Key
from atoll.task import Batch, Gradient, Model, Task

_AHEAD = 1 << 21  # numbers of rows that are read at once for several steps
ROWS = 1024  # the most rows of one client in one pass: bounds the memory of activations


def padded(rows: int) -> int:
    """The width of a full batch of `rows` rows: the next multiple of a sixteenth to an eighth of it.

    Few enough widths that clients of like sizes share one, and at most 1/8 of the work is padding.

    Example:
        >>> [padded(n) for n in (7, 17, 100, 1000)]
        [7, 18, 104, 1024]
    """
    grain = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // grain) * grain


@dataclass(frozen=True)
class Lanes:
    """K clients at work together, largest first.

    Args:
        clients: the federation they belong to.
        ids: int64 `[K]`.
        sizes: the rows each holds, falling.
        dtype: the type of the run, which float features and targets take.
        share: the part of its work that each had time for, in (0, 1].
    """

    clients: Clients
    ids: Tensor
    sizes: tuple[int, ...]
    dtype: torch.dtype
    share: float = 1.0

    @cached_property
    def rows(self) -> Tensor:
        """The rows each holds, int64 `[K]`."""
        return self.clients.sizes[self.ids]

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """Where each client's rows begin, and the last position among them, int64 `[K]`."""
        return self.clients.offsets[self.ids], self.rows - 1

    def take(self, positions: Tensor, counts: tuple[int, ...]) -> Batch:
        """The rows at these positions, int64 `[k, B]`, of the first k clients; a position past the end is padding."""
        starts, lasts = (column[: len(counts), None] for column in self._ends)
        return Batch(*self._read(starts + torch.minimum(positions, lasts)), counts)

    def _read(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The rows at these places of the list of all rows, in the type of the run."""
        x, y = self.clients.take(self.clients.order[places])
        x = x.to(self.dtype) if x.is_floating_point() else x
        return x, y.to(self.dtype) if y.is_floating_point() else y

    def batches(self, steps: Iterable[tuple[Tensor, tuple[int, ...]]]) -> Iterator[Batch]:
        """The batch of each step, from positions `[k, B]` and counts; the rows of several steps are read at once."""
        width, some = max(1, prod(self.clients.features)), []
        for step in steps:
            some.append(step)
            if sum(positions.numel() for positions, _ in some) * width >= _AHEAD:
                yield from self._together(some)
                some = []
        if some:
            yield from self._together(some)

    def _together(self, steps: list[tuple[Tensor, tuple[int, ...]]]) -> Iterator[Batch]:
        starts, lasts = self._ends
        places = [starts[: len(p), None] + torch.minimum(p, lasts[: len(p), None]) for p, _ in steps]
        sizes = [p.numel() for p in places]
        x, y = self._read(torch.cat([p.flatten() for p in places]))
        for p, xs, ys, (_, counts) in zip(places, x.split(sizes), y.split(sizes), steps, strict=True):
            yield Batch(xs.unflatten(0, p.shape), ys.unflatten(0, p.shape), counts)

    def gradient(self, task: Task, model: Model, positions: Tensor, counts: tuple[int, ...], key: Key) -> Gradient:
        """The mean gradient of each client's loss over the rows at these positions; at most `ROWS` of them in a pass.

        More rows go in sub-batches, as equal as can be (batch statistics want no short tail), whose gradients are
        averaged by the rows they hold.
        """
        wide = positions.shape[1]
        if wide <= ROWS:
            return task.gradient(model, self.take(positions, counts), key)
        # Without padding a lane is cut by its own rows alone; with it, by the width that its neighbours share.
        size = ROWS if task.batch_statistics else -(-wide // -(-wide // ROWS))
        rows = torch.tensor(counts, device=model.theta.device)
        own = (-(-rows // size)).clamp(min=1)
        span, whole = torch.arange(size, device=rows.device), None
        for part in range(int(own.max())):
            begin, end = (torch.minimum(rows * i // own, rows) for i in (part, part + 1))
            columns = (begin[:, None] + span).clamp(max=wide - 1)
            here = tuple((end - begin).tolist())
            got = task.gradient(model, self.take(positions.gather(1, columns), here), key.fold(part) if part else key)
            share = ((end - begin).to(got.grad.dtype) / rows)[:, None]
            if whole is None:
                whole = got._replace(grad=got.grad * share, loss=got.loss.clone())
            else:
                whole = Gradient(whole.grad + got.grad * share, got.buffers, got.counters, whole.loss + got.loss)
            model = model._replace(buffers=whole.buffers, counters=whole.counters)
        return whole  # type: ignore[return-value]
