"""A second device on a machine that has one: tensors that say they are elsewhere, and hold their numbers here.

`FAR` is the `meta` device, which computes nothing. Inside `far_device()` a tensor that is moved or made there is a
`FarTensor`: every operation on it is the CPU's, so its numbers are real and must come to the CPU's bits; and an
operation that is given tensors of both devices raises, as it would on a GPU. What a GPU allows is allowed: a single
number of the host, whole numbers or truth values of the host as an index, and copies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FAR, HERE = torch.device("meta"), torch.device("cpu")
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::to.other", "aten::to.device", "aten::to.dtype_layout")
_JOINED = ("aten::cat", "aten::stack")
_INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class FarTensor(Tensor):
    """A tensor that says it is elsewhere. Args: inner: its numbers, here."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> FarTensor:
        start, dtype = inner.storage_offset(), inner.dtype
        return Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), start, dtype=dtype, device=FAR)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    # What a wrapper cannot answer by itself.

    is_meta = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, other: setattr(self, "inner", other.inner))

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"Far({self.inner!r})"


class _Made(TorchFunctionMode):
    """`torch.tensor` and its like make a tensor before anybody hears of it: it is made here, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": HERE}).to(kwargs["device"])
        if func is Tensor.new_tensor and isinstance(args[0], FarTensor):
            return func(args[0].inner, *args[1:], **kwargs).to(FAR)
        return func(*args, **kwargs)


class _Computed(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: to be kept from the compiler would load all of it first."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def far_device() -> Iterator[None]:
    """While it is on, the device `FAR` exists; what is remembered of `meta` tensors is not of its tensors."""
    _forget()
    try:
        with _Made(), _Computed():
            yield
    finally:
        _forget()


def _forget() -> None:
    """Empty the tables that parts keep by device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("atoll."):
            for remembered in list(vars(module).values()):
                if hasattr(remembered, "cache_clear"):
                    remembered.cache_clear()


def _computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = func.name()
    far: dict[int, FarTensor] = {}  # by the tensor within: what is changed in place is the same tensor
    near: list[Tensor] = []
    asked: list[torch.device] = []

    def here(value: Any) -> Any:
        """An argument as the CPU's operation takes it, and beside it what was met on the way."""
        if isinstance(value, FarTensor):
            far[id(value.inner)] = value
            return value.inner
        if isinstance(value, Tensor):
            near.append(value)
        elif isinstance(value, torch.device):
            asked.append(value)
            return HERE
        elif isinstance(value, (tuple, list)):
            return type(value)([here(item) for item in value])
        return value

    inner, words = [here(value) for value in args], {word: here(value) for word, value in kwargs.items()}
    if far and near and name not in _COPIES:
        _refuse_mixed(name, args, near, list(far.values()))
    out = func(*inner, **words)
    if name == "aten::copy_":
        return args[0]
    goes_far = asked[0] == FAR if asked else bool(far)
    return _there(out, far) if goes_far else out


def _there(out: Any, far: Mapping[int, FarTensor]) -> Any:
    if isinstance(out, Tensor):
        return far[id(out)] if id(out) in far else FarTensor(out)
    return type(out)([_there(item, far) for item in out]) if isinstance(out, (tuple, list)) else out


def _refuse_mixed(name: str, args: tuple[Any, ...], near: list[Tensor], far: list[FarTensor]) -> None:
    wrong = [t for t in near if t.dim() or name in _JOINED]
    if name in _INDEXED and isinstance(args[0], FarTensor):
        wrong = [t for t in wrong if t.is_floating_point()]
    if wrong:
        shapes = [*((list(t.shape), "far") for t in far), *((list(t.shape), "here") for t in wrong)]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} was given {shapes}")
