"""A simulation of a federation on a virtual clock: the coordinator, clients with disks, a network with faults, crashes.

    report = simulate(seed)         one schedule; raises AssertionError with the seed if an invariant breaks
    python tests/faults/simulator.py [SEEDS] [FIRST]

The server is the coordinator of the package, a database that keeps only committed rounds, and a sum that is a hash. A
client follows the rules of docs/wire.md: it computes a message and a next memory from the work and its memory, writes
both to its disk, syncs, and only then sends. A crash forgets everything that was not synced. The network delays,
duplicates, reorders and loses messages, and cuts channels. A hostile client sends other bytes, wrong lengths, broken
chains, frames that are no messages, and works of others. `Model` checks the invariants I1 to I7 after every event.
"""

import heapq
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256

from atoll.net import coordinator as co
from atoll.net import wire
from atoll.net.wire import WorkId

Start = tuple[int, int, int]  # client, version, repeat
Fold = tuple[int, WorkId, bytes | None, bytes]  # client, work, after, digest
RUN, PLAN = "run", "Plan()"
VERSIONS = wire.Versions("3.11.7", "0.1.0", "2.13.0", "2.4.6")
INPUT = wire.Blob(bytes(32), 1)
START = bytes(32)
SMALL, LARGE = 64, wire.MAX_INLINE + 8


def h(*parts: bytes) -> bytes:
    return sha256(b"".join(parts)).digest()


def message_of(work: WorkId, memory: bytes, large: bool) -> bytes:
    """The message of a work: a pure function of the work and the memory."""
    head = h(b"message", work, memory) * 2
    return head + bytes(LARGE - len(head)) if large else head


def memory_of(work: WorkId, memory: bytes) -> bytes:
    return h(b"memory", work, memory)


# 1. The model: the facts that must hold, from observations only


@dataclass
class Commit:
    """One transaction: the accepted works in order, and the works that are in flight after it."""

    model: bytes
    accepted: list["Fold"]
    flights: list["Start"]


