"""What the participants of a session agree on, and the size of the graph that is safe.

Paper: Bell, Bonawitz, Gascón, Lepoint, Raykova, Secure single-server aggregation with (poly)logarithmic overhead, 2020.

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

from atoll.base.errors import UsageError

_LN2 = math.log(2)
ADVERSARIES, DROPPED = 0.05, 0.33  # shares of the clients for which a regular graph is chosen by default
CHECK = ("check", 4)  # the vector (1, weight, 0, 0) that is masked like the others
COMPLETE_UP_TO = 100


@dataclass(frozen=True)
class Agreement:
    """What every participant of a session must have for itself. A client takes it from the plan that it has read.

    Attributes:
        run: 16 bytes.
        round, attempt: numbers from 0.
        model, config: SHA-256 of the model and of the settings that this participant has.
        vectors: name and number of words of each vector of a contribution, without the check vector.
        ring: 32 or 64 bits a word.
        bound: largest absolute value of a number before its weight.
        largest_weight: largest weight of a client, at least 1.
        largest_cohort: largest number of clients of a session.
        hybrid: ML-KEM-768 beside X25519.
        noise: noise multiplier of the plan, or 0.
    """

    run: bytes
    round: int
    attempt: int
    model: bytes
    config: bytes
    vectors: tuple[tuple[str, int], ...]
    ring: int
    bound: int
    largest_weight: int = 1
    largest_cohort: int = 1 << 16
    hybrid: bool = True
    noise: float = 0.0

    @property
    def context(self) -> bytes:
        """run ‖ round ‖ attempt, 28 bytes."""
        return self.run + struct.pack(">QI", self.round, self.attempt)

    @property
    def masked_vectors(self) -> tuple[tuple[str, int], ...]:
        return (*self.vectors, CHECK)

    def fits(self, clients: int) -> bool:
        """Whether no sum of that many clients can leave the ring: n · w · B < 2^(ring - 1)."""
        largest = max(self.bound, 1)  # the check vector contains the weight itself
        return self.ring in (32, 64) and clients * self.largest_weight * largest < 1 << (self.ring - 1)


@dataclass(frozen=True)
class Topology:
    """The graph of a session: number of clients, neighbours of each, and shares that rebuild a secret."""

    clients: int
    neighbours: int
    threshold: int

    @property
    def complete(self) -> bool:
        return self.neighbours == self.clients - 1

    @property
    def holders(self) -> int:
        """Number of holders of a client's secrets: its neighbours and itself."""
        return self.neighbours + 1


def default_threshold(holders: int) -> int:
    """The threshold ⌊2h/3⌋ + 1 of h holders: two thirds and one."""
    return 2 * holders // 3 + 1


def least_threshold(shape: Topology, adversaries: float = ADVERSARIES, dropped: float = DROPPED) -> int:
    """The least threshold of a graph that protects against the colluding clients.

    Args:
        shape: the graph.
        adversaries, dropped: as in `safe_topology`.
    Raises:
        UsageError: the graph itself does not protect.
    """
    if shape.complete:
        return default_threshold(shape.holders)
    if shape.clients <= COMPLETE_UP_TO or shape.neighbours % 2:
        required = "the complete graph." if shape.clients <= COMPLETE_UP_TO else "an even number of neighbours."
        raise UsageError(f"{shape.neighbours} neighbours among {shape.clients} clients.", required)
    safe = safe_topology(shape.clients, adversaries, dropped)
    if shape.neighbours < safe.neighbours:
        given = f"{shape.neighbours} neighbours among {shape.clients} clients."
        raise UsageError(given, f"at least {safe.neighbours}.", "with fewer, colluding clients could open a secret.")
    # More neighbours are more colluding ones, so the threshold of the smallest safe graph is too low for them.
    return safe.threshold if shape.neighbours == safe.neighbours else default_threshold(shape.holders)


