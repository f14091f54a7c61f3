"""Shapes of outputs, targets, losses and metrics: equal to torch, or refused with both shapes."""

import itertools
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from problems import NO_NATIVE, classification, federation, seeded
from torch import Tensor, nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.base.lines import form
from atoll.base.random import Key
from atoll.compute.loss import (
    LOSSES,
    binary_cross_entropy,
    cross_entropy,
    huber,
    loss_of,
    mae,
    mse,
    poisson,
    quantile,
    values_of,
)
from atoll.compute.metrics import Metric, named_metric
from atoll.compute.shapes import aligned

ROWS = 5
GRID = [(ROWS, *rest) for axes in range(3) for rest in itertools.product((1, 2, 3), repeat=axes)]
GRID += [(ROWS, *rest) for rest in itertools.product((1, 2), repeat=3)]
TORCH = {
    mse: lambda o, y: F.mse_loss(o, y, reduction="none"),
    mae: lambda o, y: F.l1_loss(o, y, reduction="none"),
    binary_cross_entropy: lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="none"),
    huber(0.7): lambda o, y: F.huber_loss(o, y, reduction="none", delta=0.7),
    poisson: lambda o, y: F.poisson_nll_loss(o, y, log_input=True, full=False, reduction="none"),
    quantile(0.9): lambda o, y: torch.where(y > o, 0.9 * (y - o), 0.1 * (o - y)),
}


def draw(shape, seed=0):
    return Key(seed).fold("shapes", *shape).normal(torch.Size(shape).numel()).reshape(shape)


def rows_of(values):
    return values.reshape(len(values), -1).mean(1)


@pytest.mark.parametrize("loss", TORCH)
@pytest.mark.parametrize("rest", [(), (2,), (2, 3), (3, 2, 2)])
def test_losses_of_entries_equal_torch(loss, rest):
    output, y = draw((ROWS, *rest)), draw((ROWS, *rest), 1)
    y = (y > 0).double() if loss is binary_cross_entropy else y
    torch.testing.assert_close(loss(output, y), rows_of(TORCH[loss](output, y)), rtol=1e-12, atol=1e-12)


def long(shape):
    return [n for n in shape if n > 1]


def test_every_pair_of_shapes_is_equal_to_torch_or_refused():
    """Numbers of one place are compared with numbers of the same place, never with those of another."""
    same = 0
    for shape, target in itertools.product(GRID, GRID):
        output, y = draw(shape), (draw(target, 1) > 0).double()
        if long(shape) != long(target):
            for loss in TORCH:
                with pytest.raises(UsageError) as error:
                    loss(output, y)
                assert str(shape) in str(error.value) and str(target) in str(error.value)
            continue
        same += 1
        matched = output.squeeze().reshape(target)  # the order of the numbers stays
        for loss, reference in TORCH.items():
            assert torch.allclose(loss(output, y), rows_of(reference(matched, y)), rtol=1e-12, atol=1e-12)
    assert same > len(GRID)


def entropies(output, y):
    """The per-row cross-entropy of each axis at which torch's function takes these labels, by that axis."""
    found = {}
    for at in {1, output.dim() - 1} if output.dim() > 1 else ():
        moved = output.movedim(at, 1)
        if moved.shape[:1] + moved.shape[2:] == y.shape:
            found[at] = rows_of(F.cross_entropy(moved, y, reduction="none"))
    return found


