"""One client of a secure sum. It takes the messages of the server, checks each, and returns the next message.

A client trusts nothing that the server chooses: it draws the graph itself, verifies every signature, compares the model
and the settings with its own, and reveals one kind of share for each client. After a refusal it has no secret left.

Tests: tests/attacks/test_evil_server.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from atoll.base.errors import UsageError
from atoll.secure import keys, messages, shamir
from atoll.secure.masks import masked
from atoll.secure.messages import Advert, Box, ListedCohort, SumMessage
from atoll.secure.params import CHECK, Agreement, Topology, least_threshold, params_bytes
from atoll.secure.refusals import SessionError

Words = Mapping[str, NDArray[np.unsignedinteger]]
_LAST_ATTEMPT = (1 << 32) - 1
Identities = Callable[[bytes], bytes | None]


@dataclass(frozen=True)
class Floors:
    """The least that a client accepts. A server cannot lower it.

    Attributes:
        cohort: least number of clients, and of survivors; at least 3.
        colluding: number of clients that may collude with the server.
        adversaries, dropped: shares of the clients in the size of a regular graph, see `safe_topology`.
        threshold: least number of shares that open a secret.
        strict: only the complete graph, and a threshold that holds against a server that lies.
        noise: least noise multiplier of the plan.
        attempts: the largest number of attempts of a round.
    """

    cohort: int = 5
    colluding: int = 0
    adversaries: float = 0.05
    dropped: float = 0.33
    threshold: int = 2
    strict: bool = False
    noise: float = 0.0
    attempts: int = 2

    def __post_init__(self) -> None:
        if self.cohort < 3:
            raise ValueError("With fewer than three clients, a sum and one's own vector give the other vector.")

    def check(self, shape: Topology) -> None:
        """Compare the shape of a session with the floors.

        Raises:
            SessionError: `cohort`, `graph` or `threshold`.
        """
        n, k, t, h = shape.clients, shape.neighbours, shape.threshold, shape.holders
        if n < self.cohort:
            raise SessionError("cohort", f"{n} clients.", f"at least {self.cohort}.")
        if self.strict and not shape.complete:
            raise SessionError("graph", f"{k} neighbours among {n} clients.", "the complete graph.")
        try:
            least = least_threshold(shape, self.adversaries, self.dropped)
        except UsageError as error:
            raise SessionError("graph", error.given, error.required) from None
        least = max(least, self.threshold, self.colluding + 1)
        if not least <= t <= h or (shape.complete and 2 * t <= h + self.colluding):
            raise SessionError("threshold", f"threshold {t} of {h} holders.", f"at least {least}.")


def verified(public: bytes | None, signature: bytes, data: bytes) -> bool:
    """Whether a signature is of this identity key; False without a key."""
    if public is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_identity() -> Ed25519PrivateKey:
    """A new identity key: Ed25519, from the random numbers of the operating system."""
    return Ed25519PrivateKey.generate()


@dataclass
class _Session:
    """What a client knows after message 1."""

    sid: bytes
    shape: Topology
    own: int
    adverts: dict[int, Advert]  # the neighbours
    identities: dict[int, bytes]
    own_shares: tuple[int, int] = (0, 0)
    shares: dict[int, tuple[int, int]] = field(default_factory=dict)  # (a, b) of each neighbour that shared
    seeds: dict[int, bytes] = field(default_factory=dict)  # r of each pair, in hybrid mode
    pairs: dict[int, bytes] = field(default_factory=dict)  # exchange of the mask keys with each neighbour
    shared: frozenset[int] = frozenset()
    survivors: frozenset[int] = frozenset()


class SumClient:
    """One client of one session.

    Args:
        agreement: what this client has read for itself.
        identity: its Ed25519 identity key.
        fingerprint: 32 bytes, the fingerprint of its certificate.
        identities: the public identity key of a fingerprint, or None if it is unknown, expired or revoked.
        floors: the least that it accepts.
        last: `taken` of the last session of this run in which it took part.
    Raises:
        SessionError: `replayed`, `overflow` or `privacy`.
    """

    def __init__(
        self,
        agreement: Agreement,
        identity: Ed25519PrivateKey,
        fingerprint: bytes,
        identities: Identities,
        floors: Floors | None = None,
        last: tuple[int, int] = (-1, -1),
    ) -> None:
        self.agreement, self.fingerprint = agreement, fingerprint
        self._identity, self._identities = identity, identities
        self.floors = floors or Floors()
        if (agreement.round, agreement.attempt) <= last or agreement.attempt >= self.floors.attempts:
            raise SessionError("replayed", f"Round {agreement.round}, attempt {agreement.attempt} took place already.")
        if not agreement.fits(1):
            raise SessionError("overflow", f"A ring of {agreement.ring} bits is too small for one client.")
        if agreement.noise < self.floors.noise:
            raise SessionError("privacy", f"Noise multiplier {agreement.noise}.", f"at least {self.floors.noise}.")
        self._secrets: keys.Secrets | None = keys.Secrets(agreement.hybrid)
        self._next = messages.ADVERTISE
        self._advert: Advert | None = None
        self._session: _Session | None = None
        self._upload: SumMessage | None = None
        self._plain = b""
        self._request: bytes | None = None
        self._reply: SumMessage | None = None

    def __repr__(self) -> str:
        return f"SumClient(round={self.agreement.round}, attempt={self.agreement.attempt}, next={self._next})"

    def __reduce__(self) -> str:
        raise TypeError("A session is never stored: its secrets stay in RAM.")

    @property
    def answered(self) -> bool:
        """Whether this client sent its shares."""
        return self._reply is not None

    @property
    def taken(self) -> tuple[int, int]:
        """The round and attempt below which the client takes part in no further session.

        After its shares were sent, no attempt of the round remains: two sums of one round that differ in one client
        would reveal the vector of this client.
        """
        return self.agreement.round, _LAST_ATTEMPT if self.answered else self.agreement.attempt

    def wipe(self) -> None:
        """Drop every secret; the session is over."""
        self._secrets, self._session, self._upload, self._next = None, None, None, -1

    def advertise(self) -> SumMessage:
        """Message 0: the public keys of this session, signed."""
        self._expect(messages.ADVERTISE)
        secrets, agreement = self._the_secrets(), self.agreement
        kems = (secrets.channel_kem, secrets.mask.kem)
        public = [kem.public_key().public_bytes_raw() if kem else b"" for kem in kems]
        advert = Advert(
            self.fingerprint,
            os.urandom(32),
            secrets.channel.public_key().public_bytes_raw(),
            secrets.mask.public,
            keys.commitment(agreement.context, self.fingerprint, secrets.b),
            public[0],
            public[1],
        )
        signature = self._identity.sign(messages.signed_advert(advert.hash(agreement.context)))
        self._advert = replace(advert, signature=signature)
        self._next = messages.COHORT
        return SumMessage(messages.ADVERTISE, self._advert.to_bytes(agreement.context))

    def receive(self, message: SumMessage) -> SumMessage | None:
        """Check a message of the server and return the answer; None after message 3, when `mask` is due.

        Raises:
            SessionError: the message was refused. The secrets are wiped.
        """
        try:
            if message.kind == messages.CONFIRMED and self._reply is not None:
                if message.body == self._request:
                    return self._reply
                raise SessionError("second_unmask", "A second, different request for shares.")
            if message.kind == messages.SURVIVORS and self._session and self._session.survivors:
                raise SessionError("both_shares", "A second set of survivors would open both shares of a client.")
            self._expect(message.kind)
            if message.kind == messages.COHORT:
                return self._share(message.body)
            if message.kind == messages.BOXES:
                self._open(message.body)
                return None
            if message.kind == messages.SURVIVORS:
                return self._confirm(message.body)
            return self._unmask(message.body)
        except SessionError:
            self.wipe()
            self._reply = None
            raise

    def mask(self, words: Words, weight: int) -> SumMessage:
        """Message 4: the words of this client under its masks. A second call with equal words returns the same bytes.

        Args:
            words: for each vector of the agreement, `uint32` or `uint64` by the ring, times the weight.
            weight: 1 to the largest weight.
        Raises:
            SessionError: `second_upload`, if other words are given: two vectors under the same masks reveal their
                difference.
            ValueError: names, lengths, dtype or weight differ from the agreement.
        """
        agreement, dtype = self.agreement, np.dtype(f"<u{self.agreement.ring // 8}")
        if {name: len(vector) for name, vector in words.items()} != dict(agreement.vectors):
            raise ValueError("The vectors differ from the agreement.")
        if not 1 <= weight <= agreement.largest_weight or any(vector.dtype != dtype for vector in words.values()):
            raise ValueError(f"Words are {dtype.name}, and a weight is in 1 .. {agreement.largest_weight}.")
        content = {**words, CHECK[0]: np.array([1, weight, 0, 0], dtype=dtype)}
        plain = keys.hashed(*(content[name].tobytes() for name, _ in agreement.masked_vectors))
        if self._upload is not None:
            if plain != self._plain:
                self.wipe()
                raise SessionError("second_upload", "A second vector in one session.")
            return self._upload
        self._expect(messages.MASKED)
        parts = []
        for name, length in agreement.masked_vectors:
            mask_keys, signs = self._mask_keys(name, length)
            parts.append(masked(content[name], mask_keys, signs).tobytes())
        self._upload, self._plain = SumMessage(messages.MASKED, b"".join(parts)), plain
        self._next = messages.SURVIVORS
        return self._upload

    # 1. Steps

    def _share(self, body: bytes) -> SumMessage:
        cohort = messages.read_cohort(body, self.agreement)
        session = self._checked(cohort)
        secrets, shape = self._the_secrets(), session.shape
        holders = sorted((*session.adverts, session.own))
        shares_a = dict(zip(holders, shamir.share_out(secrets.a, shape.threshold, holders), strict=True))
        shares_b = dict(zip(holders, shamir.share_out(secrets.b, shape.threshold, holders), strict=True))
        session.own_shares = (shares_a[session.own], shares_b[session.own])
        boxes = []
        for other in session.adverts:
            shared, kem_text = self._exchange(other, session)
            nonce = os.urandom(12)
            key = keys.channel_key(session.sid, shared, session.own, other)
            plain = messages.sealed_shares(session.own, other, shares_a[other], shares_b[other])
            context = messages.box_context(session.sid, session.own, other)
            sealed = ChaCha20Poly1305(key).encrypt(nonce, plain, context)
            boxes.append(Box(other, kem_text, nonce, sealed, self._wrap(session, other)).to_bytes())
        self._session, self._next = session, messages.BOXES
        return SumMessage(messages.SHARES, b"".join(boxes))

    def _checked(self, cohort: ListedCohort) -> _Session:
        """The session of a cohort message whose every value was compared with the client's own."""
        agreement, shape, own_advert = self.agreement, cohort.shape, self._advert
        if (cohort.model, cohort.config) != (agreement.model, agreement.config):
            raise SessionError("version", "The server names another model or other settings than this client has.")
        self.floors.check(shape)
        if not agreement.fits(shape.clients):
            raise SessionError("overflow", f"{shape.clients} clients can leave a ring of {agreement.ring} bits.")
        if cohort.params != params_bytes(agreement, shape):
            raise SessionError("version", "The server names other vectors, bounds or weights than this client has.")
        fingerprints = [client.fingerprint for client in cohort.clients]
        if any(a >= b for a, b in pairwise(fingerprints)):
            raise SessionError("duplicate", "A client is listed twice or out of order.")
        if own_advert is None or self.fingerprint not in fingerprints:
            raise SessionError("own_entry", "This client is not listed.")
        own = fingerprints.index(self.fingerprint) + 1
        entry = cohort.clients[own - 1]
        if (entry.advert_hash, entry.signature) != (own_advert.hash(agreement.context), own_advert.signature):
            raise SessionError("own_entry", "The entry of this client was altered.")
        identities = self._verify(cohort)
        sid, around = messages.session_of(agreement, shape, [client.advert_hash for client in cohort.clients])
        adverts = self._neighbours(cohort, around[own - 1])
        public = [advert.channel for advert in adverts.values()] + [advert.mask for advert in adverts.values()]
        if len({*public, own_advert.channel, own_advert.mask}) < len(public) + 2:
            raise SessionError("duplicate", "Two clients advertise one key.")
        return _Session(sid, shape, own, adverts, identities)

    def _verify(self, cohort: ListedCohort) -> dict[int, bytes]:
        """The identity keys of all clients, after each signature was verified."""
        found: dict[int, bytes] = {}
        for index, client in enumerate(cohort.clients, start=1):
            public = self._identities(client.fingerprint)
            if public is None or not verified(public, client.signature, messages.signed_advert(client.advert_hash)):
                raise SessionError("signature", f"The advert of client {index} is not signed by a known identity.")
            found[index] = public
        if len(set(found.values())) < len(found):
            raise SessionError("duplicate", "Two clients have one identity key.")
        return found

    def _neighbours(self, cohort: ListedCohort, around: Sequence[int]) -> dict[int, Advert]:
        """The adverts of the neighbours in the graph that this client drew."""
        if cohort.shape.complete:
            adverts = [cohort.clients[index - 1].advert for index in around]
        else:
            adverts = list(cohort.neighbours)
        found: dict[int, Advert] = {}
        for index, advert in zip(around, adverts, strict=True):
            entry = cohort.clients[index - 1]
            if advert is None or advert.fingerprint != entry.fingerprint:
                raise SessionError("graph", "The neighbours differ from the recomputed graph.")
            if (advert.hash(self.agreement.context), advert.signature) != (entry.advert_hash, entry.signature):
                raise SessionError("graph", f"The advert of neighbour {index} differs from its listed hash.")
            found[index] = advert
        return found

    def _open(self, body: bytes) -> None:
        """Message 3: open every box."""
        session, secrets, hybrid = self._the_session(), self._the_secrets(), self.agreement.hybrid
        n = session.shape.clients
        size = (n + 7) // 8
        shared = messages.read_bitmap(body[len(body) - size :], n)
        boxes = messages.read_boxes(body[: len(body) - size], messages.BOXES, session.own, hybrid)
        if session.own not in shared:
            raise SessionError("dropped", "This client is listed as dropped, but it sent its shares.")
        least = max(session.shape.threshold, self.floors.cohort)
        if len(shared) < least:
            raise SessionError("few_shared", f"{len(shared)} clients shared.", f"at least {least}.")
        senders = [box.peer for box in boxes]
        if sorted(senders) != sorted(shared & session.adverts.keys()):
            raise SessionError("boxes", "The boxes are not those of the neighbours that shared, one each.")
        for box in boxes:
            try:
                session.shares[box.peer] = self._opened(box, session)
                if hybrid:
                    session.seeds[box.peer] = self._pair_seed(box, session, secrets)
            except (InvalidTag, ValueError):
                raise SessionError("box", f"The box of client {box.peer} does not open.") from None
        session.shared, self._next = frozenset(shared), messages.MASKED

    def _confirm(self, body: bytes) -> SumMessage:
        session = self._the_session()
        survivors = messages.read_bitmap(body, session.shape.clients)
        if not survivors <= session.shared:
            raise SessionError("survivors", "A survivor did not share.")
        if session.own not in survivors:
            raise SessionError("dropped", "This client is listed as dropped, but it sent its vector.")
        least = max(session.shape.threshold, self.floors.cohort)
        if len(survivors) < least:
            raise SessionError("few_survivors", f"{len(survivors)} survivors.", f"at least {least}.")
        session.survivors, self._next = frozenset(survivors), messages.CONFIRMED
        return SumMessage(messages.CONFIRM, self._identity.sign(self._sets(session)))

    def _unmask(self, body: bytes) -> SumMessage:
        session = self._the_session()
        entries, signed = messages.read_confirmed(body), self._sets(session)
        holders = (session.adverts.keys() | {session.own}) & session.survivors
        if any(index not in holders for index, _ in entries):
            raise SessionError("not_neighbour", "A confirmation of a client that holds no share with this one.")
        for index, signature in entries:
            if not verified(session.identities[index], signature, signed):
                raise SessionError("confirmations", f"SumClient {index} did not confirm the same sets.")
        count = len({index for index, _ in entries})
        if count < len(entries) or count < session.shape.threshold:
            raise SessionError("confirmations", f"{count} confirmations.", f"at least {session.shape.threshold}.")
        held = {**session.shares, session.own: session.own_shares}
        shares = [
            (index, messages.SELF_SHARE, held[index][1])
            if index in session.survivors
            else (index, messages.MASK_SHARE, held[index][0])
            for index in sorted(held)
        ]
        reply = SumMessage(messages.UNMASK, messages.unmask_body(shares))
        self.wipe()
        self._request, self._reply = body, reply
        return reply

    # 2. Keys of a pair

    def _exchange(self, other: int, session: _Session) -> tuple[bytes, bytes]:
        """The shared secret of the channel to a neighbour, and the ciphertext for its ML-KEM key."""
        advert = session.adverts[other]
        try:
            shared = keys.exchange(self._the_secrets().channel, advert.channel)
            session.pairs[other] = keys.exchange(self._the_secrets().mask.exchange_key, advert.mask)
            if not self.agreement.hybrid:
                return shared, b""
            secret, text = MLKEM768PublicKey.from_public_bytes(advert.channel_kem).encapsulate()
        except ValueError:
            raise SessionError("key", "A public key of a neighbour has a low order or is malformed.") from None
        return shared + secret, text

    def _wrap(self, session: _Session, other: int) -> bytes:
        """The seed of the pair for a neighbour of higher index, in hybrid mode."""
        if not self.agreement.hybrid or other < session.own:
            return b""
        try:
            secret, text = MLKEM768PublicKey.from_public_bytes(session.adverts[other].mask_kem).encapsulate()
        except ValueError:
            raise SessionError("key", "A public key of a neighbour is malformed.") from None
        nonce, key = os.urandom(12), keys.wrap_key(session.sid, secret, session.own, other)
        seed = self._the_secrets().mask.pair_seed(session.sid, other)
        return text + nonce + ChaCha20Poly1305(key).encrypt(nonce, seed, session.sid + b"wrap")

    def _opened(self, box: Box, session: _Session) -> tuple[int, int]:
        secrets, sender = self._the_secrets(), box.peer
        shared = keys.exchange(secrets.channel, session.adverts[sender].channel)
        if secrets.channel_kem is not None:
            shared += secrets.channel_kem.decapsulate(box.kem_text)
        key = keys.channel_key(session.sid, shared, sender, session.own)
        context = messages.box_context(session.sid, sender, session.own)
        return messages.read_sealed(ChaCha20Poly1305(key).decrypt(box.nonce, box.sealed, context), sender, session.own)

    def _pair_seed(self, box: Box, session: _Session, secrets: keys.Secrets) -> bytes:
        if box.peer > session.own:
            return secrets.mask.pair_seed(session.sid, box.peer)
        return keys.unwrap(box.wrap, secrets.mask, session.sid, box.peer, session.own)

    def _mask_keys(self, name: str, length: int) -> tuple[list[bytes], list[int]]:
        """The keys and signs of the masks of one vector."""
        session, secrets, ring = self._the_session(), self._the_secrets(), self.agreement.ring
        mask_keys, signs = [keys.self_key(session.sid, secrets.b, session.own, name, length, ring)], [1]
        for other in sorted(session.shares):
            shared = keys.extract(session.sid, session.pairs[other] + session.seeds.get(other, b""))
            low, high = sorted((session.own, other))
            mask_keys.append(keys.pair_key(shared, low, high, name, length, ring))
            signs.append(1 if other > session.own else -1)
        return mask_keys, signs

    # 3. State

    def _expect(self, kind: int) -> None:
        if kind != self._next:
            self.wipe()
            raise SessionError("message", f"Message {kind} is out of order.")

    def _the_secrets(self) -> keys.Secrets:
        if self._secrets is None:
            raise SessionError("message", "The session is over.")
        return self._secrets

    def _the_session(self) -> _Session:
        if self._session is None:
            raise SessionError("message", "The session has no cohort.")
        return self._session

    def _sets(self, session: _Session) -> bytes:
        n = session.shape.clients
        return messages.signed_sets(
            session.sid, messages.bitmap(session.shared, n), messages.bitmap(session.survivors, n)
        )
