"""Clients on the nodes of a Ray cluster: each actor computes chunks of clients and returns one sum a round.

The engine puts task and data into Ray's object store once, and the broadcast of a round once a round. Each node that
needs them fetches one copy, and all its actors read that copy. The objects that Ray transports are bytes, arrays,
numbers and names of code: a plan is sent as its text, a module as the name of its class and its tensors. Ray is
imported when an engine is built, not earlier.

Tests: tests/parity/test_ray.py, tests/parity/test_ray_alone.py.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, EngineChange, Line, Write
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.workers.actor import Actor
from atoll.engine.workers.messages import (
    Answer,
    BroadcastMessage,
    Ready,
    ResultsMessage,
    RunMessage,
    answers,
    encode,
)
from atoll.engine.workers.pool import WorkerConnection, WorkerDied
from atoll.engine.workers.resources import check_actor, check_installed
from atoll.engine.workers.scheduler import WorkerEngine, packed
from atoll.engine.workers.shared_memory import Arrays, Place, from_buffers, to_buffers

OLDEST = (2, 40)  # the oldest version of Ray that the engine supports
_REACH_S = 3.0  # seconds for a server to answer
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # the client preface of HTTP/2
_SETTINGS = 4  # the type of the first frame of an HTTP/2 server
_TINY = 1e-9  # tolerance for the rounding of fractions of a resource


class RayEngine(WorkerEngine):
    """An engine that runs clients in actors on a Ray cluster.

    If an actor dies, or its node, the engine starts another actor and repeats the work of which it has no result. The
    bits of a synchronous round do not change. If the program is already connected to Ray, the engine uses that
    connection and leaves it open. Otherwise the engine connects to a cluster, or starts one on this machine. `close`
    then disconnects and stops a cluster that the engine started.

    Args:
        task: the model, loss and metrics; its `numerics` select the backend. With `task` and `data` the engine is open
            at once; otherwise `open` receives them.
        data: the clients. An actor opens a memory-mapped file by its path, so every node must have that path.
        workers: the number of actors, ≥ 1; None: all that the cluster can place.
        chunk: the number of clients that are computed together, ≥ 1; None chooses it by the size of the model. It
            changes no bit.
        cpus: the number of cores of each actor, > 0; an actor uses max(1, ⌊cpus⌋) threads.
        gpus: the number of GPUs of each actor, ≥ 0: a fraction of one GPU or a whole number.
        device: the device of an actor: "auto", the actor's GPU if it has one and else the CPU; "cpu"; or "cuda".
        address: the cluster, "host:port", or "auto" for one on this machine; None: RAY_ADDRESS if that is set, else a
            new cluster on this machine.
        model: the name from which the model was built, a name or `module:factory`; None: it has no name.
        seed: the seed with which the model was built.
        patience_s: seconds to wait until an actor has a place and has started, counted only while no actor is working.
    Raises:
        UsageError: Ray is missing or too old; no cluster answers at the address, or one of another version; the cluster
            has too few resources; or an actor cannot import the model, the loss or the data set.
        RunError: Ray does not start on this machine.
    Example:
        >>> from atoll.testing.local import clients, problem
        >>> RayEngine(problem(), clients(), gpus=1.5)
        Traceback (most recent call last):
        atoll.base.errors.UsageError: gpus = 1.5.
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
        check_installed()
        check_actor(cpus, gpus, device)
        self.cpus, self.gpus = cpus, gpus
        self._wanted, self._address, self._device, self._patience_s = workers, address, device, patience_s
        self._made = model, seed
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Connect to the cluster and start the actors.

        Raises:
            UsageError: no cluster answers at the address; the cluster runs another version of Ray or Python; it has
                fewer cores or GPUs than the actors need; or the model, the loss or the data set cannot be imported by
                an actor.
            RunError: Ray does not start on this machine, or the actors have no place or do not start in time.
        """
        threads = max(1, int(self.cpus))
        setup, tensors = packed(task, data, *self._made, threads, None)
        ray = installed()
        end = _connected(self, ray, self._address)
        try:
            workers = _placed(ray, self._wanted, self.cpus, self.gpus)
            places, arrays = to_buffers(tensors)
            transport = _Actors(ray, self.cpus, self.gpus, self._patience_s, end)
            device = self._device if self.gpus else "cpu"
            transport.prepare(encode(structs.replace(setup, places=places, device=device)), arrays)
            # If a node fails, all its actors fail. Ray may place their replacements on the same node before it notices.
            self._ray = ray
            self._open(task, data, workers, threads, transport, max_failed_starts=2 * workers + 2)
            self._ready()  # a run without a place ends before its folder is created
        except BaseException:
            self.close()
            end()
            raise

    def _ready(self) -> None:
        if not self._ray.is_initialized():  # the program called ray.shutdown(): no actor can be reached
            self.close()
        super()._ready()


# the actors


class _Actors:
    """Actors on a cluster, and the objects that they read. Each object is put once for all actors.

    Args:
        ray: the library.
        cpus, gpus: resources of each actor.
        patience_s: seconds to wait until Ray places an actor, counted only while no actor is working.
        end: closes the connection to the cluster.
    """

    def __init__(self, ray: Any, cpus: float, gpus: float, patience_s: float, end: weakref.finalize[Any, Any]) -> None:
        self.ray, self._patience_s, self._end = ray, patience_s, end
        self._kind = ray.remote(Actor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._published: dict[int, Any] = {}
        self._last_answer = time.monotonic()
        self._first: tuple[Any, ...] = ()

    def prepare(self, order: bytes, arrays: Arrays) -> None:
        """Put the first message to every actor: task and data."""
        self._first = order, self.ray.put(arrays), [os.path.abspath(path) for path in sys.path]

    def start_worker(self) -> _Call:
        self._last_answer = time.monotonic()
        return _Call(self.ray, self._kind.remote(), self._first, self._published)

    def wait(self, connections: Sequence[WorkerConnection], timeout: float | None) -> Sequence[WorkerConnection]:
        calls = {c.due[0]: c for c in connections if isinstance(c, _Call) and c.due}
        if any(call.ready for call in calls.values()):
            answered, _ = self.ray.wait(list(calls), timeout=timeout)
        else:
            left = max(0.0, self._last_answer + self._patience_s - time.monotonic())
            answered, _ = self.ray.wait(list(calls), timeout=left if timeout is None else min(left, timeout))
            if not answered and (timeout is None or left <= timeout):
                raise self._late(list(calls.values()), len(connections))
        if answered:
            self._last_answer = time.monotonic()
        return [calls[due] for due in answered]

    def _late(self, waiting: Sequence[_Call], count: int) -> RunError:
        """The error for actors that have not started: they have no place, or they have one and are still starting."""
        patience = f"{self._patience_s:g} s"
        placed, _ = self.ray.wait([call.placed for call in waiting], num_returns=len(waiting), timeout=0)
        if len(placed) == len(waiting):
            longer = 10 * self._patience_s
            return RunError(
                f"{len(waiting)} of {count} actors have a place, and did not start within {patience}.",
                "nodes that load the code, the task and the data within this time.",
                "an actor imports torch and receives the task and the data.",
                EngineChange(f"Ray(patience_s={longer:g})", "patience_s", longer),
            )
        there = count - len(waiting) + len(placed)
        return RunError(
            f"{len(waiting) - len(placed)} of {count} actors waited {patience} for a place.",
            "nodes with free cores and GPUs.",
            "the cluster's resources are in use, or nodes have left.",
            EngineChange(f"Ray(workers={there})", "workers", there) if there else "ray status",
        )

    def publish(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[str, list[Place]]:
        places, arrays = to_buffers(tensors)
        self._published[number] = self.ray.put(arrays)
        return "", places

    def unpublish(self, number: int) -> None:
        del self._published[number]

    def close(self) -> None:
        self._published.clear()
        self._first = ()
        self._end()


class _Call:
    """An actor, and the futures of the answers that it owes."""

    def __init__(self, ray: Any, actor: Any, first: tuple[Any, ...], published: Mapping[int, Any]) -> None:
        self._ray, self._actor, self._published = ray, actor, published
        self.ready = False
        self.placed = actor.placed.remote()
        self.due: deque[Any] = deque([actor.setup.remote(*first)])

    def send(self, broadcast: BroadcastMessage | None, run: RunMessage, rows: Mapping[str, Tensor] | None) -> None:
        arrays: Arrays = []
        if rows is not None:
            places, arrays = to_buffers(rows)
            run = structs.replace(run, rows=("", places))
        news = (None, None) if broadcast is None else (encode(broadcast), self._published[broadcast.number])
        self.due.append(self._actor.run.remote(encode(run), arrays, *news))

    def receive(self) -> tuple[Answer, Mapping[str, Tensor]]:
        try:
            answer_bytes, arrays = self._ray.get(self.due.popleft())
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(str(error).strip()) from error
        answer = answers.decode(answer_bytes)
        self.ready |= isinstance(answer, Ready)
        return answer, from_buffers(answer.places, arrays) if isinstance(answer, ResultsMessage) else {}

    def close(self) -> None:
        self.due.clear()
        if self._ray.is_initialized():
            self._ray.kill(self._actor)


# the cluster


def installed() -> Any:
    """Import Ray, with its usage statistics turned off.

    Returns:
        The module `ray`.
    Raises:
        UsageError: Ray is not installed, or it is too old.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # suppresses a warning about a future default
    oldest = ".".join(map(str, OLDEST))
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "Ray is not installed.",
            f"Ray {oldest} or newer.",
            "the engine `ray` runs clients in Ray actors.",
            "pip install 'atoll[ray]'",
        ) from error
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        raise UsageError(
            f"Ray {ray.__version__} is installed.",
            f"Ray {oldest} or newer.",
            "an older Ray lacks functions that the engine calls.",
            f"pip install 'ray>={oldest}'",
        )
    return ray


