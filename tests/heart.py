"""Heart disease by hospital, with the rows, the columns and the split of the published benchmark.

Reference: Ogier du Terrail et al., FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning, 2022,
    Fed-Heart-Disease.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atoll.data import Clients, federate, load

CLASSES = ("healthy", "disease")
Rows = tuple[Tensor, list[str]]


def heart_folder() -> str:
    """The folder of the files; the test is skipped if ATOLL_DATA does not name it."""
    folder = os.environ.get("ATOLL_DATA")
    if not folder or not (Path(folder) / "heart.processed.va.data").is_file():
        pytest.skip(f"the heart files are not in the folder that ATOLL_DATA names ({folder})")
    return folder


@functools.cache
def heart_parts() -> tuple[dict[str, Rows], dict[str, Rows]]:
    """The train rows and the test rows of each hospital, features in their own units."""
    from sklearn.model_selection import train_test_split

    source = load("heart", folder=heart_folder(), scale="none")
    x, y = source.rows.take(torch.arange(len(source)))
    train, test = {}, {}
    for client, name in enumerate(source.names):
        mine = (source.by == client).nonzero()[:, 0]
        few = int(y[mine].bincount(minlength=2).min()) <= 2
        sides = train_test_split(
            mine.numpy(),
            train_size=0.66,
            test_size=0.34,
            random_state=43,
            shuffle=True,
            stratify=None if few else y[mine].numpy(),
        )
        for part, rows in zip((train, test), sides, strict=True):
            part[name] = (x[rows], [CLASSES[label] for label in y[rows].tolist()])
    return train, test


def heart(scale: str = "client") -> Clients:
    """The federation of the four hospitals."""
    train, test = heart_parts()
    return federate(train, held_out=test, classes=CLASSES, scale=scale, name="heart by hospital")


def heart_model(seed: int) -> nn.Module:
    """Logistic regression with the start of the published benchmark."""
    torch.manual_seed(seed)
    return nn.Linear(13, 1)
