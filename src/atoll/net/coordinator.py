"""The coordinator of a server: presence, leases, receipts, chains, uploads, quotas and drain, without I/O and clocks.

    actions = coordinator.handle(event, now)        now: monotonic seconds, never decreasing
    coordinator.wake                                the time of the next timer; then call handle(Tick(), now)

It is a state machine: it imports no I/O, reads no clock and starts no thread. A server protects it by one lock and
carries out the returned actions in order. Two threads send events:

    event loop        Joined Left Arrived Garbled · Offered UploadProgress Uploaded Aborted · Revoked Enrolled Tick
                      Renumbered
    stepping thread   RunOpened Assigned Withdrawn Stepping · Folded Rejected · Committed Closing · Numbered Dismissed
                      Placed

and two threads carry out actions:

    event loop        Send Close · Grant Finish Discard · Drained
    stepping thread   Deliver Stepped Failed Noted Forget Present Gone Refused Reported

A contribution goes through these states. The stepping thread ends each work by `Committed`, `Withdrawn` or `Rejected`,
or it learns the end by `Failed`.

    waiting → leased → checking → received → committed
                ↓ ↑       ↑
              expired    held         (held: its predecessor has not been folded)

- `Receipt("received")` is sent after `Folded`, `Settled` after `Committed`: only what is on disk is acknowledged.
- The first bytes of a work win. Equal bytes get the equal receipt, also after the commit; other bytes get "conflict".
- Bytes under another lease than the last one of an open work are ignored: their receipt has been sent.
- A work that is no open work of this client gets "late". No other client can have the same work, so an expired lease
  whose work is still wanted is renewed by any sign of life.
- With client memory, `after` must be the link of the client's last folded contribution (`chain_link`). A contribution
  whose predecessor is known but not folded is held. Otherwise it is refused by "predecessor". Then the open works of
  the client are sent again under new leases, because the client drops the later messages of its chain.
- Only works of the kind "round" form chains and belong to a transaction. A contribution of another kind is settled as
  soon as it is folded: after a restart the server asks for it again.
- A client that has connected again may still compute: signs of life before `Ready` renew leases, too.
- Signs of life renew a lease for `work_s` at most, so that an open run does not wait for ever for a client that
  computes nothing. A closed run without `absent_s` waits. The lease of a relay ends later than those of its clients.
- A client of a relay that has no number in the run stays connected as before a run.
- A closed run waits for an absent client (`absent_s = None`). An open run fails its works once their leases expire
  (`absent_s = 0`). A client that is not present has the time of a lease to return.
- The masked contribution of a secure sum moves the memory only with its commit: an attempt without a sum is withdrawn,
  also after `Folded`. Its link does not depend on its bytes, which the masks of another attempt would change.
- A large contribution waits for its grant, so that at most `window` bytes of uploads are in memory. A granted upload
  without progress for `stall_s` loses grant and bytes. The bytes of an upload count until it is folded.

Tests: tests/faults/test_coordinator.py, tests/faults/test_simulator.py
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any, Literal, TypeAlias

from msgspec.structs import replace

from atoll.net.wire import (
    MAX_ROWS,
    RELAYS,
    Blob,
    Bye,
    ByeCode,
    Cancel,
    Down,
    FrameFault,
    Gather,
    Hello,
    Leaf,
    Lease,
    Leave,
    Members,
    Numbers,
    Place,
    Progress,
    Ready,
    Receipt,
    ReceiptCode,
    Refusal,
    RelayRules,
    Seat,
    Sent,
    Settled,
    Start,
    StepMessage,
    Up,
    Update,
    Versions,
    Welcome,
    Work,
    chain_link,
    digest,
    version_fault,
)

_EARLY = (Ready, Members, Refusal, Leave, Progress)  # the messages that are possible before a client is ready
_LONGEST = 1e9  # seconds in a message
_IS_RELAY = "This client was invited with --relay. Write: atoll relay"
MAX_OPEN = 64  # open works of one client; a larger chain would not fit into one `Hello`
NO_DIGEST = bytes(32)  # of a masked contribution in the links of a chain
ATTEMPTS = 5  # of one work whose contributions continue a lost one, or differ from their hash

# 1. Events


@dataclass(frozen=True, slots=True)
class Joined:
    """A client with a verified, admitted certificate has opened a channel. The server numbers channels."""

    channel: int
    client: int


@dataclass(frozen=True, slots=True)
class Left:
    """A channel has ended, or its pings have had no answer."""

    channel: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message has been decoded on a channel."""

    channel: int
    message: Up


@dataclass(frozen=True, slots=True)
class Garbled:
    """A frame on a channel was no message."""

    channel: int
    code: FrameFault


@dataclass(frozen=True, slots=True)
class Offered:
    """A client waits to send the body of a work by HTTP. The server numbers uploads."""

    upload: int
    client: int
    work: bytes


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """`size` bytes of an upload have arrived."""

    upload: int
    size: int


@dataclass(frozen=True, slots=True)
class Uploaded:
    """An upload is complete. `hash` is the SHA-256 of `body`, which the server computed."""

    upload: int
    hash: bytes
    body: Any


@dataclass(frozen=True, slots=True)
class Aborted:
    """The connection of an upload has ended early. Its bytes stay until the upload stalls."""

    upload: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """The certificate of a client is revoked."""

    client: int


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A client has used a token: it is a new machine without the memory of the former one, and it is not revoked."""

    client: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of `wake` has come."""


