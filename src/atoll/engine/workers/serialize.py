"""Rebuilds any class by its name: a module that serves a network (`atoll.net`) must never import this one.

Serialization for worker processes: values as plain trees and arrays, and arrays in memory that both processes map.

    None, bool, numbers, str, bytes, torch's dtypes, devices and sizes                unchanged
    tuples, lists, sets, dicts                                                        item by item
    tensors, numpy arrays                                                             in a shared block or mapped file
    functions and classes                                                             by name, module:name
    structs of msgspec                                                                as JSON
    modules, data sets and other objects whose state is their `__dict__`              name of the class, and the dict

No other value can be serialized. Deserialization imports the named modules. It runs no code from the message.

Tests: tests/parity/test_processes.py, tests/parity/test_ray_alone.py.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError
from atoll.base.lines import Change, Write
from atoll.base.names import load

_WRITTEN_IN_PYTHON = 1 << 9  # CPython's flag for heap types; static types of C lack it
_HOMES = ("torch", "torch.nn.functional", "builtins")  # modules to search for functions without `__module__`


class Packed(NamedTuple):
    """A serialized value: a tree of plain items, and the tensors that the tree refers to by number."""

    tree: Any
    tensors: dict[str, Tensor]


def serialize(value: Any, role: str, write: Write, spill: Callable[[], Path] | None) -> Packed:
    """Serialize a value.

    A memory-mapped array is sent as the name of its file. All other arrays become tensors.

    Args:
        value: the value.
        role: what the value is, such as "The task". Error messages begin with it.
        write: code that an error suggests to the user, if no better suggestion is known.
        spill: returns the path of a new file. A memory-mapped array whose own file cannot be used is written to it.
            None: such an array is sent as a tensor.
    Returns:
        The tree and its tensors.
    Raises:
        UsageError: a part of the value cannot be serialized. The error names the part.
    """
    packer = _Packer(write, spill)
    return Packed(packer.pack(value, role), packer.tensors)


def deserialize(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Deserialize a value. An object that occurs twice in the value is one object again.

    A module receives copies of its tensors, since it changes them. All other objects read the shared tensors.
    """
    return _Unpacker(tensors).unpack(tree)


def import_name(thing: Any, role: str) -> str:
    """The name, `module:name`, by which another process can import a function or class.

    Args:
        thing: the function or class.
        role: its role, for errors.
    Raises:
        UsageError: no module has it at its top level.
    Example:
        >>> import_name(nn.Linear, "the model")
        'torch.nn.modules.linear:Linear'
    """
    name, module = getattr(thing, "__qualname__", ""), getattr(thing, "__module__", None)
    kind = "class" if isinstance(thing, type) else "function"
    if module == "__main__":
        raise UsageError(
            f"{role}: the {kind} {name} is defined in __main__: a script, a notebook or a prompt.",
            f"a {kind} in a separate file, imported from there.",
            "a worker is another process: it receives numbers, and imports code by its name.",
            f"from my_{name.split('.')[0].strip('<>').lower()} import {name.split('.')[0].strip('<>')}",
        )
    for home in (module,) if module else _HOMES:
        try:
            if load(f"{home}:{name}") is thing:
                return f"{home}:{name}"
        except (ImportError, AttributeError):
            continue
    raise UsageError(
        f"{role}: the {kind} {name or thing!r} of {module} has no name that can be imported.",
        f"a {kind} at the top of a module.",
        "a worker is another process: it receives numbers, and imports code by its name.",
        Change("engine", "inprocess"),
    )