def test_the_class_axis_follows_from_the_shapes():
    fitting = set()
    for shape, target in itertools.product([*GRID, (ROWS, 2, 4, 2), (ROWS, 4, 2, 2)], GRID):
        output, y = draw(shape), torch.zeros(target, dtype=torch.int64)
        found = entropies(output, y)
        if len(found) == 1:
            ((at, wanted),) = found.items()
            torch.testing.assert_close(cross_entropy()(output, y), wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(cross_entropy(axis=at)(output, y), wanted, rtol=1e-12, atol=1e-12)
            fitting.add((len(shape), at))
        elif len(found) == 2:
            with pytest.raises(UsageError, match="axis 1 or on the last axis") as error:
                cross_entropy()(output, y)
            for line, (at, wanted) in zip(
                form(error.value.write, "python").splitlines(), sorted(found.items()), strict=True
            ):
                named = loss_of(line.removeprefix("loss=").strip('"'))
                assert named.axis % output.dim() == at
                torch.testing.assert_close(named(output, y), wanted, rtol=1e-12, atol=1e-12)
        elif not any(long(shape[:at] + shape[at + 1 :]) == long(target) for at in range(1, len(shape))):
            with pytest.raises(UsageError) as error:
                cross_entropy()(output, y)
            assert str(shape) in str(error.value) and str(target) in str(error.value)
    assert fitting == {(2, 1), (3, 1), (3, 2), (4, 1), (4, 3)}


@pytest.mark.parametrize(
    ("shape", "target", "axis"), [((5, 3), (5, 1), None), ((5, 1, 3), (5,), None), ((5, 3, 1), (5,), 1)]
)
def test_labels_differ_by_axes_of_length_one(shape, target, axis):
    y = torch.arange(5) % 3
    wanted = F.cross_entropy(draw(shape).reshape(5, 3), y, reduction="none")
    torch.testing.assert_close(cross_entropy(axis=axis)(draw(shape), y.reshape(target)), wanted)
    right = (draw(shape).reshape(5, 3).argmax(1) == y).float()
    assert torch.equal(named_metric("accuracy", axis=axis).sums(draw(shape), y.reshape(target)).float(), right)


def test_an_axis_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="on axis 1"):
        cross_entropy(axis=1)(torch.zeros(4, 5, 3), torch.zeros(4, 5).long())
    for text in ("cross_entropy(axis=0)", "cross_entropy(axis=0.5)", "cross_entropi(axis=1)"):
        with pytest.raises(UsageError):
            loss_of(text)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_named_axis_reaches_loss_and_accuracy(axis):
    """Seven places and seven classes: only the axis in the loss decides, and the default accuracy follows it."""
    x, y = draw((24, 4, 7)).float(), Key(1).integers(24 * 7, 7).reshape(24, 7)
    data, net = federation(x, y, (24,)), seeded(nn.Conv1d, 4, 7, 1)
    with pytest.raises(UsageError, match=r"cross_entropy\(axis=1\)"):
        atoll.rounds(net, data, recipes.gd(0.1), rounds=1)
    training = atoll.rounds(net, data, recipes.gd(0.1), rounds=1, loss=f"cross_entropy(axis={axis})")
    report, output = training.next(), net(x).detach().movedim(axis, 1)
    assert report.metrics["loss"] == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-6)
    model = training.model(x).detach()
    assert training.task.metrics[0].sums(model, y).mean() == pytest.approx(
        float((model.argmax(axis) == y).float().mean())
    )


NEAR = {
    "loss": lambda o, y: F.cross_entropy(o, y),
    "column": lambda o, y: F.cross_entropy(o, y, reduction="none")[:, None],
    "None": lambda o, y: None,
    "number": lambda o, y: 0.5,
    "shorter": lambda o, y: F.cross_entropy(o, y, reduction="none")[1:],
    "elsewhere": lambda o, y: torch.zeros(len(y), device="meta"),
    "nan": lambda o, y: F.cross_entropy(o, y, reduction="none") * float("nan"),
    "raises": lambda o, y: o[:, 99],
}
DATA = classification([9, 7, 5, 3])


@pytest.mark.parametrize("numerics", ["auto", "loop"])
@pytest.mark.parametrize("how", NEAR)
def test_a_loss_or_metric_without_one_number_a_row_is_refused(how, numerics):
    """Before round 0; a mean of a metric would be divided by the rows."""
    words = {"numerics": numerics, "rounds": 1}
    net = seeded(nn.Linear, 4, 3)
    for case in ({"loss": NEAR[how]}, {"metrics": Metric("near", NEAR[how])}):
        with pytest.raises(UsageError) as error:
            atoll.rounds(net, DATA, recipes.fedavg(0.1), **words, **case)
        assert ("metric near" if "metrics" in case else "loss") in str(error.value)
        if how in ("loss", "column", "shorter"):
            assert "(4, 3)" in str(error.value) and "(4,)" in str(error.value)


def test_a_loss_that_changes_its_shape_later_fails():
    def late(output, y):
        each = F.cross_entropy(output, y, reduction="none")
        return each if len(each) <= 4 else each.mean()

    with pytest.raises(atoll.AtollError, match="has shape"):
        atoll.rounds(seeded(nn.Linear, 4, 3), DATA, recipes.gd(0.1), rounds=1, numerics="loop", loss=late).next()


