"""A source is a data set before its split. The split holds rows out, assigns the rest to clients, and scales.

Tests: tests/data/test_split.py, tests/data/test_partition.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.base.errors import UsageError, unknown_name
from atoll.base.random import Key
from atoll.data.clients import Clients, offsets_of
from atoll.data.partition import IID, ByColumn, Partition, Pool, fill_up, in_groups, shuffled
from atoll.data.rows import PickedRows, Rows
from atoll.data.scale import scaled

SCALES = ("none", "standard", "client")


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """A data set with its metadata, before the split.

    Args:
        name: name of the data set.
        rows: the rows as stored: missing numbers are not filled, and columns are not scaled.
        kind: "classification" or "regression".
        classes: names of the classes; None for regression, or if a row has several targets.
        features: shape of one row's features.
        columns: names of the features, if they have names and one axis.
        test: the test rows of the data set, which `split` holds out; None: the data set has no test rows.
        by: the natural client of each row, an index into `names`, int64 `[rows]`; None if there are no natural clients.
        names: names of the natural clients.
        scale: "none", "standard" or "client" (each natural client by its own statistics). `split` computes the
            statistics from the train rows.
        fill: whether NaN is a missing number, which is filled with the mean of the train rows.
        notes: one sentence for each guess.
    """

    name: str
    rows: Rows
    kind: str
    classes: tuple[str, ...] | None
    features: tuple[int, ...]
    columns: tuple[str, ...] | None = None
    test: Rows | None = None
    by: Tensor | None = None
    names: tuple[str, ...] | None = None
    scale: str = "none"
    fill: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise unknown_name("scale", self.scale, SCALES)
        if self.scale == "none":
            return
        given = f"{self.name} was given scale={self.scale!r}."
        if not self.rows.take(torch.zeros(1, dtype=torch.int64))[0].is_floating_point():
            raise UsageError(given, "float features.", "token ids have no mean.", "scale='none'")
        if self.scale == "client" and (self.by is None or self.test is not None):
            raise UsageError(
                given,
                "a natural client for every row, also for held-out rows.",
                "each row is scaled by the statistics of its own client.",
                "scale='standard'",
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.kind}, rows={len(self)}, features={self.features})"

    def split(
        self,
        clients: int | None = None,
        by: Partition | None = None,
        *,
        held_out: float = 0.2,
        seed: int = 0,
        min_rows: int = 2,
    ) -> Clients:
        """Hold rows out, then divide the remaining train rows among clients.

        The held-out rows are selected first, by a hash of each row and the seed, with the same fraction of every class.
        Held-out rows and train rows are therefore the same for any number of clients and any partition.

        Args:
            clients: the number of clients; None: 10, or all natural clients.
            by: the partition; None: `ByColumn()` if the set has natural clients, else `IID()`.
            held_out: fraction of the rows to hold out, in [0, 1). A set with its own test rows uses those instead;
                0 holds out no rows.
            seed: the seed of the random selection of held-out rows, and of the partition.
            min_rows: rows that each client must have, ≥ 1. If a draw gives a client fewer, the partition draws
                again; then rows are moved from the largest clients, and a note reports it. Natural clients with
                fewer rows are left out.
        Returns:
            The federation, its features filled and scaled by the statistics of the train rows.
        Raises:
            UsageError: more clients than rows, a partition that does not fit the data, or held-out rows of a
                class that no train row has. The source is unchanged.
        Example:
            >>> from atoll.data import load, Dirichlet
            >>> load("digits").split(100, Dirichlet(0.3))
            Clients('digits', clients=100, rows=1438, held_out=359)
        """
        partition = by if by is not None else (IID() if self.by is None else ByColumn())
        _check(partition, held_out, seed, min_rows)
        key = Key(seed).fold("split")
        labels = None if self.classes is None else self.rows.targets()
        train, held, notes = self._hold_out(labels, held_out, key.fold("held-out"))
        count = self._count(clients, partition, len(train), held_out, min_rows)
        pool = Pool(
            len(train),
            None if labels is None else labels[train],
            None if self.by is None else self.by[train],
        )
        names = self.names if partition.natural else None
        owner, deal_notes = _deal(partition, pool, count, min_rows, key)
        if partition.natural:
            train, owner, names, deal_notes = _leave_out(train, owner, names or (), min_rows)
            count = len(names)
        rows, own_test = scaled(self.rows, train, self.test, self.by, self.scale, self.fill)
        drawn = PickedRows(rows, held) if held is not None and len(held) else None
        judge = own_test if held is None else drawn
        if judge is not None and labels is not None:
            _refuse_unseen(labels[train], judge.targets(), self.classes or ())
        whose = torch.full((len(self),), -1)
        whose[train] = owner
        return Clients(
            name=self.name,
            rows=partition.view(rows, whose, count, key.fold("shift")),
            order=train[in_groups(owner)],
            offsets=offsets_of(owner.bincount(minlength=count)),
            held_out=judge,
            kind=self.kind,
            classes=self.classes,
            features=self.features,
            columns=self.columns,
            names=names,
            notes=(*self.notes, *notes, *deal_notes),
        )

    def _hold_out(self, labels: Tensor | None, part: float, key: Key) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """Return the train rows, the held-out rows (None for the set's own test rows), and the notes."""
        every = torch.arange(len(self))
        if part == 0:
            return every, every[:0], ()
        if self.test is not None:
            return every, None, (f"Held out: the set's own {len(self.test)} test rows.",)
        held = draw_held_out(labels, len(self), part, key)
        how = "at random" if labels is None else "in equal parts of every class"
        return every[~held], every[held], (f"Held out: {int(held.sum())} of {len(self)} rows, {how}.",)

    def _count(self, clients: int | None, partition: Partition, train: int, held_out: float, min_rows: int) -> int:
        """Return the number of clients, or refuse it."""
        if partition.natural and self.names is not None:
            if clients not in (None, len(self.names)):
                raise UsageError(
                    f"split({clients}) was called on data with {len(self.names)} natural clients.",
                    f"{len(self.names)} clients, or a partition that draws them.",
                    "the data determine the natural clients.",
                    f"data.split({clients}, by=IID())",
                )
            return len(self.names)
        count = 10 if clients is None else clients
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"split({clients!r}).", "an integer ≥ 1.", write="data.split(10)")
        if count * min_rows > train:
            count, least = (count, 1) if count <= train else (max(1, train // min_rows), min(min_rows, train))
            raise UsageError(
                f"split({clients}) was called on {train} train rows, with at least {min_rows} per client.",
                f"clients × min_rows ≤ {train}.",
                "each row belongs to exactly one client.",
                f"data.split({count}, by={partition}, held_out={held_out}, min_rows={least})",
            )
        return count


def _check(partition: object, held_out: object, seed: object, min_rows: object) -> None:
    """Refuse arguments that are invalid for every data set."""
    if not isinstance(partition, Partition):
        raise UsageError(f"by={partition!r}.", "a partition.", write="data.split(by=IID())")
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 <= held_out < 1:
        raise UsageError(
            f"held_out={held_out!r}.",
            "0 ≤ held_out < 1.",
            "it is a fraction of the rows, and training needs the rest.",
            "data.split(held_out=0.2)",
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed={seed!r}.", "an integer.", write="data.split(seed=0)")
    if isinstance(min_rows, bool) or not isinstance(min_rows, int) or min_rows < 1:
        raise UsageError(
            f"min_rows={min_rows!r}.",
            "an integer ≥ 1.",
            "a client without rows has no gradient.",
            "data.split(min_rows=1)",
        )


def draw_held_out(labels: Tensor | None, count: int, part: float, key: Key) -> Tensor:
    """Draw the held-out rows, bool `[count]`: the first rows of each class in the order of their hashes.

    Each class holds out the fraction `part` of its rows, to within one row, and keeps at least one train row. The
    total is round(part · count), unless a class has too few rows.

    Args:
        labels: class of each row, int64 `[count]`; None: one class.
        count: the number of rows.
        part: fraction to hold out, in [0, 1).
        key: key of the hashes.
    Example:
        >>> held = draw_held_out(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), 10, 0.2, Key(0))
        >>> held[:5].sum().item(), held[5:].sum().item()
        (1, 1)
    """
    group = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    order, rank, sizes = shuffled(group, int(group.max()) + 1, key)
    edge = (sizes.cumsum(0).double() * part).round().long()
    quota = edge.diff(prepend=edge.new_zeros(1)).minimum((sizes - 1).clamp(min=0))
    held = torch.zeros(count, dtype=torch.bool)
    held[order] = rank < quota[group[order]]
    return held


def _deal(partition: Partition, pool: Pool, clients: int, min_rows: int, key: Key) -> tuple[Tensor, tuple[str, ...]]:
    """Return the owner of each train row, and notes.

    The partition draws until each client has `min_rows`, at most `draws` times. Then rows are moved.
    """
    for draw in range(1, partition.draws + 1):
        owner = partition(pool, clients, key.fold("partition", draw))
        if owner.shape != (pool.rows,) or int(owner.min()) < 0 or int(owner.max()) >= clients:
            raise UsageError(
                f"{partition} returned owners of shape {tuple(owner.shape)}.",
                f"one integer in [0, {clients}) for each of the {pool.rows} train rows.",
            )
        missing = (min_rows - owner.bincount(minlength=clients)).clamp(min=0)
        short = int((missing > 0).sum())
        if partition.natural or not short:
            return owner, (f"{partition}: draw {draw} is the first with min_rows={min_rows}.",) if draw > 1 else ()
        # If m clients fall short in one draw, about one draw in e^m gives every client enough rows.
        if short > 10:
            break
    moved, drawn = int(missing.sum()), f" after {draw} draws" if draw > 1 else ""
    note = f"{partition}: {moved} rows were moved{drawn}, to give each client min_rows={min_rows}."
    return fill_up(owner, clients, min_rows, key.fold("fill-up")), (note,)


def _leave_out(
    train: Tensor, owner: Tensor, names: tuple[str, ...], min_rows: int
) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """Keep the natural clients with at least `min_rows` rows, renumbered; drop the others and their rows."""
    keep = owner.bincount(minlength=len(names)) >= min_rows
    if keep.all():
        return train, owner, names, ()
    if not keep.any():
        raise UsageError(
            f"None of the {len(names)} natural clients has {min_rows} train rows.",
            f"at least one client with {min_rows} train rows.",
            write="data.split(min_rows=1)",
        )
    mine = keep[owner]
    note = (
        f"{int((~keep).sum())} of {len(names)} natural clients have fewer than {min_rows} train rows; "
        f"they and their {int((~mine).sum())} rows were left out."
    )
    kept = tuple(itertools.compress(names, keep.tolist()))
    return train[mine], (keep.cumsum(0) - 1)[owner[mine]], kept, (note,)


def _refuse_unseen(train: Tensor, held: Tensor, classes: tuple[str, ...]) -> None:
    """Refuse held-out rows of a class that no train row has."""
    known = torch.zeros(max(len(classes), int(held.max()) + 1), dtype=torch.bool)
    known[train] = True
    new = (~known[held]).nonzero()
    if len(new):
        row = int(new[0])
        label = int(held[row])
        raise unseen(classes[label] if label < len(classes) else str(label), row)


def unseen(label: str, row: int) -> UsageError:
    """Build the error for a held-out row of a class that no train row has."""
    return UsageError(
        f"Held-out row {row} has label {label!r}, which no train row has.",
        "only labels that occur in training.",
        "a model cannot learn a class without train rows.",
        "data.split(held_out=0)",
    )
