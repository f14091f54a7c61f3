"""A fork server: one process that has imported all modules and forks workers.

A forked worker starts in milliseconds and shares the memory of the imported modules. A worker inherits only the
connection from the program, not its memory, its threads or its open files. The fork server and its workers are a
separate process group, so Ctrl-C does not reach them. They end when the program ends, also after a crash, since the
kernel then closes the program's connections.

Tests: tests/parity/test_processes.py, tests/faults/test_kill.py.
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

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.engine.workers.shared_memory import remove_folders

_ORDER = struct.Struct("<cq")  # b"f" fork, with a connection; b"k" kill, with a process id; b"w" preload
_START = "from atoll.engine.workers.forkserver import run_server; run_server({fd}, {folders!r})"
_GRACE_S = 1.0  # seconds to end before SIGKILL
_SHARED = "/dev/shm"  # a file system in memory; not every system has it


class ForkServer:
    """The program's handle of the fork server. The server process starts at first use.

    Several engines may share one. Its folders contain the memory that engines share with their workers. `close` removes
    the folders.
    """

    def __init__(self) -> None:
        shared = _SHARED if os.path.isdir(_SHARED) else None
        self.folders = tuple(tempfile.mkdtemp(prefix="atoll-", dir=folder) for folder in dict.fromkeys((shared, None)))
        self._lives: list[_Server] = []
        self._end = weakref.finalize(self, _ended, self._lives, self.folders)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._end.alive

    @property
    def pids(self) -> list[int]:
        """The process id of the fork server if it runs, else []."""
        return [life.process.pid for life in self._lives if life.process.poll() is None]

    def start(self) -> None:
        """Start the fork server if it does not run.

        Raises:
            UsageError: it was closed.
        """
        if self.closed:
            raise UsageError("The fork server was closed.", "an open one.", write=Line(python="ForkServer()"))
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
        self._lives.append(_Server(process, ours))

    def worker(self) -> Connection:
        """Start a worker and return its connection. If the fork fails, reading from the connection raises EOFError."""
        self.start()
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._lives[-1].control, [_ORDER.pack(b"f", 0)], [theirs.fileno()])
        return Connection(ours.detach())

    def warm(self) -> None:
        """Preload the modules that torch imports at the first use of lanes, once for all later workers."""
        self.start()
        with contextlib.suppress(OSError):
            self._lives[-1].control.sendall(_ORDER.pack(b"w", 0))

    def kill(self, pid: int) -> None:
        """Kill a worker with SIGKILL."""
        for life in self._lives:
            with contextlib.suppress(OSError):
                life.control.sendall(_ORDER.pack(b"k", pid))

    def close(self) -> None:
        """End the fork server and all its workers, wait for their end, and remove the folders."""
        self._end()


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    control: socket.socket


def _ended(lives: list[_Server], folders: tuple[str, ...]) -> None:
    for _, control in lives:
        control.close()  # the server then kills its workers and exits
    for process, _ in lives:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        if process.poll() is None:  # it still imports modules, or it was stopped by a signal
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    remove_folders(folders)


def run_server(fd: int, folders: tuple[str, ...]) -> None:
    """The main function of the fork server: import modules, then fork on request until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from atoll.engine.workers import worker  # imports torch; requests wait in the socket meanwhile

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
                worker.preload()
            elif what == b"f":
                child = os.fork()
                if not child:
                    children.clear()
                    control.close()
                    _live(worker.run_worker, fds[0], folders)
                children.add(child)
                os.close(fds[0])
    finally:
        for child in children - _gone(children):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        remove_folders(folders)


def _live(run: Callable[..., None], fd: int, folders: tuple[str, ...]) -> None:
    """Run a worker in the forked process, then exit. The process never returns to the server's code."""
    code = 1
    try:
        run(Connection(fd), *folders)
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _gone(children: set[int]) -> set[int]:
    """Reap the children that have ended and return them."""
    return {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
