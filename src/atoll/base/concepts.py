"""Words of other libraries and of papers, with the name or the line that atoll has in their place.

`SYNONYMS` has other names of things that atoll has in the same place: `batch_size` is `batch`. `concept` has the line
for a word whose place is another one, such as `lr` as a setting, and for a feature that is missing. If a recipe or a
part of this name exists, the line points to it.

Tests: tests/surface/test_mistakes.py
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

from atoll.base.lines import Change, Line, Split, Write, example_call, form, literal

# word: the names that it may have, the first known one counts
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "step_size", "eta", "client_lr"), ("lr",)),
    **dict.fromkeys(("batch_size", "batchsize", "local_batch_size"), ("batch",)),
    **dict.fromkeys(("local_epochs", "num_epochs", "n_epochs"), ("epochs",)),
    **dict.fromkeys(("num_clients", "n_clients", "clients_per_round"), ("clients", "cohort")),
    "clients": ("cohort", "q"),
    **dict.fromkeys(("cohort", "sample_rate", "sampling_rate"), ("q",)),
    "client": ("clients",),
    **dict.fromkeys(("client_id", "client_column", "group", "groups", "group_by", "groupby"), ("by",)),
    **dict.fromkeys(("num_rounds", "n_rounds", "iterations"), ("rounds",)),
    **dict.fromkeys(("label", "labels", "target_column", "y"), ("target",)),
    **dict.fromkeys(("strategy", "algorithm", "plan"), ("recipe",)),
    **dict.fromkeys(("partition", "partitioner"), ("split",)),
    "dataset": ("data",),
    "random_state": ("seed",),
    **dict.fromkeys(("multiprocessing", "multiprocess"), ("processes",)),
    **dict.fromkeys(("acc", "top1"), ("accuracy",)),
    **dict.fromkeys(("roc_auc", "auroc"), ("auc",)),
    "f1_score": ("f1",),
    **dict.fromkeys(("ce", "nll", "log_loss", "softmax"), ("cross_entropy",)),
    **dict.fromkeys(("bce", "logistic"), ("binary_cross_entropy",)),
    **dict.fromkeys(("l1", "l1_loss"), ("mae",)),
    **dict.fromkeys(("l2", "mse_loss", "squared_error"), ("mse", "rmse")),
    **dict.fromkeys(("noniid", "non_iid", "lda"), ("Dirichlet",)),
    **dict.fromkeys(("train", "fit", "start"), ("run",)),
    **dict.fromkeys(("list", "ls", "history"), ("runs",)),
    **dict.fromkeys(("continue", "restart"), ("resume",)),
}

# Tables above this package, which imports none of them: a line for a word looks into them when an error is built.
_RECIPES = "atoll.training.known_names:RECIPES"
_PARTS = "atoll.plan.registry:PARTS"
_PARSE = "atoll.base.grammar:parse"  # by its name: that module imports errors, which look for foreign words here
_ARCHITECTURE = re.compile(r"(resnet|bert|vgg|vit|gpt|llama|mobilenet|efficientnet|densenet|alexnet|lenet)[\w-]*", re.I)


class Concept(NamedTuple):
    """The reason in an error about a word, and the line to write."""

    why: str
    write: Write


def synonym(name: str, known: Collection[str]) -> str:
    """The known name of the thing that a foreign word denotes; an empty text if there is none.

    Example:
        >>> synonym("batch_size", ["lr", "batch"]), synonym("batch_size", ["rounds"])
        ('batch', '')
    """
    return next((each for each in SYNONYMS.get(folded(name), ()) if each in known), "")


def concept(name: str, value: Any = None) -> Concept | None:
    """The reason and the line for a foreign word; None for another word.

    Args:
        name: the word.
        value: the value that was given with it, a number or a text; None if there is none.
    Example:
        >>> concept("lr", 0.3).write.at("shell")
        '--recipe "fedavg(lr=0.3)"'
    """
    word = _word(name)
    return _CONCEPTS[word](value) if word in _CONCEPTS else own_model(name) if _ARCHITECTURE.fullmatch(word) else None


def is_concept(name: str) -> bool:
    """Whether `concept` has a line for a word. No table is read."""
    return _word(name) in _CONCEPTS or bool(_ARCHITECTURE.fullmatch(_word(name)))


def _word(name: str) -> str:
    word = folded(name)
    return next((each for each in (word, *SYNONYMS.get(word, ())) if each in _CONCEPTS), word)


def folded(name: str) -> str:
    """A name in lower case, with underscores instead of hyphens.

    Example:
        >>> folded("Num-Clients")
        'num_clients'
    """
    return name.casefold().replace("-", "_")


def own_model(name: str) -> Concept:
    """The line for a model that atoll does not have: a module of the user, by `module:name`.

    Example:
        >>> own_model("main.py").write.at("shell"), own_model("resnet18").write.at("shell")
        ('--model main:net', '--model mine:resnet18')
    """
    word = name.removesuffix(".py").rpartition("/")[2].replace("-", "_")
    text = f"{word}:net" if name.endswith(".py") else f"mine:{word}"
    if not word.isidentifier():
        text = "mine:net"
    module, _, function = text.partition(":")
    return Concept(
        f"{text} names a model of your own: {function} in {module}.py, a torch module or a function that returns one.",
        Change("model", text),
    )


# The module of the parts of a slot: another library's Fraction is no sampler where an optimizer is due.
_FLOORS = {
    "optimizer": "optimizer",
    "local": "local",
    "aggregator": "aggregate",
    "codec": "codec",
    "downlink": "codec",
    "cohort": "sampler",
    "sampler": "sampler",
    "pace": "pace",
}


def part_for(slot: str, value: Any) -> str:
    """The text of the part that a user means by a value that is no part; an empty text if it is unknown.

    Args:
        slot: the slot of the plan.
        value: the name of a part; a class or an object of another library whose name is that of a part, such as
            `torch.optim.Adam`; or a function, which is a loop of the user (`local`) or a rule (`aggregator`).
    Example:
        >>> part_for("optimizer", "adam"), part_for("local", part_for), part_for("pace", "none")
        ('adam(0.01)', 'Custom(part_for)', '')
    """
    if isinstance(value, str) and "(" in value:
        return _parsed(value)
    name = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    parts = {folded(part): part for part in _table(_PARTS)}
    part = parts.get(folded(name), "")
    if part and _table(_PARTS)[part].__module__.startswith(f"atoll.plan.{_FLOORS.get(slot, '')}"):
        return example_call(part, _table(_PARTS)[part])
    around = {"local": "Custom", "aggregator": "Combine"}.get(slot, "")
    function = callable(value) and not isinstance(value, type) and name.isidentifier()
    return f"{around}({name})" if function and around else ""


def _parsed(text: str) -> str:
    """The text itself if it is that of a part, else an empty text."""
    try:
        _table(_PARSE)(text, _table(_PARTS))
    except ValueError:  # a UsageError is a ValueError
        return ""
    return text


def _table(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _recipe(text: str) -> Write:
    return Line(f"plan={literal(text)}", *(form(Change("recipe", text), door) for door in ("shell", "file")))


def _argument(word: str, default: Any) -> Callable[[Any], Concept]:
    """The concept of a word that is an argument of a recipe."""

    def of(value: Any) -> Concept:
        given = _number(value)
        rate = "" if word == "lr" else "lr=0.1, "
        number = default if given is None or (isinstance(default, int) and given != int(given)) else given
        number = int(number) if isinstance(default, int) else number
        return Concept(f"{word} is an argument of the recipe.", _recipe(f"fedavg({rate}{word}={number!r})"))

    return of


def _number(value: Any) -> float | None:
    """The value as a positive finite number; None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < float("inf") else None


