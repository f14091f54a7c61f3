"""The model vector: the positions of the tensors of an `nn.Module` in flat vectors.

    params    trainable floats: θ, the only segment that codecs, clipping and optimizers read
    buffers   floats that are computed, not trained (running means and variances): the server joins them by their rule
    fixed     all other tensors, frozen, constant or integer: sent once; a counter takes its largest value

Buffers with `persistent=False` are carried like others. Tied weights are stored once. `state_dict` restores the
module's own keys, shapes and dtypes.

Tests: tests/conformance/test_user_code.py, tests/identities/test_numerics.py, tests/identities/test_codecs_memory.py,
tests/golden/test_golden.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Change, Line

SEGMENTS = ("params", "buffers", "fixed")
RULES = ("mean", "unit", "largest", "keep")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
CHANGED = "buffers/changed"  # the counter of a contribution with one flag for each float buffer


@dataclass(frozen=True)
class Entry:
    """One tensor of the module.

    Args:
        name, shape, dtype: as in the module.
        segment: one of `SEGMENTS`.
        alias: the first name of a tied tensor; None for a tensor that is stored.
        rule: of a buffer, one of `RULES`; `"constant"` if no client may change it; empty for a parameter.
        persistent: whether `state_dict` contains it.
        chosen: whether the user gave the rule.
        norm: whether it belongs to a layer of normalisation.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    segment: str
    alias: str | None = None
    rule: str = field(default="", repr=False)
    persistent: bool = field(default=True, repr=False)
    chosen: bool = field(default=False, repr=False)
    norm: bool = field(default=False, repr=False)

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Spectral:
    """A spectral norm of torch: its weight is divided by u·W·v, and u and v are buffers of norm 1.

    Args:
        weight, u, v: the names of W, u and v.
        dim: the axis of W that u belongs to.
    """

    weight: str
    u: str
    v: str
    dim: int


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The parameters and buffers of a module in the order of `state_dict`: name, tensor, and whether it is persistent.

    A tied tensor occurs under each of its names. A buffer with `persistent=False` is not in `state_dict`.

    Example:
        >>> [name for name, _, _ in tensors_of(nn.Linear(1, 1))]
        ['weight', 'bias']
    """
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield f"{dot}{name}", parameter, True
        for name, buffer in part._buffers.items():
            if buffer is not None:
                yield f"{dot}{name}", buffer, name not in part._non_persistent_buffers_set


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name; unlike `state_dict` with non-persistent buffers."""
    return {name: tensor for name, tensor, _ in tensors_of(module)}


