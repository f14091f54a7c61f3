"""Worker processes: the same bits as in one process, real arrivals, deaths of workers, and serialization."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import importable_parts
import numpy as np
import psutil
import pytest
import torch
from problems import COMPILED, classification, far, federation, regression, run, seeded, task_of
from quick_cases import one_in, only
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.data import ArrayRows, DatasetRows
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.workers import forkserver
from atoll.engine.workers.forkserver import ForkServer
from atoll.engine.workers.processes import ProcessesEngine, _Pipes
from atoll.engine.workers.serialize import deserialize, serialize
from atoll.engine.workers.shared_memory import SharedBlock, SharedBlocks, block_bytes
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip, ErrorFeedback, Noise, Quantize, Rotate, TopK
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd, yogi  # workers import `torch.optim` for adam, and not for yogi
from atoll.plan.pace import Bounded, Buffered, Sync, staleness_polynomial
from atoll.plan.plan import Plan
from atoll.plan.round import bind, open_round, step
from atoll.plan.sampler import Poisson
from atoll.plan.state import State
from atoll.testing import check_engine

SIZES = (9, 9, 7, 4, 4, 3, 2, 1)


@pytest.fixture(scope="module")
def nursery():
    """A fork server that has imported what the first backward pass imports, for more than a second in each worker."""
    with_all = ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "_START", f"import torch.fx.experimental.symbolic_shapes; {forkserver._START}")
        with_all.start()
    yield with_all
    processes = [p for pid in with_all.pids for p in (psutil.Process(pid), *psutil.Process(pid).children())]
    with_all.close()
    _ended, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert not any(Path(folder).exists() for folder in with_all.folders)


@pytest.fixture(scope="module")
def mlp(nursery):
    """An engine with two workers for a small classifier, and an in-process engine."""
    data = classification(SIZES)
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    task = task_of(module, data, "fused", torch.float32)  # a new worker in `lanes` would import torch.func for seconds
    with ProcessesEngine(task, data, workers=2, nursery=nursery) as engine:
        yield engine, InProcessEngine(task, data)


@pytest.fixture(scope="module")
def alone(mlp, nursery):
    """The same with one worker."""
    _, reference = mlp
    with ProcessesEngine(reference.task, reference.data, workers=1, nursery=nursery) as engine:
        yield engine, reference


def same(plan: Plan, ours, theirs, rounds: int = 2) -> None:
    """Check that model, memory and reports are equal, bit for bit."""
    (a, found), (b, expected) = run(plan, ours, rounds), run(plan, theirs, rounds)
    assert torch.equal(a.model.theta, b.model.theta)
    assert torch.equal(a.model.buffers, b.model.buffers)
    everyone = torch.arange(ours.population.clients)
    kept, expected_kept = a.memory.take(everyone), b.memory.take(everyone)
    assert all(torch.equal(kept[n], expected_kept[n]) for n in expected_kept)
    for r, e in zip(found, expected, strict=True):
        assert (r.metrics, r.arrived, r.bytes_up, r.bytes_down, r.failures) == (
            e.metrics,
            e.arrived,
            e.bytes_up,
            e.bytes_down,
            e.failures,
        )
        assert r.clients.keys() == e.clients.keys()
        assert all(torch.equal(r.clients[n], e.clients[n]) for n in e.clients)


# parity


OTHER_MODELS = (recipes.fedbn, recipes.newton)  # they need layers of normalisation, or one linear layer


@pytest.mark.usefixtures("known_secrets")
@pytest.mark.parametrize(
    "recipe", one_in(4, [r for r in recipes.RECIPES if r not in OTHER_MODELS]), ids=lambda r: r.__name__
)
def test_every_recipe_has_the_bits_of_one_process(recipe, mlp, alone):
    own = {"own": ("2.*",)}
    words = {recipes.diloco: {"steps": 3, "batch": 4}, recipes.fedper: own, recipes.fedrep: own}
    plan = recipe(**words.get(recipe, {}))
    same(plan, *(alone if plan.pace.asynchronous else mlp))


@pytest.mark.usefixtures("known_secrets")
def test_clients_on_workers_draw_the_noise_of_the_secret_of_the_round(mlp):
    fair = Mean(weights="equal", over="expected")
    same(Plan(Gradient(), fair, codec=Clip(1.0) >> Noise(1.0, by="client"), cohort=Poisson(0.7)), *mlp)


@pytest.mark.parametrize("pace", one_in(2, [Buffered(3), Bounded(2), Sync(over_select=1.5)]), ids=repr)
def test_one_worker_has_the_bits_of_one_process_under_every_pace(pace, alone):
    """One worker computes flights in the order of their starts, as in a simulation with equal durations."""
    local = Train(yogi(0.01), steps=2, batch=2, keep=("optimizer", "order"))
    same(Plan(local, Mean(), cohort=4, pace=pace), *alone, rounds=5)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), codec=ErrorFeedback(TopK(0.3))),
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), codec=Rotate() >> Quantize(4), downlink=Quantize(8)),
        Plan(Custom(importable_parts.descend, batch=4), Mean()),
        Plan(Custom(importable_parts.remember, batch=4, memory=importable_parts.personal), Mean(), cohort=0.6),
        Plan(Gradient(batch=3), Mean(), adam(0.01), codec=importable_parts.Halve(), cohort=0.5),
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), pace=Bounded(0)),
    ],
    ids=lambda plan: repr(plan.codec) + repr(plan.pace),
)
def test_parts_have_the_bits_of_one_process(plan, mlp):
    same(plan, *mlp)


@pytest.mark.parametrize("numerics", only(["loop"], ["lanes", "loop"]))
def test_rows_of_several_tensors_have_the_bits_of_one_process(numerics, nursery):
    data = importable_parts.masked(classification(SIZES))
    task = task_of(seeded(importable_parts.Masked), data, numerics, torch.float32)
    with ProcessesEngine(task, data, workers=1, nursery=nursery) as engine:
        same(Plan(Train(sgd(0.1), epochs=1, batch=4), Mean()), engine, InProcessEngine(task, data))


@pytest.mark.slow
def test_contract_of_engines(nursery):
    check_engine(lambda task, data: ProcessesEngine(task, data, workers=2, nursery=nursery))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("numerics", ["lanes", "loop", "fused", COMPILED])
def test_number_of_workers_and_chunks_change_no_bit(workers, numerics, nursery, mlp):
    task, data = mlp[1].task, mlp[1].data
    task = replace(task, numerics=numerics)
    for chunk in (1, 3, None):
        with ProcessesEngine(task, data, workers, chunk, threads=workers, nursery=nursery) as engine:
            same(recipes.fedadam(), engine, InProcessEngine(task, data))


@pytest.mark.slow
def test_the_front_door_runs_on_processes(tmp_path):
    data = atoll.data.load("digits").split(clients=6)
    settings = {"rounds": 2, "numerics": "lanes", "report": False, "out": tmp_path}
    ours = atoll.train("softmax", data, recipes.fedavg(lr=0.1), engine="Processes(workers=2)", **settings)
    theirs = atoll.train("softmax", data, recipes.fedavg(lr=0.1), **settings)
    assert ours.metrics == theirs.metrics
    about = (ours.path / "environment.json").read_text(encoding="utf-8")
    assert '"workers": 2' in about and '"threads_per_worker"' in about


# deaths


def killing_row(tmp_path: Path, times: int):
    """Clients of which one row kills its reader, this number of times. The row belongs to client 2."""
    data = classification(SIZES)
    crosses = tmp_path / "crosses"
    crosses.touch()
    return (
        data,
        replace(data, rows=importable_parts.Deadly(data.rows, int(data.offsets[2]), times, str(crosses))),
        crosses,
    )


def test_a_worker_killed_in_mid_round_changes_no_bit(tmp_path, nursery, mlp):
    data, mined, crosses = killing_row(tmp_path, times=1)
    task = mlp[1].task
    with ProcessesEngine(task, mined, workers=2, nursery=nursery) as engine:
        same(recipes.fedavg(lr=0.1, batch=4), engine, InProcessEngine(task, data))
        assert crosses.stat().st_size == 1
        assert engine.deaths == 1
        engine._pool.ready()  # the rounds may end before the worker in place of the dead one has started
        assert len(set(engine.pids)) == 2


def test_a_client_that_kills_every_worker_is_a_failure(tmp_path, nursery, mlp):
    _, mined, _ = killing_row(tmp_path, times=100)
    plan = recipes.fedavg(lr=0.1, batch=4)
    with ProcessesEngine(mlp[1].task, mined, workers=2, nursery=nursery) as engine:
        state, (report,) = run(plan, engine, 1)
    assert [(f.client, f.stage) for f in report.failures] == [(2, "local")]
    assert "died" in report.failures[0].cause
    assert report.arrived == len(SIZES) - 1
    assert far(state.model.theta, run(plan, mlp[1], 1)[0].model.theta) < 1  # the sum of the other clients is valid


def test_workers_killed_between_rounds_are_replaced(mlp):
    engine, reference = mlp
    for pid in engine.pids:
        os.kill(pid, signal.SIGKILL)
    same(recipes.fedavg(lr=0.1, batch=4), engine, reference)


@pytest.mark.slow
def test_a_killed_nursery_is_started_again(mlp):
    engine, reference = mlp
    (pid,) = engine._nursery.pids
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=10)
    os.kill(engine.pids[0], signal.SIGKILL)
    same(recipes.fedavg(lr=0.1, batch=4), engine, reference)


# other paces


@pytest.mark.parametrize(
    "pace",
    one_in(
        2,
        [
            Sync(over_select=1.5, deadline_s=30.0),
            Buffered(1, staleness=staleness_polynomial(0.0)),
            Bounded(2),
            Buffered(3),
        ],
    ),
    ids=repr,
)
def test_every_pace_reaches_least_squares(pace, nursery):
    sizes = (12, 10, 9, 8)
    data = regression(sizes)
    task = task_of(seeded(nn.Linear, 3, 1), data, "loop")
    x, y = data.take(data.order)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y).solution
    # The gradient of a single client does not vanish at the minimum, so the learning rate decreases.
    rate = atoll.plan.schedule.inverse(12.0, t0=60) if not isinstance(pace, Sync) else 0.2
    cohort = 2 if isinstance(pace, Sync) else None
    plan = Plan(Gradient(), Mean(weights="equal"), sgd(rate), pace=pace, cohort=cohort)
    with ProcessesEngine(task, data, workers=2, nursery=nursery) as engine:
        state, reports = run(plan, engine, 100)
    assert far(state.model.theta, best) < 0.02
    assert sum(r.arrived for r in reports) >= 100
    if pace.asynchronous:
        assert reports[-1].flying > 0
        assert {0} < {int(s) for r in reports for s in r.clients["staleness"]}


def test_flights_of_a_loaded_state_are_computed_again(mlp):
    engine, _ = mlp
    plan = Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), pace=Buffered(2))
    state, _ = run(plan, engine, 3)
    assert state.air.flights
    versions = {b: v._replace(model=v.model._replace(theta=v.model.theta.clone())) for b, v in state.versions.items()}
    after, report = step(plan, replace(state, versions=versions), engine)
    assert report.arrived == 2 and after.round == 4


def test_memory_goes_on_within_an_open_round(nursery):
    """A client that arrives several times in one round reads the memory of its last arrival."""
    data = classification((6,))
    task = task_of(seeded(nn.Linear, 4, 3), data, "loop", torch.float32)
    plan = Plan(Train(yogi(0.01), steps=2, batch=2, keep=("optimizer", "order")), Mean(), pace=Buffered(3))
    with ProcessesEngine(task, data, workers=1, nursery=nursery) as engine:
        same(plan, engine, InProcessEngine(task, data))


@pytest.mark.parametrize(("pace", "sizes"), [(Sync(), SIZES), (Buffered(3), (6,))])
def test_kept_contributions_are_those_of_one_process(pace, sizes, nursery):
    data = classification(sizes)
    task = task_of(seeded(nn.Linear, 4, 3), data, "loop", torch.float32)
    plan = Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), codec=ErrorFeedback(TopK(0.5)), pace=pace)
    with ProcessesEngine(task, data, workers=2, nursery=nursery) as engine:
        plan = bind(plan, engine)
        opened = open_round(plan, State.first(plan, task, 0, Memory(plan.memory(task))), engine)
        kept = engine.gather(plan, *opened[:3], keep=(0,)).kept
        with pytest.raises(UsageError, match="no contribution of client 99 arrived"):
            engine.gather(plan, *opened[:3], keep=(99,))
    others = InProcessEngine(task, data).gather(plan, *opened[:3], keep=(0,)).kept
    assert len(kept) == (1 if pace == Sync() else 3)
    for one, other in zip(kept, others, strict=True):
        assert one[:3] == other[:3]
        for mine, theirs in ((one.contribution, other.contribution), (one.decoded, other.decoded)):
            assert torch.equal(mine.means["update"], theirs.means["update"])


@pytest.mark.slow
def test_a_client_that_hangs_costs_its_rounds_a_contribution_and_its_worker(tmp_path, nursery):
    data = classification(SIZES)
    gate = tmp_path / "gate"
    os.mkfifo(gate)  # a reader that opens it waits forever, since it has no writer
    rows = importable_parts.Waiting(data.rows, int(data.order[int(data.offsets[2])]), str(gate))
    task = task_of(seeded(nn.Linear, 4, 3), data, "loop", torch.float32)
    plan = Plan(Gradient(), Mean(), pace=Sync(deadline_s=0.5))
    state = State.first(plan, task, 0, Memory(plan.memory(task)))
    with ProcessesEngine(task, replace(data, rows=rows), workers=2, nursery=nursery) as engine:
        arrived: set[int] = set()
        while not engine.deaths:
            state, report = step(plan, state, engine)
            assert report.late >= 1
            arrived |= set(report.clients["id"].tolist())
    assert arrived == set(range(len(SIZES))) - {2}


def test_a_client_that_raises_is_a_failure_under_every_pace(nursery):
    data = classification(SIZES)
    task = task_of(seeded(nn.Linear, 4, 3), data, "loop", torch.float32)
    x, y = data.rows.take(torch.arange(sum(SIZES)))
    x[data.order[int(data.offsets[3])]] = torch.inf
    broken = federation(x, y, SIZES)
    with ProcessesEngine(task, broken, workers=2, nursery=nursery) as engine:
        _, reports = run(Plan(Gradient(), Mean(), pace=Buffered(8), max_failed=1.0), engine, 2)
    assert {f.client for r in reports for f in r.failures} == {3}


def test_an_engine_that_was_not_closed_leaves_its_names_unused(nursery):
    """Engines of one fork server share folders. A new engine never takes the file name of an earlier one."""
    blocks = [_Pipes(nursery, False)._blocks.block(8).path for _ in range(3)]
    assert len(set(blocks)) == 3 and len({os.path.dirname(path) for path in blocks}) == 1


# cleanup

PROGRAM = """
import sys, atoll
data = atoll.data.load("digits").split(clients=20)
plan, settings = atoll.recipes.fedavg(lr=0.1), dict(rounds=10**6, numerics="fused")  # auto looks at the rounds
training = atoll.rounds("softmax", data, plan, **settings, engine="Processes(workers=2)")
for report in training:
    if report.round == 1:
        print(report.fingerprint, *training.engine._nursery.folders)
        print(*training.engine._nursery.pids, *training.engine.pids, flush=True)
        {then}
