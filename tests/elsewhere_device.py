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
from torch.utils._pytree import tree_leaves, tree_map_only

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
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    far = [t for t in tensors if isinstance(t, FarTensor)]
    if far and name not in _COPIES:
        _refuse_mixed(name, args, tensors)
    asked = [d for d in tree_leaves((args, kwargs)) if isinstance(d, torch.device)]
    goes_far = asked[0] == FAR if asked else bool(far)
    args, kwargs = tree_map_only(torch.device, lambda d: HERE, (args, kwargs))
    out = func(
        *tree_map_only(FarTensor, lambda t: t.inner, args), **tree_map_only(FarTensor, lambda t: t.inner, kwargs)
    )
    if name == "aten::copy_":
        return args[0]
    if not goes_far:
        return out
    known = {id(t.inner): t for t in far}  # what was changed in place is the same tensor
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else FarTensor(t), out) if _any(out) else out


def _any(out: Any) -> bool:
    return any(isinstance(t, Tensor) for t in tree_leaves(out))


def _refuse_mixed(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    near = [t for t in tensors if not isinstance(t, FarTensor) and (t.dim() or name in _JOINED)]
    if name in _INDEXED and isinstance(args[0], FarTensor):
        near = [t for t in near if t.is_floating_point()]
    if near:
        shapes = [(list(t.shape), "far" if isinstance(t, FarTensor) else "here") for t in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} was given {shapes}")
