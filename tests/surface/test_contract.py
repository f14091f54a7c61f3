"""The contract of parts: every attribute that the package reads of a part is declared, and a part needs no more.

An `ast` test finds `getattr` and `hasattr`. Parts that define only the abstract members of their protocols train. Parts
that break the contract are refused by an error that names the part and the member.
"""

import ast
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from problems import run

import atoll
from atoll.base.errors import UsageError
from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.workers.scheduler import _checked as check_for_workers
from atoll.plan import conflicts, protocols
from atoll.plan.aggregate import Mean, PartialSum
from atoll.plan.codec import Codec, Identity
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import (
    Aggregator,
    Conflict,
    Declared,
    Local,
    Optimizer,
    Pace,
    Partial,
    Sampler,
    Stage,
    Total,
)
from atoll.plan.sampler import Everyone, Uniform
from atoll.testing.local import clients, problem

SRC = Path(__file__).parents[2] / "src" / "atoll"

# file, function: the reason for `getattr` or `hasattr` in it
ALLOWED = {
    ("plan/conflicts.py", "check_part"): "the check that a part has every declared member",
    ("plan/optimizer/base.py", "inner"): "fields of the optimizer itself, listed by dataclasses",
    ("training/stop.py", "*"): "a stop rule, which is no part of a plan",
    ("engine/workers/messages.py", "plan_to_text"): "whether a value is a function",
    ("engine/workers/messages.py", "_parts"): "fields of a value, listed by dataclasses",
    ("engine/workers/pool.py", "*"): "a function that some operating systems lack",
    ("engine/workers/serialize.py", "*"): "values of any class, rebuilt by name",
    ("engine/workers/shared_memory.py", "*"): "a dtype of torch, by name",
    ("compute/device.py", "*"): "attributes of torch that depend on its version",
    ("engine/ranks/process_group.py", "*"): "a reduction of torch, by name",
    ("engine/state_probe.py", "*"): "attributes of autograd nodes and of functions",
    ("engine/ranks/torchrun.py", "*"): "a dtype of torch, by name",
    ("engine/simulation/fleet.py", "*"): "fields of a fleet",
    ("engine/spec.py", "*"): "fields of an engine's spec, listed by dataclasses",
    ("tools/single_client.py", "of"): "fields of a task, listed by dataclasses",
    ("tools/doctor.py", "*"): "a function that some operating systems lack",
    ("tools/forecast.py", "_tried"): "a slot of a plan, by name",
    ("training/settings.py", "*"): "fields of the settings, listed by dataclasses",
    ("training/experiment.py", "*"): "fields of the experiment, listed by dataclasses",
    ("report/figure.py", "x"): "a column of a curve, by name",
    ("tools/compare.py", "find_runs"): "the folder of a run, or a path",
    ("training/rounds.py", "share"): "fields of the settings, by name",
    ("training/recorder.py", "*"): "fields of a training",
}


