"""Tests the outputs of the model, the loss and the metrics on a few rows, before the first round.

Tests: tests/identities/test_shapes.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atoll.base.errors import AtollError, UsageError, place_of
from atoll.base.lines import Change, Line, Write
from atoll.base.random import Key, global_scope
from atoll.compute.loss import ClassWeighted, cross_entropy, single_logit, values_of
from atoll.compute.metrics import Counts, row_sums
from atoll.compute.shapes import check_output, class_axis
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.rows import in_memory

_NOISE = 0.1  # standard deviation of the second probe point: zero weights can hide the form of an output


def outputs(task: Task, x: Tensor) -> tuple[Any, Any]:
    """The outputs of the model in evaluation mode, at θ and at θ plus keyed noise.

    Args:
        task: the model.
        x: rows `[n, …]`.
    """
    model = task.initial()
    noise = Key(0).fold("probe", "noise").normal(len(model.theta), model.theta.dtype).to(model.theta.device)
    with global_scope(Key(0).fold("probe")):
        return task.output(model, x), task.output(model._replace(theta=model.theta + _NOISE * noise), x)


def check_answers(task: Task, data: Clients, x: Tensor, y: Tensor) -> None:
    """Refuse an output, a loss or a metric that does not fit the rows.

    Args:
        task: the model, loss and metrics.
        data: the clients.
        x, y: a few rows `[n, …]`.
    Raises:
        UsageError: the output is no tensor, has no logit for a class, or contains probabilities; or the loss or a
            metric has no finite number for each row.
    """
    first, second = outputs(task, x)
    if first is None:
        check_output(first)
    loss = task.loss.loss if isinstance(task.loss, ClassWeighted) else task.loss
    if isinstance(loss, (cross_entropy, nn.CrossEntropyLoss)) and not y.is_floating_point():
        _check_classes(loss, data, first, second, y)
    calls: dict[str, Callable[[], Tensor | Counts]] = {"loss": partial(values_of, task.loss, first, y)}
    calls |= {f"metric {m.name}": partial(row_sums, m, first, y) for m in task.metrics if m.sums is not None}
    for name, call in calls.items():
        with torch.no_grad(), global_scope(Key(0).fold("probe")):
            try:
                each = call()
            except AtollError:
                raise
            except Exception as error:
                raise _raised(name, first, y, error) from error
        if isinstance(each, Tensor) and not bool(torch.isfinite(each).all()):
            row = int((~torch.isfinite(each)).nonzero()[0][0])
            raise UsageError(
                f"The {name} is {each[row].tolist()} at the start, for row {row} of the first client.",
                "a finite number for each row.",
                "one NaN or infinity makes every number of the model NaN.",
            )


def _example(task: Task, data: Clients) -> tuple[Tensor, Tensor]:
    """One row, twice: a model that removes axes of length 1 would also remove the axis of a single row."""
    return tuple(  # type: ignore[return-value]
        t.to(task.device, task.layout.dtype if t.is_floating_point() else t.dtype).repeat_interleave(2, 0)
        for t in data.example
    )


def fitting_metrics(task: Task, data: Clients) -> Task:
    """The task without the metrics that cannot compare the output with the targets, and a note for each of them.

    Args:
        task: a task with metrics that the user did not choose.
        data: the clients; one row is read.
    """
    x, y = _example(task, data)
    try:
        output, _ = outputs(task, x)
    except Exception:
        return task  # the test of the backend repeats the pass, and its error describes the model
    fitting, notes = [], []
    for metric in task.metrics:
        try:
            with torch.no_grad():
                row_sums(metric, output, y)
        except UsageError as error:
            notes.append(f"No metric {metric.name}, the default, because {error.given[0].lower()}{error.given[1:]}")
        else:
            fitting.append(metric)
    return replace(task, metrics=tuple(fitting), notes=(*task.notes, *notes))


def sum_lengths(task: Task, data: Clients) -> dict[str, int]:
    """How many numbers the sums of each metric have that is not one number, by name.

    Args:
        task: the model and the metrics.
        data: the clients; one row is read.
    """
    if all(m.finish is None for m in task.metrics):
        return {}
    x, y = _example(task, data)
    with global_scope(Key(0).fold("probe")), torch.no_grad():
        scores = task.scores(task.output(task.initial(), x), y)
    lengths = {n: s.length if isinstance(s, Counts) else s[0].numel() for n, s in scores.items()}
    return {n: length for n, length in lengths.items() if length != 1}


def failed_pass(task: Task, x: Tensor, error: Exception) -> UsageError:
    """The error for a model or a loss that raised an exception in the first pass.

    Args:
        task: the model.
        x: a row `[1, …]`.
        error: the exception.
    """
    place = place_of(error)
    given = f"The model or its loss does not take a batch of this data: {type(error).__name__}: {error}".rstrip(".")
    row = f"rows of {', '.join(map(str, task.fields)) or f'shape {tuple(x.shape[1:])} ({x.dtype})'}"
    why, write = _width(task, x)
    return UsageError(
        f"{given}.{f' It was raised in {place}.' if place else ''}",
        f"a model for {row}, and a loss with one value a row.",
        why or "one pass over a few rows was tested before the first round.",
        write,
    )


def _width(task: Task, x: Tensor) -> tuple[str, Write]:
    """The reason and the line if the first layer that fails has another width than its input; else empty texts."""
    module, entered = task.rebuilt(task.initial()), list[tuple[nn.Module, Any]]()
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    hooks: list[Any] = [m.register_forward_pre_hook(lambda m, given: entered.append((m, given[:1]))) for m in leaves]
    hooks += [m.register_forward_hook(lambda *_: entered.clear()) for m in leaves]  # this layer took its input
    inputs = task.inputs(x)
    with torch.no_grad(), contextlib.suppress(Exception):
        _ = module(**inputs) if isinstance(inputs, dict) else module(x)
    for hook in hooks:
        hook.remove()
    layer, (given, *_) = entered[-1] if entered else (None, (None,))
    if not isinstance(given, Tensor):
        return "", ""
    shape = f"and its input has shape {tuple(given.shape)}."
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and given.shape[1:2] != (layer.in_channels,):
        return f"the layer {type(layer).__name__} has in_channels={layer.in_channels}, {shape}", ""
    if not isinstance(layer, nn.Linear) or given.dim() < 2 or given.shape[-1] == layer.in_features:
        return "", ""
    line = f"nn.Linear({given.shape[-1]}, {layer.out_features})"
    if given[0].numel() == layer.in_features:
        line = "nn.Sequential(nn.Flatten(), model)"
    return f"the layer Linear has in_features={layer.in_features}, {shape}", Line(python=line if given is x else "")


def _raised(name: str, output: Any, y: Tensor, error: Exception) -> UsageError:
    """The error for a loss or a metric that raised an exception."""
    if not isinstance(output, Tensor):
        try:
            check_output(output)
        except UsageError as refused:
            return refused
    place = place_of(error)
    text = f"The {name} raised {type(error).__name__}: {error}"
    return UsageError(
        f"{text.rstrip('.')}. It was raised in {place}." if place else text,
        f"a function of the output {tuple(output.shape)} ({output.dtype}) and the targets {tuple(y.shape)} "
        f"({y.dtype}), with one value a row.",
        "it was tested with a few rows before the first round.",
    )


def _check_classes(loss: Any, data: Clients, first: Any, second: Any, y: Tensor) -> None:
    """Refuse logits without an entry for each class, and probabilities in place of logits."""
    check_output(first)
    at, _ = class_axis(first, y, loss.axis if isinstance(loss, cross_entropy) else 1)
    classes = len(data.classes) if data.classes else _labels(data, y)
    if first.shape[at] < classes:
        single = classes == 2 and single_logit(first, y)
        raise UsageError(
            f"The model returned {tuple(first.shape)} for {len(y)} rows of {classes} classes.",
            f"{classes} numbers on axis {at}: one logit for each class.",
            "the loss of a row is undefined if its class has no logit.",
            Change("loss", "binary_cross_entropy") if single else "",
        )
    if first.shape[at] > 1 and all(_probabilities(output, at) for output in (first, second)):
        raise UsageError(
            "The model returned probabilities: they are at least 0 and their sum over the classes is 1.",
            "logits: remove the softmax from the end of the model.",
            "cross-entropy applies a softmax; a second one flattens the gradient.",
        )


def _labels(data: Clients, y: Tensor) -> int:
    """The number of classes that the labels of several places require, from all labels if they are in memory."""
    labels = data.rows.targets() if in_memory(data.rows) else y
    return 1 + int(labels.max())


def _probabilities(output: Tensor, at: int) -> bool:
    low, total = output.amin(), output.sum(at)
    return bool(low >= 0) and bool(((total - 1).abs() < 1e-3).all())


def has_single_logit(task: Task, data: Clients) -> bool:
    """Whether the model returns one number for each target; False if it cannot take the rows.

    Args:
        task: the model.
        data: the clients; one row is read.
    """
    x, y = _example(task, data)
    try:
        output, _ = outputs(task, x)
    except Exception:
        return False  # the test of the backend repeats the pass, and its error describes the model
    return isinstance(output, Tensor) and single_logit(output, y)
