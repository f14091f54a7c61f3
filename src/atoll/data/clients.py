"""A federation: the clients and their rows, stored as an array of row numbers and an array of offsets.

Tests: tests/data/test_clients.py, tests/data/test_split.py.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data.measure import effective_clients, label_divergence, size_gini
from atoll.data.rows import ConcatRows, Rows, on_device, pieces


def offsets_of(sizes: Tensor) -> Tensor:
    """Compute the start of each client's rows and the end of the last one's, int64 `[clients + 1]`.

    Args:
        sizes: the number of rows of each client, int64 `[clients]`.
    Example:
        >>> offsets_of(torch.tensor([2, 0, 3])).tolist()
        [0, 2, 2, 5]
    """
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))


@dataclass(frozen=True, eq=False, repr=False)
class Clients:
    """The clients and their rows. Client i has the rows order[offsets[i] : offsets[i + 1]].

    Args:
        name: name of the data set.
        rows: storage of the rows; the clients' data is not copied.
        order: the row numbers of all clients, client after client, int64 `[N]`. A row number occurs at most once.
        offsets: the start of each client in `order`, and the end of the last, int64 `[clients + 1]`.
        held_out: the rows that no client has, to evaluate the model; None: there are no such rows.
        kind: "classification" or "regression".
        classes: names of the classes; None for regression, or if a row has several targets.
        features: shape of one row's features.
        columns: names of the features, if they have names and one axis.
        names: the names of natural clients (hospitals, speakers); None if a partition formed the clients at random.
        notes: sentences that state the guesses and the moved rows of the split.
    Example:
        >>> from atoll.data import arrays, IID
        >>> data = arrays(torch.arange(10.0)[:, None], torch.arange(10.0)).split(3, IID(), held_out=0)
        >>> data
        Clients('arrays', clients=3, rows=10, held_out=0)
        >>> data.sizes.tolist()
        [4, 3, 3]
    """

    name: str
    rows: Rows
    order: Tensor
    offsets: Tensor
    held_out: Rows | None
    kind: str
    classes: tuple[str, ...] | None
    features: tuple[int, ...]
    columns: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        held = 0 if self.held_out is None else len(self.held_out)
        return f"Clients({self.name!r}, clients={self.count}, rows={len(self.order)}, held_out={held})"

    @property
    def count(self) -> int:
        """The number of clients."""
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> Tensor:
        """The number of rows of each client, int64 `[clients]`."""
        return self.offsets.diff()

    @cached_property
    def vocab(self) -> int | None:
        """The vocabulary size, one more than the largest token id; None if rows contain numbers, not ids."""
        if self.rows.take(self.order[:1])[0].dtype != torch.int64:
            return None
        parts = [(self.rows, piece) for piece in self.order.split(4096)]
        if self.held_out is not None:
            parts += [(self.held_out, piece) for piece in torch.arange(len(self.held_out)).split(4096)]
        return 1 + max(int(rows.take(piece)[0].max()) for rows, piece in parts)

    def client_rows(self, client: int) -> Tensor:
        """Return the row numbers of one client, int64 `[size]`."""
        start, end = self.offsets[client : client + 2].tolist()
        return self.order[start:end]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Read features and targets of rows, including the feature shift of each row's client.

        Args:
            rows: row numbers from `order`, int64 of any shape; `[clients, batch]` for a batch of clients.
        Returns:
            x `[..., *features]` and y `[...]` or `[..., *target]`: float32 or float64 features, or int64
            tokens; int64 classes, or float numbers to predict.
        Raises:
            RunError: a row read from outside memory contains NaN or infinity.
        """
        return self.rows.take(rows)

    def on(self, device: torch.device, room: float) -> Clients:
        """Move the rows to a device if they are in memory and need at most `room` bytes; else return `self`.

        The row numbers stay in CPU memory. Rows that are not moved here are copied batch by batch when they are read.
        """
        if device.type == "cpu":
            return self
        everything = self.rows if self.held_out is None else ConcatRows((self.rows, self.held_out))
        moved = on_device(everything, device, room)  # together: train and held-out rows often share one array
        if moved is everything:
            return self
        if self.held_out is None:
            return replace(self, rows=moved)
        rows, held_out = moved.parts  # type: ignore[attr-defined]
        return replace(self, rows=rows, held_out=held_out)

    def pooled(self) -> Clients:
        """Return a federation of one client that has every train row, in the order of their numbers."""
        return replace(self, order=self.order.sort().values, offsets=torch.tensor([0, len(self.order)]), names=None)

    def held(self) -> Clients:
        """Return a federation of one client that has the held-out rows.

        Raises:
            UsageError: there are no held-out rows.
        """
        if self.held_out is None:
            raise UsageError(
                f"{self.name} was split with held_out=0.",
                "held-out rows.",
                "a model is evaluated on rows that it was not trained on.",
                "data.split(held_out=0.2)",
            )
        count = len(self.held_out)
        return replace(
            self,
            rows=self.held_out,
            order=torch.arange(count),
            offsets=torch.tensor([0, count]),
            held_out=None,
            names=None,
        )

    def only(self, ids: Tensor) -> Clients:
        """Select the clients with these ids, int64 `[k]`. In the result their ids are 0 … k − 1, in this order."""
        sizes = self.sizes[ids]
        offsets = offsets_of(sizes)
        shift = (self.offsets[ids] - offsets[:-1]).repeat_interleave(sizes)
        names = None if self.names is None else tuple(self.names[i] for i in ids.tolist())
        return replace(self, order=self.order[torch.arange(len(shift)) + shift], offsets=offsets, names=names)

    def histogram(self) -> Tensor:
        """Count the rows of each class on each client, int64 `[clients, classes]`.

        Raises:
            UsageError: the rows have no classes.
        """
        if self.classes is None:
            raise UsageError(
                f"{self.name} is a {self.kind} data set without a list of classes.",
                "one class per row.",
                "rows are counted class by class.",
                "data.sizes",
            )
        client = torch.arange(self.count).repeat_interleave(self.sizes)
        cell = client * len(self.classes) + self.rows.targets()[self.order]
        return cell.bincount(minlength=self.count * len(self.classes)).reshape(self.count, -1)

    def imbalance(self) -> dict[str, float]:
        """Measure how uneven the federation is.

        Returns:
            `size_gini` in [0, 1), `effective_clients` = (Σ n)² / Σ n², and for classes `label_divergence`: the
            mean Jensen–Shannon divergence, in bits, between a client's labels and the labels of all clients.
        Example:
            >>> from atoll.data import load, Dirichlet
            >>> load("digits").split(20, Dirichlet(0.1)).imbalance()["label_divergence"] > 0.3
            True
        """
        sizes = {"size_gini": size_gini(self.sizes), "effective_clients": effective_clients(self.sizes)}
        return sizes if self.classes is None else {"label_divergence": label_divergence(self.histogram()), **sizes}

    def fingerprint(self) -> str:
        """Return 16 hex digits that change if the data or the split changes.

        They are a SHA-256 over the shape of the data set, every client's row numbers, and the rows. Of a large set
        only a sample is read, drawn with a fixed key: about 2²⁰ numbers and at least 64 rows each of train and
        held-out rows. The cost is therefore bounded, and a change in a row outside the sample is not detected.
        """
        held = 0 if self.held_out is None else len(self.held_out)
        digest = hashlib.sha256(repr((self.kind, self.classes, self.features, held)).encode())
        for part in (self.offsets, self.order):
            digest.update(part.contiguous().numpy().data)
        key, sample = Key(0).fold("fingerprint"), max(64, 2**20 // max(1, math.prod(self.features)))
        for rows, numbers in ((self.rows, self.order), (self.held_out or self.rows, torch.arange(held))):
            drawn = numbers[key.distinct(min(sample, len(numbers)), len(numbers))]
            for piece in pieces(drawn, self.features) if len(drawn) else ():
                for part in rows.take(piece):
                    digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]
