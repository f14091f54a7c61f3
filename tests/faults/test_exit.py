"""Daemon threads that serve and join end before the interpreter that exits is gone."""

import atexit
import os
import subprocess
import sys
from pathlib import Path

import pytest
from network import eventually
from sites import Served, experiment, write_tables

from atoll.data import csv

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