def reads():
    """(file, function, line) of each call of `getattr` or `hasattr`."""
    for folder in ("plan", "engine", "training", "report", "tools"):
        for path in sorted((SRC / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            owner = {}
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    owner |= {id(inner): node.name for inner in ast.walk(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                    yield str(path.relative_to(SRC)), owner.get(id(node), ""), node.lineno


def test_no_attribute_of_a_part_is_read_by_name():
    found = {(file, function): line for file, function, line in reads()}
    unknown = [
        f"{file}:{line} in {f}" for (file, f), line in found.items() if not {(file, f), (file, "*")} & set(ALLOWED)
    ]
    assert not unknown, "\n".join(unknown)


def test_no_class_of_a_part_is_compared_by_name():
    for path in sorted((SRC / "plan").rglob("*.py")):
        assert "__name__ ==" not in path.read_text(encoding="utf-8"), path


# parts that define only the abstract members of their protocols


@dataclass(frozen=True, repr=False)
class Least(Local):
    def contribute(self, broadcast, lanes, memory, key, task):
        return Gradient().contribute(broadcast, lanes, memory, key, task)


@dataclass(frozen=True, repr=False)
class LeastStage(Stage):
    def encode(self, x, memory, shared, key):
        return x, {}, {}, memory


@dataclass(frozen=True, repr=False)
class LeastAggregator(Aggregator):
    def zero(self):
        return Mean().zero()

    def fold(self, partial, contribution, ids):
        assert ids.client.shape == ids.repeat.shape == contribution.weight.shape
        return Mean().fold(partial, contribution, ids)

    def merge(self, a, b):
        return Mean().merge(a, b)

    def total(self, partial):
        return Mean().total(partial)

    def finalize(self, total, info):
        return Mean().finalize(total, info)


@dataclass(frozen=True, repr=False)
class LeastSampler(Sampler):
    def __call__(self, population, round, key):
        return Everyone()(population, round, key)


@dataclass(frozen=True, repr=False)
class LeastPace(Pace):
    def should_close(self, open):
        return open.arrived >= open.wanted


@dataclass(frozen=True, repr=False)
class LeastOptimizer(Optimizer):
    def init(self, theta):
        return {}

    def update(self, theta, g, sums, state, round):
        return theta - 0.1 * g, {}

    def lr_at(self, round, state):
        return 0.1


def engine_of():
    return InProcessEngine(replace(problem(), numerics="lanes"), clients())


USUAL = Plan(Gradient(), Mean(), sgd(0.1))
LEAST = {
    "local": Least(),
    "codec": LeastStage(),
    "aggregator": LeastAggregator(),
    "cohort": LeastSampler(),
    "pace": LeastPace(),
    "optimizer": LeastOptimizer(),
    "downlink": LeastStage(),
}


@pytest.mark.parametrize("slot", LEAST)
def test_a_part_with_its_abstract_members_alone_trains(slot):
    engine = engine_of()
    plain, _ = run(USUAL, engine, 2)
    state, _ = run(replace(USUAL, **{slot: LEAST[slot]}), engine, 2)
    close = 0 if slot not in ("optimizer", "downlink") else 1e-6
    assert float((state.model.theta - plain.model.theta).abs().max()) <= close


def test_members_of_a_protocol_are_read_only_and_a_field_replaces_them():
    @dataclass(frozen=True, repr=False)
    class Batched(Local):
        batch: int  # without a default of its own

        def contribute(self, broadcast, lanes, memory, key, task):
            raise NotImplementedError

    assert Batched(3).batch == 3 and Batched(3).sends == "update"
    with pytest.raises(TypeError):
        Batched()
    with pytest.raises(TypeError):
        Local()


# what is refused


class Foreign:
    """A local part that inherits nothing and lacks a member."""

    def contribute(self, broadcast, lanes, memory, key, task): ...


def refused(**slots):
    with pytest.raises(UsageError) as caught:
        replace(USUAL, **slots)
    assert caught.value.given and caught.value.required and caught.value.why and caught.value.line
    return caught.value


def test_a_part_without_a_member_is_refused_by_its_name():
    error = refused(local=Foreign())
    assert "Foreign has no member numerics" in error.given and "atoll.plan.protocols.Local" in error.required
    assert "int has no member zero" in refused(aggregator=3).given
    assert "has no member interchangeable" in refused(cohort=lambda population, round, key: None).given
    assert "is the class Identity, not a value of it" in refused(codec=Identity).given


@pytest.mark.parametrize(
    ("slot", "base", "member", "value"),
    [
        ("aggregator", LeastAggregator, "weights", "rows"),
        ("aggregator", LeastAggregator, "linear", 1),
        ("aggregator", LeastAggregator, "fold", None),
        ("local", Least, "sends", "both"),
        ("local", Least, "batch", "ten"),
        ("local", Least, "padded_batch", 3),
        ("codec", LeastStage, "per_sum", "yes"),
        ("cohort", LeastSampler, "interchangeable", None),
        ("pace", LeastPace, "deadline_s", "soon"),
        ("optimizer", LeastOptimizer, "trains_clients", 0),
        ("downlink", LeastStage, "parts", []),
    ],
)
def test_a_member_of_a_wrong_type_is_refused(slot, base, member, value):
    odd = type("Odd", (base,), {member: value})
    error = refused(**{slot: odd()})
    assert f"Odd.{member} is {value!r}" in error.given and "declares it" in error.required


@pytest.mark.parametrize("name", ("lanes", "loop"))
def test_the_backend_that_a_local_part_requires_is_chosen(name):
    plan = replace(USUAL, local=type("Own", (Least,), {"numerics": name})())
    task = problem()
    assert choose(task, clients(), plan).task.numerics == name
    assert choose(task, clients(), plan, name).task.numerics == name
    other = "fused"
    with pytest.raises(UsageError) as caught:
        choose(task, clients(), plan, other)
    error = caught.value
    assert f"numerics = '{other}' with Own()" in error.given and f"'{name}'" in error.required
    assert error.why and error.at("shell").line == "--numerics auto"


def test_a_required_backend_is_tested_on_the_model_and_an_unknown_one_is_refused():
    plan = replace(USUAL, local=type("Own", (Least,), {"numerics": "fused"})())
    with pytest.raises(UsageError, match=r"Own\(\) requires the backend fused, and"):
        choose(problem(norm=True), clients(), plan)
    error = refused(local=type("Own", (Least,), {"numerics": "nonsense"})())
    assert "Own.numerics is 'nonsense'" in error.given and "lanes, loop, fused, compiled" in error.required


def test_conflicts_that_raise_or_yield_something_else_are_refused():
    class Raises(LeastAggregator):
        def conflicts(self, slots):
            raise KeyError("weights")

    class Yields(LeastAggregator):
        def conflicts(self, slots):
            yield "not with this"

    class Numbers(LeastAggregator):
        def conflicts(self, slots):
            yield Conflict("given.", "required.", 3, "")

    assert "Raises.conflicts" in refused(aggregator=Raises()).given
    assert "Yields.conflicts" in refused(aggregator=Yields()).given
    assert "Numbers.conflicts" in refused(aggregator=Numbers()).given


def test_a_part_names_its_own_conflicts_and_those_of_its_parts():
    conflict = Conflict("Both.", "one of them.", "they exclude each other.", "sgd(0.1)")

    class Refusing(sgd):
        def conflicts(self, slots):
            yield conflict

    class Stopping(Identity):
        def conflicts(self, slots):
            yield conflict

    for slots in (
        {"local": Train(Refusing(0.1), epochs=1)},
        {"optimizer": Refusing(0.1)},
        {"codec": Identity() >> Stopping()},
    ):
        assert refused(**slots).args == UsageError(*conflict).args


@dataclass(frozen=True, repr=False)
class Naming(Local):
    """A gradient and one more sum, mean or length than declared."""

    way: str

    def contribute(self, broadcast, lanes, memory, key, task):
        given, after = Gradient().contribute(broadcast, lanes, memory, key, task)
        k = len(given.weight)
        match self.way:
            case "mean":
                return given._replace(means={**given.means, "more": torch.zeros(k, 2)}), after
            case "sum":
                return given._replace(sums={**given.sums, "more": torch.zeros(k, 2)}), after
            case "length":
                return given._replace(means={"update": torch.zeros(k, 2)}), after
        return given._replace(means={}), after


@pytest.mark.parametrize(("way", "name"), [("mean", "more"), ("sum", "more"), ("length", "update"), ("none", "update")])
def test_a_contribution_with_other_names_than_declared_is_refused(way, name):
    with pytest.raises(UsageError) as caught:
        run(Plan(Naming(way), Mean(), sgd(0.1)), engine_of(), 1)
    assert f"Naming('{way}'), client " in caught.value.given and f", round 0, {name}: " in caught.value.given


@dataclass(frozen=True, repr=False)
class Shaped(Local):
    """A gradient with a tensor that has another number of rows than clients."""

    way: str
    numerics = "lanes"

    def contribute(self, broadcast, lanes, memory, key, task):
        given, after = Gradient().contribute(broadcast, lanes, memory, key, task)
        k = len(given.weight)
        match self.way:
            case "scalar":
                return given._replace(sums={**given.sums, "loss": torch.tensor(1.0)}), after
            case "more":
                return given._replace(sums={**given.sums, "loss": torch.zeros(k + 1)}), after
            case "mean":
                return given._replace(means={"update": given.means["update"][:-1]}), after
            case "counter":
                return given._replace(counters={"seen": torch.tensor(3)}), after
            case "same name":
                return given._replace(counters={"loss": torch.tensor(3)}), after
        return given._replace(weight=given.weight[:0]), after


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("scalar", "loss"),
        ("more", "loss"),
        ("mean", "update"),
        ("counter", "seen"),
        ("same name", "loss"),
        ("weight", "weight"),
    ],
)
def test_a_contribution_with_other_rows_than_clients_is_refused(way, name):
    with pytest.raises(UsageError) as caught:
        run(Plan(Shaped(way), Mean(), sgd(0.1)), engine_of(), 1)
    error = caught.value
    assert f"Shaped('{way}'), client " in error.given and f", round 0, {name}: a tensor of shape" in error.given
    assert error.required and error.why and error.line


@dataclass(frozen=True, repr=False)
class Adding(Codec):
    """A codec that adds a sum, which it declares or not."""

    declared: bool

    def encode(self, x, memory, shared, key):
        return x, {}, {"clipped": torch.ones(len(x))}, memory

    def declare(self, layout):
        more = {"clipped": Declared(1, torch.float32, "sum")} if self.declared else {}
        return {**super().declare(layout), **more}


def test_a_sum_of_a_codec_is_declared():
    plan = Plan(Gradient(), Mean(), sgd(0.1), codec=Identity() >> Adding(True))
    _, reports = run(plan, engine_of(), 1)
    assert reports[0].metrics["clipped"] > 0
    with pytest.raises(UsageError, match=r"Adding\(False\).*, client \d+, round 0, clipped: no sum of this name"):
        run(replace(plan, codec=Adding(False)), engine_of(), 1)


@pytest.mark.parametrize("pace", [type("Cut", (LeastPace,), {"partial": True})(), Sync(deadline_s=1.0, partial=True)])
def test_workers_refuse_a_pace_with_partial_work(pace):
    local = Train(sgd(0.1), epochs=1)
    with pytest.raises(UsageError, match="with workers") as caught:
        check_for_workers(Plan(local, Mean(), sgd(0.1), pace=pace))
    assert caught.value.line == (repr(Sync(deadline_s=1.0)) if isinstance(pace, Sync) else "Sync()")


@dataclass
class Rows(Partial):
    """A partial of another kind."""

    def tensors(self):
        return {}

    @classmethod
    def of(cls, tensors):
        return cls()

    def reduce(self, group):
        return self


def test_partials_of_two_kinds_are_not_merged():
    with pytest.raises(UsageError, match="a partial of type PartialSum and one of type Rows"):
        conflicts.check_partials(Mean(), PartialSum(), Rows())
    with pytest.raises(UsageError, match="merges a Rows"):
        Mean().merge(PartialSum(), Rows())


def test_a_partial_without_reduce_is_refused_on_torchrun():
    from atoll.engine.ranks.torchrun import refuse_partial

    @dataclass(frozen=True, repr=False)
    class Bare(LeastAggregator):
        def zero(self):
            return {}

    with pytest.raises(UsageError) as caught:
        refuse_partial(Plan(Gradient(), Bare()))
    assert "`reduce`" in caught.value.required and caught.value.at("shell").line == "--engine inprocess"
    refuse_partial(Plan(Gradient(), LeastAggregator()))


@dataclass(frozen=True, repr=False)
class Selecting(LeastAggregator):
    """An aggregator that names the clients it has selected, in another order than they arrived."""

    def finalize(self, total, info):
        mean = Mean().finalize(total, info)
        ids = torch.tensor([2, 0])
        return mean._replace(per_client={"id": ids, "selected": torch.tensor([7, 5])})


def test_columns_of_an_aggregator_are_in_the_report():
    _, reports = run(replace(USUAL, aggregator=Selecting()), engine_of(), 1)
    column = reports[0].clients["selected"].tolist()
    assert column[:3] == [5, 0, 7] and not any(column[3:])
    assert reports[0].clients["id"].tolist() == list(range(len(column)))


def test_round_info_has_the_facts_of_the_round():
    seen = []

    @dataclass(frozen=True, repr=False)
    class Watching(LeastAggregator):
        def finalize(self, total, info):
            seen.append(info)
            return Mean().finalize(total, info)

    engine = engine_of()
    run(replace(USUAL, aggregator=Watching(), cohort=Uniform(2)), engine, 2)
    assert [info.round for info in seen] == [0, 1] and {info.cohort_size for info in seen} == {2}
    assert seen[0].population.clients == engine.population.clients
    assert float(seen[0].chance) == 2 / engine.population.clients


def test_every_protocol_is_documented():
    for protocol in (Local, Stage, Aggregator, Sampler, Pace, Optimizer, Partial):
        for name, member in vars(protocol).items():
            if not name.startswith("_") and callable(member):
                assert member.__doc__, f"{protocol.__name__}.{name}"
    assert isinstance(Total({}, {}, torch.tensor(0), torch.tensor(0), {}).per_client, dict)
    assert protocols.OPEN == "*" and atoll.__name__ == "atoll"


def test_foreign_parts_that_mypy_checks_also_run():
    parts = runpy.run_path(str(Path(__file__).parents[1] / "typing" / "foreign_parts.py"))
    assert repr(parts["plan"].codec) == "Clip(1.0) >> TopK(0.1)"
