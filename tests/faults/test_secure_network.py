"""A secure sum over TLS gives the bits of a simulation, also with lost clients and after a kill of the server."""

import json
from hashlib import sha256
from itertools import count

import numpy as np
import pytest
from net_messages import WORK, work
from network import Federation
from test_federation import alone, federation
from test_federation import client as site_thread
from test_rehearsal import flags, rows_of

from atoll.net import wire
from atoll.net.coordinator import Deliver
from atoll.net.secure import Assembly, SiteSum, SumRound, step_pieces
from atoll.plan.aggregate import Masks
from atoll.plan.in_flight import Flight
from atoll.secure.client import SumClient, new_identity
from atoll.secure.messages import MASKED, SumMessage
from atoll.secure.params import Agreement
from atoll.secure.refusals import SessionError

SETTINGS = {
    "model": "softmax",
    "recipe": "fedavg(lr=0.5, batch=100)",
    "plan__codec": "Clip(1.0)",
    "plan__aggregator": "Mean(weights='equal', secure=True)",
    "numerics": "fused",
    "rounds": 2,
    "seed": 4,
}


def model(path):
    return (path / "model.safetensors").read_bytes()


def threads(it, many=6):
    """Clients of a federation as threads of this process."""
    return [site_thread(token, it.folder / f"site-{i}", []) for i, token in enumerate(it.tokens[:many])]


# 1. Over TLS


def test_a_secure_sum_of_a_network_gives_the_bits_of_a_simulation(tmp_path, monkeypatch, capfd):
    """No file of server or site, and no output, has words or secrets of a client."""
    secret, mask = [], SumClient.mask

    def spied(self, words, weight):
        secret.extend([words["update"][:4].tobytes(), self._secrets.a, self._secrets.b])
        return mask(self, words, weight)

    monkeypatch.setattr(SumClient, "mask", spied)
    served, events = federation(tmp_path, SETTINGS, 6)
    assert model(served.path) == model(alone(tmp_path, SETTINGS, 6).path)
    assert [report.arrived for report in served.reports] == [6, 6]
    numbers = 64 * 10 + 10 + len(("loss", "rows"))
    sent = [event["bytes"] for each in events for event in each if event["event"] == "work"]
    assert len(sent) == 12 and set(sent) == {4 * (numbers + 4)}
    ledger = [json.loads(line) for line in (tmp_path / "site-0" / "ledger.jsonl").read_text().splitlines()]
    assert [(row["round"], row["attempt"], row["bytes"]) for row in ledger] == [(0, 0, sent[0]), (1, 0, sent[0])]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [text.encode() for text in capfd.readouterr()]
    assert len(secret) == 36 and len(written) > 40
    for plain in secret:
        assert not any(plain in data or plain.hex().encode() in data for data in written)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("step", "arrived"), [(2, 6), (4, 6), (6, 6), (8, 0)])
