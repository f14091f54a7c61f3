"""Mistakes of users at the three doors: each is refused, and the line to write is read and executed at its door."""

import dataclasses
import re
import shlex
import sys
import tomllib

import doors
import numpy as np
import pytest
import torch
from torch import nn

import atoll
from atoll import recipes
from atoll.base.concepts import concept
from atoll.base.errors import AtollError, did_you_mean
from atoll.base.names import dotted
from atoll.cli.answer import answer
from atoll.cli.app import app
from atoll.data import partition
from atoll.engine.spec import Processes
from atoll.plan import registry
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS
from atoll.training import known_names
from atoll.training.experiment import Experiment
from atoll.training.stop import RULES

MINE = """
from torch import nn
def train(model, loader, ctx): ...
def krum(updates, weights): return updates[0]
median = krum
def net(): return nn.Linear(64, 10)
resnet18 = bert = main = net
"""


def my_train(model, loader, ctx):
    """Make no step."""


def reads_rate(model, loader, ctx):
    """Read the rate of Custom."""
    return {"rate": ctx.lr}


class Broken(nn.Linear):
    """A model that fails in its forward pass."""

    def forward(self, x):
        raise KeyError("attention")


def broken_loss(output, y):
    """A loss that fails."""
    return output.no_such_thing


def rows():
    draw = np.random.default_rng(0)
    return atoll.data.arrays(draw.normal(size=(60, 4)).astype("float32"), draw.integers(0, 3, 60))


DATA = rows()
CLIENTS = DATA.split(3)
IN_SCOPE = {
    **{"atoll": atoll, "nn": nn, "torch": torch, "recipes": recipes, "Plan": Plan, "dataclasses": dataclasses},
    **{"data": DATA, "clients": CLIENTS, "model": nn.Flatten(), "plan": recipes.fedavg(0.1)},
    **{"my_train": my_train, "train": my_train, "fn": my_train, "krum": my_train, "median": my_train},
    "experiment": atoll.Experiment().override(data="wine", model="softmax", clients=3, rounds=1, report=False),
    **{"reads_rate": reads_rate, "Broken": Broken, "broken_loss": broken_loss, "Processes": Processes},
    **PARTS,
    **RULES,
    **partition.PARTITIONS,
    **{r.__name__: r for r in recipes.RECIPES if r.__name__ not in PARTS},
}


def fit(model="mlp", data=CLIENTS, plan="fedavg(0.1)", **settings):
    """Train for one round without files."""
    return atoll.train(model, data, plan, **{"out": None, "rounds": 1, "report": False, **settings})


