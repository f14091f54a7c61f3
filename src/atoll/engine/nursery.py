"""Where workers come from: one process that has imported everything, and forks.

A worker that is forked from it starts in milliseconds, and shares what was imported. Nothing of the program that asked
for it is inherited but the connection: neither its memory, nor its threads, nor its open files. The nursery and its
workers are a process group of their own, so Ctrl-C does not reach them; they end when the program does, however it
ends: the kernel then closes its connections.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from atoll.engine.crossing import removed
from atoll.errors import UsageError

_ORDER = struct.Struct("<cq")  # b"f" fork, with a connection; b"k" kill, with a process id; b"w" warm up
_START = "from atoll.engine.nursery import main; main({fd}, {folders!r})"
_GRACE_S = 1.0  # to end by itself
_SHARED = "/dev/shm"  # memory that looks like a folder, where there is such a thing


class Nursery:
    """The process that forks workers, seen from the program that wants them; it is started when it is first needed.

    It may serve several engines. Folders for what they share with their workers go when it does.
    """

    def __init__(self) -> None:
        shared = _SHARED if os.path.isdir(_SHARED) else None
        self.folders = tuple(tempfile.mkdtemp(prefix="atoll-", dir=folder) for folder in dict.fromkeys((shared, None)))
        self._lives: list[_Life] = []
        self._end = weakref.finalize(self, _ended, self._lives, self.folders)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._end.alive

    @property
    def pids(self) -> list[int]:
        """The process id of the nursery itself, where it runs."""
        return [life.process.pid for life in self._lives if life.process.poll() is None]

    def start(self) -> None:
        """Start it, or start it again where somebody killed it."""
        if self.closed:
            raise UsageError("The nursery was closed.", "one that is open.", write="Nursery()")
        if self._lives and self._lives[-1].process.poll() is None:
            return
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START.format(fd=theirs.fileno(), folders=self.folders)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,
            )
        self._lives.append(_Life(process, ours))

    def worker(self) -> Connection:
        """A connection to a new worker; who reads from it reads its end where the worker could not be made."""
        self.start()
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._lives[-1].control, [_ORDER.pack(b"f", 0)], [theirs.fileno()])
        return Connection(ours.detach())

    def warm(self) -> None:
        """Load what torch loads at the first use of lanes, once for all workers to come instead of in each."""
        self.start()
        with contextlib.suppress(OSError):
            self._lives[-1].control.sendall(_ORDER.pack(b"w", 0))

    def kill(self, pid: int) -> None:
        """End a worker at once, whatever it is at."""
        for life in self._lives:
            with contextlib.suppress(OSError):
                life.control.sendall(_ORDER.pack(b"k", pid))

    def close(self) -> None:
        """End the nursery and all its workers, wait until they are gone, and remove the folders."""
        self._end()


class _Life(NamedTuple):
    process: subprocess.Popen[bytes]
    control: socket.socket


def _ended(lives: list[_Life], folders: tuple[str, ...]) -> None:
    for _, control in lives:
        control.close()  # it ends its workers, and then itself
    for process, _ in lives:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        if process.poll() is None:  # it is still importing, or somebody stopped it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    removed(folders)


def main(fd: int, folders: tuple[str, ...]) -> None:
    """The nursery's own life: import, then fork at every order, until whoever gives the orders is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from atoll.engine import worker  # torch and everything: the orders wait meanwhile

    control = socket.socket(fileno=fd)
    children: set[int] = set()
    try:
        while True:
            order, fds, _, _ = socket.recv_fds(control, _ORDER.size, 1)
            if not order:
                return
            order += control.recv(_ORDER.size - len(order), socket.MSG_WAITALL) if len(order) < _ORDER.size else b""
            what, pid = _ORDER.unpack(order)
            children -= _gone(children)
            if what == b"k" and pid in children:
                os.kill(pid, signal.SIGKILL)
            elif what == b"w":
                worker.warm()
            elif what == b"f":
                child = os.fork()
                if not child:
                    children.clear()
                    control.close()
                    _live(worker.main, fds[0], folders)
                children.add(child)
                os.close(fds[0])
    finally:
        for child in children - _gone(children):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        removed(folders)


def _live(run: Callable[..., None], fd: int, folders: tuple[str, ...]) -> None:
    """A worker's life, from which there is no way back into the nursery's."""
    code = 1
    try:
        run(Connection(fd), *folders)
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _gone(children: set[int]) -> set[int]:
    """Those that have ended, reaped."""
    return {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