def _optimizer(value: Any) -> Concept:
    rates = {"adam": 0.01, "adamw": 0.01, "sgd": 0.1, "adagrad": 0.01, "yogi": 0.01}
    name = folded(value) if isinstance(value, str) else ""
    text = value if isinstance(value, str) and "(" in value else f"{name}({rates[name]})" if name in rates else ""
    text = text or "adam(0.01)"
    return Concept(
        "the optimizer is a slot of the plan, the rule of the server; that of the clients is in Train.",
        Line(f"dataclasses.replace(plan, optimizer={text})", *_slot("optimizer", text)),
    )


def _slot(slot: str, text: str) -> tuple[str, str]:
    change = Change(f"plan.{slot}", text)
    return change.at("shell"), change.at("file")


def _by(value: Any) -> Concept:
    column = value if isinstance(value, str) and value else "shop"
    shell, file = (Change("by", column).at(door) for door in ("shell", "file"))
    return Concept(
        "the column of the client is an option of the data.",
        Line(f'atoll.data.load("rows.csv", by={literal(column)})', shell, file),
    )


def _clients(value: Any) -> Concept:
    number = _number(value)
    if number is None and isinstance(value, str) and value.isidentifier():
        return _by(value)
    count = int(number) if number is not None and number == int(number) else 10
    return Concept("the split of the data sets the number of clients.", Split(count))


