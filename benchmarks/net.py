"""Costs of a server and its clients over mutual TLS on loopback, with comparisons by turns in one run.

    python benchmarks/net.py                    all workloads, about five minutes
    python benchmarks/net.py null bulk --quick  fewer rounds, clients and numbers
    python benchmarks/net.py null --flower ENV/bin/python     and Flower: an environment with flwr and NumPy

    null    rounds of ten client processes, each committed: without `step` (1,000 floats) and bare asyncio TLS frames
            of the same bytes, and `atoll serve` with ten `atoll join` (softmax, 650 floats) and bare echoes; with
            --flower also two clients of each, by turns
    envelope  the bytes of TCP connections of `atoll serve` and `atoll join`, and the counted bytes of their messages
    bulk    a model of 10 M floats and 4 clients: down, up, hash, check and fold and the same bytes over blocking TLS
            sockets, and the commit and a plain write and fsync of its bytes
    idle    1,000 connected clients: memory for each, CPU of the idle server, seconds until all are back after a restart
    ingest  1,000 updates of 100 KiB at once: updates in a CPU second of the server, received, and also checked and
            folded; then the memory for growing cohorts

Each server and each client process reports its own CPU time. Clients without training send prepared bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import net_servers as servers
from net_load import Load, enrol, serve_load

from atoll import models
from atoll.data import load
from atoll.net import identity
from atoll.net.home import ServerHome
from atoll.net.join import join_federation
from atoll.net.loop import collect_rarely

FORK = multiprocessing.get_context("fork")
MIB = 1 << 20
HEAD = 20  # the bytes of a message of `Gradient` before its update: its sums and the weight


SOFTMAX = {"model": "softmax", "recipe": "fedsgd(lr=0.1)", "plan.local": "Gradient(batch=10)", "numerics": "fused"}


class Child:
    """A function in a process of its own, and a pipe to it."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=function, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, command: Any) -> Any:
        """Send a command and wait for the answer."""
        self.pipe.send(command)
        return self.receive()

    def receive(self) -> Any:
        """The next answer."""
        if not self.pipe.poll(300):
            raise TimeoutError("a process of the benchmark has not answered within 300 s")
        return self.pipe.recv()

    def stop(self) -> None:
        """End the process."""
        self.pipe.send("stop")
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()


def show(name: str, value: str, bar: str = "") -> None:
    """Print one line of the table."""
    print(f"  {name:<58}{value:>22}   {bar}", flush=True)


def ms(seconds: Sequence[float], part: float = 0.5) -> float:
    """A quantile in milliseconds."""
    return 1e3 * sorted(seconds)[min(len(seconds) - 1, int(part * len(seconds)))]


def prepared(folder: Path, clients: int) -> tuple[Path, list[tuple[Path, Path, Path]]]:
    """A new home with enrolled clients, and a certificate for the bare servers in the folder."""
    home = folder / "server"
    at = ServerHome.open(home)
    key = identity.new_key()
    identity.write_key(folder / "server.key", key)
    made = at.authority.server(key, (servers.HOST,), datetime.now(UTC))
    (folder / "server.pem").write_bytes(identity.certificate_pem(made))
    (folder / "ca.pem").write_bytes((home / "ca.pem").read_bytes())
    at.close()
    return home, enrol(home, folder / "clients", clients)


def wait_for(load: Child, name: str, count: int, seconds: float = 120.0) -> float:
    """The seconds until this count of the load is reached."""
    began = time.perf_counter()
    while load.ask("status")[name] < count:
        if time.perf_counter() - began > seconds:
            raise TimeoutError(f"{name} has not reached {count}: {load.ask('status')}")
        time.sleep(0.02)
    return time.perf_counter() - began


# null