@dataclass(frozen=True)
class Layout:
    """The positions of a module's tensors in the flat vectors of its segments.

    Args:
        entries: one entry for every parameter and buffer of the module, in the order of `state_dict`.
        dtype: dtype of θ and of float buffers in a run, float32 or float64.
        spectral: the spectral norms of torch in the module, whose vectors the server refreshes.
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
    spectral: tuple[Spectral, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, module: nn.Module, dtype: torch.dtype = torch.float32, rules: Mapping[str, str] | None = None
    ) -> Layout:
        """Build the layout of a module.

        Args:
            module: the module.
            dtype: dtype of θ and of float buffers in a run.
            rules: the rule of buffers by name pattern, such as `{"*.scale": "keep"}`.
        Raises:
            UsageError: a trained tensor is complex, the module has no trainable parameter, or a rule does not fit.
        """
        trainable = {id(p) for p in module.parameters() if p.requires_grad}
        buffers = {id(b) for b in module.buffers()}
        given = dict(rules or {})
        norms = {id(t) for m in module.modules() if isinstance(m, _NORMS) for _, t, _ in tensors_of(m)}
        first: dict[int, str] = {}
        entries = []
        for name, tensor, persistent in tensors_of(module):
            segment, rule, chosen = "fixed", "", False
            if id(tensor) in trainable:
                _check_real(name, tensor)
                segment = "params"
            elif id(tensor) in buffers:
                rule, chosen = _rule(name, tensor, given)
                joined = rule in ("mean", "unit") or (rule == "keep" and tensor.is_floating_point())
                segment = "buffers" if joined else "fixed"
            alias = first.setdefault(id(tensor), name)
            tied = None if alias == name else alias
            kind = segment, tied, rule, persistent, chosen, id(tensor) in norms
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, *kind))
        _check_patterns(given, [e.name for e in entries if e.rule])
        layout = cls(tuple(entries), dtype, _spectral_norms(module, given))
        if not layout.segment("params"):
            raise UsageError(
                "The model has no trainable parameter.",
                "at least one float parameter with requires_grad.",
                "θ would be empty, so training could not change the model.",
                Line(python="model.requires_grad_(True)"),
            )
        return layout

    def with_rules(self, rules: Mapping[str, str]) -> Layout:
        """A copy in which these buffers, by name, have another rule. A constant buffer moves to the fixed tensors."""
        entries = (replace(e, rule=rules.get(e.alias or e.name, e.rule)) for e in self.entries)
        moved = (replace(e, segment="fixed") if e.rule == "constant" else e for e in entries)
        return replace(self, entries=tuple(moved))

    def without(self, own: tuple[str, ...] | Literal["norms"]) -> Layout:
        """The layout without the parameters, float buffers and counters that a pattern fits: the shared part.

        Args:
            own: patterns of names, such as `("fc2.*",)`; or `"norms"`, the tensors of all layers of normalisation. A
                tied tensor fits if one of its names does.
        Raises:
            UsageError: a pattern fits no such tensor, or no parameter remains.
        Example:
            >>> layout = Layout.of(nn.Linear(3, 2))
            >>> layout.without(("bias",)).d
            6
        """
        moving = {e.name for e in (*self.segment("params"), *self.segment("buffers"), *self.counters)}
        names = [e for e in self.entries if (e.alias or e.name) in moving]
        patterns = (own,) if isinstance(own, str) else own
        fits = {
            p: {e.alias or e.name for e in names if (e.norm if own == "norms" else fnmatchcase(e.name, p))}
            for p in patterns
        }
        taken = set().union(*fits.values())
        layout = replace(self, entries=tuple(e for e in self.entries if (e.alias or e.name) not in taken))
        empty = next((p for p, found in fits.items() if not found), None)
        if empty is not None or not layout.segment("params"):
            last = self.segment("params")[-1].name
            raise UsageError(
                f"own={own!r} fits {'no' if empty is not None else 'every'} parameter of the model"
                f"{'' if empty is None else f': {empty!r}'}.",
                f"patterns of some of {', '.join(e.name for e in names)}.",
                "the own part stays at the client, and the rest is trained together.",
                Change("plan.local.own", f"('{last.rpartition('.')[0] or last}*',)") if len(names) > 1 else "",
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
        """The buffers that take the largest value of the clients: integers, such as a batch counter, by default."""
        plain = (e for e in self._segments["fixed"] if not (e.dtype.is_floating_point or e.dtype.is_complex))
        return (*plain, *(e for e in self._segments["fixed"] if e.dtype.is_floating_point and e.rule == "largest"))

    @cached_property
    def constants(self) -> tuple[str, ...]:
        """The names of the buffers that no client may change."""
        return tuple(e.name for e in self._segments["fixed"] if e.rule == "constant")

    @cached_property
    def sent(self) -> Tensor | None:
        """The places of the float buffers that clients send, int64 `[s]`; None: they send all."""
        kept = [torch.full((e.size,), e.rule != "keep") for e in self._segments["buffers"]]
        flags = torch.cat(kept) if kept else torch.ones(0, dtype=torch.bool)
        return None if bool(flags.all()) else flags.nonzero()[:, 0]

    @cached_property
    def owner(self) -> Tensor:
        """The number of the buffer that each place of the float buffers belongs to, int64 `[b]`."""
        sizes = torch.tensor([e.size for e in self._segments["buffers"]], dtype=torch.int64)
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @cached_property
    def dropped(self) -> frozenset[str]:
        """The names of integer buffers that clients do not send."""
        return frozenset(e.name for e in self.counters if e.rule == "keep")

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
        return {e.name: part.view((*lead, *e.shape)) for e, part in zip(entries, parts, strict=True)}

    def flatten(
        self, state: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Copy tensors by name into (θ `[d]`, buffers `[b]`, fixed tensors by name, in their own dtypes).

        Args:
            state: a `state_dict`, or the result of `named_tensors`. Entries that are no tensor are left out.
            others: the tensors of names that `state_dict` does not contain: non-persistent buffers.
        Raises:
            UsageError: a key is missing or unknown, or a tensor has another shape.
        """
        entries = {e.name: e for e in self.entries}
        hidden = {n: t for n, t in (others or {}).items() if n in entries and not entries[n].persistent}
        state = {**hidden, **{n: t for n, t in state.items() if not n.endswith("_extra_state")}}
        differing = sorted(set(entries) ^ set(state))
        differing += [n for n, e in entries.items() if n in state and tuple(state[n].shape) != e.shape]
        if differing:
            raise UsageError(
                f"The state_dict does not fit the model at {', '.join(differing[:5])}.",
                "the model's own keys and shapes.",
                "θ is read by name and shape.",
                Line(python="model.load_state_dict(state)"),
            )
        theta, buffers = (
            torch.cat(
                [state[e.name].detach().reshape(-1).to(self.dtype) for e in self._segments[s]]
                or [next(iter(state.values())).new_empty(0, dtype=self.dtype)]
            )
            for s in ("params", "buffers")
        )
        return theta, buffers, {e.name: state[e.name].detach().clone() for e in self._segments["fixed"]}

    def state_dict(
        self, theta: Tensor, buffers: Tensor, fixed: Mapping[str, Tensor], *, hidden: bool = False
    ) -> dict[str, Tensor]:
        """Return copies as the module's `state_dict`, in its order and dtypes; tied weights share one tensor.

        Args:
            theta, buffers, fixed: the tensors of a single model.
            hidden: whether the result also contains buffers with `persistent=False`.
        """
        flat = {**self.params(theta), **self.buffers(buffers), **fixed}
        out: dict[str, Tensor] = {}
        for e in self.entries:
            if e.persistent or hidden:
                known = out.get(e.alias) if e.alias else None
                own = flat[e.alias or e.name].detach()
                out[e.name] = own.to(e.dtype, copy=True).contiguous() if known is None else known
        return out