@dataclass
class Model:
    """The invariants. The world reports events; a broken invariant raises."""

    world: "World"
    settled: set[WorkId] = field(default_factory=set)
    epochs: list[int] = field(default_factory=list)
    rounds: Counter = field(default_factory=Counter)
    revoked: set[int] = field(default_factory=set)
    receipts: dict[tuple[int, WorkId, bytes], str] = field(default_factory=dict)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def committed(self) -> None:
        """I1, I2: after each transaction."""
        commits = self.world.db
        last = commits[-1]
        before = commits[-2].model if len(commits) > 1 else START
        assert last.model == next_model(before, last.accepted), "I1: the model is no function of the accepted works"
        works = [work for commit in commits for _, work, *_ in commit.accepted]
        assert len(works) == len(set(works)), "I2: a work was counted twice"

    def accepted_of(self, client: int) -> list[WorkId]:
        return [work for commit in self.world.db for owner, work, *_ in commit.accepted if owner == client]

    def epoch(self, epoch: int) -> None:
        assert not self.epochs or epoch > self.epochs[-1], "I3: an epoch does not grow"
        self.epochs.append(epoch)

    def sent(self, client: int, message: wire.Down) -> None:
        """I3, I4, I7: each message of the server, before the network can lose it."""
        assert client not in self.revoked or isinstance(message, wire.Bye), "I7: a message to a revoked client"
        if isinstance(message, wire.Settled):
            known = set(self.accepted_of(client))
            assert set(message.works) <= known, "I4: settled before it was committed"
            self.settled.update(message.works)
        elif isinstance(message, wire.Work):
            assert message.version <= len(self.world.db), "I4: work of a version that was not committed"
            assert message.lease.epoch == self.epochs[-1], "I3: a lease of another epoch"

    def delivered(self, client: int, work: WorkId, body: bytes) -> None:
        """I7, I6, I2: each contribution that the stepping thread receives."""
        assert client not in self.revoked, "I7: a contribution of a revoked client"
        assert self.world.owner[work] == client, "I6: a contribution to another client's work"
        assert not any(work == other for commit in self.world.db for _, other, *_ in commit.accepted), (
            "I2: counted again"
        )

    def failure(self, client: int, code: str) -> None:
        possible = {"absent", "expired"} if self.world.absent_s is not None else set()
        honest = client not in self.world.hostile | self.revoked
        assert not honest or code in possible, f"I6: client {client} failed by {code}"
        self.failed.append((client, code))

    def client_memory(self, client: "Client") -> None:
        """I2, I4: the settled memory of a client is the fold of exactly its first accepted works."""
        memory, works = START, self.accepted_of(client.id)
        position = 0
        if client.disk.settled is not None:
            assert client.disk.settled in works, "I4: a client settled a work that is not committed"
            position = works.index(client.disk.settled) + 1
        if self.world.memory:
            for work in works[:position]:
                memory = memory_of(work, memory)
            assert client.disk.memory == memory, "I2: the memory of a client does not follow from its accepted works"

    def seen(self, client: "Client", epoch: int, version: int) -> None:
        assert epoch >= client.disk.epoch, "I3: a client worked for a lower epoch"

    def event(self) -> None:
        """I4, I6: after every event."""
        assert self.settled <= self.world.committed_works, "I4: an acknowledged work was lost"
        coordinator = self.world.coordinator
        if coordinator is not None:
            limits = coordinator.limits
            assert 0 <= coordinator.in_flight <= max(limits.window, LARGE), "I6: more bytes in flight than the window"
            assert len(coordinator._timers) < 200 * (1 + len(self.world.clients)), "I6: timers accumulate"

    def end(self) -> None:
        """I5 and I1: the run has ended, and without hostile clients the model is the undisturbed one."""
        world = self.world
        if not {client.id for client in world.clients} - world.hostile - self.revoked:
            return  # I5 needs an honest client: a closed run waits for a hostile one
        assert len(world.db) == world.rounds, f"I5: {len(world.db)} of {world.rounds} rounds at {world.now:.0f} s"
        for client in world.clients:
            if client.id in world.hostile | self.revoked:
                continue
            left = {p.work for p in client.disk.prepared} & world.committed_works
            assert client.state == "done" and not left, f"I5: client {client.id} is {client.state}"
            accepted = self.accepted_of(client.id)
            assert not world.memory or not accepted or client.disk.settled == accepted[-1], "I4: a work is not settled"
            self.client_memory(client)
        if world.closed and not world.hostile | self.revoked and world.depth == 1:
            assert world.db[-1].model == undisturbed(world), "I1: the model differs from the undisturbed run"


def next_model(model: bytes, accepted: list[Fold]) -> bytes:
    """The model after a round; it depends on the set of contributions, not on their order."""
    return h(b"model", model, *sorted(work + hash for _, work, _, hash in accepted))


def undisturbed(world: "World") -> bytes:
    model, memories = START, [START] * len(world.clients)
    for round in range(world.rounds):
        accepted = []
        for client in world.clients:
            work = wire.work_id(RUN, "round", client.id, round, 0, PLAN, wire.digest(model))
            body = message_of(work, memories[client.id] if world.memory else START, client.large)
            accepted.append((client.id, work, None, wire.digest(body)))
            memories[client.id] = memory_of(work, memories[client.id])
        model = next_model(model, accepted)
    return model


# 2. A client


@dataclass
class Prepared:
    """A message on the disk of a client, with the memory after it and the link of that memory."""

    work: WorkId
    after: bytes | None
    body: bytes
    memory: bytes

    @property
    def link(self) -> bytes:
        return wire.chain_link(self.after, self.work, wire.digest(self.body))


@dataclass
class Disk:
    """The synced files of a client."""

    memory: bytes = START
    settled: WorkId | None = None
    link: bytes | None = None
    epoch: int = 0
    prepared: tuple[Prepared, ...] = ()


