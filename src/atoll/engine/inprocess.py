"""Clients in this process: lanes of a chunk computed together, contributions folded as they come.

A chunk is K clients whose batches are padded to one width. How large it is, and in which order chunks run, changes no
bit: a lane's numbers depend on its own client alone, and the sum does not depend on order.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atoll.data.clients import Clients
from atoll.engine.arrivals import Flown, fly, message, nbytes
from atoll.engine.fleet import Fleet
from atoll.engine.memory import Pending
from atoll.errors import AtollError, RunError, UsageError
from atoll.layout import Layout
from atoll.plan.aggregate.exact import LARGEST
from atoll.plan.flight import Flight, waves
from atoll.plan.lanes import Lanes
from atoll.plan.plan import Failure, Gathered, Plan, State, part_of
from atoll.plan.slots import Cohort, Contribution, Population
from atoll.rng import Key
from atoll.task import Task

_LANE_BYTES = 16 << 20  # what a chunk's θ, gradients and updates take together: they stay near the cores
_DROPPED = "dropped out"
_SMALL = 100_000  # parameters below which one thread is quickest


@dataclass(frozen=True)
class InProcess:
    """An engine that runs clients in this process.

    Args:
        task: the model, loss and metrics; its `numerics` say which body computes.
        data: the clients.
        chunk: clients computed together; None chooses by the model's size. It changes no bit.
        fleet: how long clients and links take, on a virtual clock; None: everybody as long as everybody else.
    """

    task: Task
    data: Clients
    chunk: int | None = None
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"chunk = {self.chunk}.", "at least one client.", write="--chunk 32")

    @property
    def population(self) -> Population:
        """All clients, and the rows each holds."""
        return Population(self.data.count, self.data.sizes)

    @property
    def layout(self) -> Layout:
        """How the model lies in its vector."""
        return self.task.layout

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key) -> Gathered:
        """Run the cohort: one partial sum, and the record of who gave it.

        Raises:
            RunError: the same error struck every client, or more failed than the plan allows.
        """
        plan = plan.at(self)
        own = getattr(plan.local, "numerics", self.task.numerics)
        task = self.task if own == self.task.numerics else replace(self.task, numerics=own)
        up = 0 if self.fleet is None else message(plan, task.layout)
        flown = fly(plan, state, self.population, cohort, self.fleet, up)
        round_ = _Round(plan, state, task, self.data, flown, key)
        with threads_for(task):
            for wave in waves(flown.arrived) if state.memory.first else [flown.arrived]:
                for birth, codes in round_.births(wave):
                    for chunk in self._chunks(plan, task, codes):
                        for part in round_.apart(chunk) if round_.cut else (chunk,):
                            round_.run(birth, part)
                round_.landed()
        return round_.gathered()

    def _chunks(self, plan: Plan, task: Task, codes: Tensor) -> Iterator[Tensor]:
        """Clients of one width together, largest first, a chunk at a time."""
        if len(codes) == 1:
            yield codes
            return
        sizes = self.data.sizes[codes % self.data.count]
        sizes, order = torch.sort(sizes, descending=True, stable=True)
        chunk = self._lanes(plan, task)
        group: list[int] = []
        now = -1
        for i, n in zip(codes[order].tolist(), sizes.tolist(), strict=True):
            width = plan.local.width(n)
            if group and (width != now or len(group) == chunk):
                yield torch.tensor(group)
                group = []
            now = width
            group.append(i)
        if group:
            yield torch.tensor(group)

    def _lanes(self, plan: Plan, task: Task) -> int:
        if task.numerics == "loop":
            return 1
        if self.chunk is not None:
            return self.chunk
        each = 6 * task.layout.d * task.layout.dtype.itemsize
        return max(4, min(1024, _LANE_BYTES // each))


@contextlib.contextmanager
def threads_for(task: Task) -> Iterator[None]:
    """Let torch use one thread for a small model, and then as many as before. It changes no bit.

    A kernel of a small model is over before a second thread has woken; on a busy machine the first then waits for it.
    """
    before = torch.get_num_threads()
    if before == 1 or task.layout.d >= _SMALL or task.slow_in_lanes:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Round:
    """One round under way: what has been computed so far.

    A start is told by its code, client + clients·again: a client may be at work more than once in a round, and each
    time draws anew.
    """

    def __init__(self, plan: Plan, state: State, task: Task, data: Clients, flown: Flown, key: Key) -> None:
        self.plan, self.state, self.task, self.data, self.flown = plan, state, task, data, flown
        self.now, self.key = state.broadcast(), key
        self.kept = Pending(state.memory)
        self.partials: dict[int, Any] = {}
        self.failures = [Failure(f.client, f.birth, "network", _DROPPED) for f in flown.dropped]
        self.errors: list[Exception] = []
        self.arrived: list[Tensor] = []
        self.facts: list[Mapping[str, Tensor]] = []
        self.memory: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self._wave: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self._down: dict[tuple[int, int], int] = {}
        self.cut: dict[int, float] = {}  # the part of its work that a start had time for, where it is not all

    def births(self, flights: list[Flight]) -> Iterator[tuple[int, Tensor]]:
        """The codes of these flights, by the round whose model they started from."""
        by: dict[int, list[int]] = {}
        for f in flights:
            code = f.client + self.data.count * f.again
            by.setdefault(f.birth, []).append(code)
            self._down[f.birth, code] = f.down
            if f.share < 1:
                self.cut[code] = f.share
        for birth in sorted(by):
            yield birth, torch.tensor(by[birth])

    def apart(self, codes: Tensor) -> Iterator[Tensor]:
        """Those who had time for all their work together, each of the others by itself."""
        cut = [i for i, code in enumerate(codes.tolist()) if code in self.cut]
        if len(cut) < len(codes):
            whole = torch.ones(len(codes), dtype=torch.bool)
            whole[cut] = False
            yield codes[whole]
        for i in cut:
            yield codes[i : i + 1]

    def run(self, birth: int, codes: Tensor) -> None:
        """Compute a chunk and fold what it gives; a client that raises is found by halving the chunk."""
        ids = codes % self.data.count
        try:
            contribution, memory, sizes = self._contribute(birth, ids, codes)
        except (MemoryError, KeyboardInterrupt, AtollError):
            raise
        except Exception as error:
            if len(ids) > 1:
                self.run(birth, codes[: len(ids) // 2])
                self.run(birth, codes[len(ids) // 2 :])
            else:
                self._fail(int(ids[0]), birth, "local", f"{type(error).__name__}: {error}")
                self.errors.append(error)
            return
        good = torch.ones(len(ids), dtype=torch.bool)
        for name, rows in (*contribution.means.items(), *contribution.sums.items()):
            flat = rows.reshape(len(ids), -1)
            if rows.numel() and float(flat.max()) <= LARGEST and float(flat.min()) >= -LARGEST:
                continue
            finite = (flat.amax(1) <= LARGEST) & (flat.amin(1) >= -LARGEST)
            for i in ids[good & ~finite].tolist():
                self._fail(i, birth, "check", f"{name} is not finite")
            good &= finite
        down = [self._down[birth, code] for code in codes.tolist()]
        facts = {**contribution.facts, "rows": contribution.weight, "bytes_up": sizes, "bytes_down": torch.tensor(down)}
        if self.plan.pace.flies_on:
            facts["staleness"] = torch.full_like(ids, self.state.round - birth)
        self._accept(birth, ids, good, contribution._replace(facts=facts), memory)

    def _accept(
        self, birth: int, ids: Tensor, good: Tensor, contribution: Contribution, memory: Mapping[str, Tensor]
    ) -> None:
        if not bool(good.all()):
            ids, memory = ids[good], {n: t[good] for n, t in memory.items()}
            picked = (
                {n: t[good] for n, t in part.items()}
                for part in (contribution.means, contribution.sums, contribution.largest, contribution.facts)
            )
            means, sums, largest, facts = picked
            contribution = Contribution(means, sums, contribution.weight[good], largest, facts)
        if not len(ids):
            return
        rule = self.plan.aggregator
        self.partials[birth] = rule.fold(self.partials.get(birth) or rule.zero(), contribution)
        self.arrived.append(ids)
        self.facts.append(contribution.facts)
        if memory:
            self._wave.append((ids, memory))

    def landed(self) -> None:
        """What a wave of clients keeps is what the same clients start from in the next wave."""
        for ids, rows in self._wave:
            self.kept.put(ids, rows)
        self.memory += self._wave
        self._wave = []

    def _contribute(self, birth: int, ids: Tensor, codes: Tensor) -> tuple[Contribution, Mapping[str, Tensor], Tensor]:
        """The contributions of a chunk, opened, with the size of each message in bytes, int64 `[K]`."""
        share = self.cut.get(int(codes[0]), 1.0) if self.cut else 1.0
        lanes = Lanes(self.data, ids, tuple(self.data.sizes[ids].tolist()), self.task.layout.dtype, share)
        kept = self.kept.take(ids)
        if birth == self.state.round:
            broadcast, key = self.now, self.key.of(codes)
        else:
            broadcast, key = self.state.versions[birth], Key(self.state.seed).fold("round", birth).of(codes)
        contribution, local = self.plan.local.contribute(
            broadcast, lanes, part_of(kept, "local"), key.fold("clients", "local"), self.task
        )
        memory = {f"local/{n}": t for n, t in local.items()}
        rest = _rest(contribution)
        update = contribution.means.get("update")
        if update is None:
            return contribution, memory, torch.full((len(ids),), rest)
        payload, side, sums, codec = self.plan.codec.encode(
            update, part_of(kept, "codec"), broadcast.shared["codec"], key.fold("codec")
        )
        memory |= {f"codec/{n}": t for n, t in codec.items()}
        contribution = contribution._replace(sums={**contribution.sums, **sums})
        sizes = self.plan.codec.sizes(payload, side) + _rest(contribution)
        opened = {**contribution.means, "update": self.plan.codec.open(payload, side)}
        return contribution._replace(means=opened), memory, sizes

    def _fail(self, client: int, birth: int, stage: str, cause: str) -> None:
        self.failures.append(Failure(client, birth, stage, cause))

    def gathered(self) -> Gathered:
        """What the round brought back, or the reason to end the run."""
        flown = self.flown
        # Everybody who was at work: who started in this round, and who still was from earlier ones.
        asked = len(self.state.air.flights) + flown.started - flown.late
        self.failures.sort()  # by client: the order of chunks tells nothing
        if self.failures and len(self.failures) == asked:
            self._all_failed()
        if len(self.failures) > self.plan.max_failed * asked:
            first = self.failures[0]
            raise RunError(
                f"{len(self.failures)} of {asked} clients failed in round {self.state.round}; "
                f"first client {first.client}, at {first.stage}: {first.cause}.",
                f"at most the fraction max_failed = {self.plan.max_failed}.",
                "what is left would be another cohort than the sampler drew. The state is that of the round before.",
                "atoll lr" if "not finite" in first.cause else "--set plan.max_failed=1.0",
            )
        ids, facts = self._columns()
        return Gathered(
            self.partials or {self.state.round: self.plan.aggregator.zero()},
            ids,
            tuple(self.memory),
            facts,
            tuple(self.failures),
            int(facts["bytes_up"].sum()) if facts else 0,
            flown.sent,
            flown.air,
            flown.started,
            flown.late,
            flown.now,
            flown.trips,
        )

    def _columns(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Who arrived, by rising id, and what each told in the clear."""
        if not self.arrived:
            return torch.empty(0, dtype=torch.int64), {}
        names = sorted(set.intersection(*map(set, self.facts)))
        if len(self.arrived) == 1 and len(self.arrived[0]) == 1:
            return self.arrived[0], {n: self.facts[0][n] for n in names}
        ids = torch.cat(self.arrived)
        order = torch.argsort(ids, stable=True)
        return ids[order], {n: torch.cat([f[n] for f in self.facts])[order] for n in names}

    def _all_failed(self) -> None:
        """Every client failed: the same way is a fault of the program, not of the clients."""
        (cause, count), *_ = Counter(f.cause for f in self.failures).most_common()
        if count < len(self.failures) or (not self.errors and cause == _DROPPED):
            return  # who is cut off says nothing about the program
        first = self.failures[0]
        raise RunError(
            f"Every client of round {first.round} failed in the same way, at {first.stage}: {cause}.",
            "a model, a loss and data that fit each other, and a step that stays finite.",
            "what strikes every client alike is a fault of the program or of the learning rate, not of a client.",
            "atoll lr" if first.stage == "check" else "atoll run --smoke",
        ) from (self.errors[0] if self.errors else None)


def _rest(contribution: Contribution) -> int:
    """The bytes of one client's message beside the encoded update: other means, sums, counters, 8 for the weight."""
    rest = {n: t for n, t in contribution.means.items() if n != "update"}
    whole = nbytes(rest) + nbytes(contribution.sums) + nbytes(contribution.largest)
    return whole // len(contribution.weight) + 8
