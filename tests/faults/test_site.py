"""The memory of a site and its prepared messages survive a kill between any two writes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from msgspec import structs
from net_messages import work
from scaffold import Scaffold as ForeignScaffold
from sites import write_tables
from test_sites import terms

from atoll.base.errors import UsageError
from atoll.compute.batches import HOST
from atoll.net import wire
from atoll.net.client import _Channel
from atoll.net.coordinator import NO_DIGEST
from atoll.net.join import own_rows
from atoll.net.policy import Policy
from atoll.net.site import MemoryChain, Prepared, Site, _Kept
from atoll.net.tensors import tensor_bytes
from atoll.net.terms import RefusedError, layout_hash, plan_text
from atoll.net.wire import SumTerms, chain_link, digest, work_id
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip, Noise
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast
from atoll.plan.state import pack_broadcast
from atoll.recipes import fedavg

FIRST = {"codec/error": torch.zeros(2)}


def one(number, after):
    rows = {"codec/error": torch.full((1, 2), float(number))}
    return Prepared(bytes([number]) * 16, after, b"body %d" % number, rows)


def begun(home):
    chain = MemoryChain.open(home)
    chain.begin("run")
    return chain


def values(memory):
    return memory["codec/error"].tolist()


def test_a_prepared_message_and_its_memory_are_on_disk(tmp_path):
    chain = begun(tmp_path)
    memory, link = chain.next_memory(FIRST)
    assert values(memory) == [[0.0, 0.0]] and link is None
    chain.prepare(one(1, link))
    again = MemoryChain.open(tmp_path)
    assert [(p.work, p.after, p.body) for p in again.prepared] == [(bytes([1]) * 16, None, b"body 1")]
    assert again.next_memory(FIRST)[1] == chain.prepared[0].link and again.run == "run"


def test_settled_work_replaces_the_memory_and_deletes_its_message(tmp_path):
    chain = begun(tmp_path)
    chain.prepare(one(1, None))
    chain.prepare(one(2, chain.prepared[0].link))
    chain.settle((bytes([1]) * 16,))
    again = MemoryChain.open(tmp_path)
    assert again.settled == bytes([1]) * 16 and [p.work for p in again.prepared] == [bytes([2]) * 16]
    assert values(again.memory) == [[1.0, 1.0]] and again.number == 1
    again.settle((bytes([2]) * 16,))
    assert MemoryChain.open(tmp_path).prepared == [] and MemoryChain.open(tmp_path).number == 2


def test_a_kill_between_the_memory_and_the_deletion_loses_nothing(tmp_path):
    chain = begun(tmp_path)
    chain.prepare(one(1, None))
    (kept,) = (tmp_path / "prepared").iterdir()
    data = kept.read_bytes()
    chain.settle((bytes([1]) * 16,))
    kept.write_bytes(data)  # as if the process had ended before the deletion
    again = MemoryChain.open(tmp_path)
    assert again.prepared == [] and again.settled == bytes([1]) * 16 and not kept.exists()


@pytest.mark.parametrize(("drop", "work"), [("drop", 2), ("drop_continued", 3)])
def test_a_lost_work_takes_the_later_ones_with_it(drop, work, tmp_path):
    """A refused message ends with the lost one that it continues. Else it would be made from the lost one again."""
    chain = begun(tmp_path)
    for number in (1, 2, 3):
        chain.prepare(one(number, chain.prepared[-1].link if chain.prepared else None))
    getattr(chain, drop)(bytes([work]) * 16)
    getattr(chain, drop)(bytes([9]) * 16)
    assert [p.work[0] for p in MemoryChain.open(tmp_path).prepared] == [1]
    assert [p.work[0] for p in chain.prepared] == [1]


def test_another_run_begins_without_memory(tmp_path):
    chain = begun(tmp_path)
    chain.prepare(one(1, None))
    chain.settle((bytes([1]) * 16,))
    chain.begin("other")
    assert chain.next_memory(FIRST)[1] is None and MemoryChain.open(tmp_path).settled is None


def test_another_attempt_continues_the_contribution_and_other_rounds_end(tmp_path):
    chain = begun(tmp_path)
    chain.prepare(one(1, None)._replace(masked=True))
    chain.continue_attempt(bytes([2]) * 16, [bytes([1]) * 16])
    again = MemoryChain.open(tmp_path)
    assert [(p.work[0], p.body, p.masked) for p in again.prepared] == [(2, b"body 1", True)]
    assert again.prepared[0].link == chain_link(None, bytes([2]) * 16, NO_DIGEST)
    again.continue_attempt(bytes([3]) * 16, [])
    assert again.prepared == [] and values(again.next_memory(FIRST)[0]) == [[0.0, 0.0]]
    assert MemoryChain.open(tmp_path).prepared == []


def test_a_site_forgets_no_sum_of_any_run(tmp_path):
    site = Site(tmp_path, None, {}, torch.device("cpu"))
    for run, taken in (("a", (5, 0)), ("b", (0, 1)), ("a", (6, 1))):
        site.chain.begin(run)
        site._take_sum(work(), taken)
    assert site._last_sum() == (6, 1)
    site.chain.begin("b")
    assert Site(tmp_path, None, {}, torch.device("cpu"))._sums() == {"a": (6, 1), "b": (0, 1)}
    assert site._last_sum() == (0, 1)


def test_a_site_refuses_to_send_an_update_in_the_clear_if_the_sum_is_secure(tmp_path):
    site = Site(tmp_path, None, {}, torch.device("cpu"))
    secure = replace(fedavg(0.1), codec=Clip(1.0), aggregator=Mean(weights="equal", secure=True))
    terms = wire.SumTerms(6, 1, 10)
    for plan, changes in ((secure, {}), (fedavg(0.1), {"sum": terms}), (secure, {"sum": terms, "kind": "evaluate"})):
        with pytest.raises(RefusedError) as refused:
            site._check_sum(work(**changes), plan)
        assert refused.value.code == "session"
    site._check_sum(work(sum=terms), secure)


def test_a_damaged_memory_is_refused(tmp_path):
    from atoll.base.errors import RunError

    chain = begun(tmp_path)
    chain.prepare(one(1, None))
    chain.settle((bytes([1]) * 16,))
    data = bytearray((tmp_path / "memory").read_bytes())
    data[-1] ^= 1
    (tmp_path / "memory").write_bytes(data)
    with pytest.raises(RunError, match="damaged"):
        MemoryChain.open(tmp_path)


@pytest.fixture
def rows(tmp_path):
    """A site for the rows of a file, in the home of `tmp_path`."""
    write_tables(tmp_path)
    (tmp_path / "home").mkdir()
    return lambda data: Site(tmp_path / "home", own_rows(str(data)), {}, HOST)


def asked(it, plan, model, **changes):
    """A work as the server of a run names it, for the client 0 of the run "run"."""
    facts = {"kind": "round", "version": 0, "repeat": 0, "attempt": 0, "plan": plan_text(plan)} | changes
    names = (facts[n] for n in ("kind", "version", "repeat", "plan"))
    kind, version, repeat, text = names
    name = work_id("run", kind, 0, version, repeat, text, digest(model), facts["attempt"])
    hashes = {"layout": layout_hash(it._task.layout), "input": digest(it.terms.encode()), "model": model}
    return work(**{"work": name, "round": 0, **hashes, **facts})


def entered(tmp_path, rows, **rules):
    """A site in a run of six clients, and the bytes of its model."""
    it = rows(tmp_path / "north.csv")
    it.policy = Policy(**rules)
    it.enter(0, "run", terms(tmp_path, clients=6, held_out=0.2), None)
    return it, tensor_bytes(pack_broadcast(Broadcast(0, it._task.start, {})))


def test_a_contribution_to_a_secure_sum_is_never_sent_in_the_clear(tmp_path, rows):
    """A server that sends a prepared work again without the terms of its sum would receive the plain update."""
    plan = replace(fedavg(0.1), codec=Clip(1.0), aggregator=Mean(weights="equal", secure=True))
    it, model = entered(tmp_path, rows, secure=True)
    masked = asked(it, plan, model, sum=SumTerms(6, 1, 40))
    assert it.compute(masked, model, None).masked
    for clear in (structs.replace(masked, sum=None), structs.replace(masked, sum=None, attempt=1)):
        with pytest.raises(RefusedError) as found:
            it.compute(clear, model, None)
        assert found.value.code in ("session", "changed")
    with pytest.raises(RefusedError, match="name"):
        it.compute(structs.replace(masked, attempt=1), model, None)
    it.policy = Policy(models=(), max_rounds=0)  # the person has restarted the site with another policy
    with pytest.raises(RefusedError) as found:
        it.compute(masked, model, None)
    assert found.value.code == "policy-rounds"


def test_a_site_draws_its_noise_from_its_own_secret_and_only_once_for_a_work(tmp_path, rows):
    """A site that starts again sends the same message: another one with other noise would be another release."""
    fair, codec = Mean(weights="equal", over="expected"), Clip(1.0) >> Noise(1.0, by="client")
    plan = replace(fedavg(0.1), codec=codec, aggregator=fair)
    it, model = entered(tmp_path, rows)
    first = it.compute(asked(it, plan, model), model, None)
    again = rows(tmp_path / "north.csv")
    again.enter(0, "run", terms(tmp_path, clients=6, held_out=0.2), None)
    assert again.compute(asked(again, plan, model), model, None).body == first.body
    other = again.compute(asked(again, plan, model, repeat=1), model, None)
    again.chain.settle((first.work,))
    again.chain.drop(other.work)
    assert other.body != first.body and again.compute(asked(again, plan, model, repeat=1), model, None) != other
    plain = it.compute(asked(it, fedavg(0.1), model), model, None)
    assert plain.memory == {} and len(list((tmp_path / "home" / "prepared").iterdir())) == 1


def test_a_server_that_repeats_the_number_of_a_round_gets_no_further_contribution(tmp_path, rows):
    it, model = entered(tmp_path, rows, max_rounds=2)
    for version in (0, 1, 0):
        one = asked(it, fedavg(0.1), model, version=version)
        it.record(one, it.compute(one, model, None).body)
    again = rows(tmp_path / "north.csv")
    again.policy = it.policy
    again.enter(0, "run", terms(tmp_path, clients=6, held_out=0.2), None)
    for each in (it, again):
        for changes in ({"version": 2}, {"repeat": 1}):
            with pytest.raises(RefusedError) as found:
                each.compute(asked(it, fedavg(0.1), model, **changes), model, None)
            assert found.value.code == "policy-rounds"
    with open(tmp_path / "home" / "ledger.jsonl", "a") as file:
        file.write('{"time": "2026')  # a kill has cut the line
    assert len(rows(tmp_path / "north.csv")._made["run"]) == 2


@pytest.mark.parametrize("error", [IndexError, ValueError, MemoryError])
def test_a_codec_that_cannot_decode_a_delta_lets_the_site_read_the_whole_version(error):
    def fail(work):
        raise error("own code")

    site = SimpleNamespace(_version=_Kept(0, b"", b""), _plan=fail)
    blob = wire.Blob(bytes(32), 8)
    for deltas, fits in (((b"1234", b"5678"), True), ((b"1234", b"56789"), False), ((), False)):
        asked = structs.replace(work(), version=2, model=blob, deltas=deltas)
        assert Site.has_base(site, asked) is fits  # deltas are never longer than the version
    assert Site.next_version(site, work(), [b"1234"], b"") is None


def test_a_work_that_the_server_sends_again_after_its_cancel_is_answered():
    asked = work()
    client = SimpleNamespace(_dropped={asked.work}, compute=None)
    channel = SimpleNamespace(client=client, _leases={}, _later=lambda call: None, _work=lambda message: None)
    _Channel._handle(channel, asked)
    assert not client._dropped


def test_a_part_of_the_user_with_the_name_of_a_part_of_atoll_is_refused():
    """A site would read the name as atoll's part, also if both have the same arguments."""
    with pytest.raises(UsageError, match="Scaffold is atoll's part there"):
        plan_text(Plan(ForeignScaffold(0.1, steps=2), Mean("equal")))
