"""A training, gone through round by round: the state between two rounds, the judging, the rules that end it.

Engines of several processes are imported where one is asked for: most trainings begin without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from atoll import models
from atoll.data.clients import Clients
from atoll.digest import fingerprint
from atoll.engine import ENGINES
from atoll.engine.arrivals import check_clock
from atoll.engine.device import check_precision, found, gpu, local_rank, nearby
from atoll.engine.fleet import FLEET, Fleet
from atoll.engine.inprocess import InProcessEngine, threads_for
from atoll.engine.memory import Memory
from atoll.engine.probe import Choice, choose
from atoll.engine.ranks import Ranks
from atoll.errors import UsageError, unknown_name
from atoll.grammar import parse
from atoll.loss import Metric, PerExample
from atoll.plan import stop as stops
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Identity
from atoll.plan.in_flight import Air
from atoll.plan.lanes import HOST
from atoll.plan.local import Evaluate, Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.round import Report, bind, close_round, open_round, opening, step
from atoll.plan.state import State
from atoll.rng import Key
from atoll.saved import share
from atoll.shelf import Shelf, lent_from
from atoll.task import Model, Task

if TYPE_CHECKING:
    from atoll.engine.dealer import Dealer

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOSSES = {"classification": "cross_entropy", "regression": "mse", "tokens": "cross_entropy"}
JUDGES = {"classification": ("accuracy",), "regression": ("rmse",), "tokens": ("accuracy",)}
_JUDGE = Plan(Evaluate(), Mean())
_WORTH_A_THREAD = 1 << 20  # parameters, from which on one pass over the model is worth a second thread


@dataclass(frozen=True)
class Settings:
    """How a training is run, beside model, data and plan.

    Args:
        rounds: at most so many.
        seed: of everything drawn.
        dtype: "float32" or "float64".
        loss: a name or a function of one value a row; None chooses by the kind of data.
        metrics: names or `Metric`s; None chooses by the kind of data.
        stop: further rules that end the training; `Diverged()` is always on.
        evaluate_every: rounds between two looks at the held-out rows; 0 never looks.
        numerics: "auto", "compiled", "fused", "lanes" or "loop".
        precision: "full", or "bf16": the model's products in bfloat16 by torch's autocast; θ and sums as ever.
        device: "auto", a GPU where there is one and else the CPU; "cpu"; "cuda" or "cuda:1". Worker processes
            compute on the CPU, an actor on the GPU that `gpus` gives it.
        chunk: clients computed together; changes no bit. None: what stays near the cores, or fits a GPU.
        engine: where clients run: "inprocess"; "processes", worker processes on this machine; "torchrun", in a
            program that `torchrun` started; or "ray", in actors on a Ray cluster.
        workers: worker processes, None is one a core; or how many ranks there must be, None is as many as there are;
            or actors, None is as many as the cluster has room for.
        backend: by what ranks tell each other tensors: "gloo", "nccl" or "auto".
        address: of the Ray cluster, "host:port" or "auto"; None is one of this machine, for as long as the training.
        cpus, gpus: of each actor on it; a GPU may be a fraction.
        fleet: how long clients and links take, on a virtual clock: a `Fleet` or its text; None has no clock.
        init: numbers to start from, a `state_dict` or the path of a run or a safetensors file; None is the model's own.
    """

    rounds: int = 100
    seed: int = 0
    dtype: str = "float32"
    loss: str | PerExample | None = None
    metrics: tuple[str | Metric, ...] | None = None
    stop: tuple[Any, ...] = ()
    evaluate_every: int = 1
    numerics: str = "auto"
    precision: str = "full"
    device: str = "auto"
    chunk: int | None = None
    engine: str = "inprocess"
    workers: int | None = None
    backend: str = "auto"
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    fleet: Fleet | str | None = None
    init: Mapping[str, Tensor] | str | Path | None = None

    @classmethod
    def told(cls, words: Mapping[str, Any]) -> Settings:
        """The settings that keyword arguments name."""
        known = [f.name for f in fields(cls)]
        for word in words:
            if word not in known:
                raise unknown_name("setting", word, known)
        return cls(**words)

    def __post_init__(self) -> None:
        if isinstance(self.fleet, str):
            object.__setattr__(self, "fleet", parse(self.fleet, FLEET))
        if self.fleet is not None and not isinstance(self.fleet, Fleet):
            raise UsageError(f"fleet = {self.fleet!r}.", "a Fleet, or its text.", write='fleet = "Fleet(HalfNormal())"')
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        _refuse_mixed(self)
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype = {self.dtype!r}.", "float32 or float64.", write="--dtype float32")
        if self.rounds < 1 or self.evaluate_every < 0:
            raise UsageError(
                f"rounds = {self.rounds}, evaluate_every = {self.evaluate_every}.",
                "at least one round; evaluate_every 0 (never) or more.",
                write="--rounds 100",
            )


class Rounds:
    """A training that is gone through round by round: `for report in atoll.rounds(model, data, plan): ...`.

    Each step is `atoll.plan.round.step`. Between two rounds everything is open: `state`, `model`, `evaluate()`.
    """

    def __init__(self, model: Any, data: Clients, plan: Plan, settings: Settings) -> None:
        _refuse_other(data, plan)
        dtype = DTYPES[settings.dtype]
        module = models.resolve(model, data, Key(settings.seed).fold("model"), dtype)
        kind = "binary" if _binary(module, data) else data.kind
        loss = settings.loss or ("binary_cross_entropy" if kind == "binary" else LOSSES[data.kind])
        metrics = JUDGES[data.kind] if settings.metrics is None else settings.metrics
        device = _device(settings)
        check_precision(settings.precision, settings.dtype, settings.numerics, device)
        task = replace(Task.of(module, loss, metrics, dtype), precision=settings.precision).on(device)
        self.data, self.settings = data, settings
        self.fleet = settings.fleet if isinstance(settings.fleet, Fleet) else None
        self.ranks: Ranks | None = None
        if settings.engine == "torchrun":
            from atoll.engine.torchrun import refuse_pace

            refuse_pace(plan)
            self.ranks = Ranks.join(settings.workers, settings.backend, device)
        self.task, self.reason = _chosen(task, data, plan, settings, self.ranks)
        near = nearby(data, device)  # the fingerprint is taken of what the host has
        self.engine = self._engine(model, near)
        self.judge = None
        if data.held_out is not None and settings.evaluate_every:
            self.judge = InProcessEngine(self.task, near.held(), settings.chunk)
        self.memory = Memory(plan.memory(self.task.layout))
        start = None if settings.init is None else start_from(settings.init, self.task)
        self.state = State.first(plan, self.task, settings.seed, self.memory, start)
        opening(plan, self.state, self.engine.population, self.state.key())  # what cannot be drawn is refused now
        self.plan = plan = bind(plan, self.engine)
        if isinstance(self.engine, InProcessEngine):
            check_clock(plan, self.fleet, self.engine.population, self.state.model, self.task.layout, settings.seed)
        self.first = self.state.model  # where the training began; the loop body writes into the module itself
        self.rules = (stops.Rounds(settings.rounds), stops.Diverged(), settings.stop)
        if isinstance(plan.local, (Gradient, Train)) and isinstance(plan.codec, Identity):
            # Nothing else adds metrics of its own, so all names are known.
            judged = ("held_out_loss", *(m.name for m in self.task.metrics)) if self.judge else ()
            stops.refuse_unknown(self.rules, ("loss", "gradient_norm", "lr", *judged))
        self._shelf = Shelf()
        self.watch: dict[str, Any] = {}
        self.outcome: stops.Outcome | None = None
        self.seconds = 0.0
        self.bytes_up = self.bytes_down = 0
        if self.ranks is not None:
            from atoll.engine.torchrun import alike

            alike(self.ranks, identity(self))
            share(self, self.ranks)
            self.first = self.state.model

    def _engine(self, model: Any, near: Clients) -> InProcessEngine | Dealer:
        settings = self.settings
        if settings.engine == "inprocess":
            return InProcessEngine(self.task, near, settings.chunk, self.fleet)
        if self.ranks is not None:
            from atoll.engine.torchrun import TorchrunEngine

            return TorchrunEngine(self.task, near, settings.chunk, self.fleet, self.ranks)
        name = model if isinstance(model, str) else None
        told: dict[str, Any] = {"model": name, "seed": settings.seed}
        if settings.engine == "processes":
            from atoll.engine.processes import ProcessesEngine

            return ProcessesEngine(self.task, self.data, settings.workers, settings.chunk, **told)
        from atoll.engine.ray import RayEngine

        told |= {"cpus": settings.cpus, "gpus": settings.gpus, "device": settings.device, "address": settings.address}
        return RayEngine(self.task, self.data, settings.workers, settings.chunk, **told)

    def where(self) -> dict[str, Any]:
        """Where clients run, to be written down."""
        if not isinstance(self.engine, InProcessEngine):
            return {
                "engine": self.settings.engine,
                "workers": self.engine.workers,
                "threads_per_worker": self.engine.threads,
            }
        return {"engine": self.settings.engine, **gpu(self.task.device)}

    def close(self) -> None:
        """End what the engine runs beside this process, if anything; the state stays."""
        if not isinstance(self.engine, InProcessEngine):
            self.engine.close()

    def __iter__(self) -> Iterator[Report]:
        while self.outcome is None:
            yield self.next()
        self.close()

    def next(self) -> Report:
        """Run one round, judge it, and see whether a rule ends the training.

        Raises:
            RunError: the round could not be run; the state is that of the round before.
        """
        began = time.perf_counter()
        with lent_from(self._shelf), self._threads():
            self.state, report = step(self.plan, self.state, self.engine)
        spent = time.perf_counter() - began
        last = self.state.round >= self.settings.rounds
        every = self.settings.evaluate_every
        judged = {m.name for m in self.task.metrics} if self.judge is not None else set()
        metrics = {f"training_{n}" if n in judged else n: v for n, v in report.metrics.items()}
        if self.judge is not None and (last or self.state.round % every == 0):
            metrics |= self.evaluate()
        report = report.to(metrics=metrics, seconds=spent, fingerprint=fingerprint(self.state.model.theta))
        if self.ranks is not None:
            from atoll.engine.torchrun import agreed

            report = agreed(self.ranks, report)
        self.seconds += report.seconds
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down
        self.watch, self.outcome = stops.update(self.rules, self.watch, report)
        return report

    def _threads(self) -> AbstractContextManager[None]:
        """What torch does around native code is short: threads that it woke would spin where native code has to run."""
        small = isinstance(self.engine, InProcessEngine) and self.task.layout.d < _WORTH_A_THREAD
        native = self.task.numerics == "compiled"
        return threads_for(self.task, plan=self.plan) if small and native else nullcontext()

    def evaluate(self, engine: InProcessEngine | None = None) -> dict[str, float]:
        """The held-out loss and metrics of the model as it stands, or those on another engine's clients."""
        engine = engine or self.judge
        if engine is None:
            return {}
        return judge(self.state, engine)

    @property
    def model(self) -> nn.Module:
        """A fresh module that holds the model as it stands."""
        return self.task.result(self.state.model)