PYTHON = [
    # names that atoll does not have
    ('fit("resnet18")', 'model="mine:resnet18"'),
    ('fit("bert")', 'model="mine:bert"'),
    ('fit("cnnn")', 'model="cnn"'),
    ('fit("main.py")', 'model="main:net"'),
    ('fit(plan="FedAvg(0.1)")', "fedavg(0.1)"),
    ('fit(plan="fedavg")', "fedavg()"),
    ('fit(plan="adam")', "dataclasses.replace(plan, optimizer=adam(0.01))"),
    ('fit(plan="fedavg(0.1, batch_size=5)")', "fedavg(0.1, batch=5)"),
    ('fit(plan="fedavg(0.1, sweep=3)")', 'atoll.sweep(experiment, {"plan.local.optimizer.lr": [0.03, 0.1]})'),
    ('fit(plan="fedavg(0.1, fraction=0.1)")', 'plan="fedavg(lr=0.1, cohort=10)"'),
    ("fit(callbacks=[print])", "observers=[lambda report: print(report.round, report.metrics)]"),
    ("fit(plan=recipes.fedavg)", "atoll.recipes.fedavg(0.1)"),
    ("fit(plan=my_train)", "Plan(Custom(my_train), Mean())"),
    ('fit(metrics="acc")', 'metrics="accuracy"'),
    ('fit(metrics="roc_auc", data=42)', 'atoll.data.load("digits").split(10)'),
    ('fit(loss="ce")', 'loss="cross_entropy"'),
    ('fit(loss="crossentropy")', 'loss="cross_entropy"'),
    ('fit(loss="zzz")', ""),
    ('fit(engine="torch")', 'engine="inprocess"'),
    ('fit(engine="multiprocessing")', 'engine="processes"'),
    ('fit(device="gpu")', 'device="auto"'),
    ('atoll.data.load("mnst")', 'atoll.data.load("mnist")'),
    ('atoll.data.load("cifar10")', ""),
    # settings that have another place
    ("fit(epochs=3)", 'plan="fedavg(lr=0.1, epochs=3)"'),
    ("fit(lr=0.3)", 'plan="fedavg(lr=0.3)"'),
    ("fit(learning_rate=0.3)", 'plan="fedavg(lr=0.3)"'),
    ("fit(batch_size=5)", 'plan="fedavg(lr=0.1, batch=5)"'),
    ("fit(num_clients=5)", "data.split(5)"),
    ("fit(num_rounds=5)", "rounds=5"),
    ('fit(optimizer="adam")', "dataclasses.replace(plan, optimizer=adam(0.01))"),
    ("fit(f1=True)", 'metrics="f1"'),
    ("fit(auc=True)", 'metrics="auc"'),
    ("fit(r2=True)", 'metrics="r2"'),
    ("fit(iid=True)", "data.split(by=IID())"),
    ("fit(dirichlet=0.5)", "data.split(by=Dirichlet(0.5))"),
    ('fit(label="price")', 'atoll.data.load("rows.csv", target="price")'),
    ("fit(fedprox=True)", "?fedprox"),
    ("fit(krum=True)", "?krum"),
    ("fit(workers=2)", 'engine="Processes(workers=2)"'),
    ("fit(stop=10)", "Rounds(10)"),
    ('fit(class_weight="balance")', 'class_weight="balanced"'),
    ("fit(rounds=0)", "rounds=100"),
    # parts of a plan
    ("Plan(my_train, Mean())", "Custom(my_train)"),
    ('Plan(Train(sgd(0.1), epochs=1), Mean(), optimizer="adam")', "adam(0.01)"),
    ('Plan(Train("adam", epochs=1), Mean())', "Train(adam(0.01), epochs=1, batch=10)"),
    ("Plan(Train(torch.optim.SGD, epochs=1), Mean())", "sgd(0.1)"),
    ('Plan(Gradient(), "krum")', "?krum"),
    ('Plan(Gradient(), "median")', "?median"),
    ("Plan(Gradient(), my_train)", "Combine(my_train)"),
    ('Plan(Gradient(), Mean(), codec="zip")', ""),
    ('Plan(Custom(my_train), Mean(), codec="topk")', "TopK(0.1)"),
    ('Plan(Custom(my_train), Mean(), codec="TopK(0.2)")', "TopK(0.2)"),
    ('Plan(Custom(my_train), Mean(), codec="Quantize()")', ""),
    ('Plan(Custom(my_train), Mean(), pace="buffered")', "Buffered(10)"),
    ('Plan(Custom(my_train), Mean(), downlink="quantize")', "Quantize(8)"),
    ('Plan(Custom(my_train), Mean(), cohort="poisson")', "Poisson(0.1)"),
    ('Plan(Custom(my_train), Mean(), cohort="RoundRobin(3)")', "RoundRobin(3)"),
    ("Plan(Train(sgd(0.1)), Mean())", "Train(sgd(0.1), epochs=1)"),
    ("Plan(Gradient(), Mean(), sgd)", "sgd(0.1)"),
    # arguments of a recipe
    ("recipes.fedavg(0.1, batch_size=5)", "fedavg(0.1, batch=5)"),
    ("recipes.fedavg(learning_rate=0.1)", "fedavg(lr=0.1)"),
    ("recipes.fedavg(0.1, num_clients=5)", "fedavg(0.1, cohort=5)"),
    ('recipes.fedavg(0.1, optimizer="adam")', "dataclasses.replace(plan, optimizer=adam(0.01))"),
    ("recipes.fedavg(0.1, epochs=0)", "fedavg(0.1, epochs=1)"),
    ("recipes.fedavg(0.1, cohort=0)", "fedavg(0.1, cohort=Uniform(10))"),
    ("recipes.fedavg(-1)", "fedavg(0.1)"),
    # data
    ("data.split(3, by=0.3)", "data.split(by=Dirichlet(0.3))"),
    ('data.split(3, by="dirichlet")', "data.split(by=Dirichlet(0.3))"),
    ('data.split(3, by="iid")', "data.split(by=IID())"),
    ("data.split(3, by=Dirichlet)", "data.split(by=Dirichlet(0.3))"),
    ('data.split(3, by="Dirichlett(0.5)")', "data.split(by=Dirichlet(0.5))"),
    ("data.split(num_clients=3)", "clients=3"),
    ("data.split(3, iid=True)", "data.split(by=IID())"),
    ("fit(data=data)", "data.split(10)"),
    ('fit(data="digits")', 'atoll.data.load("digits").split(10)'),
    # code of the user
    ("fit(nn.Linear(5, 3))", "nn.Linear(4, 3)"),
    ("fit(Broken(4, 3))", ""),
    ("fit(loss=broken_loss)", ""),
    ("fit(plan=Plan(Custom(reads_rate), Mean()))", "Custom(fn, lr=0.1)"),
    ('fit(resume="nope")', "atoll runs"),
    ('fit(init="nope")', "atoll runs"),
    ('atoll.load("nope")', "atoll runs"),
]