def topology(clients: int, neighbours: int | None = None, threshold: int | None = None) -> Topology:
    """The graph of a session: complete up to 100 clients, else the regular graph of `safe_topology`.

    Args:
        clients: number of clients.
        neighbours: another number of neighbours.
        threshold: another threshold.
    """
    found = Topology(clients, clients - 1, default_threshold(clients))
    if clients > COMPLETE_UP_TO:
        found = safe_topology(clients)
    if neighbours is not None and (k := min(neighbours, clients - 1)) != found.neighbours:
        found = Topology(clients, k, default_threshold(k + 1))
    return found if threshold is None else Topology(clients, found.neighbours, threshold)


def params_bytes(agreement: Agreement, shape: Topology) -> bytes:
    """The canonical bytes of the parameters, which enter the session's identity."""
    head = struct.pack(
        ">BIIBBQQH",
        not shape.complete,
        shape.neighbours,
        shape.threshold,
        agreement.ring,
        agreement.hybrid,
        agreement.bound,
        agreement.largest_weight,
        len(agreement.vectors),
    )
    names = [
        struct.pack(">H", len(name.encode())) + name.encode() + struct.pack(">Q", words)
        for name, words in agreement.vectors
    ]
    return head + b"".join(names)


def _ln_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _hypergeometric(n: int, marked: int, drawn: int) -> list[float]:
    """P[X = x] for x = 0 .. drawn, X the marked ones among `drawn` of n."""
    total = _ln_choose(n, drawn)
    return [
        math.exp(_ln_choose(marked, x) + _ln_choose(n - marked, drawn - x) - total)
        if x <= marked and drawn - x <= n - marked
        else 0.0
        for x in range(drawn + 1)
    ]


def _connected(n: int, k: int, missing: int) -> bool:
    """Whether the graph without `missing` clients is connected but for a probability of 2^-41."""
    if k > missing:
        return True
    chance = math.log(n * (n - k - 1) / 2) + math.lgamma(missing + 1) + math.lgamma(n - k + 1)
    return chance - math.lgamma(n + 1) - math.lgamma(missing - k + 1) < -41 * _LN2


@lru_cache(maxsize=64)
def safe_topology(clients: int, adversaries: float = 0.05, dropped: float = 0.33, malicious: bool = False) -> Topology:
    """The smallest regular graph that is safe with probability 1 - 2^-40 and succeeds with probability 1 - 2^-20.

    Args:
        clients: number n of clients.
        adversaries: share of the clients that collude with the server, below 1.
        dropped: share of the clients that may drop out.
        malicious: the server may lie about the survivors. The threshold then counts the client's own share, too.
    Returns:
        k neighbours and the threshold t; the complete graph if no regular one is safe.
    Raises:
        UsageError: the shares are too large for any graph.
    Example:
        >>> safe_topology(1000, 0.05, 0.33)
        Topology(clients=1000, neighbours=72, threshold=24)
    """
    n = clients
    if adversaries < 0 or dropped < 0 or adversaries + (2 if malicious else 1) * dropped > 0.9:
        raise UsageError(
            f"adversaries = {adversaries}, dropped = {dropped}.",
            "shares whose sum is at most 0.9" + (", with the dropped ones counted twice" if malicious else "") + ".",
            "with more, the other clients cannot rebuild a mask, or the adversaries can.",
        )
    colluding = math.floor(adversaries * n + 1e-14 * n)
    staying = math.ceil((1 - dropped) * n - 1e-14 * n)
    missing = colluding + math.floor(dropped * n + 1e-14 * n)
    for k in range(2, n - 1, 2):
        if not _connected(n, k, missing):
            continue
        tail, low = 0.0, k
        chances = _hypergeometric(n, colluding, k)
        while low >= 0 and tail + chances[low] <= 2.0**-41 / n:  # P[X > low - 1]
            tail += chances[low]
            low -= 1
        t1 = max(low, 0)
        below, high = 0.0, -1
        for x, chance in enumerate(_hypergeometric(n, staying, k)):
            below += chance
            if below >= 2.0**-20 / n:
                high = x
                break
        if malicious:
            threshold = max(t1, (k + 1 + t1) // 2) + 1
            if high > threshold - 1:
                return Topology(n, k, max(threshold, 2))
        elif high > t1:
            return Topology(n, k, max(t1 + 1, 2))
    return Topology(n, n - 1, default_threshold(n))
