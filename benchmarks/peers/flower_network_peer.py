"""A null round of Flower on loopback for benchmarks/net.py: a SuperLink and SuperNodes, without TLS.

    ENV/bin/python benchmarks/peers/flower_network_peer.py FOLDER SOCKET CLIENTS NUMBERS

This process starts the federation and submits this file as an app. Its ServerApp connects to SOCKET (Unix), sends the
number of connected nodes, and answers each request with the seconds of one round: NUMBERS float32 down to each client,
and back. Nothing leaves this machine: no telemetry, no search for updates, and no installation of packages.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()  # `flwr run` searches the text of this file for assignments to one name
server = ServerApp()

PROJECT = """
[project]
name = "null"
version = "1.0.0"
description = "Null rounds"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "flower_network_peer:server"
clientapp = "flower_network_peer:client"

[tool.flwr.app.config]
socket = ""
clients = 2
numbers = 650
"""


@client.train()
def train(message: Message, context: Context) -> Message:
    """Return the arrays of the message."""
    return Message(content=RecordDict({"arrays": message.content["arrays"]}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Make a round for each request."""
    given = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(given["clients"]):
        time.sleep(0.1)
    model = np.zeros(int(given["numbers"]), np.float32)
    with Client(str(given["socket"]), "AF_UNIX") as link:
        link.send(len(nodes))
        while link.recv() == "go":
            began = time.perf_counter()
            content = RecordDict({"arrays": ArrayRecord([model])})
            replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
            model = np.mean([reply.content["arrays"].to_numpy_ndarrays()[0] for reply in replies], axis=0)
            link.send(time.perf_counter() - began)


def free_port() -> int:
    """A port of loopback that no process uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(folder: Path, link: str, clients: int, numbers: int) -> None:
    """Start the federation and the run, and wait until the SuperLink ends."""
    app, home, programs = folder / "app", folder / "home", Path(sys.executable).parent
    app.mkdir(), home.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    shutil.copy(__file__, app)
    address = f"127.0.0.1:{free_port()}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "null"\n\n[superlink.null]\naddress = "{address}"\ninsecure = true\n'
    )
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(home)}
    env = {**os.environ, **quiet, "PATH": f"{programs}:{os.environ['PATH']}"}
    host, _, port = address.rpartition(":")
    link_words = ["--insecure", "--host", host, "--port", port, "--disable-runtime-dependency-installation"]
    superlink = subprocess.Popen([programs / "flower-superlink", *link_words], env=env)
    for _ in range(clients):
        words = ["--insecure", "--superlink", address, "--host", host, "--port", str(free_port())]
        subprocess.Popen([programs / "flower-supernode", *words], env=env)
    config = f'socket="{link}" clients={clients} numbers={numbers}'
    while subprocess.run([programs / "flwr", "run", app, "null", "--run-config", config], env=env).returncode:
        time.sleep(1)
    superlink.wait()


if __name__ == "__main__":
    start(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
