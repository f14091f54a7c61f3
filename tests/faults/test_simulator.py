"""Seeded schedules of the simulator: crashes, cuts, lost and repeated messages, hostile clients, revocations.

`python tests/faults/simulator.py 10000` runs more of them and prints their number a minute and core.
"""

import re
from pathlib import Path

import pytest
import simulator
from quick_cases import one_in
from simulator import Hostile, Model, World, simulate

from atoll.net import coordinator as co
from atoll.net import wire

# Seeds that once broke an invariant.
FOUND = (28, 29, 46, 48, 73, 91, 910, 1216, 1953, 2362, 3080, 4539)


@pytest.mark.parametrize("first", one_in(4, range(0, 240, 60)))
def test_schedules_keep_every_invariant(first):
    for seed in range(first, first + 60):
        simulate(seed)


@pytest.mark.parametrize("seed", FOUND)
def test_schedules_that_once_failed(seed):
    simulate(seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("first", range(10_000, 20_000, 1000))
def test_ten_thousand_schedules(first):
    for seed in range(first, first + 1000):
        simulate(seed)


def test_schedules_contain_every_fault():
    kinds = {(w.closed, w.memory, w.depth) for w in map(World, range(300))}
    assert kinds == {(c, m, d) for c in (True, False) for m in (True, False) for d in (1, 3)}
    worlds = [simulate(seed) for seed in range(60)]
    assert any(len(w.model.epochs) > 3 for w in worlds), "server crashes"
    assert any(w.hostile for w in worlds) and any(w.model.revoked for w in worlds)
    assert {code for w in worlds for _, code in w.model.failed} >= {"revoked", "expired", "length", "failed"}
    assert any(client.large for w in worlds for client in w.clients)


def broken(seeds, monkeypatch, change):
    """The first invariant that breaks after a change of the coordinator or of a client."""
    change(monkeypatch)
    for seed in seeds:
        try:
            simulate(seed)
        except AssertionError as error:
            return str(error)
    return None


def acknowledge_early(monkeypatch):
    """`Settled` before the transaction."""
    old = co.Coordinator._folded

    def folded(self, event):
        old(self, event)
        c = self._owner.get(event.work)
        if c is not None:
            self._send(c, wire.Settled((event.work,)))

    monkeypatch.setattr(co.Coordinator, "_folded", folded)


def accept_any_predecessor(monkeypatch):
    monkeypatch.setattr(co.Coordinator, "_position", lambda *_: "next")


def forget_the_first_bytes(monkeypatch):
    """Every contribution counts as the first one."""

    def first(self, c, message, hash):
        return message.work in c.works and c.works[message.work].state != "checking"

    monkeypatch.setattr(co.Coordinator, "_is_first", first)


def send_before_the_sync(monkeypatch):
    """A client sends a message that its disk forgets in a crash."""

    def synced(self, made):
        self.busy = None
        self.submit(made)
        self.later(3.0, self._store, made)
        self.compute()

    def store(self, made):
        if all(p.work != made.work for p in self.disk.prepared):
            self.disk.prepared += (made,)

    monkeypatch.setattr(simulator.Client, "_store", store, raising=False)
    monkeypatch.setattr(simulator.Client, "synced", synced)


def take_any_owner(monkeypatch):
    """A client can contribute to the work of another one."""
    old = co.Coordinator._update

    def update(self, c, message):
        return old(self, self._owner.get(message.work, c), message)

    monkeypatch.setattr(co.Coordinator, "_update", update)


def never_expire(monkeypatch):
    monkeypatch.setattr(co.Coordinator, "_lease_timer", lambda *_: None)
    monkeypatch.setattr(co.Coordinator, "_absent", lambda *_: None)


def keep_the_window(monkeypatch):
    """The bytes of uploads are never freed."""
    monkeypatch.setattr(co.Coordinator, "_release", lambda self, open: None)


def same_epoch(monkeypatch):
    old = Model.epoch
    monkeypatch.setattr(Model, "epoch", lambda self, epoch: old(self, min(epoch, 2)))


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (acknowledge_early, "I4|I2"),
        (accept_any_predecessor, "I2|I4|I5|behind|ValueError|KeyError"),
        (forget_the_first_bytes, "I2|I6|KeyError|ValueError"),
        (send_before_the_sync, "I2|I4|behind|out of order|I5|I6"),
        (take_any_owner, "I6|KeyError|I2"),
        (never_expire, "I5"),
        (keep_the_window, "I5"),
        (same_epoch, "I3"),
    ],
)
def test_a_broken_rule_is_found(monkeypatch, change, invariant):
    fault = broken(range(200), monkeypatch, change)
    assert fault is not None and re.search(invariant, fault), fault


def test_the_model_is_short():
    """The invariants can be read whole."""
    text = Path(simulator.__file__).read_text(encoding="utf-8")
    model = text[text.index("# 1. The model") : text.index("# 2. A client")]
    assert len(model.splitlines()) <= 150


def test_a_seed_gives_one_schedule():
    a, b = simulate(7), simulate(7)
    assert (a.number, a.now, a.db) == (b.number, b.now, b.db)
    assert isinstance(World(5).clients[0], (simulator.Client, Hostile))
