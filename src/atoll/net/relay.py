"""A relay: a server to its clients, and one member of the federation of its root.

    root ── Gather ──▶ relay ── Work ──▶ clients         the model travels to the relay once
    root ◀─ Update ─── relay ◀─ Update ─ clients         one sum over the clients of the relay

The clients keep their memory and their policy. A contribution is committed only if the root has committed the partial
that contains it: `Settled` of the root is passed on. A relay writes a partial to disk before it sends it, so a relay or
a root that is killed sends or receives the same bytes again.

Two threads call this class: that of the site of `atoll.net.client`, and one that takes the actions of the coordinator.

Tests: tests/faults/test_relay.py
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.validation import required
from atoll.compute.batches import HOST, OnStep
from atoll.compute.task import Task
from atoll.engine.contribution import Fold
from atoll.net import coordinator as events
from atoll.net import wire
from atoll.net.client import plain_text
from atoll.net.coordinator import Limits
from atoll.net.engine import drained, listen, listener_of
from atoll.net.failpoints import failpoint
from atoll.net.home import ServerHome
from atoll.net.partial import PartialForm, check_additive, read_messages, write_answers
from atoll.net.policy import Policy
from atoll.net.site import MemoryChain, Prepared
from atoll.net.spec import Server
from atoll.net.store import Accepted
from atoll.net.terms import Own, RefusedError, Terms, bind_codecs, layout_hash, read_plan
from atoll.plan.form import MessageError
from atoll.plan.message import MessageForm
from atoll.plan.plan import Plan
from atoll.plan.protocols import Ids

_REASON = 1000  # characters of the reason of a failure: the root allows 4 KiB of the head for each client
_WAIT_S = 1.0  # between two signs of life, and between two looks at the invitations


class Gathering:
    """The open works of the clients of a relay for one work of its root.

    Args:
        work: the work of the root.
        starts: its clients by the names of their works.
        plan: the algorithm, after `bind`.
        form: the form of their messages.
        rows: the rows of each client.
    """

    def __init__(
        self,
        work: wire.Work,
        starts: Mapping[bytes, wire.Start],
        plan: Plan,
        form: MessageForm,
        rows: Mapping[int, int],
    ) -> None:
        self.work, self.plan, self.form, self.rows = work, plan, form, rows
        self.starts, self.open = starts, set(starts)
        self.accepted: list[Accepted] = []
        self._fold: Fold | None = Fold(plan, work.round)
        self._arrived: list[tuple[wire.Counted, Mapping[str, Tensor] | bytes]] = []
        self._lost: list[wire.Lost] = []

    def lose(self, work: bytes, code: str, reason: str) -> None:
        """Record a work without a contribution."""
        if work in self.open:
            self.open.discard(work)
            start = self.starts[work]
            text = plain_text(reason)[:_REASON]
            self._lost.append(wire.Lost(start.client, start.repeat, code, text))

    def take(self, message: events.Deliver) -> bool:
        """Check and fold a contribution. Returns whether it is valid."""
        start, body = self.starts[message.work], message.body
        counted = wire.Counted(start.client, start.repeat, self.rows[start.client], len(body))
        try:
            if self.work.kind == "round":
                values: Any = self._folded(start, body)
            else:
                values = bytes(body)  # the root reads it
        except MessageError as error:
            cause = error.given.partition(": ")[2].rstrip(".") or error.given
            self.lose(message.work, "check", cause)
            return False
        if values is None:
            self.lose(message.work, "check", required(self._fold, "fold").results.failures[-1].cause)
            return False
        self.open.discard(message.work)
        self._arrived.append((counted, values))
        place = start.client, self.work.version, start.repeat
        self.accepted.append(Accepted(*place, message.work, message.after, message.digest, counted.rows))
        return True

    def _folded(self, start: wire.Start, body: Any) -> Mapping[str, Tensor] | None:
        """Fold a message. Returns the values of its client; None if a number is not finite."""
        ids = Ids(torch.tensor([start.client]), torch.tensor([start.repeat]))
        decoded = read_messages(self.plan, self.form, [body], torch.tensor([self.rows[start.client]]))
        columns = decoded.per_client
        good, _ = required(self._fold, "fold").add(
            self.work.version, ids, torch.zeros(1), torch.tensor([len(body)]), decoded
        )
        return columns if len(good.client) else None

    def body(self, task: Task) -> bytes:
        """The contribution of the relay. Its parts end: only the names of the works stay until the root settles it."""
        self._arrived.sort(key=lambda pair: (pair[0].client, pair[0].repeat))
        self._lost.sort(key=lambda one: (one.client, one.repeat))
        self.accepted.sort(key=lambda one: (one.client, one.repeat))
        arrived, values = [pair[0] for pair in self._arrived], [pair[1] for pair in self._arrived]
        fold, self._fold, self._arrived = required(self._fold, "fold"), None, []
        if self.work.kind != "round":
            return write_answers(arrived, self._lost, values)  # type: ignore[arg-type]
        form = PartialForm.of(self.plan, task, self.form)
        columns = {n: torch.cat([each[n] for each in values]) for n in form.columns} if values else {}  # type: ignore
        return form.to_bytes(arrived, self._lost, fold.results.partials.get(self.work.version), columns)


class RelayChain(MemoryChain):
    """The partials that the root has not committed yet. The clients of a partial settle with it."""

    on_settled: Callable[[Prepared], None] = lambda one: None
    on_dropped: Callable[[Prepared], None] = lambda one: None
    is_settling = False  # also after a commit that could not be written: the root settles it again

    def settle(self, works: tuple[bytes, ...]) -> None:
        """Settle the clients of committed partials, then delete these."""
        self.is_settling = True
        for one in self.prepared:
            if one.work in works:
                self.on_settled(one)
        failpoint("relay.settled")
        super().settle(works)
        self.is_settling = False

    def drop(self, work: bytes) -> None:
        """Let the clients of a partial that the root does not use return to the memory before it."""
        before = list(self.prepared)
        super().drop(work)
        for one in before[len(self.prepared) :]:
            self.on_dropped(one)


def _accepted_of(one: Prepared) -> tuple[int, tuple[Accepted, ...]]:
    """The round of a partial, and its clients."""
    round, rows = msgspec.msgpack.decode(one.memory["clients"].numpy().tobytes())
    return round, tuple(Accepted(*row) for row in rows)


class Relay:
    """A relay, in the place of the site of a client of the root.

    Args:
        home: its home as a server.
        root: the folder of its membership at the root.
        spec: the settings of its server.
        own: code by the names that the run uses.
        notify: receives the events of the relay.
    """

    policy = Policy()

    def __init__(
        self, home: ServerHome, root: Path, spec: Server, own: Own, notify: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.home, self.spec, self._own, self.notify = home, spec, own, notify
        self.post: Callable[[wire.Up], None] = lambda message: None
        self.is_withdrawn: Callable[[bytes], bool] = lambda work: False
        self.open_chain(root)
        self.final: bytes | None = None
        self._number = -1
        self._run = ""
        self._seat: wire.Seat | None = None
        self._terms = b""
        self._task: Task | None = None
        self._opened: tuple[str, bool] | None = None  # the run that its clients know, and whether its plan has memory
        self._members: tuple[wire.Leaf, ...] | None = None  # of the last report
        self._refused: dict[str, str] = {}  # the codes of clients that take no part, by name
        self._forms: dict[str, tuple[Plan, MessageForm]] = {}
        self._gatherings: dict[bytes, Gathering] = {}  # those of this start that have not ended, by the root's work
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._drained = False
        self.net = listener_of(home, spec, Limits(window=spec.window))  # its root gives the other limits
        self.net.coordinator.below_relay = True
        self.net.awaited = self._awaited
        self._thread = threading.Thread(target=self._take_all, name="atoll-relay", daemon=True)

    def open_chain(self, root: Path) -> None:
        """Read the partials that the root has not committed. A further token of the root ends them."""
        self.chain: RelayChain = RelayChain.open(root)  # type: ignore[assignment]
        self.chain.on_settled, self.chain.on_dropped = self._settled, self._dropped

    def start(self) -> str:
        """Listen for clients. Returns the address."""
        address = listen(self.net, self.home, self.spec)
        self._thread.start()
        return address

    # the thread of the site

    def absence(self) -> None:
        """A relay has no rule that keeps it away."""
        return

    def record(self, work: wire.Work, body: bytes) -> None:
        """A relay keeps no ledger: its database records what was settled."""

    def kept_version(self, work: wire.Work) -> None:
        """A relay keeps no model version."""
        return

    def has_base(self, work: wire.Work) -> bool:
        """A relay reads whole versions."""
        return False

    def own_model(self, data: bytes) -> bytes:
        """Keep the final model for the clients."""
        self.final = data
        return data

    def enter(self, client: int, run: str, terms: bytes, seat: wire.Seat | None) -> None:
        """Take part in a run: report the clients.

        Raises:
            RefusedError: a name of the terms is unknown here.
        """
        self._check()
        self.chain.begin(run)
        if terms != self._terms:
            self._task, self._forms = Terms.decode(terms).task(HOST, self._own), {}
        with self._changed:
            self._number, self._run, self._terms, self._seat, self._members = client, run, terms, seat, None
        self._report()

    def number(self, numbers: wire.Numbers) -> None:
        """Give the clients their numbers, and open the run for them."""
        given = {place.name: place.client for place in numbers.places if place.client < wire.RELAYS}
        self.home.database.renumber(given)
        known = {client.name: client.id for client in self.home.database.clients()}
        waiting = {known[place.name]: place for place in numbers.places if place.code and place.name in known}
        self.net.handle(events.Placed(numbers, waiting))
        for place in waiting.values():
            if self._refused.get(place.name) != place.code:
                facts = {"client": known[place.name], "code": place.code, "reason": numbers.rules.refusal(place)}
                self.notify({"event": "refused", **facts})
        self._refused = {place.name: place.code for place in waiting.values()}
        if self._opened != (self._run, bool(numbers.memory)):
            self._opened = self._run, bool(numbers.memory)
            self._open_run()

    def compute(
        self,
        work: wire.Work,
        model: bytes,
        fixed: bytes | None,
        on_step: OnStep | None = None,
        starts: tuple[wire.Start, ...] = (),
    ) -> Prepared:
        """Gather the contributions of clients, or return the prepared partial of the same work.

        Args:
            work: the work.
            model: the safetensors bytes of the model version.
            fixed: the safetensors bytes of frozen tensors.
            on_step: is called while clients are awaited.
            starts: the clients.
        Raises:
            RefusedError: the relay cannot gather this work.
        """
        try:
            plan, form = self._checked(work, model, starts)
            known = self.chain.find(work.work)
            if known is not None:
                return known
            self._end_earlier(work)
            gathering = self._begin(work, model, fixed, starts, plan, form)
            if not self._wait(gathering, on_step):
                return Prepared(work.work, None, b"", {})
            body = gathering.body(required(self._task, "task"))
            if work.kind != "round":
                with self._changed:
                    del self._gatherings[work.work]
        except RefusedError:
            raise
        except UsageError as error:
            self._withdraw(work.work)
            raise RefusedError("part", error.given, error.required, error.why, error.write) from error
        return self._prepared(work, gathering, body)

    def _prepared(self, work: wire.Work, gathering: Gathering, body: bytes) -> Prepared:
        """Write the partial, and which clients are in it."""
        if work.kind != "round":
            one = Prepared(work.work, None, body, {})
            self.chain.prepare(one)
            return one
        clients = msgspec.msgpack.encode((work.round, gathering.accepted))
        packed = torch.frombuffer(bytearray(clients), dtype=torch.uint8)
        _, after = self.chain.next_memory({})
        has_memory = required(self._opened, "run")[1]
        one = Prepared(work.work, after if has_memory else None, body, {"clients": packed})
        self.chain.prepare(one, secret=True)
        failpoint("relay.prepared")
        return one

    def _checked(self, work: wire.Work, model: bytes, starts: tuple[wire.Start, ...]) -> tuple[Plan, MessageForm]:
        """The plan of a work that this relay may gather, and the form of the messages of its clients."""
        self._check()
        task = required(self._task, "task")
        if not starts or work.sum is not None:
            raise RefusedError("part", "The work is for a client.", "work for clients of this relay.")
        start = self._number, work.version, work.repeat
        name = wire.work_id(self._run, work.kind, *start, work.plan, wire.digest(model))
        if wire.gather_id(name, starts) != work.work or work.input != wire.digest(self._terms):
            raise RefusedError("changed", "The name of the work is not that of its content.", "work of this run.")
        if layout_hash(task.layout) != work.layout:
            raise RefusedError("layout", "The model has another layout at this relay.", "that of the server.")
        if work.plan not in self._forms:
            plan = bind_codecs(read_plan(work.plan, self._own), task.layout)
            self._forms[work.plan] = plan, MessageForm.of(plan, task)
        plan, form = self._forms[work.plan]
        check_additive(plan)
        return plan, form

    def _begin(
        self,
        work: wire.Work,
        model: bytes,
        fixed: bytes | None,
        starts: tuple[wire.Start, ...],
        plan: Plan,
        form: MessageForm,
    ) -> Gathering:
        """Assign the works of the clients."""
        hash, net = wire.digest(model), self.net
        sent: Any = model if len(model) <= wire.MAX_INLINE else net.offer(model)
        frozen = None if fixed is None else net.offer(fixed)
        blobs = {blob.hash for blob in (sent, frozen) if isinstance(blob, wire.Blob)}
        net.keep_blobs(blobs | {work.input})
        rows = {client.id: client.rows or 0 for client in self.home.database.clients()}
        names = {
            wire.work_id(self._run, work.kind, one.client, work.version, one.repeat, work.plan, hash): one
            for one in starts
        }
        gathering = Gathering(work, names, plan, form, rows)
        for name, one in names.items():
            if not rows.get(one.client):
                gathering.lose(name, "rows", f"Client {one.client} is no client of this relay with rows.")
        with self._changed:
            self._gatherings[work.work] = gathering
        assigned = [
            events.Assigned(
                one.client,
                msgspec.structs.replace(
                    work, work=name, repeat=one.repeat, model=sent, fixed=frozen, lease=wire.Lease(0, 0), deadline=None
                ),
                form.shortest,
                form.longest,
            )
            for name, one in names.items()
            if name in gathering.open
        ]
        net.handle(*assigned)
        return gathering

    def _end_earlier(self, work: wire.Work) -> None:
        """Drop the partials of earlier rounds that are not settled: the root has ended these rounds without them."""
        if work.kind != "round" or self.chain.is_settling:
            return
        for one in self.chain.prepared:
            if _accepted_of(one)[0] < work.round:
                return self.chain.drop(one.work)  # and those after it

    def _wait(self, gathering: Gathering, on_step: OnStep | None) -> bool:
        """Wait for the ends of all works. False: the root no longer waits, and the works are withdrawn."""
        while True:
            with self._changed:
                self._check()
                if not gathering.open:
                    return True
                self._changed.wait(_WAIT_S)
            if on_step is not None:
                on_step(0, len(gathering.starts) - len(gathering.open), 0.0)
            if not self._run or self.is_withdrawn(gathering.work.work):
                self._withdraw(gathering.work.work)
                return False

    def _withdraw(self, work: bytes) -> None:
        """End a gathering that the root does not use. Its clients go back to the memory before it."""
        with self._changed:
            gathering = self._gatherings.pop(work, None)
        if gathering is not None:
            self.net.handle(events.Withdrawn(tuple(gathering.starts), undone=True))

    def _settled(self, one: Prepared) -> None:
        """The root has committed a partial: record it, and settle the clients."""
        (_, accepted), has_memory = _accepted_of(one), self._opened is None or self._opened[1]
        if has_memory and accepted:  # after a start, the root can settle before the run is entered
            self.home.database.settle(required(self.chain.run, "run"), accepted[0].version, accepted)
        with self._changed:
            gathering = self._gatherings.pop(one.work, None)
        if gathering is not None:
            self.net.handle(events.Committed(tuple(each.work for each in accepted)))
        elif self._opened is not None:
            self._open_run()  # they were gathered by a former start; clients that are here learn of the commit

    def _dropped(self, one: Prepared) -> None:
        self._withdraw(one.work)

    def _open_run(self) -> None:
        """Open the run for the clients, with their numbers and rows."""
        run, has_memory = required(self._opened, "run")
        for work in list(self._gatherings):
            self._withdraw(work)
        database, blob = self.home.database, self.net.offer(self._terms)
        known = {c.id: (c.rows, c.held or 0) for c in database.clients() if c.rows and c.input == blob.hash}
        recent = database.recent(run) if has_memory else {}
        self.net.handle(events.RunOpened(run, blob, True, has_memory, self._seat, recent, known))

    def _report(self) -> None:
        """Send the root the names and the rows of the clients, if they have changed."""
        with self._changed:
            if not self._run:
                return
            input = wire.digest(self._terms)
            clients = [client for client in self.home.database.clients() if client.state != "revoked"]
            ours = sorted(clients, key=lambda client: client.id)
            members = tuple(
                wire.Leaf(c.name, *((c.rows, c.held or 0) if c.rows and c.input == input else (None, 0)))
                for c in ours[: wire.MAX_LEAVES]
            )
            if members == self._members:
                return
            self._members = members
            self.post(wire.Members(input, members))

    def _check(self) -> None:
        """Raise the error that has ended the thread of the clients."""
        if self._failure is not None:
            raise self._failure

    # the thread of the clients

    def _take_all(self) -> None:
        """Carry out the actions of the coordinator until `close`."""
        try:
            while True:
                try:
                    first = self.net.inbox.get(timeout=_WAIT_S)
                except queue.Empty:
                    self._report()
                    continue
                if first is None:
                    return
                for action in (first, *drained(self.net.inbox)):
                    self._act(action)
                with self._changed:
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _act(self, action: Any) -> None:
        match action:
            case events.Deliver(work=work):
                with self._changed:
                    mine = self._gathering_of(work)
                    good = mine is not None and mine.take(action)
                    # Before the lock is released: the partial can be committed as soon as it is complete.
                    self.net.handle((events.Folded if good else events.Rejected)(work))
            case events.Failed(work=work, code=code, reason=reason, client=client):
                self.notify({"event": "lost", "client": client, "code": code, "reason": reason})
                with self._changed:
                    if (lost := self._gathering_of(work)) is not None:
                        lost.lose(work, code, reason)
            case events.Present(client=client, rows=rows, held=held):
                self.home.database.record_rows(client, rows, held, wire.digest(self._terms))
                self.notify({"event": "present", "client": client, "rows": rows})
                self._report()
            case events.Gone(client=client):
                self.notify({"event": "gone", "client": client})
            case events.Refused(client=client, code=code, reason=reason):
                self.notify({"event": "refused", "client": client, "code": code, "reason": reason})
                self.post(wire.Refusal(None, code, f"Client {client}: {reason}"[:2000]))  # type: ignore[arg-type]
            case events.Forget(client=client):
                self.home.database.forget_memory(client)
            case events.Drained():
                with self._changed:
                    self._drained = True
            case BaseException():
                raise action
            case _:
                pass

    def _gathering_of(self, work: bytes) -> Gathering | None:
        """The gathering that awaits the work of a client."""
        return next((one for one in self._gatherings.values() if work in one.open), None)

    def _awaited(self) -> tuple[int, ...]:
        """The clients that are awaited, for `atoll status`."""
        return tuple(
            sorted(one.starts[work].client for one in list(self._gatherings.values()) for work in set(one.open))
        )

    # the end

    def finish(self, code: wire.ByeCode, reason: str, retry_s: float = 5.0) -> None:
        """Send the present clients the end of the run, with the final model, and wait until they have left."""
        blob = None if self.final is None else self.net.offer(self.final)
        with self._changed:
            self._drained, self._opened, self._run = False, None, ""
            self._gatherings.clear()
        self.net.handle(events.Closing(wire.Bye(code, reason, retry_s, blob), self.spec.drain))
        until = time.monotonic() + self.spec.drain
        with self._changed:
            self._changed.wait_for(
                lambda: self._drained or self._failure is not None, max(0.0, until - time.monotonic())
            )
        self.final = None

    def close(self) -> None:
        """End the event loop and close the database."""
        ended = self.net.stop()
        self.net.inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(10)
        if ended:
            self.home.close()