class Client:
    """A client: its disk survives a crash, everything else does not."""

    def __init__(self, world: "World", number: int, large: bool) -> None:
        self.world, self.id, self.large = world, number, large
        self.disk = Disk()
        self.state = "down"
        self.life = 0
        self.channel = -1
        self.queue: list[wire.Work] = []
        self.busy: WorkId | None = None
        self.upload: int | None = None
        self.leases: dict[WorkId, wire.Lease] = {}

    def later(self, delay: float, call, *args) -> None:
        """Call a method unless the client crashes before."""
        life = self.life

        def run() -> None:
            if life == self.life:
                call(*args)

        self.world.at(delay, run)

    def start(self) -> None:
        self.life += 1
        self.state, self.channel, self.queue, self.busy, self.upload = "dialling", -1, [], None, None
        self.leases = {}
        self.later(self.world.rng.random(), self.dial)

    def crash(self) -> None:
        if self.state == "done":
            return
        self.life += 1
        if self.channel >= 0:
            self.world.cut(self.channel)
        self.state, self.channel = "down", -1
        if self.id not in self.world.model.revoked:
            self.world.at(self.world.rng.expovariate(0.2), self.start)

    def dial(self) -> None:
        if self.state != "dialling":
            return
        self.channel = self.world.connect(self)
        if self.channel < 0:
            return self.later(1.0, self.dial) if self.state == "dialling" else None
        self.state, self.queue, self.known = "open", [], set()
        self.tried: set[WorkId] = set()
        run = RUN if self.disk.settled is not None or self.disk.prepared else None
        prepared = tuple(p.work for p in self.disk.prepared)
        self.send(wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), run, self.disk.settled, prepared))

    def lost(self) -> None:
        """The channel has ended."""
        self.channel, self.upload = -1, None
        if self.state == "open":
            self.state = "dialling"
            self.later(self.world.rng.random() * 2, self.dial)

    def send(self, message: wire.Up) -> None:
        if self.channel >= 0:
            self.world.to_server(self.channel, message)

    def receive(self, message: wire.Down) -> None:
        match message:
            case wire.Welcome():
                self.world.model.seen(self, message.epoch, 0)
                self.disk.epoch = message.epoch
                if message.run is not None:
                    self.send(wire.Ready(INPUT.hash, 10, 0))
            case wire.Work():
                self.world.model.seen(self, message.lease.epoch, message.version)
                self.leases[message.work] = message.lease
                found = next((p for p in self.disk.prepared if p.work == message.work), None)
                if found is not None:
                    self.submit(found)
                elif self.busy != message.work and all(w.work != message.work for w in self.queue):
                    self.queue.append(message)
                    self.compute()
            case wire.Receipt():
                if message.code == "received":
                    self.known.add(message.work)
                elif message.code in ("late", "invalid", "large", "predecessor"):
                    if self.forget(message.work) and message.code == "predecessor":
                        for p in self.disk.prepared:
                            if p.work not in self.known:
                                self.submit(p)
                elif message.code == "quota":
                    self.resend(message.work)
            case wire.Cancel():
                self.queue = [w for w in self.queue if w.work != message.work]
                self.forget(message.work)
                if self.busy == message.work:
                    self.busy = None
            case wire.Settled():
                self.settle(message.works)
            case wire.Bye():
                channel, self.channel = self.channel, -1
                self.world.cut(channel)
                if message.code == "done":
                    self.state = "done"
                elif message.retry_s is not None:
                    self.state = "dialling"
                    self.later(message.retry_s, self.dial)
                else:
                    assert self.id in self.world.model.revoked | self.world.hostile, f"{self.id}: {message}"
                    self.state = "gone"

    def compute(self) -> None:
        if self.busy is not None or not self.queue:
            return
        work = self.queue.pop(0)
        self.busy = work.work
        steps = self.world.rng.randint(1, 3)
        for step in range(steps):
            self.later(0.3 * step, self.send, wire.Progress(work.work, step))
        # A client is sometimes stopped for longer than its lease.
        pause = self.world.rng.uniform(70, 200) if self.world.rng.random() < 0.02 else 0.0
        self.later(0.3 * steps + pause, self.finish, work)

    def finish(self, work: wire.Work) -> None:
        if self.busy != work.work:
            return self.compute()
        # The message is computed from the memory of this moment: the chain can have changed since the start.
        last = self.disk.prepared[-1] if self.disk.prepared else None
        memory = last.memory if last else self.disk.memory
        after = last.link if last else self.disk.link
        body = message_of(work.work, memory if self.world.memory else START, self.large)
        made = Prepared(work.work, after if self.world.memory else None, body, memory_of(work.work, memory))
        # Write and sync: a crash before this moment forgets the message.
        return self.later(self.world.rng.random() * 0.05, self.synced, made)

    def synced(self, made: Prepared) -> None:
        if self.busy != made.work:
            return self.compute()
        now = self.disk.prepared[-1].link if self.disk.prepared else self.disk.link
        if now != made.after and self.world.memory:
            return self.later(0.0, self.again, made.work)
        self.disk.prepared += (made,)
        self.busy = None
        self.submit(made)
        return self.compute()

    def again(self, work: WorkId) -> None:
        """The chain changed while the message was written: compute it once more."""
        self.busy = None
        order = self.world.orders.get(work)
        if order is not None:
            self.queue.insert(0, order)
        self.compute()

    def lease(self, work: WorkId) -> wire.Lease:
        return self.leases.get(work, wire.Lease(0, 0))

    def submit(self, p: Prepared) -> None:
        for earlier in self.disk.prepared:
            if earlier is p or not self.world.memory:
                break
            if earlier.work not in self.known | self.tried:
                self.submit(earlier)
        self.tried.add(p.work)
        if self.large:
            self.send(wire.Sent(p.work, self.lease(p.work), p.after, len(p.body), wire.digest(p.body)))
            self.later(0.2, self.put, p)
        else:
            self.send(wire.Update(p.work, self.lease(p.work), p.after, p.body))

    def put(self, p: Prepared) -> None:
        if self.channel >= 0 and any(q is p for q in self.disk.prepared):
            self.upload = self.world.put(self, p)

    def resend(self, work: WorkId) -> None:
        for p in self.disk.prepared:
            if p.work == work:
                self.later(1.0, self.submit, p)

    def forget(self, work: WorkId) -> bool:
        """Drop a message and the later ones of its chain."""
        for i, p in enumerate(self.disk.prepared):
            if p.work == work:
                end = len(self.disk.prepared) if self.world.memory else i + 1
                self.disk.prepared = self.disk.prepared[:i] + self.disk.prepared[end:]
                return True
        return False

    def settle(self, works: tuple[WorkId, ...]) -> None:
        for work in works:
            for i, p in enumerate(self.disk.prepared):
                if p.work == work:
                    assert not self.world.memory or i == 0, "I2: a client settles out of order"
                    self.disk.memory, self.disk.settled, self.disk.link = p.memory, p.work, p.link
                    self.disk.prepared = self.disk.prepared[:i] + self.disk.prepared[i + 1 :]
                    self.world.model.client_memory(self)
                    break


