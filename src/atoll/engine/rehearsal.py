"""A rehearsal of a secure sum: the real protocol between the clients of a round, in one process.

A round is simulated as always. The rehearsal then takes the words of each client, runs a session with real keys, shares
and masks, and gives the sum of the session to the server in place of the simulated one. Both are equal to the bit.

Tests: tests/identities/test_rehearsal.py
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from atoll.engine.contribution import Results, Upload
from atoll.plan.aggregate.mean import Mean, PartialSum
from atoll.plan.aggregate.ring import Words
from atoll.plan.plan import Plan
from atoll.plan.state import State


def rehearse(plan: Plan, state: State, results: Results, sent: Sequence[Upload] | None, lost: Sequence[int]) -> None:
    """Replace the partial of a round by that of a session of the protocol, in place.

    Args:
        plan: the algorithm, bound; its aggregator is a `Mean` with a secure sum.
        state: the state of the open round.
        results: the results of the round.
        sent: the contributions of the clients that arrived.
        lost: clients that started and were lost before their upload.
    Raises:
        SessionError: a participant refused a message.
    """
    arrived, rule = sum(map(len, results.arrived)), plan.aggregator
    if sent and isinstance(rule, Mean) and arrived >= rule.least(arrived + len(lost)):
        results.partials[state.round] = _session(rule, repr(plan), state, sent, lost)


def _session(rule: Mean, config: str, state: State, sent: Sequence[Upload], lost: Sequence[int]) -> PartialSum:
    """The sum of a session with real keys, shares and masks."""
    # These modules load `cryptography`, which no other run needs.
    from atoll.secure.client import Floors, SumClient, new_identity
    from atoll.secure.params import Agreement, topology
    from atoll.secure.server import SumServer

    masks = rule.masks
    plain: dict[int, tuple[dict[str, Words], int]] = {}
    for chunk in sent:
        words = rule.words(chunk.contribution, chunk.weights)
        for k, (client, weight) in enumerate(zip(chunk.clients.tolist(), chunk.weights.tolist(), strict=True)):
            plain[client] = {name: vector[k] for name, vector in words.items()}, weight
    everyone = sorted({*plain, *lost})
    agreement = Agreement(**_agreed(rule, config, state, plain))
    identities = {client: new_identity() for client in everyone}
    prints = {client: sha256(client.to_bytes(8, "big")).digest() for client in everyone}
    public = {prints[client]: identities[client].public_key().public_bytes_raw() for client in everyone}
    shape = topology(len(everyone), masks.neighbours, masks.threshold)
    floors = Floors(cohort=3)
    clients = {c: SumClient(agreement, identities[c], prints[c], public.get, floors) for c in everyone}
    server = SumServer(agreement, public.get, masks.least, masks.neighbours, masks.threshold)
    for client in everyone:
        server.receive(prints[client], clients[client].advertise())
    _relay(server, clients, prints, everyone)
    for client, message in server.close().items():
        clients[_of(prints, client)].receive(message)
    for client, (words, weight) in sorted(plain.items()):
        server.receive(prints[client], clients[client].mask(words, weight))
    present = _vanish(sorted(plain), shape.threshold, len(lost) / max(1, len(everyone)))
    _relay(server, clients, prints, present)
    _relay(server, clients, prints, present)
    result = server.result()
    return rule.partial(result.words, result.weight, len(plain))


def _agreed(rule: Mean, config: str, state: State, plain: Mapping[int, Any]) -> dict[str, Any]:
    """What all clients agree on: the model that they downloaded, the plan, and the vectors."""
    words, _ = next(iter(plain.values()))
    weight = max(weight for _, weight in plain.values())
    return {
        "run": sha256(str(state.seed).encode()).digest()[:16],
        "round": state.round,
        "attempt": 0,
        "model": sha256(state.model.theta.detach().cpu().contiguous().numpy().tobytes()).digest(),
        "config": sha256(config.encode()).digest(),
        "vectors": tuple((name, len(vector)) for name, vector in sorted(words.items())),
        "ring": rule.masks.ring,
        "bound": rule.largest_number(weight),
        "largest_weight": weight,
        "hybrid": rule.masks.hybrid,
    }


def _of(prints: Mapping[int, bytes], fingerprint: bytes) -> int:
    return next(client for client, own in prints.items() if own == fingerprint)


def _relay(server: Any, clients: Mapping[int, Any], prints: Mapping[int, bytes], present: Sequence[int]) -> None:
    """Close a step: give each present client its message, and the server the answers."""
    sent = server.close()
    for client in present:
        if prints[client] in sent:
            answer = clients[client].receive(sent[prints[client]])
            if answer is not None:
                server.receive(prints[client], answer)


def _vanish(clients: list[int], threshold: int, chance: float) -> list[int]:
    """The clients that stay after their upload: some vanish with the chance of a loss, down to the threshold."""
    draw = secrets.SystemRandom()  # which of them vanish changes no bit
    gone = [client for client in clients if draw.random() < chance][: max(0, len(clients) - threshold)]
    return [client for client in clients if client not in set(gone)]
