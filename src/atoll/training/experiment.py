"""An experiment contains the settings of `atoll run`. It is read from and written to a TOML file.

    flag  >  --set  >  environment, ATOLL_…  >  file  >  default            the first that gives a value wins

The file is the named one, else atoll.toml or [tool.atoll] of pyproject.toml in the working folder. A plan, a split, an
engine and a stop rule are texts of the grammar. `module:name` is code. It is imported only if a person at this machine
typed it or named its file: a file that was found, or a run folder, needs `--trust`.

Tests: tests/surface/test_experiment.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

from atoll.base import grammar
from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import TRUST, Change, Line, Part, Split, Text, form
from atoll.base.names import dotted
from atoll.base.validation import check_arguments
from atoll.plan.formula import FEDAVG_RATE
from atoll.runs.next_line import program_call, program_of, resume_line, started_by_program
from atoll.training.engine_fields import ENGINE_FIELDS, is_old_default
from atoll.training.known_names import PARTITIONS, RECIPES, check_call, check_data, check_model
from atoll.training.setting_texts import (
    DATA,
    GROUP_NAMES,
    METHOD,
    OUTPUT,
    TEXTS,
    as_text,
    checked,
    of_text,
    read_toml,
    toml,
)
from atoll.training.settings import Settings, TrainingFields, declared, setting

if TYPE_CHECKING:
    from torch import nn

    from atoll.data import Clients, Source
    from atoll.data.input import Input
    from atoll.data.partition import Partition
    from atoll.engine.protocols import EngineSpec
    from atoll.plan.plan import Plan
    from atoll.runs.events import Run
    from atoll.runs.personal import ClientModels
    from atoll.runs.predictor import Predictor
    from atoll.training.rounds import Training

F = TypeVar("F", bound=Callable[..., Any])

CLIENTS, ROWS_EACH = 100, 10
RECIPE = f"fedavg(lr={FEDAVG_RATE}, batch=10)"
REGRESSION_RECIPE = "fedavg(lr=0.05, batch=10)"
LARGEST_RATE = 0.12  # a client that trains by itself may have more curvature than all rows together
_KEYS = {"dataset": "data", "overrides": "plan"}
_ABOUT_TABLE = (
    *("target", "by", "task", "missing", "scale", "columns", "drop", "na", "decimal", "dates"),
    *("max_levels", "classes", "positive", "scale_target", "encoding", "sheet"),
)
_ABOUT_DATA = {"dataset", "folder", *_ABOUT_TABLE}


def linear_recipe(features: int) -> str:
    """The default recipe of least squares: gradient descent on all rows, with Nesterov's momentum.

    It converges for any rows and any partition, because 2η·trace < 1.35. The trace of the mean of x xᵀ is at least its
    largest eigenvalue; each scaled feature and the bias add at most 1 to it.

    Args:
        features: the number of features with a mean square of at most 1, ≥ 1.
    Example:
        >>> linear_recipe(10)
        'Plan(Gradient(), Mean(), sgd(0.0606, momentum=0.9, nesterov=True))'

    Reference: Lessard, Recht and Packard, Analysis and Design of Optimization Algorithms via Integral Quadratic
        Constraints, 2016, proposition 12.
    """
    rate = min(LARGEST_RATE, 2 / (3 * (features + 1)))
    return f"Plan(Gradient(), Mean(), sgd({rate:.3g}, momentum=0.9, nesterov=True))"


def _with_lines_of_files(method: F) -> F:
    """A method of `Experiment` whose errors about a setting that a file gave have their lines for the file."""

    @wraps(method)
    def call(self: Experiment, *args: Any, **words: Any) -> Any:
        try:
            return method(self, *args, **words)
        except UsageError as error:
            line = error.write
            names = (
                {line.name} if isinstance(line, Change) else {"clients", "split"} if isinstance(line, Split) else set()
            )
            if names & self.files.keys():
                error.at("file")
            raise

    return cast("F", call)


@dataclass(frozen=True, repr=False)
class Experiment(grammar.Value, TrainingFields):
    """The settings of `atoll run` as plain values; the defaults are the demonstration.

    In files and flags each field has its own name, except for `data` (`dataset` here) and `plan` (`overrides` here).
    The settings of the training are those of `atoll.Settings`, in the form of texts.

    Args:
        dataset: the name of a data set, or the path of a CSV file or of a folder of arrays.
        folder, target, by, task, missing, scale, columns, drop, na, decimal, dates, max_levels, classes, positive,
            scale_target, encoding, sheet: how the data is read; `atoll.data.load` explains them.
        input: the path of an input.json or of a run, whose columns, levels and statistics are used.
        clients: the number of clients. None: the natural clients if the data has any; otherwise 100, or fewer, so that
            each client has at least ten rows.
        split: the partition. None: the natural clients if the data has any; otherwise `Dirichlet(0.3)` if rows have
            classes, and `IID()` if not.
        held_out: the fraction of the rows that no client gets, in [0, 1); or a rule, such as Groups("patient", 0.2).
        min_rows: the smallest number of rows of a client.
        model: a name, or `module:factory`; None: "lstm" if rows contain tokens, otherwise "mlp".
        recipe: a recipe or a whole plan; None: `fedavg`, with a learning rate by the kind of data.
        baselines: whether pooled and local-only models are trained for comparison.
        checkpoint_s: the number of seconds between two checkpoints.
        report: whether plots and report.html are drawn at the end.
        plots: further formats of the plots, such as "png,pdf".
        out: the parent of run folders.
        overrides: texts of parts that replace parts of the recipe. The keys are slots, or fields of slots:
            `{"pace": "Sync()", "optimizer.lr": "0.5"}`.
        engine_fields: the fields of the engine that `--workers`, `--gpus` and similar flags set.
        untrusted: the names of settings that must not import code, because their text was not typed at this machine.
        files: the file of each setting that a file gave, for errors.
    Raises:
        UsageError: a value has no text, for example a function as `loss`.
    Example:
        >>> it = Experiment().with_settings({"rounds": "5", "plan.optimizer": "adam(0.01)"})
        >>> it.rounds, it.plan().optimizer
        (5, adam(0.01))
    """

    dataset: str = setting("digits", "A name, a CSV file, or a folder of x.npy and y.npy. Default: digits.", group=DATA)
    clients: int | None = setting(
        None, "Number of clients. Default: the natural ones, else 100, or fewer for small data.", group=DATA
    )
    split: str | None = setting(
        None,
        "Rows of each client: IID(), Pathological(2), … Default: Dirichlet(0.3) if rows have classes.",
        group=DATA,
    )
    held_out: float | str = setting(
        0.2,
        """Rows that no client gets: a fraction, or PerClient(0.2), Groups("patient", 0.2), After("visit", 0.2),
        Mask("fold", "test"). Default: 0.2.""",
        group=DATA,
    )
    target: str | None = setting(None, "The column of a CSV file to predict. Default: the last.", group=DATA)
    by: str | None = setting(None, "The column of a CSV file that names the client of a row.", group=DATA)
    task: str | None = setting(
        None, "classification, regression, or labels (several targets of 0 and 1). Default: guessed.", group=DATA
    )
    missing: str | None = setting(None, "Treatment of missing numbers: mean or drop.", group=DATA)
    scale: str | None = setting(None, "standard, client or none. Default: standard for tables.", group=DATA)
    columns: str | None = setting(None, "Features of a table: A,B. Default: all other columns.", group=DATA)
    drop: str | None = setting(None, "Columns that are no features: A,B.", group=DATA)
    na: str | None = setting(None, "Texts of missing values, instead of the usual ones: none,-9.", group=DATA)
    decimal: str | None = setting(None, 'Decimal mark of a table: "," or ".". Default: guessed.', group=DATA)
    dates: str | None = setting(None, "drop, or a format such as %d.%m.%Y. Default: ISO dates.", group=DATA)
    max_levels: str | None = setting(
        None, "Largest number of levels of a text column. 20,other collects the rest. Default: 100.", group=DATA
    )
    classes: str | None = setting(None, "The classes in order: A,B. Default: those of the target.", group=DATA)
    positive: str | None = setting(None, "The positive class of two. Default: the last.", group=DATA)
    scale_target: str | None = setting(
        None, "standard or none: the scale of a number to predict. Default: standard.", group=DATA, flag=False
    )
    encoding: str | None = setting(None, "Encoding of a CSV file. Default: utf-8.", group=DATA)
    sheet: str | None = setting(None, "Sheet of an Excel file. Default: the first.", group=DATA)
    input: str | None = setting(None, "An input.json or a run, whose columns and statistics are used.", group=DATA)
    folder: str | None = setting(None, "Folder of the files of mnist, fashion_mnist and heart.", group=DATA)
    min_rows: int = setting(2, "Smallest number of rows of a client.", group=DATA, flag=False)
    model: str | None = setting(None, "A name, or module:factory. Default: mlp.", group=METHOD)
    recipe: str | None = setting(None, f"A recipe or a whole plan. Default: {RECIPE}.", group=METHOD)
    baselines: bool = setting(False, "Also train pooled and local-only models, and compare. Default: no.")
    checkpoint_s: float = setting(15.0, "Seconds between two checkpoints.", flag=False)
    report: bool = setting(True, "Whether plots and report.html are drawn.", group=OUTPUT, flag=False)
    plots: str = setting("", "Further formats of the plots: png,pdf. They need atoll[plots].", group=OUTPUT, flag=False)
    out: str = setting("runs", "The parent of run folders. Default: runs.", group=OUTPUT)
    overrides: Mapping[str, str] = field(default_factory=dict)
    engine_fields: Mapping[str, Any] = field(default_factory=dict)
    untrusted: frozenset[str] = field(default=frozenset(), compare=False)
    files: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if "setting" in f.metadata:
                object.__setattr__(self, f.name, as_text(f.name, getattr(self, f.name)))

    # reading and writing

    @classmethod
    def read(cls, path: str | Path, *, trust: bool | None = None, old_names: bool = False) -> Experiment:
        """Read an experiment from a TOML file: a separate file, pyproject.toml, or the config.toml of a run.

        Args:
            path: the file, or a run's folder.
            trust: whether the file may name code; None: yes, except for a config.toml, which another user may have
                written.
            old_names: whether plan texts may contain the former names of renamed parts.
        Raises:
            UsageError: the file is missing or malformed, or contains an unknown key or a value of another type.
        """
        file = Path(path)
        file = file / "config.toml" if file.is_dir() else file
        values = read_toml(file)
        if values is None:
            raise UsageError(
                f"{file} has no section [tool.atoll].", "this section, with settings.", write=Line(file="[tool.atoll]")
            )
        if values.get("python"):
            rounds = {"rounds": values["rounds"]} if "rounds" in values else {}
            raise started_by_program(file.parent, program_call(values, **rounds))
        trust = file.name != "config.toml" if trust is None else trust
        given = dotted(values)
        if file.name == "config.toml":  # a run folder; in the file of a user such a value has a meaning
            given = {key: value for key, value in given.items() if not is_old_default(key, value)}
        if old_names:
            from atoll.plan.formula import renamed

            parts = {n: text for n, text in given.items() if n.startswith(("plan.", "recipe"))}
            given |= {n: renamed(text) for n, text in parts.items() if isinstance(text, str)}
        return cls()._of_file(given, str(file), trust)

    @classmethod
    def found(cls, folder: str | Path = ".", *, trust: bool = False) -> Experiment:
        """The experiment of atoll.toml in a folder, else of [tool.atoll] in pyproject.toml, else the demonstration."""
        for name in ("atoll.toml", "pyproject.toml"):
            file = Path(folder) / name
            if file.is_file() and (values := read_toml(file)) is not None:
                return cls()._of_file(dotted(values), name, trust)
        return cls()

    def _of_file(self, values: Mapping[str, Any], file: str, trust: bool) -> Experiment:
        """A copy with the settings of a file. Errors about them have lines for the file."""
        try:
            it = self._with(values, file, trust=trust)
        except UsageError as error:
            _stands_in_file(error)
            raise
        return it._to(files=dict.fromkeys((name.replace("-", "_") for name in values), file))

    def with_settings(self, texts: Mapping[str, str], where: str = "--set") -> Experiment:
        """A copy with other settings. They are texts with dotted keys, as in `--set`.

        Args:
            texts: a text for each key.
            where: the source of the texts, for errors.
        Raises:
            UsageError: a key is unknown, or a value is of another type. The error suggests the most similar key.
        Example:
            >>> Experiment().with_settings({"held_out": "0.1", "plan.pace": "Sync()"})
            Experiment(held_out=0.1, overrides={'pace': 'Sync()'})
        """
        hints = {key_of(name): kind for name, kind in types().items()} | {n: f.text for n, f in ENGINE_FIELDS.items()}
        values = {k: of_text(text, hints.get(k.replace("-", "_"), str)) for k, text in texts.items()}
        return self._with(values, where, trust=True)

    def with_environment(self, environ: Mapping[str, str] = os.environ) -> Experiment:
        """A copy with settings of variables such as ATOLL_ROUNDS and ATOLL_PLAN_PACE; ATOLL_DATASET is the data set.

        Example:
            >>> Experiment().with_environment({"ATOLL_HELD_OUT": "0.1"}).held_out
            0.1
        """
        texts = dict[str, str]()
        keys = {name: key for name, key in _fields().items() if name != "overrides"}
        for name, key in {**keys, **{name: name for name in ENGINE_FIELDS}}.items():
            variable = f"ATOLL_{name.upper()}"
            if variable in environ:
                texts[key] = environ[variable]
                self.with_settings({key: environ[variable]}, variable)  # its error names the variable
        for variable in sorted(environ):
            if variable.startswith("ATOLL_PLAN_"):
                slot = variable.removeprefix("ATOLL_PLAN_").lower()
                texts[f"plan.{slot}"] = environ[variable]
                self.with_settings({f"plan.{slot}": environ[variable]}, variable)
        return self.with_settings(texts, "the environment")  # together, so that a field given twice is refused

    def override(self, **values: Any) -> Experiment:
        """A copy with these values as settings. The value None changes nothing.

        Example:
            >>> Experiment().override(data="wine", rounds=3, clients=None)
            Experiment('wine', rounds=3)
        """
        return self._with({k: v for k, v in values.items() if v is not None}, "", trust=True)

    def _with(self, values: Mapping[str, Any], where: str, *, trust: bool) -> Experiment:
        overrides, changes, names = dict(self.overrides), dict[str, Any](), set[str]()
        shorthands: dict[str, Any] = {}
        known = {key: name for name, key in _fields().items()}
        for name, value in values.items():
            key = name.replace("-", "_")
            if key.startswith("plan."):
                _refuse_unknown("slot", key, _slots(), ".".join(key.split(".")[:2]), value, where)
                overrides[key[5:]] = value if isinstance(value, str) else repr(value)
            elif key in ENGINE_FIELDS:
                shorthands[key] = checked(key, value, ENGINE_FIELDS[key].text, ENGINE_FIELDS[key].default, where)
            else:
                _refuse_unknown("setting", key, (known.keys() - {"plan"}) | ENGINE_FIELDS.keys(), key, value, where)
                field_name = known[key]
                changes[field_name] = checked(key, value, types()[field_name], getattr(_DEFAULT, field_name), where)
            names.add(key)
        untrusted = self.untrusted - names if trust else self.untrusted | names
        files = {name: file for name, file in self.files.items() if name not in names}
        it = self._to(**changes, overrides=overrides, untrusted=untrusted, files=files)
        return it._filled(shorthands, "engine" in changes)

    def _filled(self, shorthands: Mapping[str, Any], engine_too: bool) -> Experiment:
        """A copy with fields of the engine from shorthands. Their source may also name the engine.

        Raises:
            UsageError: the source gives a field twice, in the text of the engine and as a shorthand.
        """
        written = "(" in str(self.engine)  # a call, such as Processes(workers=2), not a short name
        if engine_too and written:
            from atoll.engine.spec import given_twice

            twice = given_twice(self._named_engine(), shorthands) if shorthands else None
            if twice is not None:
                raise twice
            return self._to(engine_fields=dict(shorthands))
        return self._to(engine_fields={**self.engine_fields, **shorthands})

    def _named_engine(self) -> EngineSpec:
        from atoll.engine.ranks.launch import engine_of_launch
        from atoll.engine.spec import engine

        text = engine_of_launch() if self.engine == _DEFAULT.engine else self.engine
        with self._reading("engine"):
            return engine(text, trust=self._trusts("engine"))

    def spec(self) -> EngineSpec:
        """The engine, with the fields that `--workers`, `--gpus` and so on set.

        Raises:
            UsageError: an unknown engine, or a field that it does not have.
        Example:
            >>> Experiment(engine="processes", engine_fields={"workers": 2}).spec()
            Processes(2)
        """
        from atoll.engine.spec import fill

        return fill(self._named_engine(), self.engine_fields)

    def _to(self, **changes: Any) -> Experiment:
        """A copy with some fields replaced. It keeps the data that are read already if no field about data changes."""
        it = dataclasses.replace(self, **changes)
        if "source" in self.__dict__ and all(getattr(it, n) == getattr(self, n) for n in _ABOUT_DATA):
            it.__dict__["source"] = self.source
        return it

    def toml(self) -> str:
        """Write all settings as the text of a TOML file. `read` makes an equal experiment from this text."""
        from atoll.engine.spec import spec_text

        lines = ["# All settings of the run, with defaults. `atoll run` of this file repeats the run."]
        written = "(" in str(self.engine) and bool(self.engine_fields)
        it = self._to(engine=spec_text(self.spec()), engine_fields={}) if written else self
        for name, key in _fields().items():
            value = getattr(it, name)
            if value is not None and name != "overrides":
                lines.append(f"{key} = {toml(value)}")
        lines += [f"{name} = {toml(value)}" for name, value in it.engine_fields.items() if value is not None]
        if self.overrides:
            lines += ["", "[plan]"]
            lines += [f"{toml(slot)} = {toml(text)}" for slot, text in self.overrides.items()]
        return "\n".join(lines) + "\n"

    # building

    @cached_property
    def source(self) -> Source:
        """The data set before the split. It is read once."""
        from atoll.data import load

        options = {name: getattr(self, name) for name in _ABOUT_DATA - {"dataset"}}
        kept = self._rule_columns()
        if kept:
            options["keep"] = kept
        return load(self.dataset, **options)

    def _rule_columns(self) -> tuple[str, ...]:
        """The columns that the rule of held-out rows reads."""
        from atoll.data.held_out import HeldOut, held_out_rule

        rule = held_out_rule(self.held_out, 0) if isinstance(self.held_out, str) else None
        return rule.columns if isinstance(rule, HeldOut) else ()

    def resolved(self) -> Experiment:
        """A copy with the settings that depend on the data: clients, split, model, recipe, and the path of a file."""
        from atoll.data.named import NAMED

        changes: dict[str, Any] = {}
        if self.input is not None:
            changes["input"] = str((self._input() or Path(self.input)).resolve())
        if self.dataset not in NAMED and Path(self.dataset).exists():
            changes["dataset"] = str(Path(self.dataset).resolve())
        classes = self.source.classes is not None
        changes |= self.method(self.source.kind, classes, self._scaled_features())
        if self.split is None:
            natural = self.source.by is not None
            changes["split"] = "ByColumn()" if natural else "Dirichlet(0.3)" if classes else "IID()"
        if self.clients is None:
            changes["clients"] = self._count(self._partition(changes.get("split") or self.split or ""))
        it = self._to(**changes)
        it.__dict__["source"] = self.source
        return it

    def method(self, kind: str, classes: bool, scaled: int = 0) -> dict[str, str]:
        """The model and the recipe that a kind of data determines, if they are not set.

        Args:
            kind: the kind of the target.
            classes: whether rows have classes.
            scaled: the number of features, if the mean square of each is at most 1 over the train rows; otherwise 0.
        """
        changes = {} if self.model is not None else {"model": "lstm" if kind == "tokens" else "mlp"}
        if self.recipe is not None:
            return changes
        if classes or kind == "labels":
            recipe = RECIPE
        elif scaled and self.model == "linear" and self.loss in (None, "mse") and not self.overrides:
            recipe = linear_recipe(scaled)
        else:
            recipe = REGRESSION_RECIPE
        return {**changes, "recipe": recipe}

    def _scaled_features(self) -> int:
        """The number of features that are scaled by the train rows; 0 if they are not."""
        scaled = self.source.scale != "none" and self.input is None
        return math.prod(self.source.features) if scaled else 0

    def _count(self, partition: Partition) -> int:
        """The default number of clients."""
        if partition.natural and self.source.names is not None:
            return len(self.source.names)
        own_test = self.source.test is not None
        part = self.held_out if isinstance(self.held_out, (int, float)) else 0.2
        train = len(self.source) if own_test else int(len(self.source) * (1 - part))
        return max(1, min(CLIENTS, train // max(ROWS_EACH, self.min_rows)))

    def _trusts(self, key: str) -> bool:
        return key not in self.untrusted

    def _partition(self, text: str) -> Partition:
        from atoll.data.partition import PARTITIONS as known  # `PARTITIONS` here has the names only, without torch

        with self._reading("split"):
            return grammar.parse(text, known, trust=self._trusts("split"), kind="partition")  # type: ignore[no-any-return]

    @_with_lines_of_files
    def data(self) -> Clients:
        """The clients: the data set after the split.

        Raises:
            UsageError: the data set is unknown, or it cannot be split in this way.
        """
        it = self.resolved()
        partition = it._partition(it.split or "")
        return it.source.split(
            it.clients, partition, held_out=it.held_out, seed=it.seed, min_rows=it.min_rows, input=it._input()
        )

    def _input(self) -> Path | None:
        """The path of the given input."""
        from atoll import runs

        if self.input is None:
            return None
        path = Path(self.input)
        if path.suffix == ".json" and not path.exists():
            raise UsageError(
                f"There is no file {self.input}.",
                "the path of an input.json, or the name of a run.",
                "each run folder has an input.json.",
                "atoll runs",
            )
        return path if path.exists() else runs.find_run(self.input, Path(self.out))

    def plan(self) -> Plan:
        """The plan: the recipe, with the parts of `overrides` in its slots.

        Raises:
            UsageError: a text is not a plan or not a part, or it names code and is not trusted.
        """
        from atoll.plan.plan import Plan
        from atoll.plan.registry import read_part
        from atoll.recipes import RECIPES

        text = self.recipe or self.resolved().recipe or RECIPE
        names = {r.__name__: r for r in RECIPES} | {"Plan": Plan}
        with self._reading("recipe"):
            built = read_part(text, names, trust=self._trusts("recipe"), kind="recipe")
        if not isinstance(built, Plan):
            raise UsageError(
                f"{text!r} is a {type(built).__name__}.", "a recipe, or a whole plan.", write=Change("recipe", RECIPE)
            )
        plan: Plan = built
        parts: dict[str, Any] = {}  # all slots change at once: two parts that exclude each other may change together
        for slot, text in sorted(self.overrides.items(), key=lambda item: item[0].count(".")):
            with self._reading(f"plan.{slot}"):
                part = read_part(text, trust=self._trusts(f"plan.{slot}"))
            first, *path = slot.split(".")
            parts[first] = _put(parts.get(first, getattr(plan, first)), path, part, slot)
        try:
            return dataclasses.replace(plan, **parts)
        except UsageError as error:
            raise _in_a_slot(error, plan, parts) from None

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """Complete an error about the text of a setting: its line is the setting, in the file if that gave the text."""
        try:
            yield
        except UsageError as error:
            if isinstance(error.write, Text):
                error.writing(Change(key, [error.write.text] if types().get(key) == TEXTS else error.write.text))
            if key in self.files:
                _stands_in_file(error)
            raise

    def module(self) -> nn.Module:
        """Build the model before the first round, for example to load saved parameters into it."""
        from atoll import models
        from atoll.base.random import Key
        from atoll.training.rounds import DTYPES

        dtype = DTYPES[self.dtype]
        model = self.resolved()._model()
        return models.resolve(model, self.data(), Key(self.seed).fold("model"), dtype).to(dtype)

    def _refuse_untrusted(self, key: str) -> None:
        """Refuse a loss or metrics that name code, if their text was not typed at this machine."""
        value: Any = self.loss if key == "loss" else self.metrics
        texts = (value,) if isinstance(value, str) else value or ()
        for text in texts:  # `__post_init__` has converted all values to texts
            if ":" in str(text) and not self._trusts(key):
                raise UsageError(
                    f"{key} = {text} names code outside atoll.",
                    "a name of atoll's own, or trust.",
                    "this text was not typed at this machine, so it must not import code.",
                    TRUST,
                )

    def _model(self) -> str:
        """The name of the model. It may name code outside atoll only if it is trusted."""
        model = self.model or "mlp"
        if ":" in model and not self._trusts("model"):
            raise UsageError(
                f"The model {model} names code outside atoll.",
                "a model of atoll's own, or --trust.",
                "this text was not typed at this machine, so it must not import code.",
                TRUST,
            )
        return model

    def _settings(self, **changes: Any) -> dict[str, Any]:
        """The keyword arguments of `atoll.Settings`; `changes` replace some of them."""
        from atoll import runs
        from atoll.training.stop import RULES

        for key in ("loss", "metrics"):
            self._refuse_untrusted(key)
        rules: list[Any] = []
        for text in self.stop:
            with self._reading("stop"):
                rule = grammar.parse(text, RULES, trust=self._trusts("stop"))
            rules += rule if isinstance(rule, (tuple, list)) else [rule]
        init = self.init
        if isinstance(init, str) and not Path(init).exists():
            init = str(runs.find_run(init, Path(self.out)))
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainingFields)}
        values |= {"stop": tuple(rules), "init": init}
        if "engine" not in changes:
            values["engine"] = self.spec()
        return {**values, **changes}

    @_with_lines_of_files
    def check(self, **changes: Any) -> Settings:
        """Check the settings, the names and the paths. No data is read, and torch is not imported for them.

        Args:
            changes: values that replace fields of `atoll.Settings`.
        Returns:
            The settings of the training.
        Raises:
            UsageError: a wrong value, an unknown name, or a path that does not exist.
        """
        check_data(self.dataset)
        for key, text, names, kind in (
            ("recipe", self.recipe, (*RECIPES, "Plan"), "recipe"),
            ("split", self.split, PARTITIONS, "partition"),
        ):
            if text is not None:
                with self._reading(key):
                    check_call(text, names, kind)
        if self.model is not None:
            check_model(self.model)
        return Settings.from_kwargs(self._settings(**changes))

    @_with_lines_of_files
    def training(self, **changes: Any) -> Training:
        """The training before its first round, for your own loop; no file is written.

        Args:
            changes: values that replace fields of `atoll.Settings`.
        """
        settings = self.check(**changes)
        from atoll.training.rounds import Training

        it = self._after_plan().resolved()
        return Training(it._model(), it.data(), it.plan(), settings)

    @_with_lines_of_files
    def train(self, **more: Any) -> Run:
        """Train: `atoll.train` with the settings of the experiment.

        Args:
            more: further arguments of `atoll.train`; they take precedence over the experiment. With `resume=`, the
                training keeps the backend and the device of the run.
        """
        known = Settings.__dataclass_fields__.keys() | ENGINE_FIELDS.keys()  # `check` refuses a field of an engine
        changes = {name: value for name, value in more.items() if name in known}
        self.check(**changes)
        from atoll.training.train import train

        it = self._after_plan().resolved()
        if more.get("resume") is not None:
            it = it._kept(Path(more["resume"]))
            more["observers"] = (*more.get("observers", ()), _RewriteConfig(it.toml()))
        arguments: dict[str, Any] = {n: getattr(it, n) for n in ("out", "baselines", "checkpoint_s", "report", "plots")}
        arguments["config"] = it.toml()
        plan, settings = it.plan(), it._settings(**changes)
        return train(it._model(), it.data(), plan, **{**arguments, **settings, **more})

    def _after_plan(self) -> Experiment:
        """The experiment itself, after a check of its plan: a wrong plan is refused before the data are read."""
        if self.recipe is not None:
            self.plan()
        return self

    def _kept(self, run: Path) -> Experiment:
        """A copy for a resumed run: with its backend and device, and without `init`, whose file may no longer exist."""
        from atoll import runs
        from atoll.training.train import recorded_backend

        changes: dict[str, Any] = recorded_backend(
            runs.read_environment(run), {"numerics": self.numerics, "device": self.device}
        )
        if (run / "checkpoint" / "pointer.json").exists():
            changes["init"] = None
        return self._to(**changes)


@dataclass(frozen=True)
class _RewriteConfig:
    """Writes the settings of a resumed run to its folder, because they may differ, for example in `rounds`."""

    config: str

    def start(self, training: object, path: Path | None) -> None:
        from atoll import runs

        if path is not None:
            runs.write(path / "config.toml", self.config.encode())

    def round(self, report: object) -> None: ...
    def end(self, run: object) -> None: ...


_DEFAULT = Experiment()


def settings() -> list[dataclasses.Field[Any]]:
    """The fields of `Experiment` that are settings, sorted by their groups."""
    found = [f for f in dataclasses.fields(Experiment) if "setting" in f.metadata]

    # The name of a model and a recipe come before the settings that are shared with `Settings`.
    return sorted(
        found, key=lambda f: (GROUP_NAMES.index(declared(f).group), declared(f).group == METHOD and f.kw_only)
    )


def key_of(name: str) -> str:
    """The key of a field in files and flags."""
    return _KEYS.get(name, name)


@cache
def _fields() -> dict[str, str]:
    """The settings and their keys; `plan` is the table of overrides."""
    return {**{f.name: key_of(f.name) for f in settings()}, "overrides": "plan"}


@cache
def types() -> dict[str, Any]:
    """The type of each setting in a file."""
    unknown = dict.fromkeys(
        ("Tensor", "Fleet", "Train", "Metric", "PerExample", "EngineSpec"), Any
    )  # their modules load torch
    hints = get_type_hints(Experiment, localns={"Mapping": Mapping, "Path": Path, **unknown})
    return {f.name: declared(f).text or hints[f.name] for f in settings()}


def _slots() -> list[str]:
    from atoll.plan.formula import DEFAULTS

    return [f"plan.{slot}" for slot in DEFAULTS]


def _refuse_unknown(kind: str, key_given: str, known: Iterable[str], key: str, value: Any, where: str) -> None:
    """Refuse a key that is in no table. The error names the source, for example a file."""
    if key not in (names := set(known)):
        error = unknown_name(kind, key_given, names, lambda near: Change(near, _of_kind(near, value)), value)
        place = "" if where in ("", "--set") else f"{where}: "
        raise UsageError(f"{place}{error.given}", error.required, error.why, error.write)


def _stands_in_file(error: UsageError) -> None:
    """Give the error of a text in a file a line for the file, if its line has such a form."""
    if form(error.write, "file"):
        error.at("file")


def _in_a_slot(error: UsageError, plan: Plan, parts: Mapping[str, Any]) -> UsageError:
    """The error of a plan with other parts. A part as its line becomes the slot in which the part makes a plan."""
    from atoll.plan.registry import read_part

    with contextlib.suppress(UsageError):
        part = read_part(error.line)
        for slot in (f.name for f in dataclasses.fields(plan)):
            with contextlib.suppress(UsageError):
                dataclasses.replace(plan, **{**parts, slot: part})
                return error.writing(Part(error.line, slot))
    return error


def _of_kind(key: str, value: Any) -> Any:
    """A value with the type of a setting, for the line of an error. A text may be a number or a list."""
    kind = {key_of(name): kind for name, kind in types().items()}.get(key, str)
    return of_text(value, kind) if isinstance(value, str) else value


def _put(value: Any, path: list[str], part: Any, slot: str) -> Any:
    """A copy of a frozen value with the field at a path replaced. Every value on the path is checked again."""
    if not path:
        return part
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    if path[0] not in names:
        kind, outer = f"field of {type(value).__name__}", ".".join(slot.split(".")[: -len(path)])
        raise (
            unknown_name(kind, path[0], names, lambda near: Change(f"plan.{outer}.{near}", repr(part)))
            if names
            else UsageError(
                f"plan.{slot}: {value!r} has no fields.",
                "a part with fields.",
                write=Change(f"plan.{slot.rpartition('.')[0]}", repr(value)),
            )
        )
    return dataclasses.replace(value, **{path[0]: _put(getattr(value, path[0]), path[1:], part, slot)})


@check_arguments
def load(
    path: str | Path, model: Any = None, *, best: bool = False, trust: bool = False, client: int | str | None = None
) -> nn.Module:
    """The model of a run, as a new module in evaluation mode. It takes prepared rows; `predictor` takes raw rows.

    A named model is rebuilt from the run's input.json. No training data is read, except for a run of an earlier
    version, which has no such file.

    Args:
        path: the run folder, the name of a run in ./runs, or "latest".
        model: a module of the same architecture, if the run was trained from a module; None builds a named model.
        best: whether the best model is loaded instead of the last.
        trust: whether the run folder may name code outside atoll, as `module:name`.
        client: load the model of this client, by its name or number; None loads the model of the server.
    Raises:
        UsageError: the run has not ended, or its model cannot be built from its files; or there is no such client,
            clients have no models of their own, or they are on the machines of the clients.
    """
    from safetensors.torch import load_file

    from atoll.runs.folder import HIDDEN

    folder = _run_folder(path)
    file = folder / ("best.safetensors" if best else "model.safetensors")
    if not file.is_file():
        raise UsageError(f"{file} does not exist.", "a run that has ended.", write=resume_line(folder))
    module = _rebuilt(folder, trust) if model is None else model
    tensors = load_file(file)
    _refuse_other_model(folder, module, tensors)
    extra = {n: value for n, value in module.state_dict().items() if n.endswith("_extra_state")}
    module.load_state_dict({**extra, **tensors})
    hidden = file.with_name(file.stem + HIDDEN)
    if hidden.is_file():
        buffers = dict(module.named_buffers())
        for name, tensor in load_file(hidden).items():
            buffers[name].copy_(tensor)
    if client is None:
        return module.eval()
    if best:
        raise UsageError(
            f"The best model of client {client!r}.",
            "its last model.",
            "the client memory of a run is that of its last round.",
            Line(f"atoll.load({str(folder)!r}, client={client!r})", f"--client {client}"),
        )
    return _models_of(folder, module, trust).module(client).eval()


def _models_of(folder: Path, module: nn.Module, trust: bool) -> ClientModels:
    """The models of the clients of a run whose server's model is given."""
    from atoll.compute.task import Task
    from atoll.plan.plan import Plan
    from atoll.plan.registry import read_part
    from atoll.runs.folder import read_environment
    from atoll.runs.personal import ClientModels, no_models_here
    from atoll.training.rounds import DTYPES

    text = read_environment(folder).get("plan")
    if text is None:
        raise no_models_here(folder.name)
    plan = read_part(text, {"Plan": Plan}, trust=trust, kind="plan")
    task = Task.of(module, "mse", (), DTYPES[_input_of(folder).dtype])
    return ClientModels.of_folder(folder, plan, task, task.initial())


