"""A model is a vector: how the tensors of an `nn.Module` lie in flat ones.

    params    trainable floats: θ, the only thing a codec, a clip or an optimizer sees
    buffers   floats that are computed, not trained (running means and variances): replaced by their mean
    fixed     everything else, frozen or whole numbers: sent once; a counter takes its largest increment

Tied weights lie in the vector once. `state_dict` keys, shapes and types come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from atoll.errors import UsageError

SEGMENTS = ("params", "buffers", "fixed")


@dataclass(frozen=True)
class Entry:
    """One tensor of the module: its name, shape and type, its segment, and the first name it is tied to."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    segment: str
    alias: str | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a module lies in the flat vectors of its segments.

    Args:
        entries: every key of the module's `state_dict`, in its order.
        dtype: the type of θ and of float buffers in a run, float32 or float64.
    Example:
        >>> layout = Layout.of(nn.Linear(3, 2))
        >>> layout.d, [entry.name for entry in layout.entries]
        (8, ['weight', 'bias'])
        >>> theta = torch.arange(8.0)
        >>> layout.params(theta)["bias"]
        tensor([6., 7.])
    """

    entries: tuple[Entry, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype = torch.float32) -> Layout:
        """The layout of a module.

        Raises:
            UsageError: a tensor is neither float nor a whole number or truth value, or nothing is trainable.
        """
        trainable = {id(p) for p in module.parameters() if p.requires_grad}
        state = module.state_dict(keep_vars=True)
        buffers = dict(module.named_buffers(remove_duplicate=False))
        first: dict[int, str] = {}
        entries = []
        for name, tensor in state.items():
            if tensor.is_complex():
                raise UsageError(
                    f"The model's {name} is {tensor.dtype}.",
                    "real numbers.",
                    "θ is a vector of reals.",
                    "torch.view_as_real(tensor)",
                )
            if tensor.is_floating_point() and id(tensor) in trainable:
                segment = "params"
            elif tensor.is_floating_point() and name in buffers:
                segment = "buffers"
            else:
                segment = "fixed"
            alias = first.setdefault(id(tensor), name)
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, segment, None if alias == name else alias))
        layout = cls(tuple(entries), dtype)
        if not layout.d:
            raise UsageError(
                "The model has no trainable parameter.",
                "at least one float parameter with requires_grad.",
                "θ would be empty: there is nothing to learn.",
                "model.requires_grad_(True)",
            )
        return layout

    def segment(self, name: str) -> tuple[Entry, ...]:
        """The entries that lie in a segment, tied ones once."""
        return self._segments[name]

    @cached_property
    def _segments(self) -> dict[str, tuple[Entry, ...]]:
        return {s: tuple(e for e in self.entries if e.segment == s and e.alias is None) for s in SEGMENTS}

    @cached_property
    def d(self) -> int:
        """The length of θ."""
        return sum(e.size for e in self._segments["params"])

    @cached_property
    def b(self) -> int:
        """The length of the float buffers."""
        return sum(e.size for e in self._segments["buffers"])

    @cached_property
    def counters(self) -> tuple[Entry, ...]:
        """Whole-number buffers such as a batch counter: what a client may raise."""
        return tuple(e for e in self._segments["fixed"] if not e.dtype.is_floating_point)

    def params(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of θ `[..., d]` by name, `[..., *shape]`; nothing is copied."""
        return self._views("params", theta)

    def buffers(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of the float buffers `[..., b]` by name, `[..., *shape]`; nothing is copied."""
        return self._views("buffers", vector)

    def _views(self, segment: str, vector: Tensor) -> dict[str, Tensor]:
        entries = self._segments[segment]
        if not entries:
            return {}
        lead = vector.shape[:-1]
        parts = vector.split([e.size for e in entries], -1)
        return {e.name: part.view(*lead, *e.shape) for e, part in zip(entries, parts, strict=True)}

    def flatten(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(θ `[d]`, buffers `[b]`, fixed by name) from a `state_dict`; copies.

        Raises:
            UsageError: a key is missing, unknown, or has another shape.
        """
        ours = {e.name: e for e in self.entries}
        odd = sorted(set(ours) ^ set(state))
        odd += [n for n, e in ours.items() if n in state and tuple(state[n].shape) != e.shape]
        if odd:
            raise UsageError(
                f"A state_dict that does not fit the model: {', '.join(odd[:5])}.",
                "the model's own keys and shapes.",
                "θ is read by name and shape.",
                "model.load_state_dict(state)",
            )
        theta, buffers = (
            torch.cat(
                [state[e.name].detach().reshape(-1).to(self.dtype) for e in self._segments[s]]
                or [next(iter(state.values())).new_empty(0, dtype=self.dtype)]
            )
            for s in ("params", "buffers")
        )
        fixed = {e.name: state[e.name].detach().clone() for e in self._segments["fixed"]}
        return theta, buffers, {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in fixed.items()}

    def state_dict(self, theta: Tensor, buffers: Tensor, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's `state_dict` in its own order and types; copies, tied weights shared."""
        flat = {**self.params(theta), **self.buffers(buffers), **fixed}
        own: dict[str, Tensor] = {}
        for e in self.entries:
            own[e.name] = own[e.alias] if e.alias else flat[e.name].detach().to(e.dtype, copy=True).contiguous()
        return own
