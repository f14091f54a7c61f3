"""The state and the computation of a client at its site, without sockets.

    home/key.pem certificate.pem ca.pem site.json      the identity, and the server
    home/memory                                        client state after its last settled work
    home/prepared/NUMBER-WORK                          messages that no committed round contains yet, in order
    home/ledger.jsonl ledger.head                      every message that was sent; `atoll.net.ledger`
    home/identity.pem                                  the key that names the site in secure sums
    home/sums.json                                     the last secure sum of each run in which the site took part
    home/data.json                                     the run of the rows, and their fingerprint
    home/runs/                                         the final models

A prepared message and its next memory are one file, which is written and synced before the message is sent. `settle`
replaces the memory and then deletes the file; after a crash between the two the start deletes it. A plan without client
memory writes neither: the same work gives the same bytes. If the client adds noise, its message is written in any case:
a second message with other noise would be another release.

Tests: tests/faults/test_site.py
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from atoll.base.entropy import SECRET_BYTES
from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.files import atomic_write
from atoll.base.random import Key, user_modes
from atoll.base.validation import required
from atoll.compute.batches import OnStep
from atoll.compute.model_state import Model, split_of
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.choose_backend import choose
from atoll.engine.contribution import encode_contribution, lift_message
from atoll.engine.inprocess import threads_for
from atoll.net.coordinator import NO_DIGEST
from atoll.net.identity import own_identity
from atoll.net.ledger import SiteLedger
from atoll.net.policy import Policy, contribution_name
from atoll.net.secure import SiteSum, agreement_of
from atoll.net.tensors import tensor_bytes
from atoll.net.terms import Own, RefusedError, Terms, bind_codecs, layout_hash, read_plan
from atoll.net.wire import (
    Blob,
    FrameError,
    LeaveCode,
    Numbers,
    Place,
    Seat,
    Start,
    Work,
    chain_link,
    digest,
    tensor_table,
    work_id,
)
from atoll.plan.aggregate import Mean
from atoll.plan.codec.privacy import noises_messages
from atoll.plan.codec.stage import Identity
from atoll.plan.form import MessageError
from atoll.plan.local import Evaluate, Gradient, Moments
from atoll.plan.message import MessageForm
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Ids, Tensors
from atoll.plan.round import SumLimits, apply_deltas, secured
from atoll.plan.state import part_of, round_key, unpack_broadcast
from atoll.secure.client import SumClient, Words
from atoll.secure.refusals import SessionError

_NO_SHARED: Mapping[str, Tensors] = {"local": {}, "codec": {}}
_LIGHT = 8  # messages that stay in memory if the plan has no client memory
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64}
Loader = Callable[[Terms, Seat | None, int], Clients]


class Prepared(NamedTuple):
    """A message that no committed round contains yet.

    Args:
        work: the work.
        after: the `chain_link` of the memory that it started from; None for the first memory.
        body: the bytes of the message, before they are masked.
        memory: the client memory after this work, tensors `[1, …]`.
        masked: whether only its masked words are sent, in a secure sum.
    """

    work: bytes
    after: bytes | None
    body: bytes
    memory: Tensors
    masked: bool = False

    @property
    def link(self) -> bytes:
        """The name of the memory after this work."""
        return chain_link(self.after, self.work, NO_DIGEST if self.masked else digest(self.body))


class _Kept(NamedTuple):
    """A model version that a site keeps: the number of its round, its hash, and its safetensors bytes."""

    number: int
    hash: bytes
    data: bytes


@dataclass
class MemoryChain:
    """The client memory of one site, and the messages that are prepared on top of it.

    Args:
        home: the folder of the site.
    """

    home: Path
    run: str | None = None
    settled: bytes | None = None
    link: bytes | None = None
    number: int = 0
    memory: Tensors = field(default_factory=dict)
    prepared: list[Prepared] = field(default_factory=list)
    light: dict[bytes, Prepared] = field(default_factory=dict)  # of plans without client memory

    @classmethod
    def open(cls, home: Path) -> MemoryChain:
        """Read the memory and the prepared messages of a site."""
        it = cls(home)
        (home / "prepared").mkdir(mode=0o700, exist_ok=True)
        if (home / "memory").exists():
            facts, it.memory = _read(home / "memory")
            it.run, it.number = facts["run"], facts["number"]
            it.settled, it.link = bytes.fromhex(facts["work"]), bytes.fromhex(facts["link"])
        for path in sorted((home / "prepared").iterdir()):
            if path.suffix == ".new" or int(path.name.partition("-")[0]) <= it.number:
                path.unlink()  # an incomplete file, or one whose memory is settled
                continue
            facts, tensors = _read(path)
            after = bytes.fromhex(facts["after"]) if facts["after"] else None
            body = tensors.pop("body").numpy().tobytes()
            it.prepared.append(
                Prepared(bytes.fromhex(facts["work"]), after, body, _under(tensors), facts.get("masked", False))
            )
            it.run = facts["run"]
        return it

    def begin(self, run: str) -> None:
        """Begin another run: the memory and the messages of the former one end."""
        if run == self.run:
            return
        for path in sorted((self.home / "prepared").iterdir(), reverse=True):
            path.unlink()
        (self.home / "memory").unlink(missing_ok=True)
        self.run, self.settled, self.link, self.number = run, None, None, 0
        self.memory, self.prepared, self.light = {}, [], {}

    def find(self, work: bytes) -> Prepared | None:
        """The prepared message of this work, if there is one."""
        return self.light.get(work) or next((one for one in self.prepared if one.work == work), None)

    def next_memory(self, first: Tensors) -> tuple[Tensors, bytes | None]:
        """The client memory from which the next work starts, and its name, a `chain_link`.

        Args:
            first: the memory before the first round, tensors `[…]`.
        """
        if self.prepared:
            return self.prepared[-1].memory, self.prepared[-1].link
        if self.memory:
            return self.memory, self.link
        return {name: t[None] for name, t in first.items()}, None

    def prepare(self, one: Prepared, secret: bool = False) -> None:
        """Write a message and its next memory. They are on disk when the method returns, if the plan has memory.

        Args:
            one: the message.
            secret: whether it follows from a secret, so that the same work would give other bytes.
        """
        if not one.memory and not secret:
            self.light[one.work] = one
            for old in list(self.light)[:-_LIGHT]:
                del self.light[old]
            return
        facts: dict[str, Any] = {"run": self.run, "work": one.work.hex(), "after": one.after.hex() if one.after else ""}
        facts |= {"masked": True} if one.masked else {}
        body = torch.frombuffer(bytearray(one.body), dtype=torch.uint8)
        tensors = {"body": body, **{f"memory/{n}": t for n, t in one.memory.items()}}
        _write(self._path(self.number + len(self.prepared) + 1, one.work), facts, tensors)
        self.prepared.append(one)

    def continue_attempt(self, work: bytes, earlier: Iterable[bytes]) -> None:
        """Let the message of an earlier attempt be that of this work. All others end: their rounds ended without them.

        Args:
            work: the work of a secure sum.
            earlier: the works of the same contribution in earlier attempts.
        """
        if self.find(work) is not None:
            return
        known = next((one for one in map(self.find, earlier) if one is not None), None)
        if self.prepared:
            self.drop(self.prepared[0].work)
        self.light.clear()
        if known is not None:
            self.prepare(known._replace(work=work))

    def settle(self, works: tuple[bytes, ...]) -> None:
        """Replace the memory by that of the last committed work, and delete the messages up to it."""
        for work in works:
            self.light.pop(work, None)
        known = [i for i, one in enumerate(self.prepared) if one.work in works]
        if not known:
            return
        count = known[-1] + 1
        done, self.prepared = self.prepared[:count], self.prepared[count:]
        last, first = done[-1], self.number + 1
        self.number += count
        self.settled, self.link, self.memory = last.work, last.link, last.memory
        facts = {"run": self.run, "work": last.work.hex(), "link": last.link.hex(), "number": self.number}
        _write(self.home / "memory", facts, self.memory)
        for i, one in enumerate(done):
            self._path(first + i, one.work).unlink(missing_ok=True)

    def drop(self, work: bytes) -> None:
        """Forget the message of a work that was refused or lost, and all messages after it."""
        self.light.pop(work, None)
        at = next((i for i, one in enumerate(self.prepared) if one.work == work), None)
        if at is None:
            return
        lost, self.prepared = self.prepared[at:], self.prepared[:at]
        for i, one in reversed(list(enumerate(lost))):
            self._path(self.number + at + i + 1, one.work).unlink(missing_ok=True)

    def drop_continued(self, work: bytes) -> None:
        """Forget a message that continues a lost one, the lost one, and all messages after it.

        A server with noise that is killed draws another cohort: the message of the lost round is then never committed.
        """
        at = next((i for i, one in enumerate(self.prepared) if one.work == work), None)
        self.drop(work if at is None else self.prepared[max(0, at - 1)].work)

    def _path(self, number: int, work: bytes) -> Path:
        return self.home / "prepared" / f"{number:012d}-{work.hex()}"


class Site:
    """Computes the work of one client.

    Args:
        home: the folder of the site.
        load: returns the rows of the client, for the terms of a run, its seat and its number. The client has this
            number in the rows.
        own: the site's own code by name.
        device: the device of the site.
        policy: the limits of the site.
    """

    def __init__(self, home: Path, load: Loader, own: Own, device: torch.device, policy: Policy = Policy()) -> None:
        self.home, self._load, self._own, self._device, self.policy = home, load, own, device, policy
        self._rows_facts: dict[str, str] = {}  # the run, and the fingerprint of the rows
        self._rows_fixed = False  # whether data.json has them
        self._hashes = b"", b""  # of the terms and of the layout
        self._sent: Counter[str] = Counter()  # bytes by day of UTC
        self._made: defaultdict[str, dict[str, int | str]] = defaultdict(dict)  # by run and work: `contribution_name`
        self._ledger = SiteLedger(home)
        for row in self._ledger.rows:
            self._count(row)
        self._ledger.rows.clear()
        self.chain = MemoryChain.open(home)
        self.client = -1
        self.terms: Terms | None = None
        self.data: Clients | None = None
        self._task: Task | None = None
        self._tasks: dict[tuple[str, str], Task] = {}
        self._plans: dict[str, tuple[Plan, MessageForm, Tensors]] = {}
        self._version: _Kept | None = None

    def enter(self, client: int, run: str, terms: bytes, seat: Seat | None) -> tuple[int, int]:
        """Take part in a run. Returns the numbers of train rows and of held-out rows.

        Raises:
            RefusedError: the site's code or data do not fit the terms.
        """
        fresh = run != self.chain.run
        self.chain.begin(run)
        found = Terms.decode(terms)
        if fresh or self.terms != found or self.client != client:
            self._task, self._tasks, self._plans = found.task(self._device, self._own), {}, {}
            try:
                data = self._load(found, seat, client)
            except RefusedError:
                raise
            except Exception as error:
                public = "The data of the site cannot be read."
                raise RefusedError("data", f"The data cannot be read: {error}", public=public) from error
            self._check(run, found, data, client)
            self.terms, self.data, self.client = found, data, client
            self._hashes = digest(found.encode()), layout_hash(self._task.layout)
        rows = required(self.data, "data")
        kept = rows.held_out is None or not self.policy.sends_values
        return int(rows.sizes[client]), 0 if kept else len(required(rows.held_out, "held-out rows"))

    def _check(self, run: str, terms: Terms, data: Clients, client: int) -> None:
        """Refuse a client with too few rows, and other rows than those with which it began the run."""
        rows, path = int(data.sizes[client]), self.home / "data.json"
        self.policy.check_run(terms.model, rows)
        if rows < terms.min_rows:
            raise RefusedError("rows", f"The data has {rows} train rows.", f"at least {terms.min_rows}.")
        facts = {"run": run, "fingerprint": data.fingerprint()}
        before = json.loads(path.read_bytes()) if path.exists() else {}
        if before.get("run") == run and before != facts:
            raise RefusedError(
                "changed",
                "The rows of this site differ from those with which it began the run.",
                "the same rows until the run ends.",
                "the work of earlier rounds belongs to these rows.",
            )
        self._rows_facts, self._rows_fixed = facts, False

    def fix_rows(self) -> None:
        """Record the rows of the run, before the first work."""
        if self._rows_fixed:
            return
        content, path = json.dumps(self._rows_facts).encode(), self.home / "data.json"
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, content, 0o600)
        self._rows_fixed = True

    def number(self, numbers: Numbers) -> Place:
        """The own place, if the relay of this site reports that the run has none for it.

        Raises:
            RunError: it numbers other clients: a site has none.
        """
        if len(numbers.places) != 1 or not numbers.places[0].code:
            raise RunError("The server numbers the clients of this site.", "a message for a relay.")
        return numbers.places[0]

    def compute(
        self,
        work: Work,
        model: bytes,
        fixed: bytes | None,
        on_step: OnStep | None = None,
        starts: tuple[Start, ...] = (),
    ) -> Prepared:
        """Compute a piece of work, or return the prepared message of the same work.

        Args:
            work: the work.
            model: the safetensors bytes of the model version.
            fixed: the safetensors bytes of frozen tensors.
            on_step: is called after each step.
            starts: empty; a site is no relay.
        Raises:
            RefusedError: the site does not compute this work; the code names the reason.
        """
        if starts:
            raise RefusedError("part", "The work is for clients of a relay.", "work for this client.")
        try:
            plan = self._checked(work, model)  # also of a message that is prepared: the server sends the work again
            self._keep_version(work, plan, model)
            if work.sum is not None:
                earlier = [self._name(work, model, n) for n in range(min(work.attempt, self.policy.max_attempts))]
                self.chain.continue_attempt(work.work, earlier)
            known = self.chain.find(work.work)
            if known is not None:
                return known
            self.fix_rows()
            with user_modes():
                return self._computed(work, plan, model, fixed, on_step)
        except RefusedError:
            raise
        except MemoryError as error:
            raise RefusedError("memory", f"The memory of this machine is full: {error}.") from error
        except OSError as error:
            raise RefusedError("disk", f"A file of the home could not be written: {error.strerror}.") from error
        except AtollError as error:
            raise RefusedError("failed", error.given.rstrip(".")) from error
        except Exception as error:
            raise RefusedError("failed", f"{type(error).__name__}: {error}") from error

    def _checked(self, work: Work, model: bytes) -> Plan:
        """The plan of a work that this site may compute and send.

        Raises:
            RefusedError: it may not.
        """
        terms = required(self.terms, "terms")
        if self._name(work, model, work.attempt) != work.work or work.input != self._hashes[0]:
            raise RefusedError("changed", "The name of the work is not that of its content.", "the work of this run.")
        if self._hashes[1] != work.layout:
            raise RefusedError(
                "layout",
                f"The model {terms.model!r} has another layout at this site.",
                "the names, shapes and dtypes of the server's model.",
                "θ is read by name and shape.",
            )
        plan = self._plan(work)[0]
        check_kind(work, plan)
        self.policy.check_work(work, plan, terms.clients, self._made[self.chain.run or ""])
        self._check_sum(work, plan)
        return plan

    def _computed(self, work: Work, plan: Plan, model: bytes, fixed: bytes | None, on_step: OnStep | None) -> Prepared:
        whole = required(self._task, "task")
        _, form, first = self._plan(work)
        plan = _unmasked(plan)
        task = whole if work.kind == "moments" else self._prepared_task(work, plan)  # no model runs on unscaled rows
        tensors = {**self._tensors(model), **({} if fixed is None else self._tensors(fixed))}
        broadcast = unpack_broadcast(work.version, tensors)
        layout = plan.local.server_layout(task.layout)
        if broadcast.model.theta.shape != (layout.d,) or broadcast.model.theta.dtype != layout.dtype:
            raise RefusedError("layout", "The model version has another length.", f"{layout.d} numbers.")
        ids = Ids(torch.tensor([self.client]), torch.tensor([work.repeat]))
        # The server learns no secret of a site: the noise protects the message from the server.
        secret = os.urandom(SECRET_BYTES) if noises_messages(plan.codec) else b""
        key = Key(int(work.key.seed), tuple(work.key.path), None, secret)
        # An evaluation of the models of sites reads the memory, and prepares none.
        memory, after = self.chain.next_memory(first) if work.kind == "round" or first else ({}, None)
        data = self._rows(work)
        with threads_for(task, 1, plan):
            _, message, rows = encode_contribution(plan, task, data, broadcast, ids, key, memory, on_step)
        rows = {n: t.cpu() for n, t in rows.items()}
        body, masked = form.to_bytes(message)[0], work.sum is not None
        one = Prepared(work.work, after if rows else None, body, rows, masked)
        self.chain.prepare(one, bool(secret))
        return one

    def kept_version(self, work: Work) -> bytes | None:
        """The model version of a work, if it is the one that this site has kept."""
        kept = self._version
        return kept.data if kept is not None and isinstance(work.model, Blob) and kept.hash == work.model.hash else None

    def has_base(self, work: Work) -> bool:
        """Whether the deltas of a work lead from the version that this site has kept."""
        kept, model = self._version, work.model
        size = sum(one.length if isinstance(one, Blob) else len(one) for one in work.deltas)
        if not size or kept is None or not isinstance(model, Blob) or size > model.length:
            return False  # deltas that are longer than the version would only occupy memory
        return kept.number == work.version - len(work.deltas)

    def next_version(self, work: Work, deltas: Sequence[bytes], rest: bytes) -> bytes | None:
        """The model version of a work from the kept one, the downlink messages and the other tensors.

        Returns:
            The safetensors bytes. None if their hash is not that of the server, as on another kind of processor: the
            site then reads the whole version.
        """
        kept = required(self._version, "kept version")
        try:
            plan, rounds = self._plan(work)[0], range(kept.number + 1, work.version + 1)
            keys = (round_key(int(work.key.seed), number) for number in rounds)
            theta = apply_deltas(plan, load(kept.data)["theta"], deltas, keys)
            data = tensor_bytes({**load(rest), "theta": theta})
        except Exception:  # also of a codec of the site's own code
            return None
        return data if isinstance(work.model, Blob) and digest(data) == work.model.hash else None

    def _keep_version(self, work: Work, plan: Plan, model: bytes) -> None:
        """Keep the version of the latest round for the deltas that follow, if the downlink is compressed."""
        if work.kind == "round" and plan.downlink != Identity():
            self._version = _Kept(work.version, digest(model), model)

    def _name(self, work: Work, model: bytes, attempt: int) -> bytes:
        """The name of a work, or of an earlier attempt of it."""
        start = self.client, work.version, work.repeat
        return work_id(self.chain.run or "", work.kind, *start, work.plan, digest(model), attempt)

    def _check_sum(self, work: Work, plan: Plan) -> None:
        """Refuse a work that asks for the update of a plan whose sum is secure, or to mask another one."""
        if (work.kind == "round" and plan.aggregator.secure is not None) != (work.sum is not None):
            raise RefusedError(
                "session",
                f"The work is {'' if work.sum else 'not '}masked, and the plan has {plan.aggregator!r}.",
                "a masked contribution if, and only if, the sum of the plan is secure.",
            )

    def open_sum(self, work: Work, model: bytes) -> SiteSum:
        """Take part in the secure sum of a work whose contribution is prepared.

        Args:
            work: the work.
            model: the safetensors bytes of the model version.
        Raises:
            RefusedError: the site took part in this attempt, or its contribution is not finite.
        """
        plan, form, _ = self._plan(work)
        task, terms = required(self._task, "task"), required(work.sum, "terms of the sum")
        one = required(self.chain.find(work.work), "contribution")
        key = own_identity(self.home / "identity.pem")
        fingerprint, listed = key.public_key().public_bytes_raw(), self.policy.accepted()
        try:
            rule = secured(plan, task, SumLimits(terms.clients, terms.weight, terms.rows))
            agreement = agreement_of(self.chain.run or "", work, digest(model), replace(plan, aggregator=rule), task)
            client = SumClient(
                agreement,
                key,
                fingerprint,
                lambda other: other if listed is None or other in listed or other == fingerprint else None,
                self.policy.floors,
                self._last_sum(),
            )
            with user_modes():
                words = self._words(work, rule, form, one)
        except SessionError as error:
            raise RefusedError("session", f"{error.reason}: {error.given}", error.required) from error
        except (MessageError, UsageError) as error:
            raise RefusedError("failed", error.given, error.required) from error
        self._take_sum(work, client.taken)
        return SiteSum(work, client, words, lambda: self._take_sum(work, client.taken), one.after)

    def _words(self, work: Work, rule: Any, form: MessageForm, one: Prepared) -> tuple[Words, int]:
        """The words of a prepared contribution, and its weight."""
        ids = Ids(torch.tensor([self.client]), torch.tensor([work.repeat]))
        key = Key(int(work.key.seed), tuple(work.key.path)).starts(ids.client, ids.repeat).fold("codec")
        key = key.fold("attempt", work.attempt) if work.attempt else key
        message = form.from_bytes([one.body])
        weights = rule.weigh(ids.client, message.rest.weight)
        if int(weights[0]) > required(work.sum, "terms of the sum").weight:
            raise RefusedError("session", f"The weight of this site is above {work.sum}.")
        words = rule.words(lift_message(rule, message, key), weights)
        return {name: vector[0] for name, vector in words.items()}, int(weights[0])

    def _last_sum(self) -> tuple[int, int]:
        """The round and attempt below which this site takes part in no further sum of the run."""
        round, attempt = self._sums().get(self.chain.run or "", (-1, -1))
        return round, attempt

    def _sums(self) -> dict[str, tuple[int, int]]:
        """The last round and attempt of each run in whose sums this site took part. None is forgotten: a server that
        repeats a round with other clients would learn a difference of two sums."""
        path = self.home / "sums.json"
        return {run: tuple(last) for run, last in json.loads(path.read_bytes()).items()} if path.exists() else {}

    def _take_sum(self, work: Work, taken: tuple[int, int]) -> None:
        """Write that this site takes part in a sum, before a message leaves it."""
        facts = {**self._sums(), self.chain.run or "": taken}
        atomic_write(self.home / "sums.json", json.dumps(facts).encode(), 0o600)

    def _rows(self, work: Work) -> Clients:
        """The rows of a work, under the number of the client."""
        data = required(self.data, "data")
        if work.rows == "train":
            return data
        if data.held_out is None:
            raise RefusedError("rows", "The site has no held-out rows.", "a work on train rows.")
        count = len(data.held_out)
        offsets = torch.zeros(self.client + 2, dtype=torch.int64)
        offsets[-1] = count
        order = torch.arange(count)
        return replace(data, rows=data.held_out, order=order, offsets=offsets, held_out=None, held_owner=None)

    def _plan(self, work: Work) -> tuple[Plan, MessageForm, Tensors]:
        """The plan of a work, the form of its messages, and the client memory before the first round.

        An own part begins with the first weights of the server, which the site draws by the seed of the run.
        """
        if work.plan not in self._plans:
            task = first = required(self._task, "task")
            plan = read_plan(work.plan, self._own)
            if plan.local.own:
                first = required(self.terms, "terms").task(self._device, self._own, int(work.key.seed))
            plan = bind_codecs(plan, task.layout)
            self._plans[work.plan] = plan, MessageForm.of(_unmasked(plan), task), plan.memory(first)
        return self._plans[work.plan]

    def own_model(self, data: bytes) -> bytes:
        """The final model of this site, of the safetensors bytes of the server's: with its own part, if it has one."""
        plan = next((p for p, _, _ in reversed(self._plans.values()) if p.local.trains_personal), None)
        if plan is None or not self.chain.memory:
            return data
        task = required(self._task, "task")
        theta, buffers, fixed = task.layout.flatten(load(data), task.first_tensors())
        counters = {e.name: fixed.pop(e.name) for e in task.layout.counters}
        server, layout = Model(theta, buffers, counters, fixed), plan.local.server_layout(task.layout)
        shared = split_of(task.layout, layout).shared(server) if plan.local.own else server
        model = plan.local.personal(shared, part_of(self.chain.memory, "local"), task).of(0)
        return save(task.layout.state_dict(model.theta, model.buffers, {**model.counters, **model.fixed}))

    def _prepared_task(self, work: Work, plan: Plan) -> Task:
        """The task with the backend of the work, after a test on the site's own rows."""
        key = work.plan, work.numerics
        if key not in self._tasks:
            own = self._rows(work).only(torch.tensor([self.client]))
            try:
                self._tasks[key] = choose(required(self._task, "task"), own, plan, work.numerics).task
            except AtollError as error:
                raise RefusedError("numerics", error.given, error.required, error.why, error.write) from error
        return self._tasks[key]

    def _tensors(self, data: bytes) -> dict[str, Tensor]:
        """The tensors of a model version; the table is checked before one is allocated."""
        try:
            table = tensor_table(data)
            if any(place.dtype not in _DTYPES for place in table.values()):
                raise RefusedError(
                    "layout", "The model version has a tensor of another dtype.", "numbers of the model."
                )
            return {n: t.to(self._device) for n, t in load(data).items()}
        except (FrameError, SafetensorError) as error:
            raise RefusedError("layout", f"The model version cannot be read: {error}.", "safetensors bytes.") from error

    def absence(self) -> tuple[LeaveCode, float] | None:
        """Why the policy keeps this site away now, and for how many seconds; None if it does not."""
        if self.policy.hours is None and self.policy.bytes_per_day is None:
            return None
        return self.policy.absence(datetime.now().astimezone(), self._sent[datetime.now(UTC).date().isoformat()])

    def try_step(self) -> dict[str, Any]:
        """Compute one gradient of the first model on the rows of the site, for `atoll join --check`."""
        terms, data, whole = required(self.terms, "terms"), required(self.data, "data"), required(self._task, "task")
        plan = bind_codecs(Plan(Gradient(), Mean()), whole.layout)
        task = choose(whole, data.only(torch.tensor([self.client])), plan, "auto").task
        ids, model = (
            Ids(torch.tensor([self.client]), torch.zeros(1, dtype=torch.int64)),
            Broadcast(0, task.start, _NO_SHARED),
        )
        with user_modes(), threads_for(task, 1, plan):
            sent, message, _ = encode_contribution(plan, task, data, model, ids, Key(0), {})
        body = MessageForm.of(plan, task).to_bytes(message)[0]
        return {
            "model": terms.model,
            "parameters": task.layout.d,
            "rows": int(data.sizes[self.client]),
            "held_out": 0 if data.held_out is None else len(data.held_out),
            "loss": float(sent.sums["loss"][0] / data.sizes[self.client]),
            "bytes": len(body),
            "vectors": [*sorted(MessageForm.of(plan, task).head.side), "update"],
        }

    def record(self, work: Work, body: bytes) -> None:
        """Write a message to the ledger, before it is sent.

        Raises:
            RunError: the ledger could not be written.
        """
        row: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": self.chain.run,
            "work": work.work.hex(),
            "kind": work.kind,
            "round": work.round,
            "version": work.version,
            "bytes": len(body),
            "sha256": digest(body).hex(),
            "plan": work.plan,
        }
        row |= {} if work.sum is None else {"attempt": work.attempt}
        self._ledger.append(row)
        self._count(row)

    def _count(self, row: Mapping[str, Any]) -> None:
        """Add a row of the ledger to what the rules of the policy count."""
        self._sent[row["time"][:10]] += row["bytes"]
        if row["kind"] == "round":
            name = contribution_name(row["work"], row["round"], "attempt" in row)
            self._made[row["run"] or ""][row["work"]] = name


