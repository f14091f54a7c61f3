"""A parameter server and four joined workers over TLS, one of them five times slower, with three waiting rules (paces).

    θ ← θ − lr · g        the server, when the pace closes a round
    gᵢ = ∇Jᵢ(θᵢ)          a worker, on its own rows, from the last θ that it received

Each worker is a process that joins with a token, as `atoll join` on another machine does. The server sends the plan as
text: a worker maps the name `Paced` to its own code. Only the duration of a gradient is simulated, because this machine
may have fewer cores than workers: a worker sleeps until 0.1 s, or 0.5 s for the slow one, have passed since it began;
four times as long for the network.

Each pace runs twice, with the three fast workers and with all four, for linear regression and for a convolutional
network.

    python examples/parameter_server_hosts.py --seconds 8
"""

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import dataclass

import torch

import atoll
from atoll.data import IID
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Local

TIMES_S = {"linear": (0.1, 0.1, 0.1, 0.5), "cnn": (0.4, 0.4, 0.4, 2.0)}  # a gradient of each worker
WORKERS = 4
FAST = 3
PACES = (Sync(), Buffered(1), Bounded(5))


@dataclass(frozen=True, repr=False)
class Paced(Local):
    """The gradient of a batch, with a fixed duration for each worker.

    Args:
        times_s: seconds per gradient, by worker.
    """

    times_s: tuple[float, ...]

    def padded_batch(self, rows):
        return Gradient(batch=20).padded_batch(rows)

    def declare(self, task):
        return Gradient().declare(task)

    def contribute(self, broadcast, lanes, memory, key, task):
        began = time.perf_counter()
        out = Gradient(batch=20).contribute(broadcast, lanes, memory, key, task)
        due = began + sum(self.times_s[i] for i in lanes.ids.tolist())
        time.sleep(max(0.0, due - time.perf_counter()))
        return out


def worker(token: str, x, y, home: str) -> None:
    """One worker: the process that runs on the machine of the rows."""
    from parameter_server_hosts import Paced  # this file is `__main__` in a new process

    torch.set_num_threads(1)
    atoll.join(token, (x, y), home=home, own={"Paced": Paced})


def run(model: str, data, pace, workers: int, seconds: float) -> float:
    """Train for `seconds` after the first round. Returns the gradients of the fast workers in a second."""
    from parameter_server_hosts import Paced

    plan = Plan(Paced(TIMES_S[model]), Mean(), sgd(0.02), pace=pace)
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all workers
    context.set_forkserver_preload(["parameter_server_hosts", "atoll.net.join"])
    processes, first, fast, last = [], 0.0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "home": f"{folder}/server",
            "clients": workers,
            "held_out": 0,
            "rounds": 10**6,
            "report": False,
            "drain": 5,
        }
        with atoll.serve(model, data.described(), plan, numerics="loop", **given) as server:
            for client in range(workers):
                token = server.invite(f"worker-{client}")
                rows = data.take(data.client_rows(client))
                processes.append(context.Process(target=worker, args=(token, *rows, f"{folder}/{client}")))
                processes[-1].start()
            for report in server.rounds():
                last = time.perf_counter()
                if report.round:
                    fast += int((report.clients["id"] < FAST).sum())
                else:
                    first = last
                if last - first >= seconds:
                    break
        for process in processes:
            process.terminate()
            process.join()
    return fast / (last - first)


def regression():
    """Rows y = x·a + 1 + noise, divided evenly among four workers."""
    x, noise = atoll.Key(0).fold("rows").normal(4000 * 9).split([4000 * 8, 4000])
    x = x.reshape(4000, 8)
    y = x @ torch.linspace(-2, 2, 8, dtype=torch.float64) + 1 + noise
    return atoll.data.arrays(x, y, task="regression").split(WORKERS, IID(), held_out=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="A parameter server over TLS with one slow worker, under three paces.")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each training")
    parser.add_argument("--models", nargs="+", default=["linear", "cnn"], choices=["linear", "cnn"])
    given = parser.parse_args()
    digits = atoll.data.load("digits").split(WORKERS, IID(), held_out=0)
    print(f"{'model':10}{'pace':14}{'alone':>9}{'slowed':>9}{'kept':>8}    gradients of the fast workers a second")
    for model, data in [(m, regression() if m == "linear" else digits) for m in given.models]:
        for pace in PACES:
            alone = run(model, data, pace, FAST, given.seconds / 2)
            slowed = run(model, data, pace, WORKERS, given.seconds)
            print(f"{model:10}{pace!r:14}{alone:9.1f}{slowed:9.1f}{slowed / alone:8.0%}", flush=True)


if __name__ == "__main__":
    main()
