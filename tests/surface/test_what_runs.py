"""The page of rules for user code is up to date, and its pages and tests exist."""

import importlib.util
from pathlib import Path

import pytest

from atoll.compute.user_code import RULES

ROOT = Path(__file__).parents[2]


def made(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


@pytest.mark.parametrize("name", ["what_runs", pytest.param("what_combines", marks=pytest.mark.slow)])
def test_the_page_is_generated(name):
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == made(name), f"run python docs/{name}.py"


def test_each_rule_has_an_outcome_a_backend_and_a_test():
    assert len({rule.code for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.outcome in ("carried", "reset", "refused")
        assert bool(rule.backend) == (rule.outcome != "refused"), rule.code
        assert (ROOT / rule.test).is_file(), rule.test


def test_other_pages_link_to_it():
    for name in ("models", "data", "errors"):
        assert "what_runs.md" in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), name
    assert "what_runs" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