@check_arguments
def predictor(
    path: str | Path, model: Any = None, *, best: bool = False, trust: bool = False, client: int | str | None = None
) -> Predictor:
    """A predictor of a run: it takes raw rows, and answers with names of classes or numbers in the target's units.

    Args:
        path, model, best, trust: as in `load`.
        client: use the model of this client for all rows; None: if clients have models of their own, a row with a known
            client uses its model.
    Raises:
        UsageError: as in `load`, or the run has no input.json.
    Example:
        >>> import atoll, tempfile
        >>> data = atoll.data.load("wine").split(clients=3)
        >>> where = {"out": tempfile.mkdtemp(), "report": False}
        >>> run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=2, **where)
        >>> row = {name: [1.0] for name in data.columns}
        >>> bool(atoll.predictor(run.path).predict(row) == run.predictor.predict(row))
        True
    """
    from atoll.compute.loss import cox, is_named, loss_of, poisson
    from atoll.compute.metrics import METRICS, metric_of, metrics_of
    from atoll.runs.predictor import predictor_of
    from atoll.training.rounds import default_loss, metrics_of_kind

    folder = _run_folder(path)
    found = _input_of(folder)
    module = load(folder, model, best=best, trust=trust, client=client)
    models = None
    if client is None and not best and _saves_models(folder):
        models = _models_of(folder, module, trust)
    config = read_toml(folder / "config.toml") or {}
    loss, metrics = config.get("loss"), config.get("metrics")
    binary = found.classes is not None and len(found.classes) == 2 and _width(module, found) == 1
    usual = default_loss(config.get("model"), found.kind)
    name = str(loss) if loss is not None else "binary_cross_entropy" if binary else usual
    known = is_named(name)
    name = name if known else usual
    name = "cross_entropy(axis=-1)" if name == "cross_entropy" else name
    default = metrics_of_kind(found.kind, found.classes)
    default = ("poisson_deviance", *default) if loss_of(name) is poisson else default
    default = ("c_index",) if loss_of(name) is cox else default
    names = [n for n in metrics if n in METRICS] if isinstance(metrics, list) else default
    each = [metric_of(m, loss_of(name)) for m in metrics_of(names, name, found)]
    return predictor_of(module, found, loss_of(name) if known else None, tuple(each), models)


