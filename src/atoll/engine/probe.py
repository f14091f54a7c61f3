"""Which body computes the clients: tried on the model at hand before the first round, and said why."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.compiled import build, products, stages
from atoll.data.clients import Clients
from atoll.engine.elementwise import Elementwise
from atoll.errors import AtollError, UsageError
from atoll.fused import Unserved
from atoll.loss import cross_entropy
from atoll.native import Unbuilt
from atoll.plan.lanes import Lanes
from atoll.plan.plan import Plan
from atoll.plan.protocols import Population
from atoll.rng import Key, generator_states, global_scope
from atoll.task import Gradient, Task

BODIES = ("auto", "lanes", "loop", "fused", "compiled")
_WORTH = 2e10  # products of a run from which on a library is built for it: what takes fused layers about as long
_LARGE = 100_000  # parameters from which a client's kernels are worth their start: lanes then only move more memory
_FAR = {"full": 1e-3, "bf16": 0.2}  # of a gradient's largest number: more is not rounding


class Choice(NamedTuple):
    """A task with its body chosen, and the reason in words."""

    task: Task
    reason: str


def choose(task: Task, data: Clients, plan: Plan, wanted: str = "auto", rounds: int = 1) -> Choice:
    """Choose the body for a run: known layers by hand, and in native code where the run is long enough to be worth it;
    `lanes` where they take the model, keep every lane's bits to themselves, and are quicker; or the loop.

    The choice is made by the model, the data, the plan and what is installed, never by a timing.

    Args:
        task: the task; its `numerics` are not looked at.
        data: the clients; a few rows of one are computed.
        plan: the plan; a local part may ask for a body of its own.
        wanted: `"auto"`, or a body that is taken or refused.
        rounds: how many there will be.
    Raises:
        UsageError: the model or the loss does not fit the data, or the wanted body cannot take the model.
    """
    if wanted not in BODIES:
        raise UsageError(f"numerics = {wanted!r}.", f"one of {', '.join(BODIES)}.", write="--numerics auto")
    rows = min(4, int(data.sizes.max()))
    task = replace(task, numerics="loop", noisy=False)
    task = replace(task, noisy=_passes(task, data, rows))
    own = plan.local.numerics
    if own == "loop" and task.precision != "full":
        raise UsageError(
            f"precision = {task.precision!r} with {plan.local!r:.80}.",
            "a local part of atoll's own.",
            "a loop of your own computes as it is written: torch.autocast belongs in there.",
            "--precision full",
        )
    if own == "loop":
        return Choice(task, "the plan's own loop runs client by client")
    if wanted == "loop":
        return Choice(task, "asked for")
    if wanted == "auto" and data.count == 1:
        return Choice(task, "one client: there is none to put beside it")
    if wanted in ("auto", "fused", "compiled") and task.precision == "full":
        body = "compiled" if wanted == "compiled" else "fused"
        trouble = _trouble(replace(task, numerics=body), task, data, rows)
        if trouble and wanted != "auto":
            raise _refused(wanted, *trouble)
        if wanted != "auto":
            return Choice(replace(task, numerics=wanted), "asked for")
        if not trouble:
            return _by_hand(task, data, plan, rows, rounds)
    if task.slow_in_lanes and wanted == "auto":
        return Choice(task, task.slow_in_lanes)
    if wanted == "auto" and _large(task, data, plan):
        return Choice(task, "a step of one client is work enough by itself, and made without a gradient in one piece")
    trouble = _trouble(replace(task, numerics="lanes"), task, data, rows)
    if trouble and wanted == "lanes":
        raise _refused(wanted, *trouble)
    if trouble:
        return Choice(task, trouble.why)
    return Choice(replace(task, numerics="lanes"), "asked for" if wanted == "lanes" else "many clients in one pass")


def _large(task: Task, data: Clients, plan: Plan) -> bool:
    """Whether the loop has nothing to gain from a second client: on the host, where it takes one after the other."""
    apart = plan.local.sequential(int(data.sizes.max()))
    return apart and task.device.type == "cpu" and task.layout.d >= _LARGE


class Trouble(NamedTuple):
    """Why a body cannot take a model, and what would help."""

    why: str
    write: str = "--numerics loop"


def _by_hand(task: Task, data: Clients, plan: Plan, rows: int, rounds: int) -> Choice:
    """Known layers: in native code where the run is worth building it."""
    fused, native = (replace(task, numerics=body) for body in ("fused", "compiled"))
    reason = "a stack of known layers, by hand: many clients in one pass"
    if task.device.type != "cpu" or _products(native, data, plan) * rounds < _WORTH:
        return Choice(fused, f"{reason}; native code is for longer runs")
    trouble = _trouble(native, task, data, rows)
    if trouble is None:
        return Choice(native, "a stack of known layers, in native code: a client's steps at one core")
    return Choice(fused, f"{reason}; not in native code: {trouble.why}{f' ({trouble.write})' if trouble.write else ''}")


def _products(task: Task, data: Clients, plan: Plan) -> float:
    """Multiplications of a round; those of the first one."""
    try:
        each = products(task.program, data.features)
    except Unserved:
        return 0.0
    sizes = data.sizes[plan.sampler(Population(data.count, data.sizes), 0, Key(0)).ids]
    return each * float(plan.local.examples_per_round(sizes).sum())


_REQUIRED = {
    "lanes": "a model that runs for many clients side by side.",
    "fused": "a stack of known layers.",
    "compiled": "known layers in the host's memory, and a C compiler.",
}


def _refused(wanted: str, why: str, write: str) -> UsageError:
    return UsageError(
        f"numerics = {wanted!r}, and {why}.",
        _REQUIRED[wanted],
        "another way would come to other last digits than those that were asked for.",
        write or "--numerics auto",
    )


def _passes(task: Task, data: Clients, rows: int) -> bool:
    """One pass in the loop, which every model must survive; whether it drew from the global generators."""
    with global_scope(Key(0).fold("probe")):
        before = generator_states()
        try:
            gradient = _gradient(task, data, rows, (0,))
        except AtollError:
            raise
        except Exception as error:
            if task.precision != "full" and _takes(replace(task, precision="full"), data, rows):
                raise UsageError(
                    f"precision = {task.precision!r}, in which the model fails: {type(error).__name__}: {error}",
                    "a model whose layers torch computes in bfloat16 on this processor.",
                    "in full precision it takes the same rows.",
                    "--precision full",
                ) from error
            lanes = _lanes(task, data, (0,))
            x = lanes.take(lanes.places(torch.zeros(1, 1, dtype=torch.int64)), (1,)).x
            raise UsageError(
                f"The model or its loss does not take a batch of this data: {type(error).__name__}: {error}",
                f"a model for rows of shape {tuple(x.shape[2:])} ({x.dtype}), and a loss of one value a row.",
                "one pass over a few rows was tried before the first round.",
                "atoll doctor",
            ) from error
        drew = before != generator_states()
    if gradient.grad.shape != (1, task.layout.d):
        raise UsageError("The model's gradient has another length than its parameters.", "one number a parameter.")
    return drew


def _takes(task: Task, data: Clients, rows: int) -> bool:
    try:
        _gradient(task, data, rows, (0,))
    except Exception:
        return False
    return True


def _trouble(lanes: Task, task: Task, data: Clients, rows: int) -> Trouble | None:
    """Why a body for many clients at once cannot take this model; None where it can. `task` is the loop's."""
    if lanes.by_hand:
        try:
            _ = lanes.program
        except UsageError as error:
            return Trouble(error.given.rstrip(".").partition(": ")[2])
    if lanes.numerics == "compiled":
        if lanes.device.type != "cpu":
            return Trouble("native code computes on the CPU", "--device cpu")
        try:
            stages(lanes.program, data.features)
            build(lanes.layout.dtype)
        except Unserved as why:
            return Trouble(str(why), "--numerics fused")
        except Unbuilt as why:
            return Trouble(str(why), why.write)
    if task.noisy:
        return Trouble("the model draws random numbers of its own, which lanes cannot key")
    if lanes.numerics != "compiled" and not _steady(task.device):
        return Trouble(
            "a matrix product's bits depend on its place in memory: import atoll before the first, or set MKL_CBWR=AUTO"
        )
    some = tuple(torch.argsort(data.sizes, descending=True, stable=True)[:3].tolist())
    some = (some * 3)[:3]
    try:
        alone, three = _gradient(lanes, data, rows, some[:1]), _gradient(lanes, data, rows, some)
        moved = _gradient(lanes, data, rows, (some[1], some[2], some[0]))
    except Exception as error:
        return Trouble(
            f"the model cannot be vectorised over clients ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        )
    first = [alone.grad[0], three.grad[0], moved.grad[2]]
    if not all(torch.equal(first[0], other) for other in first):
        return Trouble("a lane's bits would depend on its neighbours")
    reference = _gradient(task, data, rows, some[:1]).grad[0]
    with Elementwise(min(rows, int(data.sizes[some[0]]))) as watch:
        _ = _gradient(lanes if lanes.by_hand else task, data, rows, some[:1])
    if watch.restless:
        names = ", ".join(sorted(watch.restless))
        return Trouble(
            f"torch rounds {names} differently at the end of a tensor, so a lane's bits would depend on its place"
        )
    scale = reference.abs().max().clamp(min=1e-30)
    if float((first[0] - reference).abs().max() / scale) > _FAR[task.precision]:
        return Trouble("its gradient in lanes differs from autograd's")
    return None


def _steady(device: torch.device) -> bool:
    """Whether the bits of a matrix product are the same wherever its factors lie: in a batch of odd sizes, anywhere."""
    for dtype in (torch.float32, torch.float64):
        for n, k, m in ((33, 5, 4), (33, 9, 65)):
            a, b = (Key(0).fold(size).normal(size * k, dtype).reshape(size, k).to(device) for size in (n, m))
            product = a.repeat(8, 1, 1) @ b.repeat(8, 1, 1).mT
            if not bool((product == product[0]).all()):
                return False
    return True


def _gradient(task: Task, data: Clients, rows: int, ids: tuple[int, ...]) -> Gradient:
    lanes = _lanes(task, data, ids)
    counts = tuple(min(rows, n) for n in lanes.sizes)
    positions = torch.arange(max(counts)).expand(len(ids), -1)
    batch = lanes.take(lanes.places(positions), counts)
    _check_loss(task, data, batch.x[0, : counts[0]], batch.y[0, : counts[0]])
    return task.gradient(task.initial().lanes(len(ids)), batch, Key(0).of(lanes.ids))


def _check_loss(task: Task, data: Clients, x: Tensor, y: Tensor) -> None:
    """One value a row, or the loss is not what the mean over clients needs; and an output for every class."""
    task.module.eval()
    with torch.no_grad():
        output = task.module(x)
        if task.loss is cross_entropy and data.classes and output.shape[-1] < len(data.classes):
            raise UsageError(
                f"The model returned {tuple(output.shape)} for {len(x)} rows of {len(data.classes)} classes.",
                f"shape ({len(x)}, {len(data.classes)}): one logit a class.",
                "a row of a class without a logit has no loss.",
                "--model mlp",
            )
        each = task.loss(output, y)
    if each.shape != (len(x),):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"The loss of {len(x)} rows has shape {tuple(each.shape)}; the model returned {shape}.",
            f"one value a row: shape ({len(x)},).",
            "clients are weighted and averaged example by example.",
            'torch.nn.functional.cross_entropy(output, y, reduction="none")',
        )


def _lanes(task: Task, data: Clients, ids: tuple[int, ...]) -> Lanes:
    return Lanes(data, torch.tensor(ids), task.layout.dtype, device=task.device)
