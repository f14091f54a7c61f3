"""Find a learning rate by a range test: run the same short training from the same model at many rates.

    atoll lr --which local          the learning rate of the clients
    atoll lr --which server         the learning rate of the server

Tests: tests/surface/test_tools.py.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from atoll.base.errors import RunError, UsageError, unknown_name
from atoll.base.files import write_output
from atoll.base.lines import Change
from atoll.base.random import Key, user_scope
from atoll.data.clients import Clients, offsets_of
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.local import Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.round import bind, step
from atoll.plan.schedule import Schedule
from atoll.plan.state import State, evaluated_model
from atoll.report.chart import Axis, Band, Drawing, Mark, Panel, ReferenceLine, Series
from atoll.tools.rebuild import training_of
from atoll.training.evaluation import evaluate
from atoll.training.experiment import Experiment
from atoll.training.rounds import Training
from atoll.training.settings import Settings

Which = Literal["local", "server"]

LOW, HIGH = 1e-4, 10.0
A_DECADE = 4  # rates per power of ten
MARGIN = 3.0
CLIENTS, ROWS = 8, 256
STEPS = 40  # approximate number of optimizer steps in each short training


@dataclass(frozen=True)
class Finding:
    """The result of a range test.

    Args:
        which: the kind of rate, "local" or "server".
        suggestion: the suggested rate: the one with the lowest loss among the rates up to a third of the edge.
        rates: the tested rates, ascending.
        losses: the loss after the short training at each rate, mean over the rows used; infinite if it diverged.
        start: the loss before the short training.
        now: the rate of the plan in round 0.
        edge: the lowest rate above the best one that loses half of the best one's gain; None if there is none.
        steepest: the rate at which the loss falls fastest by log rate, the rule of the paper; None if it never falls.
        rounds: the number of rounds of each short training.
        clients: the number of clients of each short training.
        rows: the number of rows of these clients.
        plan: the plan with the suggested rate.
        line: the line to write: a flag for an experiment, else the plan.
        plot: the chart of losses over rates; None if no plot was requested.
    """

    which: str
    suggestion: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    now: float
    edge: float | None
    steepest: float | None
    rounds: int
    clients: int
    rows: int
    plan: Plan
    line: str
    plot: Path | None = None

    def text(self) -> str:
        """Format the result as text: a table of rates and losses, and the suggestion."""
        top = max((x for x in self.losses if math.isfinite(x) and x <= 2 * self.start), default=self.start)
        lines = [
            f"loss after {self.rounds} rounds on {self.clients} clients, {self.rows} rows; {self.start:.4g} before",
            f"{'rate':>9}  {'loss':>9}",
        ]
        for rate, loss in zip(self.rates, self.losses, strict=True):
            bar = "█" * round(30 * min(loss, top) / top) if math.isfinite(loss) and top > 0 else "diverged"
            mark = " ← suggested" if rate == self.suggestion else ""
            lines.append(f"{rate:>9.2g}  {loss:>9.4g}  {bar}{mark}")
        edge = "no rate was too large" if self.edge is None else f"{self.edge:.2g} is too large"
        lines += [
            f"suggested {self.which} rate: {self.suggestion:g} ({edge}; the plan has {self.now:g})",
            self.line,
        ]
        return "\n".join(lines + ([f"plot: {self.plot}"] if self.plot else []))


def find_rate(experiment: Experiment, which: Which = "local", out: Path | None = None) -> Finding:
    """Suggest a learning rate for an experiment by a range test on its data; see `range_test`.

    Args:
        experiment: the experiment.
        which: the rate to vary: "local", that of the clients, or "server".
        out: the place of the plot: a folder or a file; None draws no plot.
    Returns:
        the result; its `line` is a flag of `atoll run`.
    Raises:
        UsageError: the plan has no such rate.
        RunError: no rate lowers the loss.
    """
    it = experiment.resolved()
    found = _swept(training_of(it, evaluate_every=0), which, rates(it.plan(), which))
    found = replace(found, line=_flag(it, found))
    return found if out is None else replace(found, plot=draw_rates(found, out))


@user_scope(Key(0).fold("tool"))
def range_test(
    model: Any,
    data: Clients,
    plan: Plan,
    settings: Settings,
    which: Which = "local",
    *,
    tried: Sequence[float] | None = None,
) -> Finding:
    """Learning rate range test: run the same short training at each of many rates, from the same model.

    L(r) = loss after a few rounds at rate r, on the training rows; L₀ = loss before
    r* = argmin { L(r) : r ≤ edge / 3, L(r) < L₀ },   or edge / 3 if this set is empty
    edge = min { r > argmin L : L(r) > (L₀ + min L) / 2, or not finite }: half of the gain is lost again

    The margin of 3 allows for the shortness of the test: a rate that is best for some rounds may lie just below one
    that diverges later. The paper raises the rate within one training and takes the rate at which the loss falls
    fastest. Here each rate has its own training, because clients restart from the server's model in every round. The
    result also contains the paper's rate as `steepest`. A training uses at most 8 clients, drawn by key, 256 rows of
    each, and about 40 steps.

    Args:
        model: a model name, a module, or a function that returns a module.
        data: the clients.
        plan: the algorithm. Each tested rate is constant: schedules after round 0 are ignored.
        settings: the settings of the training; seed, dtype, loss, numerics and init are used.
        which: the rate to vary: "local", that of the clients, or "server".
        tried: the rates to test, ascending, > 0. None is four rates per power of ten from 1e-4 to 10, extended so that
            a tenth and ten times the plan's own rate are included.
    Returns:
        the result; its `line` is the plan with the suggested rate.
    Raises:
        UsageError: the plan has no such rate.
        RunError: no rate lowers the loss.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("diabetes").split(clients=4)
        >>> found = range_test("linear", data, atoll.recipes.gd(0.01), Settings(), "server", tried=(0.01, 0.1, 100.0))
        >>> found.suggestion
        0.1

    Reference: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3.
    """
    training = Training(model, data, plan, replace(settings, evaluate_every=0))
    return _swept(training, which, tuple(tried) if tried is not None else rates(plan, which))


def rates(plan: Plan, which: Which) -> tuple[float, ...]:
    """The rates to test: four per decade, rounded to two digits, from 1e-4 to 10 and around the plan's own rate.

    Example:
        >>> from atoll.recipes import fedavg
        >>> rates(fedavg(0.5), "local")[:5], len(rates(fedavg(0.5), "local"))
        ((0.0001, 0.00018, 0.00032, 0.00056, 0.001), 21)
    """
    now = rate_of(plan, which)
    low = math.floor(A_DECADE * math.log10(min(LOW, now / 10)) + 1e-9)
    high = math.ceil(A_DECADE * math.log10(max(HIGH, now * 10)) - 1e-9)
    return tuple(float(f"{10 ** (k / A_DECADE):.2g}") for k in range(low, high + 1))


def rate_of(plan: Plan, which: Which) -> float:
    """The rate of the plan in round 0.

    Raises:
        UsageError: the plan has no such rate.
    """
    if which not in ("local", "server"):
        raise unknown_name("rate", which, ("local", "server"), lambda near: Change("which", near))
    local = plan.local
    holder: Any = plan.optimizer if which == "server" else local if local.optimizer is None else local.optimizer
    lr = holder.lr
    if lr is None:
        raise UsageError(
            f"{holder if which == 'server' else plan.local!r} has no learning rate.",
            f"a {which} part with a learning rate.",
            "clients of this plan send gradients, and only the server makes steps."
            if isinstance(plan.local, Gradient)
            else "a range test varies this rate.",
            "atoll lr --which server" if which == "local" else "atoll lr --which local",
        )
    return float(lr(0, lr.init())) if isinstance(lr, Schedule) else float(lr)


def with_rate(plan: Plan, which: Which, rate: float, *, keep_schedule: bool = False) -> Plan:
    """Replace the rate of the plan. With `keep_schedule`, a schedule with a field `lr` stays a schedule."""

    def put(holder: Any) -> Any:
        lr = holder.lr
        named = dataclasses.is_dataclass(lr) and any(f.name == "lr" for f in dataclasses.fields(lr))
        new = replace(lr, lr=rate) if keep_schedule and isinstance(lr, Schedule) and named else rate  # type: ignore[type-var]
        return replace(holder, lr=new)

    if which == "server":
        return replace(plan, optimizer=put(plan.optimizer))
    local: Any = plan.local
    return replace(
        plan,
        local=put(local) if local.optimizer is None else replace(local, optimizer=put(local.optimizer)),
    )


def _swept(training: Training, which: Which, tried: tuple[float, ...]) -> Finding:
    now = rate_of(training.plan, which)
    if training.plan.releases:
        raise UsageError(
            f"atoll lr with {training.plan.codec!r}.",
            "a plan without noise, on public rows.",
            "the test trains on the rows of the clients, and no accountant counts it.",
            "atoll run",
        )
    data = _few(training.data, training.plan, Key(training.settings.seed).fold("lr"))
    engine = InProcessEngine(training.task, data, training.settings.chunk)
    plan = _short(training.plan)
    rounds = _rounds(plan, data)
    judge = InProcessEngine(training.task, data.pooled(), training.settings.chunk)
    start = _after(training, engine, judge, plan, 0)
    losses: list[float] = []
    for rate in tried:
        losses.append(_after(training, engine, judge, with_rate(plan, which, rate), rounds))
        if len(losses) > 2 and min(losses[-2:]) > 4 * start:
            break  # two losses in a row far above the start: higher rates do not improve
    done = tuple(tried[: len(losses)])
    suggestion, edge = suggest(done, losses, start)
    found = with_rate(training.plan, which, suggestion, keep_schedule=True)
    return Finding(
        which,
        suggestion,
        done,
        tuple(losses),
        start,
        now,
        edge,
        _steepest(done, losses),
        rounds,
        data.count,
        len(data.order),
        found,
        repr(found),
    )


def suggest(rates: Sequence[float], losses: Sequence[float], start: float) -> tuple[float, float | None]:
    """Choose the suggested rate and the edge by the definitions of `range_test`.

    Args:
        rates: the tested rates, ascending, > 0.
        losses: the loss at each rate.
        start: the loss before the short training.
    Returns:
        the suggested rate, and the edge or None.
    Raises:
        RunError: no loss is below `start`.
    Example:
        >>> suggest((0.01, 0.1, 1.0, 10.0), (2.0, 1.0, 0.5, 9.0), start=2.2)
        (1.0, 10.0)
        >>> suggest((0.1, 1.0, 2.0), (1.0, 0.5, 9.0), start=2.2)
        (0.1, 2.0)
    """
    best = min(range(len(rates)), key=lambda i: losses[i])
    if not losses[best] < start:
        raise RunError(
            f"No rate from {rates[0]:g} to {rates[-1]:g} lowers the loss; it is {start:g} at the start.",
            "at least one rate that lowers the loss.",
            "the model is already at a minimum, or its loss does not depend on its parameters.",
            "atoll doctor",
        )
    half = (start + losses[best]) / 2
    above = [r for r, loss in zip(rates, losses, strict=True) if r > rates[best] and not loss <= half]
    edge = min(above, default=None)
    limit = math.inf if edge is None else edge / MARGIN * (1 + 1e-9)
    safe = [i for i in range(len(rates)) if rates[i] <= limit and losses[i] < start]
    if not safe:
        return float(f"{limit:.2g}"), edge
    return rates[min(safe, key=lambda i: losses[i])], edge


def _steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest by log rate: central differences over finite losses."""
    slopes = [
        ((losses[i + 1] - losses[i - 1]) / math.log(rates[i + 1] / rates[i - 1]), rates[i])
        for i in range(1, len(rates) - 1)
        if all(map(math.isfinite, losses[i - 1 : i + 2]))
    ]
    slope, rate = min(slopes, default=(0.0, 0.0))
    return rate if slope < 0 else None


