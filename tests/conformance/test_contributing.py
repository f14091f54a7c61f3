"""The examples of CONTRIBUTING.md work unchanged outside the package: a new rule, a new recipe, a run, a check."""

import ast
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from problems import classification, run, seeded, task_of

from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.aggregate import Mean
from atoll.plan.local import Dynamic, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Each block names its file in its first line.
BLOCKS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))


def lines_of(name):
    return [line for line in BLOCKS[name].splitlines() if line.strip()]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Write the blocks as modules to a folder and import them by name; the imports are undone afterwards."""
    for name, code in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module
    for name in BLOCKS:
        sys.modules.pop(name, None)


def test_sizes():
    """An aggregator in at most 20 lines and FedDyn in at most 25, imports included, and a recipe in one."""
    assert list(BLOCKS) == ["vote", "recipes_of_mine", "train", "test_vote", "dyn"]
    assert len(lines_of("vote")) <= 20 and len(lines_of("dyn")) <= 25
    (recipe,) = [node for node in ast.parse(BLOCKS["recipes_of_mine"]).body if not isinstance(node, ast.ImportFrom)]
    assert recipe.lineno == recipe.end_lineno


def test_rule_keeps_its_contract(modules):
    modules("test_vote").test_vote()


def test_recipe_trains(modules, capsys):
    """The example's run reaches the accuracy of gradient steps with sign steps, as its paper claims."""
    run = modules("train").run
    assert float(capsys.readouterr().out) == run.metrics["accuracy"] >= 0.93
    assert run.rounds == 50 and run.reports[0].metrics["loss"] > 2 * run.metrics["loss"]


@pytest.mark.parametrize("numerics", ["lanes", "fused"])
def test_feddyn_outside_the_package_is_that_of_the_package(modules, numerics):
    """Five rounds of some clients, with a round in which no contribution arrives."""
    data = classification((12, 9, 9, 7), dtype=torch.float64)

    def theta(correction):
        plan = Plan(Train(sgd(0.1), epochs=1, batch=4, correction=correction), Mean(), cohort=2, max_failed=1.0)
        task = task_of(seeded(torch.nn.Linear, 4, 3), data, numerics, torch.float64)
        state, reports = run(plan, InProcessEngine(task, data, fleet=Fleet(dropout=0.5)), 5)
        assert any(not report.arrived for report in reports)
        return state.model.theta

    torch.testing.assert_close(theta(modules("dyn").Dyn(0.3)), theta(Dynamic(0.3)), rtol=1e-12, atol=1e-12)


def test_text_of_the_rule(modules):
    """`vote:Vote()` is accepted from a trusted source and refused from any other."""
    assert parse("vote:Vote()", PARTS, trust=True) == modules("vote").Vote()
    with pytest.raises(UsageError, match="names code outside atoll"):
        parse("vote:Vote()", PARTS)


def test_refused_with_a_codec_that_decodes_the_sum(modules):
    from atoll.plan.codec import Identity
    from atoll.plan.local import Gradient

    @dataclass(frozen=True, repr=False)
    class Undone(Identity):
        per_sum = True

    with pytest.raises(UsageError) as refusal:
        Plan(Gradient(), aggregator=modules("vote").Vote(), codec=Undone())
    Plan(Gradient(), aggregator=parse(refusal.value.line, PARTS), codec=Undone())


def test_names_in_the_page_exist():
    """The files, commands, checks and tables that the page mentions exist."""
    import atoll.testing

    for name in re.findall(r"`(check_\w+)[`(]", TEXT):
        assert name in atoll.testing.__all__
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"`(setup|demo|test|test-all|check|docs|bench)`|^make ([\w-]+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{verb[0] or verb[1]}:", makefile, re.MULTILINE)
    for path in re.findall(r"`((?:tests|src|plan|data|models|engine)/[\w/.]+?)/?`", TEXT):
        assert any((base / path).exists() for base in (ROOT, ROOT / "src" / "atoll")), path
    for table, file in re.findall(r"`(OURS|RECIPES|ENGINES)` of `(?:tests/conformance/)?(test_\w+\.py)`", TEXT):
        assert f"\n{table} = " in (ROOT / "tests" / "conformance" / file).read_text(encoding="utf-8")
