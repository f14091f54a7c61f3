"""Clients on the nodes of a Ray cluster: actors that each compute chunks of clients, and hand over one sum a round.

Task and data are put into the cluster once, what a round's clients may know once a round; every node that asks for
them has them once, and its actors read them there. Across Ray go bytes, arrays, numbers and names of code: the plan as
its text, a module as the name of its class and its tensors. Ray is imported where an engine is made, and not before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs
from torch import Tensor

from atoll.data.clients import Clients
from atoll.engine import spec as specs
from atoll.engine.crew import Gone, Line
from atoll.engine.crossing import Arrays, Place, laid, lying
from atoll.engine.dealer import Dealer, packed
from atoll.engine.worker import (
    Answer,
    Done,
    Hauled,
    Ready,
    Run,
    Told,
    Worker,
    answers,
    broken,
    encode,
    flat,
    hauled,
    orders,
)
from atoll.errors import RunError, UsageError
from atoll.task import Task

OLDEST = (2, 40)  # of Ray, that this was written for
_REACH_S = 3.0  # for a server to answer at all
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # what HTTP/2 begins with
_SETTINGS = 4  # the kind of frame that its server answers with
_TINY = 1e-9  # of a fraction that is asked for


class RayEngine(Dealer):
    """An engine that runs clients in actors on a Ray cluster.

    An actor that dies, alone or with its node, is replaced, and what it had not handed over is computed again: no bit
    of a synchronous round changes. A program that is connected to Ray already uses that connection, and keeps it;
    otherwise the engine connects, or starts a cluster on this machine, and ends that when it is closed.

    Args:
        task: the model, loss and metrics; `task.numerics` names the backend. With `task` and `data` the engine is open
            at once; otherwise `open` passes them.
        data: the clients. Memory-mapped files are read by their names, which every node must be able to do.
        workers: how many actors; None: as many as the cluster has room for.
        chunk: clients computed together; None chooses by the model's size. It changes no bit.
        cpus: cores of each actor, > 0; it uses as many threads as they are whole.
        gpus: of each actor, a fraction of one or a whole number.
        device: what an actor computes on: "auto", the GPU that it is given where there is one and else the CPU; "cpu";
            or "cuda".
        address: of the cluster, "host:port", or "auto" for one on this machine; None: RAY_ADDRESS where that is set,
            else a cluster of the engine's own on this machine.
        model: the name that the model was made by, a name or `module:factory`, where it has one.
        seed: that it was made with.
        patience_s: seconds to wait for an actor to be placed while none is at work.
    Raises:
        UsageError: no Ray or too old a one, no cluster at the address or one of another version, less room than is
            asked for, or a model, loss or data set that an actor cannot import.
        RunError: Ray does not start on this machine.
    Example:
        >>> from atoll.testing.locals import clients, problem
        >>> RayEngine(problem(), clients(), gpus=1.5)
        Traceback (most recent call last):
        atoll.errors.UsageError: gpus = 1.5.
        Required: a fraction of one GPU, or an integer.   Why: Ray gives an actor a part of one GPU, or whole GPUs.
        Write: Ray(gpus=0.5)

    Reference: Moritz et al., Ray: A Distributed Framework for Emerging AI Applications, 2018.
    """

    def __init__(
        self,
        task: Task | None = None,
        data: Clients | None = None,
        workers: int | None = None,
        chunk: int | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        device: str = "auto",
        address: str | None = None,
        model: str | None = None,
        seed: int = 0,
        patience_s: float = 60.0,
    ) -> None:
        super().__init__(chunk)
        specs.Ray(address, workers=workers, cpus=cpus, gpus=gpus).check(specs.RunOptions(device=device))
        self.cpus, self.gpus = cpus, gpus
        self._wanted, self._address, self._device, self._patience_s = workers, address, device, patience_s
        self._made = model, seed
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Connect to the cluster and start the actors.

        Raises:
            UsageError: no cluster at the address or one of another version, less room than is asked for, or a model,
                loss or data set that an actor cannot import.
            RunError: Ray does not start on this machine.
        """
        threads = max(1, int(self.cpus))
        setup, tensors = packed(task, data, *self._made, threads, None)
        ray = installed()
        end = _connected(self, ray, self._address)
        try:
            workers = _placed(ray, self._wanted, self.cpus, self.gpus)
            places, arrays = laid(tensors)
            office = _Actors(ray, self.cpus, self.gpus, self._patience_s, end)
            device = self._device if self.gpus else "cpu"
            office.prepare(encode(structs.replace(setup, places=places, device=device)), arrays)
            # A node may be lost with all its actors, and those that replace them too, before it is known to be lost.
            self._open(task, data, workers, threads, office, stillborn=2 * workers + 2)
        except BaseException:
            end()
            raise
        self._ray = ray

    def _ready(self) -> None:
        if not self._ray.is_initialized():  # somebody ended the connection that all of it hangs on
            self.close()
        super()._ready()


