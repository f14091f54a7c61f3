"""The commands of "Two machines" in docs/deploy.md, on machines of their own: network namespaces with one user each.

    direct     server, oslo and rome share a network
    proxied    the server and the sites have no common network and no route; a proxy is in both

Each machine has its own network, its own `/etc/hosts` and its own folder. The commands are those of the page, with no
word changed.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from network import eventually
from proxy import __file__ as PROXY
from sites import experiment, write_tables

ROOT = Path(__file__).parents[2]
SITES = ("oslo", "rome")
LIMIT_S = 180  # from the first command to two connected sites
ADDRESSES = {
    "direct": {"server": ("10.77.1.1",), "oslo": ("10.77.1.2",), "rome": ("10.77.1.3",)},
    "proxied": {
        "server": ("10.77.1.1",),
        "proxy": ("10.77.1.4", "10.77.2.4"),
        "oslo": ("10.77.2.2",),
        "rome": ("10.77.2.3",),
    },
}


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass
class Started:
    """A process in a session of its own, and the file of its output."""

    output: Path
    process: subprocess.Popen | None = None

    def text(self):
        return self.output.read_text()

    def kill(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


class Hosts:
    """Machines that bridges connect: one bridge for each network 10.77.N.0/24. They end with their processes."""

    def __init__(self, folder, machines):
        self.folder, self.started = folder, []
        self.names = {name: f"atoll-{os.getpid()}-{name}" for name in (*machines, "switch")}
        self.machines = machines

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._connect()
            stack.pop_all()
        return self

    def __exit__(self, *_):
        self.close()

    def _connect(self):
        for name in self.names.values():
            ip("netns", "add", name)
        switch, bridges = self.names["switch"], set()
        for machine, addresses in self.machines.items():
            namespace = self.names[machine]
            ip("-n", namespace, "link", "set", "lo", "up")
            for number, address in enumerate(addresses):
                bridge = f"net{address.split('.')[2]}"
                if bridge not in bridges:
                    ip("-n", switch, "link", "add", bridge, "type", "bridge")
                    ip("-n", switch, "link", "set", bridge, "up")
                    bridges.add(bridge)
                port = f"{machine}{number}"
                ip("link", "add", f"eth{number}", "netns", namespace, "type", "veth", "peer", port, "netns", switch)
                ip("-n", switch, "link", "set", port, "master", bridge, "up")
                ip("-n", namespace, "addr", "add", f"{address}/24", "dev", f"eth{number}")
                ip("-n", namespace, "link", "set", f"eth{number}", "up")
            (self.folder / machine).mkdir(exist_ok=True)
            self.hosts(machine, {})

    def hosts(self, machine, known):
        """The names that a machine can resolve."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in known.items())]
        (self.folder / f"{machine}.hosts").write_text("\n".join(lines) + "\n")

    def start(self, machine, command, **env):
        """A line of a shell on a machine, in its folder. A user of the machine has installed `atoll`."""
        named = f'mount --bind "{self.folder / machine}.hosts" /etc/hosts\n'
        atoll = f'atoll() {{ {sys.executable} -m atoll "$@"; }}\n'
        words = ["ip", "netns", "exec", self.names[machine], "bash", "-c", f"set -eo pipefail\n{named}{atoll}{command}"]
        usual = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self.started.append(made := Started(self.folder / f"{machine}-{len(self.started)}.txt"))
        with made.output.open("w") as out:
            made.process = subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, cwd=self.folder / machine, start_new_session=True,
                env={**usual, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **env},
            )  # fmt: skip
        return made

    def run(self, machine, command, **env):
        """A line of a shell, to its end. Returns its output."""
        made = self.start(machine, command, **env)
        assert made.process.wait(LIMIT_S) == 0, f"{machine}: {command}\n{made.text()}"
        return made.text()

    def close(self):
        for made in self.started:
            made.kill()
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def permitted():
    """Skip where a process may not make namespaces."""
    name = f"atoll-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "exec", name, "mount", "--bind", "/dev/null", "/etc/hosts")
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "eth1")
    except (OSError, AssertionError) as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


def commands():
    """The five commands of the page: two of the server, two of a site, and the status."""
    section = (ROOT / "docs" / "deploy.md").read_text().partition("## Two machines\n")[2].partition("\n### ")[0]
    server, site = (block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL))
    status = re.search(r"fifth command[^`]*`([^`]*)`", section)[1]
    found = [*server, *site, status]
    assert len(found) == 5, found
    return found


def proxy_of_the_page():
    """The setting of a site behind a proxy, as the page has it."""
    found = re.search(r"`HTTPS_PROXY=(\S+) atoll join", (ROOT / "docs" / "deploy.md").read_text())
    return {"HTTPS_PROXY": found[1]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ADDRESSES)
def test_two_sites_are_connected_by_five_commands(tmp_path, permitted, way):
    invite, serve, check, join, status = commands()
    env = proxy_of_the_page() if way == "proxied" else {}
    with Hosts(tmp_path, ADDRESSES[way]) as it:
        tables(tmp_path)
        seen = {"server.example.org": "10.77.1.1"} if way == "direct" else {"proxy.example.org": "10.77.2.4"}
        for site in SITES:
            it.hosts(site, seen)
        proxy = None
        if way == "proxied":
            it.hosts("proxy", {"server.example.org": "10.77.1.1"})
            proxy = it.start("proxy", f"exec {sys.executable} {PROXY} 0.0.0.0:3128")
            no_route = it.run("oslo", "timeout 2 bash -c '</dev/tcp/10.77.1.1/4433' 2>&1 || true")
            assert "unreachable" in no_route, no_route
        began = time.monotonic()
        it.run("server", invite)
        server = it.start("server", serve)
        tokens = (tmp_path / "server" / "tokens").read_text().splitlines()
        for site, token in zip(SITES, tokens, strict=True):
            (tmp_path / site / "token").write_text(token + "\n")
            it.run(site, check, **env)
        sites = [it.start(site, join, **env) for site in SITES]
        shown = ""

        def connected():
            nonlocal shown
            shown = it.run("server", status)
            return all(re.search(rf"\b{site} +enrolled +\d+ +\w+", shown) for site in SITES)

        assert eventually(connected, LIMIT_S), shown
        took = time.monotonic() - began
        assert took <= LIMIT_S, f"{took:.0f} s until two sites were connected"
        print(f"{way}: two connected sites after {took:.0f} s\n{shown}")
        assert server.process.wait(LIMIT_S) == 0, server.text()
        assert "All checks passed." in it.run("server", "atoll verify --home federation")
        final = (tmp_path / "server" / "federation" / "runs" / "latest" / "model.safetensors").read_bytes()
        for site, made in zip(SITES, sites, strict=True):
            (kept,) = (tmp_path / site / "site" / "runs").glob("*/model.safetensors")
            assert kept.read_bytes() == final and made.process.poll() is None  # it waits for the next run
        if proxy is not None:
            asked = proxy.text().split()
            assert set(asked) == {"server.example.org:4433"} and len(asked) >= 6, proxy.text()


def tables(folder):
    """A table for each site, and for the server the input of a run on a pilot table."""
    write_tables(folder)
    for site, name in zip(SITES, ("north", "south"), strict=True):
        (folder / f"{name}.csv").rename(folder / site / "site.csv")
    pilot = {"data": folder / "west.csv", "target": "ill", "model": "softmax", "clients": 2, "rounds": 1}
    path = experiment(**pilot, report="false", out=folder / "pilot").train().path
    (path / "input.json").rename(folder / "server" / "input.json")
