"""Settings: one declaration each, which signature, flags, experiment and keyword types follow; bad values."""

import dataclasses
import inspect
import subprocess
import sys
from typing import get_type_hints

import numpy as np
import pytest

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.cli.flags import ExperimentFlags
from atoll.compute.metrics import Metric
from atoll.training import Experiment, Settings, SettingsDict
from atoll.training.setting_texts import GROUP_NAMES
from atoll.training.settings import ENGINE_FIELDS, declared
from atoll.training.stop import Target

FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def test_keyword_types_are_those_of_the_fields():
    words = SettingsDict.__annotations__
    assert list(words) == list(FIELDS)
    for name, f in FIELDS.items():
        if name != "stop":  # a single rule is also valid
            assert words[name].__forward_arg__ == f.type, name


@pytest.mark.parametrize("function", [atoll.train, atoll.rounds])
def test_signature_and_help_list_every_setting_with_its_default(function):
    parameters = inspect.signature(function).parameters
    for name, f in FIELDS.items():
        assert parameters[name].default == f.default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert "evaluate_every: 'int' = 1" in str(inspect.signature(function))


def test_every_setting_is_declared():
    for f in FIELDS.values():
        rule = declared(f)
        assert rule.help.endswith((".", '".')) and rule.group in GROUP_NAMES, f.name
    assert set(FIELDS) <= {f.name for f in dataclasses.fields(Experiment)}
    assert {"rounds", "engine", "workers", "fleet", "settings"} <= set(get_type_hints(ExperimentFlags))
    assert not set(ENGINE_FIELDS) & set(FIELDS)


def test_settings_and_flags_load_without_torch():
    code = "import sys, atoll.training.settings, atoll.cli.app, atoll.engine; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_single_metric_or_rule_is_one():
    metric = Metric("ones", lambda outputs, targets: targets * 0 + 1.0)
    assert Settings(metrics="accuracy").metrics == ("accuracy",)
    assert Settings(metrics=metric).metrics == (metric,)
    assert Settings(stop=Target("accuracy", 0.9)).stop == (Target("accuracy", 0.9),)
    data = atoll.data.load("digits").split(clients=5)
    run = atoll.train("softmax", data, recipes.gd(0.1), rounds=1, metrics="accuracy", out=None)
    assert "accuracy" in run.metrics


@pytest.mark.parametrize(
    ("settings", "given", "write"),
    [
        ({"rounds": "5"}, "rounds = '5'", "rounds=5"),
        ({"rounds": 0}, "rounds = 0", "rounds=100"),
        ({"rounds": 2.5}, "rounds = 2.5", "rounds=2"),
        ({"rounds": True}, "rounds = True", "rounds=1"),
        ({"seed": None}, "seed = None", "seed=0"),
        ({"seed": "x"}, "seed = 'x'", "seed=0"),
        ({"chunk": 0}, "chunk = 0", "chunk=32"),
        ({"evaluate_every": -1}, "evaluate_every = -1", "evaluate_every=1"),
        ({"dtype": "float16"}, "dtype = 'float16'", 'dtype="float32"'),
        ({"numerics": "fast"}, "numerics = 'fast'", 'numerics="auto"'),
        ({"precision": "half"}, "precision = 'half'", 'precision="full"'),
        ({"device": None}, "device = None", 'device="auto"'),
        ({"fleet": 3}, "fleet = 3", 'fleet="Fleet(HalfNormal())"'),
        ({"metrics": 5}, "metrics = (5,)", 'metrics="accuracy"'),
        ({"init": 5}, "init = 5", 'init="runs/latest"'),
        ({"loss": 5}, "loss = 5", 'loss="cross_entropy"'),
        ({"round": 3}, "No setting is called 'round'", "rounds=3"),
    ],
)
def test_bad_settings(settings, given, write):
    with pytest.raises(UsageError) as caught:
        Settings.from_kwargs(settings)
    error = caught.value
    assert given in error.given and error.required and error.line == write
    if "=" in write:
        Settings(**eval(f"dict({write})"))


def test_a_seed_keeps_every_bit():
    assert Settings(seed=2**63 - 1).seed == 2**63 - 1


def test_an_integer_of_numpy_is_stored_as_an_integer(tmp_path):
    it = Settings(rounds=np.int64(1), seed=np.int64(3), chunk=np.int32(2), evaluate_every=np.int8(1))
    assert [type(getattr(it, name)) for name in ("rounds", "seed", "chunk", "evaluate_every")] == [int] * 4
    data = atoll.data.load("digits").split(clients=5)
    run = atoll.train("softmax", data, recipes.gd(0.1), rounds=np.int64(1), out=tmp_path, report=False)
    assert run.rounds == 1
