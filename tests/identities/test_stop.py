"""Each stop rule ends a run in the round of its definition, and its memory consists of JSON values."""

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

import atoll
from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import parse
from atoll.training.stop import (
    RULES,
    Bytes,
    Diverged,
    Outcome,
    Patience,
    Rounds,
    Seconds,
    Target,
    Tolerance,
    each,
    refuse_unknown,
    update,
)


@dataclass
class Report:
    round: int
    metrics: dict = field(default_factory=dict)
    seconds: float = 1.0
    bytes_up: int = 0
    bytes_down: int = 0


def end(rules, reports):
    """(round, outcome) of the first report that ends the run, or None; the memory passes through JSON every round."""
    memory = {}
    for report in reports:
        before = json.dumps(memory, allow_nan=False)
        after, outcome = update(rules, memory, report)
        assert json.dumps(memory) == before
        memory = json.loads(json.dumps(after, allow_nan=False))
        if outcome:
            return report.round, outcome
    return None


def series(name, values, start=0):
    return [Report(t, {} if v is None else {name: v}) for t, v in enumerate(values, start)]


@given(st.integers(1, 30), st.integers(0, 1))
def test_rounds(n, start):
    assert end(Rounds(n), series("loss", [1.0] * 40, start))[0] == n - 1 + start


def test_seconds_and_bytes_add_up():
    assert end(Seconds(2.5), [Report(t, seconds=1.0) for t in range(9)])[0] == 2
    assert end(Bytes(100), [Report(t, bytes_up=10, bytes_down=25) for t in range(9)])[0] == 2
    assert end(Bytes(106), [Report(t, bytes_up=10, bytes_down=25) for t in range(3)]) is None


@given(st.lists(st.floats(0, 2), max_size=30), st.integers(1, 3))
def test_gradient_tolerance(norms, patience):
    ended = end(Tolerance(gradient=1.0, patience=patience), series("gradient_norm", norms))
    runs = [t for t in range(patience - 1, len(norms)) if max(norms[t - patience + 1 : t + 1]) <= 1.0]
    assert (ended[0] if ended else None) == (runs[0] if runs else None)


def test_loss_tolerance():
    assert end(Tolerance(loss=0.1), series("loss", [5.0, 3.0, 2.9]))[0] == 2
    assert end(Tolerance(loss=0.01), series("loss", [5.0, 3.0, 2.9])) is None
    assert end(Tolerance(loss=1e-3), series("loss", [2000.0, 1000.0, 999.5]))[0] == 2
    assert end(Tolerance(loss=1e-3, patience=2), series("loss", [3, 1, 1, 0.5, 0.5, 0.5]))[0] == 5
    assert end(Tolerance(loss=0.0), series("loss", [3, math.nan, math.nan, 3.0]))[0] == 3
    assert end(Tolerance(gradient=1e-9, loss=0.0), series("loss", [3, None, 3]))[0] == 2


def test_target_knows_up_from_down():
    assert end(Target("accuracy", 0.9), series("accuracy", [0.5, None, 0.89, 0.9]))[0] == 3
    assert end(Target("loss", 0.9), series("loss", [1.5, 0.91, 0.9]))[0] == 2
    assert end(Target("held_out_rmse", 0.9), series("held_out_rmse", [1.5, 0.8]))[0] == 1
    assert end(Target("margin", above=2), series("margin", [1, 3]))[0] == 1
    assert end(Target("margin", below=2), series("margin", [3, 1]))[0] == 1
    assert end(Target("accuracy", below=0.1), series("accuracy", [0.5, 0.05]))[0] == 1
    assert end(Target("loss", 0.9), series("loss", [math.nan] * 9)) is None


def test_patience():
    assert end(Patience("loss", 2), series("loss", [3, 2, 2, 2]))[0] == 3
    assert end(Patience("accuracy", 2), series("accuracy", [0.1, 0.2, 0.2, 0.3, 0.3, 0.2]))[0] == 5
    assert end(Patience("loss", 3), series("loss", [3, None, None, 3]))[0] == 3
    assert end(Patience("loss", 2, min_delta=0.5), series("loss", [3, 2.6, 2.5, 1.9, 1.8, 1.7]))[0] == 2
    assert end(Patience("margin", 1, better="higher"), series("margin", [1, 2, 2]))[0] == 2
    assert end(Patience("loss", 2), series("loss", [math.nan] * 9))[0] == 2


def test_diverged_when_not_finite():
    for name in ("loss", "gradient_norm"):
        for bad in (math.nan, math.inf):
            t, outcome = end(Diverged(), series(name, [1.0, bad]))
            assert t == 1 and outcome.failed


def test_diverged_when_far_above_the_first():
    grown = [1.0, 11, 11, 11, 11, 2, 11, 11, 11, 11, 11, 11]
    assert end(Diverged(), series("loss", grown))[0] == 10
    assert end(Diverged(), series("loss", [1.0, *[10.0] * 9])) is None
    assert end(Diverged(), series("loss", [-1.0, *[7.9] * 9])) is None
    assert end(Diverged(factor=2, rounds=1), series("loss", [-1.0, 0.1]))[0] == 1
    assert end(Diverged(), series("loss", [0.0, *[1e-14] * 9])) is None
    assert end(Diverged(), series("loss", [None, 1.0, *[11.0] * 5]))[0] == 6


