"""The plain attributes of a user's objects: those that are no parameter, no buffer, no submodule and no hook.

A private copy of a module has the same attributes. A probe compares them before and after a pass. Attributes that a
pass changes are reset for each client.

Tests: tests/conformance/test_user_code.py
"""

from __future__ import annotations

import copy
import functools
import hashlib
import random
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError

_TORCH = frozenset(vars(nn.Module()))  # tables of tensors, submodules and hooks, and the mode
_PLAIN = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_DEEP = 8  # levels of nested containers and objects that are followed


class Attribute(NamedTuple):
    """A plain attribute: its path from the root, the table that contains it, its name there, and its value."""

    path: str
    table: dict[str, Any]
    name: str
    value: Any


class Same:
    """An object that equals another only if both refer to the same thing. It keeps the thing alive."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def roots_of(code: Any) -> list[Any]:
    """The objects with attributes in a piece of user code: a module, a callable object, the object of a bound method.

    Example:
        >>> roots_of(len), len(roots_of(nn.Linear(1, 1)))
        ([], 1)
    """
    if isinstance(code, types.MethodType):
        return roots_of(code.__self__)
    if isinstance(code, functools.partial):
        return [root for part in (code.func, *code.args, *code.keywords.values()) for root in roots_of(part)]
    if isinstance(code, (*_CODE, *_PLAIN, float, Tensor)) or not hasattr(code, "__dict__"):
        return []
    if isinstance(code, nn.Module):
        return [code]
    return [code, *(value for value in vars(code).values() if isinstance(value, nn.Module))]


def attributes(root: Any) -> Iterator[Attribute]:
    """The plain attributes of an object; of a module those of all its submodules."""
    if not isinstance(root, nn.Module):
        yield from (Attribute(name, vars(root), name, value) for name, value in vars(root).items())
        return
    for prefix, module in root.named_modules():
        table = vars(module)
        for name, value in list(table.items()):
            if name not in _TORCH and not isinstance(module, torch.jit.ScriptModule):
                yield Attribute(f"{prefix}.{name}" if prefix else name, table, name, value)
        for name, buffer in module._buffers.items():
            if buffer is None:  # a pass may set it
                yield Attribute(f"{prefix}.{name}" if prefix else name, module._buffers, name, None)


def tensors_in(value: Any, path: str, seen: set[int] | None = None, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors inside a value, with their paths: in containers and in attributes of other objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value
        return
    if id(value) in seen or depth > _DEEP or isinstance(value, (*_PLAIN, *_CODE, float, np.ndarray)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner: Iterable[tuple[str, Any]] = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        inner = ((f"{path}.{name}", item) for name, item in vars(value).items())
    else:
        return
    for where, item in inner:
        yield from tensors_in(item, where, seen, depth + 1)


def frozen(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A comparable picture of a value: equal pictures mean that nothing in it has changed.

    Example:
        >>> box = [torch.zeros(2)]
        >>> before = frozen(box)
        >>> box[0].add_(1) is box[0], frozen(box) == before
        (True, False)
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, float):
        return float, value.hex()
    if isinstance(value, (nn.Parameter, nn.Module, *_CODE)):
        return "same", id(value)
    if isinstance(value, Tensor):
        return "tensor", Same(value), tuple(value.shape), _digest(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return "array", value.dtype.str, value.shape, np.asarray(value).tobytes()
    if id(value) in seen or len(seen) > _DEEP:
        return "again", type(value)
    return _frozen_object(value, seen | {id(value)})


def _frozen_object(value: Any, seen: frozenset[int]) -> Any:
    match value:
        case Mapping():
            return type(value), [(frozen(k, seen), frozen(v, seen)) for k, v in value.items()]
        case set() | frozenset():
            return type(value), sorted(map(repr, value))
        case list() | tuple() | deque():
            return type(value), [frozen(item, seen) for item in value]
        case torch.Generator():
            return "generator", _digest(value.get_state())
        case random.Random():
            return "generator", value.getstate()
        case np.random.Generator():
            return "generator", repr(value.bit_generator.state)
        case np.random.RandomState():
            return "generator", repr(value.get_state(legacy=False))
        case types.MethodType():
            return "method", value.__func__, id(value.__self__)
    if hasattr(value, "__dict__"):
        return type(value), [(n, frozen(v, seen)) for n, v in vars(value).items()]
    return type(value), repr(value) if type(value).__module__ in ("itertools", "datetime") else id(value)


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.detach()
    if plain.layout != torch.strided or plain.is_meta:
        return repr(plain).encode()
    whole = plain.cpu().contiguous().flatten().view(torch.uint8) if plain.numel() else torch.empty(0, dtype=torch.uint8)
    return hashlib.blake2b(whole.numpy().data, digest_size=16).digest()


def deep_copy(code: Any, role: str) -> Any:
    """A deep copy of a module or of a callable object, with its gradient hooks. A function is returned unchanged.

    Tensors that a computation returned are copied as plain values, because torch cannot copy them with their history.

    Args:
        code: the module, or another callable.
        role: its role, for errors.
    Raises:
        UsageError: the object cannot be copied.
    """
    memo: dict[int, Any] = {}
    roots = roots_of(code)
    for root in roots:
        for part in root.modules() if isinstance(root, nn.Module) else ():
            # A module has a dozen empty dicts of hooks. copy.deepcopy takes longer for them than for small tensors.
            values = [v for v in vars(part).values() if type(v) in (OrderedDict, set)]
            memo |= {id(v): type(v)() for v in values if not v and not getattr(v, "__dict__", None)}
        for attribute in attributes(root):
            for _, tensor in tensors_in(attribute.value, attribute.path):
                if not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    if not roots:
        return code
    try:
        with torch.no_grad():  # torch clones the parameters of a scripted module, with a history if gradients are on
            made = copy.deepcopy(code, memo)
    except Exception as error:
        raise UsageError(
            f"{role} cannot be copied: {type(error).__name__}: {error}",
            "an object that copy.deepcopy copies.",
            "each training has a copy of its own, so that your object stays unchanged.",
        ) from error
    for mine, theirs in zip(map(parameters_of, roots), map(parameters_of, roots_of(made)), strict=True):
        for before, after in zip(mine, theirs, strict=True):
            after.requires_grad_(before.requires_grad)
            for hook in (before._backward_hooks or {}).values() if after.requires_grad else ():
                after.register_hook(hook)
    return made


def parameters_of(root: Any) -> list[nn.Parameter]:
    """The parameters of a module, each once; none of another object."""
    return list(root.parameters()) if isinstance(root, nn.Module) else []


class Reset:
    """The first values of some attributes, to set them again for each client.

    Args:
        roots: the objects, by a name that the paths begin with; the name of the model is empty.
        paths: the paths of the attributes. None: all plain attributes.
    """

    def __init__(self, roots: Mapping[str, Any], paths: Iterable[str] | None = None) -> None:
        wanted = None if paths is None else set(paths)
        found = [
            (f"{prefix}{attribute.path}", attribute)
            for prefix, root in roots.items()
            for attribute in attributes(root)
            if wanted is None or f"{prefix}{attribute.path}" in wanted
        ]
        self._own = {
            id(thing): thing
            for root in roots.values()
            if isinstance(root, nn.Module)
            for group in (root.modules(), root.parameters(), root.buffers())
            for thing in group
        }
        self._places = {path: (attribute.table, attribute.name) for path, attribute in found}
        self._first = self._copies({path: attribute.value for path, attribute in found})
        self._tables = [(prefix, root) for prefix, root in roots.items()] if wanted is None else []

    def _copies(self, values: dict[str, Any]) -> dict[str, Any]:
        """Deep copies that refer to the same parameters, buffers and submodules."""
        memo = dict(self._own)
        for path, value in values.items():
            for _, tensor in tensors_in(value, path):
                if not tensor.is_leaf and id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().clone()
        return copy.deepcopy(values, memo)

    def __call__(self) -> None:
        """Set the attributes to copies of their first values, and remove attributes that were added since."""
        for path, value in self._copies(self._first).items():
            table, name = self._places[path]
            table[name] = value
        for prefix, root in self._tables:
            for attribute in list(attributes(root)):
                if f"{prefix}{attribute.path}" not in self._first:
                    del attribute.table[attribute.name]


def pictures(roots: Mapping[str, Any]) -> dict[str, Any]:
    """The picture of each plain attribute, by path, to compare them before and after a pass."""
    return {f"{prefix}{a.path}": frozen(a.value) for prefix, root in roots.items() for a in attributes(root)}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths at which two results of `pictures` differ, sorted."""
    nothing = object()
    return tuple(sorted(p for p in {**before, **after} if before.get(p, nothing) != after.get(p, nothing)))
