"""Each rule of the coordinator: presence, leases, receipts, chains, uploads, quotas, revocation, the end of a run."""

from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from msgspec import structs
from net_messages import HASH, RULES, VERSIONS, work

from atoll.engine.protocols import RunOptions
from atoll.net import coordinator as co
from atoll.net import spec, wire
from atoll.net.coordinator import Coordinator, Limits
from atoll.net.engine import ServerEngine
from atoll.net.server import Listener
from atoll.net.wire import Lease, chain_link, digest

INPUT = wire.Blob(HASH, 10)
BIG = wire.MAX_INLINE + 100


def id_of(n: int) -> bytes:
    return bytes([n] * 16)


class Server:
    """A coordinator with an open run, and a clock."""

    def __init__(self, memory=False, closed=True, recent=None, rows=None, **limits):
        self.now = 100.0
        self.it = Coordinator(7, "hospitals", VERSIONS, Limits(**limits))
        self.run = co.RunOpened("run", INPUT, closed, memory, None, recent or {}, rows or {})
        self.do(self.run)

    def do(self, event, after=0.0):
        self.now += after
        return self.it.handle(event, self.now)

    def say(self, channel, message):
        return self.do(co.Arrived(channel, message))

    def join(self, client, channel=None, rows=10, **hello):
        channel = client if channel is None else channel
        fields = {"run": None, "settled": None, "prepared": (), **hello}
        out = self.do(co.Joined(channel, client))
        out += self.say(channel, wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), *fields.values()))
        return out + self.say(channel, wire.Ready(HASH, rows, 0))

    def assign(self, client, n, least=0, most=BIG, deadline=None, **changes):
        fields = dict(work=id_of(n), round=3, version=3, lease=Lease(0, 0), deadline=None)
        return self.do(co.Assigned(client, work(**{**fields, "model": b"m", **changes}), least, most, deadline))

    def lease(self, n):
        return Lease(7, next(w.lease for c in self.it._clients.values() for w in c.works.values() if w.id == id_of(n)))

    def update(self, channel, n, body=b"body", after=None, lease=None):
        return self.say(channel, wire.Update(id_of(n), lease or self.lease(n), after, body))

    def fold(self, channel, n, body=b"body", after=None):
        self.update(channel, n, body, after)
        return self.do(co.Folded(id_of(n)))


def messages(actions, kind):
    return [a.message for a in actions if isinstance(a, co.Send) and isinstance(a.message, kind)]


def receipts(actions):
    return [(m.work[0], m.code) for m in messages(actions, wire.Receipt)]


def of(actions, kind):
    return [a for a in actions if isinstance(a, kind)]


def closes(actions):
    return [(a.bye.code, a.bye.retry_s) for a in of(actions, co.Close)]


# 1. Presence


def test_a_client_is_welcomed_present_and_gone():
    s = Server()
    out = s.join(4)
    assert messages(out, wire.Welcome) == [wire.Welcome(4, 7, "run", "hospitals", INPUT, None)]
    assert [(a.client, a.rows) for a in of(out, co.Present)] == [(4, 10)] and s.it.present == (4,)
    assert of(s.do(co.Left(4)), co.Gone) == [co.Gone(4)] and s.it.present == ()
    assert s.do(co.Left(4)) == []


def test_without_a_run_a_client_waits_for_it():
    it = Coordinator(7, "hospitals", VERSIONS, Limits())
    it.handle(co.Joined(1, 0), 0.0)
    hello = wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), None, None, ())
    assert messages(it.handle(co.Arrived(1, hello), 0.0), wire.Welcome)[0].run is None
    out = it.handle(co.RunOpened("run", INPUT, True, False), 5.0)
    assert messages(out, wire.Welcome)[0].run == "run"
    assert of(it.handle(co.Arrived(1, wire.Ready(HASH, 1, 0)), 6.0), co.Present)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (wire.Ready(bytes(32), 10, 0), "input"),
        (wire.Ready(HASH, 0, 0), "rows"),
        (wire.Ready(HASH, (1 << 24) + 1, 0), "rows"),
        (wire.Ready(HASH, 10, (1 << 24) + 1), "rows"),
        (wire.Update(id_of(1), Lease(7, 1), None, b""), "order"),
    ],
)
def test_a_wrong_second_message_closes_the_channel(message, code):
    s = Server()
    s.do(co.Joined(1, 1))
    s.say(1, wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), None, None, ()))
    assert closes(s.say(1, message))[0][0] == code
    assert s.it.present == () and s.say(1, message) == []


def test_rows_are_fixed_within_a_run():
    s = Server(rows={1: (10, 0)})
    assert closes(s.join(1, rows=11)) == [("rows", None)]
    assert of(s.join(1, channel=2, rows=10), co.Present)
    s.do(co.Left(2))
    assert closes(s.join(1, channel=3, rows=9)) == [("rows", None)]


