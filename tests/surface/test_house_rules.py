"""Rules of this project that no general tool checks. Each is tested on a line that breaks it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # `make check` runs this file
ROOT = Path(__file__).parents[2]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LATE = {"matplotlib", "sklearn", "pandas", "scipy"}
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".html", ".js", ".css", ".json", ".yml", ".rst", ""}

Found = Iterator[tuple[int, str]]


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords}


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call, with its whole dotted name and the last part of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            last = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            yield node, ast.unparse(node.func), last


def imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, (node.module or "").split(".")[0]


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run on import, without function bodies and imports for type checkers."""
    for child in ast.iter_child_nodes(node):
        typing = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not isinstance(child, FUNCTIONS) and not typing:
            yield child
            yield from on_import(child)


def leaves_the_device(tree: ast.Module) -> Found:
    for call, _, last in calls(tree):
        if isinstance(call.func, ast.Attribute) and last in {"cpu", "numpy", "item"}:
            yield call.lineno, f".{last}() in a part"


def asserts(tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert vanishes under -O; raise UsageError or RunError"


def runs_code(tree: ast.Module) -> Found:
    for line, name in imported(ast.walk(tree)):
        if name in UNSAFE:
            yield line, f"import {name}"
    for call, name, _ in calls(tree):
        given = keywords(call)
        if name in {"eval", "exec", "compile", "__import__"}:
            yield call.lineno, f"{name}()"
        elif name == "torch.load" and given.get("weights_only") != "True":
            yield call.lineno, "torch.load without weights_only=True"
        elif given.get("allow_pickle", "False") != "False":
            yield call.lineno, "allow_pickle"


def sleeps(tree: ast.Module) -> Found:
    for call, name, last in calls(tree):
        nothing = [ast.unparse(argument) for argument in call.args] == ["0"]
        if last == "sleep" and not (name == "asyncio.sleep" and nothing):
            yield call.lineno, f"{name}(): wait for what is awaited instead"


def imports_early(tree: ast.Module) -> Found:
    for line, name in imported(on_import(tree)):
        if name in LATE:
            yield line, f"import {name} inside the function that needs it"


def too_long(tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            arguments = node.args
            given = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > 70:
                yield node.lineno, f"{node.name} has {length} lines, more than 70"
            if given > 12:
                yield node.lineno, f"{node.name} has {given} parameters, more than 12"


def rebuilds_classes(tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and "serialize" in f"{node.module}.{[a.name for a in node.names]}":
            yield node.lineno, "serialize rebuilds any class by its name: bytes of a network must not reach it"


ENGINE_NAMES = {"inprocess", "processes", "torchrun", "ray"}
ENGINE_CLASSES = {"InProcess", "Processes", "Torchrun", "Ray"}
ENGINE_CLASSES |= {f"{name}Engine" for name in ENGINE_CLASSES} | {"WorkerEngine"}


def words(node: ast.AST) -> set[str]:
    """The texts and the last parts of the names in an expression."""
    found = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def compares_engines(tree: ast.Module) -> Found:
    """A comparison, a `case` or an `isinstance` that contains the name or the class of an engine."""
    for node in ast.walk(tree):
        tested: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            tested = [node]
        elif isinstance(node, ast.match_case):
            tested = [node.pattern]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            tested = list(node.args[1:])
        for part in tested:
            if found := words(part) & (ENGINE_NAMES | ENGINE_CLASSES):
                yield part.lineno, f"asks for the engine {', '.join(sorted(found))}"


def names_no_tests(tree: ast.Module) -> Found:
    """A module docstring that does not end with `Tests: tests/…`, or names a file that does not exist."""
    last = " ".join((ast.get_docstring(tree) or "").split("\n\n")[-1].split())
    if tree.body and not re.fullmatch(r"Tests: (tests/[\w/]+\.py, )*tests/[\w/]+\.py\.?", last):
        yield 1, "the module docstring does not end with the line `Tests: tests/…`"
    yield from (
        (1, f"{name} does not exist") for name in re.findall(r"tests/[\w/]+\.py", last) if not (ROOT / name).exists()
    )


ABOVE_ENGINES = [f"src/atoll/{package}" for package in ("training", "tools", "report", "cli")]

# rule, its folders, a line that breaks it, a line that does not
RULES = [
    (leaves_the_device, ["src/atoll/plan"], "x.sum().item()", "x.items(); device('cpu')"),
    (asserts, ["src"], "assert x > 0", "raise ValueError(x)"),
    (runs_code, ["src"], "import pickle", "import msgspec"),
    (runs_code, ["src"], "from joblib import load", "from safetensors import safe_open"),
    (runs_code, ["src"], "torch.load(path)", "torch.load(path, weights_only=True)"),
    (runs_code, ["src"], "numpy.load(path, allow_pickle=True)", "numpy.load(path, allow_pickle=False)"),
    (runs_code, ["src"], "eval(text)", "model.eval(); re.compile('x')"),
    (sleeps, ["src", "tests"], "time.sleep(1)", "event.wait(1)"),
    (sleeps, ["src", "tests"], "await asyncio.sleep(.1)", "await asyncio.sleep(0)"),
    (imports_early, ["src"], "import matplotlib.pyplot as plt", "def draw():\n    import matplotlib"),
    (imports_early, ["src"], "try:\n    import pandas\nfinally:\n    pass", "import numpy"),
    (rebuilds_classes, ["src/atoll/net"], "from atoll.engine.workers import serialize", "from atoll.base import names"),
    (
        rebuilds_classes,
        ["src/atoll/net"],
        "from ..workers.serialize import deserialize",
        "from ..base.names import load",
    ),
    (compares_engines, ABOVE_ENGINES, "if engine == 'torchrun': pass", "text = f'--engine {name}'"),
    (compares_engines, ABOVE_ENGINES, "alone = name in ('ray', 'processes')", "field in spec.fields"),
    (compares_engines, ABOVE_ENGINES, "isinstance(engine, (a.TorchrunEngine, int))", "InProcessEngine(task, data)"),
    (compares_engines, ABOVE_ENGINES, "type(engine) is InProcess", "engine: InProcess = InProcess()"),
    (compares_engines, ABOVE_ENGINES, "match engine:\n    case Ray(): pass", "match engine:\n    case None: pass"),
    (names_no_tests, ["src"], "import os", '"""One line.\n\nTests: tests/surface/test_cli.py\n"""'),
    (names_no_tests, ["src"], '"""One line.\n\nTests: tests/nothing.py\n"""', ""),
    (too_long, ["src"], "def f():\n" + "    x\n" * 70, "def f():\n" + "    x\n" * 69),
    (too_long, ["src"], "def f(a, b, c, d, e, f, g, h, i, j, k, l, *, m): ...", "def f(a, *, b): ..."),
]
# rule and file: the reason
EXEMPT = {
    (imports_early, "src/atoll/sklearn.py"): "its classes inherit from scikit-learn, and nothing of atoll imports it",
    (too_long, "src/atoll/training/train.py"): "users write the arguments of train by keyword",
    (too_long, "src/atoll/training/serve.py"): "users write the arguments of serve by keyword",
    (sleeps, "src/atoll/net/loop.py"): "a socket that is closed by the loop gives no signal",
    (too_long, "src/atoll/sklearn.py"): "an estimator lists its parameters in the constructor",
}
EACH = list({rule: where for rule, where, _, _ in RULES}.items())


def python(where: list[str]) -> Iterator[Path]:
    for folder in where:
        yield from sorted((ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("rule", "where"), EACH, ids=[rule.__name__ for rule, _ in EACH])
def test_house_rule(rule, where):
    files = [path for path in python(where) if (rule, str(path.relative_to(ROOT))) not in EXEMPT]
    broken = [f"{path.relative_to(ROOT)}:{line} {what}" for path in files for line, what in rule(tree(path))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("rule", "where", "bad", "good"), RULES)
def test_a_rule_finds_its_violations(rule, where, bad, good):
    assert list(rule(ast.parse(bad)))
    assert not list(rule(ast.parse(good)))


# A folder of one machine; the lookbehind excludes addresses and relative paths.
MACHINE = re.compile(r"(?<![\w.:/~})-])/(?:root|work|opt|Users|home/\w+)/")


def texts() -> Iterator[Path]:
    # In a linked working tree .git is a file that contains a path of the machine.
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and path.name != ".git")
    for folder in ("src", "tests", "docs", "examples", "benchmarks", "decisions", "changes", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in TEXT and not {"__pycache__", "_build"} & set(path.parts):
                yield path


def test_no_path_of_one_machine():
    broken = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not broken, "\n".join(broken)


def test_machine_path_is_found():
    assert MACHINE.search("open('/" + "root/x')")
    assert not MACHINE.search("https://example.org/" + "work/x, ../" + "opt/x, /usr/share/datasets")
