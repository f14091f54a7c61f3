"""A source is a data set before its split. The split holds rows out, assigns the rest to clients, and scales.

Tests: tests/data/test_split.py, tests/data/test_partition.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from atoll.base import lines
from atoll.base.errors import UsageError, unknown_name
from atoll.base.grammar import parse
from atoll.base.lines import Change, Split
from atoll.base.markup import html_table, mimebundle
from atoll.base.names import with_noun
from atoll.base.random import Key, user_scope
from atoll.base.validation import check_arguments
from atoll.data.cells import EPOCH, Cells, Missing, code_of
from atoll.data.clients import Clients, offsets_of
from atoll.data.held_out import (
    HeldOut,
    HeldOutPool,
    RandomRows,
    check_sides,
    deal_held_out,
    held_out_rule,
    no_column,
)
from atoll.data.input import Input, InputTarget, Statistics, TextColumn
from atoll.data.partition import IID, PARTITIONS, ByColumn, Partition, Pool, fill_up, in_groups
from atoll.data.rows import Array, ArrayRows, PickedRows, RelabelledRows, Rows, fields_of, intensities, keyed
from atoll.data.scale import ScaledRows, moments, moments_of

SCALES = ("none", "standard", "client")
TARGET_SCALES = ("none", "standard")
FEW_ROWS = 5  # a median below it gives a note: the column of natural clients may name the rows


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """A data set with its metadata, before the split.

    Args:
        name: name of the data set.
        rows: the rows as stored: missing numbers are not filled, and columns are not scaled.
        kind: "classification" or "regression".
        classes: names of the classes; None for regression, or if a row has several targets.
        features: shape of one row's features.
        columns: names of the features, if they have names and one axis.
        test: the test rows of the data set, which `split` holds out; None: the data set has no test rows.
        by: the natural client of each row, an index into `names`, int64 `[rows]`; None if there are no natural clients.
        names: names of the natural clients.
        test_by: the natural client of each test row; None: unknown.
        scale: "none", "standard" or "client" (each natural client by its own statistics). `split` computes the
            statistics from the train rows.
        fill: whether NaN is a missing number, which is filled with the mean of the train rows.
        notes: one sentence for each guess.
        schema: columns, levels and classes, without statistics; None: those of an array.
        cells: the cells of a table's columns, to read them by the columns and levels of another input.
        codes: the texts of columns of numbers with a text such as 007, which rules of held-out rows read.
        listed: columns that the user listed as features.
        scale_target: "none" or "standard": numbers to predict are scaled by mean and deviation of the train rows.
    """

    name: str
    rows: Rows
    kind: str
    classes: tuple[str, ...] | None
    features: tuple[int, ...]
    columns: tuple[str, ...] | None = None
    test: Rows | None = None
    by: Tensor | None = None
    names: tuple[str, ...] | None = None
    test_by: Tensor | None = None
    scale: str = "none"
    fill: bool = False
    notes: tuple[str, ...] = ()
    schema: Input | None = None
    cells: Mapping[str, Cells] | None = None
    codes: Mapping[str, Cells] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    scale_target: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, str) or self.scale not in SCALES:
            raise unknown_name("scale", self.scale, SCALES, lambda near: Change("scale", near))
        if self.scale_target not in TARGET_SCALES:
            raise unknown_name(
                "scale of the target", self.scale_target, TARGET_SCALES, lambda near: Change("scale_target", near)
            )
        if self.scale == "none":
            return
        given = f"{self.name} was given scale={self.scale!r}."
        if not self.rows.take(torch.zeros(1, dtype=torch.int64))[0].is_floating_point():
            why = "token ids and rows of several tensors have no mean."
            raise UsageError(given, "float features.", why, Change("scale", "none"))
        if self.scale == "client" and (self.by is None or (self.test is not None and self.test_by is None)):
            raise UsageError(
                given,
                "a natural client for every row, also for held-out rows.",
                "each row is scaled by the statistics of its own client.",
                Change("scale", "standard"),
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.kind}, rows={len(self)}, features={self.features})"

    def _repr_html_(self) -> str:
        columns = self.columns or ()
        shown = [[str(i), name] for i, name in enumerate(columns[:100])]
        return html_table(repr(self), [["feature", "name"], *shown] if shown else [["features"], [str(self.features)]])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    @check_arguments
    def split(
        self,
        clients: int | None = None,
        by: Partition | str | None = None,
        *,
        held_out: Any = 0.2,
        seed: int = 0,
        min_rows: int = 2,
        input: Input | str | Path | None = None,
    ) -> Clients:
        """Hold rows out, then divide the remaining train rows among clients.

        The held-out rows are selected first, by a hash of each row and the seed, with the same fraction of every class.
        Held-out rows and train rows are therefore the same for any number of clients and any partition.

        Args:
            clients: the number of clients; None: 10, or all natural clients.
            by: the partition, or its text, such as "Dirichlet(0.3)";
                None: `ByColumn()` if the set has natural clients, else `IID()`.
            held_out: fraction of the rows to hold out, in [0, 1). A set with its own test rows uses those instead;
                0 holds out no rows. Or a rule, such as `Groups("patient", 0.2)`, or its text; or a bool array `[rows]`.
                The columns that a rule names are features only if `columns=` lists them.
            seed: the seed of the random selection of held-out rows, and of the partition.
            min_rows: rows that each client must have, ≥ 1. If a draw gives a client fewer, the partition draws
                again; then rows are moved from the largest clients, and a note reports it. Natural clients with
                fewer rows are left out.
            input: an input, or the path of an `input.json` or of a run: its columns, levels, classes and statistics
                are used instead of those of this data set.
        Returns:
            The federation, its features filled and scaled by the statistics of the train rows.
        Raises:
            UsageError: more clients than rows, a partition that does not fit the data, held-out rows of a
                class that no train row has, or an input that does not fit. The source is unchanged.
        Example:
            >>> from atoll.data import load, Dirichlet
            >>> load("digits").split(100, Dirichlet(0.3))
            Clients('digits', clients=100, rows=1438, held_out=359)
        """
        partition = _of_text(by) if by is not None else (IID() if self.by is None else ByColumn())
        _check(partition, seed, min_rows)
        if input is not None:
            given = input if isinstance(input, Input) else Input.read(input)
            with user_scope(Key(seed).fold("split")):
                return self.read_as(given)._split(clients, partition, held_out, seed, min_rows, given)
        rule = held_out_rule(held_out, len(self))
        with user_scope(Key(seed).fold("split")):
            return self._without(rule)._split(clients, partition, rule, seed, min_rows, None)

    def _split(
        self,
        clients: int | None,
        partition: Partition,
        held_out: Any,
        seed: int,
        min_rows: int,
        given: Input | None,
    ) -> Clients:
        key = Key(seed).fold("split")
        word = Key(seed).fold("rows").word()
        labels = None if self.classes is None else self.rows.targets()
        rule = held_out_rule(held_out, len(self))
        train, held, notes = self._hold_out(labels, rule, key.fold("held-out"))
        count = self._count(clients, partition, len(train), rule, min_rows)
        pool = Pool(
            len(train),
            None if labels is None else labels[train],
            None if self.by is None else self.by[train],
        )
        names = self.names if partition.natural else None
        owner, deal_notes = _deal(partition, pool, count, min_rows, key)
        if partition.natural:
            train, owner, names, deal_notes = _leave_out(train, owner, names or (), min_rows, self.by)
            count = len(names)
            notes = (*notes, *_few_rows(owner.bincount(minlength=count)))
        own, test = keyed(self.rows, word), None if self.test is None else keyed(self.test, word)
        described = self.schema is not None or self.scale != "none" or self.fill or self.scale_target != "none"
        fitted = given if given is not None or not described else self._fit(train)
        rows, own_test = self._prepared(own, self.by, fitted), self._prepared(test, self.test_by, fitted)
        rows = own if rows is None else rows
        if fitted is not None and fitted.clients:
            self._refuse_unscaled(fitted, self.test_by if held is None else None if self.by is None else self.by[held])
        drawn = PickedRows(rows, held) if held is not None and len(held) else None
        judge = own_test if held is None else drawn
        if judge is not None and labels is not None:
            _refuse_unseen(labels[train], judge.targets(), self.classes or ())
        whose = torch.full((len(self),), -1)
        whose[train] = owner
        judges = None if judge is None else self._judges(partition, held, labels, train, owner, names, judge, key)
        if judges is not None:
            lacking = int((judges[judges >= 0].bincount(minlength=count) == 0).sum())
            if lacking and partition.natural:
                notes = (*notes, f"{lacking} of {count} clients have no held-out rows.")
        seen = (
            judge if judge is None or judges is None else partition.held_view(judge, judges, count, key.fold("judges"))
        )
        return Clients(
            name=self.name,
            rows=partition.view(rows, whose, count, key.fold("shift")),
            order=train[in_groups(owner)],
            offsets=offsets_of(owner.bincount(minlength=count)),
            held_out=judge,
            kind=self.kind,
            classes=self.classes,
            features=self.features,
            columns=self.columns,
            names=names,
            notes=(*self.notes, *notes, *deal_notes),
            input=fitted,
            held_owner=judges,
            held_view=None if seen is judge else seen,
            reads_rows=given is None and described,
        )

    def _without(self, rule: HeldOut | Tensor) -> Source:
        """The source without the features that a rule names, except those that the user listed as features."""
        named = rule.columns if isinstance(rule, HeldOut) else ()
        for column in named:
            if self.cells is None or column not in self.cells:
                raise no_column(column, self.cells or {})
        there = () if self.schema is None else self.schema.columns
        left = tuple(c for c in there if c.name not in named or c.name in self.listed)
        if len(left) == len(there) or self.schema is None or self.cells is None:
            return self
        if not left:
            raise UsageError(f"held_out={rule}: no other column is left as a feature.", "at least one feature.")
        width = sum(len(c.levels) if isinstance(c, TextColumn) else 1 for c in left)
        schema = structs.replace(self.schema, columns=left, features=(width,))
        x = schema.expand(torch.from_numpy(schema.values(self.cells).numbers))
        rows = ArrayRows(x, self.rows.targets(), self.kind == "regression")
        note = f"{', '.join(named)}: read by the rule of held-out rows, no feature."
        notes = (*self.notes, note)
        return replace(
            self,
            rows=rows,
            features=schema.features,
            columns=schema.names,
            schema=schema,
            notes=notes,
            fill=bool(np.isnan(x.numpy()).any()),
        )

    def _judges(
        self,
        partition: Partition,
        held: Tensor | None,
        labels: Tensor | None,
        train: Tensor,
        owner: Tensor,
        names: tuple[str, ...] | None,
        judge: Rows,
        key: Key,
    ) -> Tensor | None:
        """The client of each held-out row, −1 for none; None if no row has a client."""
        if partition.natural:
            natural = self.test_by if held is None else self.by
            if natural is None:
                return None
            place = {name: i for i, name in enumerate(names or ())}
            table = torch.tensor([place.get(name, -1) for name in self.names or ()])
            return table[natural if held is None else natural[held]]
        if labels is None or labels.dim() > 1:
            return deal_held_out(torch.zeros_like(train), owner, torch.zeros(len(judge), dtype=torch.int64), key)
        return deal_held_out(labels[train], owner, judge.targets(), key.fold("judges"))

    def _described(self) -> Input:
        """The input without statistics."""
        if self.schema is not None:
            target = structs.replace(self.schema.target, classes=self.classes)
            return structs.replace(self.schema, target=target)
        y = self.rows.take(torch.zeros(1, dtype=torch.int64))[1]
        outputs = len(self.classes) if self.classes is not None else math.prod(y.shape[1:])
        names = ("y",) if outputs == 1 or self.classes is not None else tuple(f"y{i}" for i in range(outputs))
        return Input(
            target=InputTarget(self.kind, names, self.classes),
            features=self.features,
            outputs=outputs,
            by=None if self.by is None else "client",
            intensities=intensities(self.rows),
            fields=tuple(map(str, fields_of(self.rows))),
        )

    def _fit(self, train: Tensor) -> Input:
        """The input with the statistics of the train rows."""
        it = self._described()
        if self.scale != "none" or self.fill:
            group = self.by if self.scale == "client" else None
            mean, sd = moments(self.rows, train, group)
            centre, spread = (mean, sd) if self.scale != "none" else (torch.zeros_like(mean), torch.ones_like(sd))
            if group is not None and self.names is not None:
                there = group[train].unique().tolist()
                each = {self.names[i]: Statistics(*(_floats(t[i]) for t in (mean, centre, spread))) for i in there}
                it = structs.replace(it, clients=each)
            else:
                it = it.fitted(Statistics(*(_floats(t[0]) for t in (mean, centre, spread))))
        if self.scale_target == "standard" and self.kind == "regression":
            y = self.rows.targets()[train]
            mean, sd = moments_of(lambda: y.split(1 << 16), y.shape[1:])
            target = structs.replace(it.target, centre=_floats(mean), spread=_floats(sd))
            it = structs.replace(it, target=target)
        return it

    def scaled_rows(self, it: Input) -> Rows:
        """The rows as a model takes them: filled and scaled by the statistics of an input."""
        return self._prepared(self.rows, self.by, it) or self.rows

    def _prepared(self, rows: Rows | None, by: Tensor | None, it: Input | None) -> Rows | None:
        """The rows as the model takes them: filled and scaled by the statistics of an input."""
        if rows is None or it is None:
            return rows
        fill, centre, spread = it.tables or (None, None, None)
        target = torch.tensor([it.target.centre, it.target.spread], dtype=torch.float64)
        target = target[:, 0] if target.shape[1] == 1 else target
        group = None
        if it.clients:
            place = {name: i for i, name in enumerate(it.clients)}
            group = torch.tensor([place.get(name, 0) for name in self.names or ()])[by]
        if fill is None and not it.target.spread:
            return rows
        return ScaledRows(rows, group, fill, centre, spread, target if it.target.spread else None)

    def _refuse_unscaled(self, it: Input, of: Tensor | None) -> None:
        """Refuse held-out rows of clients without statistics. `of` is the client of each held-out row."""
        for client in [] if of is None else of.unique().tolist():
            name = (self.names or ())[client]
            if name not in it.clients:
                row = int((of == client).nonzero()[0])
                raise UsageError(
                    f'Held-out row {row} with scale="client": its client {name!r} has no train rows in the federation.',
                    "a client with train rows for each held-out row.",
                    "each row is scaled by the statistics of the train rows of its own client.",
                    Change("scale", "standard"),
                )

    def read_as(self, given: Input) -> Source:
        """The source with the columns, levels and classes of another input.

        Raises:
            UsageError: a column is missing or has another type, or a class is unknown to the input.
        """
        known = self.names or ()
        new = [name for name in known if given.clients and name not in given.clients]
        if new or (given.clients and not known):
            raise UsageError(
                f"The input has no statistics of the client {new[0]!r}."
                if new
                else "The data have no natural clients.",
                f"the clients {', '.join(given.clients)}.",
                "each client is scaled by its own statistics.",
            )
        y = self.rows.targets()
        if given.kind != self.kind or (given.classes is None) != (self.classes is None):
            raise UsageError(f"The target is a {self.kind}.", f"{given.kind}, as in the input.")
        if self.classes is not None and given.classes is not None:
            missing = [name for name in self.classes if name not in given.classes]
            if missing:
                raise UsageError(
                    f"The class {missing[0]!r} is not in the input.", f"the classes {', '.join(given.classes)}."
                )
            y = torch.tensor([given.classes.index(name) for name in self.classes])[y]
        if self.cells is None or not given.columns:
            difference = "" if given.features == self.features else f"{self.features}, and not {given.features}"
            if given.columns or difference:
                raise UsageError(
                    f"The data are rows of shape {self.features}.",
                    f"rows of shape {given.features}"
                    + (f" of the columns {', '.join(c.name for c in given.columns)}." if given.columns else "."),
                )
            return replace(self, rows=RelabelledRows(self.rows, y), classes=given.classes)
        values = given.values(self.cells)
        unknown = tuple(
            f"Column {column!r} contains {text!r} in {with_noun(count, 'row')}, which the input does not know."
            for (column, text), count in values.unknown.items()
        )
        rows = ArrayRows(given.expand(torch.from_numpy(values.numbers)), y, self.kind == "regression")
        return replace(
            self,
            rows=rows,
            classes=given.classes,
            features=given.features,
            columns=given.names,
            notes=(*self.notes, *unknown),
        )

    def _hold_out(
        self, labels: Tensor | None, rule: HeldOut | Tensor, key: Key
    ) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """Return the train rows, the held-out rows (None for the set's own test rows), and the notes."""
        every = torch.arange(len(self))
        drawn = isinstance(rule, RandomRows)
        if rule == RandomRows(0.0):
            return every, every[:0], ()
        if self.test is not None:
            if not drawn:
                raise UsageError(
                    f"held_out={rule} on {self.name}, which has {len(self.test)} test rows of its own.",
                    "a number: the set's own test rows are held out.",
                    write=Split(options={"held_out": 0.2}),
                )
            return every, None, (f"Held out: the set's own {len(self.test)} test rows.",)
        held = rule(HeldOutPool(len(self), labels, self.by, self._column), key) if isinstance(rule, HeldOut) else rule
        if not drawn:
            check_sides(held, rule if isinstance(rule, HeldOut) else "an array")
        how = ("at random" if labels is None else "in equal parts of every class") if drawn else f"by {rule}"
        how = how if isinstance(rule, HeldOut) else "as given"
        return every[~held], every[held], (f"Held out: {int(held.sum())} of {len(self)} rows, {how}.",)

    def _column(self, name: str) -> Array:
        """The cells of a column, for a rule: numbers, or ISO dates, codes and texts with None for missing."""
        if self.cells is None or name not in self.cells:
            raise no_column(name, self.cells or {})
        cells = self.cells[name]
        days = cells.days()
        if days is not None:
            dates = [None if math.isnan(d) else (EPOCH + timedelta(days=d)).isoformat() for d in days.tolist()]
            return np.array(dates, dtype=object)
        codes, numbers = self.codes.get(name), cells.numbers(Missing())
        if numbers is not None and codes is None:
            return numbers
        # As numbers the codes 007 and 7, or two codes of 17 digits, would be one group.
        texts = (codes or cells).texts()
        names = [None if Missing().text(text) else code_of(text) for text in texts.levels] + [None]
        out = np.array([names[code] for code in texts.codes.tolist()], dtype=object)
        if numbers is not None:
            out[np.isnan(numbers)] = None
        return out

    def _count(
        self, clients: int | None, partition: Partition, train: int, rule: HeldOut | Tensor, min_rows: int
    ) -> int:
        """Return the number of clients, or refuse it."""
        count = 10 if clients is None else clients
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"split({clients!r}).", "an integer ≥ 1.", write=Split(10))
        if partition.natural and self.names is not None:
            if clients not in (None, len(self.names)):
                raise UsageError(
                    f"split({clients}) was called on data with {len(self.names)} natural clients.",
                    f"{len(self.names)} clients, or a partition that draws them.",
                    "the data determine the natural clients.",
                    Split(clients, "IID()"),
                )
            return len(self.names)
        if count * min_rows > train:
            count, least = (count, 1) if count <= train else (max(1, train // min_rows), min(min_rows, train))
            raise UsageError(
                f"split({clients}) was called on {train} train rows, with at least {min_rows} per client.",
                f"clients × min_rows ≤ {train}.",
                "each row belongs to exactly one client.",
                Split(
                    count,
                    str(partition),
                    {**({"held_out": rule.part} if isinstance(rule, RandomRows) else {}), "min_rows": least},
                ),
            )
        return count


def _few_rows(sizes: Tensor) -> tuple[str, ...]:
    """A note if the natural clients have few rows each: their column may name the rows."""
    middle = int(sizes.median())
    question = "does the column of the clients name a row, or a client?"
    return () if middle >= FEW_ROWS else (f"The median client has {with_noun(middle, 'row')}: {question}",)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().flatten().tolist())


def _of_text(by: object) -> Any:
    """A partition of its text; another value as it is."""
    if not isinstance(by, str):
        return by
    try:
        return parse(by, PARTITIONS, trust=True, kind="partition")
    except UsageError as error:
        if isinstance(error.write, lines.Text):
            error.writing(Split(by=error.write.text))
        raise


def _instead(given: object) -> str:
    """The partition to write for a value that is none: a share of classes is the number of `Dirichlet`."""
    number = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < math.inf
    if isinstance(given, type) and issubclass(given, Partition):
        return lines.example_call(given.__name__, given)
    return f"Dirichlet({float(given)!r})" if number else ""  # type: ignore[arg-type]


def _check(partition: object, seed: object, min_rows: object) -> None:
    """Refuse arguments that are invalid for every data set."""
    if not isinstance(partition, Partition):
        instead = _instead(partition)
        raise UsageError(f"by={partition!r}.", "a partition.", write=Split(by=instead) if instead else "")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed={seed!r}.", "an integer.", write=Split(options={"seed": 0}))
    if isinstance(min_rows, bool) or not isinstance(min_rows, int) or not 1 <= min_rows < 2**31:
        raise UsageError(
            f"min_rows={min_rows!r}.",
            "an integer ≥ 1 and below 2³¹.",
            "a client without rows has no gradient.",
            Split(options={"min_rows": 1}),
        )


def _deal(partition: Partition, pool: Pool, clients: int, min_rows: int, key: Key) -> tuple[Tensor, tuple[str, ...]]:
    """Return the owner of each train row, and notes.

    The partition draws until each client has `min_rows`, at most `draws` times. Then rows are moved.
    """
    for draw in range(1, partition.draws + 1):
        owner = partition(pool, clients, key.fold("partition", draw))
        if owner.shape != (pool.rows,) or int(owner.min()) < 0 or int(owner.max()) >= clients:
            raise UsageError(
                f"{partition} returned owners of shape {tuple(owner.shape)}.",
                f"one integer in [0, {clients}) for each of the {pool.rows} train rows.",
            )
        missing = (min_rows - owner.bincount(minlength=clients)).clamp(min=0)
        short = int((missing > 0).sum())
        if partition.natural or not short:
            return owner, (f"{partition}: draw {draw} is the first with min_rows={min_rows}.",) if draw > 1 else ()
        # If m clients fall short in one draw, about one draw in e^m gives every client enough rows.
        if short > 10:
            break
    moved = with_noun(int(missing.sum()), "row was", "rows were")
    drawn = f" after {draw} draws" if draw > 1 else ""
    note = f"{partition}: {moved} moved{drawn}, to give each client min_rows={min_rows}."
    return fill_up(owner, clients, min_rows, key.fold("fill-up")), (note,)


def _leave_out(
    train: Tensor, owner: Tensor, names: tuple[str, ...], min_rows: int, by: Tensor | None
) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """Keep the natural clients with at least `min_rows` rows, renumbered; drop the others and their rows.

    Args:
        train: the train rows, int64 `[n]`.
        owner: the client of each train row, int64 `[n]`.
        names: the names of the clients.
        min_rows: the least number of train rows.
        by: the client of each row, of train rows and held-out rows; for the note.
    """
    keep = owner.bincount(minlength=len(names)) >= min_rows
    if keep.all():
        return train, owner, names, ()
    if not keep.any():
        raise UsageError(
            f"None of the {len(names)} natural clients has {min_rows} train rows.",
            f"at least one client with {min_rows} train rows.",
            write=Split(options={"min_rows": 1}),
        )
    mine = keep[owner]
    rows, left = owner.bincount(minlength=len(names)), (~keep).nonzero()[:, 0].tolist()
    whole = rows if by is None else by.bincount(minlength=len(names))
    reasons = [f"{names[i]}: {_of_rows(int(whole[i]), int(whole[i] - rows[i]))}" for i in left[:3]]
    note = (
        f"{len(left)} of {len(names)} natural clients have fewer than {min_rows} train rows; "
        f"they and their {int((~mine).sum())} train rows were left out "
        f"({'; '.join(reasons)}{'; …' if len(left) > len(reasons) else ''})."
    )
    kept = tuple(itertools.compress(names, keep.tolist()))
    return train[mine], (keep.cumsum(0) - 1)[owner[mine]], kept, (note,)


def _of_rows(rows: int, held: int) -> str:
    """The reason why a client has few train rows: it has few rows, or they were held out."""
    if not held:
        return f"{rows} row{'s' if rows != 1 else ''}"
    if held == rows:
        return (
            "its row was" if rows == 1 else "both rows were" if rows == 2 else f"all {rows} rows were"
        ) + " held out"
    return f"{held} of {rows} rows were held out"


def _refuse_unseen(train: Tensor, held: Tensor, classes: tuple[str, ...]) -> None:
    """Refuse held-out rows of a class that no train row has."""
    known = torch.zeros(max(len(classes), int(held.max()) + 1), dtype=torch.bool)
    known[train] = True
    new = (~known[held]).nonzero()
    if len(new):
        row = int(new[0])
        label = int(held[row])
        raise unseen(classes[label] if label < len(classes) else str(label), row)


def unseen(label: str, row: int) -> UsageError:
    """Build the error for a held-out row of a class that no train row has."""
    return UsageError(
        f"Held-out row {row} has label {label!r}, which no train row has.",
        "only labels that occur in training.",
        "a model cannot learn a class without train rows.",
        Split(options={"held_out": 0}),
    )