def _check_real(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise UsageError(
            f"The model's {name} is {tensor.dtype}.",
            "real numbers in every trained tensor.",
            "θ is a real vector.",
            Line(python="torch.view_as_real(tensor)"),
        )


def _rule(name: str, tensor: Tensor, given: Mapping[str, str]) -> tuple[str, bool]:
    """The rule of a buffer, and whether a pattern that fits its name gives it; else the rule for its dtype."""
    usual = "mean" if tensor.is_floating_point() else "constant" if tensor.is_complex() else "largest"
    fitting = [r for pattern, r in given.items() if fnmatchcase(name, pattern)]
    rule = fitting[0] if fitting else usual
    if (rule in ("mean", "unit") and not tensor.is_floating_point()) or (rule == "largest" and tensor.is_complex()):
        raise UsageError(
            f"buffers = {given!r}: {name} is {tensor.dtype}.",
            f"{'keep' if tensor.is_complex() else 'largest or keep'} for this dtype.",
            "a mean of integers is no integer." if not tensor.is_complex() else "complex numbers have no order.",
            Change("buffers", [f"{name}=keep"]),
        )
    return rule, bool(fitting)


def _with_rule(pattern: str, rule: str) -> Change:
    return Change("buffers", [f"{pattern}={rule}"])


def _check_patterns(given: Mapping[str, str], names: Collection[str]) -> None:
    for pattern, rule in given.items():
        if rule not in RULES:
            raise unknown_name("rule of a buffer", rule, RULES, partial(_with_rule, pattern))
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"buffers = {dict(given)!r}: no buffer of the model fits {pattern!r}.",
                f"a pattern of {', '.join(names) if names else 'a model with buffers'}.",
                "a rule without a buffer has no effect.",
                Change("buffers", [f"{next(iter(names))}={rule}"]) if names else "",
            )


def _spectral_norms(module: nn.Module, given: Mapping[str, str]) -> tuple[Spectral, ...]:
    """The spectral norms of torch, as a parametrization or as a hook, without those whose buffers have a given rule."""
    found = []
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(part, _SpectralNorm) and prefix.endswith(".0"):
            found.append(Spectral(f"{prefix[:-1]}original", f"{dot}_u", f"{dot}_v", part.dim))
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                name = f"{dot}{hook.name}"
                found.append(Spectral(f"{name}_orig", f"{name}_u", f"{name}_v", hook.dim))
    names = named_tensors(module)
    return tuple(
        s
        for s in found
        if {s.weight, s.u, s.v} <= names.keys() and not any(fnmatchcase(n, p) for n in (s.u, s.v) for p in given)
    )
