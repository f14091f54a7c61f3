"""The event loops of servers and clients.

Tests: tests/faults/test_federation.py, tests/faults/test_exit.py
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
EXIT_S = 10.0  # seconds in which a thread can end when the interpreter exits


def run_loop(work: Coroutine[Any, Any, T], end: Callable[[], None] | None = None) -> T:
    """Run a coroutine to its end in a new event loop of this thread.

    If the interpreter exits before that, the coroutine is ended first. A loop of a daemon thread would otherwise wake
    up in an interpreter without state, and the process would end by SIGSEGV.

    Args:
        work: the coroutine.
        end: called in the loop to end the coroutine; None: all tasks are cancelled.
    Returns:
        The result of the coroutine.
    Example:
        >>> async def answer() -> int:
        ...     return 42
        >>> run_loop(answer())
        42
    """
    runner = asyncio.Runner(loop_factory=loop_factory())
    loop = runner.get_loop()

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    def stop() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(end or cancel)

    with ended_at_exit(stop):
        try:
            return runner.run(work)
        finally:
            with contextlib.suppress(OSError):  # uvloop is busy with the end of a TLS connection whose peer is gone
                runner.close()


@contextlib.contextmanager
def ended_at_exit(stop: Callable[[], None]) -> Iterator[None]:
    """If the interpreter exits while a thread is in this block, call `stop` and wait until the thread has left it.

    Args:
        stop: lets the thread leave the block; another thread calls it.
    Example:
        >>> with ended_at_exit(lambda: None):
        ...     pass
    """
    thread, over = threading.current_thread(), threading.Event()

    def ended() -> None:
        if thread is not threading.current_thread() and thread.is_alive():  # a fork has no other threads
            stop()
            over.wait(EXIT_S)

    atexit.register(ended)
    try:
        yield
    finally:
        over.set()
        atexit.unregister(ended)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The loop of uvloop, which needs a sixth of the memory for a TLS connection; else that of asyncio."""
    try:
        import uvloop
    except ImportError:
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made