def test_a_divergence_is_an_error_that_names_lr_and_its_finder():
    _, outcome = end(Diverged(), series("loss", [1.0, math.nan]))
    error = outcome.error()
    assert isinstance(error, RunError) and error.exit_code == 1
    assert "learning rate lr" in str(error) and error.line == "atoll lr" and "round 1" in str(error)


def test_rules_side_by_side():
    assert end((Rounds(5), Target("loss", 1.0)), series("loss", [3, 2, 1, 1]))[0] == 2
    t, outcome = end((Rounds(2), Diverged()), series("loss", [1.0, math.nan]))
    assert t == 1 and outcome.failed
    assert end((Rounds(9), (Rounds(3), Rounds(4))), series("loss", [1.0] * 9))[0] == 2
    names = [name for name, _ in each((Rounds(9), (Rounds(3), Diverged())))]
    assert names == ["Rounds", "Rounds 2", "Diverged"]
    assert end((), series("loss", [1.0] * 9)) is None


def test_other_rules_on_resume():
    """After a resume with more rounds a rule continues to count; a new rule starts from zero."""
    memory = {}
    for report in series("loss", [1.0] * 3):
        memory, _ = update(Rounds(3), memory, report)
    longer = (Patience("loss", 9), Rounds(5))
    memory, outcome = update(longer, memory, Report(3, {"loss": 1.0}))
    assert outcome is None
    assert update(longer, memory, Report(4, {"loss": 1.0}))[1] == Outcome("Finished 5 rounds.")


EVERY = [
    Rounds(100),
    Seconds(60),
    Bytes(10**9),
    Tolerance(gradient=1e-6),
    Tolerance(loss=1e-6, patience=3),
    Target("accuracy", 0.95),
    Target("margin", above=2),
    Patience("loss", 10),
    Patience("margin", 10, min_delta=0.1, better="lower"),
    Diverged(),
    Diverged(factor=5, rounds=2),
]


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_prints_as_its_constructor(rule):
    again = parse(repr(rule), RULES)
    assert again == rule and hash(again) == hash(rule) and repr(again) == repr(rule)
    assert json.loads(json.dumps(rule.init(), allow_nan=False)) == rule.init()


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_a_round_without_metrics_ends_nothing(rule):
    memory, outcome = rule.update(rule.init(), Report(0, {}))
    assert outcome is None and memory.keys() == rule.init().keys()


def test_every_rule_is_here():
    assert {type(rule) for rule in EVERY} == set(RULES.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rounds(0),
        lambda: Rounds(2.5),
        lambda: Rounds("ten"),
        lambda: Seconds(0),
        lambda: Bytes(-1),
        lambda: Tolerance(),
        lambda: Tolerance(gradient=-1),
        lambda: Tolerance(loss=math.nan),
        lambda: Tolerance(gradient=1, patience=0),
        lambda: Target("accuracy"),
        lambda: Target("margin"),
        lambda: Target("margin", 0.9),
        lambda: Target("accuracy", 0.9, below=0.1),
        lambda: Target("accuracy", math.nan),
        lambda: Target("", 0.9),
        lambda: Target(3, 0.9),
        lambda: Target("", math.nan, above=3),
        lambda: Tolerance(patience=0),
        lambda: Patience("loss", 0),
        lambda: Patience("margin", 3),
        lambda: Patience("loss", 3, better="up"),
        lambda: Patience("loss", 3, min_delta=-1),
        lambda: Diverged(factor=1),
        lambda: Diverged(rounds=0),
        lambda: list(each(3)),
        lambda: list(each((Rounds(1), Rounds))),
        lambda: refuse_unknown(Target("acuracy", above=0.9), ["accuracy", "loss"]),
        lambda: refuse_unknown((Rounds(3), Patience("lss", 3, better="lower")), ["accuracy", "loss", "odd"]),
        lambda: refuse_unknown(Tolerance(gradient=1e-6), ["loss"]),
    ],
)
def test_refuses_with_a_line_that_builds(make):
    with pytest.raises(UsageError) as refusal:
        make()
    assert refusal.value.required
    assert repr(parse(refusal.value.line, RULES)) == refusal.value.line


def test_known_metrics_pass():
    refuse_unknown(EVERY, ["loss", "gradient_norm", "accuracy", "margin"])


def test_a_rule_of_the_user_replaces_the_default_one():
    data = atoll.data.load("wine").split(2)
    rules = atoll.rounds("softmax", data, atoll.recipes.fedavg(0.1), rounds=1, stop=[Diverged(factor=100)]).rules
    assert [rule for _, rule in each(rules)] == [Rounds(1), Diverged(factor=100)]


def test_a_metric_without_a_similar_name_has_no_line():
    with pytest.raises(UsageError, match="needs the metric 'brightness'") as refusal:
        refuse_unknown(Target("brightness", above=0.9), ["accuracy", "loss"])
    assert not refusal.value.line


@pytest.mark.parametrize(
    ("plan", "settings"), [("fedavg(0.1)", {}), ("fedavg(0.1)", {"evaluate": "clients"}), ("ditto(0.1)", {})]
)
def test_the_names_of_metrics_are_those_of_a_round(plan, settings):
    """A rule on any reported metric is accepted, also on one over clients."""
    data = atoll.data.load("wine").split(4)
    training = atoll.rounds("softmax", data, plan, rounds=1, **settings)
    assert sorted(training.metric_names) == sorted(training.next().metrics)
    for name in training.metric_names:
        atoll.rounds("softmax", data, plan, rounds=1, stop=Target(name, above=0.5), **settings)
