"""One gradient, several backends: layers by hand equal autograd, and a lane's bits do not depend on other lanes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import COMPILED, classification, federation, needs_native, regression, run, task_of
from quick_cases import one_in
from torch import nn

from atoll import models
from atoll.base.errors import UsageError
from atoll.base.random import Key, global_scope
from atoll.compute import compiled, limits, native
from atoll.compute.batches import ClientBatch
from atoll.compute.fused import UnsupportedModel
from atoll.compute.loss import ClassWeighted, binary_cross_entropy, cross_entropy
from atoll.compute.model_state import Batch
from atoll.compute.step_rule import StepRule
from atoll.compute.task import Task
from atoll.compute.tensor_notes import BLOCK, lookup
from atoll.data.rows import DatasetRows
from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec.stage import Codec, Identity
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.plan import Plan

bodies = pytest.mark.parametrize("body", ["fused", COMPILED])

PLAN = Plan(Train(sgd(0.1), epochs=1, batch=4), Mean())
SEED = st.integers(0, 2**32)


LOSSES = ["cross_entropy", "mse", "binary_cross_entropy", ClassWeighted(cross_entropy(), (0.5, 1.0, 3.0))]


@st.composite
def architectures(draw):
    """A random stack of supported layers, and the shape of a row for it."""
    row = shape = (draw(st.integers(1, 3)), draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    layers = []
    for kind in draw(st.lists(st.sampled_from(["conv", "relu", "pool"]), max_size=5)):
        if kind == "conv":
            two = st.tuples(st.integers(1, 3), st.integers(1, 3))
            stride, padding, dilation = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.integers(1, 2))
            outputs, bias = draw(st.integers(1, 4)), draw(st.booleans())
            layers.append(nn.Conv2d(shape[0], outputs, draw(two), stride, padding, dilation, bias=bias))
        elif kind == "pool":
            layers.append(nn.MaxPool2d(draw(st.integers(1, 3)), draw(st.integers(1, 3))))
        else:
            layers.append(nn.ReLU())
        try:
            shape = tuple(nn.Sequential(*layers)(torch.zeros(1, *row)).shape[1:])
        except RuntimeError:  # the image is reduced to nothing
            assume(False)
    layers.append(nn.Flatten())
    width = torch.Size(shape).numel()
    for _ in range(draw(st.integers(0, 2))):
        layers += [nn.Linear(width, wide := draw(st.integers(1, 9)), bias=draw(st.booleans())), nn.ReLU()]
        width = wide
    return [*layers, nn.Linear(width, 3)], row


def passed(task, lanes, x, y, counts):
    """One gradient of some lanes: from the second model on, each lane has another θ."""
    model = task.initial().lanes(lanes)
    model.theta.add_(0.1 * Key(5).normal(model.theta.numel(), model.theta.dtype).view(model.theta.shape))
    return task.gradient(model, Batch(x, y, counts), Key(0).of(torch.arange(lanes)))


@bodies
@settings(max_examples=15)
@given(architectures(), st.sampled_from(LOSSES), SEED, st.integers(2, 4), st.integers(1, 40))
def test_by_hand_is_lanes(body, architecture, loss, seed, lanes, rows):
    layers, shape = architecture
    numbers = loss in ("mse", "binary_cross_entropy")
    with global_scope(Key(seed)):
        for layer in layers:
            getattr(layer, "reset_parameters", int)()
        x = torch.randn(lanes, rows, *shape)
        y = torch.randn(lanes, rows, 3).double() if numbers else torch.randint(3, (lanes, rows))
        y = (y > 0).double() if loss == "binary_cross_entropy" else y
    task = Task.of(nn.Sequential(*layers), loss, (), torch.float64)  # in float32 a near tie may resolve to either
    if body == "compiled":
        try:
            compiled.stages(task.program, shape)
        except UnsupportedModel:
            assume(False)
    counts = tuple(max(1, rows - k) for k in range(lanes))
    ours, theirs = (passed(replace(task, numerics=body), lanes, x.double(), y, counts) for body in (body, "lanes"))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=1e-12)


FAST = ["softmax", "mlp", "cnn", "niid-cnn"]


@bodies
@pytest.mark.parametrize("name", [*FAST, pytest.param("mcmahan-cnn", marks=pytest.mark.slow)])
def test_named_models_after_a_round(name, body):
    """1e-5 relative to lanes in float32: a whole round of local training."""
    data = classification((9, 7, 7, 3), shape=(16, 16), classes=4)
    module = models.build(name, (16, 16), 4, "classification", Key(3))
    ends = [
        run(PLAN, InProcessEngine(task_of(module, data, body, torch.float32), data), 1)[0].model.theta
        for body in (body, "lanes", "loop")
    ]
    moved = (ends[1] - task_of(module, data, "loop", torch.float32).initial().theta).norm()
    assert all((end - ends[1]).norm() <= 1e-5 * moved for end in ends)


@bodies
@settings(max_examples=8)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=9), st.integers(1, 9), st.sampled_from(["mlp", "cnn"]))
def test_a_chunk_changes_no_bit(body, sizes, chunk, name):
    data = classification(sizes, shape=(6, 6))
    module = models.build(name, (6, 6), 3, "classification", Key(3))
    task = task_of(module, data, body, torch.float32)
    one, other = (run(PLAN, InProcessEngine(task, data, size), 2)[0].model.theta for size in (None, chunk))
    assert torch.equal(one, other)


@bodies
@settings(max_examples=8)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=9), st.integers(1, 9))
def test_one_logit_changes_no_bit_with_the_chunk(body, sizes, chunk):
    """Also with class weights: rows do not fill vectors, so a number has another place in each chunk."""
    data = classification(sizes, shape=(13,), classes=2)
    loss = ClassWeighted(binary_cross_entropy, (1.0, 2.5))
    task = task_of(nn.Linear(13, 1), data, body, torch.float32, loss=loss)
    one, other = (run(PLAN, InProcessEngine(task, data, size), 2)[0].model.theta for size in (None, chunk))
    assert torch.equal(one, other)


@bodies
@pytest.mark.parametrize(
    "local", one_in(2, [Gradient(), Train(sgd(0.1), 2), Train(adam(0.01), steps=3, batch=2), Gradient(3)])
)
def test_every_local_part_is_served(local, body):
    data = classification((9, 7, 7, 3), shape=(6, 6))
    module = models.build("cnn", (6, 6), 3, "classification", Key(3))
    plan = Plan(local, Mean())
    engines = [InProcessEngine(task_of(module, data, body), data, 3) for body in (body, "loop")]
    ours, theirs = (run(plan, engine)[0].model.theta for engine in engines)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@bodies
def test_more_rows_than_fit_in_one_pass(body):
    """Convolutions take a bounded number of rows at once. With more rows gradients add up before the step."""
    data = classification((70, 33), shape=(6, 6))
    module = models.build("cnn", (6, 6), 3, "classification", Key(3))
    plan = Plan(Train(sgd(0.1), epochs=2), Mean())
    engines = [InProcessEngine(task_of(module, data, body), data, 3) for body in (body, "loop")]
    ours, theirs = (run(plan, engine)[0].model.theta for engine in engines)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


POOL = [nn.MaxPool2d(2, 1), nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)]
BEHIND = [nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, 1), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.MaxPool2d(2), nn.Flatten()]
BEHIND.append(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("body", "layers"),
    [
        ("fused", POOL),
        ("fused", BEHIND),
        pytest.param("compiled", BEHIND, marks=needs_native),
    ],
)
def test_equal_pixels_of_a_pool_go_to_the_first(body, layers):
    """As in torch: constant images consist of ties only."""
    data = federation(torch.ones(6, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2]), [3, 3])
    module = nn.Sequential(*layers)
    ends = [run(PLAN, InProcessEngine(task_of(module, data, body), data))[0].model.theta for body in (body, "loop")]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_auto_takes_the_fastest_supported_backend():
    data = classification((9, 7), shape=(6, 6))
    for name in ("softmax", "mlp", "cnn"):
        choice = choose(Task.of(models.build(name, (6, 6), 3, "classification", Key(0)), "cross_entropy"), data, PLAN)
        assert choice.task.numerics == "fused" and "fused operations" in choice.reason
    small = regression((5, 5))
    assert choose(Task.of(nn.Linear(3, 1), "mse"), small, PLAN).task.numerics == "fused"
    assert choose(Task.of(nn.Linear(3, 1), "mae"), small, PLAN).task.numerics == "lanes"


class Squashed(nn.Linear):
    """A layer that only looks like a known one."""

    def forward(self, x):
        return super().forward(x).tanh()


def hooked():
    layer = nn.Linear(36, 3)
    layer.register_forward_hook(lambda module, given, out: 2 * out)
    return layer


def tied():
    first, second = nn.Linear(36, 36), nn.Linear(36, 36)
    second.weight = first.weight
    return nn.Sequential(first, second, nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: Squashed(36, 3), "Squashed"),
        (lambda: nn.Sequential(nn.Linear(36, 3), nn.Tanh()), "Tanh"),
        (hooked, "hooks"),
        (tied, "tied"),
        (lambda: nn.Sequential(nn.Linear(36, 3), nn.BatchNorm1d(3)), "tied, frozen or computed"),
        (lambda: nn.Sequential(nn.Unflatten(1, (6, 6)), nn.Linear(6, 3), nn.Flatten(), nn.Linear(18, 3)), "one axis"),
    ],
)
def test_unsupported_cases_are_refused_with_the_reason(layer, why):
    data = classification((9, 7), shape=(36,))
    with pytest.raises(UsageError, match=why):
        choose(Task.of(nn.Sequential(nn.Flatten(), layer()), "cross_entropy"), data, PLAN, "fused")
    assert choose(Task.of(nn.Sequential(nn.Flatten(), layer()), "cross_entropy"), data, PLAN).task.numerics != "fused"


@pytest.mark.parametrize(
    ("name", "body"),
    [
        pytest.param("mlp", "compiled", marks=needs_native),
        pytest.param("cnn", "compiled", marks=needs_native),
        ("mlp", "fused"),
        pytest.param("mlp", "lanes", marks=pytest.mark.slow),
    ],
)
def test_threads_change_no_bit(name, body):
    data = classification((90, 60, 31, 7, 7, 1), shape=(12, 12))
    task = task_of(models.build(name, (12, 12), 3, "classification", Key(3)), data, body, torch.float32)
    ends, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        ends.append(run(PLAN, InProcessEngine(task, data))[0].model.theta)
    torch.set_num_threads(before)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.slow
def test_trying_chunks_and_threads_changes_no_bit():
    """An engine that tunes chunks and threads round by round equals one with a fixed chunk."""
    data = classification([7] * 24, shape=(6, 6))
    task = task_of(models.build("mlp", (6, 6), 3, "classification", Key(3)), data, "fused", torch.float32)
    tries = InProcessEngine(task, data)
    ends = [run(PLAN, engine, 30)[0].model.theta for engine in (tries, InProcessEngine(task, data, 5))]
    assert len(tries.tuning._rates) >= 3 and torch.equal(*ends)


@needs_native
def test_the_place_of_rows_changes_no_bit(monkeypatch):
    """Rows are read in place, bytes too; or copied, some steps at a time, if they are not in memory."""
    images = (256 * Key(1).uniform(40 * 36).reshape(40, 6, 6)).to(torch.uint8)
    labels = Key(2).integers(40, 3)
    labels[:3] = torch.arange(3)
    stored = federation(images, labels, [23, 9, 8])
    floats = federation(images.float() / 255, labels, [23, 9, 8])
    items = [(x, int(y)) for x, y in zip(images, labels, strict=True)]
    behind = replace(stored, rows=DatasetRows(items))
    task = task_of(models.build("cnn", (6, 6), 3, "classification", Key(3)), stored, "compiled", torch.float32)
    plan = Plan(Train(sgd(0.1), epochs=3, batch=4), Mean())
    monkeypatch.setattr(limits, "NATIVE_READ_AHEAD", 36 * 30)
    ends = [run(plan, InProcessEngine(task, data))[0].model.theta for data in (stored, floats, behind)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 80.0, 1e4, 1e30, float("nan")])
def test_logits_far_apart(scale, dtype):
    """e^x from 1 to underflow."""
    data = classification((60,), shape=(5,), classes=21)
    task = task_of(nn.Sequential(nn.Linear(5, 21)), data, "compiled", dtype)
    x = (scale * Key(4).normal(2 * 30 * 5).reshape(2, 30, 5)).to(dtype)
    y = Key(5).integers(60, 21).view(2, 30)
    ours, theirs = (passed(replace(task, numerics=body), 2, x, y, (30, 30)) for body in ("compiled", "lanes"))
    off = 1e-6 if dtype == torch.float32 else 1e-13
    for got, want in ((ours.grad, theirs.grad), (ours.loss, theirs.loss)):
        torch.testing.assert_close(got, want, rtol=0, atol=off * float(want.nan_to_num().abs().max()), equal_nan=True)


@needs_native
def test_an_update_is_shown_with_its_largest_numbers():
    """The number of clients changes no bit, also if the update is so large that it bypasses the caches."""
    data = classification([3] * 20, shape=(28, 28))
    task = task_of(models.build("mlp", (28, 28), 3, "classification", Key(3)), data, "compiled", torch.float32)
    model = task.initial()

    def led(clients):
        descent = task.descent(model, clients, StepRule(0.1))
        places = torch.arange(3 * clients).view(clients, 3)
        descent.follow(ClientBatch(data, torch.arange(clients), torch.float32), [(places, (3,) * clients)] * 2)
        return descent.update()

    many, few = led(20), led(2)
    assert many.nbytes > 2**23 > few.nbytes and torch.equal(many[:2], few)
    whole = nn.functional.pad(many.abs(), (0, -many.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).amax(2)
    assert torch.equal(lookup(many, "peaks"), whole) and torch.equal(lookup(few, "peaks"), whole[:2])


class Larger(Codec):
    """A stage that writes through NumPy, which torch's version counter does not see."""

    def encode(self, x, memory, shared, key):
        x.numpy()[:] *= np.float32(2.0**40)
        return x, {}, {}, memory


