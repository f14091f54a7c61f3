"""Clients and their data.

    data = load("digits").split(clients=100, by=Dirichlet(0.3))

A `Source` is a data set; a partition says who holds what; `Clients` is the federation that results. Rows are
read where they are, batch by batch, and may be larger than memory.
"""

from atoll.data.arrays import arrays, dataset, federate
from atoll.data.clients import Clients
from atoll.data.named import load
from atoll.data.partition import (
    IID,
    ByColumn,
    Dirichlet,
    FeatureShift,
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
    "ByColumn",
    "Clients",
    "ConcatRows",
    "DatasetRows",
    "Dirichlet",
    "FeatureShift",
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
    "load",
]
