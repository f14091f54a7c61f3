"""A server without statistics gathers them from its sites, and the run has the bits of a run on the joined table."""

import json

import pytest
import torch
from sites import SITES, Served, experiment, table, write_tables
from test_sites import SMALL, alone, model, served

from atoll.base.errors import UsageError
from atoll.compute.loss import cross_entropy, mse
from atoll.data import csv
from atoll.data.input import Input
from atoll.data.schema import Schema, TrainRows
from atoll.plan.registry import read_part
from atoll.training.reference import known_constant_loss
from atoll.training.statistics import lacks_statistics, refuse_private


def bare(folder, target):
    """An input.json as a person writes it: names, kinds and levels, without statistics."""
    given = json.loads(csv(folder / "all.csv", target=target, by="site").split(held_out=0).described().encode())
    for column in given["columns"]:
        for name in ("fill", "centre", "spread"):
            column.pop(name, None)
    given["target"]["centre"] = given["target"]["spread"] = []
    given["by"] = None
    path = folder / "bare.json"
    path.write_text(json.dumps(given))
    return path


@pytest.mark.parametrize(
    ("target", "more"),
    [("ill", {"class_weight": "balanced"}), pytest.param("age", {"model": "linear"}, marks=pytest.mark.slow)],
)
def test_an_input_without_statistics_gives_the_bits_of_the_joined_table(tmp_path, target, more):
    whole = table()
    whole.loc[::7, "age" if target == "ill" else "city"] = None
    write_tables(tmp_path, whole)
    settings = {"target": target, "rounds": 2, "held_out": 0, "recipe": "fedavg(lr=0.05, batch=10)", **more}
    path = bare(tmp_path, target)
    assert lacks_statistics(path)
    it = experiment(**{**SMALL, **settings}, clients=3)
    one = served(tmp_path, it, schema=str(path))
    joined, ours = alone(tmp_path, **settings), one.results["server"].path
    assert not lacks_statistics(ours / "input.json")
    assert model(ours) == model(joined)
    inputs = [Input.read(path) for path in (ours, joined)]
    assert inputs[0].columns == inputs[1].columns and inputs[0].target == inputs[1].target
    works = [json.loads(line) for line in (tmp_path / "north" / "ledger.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in works] == ["moments"] * 2 + ["round"] * 2
    assert [e["event"] for e in one.events["server"] if e["event"] in ("listening", "round")] == ["listening"] + [
        "round"
    ] * 2
    assert not (one.home / "next.toml").exists()


def test_a_policy_without_values_of_the_site_ends_the_run_by_name(tmp_path):
    from atoll.net.policy import Policy

    write_tables(tmp_path)
    it = experiment(**SMALL, rounds=1, clients=1, held_out=0)
    one = Served(tmp_path, it, schema=str(bare(tmp_path, "ill")))
    one.join("north", tmp_path / "north.csv", policy=Policy(per_client=False))
    with pytest.raises(Exception, match="policy-values"):
        raise one.wait()["server"]


@pytest.mark.parametrize("plan", ["dp_fedavg()", "Plan(Gradient(), Mean(secure=True))"])
def test_statistics_are_refused_with_noise_and_under_a_secure_sum(plan):
    from atoll.recipes import RECIPES

    names = {r.__name__: r for r in RECIPES}
    built = names["dp_fedavg"](0.1, noise=1.0, clip=1.0) if "dp" in plan else read_part(plan)
    with pytest.raises(UsageError, match="statistics"):
        refuse_private(built)


def test_the_loss_of_a_constant_from_gathered_facts(tmp_path):
    write_tables(tmp_path)
    data = csv(tmp_path / "all.csv", target="ill", by="site").split(held_out=0)
    counts = tuple(data.histogram().sum(0).tolist())
    share = torch.tensor(counts).double() / sum(counts)
    expected = float(-(share * share.log()).sum())
    found = known_constant_loss(cross_entropy(), TrainRows(counts), data.input)
    assert found == pytest.approx(expected) and known_constant_loss(mse, TrainRows(counts), data.input) is None
    assert Schema.of(data).known is None and len(SITES) == 3
