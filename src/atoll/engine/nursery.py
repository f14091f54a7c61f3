"""Where workers come from: one process that has imported everything, and forks.

A worker that is forked from it starts in milliseconds, and shares what was imported. Nothing of the program that asked
for it is inherited but the connection: neither its memory, nor its threads, nor its open files. The nursery and its
workers are a process group of their own, so Ctrl-C does not reach them; they end when the program does, however it
ends: the kernel then closes its connections.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from atoll.errors import RunError

_ORDER = struct.Struct("<cq")  # b"f" fork, with a connection, or b"k" kill, with a process id
_START = "from atoll.engine.nursery import main; main({fd}, {target!r}, {arguments!r})"


class Nursery:
    """The process that forks workers, seen from the program that wants them.

    Args:
        target: `module:function` that a worker runs, `function(connection, *arguments)`.
        arguments: texts.
    """

    def __init__(self, target: str, arguments: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        code = _START.format(fd=theirs.fileno(), target=target, arguments=arguments)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,
            )
        self._control = ours

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can still fork."""
        return self._process.poll() is None

    def worker(self) -> Connection:
        """A connection to a new worker; who reads from it reads its end where the worker could not be made."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [_ORDER.pack(b"f", 0)], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise RunError(
                    f"No worker can be started: the process that forks them has ended, code {self._process.poll()}.",
                    "what it printed above says why.",
                    write="--engine inprocess",
                ) from error
        return Connection(ours.detach())

    def kill(self, pid: int) -> None:
        """End a worker at once, whatever it is at."""
        if self.alive:
            self._control.sendall(_ORDER.pack(b"k", pid))

    def close(self) -> None:
        """End all workers and the nursery, and wait until they are gone."""
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._control.close()
        self._process.wait()


def main(fd: int, target: str, arguments: tuple[str, ...]) -> None:
    """The nursery's own life: import, then fork at every order, until whoever gives the orders is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from atoll.engine.crossing import named, removed

    run: Callable[..., None] = named(target)
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
            elif what == b"f":
                child = os.fork()
                if not child:
                    children.clear()
                    control.close()
                    _live(run, fds[0], arguments)
                children.add(child)
                os.close(fds[0])
    finally:
        for child in children - _gone(children):
            os.kill(child, signal.SIGKILL)
        removed(arguments)


def _live(run: Callable[..., None], fd: int, arguments: tuple[str, ...]) -> None:
    """A worker's life, from which there is no way back into the nursery's."""
    code = 1
    try:
        run(Connection(fd), *arguments)
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _gone(children: set[int]) -> set[int]:
    """Those that have ended, reaped."""
    return {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