def test_versions_protocols_and_silence():
    s = Server()
    s.do(co.Joined(1, 1))
    other = wire.Versions("3.11.7", "0.1.0", "2.12.0", "2.4.6")
    assert closes(s.say(1, wire.Hello(wire.PROTOCOL, other, "", ("loop",), None, None, ()))) == [("versions", None)]
    s.do(co.Joined(2, 1))
    assert closes(s.say(2, wire.Hello(9, VERSIONS, "", ("loop",), None, None, ()))) == [("protocol", None)]
    s.do(co.Joined(3, 1))
    assert s.it.wake == s.now + 10
    assert closes(s.do(co.Tick(), after=10)) == [("silent", 1.0)]
    open_run = Server(closed=False)
    open_run.do(co.Joined(1, 1))
    assert not closes(open_run.say(1, wire.Hello(wire.PROTOCOL, other, "", ("loop",), None, None, ())))


def test_a_second_channel_replaces_the_first():
    s = Server()
    s.join(1)
    out = s.join(1, channel=9)
    assert closes(out) == [("replaced", 60.0)] and s.it.present == (1,)
    assert s.do(co.Left(1)) == []
    assert messages(s.assign(1, 5), wire.Work) and s.it.present == (1,)


def test_frames_that_are_no_messages_and_floods_close_only_their_channel():
    s = Server(rate=10.0, burst=20.0)
    s.join(1)
    s.join(2)
    out = s.do(co.Garbled(1, "magic"))
    assert closes(out) == [("frame", 60.0)] and of(out, co.Noted)[0].code == "frame-magic"
    for _ in range(18):
        assert not closes(s.say(2, wire.Progress(id_of(1), 0)))
    assert closes(s.say(2, wire.Progress(id_of(1), 0))) == [("quota", 60.0)]
    assert of(s.join(3), co.Present)


# 2. Works and leases


def test_a_work_is_sent_under_a_lease_and_kept_for_an_absent_client():
    s = Server()
    assert not of(s.assign(1, 5), co.Failed)
    out = s.join(1)
    (first,) = messages(out, wire.Work)
    assert (first.work, first.lease) == (id_of(5), Lease(7, 1))
    (second,) = messages(s.assign(1, 6, deadline=s.now + 30), wire.Work)
    assert (second.lease, second.deadline) == (Lease(7, 2), 30.0)
    # A new channel: both are sent again, with the rest of the deadline and the same leases.
    s.do(co.Left(1), after=10)
    again = messages(s.join(1), wire.Work)
    assert [(w.work, w.lease, w.deadline) for w in again] == [
        (id_of(5), Lease(7, 1), None),
        (id_of(6), Lease(7, 2), 20.0),
    ]
    with pytest.raises(ValueError):
        s.assign(1, 5)


def test_progress_renews_a_lease_and_an_unknown_work_is_cancelled():
    s = Server(absent_s=0.0)
    s.join(1)
    s.assign(1, 5)
    for _ in range(5):
        assert s.do(co.Tick(), after=50) == []
        s.say(1, wire.Progress(id_of(5), 1))
    assert messages(s.say(1, wire.Progress(id_of(9), 1)), wire.Cancel) == [wire.Cancel(id_of(9))]
    out = s.do(co.Tick(), after=61)
    assert [(a.client, a.code) for a in of(out, co.Failed)] == [(1, "expired")]
    assert messages(out, wire.Cancel) and receipts(s.update(1, 5, lease=Lease(7, 1))) == [(5, "late")]


def test_signs_of_life_renew_a_lease_for_a_limited_time_in_an_open_run():
    s, closed = Server(absent_s=0.0, work_s=300.0), Server(work_s=300.0)
    for it in (s, closed):
        it.join(1)
        it.assign(1, 5)
        for step in range(5):
            assert not of(it.do(co.Tick(), after=50), co.Failed)
            it.say(1, wire.Progress(id_of(5), step))
    (failed,) = of(s.do(co.Tick(), after=50), co.Failed)
    assert failed.code == "expired" and "300 s" in failed.reason and "signs of life" in failed.reason
    for _ in range(20):
        closed.say(1, wire.Progress(id_of(5), 9))
        assert not of(closed.do(co.Tick(), after=50), co.Failed), "a closed run waits"


def test_a_closed_run_asks_again_after_a_lease_and_never_gives_up():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    out = s.do(co.Tick(), after=60)
    assert messages(out, wire.Work)[0].lease == Lease(7, 1) and not of(out, co.Failed)
    s.do(co.Left(1))
    for _ in range(20):
        assert not of(s.do(co.Tick(), after=1000), co.Failed)
    assert messages(s.join(1, channel=2), wire.Work)
    assert of(s.update(2, 5), co.Deliver)