SHELL = [
    # commands
    ("trian", "atoll run"),
    ("train --rounds 3", "atoll run"),
    ("list", "atoll runs"),
    ("frobnicate", "atoll --help"),
    ("show", "atoll show latest"),
    ("show nope", "atoll runs"),
    ("resume nope", "atoll runs"),
    # flags
    ("run --lr 0.1", '--recipe "fedavg(lr=0.1)"'),
    ("run --learning-rate=0.3", '--recipe "fedavg(lr=0.3)"'),
    ("run --epochs 3", '--recipe "fedavg(lr=0.1, epochs=3)"'),
    ("run --batch-size 20", '--recipe "fedavg(lr=0.1, batch=20)"'),
    ("run --num-clients 7", "--clients 7"),
    ("run --client 7", "--clients 7"),
    ("run --client shop", "--by shop"),
    ("run --num-clients shop", "--by shop"),
    ("run --group shop", "--by shop"),
    ("run --by store", "--clients 10"),
    ("run --input input.json", "atoll runs"),
    ("predict latest --data rows.csv", "atoll predict latest rows.csv"),
    ("run mine.toml --lr 0.1", '--recipe "fedavg(lr=0.1)"'),
    ("run --round 7", "--rounds 7"),
    ("run --optimizer adam", '--set "plan.optimizer=adam(0.01)"'),
    ('run --optimizer "adam(0.02)"', '--set "plan.optimizer=adam(0.02)"'),
    ("run --aggregator krum", "?krum"),
    ("run --strategy fedprox", "?fedprox"),
    ("run --algorithm fedavg", '--recipe "fedavg()"'),
    ("run --plan fedprox", "?fedprox"),
    ("tag latest first second", "atoll tag latest --add first --add second"),
    ("run rows.csv", "atoll run --data rows.csv"),
    ("run --sweep lr", 'atoll sweep experiment.toml --over "plan.local.optimizer.lr=[0.03, 0.1]"'),
    ("run --label y", "--target y"),
    ("run --quite", "--quiet"),
    ("run --f1", "--metrics f1"),
    ("run --iid", '--split "IID()"'),
    ("run --dirichlet 0.5", '--split "Dirichlet(0.5)"'),
    ("run --gpu", "--device cuda"),
    ("run --rounds ten", "atoll run --help"),
    # values
    ("run --model resnet18", "--model mine:resnet18"),
    ("run --model main.py", "--model main:net"),
    ("run --model mlpp", "--model mlp"),
    ("run --recipe fedavg", '--recipe "fedavg()"'),
    ("run --recipe 'fedavg(lr=-1)'", '--recipe "fedavg(lr=0.1)"'),
    ("run --recipe 'fedavg(0.1, batch_size=3)'", '--recipe "fedavg(0.1, batch=3)"'),
    ("run --recipe 0.1", ""),
    ("run --split dirichlet", '--split "Dirichlet(0.3)"'),
    ("run --split 0.3", '--split "Dirichlet(0.3)"'),
    ("run --data digits --by 0.3", '--split "Dirichlet(0.3)"'),
    ("run --data digitss", "--data digits"),
    ("run --metrics acc", "--metrics accuracy"),
    ("run --loss ce", "--loss cross_entropy"),
    ("run --engine torch", "--engine inprocess"),
    ("run --workers 2", '--engine "Processes(workers=2)"'),
    ("run --class-weight balance", "--class-weight balanced"),
    ("run --stop 10", '--stop "Rounds(10)"'),
    ("run --set plan.optimizer=adam", '--set "plan.optimizer=adam(0.01)"'),
    ("run --set optimizer=adam", '--set "plan.optimizer=adam(0.01)"'),
    ("run --set plan.codec=topk", '--set "plan.codec=TopK(0.1)"'),
    ("run --set plan.cohort=uniform", '--set "plan.cohort=Uniform(10)"'),
    ("run --set plan.aggregator=median", "?median"),
    ("run --clients 8 --set plan.aggregator=Krum(3)", '--set "plan.aggregator=Krum(2)"'),
    (
        "run --clients 8 --set 'plan.aggregator=NormBound(2.0, Krum(3))'",
        '--set "plan.aggregator=NormBound(2.0, Krum(2))"',
    ),
    ("run --clients 3 --set plan.aggregator=Krum(3)", '--set "plan.aggregator=Median()"'),
    (
        "run --recipe dp_fedavg() --set plan.aggregator=Krum(1)",
        """--set 'plan.aggregator=Mean(weights="equal", over="expected")'""",
    ),
    ("run --recipe dp_fedavg(cohort=0.1)", '--recipe "dp_fedavg(q=0.1)"'),
    ("run --set plan.lr=0.1", '--recipe "fedavg(lr=0.1)"'),
    ("run --set lr=0.1", '--recipe "fedavg(lr=0.1)"'),
    ("run main.py", "--model main:net"),
]

