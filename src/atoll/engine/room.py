"""How many clients are computed side by side: by the model and the memory, and by what did not fit."""

from __future__ import annotations

from math import prod

import torch

from atoll.data.clients import Clients
from atoll.errors import RunError
from atoll.plan.lanes import ROWS
from atoll.plan.plan import Plan
from atoll.task import Task

_FUSED_BYTES = 7 << 20  # by hand there is no gradient to hold, and a step goes through all of it three times
_LANE_BYTES = 16 << 20  # what a chunk's θ, gradients and updates take together: they stay near the cores
_LEAST, _MOST, _FAR_MOST = 4, 1024, 1 << 14
_APART_BYTES = 64 << 20  # updates of clients in turn: written once, read once
_APART = 4  # an update, and its digits, in lengths of θ
_HELD = 6  # θ, gradient and update of a lane, and what an optimizer and a codec make of them, in lengths of θ


class Room:
    """What an engine has learned of its memory: no more clients at once than fitted.

    Args:
        most: that fit side by side; None: nothing has gone wrong yet.
    Example:
        >>> room = Room()
        >>> room.learn(50)
        >>> room.said()
        ('More than 50 clients side by side did not fit into memory: no chunk is larger from now on. No bit changes.',)
        >>> room.said()
        ()
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._said = most

    def learn(self, most: int | None) -> None:
        """So many fit; more did not."""
        if most is not None and (self.most is None or most < self.most):
            self.most = most

    def said(self) -> tuple[str, ...]:
        """What has been learned since the last call, in words."""
        if self.most == self._said:
            return ()
        self._said = self.most
        some = "1 client" if self.most == 1 else f"{self.most} clients"
        told = f"More than {some} side by side did not fit into memory: no chunk is larger from now on. No bit changes."
        return (told,)

    def within(self, most: int | None) -> int | None:
        """What was asked for, as far as it fits."""
        return min((n for n in (most, self.most) if n is not None), default=None)


def lanes_of(plan: Plan, task: Task, data: Clients, rows: int, most: int | None, room: int | None = None) -> int:
    """How many clients are computed together: at most `most`, or what the size of model and batch allows.

    On the host that is as much as stays near the cores; on a device of its own memory it is as much as half of what is
    free there takes, since activations are not counted.

    Args:
        plan, task, data: what is computed.
        rows: of the largest client.
        most: that were asked for; None chooses.
        room: free bytes of a device; None on the host.
    """
    if task.numerics == "loop" and not plan.local.sequential(rows):
        return 1
    if most is not None:
        return most
    width, size = min(plan.local.padded_batch(rows), ROWS), task.layout.dtype.itemsize
    if task.numerics == "fused":
        each, near = task.program.room(data.features, width) * size, _FUSED_BYTES
    elif task.numerics == "compiled":  # of a client at work there is one a core; what they came to is what is held
        return max(2 * torch.get_num_threads(), _LEAST, min(_MOST, _LANE_BYTES // (task.layout.d * size)))
    elif task.numerics == "loop":  # nothing but updates lies side by side
        return max(1, min(_MOST, _APART_BYTES // (_APART * task.layout.d * size)))
    else:
        each, near = _HELD * task.layout.d * size, _LANE_BYTES
    if room is None:
        return max(_LEAST, min(_MOST, near // each))
    # An update and the digits of its sum are held in any body; rows of several steps are read ahead.
    each = max(each, _HELD * task.layout.d * size) + width * max(1, prod(data.features)) * size
    return max(1, min(_FAR_MOST, room // 2 // each))


def no_sum(task: Task, many: int, error: BaseException) -> RunError:
    """The error for a chunk whose contributions cannot be added up for want of memory."""
    return RunError(
        f"The updates of {many} clients do not fit into memory beside their sum: {_first_line(error)}",
        "memory for the sum of one chunk.",
        "what was added of it in part cannot be taken back. The state is that of the round before.",
        f"--chunk {many // 2}" if many > 1 else "--model linear" if task.device.type == "cpu" else "--device cpu",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def too_large(plan: Plan, task: Task, client: int, rows: int, error: BaseException) -> RunError:
    """The error for a client that does not fit into memory by itself."""
    return RunError(
        f"Client {client} does not fit into memory by itself: {_first_line(error)}",
        "memory for the model, its gradient and one batch of one client.",
        "a chunk of one client cannot be halved. The state is that of the round before.",
        _smaller(plan, task, rows),
    )


def _smaller(plan: Plan, task: Task, rows: int) -> str:
    """The line that asks for less memory."""
    if task.device.type != "cpu":
        return "--device cpu"
    batch = plan.local.batch
    wide = min(rows, ROWS) if batch is None else min(rows, int(batch))
    return f"--set plan.local.batch={max(1, wide // 2)}" if wide > 1 else "--model linear"