class Hostile(Client):
    """A client that breaks every rule it can."""

    def guess(self, work: WorkId) -> wire.Lease:
        """The true lease of a work, also of another client: leases are no secrets."""
        coordinator = self.world.coordinator
        owner = coordinator._owner.get(work) if coordinator else None
        return wire.Lease(coordinator.epoch, owner.works[work].lease) if owner else self.lease(work)

    def submit(self, p: Prepared) -> None:
        rng = self.world.rng
        others, body = list(self.world.owner) or [p.work], p.body[:SMALL]
        for _ in range(rng.randint(1, 3)):
            match rng.randrange(9):
                case 0:
                    self.send(wire.Update(p.work, self.lease(p.work), p.after, body[::-1]))
                case 1:
                    other = rng.choice(list(self.world.open) or [p.work])
                    self.send(wire.Update(other, self.guess(other), None, body))
                case 2:
                    self.send(wire.Update(p.work, self.lease(p.work), rng.choice(others), body))
                case 3:
                    self.send(wire.Update(p.work, self.lease(p.work), p.after, b""))
                case 4:
                    self.send(wire.Sent(p.work, self.lease(p.work), p.after, LARGE, bytes(32)))
                    self.put(Prepared(p.work, p.after, bytes(LARGE), b""))
                case 5:
                    self.send(wire.Refusal(rng.choice(others), "failed", "no"))
                case 6:
                    self.send(wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), RUN, rng.choice(others), ()))
                case 7:
                    self.world.garble(self.channel)
                case 8:
                    self.send(wire.Update(p.work, self.lease(p.work), p.after, b"bad" + body[3:]))
        if rng.random() < 0.5:
            super().submit(p)

    def settle(self, works: tuple[WorkId, ...]) -> None:
        self.disk.prepared = tuple(p for p in self.disk.prepared if p.work not in works)
        if works:
            self.disk.settled = works[-1]


# 3. The world: clock, network, server


