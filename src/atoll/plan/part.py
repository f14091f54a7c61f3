"""What every part may leave out: no memory, no server state, nothing to settle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from atoll.grammar import Value
from atoll.layout import Layout
from atoll.rng import Key

T = TypeVar("T")


class Part(Value):
    """The defaults of a local part or a codec stage: inherited once, overridden where a part has more to say."""

    def memory(self, layout: Layout) -> Mapping[str, Tensor]:
        """What one client keeps before its first round, by name."""
        return {}

    def server(self, layout: Layout) -> Mapping[str, Tensor]:
        """What the server keeps before the first round, by name; it travels to the clients with θ."""
        return {}

    def settle(self, total: T, server: Mapping[str, Tensor], key: Key) -> tuple[T, Mapping[str, Tensor]]:
        """Once a round, on the exact total: the total as it goes on, and the server state after."""
        return total, server