def test_an_open_run_gives_an_absent_client_the_time_of_a_lease():
    s = Server(closed=False, absent_s=5.0)
    assert not of(s.assign(1, 5), co.Failed)
    assert not of(s.do(co.Tick(), after=64), co.Failed)
    assert [a.code for a in of(s.do(co.Tick(), after=1), co.Failed)] == ["absent"]
    s.assign(2, 6)
    s.join(2)
    assert not of(s.do(co.Tick(), after=59), co.Failed), "a client that came back"
    assert [a.code for a in of(s.do(co.Tick(), after=1), co.Failed)] == []
    assert [a.code for a in of(s.do(co.Tick(), after=5), co.Failed)] == ["expired"]


def test_a_client_that_leaves_or_refuses_fails_its_works():
    s = Server(closed=False, absent_s=0.0)
    s.join(1)
    s.join(2)
    for client, n in ((1, 5), (2, 6), (2, 7)):
        s.assign(client, n)
    assert [(a.work, a.code) for a in of(s.say(1, wire.Leave("hours")), co.Failed)] == [(id_of(5), "left")]
    (failed,) = of(s.say(2, wire.Refusal(id_of(6), "policy-rounds", "10 rounds")), co.Failed)
    assert (failed.code, failed.reason) == ("policy-rounds", "10 rounds")
    # A refusal of another client's work, or of an unknown one, does nothing.
    assert s.say(2, wire.Refusal(id_of(5), "failed", "")) == []
    out = s.say(2, wire.Refusal(None, "input", "column age"))
    assert [(a.client, a.code) for a in of(out, co.Refused)] == [(2, "input")] and of(out, co.Gone)
    assert [a.work for a in of(out, co.Failed)] == [id_of(7)]
    assert [a.code for a in of(s.assign(2, 8), co.Failed)] == ["input"]


def test_withdrawn_works_are_cancelled():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    s.assign(1, 6)
    s.fold(1, 6)
    assert messages(s.do(co.Withdrawn((id_of(5), id_of(99)))), wire.Cancel) == [wire.Cancel(id_of(5))]
    assert receipts(s.update(1, 5, lease=Lease(7, 1))) == [(5, "late")]
    with pytest.raises(ValueError):
        s.do(co.Withdrawn((id_of(6),)))


def test_a_contribution_that_arrives_during_a_withdrawal_is_rejected_later():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    assert of(s.update(1, 5), co.Deliver)
    assert messages(s.do(co.Withdrawn((id_of(5),))), wire.Cancel) == [wire.Cancel(id_of(5))]
    assert s.do(co.Rejected(id_of(5))) == []
    s.assign(1, 6)
    assert receipts(s.fold(1, 6)) == [(6, "received")]


def test_a_message_that_arrives_as_its_round_ends_is_late_and_not_invalid(tmp_path):
    """It is in the inbox when the engine withdraws the works that the round no longer awaits."""
    s, out = Server(), []
    s.join(1)
    s.assign(1, 5)
    engine = ServerEngine(spec.Server(str(tmp_path / "home")), RunOptions())
    engine._net = SimpleNamespace(inbox=SimpleQueue(), handle=lambda *events: [out.extend(s.do(one)) for one in events])
    engine._assigned = {id_of(5): None}
    engine._net.inbox.put(*of(s.update(1, 5), co.Deliver))
    engine._withdraw()
    assert messages(out, wire.Cancel) == [wire.Cancel(id_of(5))] and not receipts(out) and not of(out, co.Noted)
    engine.home.close()


# 3. Receipts


def test_a_contribution_is_received_after_it_is_folded_and_settled_after_the_commit():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    out = s.update(1, 5)
    assert out == [co.Deliver(1, id_of(5), None, digest(b"body"), b"body")]
    assert receipts(s.do(co.Folded(id_of(5)))) == [(5, "received")]
    assert messages(s.do(co.Committed((id_of(5),))), wire.Settled) == [wire.Settled((id_of(5),))]
    for event in (co.Folded(id_of(5)), co.Committed((id_of(5),)), co.Rejected(id_of(5))):
        with pytest.raises(ValueError):
            s.do(event)


def test_a_receipt_is_left_out_if_the_round_is_committed_before_the_loop_wakes(tmp_path):
    s = Server()
    s.join(1)
    net = Listener(tmp_path, SimpleNamespace(directory=lambda: None), None, s.it)
    for n, happened in ((5, (co.Folded(id_of(5)), co.Committed((id_of(5),)))), (6, (co.Folded(id_of(6)),))):
        s.assign(1, n)
        s.update(1, n)
        for event in happened:
            net.post(event)
        assert not net._outward
        net.handle()
        out, net._outward = net._outward, []
        assert [type(m) for m in messages(out, object)] == [wire.Settled if n == 5 else wire.Receipt]


