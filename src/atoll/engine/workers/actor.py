"""The Ray actor that contains one worker. It loads without torch, so that it answers as soon as it has a place.

Tests: tests/parity/test_ray.py
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from atoll.base.errors import RunError
from atoll.base.lines import Change

if TYPE_CHECKING:
    from atoll.engine.workers.shared_memory import Arrays
    from atoll.engine.workers.worker import Worker


class Actor:
    """A Ray actor that contains one worker. Its first answer arrives before it imports torch: Ray has placed it."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def placed(self) -> None:
        """Return at once."""

    def setup(self, order: bytes, arrays: Arrays, paths: list[str]) -> tuple[bytes, Arrays]:
        """Build the worker from task and data. `paths` is the caller's module search path."""
        sys.path.extend(path for path in paths if path not in sys.path and os.path.exists(path))
        from atoll.engine.workers.messages import Ready, encode, orders
        from atoll.engine.workers.shared_memory import from_buffers
        from atoll.engine.workers.worker import Worker, error_message

        try:
            setup: Any = orders.decode(order)
            with _found_here():
                self._worker = Worker(setup, from_buffers(setup.places, arrays))
            return encode(Ready(os.getpid())), []
        except Exception as error:
            return encode(error_message(error)), []

    def run(self, order: bytes, rows: Arrays, news: bytes | None, arrays: Arrays | None) -> tuple[bytes, Arrays]:
        """Take the broadcast of the round if there is one, then compute clients. Return results if the order asks."""
        from atoll.engine.workers.messages import Done, encode, orders, results_to_tensors
        from atoll.engine.workers.shared_memory import from_buffers, to_buffers
        from atoll.engine.workers.worker import error_message, results_message

        try:
            if self._worker is None:
                raise RunError("An actor received clients before it received task and data.")
            if news is not None and arrays is not None:
                broadcast: Any = orders.decode(news)
                self._worker.store_broadcast(broadcast, from_buffers(broadcast.places, arrays))
            run: Any = orders.decode(order)
            results = self._worker.run(run, None if run.rows is None else from_buffers(run.rows[1], rows))
            if results is None:
                return encode(Done()), []
            places, out = to_buffers(results_to_tensors(results))
            return encode(results_message(results, "", places, self._worker.max_chunk)), out
        except Exception as error:
            return encode(error_message(error)), []


@contextlib.contextmanager
def _found_here() -> Iterator[None]:
    """Name the node on which code or a file is missing."""
    try:
        yield
    except (ImportError, FileNotFoundError) as error:
        raise RunError(
            f"The node {socket.gethostname()} does not have code or a file that the task needs: {error}.",
            "the same code and files on every node.",
            "an actor imports code by its name and opens memory-mapped files by their paths.",
            Change("engine", "processes"),
        ) from error
