"""The program of each rank in tests/parity/test_torchrun.py: it runs all cases and writes their results.

torchrun --max-restarts 1 --nproc-per-node 2 ranks.py FOLDER [all] [exits]
python ranks.py FOLDER forked [zoo]
"""

import json
import os
import signal
import socket
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from importable_parts import Masked, masked, personal, remember
from problems import NO_NATIVE, classification, federation, run, seeded, task_of
from torch import nn

from atoll import recipes, train
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.ranks.process_group import ProcessGroup
from atoll.engine.ranks.torchrun import TorchrunEngine
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import EF21, Clip, ErrorFeedback, Noise, Quantize, TopK
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd, yogi
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.round import bind, open_round
from atoll.plan.sampler import Poisson
from atoll.runs.fingerprint import fingerprint

ROUNDS = 2


def plain():
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))


def norm():
    return nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


def plans():
    """Every recipe, and every part that ranks exchange data for: client memory, server state, counters, metrics."""
    out = {
        "gd": recipes.gd(0.1),
        "sgd": recipes.sgd(0.1),
        "distributed_gd": recipes.distributed_gd(0.1),
        "distributed_gd of a batch": recipes.distributed_gd(0.1, batch=4),
        "fedsgd": recipes.fedsgd(0.1, cohort=0.3),
        "local_sgd": recipes.local_sgd(0.1, steps=3, batch=8),
        "diloco": recipes.diloco(steps=3, batch=8),
    }
    for name in ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        out[name] = getattr(recipes, name)(0.1, batch=10, cohort=7)
    some = Train(sgd(0.1), epochs=1, batch=10)
    out |= {
        "one client": recipes.fedavg(0.1, cohort=1),
        "sometimes no client": Plan(Gradient(), Mean(over="expected"), sgd(0.1), cohort=Poisson(0.02)),
        "sum": Plan(Gradient(4), Sum(), sgd(0.001)),
        "memory": Plan(Train(yogi(0.01), steps=2, batch=8, keep=("optimizer", "order")), Mean(), yogi(0.01), 7),
        "memory of a loop": Plan(Custom(remember, batch=8, memory=personal), Mean(), cohort=7),
        "error feedback": Plan(some, Mean(), cohort=7, codec=ErrorFeedback(TopK(0.1))),
        "shift": Plan(some, Mean(), codec=EF21(TopK(0.1))),
        "quantised": Plan(some, Mean(), cohort=7, codec=Quantize(8), downlink=TopK(0.2)),
        "over-selection": Plan(some, Mean(), yogi(0.01), cohort=6, pace=Sync(over_select=1.5)),
    }
    return out


def cases():
    """Yield each case: name, module, numerics, plan, options of the engine."""
    for name, plan in plans().items():
        yield name, plain, "fused", plan, {}
    for numerics in ("loop", "lanes"):
        yield f"batch norm, {numerics}", norm, numerics, plans()["memory"], {}
    if not NO_NATIVE:
        yield "native code", plain, "compiled", plans()["fedavg"], {}
    fleet = Fleet(HalfNormal(), dropout=0.05)
    yield "fleet", plain, "fused", plans()["over-selection"], {"fleet": fleet}
    yield "chunk", plain, "fused", plans()["fedavg"], {"chunk": 2}


# Cases whose parts are in other quick cases too.
SIMILAR = {"sgd", "distributed_gd", "distributed_gd of a batch", "fedavg", "fedavgm", "fedadagrad"}
SIMILAR |= {"fedadam", "diloco"}  # they import `torch._dynamo` in every process, for seconds
SIMILAR |= {"local_sgd", "fedsgd", "one client a rank", "equal weights", "many rows", "local training"}


def quick():
    """The cases that do not import torch.func, without the similar ones."""
    return [case for case in cases() if case[2] != "lanes" and case[0] not in SIMILAR]


def clients():
    """Twelve clients of different sizes."""
    return classification((30, 2, 9, 21, 14, 5, 14, 3, 17, 40, 8, 11))


def outcome(module, numerics, plan, data, engine, **words):
    """The results of some rounds: the fingerprint of the model, the report of each round, and client memory."""
    engine = engine(task_of(seeded(module), data, numerics, torch.float32), data, **words)
    state, reports = run(plan, engine, ROUNDS)
    ids = state.memory.touched()
    kept = {n: [fingerprint(row.double()) for row in rows] for n, rows in state.memory.take(ids).items()}
    outcome_rows = [[r.metrics, r.failures, r.bytes_up, r.bytes_down, r.now] for r in reports]
    outcome_rows += [{n: c.tolist() for n, c in r.clients.items()} for r in reports]
    plan, *way = opened_again(plan, state, engine)
    first = engine.gather(plan, *way).arrived[:1].tolist()
    outcome_rows += [
        [one[:3], sorted(fingerprint(t) for t in one.decoded.means.values())]
        for one in engine.gather(plan, *way, keep=first).kept
    ]
    return json.loads(json.dumps([fingerprint(state.model.theta), outcome_rows, ids.tolist(), kept]))


def opened_again(plan, state, engine):
    """The next round, before its clients train."""
    opened = open_round(bind(plan, engine), state, engine)
    return opened.plan, *opened[:3]


