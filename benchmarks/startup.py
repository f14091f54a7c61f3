"""Time until the end of the first round, compared with the time of the necessary imports and reads.

    python benchmarks/startup.py                     both tables, some minutes
    python benchmarks/startup.py --only run --times 9
    python benchmarks/startup.py --before ENV/bin/python --times 20      only the third table, with another version

run: a process that imports torch and reads Fashion-MNIST with gzip and numpy, compared with `atoll run` of the softmax
model with 1,000 clients, up to the first row in metrics.jsonl. registered: a process that imports torch and makes
arrays, compared with one that also makes one client of each row and trains a cohort of 100 for a round; and the time
of a later round. before: the CPU time and the peak memory of short programs, in this environment and in that of
another version of atoll, and the ratio after / before. Each time is that of a whole process, measured from its start.
The processes of a table take turns, so that other load on the machine affects all of them. The first turn warms up.
The tables print medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = "/usr/share/datasets/fashion-mnist"
READ = """
import gzip, sys, torch, numpy as np
for part in ("train", "t10k"):
    for name, head in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(f"{sys.argv[1]}/{part}-{name}-ubyte.gz") as file:
            np.frombuffer(file.read(), np.uint8)[head:].astype(np.float32)
"""
MODEL = ("--clients", "1000", "--model", "softmax", "--recipe", "fedavg(lr=0.05, batch=10, cohort=100)")
ARRAYS = """
import json, sys, time, torch
n = int(sys.argv[1])
x, y = torch.rand(n, 64), torch.randint(10, (n,))
"""
FIRST_ROUND = """
from torch import nn
import atoll
data = atoll.data.arrays(x, y).split(n, held_out=0.0, min_rows=1)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
plan = atoll.recipes.fedavg(0.05, batch=3, cohort=100)
training = atoll.rounds(model, data, plan, rounds=1000, evaluate_every=0)
training.next()
"""
PRINT_CPU = "print(json.dumps(time.process_time()), flush=True)\n"
LATER = """
seconds = []
for _ in range(15):
    began = time.perf_counter()
    training.next()
    seconds.append(time.perf_counter() - began)
print(json.dumps(sorted(seconds)[7]))
"""
REGISTERED = (1_000, 1_000_000)
COMMANDS = {
    "import atoll": ("-c", "import atoll"),
    "atoll --version": ("-m", "atoll", "--version"),
    "atoll --help": ("-m", "atoll", "--help"),
    "a first round": ("-c", ARRAYS + FIRST_ROUND, "1000"),
}


class Spent(NamedTuple):
    """Wall and CPU seconds of a process, seconds of a later round, and peak memory in MiB."""

    wall: float
    cpu: float
    later: float = 0.0
    peak: float = 0.0


def read(folder: str) -> Spent:
    """Run a process that imports torch and reads the data."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", READ, folder]) as process:
        return Spent(*_ended(process, began))


def run(folder: str) -> Spent:
    """Run `atoll run` up to the row of its first round, then stop it."""
    words = ("-m", "atoll", "run", "--data", "fashion_mnist", "--folder", folder, *MODEL, "--quiet")
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, *words, "--out", out]) as process:
            while not any(log.stat().st_size for log in Path(out).glob("*/metrics.jsonl")):
                if process.poll() is not None:
                    raise SystemExit("atoll run ended before its first round.")
                time.sleep(0.005)
            wall = time.perf_counter() - began
            process.kill()
            return Spent(wall, _ended(process, began, killed=True)[1])


def _ended(process: subprocess.Popen[bytes], began: float, killed: bool = False) -> tuple[float, float]:
    """Wait for a process. Return its wall and CPU seconds."""
    wall, used = _waited(process, began, killed)
    return wall, used.ru_utime + used.ru_stime


def _waited(
    process: subprocess.Popen[bytes], began: float, killed: bool = False
) -> tuple[float, resource.struct_rusage]:
    """Wait for a process. Return its wall seconds and resource usage."""
    _, status, used = os.wait4(process.pid, 0)
    wall, process.returncode = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
    if process.returncode and not killed:
        raise SystemExit(f"A process ended with {process.returncode}.")
    return wall, used


