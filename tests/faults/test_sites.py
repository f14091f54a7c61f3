"""Sites with rows of their own give the bits of a run on the joined table."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from msgspec import structs
from msgspec.structs import replace
from network import Federation, comparable, rows_of
from safetensors.torch import load_file
from sites import SITES, Served, experiment, table, write_tables

from atoll import models, recipes
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.batches import HOST
from atoll.compute.task import Task
from atoll.data import csv
from atoll.data.schema import Schema
from atoll.data.site_rows import site_rows
from atoll.engine.protocols import RunOptions
from atoll.net.join import own_rows
from atoll.net.site import Site
from atoll.net.spec import Server
from atoll.net.terms import RefusedError, Terms
from atoll.plan.aggregate import Agnostic, Attacked, Median, SignFlip
from atoll.plan.sampler import PowerOfChoice
from atoll.training.experiment import load

SMALL = {"model": "softmax", "recipe": "fedavg(lr=0.5, batch=10)", "numerics": "fused", "report": "false"}


def alone(folder, **settings):
    """The run folder of the same experiment on the joined table."""
    settings = {**SMALL, "data": folder / "all.csv", "out": folder / "alone", **settings}
    return experiment(**{"target": "ill", **settings}, by="site").train().path


def model(path):
    return (path / "model.safetensors").read_bytes()


def served(folder, it, data=SITES, **spec):
    """The run of three sites with their tables."""
    one = Served(folder, it, **spec)
    for name in data:
        one.join(name, folder / f"{name}.csv")
    results = one.wait()
    assert [results[name] for name in data] == [0] * len(data), results
    return one


def columns(path):
    return pandas.read_csv(path / "clients.csv").to_dict("list")


@pytest.mark.parametrize(
    ("target", "chosen", "first", "recipe"),
    [
        pytest.param("ill", "softmax", "accuracy", "fedavg(lr=0.05, batch=10)", marks=pytest.mark.slow),
        pytest.param("age", "linear", "rmse", "fedavg(lr=0.05, batch=10)", marks=pytest.mark.slow),
        pytest.param("ill", "mlp", "accuracy", "ditto(lr=0.05, batch=10)", marks=pytest.mark.slow),
        ("ill", "mlp", "accuracy", "fedper(lr=0.05, batch=10, own=('fc2.*',))"),  # each site draws its own part
    ],
)
def test_three_tables_give_the_bits_and_the_evaluation_of_the_joined_table(tmp_path, target, chosen, first, recipe):
    write_tables(tmp_path)
    settings = {"target": target, "rounds": 1, "recipe": recipe, "model": chosen, "seed": 4}
    given, whole = csv(tmp_path / "all.csv", target=target, by="site").split(held_out=0).described(), table()
    path = tmp_path / "input.json"
    path.write_bytes(given.encode())
    for client, name in enumerate(SITES):
        rows = whole.index[whole.site == name]
        mine = site_rows(tmp_path / f"{name}.csv", given, client, held_out=0.2, seed=4)
        whole.loc[rows[mine.held_out.index.numpy()], "fold"] = "test"
    whole.fillna({"fold": "train"}).to_csv(tmp_path / "all.csv", index=False)
    it = experiment(**{**SMALL, **settings}, clients=3)
    one = served(tmp_path, it, schema=str(path))
    joined = alone(tmp_path, **settings, held_out='Mask("fold", "test")', input=path)
    both = [one.results["server"].path, joined]
    assert model(both[0]) == model(both[1])
    assert (both[0] / "input.json").read_bytes() == path.read_bytes()
    for name in SITES if chosen == "mlp" else ():  # the final model of a site has its own part
        mine = load_file(next((tmp_path / name / "runs").iterdir()) / "model.safetensors")
        own = load(joined, client=name).state_dict()
        assert all(torch.equal(t, own[n]) for n, t in mine.items())
        with pytest.raises(UsageError, match="at the server"):
            load(both[0], client=name)
    ours, theirs = (rows_of(path)[-1] for path in both)
    assert {f"{first}_clients", "held_out_loss_worst10"} <= ours.keys()
    for name, value in theirs.items():
        if name.startswith(("held_out_loss", first, "balanced_accuracy", "r2", "mae")):
            assert ours[name] == pytest.approx(value, rel=1e-5), name
        if name.startswith("personal_"):  # each site evaluates its own model, with the bits of one process
            assert ours[name] == value, name
    assert one.results["server"].best["metric"] == (f"personal_{first}" if "own=" in recipe else first)
    ours, theirs = (pandas.read_csv(path / "clients.csv") for path in both)
    assert list(ours.columns) == list(theirs.columns) and list(ours.client) == list(SITES)
    assert any(name.startswith("personal_") for name in ours.columns) == (chosen == "mlp")
    assert list(ours[first]) == pytest.approx(list(theirs[first]), rel=1e-5)
    ours, theirs = (json.loads((path / "clients.jsonl").read_text()) for path in both)
    assert ours["round"] == 0 and ours["id"] == theirs["id"] and ours[first] == pytest.approx(theirs[first], rel=1e-5)


def test_a_server_refuses_attacks_and_in_an_open_run_parts_that_need_all_clients(tmp_path):
    engine = Server(str(tmp_path / "server")).build(RunOptions(model="softmax"))
    engine.task = Task.of(torch.nn.Linear(3, 2), "cross_entropy", ())
    plan = recipes.fedavg(0.1)
    for refused, says in (
        (dataclasses.replace(plan, aggregator=Attacked(Median(), SignFlip())), "over a network"),
        (recipes.scaffold(0.1), "in an open run"),
        (recipes.feddyn(0.1), "in an open run"),
        (recipes.newton(), "in an open run"),
        (dataclasses.replace(plan, aggregator=Agnostic(0.1)), "in an open run"),
        (dataclasses.replace(plan, cohort=PowerOfChoice(2, 3)), "in an open run"),
    ):
        with pytest.raises(UsageError, match=says):
            engine.check_start(refused, None)
    engine.check_start(plan, None)
    engine.close()


def terms(folder, **changes):
    """The terms of a run on the joined table."""
    data = csv(folder / "all.csv", target="ill", by="site").split(held_out=0)
    task = Task.of(models.resolve("softmax", data, Key(0)), "cross_entropy", ())
    return replace(Terms.of(task, Schema.of(data), "softmax", 0.0), **changes).encode()


@pytest.fixture
def site(tmp_path):
    write_tables(tmp_path)
    (tmp_path / "home").mkdir()
    return lambda data, **options: Site(tmp_path / "home", own_rows(str(data), **options), {}, HOST)


def test_a_function_of_the_site_returns_its_rows(tmp_path, site):
    code = f"import pandas\ndef rows():\n    return pandas.read_csv({str(tmp_path / 'north.csv')!r})\n"
    (tmp_path / "my_site.py").write_text(code + "def data():\n    raise ValueError('no patient 17')\n")
    assert site(tmp_path / "my_site.py:rows").enter(2, "run", terms(tmp_path), None) == (30, 0)
    with pytest.raises(RefusedError, match="no patient 17") as found:
        site(tmp_path / "my_site.py").enter(2, "run", terms(tmp_path), None)
    assert found.value.code == "data" and "17" not in found.value.public
    with pytest.raises(UsageError, match="no file"):
        site(tmp_path / "none.py")
    with pytest.raises(UsageError, match="no data"):
        site(tmp_path / "none.csv")


def test_a_site_holds_out_rows_and_keeps_its_rows(tmp_path, site):
    given = terms(tmp_path, held_out=0.2)
    assert site(tmp_path / "south.csv").enter(0, "run", given, None) == (24, 6)
    first = site(tmp_path / "north.csv")
    assert first.enter(0, "run", given, None) == (24, 6)
    first.fix_rows()
    assert site(tmp_path / "north.csv").enter(0, "run", given, None) == (24, 6)
    with pytest.raises(RefusedError, match="differ") as found:
        site(tmp_path / "south.csv").enter(0, "run", given, None)
    assert found.value.code == "changed"
    assert site(tmp_path / "south.csv").enter(0, "next", given, None) == (24, 6)
    with pytest.raises(RefusedError, match="at least 25"):
        site(tmp_path / "north.csv").enter(0, "third", terms(tmp_path, held_out=0.2, min_rows=25), None)


def test_a_refusal_sends_no_value_of_a_row(tmp_path, site):
    (tmp_path / "bad.csv").write_text("age,city,ill\n50,Lima,no\n40,Oslo,yes\n")
    with pytest.raises(RefusedError, match="'city' contains 'Lima' at row 0") as found:
        site(tmp_path / "bad.csv").enter(0, "run", terms(tmp_path), None)
    assert found.value.code == "input" and "Lima" not in found.value.public


def test_a_server_without_rows_needs_one_target(tmp_path):
    write_tables(tmp_path)
    given = csv(tmp_path / "all.csv", target="ill", by="site").split().input
    it = Schema.of_input(given)
    assert (it.features, it.classes, it.target) == ((4,), ("no", "yes"), ())
    several = structs.replace(given, target=structs.replace(given.target, classes=None))
    with pytest.raises(UsageError, match="several classes"):
        Schema.of_input(several)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_change_no_bit_of_three_tables(tmp_path):
    write_tables(tmp_path)
    settings = {"plan__codec": "ErrorFeedback(TopK(0.5))", "rounds": 6, "held_out": 0}
    path = alone(tmp_path, **settings)
    words = [f"--set={name.replace('__', '.')}={value}" for name, value in {**SMALL, **settings, "clients": 3}.items()]
    with Federation(tmp_path, "--schema", path / "input.json", *words, clients=3) as it:
        it.serve()
        it.invite()
        for client, name in enumerate(SITES):
            it.join(client, data=(tmp_path / f"{name}.csv",))
        it.server.after_round(1)
        it.server.kill()
        it.serve()
        it.server.after_round(2)
        it.clients[2].kill()
        it.join(2, token=False, data=(tmp_path / "west.csv",))
        assert [it.server.code(), *(client.code() for client in it.clients.values())] == [0] * 4, it.server.stderr()
        assert model(it.path()) == model(path) and comparable(it.path()) == comparable(path)


def block(heading):
    """The commands of a section of docs/deploy.md, with a free port in place of the stated one."""
    section = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text().partition(f"## {heading}\n")[2]
    commands = section.partition("```sh\n")[2].partition("```")[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{free.getsockname()[1]}", commands)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_manual(tmp_path):
    write_tables(tmp_path)
    for name, site in (("pilot", "west"), ("oslo", "north"), ("rome", "south")):
        (tmp_path / f"{site}.csv").rename(tmp_path / f"{name}.csv")
    start = f'set -e\natoll() {{ {sys.executable} -m atoll "$@"; }}\n'
    script = start + block("A site with its own table") + "wait\natoll verify --home hospitals\n"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "All checks passed." in done.stdout, done.stderr
    assert (tmp_path / "hospitals" / "runs" / "latest" / "model.safetensors").is_file()
