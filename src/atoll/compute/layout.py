"""The model vector: the positions of the tensors of an `nn.Module` in flat vectors.

    params    trainable floats: θ, the only segment that codecs, clipping and optimizers read
    buffers   floats that are computed, not trained (running means and variances): the server averages them
    fixed     all other tensors, frozen or integer: sent once; a counter takes its largest increment

Tied weights are stored once. `state_dict` restores the module's own keys, shapes and dtypes.

Tests: tests/identities/test_numerics.py, tests/identities/test_codecs_memory.py, tests/golden/test_golden.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError

SEGMENTS = ("params", "buffers", "fixed")


@dataclass(frozen=True)
class Entry:
    """One tensor of the module: its name, shape, dtype and segment, and for a tied tensor the first name (`alias`)."""

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
    """The positions of a module's tensors in the flat vectors of its segments.

    Args:
        entries: one entry for every key of the module's `state_dict`, in its order.
        dtype: dtype of θ and of float buffers in a run, float32 or float64.
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
        """Build the layout of a module.

        Raises:
            UsageError: a tensor is complex, or the module has no trainable parameter.
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
                    "θ is a real vector.",
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
                "θ would be empty, so training could not change the model.",
                "model.requires_grad_(True)",
            )
        return layout

    def segment(self, name: str) -> tuple[Entry, ...]:
        """Return the entries of a segment; tied tensors appear once."""
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
        """Integer buffers, such as a batch counter, that training on a client may increase."""
        return tuple(e for e in self._segments["fixed"] if not e.dtype.is_floating_point)

    def params(self, theta: Tensor) -> dict[str, Tensor]:
        """Return views of θ `[..., d]` by name, each `[..., *shape]`, without a copy."""
        return self._views("params", theta)

    def buffers(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of the float buffers `[..., b]` by name, each `[..., *shape]`, without a copy."""
        return self._views("buffers", vector)

    def _views(self, segment: str, vector: Tensor) -> dict[str, Tensor]:
        entries = self._segments[segment]
        if not entries:
            return {}
        lead = vector.shape[:-1]
        parts = vector.split([e.size for e in entries], -1)
        return {e.name: part.view(*lead, *e.shape) for e, part in zip(entries, parts, strict=True)}

    def flatten(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Copy a `state_dict` into (θ `[d]`, buffers `[b]`, fixed tensors by name).

        Raises:
            UsageError: a key is missing or unknown, or a tensor has another shape.
        """
        entries = {e.name: e for e in self.entries}
        differing = sorted(set(entries) ^ set(state))
        differing += [n for n, e in entries.items() if n in state and tuple(state[n].shape) != e.shape]
        if differing:
            raise UsageError(
                f"The state_dict does not fit the model at {', '.join(differing[:5])}.",
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
        """Return copies as the module's `state_dict`, in its order and dtypes; tied weights share one tensor."""
        flat = {**self.params(theta), **self.buffers(buffers), **fixed}
        out: dict[str, Tensor] = {}
        for e in self.entries:
            out[e.name] = out[e.alias] if e.alias else flat[e.name].detach().to(e.dtype, copy=True).contiguous()
        return out
