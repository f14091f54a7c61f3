"""Simulated attacks: a fixed share of the clients sends updates that it has agreed on.

| attack | attackers send |
|---|---|
| `SignFlip(c)` | their own updates times −c |
| `Gaussian(s)` | normal numbers of standard deviation s |
| `ALIE()` | the mean of the honest updates minus z standard deviations, hidden among them |
| `InnerProduct(eps)` | −ε times the mean of the honest updates |
| `Claim(rows)` | their own updates, with a claimed number of rows |

An attack acts where all updates of a round are together, at the aggregator, because attackers know the updates of
other clients. It exists in simulations only.

Tests: tests/identities/test_attacks.py
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Self

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import constructor
from atoll.base.lines import Part
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.layout import Layout
from atoll.plan.aggregate import exact
from atoll.plan.aggregate.robust import FLTrust
from atoll.plan.aggregate.rows import PartialRows, RowRule
from atoll.plan.protocols import Aggregator, Conflict, Contribution, Ids, Population, RoundInfo, Slots, Tensors, Total


class Attack:
    """The base of attacks. An attack defines `updates`, or `claimed`, or both."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return constructor(self)

    def updates(self, own: Tensor, honest: Tensor, key: Key) -> Tensor:
        """The updates that the attackers send, floats `[f, d]`.

        Args:
            own: the updates that they computed from their rows, float64 `[f, d]`.
            honest: the updates of the other clients of the round, float64 `[n − f, d]`.
            key: the key of the round, with one stream for each attacker.
        """
        return own

    def claimed(self, rows: Tensor) -> Tensor:
        """The numbers of rows that the attackers claim, int64 `[f]`, from their true ones."""
        return rows


@dataclass(frozen=True, repr=False)
class SignFlip(Attack):
    """Each attacker sends −c times its own update.

    Args:
        c: the factor, > 0.
    Raises:
        UsageError: c is out of range.
    Example:
        >>> SignFlip(5.0).updates(torch.tensor([[1.0]]), torch.tensor([[2.0]]), Key(0))
        tensor([[-5.]])

    Reference: Li et al., RSA: Byzantine-Robust Stochastic Aggregation Methods, 2019.
    """

    c: float = bounded_number(1.0, above=0, example=5.0)

    def updates(self, own: Tensor, honest: Tensor, key: Key) -> Tensor:
        return -self.c * own


@dataclass(frozen=True, repr=False)
class Gaussian(Attack):
    """Each attacker sends independent normal numbers of mean 0 and standard deviation s.

    Args:
        s: the standard deviation of each coordinate, in units of the update, > 0.
    Raises:
        UsageError: s is out of range.
    Example:
        >>> Gaussian(1.0).updates(torch.zeros(1, 2), torch.zeros(1, 2), Key(0).of(torch.tensor([4]))).shape
        torch.Size([1, 2])

    Reference: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017.
    """

    s: float = bounded_number(1.0, above=0, example=1.0)

    def updates(self, own: Tensor, honest: Tensor, key: Key) -> Tensor:
        return self.s * key.normal(own.shape[1], own.dtype)


