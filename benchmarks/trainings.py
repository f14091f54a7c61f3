"""The trainings that `bits.py` compares: it runs this program in each environment, once for each engine.

    ENV/bin/python benchmarks/trainings.py ENGINE OUT [quick|full|all] [ONLY]

A case is a recipe, a codec, a pace or another part of a plan. It trains 3 rounds of a small network on 480 digits,
split over 12 clients. The program appends a line of JSON to OUT for each case and numerics.

It runs with versions of atoll that have different names, so it uses public names only. A name that differs stands in
`RENAMED` or in `engine_settings`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn

import atoll

ROUNDS = 3
ROWS = 480
NUMERICS = ("loop", "lanes", "fused", "compiled")
ENGINES = {"inprocess": "InProcess", "processes": "Processes", "torchrun": "Torchrun", "ray": "Ray"}
SLOW_START = ("processes", "ray")
BY_ARRIVAL = ("processes", "ray")  # here an asynchronous round follows real arrivals, which no seed repeats
# The old text and the new text of a renamed part.
RENAMED = (
    ("Feedback(", "ErrorFeedback("),
    ("Shift(", "EF21("),
    ("staleness=polynomial(", "staleness=staleness_polynomial("),
)
FLEET = "Fleet(HalfNormal(per='flight'), uplink=LogNormal(1e5, 0.5), dropout=0.05, latency=0.01)"
TRAIN = "Train(sgd(0.1), epochs=1, batch=10)"
KEEPS = "Train(adam(0.01), steps=2, batch=8, keep=('optimizer', 'order'))"


# Cases are separated by "; " or by the end of a line.
RECIPES = """
gd(0.1); sgd(0.1, batch=16); distributed_gd(0.1); distributed_gd(0.1, batch=8, sum='float'); fedsgd(0.1, cohort=5)
fedavg(0.1, cohort=5); fedavgm(0.1, cohort=5); fedadam(0.1, cohort=5); fedyogi(0.1, cohort=5)
fedadagrad(0.1, cohort=5); local_sgd(0.1, steps=3, batch=8); post_local_sgd(0.1, switch=1, steps=3, batch=8)
diloco(steps=3, batch=8); fedbuff(0.1, cohort=1, k=1); fedasync(0.1, cohort=1)
"""
CODECS = """
Cast('bf16'); Cast('fp8'); Quantize(8); Quantize(levels=4, norm='l2'); Rotate() >> Quantize(4); Eden(2); Sign()
TopK(0.1); TopK(0.1) >> Quantize(8); RandomK(0.1); LowRank(2); Quantize(4) >> Entropy(); Feedback(TopK(0.1))
Feedback(Sign()); Feedback(LowRank(2)); Feedback(TopK(0.1) >> Cast('bf16')); Shift(TopK(0.1)); Shift(Quantize(4))
"""
OPTIMIZERS = "adam; adamw; adagrad; rmsprop; adadelta; adamax; nadam; radam; yogi"
# Arguments of Plan: samplers, aggregators, local parts, the downlink, and paces whose rounds do not overlap.
PARTS = f"""
{TRAIN}, Mean(), cohort=Fraction(0.4); {TRAIN}, Mean(), cohort=Weighted(5); {TRAIN}, Mean(), cohort=RoundRobin(5)
{TRAIN}, Mean(over='expected'), cohort=Poisson(0.4); {TRAIN}, Mean(weights='equal'); {TRAIN}, Mean(sum='float')
Gradient(8), Sum(), sgd(0.01); {KEEPS}, Mean(), cohort=7; {KEEPS}, Mean(), cohort=7, codec=Feedback(TopK(0.1))
Train(sgd(cosine(0.1, rounds=3), momentum=0.9, nesterov=True), epochs=2, batch=7), Mean(), adam(0.01)
Train(sgd(0.1), steps=cosine(6.0, rounds=3, end=1.0), batch=8), Mean()
Custom(trainings:own_loop, batch=8, lr=0.1), Mean(), sgd(1.0, momentum=0.5), cohort=6
{TRAIN}, Mean(), cohort=5, codec=Quantize(8), downlink=TopK(0.2); {TRAIN}, Mean(), cohort=5, pace=Sync(over_select=1.5)
{TRAIN}, Mean(), cohort=1, pace=Bounded(2); {TRAIN}, Mean(), cohort=5, pace=Bounded(0)
"""
# Arguments of Plan: rounds that overlap or end at a deadline. The last two have a buffer larger than the population, so
# that some clients start more than once in a round.
OVERLAPPING = f"""
{TRAIN}, Mean(), cohort=5, pace=Buffered(3); {TRAIN}, Mean(), cohort=5, pace=Bounded(1)
{TRAIN}, Mean(), cohort=5, pace=Buffered(3, staleness=polynomial(1.0)); {TRAIN}, Mean(), pace=Bounded(2)
{KEEPS}, Mean(), cohort=5, pace=Buffered(2, staleness=hinge(0.5, grace=1))
{TRAIN}, Mean(), cohort=5, codec=Feedback(TopK(0.1)), pace=Buffered(3)
Train(sgd(0.1), epochs=1, batch=10, sends='model'), Mean(), cohort=5, pace=Buffered(1)
{TRAIN}, Mean(), cohort=8, pace=Sync(over_select=1.5, deadline_s=1.0, quorum=0.5)
{TRAIN}, Mean(), cohort=8, pace=Sync(deadline_s=0.7, partial=True)
{TRAIN}, Mean(), cohort=5, codec=Quantize(4), pace=Buffered(20); {KEEPS}, Mean(), cohort=5, pace=Buffered(20)
"""


class Case(NamedTuple):
    """One training: the text of its plan, further settings, and whether its rounds overlap."""

    plan: str
    settings: Mapping[str, Any] = {}
    overlaps: bool = False
    model: str = "network"


def cases() -> dict[str, Case]:
    """All cases by name."""
    optimizers = [f"Gradient(8), Mean(), {name}(0.01)" for name in OPTIMIZERS.split("; ")]
    found = {text: Case(text) for text in texts(RECIPES)}
    found |= {f"codec {text}": Case(f"Plan({TRAIN}, Mean(), cohort=5, codec={text})") for text in texts(CODECS)}
    found |= {text: Case(f"Plan({text})") for text in (*texts(PARTS), *optimizers)}
    for text in texts(OVERLAPPING):
        found[text] = Case(f"Plan({text})", overlaps=True)
        found[f"{text} on a fleet"] = Case(f"Plan({text})", {"fleet": FLEET}, overlaps=True)
    plan = "fedavg(0.1, cohort=5)"
    for name, value in (("dtype", "float64"), ("precision", "bf16"), ("chunk", 2), ("seed", 7)):
        found[f"{name} {value}"] = Case(plan, {name: value})
    return found | {"batch norm and dropout": Case(f"Plan({KEEPS}, Mean(), cohort=7)", model="normalized")}


def texts(block: str) -> list[str]:
    """The cases of a block."""
    return block.strip().replace("\n", "; ").split("; ")


def included(which: str, engine: str, numerics: str, number: int, name: str) -> bool:
    """Whether a selection contains a case, the n-th of all.

    "all" is every case on every engine and numerics. "full" runs each case on one numerics only, in rotation, if the
    engine takes seconds to start its workers. "quick" runs in this process and on ranks, and once on worker processes.
    """
    if which == "quick":
        some = name.startswith(("fedavg", "codec F")) or "keep" in name
        few = {"inprocess": numerics == "compiled" or some, "torchrun": numerics == "fused" and some}
        return few.get(engine, engine == "processes" and numerics == "fused" and name.startswith("fedavg("))
    return which == "all" or engine not in SLOW_START or NUMERICS[number % len(NUMERICS)] == numerics


def own_loop(model: Any, loader: Any, context: Any) -> None:
    """A user's training loop, for `Custom`."""
    for x, y in loader:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= context.lr * p.grad


