"""Commands that read run folders, and refusals of names and paths, import neither torch nor NumPy."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields

import pytest

from atoll import models, recipes
from atoll.cli import look, main
from atoll.cli.app import parsed_command
from atoll.cli.look import plain_command
from atoll.compute.metric_names import direction
from atoll.compute.metrics import METRICS
from atoll.data import partition
from atoll.data.named import NAMED
from atoll.plan.formula import DEFAULTS, formula_of
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS, read_part
from atoll.training import known_names

WATCH = """
import contextlib, io, json, sys
from atoll.cli import look, main
from atoll.cli.app import parsed_command
from atoll.cli.look import plain_command
answers = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
        code = main(words)
    slow = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "sklearn", "safetensors"})
    answers.append([code, slow, text.getvalue()])
print(json.dumps(answers))
"""
COMMANDS = [
    (["runs"], 0, "linear"),
    (["show", "latest"], 0, "cohort = Everyone()"),
    (["show", "latest", "--json"], 0, '"status": "done"'),
    (["show", "absent"], 2, "absent"),
    (["run", "--data", "nope.csv"], 2, "There is no file nope.csv"),
    (["run", "--data", "digitss"], 2, "--data digits"),
    (["run", "--recipe", "fedavgg(lr=0.1)"], 2, '--recipe "fedavg(lr=0.1)"'),
    (["run", "--recipe", "nope(1)"], 2, "No recipe is called 'nope'"),
    (["run", "--split", "Dirichlett(0.3)"], 2, '--split "Dirichlet(0.3)"'),
    (["run", "--model", "mlpp"], 2, "--model mlp"),
    (["run", "--engine", "torchrun"], 2, "Write: torchrun --nproc-per-node 2"),
    (["run", "--engine", "processes", "--gpus", "1"], 2, "--engine"),
    (["run", "--dtype", "float16"], 2, "--dtype float32"),
    (["run", "--set", "plan.pce=Sync()"], 2, "plan.pace=Sync()"),
    (["run", "absent.toml"], 2, "absent.toml"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one run."""
    path = tmp_path_factory.mktemp("work")
    words = ["--data", "diabetes", "--model", "linear", "--recipe", "gd(0.1)", "--clients", "3", "--rounds", "2"]
    assert main(["run", *words, "--quiet", "--set", "report=false", "--out", str(path / "runs")]) == 0
    return path


@pytest.fixture(scope="module")
def answers(folder):
    """Exit code, slow modules imported so far, and output of each command, all in one new process."""
    words = json.dumps([*(words for words, _, _ in COMMANDS), ["compare", "latest"]])
    done = subprocess.run([sys.executable, "-c", WATCH, words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("place", range(len(COMMANDS)), ids=lambda place: str(COMMANDS[place][0]))
def test_no_slow_import(answers, place):
    _, code, text = COMMANDS[place]
    found, slow, output = answers[place]
    assert (found, slow) == (code, []), output
    assert text in output


def test_a_comparison_needs_numpy_but_not_torch(answers):
    code, slow, output = answers[-1]
    assert (code, "torch" in slow) == (0, False) and "One seed" in output


PLAIN = [
    "runs",
    "runs --out a --json",
    "show latest",
    "show 2026-x --json --out b",
    "compare a",
    "compare a b --group lr",
]
PLAIN += ["compare a* --metric loss --out o --json c"]
LEFT = [
    "show a b",
    "show",
    "runs a",
    "runs --group a",
    "show a --why",
    "show a --out",
    "show a --out --json",
    "show -h",
]
LEFT += ["show a --out=b", "compare a --target 1", "compare --json", "show a --json --json"]


@pytest.mark.parametrize("words", [*PLAIN, *LEFT])
def test_the_plain_form_means_what_the_parser_means(words, monkeypatch):
    """Words that are read without cyclopts call the same function with the same arguments, or are left to it."""
    given = []
    for name in ("print_runs", "print_run", "print_comparison"):
        usual = inspect.signature(getattr(look, name))

        def record(*names, _name=name, _usual=usual, **flags):
            bound = _usual.bind(*names, **flags)
            bound.apply_defaults()
            given.append((_name, bound.arguments))
            return 0

        monkeypatch.setattr(look, name, record)
    plain = plain_command(words.split(), {})
    assert (plain is None) == (words in LEFT)
    if plain is None:
        return
    plain()
    parsed_command(words.split())
    assert given[0] == given[1]


def test_variables_and_other_words_are_left_to_the_parser():
    assert plain_command(["runs"], {"ATOLL_JSON": "1"}) is plain_command(["show", "a"], {"ATOLL_FOLLOW": "1"}) is None
    assert plain_command([], {}) is plain_command(["run"], {}) is plain_command(["compare"], {}) is None


def test_the_import_of_the_package_is_fast():
    """At most .05 s of CPU; the fastest of three, because other processes disturb the caches of the processor."""
    code = (
        "import sys, time; t = time.process_time(); import atoll; print(time.process_time() - t); print(*sys.modules)"
    )
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, modules = zip(*(each.stdout.splitlines() for each in done), strict=True)
    loaded = {name.partition(".")[0] for name in modules[0].split()}
    extras = {"matplotlib", "transformers", "datasets", "mlflow", "tensorboardX", "wandb", "optuna", "ray", "pandas"}
    assert not loaded & (extras | {"torch", "numpy", "aiohttp", "msgspec", "sklearn"})
    assert min(map(float, seconds)) <= 0.05


def test_the_lists_are_the_tables():
    """The names that are checked without torch are the names of the tables."""
    assert set(known_names.DATA_SETS) == set(NAMED)
    assert set(known_names.MODELS) == set(models.names())
    assert set(known_names.RECIPES) == {recipe.__name__ for recipe in recipes.RECIPES}
    kinds = [c for c in vars(partition).values() if isinstance(c, type) and issubclass(c, partition.Partition)]
    assert set(known_names.PARTITIONS) == {
        c.__name__ for c in kinds if c is not partition.Partition and c.__name__[0] != "_"
    }
    for name, text in known_names.CALLS.items():
        assert type(read_part(text, {**PARTS, **partition.PARTITIONS})).__name__ == name
    assert list(DEFAULTS) == [f.name for f in fields(Plan)]


def test_directions_agree_with_the_metrics():
    numbers = {name: metric for name, metric in METRICS.items() if name != "confusion"}  # this one is a table
    assert {n: direction(n) for n in numbers} == {n: 1 if m.higher_is_better else -1 for n, m in numbers.items()}


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.__name__)
def test_the_formula_is_read_from_the_text_of_a_plan(recipe):
    plan = recipe(0.1) if recipe is not recipes.gd else recipe()
    assert formula_of(repr(plan)) == str(plan)


@pytest.mark.parametrize("text", ["", "no plan", "sgd(0.1)", "Plan()", "Plan(Gradient())", "(" * 9])
def test_a_text_that_is_no_plan_stays(text):
    assert formula_of(text) == text
