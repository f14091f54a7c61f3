"""Sources of an experiment: values, a TOML file, --set and the environment. Also which of them may name code."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atoll
from atoll.base.errors import UsageError
from atoll.compute.metrics import Metric
from atoll.engine import EngineSpec, Processes
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.optimizer.rules import adam
from atoll.plan.sampler import Uniform
from atoll.training import Experiment, Settings
from atoll.training.setting_texts import toml
from atoll.training.stop import Target

QUICK = {"data": "diabetes", "model": "linear", "recipe": "distributed_gd(0.1)", "clients": 5, "rounds": 2}


class InProcessWithState(EngineSpec):
    """A spec without fields that a text can contain."""

    def build(self, options):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("ATOLL_"):
            monkeypatch.delenv(name)


def written(text, name="experiment.toml"):
    Path(name).write_text(text, encoding="utf-8")
    return name


def refused(call, *parts):
    with pytest.raises(UsageError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    return caught.value


# Meaning


def test_defaults_are_the_demonstration():
    it = Experiment().resolved()
    assert (it.dataset, it.clients, it.split, it.model, it.rounds) == ("digits", 100, "Dirichlet(0.3)", "mlp", 100)
    assert it.plan() == atoll.recipes.fedavg(lr=0.5, batch=10)
    data = it.data()
    assert data.count == 100
    assert data.held_out is not None
    expected = atoll.data.load("digits").split(100, atoll.data.Dirichlet(0.3))
    assert data.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("data", "clients", "split"),
    [("diabetes", 35, "IID()"), ("wine", 14, "Dirichlet(0.3)"), ("breast_cancer", 45, "Dirichlet(0.3)")],
)
def test_open_settings_follow_from_the_data(data, clients, split):
    it = Experiment().override(data=data).resolved()
    assert (it.clients, it.split) == (clients, split)
    assert it.data().count == clients


def test_natural_clients_are_the_default_split():
    rows = "\n".join(f"{i},{'abc'[i % 3]},{i % 7}.5" for i in range(60))
    it = Experiment().override(data=written(f"x,site,y\n{rows}\n", "sites.csv"), by="site", target="y").resolved()
    assert (it.clients, it.split) == (3, "ByColumn()")
    assert it.data().names == ("a", "b", "c")
    assert Path(it.dataset).is_absolute(), "a run goes on from any folder"


def test_settled_twice_is_settled_once():
    it = Experiment().override(data="wine").resolved()
    assert it.resolved() == it
    assert it.resolved().source is it.source


def test_slots_are_replaced_then_their_fields():
    it = Experiment().with_settings({"plan.optimizer.lr": "0.3", "plan.optimizer": "adam(0.01)", "plan.cohort": "7"})
    plan = it.plan()
    assert (plan.optimizer, plan.sampler) == (adam(0.3), Uniform(7))
    assert plan.local == atoll.recipes.fedavg(lr=0.5, batch=10).local


@pytest.mark.parametrize("first", ["codec", "aggregator"])
def test_slots_change_at_once(first):
    """Two parts that exclude each other change together, in either order. The plan between them is never checked."""
    both = {"codec": "EF21(TopK(0.1))", "aggregator": 'Mean("equal")'}
    second = next(slot for slot in both if slot != first)
    before = Experiment().override(recipe="Plan(Gradient(), Sum())", **{f"plan.{s}": both[s] for s in (first, second)})
    assert repr(before.plan()) == "Plan(Gradient(), aggregator=Mean('equal'), codec=EF21(TopK(0.1)))"


def test_a_whole_plan_can_be_written():
    plan = atoll.recipes.fedadam(lr=0.1, cohort=3)
    assert Experiment().override(recipe=repr(plan)).plan() == plan


def test_module_is_the_model_before_the_first_round():
    it = Experiment().override(**QUICK, seed=3, dtype="float64")
    training = it.training()
    module = it.module()
    assert all(p.dtype == torch.float64 for p in module.parameters())
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_train_takes_every_setting():
    it = Experiment().override(**QUICK, seed=1, dtype="float64", evaluate_every=2, stop=("Tolerance(loss=1.0)",))
    seen = []

    class Watcher:
        def start(self, training, path):
            seen.append(training.settings)

        def round(self, report):
            seen.append(report.round)

        def end(self, run):
            seen.append(run.status)

    run = it.train(out=None, observers=[Watcher()])
    settings = seen[0]
    assert (settings.rounds, settings.seed, settings.dtype, settings.evaluate_every) == (2, 1, "float64", 2)
    assert [repr(rule) for rule in settings.stop] == ["Tolerance(loss=1.0)"]
    assert seen[1:] == [0, 1, "done"]
    assert run.path is None


# TOML


def test_config_of_a_run_reads_back_equal():
    it = Experiment().override(**QUICK, report=False).with_settings({"plan.max_failed": "0.25", "plan.cohort": "3"})
    run = it.train()
    config = run.path / "config.toml"
    assert Experiment.read(config) == it.resolved()
    assert Experiment.read(run.path) == Experiment.read(config)
    assert Experiment.read(config).plan() == it.plan()


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@given(
    model=st.none() | texts,
    stop=st.lists(texts, max_size=3).map(tuple),
    held_out=st.floats(allow_nan=False),
    seed=st.integers(-(2**63), 2**63 - 1),
    overrides=st.dictionaries(st.sampled_from(["pace", "cohort", "local.batch", "optimizer"]), texts),
)
def test_every_experiment_reads_back_equal(tmp_path_factory, model, stop, held_out, seed, overrides):
    it = Experiment(model=model, stop=stop, held_out=held_out, seed=seed, overrides=overrides)
    file = tmp_path_factory.mktemp("any") / "experiment.toml"
    file.write_text(it.toml(), encoding="utf-8")
    assert Experiment.read(file) == it


def test_every_setting_is_written():
    values = {
        f.name: 0.5 if str(f.type).startswith("float") else {bool: True, int: 3}.get(type(f.default), "x")
        for f in dataclasses.fields(Experiment)
        if f.name not in ("overrides", "engine_fields", "untrusted")
    }
    values |= {"stop": ("x",), "metrics": ("x",), "clients": 3, "chunk": 3}
    it = Experiment(**values)
    assert Experiment.read(written(it.toml())) == it


def test_pyproject_and_dashes_and_numbers_in_slots():
    it = Experiment.read(written("[tool.atoll]\nheld-out = 0\n[tool.atoll.plan]\ncohort = 10\n", "pyproject.toml"))
    assert it == Experiment(held_out=0.0, overrides={"cohort": "10"})


def test_found_file_is_atoll_toml_then_pyproject():
    assert Experiment.found() == Experiment()
    written("[project]\nname = 'x'\n", "pyproject.toml")
    assert Experiment.found() == Experiment()
    written("[tool.atoll]\nrounds = 7\n", "pyproject.toml")
    assert Experiment.found().rounds == 7
    written("rounds = 8\n", "atoll.toml")
    assert Experiment.found().rounds == 8


# Bad input


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rouns = 3", ("experiment.toml", "'rouns'", "Write: rounds")),
        ("rounds = 'ten'", ("experiment.toml", "rounds = 'ten'", "a whole number", "Write: rounds = 100")),
        ("rounds = 1.5", ("rounds = 1.5", "a whole number")),
        ("seed = true", ("seed = True", "a whole number")),
        ("stop = 'Seconds(9)'", ("a list of texts", "Write: stop = []")),
        ("untrusted = []", ("'untrusted'",)),
        ("[plan]\npce = 'Sync()'", ("'plan.pce'", 'Write: plan.pace = "Sync()"')),
        ("rounds =\nseed = 1", ("experiment.toml is malformed", "line 1")),
        ("python = true", ("started from Python", 'Write: atoll.train("mlp", data, plan)')),
    ],
)
def test_bad_files_are_refused(text, parts):
    refused(lambda: Experiment.read(written(text)), *parts)


def test_missing_and_unreadable_files_are_refused():
    refused(lambda: Experiment.read("absent.toml"), "There is no file absent.toml")
    Path("latin.toml").write_bytes(b"data = '\xe9'")
    refused(lambda: Experiment.read("latin.toml"), "not UTF-8")
    refused(lambda: Experiment.read(written("[tool.other]\n", "pyproject.toml")), "no section [tool.atoll]")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"rouns": "3"}, ("No setting is called 'rouns'", "Write: rounds=3")),
        ({"plan.pce": "Sync()"}, ("No slot is called 'plan.pce'", "Write: pace=Sync()")),
        ({"plan": "Sync()"}, ("'plan'",)),
        ({"rounds": "ten"}, ("--set: rounds = 'ten'", "Write: rounds=100")),
        ({"baselines": "perhaps"}, ("true or false", "Write: baselines=False")),
        ({"clients": "many"}, ("a whole number", "Write: clients=10")),
    ],
)
def test_bad_settings_are_refused(settings, parts):
    error = refused(lambda: Experiment().with_settings(settings), *parts)
    if error.line:
        key, _, value = error.write.at("file").partition(" = ")
        Experiment().with_settings({key: value.strip('"')})


@pytest.mark.parametrize(
    ("settings", "call", "parts"),
    [
        ({"recipe": "fedavgg()"}, "plan", ("'fedavgg'", 'Write: recipe="fedavg()"')),
        ({"recipe": "Dirichlet(0.3)"}, "plan", ("'Dirichlet'",)),
        ({"recipe": "Plan(Gradient(), Mean(), 3)"}, "plan", ("optimizer",)),
        ({"recipe": "fedavg(lr=-1.0)"}, "plan", ("lr",)),
        ({"recipe": "fedavg(lr=0)"}, "plan", ("lr",)),
        ({"split": "Dirichlett(0.3)"}, "data", ("'Dirichlett'", 'Write: split="Dirichlet(0.3)"')),
        ({"data": "digitss"}, "data", ("'digitss'", 'Write: atoll.data.load("digits")')),
        ({"data": "absent.csv"}, "data", ("absent.csv",)),
        ({"clients": 5000}, "data", ("5000", "each row belongs to exactly one client")),
        ({"model": "mlpp"}, "module", ("'mlpp'", 'Write: model="mlp"')),
        ({"engine": "inproces"}, "training", ("'inproces'", 'Write: engine="inprocess"')),
        ({"stop": ("Patience('accuracy', 0)",)}, "training", ("Patience",)),
        ({"metrics": ("acuracy",)}, "training", ("'acuracy'", 'Write: metrics="accuracy"')),
        ({"init": "absent"}, "training", ("'absent'",)),
    ],
)
def test_invalid_requests_are_refused(settings, call, parts):
    refused(lambda: getattr(Experiment().override(**{**QUICK, **settings}), call)(), *parts)


def test_a_field_that_is_not_there_is_refused():
    refused(lambda: Experiment().with_settings({"plan.optimizer.rl": "0.1"}).plan(), "field of sgd", "'rl'", "lr")
    refused(lambda: Experiment().with_settings({"plan.cohort.n.m": "1", "plan.cohort": "3"}).plan(), "has no fields")


CALLS = [
    "__import__('os').mkdir('pwned')",
    "(lambda: 0)()",
    "fedavg(**{})",
    "fedavg(lr=[x for x in (1,)])",
    "open('x')",
]


@pytest.mark.parametrize("text", CALLS)
def test_a_plan_text_calls_nothing_else(text):
    refused(lambda: Experiment().override(recipe=text).plan(), text.split("(")[0][:4])
    refused(lambda: Experiment().with_settings({"plan.local": text}).plan())
    assert not Path("pwned").exists()


# Trust: sources that may import code


CODE = """
import pathlib
from torch import nn
pathlib.Path("imported").touch()
def make(features, outputs):
    return nn.Linear(features[0], outputs)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working folder that creates a file when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{tmp_path.name}".replace("-", "_")
    Path(f"{name}.py").write_text(CODE)
    return f"{name}:make"


