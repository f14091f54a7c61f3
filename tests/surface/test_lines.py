"""The line to write instead has the right form at each door, and the grammar corrects the whole text."""

import shlex
import tomllib

import pytest

import atoll
from atoll.base.errors import AtollError, RunError, UsageError, did_you_mean, unknown_name
from atoll.base.grammar import parse
from atoll.base.lines import DOORS, SET_ONLY, Both, Change, EngineChange, Line, Load, Part, Split, Text, form, forms
from atoll.cli.flags import ExperimentFlags
from atoll.plan.registry import PARTS, read_part
from atoll.recipes import RECIPES
from atoll.training.engine_fields import ENGINE_FIELDS
from atoll.training.experiment import Experiment, key_of, settings
from atoll.training.settings import declared

LINES = [
    Change("numerics", "loop"),
    Change("min_rows", 1),
    Change("baselines", True),
    Change("plan.pace", "Sync()"),
    Change("plan.max_failed", 1.0),
    Change("fleet", "Fleet(HalfNormal())"),
    Both(Change("device", "cuda"), EngineChange("Ray(gpus=1)", "gpus", 1)),
    EngineChange("Torchrun(backend='gloo')", "backend", "gloo"),
    Part("Sync()", "pace"),
    Split(71, "Dirichlet(0.3)", {"min_rows": 1}),
    Load("heart", {"folder": "data"}),
]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_each_form_reads_back_to_the_same_settings(line):
    """The flags and the keys of a file give one experiment; Python is an expression or keyword arguments."""
    from cyclopts import App

    app, got = App(result_action="return_value"), []

    @app.default
    def run(*, flags: ExperimentFlags = ExperimentFlags()):
        got.append(flags.experiment(None, trust=False))

    app(shlex.split(line.at("shell")), exit_on_error=False)
    of_file = Experiment()._of_file(_flat(tomllib.loads(line.at("file"))), "x.toml", False)
    assert got == [of_file] and of_file != Experiment()
    python = line.at("python")
    compile(python if "(" in python.partition("=")[0] else f"f({python})", "line", "eval")


def _flat(values):
    from atoll.base.names import dotted

    return dotted(values)


def test_settings_without_a_flag_are_listed_once():
    """`SET_ONLY` is the list of settings that only `--set` reaches."""
    declared_so = {key_of(f.name) for f in settings() if not declared(f).flag}
    assert declared_so | {name for name, field in ENGINE_FIELDS.items() if not field.help} == SET_ONLY


@pytest.mark.parametrize("kind", [AtollError, UsageError, RunError])
def test_the_door_selects_the_form(kind):
    error = kind("One.", "two.", "three.", Change("numerics", "loop"))
    assert str(error).endswith('Write: numerics="loop"') and error.line == 'numerics="loop"'
    assert str(error.at("file")).endswith('Write: numerics = "loop"')
    assert error.at("shell").door == "file"  # the first place that sets the door is the nearest to the value
    assert "Write" not in str(kind("One.", write=Line(python="x")).at("shell"))


def test_an_error_survives_a_copy_and_a_message():
    import copy

    error = UsageError("One.", "two.", "three.", Change("chunk", 6)).at("shell")
    assert str(copy.copy(error)) == str(error)
    assert [form(Line(*forms(error.line)), door) for door in DOORS] == [form(error.line, door) for door in DOORS]


def test_several_lines_of_a_file_are_indented():
    error = UsageError("One.", write=Split(7, "IID()")).at("file")
    assert str(error) == 'One.\nWrite: clients = 7\n       split = "IID()"'


@pytest.mark.parametrize(
    ("text", "corrected"),
    [
        ("fedavg(lr=-1)", "fedavg(lr=0.1)"),
        ("fedavg(-1.0, batch=5)", "fedavg(0.1, batch=5)"),
        ("fedadam(0.1, server_lr=-1)", "fedadam(0.1, server_lr=0.01)"),
        ("fedavgg(lr=0.1)", "fedavg(lr=0.1)"),
        ("fedavg(0.1, chort=5)", "fedavg(0.1, cohort=5)"),
        ("fedavg(0.1, cohort=Unifrom(5))", "fedavg(0.1, cohort=Uniform(5))"),
        ("Plan(Gradient, Mean())", "Plan(Gradient(), Mean())"),
        ("Plan(Gradient(), Mean(), sgd(-0.1), codec=Cast('bf32'))", None),  # two mistakes: no corrected text is a value
        ("Plan(Gradient(), Mean(), codec=Cast('π'))", "Plan(Gradient(), Mean(), codec=Cast('bf16'))"),
        ("Plan(Custom(os.path:join), Mean(), sgd(-1))", "Plan(Custom(os.path:join), Mean(), sgd(0.1))"),
        ("Plan(Gradient(), Mean(), pace=Mean())", "Plan(Gradient(), Mean(), pace=Sync())"),
    ],
)
def test_the_grammar_corrects_the_whole_text(text, corrected):
    names = {r.__name__: r for r in RECIPES} | {"Plan": atoll.Plan}
    with pytest.raises(UsageError) as caught:
        read_part(text, names, trust=True)
    if corrected is None:
        assert not isinstance(caught.value.write, Text)
        return
    assert caught.value.write == Text(corrected)
    read_part(corrected, names, trust=True)


def test_the_experiment_completes_a_line_with_its_setting():
    it = Experiment().with_settings({"recipe": "fedavg(lr=-1)"})
    with pytest.raises(UsageError) as caught:
        it.plan()
    assert caught.value.at("shell").line == '--recipe "fedavg(lr=0.1)"'
    it = Experiment()._of_file({"recipe": "fedavg(lr=-1)", "rounds": 3}, "mine.toml", True)
    with pytest.raises(UsageError) as caught:
        it.plan()
    assert caught.value.at("shell").line == 'recipe = "fedavg(lr=0.1)"'  # the text stands in the file
    with pytest.raises(UsageError) as caught:
        it.with_settings({"recipe": "fedavg(lr=-1)"}).plan()
    assert caught.value.at("shell").line == '--recipe "fedavg(lr=0.1)"'  # a flag replaced it
    with pytest.raises(UsageError) as caught:
        Experiment().with_settings(
            {"plan.pace": "Buffered(3)", "recipe": "gd(0.1)", "plan.cohort": "Poisson(0.5)"}
        ).plan()
    assert caught.value.at("shell").line == '--set "plan.pace=Sync()"'


def test_names_far_from_every_known_name_get_no_line():
    assert did_you_mean("zzz", ["a", "b"]) == "" and did_you_mean("acuracy", ["accuracy", "mae"]) == "accuracy"
    assert did_you_mean("Held-Out", ["held_out"]) == "held_out"
    assert "Write" not in str(unknown_name("metric", "zzz", ["auc", "mae"]))
    with pytest.raises(UsageError) as caught:
        parse("Zzz(0.1)", PARTS)
    assert not caught.value.line
