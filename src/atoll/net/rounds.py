"""The commits of a run in the database of its federation: one transaction a round.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from safetensors.torch import load, save
from torch import Tensor

from atoll.net.store import SMALL_STATE, Accepted, Database, RoundCommit
from atoll.net.wire import Blob, digest
from atoll.runs.folder import Checkpoint


class RoundStore:
    """Commits the rounds of one run. `atoll.runs.Commit` describes the methods.

    Args:
        database: the database of the federation.
        run: returns the name of the run.
        accepted: returns the contributions of the round that ends.
    """

    def __init__(
        self, database: Database, run: Callable[[], str], accepted: Callable[[], tuple[Accepted, ...]]
    ) -> None:
        self._database, self._run, self._accepted = database, run, accepted
        self._last = -1
        self.seconds = 0.0  # of the last commit
        self._best: tuple[bytes, Blob | None] = (b"", None)

    def save(self, checkpoint: Checkpoint, lines: Mapping[str, bytes]) -> None:
        """Commit the state after a round."""
        round = checkpoint.facts["round"] - 1
        if round <= self._last:
            return  # the end of a run saves the state of its last round again
        began = time.perf_counter()
        state = save(storable(checkpoint.tensors))
        if checkpoint.best is not None:
            self._best = save(storable(checkpoint.best)), None
        best, blob = self._best
        small = len(state) + len(best) + 64 <= SMALL_STATE
        blobs: tuple[Blob, ...] = ()
        if not small:
            blob = blob or (self._database.put_blob([best]) if best else None)
            self._best = best, blob
            blobs = (self._database.put_blob([state]), *((blob,) if blob else ()))
        pointer = json.dumps({"facts": checkpoint.facts, "best": len(best)}, default=str).encode()
        rows = [json.loads(line) for line in lines.get("metrics.jsonl", b"").splitlines()]
        events = tuple(json.loads(line) for line in lines.get("events.jsonl", b"").splitlines())
        model = digest(checkpoint.tensors["model/theta"].detach().cpu().contiguous().numpy().data)
        whole = (state + best) if small else None
        accepted = self._accepted()
        run = self._run()
        place, _, attempt = (self._database.get("attempt") or "").rpartition(" ")
        last = int(attempt) if place == f"{run} {round}" else 0
        commit = RoundCommit(run, round, model, pointer, whole, blobs, accepted, rows[-1], events, last)
        self._database.commit_round(commit)
        self._last, self.seconds = round, time.perf_counter() - began

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
            best = self._database.read_blob(found.blobs[1]) if length else b""
        self._last = found.round
        self._best = best, (found.blobs[1] if len(found.blobs) > 1 else None)
        return Checkpoint(load(state), (), load(best) if length else None, pointer["facts"])

    def log(self, name: str) -> bytes:
        """All committed lines of a log."""
        rows = self._database.metrics(self._run()) if name == "metrics.jsonl" else self._database.events(self._run())
        return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in CPU memory that share no storage, in the order of their names, as safetensors needs them."""
    out, seen = {}, set[int]()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        place = t.untyped_storage().data_ptr()
        whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
        out[name] = t if whole and place not in seen else t.clone()
        seen.add(place)
    return out
