"""Robust rules under simulated attacks: 20 clients of digits, four of them attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from atoll.tools.attack import ATTACKS, try_attacks
from atoll.training.experiment import Experiment

from .rows import Means, Result, Row, Table

RULES = (
    *("Mean('equal')", "Median()", "TrimmedMean(0.2)", "Krum(4, m=12)", "GeometricMedian()", "CenteredClip(1.0)"),
    *("NormBound(1.0)", "Bulyan(4)", "DnC(4)", "FLTrust(0)", "Bucketing(2, Median())", "Foundation(Median())"),
)
ALL = (*ATTACKS, "Claim(1000000000, of=SignFlip(5.0))", "LabelFlip(0.2)")
CLEAN = "no attack"
MAY_LOSE = 0.03
SHARE = 0.2
WORDS = {
    "data": "digits", "model": "softmax", "clients": 20, "split": "Dirichlet(1.0)",
    "recipe": "fedavg(lr=0.3, epochs=2, batch=10)",
}  # fmt: skip


def _rule(rule: str) -> Callable[[int, int | None, Path | None], Result]:
    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        it, start = Experiment().override(rounds=rounds or 15, seed=seed, **WORDS), time.perf_counter()
        found = try_attacks(it, [rule], ALL, [SHARE]).rows
        cells = {CLEAN: found[0].accuracy} | {row.attack: row.accuracy for row in found if row.share}
        return Result(cells, rounds or 15, time.perf_counter() - start)

    return run


def _remarks(means: Means) -> list[str]:
    """The attacks under which each rule fails, the best rule under each attack, and the best one under all."""
    clean = means.get((RULES[0], CLEAN))
    if clean is None:
        return ["Losses are relative to the mean without an attack: add its row, Mean('equal')."]
    found, largest = [f"A rule fails if it loses more than {MAY_LOSE} against the mean without an attack."], {}
    for rule in RULES:
        if (rule, CLEAN) not in means:
            continue
        losses = {attack: clean - means.get((rule, attack), 0.0) for attack in ALL}  # diverged: it has no accuracy
        failed = [attack for attack, loss in losses.items() if loss > MAY_LOSE]
        largest[rule] = max(losses.values())
        found.append(f"{rule:24}{'fails under ' + ', '.join(failed) if failed else 'holds under every attack'}")
    for attack in ALL:
        value, rule = max((means.get((rule, attack), 0.0), rule) for rule in largest)
        found.append(f"{attack}: the best rule, {rule}, loses {clean - value:.3f} (required: {MAY_LOSE}).")
    best = min(largest, key=lambda rule: largest[rule])
    found.append(f"Over all attacks {best} loses least, at most {largest[best]:.3f}.")
    return found


def robust() -> Table:
    """Accuracy of each rule without an attack and under each attack, share 0.2."""
    return Table({rule: Row(_rule(rule)) for rule in RULES}, "0-2", remarks=_remarks)
