"""Servers for benchmarks/net.py, each in a process of its own: atoll with and without its step, and bare TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from pathlib import Path
from typing import Any

import torch

from atoll.net import coordinator as events
from atoll.net import identity, wire
from atoll.net.client import own_versions
from atoll.net.coordinator import Coordinator, Limits
from atoll.net.engine import ServerEngine
from atoll.net.home import ServerHome
from atoll.net.loop import collect_rarely, run_loop
from atoll.net.rounds import RoundStore
from atoll.net.server import Listener
from atoll.net.spec import Server
from atoll.net.store import Accepted, RoundCommit
from atoll.training.experiment import Experiment
from atoll.training.serve import serve_run

RUN = "benchmark"
HOST = "127.0.0.1"


class Lag:
    """The delays of a callback that the loop of a server should call every 10 ms."""

    def __init__(self, net: Listener) -> None:
        self.seconds: list[float] = []
        self._net = net
        net._loop.call_soon_threadsafe(self._call, time.perf_counter())  # type: ignore[union-attr]

    def _call(self, due: float) -> None:
        now = time.perf_counter()
        self.seconds.append(now - due)
        self._net._loop.call_later(0.01, self._call, now + 0.01)  # type: ignore[union-attr]


def usage() -> dict[str, float]:
    """The CPU seconds of this process, and its present and highest memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"cpu": time.process_time(), "rss": found["VmRSS"], "peak": found["VmHWM"]}


def reset_peak() -> None:
    """Begin the highest memory again."""
    Path("/proc/self/clear_refs").write_text("5")


def transport(pipe: Any, home: Path, clients: int, down: int, up: int, window: int = 256 << 20) -> None:
    """A server without `step`: rounds of the coordinator, each committed. Commands: a number of rounds, stop."""
    collect_rarely()  # as `atoll serve` does
    at = ServerHome.open(home)
    epoch = at.database.begin_epoch(int(time.time()))
    coordinator = Coordinator(epoch, at.database.federation, own_versions(), Limits(window=window))
    net = Listener(at.path, at.database, at.authority, coordinator)
    pipe.send(net.start(*at.listen_address(None)))
    at.database.put("address", net.address)
    terms = net.offer(b"terms")
    last = at.database.last_round(RUN)
    net.handle(events.RunOpened(RUN, terms, True, False, None, at.database.recent(RUN)))
    round, present = (0 if last is None else last.round + 1), set()
    while (command := pipe.recv()) != "stop":
        seconds = []
        for _ in range(command):
            began = time.perf_counter()
            _round(net, at, round, clients, down, up, present)
            seconds.append(time.perf_counter() - began)
            round += 1
        while not net.inbox.empty():
            _present(net.inbox.get(), present)
        pipe.send({**usage(), "seconds": seconds, "present": len(present)})
    net.stop()
    at.close()


def _present(action: Any, present: set[int]) -> None:
    if isinstance(action, events.Present):
        present.add(action.client)
    elif isinstance(action, events.Gone):
        present.discard(action.client)


def _round(net: Listener, at: ServerHome, round: int, clients: int, down: int, up: int, present: set[int]) -> None:
    model = round.to_bytes(8, "big") + bytes(down - 8)
    version = wire.digest(model)
    field = model if down <= wire.MAX_INLINE else net.offer(model)
    key, lease, plan = wire.WireKey("0", ()), wire.Lease(0, 0), "Plan(Gradient(), Mean())"
    orders = []
    for client in range(clients):
        name = wire.work_id(RUN, "round", client, round, 0, plan, version)
        start, hashes = (round, round, 0), (version, version)
        work = wire.Work(name, "round", "train", *start, plan, key, "fused", *hashes, field, (), None, None, 0, None,
                         lease, None)  # fmt: skip
        orders.append(events.Assigned(client, work, up, up))
    net.handle(*orders)
    accepted = []
    while len(accepted) < clients:
        net.handle()  # from here on as `ServerEngine` does: one wake for the contributions, none for their receipts
        net.awaits = clients - len(accepted)
        arrived = [net.inbox.get()]
        while not net.inbox.empty():
            arrived.append(net.inbox.get())
        for action in arrived:
            _present(action, present)
            if isinstance(action, BaseException):
                raise action
        new = [action for action in arrived if isinstance(action, events.Deliver)]
        accepted += [Accepted(one.client, round, 0, one.work, None, one.digest, 1) for one in new]
        (net.post if up <= wire.MAX_INLINE else net.handle)(*(events.Folded(one.work) for one in new))
    net.awaits = 0
    state = bytes(4096)
    at.database.commit_round(RoundCommit(RUN, round, version, b"{}", state, (), tuple(accepted), {"round": round}))
    net.post(events.Committed(tuple(one.work for one in accepted)))
    net.keep_blobs({wire.digest(b"terms")})


