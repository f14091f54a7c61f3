"""The contracts of samplers and partitions.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data.partition import IID, Pool
from atoll.data.rows import ArrayRows
from atoll.data.sources import Source
from atoll.plan.protocols import Cohort, Population
from atoll.testing.contract import check_value, conformity, pure, refused, require, same

_ROUNDS = 1000
# In standard deviations, on each side: a correct sampler of 1000 clients is refused by mistake for one key in 10⁴.
_FAR = 5.5


@conformity
def check_sampler(part: Any) -> None:
    """Check the contract of a sampler.

    The ids are distinct clients of the population. They depend on the key and the round only. Over 1000 rounds each
    client is selected as often as its `chance` predicts: |count − Σ chance| ≤ 5.5 standard deviations.

    Args:
        part: a sampler, `part(population, round, key) -> Cohort`.
    Raises:
        Nonconformity: the sampler breaks the contract.
    Example:
        >>> from atoll.plan.sampler import Uniform
        >>> check_sampler(Uniform(3))
    """
    check_value(part)
    subject = repr(part)
    population = _population(part)
    clients = population.clients
    counts, expected, spread = (torch.zeros(clients, dtype=torch.float64) for _ in range(3))
    for t in range(_ROUNDS):
        key = Key(7).fold("round", t, "cohort")
        if t < 3:
            cohort = pure(subject, part, population, t, key)
            _check_cohort(subject, cohort, clients)
        else:
            cohort = part(population, t, key)
        once = cohort.ids.bincount(minlength=clients)
        if len(once) > clients or int(once.max()) > 1:
            _check_ids(subject, cohort.ids, clients)
        chance = cohort.chance
        counts += once
        expected += chance
        spread += chance * (1 - chance)
    far = (counts - expected).abs() - _FAR * spread.sqrt()
    worst = int(far.argmax())
    require(
        bool(far[worst] <= 1e-6),
        f"{subject} selected client {worst} in {int(counts[worst])} of {_ROUNDS} rounds.",
        f"{expected[worst]:.1f} ± {_FAR * spread[worst].sqrt():.1f}, by the chances that it gave.",
        'over="expected" divides by the chances, and privacy accounting uses them.',
    )


def _population(part: Any) -> Population:
    """The smallest population that the sampler accepts, with clients of several sizes."""
    for clients in (12, 100, 1000):
        population = Population(clients, torch.arange(clients) % 9 + 1)
        try:
            part(population, 0, Key(0))
        except UsageError:
            continue
        return population
    refused(repr(part), part, population, 0, Key(0))
    return population


def _check_ids(subject: str, ids: Tensor, clients: int) -> None:
    require(
        isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 1,
        f"{subject} gave ids {ids!r}.",
        "int64 [n].",
        "clients are numbered from 0.",
    )
    inside = bool(((ids >= 0) & (ids < clients)).all())
    require(
        inside and len(ids.unique()) == len(ids),
        f"{subject} gave the ids {ids.tolist()} of {clients} clients.",
        f"different numbers in 0 … {clients - 1}.",
        "a client can be selected at most once in a round.",
    )


def _check_cohort(subject: str, cohort: Cohort, clients: int) -> None:
    _check_ids(subject, cohort.ids, clients)
    chance = cohort.chance
    shaped = isinstance(chance, Tensor) and chance.dtype == torch.float64 and chance.shape in ((), (clients,))
    require(
        shaped and bool(((chance >= 0) & (chance <= 1)).all()),
        f"{subject} gave the chance {chance!r}.",
        f"float64 [] or [{clients}], in [0, 1].",
        "it is the probability that a client is selected.",
    )


@conformity
def check_partition(part: Any) -> None:
    """Check the contract of a partition.

    Every training row has one owner among the clients. Equal keys give equal owners. A split by this
    partition holds out the same rows as any other split. A row has the same numbers in every batch.

    Args:
        part: a partition, `part(pool, clients, key) -> owner int64 [rows]`.
    Raises:
        Nonconformity: the partition breaks the contract.
    Example:
        >>> from atoll.data import Dirichlet
        >>> check_partition(Dirichlet(0.3))
    """
    check_value(part)
    subject, rows, clients = repr(part), 400, 8
    key = Key(7).fold("partition")
    labels, by = key.fold("labels").integers(rows, 5), torch.arange(rows) % clients
    pool = Pool(rows, labels, by)
    owner = pure(subject, part, pool, clients, key)
    good = isinstance(owner, Tensor) and owner.dtype == torch.int64 and owner.shape == (rows,)
    require(
        good and bool(((owner >= 0) & (owner < clients)).all()),
        f"{subject} gave owners {owner!r}.",
        f"int64 [{rows}], each in 0 … {clients - 1}.",
        "each row belongs to exactly one client.",
    )
    require(
        not part.natural or same(owner, by),
        f"{subject} is natural and moved a row.",
        "the owners that the data names.",
        "the data determine natural clients.",
    )
    x = key.fold("x").uniform(rows * 16, torch.float32).reshape(rows, 1, 4, 4)
    source = Source(
        "check", ArrayRows(x, labels), "classification", tuple("abcde"), (1, 4, 4), by=by, names=tuple("abcdefgh")
    )
    split = refused(subject, partial(source.split, clients, part, seed=3))
    other = source.split(clients, IID(), seed=3)
    require(
        same(split.order.sort().values, other.order.sort().values) and bool((split.sizes >= 2).all()),
        f"A split by {subject} gives clients {split.sizes.tolist()} rows.",
        "the train rows of every other split, at least two a client.",
        "two splits of one data set are compared on the same held-out rows.",
    )
    some = split.order[:30:7]
    together, single = split.rows.take(some), [split.rows.take(i[None]) for i in some]
    require(
        same(together[0], torch.cat([x for x, _ in single])) and same(together[1], torch.cat([y for _, y in single])),
        f"{subject} changes a row that is read together with other rows.",
        "a row as a function of the seed, its client and its number.",
        "the number of rows that are read together must change no bit.",
    )