def _after(training: Training, engine: InProcessEngine, judge: InProcessEngine, plan: Plan, rounds: int) -> float:
    """The loss on the training rows after some rounds from the first model; infinite if it is not finite."""
    memory = Memory(plan.memory(training.task))
    state = State.first(plan, training.task, training.settings.seed, memory, training.first)
    plan = bind(plan, engine)
    try:
        for _ in range(rounds):
            state, _ = step(plan, state, engine)
    except RunError:
        return math.inf
    loss = evaluate(replace(state, model=evaluated_model(plan, state, training.task)), judge).metrics["held_out_loss"]
    return loss if math.isfinite(loss) else math.inf


def _few(data: Clients, plan: Plan, key: Key) -> Clients:
    """Select at most 8 clients and, of each, the rows of about ten batches, at most 256."""
    ids = torch.arange(data.count) if data.count <= CLIENTS else key.distinct(CLIENTS, data.count).sort().values
    some = data.only(ids)
    batch = plan.local.batch
    sizes = some.sizes.clamp(max=ROWS if not batch else min(ROWS, max(32, 10 * batch)))
    picked = [some.client_rows(i)[:n] for i, n in enumerate(sizes.tolist())]
    return replace(some, order=torch.cat(picked), offsets=offsets_of(sizes), held_out=None)


