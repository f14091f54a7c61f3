"""A client of a secure sum refuses each lie of a server by its own reason and wipes its keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atoll.secure.client import Floors, SumClient
from atoll.secure.messages import SumMessage
from atoll.secure.params import Topology
from atoll.secure.refusals import SessionError
from tests.attacks.evil_server import ATTACKS, Attack
from tests.secure_session import Group, agreement


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.row} {attack.run.__name__}")
def test_a_lie_is_refused_by_its_own_reason(attack: Attack) -> None:
    group = Group(7, agreement())
    secrets = [client._secrets for client in group.clients if client._secrets]
    with pytest.raises(SessionError) as caught:
        attack.run(group)
    assert caught.value.reason == attack.reason
    text = str(caught.value) + repr(caught.value)
    assert not any(secret.a.hex() in text or str(secret.a) in text for secret in secrets)
    client = group.clients[0]
    if attack.row in ("E23", "E7") and client._secrets is not None:
        return  # no session began
    assert client._secrets is None and client._session is None
    for kind in range(10):
        with pytest.raises(SessionError):
            client.receive(SumMessage(kind, b""))


def test_every_row_has_an_attack() -> None:
    assert {attack.row for attack in ATTACKS} == {f"E{i}" for i in range(1, 24)}


def test_more_neighbours_need_a_higher_threshold() -> None:
    """Of 998 neighbours, 24 colluding ones are likely; of the 72 of the smallest safe graph they are not."""
    Floors().check(Topology(1000, 72, 24))
    with pytest.raises(SessionError) as caught:
        Floors().check(Topology(1000, 998, 24))
    assert caught.value.reason == "threshold"


def test_no_attempt_follows_shares_that_were_sent() -> None:
    group = Group(5, agreement())
    group.run()
    client = group.clients[0]
    assert client.answered
    later = replace(group.agreed, attempt=1)
    with pytest.raises(SessionError) as caught:
        SumClient(later, group.identities[0], group.fingerprints[0], group.public.get, last=client.taken)
    assert caught.value.reason == "replayed"
    with pytest.raises(SessionError):
        SumClient(replace(group.agreed, attempt=2), group.identities[0], group.fingerprints[0], group.public.get)
