"""An experiment: everything that `atoll run` can be told, as plain values, and as a TOML file.

    flag  >  --set  >  environment, ATOLL_…  >  file  >  default            the first that says something wins

The file is the one that is named, else atoll.toml or [tool.atoll] of pyproject.toml in the working folder. A plan, a
split and a stop rule are texts of the one grammar. `module:name` is code, and is imported only where somebody at this
machine typed it or named the file it stands in: a file that was merely found, or a run folder, needs `--trust`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from atoll import grammar
from atoll.errors import UsageError, unknown_name
from atoll.experiment.texts import checked, flat, of_text, read_toml, toml

if TYPE_CHECKING:
    from torch import nn

    from atoll.data import Clients, Source
    from atoll.data.partition import Partition
    from atoll.plan.plan import Plan
    from atoll.recorder import Run
    from atoll.training import Rounds

CLIENTS, ROWS_EACH = 100, 10
RECIPE = "fedavg(lr=0.5, batch=10)"
GENTLE_RECIPE = "fedavg(lr=0.0005, batch=10)"
_KEYS = {"dataset": "data", "overrides": "plan"}
_ABOUT_DATA = {"dataset", "folder", "target", "by", "task", "missing", "scale"}


@dataclass(frozen=True, repr=False)
class Experiment(grammar.Value):
    """What `atoll run` can be told, as plain values; the defaults are the demonstration.

    In files and flags the fields go by their own names, but for `data` (`dataset` here) and `plan` (`overrides` here).

    Args:
        dataset: the name of a data set, or the path of a CSV file or of a folder of arrays.
        folder, target, by, task, missing, scale: of the data, see `atoll.data.load`.
        clients: how many; None: the natural ones, else 100, or fewer so that each has ten rows.
        split: a partition; None: the natural clients, else `Dirichlet(0.3)` where rows have classes, else `IID()`.
        held_out: part of the rows that no client gets, in [0, 1).
        min_rows: rows that each client has at least.
        model: a name, or `module:factory`; None: "mlp", and "lstm" for tokens.
        recipe: a recipe or a whole plan; None: `fedavg`, with a learning rate by the kind of data.
        overrides: what to put into the plan instead, text by slot: `{"pace": "Sync()", "optimizer.lr": "0.5"}`.
        loss, metrics: names; None: by the kind of data.
        rounds, seed, dtype, evaluate_every, numerics, precision, device, chunk: see `atoll.Settings`.
        stop: texts of stop rules.
        engine, workers, backend, address, cpus, gpus: where clients run, see `atoll.Settings`.
        fleet: how long clients and links take, on a virtual clock: the text of a `Fleet`.
        init: a run or a safetensors file to start from.
        baselines: whether to train pooled and local-only beside it.
        checkpoint_s: seconds between two checkpoints.
        report: whether plots and report.html are drawn at the end.
        out: the parent of run folders.
        untrusted: names of what may not import code, because nobody here typed it.
    Example:
        >>> told = Experiment().with_settings({"rounds": "5", "plan.optimizer": "adam(0.01)"})
        >>> told.rounds, told.plan().optimizer
        (5, adam(0.01))
    """

    dataset: str = "digits"
    folder: str | None = None
    target: str | None = None
    by: str | None = None
    task: str | None = None
    missing: str | None = None
    scale: str | None = None
    clients: int | None = None
    split: str | None = None
    held_out: float = 0.2
    min_rows: int = 2
    model: str | None = None
    recipe: str | None = None
    loss: str | None = None
    metrics: tuple[str, ...] | None = None
    rounds: int = 100
    seed: int = 0
    dtype: str = "float32"
    evaluate_every: int = 1
    stop: tuple[str, ...] = ()
    engine: str = "inprocess"
    workers: int | None = None
    backend: str = "auto"
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    fleet: str | None = None
    numerics: str = "auto"
    precision: str = "full"
    device: str = "auto"
    chunk: int | None = None
    init: str | None = None
    baselines: bool = False
    checkpoint_s: float = 15.0
    report: bool = True
    out: str = "runs"
    overrides: Mapping[str, str] = field(default_factory=dict)
    untrusted: frozenset[str] = field(default=frozenset(), compare=False)

    # what is told

    @classmethod
    def read(cls, path: str | Path, *, trust: bool | None = None, old_names: bool = False) -> Experiment:
        """The experiment that a TOML file describes: a file of its own, pyproject.toml, or a run's config.toml.

        Args:
            path: the file, or a run's folder.
            trust: whether the file may name code; None: yes, but for a config.toml, which may be somebody else's.
            old_names: whether plan texts may have names of parts from before they were renamed.
        Raises:
            UsageError: the file is missing or malformed, or holds an unknown key or a value of another type.
        """
        file = Path(path)
        file = file / "config.toml" if file.is_dir() else file
        values = read_toml(file)
        if values is None:
            raise UsageError(f"{file} has no section [tool.atoll].", "one, with the settings.", write="[tool.atoll]")
        if values.get("python"):
            raise UsageError(
                f"{file.parent.name} was started from Python.",
                "an experiment that a file can describe.",
                "its model or its data are objects, which only the program that made them has.",
                f"atoll.train(model, data, plan, resume={str(file.parent)!r})",
            )
        trust = file.name != "config.toml" if trust is None else trust
        given = flat(values)
        if old_names:
            from atoll.plan.names import renamed

            texts = [
                key for key, text in given.items() if key.startswith(("plan.", "recipe")) and isinstance(text, str)
            ]
            given |= {key: renamed(given[key]) for key in texts}
        return cls()._with(given, str(file), trust=trust)

    @classmethod
    def found(cls, folder: str | Path = ".", *, trust: bool = False) -> Experiment:
        """The experiment of atoll.toml, else of [tool.atoll] in pyproject.toml, in a folder; else the demonstration."""
        for name in ("atoll.toml", "pyproject.toml"):
            file = Path(folder) / name
            if file.is_file() and (values := read_toml(file)) is not None:
                return cls()._with(flat(values), name, trust=trust)
        return cls()

    def with_settings(self, texts: Mapping[str, str], where: str = "--set") -> Experiment:
        """The same with some settings given as texts, by dotted key, as `--set` and the environment give them.

        Raises:
            UsageError: no such key, with the nearest one that there is; or a text of another type.
        Example:
            >>> Experiment().with_settings({"held_out": "0.1", "plan.pace": "Sync()"})
            Experiment(held_out=0.1, overrides={'pace': 'Sync()'})
        """
        hints = {key: _hints()[name] for name, key in _fields().items()}
        values = {k: of_text(text, hints.get(k.replace("-", "_"), str)) for k, text in texts.items()}
        return self._with(values, where, trust=True)

    def with_environment(self, environ: Mapping[str, str] = os.environ) -> Experiment:
        """The same with what ATOLL_… variables say: ATOLL_ROUNDS, ATOLL_PLAN_PACE; the data set is ATOLL_DATASET.

        Example:
            >>> Experiment().with_environment({"ATOLL_HELD_OUT": "0.1"}).held_out
            0.1
        """
        it = self
        for name, key in _fields().items():
            variable = f"ATOLL_{name.upper()}"
            if variable in environ and name != "overrides":
                it = it.with_settings({key: environ[variable]}, variable)
        for variable in sorted(environ):
            if variable.startswith("ATOLL_PLAN_"):
                slot = variable.removeprefix("ATOLL_PLAN_").lower()
                it = it.with_settings({f"plan.{slot}": environ[variable]}, variable)
        return it

    def told(self, **values: Any) -> Experiment:
        """The same with some settings given as values; None says nothing.

        Example:
            >>> Experiment().told(data="wine", rounds=3, clients=None)
            Experiment('wine', rounds=3)
        """
        return self._with({k: v for k, v in values.items() if v is not None}, "", trust=True)

    def _with(self, values: Mapping[str, Any], where: str, *, trust: bool) -> Experiment:
        overrides, changes, names = dict(self.overrides), {}, set()
        known = {key: name for name, key in _fields().items()}
        for told, value in values.items():
            key = told.replace("-", "_")
            if key.startswith("plan."):
                _refuse_unknown("slot", key, _slots(), ".".join(key.split(".")[:2]), where)
                overrides[key[5:]] = value if isinstance(value, str) else repr(value)
            else:
                _refuse_unknown("setting", key, known.keys() - {"plan"}, key, where)
                name = known[key]
                changes[name] = checked(key, value, _hints()[name], getattr(_DEFAULT, name), where)
            names.add(key)
        untrusted = self.untrusted - names if trust else self.untrusted | names
        return self._to(**changes, overrides=overrides, untrusted=untrusted)

    def _to(self, **changes: Any) -> Experiment:
        """A copy with some fields replaced, which need not read the data again where that stays the same."""
        it = dataclasses.replace(self, **changes)
        if "source" in self.__dict__ and all(getattr(it, n) == getattr(self, n) for n in _ABOUT_DATA):
            it.__dict__["source"] = self.source
        return it

    def toml(self) -> str:
        """The experiment as the text of a TOML file, every setting written out; `read` gives an equal one back."""
        lines = ["# What `atoll run` was told, defaults included. `atoll run` of this file does the same again."]
        for name, key in _fields().items():
            value = getattr(self, name)
            if value is not None and name != "overrides":
                lines.append(f"{key} = {toml(value)}")
        if self.overrides:
            lines += ["", "[plan]"]
            lines += [f"{toml(slot)} = {toml(text)}" for slot, text in self.overrides.items()]
        return "\n".join(lines) + "\n"

    # what it means

    @cached_property
    def source(self) -> Source:
        """The data set, before it is split; read once."""
        from atoll.data import load

        return load(self.dataset, **{n: getattr(self, n) for n in _ABOUT_DATA - {"dataset"}})

    def settled(self) -> Experiment:
        """The same with what was left to the data said: clients, split, model, recipe, and where a file is."""
        from atoll.data.named import NAMED

        changes: dict[str, Any] = {}
        if self.dataset not in NAMED and Path(self.dataset).exists():
            changes["dataset"] = str(Path(self.dataset).resolve())
        kind = self.source.kind
        classes = self.source.classes is not None
        if self.model is None:
            changes["model"] = "lstm" if kind == "tokens" else "mlp"
        if self.recipe is None:
            changes["recipe"] = RECIPE if classes else GENTLE_RECIPE
        if self.split is None:
            natural = self.source.by is not None
            changes["split"] = "ByColumn()" if natural else "Dirichlet(0.3)" if classes else "IID()"
        if self.clients is None:
            changes["clients"] = self._count(self._partition(changes.get("split") or self.split or ""))
        it = self._to(**changes)
        it.__dict__["source"] = self.source
        return it

    def _count(self, partition: Partition) -> int:
        """How many clients there are where nobody said."""
        if partition.natural and self.source.names is not None:
            return len(self.source.names)
        own_test = self.source.test is not None
        train = len(self.source) if own_test else int(len(self.source) * (1 - self.held_out))
        return max(1, min(CLIENTS, train // max(ROWS_EACH, self.min_rows)))

    def _trusts(self, key: str) -> bool:
        return key not in self.untrusted

    def _partition(self, text: str) -> Partition:
        from atoll.data import partition as p

        known = (p.IID, p.Dirichlet, p.Pathological, p.Shards, p.Quantity, p.FeatureShift, p.ByColumn)
        return grammar.parse(text, {c.__name__: c for c in known}, trust=self._trusts("split"))  # type: ignore[no-any-return]

    def data(self) -> Clients:
        """The clients: the data set, split.

        Raises:
            UsageError: there is no such data, or it cannot be split so.
        """
        it = self.settled()
        partition = it._partition(it.split or "")
        return it.source.split(it.clients, partition, held_out=it.held_out, seed=it.seed, min_rows=it.min_rows)

    def plan(self) -> Plan:
        """The plan: the recipe, then what is put into its slots instead.

        Raises:
            UsageError: a text that is no plan or no part, or that names code and is not trusted.
        """
        from atoll.plan.names import read_part
        from atoll.plan.plan import Plan
        from atoll.recipes import RECIPES

        text = self.recipe or self.settled().recipe or RECIPE
        names = {r.__name__: r for r in RECIPES} | {"Plan": Plan}
        told = read_part(text, names, trust=self._trusts("recipe"))
        if not isinstance(told, Plan):
            raise UsageError(f"{text!r} is a {type(told).__name__}.", "a recipe, or a whole plan.", write=RECIPE)
        plan: Plan = told
        for slot, text in sorted(self.overrides.items(), key=lambda item: item[0].count(".")):
            part = read_part(text, trust=self._trusts(f"plan.{slot}"))
            plan = _put(plan, slot.split("."), part, slot)
        return plan

    def module(self) -> nn.Module:
        """The model as it was before the first round, to load numbers into."""
        from atoll import models
        from atoll.rng import Key
        from atoll.training import DTYPES

        dtype = DTYPES[self.dtype]
        model = self.settled()._model()
        return models.resolve(model, self.data(), Key(self.seed).fold("model"), dtype).to(dtype)

    def _model(self) -> str:
        """The name of the model; code outside atoll only where it is trusted."""
        model = self.model or "mlp"
        if ":" in model and not self._trusts("model"):
            raise UsageError(
                f"The model {model} names code outside atoll.",
                "a model of atoll's own, or --trust.",
                "this text did not come from the person at this machine, so it may not import.",
                "--trust",
            )
        return model

    def _settings(self) -> dict[str, Any]:
        """What `atoll.Settings` is given."""
        from atoll import runs
        from atoll.plan.names import PARTS

        rules: list[Any] = []
        for text in self.stop:
            rule = grammar.parse(text, PARTS, trust=self._trusts("stop"))
            rules += rule if isinstance(rule, (tuple, list)) else [rule]
        computed = ("dtype", "loss", "metrics", "numerics", "precision", "device", "chunk", "fleet")
        where = ("engine", "workers", "backend", "address", "cpus", "gpus")
        names = ("rounds", "seed", "evaluate_every", *computed, *where)
        init = self.init
        if init is not None and not Path(init).exists():
            init = str(runs.find(init, Path(self.out)))
        return {n: getattr(self, n) for n in names} | {"stop": tuple(rules), "init": init}

    def training(self, **changes: Any) -> Rounds:
        """The training before its first round, to go through by hand; nothing is written.

        Args:
            changes: fields of `atoll.Settings` to have otherwise.
        """
        from atoll import rounds

        it = self.settled()
        return rounds(it._model(), it.data(), it.plan(), **{**it._settings(), **changes})

    def train(self, **more: Any) -> Run:
        """Train it: `atoll.train` with everything that was told.

        Args:
            more: further arguments of `atoll.train`, which win; with `resume=`, what a run must keep is kept.
        """
        from atoll import train

        it = self.settled()
        if more.get("resume") is not None:
            it = it._kept(Path(more["resume"]))
            more["watchers"] = (*more.get("watchers", ()), _Rewrites(it.toml()))
        told: dict[str, Any] = {n: getattr(it, n) for n in ("out", "baselines", "checkpoint_s", "report")}
        told["config"] = it.toml()
        plan, settings = it.plan(), it._settings()
        return train(it._model(), it.data(), plan, **{**told, **settings, **more})

    def _kept(self, run: Path) -> Experiment:
        """What a run that goes on keeps: how it computes, and not where it started from, which may be gone by now."""
        from atoll import runs

        began, changes = runs.read_environment(run), dict[str, Any]()
        for name, before in (("numerics", "auto"), ("device", "cpu")):
            if getattr(self, name) == "auto":
                changes[name] = began.get(name, before)
        if (run / "checkpoint" / "pointer.json").exists():
            changes["init"] = None
        return self._to(**changes)


@dataclass(frozen=True)
class _Rewrites:
    """Puts a run's settings into its folder again: it goes on with other ones, such as more rounds."""

    config: str

    def start(self, training: object, path: Path | None) -> None:
        from atoll import runs

        if path is not None:
            runs.write(path / "config.toml", self.config.encode())

    def round(self, report: object) -> None: ...
    def end(self, run: object) -> None: ...