def network(name: str) -> Any:
    """A small convolutional network, or one with batch normalization and dropout."""
    if name == "normalized":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))


def engine_settings(engine: str) -> dict[str, Any]:
    """The settings that select an engine with two workers: an engine as a value, or a name and a number."""
    if engine == "inprocess":
        return {"engine": engine}
    try:
        atoll.Settings(engine=f"{ENGINES[engine]}(workers=2)")
    except atoll.UsageError:
        return {"engine": engine, "workers": 2}
    return {"engine": f"{ENGINES[engine]}(workers=2)"}


def plan_of(text: str) -> Any:
    """The plan of a text: with the new names if this version accepts them, else with the old names."""
    new = text
    for old, name in RENAMED:
        new = new.replace(old, name)
    try:
        return atoll.Experiment(recipe=new).plan()
    except atoll.UsageError:
        return atoll.Experiment(recipe=text).plan()


def trained(case: Case, data: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one case: a row for each round, and a digest of the final model."""
    words = {**settings, **case.settings, "rounds": ROUNDS}
    training = atoll.rounds(lambda: network(case.model), data, plan_of(case.plan), **words)
    try:
        reports = list(training)
    finally:
        training.close()
    starts = Counter(start for report in reports for start in starts_of(report.clients, report.round))
    digest = hashlib.sha256()
    for name, tensor in training.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    twice = max(starts.values(), default=0) > 1
    return {"rounds": [row(report) for report in reports], "model": digest.hexdigest(), "twice": twice}


def starts_of(clients: Mapping[str, Any], now: int) -> Iterator[tuple[int, int]]:
    """The client and the round of each start whose contribution arrived in round `now`."""
    late = clients["staleness"].tolist() if "staleness" in clients else [0] * len(clients["id"])
    return zip(clients["id"].tolist(), (now - rounds for rounds in late), strict=True)


def row(report: Any) -> dict[str, Any]:
    """A round without its duration and its texts."""
    names = ("fingerprint", "bytes_up", "bytes_down", "cohort", "arrived", "late", "flying", "now", "metrics")
    return {
        **{name: getattr(report, name) for name in names},
        "failures": [[f.client, f.round, f.stage] for f in report.failures],
        "clients": {name: column.tolist() for name, column in report.clients.items()},
        "trips": [list(trip) for trip in report.trips],
    }


def main(engine: str, out: str, which: str = "full", only: str = "") -> None:
    """Run the cases on one engine; of several ranks, only the first one writes."""
    if engine == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    digits = load_digits()
    rows = (digits.images[:ROWS] / 16).astype("float32")[:, None], digits.target[:ROWS]
    data = atoll.data.arrays(*rows, task="classification").split(12, atoll.data.Dirichlet(0.5))
    settings = engine_settings(engine)
    with open(out if os.environ.get("RANK", "0") == "0" else os.devnull, "a", buffering=1) as file:
        for number, (name, case) in enumerate(cases().items()):
            for numerics in NUMERICS:
                left_out = only not in name or (case.overlaps and engine in BY_ARRIVAL)
                if left_out or not included(which, engine, numerics, number, name):
                    continue
                try:
                    found = trained(case, data, {**settings, "numerics": numerics})
                except Exception as error:
                    given = getattr(error, "given", None) or str(error)
                    found = {"refused": type(error).__name__, "why": (given.strip().splitlines() or [""])[0]}
                print(json.dumps({"case": f"{engine}, {numerics}: {name}", **found}), file=file)


if __name__ == "__main__":
    main(*sys.argv[1:])