@dataclass(frozen=True, slots=True)
class RunOpened:
    """A run is open.

    Args:
        run: its name.
        input: the blob of its `Input`.
        closed: whether the clients are fixed. Versions must then be equal.
        memory: whether the plan has client memory, so that contributions form chains.
        seat: the split, if clients hold their parts of a known data set.
        recent: the last committed works of each client, oldest first: work, digest of its message, link after it.
        rows: the train and held-out rows of clients, fixed since the run began.
    """

    run: str
    input: Blob
    closed: bool
    memory: bool
    seat: Seat | None = None
    recent: Mapping[int, tuple[tuple[bytes, bytes, bytes], ...]] = field(default_factory=dict)
    rows: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assigned:
    """A client shall do a work.

    Args:
        client: the client.
        work: the work; its lease and deadline are set when it is sent.
        least, most: bounds of the length of its message, in bytes.
        deadline: the monotonic second at which the round closes without it; None: never.
        starts: the clients of a relay for which the work is; empty: it is for the client itself.
    """

    client: int
    work: Work
    least: int
    most: int
    deadline: float | None = None
    starts: tuple[Start, ...] = ()


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """These works are no longer wanted. None of them has been folded, except of a secure sum.

    Args:
        works: the works.
        undone: whether they may have been folded: the root does not use the partial of this relay. Then their clients
            go back to the memory before them.
    """

    works: tuple[bytes, ...]
    undone: bool = False


@dataclass(frozen=True, slots=True)
class Numbered:
    """The answer to `Reported`: the clients of a relay have these numbers in the run."""

    client: int
    numbers: Numbers


@dataclass(frozen=True, slots=True)
class Placed:
    """The root of this relay has numbered its clients.

    Args:
        numbers: its answer: the rules, and the clients that take no part.
        waiting: those by their numbers in this database.
    """

    numbers: Numbers
    waiting: Mapping[int, Place]


@dataclass(frozen=True, slots=True)
class Renumbered:
    """The client of this channel has another number now."""

    channel: int


@dataclass(frozen=True, slots=True)
class Dismissed:
    """A client can take no part in this run."""

    client: int
    code: ByeCode
    reason: str


@dataclass(frozen=True, slots=True)
class Stepping:
    """Send a client a step of the protocol inside an open work. It is lost if the client is away."""

    client: int
    message: StepMessage


@dataclass(frozen=True, slots=True)
class Folded:
    """A delivered contribution is valid and part of the open round."""

    work: bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """A delivered contribution is not valid. The stepping thread has recorded the failure."""

    work: bytes


@dataclass(frozen=True, slots=True)
class Committed:
    """The transaction with these works is on disk."""

    works: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Closing:
    """The run or the server ends: present clients receive `bye` and have `drain_s` seconds to leave."""

    bye: Bye
    drain_s: float


Event: TypeAlias = (
    Joined | Left | Arrived | Garbled | Offered | UploadProgress | Uploaded | Aborted | Revoked | Enrolled | Tick
    | RunOpened | Assigned | Withdrawn | Stepping | Folded | Rejected | Committed | Closing | Numbered | Dismissed
    | Placed | Renumbered
)  # fmt: skip

# 2. Actions


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message on a channel."""

    channel: int
    message: Down


@dataclass(frozen=True, slots=True)
class Close:
    """Send `bye` on a channel and close it. `Left` need not follow."""

    channel: int
    bye: Bye


@dataclass(frozen=True, slots=True)
class Grant:
    """Read the body of an upload."""

    upload: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Answer an upload with the HTTP status of a code, without reading further bytes."""

    upload: int
    code: ReceiptCode


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget the bytes of a work that have arrived."""

    work: bytes


@dataclass(frozen=True, slots=True)
class Drained:
    """No channel is open after `Closing`."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Check and fold a contribution; `Folded` or `Rejected` answers. The commit stores `after` and `digest`."""

    client: int
    work: bytes
    after: bytes | None
    digest: bytes
    body: Any


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step of a protocol inside an open work has arrived."""

    client: int
    message: StepMessage


@dataclass(frozen=True, slots=True)
class Failed:
    """A work has ended without a contribution.

    The code is that of a `Refusal`, or: absent, expired, left, revoked, refused, length, predecessor, hash, closing.
    """

    client: int
    work: bytes
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Noted:
    """A fault of a client that ends no work, for counters and reports.

    The code is: conflict, late, invalid, predecessor, stale, expired, stalled, hash, order, quota, session (it leaves a
    secure sum that has its contribution), or frame-FAULT.
    """

    client: int
    code: str
    work: bytes | None = None


@dataclass(frozen=True, slots=True)
class Forget:
    """Committed works belong to the memory of a former machine; `Database.forget_memory` records that."""

    client: int


@dataclass(frozen=True, slots=True)
class Present:
    """A client can do works: its channel is open and its data fits."""

    client: int
    rows: int
    held: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Reported:
    """A relay has named its clients; `Numbered` or `Dismissed` answers."""

    client: int
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """A client can no longer do works."""

    client: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A client takes no part in this run. A closed run cannot go on."""

    client: int
    code: str
    reason: str


Action: TypeAlias = (
    Send | Close | Grant | Finish | Discard | Drained
    | Deliver | Stepped | Failed | Noted | Forget | Present | Gone | Refused | Reported
)  # fmt: skip

# 3. State


@dataclass(frozen=True)
class Limits:
    """Times and sizes of a coordinator.

    Args:
        lease_s: seconds of a lease without a sign of life.
        absent_s: seconds after which a work of an absent or silent client fails; None: never.
        work_s: seconds after which a work fails although its client gives signs of life, if absent clients fail. A
            relay has further seconds: its clients can begin late, and be absent at the end.
        hello_s: seconds from the opening of a channel to `Hello`.
        stall_s: seconds of a granted upload without progress.
        window: bytes of granted uploads, until they are folded; one upload is always granted.
        client_window: bytes of granted uploads of one client; one upload is always granted.
        rate, burst: messages a second of one client, and the number that may arrive at once.
        max_rows: the most rows of a client.
    """

    lease_s: float = 60.0
    absent_s: float | None = None
    work_s: float = 86400.0
    hello_s: float = 10.0
    stall_s: float = 10.0
    window: int = 256 << 20
    client_window: int = 128 << 20
    rate: float = 2000.0
    burst: float = 4000.0
    max_rows: int = 1 << 24

    def rules(self, clients: int, leaves: int) -> RelayRules:
        """These limits for the clients of a relay.

        Args:
            clients: the clients of the run.
            leaves: the most clients of the relay.
        """
        absent = None if self.absent_s is None else min(float(self.absent_s), _LONGEST)
        times = min(float(self.lease_s), _LONGEST), absent, min(float(self.work_s), _LONGEST)
        return RelayRules(*times, min(self.max_rows, MAX_ROWS), clients, leaves)