def identity(training: Rounds) -> dict[str, Any]:
    """What a run must still be to go on, and what it must be at every rank."""
    layout = training.task.layout
    return {
        "data": training.data.fingerprint(),
        "plan": repr(training.plan),
        "numerics": training.task.numerics,
        "precision": training.task.precision,
        "device": training.task.device.type,
        "layout": f"{layout.d} parameters, {layout.dtype}, {sha256(repr(layout.entries).encode()).hexdigest()[:12]}",
        "seed": training.settings.seed,
        **({} if training.fleet is None else {"fleet": repr(training.fleet)}),
    }


def _chosen(task: Task, data: Clients, plan: Plan, settings: Settings, ranks: Ranks | None) -> Choice:
    """The body that computes; at every rank that of rank 0."""
    wanted, rounds = settings.numerics, settings.rounds
    if ranks is None:
        return choose(task, data, plan, wanted, rounds)
    from atoll.engine.overlap import data_parallel

    if wanted == "auto" and data_parallel(plan):
        return Choice(choose(task, data, plan, "loop").task, "its gradient is added up within the backward pass")
    choice = choose(task, data, plan, wanted, rounds)
    first = ranks.told(choice.task.numerics.encode()).decode()
    return choice if first == choice.task.numerics else choose(task, data, plan, first, rounds)


