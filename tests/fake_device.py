"""A fake second device: tensors that report another device and store their numbers on the CPU.

`FAR` is the `meta` device, which computes nothing. Inside `far_device()`, a tensor that is moved to it or made on it is
a `FarTensor`. Every operation on it runs on the CPU, so its bits must equal the CPU's. An operation on tensors of both
devices raises an error, as on a GPU. The exceptions are those of a GPU: a single number of the host, integers or
booleans of the host as an index, and copies.
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
    """A tensor that reports the device `FAR`.

    Args:
        inner: its numbers, on the CPU.
    """

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

    # Attributes that a wrapper subclass does not forward.

    is_meta = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, other: setattr(self, "inner", other.inner))

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"Far({self.inner!r})"


class _Made(TorchFunctionMode):
    """`torch.tensor` and similar functions make a tensor before dispatch sees it. So make it on the CPU and move it."""

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
        """Whether torch must keep its compiler away from this mode. True would import the whole compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def far_device() -> Iterator[None]:
    """Context in which the device `FAR` exists. Caches for `meta` tensors are cleared before and after."""
    _forget()
    try:
        with _Made(), _Computed():
            yield
    finally:
        _forget()


def _forget() -> None:
    """Clear the per-device caches of atoll's modules."""
    for name, module in list(sys.modules.items()):
        if name.startswith("atoll."):
            for remembered in list(vars(module).values()):
                if hasattr(remembered, "cache_clear"):
                    remembered.cache_clear()


def _computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = func.name()
    far: dict[int, FarTensor] = {}  # by the inner tensor, so that an in-place operation returns the same wrapper
    near: list[Tensor] = []
    asked: list[torch.device] = []

    def here(value: Any) -> Any:
        """Unwrap an argument for the CPU's operation, and record the tensors and devices in it."""
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
