"""For every backend that the start of a run chooses for a model, the chunk size changes no bit of a client."""

import pytest
import torch
from problems import classification, run, seeded, task_of
from quick_cases import by_turns, one_in, only
from torch import nn

from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.position_check import EXACT, PositionCheck, _exact, _same_anywhere
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan

DATA = classification((17, 17, 16, 10, 7, 7, 7, 5, 4), (5,), 3)
MIDDLES = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "dropout": nn.Dropout,
    "softmax": lambda: nn.Softmax(-1),
}
NORMS = {"layer norm": nn.LayerNorm, "batch norm": nn.BatchNorm1d}


def bits(module, loss="cross_entropy", data=DATA):
    """The reason of the choice, and θ after two rounds with several chunk sizes."""
    out = []
    for local in (Gradient(), Train(sgd(0.1), epochs=1, batch=5)):
        plan = Plan(local, Mean(), sgd(0.5))
        choice = choose(task_of(module, data, "loop", torch.float32, loss), data, plan)
        for chunk in (None, 1, 2, 3):
            state, _ = run(plan, InProcessEngine(choice.task, data, chunk))
            out.append(state.model.theta)
        first, *others = out[-4:]
        assert all(torch.equal(first, other) for other in others), choice.reason
    return choice.reason


def mlp(width, middle):
    return seeded(lambda: nn.Sequential(nn.Linear(5, width), middle(), nn.Linear(width, 3)))


@pytest.mark.parametrize("width", only([7], [7, 33]))
@pytest.mark.parametrize("middle", only(["dropout"], MIDDLES))
def test_elementwise(middle, width):
    bits(mlp(width, MIDDLES[middle]))


@pytest.mark.parametrize(("norm", "width"), one_in(2, by_turns(NORMS, [7, 16])))
def test_norms(norm, width):
    bits(mlp(width, lambda: NORMS[norm](width)))


def test_logistic():
    data = classification((17, 17, 16, 10, 7, 7, 7, 5, 4), (5,), 2)
    assert "one pass" in bits(seeded(nn.Linear, 5, 1), "binary_cross_entropy", data)


def test_rounding_that_depends_on_the_place_is_found():
    """Sigmoid differs between vectors and the remainder, so it depends on position if rows do not fill vectors."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for width, found in ((64, set()), (63, {"sigmoid"})):
        with PositionCheck(rows=3) as watch:
            (x[:, :width].sigmoid() * x[:, :width].relu().exp()).sum().backward()
        assert watch.position_dependent == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_tested_has_the_same_bits_everywhere(dtype):
    """The operations of `EXACT`, on numbers of many sizes; a scaled sum and a rounded quotient are tested."""
    a, b = (torch.randn(300, generator=torch.Generator().manual_seed(i), dtype=dtype).exp() ** 9 for i in range(2))
    further = {"where": (a > b, a, b), "threshold_backward": (a, b, 1.0)}
    ops = torch.ops.aten
    for name in EXACT:
        op = getattr(ops, name)
        func = getattr(op, "Tensor" if "Tensor" in op.overloads() else "self" if name == "where" else "default")
        args = further.get(name) or ((a, b) if "Tensor" in op.overloads() else (a,))
        assert _exact(func, args, {}) and _same_anywhere(func, args, {}), name
    tested = (
        (ops.add.Tensor, (a, b), {"alpha": 0.1}),
        (ops.add.Scalar, (a, 2, 0.1), {}),
        (ops.sigmoid.default, (a,), {}),
    )
    tested += (ops.mul.Tensor, (a.bfloat16(), b), {}), (ops.mul.Tensor, (a, 1j * b), {})
    assert not any(_exact(*each) for each in tested)
