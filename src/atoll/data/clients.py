"""A federation: the clients and their rows, stored as an array of row numbers and an array of offsets.

Tests: tests/data/test_clients.py, tests/data/test_split.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from atoll.base.errors import ClientError, UsageError, unknown_name
from atoll.base.lines import Line, Split, literal
from atoll.base.markup import html_table, mimebundle
from atoll.base.random import Key
from atoll.base.validation import plain_number
from atoll.data.fields import RowField, unpack_fields
from atoll.data.input import Input, InputTarget
from atoll.data.measure import effective_clients, label_divergence, size_gini
from atoll.data.rows import ConcatRows, Rows, fields_of, intensities, on_device, pieces

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *map(np.dtype, "bBhHiIlLqQ"))


def offsets_of(sizes: Tensor) -> Tensor:
    """Compute the start of each client's rows and the end of the last one's, int64 `[clients + 1]`.

    Args:
        sizes: the number of rows of each client, int64 `[clients]`.
    Example:
        >>> offsets_of(torch.tensor([2, 0, 3])).tolist()
        [0, 2, 2, 5]
    """
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))


def _readable(rows: Rows, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Read rows `[n]` together; if one of them is unreadable, read them one by one and leave out unreadable rows."""
    try:
        yield rows.take(index)
    except (ClientError, UsageError):
        for row in index.split(1):
            with contextlib.suppress(ClientError, UsageError):
                yield rows.take(row)


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
        features: shape of one row's features; the number of 32-bit words if a row is a dict of tensors.
        columns: names of the features, if they have names and one axis.
        names: the names of natural clients (hospitals, speakers); None if a partition formed the clients at random.
        notes: sentences that state the guesses and the moved rows of the split.
        input: the map from a user's rows to the tensors; None: `described` makes it from the other fields.
        held_owner: the client of each held-out row, int64 `[held-out rows]`, −1 for none. A natural client has its own
            rows; a drawn client has rows of each class in proportion to its train rows. None: no row has a client.
        reads_rows: whether columns, levels or statistics of the input were read from the rows.
        held_view: the held-out rows with the feature shift of their clients; None: clients have no feature shift.
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
    input: Input | None = None
    held_owner: Tensor | None = None
    held_view: Rows | None = None
    reads_rows: bool = False

    def __repr__(self) -> str:
        held = 0 if self.held_out is None else len(self.held_out)
        return f"Clients({self.name!r}, clients={self.count}, rows={len(self.order)}, held_out={held})"

    def _repr_html_(self) -> str:
        shown = [str(n) for n in self.sizes[:50].tolist()]
        names = self.names or [f"client {i}" for i in range(len(shown))]
        rows = [["client", "train rows"], *([name, n] for name, n in zip(names, shown, strict=False))]
        more = f"{self.count - len(shown)} more clients" if self.count > len(shown) else ""
        return html_table(repr(self), rows, more)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    @property
    def count(self) -> int:
        """The number of clients."""
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> Tensor:
        """The number of rows of each client, int64 `[clients]`."""
        return self.offsets.diff()

    @cached_property
    def example(self) -> tuple[Tensor, Tensor]:
        """x and y of the first readable row, `[1, *features]` and `[1, *target]`.

        Raises:
            RunError: no row can be read. The error names the first row.
        """
        for start in range(len(self.order)):
            for row in _readable(self.rows, self.order[start : start + 1]):
                return row
        return self.rows.take(self.order[:1])

    @cached_property
    def vocab(self) -> int | None:
        """The vocabulary size, one more than the largest token id; None if rows contain numbers, not ids."""
        if self.input is not None and self.input.tokens is not None:
            return self.input.tokens
        if self.example[0].dtype != torch.int64:
            return None
        parts = [(self.rows, piece) for piece in self.order.split(4096)]
        if self.held_out is not None:
            parts += [(self.held_out, piece) for piece in torch.arange(len(self.held_out)).split(4096)]
        return 1 + max(int(x.max()) for rows, piece in parts for x, _ in _readable(rows, piece))

    def described(self, dtype: str = "float32") -> Input:
        """Return the map from a user's rows to the tensors.

        Args:
            dtype: the dtype of the tensors.
        """
        if self.input is not None:
            return structs.replace(self.input, dtype=dtype, tokens=self.vocab)
        outputs = len(self.classes) if self.classes is not None else math.prod(self.example[1].shape[1:])
        names = ("y",) if outputs == 1 or self.classes is not None else tuple(f"y{i}" for i in range(outputs))
        return Input(
            target=InputTarget(self.kind, names, self.classes),
            features=self.features,
            outputs=outputs,
            dtype=dtype,
            intensities=intensities(self.rows),
            tokens=self.vocab,
            fields=tuple(map(str, self.fields)),
        )

    @cached_property
    def held_order(self) -> Tensor:
        """The numbers of the held-out rows that have a client, client after client, int64 `[m]`."""
        if self.held_owner is None:
            return self.order[:0]
        mine = (self.held_owner >= 0).nonzero()[:, 0]
        return mine[self.held_owner[mine].argsort(stable=True)]

    @cached_property
    def held_offsets(self) -> Tensor:
        """The start of each client in `held_order`, and the end of the last, int64 `[clients + 1]`."""
        owners = self.order[:0] if self.held_owner is None else self.held_owner[self.held_owner >= 0]
        return offsets_of(owners.bincount(minlength=self.count))

    def client_rows(self, client: int | str) -> Tensor:
        """Return the row numbers of one client, by its id or its name, int64 `[size]`.

        Raises:
            UsageError: there is no such client.
        """
        client = self._id(client)
        start, end = self.offsets[client : client + 2].tolist()
        return self.order[start:end]

    @cached_property
    def fields(self) -> tuple[RowField, ...]:
        """The tensors of a row, if a row is a dict of tensors; else empty."""
        return fields_of(self.rows)

    def take(self, rows: Tensor) -> tuple[Tensor | dict[str, Tensor], Tensor]:
        """Read features and targets of rows, including the feature shift of each row's client.

        Args:
            rows: row numbers from `order`, int64 of any shape; `[clients, batch]` for a batch of clients.
        Returns:
            x `[..., *features]` and y `[...]` or `[..., *target]`: float32 or float64 features, or int64
            tokens; int64 classes, or float numbers to predict. x is a dict if a row is a dict of tensors.
        Raises:
            RunError: a row read from outside memory contains NaN or infinity.
        """
        x, y = self.rows.take(rows)
        return (unpack_fields(x, self.fields) if self.fields else x), y

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
        offsets = torch.tensor([0, len(self.order)])
        return replace(
            self, order=self.order.sort().values, offsets=offsets, names=None, held_owner=None, held_view=None
        )

    def held(self, view: bool = False) -> Clients:
        """Return a federation of one client that has the held-out rows.

        Args:
            view: whether each row has the feature shift of its client.
        Raises:
            UsageError: there are no held-out rows.
        """
        if self.held_out is None:
            raise UsageError(
                f"{self.name} was split with held_out=0.",
                "held-out rows.",
                "a model is evaluated on rows that it was not trained on.",
                Split(options={"held_out": 0.2}),
            )
        count = len(self.held_out)
        return replace(
            self,
            rows=self.held_out if not view or self.held_view is None else self.held_view,
            order=torch.arange(count),
            offsets=torch.tensor([0, count]),
            held_out=None,
            held_owner=None,
            held_view=None,
            names=None,
        )

    def only(self, ids: Any) -> Clients:
        """Select some clients. In the result their ids are 0 … k − 1, in this order.

        Args:
            ids: the id or the name of one client, or several ids or names: a list, a range, an array, or a tensor
                int64 `[k]`.
        Raises:
            UsageError: an unknown id or name, a repeated one, or none.
        Example:
            >>> from atoll.data import federate
            >>> data = federate({"north": ([[0.0]] * 4, [0, 1] * 2), "south": ([[1.0]] * 6, [1, 0] * 3)}, held_out=0)
            >>> data.only("south").sizes.tolist(), data.only([1, 0]).names
            ([6], ('south', 'north'))
        """
        ids = self._ids(ids)
        sizes = self.sizes[ids]
        offsets = offsets_of(sizes)
        shift = (self.offsets[ids] - offsets[:-1]).repeat_interleave(sizes)
        names = None if self.names is None else tuple(self.names[i] for i in ids.tolist())
        held_owner = None
        if self.held_owner is not None:
            place = torch.full((self.count + 1,), -1)  # the last is that of rows without a client
            place[ids] = torch.arange(len(ids))
            held_owner = place[self.held_owner]
        order = self.order[torch.arange(len(shift)) + shift]
        return replace(self, order=order, offsets=offsets, names=names, held_owner=held_owner)

    def _ids(self, given: Any) -> Tensor:
        """The ids of clients that are given by ids or names, int64 `[k]`."""
        if isinstance(given, str) or isinstance(plain_number(given), int):
            given = [given]
        if isinstance(given, (Tensor, np.ndarray)) and given.ndim == 1 and given.dtype in _WHOLE:
            given = given.tolist()
        if not isinstance(given, (list, tuple, range)) or not len(given):
            raise UsageError(f"only({given!r:.60}).", "the id or the name of a client, or several of them.")
        ids = [self._id(one) for one in given]
        if len(set(ids)) < len(ids):
            raise UsageError(f"only({given!r:.60}) selects a client twice.", "each client at most once.")
        return torch.tensor(ids)

    def _id(self, one: Any) -> int:
        """The id of a client that is given by its id or its name."""
        if isinstance(one, str):
            if one not in (self.names or ()):
                raise unknown_name(
                    "client",
                    one,
                    self.names or map(str, range(self.count)),
                    lambda near: Line(f"data.only({literal(near)})"),
                )
            return (self.names or ()).index(one)
        number = plain_number(one)
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"{one!r:.60} is no client.", "the id or the name of a client.")
        self._check_ids([number])
        return number

    def _check_ids(self, ids: Sequence[int]) -> None:
        wrong = [i for i in ids if not 0 <= i < self.count]
        if wrong:
            raise UsageError(f"There is no client {wrong[0]}.", f"ids from 0 to {self.count - 1}.")

    def seated(self, client: int) -> Clients:
        """Select one client and keep its id: every other client has no rows. Held-out rows are left out.

        Args:
            client: the id of the client.
        Example:
            >>> from atoll.data import load
            >>> data = load("digits").split(4)
            >>> data.seated(2).sizes.tolist() == [0, 0, int(data.sizes[2])]
            True
        """
        rows = self.client_rows(client)
        offsets = torch.zeros(client + 2, dtype=torch.int64)
        offsets[-1] = len(rows)
        return replace(self, order=rows, offsets=offsets, held_out=None, held_owner=None, held_view=None, names=None)

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
                Line(python="data.sizes"),
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
        held-out rows. The cost is therefore bounded, and a change in a row outside the sample is not detected. The rows
        are read once.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        held = 0 if self.held_out is None else len(self.held_out)
        shape = (self.kind, self.classes, self.features, held, *map(str, self.fields))
        digest = hashlib.sha256(repr(shape).encode())
        for part in (self.offsets, self.order):
            digest.update(part.contiguous().numpy().data)
        _add_rows(digest, self.rows, self.order, self.features)
        if self.held_out is not None:
            _add_rows(digest, self.held_out, torch.arange(held), self.features)
        return digest.hexdigest()[:16]

    def held_out_fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of the held-out rows, and one of their clients, as 16 hex digits each.

        Returns:
            `held_out`: changes if a held-out row changes; of a large set only a sample is read, as in `fingerprint`.
            `held_out_clients`: changes if a held-out row gets another client. Empty texts without held-out rows.
        """
        if self.held_out is None:
            return {"held_out": "", "held_out_clients": ""}
        rows = hashlib.sha256(repr((self.kind, self.classes, self.features, len(self.held_out))).encode())
        _add_rows(rows, self.held_out, torch.arange(len(self.held_out)), self.features)
        owners = [] if self.held_owner is None else self.held_owner.tolist()
        named = [self.names[i] if self.names is not None and i >= 0 else i for i in owners]
        clients = hashlib.sha256(repr(named).encode()).hexdigest()[:16]
        return {"held_out": rows.hexdigest()[:16], "held_out_clients": clients}


def _add_rows(digest: Any, rows: Rows, numbers: Tensor, features: tuple[int, ...]) -> None:
    """Add a sample of rows to a digest, drawn with a fixed key: about 2²⁰ numbers, and at least 64 rows."""
    sample = max(64, 2**20 // max(1, math.prod(features)))
    drawn = numbers[Key(0).fold("fingerprint").distinct(min(sample, len(numbers)), len(numbers))]
    for piece in pieces(drawn, features) if len(drawn) else ():
        for part in itertools.chain(*_readable(rows, piece)):
            digest.update(part.contiguous().numpy().data)