@pytest.mark.parametrize("numerics", ["fused", "lanes", "loop"])
def test_boolean_and_integer_metrics_become_floats(numerics):
    metrics = (
        Metric("right", lambda o, y: o.argmax(-1) == y),
        Metric("count", lambda o, y: (o.argmax(-1) == y).long()),
        "accuracy",
    )
    data = atoll.data.arrays(DATA.rows.x, DATA.rows.y).split(3, held_out=0.3)
    report = atoll.rounds(
        seeded(nn.Linear, 4, 3), data, recipes.fedavg(0.1), rounds=1, numerics=numerics, metrics=metrics
    ).next()
    assert report.metrics["right"] == report.metrics["count"] == report.metrics["accuracy"] > 0


# Losses of torch.nn


class Column(nn.Module):
    """One number for each row, on an axis of its own."""

    def __init__(self, width=1):
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x):
        return self.linear(x)


REAL = federation(DATA.rows.x, draw((24,)).float(), (9, 7, 5, 3))
BINARY = federation(DATA.rows.x, (draw((24,)) > 0).long(), (9, 7, 5, 3))
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])
OF_TORCH = [
    (nn.L1Loss, {}, REAL, 1),
    (nn.SmoothL1Loss, {"beta": 0.3}, REAL, 1),
    (nn.HuberLoss, {"delta": 0.2}, REAL, 1),
    (nn.BCEWithLogitsLoss, {"pos_weight": torch.tensor([3.0])}, BINARY, 1),
    (nn.CrossEntropyLoss, {"weight": WEIGHTS, "label_smoothing": 0.1}, DATA, 3),
    (nn.MultiMarginLoss, {"margin": 0.5}, DATA, 3),
]


@pytest.mark.parametrize(("make", "words", "data", "width"), OF_TORCH, ids=lambda v: getattr(v, "__name__", ""))
def test_losses_of_torch_get_aligned_outputs(make, words, data, width):
    """The output `[n, 1]` would be broadcast against `[n]` to n² numbers."""
    net, x, y = seeded(Column, width), data.rows.x, data.rows.y
    output = net(x) if width > 1 else net(x)[:, 0]
    each = make(**words, reduction="none")(output, y if width > 1 else y.float())
    for numerics in ("auto", "loop"):
        training = atoll.rounds(
            net, data, recipes.distributed_gd(0.1), rounds=1, loss=make(**words, reduction="none"), numerics=numerics
        )
        assert training.next().metrics["loss"] == pytest.approx(float(each.detach().mean()), rel=1e-5)
        wanted = torch.autograd.grad(each.mean(), list(net.parameters()), retain_graph=True)
        moved = training.first.theta - training.state.model.theta
        torch.testing.assert_close(moved, 0.1 * torch.cat([g.flatten() for g in wanted]), rtol=1e-4, atol=1e-6)


def test_losses_of_torch_average_the_places_of_a_row():
    output, y = draw((4, 3, 6)), Key(0).integers(24, 3).reshape(4, 6)
    y[0, 2:] = y[1, 1] = -100
    each = nn.CrossEntropyLoss(reduction="none")(output, y)
    wanted = each.sum(1) / (y >= 0).sum(1)
    loss = nn.CrossEntropyLoss(reduction="none")
    torch.testing.assert_close(values_of(loss, output, y), wanted)
    torch.testing.assert_close(values_of(loss, output.mT, y), wanted)  # the classes are on the last axis
    torch.testing.assert_close(values_of(nn.NLLLoss(reduction="none"), output.log_softmax(1), y), wanted)


class Mine(nn.L1Loss):
    """A loss of the user's own."""


@pytest.mark.parametrize(
    "loss",
    [nn.L1Loss(), nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), nn.HuberLoss("sum", delta=0.2), Mine()],
)
def test_another_reduction_is_refused_with_the_same_class(loss):
    for case in ({"loss": loss}, {"metrics": Metric("near", loss)}):
        with pytest.raises(UsageError, match="reduction") as error:
            atoll.rounds(seeded(nn.Linear, 4, 3), DATA, recipes.fedavg(0.1), rounds=1, **case)
        made = eval(form(error.value.write, "python"), {"nn": nn, "torch": torch, "Mine": Mine})
        assert type(made) is type(loss) and made.reduction == "none"
        for name, value in vars(loss).items():
            if isinstance(value, (int, float)):
                assert vars(made)[name] == value
        assert all(torch.equal(b, made.get_buffer(n)) for n, b in loss.named_buffers())


