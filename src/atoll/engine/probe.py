"""A probe: passes of a task over a few real rows, before the first round. Its comparisons give `Findings`.

The rows are read once and used by every comparison. Each comparison runs at two models: the start, and the start plus
keyed noise, because a weight that is zero hides a dependence.

Tests: tests/conformance/test_user_code.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key, generator_states, user_scope
from atoll.compute.batches import ClientBatch
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.rows import in_memory

ROWS = 8  # rows of a probe
OUTPUTS = 256  # numbers of the output that a probe of the loss reads, if a single row does not have more
_SEARCHED = 1024  # rows of a client whose targets are compared
_NOISE = 0.1  # standard deviation of the noise at the second model
_KEY = Key(0).fold("probe")


class Pass(NamedTuple):
    """The result of one pass of a probe.

    Args:
        output: the model's output, detached if it is a tensor; else unchanged.
        loss: the values of the loss, detached, in the shape in which it returned them.
        grad: the gradient of the sum of the values, `[d]`; None in evaluation mode.
        buffers: the float buffers after the pass, `[b]`.
        counters: the integer buffers after the pass, by name.
        drew: whether the pass drew from a global generator.
    """

    output: Any
    loss: Tensor
    grad: Tensor | None
    buffers: Tensor
    counters: dict[str, Tensor]
    drew: bool


@dataclass(frozen=True)
class Probe:
    """A few rows of one client, and two models.

    Args:
        task: the task, with numerics `"loop"`.
        x: features `[n, …]`, n ≤ 8.
        y: targets `[n, …]`.
        models: the start, and the start plus keyed noise on θ; single models.
        client: the client that has the rows.
    """

    task: Task
    x: Tensor
    y: Tensor
    models: tuple[Model, Model]
    client: int

    @classmethod
    def read(cls, task: Task, data: Clients, rows: int = ROWS) -> Probe:
        """Read a few rows of the largest client. If they cannot be read, read those of the next client.

        The rows include those with the smallest and the largest target if targets are in memory: rows of one class, or
        censored rows only, would hide a coupling.

        Args:
            task: the task; the probe uses its loop backend.
            data: the clients.
            rows: the largest number of rows.
        Raises:
            UsageError: no client has rows that can be read.
        """
        error: Exception | None = None
        for client in torch.argsort(data.sizes, descending=True, stable=True)[:ROWS].tolist():
            lanes = ClientBatch(data, torch.tensor([client]), task.layout.dtype, device=task.device)
            count = min(rows, lanes.sizes[0])
            if not count:
                continue
            try:
                x, y, _ = lanes.take(lanes.places(_spread(data, client, count)[None]), (count,))
            except Exception as trouble:
                error = error or trouble
                continue
            return cls(task, x[0], y[0], _models(task), client)
        if error is not None:
            raise error
        raise UsageError("No client has a row.", "at least one row.", "the model is tested on a few rows first.")

    def loss_rows(self, output: Tensor) -> int:
        """The number of rows with at most `OUTPUTS` numbers of the output together, at least 2 if there are 2."""
        each = max(1, output[:1].numel())
        return min(len(self.x), max(2, OUTPUTS // each))

    def run(
        self,
        model: int = 0,
        rows: slice | Tensor = slice(None),
        *,
        training: bool = True,
        x: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Pass:
        """Run one pass over some of the rows. Equal calls draw equal random numbers.

        Args:
            model: the number of the model, 0 or 1.
            rows: the rows to use, by position.
            training: whether the pass runs in training mode and has a gradient.
            x, y: other rows to use, instead of those of the probe.
        """
        x, y = self.x[rows] if x is None else x, self.y[rows] if y is None else y
        with user_scope(_KEY):
            before = generator_states()
            output, loss, grad = self.task.observe(self.models[model], x, y, _KEY, training=training)
            drew = before != generator_states()
        buffers, counters = self.task.bound.buffers()
        kept = output.detach().clone() if isinstance(output, Tensor) else output
        return Pass(kept, loss.detach().clone(), grad, buffers, {n: c[0] for n, c in counters.items()}, drew)

    def passes(self, rows: slice | Tensor = slice(None), *, training: bool = True) -> Iterator[Pass]:
        """One pass at each of the two models."""
        for model in range(2):
            yield self.run(model, rows, training=training)


def _spread(data: Clients, client: int, count: int) -> Tensor:
    """Positions of rows of a client, ascending, int64 `[count]`: the first rows, and those of extreme targets."""
    first = torch.arange(count)
    if not in_memory(data.rows):
        return first
    own = data.client_rows(client)[:_SEARCHED]
    y = data.rows.targets()[own].reshape(len(own), -1)[:, :2]
    extreme = torch.cat([y.argmin(0), y.argmax(0)]).tolist()
    chosen = list(dict.fromkeys([0, *extreme, *first.tolist()]))[:count]
    return torch.tensor(sorted(chosen))


def _models(task: Task) -> tuple[Model, Model]:
    """The start, and the start plus keyed noise."""
    start = task.initial()
    noise = _KEY.fold("noise").normal(len(start.theta), start.theta.dtype).to(start.theta.device)
    return start, start._replace(theta=start.theta + _NOISE * noise)
