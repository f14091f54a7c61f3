"""Samplers: the selection of the clients of a round.

A sampler is called with the population, the round and a key. It returns the ids of the cohort, and the probability that
each client is selected. `over="expected"` computes its divisor from these probabilities.

Tests: tests/identities/test_samplers.py
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Part
from atoll.base.random import Key
from atoll.base.validation import plain_fields
from atoll.plan.pace import counts_each
from atoll.plan.protocols import Cohort, Conflict, Population, Sampler, Selection, Slots, Tensors


def _cohort(ids: Tensor, chance: Tensor | float) -> Cohort:
    return Cohort(ids, torch.as_tensor(chance, dtype=torch.float64, device=ids.device))


def _count(name: str, n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"{name}({n!r}).", "a whole number of clients, at least 1.", write=f"{name}(10)")


def _enough(name: str, n: int, population: Population) -> None:
    if n > population.clients:
        raise UsageError(
            f"A cohort of {n} clients out of {population.clients}.",
            f"at most {population.clients}.",
            "a client can be selected at most once in a round.",
            Part(f"{name}({population.clients})", "cohort"),
        )


@dataclass(frozen=True, repr=False)
class Everyone(Sampler):
    """Selects every client in every round.

    Example:
        >>> Everyone()(Population(3, torch.tensor([5, 5, 5])), 0, Key(0)).ids.tolist()
        [0, 1, 2]
    """

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        return _cohort(torch.arange(population.clients, device=population.sizes.device), 1.0)

    def selection(self, clients: int, rounds: int) -> Selection:
        """Each client takes part in every round."""
        return Selection("add or remove", rounds, 1.0, clients)


@dataclass(frozen=True, repr=False)
class Uniform(Sampler):
    """Selects n of C clients. All sets of n clients are equally likely: each client is selected with probability n/C.

    Args:
        n: the number of clients in a cohort, 1 … C.
    Raises:
        UsageError: n is not an integer ≥ 1, or it exceeds the population.
    Example:
        >>> len(Uniform(2)(Population(5, torch.ones(5, dtype=torch.int64)), 0, Key(0)).ids)
        2
    """

    n: int = field(metadata={"example": 10})
    interchangeable = True

    def __post_init__(self) -> None:
        plain_fields(self, "n")
        _count("Uniform", self.n)

    def resized(self, ask: Callable[[int], int]) -> Uniform:
        """The same sampler for ask(n) clients in place of n."""
        return _with_n(self, ask)

    def largest(self, population: Population) -> int:
        """n, the number of clients of each cohort."""
        return self.n

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        _enough("Uniform", self.n, population)
        return _cohort(key.distinct(self.n, population.clients).sort().values, self.n / population.clients)

    def selection(self, clients: int, rounds: int) -> Selection:
        """A fixed number of clients without replacement: neighbours differ in the data of one client."""
        return Selection("replace one", rounds, min(1.0, self.n / clients), self.n, fixed_size=True)


@dataclass(frozen=True, repr=False)
class Fraction(Sampler):
    """Selects n clients like `Uniform`, where n is the fraction q of all clients, rounded to an integer ≥ 1.

    Args:
        q: the fraction of the clients, in (0, 1].
    Raises:
        UsageError: q is out of range.
    Example:
        >>> Fraction(0.1).count(25)
        3
    """

    q: float = field(metadata={"example": 0.1})
    interchangeable = True

    def __post_init__(self) -> None:
        plain_fields(self, "q")
        if not isinstance(self.q, (int, float)) or not 0 < self.q <= 1:
            raise UsageError(f"Fraction({self.q!r}).", "a fraction in (0, 1].", write="Fraction(0.1)")

    def resized(self, ask: Callable[[int], int]) -> Sampler:
        """A sampler that selects ask(n) clients, where n is the number of clients that this fraction selects."""
        return _Resized(self, ask) if ask(1000) > 1000 else self

    def count(self, clients: int) -> int:
        """The number of clients that the fraction selects out of all clients."""
        return max(1, math.floor(self.q * clients + 0.5))

    def largest(self, population: Population) -> int:
        """The number of clients of each cohort."""
        return self.count(population.clients)

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        return Uniform(self.count(population.clients))(population, round, key)

    def selection(self, clients: int, rounds: int) -> Selection:
        """That of `Uniform`."""
        return Uniform(self.count(clients)).selection(clients, rounds)


def fraction(q: float) -> Fraction:
    """Return `Fraction(q)`. A plan calls this function if its argument `cohort` is a float q."""
    return Fraction(q)


@dataclass(frozen=True, repr=False)
class Poisson(Sampler):
    """Selects each client independently with probability q. A cohort may be empty.

    Args:
        q: the probability that a client is selected, in (0, 1].
    Raises:
        UsageError: q is out of range.
    Example:
        >>> Poisson(1.0)(Population(3, torch.ones(3, dtype=torch.int64)), 0, Key(0)).ids.tolist()
        [0, 1, 2]

    Reference: Abadi et al., Deep Learning with Differential Privacy, 2016: the sampling that privacy accounting
        assumes.
    """

    q: float = field(metadata={"example": 0.1})
    needs_population = True

    def __post_init__(self) -> None:
        plain_fields(self, "q")
        if not isinstance(self.q, (int, float)) or not 0 < self.q <= 1:
            raise UsageError(f"Poisson({self.q!r}).", "a chance in (0, 1].", write="Poisson(0.1)")

    def largest(self, population: Population) -> int:
        """The least n with P[cohort > n] ≤ 2⁻⁴⁰. A larger cohort of a plan with a secure sum is an empty round."""
        return binomial_tail(population.clients, self.q, 2.0**-40)

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        return _cohort((key.uniform(population.clients) < self.q).nonzero().squeeze(1), self.q)

    def selection(self, clients: int, rounds: int) -> Selection:
        """An independent coin for each client and each round."""
        return Selection("add or remove", rounds, self.q, self.q * clients)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Refuse every pace except `Sync()` and a deadline: the other paces need a cohort of fixed size."""
        if not counts_each(slots.pace):
            why = "every client is selected independently, so the size of a cohort is not fixed."
            yield Conflict(f"{self!r} with {slots.pace!r}.", "Sync(), or a cohort of n clients.", why, "Sync()")