"""


@pytest.mark.parametrize(
    ("then", "signals"),
    [
        pytest.param("pass", signal.SIGINT, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param("pass", signal.SIGKILL, id="kill -9", marks=pytest.mark.slow),
        pytest.param("raise SystemExit(3)", None, id="exit", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_behind(then, signals, request):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("{then}", then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    request.addfinalizer(program.kill)
    assert program.stdout is not None
    fingerprint, *folders = program.stdout.readline().split()
    pids = program.stdout.readline().split()
    assert len(pids) == 3 and folders
    workers = [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]
    if signals is not None:
        os.killpg(program.pid, signals)  # as a terminal does: to all processes of the foreground
    program.communicate(timeout=60)
    _gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert not any(Path(folder).exists() for folder in folders)
    data = atoll.data.load("digits").split(clients=20)
    *_, last = atoll.rounds("softmax", data, recipes.fedavg(lr=0.1), rounds=2, numerics="fused")
    assert fingerprint == last.fingerprint


# serialization


def crossed(value, tmp_path: Path):
    blocks = SharedBlocks((tempfile.mkdtemp(dir=tmp_path),), "test")
    packed = serialize(value, "It", "--engine inprocess", blocks.path)
    block = blocks.block(block_bytes(packed.tensors))
    return deserialize(packed.tree, SharedBlock(block.path).read(block.write(packed.tensors)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 4, 2),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        lambda: nn.Sequential(*[nn.Linear(3, 3)] * 2),
    ],
    ids=["lstm", "transformer", "batch norm", "tied"],
)
def test_modules_cross(make, tmp_path):
    module = seeded(make)
    other = crossed(module, tmp_path)
    assert str(other) == str(module) and type(other) is type(module)
    ours, theirs = module.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert len({id(p) for p in other.parameters()}) == len({id(p) for p in module.parameters()})


def test_values_cross(tmp_path):
    value = (1, -(1 << 80), 0.1, float("inf"), "θ", b"\0", None, True, {"a": [1, (2,)]}, {3}, torch.float64, nn.Linear)
    other = crossed(value, tmp_path)
    assert other == value and [type(v) for v in other] == [type(v) for v in value]


def test_mapped_files_and_datasets_cross(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(24.0).reshape(6, 4))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    y = torch.arange(6) % 3
    plain = DatasetRows(torch.utils.data.TensorDataset(y, y))
    for rows in (ArrayRows(mapped, y), ArrayRows(mapped[2:], y[2:]), plain):
        index = torch.tensor([3, 0])
        assert all(
            torch.equal(a, b) for a, b in zip(crossed(rows, tmp_path).take(index), rows.take(index), strict=True)
        )


# bad input


def test_code_that_a_worker_cannot_import_is_refused(nursery, monkeypatch):
    data = classification(SIZES)

    class Local(nn.Linear):
        pass

    class Notebook(nn.Linear):
        pass

    Notebook.__module__, Notebook.__qualname__ = "__main__", "Notebook"
    for make, words in ((Local, "top of a module"), (Notebook, "from my_notebook import Notebook")):
        task = task_of(seeded(make, 4, 3), data, dtype=torch.float32)
        with pytest.raises(UsageError, match=words) as found:
            ProcessesEngine(task, data, workers=2, nursery=nursery)
        assert make.__name__ in str(found.value)


def test_a_loop_that_a_worker_cannot_import_is_refused(mlp):
    engine, reference = mlp
    with pytest.raises(UsageError, match="no name that can be imported"):
        run(Plan(Custom(lambda model, loader, ctx: None), Mean()), engine, 1)
    same(Plan(Gradient(), Mean()), engine, reference)  # the engine still works


def test_settings_of_another_engine_are_refused():
    data = atoll.data.load("digits").split(clients=4)
    plan = recipes.fedavg(lr=0.1)
    for settings, words in (
        ({"workers": 2}, "Processes"),
        ({"engine": "processes", "fleet": "Fleet(HalfNormal())"}, 'engine="inprocess"'),
        ({"engine": "Processes(workers=0)"}, "Processes"),
        ({"engine": "proceses"}, 'Write: engine="processes"'),
    ):
        with pytest.raises(UsageError, match=words):
            atoll.rounds("softmax", data, plan, **settings)


def test_a_closed_engine_raises(nursery):
    data = classification(SIZES)
    engine = ProcessesEngine(task_of(seeded(nn.Linear, 4, 3), data, "loop"), data, workers=1, nursery=nursery)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        run(Plan(Gradient(), Mean()), engine, 1)


def test_partial_work_is_refused(mlp):
    with pytest.raises(UsageError, match="cannot be repeated") as found:
        run(Plan(Train(sgd(0.1), epochs=1), Mean(), pace=Sync(deadline_s=5, partial=True)), mlp[0], 1)
    assert found.value.line == "Sync(deadline_s=5)"


def test_an_unreadable_row_fails_its_client_as_in_one_process(nursery):
    data = classification(SIZES)
    task = task_of(seeded(nn.Linear, 4, 3), data, "loop", torch.float32)
    x, y = data.rows.take(torch.arange(sum(SIZES)))
    x = x.numpy().copy()
    x[0, 0] = np.nan
    broken = replace(data, rows=DatasetRows(torch.utils.data.TensorDataset(torch.from_numpy(x), y)))
    with ProcessesEngine(task, broken, workers=2, nursery=nursery) as engine:
        (state, reports), (ours, expected) = (
            run(Plan(Gradient(), Mean()), one, 2) for one in (engine, InProcessEngine(task, broken))
        )
    assert torch.equal(state.model.theta, ours.model.theta)
    failures = [report.failures for report in reports]
    assert failures == [report.failures for report in expected] and all("row 0" in f.cause for (f,) in failures)
