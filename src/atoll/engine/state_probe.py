"""Probes of everything that a module keeps: attributes, extra state, buffers, and weights inside a loss.

A pass that changes an attribute is repeated with the changed attribute. If the results are equal, the attribute is a
cache, and it is reset for each client. If they differ, the module is refused: atoll could not give each client the
attribute of its own.

Tests: tests/conformance/test_user_code.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.base.random import Key, user_scope
from atoll.compute.attributes import Reset, changed, frozen, pictures, roots_of, tensors_in
from atoll.compute.attributes import attributes as attributes_of
from atoll.compute.task import Task
from atoll.engine.probe import Pass, Probe

_UNIT = 1e-4  # largest distance of a norm from 1, for the rule "unit"


class StateFacts(NamedTuple):
    """The findings about the state of a module.

    Args:
        state: the paths of attributes that are reset for each client.
        constant: the names of float buffers that no pass changes.
        rules: the rules of other float buffers by name, where they differ from the mean.
        training, evaluation: a pass at the start model in each mode.
    """

    state: tuple[str, ...]
    constant: tuple[str, ...]
    rules: dict[str, str]
    training: Pass
    evaluation: Pass


def observe_state(probe: Probe) -> StateFacts:
    """Run passes in both modes and compare what the module keeps.

    Raises:
        UsageError: a pass changes an attribute that the next pass reads, extra state, or a buffer of the loss; or a
            tensor attribute that a computation returned is not computed again by a pass.
    """
    task = probe.task
    restore, before = Reset(task.roots), pictures(task.roots)
    stale, extra, held = _objects(task), _extra(task), _loss_buffers(task)
    training = probe.run()
    after = pictures(task.roots)
    _check_equal(task, extra, held)
    _check_derived(probe, stale, training)
    moved = set(changed(before, after))
    if moved:
        _check_repeated(probe, restore, training, tuple(sorted(moved)))
    restore()
    second = probe.run(1)
    restore()
    before = pictures(task.roots)
    evaluation = probe.run(training=False)
    in_evaluation = changed(before, pictures(task.roots))
    _check_equal(task, extra, held)
    if in_evaluation and not _same(evaluation, probe.run(training=False)):
        raise _matters(in_evaluation)
    restore()
    changes = _changed_buffers(task, (training, second, evaluation))
    constant = tuple(n for n, unit in changes.items() if unit is None)
    rules = {n: "unit" for n, unit in changes.items() if unit and n not in _ruled(task)}
    return StateFacts(
        tuple(sorted({*moved, *in_evaluation})),
        tuple(n for n in constant if n not in _ruled(task)),
        rules,
        training,
        evaluation,
    )


def _check_repeated(probe: Probe, restore: Callable[[], None], first: Pass, moved: tuple[str, ...]) -> None:
    """Repeat passes with the attributes that the first pass left, at both models and with other rows.

    Raises:
        UsageError: a result differs from that with the first attributes.
    """
    if not _same(first, probe.run()):
        raise _matters(moved)
    others = slice(len(probe.x) // 2, None)
    left = probe.run(1, others)
    restore()
    if not _same(left, probe.run(1, others)):
        raise _matters(moved)


def _same(a: Pass, b: Pass) -> bool:
    """Whether two passes have equal results, up to the order of additions."""
    pairs = [(a.loss, b.loss), (a.buffers, b.buffers)]
    if a.grad is not None and b.grad is not None:
        pairs.append((a.grad, b.grad))
    if isinstance(a.output, Tensor) and isinstance(b.output, Tensor):
        pairs.append((a.output, b.output))
    return all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-7, equal_nan=True)
        for x, y in pairs
    )


def _matters(names: tuple[str, ...]) -> UsageError:
    name = names[0].rpartition(".")[2]
    return UsageError(
        f"A pass changes {', '.join(names[:5])}, and the next pass has another result because of it.",
        "parameters and buffers for everything that lasts from one pass to the next.",
        "an attribute would carry values from one client to the next, and a resumed run would not have it.",
        Line(python=f'self.register_buffer("{name}", torch.zeros(()))'),
    )


def _objects(task: Task) -> dict[str, Tensor]:
    """The tensors that stand in for results of computations, by path."""
    wanted = set(task.derived)
    return {
        path: tensor
        for attribute in (attributes_of(task.module) if wanted else ())
        for path, tensor in tensors_in(attribute.value, attribute.path)
        if path in wanted
    }


def _check_derived(probe: Probe, stale: Mapping[str, Tensor], first: Pass) -> None:
    """Refuse a tensor attribute that a computation returned, if a pass reads it and does not compute it again."""
    now = _objects(probe.task)
    for path, tensor in stale.items():
        if now.get(path) is not tensor or not tensor.is_floating_point():
            continue
        tensor.add_(1.0)
        if not _same(first, probe.run()):
            raise UsageError(
                f"The attribute {path} is a tensor that was computed from others, and no pass computes it again.",
                "a parameter, a buffer, or a tensor that each pass computes.",
                "a copy of the module would keep its first value while the weights change.",
                Line(python=f'self.register_buffer("{path.rpartition(".")[2]}", tensor.detach())'),
            )


def _extra(task: Task) -> dict[str, Any]:
    """Pictures of the extra state of each submodule, by the key of `state_dict`."""
    return {
        f"{prefix}.{_EXTRA}" if prefix else _EXTRA: _plain(module.get_extra_state())
        for prefix, module in task.module.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


_EXTRA = "_extra_state"


def _plain(value: Any) -> Any:
    """A picture of a value in which a tensor is its numbers, since each call may return a new tensor."""
    return frozen(tree_map_only(Tensor, lambda t: (str(t.dtype), t.detach().cpu().tolist()), value))


def _loss_buffers(task: Task) -> dict[str, Any]:
    return {
        f"{prefix}{name}": frozen(buffer)
        for prefix, root in task.roots.items()
        if prefix and isinstance(root, nn.Module)
        for name, buffer in root.named_buffers()
    }


def _check_equal(task: Task, extra: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    """Refuse passes that have changed extra state, or buffers of a loss or metric."""
    for name in changed(extra, _extra(task)):
        raise UsageError(
            f"A pass changes {name}, the extra state of the model.",
            "extra state that stays the same, or a buffer.",
            "the server carries extra state as a constant, and cannot join the changes of clients.",
            Line(python='self.register_buffer("steps", torch.zeros((), dtype=torch.int64))'),
        )
    for name in changed(held, _loss_buffers(task)):
        raise UsageError(
            f"A pass changes the buffer {name}.",
            "a loss and metrics whose buffers stay the same.",
            "only buffers of the model are joined by the server. Move the buffer into the model.",
            Line(python=f'model.register_buffer("{name.rpartition(".")[2]}", torch.zeros(()))'),
        )


def _ruled(task: Task) -> set[str]:
    """The buffers with a rule that the user gave."""
    return {e.name for e in task.layout.entries if e.chosen}


def _changed_buffers(task: Task, passes: tuple[Pass, ...]) -> dict[str, bool | None]:
    """For each float buffer: None if no pass changes it, else whether its norm is 1 before and after each change."""
    first = task.layout.buffers(task.start.buffers)
    out: dict[str, bool | None] = dict.fromkeys(first)
    for each in passes:
        for name, now in task.layout.buffers(each.buffers).items():
            before = first[name]
            if not torch.equal(before, now):
                unit = before.dim() > 0 and all(abs(float(t.double().norm()) - 1) < _UNIT for t in (before, now))
                out[name] = unit and out[name] is not False
    return out


def refuse_trained_loss(probe: Probe) -> None:
    """Refuse a loss that depends on trainable tensors other than the model's output.

    Raises:
        UsageError: the loss has weights of its own.
    """
    task = probe.task
    try:
        with user_scope(Key(0).fold("probe")):
            output, _, _ = task.observe(probe.models[0], probe.x, probe.y, Key(0), training=False)
            leaf = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), output)
            with torch.enable_grad():
                values = task.loss(leaf, probe.y)
    except Exception:
        return  # the first pass of the loop reports it
    own: set[int] = set()
    tree_map_only(Tensor, lambda t: own.add(id(t)), leaf)
    foreign = [t for t in leaves_of(values) if id(t) not in own]
    if foreign:
        names = _names_in(task.loss, foreign)
        raise UsageError(
            f"The loss depends on trainable tensors that are not in the model: {', '.join(names)}.",
            "a loss without weights of its own.",
            "only the model is trained. Move the weights into the model, and return them in its output.",
            Line(python="model.weights = nn.Parameter(weights)"),
        )


def leaves_of(values: Tensor) -> Iterator[Tensor]:
    """The trainable tensors from which autograd computed these values."""
    todo, seen = [values.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [after for after, _ in node.next_functions]


def _names_in(loss: Any, tensors: list[Tensor]) -> list[str]:
    """The names of tensors among the variables and attributes of a loss; else their shapes."""
    known: dict[int, str] = {}
    code, cells = getattr(loss, "__code__", None), getattr(loss, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars if code else (), cells, strict=True):
        if isinstance(cell.cell_contents, nn.Module):
            known |= {id(p): f"{name}.{n}" for n, p in cell.cell_contents.named_parameters()}
        known |= {id(t): path for path, t in tensors_in(cell.cell_contents, name)}
    for root in roots_of(loss):
        known |= {id(t): path for a in attributes_of(root) for path, t in tensors_in(a.value, a.path)}
    return [known.get(id(t), f"a tensor of shape {tuple(t.shape)}") for t in tensors]