def test_code_that_was_typed_or_stands_in_a_named_file_is_imported(module):
    base = {**QUICK, "model": module}
    assert isinstance(Experiment().override(**base).module(), torch.nn.Linear)
    assert Path("imported").exists()
    text = "\n".join(f"{name} = {toml(value)}" for name, value in base.items())
    assert isinstance(Experiment.read(written(text)).module(), torch.nn.Linear)


@pytest.mark.parametrize("name", ["atoll.toml", "run/config.toml"])
def test_code_in_a_found_file_or_a_run_folder_is_not_imported(module, name):
    Path("run").mkdir()
    base = {**QUICK, "model": module}
    written("\n".join(f"{key} = {toml(value)}" for key, value in base.items()), name)
    read = Experiment.found if name == "atoll.toml" else lambda **more: Experiment.read(name, **more)
    error = refused(lambda: read().module(), module, "trust=True")
    assert error.at("shell").line == "--trust"
    assert not Path("imported").exists()
    assert isinstance(read(trust=True).module(), torch.nn.Linear)


@pytest.mark.parametrize(
    ("key", "call"), [("recipe", "plan"), ("split", "data"), ("stop", "training"), ("plan.local", "plan")]
)
def test_no_text_of_a_run_folder_imports(module, key, call):
    value = [f"{module}()"] if key == "stop" else f"{module}()"
    Path("run").mkdir()
    base = {**QUICK, key: value}
    base["plan"] = {"local": base.pop(key)} if key == "plan.local" else {}
    lines = [f"{k} = {toml(v)}" for k, v in base.items() if k != "plan"]
    lines += ["[plan]", *(f"{k} = {toml(v)}" for k, v in base["plan"].items())]
    written("\n".join(lines), "run/config.toml")
    refused(lambda: getattr(Experiment.read("run"), call)(), "names code outside atoll", "trust=True")
    assert not Path("imported").exists()