def test_a_function_of_torch_is_refused_with_its_reduction():
    with pytest.raises(UsageError) as error:
        atoll.rounds(seeded(nn.Linear, 4, 3), DATA, recipes.fedavg(0.1), rounds=1, loss=F.cross_entropy)
    loss = eval(form(error.value.write, "python"), {"torch": torch})
    assert atoll.rounds(seeded(nn.Linear, 4, 3), DATA, recipes.fedavg(0.1), rounds=1, loss=loss).next()


# Outputs


def last(*layers):
    return nn.Sequential(nn.Linear(4, 3), *layers)


@pytest.mark.parametrize(
    ("net", "probabilities"),
    [
        (last(nn.Softmax(-1)), True),
        (last(nn.LogSoftmax(-1)), False),
        (last(nn.Sigmoid()), False),
        (last(nn.ReLU()), False),
        (last(), False),
    ],
)
def test_probabilities_with_cross_entropy_are_refused(net, probabilities):
    for loss in (None, nn.CrossEntropyLoss(reduction="none")):
        if probabilities:
            with pytest.raises(UsageError, match="softmax"):
                atoll.rounds(net, DATA, recipes.fedavg(0.1), rounds=1, loss=loss)
        else:
            assert atoll.rounds(net, DATA, recipes.fedavg(0.1), rounds=1, loss=loss).task.loss


Pair = namedtuple("Pair", "scores rows")


@dataclass
class Answer:
    loss: Tensor | None
    scores: Tensor


class Wrapping(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    "wrap",
    [lambda o: {"scores": o, "hidden": 2 * o}, lambda o: Pair(o, 2 * o), lambda o: Answer(None, o), lambda o: (o, 1)],
)
def test_an_output_that_is_no_tensor_is_refused_with_a_wrapper(wrap):
    with pytest.raises(UsageError, match="returned a") as error:
        atoll.rounds(seeded(Wrapping, wrap), DATA, recipes.fedavg(0.1), rounds=1)
    assert "(4, 3)" in error.value.given
    names = {"torch": torch}
    exec(form(error.value.write, "python"), names)
    wrapped = atoll.rounds(names["Logits"](seeded(Wrapping, wrap)), DATA, recipes.fedavg(0.1), rounds=1)
    plain = atoll.rounds(seeded(nn.Linear, 4, 3), DATA, recipes.fedavg(0.1), rounds=1, numerics=wrapped.task.numerics)
    assert wrapped.next().metrics["loss"] == plain.next().metrics["loss"]


def test_other_outputs():
    with pytest.raises(UsageError, match="returned None"):
        atoll.rounds(seeded(Wrapping, lambda o: None), DATA, recipes.fedavg(0.1), rounds=1)
    with pytest.raises(UsageError, match="returned a str"):
        atoll.rounds(seeded(Wrapping, str), DATA, recipes.fedavg(0.1), rounds=1)
    # A loss of the user's own may read an output of several tensors.
    both = lambda o, y: F.cross_entropy(o[0], y, reduction="none") + o[1].square().mean(1)  # noqa: E731
    words = {"loss": both, "metrics": (), "rounds": 1}
    first = [
        atoll.rounds(seeded(Wrapping, lambda o: (o, o)), DATA, recipes.gd(0.1), numerics=n, **words).next().metrics
        for n in ("lanes", "loop")
    ]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)


# Guesses follow the model's output


class Gated(nn.Module):
    """The last registered layer is the gate, or the output, and the output has the given width."""

    def __init__(self, width, gate_last):
        super().__init__()
        layers = {"out": nn.Linear(4, width), "gate": nn.Linear(4, 3 - width)}
        for name in layers if gate_last else reversed(layers):
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.out(x) * torch.sigmoid(self.gate(x).sum(-1, keepdim=True))