def test_equal_bytes_get_the_equal_receipt_and_other_bytes_a_conflict():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    s.update(1, 5)
    assert s.update(1, 5) == []  # its receipt follows
    assert receipts(s.update(1, 5, b"other")) == [(5, "conflict")]
    s.do(co.Folded(id_of(5)))
    assert receipts(s.update(1, 5)) == [(5, "received")]
    out = s.update(1, 5, b"other")
    assert receipts(out) == [(5, "conflict")] and of(out, co.Noted) == [co.Noted(1, "conflict", id_of(5))]
    s.do(co.Committed((id_of(5),)))
    out = s.update(1, 5, lease=Lease(7, 1))
    assert receipts(out) == [(5, "received")] and messages(out, wire.Settled) == [wire.Settled((id_of(5),))]
    assert receipts(s.update(1, 5, b"other", lease=Lease(7, 1))) == [(5, "conflict")]


def test_a_rejected_contribution_keeps_its_receipt():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    s.update(1, 5)
    assert receipts(s.do(co.Rejected(id_of(5)))) == [(5, "invalid")]
    assert receipts(s.update(1, 5, lease=Lease(7, 1))) == [(5, "invalid")]
    assert receipts(s.update(1, 5, b"other", lease=Lease(7, 1))) == [(5, "conflict")]


def test_wrong_lengths_and_works_of_others():
    s = Server()
    s.join(1)
    s.join(2)
    s.assign(1, 5, least=4, most=6)
    s.assign(1, 6, least=4, most=6)
    # Another client's work is no open work of this client, whatever lease it guesses.
    assert receipts(s.update(2, 5, lease=s.lease(5))) == [(5, "late")]
    assert s.say(2, wire.Progress(id_of(5), 0)) == [co.Send(2, wire.Cancel(id_of(5)))]
    out = s.update(1, 5, b"abc")
    assert receipts(out) == [(5, "invalid")] and of(out, co.Failed)[0].code == "length"
    assert receipts(s.update(1, 6, b"abcdefg")) == [(6, "large")]


def test_after_a_restart_committed_works_are_known():
    link = chain_link(None, id_of(5), digest(b"body"))
    s = Server(memory=True, recent={1: ((id_of(5), digest(b"body"), link),)})
    out = s.join(1, run="run", settled=None, prepared=(id_of(5),))
    assert messages(out, wire.Settled) == [wire.Settled((id_of(5),))]
    out = s.update(1, 5, lease=Lease(3, 1))
    assert receipts(out) == [(5, "received")] and messages(out, wire.Settled)
    assert receipts(s.update(1, 5, b"other", lease=Lease(3, 1))) == [(5, "conflict")]
    s.assign(1, 6)
    assert of(s.update(1, 6, after=link), co.Deliver)
    with pytest.raises(ValueError):
        s.assign(1, 5)


# 4. Chains


def chain(*bodies):
    """The links before each message of works 1, 2, …, and after the last."""
    links = [None]
    for n, body in enumerate(bodies, 1):
        links.append(chain_link(links[-1], id_of(n), digest(body)))
    return links


def test_a_successor_is_held_until_its_predecessor_is_folded():
    s = Server(memory=True)
    s.join(1)
    for n in (1, 2, 3):
        s.assign(1, n)
    links = chain(b"a", b"b", b"c")
    assert of(s.update(1, 1, b"a"), co.Deliver)
    assert s.update(1, 2, b"b", links[1]) == [] and s.update(1, 3, b"c", links[2]) == []
    out = s.do(co.Folded(id_of(1)))
    assert [a.work for a in of(out, co.Deliver)] == [id_of(2)] and of(out, co.Deliver)[0].after == links[1]
    assert [a.work for a in of(s.do(co.Folded(id_of(2))), co.Deliver)] == [id_of(3)]
    s.do(co.Folded(id_of(3)))
    assert messages(s.do(co.Committed(tuple(map(id_of, (1, 2, 3))))), wire.Settled)[0].works == tuple(
        map(id_of, (1, 2, 3))
    )


def test_a_lost_predecessor_refuses_its_successors_and_old_copies_are_ignored():
    s = Server(memory=True)
    s.join(1)
    for n in (1, 2, 3):
        s.assign(1, n)
    links = chain(b"a", b"b", b"c")
    s.update(1, 1, b"a")
    s.update(1, 2, b"b", links[1])
    old = s.lease(3)
    out = s.do(co.Rejected(id_of(1)))
    assert receipts(out) == [(1, "invalid"), (2, "predecessor")]
    assert {(w.work[0], w.lease.counter) for w in messages(out, wire.Work)} == {(2, 4), (3, 5)}
    # A copy of 3 that was under way: the client has dropped it.
    out = s.update(1, 3, b"c", links[2], lease=old)
    assert of(out, co.Noted) == [co.Noted(1, "stale", id_of(3))] and len(out) == 1
    # The client computes 2 again, from the memory before 1.
    assert of(s.update(1, 2, b"b2", None), co.Deliver)


def test_a_chain_that_stays_broken_fails():
    s = Server(memory=True)
    s.join(1)
    s.assign(1, 1)
    codes = []
    for _ in range(co.ATTEMPTS):
        codes += [a.code for a in of(s.update(1, 1, b"a", bytes(16)), co.Failed)]
    assert codes == ["predecessor"]


