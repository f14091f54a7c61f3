"""`atoll attack`: its rows, table and chart, a training that diverges under an attack, and what it refuses."""

import json
import math

import pytest

from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.tools.attack import _attacked, try_attacks
from atoll.training.experiment import Experiment

WINE = {"data": "wine", "model": "softmax", "clients": 5, "recipe": "fedavg(lr=0.1)", "rounds": 8, "evaluate_every": 8}


def wine(**more):
    return Experiment().override(**{**WINE, **more})


def test_rows_table_and_chart(tmp_path):
    rules, attacks = ["Mean('equal')", "Median()"], ["SignFlip(30.0)", "ALIE()"]
    found = try_attacks(wine(), rules, attacks, [0.2], out=tmp_path)
    keys = [(r.attack, r.rule, r.share) for r in found.rows]
    assert keys == [(a, r, s) for a in attacks for r in rules for s in (0.0, 0.2)]
    by = {(r.attack, r.rule, r.share): r for r in found.rows}
    for name in rules:
        clean = by["ALIE()", name, 0.0]
        assert clean.accuracy == by["SignFlip(30.0)", name, 0.0].accuracy > 0.7 and clean.success == 0
        under = by["ALIE()", name, 0.2]
        assert under.success == clean.accuracy - under.accuracy
    # The mean diverges, and that is a result.
    assert math.isnan(by["SignFlip(30.0)", rules[0], 0.2].accuracy)
    assert by["SignFlip(30.0)", rules[1], 0.2].accuracy > 0.7
    assert found.plot == tmp_path / "attack.svg" and found.plot.read_bytes()[:4] == b"<svg"
    lines = found.text().splitlines()
    assert lines[1].split() == ["SignFlip(30.0)", "0", "%", "20", "%"]
    assert lines[2].split()[0] == "Mean('equal')" and lines[2].split()[2] == "diverged"
    assert list(tmp_path.iterdir()) == [found.plot]


def test_a_backdoor_opens_for_the_mean_and_not_for_the_median():
    """Attackers of rows keep the split of the experiment. The mean keeps its accuracy, and the trigger works."""
    it = Experiment().override(data="digits", clients=10, split="IID()", model="softmax", rounds=6, evaluate_every=6)
    it = it.override(recipe="fedavg(lr=0.3)")
    assert _attacked(it, "Median()", "LabelFlip()", 0.3).split == "LabelFlip(share=0.3, of=IID())"
    assert _attacked(it, "Median()", "Backdoor(1)", 0.2).data().count == 10
    found = {(r.rule, r.share): r for r in try_attacks(it, ["Mean('equal')", "Median()"], ["Backdoor(1)"], [0.2]).rows}
    assert found["Mean('equal')", 0.2].success > 0.5 > 0.1 > found["Median()", 0.2].success
    assert found["Mean('equal')", 0.0].success < 0.1
    assert found["Mean('equal')", 0.2].accuracy > found["Mean('equal')", 0.0].accuracy - 0.03
    with pytest.raises(UsageError, match="target"):
        try_attacks(it, ["Median()"], ["Backdoor(10)"], [0.2])


def test_the_command(tmp_path, capsys):
    words = "attack --data wine --model softmax --clients 5 --rounds 1 --rule Krum(1) --attack Gaussian(1.0) --seeds 2"
    words = [*words.split(), "--recipe", "fedavg(lr=0.1)", "--out", str(tmp_path)]
    assert main([*words, "--shares", "0.2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["share"] for row in rows] == [0.0, 0.2]
    assert {*rows[0]} == {"rule", "attack", "share", "accuracy", "success"}
    assert main([*words, "--shares", "a"]) == 2
    assert "--shares 0,0.1" in capsys.readouterr().err


def test_seeds_are_those_of_training_and_attackers():
    rule = _attacked(wine(seed=7), "Median()", "ALIE()", 0.2).plan().aggregator
    assert rule.seed == 7 and rule.share == 0.2


def test_refusals():
    for more, words, says in (
        ({}, {"shares": [0.5]}, "share"),
        ({}, {"rules": ["Medain()"]}, "Median"),
        ({}, {"attacks": ["Sign(5.0)"]}, "Sign"),
        ({}, {"seeds": 0}, "seeds"),
        ({}, {"rules": ["Median()"], "attacks": ["ALIE()"], "shares": [0.1]}, "no client attacks"),
        ({"data": "diabetes", "model": "linear"}, {}, "classes"),
    ):
        with pytest.raises(UsageError, match=says):
            try_attacks(wine(**more), **words)
