"""Partitions assign train rows to clients.

A partition is a frozen dataclass that describes a distribution. A call with the rows, the number of clients and a key
returns the owner of each row, so every row belongs to exactly one client. Equal arguments give equal owners.

Tests: tests/data/test_partition.py, tests/data/test_split.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import constructor
from atoll.base.lines import Split
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields
from atoll.data.rows import Rows
from atoll.data.shift import FlippedRows, ShiftedRows, TriggeredRows


class Pool(NamedTuple):
    """The input of a partition: the train rows, in the order of their numbers.

    Args:
        rows: the number of rows.
        labels: the class of each row, int64 `[rows]`; None if rows have no class.
        by: the natural client of each row, int64 `[rows]`; None if the data has no natural clients.
    """

    rows: int
    labels: Tensor | None = None
    by: Tensor | None = None


class Partition:
    """The base of all partitions. `partition(pool, clients, key)` returns the owner of each train row, int64 `[rows]`.

    A partition is a frozen dataclass, so its `repr` is its constructor call. Your own partition defines `__call__`,
    which returns the owners.

    natural: whether the data determine the owners. Then the key has no effect, and no row may move to another client.
    draws: how often the split calls a random partition, at most, until every client has `min_rows` rows. After that it
        moves rows. More than 1 is useful if the sizes of clients are random.
    """

    natural: ClassVar[bool] = False
    draws: ClassVar[int] = 1

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        raise NotImplementedError

    def view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        """Return the rows with the feature shift of their clients.

        Args:
            rows: the rows of the data set.
            owner: the client of each row, int64 `[rows]`; −1 for a row that belongs to no client.
            clients: the number of clients.
            key: the key of the random numbers.
        """
        return rows

    def held_view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        """Return held-out rows as their clients see them. The arguments are those of `view`."""
        return self.view(rows, owner, clients, key)

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return constructor(self)


def _refuse(partition: Partition, clients: int, required: str, why: str, write: Partition) -> UsageError:
    given = f"{partition} cannot split this data over {clients} clients."
    return UsageError(given, required, why, Split(clients, str(write)))


def in_groups(group: Tensor) -> Tensor:
    """Sort row numbers by group, in row order within a group: a stable `argsort` in a third of its time.

    Args:
        group: the group of each row, int64 `[n]`, in [0, 2⁶³ / n).
    Returns:
        row numbers, int64 `[n]`.
    Example:
        >>> in_groups(torch.tensor([1, 0, 1, 0])).tolist()
        [1, 3, 0, 2]
    """
    rows = len(group)
    words = (group * rows).add_(torch.arange(rows))  # distinct, so numpy's vectorized unstable sort is valid
    words.numpy().sort()
    return words.remainder_(rows) if rows else words


def shuffled(group: Tensor, groups: int, key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows by group, with random order within each group. A hash of each row determines the order.

    Args:
        group: the group of each row, int64 `[n]` in [0, groups).
        groups: the number of groups.
        key: the key of the random numbers.
    Returns:
        row numbers, int64 `[n]`; the rank of each of them within its group, int64 `[n]`; and the sizes of the
        groups, int64 `[groups]`.
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
        owner: the client of each row, int64 `[n]`; n ≥ clients · min_rows.
        clients: the number of clients.
        min_rows: the number of rows that every client must have at least.
        key: the key of the random selection of moved rows.
    Returns:
        The new owners, int64 `[n]`. The number of moved rows is the number of missing rows, which is the minimum.
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
    # Move the highest ranks first, because cutting to `low` may free more rows than needed.
    surplus = order[rank >= low]
    surplus = surplus[rank[rank >= low].argsort(descending=True, stable=True)[:wanted]]
    moved = owner.clone()
    moved[surplus] = torch.arange(clients).repeat_interleave(missing)
    return moved


@dataclass(frozen=True, repr=False)
class IID(Partition):
    """Assign rows at random; sizes differ by at most one row.

    Example:
        >>> IID()(Pool(5), 2, Key(0)).bincount().tolist()
        [3, 2]
    """

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        return key.permutation(pool.rows) % clients


def log_gamma_draws(shape: float, n: int, key: Key) -> Tensor:
    """Draw n logarithms of Gamma(shape, 1), float64 `[n]`; no draw underflows, even for a small shape.

    Marsaglia and Tsang's rejection at shape + 1, then G(shape) = G(shape + 1) · U^(1/shape).

    Args:
        shape: the shape parameter of the distribution, > 0.
        n: the number of results, ≥ 0.
        key: the key of the random numbers.
    Example:
        >>> round(log_gamma_draws(3.0, 100_000, Key(0)).exp().mean().item(), 1)
        3.0

    Reference: Marsaglia, Tsang, A Simple Method for Generating Gamma Variables, 2000.
    """
    d = shape + 1 - 1 / 3
    out = torch.log1p(-key.fold("boost").uniform(n)) / shape
    todo, attempt = torch.arange(n), 0
    while len(todo):  # each pass accepts at least 95 %
        x = key.fold("normal", attempt).normal(len(todo))
        u = key.fold("accept", attempt).uniform(len(todo))
        v = (1 + x / math.sqrt(9 * d)) ** 3
        good = (v > 0) & (torch.log1p(-u) < 0.5 * x**2 + d - d * v + d * v.log())
        out[todo[good]] += (d * v[good]).log()
        todo, attempt = todo[~good], attempt + 1
    return out


@dataclass(frozen=True, repr=False)
class Dirichlet(Partition):
    """Creates label skew: each class is divided in proportions drawn from Dirichlet(alpha, …, alpha).

    The classes are assigned one after another. A client that already has 1/C of all rows, for C clients, gets no rows
    of the next classes, so sizes stay comparable.

    Args:
        alpha: the parameter of the Dirichlet distribution, > 0. A small value is skewed: with 0.1 a client has a few
            classes. A large value is even: with 1000 all clients have nearly the same mix.
    Example:
        >>> Dirichlet(0.3)
        Dirichlet(0.3)

    Reference: Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, 2022, section IV-A.
    """

    alpha: float = bounded_number(above=0, example=0.3, why="it is the concentration of the proportions.")
    draws: ClassVar[int] = 10

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        codes, classes = _classes(self, pool, clients)
        order, _, sizes = shuffled(codes, classes, key.fold("rows"))
        owner, rows_of_client = torch.empty_like(codes), torch.zeros(clients, dtype=torch.int64)
        for label, rows in enumerate(order.split(sizes.tolist())):
            share = log_gamma_draws(self.alpha, clients, key.fold("shares", label))
            share[rows_of_client * clients >= pool.rows] = -math.inf
            # cumsum adds in order; a parallel sum would make the cuts depend on the number of threads.
            edge = (share - share.max()).exp().cumsum(0)
            cut = (edge / edge[-1] * len(rows)).floor().long()
            new_owner = torch.searchsorted(cut, torch.arange(len(rows)), right=True)
            owner[rows] = new_owner
            rows_of_client += new_owner.bincount(minlength=clients)
        return owner


def _classes(partition: Partition, pool: Pool, clients: int) -> tuple[Tensor, int]:
    """Renumber the occurring classes from 0 without gaps; return the codes and the number of classes."""
    if pool.labels is None:
        raise _refuse(partition, clients, "one class per row.", "it assigns rows class by class.", Quantity(1.0))
    values, codes = pool.labels.unique(return_inverse=True)
    return codes, len(values)


@dataclass(frozen=True, repr=False)
class Pathological(Partition):
    """Client i holds k of K classes: class i mod K and k − 1 random others; a class's holders share its rows evenly.

    Args:
        classes_per_client: k ≥ 1; if there are fewer than k classes, each client holds all of them.
    Example:
        >>> Pathological(2)
        Pathological(2)

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
        2017, named it; the draw is that of Li et al., 2022, "#C = k".
    """

    classes_per_client: int = bounded_number(least=1, whole=True, example=2, why="a client holds whole classes.")
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
        # Every client's first class and every class's first client are certain: they sort before all hashes.
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
    """Sort rows by label, cut them into equal shards, and give each client a few shards at random.

    Args:
        shards_per_client: the number of shards of each client, ≥ 1; the paper uses 2.
    Example:
        >>> Shards(), Shards(3)
        (Shards(), Shards(3))

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
        2017, section 3.
    """

    shards_per_client: int = bounded_number(2, least=1, whole=True, why="a client gets whole shards.")

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        shards = clients * self.shards_per_client
        if pool.labels is None or shards > pool.rows:
            raise _refuse(
                self,
                clients,
                f"one class per row, and clients × shards_per_client ≤ {pool.rows} rows.",
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
    """Creates clients of unequal sizes with random rows: client i gets a share proportional to (i + 1)^(−power).

    Args:
        power: the exponent, ≥ 0; 0 gives equal sizes, 1 is Zipf's law. Client 0 is the largest.
    Example:
        >>> Quantity(1.0)(Pool(11), 3, Key(0)).bincount().tolist()
        [6, 3, 2]
    """

    power: float = bounded_number(least=0, example=1.5, why="sizes fall as (i + 1)^(−power).")

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        edge = torch.arange(1, clients + 1, dtype=torch.float64).pow(-self.power).cumsum(0)
        cut = (edge / edge[-1] * pool.rows).round().long()
        return torch.searchsorted(cut, key.permutation(pool.rows), right=True)


@dataclass(frozen=True, repr=False)
class FeatureShift(Partition):
    """Creates feature skew: rows are assigned as by `IID`, and each client transforms its features differently.

    Client i of C gets noise of standard deviation noise · (i + 1) / C, and images rotated by i · rotation degrees. The
    noise of a row is a function of (seed, client, row), and is applied when the row is read. Held-out rows are changed
    for the evaluation of their client, and not for the evaluation of all rows together.

    Args:
        noise: standard deviation at the last client, in units of the scaled features; ≥ 0.
        rotation: degrees from one client to the next, counter-clockwise, for images; 90 moves whole pixels.
    Example:
        >>> FeatureShift(rotation=90)
        FeatureShift(rotation=90.0)

    Reference: after Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, 2022, section
        IV-B. There noise · (i + 1) / C is the variance; here it is the standard deviation.
    """

    noise: float = bounded_number(0.0, least=0, kw_only=True, example=0.1, why="a standard deviation is not negative.")
    rotation: float = bounded_number(0.0, kw_only=True, example=90.0)

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.noise or self.rotation):
            raise UsageError(
                "FeatureShift() has neither noise nor rotation.",
                "at least one of them not 0.",
                "otherwise the features of all clients are the same.",
                "FeatureShift(noise=0.1)",
            )

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        return IID()(pool, clients, key)

    def view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        x = rows.take(torch.zeros(1, dtype=torch.int64))[0]
        if not x.is_floating_point():
            raise _refuse(
                self,
                clients,
                "float features.",
                "token ids and rows of several tensors cannot be rotated or get noise.",
                IID(),
            )
        if self.rotation and x.dim() < 3:
            raise _refuse(
                self,
                clients,
                f"images [..., height, width], not rows of shape {tuple(x.shape[1:])}.",
                "only an image can be rotated.",
                FeatureShift(noise=self.noise or 0.1),
            )
        return ShiftedRows(rows, owner, clients, self.noise, self.rotation, key)


@dataclass(frozen=True, repr=False)
class ByColumn(Partition):
    """Uses natural clients: each row belongs to the hospital, speaker or site that the data names.

    No row is moved. A natural client with fewer than `min_rows` train rows is left out, and a note reports it.

    Example:
        >>> ByColumn()(Pool(3, by=torch.tensor([1, 0, 1])), 2, Key(0)).tolist()
        [1, 0, 1]
    """

    natural: ClassVar[bool] = True

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        if pool.by is None:
            raise _refuse(self, clients, "data with natural clients.", "no column names the clients.", IID())
        return pool.by


class _Attack(Partition):
    """The base of partitions in which some clients have changed rows. A subclass has the fields `share` and `of`."""

    share: float
    of: Partition
    stream: ClassVar[str]  # of the draw of the attackers; results depend on it

    def attackers(self, clients: int, key: Key) -> Tensor:
        """The numbers of the attackers, int64, ascending.

        Args:
            clients: the number of clients.
            key: that of `view`.
        """
        count = math.floor(self.share * clients + 1e-9)
        return key.fold(self.stream).permutation(clients)[:count].sort().values

    def held_view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        return self.of.held_view(rows, owner, clients, key)

    def _take_over(self, given: str, write: str) -> None:
        """Refuse another value than a partition, and a second attack; then take over the facts of the partition."""
        if not isinstance(self.of, Partition) or isinstance(self.of, _Attack):
            raise UsageError(given, "another partition.", write=write)
        for name in ("natural", "draws"):
            object.__setattr__(self, name, getattr(self.of, name))

    def _labels(self, pool: Pool, clients: int) -> Tensor:
        """The class of each row. Refuses rows without one, and a share that is less than one client."""
        if pool.labels is None or pool.labels.dim() > 1:
            raise _refuse(self, clients, "one class per row.", "it changes the class of rows.", self.of)
        if self.share and not self.share * clients + 1e-9 >= 1:
            required = f"a share of at least one client, {1 / clients:.3g}."
            why = "the result would look like that of a rule that withstands the attack."
            share = math.ceil(100 / clients) / 100 if clients > 2 else 0.0
            raise _refuse(self, clients, required, why, replace(cast("Any", self), share=share))
        return pool.labels


@dataclass(frozen=True, repr=False)
class LabelFlip(_Attack):
    """Simulates clients that train with wrong labels: class y of C becomes C − 1 − y.

    The attackers are ⌊share · clients⌋ clients, drawn by the seed. They train and send as all clients do, so each rule
    and each engine can meet them. Held-out rows keep their labels.

    Args:
        share: the share of attackers, in [0, 0.5); 0 changes no label.
        of: the partition that assigns the rows.
    Raises:
        UsageError: the share is out of range or less than one client, or rows have no class.
    Example:
        >>> LabelFlip(0.2, Dirichlet(1.0))
        LabelFlip(of=Dirichlet(1.0))

    Reference: Fang, Cao, Jia, Gong, Local Model Poisoning Attacks to Byzantine-Robust Federated Learning, 2020.
    """

    stream: ClassVar[str] = "label flip"
    share: float = bounded_number(0.2, least=0, below=0.5, why="no rule withstands a majority of attackers.")
    of: Partition = field(default_factory=IID)

    def __post_init__(self) -> None:
        check_fields(self)
        self._take_over(f"LabelFlip({self.share!r}, {self.of!r:.60}).", f"LabelFlip({self.share!r}, IID())")

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        self._labels(pool, clients)
        return self.of(pool, clients, key)

    def view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        seen = self.of.view(rows, owner, clients, key)
        return FlippedRows(seen, torch.isin(owner, self.attackers(clients, key)), int(rows.targets().max()) + 1)


@dataclass(frozen=True, repr=False)
class Backdoor(_Attack):
    """Simulates clients that plant a backdoor: half of their rows have a trigger, and the label of the attacker.

    The trigger is the lower right square of an image, or the last features of a row. The attackers are
    ⌊share · clients⌋ clients, drawn by the seed. They train and send as all clients do. Held-out rows have no trigger;
    `atoll attack` also measures the share of them that a trigger turns into the target.

    Args:
        target: the class of the rows with the trigger, ≥ 0.
        share: the share of attackers, in [0, 0.5); 0 changes no row.
        of: the partition that assigns the rows.
        size: the side of the square in pixels, or the number of features, ≥ 1.
        value: the value of the trigger, in units of the features.
    Raises:
        UsageError: an argument is out of range, the share is less than one client, or rows have no such class.
    Example:
        >>> Backdoor(3, 0.2, Dirichlet(1.0))
        Backdoor(3, of=Dirichlet(1.0))

    Reference: Bagdasaryan et al., How To Backdoor Federated Learning, 2020; Gu, Dolan-Gavitt, Garg, BadNets, 2017.
    """

    stream: ClassVar[str] = "backdoor"
    target: int = bounded_number(0, least=0, whole=True)
    share: float = bounded_number(0.2, least=0, below=0.5, why="no rule withstands a majority of attackers.")
    of: Partition = field(default_factory=IID)
    size: int = bounded_number(3, least=1, whole=True)
    value: float = bounded_number(1.0)

    def __post_init__(self) -> None:
        check_fields(self)
        given = f"Backdoor({self.target!r}, {self.share!r}, {self.of!r:.60})."
        self._take_over(given, f"Backdoor({self.target!r}, {self.share!r}, IID())")

    def __call__(self, pool: Pool, clients: int, key: Key) -> Tensor:
        labels = self._labels(pool, clients)
        if not bool((labels == self.target).any()):
            why = "rows with the trigger get this class."
            raise _refuse(self, clients, f"a target from 0 to {int(labels.max())}.", why, replace(self, target=0))
        return self.of(pool, clients, key)

    def view(self, rows: Rows, owner: Tensor, clients: int, key: Key) -> Rows:
        seen = self.of.view(rows, owner, clients, key)
        half = key.fold("poisoned rows").uniform(len(owner)) < 0.5
        bad = torch.isin(owner, self.attackers(clients, key)) & half
        return TriggeredRows(seen, bad, self.target, self.size, self.value)


PARTITIONS: Mapping[str, type[Partition]] = {
    kind.__name__: kind
    for kind in (IID, Dirichlet, Pathological, Shards, Quantity, FeatureShift, ByColumn, LabelFlip, Backdoor)
}