def _short(plan: Plan) -> Plan:
    """Change the plan so that all clients participate and each makes only a few steps per round."""
    local = plan.local
    if isinstance(local, Train) and local.steps is not None:
        local = replace(local, steps=min(local.steps_at(0) or 1, STEPS // 2))
    elif isinstance(local, Train) and local.epochs is not None:
        local = replace(local, epochs=min(local.epochs, 2))
    if isinstance(local, Train):  # the server's model lacks an own part that is trained: all parts are trained together
        local = replace(local, own=(), alternate=False)
    return replace(plan, local=local, cohort=None)


def _rounds(plan: Plan, data: Clients) -> int:
    """The number of rounds that make about `STEPS` steps: 3 to 20."""
    local = plan.local
    if not isinstance(local, (Train, Gradient)):
        return 3
    steps = 1
    if isinstance(local, Train):
        rows = int(data.sizes.double().median())
        steps = local.steps_at(0) or (local.epochs or 1) * math.ceil(rows / (local.batch or rows))
    return min(20, max(3, STEPS // steps))


def _flag(experiment: Experiment, found: Finding) -> str:
    """The flag that turns the experiment's plan into the suggested one: `--recipe` if possible, else `--set`."""
    holder: Any = found.plan.optimizer if found.which == "server" else found.plan.local
    slot = "plan.optimizer.lr" if found.which == "server" else "plan.local.lr"
    if found.which == "local" and holder.optimizer is not None:
        holder, slot = holder.optimizer, "plan.local.optimizer.lr"
    value = repr(holder.lr)
    try:
        call = ast.parse(experiment.recipe or "", mode="eval").body
    except SyntaxError:
        call = None
    if isinstance(call, ast.Call):
        for word in ("lr",) if found.which == "local" else ("server_lr", "lr"):
            recipe = _rewritten(call, word, value)
            try:
                if experiment.override(recipe=recipe).plan() == found.plan:
                    return f"--recipe {_quoted(recipe)}"
            except UsageError:
                continue
    return f"--set {_quoted(f'{slot}={value}') if '(' in value else f'{slot}={value}'}"


def _rewritten(call: ast.Call, word: str, value: str) -> str:
    """Replace one argument of a call, positional or by keyword; `lr` is the first parameter of every recipe."""
    new = ast.parse(value, mode="eval").body
    args = [new, *call.args[1:]] if call.args and word == "lr" else list(call.args)
    words = [k for k in call.keywords if k.arg != word]
    if not (call.args and word == "lr"):
        words.insert(0 if word == "lr" else len(words), ast.keyword(word, new))
    return ast.unparse(ast.Call(call.func, args, words))


def _quoted(text: str) -> str:
    return f'"{text}"' if '"' not in text else f"'{text}'"


def draw_rates(found: Finding, out: Path) -> Path:
    """Draw the losses over the rates.

    Args:
        found: the result to draw.
        out: a folder, or a file whose suffix is the format.
    Returns:
        the path of the file.
    """
    from atoll.report.export import rendered

    file = out if out.suffix in (".svg", ".png", ".pdf") else out / f"lr-{found.which}.svg"
    write_output(file, rendered(_rates_drawing(found), file.suffix[1:]))
    return file


def _rates_drawing(found: Finding) -> Drawing:
    top = 2 * found.start
    marks: list[Mark] = []
    if found.edge is not None:
        right = max(found.rates[-1], found.edge * 1.01)
        marks.append(Band([found.edge, right], [0.0, 0.0], [top, top], "s1"))
    marks += [
        ReferenceLine(found.start, "soft", "loss before"),
        ReferenceLine(found.now, "soft", f"rate of the plan {found.now:g}", vertical=True),
        ReferenceLine(found.suggestion, "s1", f"suggested {found.suggestion:g}", vertical=True, dashed=False),
        Series(found.rates, [min(loss, top) for loss in found.losses], "s0", "loss"),
    ]
    remark = "" if found.edge is None else "shaded: too large"
    x = Axis(f"{found.which} learning rate", log=True)
    panel = Panel(marks, f"Loss after {found.rounds} rounds", remark, x, names="top")
    return Drawing("rates", f"Loss by {found.which} learning rate; suggested {found.suggestion:g}.", [[panel]])
