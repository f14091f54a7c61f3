"""The properties of a federation's data that every participant must share, without its train rows.

A server has a `Schema` and no train row. A site compares the schema of its own rows with that of the server.

Tests: tests/data/test_schema.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple, Self

import torch
from msgspec import structs
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.base.random import Key
from atoll.data.clients import Clients
from atoll.data.input import Input, InputTarget
from atoll.data.rows import ArrayRows, Rows

_PROBED = 3  # clients of synthetic rows, and rows of each
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}


class TrainRows(NamedTuple):
    """The facts about the train rows of all sites that a server gathers.

    Args:
        classes: the rows of each class; empty: rows have no classes.
        deviation: √(Σ (y − ȳ)² / n) of each number to predict, in its units; empty if it was not gathered.
    """

    classes: tuple[int, ...] = ()
    deviation: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Schema:
    """The kind, the shapes and the names of rows. A model is built from it.

    Args:
        name: name of the data set.
        kind: "classification", "regression" or "tokens".
        features: shape of one row's features.
        classes: names of the classes; None for regression, or if a row has several targets.
        columns: names of the features, if they have names and one axis.
        target: shape of one row's target; () for a single number or class.
        dtypes: the dtypes of features and targets, "float32", "float64" or "int64".
        vocab: the vocabulary size; None if rows contain numbers, not ids.
        held_out: the rows on which the owner of the schema evaluates the model; None: there are no such rows.
        notes: sentences that state the guesses of the data set.
        input: the map from a user's rows to the tensors; None: `described` makes it from the other fields.
        known: the facts about the train rows of the sites, if they were gathered.
        reads_rows: whether columns, levels or statistics of the input were read from rows of the data.
    Example:
        >>> from atoll.data import load
        >>> schema = Schema.of(load("digits").split(10))
        >>> schema
        Schema('digits', classification, features=(1, 8, 8), held_out=359)
        >>> Schema.read(schema.text()).digest == schema.digest
        True
    """

    name: str
    kind: str
    features: tuple[int, ...]
    classes: tuple[str, ...] | None
    columns: tuple[str, ...] | None
    target: tuple[int, ...]
    dtypes: tuple[str, str]
    vocab: int | None = None
    held_out: Rows | None = None
    notes: tuple[str, ...] = ()
    input: Input | None = None
    known: TrainRows | None = None
    reads_rows: bool = False

    def __repr__(self) -> str:
        held = 0 if self.held_out is None else len(self.held_out)
        return f"Schema({self.name!r}, {self.kind}, features={self.features}, held_out={held})"

    @classmethod
    def of(cls, data: Clients) -> Self:
        """The schema of clients, with their held-out rows and without their train rows."""
        _refuse_fields(data.fields)
        x, y = data.rows.take(data.order[:1])
        return cls(
            data.name,
            data.kind,
            data.features,
            data.classes,
            data.columns,
            tuple(y.shape[1:]),
            (_named(x), _named(y)),
            data.vocab,
            data.held_out,
            data.notes,
            data.input or data.described(),  # from the rows: intensities are not known without them
            reads_rows=data.reads_rows,
        )

    @classmethod
    def of_input(cls, given: Input, name: str = "schema") -> Self:
        """The schema of an input, for a server that has no row.

        Args:
            given: the input that all sites share.
            name: the name of the data in reports.
        Raises:
            UsageError: the target has several classes in one row, whose shape an input does not state; or a row has
                several tensors.
        Example:
            >>> from atoll.data import load
            >>> Schema.of_input(load("wine").split(3).input).features
            (13,)
        """
        _refuse_fields(given.fields)
        if given.kind not in ("classification", "regression", "labels") or (
            given.kind == "classification" and not given.classes
        ):
            raise UsageError(
                f"The input has a target of the kind {given.kind!r} with several classes in one row.",
                "one class in each row, or numbers.",
                "an input does not state the shape of such a target.",
                Line(shell="atoll serve --data corpus"),
            )
        several = given.kind == "labels" or (given.kind == "regression" and given.outputs > 1)
        target = (given.outputs,) if several else ()
        x = "int64" if given.tokens is not None else "float64" if given.columns else "float32"
        y = "float64" if given.kind == "regression" else "int64"
        columns = given.names or None
        return cls(name, given.kind, given.features, given.classes, columns, target, (x, y), given.tokens, input=given)

    def described(self, dtype: str = "float32") -> Input:
        """Return the map from a user's rows to the tensors.

        Args:
            dtype: the dtype of the tensors.
        """
        if self.input is not None:
            return structs.replace(self.input, dtype=dtype, tokens=self.vocab)
        outputs = len(self.classes) if self.classes is not None else math.prod(self.target)
        names = ("y",) if outputs == 1 or self.classes is not None else tuple(f"y{i}" for i in range(outputs))
        return Input(
            target=InputTarget(self.kind, names, self.classes),
            features=self.features,
            outputs=outputs,
            dtype=dtype,
            tokens=self.vocab,
        )

    def values(self) -> dict[str, Any]:
        """The schema as values of JSON, without rows and notes."""
        return {
            "name": self.name,
            "kind": self.kind,
            "features": list(self.features),
            "classes": None if self.classes is None else list(self.classes),
            "columns": None if self.columns is None else list(self.columns),
            "target": list(self.target),
            "dtypes": list(self.dtypes),
            "vocab": self.vocab,
        }

    def text(self) -> str:
        """The schema as JSON. Equal schemas have equal texts."""
        return json.dumps(self.values(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the text."""
        return sha256(self.text().encode()).digest()

    @classmethod
    def read(cls, text: str) -> Self:
        """The inverse of `text`.

        Raises:
            UsageError: the text is no schema.
        """
        try:
            given = json.loads(text)
            x, y = given["dtypes"]
            if x not in _DTYPES or y not in _DTYPES:
                raise ValueError("an unknown dtype")
            texts = [given[n] if given[n] is None else tuple(map(str, given[n])) for n in ("classes", "columns")]
            shapes = [tuple(map(int, given[n])) for n in ("features", "target")]
            vocab = None if given["vocab"] is None else int(given["vocab"])
            name, kind = str(given["name"]), str(given["kind"])
            return cls(name, kind, shapes[0], texts[0], texts[1], shapes[1], (x, y), vocab)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"The text is no schema: {type(error).__name__}.", "the JSON text that `Schema.text` returns."
            ) from None

    def differs(self, other: Schema) -> tuple[str, Any, Any] | None:
        """The first property that differs: its name, its value here and its value there; None if all are equal."""
        mine, theirs = self.values(), other.values()
        for name, value in mine.items():
            if name in ("classes", "columns") and value and theirs[name]:
                pairs = list(zip(value, theirs[name], strict=False))
                first = next(((n, a, b) for n, (a, b) in enumerate(pairs) if a != b), None)
                if first is not None:
                    return f"{name}[{first[0]}]", first[1], first[2]
            if value != theirs[name]:
                return name, value, theirs[name]
        return None

    @cached_property
    def rows(self) -> Rows:
        """Synthetic rows, to test a model before any client is known."""
        count = _PROBED**2
        key, size = Key(0).fold("synthetic"), count * math.prod(self.features)
        if self.dtypes[0] == "int64":
            x = torch.arange(size).remainder(self.vocab or 2)
        else:
            x = key.normal(size, _DTYPES[self.dtypes[0]])
        outputs = count * math.prod(self.target)
        y = torch.arange(outputs).remainder(len(self.classes) if self.classes else self.vocab or 2)
        if self.dtypes[1] != "int64":
            y = key.fold("target").normal(outputs, _DTYPES[self.dtypes[1]])
        return ArrayRows(x.reshape(count, *self.features), y.reshape(count, *self.target))

    def without_clients(self) -> Clients:
        """A federation of no clients, with the held-out rows. A model and its evaluation are built from it."""
        it = replace(
            self._clients(self.rows, torch.zeros(1, dtype=torch.int64)), held_out=self.held_out, notes=self.notes
        )
        it.__dict__["vocab"] = self.vocab  # it cannot be counted without rows
        return it

    def synthetic(self) -> Clients:
        """Clients with a few synthetic rows each."""
        rows = self.rows
        return self._clients(rows, torch.arange(0, len(rows) + 1, _PROBED))

    def _clients(self, rows: Rows, offsets: Tensor) -> Clients:
        return Clients(
            self.name,
            rows,
            torch.arange(int(offsets[-1])),
            offsets,
            None,
            self.kind,
            self.classes,
            self.features,
            self.columns,
            input=self.input,
            reads_rows=self.reads_rows,
        )


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_fields(fields: Sequence[object]) -> None:
    """Refuse rows of several tensors.

    Args:
        fields: the tensors of a row.
    """
    if fields:
        raise UsageError(
            f"The rows have several tensors: {', '.join(map(str, fields))}.",
            "rows of one tensor.",
            "a schema, by which sites of a network read their rows, describes one tensor.",
            Line(python="torch.cat([ids, mask], 1)"),
        )