def test_without_client_memory_after_is_empty():
    s = Server(memory=False)
    s.join(1)
    s.assign(1, 1)
    assert receipts(s.update(1, 1, b"a", bytes(16))) == [(1, "predecessor")]
    assert of(s.update(1, 1, b"a"), co.Deliver)


def test_a_home_from_an_old_copy_is_refused():
    links = chain(b"a", b"b")
    recent = {1: tuple((id_of(n), digest(body), links[n]) for n, body in ((1, b"a"), (2, b"b")))}
    s = Server(memory=True, recent=recent)
    for channel, (settled, prepared, fits) in enumerate(
        [
            (id_of(2), (), True),
            (id_of(1), (id_of(2),), True),
            (None, (id_of(1), id_of(2), id_of(3)), True),
            (id_of(1), (), False),
            (None, (id_of(1),), False),
            (None, (), False),
            (id_of(9), (), False),
        ],
        50,
    ):
        out = s.join(1, channel=channel, run="run", settled=settled, prepared=prepared)
        assert (closes(out)[-1:] != [("behind", None)]) == fits, (settled, prepared)
        if fits and settled != id_of(2):
            assert messages(out, wire.Settled)
        s.do(co.Left(channel))
    # A new token means a new machine, and a new memory.
    s.do(co.Enrolled(1))
    assert of(s.join(1, channel=99), co.Present)


def test_works_of_a_lost_machine_are_committed_but_not_settled():
    s = Server(memory=True)
    s.join(1)
    s.assign(1, 1)
    s.fold(1, 1, b"a")
    assert closes(s.do(co.Enrolled(1))) == [("revoked", None)]
    assert of(s.join(1, channel=2), co.Present)
    out = s.do(co.Committed((id_of(1),)))
    assert of(out, co.Forget) == [co.Forget(1)] and not messages(out, wire.Settled)
    s.assign(1, 2)
    assert of(s.update(2, 2, b"b", None), co.Deliver)


# 5. Uploads


def announce(s, channel, n, body, after=None):
    return s.say(channel, wire.Sent(id_of(n), s.lease(n), after, len(body), digest(body)))


def test_an_upload_is_granted_read_and_delivered():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    body = bytes(BIG)
    assert s.do(co.Offered(1, 1, id_of(5))) == [co.Finish(1, "late")], "not announced"
    announce(s, 1, 5, body)
    assert s.it.announced(1, id_of(5)).length == BIG and s.it.announced(2, id_of(5)) is None
    assert s.do(co.Offered(2, 1, id_of(5))) == [co.Grant(2)] and s.it.in_flight == BIG
    s.do(co.UploadProgress(2, 100))
    out = s.do(co.Uploaded(2, digest(body), body))
    assert out[0] == co.Finish(2, "received") and of(out, co.Deliver) and s.it.in_flight == BIG
    assert s.do(co.Offered(3, 1, id_of(5))) == [co.Finish(3, "received")]
    s.do(co.Folded(id_of(5)))
    assert s.it.in_flight == 0
    # The announcement of the same bytes gets the same receipt, without an upload.
    assert receipts(announce(s, 1, 5, body)) == [(5, "received")]
    assert receipts(announce(s, 1, 5, bytes(BIG - 1) + b"1")) == [(5, "conflict")]


def test_the_window_limits_the_bytes_in_flight():
    s = Server(window=2 * BIG, client_window=BIG)
    body = bytes(BIG)
    for client in (1, 2, 3):
        s.join(client)
        for n in (10 * client, 10 * client + 1):
            s.assign(client, n)
            announce(s, client, n, body)
    assert s.do(co.Offered(1, 1, id_of(10))) == [co.Grant(1)]
    assert s.do(co.Offered(2, 1, id_of(11))) == [], "the window of one client"
    assert s.do(co.Offered(3, 2, id_of(20))) == [co.Grant(3)]
    assert s.do(co.Offered(4, 3, id_of(30))) == [], "the window of the server"
    assert s.it.in_flight == 2 * BIG
    # While an upload waits for its grant its lease does not end.
    for _ in range(5):
        s.do(co.UploadProgress(1, 1), after=9)
        s.do(co.UploadProgress(3, 1))
    s.do(co.Uploaded(1, digest(body), body))
    assert of(s.do(co.Folded(id_of(10))), co.Grant) == [co.Grant(2)]
    s.do(co.Uploaded(3, digest(body), body))
    assert of(s.do(co.Folded(id_of(20))), co.Grant) == [co.Grant(4)]