@needs_native
def test_maxima_of_an_update_do_not_hold_after_a_stage():
    data = classification([5] * 4, shape=(6, 6))
    task = task_of(models.build("mlp", (6, 6), 3, "classification", Key(3)), data, "compiled", torch.float32)
    plain, larger = (
        run(replace(PLAN, codec=codec, optimizer=sgd(rate)), InProcessEngine(task, data), 1)[0].model.theta
        for codec, rate in ((Identity(), 1.0), (Larger(), 2.0**-40))
    )
    assert torch.equal(plain, larger)


@needs_native
def test_a_class_without_a_logit_is_an_error():
    task = task_of(nn.Sequential(nn.Linear(4, 2)), classification((5, 5)), "compiled")
    with pytest.raises(IndexError, match="out of bounds"):
        passed(task, 2, torch.zeros(2, 3, 4).double(), torch.full((2, 3), 2), (3, 3))


@needs_native
@pytest.mark.parametrize(
    ("loss", "x", "y", "said"),
    [
        ("cross_entropy", torch.zeros(2, 3, 4).long(), torch.zeros(2, 3).long(), "rows of torch.int64"),
        ("cross_entropy", torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), "rows of torch.float32"),
        ("cross_entropy", torch.zeros(2, 3, 4).double(), torch.zeros(2, 3, 2).long(), "targets of shape"),
        ("cross_entropy", torch.zeros(2, 3, 4).double(), torch.zeros(2, 3), "targets of shape"),
        ("mse", torch.zeros(2, 3, 4).double(), torch.zeros(2, 3, 5), "targets of shape"),
    ],
)
def test_inputs_that_native_code_would_misread_are_refused(loss, x, y, said):
    task = task_of(nn.Sequential(nn.Linear(4, 2)), classification((5, 5)), "compiled", loss=loss)
    with pytest.raises((TypeError, ValueError), match=said):
        passed(task, 2, x, y, (3, 3))


