"""The two halves of a contribution: the client encodes it, the server decodes, checks and folds it.

In process both halves run one after the other, with no bytes between them. Over a network `atoll.plan.message` converts
the message to bytes and back.

Tests: tests/identities/test_chunks.py, tests/identities/test_message.py
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.compute.batches import HOST, ClientBatch, OnStep
from atoll.compute.task import Task
from atoll.compute.tensor_notes import drop
from atoll.data.clients import Clients
from atoll.plan.aggregate.exact import LARGEST, bounded
from atoll.plan.codec import AdaptiveClip, Clip, Identity, Noise
from atoll.plan.codec.privacy import leaves
from atoll.plan.conflicts import check_memory, check_partials, check_rows
from atoll.plan.message import Message, sizes_of
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Broadcast, Contribution, Ids, Tensors
from atoll.plan.round import Failure, Kept
from atoll.plan.state import part_of

_READ_ONLY = {Identity, Clip, AdaptiveClip, Noise}  # stages that never write into the tensor that they receive
IN_CODEC = "The codec raised this error while it encoded an update."


def encode_contribution(
    plan: Plan,
    task: Task,
    data: Clients,
    broadcast: Broadcast,
    ids: Ids,
    key: Key,
    memory: Tensors,
    on_step: OnStep | None = None,
    share: float = 1.0,
) -> tuple[Contribution, Message, dict[str, Tensor]]:
    """Train K clients and encode their updates: the client's half. This is a pure function.

    gᵢ = local(θ, dataᵢ) ;  mᵢ = encode(gᵢ)

    Args:
        plan: the algorithm, after `bind`.
        task: the model and loss; `task.numerics` names the backend.
        data: all clients.
        broadcast: the broadcast that these clients received. It contains one model for all lanes (θ `[d]`), or one
            model for each lane (θ `[K, d]`).
        ids: the K starts, clients with more rows first.
        key: the key of the round in which the clients started, `state.key(version)`.
        memory: the client state before the round, rows `[K, …]`; the keys are `part/name`.
        on_step: is called after each step with the lane, the number of the step and the mean loss of the lane's batch.
        share: the fraction of its steps that each client makes, in (0, 1].
    Returns:
        The contribution as the local part returned it, the messages of the K clients, and the client state after the
        round, rows `[K, …]`.
    Raises:
        UsageError: a tensor of the contribution or of the codec has no row for each client.
        Exception: the error of the client that failed. It does not name the client: run a chunk of one client.
    """
    far = task.device != HOST
    task.reset()
    memory = {n: t.to(task.device) for n, t in memory.items()} if far else memory
    key = key.starts(ids.client, ids.repeat)
    lanes = ClientBatch(data, ids.client, task.layout.dtype, share, task.device, on_step, key.fold("rows"))
    contribution, local = plan.local.contribute(
        broadcast, lanes, part_of(memory, "local"), key.fold("clients", "local"), task
    )
    start = len(ids.client), int(ids.client[0]), broadcast.round
    weight = {"weight": contribution.weight}
    for tensors in (contribution.means, contribution.sums, contribution.counters, weight):
        check_rows(plan.local, tensors, *start)
    check_memory(plan.local, part_of(memory, "local"), local, *start[1:])
    after = {f"local/{n}": t for n, t in local.items()}
    update = contribution.means.get("update")
    if update is None:
        return contribution, Message(None, {}, plan.aggregator.lift(contribution, key)), after
    key = key.fold("codec").to(task.device) if far else key.fold("codec")
    try:
        encoded = plan.codec.encode(update, part_of(memory, "codec"), broadcast.shared["codec"], key)
    except Exception as error:
        error.add_note(IN_CODEC)
        raise
    payload, side, sums, codec = encoded
    check_rows(plan.codec, sums, *start)
    check_memory(plan.codec, part_of(memory, "codec"), codec, *start[1:])
    after |= {f"codec/{n}": t for n, t in codec.items()}
    if plan.releases:  # only vectors that are clipped, and counts that are noised, may leave a client
        rest = Contribution({}, sums, torch.ones_like(contribution.weight), {}, {})
    else:
        rest = contribution._replace(means={n: t for n, t in contribution.means.items() if n != "update"})
        rest = rest._replace(sums={**contribution.sums, **sums}) if sums else rest
    if plan.aggregator.secure is not None:
        lifted = lift_message(plan.aggregator, Message(payload, side, rest), key)
        payload = lifted.means["update"]
        rest = lifted._replace(means={n: t for n, t in lifted.means.items() if n != "update"})
    return contribution, Message(payload, side, rest), after


def lift_message(rule: Aggregator, message: Message, key: Key) -> Contribution:
    """The contributions of K messages as a secure sum sends them.

    Args:
        rule: the aggregator, bound; it has a secure sum.
        message: the messages, with an update. Its codec has no decoding of single messages.
        key: the key of the codec for the K starts.
    """
    update = {} if message.payload is None else {"update": message.payload}
    return rule.lift(message.rest._replace(means={**update, **message.rest.means}), key)


def decode_contribution(plan: Plan, message: Message) -> Contribution:
    """Decode the messages of K clients: the server's half. The result of a message does not depend on the others.

    Args:
        plan: the algorithm, after `bind`.
        message: the messages of the K clients.
    """
    if message.payload is None:
        return message.rest
    update = plan.codec.decode(message.payload, message.side)
    if any(type(stage) not in _READ_ONLY for stage in leaves(plan.codec)):
        drop(update)
    return message.rest._replace(means={"update": update, **message.rest.means})


class Chunk(NamedTuple):
    """The results of K clients.

    Args:
        contribution: the contribution as the local part returned it.
        decoded: the contribution as the server receives it: its update was encoded, and each message was decoded.
        bytes: the length of each client's message in bytes, int64 `[K]`, in CPU memory.
        memory: the client state after the round, rows `[K, …]`; the keys are `part/name`.
    """

    contribution: Contribution
    decoded: Contribution
    bytes: Tensor
    memory: dict[str, Tensor]

    @classmethod
    def of(cls, plan: Plan, contribution: Contribution, message: Message, memory: dict[str, Tensor]) -> Chunk:
        """Decode the messages of K clients in the process that encoded them.

        Args:
            plan: the algorithm, after `bind`.
            contribution, message, memory: the result of `encode_contribution`.
        """
        decoded = decode_contribution(plan, message)
        return cls(contribution, decoded, sizes_of(plan, message).to(HOST), memory)


def contribute_chunk(
    plan: Plan,
    task: Task,
    data: Clients,
    broadcast: Broadcast,
    ids: Ids,
    key: Key,
    memory: Tensors,
    on_step: OnStep | None = None,
    share: float = 1.0,
) -> Chunk:
    """Train K clients, encode their updates, and decode each message: both halves in one process.

    The arguments and the errors are those of `encode_contribution`.
    """
    return Chunk.of(plan, *encode_contribution(plan, task, data, broadcast, ids, key, memory, on_step, share))


class Results(NamedTuple):
    """Results of running some clients: a partial sum for each model version, and the ids of the clients.

    Args:
        partials: the partial sums; the keys are model versions.
        failures: the contributions that were lost.
        errors: the exceptions that clients raised.
        arrived: the ids of accepted clients, one tensor int64 `[K]` for each chunk.
        facts: the columns of the report, one table for each chunk, with one row for each accepted client.
        memory: the new client state of accepted clients, one pair for each chunk: ids `[K]` and rows `[K, …]`.
        kept: the contributions that the caller asked for.
    """

    partials: dict[int, Any]
    failures: list[Failure]
    errors: list[Exception]
    arrived: list[Tensor]
    facts: list[Tensors]
    memory: list[tuple[Tensor, Tensors]]
    kept: list[Kept]

    @classmethod
    def empty(cls) -> Results:
        """Empty results, before any client has run."""
        return cls({}, [], [], [], [], [], [])

    def add(self, rule: Aggregator, other: Results) -> None:
        """Add the results of other clients, in place."""
        for version, partial in other.partials.items():
            mine = self.partials.get(version)
            if mine is not None:
                check_partials(rule, mine, partial)
                partial = rule.merge(mine, partial)
            self.partials[version] = partial
        self.failures.extend(other.failures)
        self.errors.extend(other.errors)
        self.arrived.extend(other.arrived)
        self.facts.extend(other.facts)
        self.memory.extend(other.memory)
        self.kept.extend(other.kept)


class Upload(NamedTuple):
    """What a chunk of K clients sends to a secure sum.

    Args:
        clients: the ids, int64 `[K]`.
        weights: the weights, int64 `[K]`.
        contribution: the numbers, rounded to the grid of the sum.
    """

    clients: Tensor
    weights: Tensor
    contribution: Contribution


class Fold:
    """Checks contributions, and folds those that are accepted into one partial sum for each model version.

    It needs neither data nor task.

    Args:
        plan: the algorithm, bound to the engine.
        now: the number of the open round.
        keep: the ids of the clients whose contributions are kept in the results.
        device: the device on which the sums are formed.
    """

    def __init__(self, plan: Plan, now: int, keep: Collection[int] = (), device: torch.device = HOST) -> None:
        self.plan, self.now, self.keep, self.device = plan, now, frozenset(keep), device
        self.results = Results.empty()
        self.sent: list[Upload] | None = None  # the accepted contributions, for a rehearsal of a secure sum

    def add(
        self,
        version: int,
        ids: Ids,
        down: Tensor,
        up: Tensor,
        decoded: Contribution,
        memory: Tensors = MappingProxyType({}),
        raw: Contribution | None = None,
    ) -> tuple[Ids, Tensors]:
        """Fold the contributions of K starts. A row that is not finite is recorded as a failure of its client.

        Args:
            version: the round whose model the clients started from.
            ids: the K starts.
            down, up: the bytes that the server sent to each client and received from it, int64 `[K]`.
            decoded: the contributions as the server receives them.
            memory: the client state after the round, rows `[K, …]`, if this process stores it.
            raw: the contributions before they were encoded, if some of them are kept; None: they are equal to
                `decoded`.
        Returns:
            The accepted starts, and their rows of the client state in CPU memory.
        """
        good = self._finite(version, ids.client, decoded)
        facts = {"bytes_up": up, "bytes_down": down}
        if self.plan.shows_clients:
            facts = {**decoded.per_client, "rows": decoded.weight, **facts}
        if self.plan.pace.asynchronous:
            facts["staleness"] = torch.full_like(ids.client, self.now - version)
        contribution = decoded._replace(per_client=facts)
        if good is not None:
            ids, contribution = ids.select(good), rows_of(contribution, good)
            memory = {n: t[good] for n, t in memory.items()}
        if not ids.client.shape[0]:
            return ids, {}
        if self.device != HOST:  # sums stay on the device; per-client values go to the host
            sums = {n: t.to(self.device) for n, t in contribution.sums.items()}
            facts = {n: t.to(HOST) for n, t in contribution.per_client.items()}
            memory = {n: t.to(HOST) for n, t in memory.items()}
            contribution = contribution._replace(sums=sums, weight=contribution.weight.to(HOST), per_client=facts)
        rule, partials = self.plan.aggregator, self.results.partials
        partial = partials.get(version)
        partials[version] = rule.fold(rule.zero() if partial is None else partial, contribution, ids)
        if self.sent is not None:
            self.sent.append(Upload(ids.client, rule.weigh(ids.client, contribution.weight), contribution))
        self.results.arrived.append(ids.client)
        self.results.facts.append(contribution.per_client)
        if self.keep:
            raw = decoded if raw is None else raw
            self._keep(version, ids, raw if good is None else rows_of(raw, good), contribution)
        return ids, memory

    def fail(self, client: int, version: int, stage: str, cause: str) -> None:
        """Record a lost contribution."""
        self.results.failures.append(Failure(client, version, stage, cause))

    def _finite(self, version: int, clients: Tensor, contribution: Contribution) -> Tensor | None:
        """Which rows are finite and small enough for the exact sum, bool `[K]`; None: all."""
        count, good = clients.shape[0], None
        for name, rows in (*contribution.means.items(), *contribution.sums.items()):
            flat = rows if rows.dim() == 2 else rows.reshape(count, -1)  # a view has no cached facts
            if rows.numel() and bounded(flat):
                continue
            high, low = flat.amax(1).double(), flat.amin(1).double()  # in float32 the bound itself is infinite
            finite = ((high <= LARGEST) & (low >= -LARGEST)).to(clients.device)
            good = torch.ones_like(finite) if good is None else good
            for client in clients[good & ~finite].tolist():
                self.fail(client, version, "check", f"{name} is not finite")
            good &= finite
        return good

    def _keep(self, version: int, ids: Ids, contribution: Contribution, decoded: Contribution) -> None:
        """Copy the contributions that the caller asked for."""
        for k, (client, repeat) in enumerate(zip(*(t.tolist() for t in ids), strict=True)):
            if client in self.keep:
                at = torch.tensor([k])
                self.results.kept.append(Kept(client, repeat, version, rows_of(contribution, at), rows_of(decoded, at)))


def rows_of(contribution: Contribution, index: Tensor) -> Contribution:
    """Copies of some rows of a contribution, by position or by a mask `[K]`."""

    def some(tensors: Tensors) -> dict[str, Tensor]:
        return {n: t[index.to(t.device)] for n, t in tensors.items()}

    means, sums, weight, counters, columns = contribution
    return Contribution(some(means), some(sums), weight[index.to(weight.device)], some(counters), some(columns))