class _Packer:
    def __init__(self, write: Write, spill: Callable[[], Path] | None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._write, self._spill = write, spill
        self._seen: dict[int, tuple[int, Any]] = {}  # also keeps the value alive, since ids of dead objects are reused

    def pack(self, value: Any, at: str) -> Any:
        match value:
            case None | bool() | float() | str() | bytes() if type(value) in (type(None), bool, float, str, bytes):
                return value
            case int() if type(value) is int:
                return value if -(1 << 63) <= value < 1 << 63 else ["int", str(value)]
            case torch.dtype():
                return ["dtype", str(value).removeprefix("torch.")]
            case torch.device():
                return ["device", str(value)]
            case torch.Size():
                return ["size", list(value)]
            case tuple() if hasattr(value, "_fields"):
                return ["named", import_name(type(value), at), self._items(value, at)]
            case tuple() | list() | set() | frozenset() if type(value) in (tuple, list, set, frozenset):
                return [type(value).__name__, self._items(value, at)]
            case dict() if type(value) in (dict, collections.OrderedDict):
                pairs = [[self.pack(k, at), self.pack(v, f"{at}.{k}")] for k, v in value.items()]
                return [type(value).__name__, pairs]
        if id(value) in self._seen:
            return ["again", self._seen[id(value)][0]]
        number = len(self._seen)
        self._seen[id(value)] = number, value
        return ["new", number, self._thing(value, at)]

    def _items(self, items: Iterable[Any], at: str) -> list[Any]:
        return [self.pack(item, f"{at}[{i}]") for i, item in enumerate(items)]

    def _thing(self, value: Any, at: str) -> Any:
        match value:
            case Tensor() if type(value) in (Tensor, nn.Parameter, nn.Buffer):
                name = str(len(self.tensors))
                self.tensors[name] = value.detach()
                if isinstance(value, nn.Parameter) and value.requires_grad and value._backward_hooks:
                    hooks = self._items(value._backward_hooks.values(), f"{at}, the hook of its gradient")
                    return ["hooked", name, hooks]
                return ["parameter" if isinstance(value, nn.Parameter) else "tensor", name, value.requires_grad]
            case np.memmap():
                return self._mapped(value)
            case np.ndarray() if value.dtype.isnative and value.dtype.kind in "biuf":
                return self._array(value)
            case type():
                return ["code", import_name(value, at)]
            case _ if callable(value) and hasattr(value, "__qualname__"):
                return ["code", import_name(value, at)]
            case msgspec.Struct():
                return ["struct", import_name(type(value), at), msgspec.json.encode(value)]
        return ["object", import_name(type(value), at), self.pack(self._state(value, at), at)]

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        name = str(len(self.tensors))
        self.tensors[name] = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return ["array", name]

    def _mapped(self, array: np.memmap[Any, Any]) -> Any:
        """Serialize a mapped array as the name of its file. If that file was removed, write the array to a new one."""
        base = array
        while isinstance(base.base, np.memmap):
            base = base.base
        whole = array.flags.c_contiguous and base.flags.c_contiguous
        inside = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        path, offset = base.filename, int(base.offset) + inside
        if path is None or not whole or not Path(path).is_file():
            if self._spill is None:
                return self._array(array)
            path, offset = str(self._spill()), 0
            with open(path, "wb") as file:
                for piece in np.array_split(array, max(1, array.nbytes >> 24)):
                    file.write(np.ascontiguousarray(piece).tobytes())
        return ["mapped", os.path.abspath(path), array.dtype.str, list(array.shape), offset]

    def _state(self, value: Any, at: str) -> dict[str, Any]:
        """The `__dict__` of an object without other state; the fields of a dataclass."""
        kind: Any = type(value)
        if dataclasses.is_dataclass(value) and not hasattr(kind, "__setstate__"):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        plain = kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__
        plain &= all(base.__flags__ & _WRITTEN_IN_PYTHON for base in kind.__mro__[:-1])
        state = value.__getstate__() if plain and hasattr(value, "__dict__") else None
        if isinstance(state, dict):
            return state
        raise UsageError(
            f"{at} is a {kind.__module__}.{kind.__qualname__}.",
            "numbers, texts, tensors, arrays, code that can be imported, and objects made of them.",
            "a worker is another process, and other values cannot be sent to it.",
            self._write,
        )


class _Unpacker:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[int, Any] = {}
        self._copies = 0  # > 0 inside a module

    def unpack(self, tree: Any) -> Any:
        if not isinstance(tree, list):
            return tree
        match tree:
            case ["int", text]:
                return int(text)
            case ["dtype", name]:
                return getattr(torch, name)
            case ["device", text]:
                return torch.device(text)
            case ["size", items]:
                return torch.Size(items)
            case ["named", kind, items]:
                return load(kind)(*map(self.unpack, items))
            case ["dict" | "OrderedDict" as kind, pairs]:
                made = ((self.unpack(k), self.unpack(v)) for k, v in pairs)
                return dict(made) if kind == "dict" else collections.OrderedDict(made)
            case ["tuple" | "list" | "set" | "frozenset" as kind, items]:
                of: Callable[..., Any] = {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}[kind]
                return of(map(self.unpack, items))
            case ["again", number]:
                return self._made[number]
            case ["new", number, ["object", kind, state]]:
                return self._object(number, load(kind), state)
            case ["new", number, thing]:
                self._made[number] = self._thing(thing)
                return self._made[number]
        raise ValueError(f"No serialized value has the form {tree!r:.80}.")

    def _thing(self, tree: Any) -> Any:
        match tree:
            case ["parameter", name, grad]:
                return nn.Parameter(self._tensors[name].clone(), grad)
            case ["hooked", name, hooks]:
                parameter = nn.Parameter(self._tensors[name].clone())
                for hook in map(self.unpack, hooks):
                    parameter.register_hook(hook)
                return parameter
            case ["tensor", name, grad]:
                tensor = self._tensors[name]
                return tensor.clone().requires_grad_(grad) if self._copies else tensor
            case ["array", name]:
                return self._tensors[name].numpy()
            case ["mapped", path, dtype, shape, offset]:
                return np.memmap(path, np.dtype(dtype), "r", offset, tuple(shape))
            case ["code", name]:
                return load(name)
            case ["struct", kind, data]:
                return msgspec.json.decode(data, type=load(kind))
        raise ValueError(f"No serialized value has the form {tree!r:.80}.")

    def _object(self, number: int, kind: type, state: Any) -> Any:
        made: Any = object.__new__(kind)
        self._made[number] = made
        inside = issubclass(kind, nn.Module)
        self._copies += inside
        restored = self.unpack(state)
        self._copies -= inside
        if hasattr(made, "__setstate__"):
            made.__setstate__(restored)
        else:
            made.__dict__.update(restored)
        return made