def test_a_stalled_upload_loses_its_grant_and_blocks_no_other():
    s = Server(window=BIG, client_window=BIG)
    body = bytes(BIG)
    for client, n in ((1, 5), (2, 6)):
        s.join(client)
        s.assign(client, n)
        announce(s, client, n, body)
        s.do(co.Offered(n, client, id_of(n)))
    s.do(co.UploadProgress(5, 10), after=9)
    assert not of(s.do(co.Tick(), after=9), co.Discard)
    out = s.do(co.Tick(), after=1)
    assert of(out, co.Finish) == [co.Finish(5, "quota")] and of(out, co.Discard) == [co.Discard(id_of(5))]
    assert of(out, co.Grant) == [co.Grant(6)] and s.it.in_flight == BIG
    # A cut connection keeps its bytes until it stalls; a new one goes on under the same grant.
    s.do(co.Aborted(6))
    assert s.do(co.Offered(7, 2, id_of(6))) == [co.Grant(7)] and s.it.in_flight == BIG


def test_bytes_that_differ_from_their_hash_are_discarded():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    body = bytes(BIG)
    codes = []
    for upload in range(co.ATTEMPTS):
        announce(s, 1, 5, body)
        s.do(co.Offered(upload, 1, id_of(5)))
        out = s.do(co.Uploaded(upload, digest(b"other"), body))
        assert of(out, co.Finish) == [co.Finish(upload, "invalid")] and of(out, co.Discard) and s.it.in_flight == 0
        codes += [a.code for a in of(out, co.Failed)]
    assert codes == ["hash"]


def test_an_upload_waits_for_its_predecessor_and_a_lost_one_is_refused_before_it_is_read():
    s = Server(memory=True)
    s.join(1)
    s.assign(1, 1)
    s.assign(1, 2)
    body = bytes(BIG)
    announce(s, 1, 1, body)
    announce(s, 1, 2, body, chain_link(None, id_of(1), digest(body)))
    assert s.do(co.Offered(2, 1, id_of(2))) == []
    assert s.do(co.Offered(1, 1, id_of(1))) == [co.Grant(1)]
    s.do(co.Uploaded(1, digest(body), body))
    out = s.do(co.Rejected(id_of(1)))
    assert receipts(out) == [(1, "invalid"), (2, "predecessor")] and of(out, co.Finish) == [co.Finish(2, "predecessor")]
    assert s.it.in_flight == 0


def test_blobs_are_readable_by_the_clients_that_need_them():
    s = Server()
    s.join(1)
    model, fixed, delta, rest = (wire.Blob(digest(bytes([n])), 5) for n in range(4))
    s.assign(1, 5, model=model, fixed=fixed, deltas=(delta, b"inside"), rest=rest)
    for blob in (INPUT, model, fixed, delta, rest):
        assert s.it.may_read(1, blob.hash)
    s.join(2)
    assert s.it.may_read(2, INPUT.hash) and not s.it.may_read(2, model.hash) and not s.it.may_read(3, INPUT.hash)
    s.do(co.Withdrawn((id_of(5),)))
    assert not s.it.may_read(1, model.hash)
    final = wire.Blob(digest(b"final"), 5)
    s.do(co.Closing(wire.Bye("done", "", None, final), 10.0))
    assert s.it.may_read(2, final.hash)


# 6. Revocation and the end


def test_a_revoked_client_is_closed_and_fails_each_round():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    s.assign(1, 6)
    s.fold(1, 6)
    out = s.do(co.Revoked(1))
    assert closes(out) == [("revoked", None)] and [(a.work, a.code) for a in of(out, co.Failed)] == [
        (id_of(5), "revoked")
    ]
    assert [a.code for a in of(s.assign(1, 7), co.Failed)] == ["revoked"]
    assert closes(s.do(co.Joined(9, 1))) == [("revoked", None)] and not s.it.may_read(1, INPUT.hash)
    assert s.do(co.Committed((id_of(6),))) == [], "its folded contribution counts, without a message to it"
    s.do(co.Enrolled(1))
    assert of(s.join(1, channel=10), co.Present)


def test_the_end_settles_then_sends_bye_and_drains():
    s = Server()
    for client in (1, 2, 3):
        s.join(client)
    s.assign(1, 5)
    s.fold(1, 5)
    s.do(co.Left(1))
    s.do(co.Committed((id_of(5),)))
    bye = wire.Bye("done", "Finished 3 rounds.", None, None)
    assert {a.channel for a in of(s.do(co.Closing(bye, 30.0)), co.Send)} == {2, 3}
    # A client that was away gets its works settled before the end.
    s.do(co.Joined(8, 1))
    out = s.say(8, wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), "run", None, (id_of(5),)))
    assert [type(a.message).__name__ for a in of(out, co.Send)] == ["Welcome", "Settled", "Bye"]
    assert not of(s.do(co.Left(2)), co.Drained) and not of(s.do(co.Left(8)), co.Drained)
    out = s.do(co.Tick(), after=30)
    assert [(a.channel, a.bye) for a in of(out, co.Close)] == [(3, bye)] and of(out, co.Drained) == [co.Drained()]


