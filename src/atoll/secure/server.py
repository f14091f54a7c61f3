"""The server of a secure sum. It relays messages, adds masked vectors, and removes the masks that did not cancel.

The masked words are added when they arrive, so the server needs the memory of one model. It rebuilds one kind of secret
for each client: the seed of the self mask of a survivor, the seed of the mask keys of a client that dropped out.

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from numpy.typing import NDArray

from atoll.base.errors import UsageError
from atoll.secure import keys, messages, shamir
from atoll.secure.client import Identities, verified
from atoll.secure.masks import masked
from atoll.secure.messages import Advert, Box, SumMessage
from atoll.secure.params import CHECK, Agreement, Topology, topology
from atoll.secure.refusals import SessionError

T = TypeVar("T")
_MOST_SUBSETS = 50  # tries to rebuild one secret if a share is wrong


class SecureSum(NamedTuple):
    """The result of a session.

    Attributes:
        words: the sum of the survivors' words by vector, modulo 2^ring.
        survivors: fingerprints of the clients in the sum.
        weight: sum of their weights.
        liars: fingerprints of clients whose share was wrong.
    """

    words: dict[str, NDArray[np.unsignedinteger]]
    survivors: tuple[bytes, ...]
    weight: int
    liars: tuple[bytes, ...]


@dataclass
class _Session:
    """What the server knows after message 1."""

    sid: bytes
    shape: Topology
    adverts: list[Advert]  # client i is adverts[i - 1]
    around: list[tuple[int, ...]]  # neighbours by index, from 1
    boxes: dict[int, list[Box]] = field(default_factory=dict)  # by sender
    total: dict[str, NDArray[np.unsignedinteger]] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    survivors: frozenset[int] = frozenset()
    signatures: dict[int, bytes] = field(default_factory=dict)
    shares: dict[int, dict[int, int]] = field(default_factory=dict)  # of each client, by holder

    def holders(self, index: int) -> tuple[int, ...]:
        return tuple(sorted((*self.around[index - 1], index)))


class SumServer:
    """The server of one session.

    Args:
        agreement: what the server has.
        identities: the public identity key of a fingerprint, or None.
        least: least number of clients in the sum.
        neighbours: neighbours of each client; by default all up to 100 clients, and `safe_topology` above.
        threshold: shares that rebuild a secret; by default by the graph.
    Raises:
        UsageError: `least` is below 3.
    """

    def __init__(
        self,
        agreement: Agreement,
        identities: Identities,
        least: int = 5,
        neighbours: int | None = None,
        threshold: int | None = None,
    ) -> None:
        if least < 3:
            raise UsageError(f"least = {least}.", "at least 3.", "a sum of two gives each client the other's vector.")
        self.agreement, self._identities, self._least = agreement, identities, least
        self._neighbours, self._threshold = neighbours, threshold
        self._step = messages.ADVERTISE
        self._adverts: dict[bytes, Advert] = {}
        self._session: _Session | None = None

    def __repr__(self) -> str:
        return f"SumServer(round={self.agreement.round}, attempt={self.agreement.attempt}, step={self._step})"

    def __reduce__(self) -> str:
        raise TypeError("A session is never stored.")

    @property
    def step(self) -> int:
        """The kind of message that the server takes now: 0, 2, 4, 6 or 8; -1 after the end."""
        return self._step

    def receive(self, client: bytes, message: SumMessage) -> None:
        """Take one message of a client.

        Args:
            client: the fingerprint of the authenticated client.
            message: its message; one of each kind.
        Raises:
            SessionError: this message was refused. The session continues without this client.
        """
        if message.kind != self._step:
            raise SessionError("message", f"Message {message.kind} is out of order.", f"message {self._step}.")
        if message.kind == messages.ADVERTISE:
            self._advertised(client, message.body)
            return
        session = self._the_session()
        index = next((i for i, advert in enumerate(session.adverts, 1) if advert.fingerprint == client), 0)
        if not index:
            raise SessionError("message", "A client outside the cohort.")
        if message.kind == messages.SHARES:
            self._shared(session, index, message.body)
        elif message.kind == messages.MASKED:
            self._masked(session, index, message.body)
        elif message.kind == messages.CONFIRM:
            self._confirmed(session, index, message.body)
        else:
            self._opened(session, index, message.body)

    def close(self) -> dict[bytes, SumMessage]:
        """End the step: the next message for each client that is still in the session.

        Raises:
            SessionError: `few` clients remain. The session is over.
        """
        try:
            if self._step == messages.ADVERTISE:
                return self._cohort()
            if self._step == messages.SHARES:
                return self._boxes()
            if self._step == messages.MASKED:
                return self._survivors()
            if self._step == messages.CONFIRM:
                return self._confirmations()
            raise SessionError("message", "The last step has a result.", "a call of result().")
        except SessionError:
            self.wipe()
            raise

    def result(self) -> SecureSum:
        """Remove the masks after message 8, and wipe the session.

        Raises:
            SessionError: `few` shares, `shares` that rebuild no secret, or `mask_residue`.
        """
        session = self._the_session()
        if self._step != messages.UNMASK:
            raise SessionError("message", "Not all steps are closed.")
        try:
            return self._unmasked(session)
        finally:
            self.wipe()

    def wipe(self) -> None:
        self._session, self._adverts, self._step = None, {}, -1

    # 1. Messages of clients

    def _advertised(self, client: bytes, body: bytes) -> None:
        advert = messages.read_advert(body, self.agreement)
        signed = messages.signed_advert(advert.hash(self.agreement.context))
        if advert.fingerprint != client or client in self._adverts:
            raise SessionError("duplicate", "An advert of another client, or a second one.")
        if not verified(self._identities(client), advert.signature, signed):
            raise SessionError("signature", "An advert is not signed by the client's identity.")
        if any(advert.channel == other.channel or advert.mask == other.mask for other in self._adverts.values()):
            raise SessionError("duplicate", "Two clients advertise one key.")
        self._adverts[client] = advert

    def _shared(self, session: _Session, index: int, body: bytes) -> None:
        if index in session.boxes:
            raise SessionError("message", "A second message with shares.")
        boxes = messages.read_boxes(body, messages.SHARES, index, self.agreement.hybrid)
        if tuple(box.peer for box in boxes) != session.around[index - 1]:
            raise SessionError("boxes", "The boxes are not those for the neighbours, in order.")
        session.boxes[index] = boxes

    def _masked(self, session: _Session, index: int, body: bytes) -> None:
        if index not in session.boxes or index in session.sent:
            raise SessionError("message", "A client that did not share, or a second vector.")
        for name, words in messages.read_words(body, self.agreement).items():
            total = session.total.setdefault(name, np.zeros(len(words), dtype=words.dtype))
            np.add(total, words, out=total)
        session.sent.add(index)

    def _confirmed(self, session: _Session, index: int, body: bytes) -> None:
        if index not in session.survivors or index in session.signatures:
            raise SessionError("message", "A client outside the sum, or a second confirmation.")
        public = self._identities(session.adverts[index - 1].fingerprint)
        if not verified(public, body, self._sets(session)):
            raise SessionError("confirmations", "The signature is not over the same sets.")
        session.signatures[index] = body

    def _opened(self, session: _Session, index: int, body: bytes) -> None:
        if index not in session.signatures:
            raise SessionError("message", "A client that did not confirm.")
        held = [other for other in session.holders(index) if other in session.boxes]
        entries = messages.read_unmask(body)
        kinds = [messages.SELF_SHARE if other in session.survivors else messages.MASK_SHARE for other in held]
        if [entry[:2] for entry in entries] != list(zip(held, kinds, strict=True)):
            # A share of the other kind is never read: the server must not hold both kinds of one client.
            raise SessionError("both_shares", "The shares are not the one of each holder relation, in order.")
        if any(index in session.shares.get(other, {}) for other in held):
            raise SessionError("message", "A second message with shares of secrets.")
        for other, _, share in entries:
            session.shares.setdefault(other, {})[index] = share

    # 2. Steps

    def _cohort(self) -> dict[bytes, SumMessage]:
        agreement = self.agreement
        n = self._enough(self._adverts, self._least)
        shape = topology(n, self._neighbours, self._threshold)
        if not agreement.fits(n) or n > agreement.largest_cohort:
            raise SessionError("overflow", f"{n} clients can leave a ring of {agreement.ring} bits.")
        adverts = [self._adverts[fingerprint] for fingerprint in sorted(self._adverts)]
        sid, around = messages.session_of(agreement, shape, [advert.hash(agreement.context) for advert in adverts])
        self._session, self._step = _Session(sid, shape, adverts, around), messages.SHARES
        return {
            advert.fingerprint: SumMessage(
                messages.COHORT, messages.cohort_body(agreement, shape, adverts, [i - 1 for i in around[index]])
            )
            for index, advert in enumerate(adverts)
        }

    def _boxes(self) -> dict[bytes, SumMessage]:
        session = self._the_session()
        self._enough(session.boxes, max(session.shape.threshold, self._least))
        arriving: dict[int, list[bytes]] = {index: [] for index in session.boxes}
        for sender in sorted(session.boxes):
            for box in session.boxes[sender]:
                if box.peer in arriving:
                    arriving[box.peer].append(box._replace(peer=sender).to_bytes())
        bits = messages.bitmap(session.boxes, session.shape.clients)
        self._step = messages.MASKED
        return self._each(session, session.boxes, messages.BOXES, {i: b"".join([*arriving[i], bits]) for i in arriving})

    def _survivors(self) -> dict[bytes, SumMessage]:
        session = self._the_session()
        self._enough(session.sent, max(session.shape.threshold, self._least))
        session.survivors, self._step = frozenset(session.sent), messages.CONFIRM
        bits = messages.bitmap(session.survivors, session.shape.clients)
        return self._each(session, session.survivors, messages.SURVIVORS, dict.fromkeys(session.survivors, bits))

    def _confirmations(self) -> dict[bytes, SumMessage]:
        session, t = self._the_session(), self._the_session().shape.threshold
        self._enough(session.signatures, t)
        bodies = {}
        for index in sorted(session.signatures):
            signed = [other for other in session.holders(index) if other in session.signatures]
            bodies[index] = messages.confirmed_body((other, session.signatures[other]) for other in signed[:t])
        self._step = messages.UNMASK
        return self._each(session, bodies, messages.CONFIRMED, bodies)

    # 3. Unmask

    def _unmasked(self, session: _Session) -> SecureSum:
        rebuild, liars = _Rebuild(session, self.agreement), set[int]()
        mask_keys: dict[str, list[bytes]] = {name: [] for name, _ in self.agreement.masked_vectors}
        signs: list[int] = []
        for index in sorted(session.boxes):
            if index in session.survivors:
                seed, wrong = rebuild.self_seed(index)
                self._add(mask_keys, lambda *vector, b=seed, i=index: keys.self_key(session.sid, b, i, *vector))
                signs.append(-1)
            else:
                mask, wrong = rebuild.mask_keys(index)
                for other in session.around[index - 1]:
                    if other in session.survivors:
                        shared = rebuild.pair(mask, index, other)
                        low, high = min(index, other), max(index, other)
                        self._add(mask_keys, lambda *vector, s=shared, p=(low, high): keys.pair_key(s, *p, *vector))
                        signs.append(-1 if index > other else 1)  # the survivor added it if its index is lower
            liars |= wrong
        words = {name: masked(total, mask_keys[name], signs) for name, total in session.total.items()}
        count, weight, *zeros = (int(word) for word in words.pop(CHECK[0]))
        n = len(session.survivors)
        if count != n or any(zeros) or not n <= weight <= n * self.agreement.largest_weight:
            raise SessionError("mask_residue", "The masks did not cancel: the check words are wrong.")
        named = [session.adverts[index - 1].fingerprint for index in sorted(session.survivors)]
        return SecureSum(words, tuple(named), weight, tuple(session.adverts[i - 1].fingerprint for i in sorted(liars)))

    def _add(self, mask_keys: dict[str, list[bytes]], key: keys.OfVector) -> None:
        for name, length in self.agreement.masked_vectors:
            mask_keys[name].append(key(name, length, self.agreement.ring))

    # 4. State

    def _the_session(self) -> _Session:
        if self._session is None:
            raise SessionError("message", "The session has no cohort.")
        return self._session

    def _sets(self, session: _Session) -> bytes:
        n = session.shape.clients
        return messages.signed_sets(
            session.sid, messages.bitmap(session.boxes, n), messages.bitmap(session.survivors, n)
        )

    def _enough(self, present: Iterable[object], least: int) -> int:
        count = sum(1 for _ in present)
        if count < least:
            raise SessionError("few", f"{count} clients after step {self._step}.", f"at least {least}.")
        return count

    def _each(
        self, session: _Session, members: Iterable[int], kind: int, bodies: dict[int, bytes]
    ) -> dict[bytes, SumMessage]:
        return {session.adverts[index - 1].fingerprint: SumMessage(kind, bodies[index]) for index in sorted(members)}


class _Rebuild:
    """Secrets from shares. The Lagrange coefficients of one set of holders are computed once."""

    def __init__(self, session: _Session, agreement: Agreement) -> None:
        self._session, self._agreement = session, agreement
        self._coefficients: dict[tuple[int, ...], list[int]] = {}

    def self_seed(self, index: int) -> tuple[bytes, set[int]]:
        """The seed b of a survivor, and the holders whose share was wrong."""
        advert = self._session.adverts[index - 1]

        def matches(seed: bytes) -> bytes | None:
            commitment = keys.commitment(self._agreement.context, advert.fingerprint, seed)
            return seed if commitment == advert.commitment else None

        return self._search(index, matches)

    def mask_keys(self, index: int) -> tuple[keys.MaskKeys, set[int]]:
        """The mask keys of a client that dropped out, and the holders whose share was wrong."""
        advert = self._session.adverts[index - 1]

        def matches(seed: bytes) -> keys.MaskKeys | None:
            rebuilt = keys.MaskKeys(seed, self._agreement.hybrid)
            return rebuilt if (rebuilt.public, rebuilt.kem_public) == (advert.mask, advert.mask_kem) else None

        return self._search(index, matches)

    def pair(self, mask: keys.MaskKeys, dropped: int, survivor: int) -> bytes:
        """The input of the pair keys of a dropped client and a survivor."""
        session = self._session
        try:
            shared = keys.exchange(mask.exchange_key, session.adverts[survivor - 1].mask)
            if self._agreement.hybrid and dropped < survivor:
                shared += mask.pair_seed(session.sid, survivor)
            elif self._agreement.hybrid:
                wrap = next(box.wrap for box in session.boxes[survivor] if box.peer == dropped)
                shared += keys.unwrap(wrap, mask, session.sid, survivor, dropped)
        except (ValueError, InvalidTag):
            raise SessionError("shares", f"The pair of clients {dropped} and {survivor} has no common key.") from None
        return keys.extract(session.sid, shared)

    def _search(self, index: int, matches: Callable[[bytes], T | None]) -> tuple[T, set[int]]:
        """The first of at most 50 sets of t shares that gives a matching secret."""
        t, shares = self._session.shape.threshold, self._session.shares.get(index, {})
        holders = sorted(shares)
        if len(holders) < t:
            raise SessionError("few", f"{len(holders)} shares of client {index}.", f"at least {t}.")
        for chosen in islice(_subsets(holders, t), _MOST_SUBSETS):
            if chosen not in self._coefficients:
                self._coefficients[chosen] = shamir.lagrange(chosen)
            number = shamir.rebuild({x: shares[x] for x in chosen}, self._coefficients[chosen])
            if number >= 1 << 8 * shamir.SECRET_BYTES:
                continue
            found = matches(number.to_bytes(shamir.SECRET_BYTES, "big"))
            if found is not None:
                return found, self._liars(holders, chosen, shares)
        raise SessionError("shares", f"No {t} shares of client {index} rebuild its secret.")

    def _liars(self, holders: list[int], chosen: tuple[int, ...], shares: dict[int, int]) -> set[int]:
        """The holders whose share is not on the polynomial; compared only after the first set failed."""
        if chosen == tuple(holders[: len(chosen)]):
            return set()
        honest = {x: shares[x] for x in chosen}
        rest = [x for x in holders if x not in honest]
        return {x for x in rest if shamir.rebuild(honest, shamir.lagrange(chosen, at=x)) != shares[x]}


def _subsets(holders: list[int], t: int) -> Iterable[tuple[int, ...]]:
    """Sets of t holders: the first t, then each with one of its members replaced by a later holder, then runs."""
    first, rest = tuple(holders[:t]), holders[t:]
    yield first
    for spare in rest[:1]:
        for position in range(t):
            yield tuple(sorted((*first[:position], *first[position + 1 :], spare)))
    for start in range(1, len(rest) + 1):
        yield tuple(sorted(holders[start : start + t]))
