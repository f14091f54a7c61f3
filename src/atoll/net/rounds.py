"""The commits of a run in the database of its federation: one transaction a round.

The state contains the model, so a round whose model is the best one writes it once: the state is then the best model
too. Its blob is kept as the best model after that round.

Tests: tests/faults/test_rehearsal.py, tests/faults/test_state_on_disk.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from safetensors.torch import load
from torch import Tensor

from atoll.net.store import SMALL_STATE, Accepted, Database, RoundCommit
from atoll.net.tensors import tensor_parts
from atoll.net.wire import Blob, digest
from atoll.runs.folder import Checkpoint

_OF_MODEL = ("model/", "counters/", "fixed/")  # the tensors of a state that `atoll.runs.checkpoint` reads as a model


class RoundStore:
    """Commits the rounds of one run. `atoll.runs.Commit` describes the methods.

    Args:
        database: the database of the federation.
        run: returns the name of the run.
        accepted: returns the contributions of the round that ends.
        attempts: whether a round can have several attempts, as that of a secure sum.
    """

    def __init__(
        self,
        database: Database,
        run: Callable[[], str],
        accepted: Callable[[], tuple[Accepted, ...]],
        attempts: bool = True,
    ) -> None:
        self._database, self._run, self._accepted, self._attempts = database, run, accepted, attempts
        self._last = -1
        self.seconds = 0.0  # of the last commit
        self._best: Mapping[str, Tensor] = {}
        self._best_blob: Blob | None = None

    def save(self, checkpoint: Checkpoint, lines: Mapping[str, bytes]) -> None:
        """Commit the state after a round."""
        round = checkpoint.facts["round"] - 1
        if round <= self._last:
            return  # the end of a run saves the state of its last round again
        began = time.perf_counter()
        if checkpoint.best is not None:
            self._best, self._best_blob = checkpoint.best, None
        # The best model of this round consists of tensors of the state.
        shared = bool(self._best) and all(checkpoint.tensors.get(n) is t for n, t in self._best.items())
        state, best = tensor_parts(checkpoint.tensors), [] if shared or not self._best else tensor_parts(self._best)
        length = _length(best)
        small = _length(state) + length + 64 <= SMALL_STATE
        blobs: tuple[Blob, ...] = ()
        if small:
            self._best_blob = None  # the blob of an earlier round is removed
        else:
            blobs = self._blobs(state, best, shared)
        pointer = json.dumps({"facts": checkpoint.facts, "best": length, "shared": shared}, default=str).encode()
        row = lines.get("metrics.jsonl", b"").splitlines()[-1].decode()
        events = tuple(line.decode() for line in lines.get("events.jsonl", b"").splitlines())
        (model,) = tensor_parts({"": checkpoint.tensors["model/theta"]})[1:]
        whole, run = b"".join([*state, *best]) if small else None, self._run()
        commit = RoundCommit(
            run, round, digest(model), pointer, whole, blobs, self._accepted(), row, events, self._attempt(run, round)
        )
        self._database.commit_round(commit)
        self._last, self.seconds = round, time.perf_counter() - began

    def _blobs(self, state: list[bytes | memoryview], best: list[bytes | memoryview], shared: bool) -> tuple[Blob, ...]:
        """Write the state, and the best model if no blob has it. Returns the blobs of the round."""
        made = self._database.put_blob(state)
        if shared:
            self._best_blob = made
        elif best and self._best_blob is None:
            self._best_blob = self._database.put_blob(best)
        return (made,) if self._best_blob in (None, made) else (made, self._best_blob)

    def _attempt(self, run: str, round: int) -> int:
        """The number of the last attempt of a round."""
        if not self._attempts:
            return 0
        place, _, attempt = (self._database.get("attempt") or "").rpartition(" ")
        return int(attempt) if place == f"{run} {round}" else 0

    def load(self) -> Checkpoint | None:
        """The last committed state."""
        found = self._database.last_round(self._run())
        if found is None:
            return None
        pointer = json.loads(found.pointer)
        length = pointer["best"]
        if found.state is not None:
            state, best = found.state[: len(found.state) - length], found.state[len(found.state) - length :]
        else:
            state = self._database.read_blob(found.blobs[0])
            best = self._database.read_blob(found.blobs[1]) if len(found.blobs) > 1 else b""
        self._last = found.round
        tensors = load(state)
        known = tensors if pointer.get("shared") else load(best) if best else {}
        self._best = {n: t for n, t in known.items() if n.startswith(_OF_MODEL)} or known
        self._best_blob = found.blobs[-1] if found.blobs and self._best else None
        return Checkpoint(tensors, (), self._best or None, pointer["facts"])

    def log(self, name: str) -> bytes:
        """All committed lines of a log."""
        rows = self._database.metrics(self._run()) if name == "metrics.jsonl" else self._database.events(self._run())
        return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _length(parts: list[bytes | memoryview]) -> int:
    return sum(map(len, parts))