def judge(state: State, engine: InProcessEngine) -> dict[str, float]:
    """The loss, as `held_out_loss`, and the metrics of the model of a state on the clients of an engine: one round."""
    opened = open_round(_JUDGE, replace(state, air=Air(), versions={}, sent=None), engine)
    gathered = engine.gather(_JUDGE, opened.state, opened.cohort, opened.key)
    each = {n: float(t) for n, t in close_round(opened, gathered).mean.sums.items()}
    out = {"held_out_loss": each.pop("loss")}
    finish = {m.name: m.finish for m in engine.task.metrics}
    return out | {n: finish[n](v) for n, v in each.items()}


def _device(settings: Settings) -> torch.device:
    """Where a training computes: a worker process on the CPU, a rank on the GPU of its number, an actor on its own."""
    if settings.engine == "ray":
        if settings.device in ("auto", "cpu", "cuda"):
            return HOST
        raise UsageError(
            f"device = {settings.device!r} with the engine ray.",
            "auto, cpu or cuda.",
            "Ray says which GPU an actor has.",
            "--device cuda --gpus 1",
        )
    if settings.engine != "processes":
        return found(settings.device, local_rank() if settings.engine == "torchrun" else None)
    if settings.device not in ("auto", "cpu"):
        raise UsageError(
            f"device = {settings.device!r} with the engine processes.",
            "the engine inprocess, or torchrun for several GPUs.",
            "one process fills a GPU with clients side by side; workers share out the cores of a machine.",
            "--engine inprocess",
        )
    return HOST


