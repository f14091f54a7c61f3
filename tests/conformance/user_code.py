"""The zoo: code as users write it, and an independent reference of a training with it.

A case has a factory of a module, a loss, and the outcome: it is trained as the reference trains it, or it is refused
with a text that names the cause. The reference is plain autograd: for each client a fresh module of the factory with
the tensors of the server, and a weighted mean in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from problems import classification, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from atoll import recipes
from atoll.data import Clients
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.optimizer import sgd
from atoll.plan.plan import Plan

SIZES = (9, 5, 7)
LR = 0.2


@dataclass(frozen=True)
class Case:
    """A module of the zoo.

    Args:
        make: builds the module; each call builds an equal one.
        loss: of the training.
        refused: a text of the error, if the module is refused; None: it is trained.
        loop: whether only the loop can train it; the other backends are refused.
        draws: whether a pass draws from a global generator: the reference then has other numbers.
        joined: whether the server joins all buffers by the mean, as the reference does.
        note: a text of the note; None: there is no note.
    """

    make: Callable[[], nn.Module]
    loss: Any = "cross_entropy"
    refused: str | None = None
    loop: bool = False
    draws: bool = False
    joined: bool = True
    note: str | None = None


class Wrapped(nn.Module):
    """A linear layer and the code of a function around it: `forward(module, x)`.

    Other arguments become attributes; those of `buffers` and `hidden` become buffers, the latter not persistent.
    """

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], buffers: Any, hidden: Any, **others: Any) -> None:
        super().__init__()
        self.out, self.code = nn.Linear(4, 3), forward
        for name, value in buffers.items():
            self.register_buffer(name, value)
        for name, value in hidden.items():
            self.register_buffer(name, value, persistent=False)
        for name, value in others.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


class Versioned(nn.Module):
    """A linear layer with extra state."""

    def __init__(self, moves: bool = False) -> None:
        super().__init__()
        self.out, self.version, self.moves = nn.Linear(4, 3), {"format": 2}, moves

    def forward(self, x: Tensor) -> Tensor:
        if self.moves:
            self.version = {"format": self.version["format"] + 1}
        return self.out(x)

    def get_extra_state(self) -> Any:
        return self.version

    def set_extra_state(self, state: Any) -> None:
        self.version = state


class Shared(nn.Module):
    """One layer under two names, and one weight in two layers, with a hook on its gradient."""

    def __init__(self, hook: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again, self.third, self.out = self.first, nn.Linear(4, 4), nn.Linear(4, 3)
        self.third.weight = self.first.weight
        if hook:
            self.first.weight.register_hook(half)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.third(self.again(self.first(x)))))


class Moving(nn.Module):
    """A loss with a buffer or an attribute that each call changes."""

    def __init__(self, buffer: bool, used: bool = False) -> None:
        super().__init__()
        self.used, self.total = used, 0.0
        if buffer:
            self.register_buffer("seen", torch.zeros(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(output, y, reduction="none")
        self.total += 1.0
        if hasattr(self, "seen"):
            self.seen += 1
        return each * self.total if self.used else each


class Weighted(nn.Module):
    """A loss with weights for each class, constant or trained."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        weight = torch.tensor([1.0, 2.0, 0.5])
        if trained:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, reduction="none") * self.weight[y]


def half(gradient: Tensor) -> Tensor:
    return gradient / 2


def plain(module: Any, x: Tensor) -> Tensor:
    return module.out(x)


def scaled(module: Any, x: Tensor) -> Tensor:
    return module.out(x) * module.scale


def noisy(module: Any, x: Tensor) -> Tensor:
    return module.out(x + 0.1 * torch.randn_like(x))


def noisy_in_evaluation(module: Any, x: Tensor) -> Tensor:
    return module.out(x) if module.training else module.out(F.dropout(x, 0.5, training=True))


def rough(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output + 0.5 * torch.randn_like(output), y, reduction="none")


def centred(module: Any, x: Tensor) -> Tensor:
    if module.training:
        module.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
    return module.out(x - module.mean)


def replacing(module: Any, x: Tensor) -> Tensor:
    if module.training:
        module.mean = 0.9 * module.mean + 0.1 * x.detach().mean(0)
    return module.out(x - module.mean)


def growing(module: Any, x: Tensor) -> Tensor:
    module.mean = torch.cat((module.mean, x.detach().mean(0)))
    return module.out(x)


def counting(module: Any, x: Tensor) -> Tensor:
    module.calls += 1
    return module.out(x)


def warming(module: Any, x: Tensor) -> Tensor:
    module.calls += 1
    return module.out(x) * min(1.0, module.calls / 10)


def recording(module: Any, x: Tensor) -> Tensor:
    hidden = module.out(x)
    module.seen["last"].append(hidden)
    module.names.add(len(module.names))
    module.recent.append(hidden.detach())
    module.array += 1
    return hidden