def real(pipe: Any, home: Path, settings: dict[str, str], block: int, spec: dict[str, Any]) -> None:
    """`atoll serve`: it waits for a command after every `block` rounds. Commands: go, stop."""
    gathers: list[float] = []
    commits: list[float] = []
    moments: list[float] = []
    lag: list[Lag] = []
    counted = {"up": 0, "down": 0}  # bytes of messages since the last pause
    folded = [0]

    def timed(function: Any, into: list[float]) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                into.append(time.perf_counter() - began)

        return call

    def begin(engine: ServerEngine, *args: Any) -> None:
        lag.append(Lag(engine.net))
        lag[0].seconds.clear()
        original(engine, *args)

    def notify(facts: Any) -> None:
        if facts["event"] == "listening":
            pipe.send(facts["address"])
        elif facts["event"] == "present":
            folded[0] += 1
            pipe.send({"present": folded[0]})
        elif facts["event"] == "round":
            moments.append(time.perf_counter())
            counted["up"], counted["down"] = counted["up"] + facts["bytes_up"], counted["down"] + facts["bytes_down"]
            if (facts["round"] + 1) % block == 0:
                late = sorted(lag[0].seconds) or [0.0]
                pipe.send({**usage(), "gathers": list(gathers), "commits": list(commits), "moments": list(moments),
                           "lag": late[int(0.99 * (len(late) - 1))], "arrived": facts["arrived"],
                           "bytes": dict(counted)})  # fmt: skip
                counted.update(up=0, down=0)
                if pipe.recv() == "stop":
                    os._exit(0)
                reset_peak()
                lag[0].seconds.clear()
                moments.append(time.perf_counter())

    collect_rarely()  # as `atoll serve` does
    original = ServerEngine.begin
    ServerEngine.begin = begin  # type: ignore[method-assign]
    ServerEngine.gather = timed(ServerEngine.gather, gathers)  # type: ignore[method-assign]
    RoundStore.save = timed(RoundStore.save, commits)  # type: ignore[method-assign]
    torch.set_num_threads(1)
    experiment = Experiment().with_settings({"data": "digits", "report": "false", "evaluate_every": "0", **settings})
    serve_run(experiment, Server(str(home), drain=2.0, **spec), notify=notify)


def forward(pipe: Any, address: str) -> None:
    """Pass connections on to an address. The command count returns the bytes in each direction."""
    asyncio.run(_forward(pipe, address))


async def _forward(pipe: Any, address: str) -> None:
    count = {"up": 0, "down": 0}
    host, _, port = address.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 18):
                count[way] += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, ours, "up"), pump(theirs, writer, "down"))

    listener = await asyncio.start_server(joined, HOST, 0)
    pipe.send("{}:{}".format(*listener.sockets[0].getsockname()))
    while await asyncio.get_running_loop().run_in_executor(None, pipe.recv) == "count":
        pipe.send(dict(count))
    os._exit(0)


def echo(pipe: Any, folder: Path, down: int, up: int) -> None:
    """Bare asyncio TLS: in a round each client receives `down` bytes and answers `up`. Commands: a number, stop."""
    run_loop(_echo(pipe, folder, down, up))


