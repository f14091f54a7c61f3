"""Train an experiment under simulated attacks: each rule, attack and share of attackers.

    atoll attack --rule "Median()" --attack "SignFlip(5.0)" --shares 0,0.1,0.2,0.3

Tests: tests/surface/test_attack.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from atoll.base import grammar
from atoll.base.errors import RunError, UsageError
from atoll.base.files import write_output
from atoll.base.lines import Line
from atoll.data.partition import Backdoor, LabelFlip
from atoll.data.shift import with_trigger
from atoll.report.chart import Axis, Drawing, Panel, Series
from atoll.runs.predictor import outputs_of
from atoll.training.experiment import Experiment

RULES = ("Mean('equal')", "Median()", "TrimmedMean(0.3)", "GeometricMedian()")
ATTACKS = ("SignFlip(5.0)", "Gaussian(1.0)", "ALIE()", "InnerProduct(0.5)")
SHARES = (0.0, 0.1, 0.2, 0.3)
_OF_ROWS = {"LabelFlip": LabelFlip, "Backdoor": Backdoor}  # attacks that are partitions: attackers have other rows


@dataclass(frozen=True)
class Row:
    """The result of one rule, attack and share, as a mean over seeds.

    Args:
        rule, attack: the texts of the parts.
        share: the share of attackers.
        accuracy: the accuracy on held-out rows after the last round; NaN if a training diverged before.
        success: the accuracy of the rule without attackers minus `accuracy`; under `Backdoor` the share of the held-out
            rows of other classes that a trigger turns into the target.
    """

    rule: str
    attack: str
    share: float
    accuracy: float
    success: float


@dataclass(frozen=True)
class Attacks:
    """The results of `try_attacks`.

    Args:
        rows: the results, by attack, rule and share.
        seeds: the number of seeds.
        plot: the chart; None if none was requested.
    """

    rows: tuple[Row, ...]
    seeds: int
    plot: Path | None = None

    def text(self) -> str:
        """Format the accuracies as a table: a line for each attack and rule, a column for each share."""
        shares = sorted({row.share for row in self.rows})
        wide = max(len(row.rule) for row in self.rows)
        lines = [f"accuracy after the last round{f', mean of {self.seeds} seeds' if self.seeds > 1 else ''}"]
        for attack in dict.fromkeys(row.attack for row in self.rows):
            lines.append(f"{attack:<{wide + 2}}" + "".join(f"{100 * share:>8.3g} %" for share in shares))
            for rule in dict.fromkeys(row.rule for row in self.rows):
                found = [row.accuracy for row in self.rows if (row.attack, row.rule) == (attack, rule)]
                lines.append(f"  {rule:<{wide}}" + _cells(found))
            if attack.startswith("Backdoor"):
                lines.append("  rows that the trigger turns into the target")
                for rule in dict.fromkeys(row.rule for row in self.rows):
                    found = [row.success for row in self.rows if (row.attack, row.rule) == (attack, rule)]
                    lines.append(f"  {rule:<{wide}}" + _cells(found))
        return "\n".join(lines + ([f"plot: {self.plot}"] if self.plot else []))


def _cells(values: Sequence[float]) -> str:
    return "".join(f"{value:>10.3f}" if value == value else "  diverged" for value in values)


def try_attacks(
    experiment: Experiment,
    rules: Sequence[str] = RULES,
    attacks: Sequence[str] = ATTACKS,
    shares: Sequence[float] = SHARES,
    seeds: int = 1,
    out: Path | None = None,
) -> Attacks:
    """Train an experiment with each rule under each attack, for each share of attackers.

    A rule is trained without attackers once for all attacks. No run folder is written. A seed is that of the training,
    of the split and of the attackers.

    Args:
        experiment: the experiment; its aggregator is replaced.
        rules: texts of aggregators.
        attacks: texts of attacks, also of the partitions `LabelFlip` and `Backdoor`; their share and partition are set.
        shares: shares of attackers, in [0, 0.5). 0 is added for the comparison.
        seeds: the number of seeds, ≥ 1, from that of the experiment.
        out: a folder for the chart attack.svg, or a file; None draws none.
    Returns:
        the accuracies.
    Raises:
        UsageError: a part or a share is refused, or the rows have no classes.
        RunError: a training failed for another reason than that it diverged.
    Example:
        >>> it = Experiment().override(data="wine", model="softmax", clients=5, rounds=2, recipe="fedavg(lr=0.1)")
        >>> [row.share for row in try_attacks(it, ["Median()"], ["ALIE()"], [0.2]).rows]
        [0.0, 0.2]
    """
    if seeds < 1:
        raise UsageError(f"seeds = {seeds}.", "at least one.", write=Line(python="seeds=5", shell="--seeds 5"))
    experiment = experiment.resolved()
    if experiment.source.classes is None:
        raise UsageError(
            "atoll attack with rows that have no classes.", "rows with classes.", "it compares accuracies.", "atoll run"
        )
    levels = sorted({0.0, *shares})
    tried = [experiment.override(seed=experiment.seed + i) for i in range(seeds)]
    plans = {
        (rule, one, share): [_attacked(it, rule, one, share) for it in tried]
        for one in attacks
        for rule in rules
        for share in levels
    }
    for its in plans.values():
        for it in its:
            it.plan()  # a wrong part is refused before the first training
    found: dict[tuple[str, str, float], tuple[float, float]] = {}
    rows = []
    for (rule, one, share), its in plans.items():
        door = _of_rows(one)
        known = (rule, one if share or isinstance(door, Backdoor) else "", share)
        if known not in found:
            accuracies, opened = zip(*(_trained(it, door) for it in its), strict=True)
            found[known] = fmean(accuracies), fmean(opened)
        accuracy, success = found[known]
        if not isinstance(door, Backdoor):
            success = found[rule, "", 0.0][0] - accuracy
        rows.append(Row(rule, one, share, accuracy, success))
    result = Attacks(tuple(rows), seeds)
    return result if out is None else replace(result, plot=draw_attacks(result, out))


def _of_rows(one: str) -> LabelFlip | Backdoor | None:
    """The attack of rows that a text describes; None: another attack."""
    if one.partition("(")[0].strip() not in _OF_ROWS:
        return None
    return grammar.parse(one, _OF_ROWS, kind="attack")  # type: ignore[no-any-return]


def _attacked(it: Experiment, rule: str, one: str, share: float) -> Experiment:
    rows = _of_rows(one)
    if rows is not None and share:
        own = {f.name: vars(rows)[f.name] for f in fields(rows) if f.name != "of"} | {"share": share}
        words = ", ".join(f"{name}={value!r}" for name, value in own.items())
        split = f"{type(rows).__name__}({words}, of={it.split})"
        return it.override(split=split).with_settings({"plan.aggregator": rule})
    text = f"Attacked({rule}, {one}, share={share!r}, seed={it.seed})" if share else rule
    return it.with_settings({"plan.aggregator": text})


class _Ended:
    """An observer that keeps the metrics of a run, also if the training diverged: under an attack that is a result."""

    run: Any = None

    def end(self, run: Any) -> None:
        self.run = run


def _trained(it: Experiment, door: LabelFlip | Backdoor | None) -> tuple[float, float]:
    """The accuracy, and the share of rows that the trigger of a backdoor turns into its target; NaN if it diverged."""
    ended = _Ended()
    try:
        it.train(out=None, baselines=False, report=False, progress="none", observers=(ended,))
    except RunError:
        if ended.run is None:
            raise
    accuracy = ended.run.metrics.get("accuracy", math.nan)
    held_out = it.data().held_out
    if not isinstance(door, Backdoor) or held_out is None or math.isnan(accuracy):
        return accuracy, math.nan
    x, y = held_out.take(torch.arange(len(held_out)))
    outputs = outputs_of(ended.run.model, with_trigger(x[y != door.target], door.size, door.value))
    chosen = outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()
    return accuracy, float((chosen == door.target).double().mean())


def draw_attacks(found: Attacks, out: Path) -> Path:
    """Draw the accuracy over the share of attackers: a panel for each attack, and a line for each rule.

    Args:
        found: the results.
        out: a folder, or a file whose suffix is the format.
    Returns:
        the path of the file.
    """
    from atoll.report.export import rendered

    file = out if out.suffix in (".svg", ".png", ".pdf") else out / "attack.svg"
    write_output(file, rendered(_drawing(found), file.suffix[1:]))
    return file


def _drawing(found: Attacks) -> Drawing:
    panels = []
    for name in dict.fromkeys(row.attack for row in found.rows):
        lines = []
        for i, rule in enumerate(dict.fromkeys(row.rule for row in found.rows)):
            its = [row for row in found.rows if (row.attack, row.rule) == (name, rule)]
            lines.append(Series([row.share for row in its], [row.accuracy for row in its], f"s{i % 8}", rule))
        x, y = Axis("share of attackers", unit="share"), Axis("accuracy", low=0.0)
        panels.append(Panel(lines, name, x=x, y=y, names="top"))
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    alt = "Accuracy over the share of attackers, a line for each rule."
    return Drawing("attack", alt, pairs, wide=len(panels) > 1, ratio=0.45 * max(1, len(pairs)))