def _target(value: Any) -> Concept:
    column = value if isinstance(value, str) and value else "price"
    shell, file = (Change("target", column).at(door) for door in ("shell", "file"))
    return Concept(
        "the target is an option of the data.",
        Line(f'atoll.data.load("rows.csv", target={literal(column)})', shell, file),
    )


def _partition(text: Callable[[Any], str]) -> Callable[[Any], Concept]:
    return lambda value: Concept("the split of the data has a partition.", Split(by=text(value)))


def _algorithm(word: str, value: Any) -> Concept:
    """An algorithm for the clients: a recipe if there is one of this name, else the loop of the user."""
    if word in _table(_RECIPES):
        return Concept(f"{word} is a recipe.", _recipe(f"{word}(lr=0.1)"))
    return Concept(
        f"atoll has no {word}. Custom takes your own training loop.",
        Line("Custom(train)", *_slot("local", "Custom(mine:train)")),
    )


def _aggregator(word: str, value: Any) -> Concept:
    """A robust aggregator: a part if there is one of this name, else the rule of the user."""
    parts = _table(_PARTS)
    if part := next((each for each in parts if folded(each) == word.replace("_", "")), ""):
        call = example_call(part, parts[part])
        return Concept(f"{part} is an aggregator, a part of the plan.", Line(call, *_slot("aggregator", call)))
    return Concept(
        f"atoll has no {word}. Combine takes your own rule, fn(updates, weights).",
        Line(f"Combine({word})", *_slot("aggregator", f"Combine(mine:{word})")),
    )


def _metric(name: str) -> Callable[[Any], Concept]:
    return lambda _: Concept(f"{name} is a metric.", Change("metrics", [name]))


_CONCEPTS: Mapping[str, Callable[[Any], Concept]] = {
    "lr": _argument("lr", 0.1),
    "epochs": _argument("epochs", 5),
    "batch": _argument("batch", 10),
    "cohort": _argument("cohort", 10),
    "clients": _clients,
    "by": _by,
    "optimizer": _optimizer,
    "adam": lambda _: _optimizer("adam"),
    "class_weight": lambda _: Concept("class_weight is a setting of the training.", Change("class_weight", "balanced")),
    "target": _target,
    "torch": lambda _: Concept("every engine computes with torch.", Change("engine", "inprocess")),
    "dirichlet": _partition(lambda alpha: f"Dirichlet({_number(alpha) or 0.3!r})"),
    "iid": _partition(lambda _: "IID()"),
    "sweep": lambda _: Concept(
        "a sweep tries several values of settings.",
        Line(
            'atoll.sweep(experiment, {"plan.local.optimizer.lr": [0.03, 0.1]})',
            'atoll sweep experiment.toml --over "plan.local.optimizer.lr=[0.03, 0.1]"',
        ),
    ),
    **dict.fromkeys(
        ("callbacks", "callback", "loggers", "logger"),
        lambda _: Concept(
            "observers is an argument of train.",
            Line("observers=[lambda report: print(report.round, report.metrics)]", "--track tensorboard"),
        ),
    ),
    **dict.fromkeys(
        ("fraction", "fraction_fit", "participation"),
        lambda _: Concept("cohort is the number of clients in a round.", _recipe("fedavg(lr=0.1, cohort=10)")),
    ),
    "gpu": lambda _: Concept("the device is a setting of the training.", Change("device", "cuda")),
    **{name: _metric(name) for name in ("accuracy", "auc", "f1", "r2", "mae", "rmse")},
    **{name: partial(_algorithm, name) for name in ("fedprox", "scaffold", "feddyn", "fednova", "moon")},
    **{name: partial(_aggregator, name) for name in ("krum", "median", "trimmed_mean", "bulyan")},
}
