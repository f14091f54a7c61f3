"""Partitions: which client holds which train row. A partition is a value; the key makes the draw.

What it draws is an owner for each row, one integer a row: so every row is in exactly one client.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from atoll.data.rows import Rows
from atoll.data.shift import ShiftedRows
from atoll.errors import UsageError
from atoll.fields import check, number
from atoll.grammar import constructor
from atoll.rng import Key


class Pool(NamedTuple):
    """What a partition may look at: the train rows, in the order of their numbers.

    rows: how many. labels: class of each row, int64 `[rows]`, or None where rows have no class.
    by: natural client of each row, int64 `[rows]`, or None.
    """

    rows: int
    labels: Tensor | None = None
    by: Tensor | None = None


class Partition:
    """What every partition is: `partition(pool, clients, key)` → owner of each train row, int64 `[rows]`.

    Each is a frozen dataclass, so that it prints as its constructor; one of your own gives owners in `__call__`.

    natural: the owners are given by the data; there is nothing to draw, and no row may be moved.
    draws: how often to draw for `min_rows` before rows are moved; more than 1 where a draw decides the sizes.
    """

    natural: ClassVar[bool] = False
    draws: ClassVar[int] = 1

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        raise NotImplementedError

    def view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        """The rows as the clients see them; `owner` int64 `[rows]`, −1 where nobody trains on a row."""
        return rows

    def __post_init__(self) -> None:
        check(self)

    def __repr__(self) -> str:
        return constructor(self)


def _refuse(partition: Partition, clients: int, required: str, why: str, write: Partition) -> UsageError:
    given = f"{partition} cannot split this data over {clients} clients."
    return UsageError(given, required, why, f"data.split({clients}, by={write})")


def in_groups(group: Tensor) -> Tensor:
    """Row numbers group by group, within each as they stand: what a stable `argsort` gives, in a third of the time.

    Args:
        group: int64 `[n]`, each in [0, 2⁶³ / n).
    Example:
        >>> in_groups(torch.tensor([1, 0, 1, 0])).tolist()
        [1, 3, 0, 2]
    """
    rows = len(group)
    words = (group * rows).add_(torch.arange(rows))  # no two are equal, and numpy sorts such by vectors
    words.numpy().sort()
    return words.remainder_(rows) if rows else words


def shuffled(group: Tensor, groups: int, key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """Rows group by group, each group in random order, every row's place by its own hash.

    Args:
        group: int64 `[n]` in [0, groups).
    Returns:
        row numbers, int64 `[n]`; the place of each of them within its group, int64 `[n]`; and the groups'
        sizes, int64 `[groups]`.
    Example:
        >>> order, rank, sizes = shuffled(torch.tensor([1, 0, 1]), 2, Key(0))
        >>> order[0].item(), rank.tolist(), sizes.tolist()
        (1, [0, 0, 1], [1, 2])
    """
    order = key.permutation(len(group))
    order = order[in_groups(group[order])]
    sizes = group.bincount(minlength=groups)
    first = (sizes.cumsum(0) - sizes)[group[order]]
    return order, torch.arange(len(group)) - first, sizes


def fill_up(owner: Tensor, clients: int, min_rows: int, key: Key) -> Tensor:
    """Move rows until every client has `min_rows`: the largest clients are cut to one common level.

    Args:
        owner: int64 `[n]`; n ≥ clients · min_rows.
    Returns:
        The new owners; as many differ as rows were missing, no fewer would do.
    Example:
        >>> fill_up(torch.tensor([0, 0, 0, 0, 1, 1]), 3, 1, Key(0)).bincount().tolist()
        [3, 2, 1]
    """
    order, rank, sizes = shuffled(owner, clients, key)
    missing = (min_rows - sizes).clamp(min=0)
    wanted = int(missing.sum())
    low, high = min_rows, int(sizes.max())
    while low < high:  # the highest level that frees enough rows
        level = (low + high + 1) // 2
        low, high = (level, high) if int((sizes - level).clamp(min=0).sum()) >= wanted else (low, level - 1)
    # The highest ranks go first: cutting to `low` may free more rows than are wanted.
    spare = order[rank >= low]
    spare = spare[rank[rank >= low].argsort(descending=True, stable=True)[:wanted]]
    moved = owner.clone()
    moved[spare] = torch.arange(clients).repeat_interleave(missing)
    return moved


@dataclass(frozen=True, repr=False)
class IID(Partition):
    """Rows dealt out at random, sizes equal up to one row.

    Example:
        >>> IID()(Pool(5), 2, Key(0)).bincount().tolist()
        [3, 2]
    """

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        return key.permutation(pool.rows) % clients


def log_gamma_draws(shape: float, n: int, key: Key) -> Tensor:
    """Logarithms of n draws of Gamma(shape, 1), float64 `[n]`: no draw underflows, however small the shape.

    Marsaglia and Tsang's rejection at shape + 1, then G(shape) = G(shape + 1) · U^(1/shape).

    Args:
        shape: > 0.
        n: ≥ 0.
    Example:
        >>> round(log_gamma_draws(3.0, 100_000, Key(0)).exp().mean().item(), 1)
        3.0

    Reference: Marsaglia, Tsang, A Simple Method for Generating Gamma Variables, 2000.
    """
    d = shape + 1 - 1 / 3
    out = torch.log1p(-key.fold("boost").uniform(n)) / shape
    todo, attempt = torch.arange(n), 0
    while len(todo):  # at least 95 % are accepted each time
        x = key.fold("normal", attempt).normal(len(todo))
        u = key.fold("accept", attempt).uniform(len(todo))
        v = (1 + x / math.sqrt(9 * d)) ** 3
        good = (v > 0) & (torch.log1p(-u) < 0.5 * x**2 + d - d * v + d * v.log())
        out[todo[good]] += (d * v[good]).log()
        todo, attempt = todo[~good], attempt + 1
    return out


@dataclass(frozen=True, repr=False)
class Dirichlet(Partition):
    """Label skew: each class is shared out in proportions drawn from Dirichlet(alpha, …, alpha).

    Class by class, a client that already holds its fair share of all rows gets no more, so sizes stay comparable.

    Args:
        alpha: > 0; small is skewed (0.1: a few classes a client), large is even (1000: the same mix for all).
    Example:
        >>> Dirichlet(0.3)
        Dirichlet(0.3)

    Reference: Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, 2022, section IV-A.
    """

    alpha: float = number(above=0, example=0.3, why="it is the concentration of the proportions.")
    draws: ClassVar[int] = 10

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        codes, classes = _classes(self, pool, clients)
        order, _, sizes = shuffled(codes, classes, key.fold("rows"))
        owner, held = torch.empty_like(codes), torch.zeros(clients, dtype=torch.int64)
        for label, rows in enumerate(order.split(sizes.tolist())):
            share = log_gamma_draws(self.alpha, clients, key.fold("shares", label))
            share[held * clients >= pool.rows] = -math.inf
            # Cumulated in order: a parallel sum would make the cuts depend on the number of threads.
            edge = (share - share.max()).exp().cumsum(0)
            cut = (edge / edge[-1] * len(rows)).floor().long()
            got = torch.searchsorted(cut, torch.arange(len(rows)), right=True)
            owner[rows] = got
            held += got.bincount(minlength=clients)
        return owner


def _classes(partition: Partition, pool: Pool, clients: int) -> tuple[Tensor, int]:
    """The classes that occur, numbered from 0 without gaps, and how many they are."""
    if pool.labels is None:
        raise _refuse(partition, clients, "one class a row.", "it deals out rows class by class.", Quantity(1.0))
    values, codes = pool.labels.unique(return_inverse=True)
    return codes, len(values)


@dataclass(frozen=True, repr=False)
class Pathological(Partition):
    """Each client holds k classes: class i mod K and k − 1 random others; their holders share the rows evenly.

    Args:
        classes_per_client: k ≥ 1; with fewer classes than that, each client holds all of them.
    Example:
        >>> Pathological(2)
        Pathological(2)

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
        2017, named it; the draw is that of Li et al., 2022, "#C = k".
    """

    classes_per_client: int = number(least=1, whole=True, example=2, why="a client holds whole classes.")
    draws: ClassVar[int] = 10

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        codes, classes = _classes(self, pool, clients)
        each = min(self.classes_per_client, classes)
        if clients * each < classes:
            enough = Pathological(-(-classes // clients))
            raise _refuse(
                self,
                clients,
                f"clients × classes_per_client ≥ {classes} classes.",
                f"{clients} clients of {each} classes would leave classes without a holder.",
                enough,
            )
        words = key.fold("classes").of(torch.arange(clients)).hash(classes)
        # Every client's first class, and every class's first client: these come before what the hashes say.
        certain = torch.arange(max(clients, classes))
        words[certain % clients, certain % classes] = -(2**63)
        holds = torch.zeros_like(words, dtype=torch.bool).scatter_(1, words.argsort(1)[:, :each], True)
        label, holder = holds.T.nonzero().unbind(1)
        holders = label.bincount(minlength=classes)
        order, rank, sizes = shuffled(codes, classes, key.fold("rows"))
        group = codes[order]
        owner = torch.empty_like(codes)
        owner[order] = holder[(holders.cumsum(0) - holders)[group] + rank * holders[group] // sizes[group]]
        return owner


@dataclass(frozen=True, repr=False)
class Shards(Partition):
    """Rows sorted by label, cut into equal shards, and dealt out: each client gets a few shards at random.

    Args:
        shards_per_client: ≥ 1; 2 is the published choice.
    Example:
        >>> Shards(), Shards(3)
        (Shards(), Shards(3))

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
        2017, section 3.
    """

    shards_per_client: int = number(2, least=1, whole=True, why="a client gets whole shards.")

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        shards = clients * self.shards_per_client
        if pool.labels is None or shards > pool.rows:
            raise _refuse(
                self,
                clients,
                f"one class a row, and clients × shards_per_client ≤ {pool.rows} rows.",
                "rows are sorted by class, and no shard may be empty.",
                IID(),
            )
        order = key.fold("rows").permutation(pool.rows)
        order = order[pool.labels[order].argsort(stable=True)]
        shard = torch.arange(pool.rows) * shards // pool.rows
        owner = torch.empty_like(order)
        owner[order] = key.fold("shards").permutation(shards)[shard] // self.shards_per_client
        return owner


@dataclass(frozen=True, repr=False)
class Quantity(Partition):
    """Sizes that follow a power law, rows at random: client i gets a share proportional to (i + 1)^(−power).

    Args:
        power: ≥ 0; 0 gives equal sizes, 1 is Zipf's law. Client 0 is the largest.
    Example:
        >>> Quantity(1.0)(Pool(11), 3, Key(0)).bincount().tolist()
        [6, 3, 2]
    """

    power: float = number(least=0, example=1.5, why="sizes fall as (i + 1)^(−power).")

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        edge = torch.arange(1, clients + 1, dtype=torch.float64).pow(-self.power).cumsum(0)
        cut = (edge / edge[-1] * pool.rows).round().long()
        return torch.searchsorted(cut, key.permutation(pool.rows), right=True)


@dataclass(frozen=True, repr=False)
class FeatureShift(Partition):
    """Rows dealt out as by `IID`, but seen differently by each client.

    Client i of C sees noise of sd noise · (i + 1) / C, and pictures turned by i · rotation degrees. A row's
    noise is a function of (seed, client, row), applied whenever the row is taken. Held-out rows are not shifted.

    Args:
        noise: standard deviation at the last client, in units of the features as they are taken; ≥ 0.
        rotation: degrees from one client to the next, counter-clockwise, for pictures; 90 moves whole pixels.
    Example:
        >>> FeatureShift(rotation=90)
        FeatureShift(rotation=90.0)

    Reference: after Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, 2022, section
        IV-B, who give the noise as a variance, noise · (i + 1) / C; here it is the standard deviation.
    """

    noise: float = number(0.0, least=0, kw_only=True, example=0.1, why="a standard deviation is not negative.")
    rotation: float = number(0.0, kw_only=True, example=90.0)

    def __post_init__(self) -> None:
        check(self)
        if not (self.noise or self.rotation):
            raise UsageError(
                "FeatureShift() without noise and rotation.",
                "one of them not 0.",
                "otherwise all clients see the same.",
                "FeatureShift(noise=0.1)",
            )

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        return IID()(pool, clients, key)

    def view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        x = rows.take(torch.zeros(1, dtype=torch.int64))[0]
        if not x.is_floating_point():
            raise _refuse(self, clients, "float features.", "a token has no noise and no angle.", IID())
        if self.rotation and x.dim() < 3:
            raise _refuse(
                self,
                clients,
                f"pictures [..., height, width], not rows of shape {tuple(x.shape[1:])}.",
                "only a picture can be turned.",
                FeatureShift(noise=self.noise or 0.1),
            )
        return ShiftedRows(rows, owner, clients, self.noise, self.rotation, key)


@dataclass(frozen=True, repr=False)
class ByColumn(Partition):
    """Natural clients: each row stays with the hospital, speaker or site that the data names.

    No row is moved: a natural client with fewer than `min_rows` train rows is left out, and the notes say so.

    Example:
        >>> ByColumn()(Pool(3, by=torch.tensor([1, 0, 1])), 2, Key(0)).tolist()
        [1, 0, 1]
    """

    natural: ClassVar[bool] = True

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        if pool.by is None:
            raise _refuse(self, clients, "data with natural clients.", "no column says who holds a row.", IID())
        return pool.by
