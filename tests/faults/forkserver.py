"""Runs in child processes that can be killed at any point. Run as a program, this file is their fork server.

Importing torch and its lazily loaded modules takes longer than the run. So it is done once: the fork server trains each
plan itself, then forks a child for each order. A *point* is a moment just before or just after a change on disk. Points
are counted. An order names the point at which the child kills itself. `half` leaves half of the current write on disk.

    {"folder": ..., "plan": ..., "rounds": 6, "kill": 17, "half": true}  →  {"killed": true, "points": null}
"""

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace


class ForkServer:
    """The parent's handle of the fork server: one order, one answer."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def order(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def failpoints(kill, half):
    """Count the points of this process, and kill it at point `kill`. Return a function that gives the count."""
    from atoll.runs import folder as module

    seen = [0]

    def point(halve=lambda: None):
        seen[0] += 1
        if seen[0] == kill:
            if half:
                halve()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name):
        real = getattr(os, name)

        def call(*args, **words):
            def halve():
                if name == "replace":
                    with open(args[0], "r+b") as file:
                        file.truncate(os.path.getsize(args[0]) // 2)

            point(halve if name == "replace" and not os.path.islink(args[0]) else lambda: None)
            result = real(*args, **words)
            point()
            return result

        setattr(os, name, call)

    for name in ("fsync", "replace", "ftruncate", "unlink"):
        around(name)
    append = module.RunFolder._append

    def appending(folder, name, row):
        line = module._json(row)
        point(lambda: folder._open(name).write(line[: len(line) // 2]))
        append(folder, name, row)
        point()

    module.RunFolder._append = appending
    return lambda: seen[0]


def work(order, data):
    """Start the run of this folder, or resume it."""
    from atoll import runs, train
    from atoll.base.grammar import parse
    from atoll.plan.registry import PARTS
    from atoll.training import recorder

    if order.get("every"):
        ticks = iter(range(10**9))
        recorder.time = SimpleNamespace(monotonic=lambda: next(ticks))  # a checkpoint every `every` rounds
    seen = failpoints(order.get("kill"), order.get("half"))
    folder = Path(order["folder"])
    begun = runs.list_runs(folder)
    run = train(
        "softmax",
        data,
        parse(order["plan"], PARTS, trust=True),
        rounds=order["rounds"],
        out=folder,
        resume=begun[0] if begun else None,
        checkpoint_s=order.get("every", 0) - 0.5 if order.get("every") else 0,
        report=False,
        fleet=order.get("fleet"),
    )
    return {"points": seen(), "path": str(run.path)}


def child(order, data, answers):
    try:
        answer = work(order, data)
    except BaseException:
        answer = {"error": traceback.format_exc()}
    os.write(answers, json.dumps(answer).encode())
    os._exit(0)


def main():
    import atoll
    from atoll.base.grammar import parse
    from atoll.plan.registry import PARTS

    # A kill loses no page of the operating system, so no process here waits for the disk.
    os.fsync = lambda file: None
    data, known = atoll.data.load("digits").split(6, atoll.data.Dirichlet(0.5)), set()
    for line in sys.stdin:
        order = json.loads(line)
        if (
            order["plan"] not in known
        ):  # imports what this plan needs, and computes the ε of its rounds, for all children
            plan = parse(order["plan"], PARTS, trust=True)
            atoll.train("softmax", data, plan, rounds=min(order["rounds"], 6), out=None, report=False)
            known.add(order["plan"])
        answers, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            child(order, data, theirs)
        os.close(theirs)
        ready, _, _ = select.select([answers], [], [], order.get("seconds"))
        if not ready:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with open(answers, "rb") as pipe:
            answer = pipe.read()
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, **(json.loads(answer) if answer and not killed else {})}), flush=True)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # parts that a plan names as importable_parts:NAME
    main()