class Bare(nn.Module):
    """One logit, by a product and without an axis of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (Gated(2, True), "cross_entropy()"),
        (Gated(2, False), "cross_entropy()"),
        (Gated(1, True), "binary_cross_entropy"),
        (Gated(1, False), "binary_cross_entropy"),
        (Bare(), "binary_cross_entropy"),
        (nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 1, 1)), "binary_cross_entropy"),
        (nn.Sequential(nn.Linear(4, 1), nn.Sequential(nn.Identity())), "binary_cross_entropy"),
        (nn.Bilinear(4, 4, 1), None),
        ("logistic", "binary_cross_entropy"),
        ("softmax", "cross_entropy(axis=-1)"),
    ],
)
def test_the_loss_follows_from_the_output(net, loss):
    if loss is None:
        with pytest.raises(UsageError, match="does not take a batch"):
            atoll.rounds(net, BINARY, recipes.fedavg(0.1), rounds=1)
        return
    training = atoll.rounds(net, BINARY, recipes.fedavg(0.1), rounds=1)
    assert getattr(training.task.loss, "__name__", repr(training.task.loss)) == loss
    assert training.task.metrics[0].name == "accuracy"
    assert training.next().metrics["loss"] > 0


def test_one_logit_for_three_classes_is_refused():
    with pytest.raises(UsageError, match="3 classes"):
        atoll.rounds(nn.Linear(4, 1), DATA, recipes.fedavg(0.1), rounds=1)


# Places without a label


def sequences(rows=20, length=6, words=5):
    """Sequences of unequal length. Places after the end have the label −100."""
    key = Key(0).fold("sequences")
    x = key.fold("x").integers(rows * length, words).reshape(rows, length)
    ends = 1 + key.fold("ends").integers(rows, length)
    y = (x + 1) % words
    y[torch.arange(length) >= ends[:, None]] = -100
    return x, y


class Reader(nn.Module):
    def __init__(self, words=5):
        super().__init__()
        self.embed, self.out = nn.Embedding(words, 4), nn.Linear(4, words)

    def forward(self, x):
        return self.out(self.embed(x))


@pytest.mark.parametrize("numerics", ["lanes", "loop"])
def test_places_without_a_label_do_not_count(numerics):
    """The mean over the labelled places of each row, in loss, gradient and accuracy."""
    (x, y), net = sequences(), seeded(Reader)
    data = atoll.data.arrays(x, y, test=(x[:7], y[:7])).split(4)
    training = atoll.rounds(net, data, recipes.distributed_gd(0.5), rounds=1, numerics=numerics)
    report = training.next()
    total = torch.stack([F.cross_entropy(net(row[None])[0], label) for row, label in zip(x, y, strict=True)]).mean()
    assert report.metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-6)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(net.parameters()))])
    torch.testing.assert_close((training.first.theta - training.state.model.theta) / 0.5, wanted, rtol=1e-4, atol=1e-6)
    right = [
        float((training.model(a[None])[0].argmax(-1) == b)[b >= 0].float().mean()) for a, b in zip(x, y, strict=True)
    ]
    assert report.metrics["accuracy"] == pytest.approx(sum(right[:7]) / 7, rel=1e-6)


def test_several_labels_of_a_row_without_some():
    """Explicit backends leave out the same labels as the loop."""
    y = Key(3).integers(24 * 11, 3).reshape(24, 11)
    y[:, 1:][y[:, 1:] == 2] = -100
    y[:, 0].clamp_(max=1)
    data, net = federation(DATA.rows.x, y, (9, 7, 5, 3)), seeded(nn.Linear, 4, 11)
    theta = {}
    for numerics in ("loop", "lanes", "fused", *(["compiled"] if not NO_NATIVE else [])):
        words = {"rounds": 1, "loss": "binary_cross_entropy", "metrics": (), "numerics": numerics}
        training = atoll.rounds(net, data, recipes.fedavg(0.3, batch=4), **words)
        training.next()
        theta[numerics] = training.state.model.theta
    for found in theta.values():
        torch.testing.assert_close(found, theta["loop"], rtol=1e-5, atol=1e-6)


def test_other_negative_labels_are_refused():
    x, y = sequences()
    y[3, 0] = -1
    with pytest.raises((UsageError, IndexError)):
        atoll.rounds(seeded(Reader), atoll.data.arrays(x, y).split(1, held_out=0), recipes.gd(0.1), rounds=1).next()
    labels, output = torch.tensor([[1, 0, -100]]), torch.tensor([[2.0, 1.0, 50.0]])
    wanted = F.binary_cross_entropy_with_logits(output[:, :2], labels[:, :2].float())
    torch.testing.assert_close(LOSSES["binary_cross_entropy"](output, labels), wanted[None])


def test_a_shape_is_checked_before_it_is_broadcast():
    assert aligned(torch.zeros(4, 1), torch.zeros(4)).shape == (4,)
    for shape in ((), (1,), (5,), (4, 4)):
        with pytest.raises(UsageError):
            aligned(torch.zeros(shape), torch.zeros(4))