@dataclass(frozen=True, repr=False)
class Weighted(Sampler):
    """Selects n clients without replacement, each with a probability proportional to its rows: n·wᵢ/Σw, at most 1.

    Systematic sampling: the clients form a line in a keyed random order, each with a length equal to its rows. Marks at
    n equal distances select n clients. `Mean` divides the weight of each client by its probability: with
    `weights="examples"` the mean over all draws is the mean over all rows, with `"equal"` the mean over all clients.

    Args:
        n: the number of clients in a cohort, at least 1 and at most the number of clients that have rows.
    Raises:
        UsageError: n is not an integer ≥ 1, or it exceeds the number of clients that have rows.
    Example:
        >>> Weighted(2)(Population(3, torch.tensor([9, 1, 0])), 0, Key(0)).ids.tolist()
        [0, 1]

    Reference: Madow, On the Theory of Systematic Sampling, II, 1949.
    """

    n: int = field(metadata={"example": 10})
    needs_population = True

    def __post_init__(self) -> None:
        plain_fields(self, "n")
        _count("Weighted", self.n)

    def resized(self, ask: Callable[[int], int]) -> Weighted:
        """The same sampler for ask(n) clients in place of n."""
        return _with_n(self, ask)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Refuse an aggregator that returns the sum Σ w·g. Only a mean can divide by the selection probability.

        This sampler selects a client with many rows more often. In a sum its rows would count twice: by the selection
        probability and by the weight of the client.
        """
        if slots.aggregator.forms_sum:
            why = "large clients are selected more often, and a sum does not divide by the probability."
            yield Conflict(
                f"{slots.aggregator!r} with {self!r}.",
                "Mean(), or a cohort of n clients.",
                why,
                "Mean()",
            )

    def largest(self, population: Population) -> int:
        """n, the number of clients of each cohort."""
        return self.n

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        sizes = population.sizes
        _enough("Weighted", self.n, population._replace(clients=int((sizes > 0).sum())))
        certain = _certain(sizes, self.n)
        rest = sizes.masked_fill(certain, 0)
        remaining, whole = self.n - int(certain.sum()), int(rest.sum())
        order = key.permutation(population.clients).to(sizes.device)
        # Integers, so no rounding. Each length is below the distance of two marks, so no client is selected twice.
        edges = (rest[order] * remaining).cumsum(0)
        start = (key.fold("start").hash(1) & (2**62 - 1)) % max(whole, 1)
        marks = start.to(edges) + whole * torch.arange(remaining, device=edges.device)
        drawn = order[torch.searchsorted(edges, marks, right=True)]
        ids = torch.cat((certain.nonzero().squeeze(1), drawn)).sort().values
        return _cohort(ids, torch.where(certain, 1.0, rest.to(torch.float64) * remaining / max(whole, 1)))


def binomial_tail(n: int, q: float, chance: float) -> int:
    """The least x with P[Bin(n, q) > x] ≤ chance.

    Example:
        >>> binomial_tail(10, 1.0, 0.5), binomial_tail(3, 0.5, 0.13)
        (10, 2)
    """
    if q >= 1:
        return n
    spread = math.sqrt(n * q * (1 - q))
    top = min(n, math.ceil(n * q + 12 * spread + 60))  # what lies beyond is far below any chance asked for
    x = torch.arange(math.floor(n * q), top + 1, dtype=torch.float64)
    choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    each = torch.exp(choose + x * math.log(q) + (n - x) * math.log1p(-q))
    above = each.flip(0).cumsum(0).flip(0) - each  # P[X > x]
    return int(x[(above <= chance).nonzero()[0, 0]])


def _certain(sizes: Tensor, n: int) -> Tensor:
    """The clients that are always drawn, bool `[C]`: their share of the remaining draws is 1 or more."""
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        remaining, whole = n - int(certain.sum()), int(sizes.masked_fill(certain, 0).sum())
        more = ~certain & (sizes * remaining >= whole) & (sizes > 0)
        if remaining == 0 or not bool(more.any()):
            return certain
        certain |= more


@dataclass(frozen=True, repr=False)
class RoundRobin(Sampler):
    """Selects n clients in turn, in a random order of all clients. The order changes after all have participated.

    If n divides C, each client participates exactly once in rounds 0 … C/n − 1, and again in every later C/n rounds.

    Args:
        n: the number of clients in a cohort, 1 … C.
    Raises:
        UsageError: n is not an integer ≥ 1, or it exceeds the population.
    Example:
        >>> population = Population(4, torch.ones(4, dtype=torch.int64))
        >>> sorted(i for t in (0, 1) for i in RoundRobin(2)(population, t, Key(0)).ids.tolist())
        [0, 1, 2, 3]
    """

    n: int = field(metadata={"example": 10})

    def __post_init__(self) -> None:
        plain_fields(self, "n")
        _count("RoundRobin", self.n)

    def resized(self, ask: Callable[[int], int]) -> RoundRobin:
        """The same sampler for ask(n) clients in place of n, in the same order."""
        return _with_n(self, ask)

    def largest(self, population: Population) -> int:
        """n, the number of clients of each cohort."""
        return self.n

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        _enough("RoundRobin", self.n, population)
        turns = -(-population.clients // self.n)
        lap, turn = divmod(round, turns)
        order = Key(key.seed).fold("round robin", lap).permutation(population.clients)
        start = min(turn * self.n, population.clients - self.n)
        return _cohort(order[start : start + self.n].sort().values, self.n / population.clients)

    def selection(self, clients: int, rounds: int) -> Selection:
        """One participation in each lap that has begun; two if n does not divide C, since the last turn overlaps."""
        turns = -(-clients // self.n)
        laps = -(-rounds // turns)
        return Selection("zero out", laps * (2 if clients % self.n else 1), 1.0, self.n)


@dataclass(frozen=True, repr=False)
class PowerOfChoice(Sampler):
    """Selects the n clients with the largest last loss among d candidates, which are drawn by rows as by `Weighted`.

    A client that has not reported a loss counts as one with an infinite loss. A loss is that of the local training in
    the last round of the client. `d = n` is `Weighted(n)`. Clients with a large loss are selected more often than
    others, which speeds up the first rounds and moves the result towards them. The chances of the cohort are those of
    a draw before any loss is known, so `Mean()` gives the selected clients equal weights, as in the paper.

    Args:
        n: the number of clients in a cohort, ≥ 1.
        d: the number of candidates, from n to the number of clients that have rows.
    Raises:
        UsageError: a number is out of range; the plan has a secure sum, noise, an asynchronous pace, or an aggregator
            that divides by the expected weight.
        RunError: clients report no loss.
    Example:
        >>> sampler = PowerOfChoice(1, 3).with_memory({"loss": torch.tensor([0.1, 0.9, 0.5])})
        >>> sampler(Population(3, torch.tensor([5, 5, 5])), 0, Key(0)).ids.tolist()
        [1]

    Reference: Cho, Wang, Joshi, Towards Understanding Biased Client Selection in Federated Learning, 2022.
    """

    n: int = field(metadata={"example": 10})
    d: int = field(metadata={"example": 20})
    needs_population = True
    needs_values = True

    def __post_init__(self) -> None:
        plain_fields(self, "n", "d")
        _count("PowerOfChoice", self.n)
        if isinstance(self.d, bool) or not isinstance(self.d, int) or self.d < self.n:
            given = f"PowerOfChoice({self.n!r}, {self.d!r})."
            raise UsageError(
                given, "a number of candidates, at least n.", write=f"PowerOfChoice({self.n}, {2 * self.n})"
            )
        object.__setattr__(self, "_loss", None)

    def resized(self, ask: Callable[[int], int]) -> PowerOfChoice:
        """The same sampler for ask(n) clients in place of n, with at least as many candidates."""
        n = ask(self.n)
        return dataclasses.replace(self, n=n, d=max(n, self.d))

    def largest(self, population: Population) -> int:
        """n, the number of clients of each cohort."""
        return self.n

    def memory(self, population: Population) -> Tensors:
        """The last loss of each client, float64 `[C]`."""
        return {"loss": torch.full((population.clients,), math.inf, dtype=torch.float64)}

    def with_memory(self, memory: Tensors) -> PowerOfChoice:
        """A copy that knows the last losses."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_loss", memory["loss"])
        return bound

    def observe(self, memory: Tensors, ids: Tensor, values: Tensors) -> Tensors:
        """The memory with the losses of the clients that arrived. A loss that is not finite counts as unknown.

        Raises:
            RunError: clients report no loss.
        """
        if not len(ids):
            return memory
        if "loss" not in values:
            raise RunError(
                f"{self!r} and clients that report no loss.",
                "a column `loss` of each client, as Train and Gradient report it.",
                "the clients with the largest loss are selected.",
                Part(f"Uniform({self.n})", "cohort"),
            )
        known = memory["loss"]
        loss = values["loss"].reshape(-1).to(known)
        return {"loss": known.index_copy(0, ids.to(known.device), torch.where(loss.isfinite(), loss, math.inf))}

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        drawn = Weighted(self.d)(population, round, key)
        ids = drawn.ids[key.fold("ties").permutation(self.d).to(drawn.ids.device)]
        known = self.__dict__["_loss"]
        loss = torch.full((self.d,), math.inf) if known is None else known.to(ids.device)[ids]
        best = ids[loss.sort(descending=True, stable=True).indices[: self.n].to(ids.device)]
        return _cohort(best.sort().values, drawn.chance * (self.n / self.d))

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Refuse parts that need the chances of clients or no values of them, and asynchronous paces."""
        yield from Weighted(self.d).conflicts(slots)
        if slots.aggregator.over == "expected":
            why = "the chance of a client depends on its loss, and is not known."
            yield Conflict(f"{slots.aggregator!r} with {self!r}.", "Mean().", why, "Mean()")
        if slots.pace.asynchronous:
            why = "a client starts when another one arrives, and not by its loss."
            yield Conflict(f"{self!r} with {slots.pace!r}.", "a pace that draws a cohort.", why, "Sync()")


S = TypeVar("S", Uniform, Weighted, RoundRobin)


def _with_n(sampler: S, ask: Callable[[int], int]) -> S:
    """The sampler with ask(n) in place of n."""
    n = ask(sampler.n)
    return sampler if n == sampler.n else dataclasses.replace(sampler, n=n)


@dataclass(frozen=True, repr=False)
class _Resized(Sampler):
    """A sampler of ask(n) clients, where n is the number of clients that a fraction selects."""

    sampler: Fraction
    ask: Callable[[int], int]

    def largest(self, population: Population) -> int:
        """The number of clients of each cohort."""
        return self.ask(self.sampler.count(population.clients))

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        return Uniform(self.ask(self.sampler.count(population.clients)))(population, round, key)
