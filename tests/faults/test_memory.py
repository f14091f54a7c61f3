"""If memory is full, the chunk is halved, the run continues, one note is reported, and no bit changes."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from limited_memory import Scarce
from problems import classification, run, seeded, task_of
from quick_cases import by_turns
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError
from atoll.compute.device import out_of_memory
from atoll.compute.task import Task
from atoll.engine.chunk_limit import ChunkLimit
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.workers.processes import ProcessesEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient, Train
from atoll.plan.plan import Plan
from atoll.report.live import LiveTable
from atoll.report.run_data import RunData
from atoll.training.experiment import Experiment

SIZES = (9,) * 13
KINDS = ("host", "python", "gpu")


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))


@pytest.fixture(scope="module")
def problem():
    data = classification(SIZES)
    return task_of(mlp(), data, "lanes", torch.float32), data


def plan_of(most, kind="host", **more):
    return Plan(Scarce(most=most, kind=kind), Mean(), rules.sgd(0.5), **more)


def test_errors_of_the_system_are_recognised():
    """Real errors of the host for impossible allocations are recognised."""
    for ask in (lambda: torch.empty(1 << 58, dtype=torch.uint8), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        assert out_of_memory(error.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value) and not out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("most", "kind"), by_turns([1, 3, 4, 12], KINDS))
def test_the_chunk_halves_and_no_bit_changes(problem, most, kind):
    task, data = problem
    expected, plain = run(Plan(Gradient(), Mean(), rules.sgd(0.5)), InProcessEngine(task, data), 3)
    engine = InProcessEngine(task, data)
    state, reports = run(plan_of(most, kind), engine, 3)
    assert torch.equal(state.model.theta, expected.model.theta)
    assert [r.metrics for r in reports] == [r.metrics for r in plain]
    assert not any(r.failures for r in reports)
    assert engine.room.most == {1: 1, 3: 2, 4: 4, 12: 7}[most]
    (note,) = reports[0].notes
    some = "1 client" if engine.room.most == 1 else f"{engine.room.most} clients"
    assert note.startswith(f"Chunks of more than {some}") and "No bit changes" in note
    assert [r.notes for r in reports[1:]] == [(), ()]


def test_a_chunk_that_exceeded_memory_is_not_tried_again(problem):
    """One chunk of 13 clients and one of 7 fail, once in the whole run."""
    task, data = problem
    plan = plan_of(4)
    Scarce.tried.clear()
    run(plan, InProcessEngine(task, data), 3)
    assert [n for n in Scarce.tried if n > 4] == [13, 7]
    assert sum(n for n in Scarce.tried if n <= 4) == 3 * 13


def test_asked_for_larger_chunks_or_for_others_stay(problem):
    task, data = problem
    expected, _ = run(Plan(Gradient(), Mean(), rules.sgd(0.5)), InProcessEngine(task, data))
    for chunk in (2, 4, 100):
        engine = InProcessEngine(task, data, chunk)
        assert torch.equal(run(plan_of(4), engine)[0].model.theta, expected.model.theta)
        assert engine.room.most == (None if chunk <= 4 else 4)


def test_memory_that_clients_keep_survives_halving(problem):
    task, data = problem
    local = Train(rules.adam(0.01), steps=2, batch=4, keep=("optimizer", "order"))
    expected, _ = run(Plan(local, Mean()), InProcessEngine(task, data), 3)

    state, _ = run(Plan(Scarce(most=3, inner=local), Mean()), InProcessEngine(task, data), 3)
    everyone = torch.arange(data.count)
    kept, wanted = state.memory.take(everyone), expected.memory.take(everyone)
    assert torch.equal(state.model.theta, expected.model.theta)
    assert all(torch.equal(kept[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("body", ["lanes", "loop"])
def test_a_client_that_does_not_fit_by_itself_ends_the_run(problem, body):
    task, data = problem
    engine = InProcessEngine(replace(task, numerics=body), data)
    with pytest.raises(RunError) as error:
        run(plan_of(0), engine)
    assert error.value.given.startswith("Client ") and "can't allocate memory" in error.value.given
    assert "halved" in error.value.why and error.value.at("shell").line == "--set plan.local.batch=4"


def test_the_line_to_write_asks_for_less_and_works(monkeypatch):
    """The error suggests `--set plan.local.batch=…`. The experiment that raised it works with this setting."""
    it = Experiment().override(
        clients=5, rounds=1, model="softmax", recipe="fedavg(lr=0.1, batch=10)", numerics="lanes"
    )
    gradient = Task.gradient

    def scarce(self, model, batch, key):
        if batch.x.shape[1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradient(self, model, batch, key)

    training = it.training()
    monkeypatch.setattr(Task, "gradient", scarce)
    with pytest.raises(RunError) as error:
        training.next()
    flag, setting = error.value.at("shell").line.split()
    assert flag == "--set" and setting == "plan.local.batch=5"
    monkeypatch.setattr(Task, "gradient", gradient)
    smaller = it.with_settings(dict([setting.split("=")])).training()
    monkeypatch.setattr(Task, "gradient", scarce)
    assert smaller.next().arrived == 5


@dataclass(frozen=True, repr=False)
class Heavy(Mean):
    """An aggregator whose sum raises for more than `most` clients at once."""

    most: int = 4

    def fold(self, partial, contribution, ids):
        if len(contribution.weight) > self.most:
            raise MemoryError
        return super().fold(partial, contribution, ids)


def test_too_little_memory_for_the_sum_is_an_error(problem):
    """A partly added chunk cannot be subtracted: the run ends, and the error suggests a smaller chunk."""
    task, data = problem
    with pytest.raises(RunError) as error:
        run(Plan(Gradient(), Heavy()), InProcessEngine(task, data))
    assert error.value.at("shell").line == "--chunk 6" and "together with their sum: MemoryError" in error.value.given
    assert run(Plan(Gradient(), Heavy()), InProcessEngine(task, data, 3))[1][0].arrived == 13


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_halve_too(problem, workers):
    """Each worker reports the largest chunk that fits. The engine reports one note and assigns smaller chunks."""
    task, data = problem
    task = replace(task, numerics="fused")  # in `lanes` each worker would import torch.func for seconds
    expected, _ = run(Plan(Gradient(), Mean(), rules.sgd(0.5)), InProcessEngine(task, data), 3)
    with ProcessesEngine(task, data, workers=workers) as engine:
        state, reports = run(plan_of(1), engine, 3)
        assert torch.equal(state.model.theta, expected.model.theta)
        assert engine.room.most == 1 and engine.deaths == 0
        assert [len(r.notes) for r in reports] == [1, 0, 0]
        with pytest.raises(RunError, match="does not fit into memory by itself"):
            run(plan_of(0), engine, 1)


def test_it_is_written_down_and_shown(tmp_path, capsys):
    """The note is an event of the run, in its report, and a line of the live table."""
    data = atoll.data.load("digits").split(clients=8)
    plan = plan_of(2)
    with LiveTable(plain=True) as table:
        done = atoll.train("softmax", data, plan, rounds=2, out=tmp_path, observers=[table], report=False)
    events = [json.loads(line) for line in (done.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (note,) = [e for e in events if e["event"] == "note"]
    assert note["round"] == 0 and "Chunks of more than 2 clients" in note["text"]
    assert [n for n in RunData.read(done.path).events.notes if n.startswith("round 0: Chunks of more than 2 clients")]
    assert capsys.readouterr().err.count("Chunks of more than 2 clients") == 1


def test_room_is_a_limit_that_only_falls():
    room = ChunkLimit()
    assert room.within(None) is None and room.within(8) == 8 and room.take_note() == ()
    for most in (5, 9, None, 3):
        room.lower(most)
    assert room.most == room.within(None) == room.within(8) == 3 and room.within(2) == 2
    assert len(room.take_note()) == 1 and room.take_note() == ()


def test_recipes_are_as_they_were(problem):
    """If all chunks fit, no chunk is halved and no note is reported."""
    task, data = problem
    _, reports = run(recipes.fedavg(0.1), InProcessEngine(task, data))
    assert [r.notes for r in reports] == [(), ()]
