"""Public classes and functions of different modules that share a name: at most ten, each with a reason."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "atoll"

# name: its modules, and the reason
ALLOWED = {
    "Engine": (
        {"engine/protocols.py", "plan/round.py"},
        "the running engine, and the members that a round reads of it",
    ),
    "Ready": (
        {"engine/workers/messages.py", "net/wire.py"},
        "a message of a worker process, and of a client of a network",
    ),
    "compare": ({"cli/app.py", "tools/compare.py"}, "the command, and the tool that it calls"),
    "export": ({"cli/app.py", "tools/export.py"}, "the command, and the tool that it calls"),
    "join": ({"plan/schedule.py", "training/serve.py"}, "`atoll.join`, and the schedule of plan texts"),
    "serve": ({"cli/net_commands.py", "training/serve.py"}, "the command, and `atoll.serve`"),
    "replay": ({"cli/app.py", "tools/replay.py"}, "the command, and the tool that it calls"),
    "load": ({"base/names.py", "data/named.py", "training/experiment.py"}, "of a name, of a data set, of a model"),
    "sgd": ({"plan/optimizer/rules.py", "recipes.py"}, "the update rule, and the recipe; plan texts contain both"),
    "step": ({"plan/round.py", "plan/schedule.py"}, "a round, and the step schedule; plan texts contain the latter"),
}
IN_ONE_PACKAGE = {"step"}  # both names are fixed: `atoll.step`, and `step(...)` in plan texts


def modules_by_name(files: dict[str, str]) -> dict[str, set[str]]:
    """The modules that define each public top-level class or function."""
    found = defaultdict(set)
    for file, text in files.items():
        for node in ast.parse(text).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name[0] != "_":
                found[node.name].add(file)
    return found


def homonyms(files: dict[str, str]) -> dict[str, set[str]]:
    return {name: modules for name, modules in modules_by_name(files).items() if len(modules) > 1}


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    return homonyms({str(p.relative_to(SRC)): p.read_text(encoding="utf-8") for p in SRC.rglob("*.py")})


def test_homonyms_are_the_allowed_ones(found):
    assert found == {name: modules for name, (modules, _) in ALLOWED.items()}
    assert len(ALLOWED) <= 10


def test_no_homonym_is_within_a_package(found):
    packages = {name: [module.partition("/")[0] for module in modules] for name, modules in found.items()}
    assert {name for name, of in packages.items() if len(set(of)) < len(of)} == IN_ONE_PACKAGE


def test_homonyms_are_found():
    files = {
        "a.py": "def f(): ...\nclass G: ...",
        "b/c.py": "async def f(): ...\ndef _h(): ...",
        "d.py": "def _h(): ...",
    }
    assert homonyms(files) == {"f": {"a.py", "b/c.py"}}
