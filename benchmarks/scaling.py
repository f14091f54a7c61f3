"""Time and memory of a round as functions of the cohort, the model, the workers, and the registered clients.

    python benchmarks/scaling.py                     a table of each, some minutes
    python benchmarks/scaling.py --only cohort --out scaling.png

Every line is measured in a separate process, because a process does not return memory that it has used. Seconds per
round are the median of three after one warm-up round. Start is the time to build the training. Memory is the peak of
the process: in total, and above its memory before the first round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atoll

COHORTS = (10, 100, 1_000, 10_000)
WIDTHS = (16, 64, 256, 1024)
WORKERS = (1, 2)
REGISTERED = (1_000, 30_000, 1_000_000)


def peak() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measured(clients: int, rows: int, cohort: int, width: int, workers: int) -> dict[str, float]:
    """Measure the seconds of the start and of a round, and the peak memory in MB, total and above data and torch."""
    x, y = torch.rand(clients * rows, 64), torch.randint(10, (clients * rows,))
    source = atoll.data.arrays(x, y)
    plan = atoll.recipes.fedavg(0.05, batch=3, cohort=cohort)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    began = time.perf_counter()
    data = source.split(clients, held_out=0.0, min_rows=1)
    engine: dict[str, Any] = {} if workers == 1 else {"engine": "processes", "workers": workers}
    training = atoll.rounds(model, data, plan, rounds=10, evaluate_every=0, **engine)
    start, before, seconds = time.perf_counter() - began, peak(), []
    for _ in range(4):
        began = time.perf_counter()
        training.next()
        seconds.append(time.perf_counter() - began)
    return {
        "d": float(training.task.layout.d),
        "start": start,
        "round": statistics.median(seconds[1:]),
        "more": peak() - before,
        "peak": peak(),
    }


def apart(**setting: int) -> dict[str, float]:
    """Run `measured` in a separate process."""
    command = [sys.executable, __file__, "--setting", json.dumps(setting)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def tables(only: str | None) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Return the settings of each table, one per row."""
    usual = {"clients": 10_000, "rows": 6, "cohort": 1_000, "width": 64, "workers": 1}
    asked = {
        "cohort": [(n, usual | {"cohort": n}) for n in COHORTS],
        "width": [(n, usual | {"width": n}) for n in WIDTHS],
        "workers": [(n, usual | {"workers": n, "cohort": 10_000}) for n in WORKERS],
        "registered": [(n, usual | {"clients": n, "rows": 1, "cohort": 100}) for n in REGISTERED],
    }
    found = {}
    for name, settings in asked.items():
        if only in (None, name):
            print(f"{name:>12}{'d':>10}{'start [s]':>11}{'round [s]':>11}{'MB':>9}{'MB more':>9}")
            found[name] = []
            for n, setting in settings:
                row = apart(**setting)
                found[name].append((n, row))
                cells = f"{row['start']:11.3f}{row['round']:11.4f}{row['peak']:9.1f}{row['more']:9.1f}"
                print(f"{n:12,}{row['d']:10,.0f}{cells}", flush=True)
    return found


def drawn(found: dict[str, list[tuple[int, dict[str, float]]]], out: Path) -> None:
    """Draw seconds and memory of each table."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(3 * len(found), 5), layout="constrained", squeeze=False)
    for column, (name, rows) in enumerate(found.items()):
        sizes = [n for n, _ in rows]
        for line, (what, label) in enumerate((("round", "seconds a round"), ("peak", "MB"))):
            axes[line][column].plot(sizes, [row[what] for _, row in rows], "o-")
            axes[line][column].set(xscale="log", xlabel=name, ylabel=label, ylim=(0, None))
    figure.savefig(out, dpi=150)


def main() -> None:
    """Read the options, print the tables."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", choices=["cohort", "width", "workers", "registered"])
    ask.add_argument("--out", type=Path, help="file of the figure")
    ask.add_argument("--setting", help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.setting:
        print(json.dumps(measured(**json.loads(args.setting))))
        return
    found = tables(args.only)
    if args.out:
        drawn(found, args.out)


if __name__ == "__main__":
    main()