def test_a_new_run_opens_after_the_end():
    s = Server()
    s.join(1)
    for n in (5, 6):
        s.assign(1, n)
        s.update(1, n)
    s.do(co.Closing(wire.Bye("draining", "", 5.0, None), 30.0))
    assert s.do(co.Folded(id_of(5))) == [], "the contribution of the ended run is asked for again"
    assert of(s.do(co.Left(1)), co.Drained)
    s.do(co.RunOpened("next", INPUT, True, False))
    assert s.do(co.Rejected(id_of(6))) == [], "it was still in the inbox when the next run opened"
    assert messages(s.join(1), wire.Welcome)[0].run == "next"


def test_status_names_stages_and_works():
    s = Server()
    s.join(1)
    s.assign(1, 5)
    s.assign(2, 6)
    one, two = s.it.status()
    assert (one.client, one.stage, one.works) == (1, "ready", ((id_of(5), "leased", s.now + 60),))
    assert (two.client, two.stage, two.works[0][1]) == (2, "away", "waiting")


def test_timers_do_not_accumulate():
    s = Server()
    s.assign(1, 5)
    for channel in range(200):
        s.join(1, channel=channel)
        s.do(co.Tick(), after=1)
    s.do(co.Tick(), after=20)
    assert len(s.it._timers) <= 2


def test_time_never_goes_back():
    s = Server(absent_s=0.0)
    s.join(1)
    s.assign(1, 5)
    s.do(co.Tick(), after=30)
    s.do(co.Tick(), after=-1000)
    assert s.it.wake == 160.0


def test_a_work_outside_the_rounds_is_settled_when_it_is_folded():
    s = Server(memory=True)
    s.join(1)
    s.assign(1, 1)
    s.fold(1, 1, b"round")
    tail = s.it._clients[1].tail
    s.assign(1, 2, kind="evaluate", rows="held")
    assert of(s.update(1, 2, b"sums"), co.Deliver)[0].after is None
    out = s.do(co.Folded(id_of(2)))
    assert receipts(out) == [(2, "received")] and messages(out, wire.Settled) == [wire.Settled((id_of(2),))]
    assert s.it._clients[1].tail == tail and id_of(2) not in s.it._clients[1].committed
    assert receipts(s.update(1, 2, b"sums", lease=Lease(7, 9))) == [(2, "late")]
    s.do(co.Committed((id_of(1),)))
    s.assign(1, 3)
    assert of(s.update(1, 3, b"next", after=tail), co.Deliver)


# Relays

RELAY = wire.RELAYS
LEAVES = (wire.Leaf("north", 10, 0), wire.Leaf("south", None, 0))
STARTS = (wire.Start(0, 0), wire.Start(1, 0))


def relay_joins(server, **hello):
    fields = {"run": None, "settled": None, "prepared": (), **hello}
    server.do(co.Joined(9, RELAY))
    return server.say(9, wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), *fields.values()))


def test_a_relay_names_its_clients_and_gets_one_work_for_them():
    server = Server(memory=True)
    relay_joins(server)
    assert server.say(9, wire.Members(HASH, LEAVES)) == [co.Reported(RELAY, LEAVES)]
    order = co.Assigned(RELAY, work(work=id_of(1)), 4, BIG, starts=STARTS)
    assert not messages(server.do(order), wire.Gather)  # it has no numbers yet
    numbers = wire.Numbers((wire.Place("north", 0, ""), wire.Place("south", 1, "")), 1, RULES)
    out = server.do(co.Numbered(RELAY, numbers))
    assert messages(out, wire.Numbers) == [numbers]
    (gather,) = messages(out, wire.Gather)
    assert gather.starts == STARTS and gather.work.lease == server.lease(1)
    assert of(server.update(9, 1), co.Deliver)[0].client == RELAY
    assert receipts(server.do(co.Folded(id_of(1)))) == [(1, "received")]
    server.do(co.Left(9))
    settled = server.do(co.Committed((id_of(1),)))
    assert not messages(settled, wire.Settled)
    out = relay_joins(server, run="run", prepared=(id_of(1),))  # it asks again after a kill
    assert messages(out, wire.Settled) == [wire.Settled((id_of(1),))]


def test_relays_and_clients_keep_their_places():
    server = Server()
    relay_joins(server)
    assert closes(server.say(9, wire.Ready(HASH, 10, 0))) == [("relay", None)]
    server.join(2)
    assert closes(server.say(2, wire.Members(HASH, LEAVES))) == [("relay", None)]
    relay_joins(server)
    assert closes(server.say(9, wire.Members(bytes(32), LEAVES))) == [("input", None)]
    relay_joins(server)
    assert closes(server.do(co.Dismissed(RELAY, "relay", "Median() with a relay."))) == [("relay", None)]
    assert server.do(co.Numbered(RELAY, wire.Numbers((), 0, RULES))) == []  # it has left


def below(*waiting, **rules):
    """The coordinator of a relay whose root has answered."""
    server = Server()
    server.it.below_relay = True
    sent = structs.replace(RULES, **rules)
    return server, co.Placed(wire.Numbers((), 1, sent), {place.client: place for place in waiting})


