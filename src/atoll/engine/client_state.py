"""Client state between rounds: a store that allocates the row of a client when it is first written.

Tests: tests/identities/test_codecs_memory.py, tests/faults/test_killed_clients.py.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        self._changed: set[int] = set()

    def take(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy the rows of these clients: named tensors `[K, …]`."""
        if not self.first:
            return {}
        rows = [self._rows.get(i, self.first) for i in ids.tolist()]
        return {n: _stacked([row[n] for row in rows]) for n in self.first} if rows else {}

    def put(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Replace the rows of these clients."""
        if not self.first:
            return
        for k, i in enumerate(ids.tolist()):
            old = self._rows.get(i)
            if old is None:
                self._rows[i] = {n: rows[n][k].clone() for n in self.first}
            else:  # no other object refers to a row, and new memory would be cleared first
                for n, row in old.items():
                    row.copy_(rows[n][k])
            self._changed.add(i)

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

    def take(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy the rows of these clients: named tensors `[K, …]`."""
        rows = dict(self._store.take(ids))
        for k, i in enumerate(ids.tolist() if self._rows else []):
            for name, row in self._rows.get(i, {}).items():
                rows[name][k] = row
        return rows

    def put(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Replace the rows of these clients."""
        for k, i in enumerate(ids.tolist()):
            self._rows[i] = {n: t[k] for n, t in rows.items()}