FILE = [
    ("lr = 0.3", 'recipe = "fedavg(lr=0.3)"'),
    ("epochs = 5", 'recipe = "fedavg(lr=0.1, epochs=5)"'),
    ("batch_size = 5", 'recipe = "fedavg(lr=0.1, batch=5)"'),
    ("num_clients = 5", "clients = 5"),
    ("num_rounds = 5", "rounds = 5"),
    ('optimizer = "adam"', 'plan.optimizer = "adam(0.01)"'),
    ('[plan]\noptimizer = "adam"', 'plan.optimizer = "adam(0.01)"'),
    ('plan.aggregator = "krum"', "?krum"),
    ('recipe = "fedavg"', 'recipe = "fedavg()"'),
    ('recipe = "fedavg(0.1, batch_size=5)"', 'recipe = "fedavg(0.1, batch=5)"'),
    ('model = "resnet18"', 'model = "mine:resnet18"'),
    ('model = "main.py"', 'model = "main:net"'),
    ('split = "iid"', 'split = "IID()"'),
    ('split = "0.3"', 'split = "Dirichlet(0.3)"'),
    ('metrics = ["acc"]', 'metrics = ["accuracy"]'),
    ('metric = "f1"', 'metrics = ["f1"]'),
    ('loss = "ce"', 'loss = "cross_entropy"'),
    ('label = "y"', 'target = "y"'),
    ('engine = "torch"', 'engine = "inprocess"'),
    ("f1 = true", 'metrics = ["f1"]'),
    ("sweep = 3", 'atoll sweep experiment.toml --over "plan.local.optimizer.lr=[0.03, 0.1]"'),
    ('class_weight = "balance"', 'class_weight = "balanced"'),
]

