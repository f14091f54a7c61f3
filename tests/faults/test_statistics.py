"""A server without statistics gathers them from its sites, and the run has the bits of a run on the joined table."""

import json
from types import SimpleNamespace

import pytest
import torch
from sites import SITES, Served, experiment, table, write_tables
from test_sites import SMALL, alone, model, served

from atoll.base.errors import RunError, UsageError
from atoll.compute.loss import cross_entropy, mse
from atoll.data import csv
from atoll.data.input import Input
from atoll.data.schema import Schema, TrainRows
from atoll.net.engine import ServerEngine
from atoll.plan.form import MessageError
from atoll.plan.local import Moments
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


class Asking:
    """The parts of the engine of a server that `measure` and the answers to its works use."""

    def __init__(self, clients, answers):
        self.spec, self.answers = SimpleNamespace(clients=clients), iter(answers)
        self._rows, self._present, self._measured = {0: 5, 1: 7}, {0: 5, 1: 7, 2: 9}, ()
        self.asked, self._answers, self._answered_bytes, self._held = [], {}, 0, {}
        self.net, self.notify = SimpleNamespace(handle=lambda *events: None), lambda facts: None

    def _name(self, client):
        return f"site-{client}"

    def _ask(self, kind, rows, plan, model, clients, key):
        self.asked.append(tuple(clients))
        return {client: {"rows": torch.tensor([5.0])} for client in next(self.answers)}

    def measure(self):
        return ServerEngine.measure(self, Moments(), SimpleNamespace(round=0, model=None))["rows"].numel()

    def _unanswered(self, *facts):
        ServerEngine._unanswered(self, *facts)

    def _take_answer(self, *facts):
        return ServerEngine._take_answer(self, *facts)

    def answered(self, sums):
        def from_bytes(bodies):
            if sums is None:
                raise MessageError("The message has another length.", "the length of the form.")
            return SimpleNamespace(rest=SimpleNamespace(sums=sums))

        self._asked = {b"work": (1, SimpleNamespace(from_bytes=from_bytes), "moments")}
        ServerEngine._answered(self, SimpleNamespace(work=b"work", body=b""))


def test_the_second_gather_has_the_sites_of_the_first():
    """In an open run sites come and go, and a deviation needs the mean of the same rows."""
    it = Asking(None, [(0, 1), (0, 1), (1,)])
    it._present.pop(2)
    assert it.measure() == 2
    it._present[2] = 9  # it arrives between two gathers
    assert it.measure() == 2 and it.asked == [(0, 1), (0, 1)]
    with pytest.raises(RunError, match="site-0 left between two gathers"):
        it.measure()


@pytest.mark.parametrize("sums", [None, {"rows": torch.tensor([6])}])
def test_a_closed_run_ends_if_the_statistics_of_a_site_cannot_be_used(sums):
    with pytest.raises(RunError, match="site-1"):
        Asking(2, []).answered(sums)
    it = Asking(None, [])
    it.answered(sums)
    assert not it._answers and not it._asked
    it.answered({"rows": torch.tensor([7])})
    assert list(it._answers) == [1] and not it._asked
