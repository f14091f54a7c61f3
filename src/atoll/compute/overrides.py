"""Replacements for some torch functions during a pass: keyed dropout, and batch norm for lanes under vmap.

Tests: tests/identities/test_dropout.py, tests/identities/test_numerics.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atoll.base.random import mix64, stir64
from atoll.compute.native import serving

_NATIVE = True  # tests set it to False, to compare the native and the torch implementation


def may_drop(module: nn.Module) -> bool:
    """Return whether a pass may call dropout. It cannot if all layers are torch's own, without hooks or dropout.

    Args:
        module: the model; all its submodules are inspected.
    Example:
        >>> may_drop(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), may_drop(nn.Sequential(nn.Dropout(0.1)))
        (False, True)
    """
    return any(
        not type(m).__module__.startswith("torch.nn.modules.")
        or isinstance(m, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention))
        or bool(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))
        for m in module.modules()
    )


class KeyedDropout(TorchFunctionMode):
    """Draw dropout masks from a keyed word instead of the global generator.

    The mask of an element is a function of (word, n, index of the element) for the n-th dropout call of the pass.
    """

    alone = True  # whether tensors belong to one client and have readable values; False under vmap

    def __init__(self, word: Callable[[], Tensor]) -> None:
        super().__init__()
        self.word, self.calls = word, 0  # called only if dropout occurs, since most models have none

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DROPOUTS:
            return self._drop(_DROPOUTS[func], *args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def _drop(
        self, channels: bool, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        self.calls += 1
        whole = input.dim() - 2 if channels else 0
        shape = (*input.shape[: input.dim() - whole], *(1,) * whole)
        if p >= 1.0:
            return input * 0.0
        word = self.word() + self.calls
        library = serving("dropout", input) if _NATIVE and self.alone else None
        if library is not None:
            mask = input.new_empty(shape)
            scale = float(1 / torch.tensor(1.0 - p, dtype=input.dtype))
            arguments = ctypes.c_uint64(int(word)), ctypes.c_int64(mask.numel()), ctypes.c_uint64(int(p * 2**24))
            library.keep(*arguments, ctypes.c_double(scale), ctypes.c_void_p(mask.data_ptr()))
            return input * mask
        index = torch.arange(prod(shape), device=input.device).mul_(-7046029254386353131)
        # Keep an element if its upper 24 bits, unsigned, are at least p·2²⁴. Flipping the sign bit makes the signed
        # comparison equal to the unsigned one.
        bits = stir64(mix64(word) + index).bitwise_xor_(-(1 << 63))
        keep = bits >= (int(p * 2**24) << 40) - (1 << 63)
        return input * keep.view(shape).to(input.dtype).div_(1.0 - p)


_DROPOUTS: Mapping[Any, bool] = {
    F.dropout: False,
    torch.dropout: False,
    F.dropout1d: True,
    F.dropout2d: True,
    F.dropout3d: True,
}


class VmapOverrides(KeyedDropout):
    """Also replace batch norm: torch joins the channels of all lanes, so rounding would depend on the position."""

    alone = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute batch norm from elementary operations: (x − mean) / √(var + eps) · weight + bias, per channel."""
    axes, shape, dtype = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2)), x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))  # 16-bit floats are too short for statistics
    mean, var, rows = running_mean, running_var, prod(x.shape) // x.shape[1]
    if training or mean is None or var is None:
        if rows == 1:
            raise ValueError(f"Batch statistics need at least 2 values per channel; {x.shape[1]} channels have 1 each.")
        mean = x.mean(axes)
        var = (x - mean.view(shape)).square().mean(axes)
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1 - momentum).add_(mean.detach(), alpha=momentum)
            running_var.mul_(1 - momentum).add_(var.detach(), alpha=momentum * rows / (rows - 1))
    out = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
    out = out if weight is None else out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(dtype)
