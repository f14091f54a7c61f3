"""What every rank does in tests/parity/test_torchrun.py: all cases one after the other, and what each came to.

torchrun --max-restarts 1 --nproc-per-node 2 ranks.py FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from atoll import data, recipes, rounds, train
from atoll.engine.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import Feedback, Quantize, Shift, TopK
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer import adam, adamw, sgd
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.sampler import Poisson

ROUNDS = 2


def norm():
    return nn.Sequential(nn.Linear(13, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


def plans():
    """Every recipe, and every part that has something to say between ranks: memory, server state, counters, facts."""
    quick = {"batch": 10, "cohort": 7}
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
        out[name] = getattr(recipes, name)(0.1, **quick)
    some = Train(sgd(0.1), epochs=1, batch=10)
    out |= {
        "one client": recipes.fedavg(0.1, cohort=1),
        "now and then nobody": Plan(Gradient(), Mean(over="expected"), sgd(0.1), cohort=Poisson(0.02)),
        "sum": Plan(Gradient(4), Sum(), sgd(0.001)),
        "memory": Plan(Train(adam(0.01), steps=2, batch=8, keep=("optimizer", "order")), Mean(), adam(0.01), 7),
        "error feedback": Plan(some, Mean(), cohort=7, codec=Feedback(TopK(0.1))),
        "shift": Plan(some, Mean(), codec=Shift(TopK(0.1))),
        "quantised": Plan(some, Mean(), cohort=7, codec=Quantize(8), downlink=TopK(0.2)),
        "over-selection": Plan(some, Mean(), adamw(0.01), cohort=6, pace=Sync(over_select=1.5)),
    }
    return out


def cases():
    """(name, model, plan, settings) of each case."""
    for name, plan in plans().items():
        yield name, "softmax", plan, {}
    for numerics in ("lanes", "loop"):
        yield f"batch norm, {numerics}", norm, plans()["memory"], {"numerics": numerics}
    fleet = Fleet(HalfNormal(), dropout=0.05)
    yield "fleet", "softmax", plans()["over-selection"], {"fleet": fleet}
    yield "chunk", "softmax", plans()["fedavg"], {"chunk": 2}


def clients():
    """The wines over 12 clients of uneven sizes."""
    return data.load("wine").split(12, data.Dirichlet(0.5))


def outcome(model, plan, clients, settings, **engine):
    """What a training comes to: a fingerprint a round, what was reported, and what clients keep."""
    torch.manual_seed(1)
    training = rounds(model, clients, plan, rounds=ROUNDS, **settings, **engine)
    reports = [r.to(seconds=0.0) for r in training]
    kept = training.memory.take(training.memory.touched())
    rows = {n: [float(t.double().sum()), float(t.double().square().sum())] for n, t in sorted(kept.items())}
    told = [
        [
            r.fingerprint,
            r.metrics,
            r.failures,
            r.bytes_up,
            r.bytes_down,
            r.now,
            {n: c.tolist() for n, c in r.clients.items()},
        ]
        for r in reports
    ]
    return json.loads(json.dumps([told, training.memory.touched().tolist(), rows]))


def descends(model, loader, ctx):
    """A user's own loop; the second rank dies in it, once, in round 3."""
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ["RANK"] == "1" and ctx.round == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    for x, y in loader:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= ctx.lr * p.grad


KILLED = Plan(Custom(descends, batch=8, lr=0.1), Mean(), sgd(1.0, momentum=0.5), cohort=6)


def main(folder):
    from atoll.engine.ranks import Ranks

    run = train("mlp", clients(), KILLED, rounds=6, out=folder / "runs", checkpoint_s=0.0, engine="torchrun")
    torch.manual_seed(Ranks.join().rank)  # a model made here is another at each rank: that of rank 0 is everybody's
    theirs = train(norm(), clients(), recipes.fedavg(0.1), rounds=1, out=None, engine="torchrun")
    here, out = clients(), {}
    for name, model, plan, settings in cases():
        out[name] = outcome(model, plan, here, settings, engine="torchrun")
    ranks = Ranks.join()
    out["run"] = {"path": run.path and run.path.name, "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"]}
    out["one model"] = theirs.reports[-1].fingerprint
    (folder / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
