"""Engines as values: the text or the object that names an engine, and the protocol of the engine that it builds.

    engine="inprocess"    engine="Processes(workers=2)"    engine="Ray('auto', gpus=0.25)"    engine="my_module:Fake()"

A spec is a frozen value of the grammar. It loads without torch. `build` makes the running engine.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.base import grammar
from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Both, Change, EngineChange, Line, Text
from atoll.base.names import load
from atoll.base.validation import bounded_number, class_instead_of_value
from atoll.base.validation import check_fields as check_numbers
from atoll.engine.protocols import Engine, EngineSpec, RunOptions
from atoll.engine.workers.resources import check_actor, check_installed

if TYPE_CHECKING:
    import torch


ENGINES: Mapping[str, str] = {  # short name → "module:Class" of the spec; a package above adds no import here
    "inprocess": "atoll.engine.spec:InProcess",
    "processes": "atoll.engine.spec:Processes",
    "torchrun": "atoll.engine.spec:Torchrun",
    "ray": "atoll.engine.spec:Ray",
}
BACKENDS = ("auto", "gloo", "nccl")


@dataclass(frozen=True, repr=False)
class InProcess(grammar.Value, EngineSpec):
    """Train the clients in this process, one chunk after the other.

    Args:
        rehearse: whether each round runs the protocol of a secure sum, with real keys, shares and masks. It changes no
            bit. The plan needs `Mean(secure=...)`.
    Raises:
        UsageError: `rehearse` is neither True nor False.
    Example:
        >>> engine("inprocess")
        InProcess()
    """

    rehearse: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)

    def build(self, options: RunOptions) -> Engine:
        """Build the engine that computes in this process."""
        from atoll.engine.inprocess import InProcessEngine

        return InProcessEngine(chunk=options.chunk, fleet=options.fleet, rehearse=self.rehearse)


@dataclass(frozen=True, repr=False)
class Processes(grammar.Value, EngineSpec):
    """Train the clients in worker processes on the CPU of this machine.

    Args:
        workers: the number of worker processes, ≥ 1; None starts one worker for each core.
    Raises:
        UsageError: `workers` is not a positive integer.
    Example:
        >>> engine("Processes(workers=2)")
        Processes(2)
    """

    workers: int | None = bounded_number(None, least=1, whole=True, example=2)

    def __post_init__(self) -> None:
        check_numbers(self)

    def check(self, options: RunOptions) -> None:
        """Refuse a fleet and a GPU."""
        _refuse_fleet(self, options)
        if options.device not in ("auto", "cpu"):
            raise UsageError(
                f"device = {options.device!r} with the engine {self!r}.",
                "the engine InProcess(), or Torchrun() for several GPUs.",
                "one process fills a GPU with a batch of clients; worker processes share the cores of the CPU.",
                Change("engine", "inprocess"),
            )

    def device(self, wanted: str) -> torch.device:
        """Return the CPU, because worker processes compute on it."""
        from atoll.compute.batches import HOST

        return HOST

    def build(self, options: RunOptions) -> Engine:
        """Build the engine. Its workers start in `open`."""
        from atoll.engine.workers.processes import ProcessesEngine

        return ProcessesEngine(workers=self.workers, chunk=options.chunk, model=options.model, seed=options.seed)


@dataclass(frozen=True, repr=False)
class Torchrun(grammar.Value, EngineSpec):
    """Train the clients on the processes that `torchrun` started: all of them run this program.

    Args:
        workers: the number of ranks that the engine requires, ≥ 1; None accepts any number.
        backend: the backend of torch.distributed: "gloo", "nccl" or "auto".
    Raises:
        UsageError: `workers` is not a positive integer, or the backend is unknown.
    Example:
        >>> engine("Torchrun(backend='gloo')")
        Torchrun(backend='gloo')
    """

    workers: int | None = bounded_number(None, least=1, whole=True, example=2)
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.backend not in BACKENDS:
            raise UsageError(
                f"backend = {self.backend!r}.",
                f"one of {', '.join(BACKENDS)}.",
                write=Change("engine", "Torchrun(backend='auto')"),
            )

    @property
    def primary(self) -> bool:
        """Whether this process is rank 0."""
        return os.environ.get("RANK", "0") == "0"

    def check(self, options: RunOptions) -> None:
        """Refuse a process that torchrun did not start, and a pace that does not wait for all clients."""
        from atoll.engine.ranks.launch import check_launch

        check_launch(self.workers)  # before torch is imported
        from atoll.engine.ranks.process_group import check_ranks
        from atoll.engine.ranks.torchrun import refuse_pace

        if options.plan is not None:
            refuse_pace(options.plan)
        check_ranks(self.workers, self.backend)

    def device(self, wanted: str) -> torch.device:
        """The device of this rank. The default is the GPU whose number is the local rank."""
        from atoll.compute.device import local_rank, resolve_device

        return resolve_device(wanted, local_rank())

    def build(self, options: RunOptions) -> Engine:
        """Join the process group and build the engine of this rank."""
        from atoll.engine.ranks.process_group import ProcessGroup
        from atoll.engine.ranks.torchrun import TorchrunEngine

        ranks = ProcessGroup.join(self.workers, self.backend, self.device(options.device))
        return TorchrunEngine(chunk=options.chunk, fleet=options.fleet, ranks=ranks)


@dataclass(frozen=True, repr=False)
class Ray(grammar.Value, EngineSpec):
    """Train the clients in actors on a Ray cluster.

    Args:
        address: the address of the cluster, "host:port", or "auto" for a running cluster on this machine. None uses
            RAY_ADDRESS, or starts a cluster on this machine if RAY_ADDRESS is not set.
        workers: the number of actors, ≥ 1; None starts all actors for which the cluster has resources.
        cpus: the number of cores of each actor, > 0.
        gpus: the number of GPUs of each actor, ≥ 0: a fraction below 1, or an integer.
        patience_s: the number of seconds in which an actor must have a place and start, > 0.
    Raises:
        UsageError: a number outside its range.
    Example:
        >>> engine("Ray('auto', gpus=0.25)")
        Ray('auto', gpus=0.25)
    """

    address: str | None = None
    workers: int | None = bounded_number(None, least=1, whole=True, example=2, kw_only=True)
    cpus: float = bounded_number(1.0, above=0, kw_only=True, why="an actor needs a part of a core.")
    gpus: float = bounded_number(0.0, least=0, kw_only=True)
    patience_s: float = bounded_number(60.0, above=0, kw_only=True, why="an actor takes some seconds to start.")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.address is not None and not isinstance(self.address, str):
            raise UsageError(
                f"address = {self.address!r}.", "a text, host:port or auto.", write=Change("engine", "Ray('auto')")
            )
        check_actor(self.cpus, self.gpus)

    def check(self, options: RunOptions) -> None:
        """Refuse a missing installation of Ray, a fleet, a GPU number such as cuda:1, and a GPU if actors have none."""
        check_installed()
        _refuse_fleet(self, options)
        if options.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"device = {options.device!r} with the engine {self!r}.",
                "auto, cpu or cuda.",
                "Ray chooses the GPU of each actor.",
                Both(Change("device", "cuda"), EngineChange(repr(dataclasses.replace(self, gpus=1)), "gpus", 1)),
            )
        check_actor(self.cpus, self.gpus, options.device)

    def device(self, wanted: str) -> torch.device:
        """Return the CPU, because this process computes no clients itself."""
        from atoll.compute.batches import HOST

        return HOST

    def build(self, options: RunOptions) -> Engine:
        """Build the engine. It connects to the cluster in `open`."""
        from atoll.engine.workers.ray import RayEngine

        return RayEngine(
            address=self.address,
            workers=self.workers,
            cpus=self.cpus,
            gpus=self.gpus,
            chunk=options.chunk,
            device=options.device,
            model=options.model,
            seed=options.seed,
            patience_s=self.patience_s,
        )


def _refuse_fleet(spec: EngineSpec, options: RunOptions) -> None:
    if options.fleet is not None:
        raise UsageError(
            f"fleet = {options.fleet!r} with the engine {spec!r}.",
            "the engine InProcess().",
            "a fleet simulates durations, and worker processes take the time that they take.",
            Change("engine", "inprocess"),
        )


# names and texts


def engine(value: object, *, trust: bool = True) -> EngineSpec:
    """Convert the value that a user wrote to a spec.

    Args:
        value: a spec, such as `Processes(workers=2)`; a short name, such as "processes"; or the text of a spec, such as
            "Processes(workers=2)" or "module:Name()".
        trust: whether "module:Name(...)" may import code.
    Raises:
        UsageError: an unknown name or field, or an object that is no spec.
    Example:
        >>> engine("ray"), engine("Processes(workers=2)")
        (Ray(), Processes(2))
    """
    if isinstance(value, str):
        if value in ENGINES:
            made: object = load(ENGINES[value])()
        elif value.replace("_", "a").isalnum():
            raise unknown_name("engine", value, ENGINES, lambda name: Change("engine", name))
        else:
            try:
                made = grammar.parse(value, _classes(), trust=trust, kind="engine")
            except UsageError as error:
                if isinstance(error.write, Text):
                    error.writing(Change("engine", error.write.text))
                raise
    else:
        made = value
    if isinstance(made, type):
        raise class_instead_of_value("engine", made, f"{value.rpartition(':')[0]}:" if isinstance(value, str) else "")
    if not isinstance(made, EngineSpec):
        raise UsageError(
            f"engine = {value!r:.80}.",
            "a name, such as processes, or a spec with the methods `check`, `device` and `build`.",
            "a training calls these methods to start the engine.",
            Change("engine", "inprocess"),
        )
    return made


def spec_name(spec: EngineSpec) -> str:
    """The short name of a spec. A spec that is not from atoll has no short name: then the name of its class.

    Example:
        >>> spec_name(Processes(2))
        'processes'
    """
    return next((name for name, known in ENGINES.items() if known == _class_name(spec)), type(spec).__name__)


def spec_text(spec: EngineSpec) -> str:
    """The text of a spec, from which `engine` makes an equal spec. A class outside `ENGINES` has its module in it.

    Raises:
        UsageError: the spec has no such text.
    Example:
        >>> spec_text(Processes(2))
        'Processes(2)'
    """
    if dataclasses.is_dataclass(spec):
        text = grammar.constructor(spec).replace(type(spec).__name__, _name_in_text(spec), 1)
        try:
            if engine(text) == spec:
                return text
        except UsageError:
            pass  # the error below names the spec
    raise UsageError(
        f"engine = {spec!r:.80}.",
        "a frozen dataclass at the top level of a module, with fields that a text can contain.",
        "an experiment writes its engine as a text.",
        Line(python="atoll.train(model, data, plan, engine=...)"),
    )


def fill(spec: EngineSpec, values: Mapping[str, Any]) -> EngineSpec:
    """Replace fields of a spec by values of flags such as `--workers` and `--gpus`.

    Raises:
        UsageError: the engine has no such field.
    Example:
        >>> fill(engine("processes"), {"workers": 3})
        Processes(3)
    """
    missing = {name: value for name, value in values.items() if name not in _fields(spec)}
    if missing:
        others = [known for known in map(engine, ENGINES) if set(missing) <= set(_fields(known))]
        given = ", ".join(f"{name} = {value!r}" for name, value in missing.items())
        names = " or ".join(f"{type(known).__name__}()" for known in others)
        raise UsageError(
            f"{given} with the engine {spec!r}.",
            f"an engine with {'this field' if len(missing) == 1 else 'these fields'}: {names}.",
            f"{type(spec).__name__} has {_listed(_fields(spec))}.",
            Change("engine", _spelled(others[0], missing)) if others else "",
        )
    return dataclasses.replace(spec, **values) if values else spec  # type: ignore[type-var]


def given_twice(spec: EngineSpec, values: Mapping[str, Any]) -> UsageError | None:
    """The error for a field that both the text of the engine and a flag set; None if there is no such field."""
    twice = [name for name in values if name in _fields(spec) and getattr(spec, name) != _fields(spec)[name]]
    if not twice:
        return None
    name = twice[0]
    return UsageError(
        f"{name} is given twice: in engine = {spec!r}, and as {name} = {values[name]!r}.",
        "one of the two.",
        "they set the same field of the engine.",
        Change("engine", _spelled(spec, values)),
    )


def misplaced(fields: Mapping[str, Any], value: object) -> UsageError:
    """The error for fields of an engine that were passed as settings of a training.

    Args:
        fields: the fields and their values.
        value: the engine that was passed, as for `engine`.
    """
    specs = [engine(value), *map(engine, ENGINES)]
    fits = next((spec for spec in specs if set(fields) <= set(_fields(spec))), None)
    given = ", ".join(f"{name} = {each!r}" for name, each in fields.items())
    return UsageError(
        f"{given} as a setting of a training.",
        "a field of the engine.",
        f"{' and '.join(fields)} belong to the engine, not to the training.",
        "" if fits is None else Change("engine", _spelled(fits, fields)),
    )


def _classes() -> dict[str, Callable[..., Any]]:
    return {where.rpartition(":")[2]: load(where) for where in ENGINES.values()}


def _class_name(spec: EngineSpec) -> str:
    """The class of a spec as `module:Class`."""
    return f"{type(spec).__module__}:{type(spec).__qualname__}"


def _name_in_text(spec: EngineSpec) -> str:
    """The name of the class of a spec in a text: `module:Name` for a class outside `ENGINES`."""
    return type(spec).__name__ if _class_name(spec) in ENGINES.values() else _class_name(spec)


def _fields(spec: EngineSpec) -> dict[str, Any]:
    """The fields of a spec with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(spec)} if dataclasses.is_dataclass(spec) else {}


def _listed(names: Mapping[str, Any]) -> str:
    return f"the fields {', '.join(names)}" if names else "no fields"


def _spelled(spec: EngineSpec, values: Mapping[str, Any]) -> str:
    """The constructor of a spec with some fields replaced; each field by its name."""
    own = {n: getattr(spec, n) for n, default in _fields(spec).items() if getattr(spec, n) != default}
    return f"{_name_in_text(spec)}({', '.join(f'{n}={v!r}' for n, v in {**own, **values}.items())})"
