"""The foreign parts in flag texts, and their runs under torchrun: `python foreign_cases.py FOLDER`."""

import json
import sys
from pathlib import Path

from parity.ranks import fork
from problems import classification

import atoll
from atoll.testing import entropy_source, known_entropy
from atoll.training.experiment import Experiment

RECIPE = "fedavg(0.1, batch=5, cohort=8)"
PLANS = {
    "fedprox": {"local": "Train(fedprox:fedprox(0.1, mu=0.5), epochs=2, batch=5)"},
    "scaffold": {"local": "scaffold:Scaffold(0.1, steps=3, batch=5)", "aggregator": 'Mean("equal")'},
    "krum": {"aggregator": "krum:Krum(2)"},
    "clip_noise": {"codec": "clip_noise:Clip(1.0) >> clip_noise:Noise(0.5)", "aggregator": 'Mean("equal")'},
}


def plan_of(name, **more):
    """The plan of a foreign part, read from flag texts."""
    texts = {f"plan.{slot}": text for slot, text in {**PLANS[name], **more}.items()}
    return Experiment().override(recipe=RECIPE, **texts).plan()


def clients():
    """Ten clients of several sizes."""
    return classification((30, 2, 9, 21, 14, 5, 14, 3, 17, 8))


def fingerprints(plan, rounds=3, **settings):
    """The fingerprint of each round of a run with known entropy."""
    with entropy_source(known_entropy(1)):
        run = atoll.train("softmax", clients(), plan, rounds=rounds, out=None, **{"numerics": "fused", **settings})
    return [report.fingerprint for report in run.reports]


if __name__ == "__main__":
    fork(2)
    from atoll.engine.ranks.process_group import ProcessGroup

    rank = ProcessGroup.join().rank
    found = {name: fingerprints(plan_of(name), engine="Torchrun()") for name in PLANS}
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
