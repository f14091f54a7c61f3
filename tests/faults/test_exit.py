"""Daemon threads that serve and join end before the interpreter that exits is gone."""

import asyncio
import atexit
import gc
import os
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from network import eventually
from quick_cases import by_turns
from sites import Served, experiment, write_tables

from atoll.data import csv
from atoll.net import identity
from atoll.net.loop import run_loop

# The loop sleeps while the interpreter ends, and would wake up in the second in which the process lingers.
LOOP = """
import asyncio, ctypes, sys, threading
from atoll.net.loop import run_loop
begun = threading.Event()
async def wakes():
    begun.set()
    while True:
        await asyncio.sleep(0.3)
threading.Thread(target=run_loop, args=(wakes(),), daemon=True).start()
begun.wait()
libc = ctypes.CDLL(None)
libc.on_exit(libc.sleep, None)
sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on_exit is a function of glibc")
def test_the_event_loop_of_a_daemon_thread_ends_before_the_interpreter():
    """uvloop would call into the interpreter, and the process would end by SIGSEGV instead of its exit code."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", LOOP], env=env, timeout=60, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()


def test_an_exit_ends_a_server_and_its_sites_in_threads(tmp_path, monkeypatch):
    """A thread that runs torch while the interpreter ends would end the process by SIGABRT."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    write_tables(tmp_path)
    given = csv(tmp_path / "north.csv", target="ill").split(held_out=0).described()
    (tmp_path / "input.json").write_bytes(given.encode())
    settings = {"target": "ill", "model": "softmax", "recipe": "fedavg(lr=0.5, batch=10)", "report": "false"}
    it = experiment(**settings, held_out=0, rounds=100_000, clients=1)
    one = Served(tmp_path, it, schema=str(tmp_path / "input.json"))
    one.join("north", tmp_path / "north.csv")
    assert eventually(lambda: any(facts["event"] == "round" for facts in one.events["server"]))
    for call in reversed(at_exit):
        call()
    results = one.wait()
    assert results["north"] == 130 and results["server"].status == "interrupted"


def contexts(folder):
    """The TLS contexts of a server and of a client."""
    now, key = datetime.now(UTC), identity.new_key()
    authority = identity.Authority.new("test", now)
    paths = [folder / name for name in ("server.pem", "server.key", "ca.pem")]
    paths[0].write_bytes(identity.certificate_pem(authority.server(key, ["localhost"], now)))
    identity.write_key(paths[1], key)
    paths[2].write_bytes(identity.certificate_pem(authority.certificate))
    return identity.server_context(*paths), identity.client_context(None, None, paths[2])


@pytest.mark.parametrize(("side", "stage"), by_turns(["server", "client"], ["no handshake", "silent", "full"]))
def test_a_loop_closes_the_connections_of_a_silent_peer(tmp_path, side, stage):
    """The peer answers no handshake, or no end of a connection; or it reads nothing, so that the buffers are full."""
    at_server, at_client = contexts(tmp_path)
    listening = socket.create_server(("localhost", 0))
    outer = socket.create_connection(listening.getsockname())
    inner, _ = listening.accept()
    ours, peer = (inner, outer) if side == "server" else (outer, inner)
    ours.setblocking(False)

    def handshake():
        wrapped = (at_client if side == "server" else at_server).wrap_socket(
            peer, server_side=side == "client", server_hostname="localhost" if side == "server" else None
        )
        peers.append(wrapped)

    async def work():
        at = asyncio.get_running_loop()
        if side == "server":
            opening = at.connect_accepted_socket(asyncio.Protocol, sock=ours, ssl=at_server)
        else:
            opening = at.create_connection(asyncio.Protocol, sock=ours, ssl=at_client, server_hostname="localhost")
        if stage == "no handshake":
            tasks.append(asyncio.create_task(opening))
            await asyncio.wait(tasks, timeout=0)  # it begins
            return at
        transport, _ = await opening
        if stage == "full":
            transport.write(bytes(8 << 20))
        transport.close()
        return at

    peers, tasks = [peer], []
    thread = threading.Thread(target=handshake)
    if stage != "no handshake":
        thread.start()
    try:
        ended = run_loop(work())
        assert ended.is_closed() and ours.fileno() == -1
    finally:
        if stage != "no handshake":
            thread.join(30)
        for one in (listening, peer, *peers):
            one.close()
    gc.collect()  # the tests fail by the warning of a transport that is not closed


def test_the_end_of_a_loop_waits_for_its_connections_without_looking_again_and_again():
    waits = []

    async def leave_open(port):
        loop = asyncio.get_running_loop()
        link = socket.create_connection(("127.0.0.1", port))
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=link)
        loop.call_later(0.05, transport.close)  # in the time that a peer has
        for name in ("call_at", "call_later"):
            timer = getattr(loop, name)
            setattr(loop, name, lambda *args, timer=timer, **kwargs: waits.append(args) or timer(*args, **kwargs))
        return link

    with socket.create_server(("127.0.0.1", 0)) as listening:
        link = run_loop(leave_open(listening.getsockname()[1]))
    assert link.fileno() < 0 and len(waits) <= 3, len(waits)