class Actor:
    """A worker in a process of Ray's."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def setup(self, order: bytes, arrays: Arrays, paths: list[str]) -> tuple[bytes, Arrays]:
        """Take task and data; `paths` are where code lies that they name."""
        try:
            sys.path.extend(path for path in paths if path not in sys.path and os.path.exists(path))
            told: Any = orders.decode(order)
            with _found_here():
                self._worker = Worker(told, lying(told.places, arrays))
            return encode(Ready(os.getpid())), []
        except Exception as error:
            return encode(broken(error)), []

    def run(self, order: bytes, rows: Arrays, news: bytes | None, arrays: Arrays | None) -> tuple[bytes, Arrays]:
        """Compute some clients, after the news of what they may know; a haul where one is wanted."""
        try:
            if self._worker is None:
                raise RunError("An actor was given work before it was set up.")
            if news is not None and arrays is not None:
                told: Any = orders.decode(news)
                self._worker.tell(told, lying(told.places, arrays))
            run: Any = orders.decode(order)
            haul = self._worker.run(run, None if run.rows is None else lying(run.rows[1], rows))
            if haul is None:
                return encode(Done()), []
            places, out = laid(flat(haul))
            return encode(hauled(haul, "", places, self._worker.most)), out
        except Exception as error:
            return encode(broken(error)), []


@contextlib.contextmanager
def _found_here() -> Iterator[None]:
    """Say on which node something is missing that is there where the program runs."""
    try:
        yield
    except (ImportError, FileNotFoundError) as error:
        raise RunError(
            f"The node {socket.gethostname()} has not what the task needs: {error}.",
            "the same code and files on every node.",
            "an actor imports code by its name, and reads memory-mapped files by theirs.",
            "--engine processes",
        ) from error


# the actors


class _Actors:
    """Actors on a cluster, and what they may read, put once for all of them.

    Args:
        ray: the library.
        cpus, gpus: of each actor.
        patience_s: seconds to wait for one to be placed while none is at work.
        end: gives back the connection.
    """

    def __init__(self, ray: Any, cpus: float, gpus: float, patience_s: float, end: weakref.finalize[Any, Any]) -> None:
        self.ray, self._patience_s, self._end = ray, patience_s, end
        self._kind = ray.remote(Actor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._published: dict[int, Any] = {}
        self._heard = time.monotonic()
        self._first: tuple[Any, ...] = ()

    def prepare(self, order: bytes, arrays: Arrays) -> None:
        """Put what every actor is given first."""
        self._first = order, self.ray.put(arrays), [os.path.abspath(path) for path in sys.path]

    def hire(self) -> _Call:
        self._heard = time.monotonic()
        return _Call(self.ray, self._kind.remote(), self._first, self._published)

    def wait(self, lines: Sequence[Line], timeout: float | None) -> Sequence[Line]:
        calls = {line.due[0]: line for line in lines if isinstance(line, _Call) and line.due}
        if any(line.ready for line in calls.values()):
            heard, _ = self.ray.wait(list(calls), timeout=timeout)
        else:
            left = max(0.0, self._heard + self._patience_s - time.monotonic())
            heard, _ = self.ray.wait(list(calls), timeout=left if timeout is None else min(left, timeout))
            if not heard and (timeout is None or left <= timeout):
                placed = sum(line.ready for line in lines if isinstance(line, _Call))
                raise RunError(
                    f"{len(calls)} of {len(lines)} actors waited {self._patience_s:g} s for a place.",
                    "nodes with free cores and GPUs.",
                    "other work holds what the cluster has, or its nodes are gone.",
                    f"--workers {placed}" if placed else "ray status",
                )
        if heard:
            self._heard = time.monotonic()
        return [calls[due] for due in heard]

    def publish(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[str, list[Place]]:
        places, arrays = laid(tensors)
        self._published[number] = self.ray.put(arrays)
        return "", places

    def withdraw(self, number: int) -> None:
        del self._published[number]

    def close(self) -> None:
        self._published.clear()
        self._first = ()
        self._end()


class _Call:
    """An actor, and its answers that are due."""

    def __init__(self, ray: Any, actor: Any, first: tuple[Any, ...], published: Mapping[int, Any]) -> None:
        self._ray, self._actor, self._published = ray, actor, published
        self.ready = False
        self.due: deque[Any] = deque([actor.setup.remote(*first)])

    def give(self, told: Told | None, run: Run, rows: Mapping[str, Tensor] | None) -> None:
        arrays: Arrays = []
        if rows is not None:
            places, arrays = laid(rows)
            run = structs.replace(run, rows=("", places))
        news = (None, None) if told is None else (encode(told), self._published[told.number])
        self.due.append(self._actor.run.remote(encode(run), arrays, *news))

    def hear(self) -> tuple[Answer, Mapping[str, Tensor]]:
        try:
            told, arrays = self._ray.get(self.due.popleft())
        except self._ray.exceptions.RayError as error:
            raise Gone(str(error).strip()) from error
        answer = answers.decode(told)
        self.ready |= isinstance(answer, Ready)
        return answer, lying(answer.places, arrays) if isinstance(answer, Hauled) else {}

    def close(self) -> None:
        self.due.clear()
        if self._ray.is_initialized():
            self._ray.kill(self._actor)


# the cluster


def installed() -> Any:
    """The library, imported; it counts nobody's use of it.

    Raises:
        UsageError: it is not installed, or too old.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of what it will do one day
    oldest = ".".join(map(str, OLDEST))
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "Ray is not installed.",
            f"Ray {oldest} or newer.",
            "the engine ray runs clients in its actors.",
            "pip install 'atoll[ray]'",
        ) from error
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        raise UsageError(
            f"Ray {ray.__version__} is installed.",
            f"Ray {oldest} or newer.",
            "older ones have not all that the engine calls.",
            f"pip install 'ray>={oldest}'",
        )
    return ray


