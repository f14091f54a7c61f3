"""Lanes: the rows of K clients in one batch, and gradients over them. Local parts are written with them.

A lane is one client's row in a batch of clients. The rows of a client are addressed by position, 0 … n−1, in its own
order. A batch of K clients is padded to one width. The width depends only on the size of each client, so the bits of a
client depend neither on the other clients of the batch nor on their number.

Tests: tests/identities/test_local_sgd.py, tests/identities/test_chunks.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from atoll.base.errors import ClientError, UsageError
from atoll.base.random import Key, mixed, user_scope
from atoll.compute import limits
from atoll.compute.model_state import Batch, GradientResult, Model, Stored
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.rows import draws_in, in_memory, keyed, pieces, stored

HOST = torch.device("cpu")
OnStep = Callable[[int, int, float], None]  # lane, step from 0, mean loss of the lane's batch

_WORD = (1 << 64) - 1
_TOGETHER = 16  # steps whose rows are read in one scope, if rows draw
ROWS = 1024  # maximum rows of one client in one pass: bounds the memory of activations


@lru_cache(4096)
def padded(rows: int) -> int:
    """The padded width of a batch of `rows` rows: the next multiple of a grain, 1/16 to 1/8 of `rows`.

    Clients of similar sizes share a width, and at most 1/8 of the work is padding.

    Example:
        >>> [padded(n) for n in (7, 17, 100, 1000)]
        [7, 18, 104, 1024]
    """
    grain = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // grain) * grain


@dataclass(frozen=True)
class ClientBatch:
    """K clients that are computed together, largest first.

    Args:
        clients: all clients, with their rows.
        ids: of the K clients, int64 `[K]`.
        dtype: of the run. Float features and targets are converted to it.
        share: the fraction of its work for which each client has time, in (0, 1].
        device: of the computation. Clients and rows are selected on the host.
        on_step: receives lane, step and the mean loss of the lane's batch, after each step.
        key: of the draws when rows are read, with the K clients; None: a row draws the same at each reading.
    """

    clients: Clients
    ids: Tensor
    dtype: torch.dtype
    share: float = 1.0
    device: torch.device = HOST
    on_step: OnStep | None = None
    key: Key | None = None

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
        """The number of rows of each client, int64 `[K]`."""
        return self.clients.sizes[self.ids]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each client, in decreasing order."""
        return tuple(self.rows.tolist())

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The place of each client's first row, and the last position of its rows, int64 `[K]`."""
        return self.clients.offsets[self.ids], self.rows - 1

    def places(self, positions: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """The places of positions `[k, B]` in the list of all rows. A position past the end means the last row."""
        starts, lasts = (column[index, None] for column in self._ends)
        return torch.minimum(positions, lasts[: len(positions)]) + starts[: len(positions)]

    def take(self, places: Tensor, counts: tuple[int, ...]) -> Batch:
        """The rows of the first k clients at these places `[k, B]`.

        Raises:
            ClientError: a row cannot be read. The error names the row, and the client that holds it fails.
        """
        try:
            if self.draws and counts:
                with user_scope(Key(0)):
                    x, y = self._drawn(places, counts)
            else:
                x, y = self.clients.rows.take(self.clients.order[places])
        except UsageError as error:  # refuses a data set before the run; during a run it is about one client
            raise ClientError(error.given, error.required, error.why, error.write) from error
        return Batch(self._here(x), self._here(y), counts)

    def _here(self, values: Tensor) -> Tensor:
        """The values on the device of the computation, floats in the dtype of the run."""
        return self._typed(values if self.device == HOST else values.to(self.device))

    def class_counts(self, classes: int) -> Tensor:
        """The number of rows of each class, int64 `[K, classes]`; the targets are class numbers.

        Args:
            classes: C, the number of classes.
        """
        targets, counts = self.clients.rows.targets(), []
        for start, last in zip(*(column.tolist() for column in self._ends), strict=True):
            own = targets[self.clients.order[start : start + last + 1]].long().reshape(-1)
            counts.append(own[own >= 0].bincount(minlength=classes)[:classes])  # −100 is no class
        return torch.stack(counts).to(self.device)

    def read(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of the k-th client in pieces, in the dtype in which they are stored, on the device.

        Raises:
            ClientError: a row cannot be read. The error names the row, and the client that holds it fails.
        """
        start, last = (int(column[k]) for column in self._ends)
        for part in pieces(self.clients.order[start : start + last + 1], self.clients.features):
            try:
                x, y = self.clients.rows.take(part)
            except UsageError as error:
                raise ClientError(error.given, error.required, error.why, error.write) from error
            yield x.to(self.device), y.to(self.device)

    def lane(self, k: int) -> ClientBatch:
        """The k-th client alone."""
        key = None if self.key is None else self.key.select(slice(k, k + 1))
        return replace(self, ids=self.ids[k : k + 1], key=key)

    @cached_property
    def draws(self) -> bool:
        """Whether each reading of a row draws its own random numbers."""
        return self.key is not None and draws_in(self.clients.rows)

    @cached_property
    def _words(self) -> list[int]:
        """The key of each client's draws, as a word."""
        return [] if self.key is None else [word & _WORD for word in self.key.state().tolist()]

    @cached_property
    def _reads(self) -> dict[int, int]:
        """The number of times that a place has been read: the number of the pass over the rows."""
        return {}

    def _drawn(self, places: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Read valid rows with the draws of their client and pass. Padding repeats the last valid row."""
        found: list[tuple[Tensor, Tensor]] = []
        at = torch.zeros_like(places)
        for k, count in enumerate(counts):
            own = places[k, :count].tolist()
            passes = [self._reads.get(place, 0) for place in own]
            self._reads.update((place, number + 1) for place, number in zip(own, passes, strict=True))
            start = sum(len(y) for _, y in found)
            column = torch.zeros(count, dtype=torch.int64)
            for number in sorted(set(passes)):
                some = torch.tensor([i for i, p in enumerate(passes) if p == number])
                rows = keyed(self.clients.rows, mixed(self._words[k], number), inside=True)
                column[some] = start + torch.arange(len(some))
                start += len(some)
                found.append(rows.take(self.clients.order[places[k, some]]))
            at[k] = column[torch.arange(places.shape[1]).clamp(max=count - 1)] if count else 0
        if not found:
            return self.clients.rows.take(self.clients.order[places])
        x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
        return x[at], y[at]

    @cached_property
    def width(self) -> int:
        """The count of numbers in a row."""
        return prod(self.clients.features)

    @cached_property
    def in_memory(self) -> bool:
        """Whether rows can be read without a copy, in the dtype in which they are stored."""
        return in_memory(self.clients.rows)

    def stored(self, places: Tensor) -> Stored:
        """The rows at these places `[n]`, without a copy if they can be read in place."""
        if self.in_memory:
            found = Stored(*stored(self.clients.rows, self.clients.order[places]))
            if found.x.dtype in (torch.uint8, self.dtype):
                return found._replace(y=self._typed(found.y))
        x, y, _ = self.take(places, ())
        return Stored(x, torch.arange(len(x)), y)

    def _typed(self, values: Tensor) -> Tensor:
        return values.to(self.dtype) if values.is_floating_point() else values

    def batches(self, steps: Iterable[tuple[Tensor, tuple[int, ...]]]) -> Iterator[Batch]:
        """The batch of each step, from places `[k, B]` and counts. The rows of several steps are read together."""
        if self.draws:
            todo = iter(steps)
            while group := list(itertools.islice(todo, _TOGETHER)):
                with user_scope(Key(0)):  # the draws of each row are keyed; one scope restores the generators
                    read = [(*self._drawn(places, counts), counts) for places, counts in group]
                yield from (Batch(self._here(x), self._here(y), counts) for x, y, counts in read)
            return
        most, total = max(1, limits.READ_AHEAD // max(1, self.width)), 0
        some: list[tuple[Tensor, tuple[int, ...]]] = []
        for places, counts in steps:
            some.append((places, counts))
            total += places.numel()
            if total >= most:
                yield from self._together(some)
                some, total = [], 0
        if some:
            yield from self._together(some)

    def _together(self, steps: list[tuple[Tensor, tuple[int, ...]]]) -> Iterator[Batch]:
        shapes, sizes = zip(*((p.shape, p.numel()) for p, _ in steps), strict=True)
        x, y, _ = self.take(torch.cat([p.reshape(-1) for p, _ in steps]), ())
        rows = zip(x.split(sizes), y.split(sizes), shapes, steps, strict=True)
        for xs, ys, shape, (_, counts) in rows:
            yield Batch(xs.view(*shape, *xs.shape[1:]), ys.view(*shape, *ys.shape[1:]), counts)

    def gradient(
        self,
        task: Task,
        model: Model,
        places: Tensor,
        counts: tuple[int, ...],
        key: Key,
        widths: tuple[int, ...] = (),
    ) -> GradientResult:
        """The mean gradient of each client's loss over the rows at these places, at most `ROWS` rows per pass.

        More rows are split into sub-batches of nearly equal size, and their gradients are averaged with their numbers
        of rows as weights. If the rows are coupled, all rows are one pass.

        Args:
            task: computes the gradients.
            model: of each lane.
            places: int64 `[k, B]`.
            counts: the number of valid rows of each lane, ≤ B.
            key: of the draws inside the model, such as dropout.
            widths: the padded length of each lane, decreasing and at most `ROWS`, if they differ. Lanes of one length
                are one pass, so that the bits of a lane do not depend on the largest length.
        """
        if len(set(widths)) > 1 and not task.exact_counts:
            return self._gradient_by_width(task, model, places, counts, key, widths)
        length = places.shape[1]
        if length <= ROWS or task.couples:
            return task.gradient(model, self.take(places, counts), key)
        size = -(-length // -(-length // ROWS))  # of the padded width, which all lanes of the batch share
        rows = torch.tensor(counts, device=places.device)
        parts = (-(-rows // size)).clamp(min=1)
        span, whole = torch.arange(size, device=rows.device), None
        for part in range(int(parts.max())):
            begin, end = (torch.minimum(rows * i // parts, rows) for i in (part, part + 1))
            columns = (begin[:, None] + span).clamp(max=length - 1)
            part_counts = tuple((end - begin).tolist())
            result = task.gradient(
                model, self.take(places.gather(1, columns), part_counts), key.fold(part) if part else key
            )
            share = ((end - begin).to(result.grad) / rows.to(result.grad.device))[:, None]
            if whole is None:
                whole = result._replace(grad=result.grad * share, loss=result.loss.clone())
            else:
                whole = GradientResult(
                    whole.grad + result.grad * share, result.buffers, result.counters, whole.loss + result.loss
                )
            model = model._replace(buffers=whole.buffers, counters=whole.counters)
        return whole  # type: ignore[return-value]

    def _gradient_by_width(
        self,
        task: Task,
        model: Model,
        places: Tensor,
        counts: tuple[int, ...],
        key: Key,
        widths: tuple[int, ...],
    ) -> GradientResult:
        """The gradients of lanes of different padded lengths: one pass for each length, on rows that are read once."""
        sizes = [len(list(lanes)) for _, lanes in groupby(widths)]
        ends = list(accumulate(sizes))
        spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        steps = [(places[at, : widths[at.start]], counts[at]) for at in spans]
        results = [
            task.gradient(model.between(at), batch, key.select(at))
            for at, batch in zip(spans, self._together(steps), strict=True)
        ]
        return tree_map(lambda *parts: torch.cat(parts), *results)  # type: ignore[no-any-return]
