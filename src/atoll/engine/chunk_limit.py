"""The chunk size: the number of clients computed together, limited by the model, the memory and earlier failures.

Tests: tests/faults/test_memory.py, tests/identities/test_device.py.
"""

from __future__ import annotations

from math import prod

import torch

from atoll.base.errors import RunError
from atoll.base.lines import Change, Write
from atoll.compute import limits
from atoll.compute.batches import ROWS
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.plan.plan import Plan

_APART = 4  # memory of such a client in lengths of θ: its update and the digits of the exact sum
_HELD = 6  # memory of a lane in lengths of θ: θ, gradient, update, and temporaries of optimizer and codec


class ChunkLimit:
    """A limit for chunks, lowered each time a chunk does not fit into memory.

    Args:
        most: the largest chunk that fits, ≥ 1; None: no chunk has failed yet.
    Example:
        >>> room = ChunkLimit()
        >>> room.lower(50)
        >>> room.take_note()
        ('Chunks of more than 50 clients did not fit into memory. Later chunks are not larger. No bit changes.',)
        >>> room.take_note()
        ()
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._noted = most

    def lower(self, most: int | None) -> None:
        """Lower the limit to `most` clients; None changes nothing."""
        if most is not None and (self.most is None or most < self.most):
            self.most = most

    def take_note(self) -> tuple[str, ...]:
        """A message if the limit was lowered since the last call, else ()."""
        if self.most == self._noted:
            return ()
        self._noted = self.most
        some = "1 client" if self.most == 1 else f"{self.most} clients"
        return (f"Chunks of more than {some} did not fit into memory. Later chunks are not larger. No bit changes.",)

    def within(self, most: int | None) -> int | None:
        """The smaller of `most` and the limit; None if neither is set."""
        return min((n for n in (most, self.most) if n is not None), default=None)


def chunk_size(plan: Plan, task: Task, data: Clients, rows: int, most: int | None, room: int | None = None) -> int:
    """Choose the number of clients that are computed together: `most`, or a number from the size of model and batch.

    On a CPU, a chunk should stay in the caches of the cores. On a device with its own memory, a chunk may take half
    of the free memory, since activations are not counted.

    Args:
        plan, task, data: the algorithm, the model and the clients.
        rows: the number of rows of the largest client.
        most: the number that the user set, ≥ 1; None: the user set none.
        room: the free memory of the device in bytes; None on a CPU.
    Returns:
        The size of a chunk, ≥ 1.
    """
    if task.numerics == "loop" and not plan.local.sequential(rows):
        return 1
    if most is not None:
        return most
    width = plan.local.padded_batch(rows)
    width, size = width if task.couples else min(width, ROWS), task.layout.dtype.itemsize
    if task.numerics == "fused":
        each, near = task.program.room(data.features, width) * size, limits.FUSED_CHUNK_BYTES
    elif task.numerics == "compiled":  # one client a core is active; its update is the memory to count
        most = min(limits.MOST_CHUNK, limits.LANE_CHUNK_BYTES // (task.layout.d * size))
        return max(2 * torch.get_num_threads(), limits.LEAST_CHUNK, most)
    elif task.numerics == "loop":  # a chunk only stores updates
        return max(1, min(limits.MOST_CHUNK, limits.LOOP_CHUNK_BYTES // (_APART * task.layout.d * size)))
    else:
        each, near = _HELD * task.layout.d * size, limits.LANE_CHUNK_BYTES
    if room is None:
        return max(limits.LEAST_CHUNK, min(limits.MOST_CHUNK, near // each))
    # Every backend stores an update and the digits of its sum. Rows of several steps are read ahead.
    each = max(each, _HELD * task.layout.d * size) + width * max(1, prod(data.features)) * size
    return max(1, min(limits.MOST_DEVICE_CHUNK, room // 2 // each))


def no_sum(task: Task, many: int, error: BaseException) -> RunError:
    """The error for a chunk whose contributions cannot be added up because memory is full."""
    return RunError(
        f"The updates of {many} clients do not fit into memory together with their sum: {_first_line(error)}",
        "memory for the sum of one chunk.",
        "a partly added chunk cannot be subtracted. The state is that of the round before.",
        Change("chunk", many // 2)
        if many > 1
        else Change("model", "linear")
        if task.device.type == "cpu"
        else Change("device", "cpu"),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def too_large(plan: Plan, task: Task, client: int, rows: int, error: BaseException) -> RunError:
    """The error for a single client that does not fit into memory."""
    causes = task.findings.couples or task.findings.couples_in_evaluation
    coupled = f"its {rows} rows are coupled, so a batch of them is one pass ({'; '.join(causes)}); " if causes else ""
    return RunError(
        f"Client {client} does not fit into memory by itself: {_first_line(error)}",
        "memory for the model, its gradient and one batch of one client.",
        f"{coupled}a chunk of one client cannot be halved. The state is that of the round before.",
        _smaller(plan, task, rows),
    )


def _smaller(plan: Plan, task: Task, rows: int) -> Write:
    """A setting that needs less memory."""
    if task.device.type != "cpu":
        return Change("device", "cpu")
    batch = plan.local.batch
    wide = (rows if task.couples else min(rows, ROWS)) if batch is None else min(rows, int(batch))
    return Change("plan.local.batch", max(1, wide // 2)) if wide > 1 else Change("model", "linear")
