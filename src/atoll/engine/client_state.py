"""Client state between rounds: a store that allocates the row of a client when it is first written.

Tests: tests/identities/test_codecs_memory.py, tests/faults/test_killed_clients.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atoll.compute.buffer_pool import empty
from atoll.plan.state import Store


class Memory:
    """State of clients by id. A client that has not participated reads the initial state, which all clients share.

    Clients use no memory before their first write. `changed` returns the rows written since its last call, so that a
    checkpoint writes only these.

    Args:
        first: the initial state of a client as named tensors; {} if clients have no state.
    Example:
        >>> memory = Memory({"v": torch.zeros(2)})
        >>> memory.put(torch.tensor([7]), {"v": torch.ones(1, 2)})
        >>> memory.take(torch.tensor([7, 8]))["v"].tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, first: Mapping[str, Tensor]) -> None:
        self.first = dict(first)
        self._rows: dict[int, dict[str, Tensor]] = {}
        self._groups: dict[int, Sequence[int]] = {}  # the clients whose rows are parts of the same tensors
        self._changed: set[int] = set()

    def take(self, ids: Tensor, read_only: str = "") -> dict[str, Tensor]:
        """Copy the rows of these clients: named tensors `[K, …]`.

        Args:
            ids: the clients, int64 `[K]`.
            read_only: begins the names of the tensors that the caller does not change, and does not use after the next
                `put`. They are not copied if the rows are adjacent in memory. "": no tensor.
        """
        if not self.first:
            return {}
        clients = ids.tolist()
        if not clients:
            return {}
        rows = [self._rows.get(i, self.first) for i in clients]
        written = read_only and all(i in self._rows for i in clients)  # the initial state belongs to all clients
        joined = {n for n in self.first if written and n.startswith(read_only)}
        return {n: (_joined if n in joined else _stacked)([row[n] for row in rows]) for n in self.first}

    def put(self, ids: Tensor, rows: Mapping[str, Tensor], owned: str = "") -> None:
        """Replace the rows of these clients.

        Args:
            ids: the clients, int64 `[K]`, each once.
            rows: named tensors `[K, …]`.
            owned: begins the names of the tensors that no one changes after this call. They are stored without a copy
                if this takes no more memory. "": no tensor.
        """
        if not self.first:
            return
        clients = ids.tolist()
        replaces = bool(owned) and self._replaces_whole_groups(clients)
        stored = {n for n in self.first if replaces and n.startswith(owned) and _fills_its_memory(rows[n])}
        for k, i in enumerate(clients):
            old = self._rows.get(i)
            if old is None:
                old = self._rows[i] = {n: rows[n][k].clone() for n in self.first if n not in stored}
            else:  # no other object refers to a row, and new memory would be cleared first
                for n in old.keys() - stored:
                    old[n].copy_(rows[n][k])
            for n in stored:
                old[n] = rows[n][k]
            if stored or i not in self._groups:
                self._groups[i] = clients if stored else (i,)
            self._changed.add(i)

    def _replaces_whole_groups(self, clients: list[int]) -> bool:
        """Whether no client outside of these has rows in the tensors of one of them, which are then freed."""
        groups = [self._groups[i] for i in clients if i in self._groups]
        return sum({id(group): len(group) for group in groups}.values()) == len(groups)

    def touched(self) -> Tensor:
        """Ids of the clients that have rows, int64 `[n]`, ascending."""
        return torch.tensor(sorted(self._rows), dtype=torch.int64)

    def changed(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids and rows that were written since the last call. The call marks them as unchanged.

        Returns:
            The ids, int64 `[n]`, ascending, and copies of their rows: named tensors `[n, …]`.
        """
        ids = torch.tensor(sorted(self._changed), dtype=torch.int64)
        self._changed.clear()
        return ids, self.take(ids)


def _joined(rows: list[Tensor]) -> Tensor:
    """The rows as one tensor: without a copy if they are adjacent parts of one tensor, in this order."""
    first = rows[0]
    start, size, memory = first.data_ptr(), first.nbytes, first.untyped_storage().data_ptr()
    adjacent = all(
        row.data_ptr() == start + k * size and row.untyped_storage().data_ptr() == memory for k, row in enumerate(rows)
    )
    if not (size and adjacent and first.is_contiguous()):
        return _stacked(rows)
    return first.as_strided((len(rows), *first.shape), (first.numel(), *first.stride()))


def _fills_its_memory(rows: Tensor) -> bool:
    """Whether a tensor is nearly all of the memory that it keeps from being freed, and needs no copy."""
    return rows.is_cpu and rows.is_contiguous() and rows.untyped_storage().nbytes() <= 1.25 * rows.nbytes


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows, out=empty(rows[0], (len(rows), *rows[0].shape)))


class Uncommitted:
    """Rows of a store as they will be once the round is accepted. A write here does not change the store.

    Args:
        store: the source of rows that have not been written here.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.first = store.first
        self._rows: dict[int, dict[str, Tensor]] = {}

    def take(self, ids: Tensor, read_only: str = "") -> dict[str, Tensor]:
        """Copy the rows of these clients: named tensors `[K, …]`; see `Memory.take`."""
        clients = ids.tolist() if self._rows else []
        rows = dict(self._store.take(ids, "" if any(i in self._rows for i in clients) else read_only))
        for k, i in enumerate(clients):
            for name, row in self._rows.get(i, {}).items():
                rows[name][k] = row
        return rows

    def put(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Replace the rows of these clients."""
        for k, i in enumerate(ids.tolist()):
            self._rows[i] = {n: t[k] for n, t in rows.items()}