def command(python: str, words: Sequence[str]) -> Spent:
    """Run a process with the Python of an environment."""
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)  # it would hide the atoll of that environment
    began = time.perf_counter()
    with subprocess.Popen([python, *words], stdout=subprocess.DEVNULL, env=environment) as process:
        wall, used = _waited(process, began)
        return Spent(wall, used.ru_utime + used.ru_stime, peak=used.ru_maxrss / 1024)


def reported(code: str, rows: int) -> Spent:
    """Run a process that prints its CPU time at its end, and then the seconds of a later round if it measures them."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code, str(rows)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        cpu = process.stdout.readline()
        wall, rest = time.perf_counter() - began, process.stdout.read()
    if process.returncode:
        raise SystemExit(f"A process ended with {process.returncode}.")
    return Spent(wall, json.loads(cpu), json.loads(rest or "0"))


def turns(measurements: Mapping[str, Callable[[], Spent]], times: int) -> dict[str, Spent]:
    """Run the measurements in turns. Return the median of each."""
    found: dict[str, list[Spent]] = {name: [] for name in measurements}
    for turn in range(times + 1):
        for name, measure in measurements.items():
            spent = measure()
            if turn:
                found[name].append(spent)
    return {n: Spent(*map(statistics.median, zip(*rows, strict=True))) for n, rows in found.items()}


def first_round(folder: str, times: int) -> None:
    """Print the table of `atoll run`."""
    found = turns({"torch, and the data": lambda: read(folder), "atoll run": lambda: run(folder)}, times)
    floor, ours = found.values()
    print(f"{'up to the first round':>24}{'wall [s]':>11}{'CPU [s]':>11}")
    for name, spent in found.items():
        print(f"{name:>24}{spent.wall:11.3f}{spent.cpu:11.3f}")
    print(f"{'ratio':>24}{ours.wall / floor.wall:11.2f}{ours.cpu / floor.cpu:11.2f}", flush=True)


def registered(times: int) -> None:
    """Print the table of clients that are registered and not trained."""
    whole = ARRAYS + FIRST_ROUND + PRINT_CPU + LATER
    codes = {(n, what): code for n in REGISTERED for what, code in (("floor", ARRAYS + PRINT_CPU), ("whole", whole))}
    found = turns({f"{n} {what}": lambda n=n, c=c: reported(c, n) for (n, what), c in codes.items()}, times)  # type: ignore[misc]
    print(f"{'registered':>24}{'wall [s]':>11}{'CPU [s]':>11}{'beyond':>11}{'CPU beyond':>11}{'a round':>11}")
    for n in REGISTERED:
        floor, spent = found[f"{n} floor"], found[f"{n} whole"]
        more = f"{spent.wall - floor.wall:11.3f}{spent.cpu - floor.cpu:11.3f}"
        print(f"{n:24,}{spent.wall:11.3f}{spent.cpu:11.3f}{more}{spent.later:11.4f}", flush=True)


def versions(before: str, times: int) -> None:
    """Print the table of two versions."""
    pythons = {"before": before, "after": sys.executable}
    each = {f"{n} {when}": (python, words) for n, words in COMMANDS.items() for when, python in pythons.items()}
    found = turns({name: lambda it=it: command(*it) for name, it in each.items()}, times)  # type: ignore[misc]
    print(f"{'':>24}{'CPU [s]':>11}{'before':>11}{'ratio':>11}{'peak [MiB]':>11}{'before':>11}{'ratio':>11}")
    for name in COMMANDS:
        a, b = found[f"{name} after"], found[f"{name} before"]
        cpu = f"{a.cpu:11.3f}{b.cpu:11.3f}{a.cpu / b.cpu:11.3f}"
        print(f"{name:>24}{cpu}{a.peak:11.1f}{b.peak:11.1f}{a.peak / b.peak:11.3f}", flush=True)


def main() -> None:
    """Read the options and print the tables."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", choices=["run", "registered"])
    ask.add_argument("--times", type=int, default=5, help="turns, after one to warm up")
    ask.add_argument("--folder", default=FOLDER, help="of the gzipped files of Fashion-MNIST")
    ask.add_argument("--before", metavar="PYTHON", help="of an environment that has another version of atoll")
    asked = ask.parse_args()
    if asked.before:
        versions(asked.before, asked.times)
        return
    if asked.only in (None, "run"):
        first_round(asked.folder, asked.times)
    if asked.only in (None, "registered"):
        registered(asked.times)


if __name__ == "__main__":
    main()
