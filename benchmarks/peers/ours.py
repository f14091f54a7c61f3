"""The same workload in atoll."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from modules import classes, module
from turns import Turns

import atoll
from atoll.data.clients import offsets_of


def main() -> None:
    """Run rounds as the benchmark requests them."""
    turns = Turns()
    source = atoll.data.arrays(torch.from_numpy(turns.x), torch.from_numpy(turns.y))
    order = torch.cat([torch.from_numpy(rows) for rows in turns.parts])
    sizes = torch.tensor([len(rows) for rows in turns.parts])
    data = replace(source.split(len(sizes), held_out=0.0), order=order, offsets=offsets_of(sizes))
    plan = atoll.recipes.fedavg(turns.lr, batch=turns.batch, cohort=turns.cohort)
    make = functools.partial(module, turns.model)
    settings = {"rounds": turns.rounds, "evaluate_every": 0, "numerics": turns.numerics}
    training = atoll.rounds(make, data, plan, **settings)
    for _ in range(turns.rounds):
        turns.wait(lambda rows: classes(training.model, rows))
        training.next()
    turns.wait(lambda rows: classes(training.model, rows))


if __name__ == "__main__":
    main()