def greeted(server, channel, client):
    server.do(co.Joined(channel, client))
    return server.say(channel, wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), None, None, ()))


def test_a_client_of_a_relay_without_a_number_waits_on_its_channel_and_learns_the_reason_once():
    place = wire.Place("east", RELAY + 3, "places")
    server, placed = below(place)
    out = greeted(server, 1, RELAY + 3)
    assert not closes(out) and messages(out, wire.Welcome)[0].run is None and not messages(out, wire.Numbers)
    assert messages(server.do(placed), wire.Numbers) == [wire.Numbers((place,), 0, RULES)]
    assert server.do(placed) == []  # each report of a relay has an answer
    assert server.do(server.run) == []  # the run of the others
    more = below(place, leaves=3)[1]
    assert messages(server.do(more), wire.Numbers)[0].rules.leaves == 3
    assert "at most 3 of this relay" in more.numbers.rules.refusal(place)
    assert closes(server.do(co.Renumbered(1))) == [("relay", 0.0)] and server.do(co.Renumbered(1)) == []
    assert not closes(server.join(3))


def test_a_client_without_a_number_takes_no_part():
    for message in (wire.Ready(HASH, 10, 0), wire.Members(HASH, LEAVES)):
        server, _ = below()
        greeted(server, 1, RELAY + 3)
        assert closes(server.say(1, message)) == [("relay", 60.0 if isinstance(message, wire.Ready) else None)]
        assert server.it.present == ()


def test_the_rules_of_a_root_hold_for_the_clients_of_its_relays():
    server, placed = below(max_rows=20, absent_s=5.0, lease_s=2.0)
    server.do(placed)
    assert closes(server.join(1, rows=21)) == [("rows", None)] and server.it.present == ()
    server.join(2, rows=20)
    server.assign(2, 1)
    server.do(co.Left(2))
    assert not of(server.do(co.Tick(), after=2.1), co.Failed)
    assert of(server.do(co.Tick(), after=5.1), co.Failed)[0].code == "expired"
    server.join(3)
    fault = below(wire.Place("south", 3, "rows"))[1]
    assert closes(server.do(fault)) == [("rows", None)]  # the root has begun again with fewer rows


def test_a_client_that_connects_again_renews_its_lease_while_it_still_computes():
    server = Server(absent_s=5.0, lease_s=2.0)
    server.join(1)
    server.assign(1, 1)
    server.do(co.Left(1))
    greeted(server, 1, 1)
    for _ in range(10):
        out = server.do(co.Tick(), after=1.5) + server.say(1, wire.Progress(id_of(1), 3))
        assert not of(out, co.Failed) and not closes(out)
    assert not messages(server.say(1, wire.Progress(id_of(9), 3)), wire.Cancel)  # the server may ask for it again
    assert messages(server.say(1, wire.Ready(HASH, 10, 0)), wire.Work)


def test_a_relay_that_connects_again_learns_that_its_work_is_over():
    server = Server(absent_s=5.0, lease_s=2.0)
    relay_joins(server)
    assert messages(server.say(9, wire.Progress(id_of(1), 0)), wire.Cancel) == [wire.Cancel(id_of(1))]
    idle = Coordinator(7, "hospitals", VERSIONS, Limits())
    idle.handle(co.Joined(1, RELAY), 0.0)
    idle.handle(co.Arrived(1, wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), None, None, ())), 0.0)
    assert idle.handle(co.Arrived(1, wire.Progress(id_of(1), 0)), 0.0) == []


def test_the_lease_of_a_relay_ends_after_those_of_its_clients():
    server = Server(absent_s=5.0, lease_s=2.0, work_s=20.0)
    relay_joins(server)
    server.do(co.Numbered(RELAY, wire.Numbers((), 1, RULES)))
    server.join(1)
    server.assign(1, 2)
    server.do(co.Assigned(RELAY, work(work=id_of(1)), 4, BIG, starts=STARTS))
    failed = []
    for _ in range(40):
        out = server.do(co.Tick(), after=1.0)
        out += [action for n in (1, 2) for action in server.say(9 if n == 1 else 1, wire.Progress(id_of(n), 0))]
        failed += [(action.work[0], round(server.now)) for action in of(out, co.Failed)]
    assert failed == [(2, 120), (1, 134)]  # 20 s, and 2 · (5 + 2) s more


def test_clients_return_to_the_memory_before_a_partial_that_is_not_used():
    server = Server(memory=True)
    server.join(1)
    server.assign(1, 1)
    server.fold(1, 1)
    with pytest.raises(ValueError, match="after its contribution was folded"):
        server.do(co.Withdrawn((id_of(1),)))
    assert messages(server.do(co.Withdrawn((id_of(1),), undone=True)), wire.Cancel) == [wire.Cancel(id_of(1))]
    server.assign(1, 2)
    assert of(server.update(1, 2, after=None), co.Deliver)  # from the memory before
