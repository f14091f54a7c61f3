"""A server that lies: one attack for each refusal E1 to E23 of a client of a secure sum.

Each attack runs an honest session up to a message, changes what client 0 receives, and delivers it. It returns nothing;
the client must raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.secure import messages
from atoll.secure.client import Floors, SumClient
from atoll.secure.messages import Advert, SumMessage
from atoll.secure.params import Topology
from atoll.secure.refusals import Reason
from tests.secure_session import Group


class Attack(NamedTuple):
    """Row of the table of refusals, the reason that the client must give, and the attack."""

    row: str
    reason: Reason
    run: Callable[[Group], None]


def _adverts(group: Group) -> list[Advert]:
    for i, client in enumerate(group.clients):
        group.up(i, client.advertise())
    return [group.server._adverts[fingerprint] for fingerprint in group.fingerprints]


def _cohort(group: Group, adverts: list[Advert], shape: Topology | None = None, **changes: object) -> None:
    """Give client 0 a cohort of these adverts under another shape or agreement."""
    shape = shape or Topology(len(adverts), len(adverts) - 1, 2 * len(adverts) // 3 + 1)
    agreed = replace(group.agreed, **changes)  # type: ignore[arg-type]
    around = list(range(1, shape.neighbours + 1))
    group.clients[0].receive(SumMessage(messages.COHORT, messages.cohort_body(agreed, shape, adverts, around)))


def _signed(group: Group, advert: Advert, key: Ed25519PrivateKey, **changes: object) -> Advert:
    """An advert with other fields and a valid signature of a key."""
    changed = replace(advert, **changes)  # type: ignore[arg-type]
    return replace(changed, signature=key.sign(messages.signed_advert(changed.hash(group.agreed.context))))


def _until_boxes(group: Group) -> SumMessage:
    """The honest message 3 for client 0."""
    for i, answer in group.down(group.advertise()).items():
        group.up(i, answer)
    return group.server.close()[group.fingerprints[0]]


def _until_survivors(group: Group) -> SumMessage:
    group.until_masked({})
    return group.server.close()[group.fingerprints[0]]


def _until_confirmed(group: Group) -> SumMessage:
    group.until_masked({})
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    return group.server.close()[group.fingerprints[0]]


# 1. The cohort


def own_entry_absent(group: Group) -> None:
    _cohort(group, _adverts(group)[1:])


def own_entry_altered(group: Group) -> None:
    adverts = _adverts(group)
    _cohort(group, [_signed(group, adverts[0], group.identities[0], nonce=bytes(32)), *adverts[1:]])


def cohort_too_small(group: Group) -> None:
    group.clients[0].floors = Floors(cohort=len(group.clients) + 1)
    _cohort(group, _adverts(group))


def cohort_above_cap(group: Group) -> None:
    group.clients[0].agreement = replace(group.agreed, largest_cohort=len(group.clients) - 1)
    _cohort(group, _adverts(group))


def threshold_too_low(group: Group) -> None:
    n = len(group.clients)
    _cohort(group, _adverts(group), Topology(n, n - 1, 2))


def threshold_below_colluding(group: Group) -> None:
    group.clients[0].floors = Floors(cohort=3, colluding=len(group.clients) - 1)
    _cohort(group, _adverts(group))


def one_key_twice(group: Group) -> None:
    adverts = _adverts(group)
    adverts[2] = _signed(group, adverts[2], group.identities[2], channel=adverts[1].channel)
    _cohort(group, adverts)


def one_client_twice(group: Group) -> None:
    adverts = _adverts(group)
    _cohort(group, [*adverts[:2], adverts[1], *adverts[2:]])


def one_identity_twice(group: Group) -> None:
    adverts = _adverts(group)
    adverts[2] = _signed(group, adverts[2], group.identities[1])
    group.public[group.fingerprints[2]] = group.public[group.fingerprints[1]]
    _cohort(group, adverts)


def bad_signature(group: Group) -> None:
    adverts = _adverts(group)
    _cohort(group, [*adverts[:3], replace(adverts[3], nonce=bytes(32)), *adverts[4:]])


def unknown_identity(group: Group) -> None:
    adverts = _adverts(group)
    del group.public[group.fingerprints[3]]
    _cohort(group, adverts)


def low_order_key(group: Group) -> None:
    adverts = _adverts(group)
    adverts[1] = _signed(group, adverts[1], group.identities[1], mask=bytes(32))
    _cohort(group, adverts)


def advert_of_an_old_attempt(group: Group) -> None:
    adverts = _adverts(group)
    _cohort(group, adverts, attempt=group.agreed.attempt + 1)


def session_that_took_place(group: Group) -> None:
    SumClient(group.agreed, group.identities[0], group.fingerprints[0], group.public.get, last=(3, 0))


def other_model(group: Group) -> None:
    _cohort(group, _adverts(group), model=b"\x01" * 32)


def other_settings(group: Group) -> None:
    _cohort(group, _adverts(group), config=b"\x01" * 32)


def other_vectors(group: Group) -> None:
    _cohort(group, _adverts(group), vectors=(("update", 8), ("age", 1)))


def regular_graph_for_few(group: Group) -> None:
    n = len(group.clients)
    _cohort(group, _adverts(group), Topology(n, 4, 4))


def chosen_neighbours(group: Group) -> None:
    """A regular graph whose listed neighbours are not the drawn ones."""

    class Regular(Floors):
        def check(self, shape: Topology) -> None:
            pass

    group.clients[0].floors = Regular(cohort=3)
    n = len(group.clients)
    adverts = _adverts(group)
    shape = Topology(n, 2, 2)
    for around in ([1, 2], [1, 3], [2, 3], [3, 4]):  # at most one of these pairs is the drawn one
        body = messages.cohort_body(group.agreed, shape, adverts, around)
        group.clients[0].receive(SumMessage(messages.COHORT, body))
        group.clients[0]._next = messages.COHORT


def sum_that_overflows(group: Group) -> None:
    n = len(group.clients)
    adverts = _adverts(group)
    group.clients[0].agreement = replace(group.agreed, bound=(1 << 31) // (n * 100) + 1)
    _cohort(group, adverts)


def unknown_ring(group: Group) -> None:
    adverts = _adverts(group)
    body = bytearray(messages.cohort_body(group.agreed, Topology(len(adverts), len(adverts) - 1, 5), adverts, []))
    body[68 + 9] = 33
    group.clients[0].receive(SumMessage(messages.COHORT, bytes(body)))


# 2. Boxes


def box_that_does_not_open(group: Group) -> None:
    message = _until_boxes(group)
    body = bytearray(message.body)
    body[40] ^= 1
    group.clients[0].receive(SumMessage(messages.BOXES, bytes(body)))


def box_for_another_client(group: Group) -> None:
    for i, answer in group.down(group.advertise()).items():
        group.up(i, answer)
    sent = group.server.close()
    other, own = sent[group.fingerprints[1]].body, sent[group.fingerprints[0]].body
    length = messages.box_length(False, False)
    # The box of client 3 for client 2 in place of its box for client 1.
    swapped = own[:length] + other[length : 2 * length] + own[2 * length :]
    group.clients[0].receive(SumMessage(messages.BOXES, swapped))


def box_missing(group: Group) -> None:
    body = _until_boxes(group).body
    group.clients[0].receive(SumMessage(messages.BOXES, body[messages.box_length(False, False) :]))


def box_twice(group: Group) -> None:
    body = _until_boxes(group).body
    length = messages.box_length(False, False)
    group.clients[0].receive(SumMessage(messages.BOXES, body[:length] + body))


def too_few_shared(group: Group) -> None:
    body = _until_boxes(group).body
    n, length = len(group.clients), messages.box_length(False, False)
    group.clients[0].receive(SumMessage(messages.BOXES, body[: 2 * length] + messages.bitmap([1, 2, 3], n)))


# 3. Survivors


def _survivors(group: Group, members: list[int]) -> None:
    _until_survivors(group)
    group.clients[0].receive(SumMessage(messages.SURVIVORS, messages.bitmap(members, len(group.clients))))


def survivor_that_did_not_share(group: Group) -> None:
    for i, answer in group.down(group.advertise()).items():
        if i != 6:
            group.up(i, answer)
    for i in group.down(group.server.close(), lambda i: i != 6):
        group.up(i, group.clients[i].mask(group.plain[i], 1))
    group.server.close()
    group.clients[0].receive(SumMessage(messages.SURVIVORS, messages.bitmap(range(1, 8), 7)))


def survivor_above_the_cohort(group: Group) -> None:
    _until_survivors(group)
    group.clients[0].receive(SumMessage(messages.SURVIVORS, b"\xff"))


def listed_as_dropped(group: Group) -> None:
    _survivors(group, [2, 3, 4, 5, 6, 7])


def too_few_survivors(group: Group) -> None:
    _survivors(group, [1, 2, 3])


# 4. Confirmations and shares


def too_few_confirmations(group: Group) -> None:
    body = _until_confirmed(group).body
    group.clients[0].receive(SumMessage(messages.CONFIRMED, body[: 4 * 68]))


def one_confirmation_twice(group: Group) -> None:
    body = _until_confirmed(group).body
    group.clients[0].receive(SumMessage(messages.CONFIRMED, body[: 4 * 68] + body[:68]))


def other_sets_signed(group: Group) -> None:
    """The server tells client 1 of other survivors than client 0: their signatures differ."""
    group.until_masked({})
    group.server.close()
    n = len(group.clients)
    everyone, fewer = messages.bitmap(range(1, n + 1), n), messages.bitmap(range(1, n), n)
    signatures = []
    for i in range(n - 1):
        answer = group.clients[i].receive(SumMessage(messages.SURVIVORS, everyone if i == 0 else fewer))
        if answer is not None:
            signatures.append((i + 1, answer.body))
    group.clients[0].receive(SumMessage(messages.CONFIRMED, messages.confirmed_body(signatures)))


def both_kinds_of_share(group: Group) -> None:
    """A second set of survivors, in which a client is dropped whose self share the first set opens."""
    message = _until_survivors(group)
    group.clients[0].receive(message)
    n = len(group.clients)
    group.clients[0].receive(SumMessage(messages.SURVIVORS, messages.bitmap(range(1, n), n)))


def second_request(group: Group) -> None:
    message = _until_confirmed(group)
    reply = group.clients[0].receive(message)
    if group.clients[0].receive(message) != reply:
        raise RuntimeError("The same request must give the same bytes.")
    group.clients[0].receive(SumMessage(messages.CONFIRMED, message.body[:-68]))


def confirmation_of_an_unknown_client(group: Group) -> None:
    body = _until_confirmed(group).body
    group.clients[0].receive(SumMessage(messages.CONFIRMED, body + messages.confirmed_body([(9, bytes(64))])))


def second_upload(group: Group) -> None:
    _until_survivors(group)
    same = group.clients[0].mask(group.plain[0], int(group.weights[0]))
    if same not in group.transcript:
        raise RuntimeError("A retry must send the same bytes.")
    changed = {name: words + np.uint32(1) for name, words in group.plain[0].items()}
    group.clients[0].mask(changed, int(group.weights[0]))


def out_of_order(group: Group) -> None:
    _adverts(group)
    group.clients[0].receive(SumMessage(messages.SURVIVORS, b"\xfe"))


def unknown_kind(group: Group) -> None:
    _adverts(group)
    group.clients[0].receive(SumMessage(17, b""))


def oversize(group: Group) -> None:
    adverts = _adverts(group)
    n = len(adverts)
    body = messages.cohort_body(group.agreed, Topology(n, n - 1, 5), adverts, [])
    group.clients[0].receive(SumMessage(messages.COHORT, body + bytes(1)))


def noise_below_the_floor(group: Group) -> None:
    floors = Floors(cohort=3, noise=1.0)
    agreed = replace(group.agreed, noise=0.5)
    SumClient(agreed, group.identities[0], group.fingerprints[0], group.public.get, floors)


ATTACKS = [
    Attack("E1", "own_entry", own_entry_absent), Attack("E1", "own_entry", own_entry_altered),
    Attack("E2", "cohort", cohort_too_small), Attack("E2", "cohort", cohort_above_cap),
    Attack("E3", "threshold", threshold_too_low), Attack("E3", "threshold", threshold_below_colluding),
    Attack("E4", "duplicate", one_key_twice), Attack("E4", "duplicate", one_client_twice),
    Attack("E4", "duplicate", one_identity_twice),
    Attack("E5", "signature", bad_signature), Attack("E5", "signature", unknown_identity),
    Attack("E6", "key", low_order_key),
    Attack("E7", "replayed", advert_of_an_old_attempt), Attack("E7", "replayed", session_that_took_place),
    Attack("E8", "version", other_model), Attack("E8", "version", other_settings),
    Attack("E8", "version", other_vectors),
    Attack("E9", "graph", regular_graph_for_few), Attack("E9", "graph", chosen_neighbours),
    Attack("E10", "overflow", sum_that_overflows), Attack("E10", "overflow", unknown_ring),
    Attack("E11", "box", box_that_does_not_open), Attack("E11", "box", box_for_another_client),
    Attack("E12", "boxes", box_missing), Attack("E12", "boxes", box_twice),
    Attack("E13", "few_shared", too_few_shared),
    Attack("E14", "survivors", survivor_that_did_not_share), Attack("E14", "survivors", survivor_above_the_cohort),
    Attack("E15", "dropped", listed_as_dropped),
    Attack("E16", "few_survivors", too_few_survivors),
    Attack("E17", "confirmations", too_few_confirmations), Attack("E17", "confirmations", one_confirmation_twice),
    Attack("E17", "confirmations", other_sets_signed),
    Attack("E18", "both_shares", both_kinds_of_share),
    Attack("E19", "second_unmask", second_request),
    Attack("E20", "not_neighbour", confirmation_of_an_unknown_client),
    Attack("E21", "second_upload", second_upload),
    Attack("E22", "message", out_of_order), Attack("E22", "message", unknown_kind), Attack("E22", "message", oversize),
    Attack("E23", "privacy", noise_below_the_floor),
]  # fmt: skip