def null(folder: Path, quick: bool) -> None:
    """Rounds without training, and bare TLS echoes."""
    clients, block, blocks = 10, (20 if quick else 50), (2 if quick else 6)
    home, places = prepared(folder, clients)
    down, up = 4000, 4016
    server = Child(servers.transport, home, clients, down, up)
    address = server.receive()
    each = [Child(serve_load, lambda place=place: Load(address, [place], HEAD), up) for place in places]
    while server.ask(0)["present"] < clients:
        time.sleep(0.05)
    # Frames of the same bytes: a frame of work and of an update have about 300 and 100 bytes more than their bodies.
    bare, echoes = bare_echoes(folder, places, down + 300, up + 100)
    server.ask(10), bare.ask(10)
    ours, theirs, cpu = [], [], {"ours": [0.0, 0.0], "bare": [0.0, 0.0]}
    for _ in range(blocks):
        before = [server.ask(0)["cpu"], sum(c.ask("status")["cpu"] for c in each)]
        found = server.ask(block)
        ours += found["seconds"]
        after = [found["cpu"], sum(c.ask("status")["cpu"] for c in each)]
        cpu["ours"] = [t + a - b for t, a, b in zip(cpu["ours"], after, before, strict=True)]
        seconds, spent = echo_block(bare, echoes, block)
        theirs += seconds
        cpu["bare"] = [t + s for t, s in zip(cpu["bare"], spent, strict=True)]
    for child in (server, *each, bare, *echoes):
        child.stop()
    rounds = block * blocks
    print(f"null: {clients} client processes, 1,000 floats, {rounds} committed rounds without step")
    show("round, p50 and p99", f"{ms(ours):.2f} {ms(ours, 0.99):.2f} ms", "at most 5 and 25 ms")
    show("bare TLS echo, p50 and p99", f"{ms(theirs):.2f} {ms(theirs, 0.99):.2f} ms")
    show("CPU of a round, server and clients", "{:.2f} {:.2f} ms".format(*(1e3 * t / rounds for t in cpu["ours"])))
    show("CPU of a bare echo, server and clients", "{:.2f} {:.2f} ms".format(*(1e3 * t / rounds for t in cpu["bare"])))
    show("CPU of both sides, ratio", f"{sum(cpu['ours']) / sum(cpu['bare']):.2f}", "at most 3")


def bare_echoes(folder: Path, places: Sequence[Any], down: int, up: int) -> tuple[Child, list[Child]]:
    """A bare server and its connected client processes."""
    bare = Child(servers.echo, folder, down, up)
    address = bare.receive()
    echoes = [Child(servers.echo_client, address, place, down, up) for place in places]
    for child in echoes:
        child.ask("cpu")
    return bare, echoes


def echo_block(bare: Child, echoes: Sequence[Child], rounds: int) -> tuple[list[float], list[float]]:
    """Some bare rounds: their seconds, and the CPU seconds of server and clients."""
    before = [bare.ask(1)["cpu"], sum(c.ask("cpu") for c in echoes)]
    found = bare.ask(rounds)
    after = [found["cpu"], sum(c.ask("cpu") for c in echoes)]
    return found["seconds"][-rounds:], [a - b for a, b in zip(after, before, strict=True)]


