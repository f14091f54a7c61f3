"""Secure sums over a network: the session of a round at the server, and that of one site.

    client   Work          trains, prepares its contribution, then advertises its keys
    both     M0 … M3       `StepMessage`s, in pieces: keys, cohort, shares
    client   M4            the masked contribution, as the body of an `Update` or an upload
    both     M5 … M8       `StepMessage`s: survivors, confirmation, shares
    server                 adds masked words when they arrive, removes the masks, and folds one sum

The server waits for the keys of all clients of the round. Once enough have arrived for a sum, each other client has
`keys_s` seconds of presence to send its own; signs of life do not extend them. An absent client is awaited as in other
rounds. From then on a client that does not answer a step in time is left out. An attempt without a sum is followed by
another one with new keys, at most `ATTEMPTS` in a round. A session is never stored: a server that starts again begins
the next attempt.

A client is named by its public identity key. It sends the same answer again if the same message arrives again, since a
connection may end at any byte.

Tests: tests/faults/test_secure_network.py
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from atoll.base.validation import required
from atoll.compute.task import Task
from atoll.net import coordinator as events
from atoll.net.failpoints import failpoint
from atoll.net.wire import MAX_INLINE, StepMessage, Work, digest
from atoll.plan.aggregate import Masks, Mean
from atoll.plan.in_flight import Flight
from atoll.plan.plan import Plan
from atoll.plan.round import summed_vectors
from atoll.secure.client import SumClient, Words
from atoll.secure.messages import ADVERTISE, MASKED, UNMASK, SumMessage, longest_bodies
from atoll.secure.params import Agreement
from atoll.secure.refusals import SessionError
from atoll.secure.server import SecureSum, SumServer

ATTEMPTS = 2  # of a round
STEPS = ("keys", "", "shares", "", "masked contribution", "", "confirmation", "", "shares of masks")


def agreement_of(run: str, work: Work, model: bytes, plan: Plan, task: Task) -> Agreement:
    """What a participant has for itself: from the work, and from the plan and the model version that it has read.

    Args:
        run: the name of the run.
        work: the work; it has the numbers of the sum.
        model: the SHA-256 of the model version.
        plan: the algorithm; its aggregator knows its grids.
        task: the model and loss.
    """
    terms, rule = required(work.sum, "terms of the sum"), _mean(plan)
    numbers = b"".join(number.to_bytes(8, "big") for number in (terms.clients, terms.weight, terms.rows))
    vectors = {name: declared.length for name, declared in summed_vectors(plan, task).items()}
    release = plan.codec.event(1.0)
    return Agreement(
        run=digest(run.encode())[:16],
        round=work.round,
        attempt=work.attempt,
        model=model,
        config=digest(digest(work.plan.encode()) + work.input + work.layout + numbers),
        vectors=tuple(sorted(vectors.items())),
        ring=rule.masks.ring,
        bound=rule.largest_number(terms.weight),
        largest_weight=terms.weight,
        largest_cohort=terms.clients,
        hybrid=rule.masks.hybrid,
        noise=0.0 if release is None else release.noise,
    )


def _mean(plan: Plan) -> Mean:
    if not isinstance(plan.aggregator, Mean):
        raise TypeError(f"{plan.aggregator!r} has no secure sum")
    return plan.aggregator


# 1. Steps in pieces


def step_pieces(work: bytes, message: SumMessage) -> list[StepMessage]:
    """The frames of a message, at most `MAX_INLINE` bytes each.

    Example:
        >>> [(piece.rest, len(piece.body)) for piece in step_pieces(bytes(16), SumMessage(2, bytes(70_000)))]
        [(4464, 65536), (0, 4464)]
    """
    kind, body = message
    starts = range(0, len(body), MAX_INLINE) or range(1)
    return [StepMessage(work, kind, max(0, len(body) - at - MAX_INLINE), body[at : at + MAX_INLINE]) for at in starts]


class Assembly:
    """Joins the pieces of messages, in their order. A message that begins again replaces its first pieces.

    Args:
        longest: the longest body of each kind.
    """

    def __init__(self, longest: Mapping[int, int]) -> None:
        self._longest = longest
        self._kind, self._total, self._data = -1, 0, bytearray()

    def add(self, piece: StepMessage) -> bytes | None:
        """The whole body after its last piece, else None.

        Raises:
            SessionError: `message`, if the body is longer than any of its kind.
        """
        left = len(piece.body) + piece.rest
        if piece.step != self._kind or len(self._data) + left != self._total:
            self._kind, self._total, self._data = piece.step, left, bytearray()
            if left > self._longest.get(piece.step, 0):
                self._kind = -1
                raise SessionError("message", f"Message {piece.step} has {left} bytes.")
        self._data += piece.body
        if piece.rest:
            return None
        self._kind = -1
        return bytes(self._data)


# 2. The server


@dataclass
class _Member:
    """A client of an attempt: its work, its identity key, and the messages of both sides."""

    flight: Flight
    work: bytes
    identity: bytes
    assembly: Assembly
    seen: dict[int, bytes] = field(default_factory=dict)  # the digest of each message that was taken
    sent: list[StepMessage] = field(default_factory=list)  # the last message to the client
    up: int = 0
    down: int = 0
    owed: float = 0.0  # seconds in which it was present without its keys, although a sum was possible
    delivered: events.Deliver | None = None


class Summed(NamedTuple):
    """A client in the sum of a round."""

    flight: Flight
    delivered: events.Deliver
    up: int
    down: int


class SumOutcome(NamedTuple):
    """The end of a round: the sum with its clients, or no sum; and the clients that are not in it, with the causes.

    `void`: the server was killed in an earlier attempt after clients had sent their shares, which they do once a round.
    """

    sum: SecureSum | None
    arrived: tuple[Summed, ...]
    lost: tuple[tuple[Flight, str], ...]
    void: bool = False


class SumRound:
    """The sum of one round at the server.

    Args:
        masks: the secure sum of the plan.
        identities: the public identity key of each client.
        assign: assigns the work of a flight in an attempt, and returns it with the agreement of the server.
        withdraw: withdraws works.
        step: sends a client a piece of a step.
        begun: writes the number of an attempt to disk, before a client learns of it.
        weigh: the weight of clients together, by their rows.
        step_s: the seconds that a client has for a step after the first one.
        keys_s: the seconds of presence that a client has for its keys, once enough others have sent theirs.
        present: returns the clients that are connected.
        first: the number of the first attempt.
    Attributes:
        masked: whether a client has sent its masked contribution.
    """

    def __init__(
        self,
        masks: Masks,
        identities: Mapping[int, bytes],
        assign: Callable[[Flight, int], tuple[Work, Agreement]],
        withdraw: Callable[[Iterable[bytes]], None],
        step: Callable[[int, StepMessage], None],
        begun: Callable[[int], None],
        weigh: Callable[[list[int]], int],
        step_s: float,
        keys_s: float,
        present: Callable[[], Collection[int]],
        first: int = 0,
    ) -> None:
        self._masks, self._identities, self._assign, self._withdraw = masks, identities, assign, withdraw
        self._step, self._begun, self._weigh, self._step_s = step, begun, weigh, step_s
        self._keys_s, self._present = keys_s, present
        self._looked: float | None = None  # the time of the last count of owed seconds
        self._there: frozenset[int] = frozenset()  # the clients that were present then
        self.attempt, self.masked, self._again = first - 1, False, first > 0
        self._flights: dict[int, Flight] = {}
        self._members: dict[bytes, _Member] = {}
        self._out: dict[int, str] = {}
        self._waits: set[int] = set()
        self._deadline: float | None = None
        self._server: SumServer | None = None

    @property
    def awaited(self) -> tuple[int, ...]:
        """The clients whose answer the open step lacks."""
        return tuple(sorted(self._waits))

    @property
    def step(self) -> str:
        """The open step, for people."""
        kind = -1 if self._server is None else self._server.step
        return "" if kind < 0 else f"{STEPS[kind]} (step {kind} of 8, attempt {self.attempt + 1} of {ATTEMPTS})"

    def start(self, flight: Flight) -> None:
        """Add a client of the round."""
        self._flights[flight.client] = flight

    def left(self, now: float) -> float | None:
        """The seconds until the step ends, or until a client without keys is left out; None: neither has a time."""
        if self._deadline is not None:
            return max(0.0, self._deadline - now)
        owed = [member.owed for member in self._owing() if member.flight.client in self._there]
        return max(0.0, (self._looked or 0.0) + self._keys_s - max(owed) - now) if owed else None

    def _owing(self) -> list[_Member]:
        """The clients without whose keys a sum is possible, and which are awaited."""
        if self._server is None or self._server.step != ADVERTISE:
            return []
        owing = [member for member in self._members.values() if member.flight.client in self._waits]
        return owing if sum(ADVERTISE in m.seen for m in self._members.values()) >= self._masks.least else []

    def _count_owed(self, now: float) -> None:
        """Leave out the clients that have owed their keys for too long."""
        passed = now - self._looked if self._looked is not None else 0.0
        for member in self._owing():
            member.owed += passed if member.flight.client in self._there else 0.0
            if member.owed >= self._keys_s:
                self.lost(member.flight.client, f"no {STEPS[ADVERTISE]} within {self._keys_s:g} s")
        self._looked, self._there = now, frozenset(self._present())

    def begin(self) -> SumOutcome | None:
        """Begin the next attempt; the end of the round if none remains."""
        self.attempt += 1
        if self.attempt >= ATTEMPTS or not self._flights:
            last = f"no sum in {ATTEMPTS} attempts"
            self._server, lost = None, tuple((f, self._out.get(c, last)) for c, f in sorted(self._flights.items()))
            return SumOutcome(None, (), lost, self._again and any(cause.startswith("replayed") for _, cause in lost))
        self._begun(self.attempt)
        self._members, self._out, self._deadline, self._looked = {}, {}, None, None
        for client, flight in self._flights.items():
            if client not in self._identities:
                self._out[client] = "it has no identity key: it enrolled without one"
                continue
            work, agreement = self._assign(flight, self.attempt)
            if self._server is None:
                masks = self._masks
                self._server = SumServer(agreement, self._known, masks.least, masks.neighbours, masks.threshold)
            assembly = Assembly(longest_bodies(agreement))
            self._members[work.work] = _Member(flight, work.work, self._identities[client], assembly)
        self._waits = {member.flight.client for member in self._members.values()}
        return None

    def _known(self, key: bytes) -> bytes | None:
        """The public identity key of a client of the federation; None of any other."""
        return key if key in self._identities.values() else None

    def stepped(self, message: StepMessage) -> None:
        """Take a piece of a step of a client."""
        member = self._members.get(message.work)
        if member is None or member.flight.client in self._out:
            return
        try:
            body = member.assembly.add(message)
            if body is not None:
                self._take(member, SumMessage(message.step, body))
        except SessionError as error:
            self.lost(member.flight.client, f"{error.reason}: {error.given}")

    def upload(self, message: events.Deliver) -> bool:
        """Add a masked contribution. Returns whether it is in the sum."""
        member = self._members.get(message.work)
        if member is None or member.flight.client in self._out:
            return False
        try:
            self._take(member, SumMessage(MASKED, bytes(message.body)))
        except SessionError as error:
            self.lost(member.flight.client, f"{error.reason}: {error.given}")
        if MASKED in member.seen:
            self.masked = True
            member.delivered = replace(message, body=b"")  # its words are in the running sum
        return MASKED in member.seen

    def _take(self, member: _Member, message: SumMessage) -> None:
        """Pass a message to the session, once. A message of a closed step is too late, and is not read."""
        server, hash = self._server, digest(message.body)
        if server is None or message.kind < server.step or member.seen.get(message.kind) == hash:
            return
        server.receive(member.identity, message)
        member.seen[message.kind] = hash
        member.up += len(message.body)
        self._waits.discard(member.flight.client)

    def lost(self, client: int, cause: str) -> None:
        """A client answers no further step of this attempt."""
        self._out.setdefault(client, cause)
        self._waits.discard(client)

    def gone(self, client: int) -> None:
        """The flight of a client has ended for another reason."""
        self._flights.pop(client, None)
        self.lost(client, "")

    def again(self, client: int) -> None:
        """Send a client that is back the last message, which it may have missed."""
        for member in self._members.values():
            if member.flight.client == client:
                for piece in member.sent:
                    self._step(client, piece)

    def advance(self, now: float) -> SumOutcome | None:
        """Close the steps that are complete or overdue. Returns the end of the round, once."""
        self._count_owed(now)
        while self._server is not None and (not self._waits or (self._deadline is not None and now >= self._deadline)):
            server = self._server
            for client in self._waits:
                self._out[client] = f"no {STEPS[server.step]} within {self._step_s:g} s"
            failpoint(f"sum.{server.step}")
            try:
                if server.step == UNMASK:
                    return self._result(server)
                sent = server.close()
            except SessionError as error:
                found = self._failed(error)
                if found is not None:
                    return found
                continue
            self._send(sent)
            self._deadline = now + self._step_s
        return None

    def _send(self, sent: Mapping[bytes, SumMessage]) -> None:
        members = {member.identity: member for member in self._members.values()}
        self._waits = set()
        for identity, message in sent.items():
            member = members[identity]
            member.sent, member.down = step_pieces(member.work, message), member.down + len(message.body)
            for piece in member.sent:
                self._step(member.flight.client, piece)
            if member.flight.client not in self._out:
                self._waits.add(member.flight.client)

    def _result(self, server: SumServer) -> SumOutcome:
        """The sum, after a comparison of its weight with the rows of its clients."""
        found = server.result()
        members = {member.identity: member for member in self._members.values()}
        inside = sorted((members[key] for key in found.survivors), key=lambda member: member.flight.client)
        weight = self._weigh([member.flight.client for member in inside])
        if weight != found.weight:
            raise SessionError("mask_residue", f"The weights add up to {found.weight}.", f"{weight}, by their rows.")
        arrived = tuple(Summed(m.flight, required(m.delivered, "contribution"), m.up, m.down) for m in inside)
        there = {one.flight.client for one in arrived}
        lost = tuple((f, self._out.get(c, "")) for c, f in sorted(self._flights.items()) if c not in there)
        self._server = None
        return SumOutcome(found, arrived, lost)

    def _failed(self, error: SessionError) -> SumOutcome | None:
        """End an attempt without a sum, and begin the next one."""
        self._withdraw(list(self._members))
        cause = f"{error.reason}: {error.given}"
        out = {client: self._out.get(client) or cause for client in self._flights}
        self._server = None
        self._out = out
        return self.begin()


# 3. A site


class SiteSum:
    """The session of one site.

    Args:
        work: the work.
        client: the participant of the protocol.
        words: the words of the contribution, and its weight.
        answering: is called before the shares that open the masks leave the site.
        after: the link of the memory from which the contribution started.
    """

    def __init__(
        self,
        work: Work,
        client: SumClient,
        words: tuple[Words, int],
        answering: Callable[[], None],
        after: bytes | None,
    ) -> None:
        self.work, self.after = work, after
        self._client, self._words, self._answering = client, words, answering
        self._assembly = Assembly(longest_bodies(client.agreement))
        self._last: tuple[int, bytes] = (-1, b"")
        self.recorded = False
        self.answer = client.advertise()

    def __repr__(self) -> str:
        return f"SiteSum(round={self.work.round}, attempt={self.work.attempt})"

    @property
    def over(self) -> bool:
        """Whether the site has sent its last message."""
        return self.answer.kind == UNMASK

    def take(self, piece: StepMessage) -> SumMessage | None:
        """Take a piece of a message of the server. Returns the answer after its last piece, else None.

        Raises:
            SessionError: the message was refused; the session is over.
        """
        body = self._assembly.add(piece)
        if body is None:
            return None
        if (piece.step, body) == self._last:
            return self.answer  # the connection may have ended before it arrived
        answer = self._client.receive(SumMessage(piece.step, body))
        if answer is None:
            answer = self._client.mask(*self._words)
        failpoint(f"site.{answer.kind}")
        if answer.kind == UNMASK:
            self._answering()
        self._last, self.answer = (piece.step, body), answer
        return answer