WorkState: TypeAlias = Literal["waiting", "leased", "expired", "held", "checking", "received"]
Stage: TypeAlias = Literal["away", "joined", "greeted", "ready"]


@dataclass(slots=True)
class _Open:
    """An open work and the contribution that has arrived for it."""

    order: Assigned
    state: WorkState = "waiting"
    expires: float = 0.0  # of the lease
    ends: float | None = None  # the time after which no sign of life renews the lease; None before the first lease
    fails: float | None = None  # the time at which an absent or silent client fails, and why
    fault: tuple[str, str] = ("", "")
    digest: bytes | None = None
    after: bytes | None = None
    link: bytes | None = None  # the link after its contribution, once that is known
    body: Any = None
    attempts: int = 0
    lease: int = 0  # the counter of its lease; 0 before it is sent, and after a refusal
    sent: Sent | None = None
    upload: int | None = None
    reserved: int = 0
    stalls: float = 0.0
    lease_armed: bool = False
    stall_armed: bool = False
    lost: bool = False  # folded, but the machine with the memory after it is gone

    @property
    def id(self) -> bytes:
        return self.order.work.work

    @property
    def masked(self) -> bool:
        """Whether the contribution is masked in a secure sum."""
        return self.order.work.sum is not None

    def link_of(self, after: bytes | None, hash: bytes) -> bytes:
        """The link of the memory after this contribution."""
        return chain_link(after, self.id, NO_DIGEST if self.masked else hash)


@dataclass(slots=True)
class _Client:
    """A client as the coordinator knows it."""

    id: int
    stage: Stage = "away"
    channel: int = -1
    since: float = 0.0
    hello: Hello | None = None
    rows: tuple[int, int] | None = None
    refused: tuple[str, str] | None = None
    revoked: bool = False
    works: dict[bytes, _Open] = field(default_factory=dict)
    tail: bytes | None = None  # the link of its last folded contribution
    committed: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    rejected: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    tokens: float = 0.0
    filled: float = 0.0


@dataclass(frozen=True)
class ClientStatus:
    """A client for `atoll status`.

    Args:
        client: its number.
        stage: "away", "joined" (no `Hello`), "greeted" (no `Ready`) or "ready".
        since: the monotonic second of the last change of the stage.
        works: its open works, each with its state and the second at which its lease ends.
    """

    client: int
    stage: Stage
    since: float
    works: tuple[tuple[bytes, WorkState, float], ...]


