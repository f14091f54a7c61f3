"""The settings of a training: each is one field with its type, default, range, help text and group.

`Settings`, `Experiment`, the flags of `atoll run` and the signature of `atoll.train` come from these fields. This
module loads without torch.

Tests: tests/surface/test_settings.py
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar, cast

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Change
from atoll.base.validation import plain_fields
from atoll.training.engine_fields import ENGINE_FIELDS
from atoll.training.setting_texts import METHOD, RUNNING, TEXTS, name_by_name

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from atoll.compute.loss import PerExample
    from atoll.compute.metrics import Metric
    from atoll.engine.protocols import EngineSpec, RunOptions
    from atoll.engine.simulation.fleet import Fleet
    from atoll.plan.local import Train

F = TypeVar("F", bound=Callable[..., Any])


class Setting(NamedTuple):
    """The declaration of a setting, without its name, type and default.

    Args:
        help: one sentence; the command line prints it.
        group: the group of the flag in `atoll run --help`.
        flag: whether the command line has a flag of this name; `--set` reaches every setting.
        text: the type of the value in a file; None: the same type as in Python.
        least: the smallest valid integer; None: there is no bound.
        choices: the valid words; empty: every text is valid.
    """

    help: str
    group: str
    flag: bool
    text: Any
    least: int | None
    choices: tuple[str, ...]


def setting(
    default: Any,
    help: str,
    *,
    group: str = RUNNING,
    flag: bool = True,
    text: Any = None,
    least: int | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that declares a setting; the arguments are those of `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, group, flag, text, least, choices)})


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)  # the classes below have these methods
class TrainingFields:
    """The settings that `Settings` and `Experiment` share.

    Args:
        rounds: the largest number of rounds, ≥ 1.
        seed: the seed of all random numbers, an integer.
        dtype: "float32" or "float64".
        loss: a name, a function that returns one value for each row, or its "module:name"; None chooses by the kind of
            data.
        metrics: a name, a `Metric`, or the "module:name" of a metric or a function, or several of them; None chooses by
            the kind of data. The first one selects the best round.
        class_weight: "balanced", n / (C · n_c) for class c of C; or the weight of each class by its name. A row's loss
            is multiplied by the weight of its class.
        evaluate: "pooled" evaluates all held-out rows together, "clients" the held-out rows of each client, "both"
            does both; None: "both" for natural clients, else "pooled".
        stop: further rules that end the training; `Diverged()` is active, except if they include one of their own.
        evaluate_every: the number of rounds between two evaluations on the held-out rows, ≥ 0; 0: no evaluation.
        numerics: the backend: "auto", "compiled", "fused", "lanes" or "loop".
        precision: "full", or "bf16": the products of the model in bfloat16 by torch's autocast; θ and sums stay in
            `dtype`.
        device: "auto", a GPU if there is one and else the CPU; "cpu"; "cuda" or "cuda:1".
        chunk: the number of clients that are computed together, ≥ 1; it changes no bit. None chooses it by the size of
            the CPU caches, or of the GPU memory.
        engine: determines where clients are trained: a spec such as `Processes(workers=2)`, its text, or a short name.
        fleet: the simulated durations of clients and links, a `Fleet` or its text; None: durations are not simulated.
        buffers: the rule by which the server joins buffers, by name pattern: `{"*.scale": "keep"}`, or the texts
            `("*.scale=keep",)`. The rules are "mean", "unit" (the mean, with norm 1), "largest" and "keep".
        budget: the largest ε, > 0, for a plan with noise; the run ends before the round that would exceed it.
        delta: δ of ε, in (0, 1/clients); None: the largest power of ten ≤ 1/(10·clients).
        ledger: a file of charges that several runs on one population share; None: `ledger.jsonl` of the run folder.
        randomness: "system", or "seed": noise and cohorts follow the seed, for tests and public data.
        draws: whether code of the user may draw random numbers in any round, although a call before the first round
            shows no draw. Each call is then keyed, and the model runs in the loop.
        tune: local training of a copy of the model at each client, at each evaluation, a `Train` or its text; the copy
            is evaluated on the client's own held-out rows. No bit of the training changes. None: no copy is tuned.
        init: the model to start from: a `state_dict`, or the path of a run or of a safetensors file; None starts from
            the initial values of the model.
    """

    rounds: int = setting(100, "Upper bound on the number of rounds.", least=1)
    stop: tuple[Any, ...] = setting(
        (), 'A rule that ends the run sooner: Target("accuracy", 0.95). May be repeated.', text=TEXTS
    )
    seed: int = setting(0, "Seed of all random draws.")
    dtype: str = setting("float32", "float32 or float64.", choices=("float32", "float64"))
    loss: str | PerExample | None = setting(
        None, "Name of the loss. Default: by the kind of data.", group=METHOD, text=str | None
    )
    metrics: str | Metric | Sequence[str | Metric] | None = setting(
        None, "Name of a metric. May be repeated. Default: by the kind of data.", group=METHOD, text=TEXTS | None
    )
    buffers: Mapping[str, str] | tuple[str, ...] | None = setting(
        None,
        "How buffers are joined: *.scale=keep. Rules: mean, unit, largest, keep.",
        group=METHOD,
        flag=False,
        text=TEXTS | None,
    )
    draws: bool = setting(False, "Whether code of the user draws in some rounds only.", group=METHOD, flag=False)
    class_weight: Mapping[str, float] | str | None = setting(
        None, "Weight of each class: balanced, or no=1,yes=3. Default: equal weights.", group=METHOD, text=str | None
    )
    evaluate: str | None = setting(
        None,
        "Held-out rows together or by client: pooled, clients, both. Default: both for natural clients.",
        choices=("pooled", "clients", "both"),
    )
    init: Mapping[str, Tensor] | str | Path | None = setting(
        None, "A run or a safetensors file to start from.", group=METHOD, text=str | None
    )
    engine: EngineSpec | str = setting(
        "inprocess", 'Where clients are trained: inprocess, "Processes(workers=2)", torchrun, ray.', text=str
    )
    fleet: Fleet | str | None = setting(
        None, 'Simulated durations of clients and links: "Fleet(HalfNormal())".', text=str | None
    )
    numerics: str = setting(
        "auto",
        "Backend of the local steps: auto, compiled, fused, lanes or loop.",
        choices=("auto", "compiled", "fused", "lanes", "loop"),
    )
    precision: str = setting("full", "full, or bf16: the products of the model in bfloat16.", choices=("full", "bf16"))
    device: str = setting("auto", "cpu, cuda, cuda:1, or auto: a GPU if there is one.")
    chunk: int | None = setting(None, "Clients computed together; it changes no bit.", least=1)
    budget: float | None = setting(None, "Largest ε of a run with noise. Default: no limit.", group=METHOD)
    delta: float | None = setting(None, "δ of ε. Default: a power of ten ≤ 1/(10·clients).", group=METHOD)
    ledger: str | None = setting(None, "A ledger of ε that runs on one population share.", group=METHOD)
    randomness: str = setting(
        "system", "Noise from the system, or from the seed: not private.", group=METHOD, choices=("system", "seed")
    )
    tune: Train | str | None = setting(
        None,
        'Local training of a copy of the model at each client before it is evaluated: "Train(sgd(0.1), epochs=1)".',
        text=str | None,
    )
    evaluate_every: int = setting(1, "Rounds between two evaluations; 0 never evaluates.", flag=False, least=0)


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingFields):
    """How a training runs: all arguments except model, data and plan. `TrainingFields` describes the fields.

    Raises:
        UsageError: a value of another type or outside its range.
    Example:
        >>> Settings(rounds=5, metrics="accuracy", engine="Processes(workers=2)").metrics
        ('accuracy',)
    """

    def __post_init__(self) -> None:
        if self.metrics is not None:
            several = self.metrics if isinstance(self.metrics, (tuple, list)) else (self.metrics,)
            self._set("metrics", tuple(name_by_name(several)))
        if isinstance(self.buffers, str):
            self._set("buffers", (self.buffers,))
        if not isinstance(self.stop, (tuple, list)):
            self._set("stop", (self.stop,))
        self._set("loss", _of_name(self.loss))
        if self.metrics is not None:
            self._set("metrics", tuple(map(_metric_of_name, cast("tuple[Any, ...]", self.metrics))))
        for f in dataclasses.fields(self):
            if str(f.type).startswith(("int", "float")):
                plain_fields(self, f.name)  # JSON cannot contain a number of NumPy
            _check(f, getattr(self, f.name))
        from atoll.engine.spec import engine

        self._set("engine", engine(self.engine))
        if isinstance(self.fleet, str):
            from atoll.base.grammar import parse
            from atoll.engine.simulation.fleet import FLEET

            self._set("fleet", parse(self.fleet, FLEET))
        if self.tune is not None:
            self._set("tune", _tune(self.tune))
        if self.fleet is not None:
            from atoll.engine.simulation.fleet import Fleet

            if not isinstance(self.fleet, Fleet):
                raise UsageError(
                    f"fleet = {self.fleet!r}.", "a Fleet, or its text.", write=Change("fleet", "Fleet(HalfNormal())")
                )
        self.spec.check(self.options())

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_kwargs(cls, words: Mapping[str, Any]) -> Settings:
        """Build settings from keyword arguments.

        Raises:
            UsageError: an unknown name, a field of an engine, or a wrong value.
        """
        if "engine" not in words:
            from atoll.engine.ranks.launch import engine_of_launch

            words = {**words, "engine": engine_of_launch()}
        known = [f.name for f in dataclasses.fields(cls)]
        for word in words:
            if word in ENGINE_FIELDS:
                from atoll.engine.spec import misplaced

                raise misplaced({n: words[n] for n in ENGINE_FIELDS if n in words}, words.get("engine", "inprocess"))
            if word not in known:
                raise unknown_name("setting", word, known, partial(_with_value, words[word]), words[word])
        return cls(**words)

    @property
    def rules(self) -> dict[str, str]:
        """The rules of buffers by name pattern."""
        if isinstance(self.buffers, Mapping):
            return dict(self.buffers)
        pairs = (text.rpartition("=") for text in self.buffers or ())
        return {pattern.strip(): rule.strip() for pattern, _, rule in pairs}

    @property
    def spec(self) -> EngineSpec:
        """The engine, converted to a spec."""
        return cast("EngineSpec", self.engine)  # __post_init__ has replaced a text

    def options(self, plan: Any = None, model: str | None = None) -> RunOptions:
        """The settings that an engine reads, with the plan and the name of the model when they are known."""
        from atoll.engine.protocols import RunOptions

        fleet = None if isinstance(self.fleet, str) else self.fleet
        return RunOptions(self.device, self.numerics, self.precision, self.chunk, fleet, self.seed, plan, model)


def _tune(value: Any) -> Train:
    """Local training without client state, from a value or its text.

    Raises:
        UsageError: it is no `Train`, or it keeps state, has a correction or an own part.
    """
    from atoll.plan.local import Train

    if isinstance(value, str):
        from atoll.plan.registry import read_part

        value = read_part(value)
    plain = isinstance(value, Train) and not value.keep and value.correction is None and not value.own
    if not plain:
        raise UsageError(
            f"tune = {value!r:.80}.",
            "a `Train` without keep, correction and own.",
            "it trains a copy of the model, which is dropped after its evaluation.",
            Change("tune", "Train(sgd(0.1), epochs=1, batch=10)"),
        )
    return cast("Train", value)


def _of_name(value: Any) -> Any:
    """The object of a text `module:name`; another value as it is."""
    if isinstance(value, str) and ":" in value and "(" not in value:
        from atoll.base.names import load_from_user

        return load_from_user(value)
    return value


def _metric_of_name(value: Any) -> Any:
    """The metric of a text `module:name`: a `Metric`, or a function, whose name is that of the metric."""
    found = _of_name(value)
    if found is value or not callable(found):
        return found
    from atoll.compute.metrics import Metric

    return found if isinstance(found, Metric) else Metric(str(value).rpartition(":")[2], found)


def _with_value(value: Any, name: str) -> Change:
    return Change(name, value)


class SettingsDict(TypedDict, total=False):
    """The keyword arguments of `atoll.train` and `atoll.rounds` that are settings: the fields of `Settings`."""

    rounds: int
    stop: Any
    seed: int
    dtype: str
    loss: str | PerExample | None
    metrics: str | Metric | Sequence[str | Metric] | None
    buffers: Mapping[str, str] | tuple[str, ...] | None
    draws: bool
    class_weight: Mapping[str, float] | str | None
    evaluate: str | None
    init: Mapping[str, Tensor] | str | Path | None
    engine: EngineSpec | str
    fleet: Fleet | str | None
    numerics: str
    precision: str
    device: str
    chunk: int | None
    budget: float | None
    delta: float | None
    ledger: str | None
    randomness: str
    tune: Train | str | None
    evaluate_every: int


def declared(f: dataclasses.Field[Any]) -> Setting:
    """The declaration of a field."""
    found: Setting = f.metadata["setting"]
    return found


def listed(function: F) -> F:
    """A function whose signature, for `help` and `inspect`, lists every setting with its default."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(Settings)
    ]
    shown: Any = function
    shown.__signature__ = signature.replace(parameters=[*own, *added])
    return function


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value of another type or outside the range of its field."""
    rule, kind = declared(f), str(f.type)
    if value is None and kind.endswith("| None"):
        return
    if kind.startswith("int"):
        if isinstance(value, bool) or not isinstance(value, int):
            raise _refusal(f, value, f"an integer{_bound(rule)}")
        if rule.least is not None and value < rule.least:
            raise _refusal(f, value, f"an integer{_bound(rule)}")
    elif kind.startswith("float"):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            works = 1e-5 if f.name == "delta" else 3.0
            raise UsageError(f"{f.name} = {value!r}.", "a number above 0.", write=Change(f.name, works))
    elif kind == "bool" and not isinstance(value, bool):
        raise _refusal(f, value, "True or False")
    elif kind in ("str", "str | None") and (not isinstance(value, str) or (rule.choices and value not in rule.choices)):
        raise _refusal(f, value, f"one of {', '.join(rule.choices)}" if rule.choices else "a text")
    elif f.name in _OBJECTS:
        _check_object(f.name, value)


_OBJECTS = {  # setting → the required value and a line that works, for the error
    "loss": ("the name of a loss, or a function that returns one value for each row", "cross_entropy"),
    "metrics": ("the name of a metric, a `Metric`, or several of them", ["accuracy"]),
    "buffers": ("a rule for each name pattern", ["*=mean"]),
    "class_weight": ('"balanced", or the weight of each class by its name', "balanced"),
    "init": ("a state_dict, or the path of a run or of a safetensors file", "runs/latest"),
}


def _check_object(name: str, value: Any) -> None:
    """Refuse a loss, metrics or a start of another type."""
    if name == "metrics":
        others = [each for each in value if not isinstance(each, str)]
        if others:
            from atoll.compute.metrics import Metric  # it loads torch, which a name does not need

            others = [each for each in others if not isinstance(each, Metric)]
        right = not others
    elif name == "buffers":
        texts = (*value.keys(), *value.values()) if isinstance(value, Mapping) else value
        right = isinstance(value, (Mapping, tuple, list)) and all(isinstance(text, str) for text in texts)
        right = right and (isinstance(value, Mapping) or all("=" in text for text in texts))
    elif name == "loss":
        right = isinstance(value, str) or callable(value)
    elif name == "class_weight":
        right = isinstance(value, (str, Mapping))
    else:
        right = isinstance(value, (str, PathLike, Mapping))
    if not right:
        required, works = _OBJECTS[name]
        raise UsageError(f"{name} = {value!r:.80}.", f"{required}.", write=Change(name, works))


def _bound(rule: Setting) -> str:
    return "" if rule.least is None else f", at least {rule.least}"


def _refusal(f: dataclasses.Field[Any], value: Any, required: str) -> UsageError:
    """The error for a value, with the integer that a text contains, or else with the default."""
    rule, works = declared(f), f.default
    try:
        number = int(value)
        if str(f.type).startswith("int") and number >= (number if rule.least is None else rule.least):
            works = number
    except Exception:  # the value is no number
        pass
    if works is None and rule.choices:
        works = rule.choices[0]
    elif works is None and str(f.type).startswith(("int", "float")):
        works = 32
    line = "" if works is None else Change(f.name, works)
    return UsageError(f"{f.name} = {value!r}.", f"{required}.", write=line)
