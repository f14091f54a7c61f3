"""A local part that simulates full memory. It has a module of its own, so that workers can import it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from atoll.plan.local import Gradient
from atoll.plan.protocols import Local

_SAYS = {
    "host": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    "python": MemoryError,
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


@dataclass(frozen=True, repr=False)
class Scarce(Local):
    """The results of `inner`, for at most `most` clients at once. More clients raise an error of full memory."""

    most: int = 4
    kind: str = "host"
    inner: Any = field(default_factory=Gradient)
    batch: int | None = None

    tried: ClassVar[list[int]] = []

    def padded_batch(self, rows):
        return self.inner.padded_batch(rows)

    def first_memory(self, task):
        return self.inner.first_memory(task)

    def server(self, layout):
        return self.inner.server(layout)

    def server_update(self, total, server, info, key):
        return self.inner.server_update(total, server, info, key)

    def contribute(self, broadcast, lanes, memory, key, task):
        self.tried.append(len(lanes.ids))
        if len(lanes.ids) > self.most:
            raise _SAYS[self.kind]()
        return self.inner.contribute(broadcast, lanes, memory, key, task)
