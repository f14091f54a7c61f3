"""The event loops of servers and clients.

Tests: tests/faults/test_federation.py, tests/faults/test_exit.py
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import functools
import gc
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
EXIT_S = 10.0  # seconds in which a thread can end when the interpreter exits
CLOSE_S = 0.1  # seconds in which a peer can answer the end of its connection, before the connection is aborted
COLLECT_EVERY = 20_000  # allocations
ABORT_S = 5.0  # seconds in which the loop can close aborted connections; it takes a few iterations


def run_loop(work: Coroutine[Any, Any, T], end: Callable[[], None] | None = None) -> T:
    """Run a coroutine to its end in a new event loop of this thread.

    If the interpreter exits before that, the coroutine is ended first. A loop of a daemon thread would otherwise wake
    up in an interpreter without state, and the process would end by SIGSEGV.

    Connections that the coroutine leaves open are closed before the loop: a loop that is closed with the end of a TLS
    connection under way would leak its socket.

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
    links = Links()
    runner = asyncio.Runner(loop_factory=lambda: links.watched(_new_loop()))
    loop = runner.get_loop()

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    def stop() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(end or cancel)

    with ended_at_exit(stop), runner:
        try:
            return runner.run(work)
        finally:
            runner.run(links.end())


def collect_rarely() -> None:
    """Let the garbage collector pass over all objects of now, and look for cycles after many allocations only.

    The connections of a server are objects that live long. With the default of 700 allocations the search for cycles
    takes a sixth of the CPU of a server that receives updates.

    Example:
        >>> before = gc.get_threshold()
        >>> collect_rarely()
        >>> gc.get_threshold()[0]
        20000
        >>> gc.set_threshold(*before)
        >>> gc.unfreeze()
    """
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 20, 20)


def return_memory() -> None:
    """Return freed memory to the system. Does nothing without glibc.

    Each TLS connection of uvloop has a buffer of 256 KiB. glibc keeps the buffers of ended connections in the middle of
    its heap, with the bytes that were in them. In a heap of 1 GiB this takes 2 to 16 ms.

    Example:
        >>> return_memory()
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Links:
    """The open connections of an event loop.

    Example:
        >>> len(Links().open)
        0
    """

    def __init__(self) -> None:
        # A transport drops its socket when it is closed, and the entry goes with the socket.
        self.open: weakref.WeakKeyDictionary[socket.socket, asyncio.BaseTransport | None]
        self.open = weakref.WeakKeyDictionary()
        self._ended = ended = asyncio.Event()

        class Noted(socket.socket):
            """A socket that reports its end: asyncio closes the socket of a transport, and uvloop detaches it."""

            __slots__ = ()

            def close(self) -> None:
                super().close()
                ended.set()

            def detach(self) -> int:
                ended.set()
                return super().detach()

        self._noted = Noted

    def watched(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        """Note each connection that the loop makes from a socket. Returns the loop."""
        loop.create_connection = self._noting(loop.create_connection)  # type: ignore[method-assign]
        loop.connect_accepted_socket = self._noting(loop.connect_accepted_socket)  # type: ignore[method-assign]
        return loop

    def _noting(self, connect: Any) -> Any:
        @functools.wraps(connect)
        async def noting(*args: Any, sock: socket.socket, **kwargs: Any) -> Any:
            # The loop needs the caller's own socket, so it gets the class in place. A protocol of the caller cannot
            # report the end: its connection_lost is not called if a TLS handshake was not completed.
            sock.__class__ = self._noted
            self.open[sock] = None
            made = await connect(*args, sock=sock, **kwargs)
            self.open[sock] = made[0]
            return made

        return noting

    async def end(self) -> None:
        """Wait for the connections that are being closed, then abort those that are still open."""
        if not await self._closed(CLOSE_S):
            for link, transport in list(self.open.items()):
                if isinstance(transport, asyncio.WriteTransport):
                    transport.abort()
                with contextlib.suppress(OSError):  # it is closed, or the peer has gone
                    link.shutdown(socket.SHUT_RDWR)
            await self._closed(ABORT_S)

    async def _closed(self, seconds: float) -> bool:
        """Wait until all connections are closed. Returns whether they are."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(link.fileno() >= 0 for link in list(self.open)):
                    self._ended.clear()
                    await self._ended.wait()
        return not any(link.fileno() >= 0 for link in list(self.open))


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


def _new_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop, which needs a sixth of the memory for a TLS connection; else one of asyncio."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
