"""A probe of coupling: whether the numbers of a row depend on the other rows of its batch.

Outputs, losses, metrics and gradients of a few rows are computed together, for the first and the second half, and for
single rows. If a number differs by more than rounding, the rows are coupled: no row of a batch may be padding, and a
batch is one pass.

Tests: tests/conformance/test_coupling.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from atoll.base.random import Key, user_scope
from atoll.compute.loss import built_in
from atoll.compute.metrics import Counts
from atoll.compute.overrides import may_drop
from atoll.compute.user_code import Findings
from atoll.engine.probe import Pass, Probe

_FAR = {"full": 1e-5, "bf16": 2e-2}  # largest difference by rounding, relative to the largest number of a tensor
_KEY = Key(0).fold("probe", "coupling")


class Coupling(NamedTuple):
    """The causes of coupling in training and in evaluation, as short texts."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...]


def coupling(probe: Probe, draws: tuple[str, ...]) -> Coupling:
    """Find the numbers of a row that depend on other rows.

    Args:
        probe: a few rows of a client. One row cannot be compared, and gives no cause. Known layers are not tested.
        draws: the passes that draw from a global generator, `"training"` or `"evaluation"`. They cannot be compared.
            The loop computes them, without padding.
    """
    known, declared = probe.task.findings.couples, probe.task.findings.couples_in_evaluation
    some = len(probe.x) > 1 and not probe.task.rows_are_independent
    training = () if known or "training" in draws or not some else _causes(_training(probe))
    evaluation = () if declared or "evaluation" in draws or not some else _causes(_evaluation(probe))
    return Coupling(known or training, declared or evaluation)


def coupling_notes(before: Findings, after: Findings) -> tuple[str, ...]:
    """A note for each cause of coupling that a probe has found.

    Args:
        before, after: the findings before and after the probe.
    """
    known = {*before.couples, *before.couples_in_evaluation}
    causes = dict.fromkeys(c for c in (*after.couples, *after.couples_in_evaluation) if c not in known)
    return tuple(
        f"Rows of a batch are coupled: {cause}. No row is padding, and a batch is one pass." for cause in causes
    )


def _causes(found: Iterator[str]) -> tuple[str, ...]:
    first = next(found, None)  # one cause is enough
    return () if first is None else (first,)


def _training(probe: Probe) -> Iterator[str]:
    """The causes in training mode. The mask of keyed dropout depends on the position of a row, so that only first rows
    can be compared with dropout."""
    rows, silent = len(probe.x), 0
    drops = _drops(probe)
    for model in range(2):
        whole = probe.run(model)
        parts = {}
        for piece in _pieces(rows, first_only=drops):
            part = _tried(lambda at=piece, m=model: probe.run(m, at))  # type: ignore[misc]
            if part is None:
                yield f"a batch of {piece.stop - piece.start} rows fails"
                return
            parts[piece.start, piece.stop] = part
            if _far(probe, whole.output, part.output, piece):
                yield "the output of a row depends on the other rows"
            if _far(probe, whole.loss, part.loss, piece):
                yield "the loss of a row depends on the other rows"
        if not drops and _gradients_differ(probe, whole, parts[0, rows // 2], parts[rows // 2, rows]):
            yield "the gradient of a row depends on the other rows"
        silent += whole.grad is not None and not bool(whole.grad.any())
    if silent == 2 and not built_in(probe.task.loss):
        yield "the loss has no gradient for the tested rows, so that they show no coupling"


def _drops(probe: Probe) -> bool:
    """Whether a training pass depends on the key of dropout."""
    if not may_drop(probe.task.module):
        return False
    with user_scope(_KEY):
        _, loss, grad = probe.task.observe(probe.models[0], probe.x, probe.y, _KEY)
    first = probe.run()
    return not torch.equal(loss.detach(), first.loss) or not torch.equal(grad, first.grad)  # type: ignore[arg-type]


def _evaluation(probe: Probe) -> Iterator[str]:
    """The causes in evaluation mode: outputs, losses, and the sums of each metric."""
    for model in range(2):
        whole = _scores(probe, model, slice(0, len(probe.x)))
        for piece in _pieces(len(probe.x)):
            part = _tried(lambda at=piece, m=model: _scores(probe, m, at))  # type: ignore[misc]
            if part is None:
                yield f"a batch of {piece.stop - piece.start} rows fails"
                return
            for name, values in whole.items():
                if _far(probe, values, part[name], piece):
                    yield f"the {name} of a row depends on the other rows"


def _scores(probe: Probe, model: int, piece: slice) -> dict[str, Any]:
    """The output, the loss and the sums of each metric of some rows, by name."""
    output = probe.run(model, piece, training=False).output
    if probe.task.built_in:  # atoll's own losses and metrics relate no rows
        return {"output": output}
    with torch.no_grad(), user_scope(_KEY):
        scores = probe.task.scores(output, probe.y[piece])
    named = {n if n == "loss" else f"metric {n}": s.index if isinstance(s, Counts) else s for n, s in scores.items()}
    return {"output": output, **named}


def _pieces(rows: int, first_only: bool = False) -> Iterator[slice]:
    """Both halves, and the first and the last row."""
    half = rows // 2
    yield slice(0, half)
    if not first_only:
        yield slice(half, rows)
    if half > 1:
        yield slice(0, 1)
    if rows - half > 1 and not first_only:
        yield slice(rows - 1, rows)


def _tried(run: Callable[[], Any]) -> Any:
    """The result, or None if the user's code raised an exception."""
    try:
        return run()
    except Exception:
        return None


def _far(probe: Probe, whole: Any, part: Any, piece: slice) -> bool:
    """Whether the numbers of some rows differ from those that the same rows have in the whole batch."""
    pairs = list(zip(tree_leaves(whole), tree_leaves(part), strict=False))
    for all_rows, some in pairs:
        if not isinstance(all_rows, Tensor) or not all_rows.dim() or len(all_rows) != len(probe.x):
            continue
        same = all_rows[piece]
        if same.shape != some.shape:
            return True
        scale = all_rows.abs().max() if all_rows.numel() else 0.0
        if same.numel() and bool((same.double() - some.double()).abs().max() > _limit(probe, scale)):
            return True
    return False


def _gradients_differ(probe: Probe, whole: Pass, first: Pass, second: Pass) -> bool:
    """Whether the gradient of all rows differs from the sum of the gradients of both halves."""
    if whole.grad is None or first.grad is None or second.grad is None:
        return False
    scale = max(g.abs().max() for g in (whole.grad, first.grad, second.grad))
    return bool((whole.grad - first.grad - second.grad).abs().max() > _limit(probe, scale))


def _limit(probe: Probe, scale: Tensor | float) -> Tensor | float:
    return _FAR[probe.task.precision] * scale