def _connected(engine: object, ray: Any, address: str | None) -> weakref.finalize[Any, Any]:
    """Connect to Ray if the program is not connected. The returned finalizer disconnects, at exit at the latest."""
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", "local", there) and _resolved(str(address)) != _resolved(there):
            raise UsageError(
                f"address = {address!r}, but this program is connected to Ray at {there}.",
                "the cluster to which the program is connected.",
                "a program has at most one connection to Ray.",
                Line(python="ray.shutdown()"),
            )
        return weakref.finalize(engine, _left, None, None)
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    folder: str | None = None
    if address == "local":
        # Logs and sockets are removed with the cluster, unless the user named a folder for them.
        if "RAY_TMPDIR" not in os.environ:
            folder = options["_temp_dir"] = tempfile.mkdtemp(prefix="atoll-ray-")
    else:
        _reach(address)
    end = weakref.finalize(engine, _left, ray, folder)
    try:
        ray.init(address=address, **options)
    except BaseException as error:
        end()
        if isinstance(error, Exception):
            raise _refused(ray, address, error) from error
        raise
    return end


def _left(ray: Any, folder: str | None) -> None:
    """Disconnect. A cluster that this connection started ends with it."""
    if ray is not None:
        ray.shutdown()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _refused(ray: Any, address: str, error: Exception) -> UsageError | RunError:
    """An error in four parts for a failed connection or start of Ray."""
    if address == "local":
        return RunError(
            f"Ray did not start on this machine: {' '.join(str(error).split())}",
            "a machine on which each process of Ray starts within 15 s.",
            "Ray gives up after that time. An overloaded machine may need longer.",
            Change("engine", "processes"),
        )
    if "mismatch" in str(error).lower():
        message = " ".join(str(error).split())
        (wanted,) = [w for w in message.partition("started with: Ray: ")[2].split()[:1]] or [ray.__version__]
        return UsageError(
            f"The cluster at {address} is of another version: {message.rstrip('.')}.",
            "the same versions of Ray and Python in this program and on the cluster.",
            "the format of their messages depends on both versions.",
            f"pip install ray=={wanted}" if wanted != ray.__version__ else Change("engine", "processes"),
        )
    return UsageError(
        f"Ray at {address}: {' '.join(str(error).split())}",
        "the address of a running cluster.",
        "actors run on the nodes of a cluster.",
        "ray start --head" if address == "auto" else EngineChange("Ray('auto')", "address", "auto"),
    )