_DEFAULT = Experiment()


@cache
def _fields() -> dict[str, str]:
    """The fields that can be told, and the keys they go by."""
    return {f.name: _KEYS.get(f.name, f.name) for f in dataclasses.fields(Experiment) if f.name != "untrusted"}


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Experiment, localns={"Mapping": Mapping})


def _slots() -> list[str]:
    from atoll.plan.plan import Plan

    return [f"plan.{f.name}" for f in dataclasses.fields(Plan)]


def _refuse_unknown(what: str, told: str, known: Iterable[str], key: str, where: str) -> None:
    """An error for a key that is in no table; it names the file, where it stands in one."""
    if key not in (names := set(known)):
        error = unknown_name(what, told, names)
        place = "" if where in ("", "--set") else f"{where}: "
        raise UsageError(f"{place}{error.given}", error.required, write=error.write)


def _put(value: Any, path: list[str], part: Any, slot: str) -> Any:
    """A frozen value with the field at a path replaced, every check on the way made again."""
    if not path:
        return part
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    if path[0] not in names:
        what = f"field of {type(value).__name__}"
        raise (
            unknown_name(what, path[0], names)
            if names
            else UsageError(
                f"plan.{slot}: {value!r} has no fields.", "a part with fields.", write=f"plan.{slot.rpartition('.')[0]}"
            )
        )
    return dataclasses.replace(value, **{path[0]: _put(getattr(value, path[0]), path[1:], part, slot)})
