"""The messages of a session and their bytes. Numbers are big-endian, but the masked words are little-endian.

    kind  name       direction  content
    0     advertise  up         version, run, round, attempt, fingerprint, nonce, public keys, commitment, signature
    1     cohort     down       parameters, and the adverts or their hashes in order of fingerprint
    2     shares     up         one box for each neighbour
    3     shares     down       the boxes for this client, and a bitmap of the clients that shared
    4     masked     up         the masked vectors, in order
    5     survivors  down       a bitmap
    6     confirm    up         a signature over both bitmaps
    7     confirmed  down       signatures of the holders
    8     unmask     up         one share for each holder relation

Each message has one length that follows from the agreement and the shape, except the lists of 3 and 7, whose entries
have one length. A message of any other length is refused before it is read.

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.secure.graph import neighbours
from atoll.secure.keys import LABEL, hashed
from atoll.secure.params import Agreement, Topology, params_bytes
from atoll.secure.refusals import SessionError
from atoll.secure.shamir import SHARE_BYTES, share_bytes, share_number

VERSION = 1
ADVERTISE, COHORT, SHARES, BOXES, MASKED, SURVIVORS, CONFIRM, CONFIRMED, UNMASK = range(9)
SIGNATURE_BYTES = 64
_KEM_KEY, _KEM_TEXT, _WRAP = 1184, 1088, 1148
_BOX = 106  # index 4, nonce 12, sealed (two indices, two shares) 74, tag 16
_LISTED = 132  # index 4, fingerprint 32, hash 32, signature 64
_ENTRY = 4 + SIGNATURE_BYTES
_SHARE = 4 + 1 + SHARE_BYTES
SELF_SHARE, MASK_SHARE = 1, 2


class SumMessage(NamedTuple):
    """A message of a session.

    Attributes:
        kind: 0 to 8. Even kinds go to the server, odd kinds to a client.
        body: its bytes.
    """

    kind: int
    body: bytes


def wrong_length(kind: int, length: int, required: int) -> SessionError:
    return SessionError("message", f"Message {kind} has {length} bytes.", f"{required} bytes.")


# 1. Adverts


@dataclass(frozen=True)
class Advert:
    """The public keys of one client in one session."""

    fingerprint: bytes
    nonce: bytes
    channel: bytes
    mask: bytes
    commitment: bytes
    channel_kem: bytes = b""
    mask_kem: bytes = b""
    signature: bytes = b""

    def fields(self, context: bytes) -> bytes:
        """The signed bytes; `context` is run ‖ round ‖ attempt."""
        head = struct.pack(">B", VERSION) + context + self.fingerprint + self.nonce
        return head + self.channel + self.mask + self.commitment + self.channel_kem + self.mask_kem

    def hash(self, context: bytes) -> bytes:
        return hashed(self.fields(context))

    def to_bytes(self, context: bytes) -> bytes:
        return self.fields(context) + self.signature


def signed_advert(advert_hash: bytes) -> bytes:
    """The bytes that a client signs with its identity key."""
    return LABEL + b"advert" + advert_hash


def advert_length(hybrid: bool) -> int:
    return 253 + (2 * _KEM_KEY if hybrid else 0)


def read_advert(body: bytes, agreement: Agreement) -> Advert:
    """Read an advert of this session.

    Raises:
        SessionError: `key` for a wrong length, `replayed` for another run, round, attempt or version.
    """
    if len(body) != advert_length(agreement.hybrid):
        raise SessionError(
            "key", f"An advert has {len(body)} bytes.", f"{advert_length(agreement.hybrid)} bytes: keys of full length."
        )
    head = struct.pack(">B", VERSION) + agreement.context
    if body[: len(head)] != head:
        raise SessionError("replayed", "An advert is of another version, run, round or attempt.")
    at, fields = len(head), []
    kem = _KEM_KEY if agreement.hybrid else 0
    for length in (32, 32, 32, 32, 32, kem, kem, SIGNATURE_BYTES):
        fields.append(body[at : at + length])
        at += length
    return Advert(*fields)


class Listed(NamedTuple):
    """What a cohort message says about one client; `advert` only for a neighbour."""

    fingerprint: bytes
    advert_hash: bytes
    signature: bytes
    advert: Advert | None


def cohort_body(agreement: Agreement, shape: Topology, adverts: Sequence[Advert], around: Sequence[int]) -> bytes:
    """The cohort for one client whose neighbours are `around` (positions from 0)."""
    params = params_bytes(agreement, shape)
    parts = [
        agreement.model,
        agreement.config,
        struct.pack(">I", len(params)),
        params,
        struct.pack(">I", shape.clients),
    ]
    context = agreement.context
    if shape.complete:
        return b"".join([*parts, *(advert.to_bytes(context) for advert in adverts)])
    for index, advert in enumerate(adverts, start=1):
        parts += [struct.pack(">I", index), advert.fingerprint, advert.hash(context), advert.signature]
    return b"".join([*parts, *(adverts[i].to_bytes(context) for i in around)])


class ListedCohort(NamedTuple):
    """A cohort message, read. `neighbours` are its full adverts in order, if the graph is not complete."""

    model: bytes
    config: bytes
    shape: Topology
    params: bytes
    clients: list[Listed]
    neighbours: list[Advert]


_PARAMS = ">BIIBB"  # graph, neighbours, threshold, ring, hybrid: the numbers that a server chooses


def read_cohort(body: bytes, agreement: Agreement) -> ListedCohort:
    """Read a cohort message. Its values are not compared with the client's own yet.

    Raises:
        SessionError: `message`, `overflow`, `cohort`, or a reason of `read_advert`.
    """
    if len(body) < 72:
        raise wrong_length(COHORT, len(body), 72)
    length = int.from_bytes(body[64:68], "big")
    start = 68 + length + 4
    if length < struct.calcsize(_PARAMS) or length > 1 << 20 or len(body) < start:
        raise SessionError("message", "The parameters of a cohort are cut.")
    params = body[68 : 68 + length]
    regular, neighbours, threshold, ring, _ = struct.unpack_from(_PARAMS, params)
    if ring not in (32, 64):
        raise SessionError("overflow", f"A ring of {ring} bits.", "32 or 64 bits.")
    n = int.from_bytes(body[start - 4 : start], "big")
    if n > agreement.largest_cohort:
        raise SessionError("cohort", f"{n} clients.", f"at most {agreement.largest_cohort}.")
    if regular and (neighbours % 2 or not 0 < neighbours < n - 1):
        raise SessionError("graph", f"{neighbours} neighbours among {n} clients.", "an even number below n - 1.")
    shape, full = Topology(n, neighbours, threshold), advert_length(agreement.hybrid)
    required = start + (_LISTED * n + full * neighbours if regular else full * n)
    if len(body) != required or regular not in (0, 1) or (not regular and neighbours != n - 1):
        raise wrong_length(COHORT, len(body), required)
    clients, adverts = [], []
    if not regular:
        for at in range(start, len(body), full):
            advert = read_advert(body[at : at + full], agreement)
            clients.append(Listed(advert.fingerprint, advert.hash(agreement.context), advert.signature, advert))
    else:
        for position in range(n):
            at = start + _LISTED * position
            if int.from_bytes(body[at : at + 4], "big") != position + 1:
                raise SessionError("message", "The clients of a cohort are not numbered in order.")
            clients.append(Listed(body[at + 4 : at + 36], body[at + 36 : at + 68], body[at + 68 : at + 132], None))
        first = start + _LISTED * n
        adverts = [read_advert(body[at : at + full], agreement) for at in range(first, len(body), full)]
    return ListedCohort(body[:32], body[32:64], shape, params, clients, adverts)


def session_of(agreement: Agreement, shape: Topology, hashes: Sequence[bytes]) -> tuple[bytes, list[tuple[int, ...]]]:
    """The identity of a session, and the neighbours of each client, by index from 1. Both sides compute them.

    Args:
        agreement: of this participant.
        shape: the graph.
        hashes: the hashes of all adverts, in order of fingerprint.
    """
    context, count = agreement.context, shape.clients.to_bytes(4, "big")
    seed = hashed(LABEL, b"graph", context, hashed(*hashes))
    around = [tuple(i + 1 for i in row) for row in neighbours(seed, shape.clients, shape.neighbours)]
    params = params_bytes(agreement, shape)
    sid = hashed(LABEL, b"sid", context, agreement.model, agreement.config, params, count, *hashes)
    return sid, around


def longest_bodies(agreement: Agreement) -> dict[int, int]:
    """The longest body of each kind of message in bytes, for any graph of the largest cohort."""
    n, hybrid = agreement.largest_cohort, agreement.hybrid
    params = len(params_bytes(agreement, Topology(n, n - 1, n)))
    boxes = n * box_length(hybrid, True)
    return {
        ADVERTISE: advert_length(hybrid),
        COHORT: 72 + params + n * (_LISTED + advert_length(hybrid)),
        SHARES: boxes,
        BOXES: boxes + (n + 7) // 8,
        MASKED: words_length(agreement),
        SURVIVORS: (n + 7) // 8,
        CONFIRM: SIGNATURE_BYTES,
        CONFIRMED: n * _ENTRY,
        UNMASK: n * _SHARE,
    }


# 2. Boxes


class Box(NamedTuple):
    """What one client sends to a neighbour.

    Attributes:
        peer: the receiver in message 2, the sender in message 3.
        kem_text: ML-KEM-768 ciphertext for the channel key, in hybrid mode.
        nonce, sealed: the encrypted indices and shares.
        wrap: the wrapped seed of the pair, in hybrid mode, if the sender has the lower index.
    """

    peer: int
    kem_text: bytes
    nonce: bytes
    sealed: bytes
    wrap: bytes

    def to_bytes(self) -> bytes:
        return struct.pack(">I", self.peer) + self.kem_text + self.nonce + self.sealed + self.wrap


def box_length(hybrid: bool, wrapped: bool) -> int:
    return _BOX + (_KEM_TEXT + (_WRAP if wrapped else 0) if hybrid else 0)


def read_boxes(body: bytes, kind: int, own: int, hybrid: bool) -> list[Box]:
    """Read consecutive boxes of client `own`: sent by it in message 2, for it in message 3.

    Raises:
        SessionError: `message`, if the last box is cut.
    """
    boxes, at = [], 0
    kem = _KEM_TEXT if hybrid else 0
    while at < len(body):
        index = int.from_bytes(body[at : at + 4], "big")
        wrapped = own < index if kind == SHARES else index < own
        length = box_length(hybrid, wrapped)
        if len(body) < at + length:
            raise wrong_length(kind, len(body), at + length)
        data = body[at : at + length]
        sealed = 4 + kem + 12
        boxes.append(
            Box(index, data[4 : 4 + kem], data[4 + kem : sealed], data[sealed : sealed + 90], data[sealed + 90 :])
        )
        at += length
    return boxes


def sealed_shares(sender: int, receiver: int, share_a: int, share_b: int) -> bytes:
    return struct.pack(">II", sender, receiver) + share_bytes(share_a) + share_bytes(share_b)


def read_sealed(data: bytes, sender: int, receiver: int) -> tuple[int, int]:
    """The shares of a and b from an opened box.

    Raises:
        ValueError: the box is of another pair, or a share is not below the prime.
    """
    if data[:8] != struct.pack(">II", sender, receiver):
        raise ValueError("The box is of another pair.")
    return share_number(data[8 : 8 + SHARE_BYTES]), share_number(data[8 + SHARE_BYTES :])


def box_context(sid: bytes, sender: int, receiver: int) -> bytes:
    """The associated data of a box."""
    return sid + b"M2" + struct.pack(">II", sender, receiver)


# 3. Sets, words, confirmations, shares


def bitmap(members: Iterable[int], n: int) -> bytes:
    """One bit for each of the clients 1 .. n; client 1 is the highest bit of the first byte."""
    data = bytearray((n + 7) // 8)
    for index in members:
        data[(index - 1) // 8] |= 0x80 >> (index - 1) % 8
    return bytes(data)


def read_bitmap(data: bytes, n: int) -> set[int]:
    """The members of a bitmap.

    Raises:
        SessionError: `survivors`, for a wrong length or a client above n.
    """
    if len(data) != (n + 7) // 8:
        raise SessionError("survivors", f"A bitmap of {len(data)} bytes.", f"{(n + 7) // 8} bytes for {n} clients.")
    members = {i + 1 for i in range(8 * len(data)) if data[i // 8] & 0x80 >> i % 8}
    if members and max(members) > n:
        raise SessionError("survivors", f"A bitmap names client {max(members)}.", f"clients 1 to {n}.")
    return members


def words_length(agreement: Agreement) -> int:
    return sum(words for _, words in agreement.masked_vectors) * (agreement.ring // 8)


def read_words(body: bytes, agreement: Agreement) -> dict[str, NDArray[np.unsignedinteger]]:
    """The masked words by vector, without a copy.

    Raises:
        SessionError: `message`, for a wrong length.
    """
    if len(body) != words_length(agreement):
        raise wrong_length(MASKED, len(body), words_length(agreement))
    flat = np.frombuffer(body, dtype=np.dtype(f"<u{agreement.ring // 8}"))
    result, at = {}, 0
    for name, words in agreement.masked_vectors:
        result[name] = flat[at : at + words]
        at += words
    return result


def signed_sets(sid: bytes, shared: bytes, survivors: bytes) -> bytes:
    """The bytes that a client signs: it saw these two sets in this session."""
    return LABEL + b"consist" + sid + shared + survivors


def confirmed_body(signatures: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack(">I", index) + signature for index, signature in signatures)


def read_confirmed(body: bytes) -> list[tuple[int, bytes]]:
    if len(body) % _ENTRY:
        raise SessionError("message", f"Confirmations of {len(body)} bytes.", f"entries of {_ENTRY} bytes.")
    starts = range(0, len(body), _ENTRY)
    return [(int.from_bytes(body[at : at + 4], "big"), body[at + 4 : at + _ENTRY]) for at in starts]


def unmask_body(shares: Iterable[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack(">IB", index, kind) + share_bytes(share) for index, kind, share in shares)


def read_unmask(body: bytes) -> list[tuple[int, int, int]]:
    """Index, kind and number of each share.

    Raises:
        SessionError: `message`.
    """
    if len(body) % _SHARE:
        raise SessionError("message", f"Shares of {len(body)} bytes.", f"entries of {_SHARE} bytes.")
    try:
        return [
            (*struct.unpack_from(">IB", body, at), share_number(body[at + 5 : at + _SHARE]))
            for at in range(0, len(body), _SHARE)
        ]
    except ValueError as error:
        raise SessionError("message", str(error)) from None
