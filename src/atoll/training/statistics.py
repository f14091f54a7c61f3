"""Statistics of the train rows of sites, by two exact gathers before round 0: around 0, and around the mean.

    Σ x → mean ;   Σ (x − mean)² → deviation ;   the rows of each class

They complete an `Input` without statistics, and give balanced class weights and the loss of a constant answer. A sum of
several sites has the bits of the sum on the joined rows, so the run has the bits of a run on the joined table.

Tests: tests/faults/test_statistics.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from msgspec import structs
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Change, Line
from atoll.data.input import Input, Statistics
from atoll.data.scale import Sums, deviation_of, exact_total, mean_of
from atoll.data.schema import Schema, TrainRows
from atoll.plan.local import Moments
from atoll.plan.plan import Plan
from atoll.plan.protocols import Tensors

Measure = Callable[[Moments], Tensors]
Scale = Literal["standard", "none"]
_COLUMNS = 128  # whose centres fit into the text of a plan
_MOST_FEATURES = 8192


def lacks_statistics(path: Path) -> bool:
    """Whether an `input.json` has a column without `centre`. A file that atoll wrote has all of them."""
    found = json.loads(path.read_bytes())
    return any("centre" not in column for column in found.get("columns", ()))


def refuse_private(plan: Plan) -> None:
    """Refuse to gather statistics for a plan with noise or with a secure sum.

    Raises:
        UsageError: the plan protects the rows, and statistics of rows would not be protected.
    """
    if plan.releases or plan.aggregator.secure is not None:
        kind = "noise" if plan.releases else "a secure sum"
        raise UsageError(
            f"The statistics of the sites are required, and the plan has {kind}.",
            "an input with the statistics of other rows, and weights for classes by their names.",
            "sums of the rows of each site would be sent without this protection.",
            Line(shell="--schema runs/pilot/input.json"),
        )


def gather_statistics(schema: Schema, measure: Measure, scale: Scale | None, scale_target: Scale | None) -> Schema:
    """The schema with the statistics of the train rows of all sites.

    Args:
        schema: the schema.
        measure: returns the sums of the rows of each site, `[sites, …]`.
        scale: whether features are scaled; None: the statistics of the input are kept, and only classes are counted.
        scale_target: whether numbers to predict are scaled, if the input has no scale for them.
    Raises:
        UsageError: a row has more features than a plan can name.
    """
    given, features = schema.described(), math.prod(schema.features) if schema.vocab is None else 0
    classes = len(schema.classes or ()) if schema.kind != "labels" else 0
    width = features + (0 if classes else math.prod(schema.target))
    if scale is None:
        counts = measure(Moments(classes=classes))["classes"].sum(0)
        return replace(schema, known=TrainRows(tuple(counts.tolist())))
    if features > _MOST_FEATURES:
        raise UsageError(
            f"A row has {features} features, and the input lacks their statistics.",
            f"at most {_MOST_FEATURES} features, or an input with statistics.",
            f"a gather measures {_COLUMNS} features.",
            Change("scale", "none"),
        )
    around, found = _measured(measure, torch.zeros(width, dtype=torch.float64), classes)
    mean = mean_of(around)
    sums, _ = _measured(measure, mean, classes)
    deviation = deviation_of(sums, mean)
    complete = bool((around.present[:features] == int(found["rows"].sum())).all())
    if scale == "standard" or not complete:
        given = _with_features(given, mean[:features], deviation[:features], scale)
    if schema.kind == "regression" and scale_target == "standard" and not given.target.spread:
        target = structs.replace(given.target, centre=_floats(mean[features:]), spread=_floats(deviation[features:]))
        given = structs.replace(given, target=target)
    rows = tuple(found["classes"].sum(0).tolist()) if classes else ()
    numbers = _floats(_population(sums)[features:]) if schema.kind == "regression" else ()
    return replace(schema, input=given, known=TrainRows(rows, numbers))


def _measured(measure: Measure, centre: Tensor, classes: int) -> tuple[Sums, Tensors]:
    """The sums around a centre over all sites, some columns at a time, and all sums of the first columns."""
    each, found = [], []
    for start in range(0, len(centre), _COLUMNS):
        part = Moments(tuple(centre[start : start + _COLUMNS].tolist()), classes, start)
        found.append(measure(part))
        each.append(part.sums_of(found[-1]))
    return Sums(*(torch.cat(parts, -1) for parts in zip(*each, strict=True))), found[0]


def _with_features(given: Input, mean: Tensor, deviation: Tensor, scale: Scale) -> Input:
    centre, spread = (mean, deviation) if scale == "standard" else (torch.zeros_like(mean), torch.ones_like(mean))
    return given.fitted(Statistics(_floats(mean), _floats(centre), _floats(spread)))


def _population(sums: Sums) -> Tensor:
    """√(Σ (x − mean)² / n)."""
    return (exact_total(sums.square) / sums.present.clamp(min=1)).sqrt()


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
