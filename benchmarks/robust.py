"""The speed and the memory of robust rules by coordinate: GB of updates in a second of CPU time, on one core.

    python benchmarks/robust.py [--clients 100] [--parameters 1000000] [--limit-mb 64]

Two rows for each rule: all updates in memory, and beyond the limit in a file. Memory is that of the process without the
pages of files, above its memory before the round.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from atoll.compute import limits
from atoll.compute.native import library
from atoll.plan.aggregate import Median, RowRule, TrimmedMean
from atoll.plan.protocols import Contribution, Ids

AT_ONCE = 10  # clients in a contribution


def resident() -> float:
    """MB of memory that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def aggregate(rule: RowRule, parts: list[Tensor], clients: int) -> float:
    """Fold contributions and form the total; returns the largest memory in MB after a step."""
    partial, most = rule.zero(), 0.0
    for start in range(0, clients, AT_ONCE):
        ids = torch.arange(start, start + AT_ONCE)
        given = Contribution({"update": parts[start // AT_ONCE % 2]}, {}, torch.ones_like(ids), {}, {})
        partial = rule.fold(partial, given, Ids(ids, torch.zeros_like(ids)))
        most = max(most, resident())
    rule.total(partial)
    return max(most, resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=10**6)
    parser.add_argument("--limit-mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    library("ranks")
    parts = [torch.randn(AT_ONCE, given.parameters) for _ in range(2)]
    size = given.clients // AT_ONCE * parts[0].nbytes
    for rule in (Median(), TrimmedMean(0.2)):
        for limit in (2 * size, given.limit_mb << 20):
            limits.ROW_BYTES, seconds, most, before = limit, [], 0.0, resident()
            for _ in range(given.rounds):
                start = time.process_time()
                most = max(most, aggregate(rule, parts, given.clients))
                seconds.append(time.process_time() - start)
            rate = size / 1e9 / sorted(seconds)[len(seconds) // 2]
            place = "in memory" if limit > size else f"in a file beyond {given.limit_mb} MB"
            print(f"{rule!r:18}{place:26}{rate:.2f} GB/s{most - before:9.0f} MB of {size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