async def _echo(pipe: Any, folder: Path, down: int, up: int) -> None:
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    ended = asyncio.Event()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams.append((reader, writer))
        await ended.wait()

    context = identity.server_context(folder / "server.pem", folder / "server.key", folder / "ca.pem")
    server = await asyncio.start_server(joined, HOST, 0, ssl=context, limit=1 << 20)
    pipe.send("{}:{}".format(*server.sockets[0].getsockname()))
    loop, frame, seconds = asyncio.get_running_loop(), bytes(down), []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame)
        await reader.readexactly(up)

    while (count := await loop.run_in_executor(None, pipe.recv)) != "stop":
        for _ in range(count):
            began = time.perf_counter()
            await asyncio.gather(*(one(*stream) for stream in streams))
            seconds.append(time.perf_counter() - began)
        pipe.send({**usage(), "seconds": seconds})
    ended.set()
    server.close()


def echo_client(pipe: Any, address: str, place: tuple[Path, Path, Path], down: int, up: int) -> None:
    """A client of `echo`. The command cpu returns its CPU seconds."""
    asyncio.run(_echo_client(pipe, address, place, down, up))


async def _echo_client(pipe: Any, address: str, place: tuple[Path, Path, Path], down: int, up: int) -> None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=identity.client_context(*place), limit=1 << 20)
    answer = bytes(up)
    task = asyncio.create_task(_answers(reader, writer, down, answer))
    while True:
        command = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        if command == "stop":
            task.cancel()
            return
        pipe.send(time.process_time())


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, down: int, answer: bytes) -> None:
    while True:
        await reader.readexactly(down)
        writer.write(answer)


def blocking(pipe: Any, folder: Path, clients: int, size: int) -> None:
    """Blocking TLS sockets, one thread a client: `size` bytes down and up. Commands: go, stop."""
    import socket
    import threading

    context = identity.server_context(folder / "server.pem", folder / "server.key", folder / "ca.pem")
    listener = socket.create_server((HOST, 0), backlog=clients)
    pipe.send("{}:{}".format(*listener.getsockname()))
    links = [context.wrap_socket(listener.accept()[0], server_side=True) for _ in range(clients)]
    data = bytes(size)

    def one(link: ssl.SSLSocket, buffer: memoryview) -> None:
        link.sendall(data)
        receive(link, buffer)

    buffers = [memoryview(bytearray(size)) for _ in links]
    while pipe.recv() == "go":
        before, began = time.process_time(), time.perf_counter()
        threads = [threading.Thread(target=one, args=both) for both in zip(links, buffers, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send({"seconds": time.perf_counter() - began, "cpu": time.process_time() - before})


def receive(link: ssl.SSLSocket, buffer: memoryview) -> None:
    """Fill the buffer from a socket."""
    at = 0
    while at < len(buffer):
        got = link.recv_into(buffer[at : at + (1 << 18)])
        if not got:
            raise ConnectionError("the peer has closed the connection")
        at += got


def blocking_clients(pipe: Any, address: str, places: list[tuple[Path, Path, Path]], size: int) -> None:
    """The clients of `blocking`. The command cpu returns their CPU seconds."""
    import socket
    import threading

    host, _, port = address.rpartition(":")

    def one(place: tuple[Path, Path, Path]) -> None:
        context = identity.client_context(*place)
        with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as link:
            buffer, data = memoryview(bytearray(size)), bytes(size)
            try:
                while True:
                    receive(link, buffer)
                    link.sendall(data)
            except (ConnectionError, OSError):
                return

    for place in places:
        threading.Thread(target=one, args=(place,), daemon=True).start()
    while pipe.recv() == "cpu":
        pipe.send(time.process_time())


def commit_cost(home: Path, size: int) -> float:
    """Seconds to write and sync a file of this size."""
    data = bytes(size)
    began = time.perf_counter()
    path = home / "plain"
    with path.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    spent = time.perf_counter() - began
    path.unlink()
    return spent