def _connected(engine: object, ray: Any, address: str | None) -> weakref.finalize[Any, Any]:
    """Connect, where the program is not connected already; what is returned undoes it, at the latest at the end."""
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", "local", there) and _resolved(str(address)) != _resolved(there):
            raise UsageError(
                f"address = {address!r}, but this program is connected to Ray at {there}.",
                "one cluster a program.",
                "Ray connects a program once.",
                "ray.shutdown()",
            )
        return weakref.finalize(engine, _left, None, None)
    told: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    folder: str | None = None
    if address == "local":
        # Logs and sockets go with the cluster, but where somebody said where they shall lie.
        if "RAY_TMPDIR" not in os.environ:
            folder = told["_temp_dir"] = tempfile.mkdtemp(prefix="atoll-ray-")
    else:
        _reach(address)
    end = weakref.finalize(engine, _left, ray, folder)
    try:
        ray.init(address=address, **told)
    except BaseException as error:
        end()
        if isinstance(error, Exception):
            raise _refused(ray, address, error) from error
        raise
    return end


def _left(ray: Any, folder: str | None) -> None:
    """Disconnect, and end the cluster that was started, where there is one."""
    if ray is not None:
        ray.shutdown()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _refused(ray: Any, address: str, error: Exception) -> UsageError | RunError:
    """Why Ray could not be connected to or started, in our words."""
    if address == "local":
        return RunError(
            f"Ray did not start on this machine: {' '.join(str(error).split())}",
            "a machine on which its own processes start in time.",
            "each of them has 15 s, and an overloaded machine may need more.",
            "--engine processes",
        )
    if "mismatch" in str(error).lower():
        said = " ".join(str(error).split())
        (wanted,) = [w for w in said.partition("started with: Ray: ")[2].split()[:1]] or [ray.__version__]
        return UsageError(
            f"The cluster at {address} is of another version: {said.rstrip('.')}.",
            "the same Ray and the same Python here as there.",
            "they tell each other Python's objects in their own way.",
            f"pip install ray=={wanted}" if wanted != ray.__version__ else "--engine processes",
        )
    return UsageError(
        f"Ray at {address}: {' '.join(str(error).split())}",
        "a cluster that runs.",
        "actors need nodes to be on.",
        "ray start --head" if address == "auto" else "--address auto",
    )


