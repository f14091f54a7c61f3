"""Clients and their data.

    data = load("digits").split(clients=100, by=Dirichlet(0.3))

A `Source` is a data set. A partition assigns its train rows to clients. `Clients` is the resulting federation.
Rows are read from their original storage, batch by batch, and may be larger than memory.

Tests: tests/data/test_split.py, tests/data/test_clients.py.
"""

from atoll.data.arrays import arrays, dataset, federate
from atoll.data.clients import Clients
from atoll.data.hub import hf
from atoll.data.named import load
from atoll.data.partition import (
    IID,
    Backdoor,
    ByColumn,
    Dirichlet,
    FeatureShift,
    LabelFlip,
    Partition,
    Pathological,
    Pool,
    Quantity,
    Shards,
)
from atoll.data.rows import ArrayRows, ConcatRows, DatasetRows, PickedRows, Rows
from atoll.data.sources import Source
from atoll.data.tabular import csv, frame

__all__ = [
    "IID",
    "ArrayRows",
    "Backdoor",
    "ByColumn",
    "Clients",
    "ConcatRows",
    "DatasetRows",
    "Dirichlet",
    "FeatureShift",
    "LabelFlip",
    "Partition",
    "Pathological",
    "PickedRows",
    "Pool",
    "Quantity",
    "Rows",
    "Shards",
    "Source",
    "arrays",
    "csv",
    "dataset",
    "federate",
    "frame",
    "hf",
    "load",
]