def test_typed_settings_over_an_untrusted_file_are_trusted(module):
    written(f"rounds = 3\nmodel = '{module}'\nrecipe = '{module}()'\n", "atoll.toml")
    it = Experiment.found().override(model=module)
    assert it.untrusted == {"rounds", "recipe"}
    assert isinstance(it.override(data="diabetes").module(), torch.nn.Linear)
    refused(it.plan, "trust=True")


# Values that are not texts


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"engine": Processes(workers=1)}, {"engine": "Processes(1)"}),
        ({"engine": "processes", "engine_fields": {"workers": 2}}, {"engine": "processes"}),
        ({"fleet": Fleet(HalfNormal())}, {"fleet": repr(Fleet(HalfNormal()))}),
        ({"init": Path("model.safetensors"), "out": Path("runs")}, {"init": "model.safetensors", "out": "runs"}),
        ({"metrics": "accuracy"}, {"metrics": ("accuracy",)}),
        ({"stop": Target("accuracy", 0.9)}, {"stop": ("Target('accuracy', value=0.9)",)}),
        ({"rounds": np.int64(3), "held_out": np.float64(0.25)}, {"rounds": 3, "held_out": 0.25}),
    ],
)
def test_an_object_becomes_its_text(values, texts):
    it = Experiment(**values)
    assert {name: getattr(it, name) for name in texts} == texts
    assert Experiment.read(written(it.toml())) == it
    assert it.spec() and Settings(engine=it.engine, fleet=it.fleet)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", lambda outputs, targets: outputs),
        ("metrics", (Metric("ones", lambda outputs, targets: targets),)),
        ("init", {}),
        ("fleet", {}),
        ("stop", object()),
        ("engine", InProcessWithState()),
    ],
)
def test_an_object_without_a_text_is_refused(name, value):
    error = refused(lambda: Experiment(**{name: value}), f"{name} = ")
    assert error.required and error.why
    assert error.line == f"atoll.train(model, data, plan, {name}=...)"