class Coordinator:
    """The state machine of the module's docstring.

    Args:
        epoch: the epoch of this start of the server.
        federation: the name of the federation.
        versions: the versions of the server.
        limits: times and sizes.
    Example:
        >>> versions = Versions("3.11.7", "0.1.0", "2.13.0", "2.4.6")
        >>> coordinator = Coordinator(7, "hospitals", versions, Limits())
        >>> coordinator.handle(Joined(1, 0), 0.0)
        []
        >>> hello = Hello(4, versions, "", ("loop",), None, None, ())
        >>> coordinator.handle(Arrived(1, hello), 0.1)[0].message.federation
        'hospitals'
        >>> coordinator.wake
        10.0
    """

    def __init__(self, epoch: int, federation: str, versions: Versions, limits: Limits) -> None:
        self.epoch, self.federation, self.versions, self.limits = epoch, federation, versions, limits
        self.below_relay = False  # whether the clients have their numbers from the root of this relay
        self._placed = Placed(Numbers((), 0, RelayRules(0.0, None, 0.0, 0, 1, 0)), {})  # the last one
        self.in_flight = 0
        self._counter = 0
        self._now = 0.0
        self._run: RunOpened | None = None
        self._bye: Bye | None = None
        self._drained = True
        self._clients: dict[int, _Client] = {}
        self._channels: dict[int, _Client] = {}
        self._owner: dict[bytes, _Client] = {}
        self._ended_late: set[bytes] = set()  # ended after their delivery, which the stepping thread still answers
        self._uploads: dict[int, _Open] = {}
        self._queue: deque[int] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._out: list[Action] = []
        self._handlers: Mapping[type[Any], Callable[[Any], None]] = {
            Joined: self._joined, Left: self._left, Arrived: self._arrived, Garbled: self._garbled,
            Offered: self._offered, UploadProgress: self._chunk, Uploaded: self._uploaded, Aborted: self._aborted,
            Revoked: self._revoked, Enrolled: self._enrolled, Tick: lambda _: None,
            RunOpened: self._opened, Assigned: self._assigned,
            Withdrawn: self._withdrawn, Stepping: self._stepping,
            Folded: self._folded, Rejected: self._rejected, Committed: self._committed,
            Closing: self._closing, Numbered: self._numbered, Dismissed: self._dismissed,
            Placed: self._take_places, Renumbered: self._renumbered,
        }  # fmt: skip
        self._messages: Mapping[type[Any], Callable[[_Client, Any], None]] = {
            Ready: self._ready, Update: self._update, Sent: self._sent, Progress: self._progress,
            Refusal: self._refusal, Leave: self._leave, StepMessage: self._step,
            Members: self._members,
        }  # fmt: skip

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event.

        Args:
            event: the event.
            now: monotonic seconds; a smaller value than the last one counts as equal.
        Returns:
            The actions, in the order in which they are carried out.
        Raises:
            ValueError: the stepping thread has broken its contract, such as by committing a work that was not folded.
        """
        self._now = max(now, self._now)
        self._out = []
        self._expire()
        self._handlers[type(event)](event)
        return self._out

    @property
    def wake(self) -> float | None:
        """The monotonic second of the next timer; None if there is none."""
        return self._timers[0][0] if self._timers else None

    @property
    def present(self) -> tuple[int, ...]:
        """The clients that can do works, in the order of their numbers."""
        return tuple(sorted(c.id for c in self._channels.values() if c.stage == "ready"))

    def status(self) -> tuple[ClientStatus, ...]:
        """Every client that has joined or has an open work, in the order of their numbers."""
        return tuple(
            ClientStatus(c.id, c.stage, c.since, tuple((w.id, w.state, w.expires) for w in c.works.values()))
            for _, c in sorted(self._clients.items())
        )

    def may_read(self, client: int, hash: bytes) -> bool:
        """Whether a blob is named in the `Welcome`, an open work or the `Bye` of this client."""
        found = self._clients.get(client)
        if found is None or found.revoked:
            return False
        named: list[Blob | bytes | None] = [
            self._run.input if self._run else None,
            self._bye.final if self._bye else None,
        ]
        for open in found.works.values():
            work = open.order.work
            named += [work.model, work.fixed, work.rest, *work.deltas]
        return any(isinstance(blob, Blob) and blob.hash == hash for blob in named)

    def announced(self, client: int, work: bytes) -> Sent | None:
        """The announcement of an upload that this client may send now; None if there is none."""
        found = self._clients.get(client)
        open = found.works.get(work) if found else None
        return open.sent if open is not None and open.digest is None else None

    # Timers

    def _at(self, time: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._timers, (time, self._number, call))

    def _expire(self) -> None:
        while self._timers and self._timers[0][0] <= self._now:
            heapq.heappop(self._timers)[2]()

    # Channels

    def _client(self, number: int) -> _Client:
        found = self._clients.get(number)
        if found is None:
            found = self._clients[number] = _Client(number, tokens=self.limits.burst, filled=self._now)
            self._restore(found)
        return found

    def _restore(self, c: _Client) -> None:
        """Begin a run for a client: its committed works and its rows come from the database."""
        c.committed, c.rejected = OrderedDict(), OrderedDict()
        c.rows, c.refused, c.tail = None, None, None
        if self._run is not None:
            recent = self._run.recent.get(c.id, ())
            c.committed.update((work, hash) for work, hash, _ in recent)
            c.rows = self._run.rows.get(c.id)
            c.tail = recent[-1][2] if recent and self._run.memory else None

    def _joined(self, event: Joined) -> None:
        c = self._client(event.client)
        if c.revoked:
            return self._out.append(Close(event.channel, Bye("revoked", "The certificate is revoked.", None, None)))
        if c.stage != "away":
            self._close(c, "replaced", "Another channel of this client was opened.", 60.0)
        c.stage, c.channel, c.since, c.hello = "joined", event.channel, self._now, None
        self._channels[event.channel] = c

        def silent() -> None:
            if c.channel == event.channel and c.stage == "joined":
                self._close(c, "silent", f"No Hello within {self.limits.hello_s:g} s.", 1.0)

        self._at(self._now + self.limits.hello_s, silent)

    def _left(self, event: Left) -> None:
        c = self._channels.pop(event.channel, None)
        if c is None:
            return
        if c.stage == "ready":
            self._out.append(Gone(c.id))
        c.stage, c.channel, c.since = "away", -1, self._now
        self._check_drained()

    def _close(self, c: _Client, code: ByeCode, reason: str, retry_s: float | None) -> None:
        """Close the channel of a client for a reason."""
        channel = c.channel
        self._out.append(Close(channel, Bye(code, reason, retry_s, None)))
        self._left(Left(channel))

    def _garbled(self, event: Garbled) -> None:
        c = self._channels.get(event.channel)
        if c is not None:
            self._out.append(Noted(c.id, f"frame-{event.code}"))
            self._close(c, "frame", f"A frame was no message: {event.code}.", 60.0)

    def _arrived(self, event: Arrived) -> None:
        c = self._channels.get(event.channel)
        if c is None:
            return
        message = event.message
        if not self._within_rate(c):
            self._out.append(Noted(c.id, "quota"))
            return self._close(c, "quota", f"More than {self.limits.rate:g} messages a second.", 60.0)
        if isinstance(message, Hello):
            if c.stage == "joined":
                return self._greet(c, message)
        elif c.stage == "ready" or (c.stage == "greeted" and isinstance(message, _EARLY)):
            return self._messages[type(message)](c, message)
        self._out.append(Noted(c.id, "order"))
        self._close(c, "order", f"{type(message).__name__} arrived too early or twice.", 60.0)

    def _within_rate(self, c: _Client) -> bool:
        c.tokens = min(self.limits.burst, c.tokens + (self._now - c.filled) * self.limits.rate)
        c.filled = self._now
        if c.tokens < 1:
            return False
        c.tokens -= 1
        return True

    def _send(self, c: _Client, message: Down) -> None:
        if c.stage in ("greeted", "ready"):
            self._out.append(Send(c.channel, message))

    # The beginning of a channel

    def _greet(self, c: _Client, hello: Hello) -> None:
        fault = version_fault(hello, self.versions, self._run is not None and self._run.closed)
        if fault is not None:
            return self._close(c, *fault, None)
        c.stage, c.since, c.hello = "greeted", self._now, hello
        run = self._run
        if run is None or self._is_unnumbered(c):
            self._send(c, Welcome(c.id, self.epoch, None, self.federation, None, None))
            if self._bye is not None:
                return self._send(c, self._bye)
            return self._explain(c)
        settled = self._unsettled(c, hello)
        if settled is None:
            return None
        self._send(c, Welcome(c.id, self.epoch, run.run, self.federation, run.input, run.seat))
        if settled:
            self._send(c, Settled(settled))
        for work in hello.prepared if hello.run == run.run else ():
            if work in c.works and c.works[work].state == "received":
                self._send(c, Receipt(work, "received"))
        # The end of a run first settles the works of a client that was away.
        return self._send(c, self._bye) if self._bye is not None else None

    def _is_unnumbered(self, c: _Client) -> bool:
        """Whether this is a client of a relay without a number in the run."""
        return self.below_relay and c.id >= RELAYS

    def _explain(self, c: _Client) -> None:
        """Send a client of a relay the reason why it waits, if the root has given one."""
        place = self._placed.waiting.get(c.id)
        if place is not None and place.code == "places":
            self._send(c, Numbers((place,), 0, self._placed.numbers.rules))

    def _take_places(self, event: Placed) -> None:
        """Take the rules of the root. Clients that cannot take part learn it once, and again after a change."""
        before, self._placed, rules = self._placed, event, event.numbers.rules
        times: dict[str, Any] = {"lease_s": rules.lease_s, "absent_s": rules.absent_s, "work_s": rules.work_s}
        self.limits = changed(self.limits, **times, max_rows=rules.max_rows)
        for client, place in event.waiting.items():
            c = self._client(client)
            if c.stage != "away" and place.code == "rows":
                self._close(c, "rows", rules.refusal(place), None)
            elif before.waiting.get(client) != place or before.numbers.rules != rules:
                self._explain(c)

    def _renumbered(self, event: Renumbered) -> None:
        c = self._channels.get(event.channel)
        if c is not None:
            self._close(c, "relay", "The root has numbered this client.", 0.0)

    def _unsettled(self, c: _Client, hello: Hello) -> tuple[bytes, ...] | None:
        """The committed works that the client has not settled; None if its memory does not fit: it is closed."""
        run = self._run
        same = run is not None and hello.run == run.run
        prepared, settled = (hello.prepared, hello.settled) if same else ((), None)
        if run is None or not run.memory:
            return tuple(work for work in prepared if work in c.committed)
        known = list(c.committed)
        if settled is not None and settled not in c.committed:
            reason = "This client has settled a work that the server has not committed: the server's database is older."
            self._close(c, "behind", reason, None)
            return None
        missing = tuple(known[known.index(settled) + 1 :] if settled is not None else known)
        if not set(missing) <= set(prepared):
            reason = "The memory of this client is older than its last committed work. A new token begins a new memory."
            self._close(c, "behind", reason, None)
            return None
        return missing

    def _ready(self, c: _Client, message: Ready) -> None:
        run = self._run
        if self._bye is not None:
            return None  # sent before the end was known
        if run is None or c.stage != "greeted" or c.hello is None:
            self._out.append(Noted(c.id, "order"))
            return self._close(c, "order", "Ready arrived too early or twice.", 60.0)
        if c.id >= RELAYS:
            reason = "The root has not numbered this client." if self.below_relay else _IS_RELAY
            return self._close(c, "relay", reason, 60.0 if self.below_relay else None)
        if message.input != run.input.hash:
            return self._close(c, "input", "The data was checked against another Input.", None)
        rows = (message.rows, message.held)
        if not 1 <= message.rows <= self.limits.max_rows or message.held > self.limits.max_rows:
            reason = (
                f"The client has {rows[0]} and {rows[1]} rows. Required: at least 1, at most {self.limits.max_rows}."
            )
            return self._close(c, "rows", reason, None)
        if c.rows is not None and c.rows != rows:
            before = f"{c.rows[0]} and {c.rows[1]}"
            return self._close(c, "rows", f"The client has {rows[0]} and {rows[1]} rows; it had {before}.", None)
        c.rows, c.stage, c.since, c.refused = rows, "ready", self._now, None
        self._out.append(Present(c.id, *rows, c.hello))
        return self._offer_all(c)

    def _members(self, c: _Client, message: Members) -> None:
        run = self._run
        if self._bye is not None or run is None:
            return None  # sent before the end was known
        if c.id < RELAYS or self.below_relay:
            return self._close(c, "relay", "This client was invited without --relay. Write: atoll join", None)
        if message.input != run.input.hash:
            return self._close(c, "input", "The clients of the relay have another Input.", None)
        return self._out.append(Reported(c.id, message.leaves))

    def _numbered(self, event: Numbered) -> None:
        c = self._client(event.client)
        if c.stage not in ("greeted", "ready") or c.hello is None:
            return  # it has left, and reports again
        self._send(c, event.numbers)
        if c.stage == "greeted":
            c.stage, c.since, c.refused = "ready", self._now, None
            self._offer_all(c)

    def _dismissed(self, event: Dismissed) -> None:
        c = self._client(event.client)
        if c.stage != "away":
            self._close(c, event.code, event.reason, None)

    def _offer_all(self, c: _Client) -> None:
        """Send the open works of a client that has become ready."""
        for open in list(c.works.values()):
            if open.state in ("waiting", "leased", "expired"):
                self._offer(c, open)

    def _leave(self, c: _Client, message: Leave) -> None:
        self._left(Left(c.channel))
        if self.limits.absent_s == 0:
            for open in list(c.works.values()):
                if open.state in ("waiting", "leased", "expired"):
                    self._fail(c, open, "left", f"The client left: {message.code}.")

    # Works

    def _opened(self, event: RunOpened) -> None:
        if self._owner:
            raise ValueError("a run opens while works of another run are open")
        self._run, self._bye = event, None
        for c in self._clients.values():
            self._restore(c)
        for c in list(self._channels.values()):
            if c.hello is not None and not self._is_unnumbered(c):
                hello, c.stage = c.hello, "joined"
                self._greet(c, hello)

    def _assigned(self, event: Assigned) -> None:
        c, work = self._client(event.client), event.work.work
        if self._run is None or work in self._owner or work in c.committed or len(c.works) >= MAX_OPEN:
            raise ValueError(
                f"work {work.hex()} of client {c.id} is assigned twice, without a run, or beyond {MAX_OPEN}"
            )
        open = c.works[work] = _Open(event)
        self._owner[work] = c
        if c.revoked:
            return self._fail(c, open, "revoked", "The certificate is revoked.")
        if c.refused is not None:
            return self._fail(c, open, *c.refused)
        if self._bye is not None:
            return self._fail(c, open, "closing", "The server ends.")
        if c.stage == "ready":
            return self._offer(c, open)
        return self._absent(c, open, "absent", "The client is not connected.")

    def _offer(self, c: _Client, open: _Open) -> None:
        """Send a work, under a new lease if its contribution has been refused."""
        if not open.lease:
            self._counter += 1
            open.lease = self._counter
        self._renew(c, open)
        deadline = open.order.deadline
        left = None if deadline is None else max(0.0, deadline - self._now)
        work = replace(open.order.work, lease=Lease(self.epoch, open.lease), deadline=left)
        self._send(c, Gather(work, open.order.starts) if open.order.starts else work)

    def _renew(self, c: _Client, open: _Open) -> None:
        """Begin a lease, or extend it after a sign of life."""
        if open.ends is None:
            open.ends = math.inf if self.limits.absent_s is None else self._now + self.limits.work_s
            if open.order.starts and self.limits.absent_s is not None:
                open.ends += 2 * (self.limits.absent_s + self.limits.lease_s)  # see `Limits`
        open.state, open.fails = "leased", None
        open.expires = min(self._now + self.limits.lease_s, open.ends)
        if not open.lease_armed:
            self._arm_lease(open)

    def _arm_lease(self, open: _Open) -> None:
        # The timer outlives the work, so it knows its name only: the work contains a model.
        open.lease_armed = True
        self._at(open.expires, partial(self._lease_timer, open.id))

    def _lease_timer(self, work: bytes) -> None:
        c = self._owner.get(work)
        if c is None:
            return None
        open = c.works[work]
        open.lease_armed = False
        if open.state != "leased":
            return None
        if open.upload is not None and not open.reserved:
            open.expires = self._now + self.limits.lease_s  # it waits for its grant: the time begins with the grant
            open.ends = max(open.ends or 0.0, open.expires)
        if open.expires > self._now:
            return self._arm_lease(open)
        self._out.append(Noted(c.id, "expired", open.id))
        open.state = "expired"
        if open.ends is not None and open.ends <= self._now:
            reason = f"No contribution within {self.limits.work_s:g} s, although the client gave signs of life."
            return self._fail(c, open, "expired", reason)
        if self.limits.absent_s is None and c.stage == "ready":
            # The message or its answer can be lost while the channel stays open; the client knows the work if not.
            return self._offer(c, open)
        return self._absent(c, open, "expired", f"No sign of life for {self.limits.lease_s:g} s.")

    def _absent(self, c: _Client, open: _Open, code: str, reason: str) -> None:
        """Let a work fail if its client stays absent or silent."""
        limit = self.limits.absent_s
        if limit is None:
            return
        if code == "absent":
            limit += self.limits.lease_s
        if limit == 0:
            return self._fail(c, open, code, reason)
        open.fails, open.fault = self._now + limit, (code, reason)

        def due() -> None:
            if open.fails is not None and open.fails <= self._now and c.works.get(open.id) is open:
                self._fail(c, open, *open.fault)

        return self._at(open.fails, due)

    def _fail(self, c: _Client, open: _Open, code: str, reason: str, cancel: bool = True) -> None:
        """End a work without a contribution."""
        if cancel and open.state in ("leased", "expired"):
            self._send(c, Cancel(open.id))
        self._end(c, open)
        self._out.append(Failed(c.id, open.id, code, reason))
        self._refuse_held(c)

    def _end(self, c: _Client, open: _Open) -> None:
        """Remove a work and the bytes of its upload."""
        del c.works[open.id], self._owner[open.id]
        self._drop_upload(open, "late")

    def _end_late(self, c: _Client, open: _Open) -> None:
        """Remove a work whose contribution may be at the stepping thread."""
        if open.state == "checking":
            self._ended_late.add(open.id)
        self._end(c, open)

    def _withdrawn(self, event: Withdrawn) -> None:
        for work in event.works:
            c = self._owner.get(work)
            if c is None:
                continue  # it has failed meanwhile
            open = c.works[work]
            if open.state == "received" and not open.masked:
                if not event.undone:
                    raise ValueError(f"work {work.hex()} is withdrawn after its contribution was folded")
                c.tail = open.after
            self._send(c, Cancel(work))
            self._end_late(c, open)
            self._refuse_held(c)

    def _progress(self, c: _Client, message: Progress) -> None:
        open = c.works.get(message.work)
        if open is None:
            # A site ends by itself, and a server that has started again may still ask for the same work.
            if message.work not in c.committed and (c.stage == "ready" or (c.id >= RELAYS and self._run is not None)):
                self._send(c, Cancel(message.work))
        elif open.state in ("waiting", "leased", "expired"):
            self._renew(c, open)

    def _step(self, c: _Client, message: StepMessage) -> None:
        open = c.works.get(message.work)
        if open is None or (open.state not in ("leased", "expired") and not open.masked):
            return self._send(c, Cancel(message.work))
        if open.state in ("leased", "expired"):
            self._renew(c, open)
        return self._out.append(Stepped(c.id, message))

    def _stepping(self, event: Stepping) -> None:
        c = self._clients.get(event.client)
        if c is not None and event.message.work in c.works:
            self._send(c, event.message)

    def _refusal(self, c: _Client, message: Refusal) -> None:
        if message.work is None:
            c.refused = (message.code, message.reason)
            self._out.append(Refused(c.id, message.code, message.reason))
            if c.stage == "ready":
                c.stage, c.since = "greeted", self._now
                self._out.append(Gone(c.id))
            for open in list(c.works.values()):
                if open.state in ("waiting", "leased", "expired", "held"):
                    self._fail(c, open, message.code, message.reason, cancel=False)
            return
        found = c.works.get(message.work)
        if found is not None and found.state in ("leased", "expired"):
            self._fail(c, found, message.code, message.reason, cancel=False)
        elif found is not None and found.masked:
            self._out.append(Noted(c.id, "session", message.work))  # its masked contribution is in the sum

    # Contributions

    def _update(self, c: _Client, message: Update) -> None:
        hash = digest(message.body)
        if self._is_first(c, message, hash):
            self._drop_upload(c.works[message.work], "conflict")
            self._contribution(c, c.works[message.work], message.after, hash, message.body)

    def _contribution(self, c: _Client, open: _Open, after: bytes | None, hash: bytes, body: Any) -> None:
        work = open.id
        length = len(body)
        if not open.order.least <= length <= open.order.most:
            self._send(c, Receipt(work, "large" if length > open.order.most else "invalid"))
            required = f"{open.order.least} to {open.order.most}"
            return self._fail(
                c, open, "length", f"The message has {length} bytes; {required} are possible.", cancel=False
            )
        open.digest, open.after, open.body, open.fails = hash, after, body, None
        open.link = open.link_of(after, hash)
        return self._try(c, open)

    def _is_first(self, c: _Client, message: Update | Sent, hash: bytes) -> bool:
        """Whether these are the first bytes of an open work of this client; else they get their receipt."""
        work = message.work
        open = c.works.get(work)
        if open is not None and message.lease != Lease(self.epoch, open.lease):
            self._out.append(Noted(c.id, "stale", work))
            return False
        known = open.digest if open is not None else c.committed.get(work, c.rejected.get(work))
        if known is None:
            if open is None:
                self._receipt(c, work, "late")
            return open is not None
        if known != hash:
            self._receipt(c, work, "conflict")
        elif open is None and work in c.rejected:
            self._send(c, Receipt(work, "invalid"))
        elif open is None:
            self._send(c, Receipt(work, "received"))
            self._send(c, Settled((work,)))
        elif open.state == "received":
            self._send(c, Receipt(work, "received"))
        return False

    def _receipt(self, c: _Client, work: bytes, code: ReceiptCode) -> None:
        self._out.append(Noted(c.id, code, work))
        self._send(c, Receipt(work, code))

    def _position(self, c: _Client, open: _Open, after: bytes | None) -> Literal["next", "wait", "lost"]:
        """Whether a contribution can be folded now, after another one that is known, or never."""
        if after == c.tail or open.order.work.kind != "round":
            return "next"
        if self._run is None or not self._run.memory or after is None:
            return "lost"
        before = next((other for other in c.works.values() if other.link == after), None)
        return "wait" if before is not None and before.state != "received" else "lost"

    def _try(self, c: _Client, open: _Open) -> None:
        """Deliver a contribution, hold it, or refuse it."""
        position = self._position(c, open, open.after)
        if position == "wait":
            open.state = "held"
            return None
        if position == "lost":
            return self._refuse(c, open)
        body, open.body, open.state = open.body, None, "checking"
        self._out.append(Deliver(c.id, open.id, open.after, open.digest or b"", body))
        return self._grant()

    def _refuse(self, c: _Client, open: _Open) -> None:
        """Refuse a contribution whose predecessor is lost, and send the work again."""
        open.digest, open.after, open.link, open.body, open.sent = None, None, None, None, None
        open.state = "waiting"
        self._drop_upload(open, "predecessor")
        self._receipt(c, open.id, "predecessor")
        open.attempts += 1
        if open.attempts >= ATTEMPTS:
            self._fail(c, open, "predecessor", "The contribution continues a lost one.", cancel=False)
        # The client drops this message and the later ones of its chain. Copies that are under way must not be folded.
        for other in list(c.works.values()):
            if other.state in ("waiting", "leased", "expired") and other.sent is None:
                other.lease = 0
                if c.stage == "ready":
                    self._offer(c, other)
                elif other is open:
                    self._absent(c, open, "absent", "The client is not connected.")
        self._refuse_held(c)

    def _refuse_held(self, c: _Client) -> None:
        """Refuse the held contributions whose predecessor is lost now."""
        for open in list(c.works.values()):
            waits = open.state == "held" and c.works.get(open.id) is open
            if waits and self._position(c, open, open.after) == "lost":
                self._refuse(c, open)

    def _delivered(self, work: bytes) -> tuple[_Client, _Open] | None:
        """The client and the work of a delivered contribution; None if it was withdrawn or its run has ended."""
        if work in self._ended_late:
            self._ended_late.discard(work)
            return None
        c = self._owner.get(work)
        if c is None or c.works[work].state != "checking":
            raise ValueError(f"work {work.hex()} has not been delivered")
        return c, c.works[work]

    def _folded(self, event: Folded) -> None:
        found = self._delivered(event.work)
        if found is None:
            return
        c, open = found
        if open.order.work.kind != "round":
            self._send(c, Receipt(open.id, "received"))
            self._send(c, Settled((open.id,)))
            self._end(c, open)
            return self._grant()
        open.state = "received"
        if self._run is not None and self._run.memory and not open.lost and not open.masked:
            c.tail = open.link
        self._release(open)
        self._send(c, Receipt(open.id, "received"))
        for other in list(c.works.values()):
            if other.state == "held" and other.after == open.link:
                self._try(c, other)
        self._refuse_held(c)
        self._grant()

    def _rejected(self, event: Rejected) -> None:
        found = self._delivered(event.work)
        if found is None:
            return
        c, open = found
        _remember(c.rejected, open.id, open.digest or b"")
        self._receipt(c, open.id, "invalid")
        self._end(c, open)
        self._refuse_held(c)

    def _committed(self, event: Committed) -> None:
        settled: dict[int, list[bytes]] = {}
        for work in event.works:
            c = self._owner.get(work)
            if c is None or c.works[work].state != "received":
                raise ValueError(f"work {work.hex()} is committed, but it was not folded")
            open = c.works[work]
            self._end(c, open)
            if open.lost:
                self._out.append(Forget(c.id))
                continue
            if open.masked and self._run is not None and self._run.memory:
                c.tail = open.link
            _remember(c.committed, work, open.digest or b"")
            settled.setdefault(c.id, []).append(work)
        for client, works in settled.items():
            self._send(self._clients[client], Settled(tuple(works)))

    # Uploads

    def _sent(self, c: _Client, message: Sent) -> None:
        if not self._is_first(c, message, message.hash):
            return
        open = c.works[message.work]
        if not open.order.least <= message.length <= open.order.most:
            self._send(c, Receipt(message.work, "large" if message.length > open.order.most else "invalid"))
            return self._fail(c, open, "length", f"The message has {message.length} bytes.", cancel=False)
        if open.sent is not None and open.sent != message:
            self._drop_upload(open, "conflict")
        open.sent, open.link = message, open.link_of(message.after, message.hash)
        return self._renew(c, open)

    def _offered(self, event: Offered) -> None:
        c = self._clients.get(event.client)
        open = c.works.get(event.work) if c is not None and not c.revoked else None
        if c is None or open is None or open.sent is None:
            return self._out.append(Finish(event.upload, "late"))
        if open.digest is not None:
            return self._out.append(Finish(event.upload, "received"))
        if open.upload is not None:
            # The client has opened a new connection; the old one is dead.
            del self._uploads[open.upload]
            self._out.append(Finish(open.upload, "quota"))
        open.upload, open.stalls = event.upload, self._now + self.limits.stall_s
        self._uploads[event.upload] = open
        if open.reserved:
            return self._out.append(Grant(event.upload))
        self._queue.append(event.upload)
        return self._grant()

    def _grant(self) -> None:
        """Grant waiting uploads in their order, while they fit into the windows."""
        waiting: list[int] = []
        lost: list[tuple[_Client, _Open]] = []
        while self._queue:
            upload = self._queue.popleft()
            open = self._uploads.get(upload)
            if open is None or open.sent is None:
                continue
            c, length = self._owner[open.id], open.sent.length
            own = sum(other.reserved for other in c.works.values())
            position = self._position(c, open, open.sent.after)
            if position == "lost":
                lost.append((c, open))
            elif position == "wait" or (own and own + length > self.limits.client_window):
                # A predecessor first: a body that waits for it would occupy the window that it needs.
                waiting.append(upload)
            elif self.in_flight and self.in_flight + length > self.limits.window:
                waiting.append(upload)
                break
            else:
                open.reserved = length
                self.in_flight += length
                self._renew(c, open)
                self._stall_in(c, open)
                self._out.append(Grant(upload))
        self._queue.extendleft(reversed(waiting))
        for c, open in lost:
            if c.works.get(open.id) is open and open.digest is None:
                self._refuse(c, open)

    def _stall_in(self, c: _Client, open: _Open) -> None:
        open.stalls = self._now + self.limits.stall_s

        def stalled() -> None:
            open.stall_armed = False
            if c.works.get(open.id) is not open or not open.reserved or open.digest is not None:
                return
            if open.stalls > self._now:
                open.stall_armed = True
                return self._at(open.stalls, stalled)
            self._out.append(Noted(c.id, "stalled", open.id))
            return self._drop_upload(open, "quota")

        if not open.stall_armed:
            open.stall_armed = True
            self._at(open.stalls, stalled)

    def _chunk(self, event: UploadProgress) -> None:
        open = self._uploads.get(event.upload)
        if open is not None and open.reserved:
            open.stalls = self._now + self.limits.stall_s
            if open.state in ("leased", "expired"):
                self._renew(self._owner[open.id], open)

    def _uploaded(self, event: Uploaded) -> None:
        open = self._uploads.pop(event.upload, None)
        if open is None or open.sent is None or not open.reserved:
            return self._out.append(Finish(event.upload, "late"))
        c, sent = self._owner[open.id], open.sent
        open.upload = None
        if event.hash != sent.hash or len(event.body) != sent.length:
            self._out.append(Finish(event.upload, "invalid"))
            self._out.append(Noted(c.id, "hash", open.id))
            self._drop_upload(open, "invalid")
            open.attempts += 1
            if open.attempts >= ATTEMPTS:
                self._fail(c, open, "hash", "The bytes differ from their announced hash.")
            return None
        self._out.append(Finish(event.upload, "received"))
        return self._contribution(c, open, sent.after, event.hash, event.body)

    def _aborted(self, event: Aborted) -> None:
        open = self._uploads.pop(event.upload, None)
        if open is not None:
            open.upload = None

    def _drop_upload(self, open: _Open, code: ReceiptCode) -> None:
        """End the upload of a work: answer its connection, forget its bytes, and free its part of the window."""
        if open.upload is not None:
            del self._uploads[open.upload]
            self._out.append(Finish(open.upload, code))
            open.upload = None
        if open.reserved and open.digest is None:
            self._out.append(Discard(open.id))
        self._release(open)

    def _release(self, open: _Open) -> None:
        if open.reserved:
            self.in_flight -= open.reserved
            open.reserved = 0
            self._grant()

    # The end

    def _revoked(self, event: Revoked) -> None:
        c = self._client(event.client)
        c.revoked = True
        if c.stage != "away":
            self._close(c, "revoked", "The certificate is revoked.", None)
        for open in list(c.works.values()):
            if open.state not in ("checking", "received") and c.works.get(open.id) is open:
                self._fail(c, open, "revoked", "The certificate is revoked.", cancel=False)

    def _enrolled(self, event: Enrolled) -> None:
        c = self._client(event.client)
        c.revoked = False
        if c.stage != "away":
            self._close(c, "revoked", "A new token was used for this client.", None)
        c.committed, c.tail = OrderedDict(), None
        for open in list(c.works.values()):
            open.lost = open.state in ("checking", "received")
        self._refuse_held(c)

    def _closing(self, event: Closing) -> None:
        self._bye, self._drained = event.bye, False
        for c in list(self._clients.values()):
            for open in list(c.works.values()):
                self._end_late(c, open)
        for c in self._channels.values():
            self._send(c, event.bye)  # a channel without `Hello` gets it after its works are settled

        def late() -> None:
            if self._bye is event.bye:
                for channel in list(self._channels):
                    self._out.append(Close(channel, event.bye))
                    self._left(Left(channel))

        self._at(self._now + event.drain_s, late)
        self._check_drained()

    def _check_drained(self) -> None:
        if self._bye is not None and not self._channels and not self._drained:
            self._drained = True
            self._out.append(Drained())


def _remember(table: OrderedDict[bytes, bytes], work: bytes, hash: bytes) -> None:
    """Add a work, and forget the oldest beyond the longest chain."""
    table[work] = hash
    if len(table) > 2 * MAX_OPEN:
        table.popitem(last=False)
