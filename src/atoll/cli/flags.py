"""The flags that tell an experiment, and the experiment they tell."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from atoll.errors import UsageError

if TYPE_CHECKING:
    from atoll.experiment import Experiment

DATA = Group.create_ordered("Data")
METHOD = Group.create_ordered("Model and plan")
RUNNING = Group.create_ordered("Running")
SHOWN = Group.create_ordered("Output")


def flag(group: Group, help: str, name: str | None = None) -> Parameter:
    """A flag of an experiment, or of a command: its default is told by the help."""
    return Parameter(name=name, group=group, help=help, show_default=False, negative_iterable="")


def switch(group: Group, help: str, variable: str, name: str | None = None) -> Parameter:
    """A flag of a command, off where it is not given, or the environment variable that stands for it."""
    return Parameter(
        name=name, group=group, help=help, negative="", env_var=variable, show_env_var=False, show_default=False
    )


@Parameter(name="*")
@dataclass(frozen=True)
class Told:
    """What the flags of an experiment say; None says nothing, and the next source is asked."""

    data: Annotated[str | None, flag(DATA, "A name, a CSV file, or a folder of x.npy and y.npy. Default: digits.")] = (
        None
    )
    clients: Annotated[
        int | None, flag(DATA, "How many. Default: the natural ones, else 100, or fewer for small data.")
    ] = None
    split: Annotated[
        str | None,
        flag(DATA, "Who holds what: IID(), Pathological(2), … Default: Dirichlet(0.3) where rows have classes."),
    ] = None
    held_out: Annotated[float | None, flag(DATA, "Part of the rows that no client gets. Default: 0.2.")] = None
    target: Annotated[str | None, flag(DATA, "The column of a CSV file to predict. Default: the last.")] = None
    by: Annotated[str | None, flag(DATA, "The column of a CSV file that says who holds a row.")] = None
    task: Annotated[str | None, flag(DATA, "classification or regression. Default: guessed, and said.")] = None
    missing: Annotated[str | None, flag(DATA, "What to do with missing numbers: mean or drop.")] = None
    scale: Annotated[str | None, flag(DATA, "standard, client or none. Default: standard for tables.")] = None
    folder: Annotated[str | None, flag(DATA, "Where the files of mnist, fashion_mnist and heart are.")] = None

    model: Annotated[str | None, flag(METHOD, "A name, or module:factory. Default: mlp.")] = None
    recipe: Annotated[str | None, flag(METHOD, "A recipe or a whole plan. Default: fedavg(lr=0.5, batch=10).")] = None
    init: Annotated[str | None, flag(METHOD, "A run or a safetensors file whose numbers to start from.")] = None

    rounds: Annotated[int | None, flag(RUNNING, "At most so many. Default: 100.")] = None
    stop: Annotated[
        list[str] | None,
        flag(RUNNING, 'A rule that ends the run sooner: Target("accuracy", 0.95). May be repeated.'),
    ] = None
    seed: Annotated[int | None, flag(RUNNING, "Of everything that is drawn. Default: 0.")] = None
    dtype: Annotated[str | None, flag(RUNNING, "float32 or float64. Default: float32.")] = None
    engine: Annotated[
        str | None, flag(RUNNING, "Where clients run: inprocess, processes, torchrun or ray. Default: inprocess.")
    ] = None
    workers: Annotated[
        int | None, flag(RUNNING, "Worker processes, default one a core; ranks of torchrun; or actors on Ray.")
    ] = None
    address: Annotated[
        str | None, flag(RUNNING, "Of the Ray cluster: host:port, or auto. Default: one of this machine, for the run.")
    ] = None
    cpus: Annotated[float | None, flag(RUNNING, "Cores of each actor on Ray. Default: 1.")] = None
    gpus: Annotated[float | None, flag(RUNNING, "GPUs of each actor on Ray, or a fraction of one. Default: 0.")] = None
    fleet: Annotated[
        str | None, flag(RUNNING, 'How long clients and links take, on a virtual clock: "Fleet(HalfNormal())".')
    ] = None
    numerics: Annotated[str | None, flag(RUNNING, "auto, compiled, fused, lanes or loop. Default: auto.")] = None
    precision: Annotated[
        str | None, flag(RUNNING, "full or bf16: the model's products in bfloat16. Default: full.")
    ] = None
    device: Annotated[
        str | None, flag(RUNNING, "auto, cpu, cuda or cuda:1. Default: auto, a GPU where there is one.")
    ] = None
    chunk: Annotated[int | None, flag(RUNNING, "Clients computed together; changes no bit.")] = None
    baselines: Annotated[bool | None, flag(RUNNING, "Also train pooled and local-only, and compare. Default: no.")] = (
        None
    )
    settings: Annotated[
        list[str] | None,
        flag(RUNNING, 'KEY=VALUE, any setting by its dotted key: "plan.pace=Sync()". May be repeated.', "--set"),
    ] = None
    out: Annotated[str | None, flag(SHOWN, "The parent of run folders. Default: runs.")] = None

    def experiment(self, file: str | None, trust: bool) -> Experiment:
        """The experiment that flags, `--set`, environment and file tell; the first that says something wins."""
        from atoll.experiment import Experiment

        base = Experiment.read(file, trust=trust or None) if file else Experiment.found(trust=trust)
        flags = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return base.with_environment(os.environ).with_settings(pairs(self.settings or [])).told(**flags)


def pairs(settings: list[str]) -> dict[str, str]:
    """KEY=VALUE texts as a dict.

    Example:
        >>> pairs(["rounds=3", "plan.pace=Sync()"])
        {'rounds': '3', 'plan.pace': 'Sync()'}
    """
    out = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}", "KEY=VALUE.", write="--set rounds=10")
        out[key.strip()] = value.strip()
    return out