def test_toml_refuses_another_type():
    refused(lambda: toml(object()), "in a TOML file")


# Order of sources


def test_the_environment_file_has_every_setting():
    it = Experiment().with_environment(
        {
            "ATOLL_DATASET": "wine",
            "ATOLL_DATA": "somewhere else",
            "ATOLL_ROUNDS": "5",
            "ATOLL_BASELINES": "1",
            "ATOLL_HELD_OUT": "0.1",
            "ATOLL_STOP": "[\"Seconds(9)\", 'Bytes(7)']",
            "ATOLL_PLAN_PACE": "Sync()",
            "ATOLL_PLAN_MAX_FAILED": "0.1",
            "OTHER": "x",
        }
    )
    assert it == Experiment(
        "wine",
        rounds=5,
        baselines=True,
        held_out=0.1,
        stop=("Seconds(9)", "Bytes(7)"),
        overrides={"pace": "Sync()", "max_failed": "0.1"},
    )
    error = refused(lambda: Experiment().with_environment({"ATOLL_ROUNDS": "x"}), "ATOLL_ROUNDS: rounds = 'x'")
    assert error.line == "ATOLL_ROUNDS=100"


def test_none_overrides_nothing_and_the_text_none_does():
    it = Experiment(clients=3)
    assert it.override(clients=None).clients == 3
    assert it.with_settings({"clients": "None"}).clients is None
