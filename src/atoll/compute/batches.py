"""The rows of K clients side by side, and gradients over them: what local parts are written on.

A client's rows are addressed by position, 0 … n−1, in its own order. A batch of K clients is padded to one width, which
depends on each client's own size alone, so that neither neighbours nor their number can change a client's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.compute.model_state import Batch, Gradient, Model, Stored
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.rows import in_memory, stored

HOST = torch.device("cpu")
OnStep = Callable[[int, int, float], None]  # lane, step from 0, mean loss of the lane's batch

_AHEAD = 1 << 19  # numbers of rows that are read at once for several steps
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
        dtype: the type of the run, which float features and targets take.
        share: the part of its work that each had time for, in (0, 1].
        device: where batches are computed on. Who is at work, on which of their rows, is decided on the host.
        on_step: receives lane, step and the mean loss of the lane's batch, after each step.
    """

    clients: Clients
    ids: Tensor
    dtype: torch.dtype
    share: float = 1.0
    device: torch.device = HOST
    on_step: OnStep | None = None

    def stepped(self, step: int, losses: Tensor, counts: tuple[int, ...]) -> None:
        """Report a step of the first k lanes to `on_step`.

        Args:
            step: from 0.
            losses: Σ of the losses of each lane's rows, `[k]`.
            counts: the rows of each lane in this step.
        """
        if self.on_step is not None:
            for lane, (loss, count) in enumerate(zip(losses.tolist(), counts, strict=True)):
                self.on_step(lane, step, loss / max(1, count))

    @cached_property
    def rows(self) -> Tensor:
        """The rows each holds, int64 `[K]`."""
        return self.clients.sizes[self.ids]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The rows each holds, falling."""
        return tuple(self.rows.tolist())

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """Where each client's rows begin, and the last position among them, int64 `[K]`."""
        return self.clients.offsets[self.ids], self.rows - 1

    def places(self, positions: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """Where in the list of all rows these positions `[k, B]` of some clients are; one past the end is the last."""
        starts, lasts = (column[index, None] for column in self._ends)
        return torch.minimum(positions, lasts[: len(positions)]) + starts[: len(positions)]

    def take(self, places: Tensor, counts: tuple[int, ...]) -> Batch:
        """The rows at these places `[k, B]`, of the first k clients."""
        x, y = self.clients.take(self.clients.order[places])
        if self.device != HOST:
            x, y = x.to(self.device), y.to(self.device)
        return Batch(self._typed(x), self._typed(y), counts)

    @cached_property
    def width(self) -> int:
        """Numbers in a row."""
        return prod(self.clients.features)

    @cached_property
    def in_memory(self) -> bool:
        """Whether rows can be read where they are stored, in the type that they are stored in."""
        return in_memory(self.clients.rows)

    def stored(self, places: Tensor) -> Stored:
        """The rows at these places `[n]`, where they are stored, or copied where that cannot be read."""
        if self.in_memory:
            found = Stored(*stored(self.clients.rows, self.clients.order[places]))
            if found.x.dtype in (torch.uint8, self.dtype):
                return found._replace(y=self._typed(found.y))
        x, y, _ = self.take(places, ())
        return Stored(x, torch.arange(len(x)), y)

    def _typed(self, values: Tensor) -> Tensor:
        return values.to(self.dtype) if values.is_floating_point() else values

    def batches(self, steps: Iterable[tuple[Tensor, tuple[int, ...]]]) -> Iterator[Batch]:
        """The batch of each step, from places `[k, B]` and counts; the rows of several steps are read at once."""
        most, held = max(1, _AHEAD // max(1, self.width)), 0
        some: list[tuple[Tensor, tuple[int, ...]]] = []
        for places, counts in steps:
            some.append((places, counts))
            held += places.numel()
            if held >= most:
                yield from self._together(some)
                some, held = [], 0
        if some:
            yield from self._together(some)

    def _together(self, steps: list[tuple[Tensor, tuple[int, ...]]]) -> Iterator[Batch]:
        shapes, sizes = zip(*((p.shape, p.numel()) for p, _ in steps), strict=True)
        x, y, _ = self.take(torch.cat([p.reshape(-1) for p, _ in steps]), ())
        rows = zip(x.split(sizes), y.split(sizes), shapes, steps, strict=True)
        for xs, ys, shape, (_, counts) in rows:
            yield Batch(xs.view(*shape, *xs.shape[1:]), ys.view(*shape, *ys.shape[1:]), counts)

    def gradient(self, task: Task, model: Model, places: Tensor, counts: tuple[int, ...], key: Key) -> Gradient:
        """The mean gradient of each client's loss over the rows at these places; at most `ROWS` of them in a pass.

        More rows go in sub-batches, as equal as can be (batch statistics want no short tail), whose gradients are
        averaged by the rows they hold.
        """
        wide = places.shape[1]
        if wide <= ROWS:
            return task.gradient(model, self.take(places, counts), key)
        # Without padding a lane is cut by its own rows alone; with it, by the width that its neighbours share.
        size = ROWS if task.batch_statistics else -(-wide // -(-wide // ROWS))
        rows = torch.tensor(counts, device=places.device)
        own = (-(-rows // size)).clamp(min=1)
        span, whole = torch.arange(size, device=rows.device), None
        for part in range(int(own.max())):
            begin, end = (torch.minimum(rows * i // own, rows) for i in (part, part + 1))
            columns = (begin[:, None] + span).clamp(max=wide - 1)
            here = tuple((end - begin).tolist())
            got = task.gradient(model, self.take(places.gather(1, columns), here), key.fold(part) if part else key)
            share = ((end - begin).to(got.grad) / rows.to(got.grad.device))[:, None]
            if whole is None:
                whole = got._replace(grad=got.grad * share, loss=got.loss.clone())
            else:
                whole = Gradient(whole.grad + got.grad * share, got.buffers, got.counters, whole.loss + got.loss)
            model = model._replace(buffers=whole.buffers, counters=whole.counters)
        return whole  # type: ignore[return-value]
