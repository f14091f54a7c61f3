"""Real processes of a federation on loopback, for tests: a server and its clients, with kills and restarts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

TICK = threading.Event()  # nothing sets it: waiting for it lets the other threads of a test run


def eventually(holds, seconds=60.0):
    """Whether a condition of another thread or process holds within some seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        TICK.wait(0.02)
    return True


ATOLL = [sys.executable, "-m", "atoll"]
DEADLINE = 280.0
# The package, and parts of users that a site maps with `--part`.
PATHS = os.pathsep.join(str(Path(__file__).parents[1] / at) for at in ("src", "tests/conformance/foreign"))


class Process:
    """A command whose output is read in a thread, so that a test waits for a line with a deadline."""

    def __init__(self, *words, cwd, failpoint=None):
        env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
        if failpoint:
            env["ATOLL_FAILPOINT"] = failpoint
        self.lines, self._more = [], threading.Condition()
        self.errors = open(Path(cwd) / f"errors-{words[0]}-{id(self)}.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*ATOLL, *map(str, words)], stdout=subprocess.PIPE, stderr=self.errors, cwd=cwd, env=env, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._more:
                self.lines.append(json.loads(line))
                self._more.notify_all()
        with self._more:
            self.lines.append({"event": "eof"})
            self._more.notify_all()

    def wait_for(self, matches):
        """The first line that matches."""
        with self._more:
            found = self._more.wait_for(
                lambda: next((line for line in self.lines if matches(line) or line.get("event") == "eof"), None),
                DEADLINE,
            )
        assert found and matches(found), f"{found}\n{self.stderr()}"
        return found

    def after_round(self, number):
        return self.wait_for(lambda line: line.get("event") == "round" and line["round"] >= number)

    def stderr(self):
        self.errors.flush()
        return Path(self.errors.name).read_text()

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait(DEADLINE)

    def code(self):
        """The exit code."""
        self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return self.process.returncode

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(DEADLINE)
        self.process.stdout.close()
        self.errors.close()


class Federation:
    """A server with its home in a folder, and the clients that joined it."""

    def __init__(self, folder, *flags, clients=2):
        self.folder, self.flags, self.count = Path(folder), flags, clients
        self.home = self.folder / "server"
        self.processes, self.clients, self.tokens = [], {}, []
        self.server = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.close()

    def start(self, *words, failpoint=None):
        process = Process(*words, cwd=self.folder, failpoint=failpoint)
        self.processes.append(process)
        return process

    def serve(self, *flags, failpoint=None):
        """Start the server, or start it again, and wait until it listens."""
        given = self.flags if self.server is None else ()
        self.server = self.start("serve", *given, *flags, "--home", self.home, "--json", failpoint=failpoint)
        return self.server.wait_for(lambda line: line.get("event") == "listening")["address"]

    def invite(self):
        names = [f"site-{i}" for i in range(self.count)]
        out = self.run("invite", *names, "--home", self.home, "--json")
        self.tokens = [json.loads(line)["token"] for line in out.splitlines()]

    def join(self, client, *flags, token=True, failpoint=None, data=("digits", "--seat")):
        words = [self.tokens[client]] if token else []
        made = self.start(
            "join", *words, "--home", self.folder / f"site-{client}", "--data", *data, "--once", "--json",
            *flags, failpoint=failpoint,
        )  # fmt: skip
        self.clients[client] = made
        return made

    def run(self, *words, code=0):
        """Run a command to its end. Returns its stdout."""
        env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*ATOLL, *map(str, words)], capture_output=True, text=True, cwd=self.folder, env=env, timeout=DEADLINE
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    def path(self):
        return Path(self.server.lines[-2]["path"])


def rows_of(path):
    return [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]


def comparable(path):
    """The columns of a run that a network must reproduce to the bit."""
    names = ("round", "fingerprint", "arrived", "bytes_up", "bytes_down", "loss")
    return [[row[name] for name in names] for row in rows_of(path)]