def _refuse_mixed(settings: Settings) -> None:
    """Refuse settings of one engine beside another."""
    if settings.workers is not None and settings.workers < 1:
        raise UsageError(
            f"workers = {settings.workers}.",
            "at least one, on an engine of several processes.",
            "somebody has to compute.",
            "--engine processes --workers 2",
        )
    if settings.engine == "inprocess" and settings.workers is not None:
        raise UsageError(
            f"workers = {settings.workers} with the engine inprocess.",
            "the engine processes.",
            "in this process clients run one chunk after the other.",
            "--engine processes",
        )
    if settings.engine != "ray" and (settings.address, settings.cpus, settings.gpus) != (None, 1.0, 0.0):
        raise UsageError(
            f"address = {settings.address!r}, cpus = {settings.cpus}, gpus = {settings.gpus} "
            f"with the engine {settings.engine}.",
            "the engine ray.",
            "they are of a Ray cluster and the actors on it.",
            "--engine ray",
        )
    if settings.engine == "ray":
        from atoll.engine.ray import check_share

        check_share(settings.cpus, settings.gpus, settings.device)
    if settings.engine in ("processes", "ray") and settings.fleet is not None:
        raise UsageError(
            f"fleet = {settings.fleet!r} with the engine {settings.engine}.",
            "the engine inprocess.",
            "a fleet is a virtual clock, and workers arrive when they arrive.",
            "--engine inprocess",
        )


def _refuse_other(data: object, plan: object) -> None:
    """Refuse what is no clients or no plan: a source that was not split, a recipe that was not called, a swap."""
    if not isinstance(data, Clients):
        raise UsageError(
            f"data is {data!r:.60}.",
            "clients: a data set that was split.",
            "a training has to know who holds which rows.",
            'atoll.data.load("digits").split(10)',
        )
    if not isinstance(plan, Plan):
        raise UsageError(f"plan is {plan!r:.60}.", "a plan.", write="atoll.recipes.fedavg(0.1)")


def _binary(module: nn.Module, data: Clients) -> bool:
    """Whether a model of two classes gives one logit rather than two."""
    if data.kind != "classification" or data.classes is None or len(data.classes) != 2:
        return False
    last = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return bool(last) and last[-1].out_features == 1


def start_from(init: Mapping[str, Tensor] | str | Path, task: Task) -> Model:
    """The model to start from."""
    if isinstance(init, (str, Path)):
        path = Path(init)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(
                f"init = {str(init)!r} is no file.",
                "a run folder or a safetensors file.",
                write="--init runs/latest",
            )
        init = load_file(path)
    theta, buffers, fixed = task.layout.flatten(init)
    counters = {e.name: fixed.pop(e.name) for e in task.layout.counters}
    return Model(theta, buffers, counters, fixed).to(task.device)


def rounds(model: Any, data: Clients, plan: Plan, **settings: Any) -> Rounds:
    """Go through a training round by round, in your own loop; nothing is written.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm.
        settings: the fields of `Settings`.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("diabetes").split(clients=5)
        >>> training = rounds("linear", data, atoll.recipes.distributed_gd(0.1), rounds=3)
        >>> [report.round for report in training]
        [0, 1, 2]
    """
    return Rounds(model, data, plan, Settings.told(settings))
