"""The boundary between Python and C: struct layouts, failed allocations, kept buffers and row numbers."""

import ctypes
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import classification, needs_native, run, task_of
from torch import nn

from atoll import models
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute import compiled, native
from atoll.compute.native.structs import STRUCTS, DescentJob, SumJob, exported
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean, exact
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan

pytestmark = needs_native
PLAN = Plan(Train(sgd(0.1), epochs=1, batch=4), Mean())
TOO_MUCH = 1 << 55  # no machine has this number of bytes


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and a compiler that does not optimise: these tests run no loop of C."""
    cached = (native.library, native._found, native._kept_at)
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "FLAGS", ("-std=gnu11", "-O0", "-march=native"))
    for each in cached:
        each.cache_clear()
    yield tmp_path / "cache"
    for each in cached:
        each.cache_clear()


def change(monkeypatch, old, new):
    """Let the loader read a changed C source, up to the last shared struct: the functions would not fit it."""
    read = native._source

    def changed(name):
        source = b"".join(read(name).partition(b"(Job, JOB_FIELDS)\n")[:2])
        assert source.count(old) == 1
        return source.replace(old, new)

    monkeypatch.setattr(native, "_source", changed)


@pytest.mark.parametrize("name", STRUCTS)
def test_each_library_exports_the_structs_of_python(name):
    compiled.load_libraries(torch.float32)
    assert {struct: exported(native.library(name), struct) for struct in STRUCTS[name]} == STRUCTS[name]
    sizes = {"descent": {"Job": 38, "LayerSpec": 21}, "exact": {"Job": 12}}
    assert {struct: len(layout.fields) for struct, layout in STRUCTS[name].items()} == sizes[name]


@pytest.mark.parametrize(
    ("name", "old", "new", "given"),
    [
        ("exact", b"F(I, threads) ", b"F(I, threads) F(I, cores)", "13 fields and 104 bytes; 'cores' instead of"),
        pytest.param(
            "exact",
            b"F(I, threads) ",
            b"",
            "11 fields and 88 bytes; 'tops' instead of 'threads'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "exact",
            b"F(I, threads) ",
            b"F(int, threads) F(int, cores)",
            "13 fields and 96 bytes; 'cores' instead of",
            marks=pytest.mark.slow,
        ),
        ("exact", b"F(I, clients) F(I, d)", b"F(I, d) F(I, clients)", "'d' instead of 'clients'"),
        ("exact", b"Struct##_size = sizeof", b"Struct##_sizes = sizeof", "does not export it"),
        pytest.param(
            "descent", b"F(I, relu)", b"", "Struct LayerSpec .* 20 fields and 160 bytes", marks=pytest.mark.slow
        ),
        ("descent", b"F(double, lr)", b"F(float, lr) F(float, rate)", "Struct Job .* 39 fields and 304 bytes"),
    ],
)
def test_a_library_with_a_changed_struct_is_refused(name, old, new, given, cache, monkeypatch):
    change(monkeypatch, old, new)
    with pytest.raises(UsageError, match=given) as caught:
        native.library(name)
    error = caught.value
    assert error.required and error.why and error.line == f"rm {native._kept_at(name, ())}"
    with pytest.raises(UsageError, match=given):
        native.present(name)  # never silently replaced by the path without native code


def test_the_line_of_the_refusal_works(cache, monkeypatch):
    place = native._kept_at("exact", ())
    with monkeypatch.context() as patch:
        change(patch, b"F(I, threads) ", b"")
        native._build("exact", (), place)
    with pytest.raises(UsageError, match="11 fields") as caught:
        native.library("exact")
    subprocess.run(caught.value.line, shell=True, check=True)
    code = f"from atoll.compute import native\nnative.FLAGS = {native.FLAGS!r}\nprint(native.library('exact').add)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert place.exists()


def test_a_failed_allocation_is_reported():
    """Of layers, of threads and of digits; nothing is read or written before."""
    descent, sums = compiled.load_libraries(torch.float32), native.library("exact", "WIDE")
    assert descent.run(ctypes.byref(DescentJob(layer_count=TOO_MUCH, clients=1, theta_stride=1))) == 1
    assert descent.run(ctypes.byref(DescentJob(clients=TOO_MUCH, threads=TOO_MUCH, theta_stride=1))) == 1
    for function in (sums.tops, sums.add):
        assert function(ctypes.byref(SumJob(d=TOO_MUCH << 7, threads=TOO_MUCH))) == 1
    assert sums.total(None, ctypes.c_int64(TOO_MUCH), ctypes.c_int64(0), ctypes.c_int64(1), None) == 1


class FailsSecond:
    """The native sum, whose second call of `add` finds no memory."""

    def __init__(self, library):
        self.library, self.calls = library, 0

    def add(self, job):
        self.calls += 1
        return 1 if self.calls == 2 else self.library.add(job)


def test_a_sum_without_memory_leaves_no_uninitialised_digits(monkeypatch):
    rows = torch.full((2, 5000), 3.0)
    failing = FailsSecond(native.library("exact"))
    monkeypatch.setattr(exact, "_library", lambda rows: failing)
    monkeypatch.setattr(exact, "empty", lambda like, shape, dtype: like.new_full(shape, math.nan, dtype=dtype))
    digits = {}
    with pytest.raises(MemoryError, match="no memory for an exact sum"):
        exact.add(digits, rows, torch.ones(2))
    assert failing.calls == 2 and digits
    assert all(not digit.any() for digit in digits.values())


def test_a_job_without_memory_raises(monkeypatch):
    data = classification([5, 5])
    task = task_of(nn.Sequential(nn.Linear(4, 3)), data, "compiled")
    monkeypatch.setattr(compiled, "load_libraries", lambda dtype: type("Full", (), {"run": lambda self, job: 1})())
    x, y = torch.zeros(1, 2, 4).double(), torch.zeros(1, 2).long()
    with pytest.raises(MemoryError, match="no memory"):
        compiled.gradient(task.program, torch.zeros(1, 15).double(), x, y, (2,))


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read in /proc")
def test_kept_buffers_are_released():
    data = classification([8, 8], shape=(28, 28))
    task = task_of(models.build("mlp", (28, 28), 3, "classification", Key(3)), data, "compiled", torch.float32)
    wide = task_of(nn.Sequential(nn.Flatten(), nn.Linear(784, 8000), nn.Linear(8000, 3)), data, "compiled")
    before = run(PLAN, InProcessEngine(task, data), 1)[0].model.theta
    x, y = torch.zeros(1, 2, 28, 28).double(), torch.zeros(1, 2).long()
    theta = torch.zeros(1, wide.layout.d).double()
    compiled.gradient(wide.program, theta, x, y, (2,))
    held = resident()
    native.release_buffers()
    assert held - resident() > 8 * wide.layout.d  # weights and gradient: at least one of them
    native.release_buffers()
    assert torch.equal(run(PLAN, InProcessEngine(task, data), 1)[0].model.theta, before)


@pytest.mark.parametrize(("row", "dtype"), [(16, torch.float32), (-1, torch.float64), (1 << 40, torch.float32)])
def test_a_row_number_outside_the_rows_is_refused(row, dtype):
    data = classification([9, 7], shape=(6, 6), dtype=dtype)
    task = task_of(models.build("mlp", (6, 6), 3, "classification", Key(3)), data, "compiled", dtype)
    order = data.order.clone()
    order[11] = row
    with pytest.raises(UsageError, match=f"Row {row} of a data set with 16 rows") as caught:
        run(PLAN, InProcessEngine(task, replace(data, order=order)), 1)
    assert caught.value.required == "row numbers from 0 to 15." and "address" in caught.value.why


class MoreTargets:
    """Rows whose targets are found although their row numbers are outside the features."""

    in_memory, width = True, 4

    def __init__(self, at):
        self.at = at

    def stored(self, places):
        return compiled.Stored(torch.zeros(6, 4).double(), self.at, torch.zeros(len(self.at)).long())


@pytest.mark.parametrize("at", [(0, 5, 6), (0, -1, 2)])
def test_native_code_is_not_called_with_a_row_number_outside(at, monkeypatch):
    data = classification([5, 5])
    program = task_of(nn.Sequential(nn.Linear(4, 3)), data, "compiled").program
    descent = compiled.CompiledDescent(program, torch.zeros(15).double(), 1, compiled.StepRule(0.1))
    monkeypatch.setattr(compiled, "load_libraries", None)
    with pytest.raises(UsageError, match=r"Row (6|-1) of a data set with 6 rows"):
        descent.follow(MoreTargets(torch.tensor(at)), [(torch.zeros(1, 3).long(), (3,))])


def test_an_empty_step_has_no_row_number_outside():
    compiled._check_rows(torch.empty(0, dtype=torch.int64), torch.empty(0, 3), torch.float32)
