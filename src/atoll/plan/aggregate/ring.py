"""A secure sum as a rounding: numbers on a grid, whose weighted sum is exact in floats and in the words of a ring.

    q = ⌊x · 2^k + u⌉,  |q| ≤ B                   a client: x becomes q · 2^-k; u is keyed and uniform in (−½, ½)
    Σ w q mod R  in two's complement, R = 2^ring  the server: the words of the secure sum
    n · w · B < R / 2                             no sum of n clients leaves the ring; proved with integers

A simulation adds the rounded floats by the exact sum, a network adds words. Both sums are equal to the bit, so the
simulation of a secure sum needs no keys.

Tests: tests/identities/test_ring.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import Value
from atoll.base.lines import Part
from atoll.base.names import ROWS_OF
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.bounded_rows import rounded_rows
from atoll.compute.tensor_notes import lookup
from atoll.plan.aggregate import exact
from atoll.plan.pace import Sync
from atoll.plan.protocols import Aggregator, Conflict, Contribution, Declared, Slots
from atoll.secure.params import least_threshold, topology

Words: TypeAlias = NDArray[np.unsignedinteger]
MANTISSA = {torch.float32: 24, torch.float64: 53}
CLAMPED = "clamped"  # the sum that counts the numbers that were cut
_COUNT = Declared(1, torch.int64, "sum")
_MORE_ROWS = 64  # a schedule may process this many times the rows of round 0 before a summed loss is cut
HALF = 32  # a ring number is added to the exact sum in two halves


class Grid(NamedTuple):
    """The grid of one vector.

    Args:
        exponent: k; numbers are multiples of 2^-k.
        limit: B, the largest |q|.
        weighted: whether the numbers are multiplied by the client's weight: means are, sums are not.
        cut: whether larger numbers are possible; they are cut to the limit and counted.
    """

    exponent: int
    limit: int
    weighted: bool
    cut: bool = False


@dataclass(frozen=True, repr=False)
class Masks(Value):
    """A secure sum by pairwise masks: the server learns the sum over the clients of a round, and no single update.

    Args:
        bits: the number of bits of a number beside its sign. None: as many as fit in the ring, at most 24.
        ring: bits of a word that is sent, 32 or 64.
        threshold: shares that rebuild the secret of a client that dropped out. None: two thirds of its holders and one.
        neighbours: neighbours of each client. None: all clients, and fewer above 100 clients.
        least: the least number of clients in a sum, at least 3. A round with fewer ends without an update.
        hybrid: ML-KEM-768 beside X25519, against a later quantum computer.
        loss: the largest mean loss of a client that is summed; a larger one counts as this.
        bound: the largest absolute value of vectors without a bound of their own. Larger numbers are cut to it, and the
            metric `clamped` is their number for each client. None: a vector without a bound is refused.
    Raises:
        UsageError: an argument is out of range.
    Example:
        >>> Masks(ring=64)
        Masks(ring=64)

    Reference: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, 2017.
    """

    bits: int | None = bounded_number(None, least=1, most=53, whole=True, why="a float has 53 bits.")
    ring: int = 32
    threshold: int | None = bounded_number(None, least=2, whole=True, why="one share would be the secret.")
    neighbours: int | None = bounded_number(None, least=2, whole=True, why="a client without neighbours has no mask.")
    least: int = bounded_number(5, least=3, whole=True, why="a sum of two gives each client the other's update.")
    hybrid: bool = True
    loss: float = bounded_number(16.0, above=0, why="it is the largest mean loss.")
    bound: float | None = bounded_number(None, above=0, example=10.0, why="numbers are cut to it.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ring not in (32, 64):
            raise UsageError(f"Masks(ring={self.ring!r}).", "32 or 64.", "a word has 4 or 8 bytes.", "Masks(ring=64)")


def largest_bits(masks: Masks, clients: int, weight: int, dtype: torch.dtype) -> int:
    """The number of bits of a number: the given one if it fits, else the most that fit, at most 24 by default.

        clients · weight · 2^bits < 2^(ring - 1)

    Raises:
        UsageError: no bit fits, or fewer than were given.
    """
    room = (1 << (masks.ring - 1)) - 1
    most = min((room // max(1, clients * weight)).bit_length() - 1, MANTISSA[dtype])
    if (masks.bits is not None and masks.bits > most) or most < 1:
        given = f"{clients} clients of weight {weight} with {masks.bits or 1} bits in a ring of {masks.ring} bits."
        required = f"at most {most} bits." if most >= 1 else "a larger ring."
        write = Part(f"Mean(secure=Masks({f'bits={most}' if most >= 1 else 'ring=64'}))", "aggregator")
        raise UsageError(given, required, "the sum would leave the ring.", write)
    return min(most, 24) if masks.bits is None else masks.bits


def grid_of(masks: Masks, declared: Declared, clients: int, weight: int, bound: float) -> Grid:
    """The grid of a vector whose numbers are at most `bound` in absolute value.

    Whole numbers have exponent 0. Others have the finest grid on which `bound` has the number of bits that fit.
    """
    weighted = declared.kind == "mean"
    factor = weight if weighted else 1
    if not declared.dtype.is_floating_point:
        limit = (1 << (masks.ring - 2)) // max(1, clients * factor)  # half of the room: a count is never cut
        if limit < math.ceil(bound):
            raise UsageError(
                f"{clients} clients with counts up to {math.ceil(bound)} in a ring of {masks.ring} bits.",
                "a larger ring.",
                "the sum would leave the ring.",
                Part("Mean(secure=Masks(ring=64))", "aggregator"),
            )
        return Grid(0, limit, weighted)
    bits = largest_bits(masks, clients, factor, declared.dtype)
    return Grid(bits - math.ceil(math.log2(bound)), 1 << bits, weighted)


def rounded(x: Tensor, grid: Grid, key: Key) -> Tensor:
    """Round numbers to their grid at random, without bias, and cut them to its limit.

    Args:
        x: `[K, …]`, float or integer.
        grid: the grid.
        key: one stream for each of the K clients.
    """
    if not x.is_floating_point():
        return x.clamp(-grid.limit, grid.limit)
    if x.dim() == 2:
        return rounded_rows(x, grid.exponent, grid.limit, key)
    return rounded_rows(x.reshape(len(x), -1), grid.exponent, grid.limit, key).reshape(x.shape)


def words_of(x: Tensor, grid: Grid, weights: Tensor, ring: int) -> Words:
    """The words of rounded numbers: w · q modulo 2^ring, `[K, m]`.

    Args:
        x: numbers on the grid, `[K, m]`.
        weights: the weight of each client, int64 `[K]`.
        ring: 32 or 64.
    """
    q = (x.double() * math.ldexp(1.0, grid.exponent)).long().reshape(len(weights), -1)
    product = q * weights.reshape(-1, 1) if grid.weighted else q
    integers: NDArray[np.int64] = np.asarray(product)
    return integers.astype(np.dtype(f"<u{ring // 8}"))


def numbers_of(words: Words, grid: Grid) -> exact.Digits:
    """The exact sum of a secure sum: two's complement, times 2^-k.

    Args:
        words: the sum of the words of all clients, `[m]`.
        grid: the grid of the vector.
    """
    signed = words.view(np.dtype(f"<i{words.itemsize}")).astype(np.int64)
    high, low = signed >> HALF, signed & ((1 << HALF) - 1)
    halves = torch.from_numpy(np.stack([high.astype(np.float64) * 2.0**HALF, low.astype(np.float64)]))
    return exact.add({}, halves * math.ldexp(1.0, -grid.exponent), torch.ones(2, dtype=torch.int64))


def grids_of(masks: Masks, vectors: Mapping[str, Declared], clients: int, weight: int, rows: int) -> dict[str, Grid]:
    """The grid of each vector of a contribution.

    Args:
        masks: the secure sum.
        vectors: the vectors, the update as the codec encodes it.
        clients: the largest number of clients of a round.
        weight: the largest weight of a client.
        rows: the largest number of rows that a client processes in a round.
    Raises:
        UsageError: a vector has no bound, or a sum could leave the ring.
    """
    if clients < masks.least:
        raise UsageError(
            f"A secure sum of at most {clients} clients.",
            f"at least {masks.least} clients in a round.",
            "each round would end without an update.",
            Part(f"Mean(secure=Masks(least={clients}))", "aggregator") if clients >= 3 else "",
        )
    shape = topology(clients, masks.neighbours, masks.threshold)
    least = least_threshold(shape)
    if not least <= shape.threshold <= shape.holders:
        raise UsageError(
            f"Masks(threshold={shape.threshold}) for {shape.holders} holders of each secret.",
            f"{least} to {shape.holders}.",
            "with fewer, a server that lies could open both secrets of a client; with more, no secret can be rebuilt.",
            Part("Mean(secure=True)", "aggregator"),
        )
    grids, cut = {}, 0
    for name, declared in vectors.items():
        grid = grid_of(masks, declared, clients, weight, _bound_of(name, declared, masks, rows))
        free = declared.kind == "mean" and declared.bound is None
        grids[name], cut = grid._replace(cut=free), cut + (declared.length if free else 0)
    if cut:
        for name, most in ((CLAMPED, cut), (ROWS_OF + CLAMPED, 1)):
            grids[name] = grid_of(masks, _COUNT, clients, 1, most)
    return grids


def added_sums(grids: Mapping[str, Grid]) -> dict[str, Declared]:
    """The sums that count the numbers that were cut, if a vector may be cut."""
    return {name: _COUNT for name in (CLAMPED, ROWS_OF + CLAMPED) if name in grids}


def _bound_of(name: str, declared: Declared, masks: Masks, rows: int) -> float:
    """The largest absolute value of the numbers of a vector."""
    if declared.bound is not None:
        return declared.bound
    if not declared.dtype.is_floating_point:
        return rows
    if name == "loss":
        return masks.loss * rows * _MORE_ROWS
    if masks.bound is not None:
        return masks.bound
    raise UsageError(
        f"A secure sum of the vector {name}, which has no bound.",
        "a bound on the numbers of every vector.",
        "a sum that leaves the ring is another number.",
        Part("Clip(1.0)", "codec") if name == "update" else Part("Mean(secure=Masks(bound=10.0))", "aggregator"),
    )


def lifted(contribution: Contribution, grids: Mapping[str, Grid], key: Key) -> Contribution:
    """Round the means and sums of K clients to their grids; nothing else leaves a client.

    Raises:
        UsageError: a vector was not declared.
    """
    means, sums = (
        {name: rounded(x, _grid(name, grids), key.fold("ring", name)) for name, x in tensors.items()}
        for tensors in (contribution.means, contribution.sums)
    )
    if CLAMPED in grids:
        sums[CLAMPED] = _clamped(contribution.means, grids, contribution.weight)
        sums[ROWS_OF + CLAMPED] = torch.ones_like(contribution.weight)
    return Contribution(means, sums, contribution.weight, {}, {})


def _clamped(means: Mapping[str, Tensor], grids: Mapping[str, Grid], weight: Tensor) -> Tensor:
    """The number of values of each client that were cut, int64 `[K]`."""
    found = torch.zeros_like(weight)
    for name, x in means.items():
        if grids[name].cut:
            largest = math.ldexp(grids[name].limit, -grids[name].exponent)
            peaks = lookup(x, "peaks")
            tops = torch.linalg.vector_norm(x, math.inf, 1) if peaks is None else peaks.amax(1)
            cut = tops > largest
            if bool(cut.any()):
                found[cut.to(found.device)] += (x[cut].abs() > largest).sum(1).to(found.device)
    return found


def _grid(name: str, grids: Mapping[str, Grid]) -> Grid:
    if name not in grids:
        raise UsageError(
            f"A secure sum of the vector {name!r}, which was not declared.",
            f"one of {', '.join(grids)}.",
            "the bound of every vector must be known before the first round.",
        )
    return grids[name]


def secure_conflicts(rule: Aggregator, slots: Slots) -> Iterator[Conflict]:
    """The combinations that have no secure sum."""
    given = f"{rule!r} with"
    if rule.sum != "exact":
        yield Conflict(f"{rule!r}.", 'sum="exact".', "words of a ring are added exactly.", "Mean(secure=True)")
    if slots.codec.per_message:
        why = "the server never has a single message that it could decode."
        yield Conflict(f"{given} {slots.codec!r}.", "a codec whose messages can be added.", why, "Clip(1.0)")
    if slots.pace != Sync():
        why = "a sum is formed once for each round, over the clients that started together."
        yield Conflict(f"{given} {slots.pace!r}.", "Sync().", why, "Sync()")
