"""Choice of the backend that computes the clients. Before the first round, each backend is tested on the model.

Tests: tests/conformance/test_bodies.py, tests/identities/test_numerics.py, tests/identities/test_order.py,
tests/identities/test_precision.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import AtollError, ClientError, UsageError
from atoll.base.lines import Change, Write, form
from atoll.base.random import Key, user_scope
from atoll.compute import limits
from atoll.compute.attributes import Reset
from atoll.compute.batches import ClientBatch
from atoll.compute.compiled import load_libraries, products, stages
from atoll.compute.fused import UnsupportedModel
from atoll.compute.model_state import Batch, GradientResult
from atoll.compute.native import BuildError
from atoll.compute.task import BACKENDS, Task
from atoll.data.clients import Clients
from atoll.data.rows import draws_in
from atoll.engine.check_answers import check_answers, failed_pass
from atoll.engine.coupling_probe import coupling, coupling_notes
from atoll.engine.position_check import PositionCheck
from atoll.engine.probe import Probe
from atoll.engine.state_probe import observe_state, refuse_trained_loss
from atoll.plan.plan import Plan
from atoll.plan.protocols import Population
from atoll.plan.round import select

NUMERICS = ("auto", *BACKENDS)
_PROBE_ROWS = 8  # largest number of rows of a client that the tests read
_FAR = {"full": 1e-3, "bf16": 0.2}  # largest error of a gradient by rounding, relative to its largest number


class Choice(NamedTuple):
    """A task with the chosen backend, and the reason as text."""

    task: Task
    reason: str


def choose(task: Task, data: Clients, plan: Plan, wanted: str = "auto", rounds: int = 1) -> Choice:
    """Choose the backend for a run.

    The first of these that supports the model is chosen. `compiled`: known layers in C, if the run is long enough to
    repay the build. `fused`: known layers by batched products. `lanes`: any model whose lanes have bits that do not
    depend on other lanes, if lanes are faster. `loop`: any model. The choice depends on the model, the data, the plan
    and the installed compiler, never on a timing.

    Args:
        task: the model, loss and metrics; its `numerics` are ignored.
        data: the clients; the tests use a few rows of up to three of them.
        plan: the plan; its local part may require a backend.
        wanted: `"auto"`, or the backend to use.
        rounds: the number of rounds of the run, ≥ 1.
    Returns:
        The task with the backend, and the reason.
    Raises:
        UsageError: the model or the loss does not fit the data, the wanted backend does not support the model, or the
            local part requires another backend.
    """
    if wanted not in NUMERICS:
        raise UsageError(f"numerics = {wanted!r}.", f"one of {', '.join(NUMERICS)}.", write=Change("numerics", "auto"))
    try:
        return _choose(task, data, plan, wanted, rounds)
    except ClientError:
        return _choose(task, _with_readable_clients(data), plan, wanted, rounds)


def _with_readable_clients(data: Clients) -> Clients:
    """The clients, with the rows of the first readable client in place of the rows of each unreadable one.

    The tests before the first round read these rows. The run itself reads the rows of each client, and an unreadable
    client fails there.

    Raises:
        ClientError: the first rows of every client are unreadable.
    """
    order, good = data.order.clone(), data.order[:0]
    bad: list[int] = []
    for client in range(data.count):
        own = data.client_rows(client)
        try:
            data.take(own[:_PROBE_ROWS])
        except (ClientError, UsageError):
            bad.append(client)
        else:
            good = good if len(good) else own
    if not len(good):
        data.take(data.order[:_PROBE_ROWS])  # raises the error of the first rows
    for client in bad:
        start, end = data.offsets[client : client + 2].tolist()
        order[start:end] = good[torch.arange(end - start) % len(good)]
    return replace(data, order=order)


def _choose(task: Task, data: Clients, plan: Plan, wanted: str, rounds: int) -> Choice:
    """The choice, from rows that can be read."""
    rows = min(4, int(data.sizes.max()))
    task = _with_findings(task, data, rows)
    choice = _chosen_body(task, data, plan, wanted, rounds, rows)
    task.reset()  # the tests of other backends may have changed attributes
    return choice


def _with_findings(task: Task, data: Clients, rows: int) -> Task:
    """The task with the loop, after one pass that works and with the findings of probes."""
    task = replace(task, numerics="loop")
    if task.findings.probed:
        _check_pass(task, data, rows)
    else:
        restore, probe = Reset(task.roots), Probe.read(task, data)
        refuse_trained_loss(probe)
        _check_pass(task, data, rows)
        restore()
        task = findings_of(probe)
    task.reset()
    return task


def _chosen_body(task: Task, data: Clients, plan: Plan, wanted: str, rounds: int, rows: int) -> Choice:
    """The choice for a task with findings."""
    wanted = _wanted(task, plan, wanted)
    reason = "requested" if plan.local.numerics is None else "required by the local part of the plan"
    if plan.local.numerics == "loop":
        return Choice(task, "the plan's own loop trains one client at a time")
    if wanted == "loop":
        return Choice(task, reason)
    if wanted == "auto" and data.count == 1:
        return Choice(task, "one client: there is no batch of clients")
    if wanted in ("auto", "fused", "compiled") and task.precision == "full":
        body = "compiled" if wanted == "compiled" else "fused"
        trouble = _trouble(replace(task, numerics=body), task, data, rows)
        if trouble and wanted != "auto":
            raise _refused(plan, wanted, *trouble)
        if wanted != "auto":
            return Choice(replace(task, numerics=wanted), reason)
        if not trouble:
            return _by_hand(task, data, plan, rows, rounds)
    if task.slow_in_lanes and wanted == "auto":
        return Choice(task, task.slow_in_lanes)
    if wanted == "auto" and _large(task, data, plan):
        return Choice(task, "large model: a step of one client fills the machine, and the loop needs no flat gradient")
    trouble = _trouble(replace(task, numerics="lanes"), task, data, rows)
    if trouble and wanted == "lanes":
        raise _refused(plan, wanted, *trouble)
    if trouble:
        return Choice(task, trouble.why)
    return Choice(replace(task, numerics="lanes"), reason if wanted == "lanes" else "many clients in one pass")


def choose_without_rows(task: Task, synthetic: Clients, plan: Plan, wanted: str = "auto") -> Choice:
    """Choose the backend for a run whose train rows are on other machines.

    `fused` if it supports the model; else `lanes` for at most 10⁶ parameters, and `loop` above or if a step on
    synthetic rows fails in lanes. `compiled` is never chosen, because it depends on the compiler of each site.

    Args:
        task, plan, wanted: as for `choose`.
        synthetic: clients with a few synthetic rows.
    Raises:
        UsageError: as for `choose`.
    """
    if wanted != "auto" or plan.local.numerics is not None:
        return choose(task, synthetic, plan, wanted)
    rows = int(synthetic.sizes.max())
    task = _with_findings(task, synthetic, rows)
    if task.precision == "full" and _trouble(replace(task, numerics="fused"), task, synthetic, rows) is None:
        return Choice(replace(task, numerics="fused"), "a stack of known layers, which every site can compute")
    if task.layout.d > limits.LANES_WITHOUT_ROWS:
        return Choice(task, "a large model: a step of one client fills the machine")
    trouble = _trouble(replace(task, numerics="lanes"), task, synthetic, rows)
    if trouble:
        return Choice(task, trouble.why)
    return Choice(replace(task, numerics="lanes"), "a model of any layers, chosen without rows")


def _wanted(task: Task, plan: Plan, wanted: str) -> str:
    """The backend that the local part requires, else the backend that the user wants.

    Raises:
        UsageError: the local part excludes the backend or the precision that the user wants.
    """
    own = plan.local.numerics
    if own is None:
        return wanted
    if wanted not in ("auto", own):
        raise UsageError(
            f"numerics = {wanted!r} with {plan.local!r:.80}.",
            f"numerics = {own!r}, the backend that the part requires.",
            f"{type(plan.local).__name__}.numerics is the only backend that the part can use.",
            Change("numerics", "auto"),
        )
    if own != "lanes" and task.precision != "full":
        raise UsageError(
            f"precision = {task.precision!r} with {plan.local!r:.80}.",
            "a local part of atoll.",
            "a custom loop chooses its own precision: torch.autocast belongs in there."
            if own == "loop"
            else f"the part requires the backend {own}, which computes in full precision.",
            Change("precision", "full"),
        )
    return own


def _large(task: Task, data: Clients, plan: Plan) -> bool:
    """Whether one client uses all cores of the CPU, so that a batch of clients is not faster. Always False on a GPU."""
    apart = plan.local.sequential(int(data.sizes.max()))
    return apart and task.device.type == "cpu" and task.layout.d >= limits.LOOP_PARAMETERS


class Rejection(NamedTuple):
    """The reason why a backend does not support a model, and a line to write instead."""

    why: str
    write: Write = Change("numerics", "loop")


def _by_hand(task: Task, data: Clients, plan: Plan, rows: int, rounds: int) -> Choice:
    """The choice for known layers: native code if the run is long enough to repay the build, else fused."""
    fused, native = (replace(task, numerics=body) for body in ("fused", "compiled"))
    reason = "a stack of known layers: fused operations train many clients in one pass"
    if task.device.type != "cpu" or _products(native, data, plan) * rounds < limits.BUILD_PRODUCTS:
        return Choice(fused, f"{reason}; native code is for longer runs")
    trouble = _trouble(native, task, data, rows)
    if trouble is None:
        return Choice(native, "a stack of known layers: native code runs all steps of a client on one core")
    line = form(trouble.write, "shell")
    return Choice(fused, f"{reason}; not in native code: {trouble.why}{f' ({line})' if line else ''}")


def _products(task: Task, data: Clients, plan: Plan) -> float:
    """The work of fused layers in the first round, in multiplications: an estimate for every round.

    The Python code of a pass counts as multiplications. A local part that takes clients of several padded lengths
    together has a pass for each length.
    """
    try:
        each = products(task.program, data.features)
    except UnsupportedModel:
        return 0.0
    sizes = data.sizes[select(plan.sampler, Population(data.count, data.sizes), 0, Key(0)).ids]
    lengths = set(map(plan.local.padded_batch, sizes.unique().tolist())) if plan.local.mixes_widths else ()
    return each * float(plan.local.examples_per_round(sizes).sum()) + len(lengths) * limits.PASS_PRODUCTS


_REQUIRED = {
    "lanes": "a model that torch.func can vectorise over clients.",
    "fused": "a stack of known layers.",
    "compiled": "known layers in the host's memory, and a C compiler.",
}


def _refused(plan: Plan, wanted: str, why: str, write: Write) -> UsageError:
    if plan.local.numerics is not None:
        return UsageError(
            f"{plan.local!r:.80} requires the backend {wanted}, and {why}.",
            _REQUIRED[wanted],
            "the part can use no other backend.",
            "Gradient()",
        )
    return UsageError(
        f"numerics = {wanted!r}, and {why}.",
        _REQUIRED[wanted],
        "another backend would round differently.",
        write or Change("numerics", "auto"),
    )


def findings_of(probe: Probe) -> Task:
    """The task of a probe with the findings about the user's code.

    Args:
        probe: a few rows of a task with numerics `"loop"`; one pass of it works.
    Raises:
        UsageError: the module keeps values that clients cannot have of their own.
    """
    task, kept = probe.task, observe_state(probe)
    passes = (("training", kept.training), ("evaluation", kept.evaluation))
    draws = tuple(name for name, each in passes if each.drew or name in task.findings.draws)
    output, restore = kept.training.output, Reset(task.roots)
    together, evaluated = coupling(probe, draws)
    restore()
    findings = replace(
        task.findings,
        draws=draws,
        couples=together,
        couples_in_evaluation=evaluated,
        state=kept.state,
        constant=kept.constant,
        output=tuple(output.shape[1:]) if isinstance(output, Tensor) else None,
        target=tuple(probe.y.shape[1:]),
        probed=True,
    )
    notes = (*task.notes, *coupling_notes(task.findings, findings))
    return replace(task.with_findings(findings, kept.rules), notes=notes)


def _check_pass(task: Task, data: Clients, rows: int) -> None:
    """Run one pass in the loop, which must work for every model.

    Raises:
        UsageError: the pass fails, or its gradient has another length than θ.
    """
    with user_scope(Key(0).fold("probe")):
        try:
            _, batch = _batch(task, data, rows, (0,))
            check_answers(task, data, batch.x[0, : batch.counts[0]], batch.y[0, : batch.counts[0]])
            gradient = _gradient(task, data, rows, (0,))
        except AtollError:
            raise
        except Exception as error:
            if task.precision != "full" and _takes(replace(task, precision="full"), data, rows):
                raise UsageError(
                    f"precision = {task.precision!r}, in which the model fails: {type(error).__name__}: {error}",
                    "a model whose layers torch computes in bfloat16 on this processor.",
                    "the model works in full precision on the same rows.",
                    Change("precision", "full"),
                ) from error
            lanes = _lanes(task, data, (0,))
            x = lanes.take(lanes.places(torch.zeros(1, 1, dtype=torch.int64)), (1,)).x
            raise failed_pass(task, x[0], error) from error
    if gradient.grad.shape != (1, task.layout.d):
        raise UsageError("The model's gradient has another length than its parameters.", "one number a parameter.")


def _takes(task: Task, data: Clients, rows: int) -> bool:
    try:
        _gradient(task, data, rows, (0,))
    except Exception:
        return False
    return True


def _trouble(lanes: Task, task: Task, data: Clients, rows: int) -> Rejection | None:
    """The reason why the backend of `lanes` does not support this model; None if it does. `task` has the loop."""
    if lanes.by_hand and lanes.fields:
        return Rejection("a row has several tensors, and known layers take one")
    if lanes.by_hand:
        try:
            _ = lanes.program
        except UsageError as error:
            return Rejection(error.given.rstrip(".").partition(": ")[2])
    if lanes.numerics == "compiled":
        if lanes.device.type != "cpu":
            return Rejection("native code computes on the CPU", Change("device", "cpu"))
        try:
            stages(lanes.program, data.features)
            load_libraries(lanes.layout.dtype)
        except UnsupportedModel as why:
            return Rejection(str(why), Change("numerics", "fused"))
        except BuildError as why:
            return Rejection(str(why), why.write)
    if task.hooked:
        return Rejection(f"the gradient hook of {task.hooked[0]} runs in the loop only")
    if task.findings.state:
        return Rejection(f"a pass changes the attribute {task.findings.state[0]}, which is reset for each client")
    if lanes.numerics == "compiled" and draws_in(data.rows):
        return Rejection("reading a row draws random numbers, and native code reads the rows of several steps once")
    if task.findings.draws:
        return Rejection("the model draws from a global random generator, which lanes cannot key by client")
    if lanes.numerics != "compiled" and not matmul_is_position_independent(task.device):
        return Rejection(
            "the bits of a matrix product depend on its address: import atoll before the first, or set MKL_CBWR=AUTO"
        )
    some = tuple(torch.argsort(data.sizes, descending=True, stable=True)[:3].tolist())
    some = (some * 3)[:3]
    try:
        alone, three = _gradient(lanes, data, rows, some[:1]), _gradient(lanes, data, rows, some)
        moved = _gradient(lanes, data, rows, (some[1], some[2], some[0]))
    except ClientError:
        raise
    except Exception as error:
        return Rejection(
            f"the model cannot be vectorised over clients ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        )
    first = [alone.grad[0], three.grad[0], moved.grad[2]]
    if not all(torch.equal(first[0], other) for other in first):
        return Rejection("a lane's bits would depend on its neighbours")
    reference = _gradient(task, data, rows, some[:1]).grad[0]
    with PositionCheck(min(rows, int(data.sizes[some[0]]))) as watch:
        _ = _gradient(lanes if lanes.by_hand else task, data, rows, some[:1])
    if watch.position_dependent:
        names = ", ".join(sorted(watch.position_dependent))
        return Rejection(
            f"torch rounds {names} differently at the end of a tensor, so a lane's bits would depend on its position"
        )
    scale = reference.abs().max().clamp(min=1e-30)
    if float((first[0] - reference).abs().max() / scale) > _FAR[task.precision]:
        return Rejection("its gradient in lanes differs from autograd's")
    return None


@cache
def matmul_is_position_independent(device: torch.device) -> bool:
    """Whether the bits of a matrix product do not depend on the addresses of its factors, tested on odd sizes."""
    for dtype in (torch.float32, torch.float64):
        for n, k, m in ((33, 5, 4), (33, 9, 65)):
            a, b = (Key(0).fold(size).normal(size * k, dtype).reshape(size, k).to(device) for size in (n, m))
            product = a.repeat(8, 1, 1) @ b.repeat(8, 1, 1).mT
            if not bool((product == product[0]).all()):
                return False
    return True


def _gradient(task: Task, data: Clients, rows: int, ids: tuple[int, ...]) -> GradientResult:
    lanes, batch = _batch(task, data, rows, ids)
    return task.gradient(task.initial().lanes(len(ids)), batch, Key(0).of(lanes.ids))


def _batch(task: Task, data: Clients, rows: int, ids: tuple[int, ...]) -> tuple[ClientBatch, Batch]:
    """The first rows of some clients."""
    lanes = _lanes(task, data, ids)
    counts = tuple(min(rows, n) for n in lanes.sizes)
    positions = torch.arange(max(counts)).expand(len(ids), -1)
    return lanes, lanes.take(lanes.places(positions), counts)


def _lanes(task: Task, data: Clients, ids: tuple[int, ...]) -> ClientBatch:
    return ClientBatch(data, torch.tensor(ids), task.layout.dtype, device=task.device)
