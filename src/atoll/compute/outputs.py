"""The tensor of a model's output: the output itself, its `logits`, or those of the first item of a tuple.

Tests: tests/data/test_hub.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Line


def logits_of(output: Any) -> Tensor:
    """The tensor of an output.

    Args:
        output: a tensor, a mapping or an object with `logits`, or a tuple whose first item is one of these.
    Raises:
        UsageError: the output has no such tensor; the error lists its fields.
    Example:
        >>> import torch
        >>> logits_of({"logits": torch.zeros(2, 3)}).shape, logits_of((torch.zeros(2, 3), None)).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(first, Tensor):
        return first
    found = first.get("logits") if isinstance(first, Mapping) else getattr(first, "logits", None)
    if isinstance(found, Tensor):
        return found
    names = [*first] if isinstance(first, Mapping) else [f.name for f in fields(first)] if is_dataclass(first) else []
    held = f" with the fields {', '.join(map(str, names))}" if names else ""
    name = next((n for n in names if isinstance(n, str) and n.isidentifier()), "last_hidden_state")
    raise UsageError(
        f"The model returned {type(output).__name__}{held}, and no logits.",
        "a tensor, an object with logits, or a tuple that begins with one of these.",
        "the loss compares one tensor with the targets.",
        Line(python=f"def forward(self, **words): return self.head(self.model(**words).{name})"),
    )
