"""The tensor of a model's output: the output itself, or its `logits`.

Tests: tests/data/test_hub.py, tests/identities/test_shapes.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from atoll.compute.shapes import check_output


def logits_of(output: Any) -> Tensor:
    """The tensor of an output.

    The first item of a tuple is not taken: it may be a loss, a hidden state or a reconstruction.

    Args:
        output: a tensor, or a mapping or an object with `logits`.
    Raises:
        UsageError: the output has no such tensor; the error lists its fields.
    Example:
        >>> import torch
        >>> logits_of({"logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(output, Tensor) and isinstance(found, Tensor):
        return found
    check_output(output)
    tensor: Tensor = output
    return tensor