@needs_native
def test_whole_numbers_to_predict_are_numbers():
    task = task_of(nn.Sequential(nn.Linear(4, 1)), classification((5, 5)), "compiled", loss="mse")
    x, y = torch.ones(2, 3, 4).double(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    ours, theirs = (passed(replace(task, numerics=body), 2, x, y, (3, 3)) for body in ("compiled", "fused"))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@needs_native
def test_a_long_run_is_worth_native_code():
    data = classification((30, 30), shape=(28, 28))
    task = Task.of(models.build("mlp", (28, 28), 3, "classification", Key(0)), "cross_entropy")
    assert choose(task, data, PLAN, rounds=1).task.numerics == "fused"
    choice = choose(task, data, PLAN, rounds=10_000)
    assert choice.task.numerics == "compiled" and "native code" in choice.reason
    assert choose(task, data, PLAN, "fused", rounds=10_000).task.numerics == "fused"


@needs_native
def test_many_lengths_of_small_clients_are_worth_native_code():
    """Fused layers make a pass for each padded length, whose Python code takes longer than its arithmetic."""
    plan = Plan(Gradient(), Mean(), sgd(0.1))
    task = Task.of(nn.Sequential(nn.Linear(3, 1)), "mse", dtype=torch.float64)
    many, alike = (regression(sizes, 3) for sizes in (range(5, 35), [20] * 30))
    assert choose(task, many, plan, rounds=50).task.numerics == "fused"
    assert choose(task, many, plan, rounds=400).task.numerics == "compiled"
    assert choose(task, alike, plan, rounds=400).task.numerics == "fused"
    assert choose(task, many, PLAN, rounds=400).task.numerics == "fused"  # batches of one length


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library is built yet, and no compiler is cached."""
    remembered = (native.library, native._found, native.compiler, native._kept_at)
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "own"))
    for each in remembered:
        each.cache_clear()
    yield tmp_path / "own"
    for each in remembered:
        each.cache_clear()


def no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    return "no C compiler no-such-compiler"


def compiler_that_says_nothing(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    return "false --version fails"


def compiler_that_fails(fresh, monkeypatch):
    broken = fresh.parent / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo cc 1 && exit\necho no stdlib.h >&2\nexit 1\n')
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    return "no stdlib.h"


def folder_of_others(fresh, monkeypatch):
    fresh.mkdir()
    fresh.chmod(0o777)
    return "other users can write"


@pytest.mark.parametrize("trouble", [no_compiler, compiler_that_says_nothing, compiler_that_fails, folder_of_others])
def test_without_native_code(trouble, fresh, monkeypatch):
    """If requested, it is refused with a line to write. Otherwise `auto` takes fused layers and gives the reason."""
    said = trouble(fresh, monkeypatch)
    data = classification((9, 7), shape=(6, 6))
    task = Task.of(models.build("mlp", (6, 6), 3, "classification", Key(0)), "cross_entropy")
    with pytest.raises(UsageError, match=said) as caught:
        choose(task, data, PLAN, "compiled")
    assert caught.value.line.startswith(("apt-get install", "unset CC", "export ATOLL_CACHE="))
    choice = choose(task, data, PLAN, rounds=10**9)
    assert choice.task.numerics == "fused" and said in choice.reason


@needs_native
def test_a_built_library_is_kept(fresh):
    first = native._kept_at("exact", ())
    assert native.present("exact") is None and not first.exists()
    native.library("exact")
    assert native.present("exact") is not None and first.exists() and [*fresh.iterdir()] == [first]


@needs_native
@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([nn.Conv2d(1, 2, 2, dilation=2), nn.Flatten(), nn.Linear(32, 3)], "dilation"),
        ([nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)], "precedes its first"),
        ([nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 3)], "precedes its first"),
        ([nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(8, 3)], "follows a pool"),
        (
            [nn.Flatten(), nn.Linear(36, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 3, 3), nn.Flatten()],
            "Unflatten",
        ),
        ([nn.Conv2d(1, 3, 6), nn.ReLU(), nn.Flatten()], "end in a Linear"),
        ([nn.Conv2d(1, 3, 5, stride=5), nn.Flatten()], "end in a Linear"),
    ],
)
def test_other_dtypes_take_the_path_without_native_code(layers, why):
    data = classification((9, 7), shape=(1, 6, 6))
    task = Task.of(nn.Sequential(*layers), "cross_entropy")
    with pytest.raises(UsageError, match=why) as caught:
        choose(task, data, PLAN, "compiled")
    assert caught.value.at("shell").line == "--numerics fused"
    assert choose(task, data, PLAN, "fused").task.numerics == "fused"