@dataclass(frozen=True, repr=False)
class ALIE(Attack):
    """A little is enough: all attackers send one update at the edge of the honest ones.

    a = m − z·σ,  m and σ the mean and the standard deviation of each coordinate of the honest updates

    z = Φ⁻¹((n − f − s)/(n − f)),  s = ⌊n/2 + 1⌋ − f: with s honest clients that are further away the attackers are a
    majority. z is at least 0.

    Example:
        >>> ALIE().updates(torch.zeros(2, 1), torch.tensor([[1.0], [1.0], [1.0]]), Key(0))
        tensor([[1.],
                [1.]])

    Reference: Baruch, Baruch, Goldberg, A Little Is Enough: Circumventing Defenses For Distributed Learning, 2019.
    """

    def updates(self, own: Tensor, honest: Tensor, key: Key) -> Tensor:
        f, others = len(own), len(honest)
        further = max(1, (f + others) // 2 + 1 - f)
        z = NormalDist().inv_cdf(max(0.5, (others - further) / others))
        return (honest.mean(0) - z * honest.std(0, correction=0)).expand_as(own)


@dataclass(frozen=True, repr=False)
class InnerProduct(Attack):
    """All attackers send −ε times the mean of the honest updates: the aggregate has a negative inner product with it.

    Args:
        eps: ε, > 0.
    Raises:
        UsageError: eps is out of range.
    Example:
        >>> InnerProduct(0.5).updates(torch.zeros(1, 1), torch.tensor([[1.0], [3.0]]), Key(0))
        tensor([[-1.]])

    Reference: Xie, Koyejo, Gupta, Fall of Empires: Breaking Byzantine-Tolerant SGD by Inner Product Manipulation, 2020.
    """

    eps: float = bounded_number(0.5, above=0, example=0.5)

    def updates(self, own: Tensor, honest: Tensor, key: Key) -> Tensor:
        return (-self.eps * honest.mean(0)).expand_as(own)


@dataclass(frozen=True, repr=False)
class Claim(Attack):
    """Each attacker claims a number of rows, so that a mean by rows gives it this weight.

    Args:
        rows: the number of rows that it claims, ≥ 1.
        of: the attack by which it forms its update; None: it sends its own.
    Raises:
        UsageError: rows is out of range, or `of` is not an attack.
    Example:
        >>> Claim(1000).claimed(torch.tensor([3, 5])).tolist()
        [1000, 1000]
    """

    rows: int = bounded_number(least=1, whole=True, example=10**6)
    of: Attack | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.of is not None and not isinstance(self.of, Attack):
            write = f"Claim({self.rows!r}, SignFlip(5.0))"
            raise UsageError(f"Claim({self.rows!r}, {self.of!r:.60}).", "an attack as `of`, or None.", write=write)

    def updates(self, own: Tensor, honest: Tensor, key: Key) -> Tensor:
        return own if self.of is None else self.of.updates(own, honest, key)

    def claimed(self, rows: Tensor) -> Tensor:
        return torch.full_like(rows, self.rows)


ATTACKS = (SignFlip, Gaussian, ALIE, InnerProduct, Claim)


@dataclass(frozen=True, repr=False)
class Attacked(RowRule):
    """Another rule in a simulation in which a share of the clients attacks.

    The attackers are ⌊share · C⌋ of the C clients, drawn by the seed, without the trusted client of `FLTrust`; they are
    the same in every round. They train as
    all clients do. Then their updates are those of the attack; their buffers and metrics are their own. The attack
    acts on decoded updates.

    Args:
        of: the rule that receives the updates, without a secure sum.
        attack: the attack.
        share: the share of attackers in the population, in [0, 0.5).
        seed: the seed of the attackers and of their random numbers.
    Raises:
        UsageError: an argument is out of range, `of` has a secure sum, or the share is less than one client.
        RunError: all contributions of a round are those of attackers, or an attack sends numbers beyond the dtype.
    Example:
        >>> from atoll.plan.aggregate import Median
        >>> Attacked(Median(), SignFlip(5.0), share=0.2)
        Attacked(Median(), attack=SignFlip(5.0))
    """

    of: Aggregator
    attack: Attack
    share: float = bounded_number(0.2, least=0, below=0.5, why="no rule withstands a majority of attackers.")
    seed: int = bounded_number(0, least=0, whole=True)
    in_memory = True

    def __post_init__(self) -> None:
        check_fields(self)
        given = f"Attacked({self.of!r:.60}, {self.attack!r:.60})."
        example = "Attacked(Median(), SignFlip(5.0), share=0.2)"
        if not isinstance(self.of, Aggregator) or isinstance(self.of, Attacked):
            raise UsageError(given, "an aggregator, and no second attack.", write=example)
        if not isinstance(self.attack, Attack):
            raise UsageError(given, f"an attack: {', '.join(kind.__name__ for kind in ATTACKS)}.", write=example)
        if self.of.secure is not None:
            raise UsageError(given, "a rule without a secure sum.", "an attack reads the updates of others.", example)
        if isinstance(self.of, RowRule) and type(self.of).noted is not RowRule.noted:
            raise UsageError(
                given, "a rule that reads updates only.", "an attack changes no loss of a client.", example
            )
        object.__setattr__(self, "weights", self.of.weights)
        object.__setattr__(self, "over", self.of.over)
        object.__setattr__(self, "forms_sum", self.of.forms_sum)
        object.__setattr__(self, "uses_entropy", self.of.uses_entropy)
        object.__setattr__(self, "_attackers", None)

    @property
    def attackers(self) -> Tensor:
        """The ids of the attackers, int64, ascending.

        Raises:
            UsageError: the aggregator was not bound.
        """
        found: Tensor | None = self.__dict__["_attackers"]
        if found is None:
            raise UsageError(
                f"{self!r:.100} was not bound.", "an aggregator that knows the clients: `atoll.plan.round.bind`."
            )
        return found

    def least_rows(self) -> int:
        return self.of.least_rows() if isinstance(self.of, RowRule) else 1

    def for_rows(self, n: int) -> str:
        inner = self.of.for_rows(n) if isinstance(self.of, RowRule) else repr(self.of)
        return f"Attacked({inner}, {self.attack!r}, share={self.share!r})"

    def bind(self, population: Population, chance: Tensor) -> Self:
        """A copy that knows the attackers, and whose rule knows the clients.

        Raises:
            UsageError: the share is less than one client, or the rule is not defined for so few clients.
        """
        clients = population.clients
        count = math.floor(self.share * clients + 1e-9)
        if self.share and not count:
            share = math.ceil(100 / clients) / 100 if clients > 2 else 0.0
            raise UsageError(
                f"{self!r:.100} with {clients} clients: no client attacks.",
                "a share of at least one client.",
                "the result would look like that of a rule that withstands the attack.",
                Part(repr(replace(self, share=share)), "aggregator"),
            )
        bound = super().bind(population, chance)
        object.__setattr__(bound, "of", self.of.bind(population, chance))
        drawn = Key(self.seed).fold("attackers").permutation(clients)
        drawn = drawn[drawn != self.of.client] if isinstance(self.of, FLTrust) else drawn
        object.__setattr__(bound, "_attackers", drawn[:count].sort().values)
        return bound

    def server(self, layout: Layout) -> Tensors:
        """That of the rule."""
        return self.of.server(layout)

    def in_round(self, server: Tensors, key: Key) -> Self:
        """A copy whose rule knows the server state and the key of a round."""
        bound = copy.copy(self)
        object.__setattr__(bound, "of", self.of.in_round(server, key))
        return bound

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """That of the rule."""
        return self.of.server_update(total, server, info)

    def weigh(self, clients: Tensor, rows: Tensor) -> Tensor:
        """The weight that the rule gives to honest contributions, int64 `[K]`."""
        return self.of.weigh(clients, rows)

    def total(self, partial: PartialRows) -> Total:
        """The total of the rule after the attack, with the sums of all clients.

        Raises:
            RunError: all contributions are those of attackers, or an attack sends numbers beyond the dtype.
        """
        sums = self._mean.total(partial.rest)
        if not len(partial):
            return sums
        means = {name: partial.matrix(f"means/{name}") for name in partial.names}
        client, repeat, rows = (partial.matrix(name) for name in ("client", "repeat", "rows"))
        bad = torch.isin(client, self.attackers)
        if bool(bad.any()) and "update" in means:
            means["update"] = self._sent(means["update"], bad, client)
            rows = torch.where(bad, self.attack.claimed(rows), rows)
        given = Contribution(means, {}, rows, {}, {})
        total = self.of.total(self.of.fold(self.of.zero(), given, Ids(client, repeat)))
        return total._replace(sums=sums.sums, counters=sums.counters)

    def _sent(self, x: Tensor, bad: Tensor, client: Tensor) -> Tensor:
        """The updates after the attack, as x `[n, d]` in the order of (client, repeat)."""
        if bool(bad.all()):
            raise RunError(
                f"{self!r:.100}: all {len(bad)} contributions of a round are those of attackers.",
                "a cohort with an honest client.",
                "without one there is no update that a rule could find.",
                Part("Everyone()", "cohort"),
            )
        at = bad.to(x.device)
        own, honest = x[at].double(), x[~at].double()
        # The updates differ from round to round, and so do the random numbers that follow from their bits.
        key = Key(self.seed).fold("attack", int(honest.view(torch.int64).sum()))
        sent = self.attack.updates(own, honest, key.of(client[bad].to(x.device))).to(x.dtype)
        if not exact.bounded(sent):
            raise RunError(
                f"{self.attack!r} sends numbers beyond {x.dtype}.",
                "finite numbers.",
                "a server refuses a message with other ones.",
            )
        out = x.clone()
        out[at] = sent
        return out

    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """Divide as the rule does."""
        return self.of.finalize(total, info)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """The conflicts of a rule of rows, and those of the rule itself."""
        yield from super().conflicts(slots)
        if not isinstance(self.of, RowRule):
            yield from self.of.conflicts(slots)