def check_kind(work: Work, plan: Plan) -> None:
    """Refuse a work whose plan or rows are not those of its kind: the policy of a site has rules for each kind.

    Raises:
        RefusedError: the plan of an evaluation trains, or the rows are not those of the kind.
    """
    local, rows = {"evaluate": (Evaluate, "held"), "moments": (Moments, "train")}.get(work.kind, (None, "train"))
    only = local is None or (type(plan.local) is local and plan == Plan(plan.local, Mean()))
    if work.kind == "baseline" or work.rows != rows or not only:
        raise RefusedError(
            "part",
            f"A work of the kind {work.kind} on {work.rows} rows has the plan {plan!r:.100}.",
            f"{work.kind if local is None else f'the plan Plan({local.__name__}(…), Mean())'} on {rows} rows.",
        )


def _unmasked(plan: Plan) -> Plan:
    """The plan by which a site computes its contribution. Its words are made from it again in each attempt."""
    rule: Any = plan.aggregator
    return plan if rule.secure is None else replace(plan, aggregator=replace(rule, secure=None))


def _under(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("memory/"): t for n, t in tensors.items()}


def _write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write facts and tensors in one step: the length of the facts, the facts as JSON, safetensors bytes."""
    head = json.dumps(facts).encode()
    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    content = struct.pack("<I", len(head)) + head + save(plain)
    atomic_write(path, struct.pack("<I", 0) + digest(content) + content, 0o600)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        data = path.read_bytes()
        content = data[36:]
        if data[:4] != bytes(4) or digest(content) != data[4:36]:
            raise ValueError("the digest differs")
        (length,) = struct.unpack("<I", content[:4])
        return json.loads(content[4 : 4 + length]), load(content[4 + length :])
    except (ValueError, OSError, SafetensorError, struct.error) as error:
        raise RunError(
            f"The file {path} is damaged: {error}.",
            "the bytes that were written.",
            "without its client memory a site cannot continue; a new token for the same name begins again.",
        ) from None