def caching(module: Any, x: Tensor) -> Tensor:
    if module.table is None:
        module.table = torch.arange(4, dtype=x.dtype) / 4
    return module.out(x + module.table)


def data_dependent(module: Any, x: Tensor) -> Tensor:
    if module.mean is None:
        module.mean = x.detach().mean(0)
    return module.out(x - module.mean)


def own_generator(module: Any, x: Tensor) -> Tensor:
    return module.out(x + torch.randn(x.shape, generator=module.generator, dtype=x.dtype))


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def wrapped(forward: Callable[[Any, Tensor], Tensor], **others: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        given = {n: value() if callable(value) else value for n, value in others.items()}
        buffers, hidden = given.pop("buffers", {}), given.pop("hidden", {})
        return Wrapped(forward, buffers, hidden, **given)

    return lambda: seeded(make)


def stack(*layers: Callable[[], nn.Module], then: Callable[[Any], Any] = lambda model: None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(*(layer() for layer in layers))
        then(model)
        return model

    return lambda: seeded(make)


def linear() -> nn.Module:
    return nn.Linear(4, 6)


def last() -> nn.Module:
    return nn.Linear(6, 3)


def norm() -> nn.Module:
    return nn.BatchNorm1d(6)


def quiet(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of torch that warns that it is old."""

    def changed(model: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model)

    return changed


def computed(model: Any) -> None:
    model.table = model[0].weight * 2


def frozen(model: Any) -> None:
    model[1].requires_grad_(False).eval()


RANKS: dict[str, Any] = {
    "buffers": lambda: {f"b{rank}": torch.arange(float(3**rank)).reshape([3] * rank) for rank in range(5)},
    "scale": lambda: nn.Parameter(torch.tensor(2.0)),
    "empty": lambda: nn.Parameter(torch.zeros(0, 3)),
    **{f"p{rank}": lambda rank=rank: nn.Parameter(torch.ones([2] * rank)) for rank in range(1, 5)},
}
KINDS: dict[str, Any] = {
    "buffers": lambda: {
        "complex": torch.tensor([1 + 2j, 3j]),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(3),
        "short": torch.tensor([0.1], dtype=torch.float16),
        "wide": torch.tensor([0.1], dtype=torch.float64),
        "none": torch.zeros(0),
    },
}
OUTSIDE = nn.Linear(3, 3)


def with_outside(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(OUTSIDE(output.float()), y, reduction="none")


MODULES = {
    "plain": Case(wrapped(plain)),
    "batch norm": Case(stack(linear, norm, last)),
    "tensors of each rank": Case(wrapped(scaled, **RANKS)),
    "tensors of each dtype": Case(wrapped(plain, **KINDS)),
    "extra state": Case(lambda: seeded(Versioned)),
    "extra state that moves": Case(lambda: seeded(Versioned, True), refused="extra state"),
    "pruned": Case(stack(linear, last, then=lambda m: prune.l1_unstructured(m[0], "weight", 0.5)), loop=True),
    "old weight norm": Case(stack(linear, last, then=quiet(lambda m: nn.utils.weight_norm(m[0]))), loop=True),
    "old spectral norm": Case(
        stack(linear, last, then=quiet(lambda m: nn.utils.spectral_norm(m[0]))), loop=True, joined=False
    ),
    "weight norm": Case(stack(linear, last, then=lambda m: parametrizations.weight_norm(m[0]))),
    "spectral norm": Case(stack(linear, last, then=lambda m: parametrizations.spectral_norm(m[0])), joined=False),
    "orthogonal": Case(stack(linear, last, then=lambda m: parametrizations.orthogonal(m[0]))),
    "gradient hook": Case(stack(linear, last, then=lambda m: m[0].weight.register_hook(half)), loop=True),
    "hook after accumulation": Case(
        stack(linear, last, then=lambda m: m[0].weight.register_post_accumulate_grad_hook(lambda p: None)),
        refused="hook after the accumulation",
    ),
    "shared": Case(lambda: seeded(Shared)),
    "shared with a hook": Case(lambda: seeded(Shared, True), loop=True),
    "module hooks": Case(
        stack(
            linear,
            last,
            then=lambda m: (
                m[0].register_forward_hook(lambda module, args, output: output * 2),
                m[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
            ),
        )
    ),
    "module backward hook": Case(
        stack(linear, last, then=lambda m: m[1].register_full_backward_hook(lambda module, i, o: None))
    ),
    "scripted": Case(lambda: seeded(lambda: quietly(torch.jit.script, nn.Sequential(linear(), norm(), last())))),
    "frozen batch norm": Case(stack(linear, norm, last, then=frozen)),
    "all in evaluation mode": Case(stack(linear, norm, last, then=lambda m: m.eval()), note="evaluation mode"),
    "hidden buffer that moves": Case(wrapped(centred, hidden=lambda: {"mean": torch.zeros(4)})),
    "hidden buffer that is constant": Case(wrapped(scaled, hidden=lambda: {"scale": torch.tensor([0.1, 0.3, 0.7])})),
    "buffer that is replaced": Case(wrapped(replacing, buffers=lambda: {"mean": torch.zeros(4)})),
    "buffer that grows": Case(wrapped(growing, buffers=lambda: {"mean": torch.zeros(4)}), refused="buffer mean"),
    "attribute that is a record": Case(wrapped(counting, calls=0), loop=True),
    "attribute that matters": Case(wrapped(warming, calls=0), refused='register_buffer("calls"'),
    "containers that are records": Case(
        wrapped(
            recording,
            seen=lambda: {"last": []},
            names=set,
            recent=lambda: deque(maxlen=2),
            array=lambda: np.zeros(2),
        ),
        loop=True,
    ),
    "attribute that is a cache": Case(wrapped(caching, table=None), loop=True),
    "buffer that is set once": Case(wrapped(data_dependent, buffers=lambda: {"mean": None}), refused="mean"),
    "attribute from the first rows": Case(wrapped(data_dependent, mean=None), refused="mean"),
    "generator as attribute": Case(wrapped(own_generator, generator=torch.Generator), refused="generator"),
    "computed attribute": Case(wrapped(scaled, scale=lambda: torch.ones(3, requires_grad=True) * 2), refused="scale"),
    "computed attribute that is not read": Case(stack(linear, last, then=computed)),
    "draws": Case(wrapped(noisy), loop=True, draws=True),
    "draws in evaluation": Case(wrapped(noisy_in_evaluation), loop=True, draws=True),
    "loss draws": Case(wrapped(plain), loss=rough, loop=True, draws=True),
    "loss with constant weights": Case(wrapped(plain), loss=Weighted(trained=False)),
    "loss with trained weights": Case(wrapped(plain), loss=Weighted(trained=True), refused="weight"),
    "loss with weights of another module": Case(wrapped(plain), loss=with_outside, refused="shape (3, 3)"),
    "loss with a moving buffer": Case(wrapped(plain), loss=Moving(buffer=True), refused="seen"),
    "loss with a record": Case(wrapped(plain), loss=Moving(buffer=False), loop=True),
    "loss with a moving factor": Case(wrapped(plain), loss=Moving(buffer=False, used=True), refused="total"),
}


def weight_factory() -> nn.Module:
    return MODULES["weight norm"].make()


def containers_factory() -> nn.Module:
    return MODULES["containers that are records"].make()


PLAN = Plan(Train(sgd(LR), epochs=3), Mean(), recipes.distributed_gd(1.0).optimizer)  # full batches: no order of rows


def data_of(case: Case, dtype: torch.dtype = torch.float32) -> Clients:
    """The clients of a case."""
    return classification(SIZES, dtype=dtype)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, including buffers that `state_dict` leaves out."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: t.detach().clone() for n, t in named.items()}


def load(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Write tensors into a module, by name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(tensors[name])
    return module


def typed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with real float parameters and float32 buffers in a dtype; other tensors stay."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.to(dtype)
    return module


def reference(case: Case, data: Clients, rounds: int, dtype: torch.dtype, epochs: int = 3) -> dict[str, Tensor]:
    """The tensors after some rounds of federated averaging with full batches, by plain autograd."""
    server = tensors_of(typed(case.make(), dtype))
    for _ in range(rounds):
        after, weights = [], []
        for client in range(data.count):
            module, loss = load(typed(case.make(), dtype), server), copy.deepcopy(case.loss)
            loss = F.cross_entropy if case.loss == "cross_entropy" else loss
            if not any(m.training for m in module.modules()):
                module.train()
            x, y = data.take(data.client_rows(client))
            trained = [p for p in module.parameters() if p.requires_grad]
            for _ in range(epochs):
                module.zero_grad()
                loss(module(x.to(dtype)), y).mean().backward()
                for p in trained:
                    if p.grad is not None:
                        p.data.sub_(LR * p.grad)
            after.append(tensors_of(module))
            weights.append(len(x))
        server = {n: _joined([t[n] for t in after], weights) for n in server}
    return server


def _joined(tensors: list[Tensor], weights: list[int]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0] if tensors[0].is_complex() else torch.stack(tensors).amax(0)
    if all(torch.equal(t, tensors[0]) for t in tensors):
        return tensors[0]
    total = sum(w * t.double() for w, t in zip(weights, tensors, strict=True)) / sum(weights)
    return total.to(tensors[0].dtype)