class World:
    """One schedule. All choices come from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now, self.events, self.number = 0.0, [], 0
        self.closed, self.memory = rng.random() < 0.7, rng.random() < 0.7
        self.depth = rng.choice([1, 1, 3])
        self.rounds = rng.randint(2, 5)
        n = rng.randint(1, 5)
        self.hostile = {rng.randrange(n)} if n > 1 and rng.random() < 0.3 else set()
        self.clients = [(Hostile if i in self.hostile else Client)(self, i, rng.random() < 0.3) for i in range(n)]
        self.model = Model(self)
        self.db: list[Commit] = []
        self.committed_works: set[WorkId] = set()
        self.owner: dict[WorkId, int] = {}
        self.start_of: dict[WorkId, Start] = {}
        self.absent_s = (30.0 if self.hostile else None) if self.closed else rng.choice([0.0, 5.0])
        self.orders: dict[WorkId, wire.Work] = {}
        self.unix, self.life = 0, 0
        self.coordinator: co.Coordinator | None = None
        self.channels: dict[int, Client] = {}
        self.uploads: dict[int, tuple[Client, Prepared]] = {}
        self.next = 0
        self.quiet = rng.uniform(20, 120)  # the time after which no fault happens
        self.trouble = rng.choice([0.0, 0.02, 0.1])

    def at(self, delay: float, call) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + delay, self.number, call))

    def faulty(self, chance: float) -> bool:
        return self.now < self.quiet and self.rng.random() < chance

    def run(self) -> None:
        self.start_server()
        for client in self.clients:
            client.start()
        for _ in range(self.rng.randint(0, 4)):
            self.at(self.rng.uniform(0, self.quiet), self.crash_server)
        for _ in range(self.rng.randint(0, 6)):
            self.at(self.rng.uniform(0, self.quiet), self.rng.choice(self.clients).crash)
        if len(self.clients) > 1 and self.rng.random() < 0.2:
            self.at(self.rng.uniform(0, self.quiet), lambda: self.revoke(self.rng.choice(self.clients)))
        deadline = self.quiet + 4000
        while self.events and self.events[0][0] < deadline:
            self.now, _, call = heapq.heappop(self.events)
            call()
            self.model.event()
        self.model.end()

    # The network

    def connect(self, client: Client) -> int:
        if client.id in self.model.revoked:
            client.state = "gone"  # the server refuses the certificate before it asks the coordinator
            return -1
        if self.coordinator is None or self.faulty(self.trouble):
            return -1
        self.next += 1
        channel = self.next
        self.channels[channel] = client
        self.handle(co.Joined(channel, client.id))
        if self.faulty(self.trouble):
            self.at(self.rng.expovariate(0.2), lambda: self.cut(channel))
        return channel

    def cut(self, channel: int) -> None:
        """End a channel. Each side learns it at its own time."""
        client = self.channels.pop(channel, None)
        if client is None:
            return
        life = self.life
        self.at(self.rng.random() * 3, lambda: self.handle(co.Left(channel)) if life == self.life else None)
        if client.channel == channel:
            client.later(self.rng.random() * 3, lambda: client.lost() if client.channel == channel else None)

    def to_server(self, channel: int, message: wire.Up) -> None:
        message = wire.decode_up(wire.encode_frame(message)) if self.rng.random() < 0.05 else message
        copies = 0 if self.faulty(self.trouble) else 2 if self.faulty(self.trouble) else 1
        if isinstance(message, (wire.Hello, wire.Ready)):
            if copies == 0:
                self.cut(channel)
            copies = min(copies, 1)
        delay, life = 0.01 + (self.rng.random() if self.faulty(self.trouble) else 0.0), self.life

        def arrive() -> None:
            if channel in self.channels and life == self.life:
                self.handle(co.Arrived(channel, message))

        for _ in range(copies):
            self.at(delay, arrive)
        if copies == 0 and self.faulty(0.5):
            self.cut(channel)

    def to_client(self, channel: int, message: wire.Down) -> None:
        client = self.channels.get(channel)
        if client is None:
            return
        self.model.sent(client.id, message)
        if self.faulty(self.trouble):
            # TCP loses the end of a stream, never a part of it.
            return self.cut(channel)
        life = client.life

        def arrive() -> None:
            if client.channel == channel and client.life == life:
                client.receive(message)

        return self.at(0.01, arrive)

    def garble(self, channel: int) -> None:
        if channel in self.channels:
            self.handle(co.Garbled(channel, "magic"))

    def put(self, client: Client, p: Prepared) -> int:
        self.next += 1
        self.uploads[self.next] = (client, p)
        self.handle(co.Offered(self.next, client.id, p.work))
        return self.next

    def granted(self, upload: int) -> None:
        client, p = self.uploads[upload]
        life, server = client.life, self.life

        def step(part: int) -> None:
            if upload not in self.uploads or server != self.life:
                return
            if client.life != life or self.faulty(self.trouble):
                del self.uploads[upload]
                self.handle(co.Aborted(upload))
                if client.life == life:
                    client.later(2.0, client.put, p)
            elif part < 2:
                self.handle(co.UploadProgress(upload, len(p.body) // 2))
                self.at(0.1, lambda: step(part + 1))
            elif isinstance(client, Hostile) and self.rng.random() < 0.3:
                return  # never sends the end
            else:
                del self.uploads[upload]
                self.handle(co.Uploaded(upload, wire.digest(p.body), p.body))

        self.at(0.1, lambda: step(0))

    # The server

    def start_server(self) -> None:
        self.life += 1
        self.unix += self.rng.choice([0, 1, 100])
        epoch = max((self.model.epochs[-1] if self.model.epochs else 0) + 1, self.unix)
        self.model.epoch(epoch)
        limits = co.Limits(absent_s=self.absent_s, window=2 * LARGE, client_window=LARGE)
        self.coordinator = co.Coordinator(epoch, "federation", VERSIONS, limits)
        self.open: dict[WorkId, Start] = {}
        self.folded: list[Fold] = []
        self.starts: Counter[tuple[int, int]] = Counter()
        self.failures: Counter[int] = Counter()
        self.present: set[int] = set()
        self.committing, self.ended, self.tick = False, False, -1.0
        recent: dict[int, list[tuple[WorkId, bytes, bytes]]] = {}
        for commit in self.db:
            for client, work, after, hash in commit.accepted:
                recent.setdefault(client, []).append((work, hash, wire.chain_link(after, work, hash)))
        for client in self.model.revoked:
            self.handle(co.Revoked(client))
        self.handle(co.RunOpened(RUN, INPUT, self.closed, self.memory, None, {c: tuple(w) for c, w in recent.items()}))
        for start in self.db[-1].flights if self.db else ():
            self.assign(start)
        self.fill()

    def crash_server(self) -> None:
        if self.coordinator is None:
            return
        self.life += 1
        self.coordinator = None
        self.uploads.clear()
        for channel, client in list(self.channels.items()):
            del self.channels[channel]
            if client.channel == channel:
                client.later(self.rng.random() * 3, lambda c=client, n=channel: c.lost() if c.channel == n else None)
        self.at(self.rng.expovariate(0.5), self.start_server)

    def revoke(self, client: Client) -> None:
        self.model.revoked.add(client.id)
        self.handle(co.Revoked(client.id))

    def soon(self, delay: float, call) -> None:
        """Call a function of the server unless it crashes before."""
        life = self.life
        self.at(delay, lambda: call() if life == self.life else None)

    def handle(self, event: co.Event) -> None:
        if self.coordinator is None:
            return
        for action in self.coordinator.handle(event, self.now):
            self.act(action)
        wake = self.coordinator.wake
        if wake is not None and not self.now <= self.tick <= wake:
            self.tick = wake
            self.soon(max(0.0, wake - self.now), self.ticks)

    def ticks(self) -> None:
        self.tick = -1.0
        self.handle(co.Tick())

    def act(self, action: co.Action) -> None:
        match action:
            case co.Send(channel, message):
                self.to_client(channel, message)
            case co.Close(channel, bye):
                self.to_client(channel, bye)
                self.soon(0.02, lambda: self.cut(channel))
            case co.Deliver(client, work, after, _, body):
                self.model.delivered(client, work, body)
                self.soon(self.rng.random() * 0.1, lambda: self.check(client, work, after, body))
            case co.Failed(client, work, code, _):
                self.model.failure(client, code)
                start = self.open.pop(work, None)
                if start is not None:
                    self.failures[client] += 1
                self.soon(0.0, self.fill)
            case co.Present(client):
                self.present.add(client)
                self.soon(0.0, self.fill)
            case co.Gone(client):
                self.present.discard(client)
            case co.Grant(upload):
                self.granted(upload)
            case co.Finish(upload, code):
                self.finished(upload, code)

    def finished(self, upload: int, code: str) -> None:
        found = self.uploads.pop(upload, None)
        if found is not None and code == "quota":
            found[0].later(2.0, found[0].put, found[1])

    def check(self, client: int, work: WorkId, after: bytes | None, body: bytes) -> None:
        """The stepping thread: check a contribution and fold it."""
        if body.startswith(b"bad"):
            del self.open[work]
            self.failures[client] += 1
            self.handle(co.Rejected(work))
        else:
            del self.open[work]
            self.folded.append((client, work, after, wire.digest(body)))
            self.handle(co.Folded(work))
        self.fill()

    def model_of(self, version: int) -> bytes:
        return self.db[version - 1].model if version else START

    def fill(self) -> None:
        """Start works: one of each client in a round, or `depth` at a time; then commit if enough has arrived."""
        if self.ended or self.committing:
            return
        version = len(self.db)
        if version == self.rounds:
            return self.end_run()
        for client in self.clients:
            while self.may_start(client.id, version):
                repeat = self.starts[client.id, version]
                self.assign((client.id, version, repeat))
        enough = len(self.clients) * self.depth if self.depth > 1 else 1
        if (len(self.folded) >= enough and self.depth > 1) or (not self.open and (self.folded or self.stuck())):
            self.commit()

    def may_start(self, client: int, version: int) -> bool:
        if not (self.closed or client in self.present) or self.failures[client] > 2:
            return False
        if self.depth == 1:
            return self.starts[client, version] == 0
        return sum(1 for owner, _, _ in self.open.values() if owner == client) < self.depth

    def stuck(self) -> bool:
        """Whether no client can start: an empty round is a legal round."""
        version = len(self.db)
        return all(
            self.starts[c.id, version] or self.failures[c.id] > 2 or c.state == "gone" or c.id in self.model.revoked
            for c in self.clients
        )

    def assign(self, start: "Start") -> None:
        client, version, repeat = start
        self.starts[client, version] = max(self.starts[client, version], repeat + 1)
        model = self.model_of(version)
        id = wire.work_id(RUN, "round", client, version, repeat, PLAN, wire.digest(model))
        self.owner[id] = client
        self.open[id] = start
        work = wire.Work(
            id, "round", "train", len(self.db), version, repeat, PLAN, wire.WireKey("0", ()), "loop",
            bytes(32), bytes(32), model, (), None, None, 0, None, wire.Lease(0, 0), None,
        )  # fmt: skip
        self.orders[id], self.start_of[id] = work, start
        self.handle(co.Assigned(client, work, SMALL, LARGE))

    def commit(self) -> None:
        """The transaction, and a moment later the acknowledgement. A crash can fall before, between and after them."""
        self.committing = True
        accepted = list(self.folded)

        def durable() -> None:
            later = [self.start_of[work] for _, work, *_ in self.folded[len(accepted) :]]
            before = self.model_of(len(self.db))
            flights = [*later, *self.open.values()]
            self.db.append(Commit(next_model(before, accepted), accepted, flights))
            self.committed_works.update(work for _, work, *_ in accepted)
            self.model.committed()
            self.soon(self.rng.random() * 0.2, acknowledge)

        def acknowledge() -> None:
            del self.folded[: len(accepted)]
            self.failures.clear()
            self.committing = False
            self.handle(co.Committed(tuple(work for _, work, *_ in accepted)))
            self.fill()

        self.soon(self.rng.random() * 0.2, durable)

    def end_run(self) -> None:
        self.ended = True
        self.handle(co.Closing(wire.Bye("done", "", None, None), 60.0))


def simulate(seed: int) -> World:
    """Run one schedule.

    Raises:
        AssertionError: an invariant is broken; the error begins with the seed.
    """
    world = World(seed)
    try:
        world.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return world


if __name__ == "__main__":
    import time

    count, first = (int(word) for word in (sys.argv[1:] + ["1000", "0"][len(sys.argv) - 1 :]))
    begin = time.process_time()
    events = sum(simulate(seed).number for seed in range(first, first + count))
    seconds = time.process_time() - begin
    print(f"{count} schedules, {events} events, {60 * count / seconds:.0f} schedules a minute and core")