def _saves_models(folder: Path) -> bool:
    """Whether the checkpoint of a run has an own part or a second model of clients."""
    from atoll.runs.folder import read_environment

    facts = read_environment(folder)
    personal = any(word in str(facts.get("plan", "")) for word in (" own=", "Ditto("))
    return personal and (folder / "checkpoint" / "pointer.json").is_file()


def _width(module: nn.Module, found: Input) -> int:
    """The number of outputs of a model for one row."""
    import torch

    dtype = torch.float64 if found.dtype == "float64" else torch.float32
    x = torch.zeros(2, *found.features, dtype=dtype if found.tokens is None else torch.int64)
    with torch.no_grad():
        output = module(x)
    return int(output.shape[-1]) if output.dim() > 1 else 1


def _run_folder(path: str | Path) -> Path:
    """The folder of a run, from its path or its name in `runs`. A folder with a model only is enough for `load`."""
    from atoll import runs

    folder = Path(path).resolve()  # the name of "." is that of its folder
    has_files = any((folder / name).is_file() for name in ("config.toml", "model.safetensors"))
    return folder if has_files else runs.find_run(path, Path("runs"))


def _input_of(folder: Path) -> Input:
    from atoll.data.input import Input
    from atoll.runs.folder import has_own_input

    if not (folder / "input.json").is_file():
        raise UsageError(
            f"{folder.name} has no input.json.",
            "a run with its input.",
            "a version of atoll before this file wrote the run; resuming it writes the file.",
            resume_line(folder),
        )
    then = " && " if program_of(folder) is None else "\n"
    again = Line(shell=f"rm {folder / 'input.json'}{then}{resume_line(folder)}")
    try:
        found = Input.read(folder)
    except UsageError as error:
        raise error.writing(again) from None
    if not has_own_input(folder):
        raise UsageError(
            f"input.json of {folder.name} was changed after the run.",
            "the bytes that the run wrote.",
            "the model was trained with another map from rows to tensors.",
            again,
        )
    return found