def test_a_server_killed_in_a_session_begins_another_attempt(step, arrived, tmp_path):
    """No client answers two attempts of a round with its shares, so a kill after them ends the round without a sum."""
    with Federation(tmp_path, *flags(**SETTINGS, clients=6), clients=6) as it:
        address = it.serve(failpoint=f"sum.{step}:1")
        it.invite()
        threads(it)
        it.server.process.wait(110)
        assert it.serve() == address
        assert it.server.code() == 0, it.server.stderr()
        assert [row["arrived"] for row in rows_of(it.path())] == [arrived, 6]
        ledger = [json.loads(line) for line in (tmp_path / "site-0" / "ledger.jsonl").read_text().splitlines()]
        attempts = [(row["round"], row["attempt"]) for row in ledger]
        assert attempts == [*([(0, 0)] if step > 2 else []), *([(0, 1)] if arrived else []), (1, 0)]
        assert json.loads(it.run("verify", "--home", it.home, "--json"))["ok"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_client_that_dies_in_a_session_is_left_out(tmp_path):
    with Federation(tmp_path, *flags(**SETTINGS, clients=7), "--set", "net.step_s=10", clients=7) as it:
        it.serve()
        it.invite()
        it.join(6, failpoint="site.2:1")
        threads(it, 6)
        it.clients[6].process.wait(110)
        it.server.after_round(0)
        it.join(6, token=False)
        assert it.server.code() == 0, it.server.stderr()
        assert [row["arrived"] for row in rows_of(it.path())] == [6, 7]


# 2. Sessions without a network


class Net:
    """A round of a secure sum between sites in one process, without sockets."""

    def __init__(self, clients, step_s=10.0, first=0, keys_s=100.0):
        self.ids, self.begun, self.withdrawn, self.log = count(), [], [], []
        self.identities = {i: new_identity() for i in range(clients)}
        self.public = {i: key.public_key().public_bytes_raw() for i, key in self.identities.items()}
        self.works, self.sites, self.queue, self.now = {}, {}, [], 0.0
        self.present = set(range(clients))
        self.values = {i: np.arange(8, dtype="<u4") * i for i in range(clients)}
        masks = Masks(least=3, hybrid=False)
        self.round = SumRound(
            masks, self.public, self.assign, self.withdraw, lambda c, piece: self.queue.append((c, piece)),
            self.begun.append, len, step_s, keys_s, lambda: self.present, first,
        )  # fmt: skip
        for i in range(clients):
            self.round.start(Flight(i, 0, 0, i))

    def agreement(self, attempt):
        return Agreement(bytes(16), 0, attempt, bytes(32), bytes(32), (("update", 8),), 32, 100, 1, 9, False)

    def assign(self, flight, attempt):
        name = sha256(b"%d %d" % (flight.client, attempt)).digest()[:16]
        self.works[flight.client] = work(work=name, attempt=attempt, sum=wire.SumTerms(9, 1, 1))
        return self.works[flight.client], self.agreement(attempt)

    def withdraw(self, works):
        self.withdrawn += works

    def join(self, client, last=(-1, -1)):
        """Let a site open its session, and send its keys."""
        attempt = self.works[client].attempt
        key = self.identities[client]
        it = SumClient(self.agreement(attempt), key, self.public[client], lambda other: other, last=last)
        site = SiteSum(
            self.works[client], it, ({"update": self.values[client]}, 1), lambda: self.log.append(client), None
        )
        self.sites[client] = site
        self.send(client, site.answer)
        return site

    def send(self, client, message):
        name = self.works[client].work
        if message.kind == MASKED:
            return self.round.upload(Deliver(client, name, None, bytes(32), bytearray(message.body)))
        for piece in step_pieces(name, message):
            self.round.stepped(piece)
        return True

    def run(self, lost=(), at=-1):
        """Deliver all steps. The sites of `lost` take no message from step `at` on."""
        while True:
            outcome = self.round.advance(self.now)
            if outcome is not None:
                return outcome
            if not self.queue:
                if self.round.left(self.now) is None:
                    return None
                self.now += 20.0
                continue
            client, piece = self.queue.pop(0)
            if client in lost and piece.step >= at:
                continue
            answer = self.sites[client].take(piece)
            if answer is not None:
                self.send(client, answer)


def joined(clients, **more):
    net = Net(clients, **more)
    assert net.round.begin() is None
    for client in range(clients):
        net.join(client)
    return net


@pytest.mark.parametrize(("at", "inside"), [(1, 5), (3, 5), (5, 6), (7, 6)])
def test_a_site_that_falls_silent_is_left_out_before_its_masked_words_and_kept_after_them(at, inside):
    net = joined(6)
    outcome = net.run(lost=(4,), at=at)
    clients = [one.flight.client for one in outcome.arrived]
    assert clients == [i for i in range(6) if i != 4 or inside == 6]
    assert outcome.sum.words["update"].tolist() == sum(net.values[i] for i in clients).tolist()
    assert [flight.client for flight, _ in outcome.lost] == [4] * (6 - inside)
    assert all(not one.delivered.body for one in outcome.arrived)


def test_the_server_waits_for_the_keys_of_all_and_then_for_a_step_at_most():
    net = Net(4)
    net.round.begin()
    net.present.remove(3)
    for client in range(3):
        net.join(client)
    assert net.run() is None and net.round.awaited == (3,) and net.round.left(1e9) is None
    net.join(3)
    assert net.round.advance(5.0) is None and net.round.left(7.0) == 8.0
    assert net.round.step == "shares (step 2 of 8, attempt 1 of 2)"


def test_a_client_that_is_present_without_keys_is_left_out_and_an_absent_one_is_awaited():
    """A channel and signs of life extend nothing: only seconds of presence count, once a sum is possible."""
    net = Net(6, keys_s=100.0)
    net.round.begin()
    net.present.remove(4)
    for client in range(2):
        net.join(client)
    assert net.round.advance(0.0) is None and net.round.left(0.0) is None  # two are too few for a sum
    assert net.round.advance(500.0) is None and net.round.awaited == (2, 3, 4, 5)
    net.join(2)
    net.join(5)
    assert net.round.advance(500.0) is None and net.round.left(510.0) == 90.0
    net.present ^= {3, 4}  # the silent client flees after 60 s, and the absent one comes
    assert net.round.advance(560.0) is None and net.round.left(560.0) == 100.0
    net.present.add(3)
    assert net.round.advance(600.0) is None and net.round.left(600.0) == 40.0
    net.join(4)
    assert net.round.advance(640.0) is None and net.round.step.startswith("shares")
    net.now = 640.0
    outcome = net.run()
    assert [one.flight.client for one in outcome.arrived] == [0, 1, 2, 4, 5]
    assert [(flight.client, cause) for flight, cause in outcome.lost] == [(3, "no keys within 100 s")]
    net.join(3)  # its keys come too late, and change nothing


def test_messages_that_arrive_again_change_nothing():
    net = joined(5)
    while (outcome := net.round.advance(0.0)) is None:
        client, piece = net.queue.pop(0)
        site = net.sites[client]
        answer = site.take(piece)
        again = site.take(piece)
        assert again == answer
        net.send(client, answer)
        if answer.kind != MASKED:
            net.send(client, again)
        net.round.again(client)  # the connection was lost: the last message of the server is sent again
        net.queue = [entry for n, entry in enumerate(net.queue) if entry not in net.queue[:n]]
    assert outcome.sum.words["update"].tolist() == sum(net.values.values()).tolist()


def test_an_attempt_without_a_sum_is_followed_by_one_with_new_keys_and_no_third():
    net = joined(5)
    assert net.run(lost=(0, 1, 2), at=1) is None  # three of five sites share nothing
    assert net.begun == [0, 1] and len(net.withdrawn) == 5
    for client in range(5):
        net.join(client)
    assert len(net.run().arrived) == 5
    net = joined(5, first=1)
    outcome = net.run(lost=(0, 1, 2), at=1)
    assert not outcome.void and outcome.sum is None and net.begun == [1] and len(outcome.lost) == 5


@pytest.mark.parametrize(("first", "void"), [(0, False), (1, True)])
def test_a_round_without_a_sum_is_void_only_after_a_kill_and_shares(first, void):
    """Then no client has decided that it has no sum. All others end a run with noise."""
    net = joined(5, first=first)
    for client in range(5):
        net.round.lost(client, "replayed: Round 0, attempt 1 took place already.")
    outcome = net.round.advance(0.0)
    if not first:
        assert outcome is None and net.begun == [0, 1]
        for client in range(5):
            net.round.lost(client, "network: it is absent")
        outcome = net.round.advance(0.0)
    assert (outcome.sum, outcome.void) == (None, void)


def test_a_site_answers_no_second_attempt_with_shares():
    net = joined(5)
    net.run(lost=(0, 1, 2), at=7)  # two sites have sent their shares, and no sum follows
    assert sorted(net.log) == [3, 4] and net.begun == [0, 1]
    with pytest.raises(SessionError, match="took place"):
        net.join(3, last=net.sites[3]._client.taken)


def test_a_sum_with_another_weight_than_the_rows_of_its_clients_is_no_sum():
    net = joined(5)
    net.round._weigh = lambda clients: len(clients) + 1
    assert net.run() is None and net.begun == [0, 1]


def test_bodies_travel_in_pieces_and_begin_again():
    body = bytes(range(256)) * 600
    whole = step_pieces(WORK, SumMessage(1, body))
    assert [piece.rest for piece in whole] == [len(body) - (1 << 16), len(body) - (2 << 16), 0]
    it = Assembly({1: len(body)})
    assert it.add(whole[0]) is None and [it.add(piece) for piece in whole][-1] == body
    with pytest.raises(SessionError):
        Assembly({1: len(body) - 1}).add(whole[0])
    with pytest.raises(SessionError):
        Assembly({2: len(body)}).add(whole[0])