def null_step(folder: Path, quick: bool) -> None:
    """`atoll serve` and ten `atoll join` with a real step."""
    clients, rounds, block = 10, (60 if quick else 300), (20 if quick else 50)
    server, joined = served(folder, clients, SOFTMAX | {"rounds": str(rounds)}, block)
    other = folder / "other"
    other.mkdir()
    _, places = prepared(other, clients)
    bare, echoes = bare_echoes(other, places, 2600, 2600)
    ours, theirs, cpu, seen = [], [], [], 0.0
    while len(ours) < rounds - rounds // block:
        found = next_round(server)
        ours += within(found["moments"], block)
        cpu.append((found["cpu"] - seen) / block)
        seconds, _ = echo_block(bare, echoes, block)
        theirs += seconds
        seen = found["cpu"]
        server.pipe.send("go" if len(ours) < rounds - rounds // block else "stop")
    for process in joined:
        process.kill()
    for child in (bare, *echoes):
        child.stop()
    server.process.join(20)
    print(f"null: {clients} processes of `atoll join`, softmax of 650 floats, {rounds} rounds of `atoll serve`")
    show("round, p50 and p99", f"{ms(ours):.2f} {ms(ours, 0.99):.2f} ms", "at most 15 and 60 ms")
    show("bare TLS echo of 2,600 bytes, p50", f"{ms(theirs):.2f} ms")
    show("round / bare echo, p50", f"{ms(ours) / ms(theirs):.2f}", "at most 8 on a loaded machine")
    spent = f"{1e3 * statistics.median(cpu[1:] or cpu):.2f} ms"
    show("CPU of the server for a round, median of blocks", spent, "at most 8 ms")


def null_flower(folder: Path, quick: bool, python: str) -> None:
    """Two `atoll join` and two SuperNodes of Flower, by turns. Flower has no TLS here and commits nothing to a disk."""
    clients, turns, block = 2, (2 if quick else 5), 20
    server, joined = served(folder, clients, SOFTMAX | {"rounds": str(block * (turns + 2))}, block)
    peer = Path(__file__).parent / "peers" / "flower_network_peer.py"
    (folder / "flower").mkdir()
    with Listener(str(folder / "link"), "AF_UNIX") as listener, (folder / "flower.log").open("w") as log:
        words = [python, peer, folder / "flower", folder / "link", str(clients), "650"]
        flower = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            link = connected(listener, flower, folder / "flower.log")
            link.recv()
            ours, theirs = [], []
            next_round(server)  # the connections and the processes of both are warm from here on
            link.send("go"), link.recv()
            for _ in range(turns):
                server.pipe.send("go")
                ours += within(next_round(server)["moments"], block)
                link.send("go")
                theirs.append(link.recv())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(flower.pid, signal.SIGKILL)
    server.pipe.send("stop")
    for process in joined:
        process.kill()
    server.process.join(20)
    print(f"null: {clients} clients of atoll and of Flower on loopback, 650 floats, by turns")
    show("round of `atoll serve` (TLS, step, commit), p50", f"{ms(ours):.2f} ms")
    show(f"round of Flower (no TLS, in memory), p50 of {turns}", f"{ms(theirs):.0f} ms")
    show("Flower / ours", f"{ms(theirs) / ms(ours):.0f}")


def connected(listener: Listener, peer: subprocess.Popen[bytes], log: Path) -> Connection:
    """The connection of a peer that has two minutes to start."""
    accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    threading.Thread(target=lambda: accepted.put(listener.accept()), daemon=True).start()
    for _ in range(240):
        with contextlib.suppress(queue.Empty):
            return accepted.get(timeout=0.5)
        if peer.poll() is not None:
            break
    raise RuntimeError(f"the peer has not started:\n{log.read_text()[-4000:]}")


def within(moments: Sequence[float], block: int) -> list[float]:
    """The seconds of the rounds of the last block, without the pause before it."""
    last = moments[len(moments) - block :]
    return [b - a for a, b in pairwise(last)]


def served(
    folder: Path,
    clients: int,
    settings: dict[str, str],
    block: int,
    through: Callable[[str], str] = str,
) -> tuple[Child, list[Any]]:
    """`atoll serve`, and a process of `atoll join` for each client, which dials the address through a function."""
    load("digits").split(clients)  # its libraries are loaded once, before the processes begin
    home = folder / "served"
    ServerHome.open(home).close()
    server = Child(servers.real, home, {"clients": str(clients), **settings}, block, {})
    address = through(server.receive())
    at = ServerHome.open(home, serve=False)
    tokens = [at.invite(f"site-{i}", address, None, 1).text() for i in range(clients)]
    at.close()
    joined = [
        FORK.Process(target=joins, args=(token, folder / f"site-{i}"), daemon=True) for i, token in enumerate(tokens)
    ]
    for process in joined:
        process.start()
    return server, joined


def joins(token: str, home: Path) -> None:
    """`atoll join` in a process."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    collect_rarely()  # as `atoll join` does
    join_federation(token, home, "digits", seat=True, once=True, own={"wide": models.factory("net_model:wide")})


# envelope


def envelope(folder: Path, quick: bool) -> None:
    """Messages of 100 KiB, and the bytes that cross the connections: TCP segments without their headers."""
    clients, rounds, block = 4, (10 if quick else 40), 5
    settings = SOFTMAX | {"model": wide(25_600, clients, 0)[0]["model"], "rounds": str(rounds + block)}
    forward: list[Child] = []

    def through(address: str) -> str:
        forward.append(Child(servers.forward, address))
        return str(forward[0].receive())

    server, joined = served(folder, clients, settings, block, through)
    counted, seen = {"up": 0, "down": 0}, 0
    next_round(server)
    began = forward[0].ask("count")
    while seen < rounds:
        server.pipe.send("go")
        found = next_round(server)
        counted = {way: counted[way] + found["bytes"][way] for way in counted}
        seen += block
    crossed = {way: n - began[way] for way, n in forward[0].ask("count").items()}
    server.pipe.send("stop")
    for process in joined:
        process.kill()
    forward[0].stop()
    server.process.join(20)
    print(f"envelope: {clients} clients, messages of 100 KiB, {rounds} rounds of `atoll serve`")
    for way in ("up", "down"):
        show(
            f"counted and crossed bytes of a message, {way}",
            f"{counted[way] / rounds / clients:,.0f} {crossed[way] / rounds / clients:,.0f}",
        )
        show(f"envelope and TLS, {way}", f"{100 * (crossed[way] / counted[way] - 1):.2f} %", "at most 3 %")


# bulk


def bulk(folder: Path, quick: bool) -> None:
    """Four clients and a large model, and blocking sockets."""
    clients, numbers, rounds = 4, (1_000_000 if quick else 10_000_000), (4 if quick else 6)
    home, places = prepared(folder, clients)
    settings, size = wide(numbers, clients, rounds)
    server = Child(servers.real, home, settings, 1, {})
    address = server.receive()
    load = Child(serve_load, lambda: Load(address, places, HEAD), size + HEAD)
    plain = Child(servers.blocking, folder, clients, size)
    sockets = Child(servers.blocking_clients, plain.receive(), places, size)
    before_clients = 0.0
    before_server = 0.0
    rows: list[list[float]] = []
    while len(rows) < rounds:
        found = server.receive()
        if "moments" not in found:
            continue
        cpu_clients = load.ask("status")["cpu"]
        ours = [found["gathers"][-1], found["cpu"] - before_server + cpu_clients - before_clients]
        theirs_before = sockets.ask("cpu")
        done = plain.ask("go")
        theirs = [done["seconds"], done["cpu"] + sockets.ask("cpu") - theirs_before]
        written = servers.commit_cost(home, size)
        rows.append([*ours, *theirs, found["commits"][-1], written, found["lag"], found["peak"]])
        before_server, before_clients = found["cpu"], load.ask("status")["cpu"]
        server.pipe.send("go" if len(rows) < rounds else "stop")
    for child in (load, sockets):
        child.stop()
    plain.pipe.send("end")
    server.process.join(20)
    columns = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    wall, cpu, bare_wall, bare_cpu, commit, written, lag, peak = columns
    print(f"bulk: {numbers:,} floats, {clients} clients, {rounds - 1} rounds")
    show("down, up, hash, check and fold", f"{wall:.3f} s")
    show("the same bytes over blocking TLS sockets", f"{bare_wall:.3f} s")
    show("ratio of wall time", f"{wall / bare_wall:.2f}", "at most 1.5")
    show("CPU of both sides, ours (with commit) and blocking", f"{cpu:.3f} {bare_cpu:.3f} s")
    show("ratio of CPU", f"{cpu / bare_cpu:.2f}", "at most 1.7")
    show("commit, and a plain write and fsync of θ", f"{commit:.3f} {written:.3f} s", "at most 1.3 x")
    show("lag of the event loop, p99", f"{1e3 * lag:.1f} ms", "at most 50 ms")
    show("highest memory of the server", f"{peak / MIB:.0f} MiB", f"a model has {size / MIB:.0f} MiB")


def wide(numbers: int, clients: int, rounds: int) -> tuple[dict[str, str], int]:
    """Settings for a model of about this many parameters, and the bytes of its θ."""
    hidden = max(1, (numbers - 10) // 75)
    os.environ["NET_HIDDEN"] = str(hidden)
    settings = {"clients": str(clients), "model": "net_model:wide", "recipe": "fedsgd(lr=0.1)", "numerics": "loop",
                "split": "IID()", "min_rows": "1",
                "plan.local": "Gradient(batch=10)", "rounds": str(rounds)}  # fmt: skip
    return settings, 4 * (hidden * 75 + 10)


# idle and ingest


def idle(folder: Path, quick: bool) -> None:
    """Connected clients that do nothing."""
    clients, seconds = (100 if quick else 1000), (3 if quick else 10)
    home, places = prepared(folder, clients)
    server = Child(servers.transport, home, clients, 4000, 4016)
    address = server.receive()
    empty = server.ask(0)["rss"]
    load = Child(serve_load, lambda: Load(address, places, HEAD), 4016)
    took = wait_for(load, "ready", clients)
    time.sleep(1)
    full = server.ask(0)
    time.sleep(seconds)
    later = server.ask(0)
    server.stop()
    again = Child(servers.transport, home, clients, 4000, 4016)
    again.receive()
    began = time.perf_counter()
    while again.ask(0)["present"] < clients:
        time.sleep(0.05)
    back = time.perf_counter() - began
    for child in (load, again):
        child.stop()
    print(f"idle: {clients} connected clients")
    show("memory of the server for each", f"{(full['rss'] - empty) / clients / 1024:.1f} KiB", "at most 64 KiB")
    show("CPU of the idle server", f"{100 * (later['cpu'] - full['cpu']) / seconds:.2f} %", "at most 5 % of a core")
    show("first connections", f"{took:.1f} s")
    show("all back after a restart of the server", f"{back:.1f} s", "at most 20 s")


def ingest(folder: Path, quick: bool) -> None:
    """Many updates at once, and the memory of growing cohorts."""
    clients, size, window = (100 if quick else 1000), 100 << 10, 64 * MIB
    received(folder / "transport", clients, size, window)
    folded(folder / "folded", clients, size, window)
    cohorts = (
        [(10, 100_000), (100, 100_000)]
        if quick
        else [(10, 1_000_000), (1000, 1_000_000), (4, 10_000_000), (40, 10_000_000)]
    )
    for count, numbers in cohorts:
        memory(folder / f"memory-{count}-{numbers}", count, numbers, window)


def received(folder: Path, clients: int, size: int, window: int) -> None:
    """Updates that are received and hashed."""
    folder.mkdir()
    home, places = prepared(folder, clients)
    server = Child(servers.transport, home, clients, size, size, window)
    address = server.receive()
    load = Child(serve_load, lambda: Load(address, places, HEAD), size)
    wait_for(load, "ready", clients)
    server.ask(1)  # the connections of uploads are open from here on
    load.ask("hold")
    server.pipe.send(1)
    wait_for(load, "working", clients)
    time.sleep(0.5)
    # The server is in its round and answers at its end, so its CPU is read from the system.
    before, rss = cpu_of(server.process.pid), rss_of(server.process.pid)
    began = time.perf_counter()
    load.ask("release")
    found = server.receive()
    wall, spent = time.perf_counter() - began, cpu_of(server.process.pid) - before
    time.sleep(1)  # the last answers are under way
    codes = load.ask("status")
    print(f"ingest: {clients} updates of 100 KiB at once, window {window // MIB} MiB, without step")
    show("received and hashed in a CPU second of the server", f"{clients / spent:.0f}", "at least 1,500")
    show("wall time", f"{wall:.2f} s")
    show("growth of the highest memory", f"{(found['peak'] - rss) / MIB:.0f} MiB", "at most the window")
    show("answers of the clients in two rounds", f"{codes['answered']}", f"{2 * clients}")
    for child in (load, server):
        child.stop()


def folded(folder: Path, clients: int, size: int, window: int) -> None:
    """Updates that are received, hashed, checked and folded by `atoll serve`."""
    folder.mkdir()
    home, places = prepared(folder, clients)
    settings, length = wide(size // 4, clients, 2)
    server = Child(servers.real, home, settings, 1, {"window": window})
    address = server.receive()
    load = Child(serve_load, lambda: Load(address, places, HEAD), length + HEAD)
    next_round(server)
    load.ask("hold")
    server.pipe.send("go")
    wait_for(load, "working", clients)
    time.sleep(0.5)
    before, rss = cpu_of(server.process.pid), rss_of(server.process.pid)
    load.ask("release")
    found = next_round(server)
    spent = cpu_of(server.process.pid) - before
    server.pipe.send("stop")
    show("received, hashed, checked and folded (with commit)", f"{clients / spent:.0f}", "at least 800")
    show("growth of the highest memory", f"{(found['peak'] - rss) / MIB:.0f} MiB")
    show("arrived", f"{found['arrived']}", f"{clients}")
    load.stop()
    server.process.join(20)


def memory(folder: Path, clients: int, numbers: int, window: int) -> None:
    """The highest memory of the server in the second round."""
    folder.mkdir()
    home, places = prepared(folder, clients)
    settings, length = wide(numbers, clients, 2)
    server = Child(servers.real, home, settings, 1, {"window": window})
    address = server.receive()
    empty = rss_of(server.process.pid)
    load = Child(serve_load, lambda: Load(address, places, HEAD), length + HEAD)
    next_round(server)
    server.pipe.send("go")
    found = next_round(server)
    server.pipe.send("stop")
    load.stop()
    server.process.join(20)
    size = length / MIB
    models = ((found["peak"] - empty) / MIB - window / MIB) / size
    name = f"memory, {clients} clients of {numbers:,} floats, window {window // MIB} MiB"
    show(name, f"{found['peak'] / MIB:.0f} MiB", f"{models:.1f} models + window above the empty server; at most 12")


def next_round(server: Child) -> Any:
    """The facts of the next committed round."""
    while "moments" not in (found := server.receive()):
        pass
    return found


def cpu_of(pid: int | None) -> float:
    """The CPU seconds of a process, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_of(pid: int | None) -> int:
    """The memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


WORKLOADS = {"null": (null, null_step), "envelope": (envelope,), "bulk": (bulk,), "idle": (idle,), "ingest": (ingest,)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; default: all")
    ask.add_argument("--quick", action="store_true", help="fewer rounds, clients and numbers")
    ask.add_argument("--flower", metavar="PYTHON", help="the Python of an environment with flwr, for `null`")
    given = ask.parse_args()
    unknown = set(given.workloads) - set(WORKLOADS)
    if unknown:
        ask.error(f"unknown workload {', '.join(sorted(unknown))}; one of {', '.join(WORKLOADS)}")
    for name in given.workloads or WORKLOADS:
        functions = list(WORKLOADS[name])
        if name == "null" and given.flower:
            functions.append(partial(null_flower, python=given.flower))
        for number, function in enumerate(functions):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder) / str(number)
                place.mkdir()
                function(place, given.quick)


if __name__ == "__main__":
    main()