def _rebuilt(folder: Path, trust: bool) -> nn.Module:
    """The model of a run, built from its files."""
    from atoll import models
    from atoll.base.random import Key
    from atoll.training.rounds import DTYPES

    config = read_toml(folder / "config.toml") or {}
    name, from_python = str(config.get("model", "mlp")), bool(config.get("python"))
    code = ":" in name
    if code and (from_python or not trust):
        raise UsageError(
            f"The model of {folder.name} is {name}, which is no model of atoll's own.",
            "the module, or trust=True if the run folder may import code." if not from_python else "the module.",
            "the folder contains numbers, and no code.",
            Line(
                f"atoll.load({str(folder)!r}, model)",
                f"atoll.predictor({str(folder)!r}, model).predict(rows)" if from_python else "--trust",
            ),
        )
    if not from_python and not (folder / "input.json").is_file():
        # An earlier version wrote the run. The data set has the sizes of the model.
        return Experiment.read(folder / "config.toml", trust=trust, old_names=True).module()
    found = _input_of(folder)
    return models.resolve(name, found, Key(int(config.get("seed", 0))).fold("model"), DTYPES[found.dtype])


def _refuse_other_model(folder: Path, module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Refuse a module whose tensors differ from those of the run; the error names them."""
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if ours == theirs:
        return
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    listed = ", ".join(f"{n}: {ours.get(n, 'absent')}, and not {theirs.get(n, 'absent')}" for n in names[:5])
    raise UsageError(
        f"The module has other tensors than {folder.name}: {listed}.",
        "a module of the same architecture.",
        "each tensor of the run has one place in the module.",
    )