def _reach(address: str) -> None:
    """Refuse an address at which no cluster answers. Ray itself would wait for minutes and then exit the program.

    Raises:
        UsageError: the address is malformed, or no cluster answers within 3 s.
    """
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        address = os.environ.get("RAY_ADDRESS") or (known.read_text() if known.is_file() else address)
        if address == "auto":
            return  # Ray searches the processes of this machine, and reports at once if there is no cluster
    host, _, port = address.strip().rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UsageError(
            f"address = {address!r}.",
            "host:port, as `ray start --head` prints it, or auto.",
            "the engine connects to actors directly, not through a proxy.",
            EngineChange("Ray('127.0.0.1:6379')", "address", "127.0.0.1:6379"),
        )
    trouble = ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH_S) as server:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                server.settimeout(_REACH_S)
                server.sendall(_HELLO)
                frame = server.recv(9)
                trouble = "" if frame[3:4] == bytes((_SETTINGS,)) else "the server there is not a Ray head node"
    except (OSError, OverflowError) as error:
        trouble = str(error)
    if trouble:
        raise UsageError(
            f"No Ray cluster answers at {address}: {trouble}.",
            "the address of a cluster's head node.",
            "the engine runs clients on the nodes of that cluster.",
            "ray start --head --port 6379",
        )


def _resolved(address: str) -> tuple[str, str]:
    """Host and port of an address. The host is an IP address if the name can be resolved."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)
    return host, port


def _placed(ray: Any, workers: int | None, cpus: float, gpus: float) -> int:
    """The number of actors: `workers`, or all that the nodes can place.

    Raises:
        UsageError: the nodes cannot place them, even without other work on the cluster.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_room(node, cpus, gpus) for node in nodes)
    if 0 < (room if workers is None else workers) <= room:
        return room if workers is None else workers
    has = "; ".join(f"{node.get('CPU', 0.0):g} CPU, {node.get('GPU', 0.0):g} GPU" for node in nodes)
    if room:
        write: Write = EngineChange(f"Ray(workers={room}, cpus={cpus:g}, gpus={gpus:g})", "workers", room)
    elif any(_room(node, cpus, 0.0) for node in nodes):
        write = EngineChange(f"Ray(cpus={cpus:g})", "gpus", 0)
    else:
        write = EngineChange(f"Ray(gpus={gpus:g})", "cpus", 1)
    raise UsageError(
        f"{workers or 'Some'} actors with {cpus:g} CPU and {gpus:g} GPU each.",
        f"nodes with room for them. This cluster has {has or 'no node'}, which is room for {room}.",
        "Ray would wait forever for resources that no node has.",
        write,
    )


def _room(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """The number of actors that a node can place if it does no other work."""
    wanted = [("CPU", cpus), *([("GPU", gpus)] if gpus else [])]
    return min(int(node.get(name, 0.0) / each + _TINY) for name, each in wanted)