def _reach(address: str) -> None:
    """Refuse an address where no cluster answers: Ray itself would wait for minutes, and then end the program.

    Raises:
        UsageError: why.
    """
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        address = os.environ.get("RAY_ADDRESS") or (known.read_text() if known.is_file() else address)
        if address == "auto":
            return  # it looks among the processes of this machine, and says at once that there is none
    host, _, port = address.strip().rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UsageError(
            f"address = {address!r}.",
            "host:port, as `ray start --head` prints it, or auto.",
            "actors are spoken with directly, and not through a proxy.",
            "--address 127.0.0.1:6379",
        )
    trouble = ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH_S) as server:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                server.settimeout(_REACH_S)
                server.sendall(_HELLO)
                frame = server.recv(9)
                trouble = "" if frame[3:4] == bytes((_SETTINGS,)) else "what answers there is something else"
    except (OSError, OverflowError) as error:
        trouble = str(error)
    if trouble:
        raise UsageError(
            f"No Ray cluster answers at {address}: {trouble}.",
            "the address of a cluster's head node.",
            "without it there is nowhere to run.",
            "ray start --head --port 6379",
        )


def _resolved(address: str) -> tuple[str, str]:
    """An address as numbers, where its name is known."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)
    return host, port


def _placed(ray: Any, workers: int | None, cpus: float, gpus: float) -> int:
    """How many actors there shall be: those asked for, or all that there is room for.

    Raises:
        UsageError: there is no room for them, whoever else is at work.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_room(node, cpus, gpus) for node in nodes)
    if 0 < (room if workers is None else workers) <= room:
        return room if workers is None else workers
    has = "; ".join(f"{node.get('CPU', 0.0):g} CPU, {node.get('GPU', 0.0):g} GPU" for node in nodes)
    if room:
        write = f"--workers {room}"
    elif any(_room(node, cpus, 0.0) for node in nodes):
        write = "--gpus 0"
    else:
        write = "--cpus 1"
    raise UsageError(
        f"{workers or 'Some'} actors of {cpus:g} CPU and {gpus:g} GPU each.",
        f"nodes that have room for them; this cluster has {has or 'none'}, which is room for {room}.",
        "Ray would wait for ever for what no node has.",
        write,
    )


def _room(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Actors that a node has room for, if nobody else is on it."""
    wanted = [("CPU", cpus), *([("GPU", gpus)] if gpus else [])]
    return min(int(node.get(name, 0.0) / each + _TINY) for name, each in wanted)