# the lines of a feature as long as no part and no recipe has its name
ABSENT = {
    "fedprox": {"python": "Custom(train)", "shell": '--set "plan.local=Custom(mine:train)"'},
    "scaffold": {"python": "Custom(train)"},
    "krum": {"python": "Combine(krum)", "shell": '--set "plan.aggregator=Combine(mine:krum)"'},
    "median": {"python": "Combine(median)", "shell": '--set "plan.aggregator=Combine(mine:median)"'},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a module of the user, which names of code in a line may name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATOLL_DATASET", "rows.csv")
    (tmp_path / "rows.csv").write_text(
        "a,b,y\n" + "".join(f"{i},{i * i},{'no' if i % 3 else 'yes'}\n" for i in range(40))
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "runs" / "2026-11-22-calm-reef").mkdir(parents=True)
    (tmp_path / "runs" / "2026-11-22-calm-reef" / "config.toml").touch()
    for module in ("mine", "main"):
        (tmp_path / f"{module}.py").write_text(MINE)
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def fits(line, wanted, door):
    """Whether the line is the wanted one. `?name` is the line of a feature: that of the part, or of its absence."""
    if not wanted.startswith("?"):
        return line == wanted
    word = wanted[1:]
    there = {r.__name__.lower() for r in recipes.RECIPES} | {name.lower() for name in PARTS}
    if word in there:
        return f"{word}(" in line.lower() and "mine" not in line
    shell = ABSENT[word].get("shell", "")
    return line == ABSENT[word].get(door, re.sub(r'--set "(.*?)=(.*)"', r'\1 = "\2"', shell))


@pytest.mark.parametrize(("source", "wanted"), PYTHON, ids=[source for source, _ in PYTHON])
def test_python(source, wanted):
    with pytest.raises(AtollError) as caught:
        eval(source, {**IN_SCOPE, "fit": fit})  # a call of the table above
    line = caught.value.line
    assert fits(line, wanted, "python"), str(caught.value)
    if line.startswith("atoll "):
        parse(line)
        return
    if not line or line.startswith("for "):
        compile(line, "line", "exec")
        return
    try:
        value = compile(line, "line", "eval")
    except SyntaxError:
        value = compile(f"dict({line})", "line", "eval")  # keyword arguments
    if "split(10)" not in line and "rows.csv" not in line and "mnist" not in line:
        eval(value, dict(IN_SCOPE))


def parse(line):
    """Parse a line of the shell; flags are those of `atoll run`. Returns the arguments of the command."""
    words = shlex.split(line)
    words = words[1:] if words[0] == "atoll" else ["run", *words]
    if words[-1] == "--help":
        return {}
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments


def checked(it):
    """Check an experiment as `atoll run` does, up to the plan, without data."""
    if it.engine_fields or it.device == "cuda" or it.target is not None:
        return
    it.check()
    it.override(recipe=it.recipe or "fedavg(0.1)").plan()


@pytest.mark.parametrize(("words", "wanted"), SHELL, ids=[words for words, _ in SHELL])
def test_shell(words, wanted, capsys):
    assert answer(shlex.split(words)) == 2
    error = capsys.readouterr().err
    line = error.partition("Write: ")[2].strip()
    assert fits(line, wanted, "shell"), error
    if line:
        arguments = parse(line)
        if "flags" in arguments and line.startswith("--"):
            checked(arguments["flags"].experiment(None, True))


@pytest.mark.parametrize(("text", "wanted"), FILE, ids=[text for text, _ in FILE])
def test_file(text, wanted, capsys, folder):
    (folder / "experiment.toml").write_text(text)
    assert answer(["run", "experiment.toml"]) == 2
    error = capsys.readouterr().err
    line = error.partition("Write: ")[2].strip()
    assert fits(line, wanted, "file"), error
    if line.startswith("atoll "):
        parse(line)
    else:
        checked(Experiment()._of_file(dotted(tomllib.loads(line)), "experiment.toml", True))


WORDS = "fedprox scaffold krum median epochs lr batch_size num_clients optimizer class_weight label f1 auc r2 acc torch"
WORDS += " resnet18 bert dirichlet iid adam sweep"


@pytest.mark.parametrize("word", WORDS.split())
def test_each_foreign_word_has_a_reason_and_a_line(word):
    found = concept(word)
    assert found.why and found.write.at("python") and found.write.at("shell")
    doors.check(found.write)
    assert did_you_mean(word, ["zzz"]) == ""


def test_a_feature_that_exists_is_pointed_to(monkeypatch):
    """The table looks for recipes and parts when an error is built."""
    monkeypatch.setattr(known_names, "RECIPES", (*known_names.RECIPES, "feddyn"))
    assert concept("feddyn").write.at("shell") == '--recipe "feddyn(lr=0.1)"'
    monkeypatch.setattr(registry, "PARTS", {**PARTS, "Bulyan": PARTS["Mean"]})
    assert concept("bulyan").write.at("python") == "Bulyan()"


def test_the_table_is_large():
    assert len(PYTHON) + len(SHELL) + len(FILE) >= 75


def test_errors_in_user_code_have_file_and_line():
    for act in (lambda: fit(Broken(4, 3)), lambda: fit(loss=broken_loss)):
        with pytest.raises(AtollError, match=r"raised in (forward|broken_loss), test_mistakes\.py:\d+"):
            act()


def test_a_wrong_width_shows_both_shapes():
    with pytest.raises(AtollError, match=r"rows of shape \(4,\)(.|\n)*=5, and its input has shape \(1, 4\)"):
        fit(nn.Linear(5, 3))
    images = atoll.data.arrays(np.zeros((20, 8, 8), "float32"), np.arange(20) % 2).split(2)
    with pytest.raises(AtollError) as caught:
        fit(nn.Linear(64, 2), data=images)
    assert caught.value.line == "nn.Sequential(nn.Flatten(), model)"


def test_load_lists_the_names_that_differ(folder):
    run = fit(nn.Sequential(nn.Linear(4, 3)), out=folder / "runs")
    with pytest.raises(AtollError, match=r"1\.weight: \(3, 4\), and not absent"):
        atoll.load(run.path, nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
