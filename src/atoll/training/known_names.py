"""The names that settings may use, as plain lists, and checks of names and paths. This module loads without torch.

A wrong name is refused before torch is imported, which takes seconds. A test compares the lists with the tables.

Tests: tests/surface/test_fast_commands.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atoll.base.errors import UsageError, unknown_name
from atoll.base.files import no_such_file
from atoll.base.grammar import parse
from atoll.base.lines import Change, Load, Text

DATA_SETS = ("breast_cancer", "diabetes", "digits", "fashion_mnist", "heart", "mnist", "wine")
MODELS = (
    *("2nn", "cnn", "cox", "linear", "logistic", "lstm", "mcmahan-cnn", "mlp", "niid-cnn", "pfl-cnn", "softmax"),
    "transformer",
)
RECIPES = (
    *(
        "diloco",
        "ditto",
        "distributed_gd",
        "dp_fedavg",
        "fedadagrad",
        "fedadam",
        "fedasync",
        "fedavg",
        "fedavgm",
        "fedbn",
        "fedbuff",
        "feddyn",
        "fedexp",
        "fedlc",
        "fednova",
        "fedper",
        "fedprox",
        "fedrep",
        "fedsgd",
    ),
    *("fedyogi", "gd", "local_sgd", "mimelite", "newton", "post_local_sgd", "qffl", "scaffold", "sgd"),
)
PARTITIONS = (
    *("Backdoor", "ByColumn", "Dirichlet", "FeatureShift", "IID", "LabelFlip", "Pathological", "Quantity", "Shards"),
)
CALLS = {  # a call of each name that has required arguments
    "Dirichlet": "Dirichlet(0.3)",
    "FeatureShift": "FeatureShift(noise=0.1)",
    "Pathological": "Pathological(2)",
    "Quantity": "Quantity(1.5)",
    "Plan": "Plan(Gradient(), Mean())",
}
TABLES = (".csv", ".tsv", ".txt", ".gz", ".parquet", ".xlsx")  # such a path is a file, also if it does not exist


def check_data(name: str) -> None:
    """Refuse a data set that is neither a known name nor a path that exists.

    Raises:
        UsageError: the error suggests a similar name, or a similar file of the same folder.
    """
    path = Path(name)
    if name in DATA_SETS or path.exists() or "*" in name:
        return
    if path.suffix in TABLES or os.sep in name:
        raise no_such_file(path, "the path of a CSV file", Load)
    raise unknown_data(name, DATA_SETS)


def unknown_data(name: str, known: Iterator[str] | tuple[str, ...]) -> UsageError:
    """The error for a data set that no table names."""
    error = unknown_name("data set", name, known, Load)
    return UsageError(error.given, f"{error.required[:-1]}, or the path of a CSV file.", error.why, error.write)


def check_model(name: str) -> None:
    """Refuse an unknown model. A `module:name` is not imported here.

    Raises:
        UsageError: the error suggests a similar name.
    """
    if ":" not in name and name not in MODELS:
        raise unknown_name("model", name, MODELS, lambda near: Change("model", near))


def check_call(text: str, names: tuple[str, ...], kind: str) -> None:
    """Refuse a text that is no call of one of these names. Its arguments are not checked.

    Raises:
        UsageError: the text cannot be read, or its name is unknown or is not called.
    """
    if text.isidentifier():
        calls = {name: Text(CALLS.get(name, f"{name}()")) for name in names}
        if text not in names:
            raise unknown_name(kind, text, names, calls.__getitem__)
        raise UsageError(f"{text} is a name.", "a call.", "a value is a call of its constructor.", calls[text])
    if ":" not in text:  # otherwise it names code, which is imported later, if it is trusted
        value = parse(text, dict.fromkeys(names, _Anything), inner=_EVERY_NAME, kind=kind)
        if not isinstance(value, _Anything):
            share = kind == "partition" and isinstance(value, float) and value > 0
            raise UsageError(f"{text!r} is no {kind}.", "a call.", write=Text(f"Dirichlet({value})") if share else "")


class _Anything:
    """A value that is built from any arguments."""

    def __init__(self, *args: Any, **words: Any) -> None: ...

    def __rshift__(self, other: Any) -> _Anything:
        return self

    def __rrshift__(self, other: Any) -> _Anything:
        return self


class _EveryName(Mapping[str, Callable[..., Any]]):
    """A table in which each name is a constructor of anything."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _Anything

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return True


_EVERY_NAME = _EveryName()
