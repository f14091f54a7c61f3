"""The rows of K clients side by side, and gradients over them: what local parts are written on.

A client's rows are addressed by position, 0 … n−1, in its own order. A batch of K clients is padded to one width, which
depends on each client's own size alone, so that neither neighbours nor their number can change a client's bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from atoll.data.clients import Clients
from atoll.rng import Key
from atoll.task import Batch, Gradient, Model, Task

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
    """

    clients: Clients
    ids: Tensor
    sizes: tuple[int, ...]
    dtype: torch.dtype

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
        x, y = self.clients.take(self.clients.order[starts + torch.minimum(positions, lasts)])
        x = x.to(self.dtype) if x.is_floating_point() else x
        y = y.to(self.dtype) if y.is_floating_point() else y
        return Batch(x, y, counts)

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