class Unused(nn.Module):
    """A model of which half of the parameters have no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.never, self.last = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def broken(data):
    """The same clients; the third one has a row that is not finite."""
    x, y = data.rows.take(torch.arange(len(data.rows)))
    x[data.offsets[2]] = torch.nan
    return federation(x, y, data.sizes.tolist())


def float_cases():
    """Yield (name, module, plan, clients) of plans with the float sum, which is reduced during the backward pass."""
    descent = recipes.distributed_gd(0.1, sum="float")
    yield "one client a rank", plain, descent, classification((40, 24))
    yield "many clients", plain, Plan(Gradient(4), Sum(sum="float"), sgd(0.001)), clients()
    yield "equal weights", plain, Plan(Gradient(), Mean(weights="equal", sum="float"), adam(0.01), cohort=5), clients()
    yield "fewer clients than ranks", plain, descent, classification((40,))
    yield "expected", plain, Plan(Gradient(), Mean(over="expected", sum="float"), sgd(0.1), cohort=0.5), clients()
    yield "many rows", plain, descent, classification((30, 1500))
    yield "parameters in no pass", Unused, descent, clients()
    yield "a client fails", plain, descent, broken(clients())
    yield "batch norm", norm, descent, clients()
    yield "rows of two tensors", Masked, descent, masked(clients())
    yield "local training", plain, Plan(Train(sgd(0.1), epochs=1, batch=8), Mean(sum="float")), clients()


def quick_floats():
    """The cases of the float sum without the similar ones."""
    return [case for case in float_cases() if case[0] not in SIMILAR]


def floats(module, plan, data, engine):
    """The results of some rounds with the float sum: numbers, failures, and whether the backward pass reduced them."""
    engine = engine(task_of(seeded(module), data, "loop", torch.float32), data)
    state, reports = run(plan, engine, 3)
    outcome_rows = [[*r.failures, r.arrived, r.bytes_up, r.bytes_down, r.clients["id"].tolist()] for r in reports]
    losses = [r.metrics["loss"] for r in reports] + [loss for r in reports for loss in r.clients["loss"].tolist()]
    sent = "_overlap" in vars(engine) and bool(engine._overlap._sent)
    out = {"theta": state.model.theta.tolist(), "outcome_rows": outcome_rows, "losses": losses, "sent": sent}
    return json.loads(json.dumps(out))


def descends(model, loader, ctx):
    """A custom loop. In round 3 it kills the second rank once, if the argument `exits` is present."""
    first = "exits" in sys.argv and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ["RANK"] == "1" and ctx.round == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    for x, y in loader:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= ctx.lr * p.grad


SECURE = replace(recipes.fedavg(0.1), codec=Clip(1.0), aggregator=Mean("equal", secure=True))
KILLED = Plan(Custom(descends, batch=8, lr=0.1), Mean(), sgd(1.0, momentum=0.5), cohort=6)


def main(folder, cases):
    ranks, here = ProcessGroup.join(), clients()
    if "zoo" in sys.argv:
        found = zoo(partial(TorchrunEngine, ranks=ranks))
        (folder / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(found))
        return
    words = {"engine": "torchrun", "numerics": "loop"}
    ended = train("mlp", here, KILLED, rounds=6, out=folder / "runs", checkpoint_s=0.0, report=False, **words)
    torch.manual_seed(ranks.rank)  # each rank builds another model; the one of rank 0 is broadcast
    mine = train(norm(), here, recipes.fedavg(0.1), rounds=1, out=None, **words)
    noised = train("softmax", here, recipes.dp_fedavg(0.1, q=0.5), rounds=2, out=None, **words)
    local = replace(recipes.dp_fedavg(0.1, q=0.5), codec=Clip(0.5) >> Noise(2.0, by="client"))
    noised_by_clients = train("softmax", here, local, rounds=2, out=None, **words)
    masked_sum = train("softmax", here, SECURE, rounds=2, out=None, **words)
    runs = {"one model": mine, "noised": noised, "noised by clients": noised_by_clients, "secure": masked_sum}
    out = {name: run.reports[-1].fingerprint for name, run in runs.items()}
    out["run"] = {"path": ended.path and ended.path.name, "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"]}
    for name, module, numerics, plan, outcome_rows in cases:
        out[name] = outcome(module, numerics, plan, here, partial(TorchrunEngine, ranks=ranks), **outcome_rows)
    for name, module, plan, data in float_cases() if "all" in sys.argv else quick_floats():
        out[name] = floats(module, plan, data, partial(TorchrunEngine, ranks=ranks))
    (folder / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(out))


def zoo(engine):
    """For each code of a user: fingerprints of its tensors after two rounds, and θ after two float rounds."""
    from conformance.user_code import LR, MODULES, PLAN, data_of

    out, descent = {}, Plan(Gradient(), Mean(sum="float"), sgd(LR))
    warnings.simplefilter("ignore")
    for name, case in MODULES.items():
        if case.refused:
            continue
        data = data_of(case)
        task = choose(Task.of(case.make(), case.loss), data, PLAN).task
        state, _ = run(PLAN, engine(task, data), 2)
        tensors = [state.model.theta, state.model.buffers, *state.model.counters.values()]
        summed, _ = run(descent, engine(replace(task, numerics="loop"), data), 2)
        out[name] = [fingerprint(t.double()) for t in tensors], summed.model.theta.tolist()
    return out


def fork(ranks):
    """Fork this number of ranks, as torchrun does, and return in each. The parent process waits for them and exits."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outcome_rows = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    outcome_rows["TORCHELASTIC_RESTART_COUNT"] = 0
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                {name: str(value) for name, value in {**outcome_rows, "RANK": rank, "LOCAL_RANK": rank}.items()}
            )
            return
        pids.append(pid)
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))


if __name__ == "__main__":
    if "forked" in sys.argv:
        import_module("torch.fx.experimental.symbolic_shapes")  # by the first backward pass: here once for both ranks
        fork(2)
    main(Path(sys.argv[1]), list(cases()) if "all" in sys.argv else quick())
