"""The base of optimizers, and their steps: at the server once per round, in local training in place.

    θ⁺, state⁺ = optimizer.update(θ, g, sums, state, round)       no argument changes
    stepper = optimizer.stepper(θ, state, lr); stepper.step(g)    θ and state change

A rule acts on each coordinate independently, so it can be computed on any part of θ. The lanes are concatenated and
cut into blocks. A cut is made between lanes with different step counts, since the scalars of a rule depend on the
count. A cut is also made after every `limits.OPTIMIZER_BLOCK` numbers, so that temporaries stay small. A rule of
`torch.optim` receives the blocks as its parameters, and views of the state here as its state.

The bits of a lane do not depend on its neighbours, because no elementwise kernel used here depends on the position of a
number in memory. tests/identities/test_optimizer.py measures this for every rule, over lengths, positions and threads.
The `fused` kernels of torch do not have this property, since their vector and scalar parts round differently; they are
never used.

Counters (`step`, int64) stay on the host, as in torch. They determine scalars, and reading one must not wait for a
device.

Tests: tests/identities/test_optimizer.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.validation import check_fields
from atoll.compute import limits
from atoll.compute.buffer_pool import empty
from atoll.plan.protocols import Optimizer
from atoll.plan.schedule import NOTHING, Schedule, as_schedule, constant

Tensors = Mapping[str, Tensor]
Counters = Mapping[str, tuple[float, torch.dtype]]
Inner = tuple[type[torch.optim.Optimizer], dict[str, Any]]

STEP: Counters = {"step": (0, torch.int64)}
_LR = "lr."


class OptimizerBase(Optimizer):
    """The base of optimizers that step in place: a value with slots of state and a rule.

    A rule is `apply`, or a class of `torch.optim` in `_torch`.
    """

    lr: float | Schedule
    trains_clients = True

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.lr, constant):
            object.__setattr__(self, "lr", self.lr.lr)  # equal optimizers have the same text

    @property
    def schedule(self) -> Schedule:
        """The learning rate as a schedule."""
        return as_schedule(self.lr)

    def lr_at(self, round: int, state: Tensors = NOTHING) -> float:
        """The learning rate that `update` uses in this round with this state.

        Args:
            round: the number of the round, t ≥ 0.
            state: the state that `init` or the last `update` returned; only its memory of the schedule is read.
        """
        return self.schedule(round, _memory(state))

    def slots(self, theta: Tensor) -> dict[str, Tensor]:
        """The state of lanes before their first step. With `keep=("optimizer",)` it becomes client memory.

        Args:
            theta: the parameters of one model, float `[d]`, or of K models, `[K, d]`.
        Returns:
            Tensors with the shape, dtype and device of θ, and counters of shape `[]` or `[K]` on the host.
        """
        state: dict[str, Tensor] = {}
        for name, value in self.per_coordinate().items():
            if value is None:
                state[name] = theta.detach().clone(memory_format=torch.contiguous_format)
            else:
                state[name] = torch.full_like(theta, value, memory_format=torch.contiguous_format)
        for name, (value, dtype) in self.per_lane().items():
            state[name] = torch.full(theta.shape[:-1], value, dtype=dtype, device="cpu")
        return state

    def init(self, theta: Tensor) -> dict[str, Tensor]:
        """The state before the first `update`: the slots, and the memory of the schedule under names `lr.…`.

        Args:
            theta: the parameters of one model, float `[d]`, or of K models, `[K, d]`.
        """
        return {**self.slots(theta), **_named(self.schedule.init())}

    def update(
        self, theta: Tensor, g: Tensor, sums: Tensors, state: Tensors, round: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return θ and the state after one step of descent. The arguments do not change.

        Args:
            theta: the parameters of one model, float `[d]`, or of K models, `[K, d]`.
            g: the update, of the shape of `theta`. It points uphill.
            sums: the metrics of the round as means over rows. A `plateau` schedule reads `loss`, a single number.
            state: the state that `init` or the last `update` returned.
            round: the number of the round, t ≥ 0.
        Returns:
            θ⁺ and state⁺, as new tensors.
        Example:
            >>> from atoll.plan.optimizer import sgd
            >>> sgd(0.1).update(torch.tensor([1.0]), torch.tensor([2.0]), {}, {}, 0)
            (tensor([0.8000]), {})
        """
        memory = _memory(state)
        rate = self.schedule(round, memory)
        rule = self.step_rule(rate)
        if rule is not None and rule.plain:  # the rule of most servers; it needs no stepper
            room = empty(theta, theta.shape)
            step = torch.add(theta.detach(), g.to(theta.dtype), alpha=-rate, out=room)
            return step, _named(self.schedule.observe(memory, sums["loss"]) if "loss" in sums else memory)
        theta = theta.detach().clone(memory_format=torch.contiguous_format)
        after = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in state.items()
            if not name.startswith(_LR)
        }
        self.stepper(theta, after, rate).step(g.to(theta.dtype))
        if "loss" in sums:
            memory = self.schedule.observe(memory, sums["loss"])
        return theta, {**after, **_named(memory)}

    def stepper(self, theta: Tensor, state: Tensors, lr: float) -> InPlaceStepper:
        """A stepper that makes steps in place on θ and its state, at one learning rate.

        Args:
            theta: the parameters, float `[d]` or `[K, d]`, contiguous. The steps change them.
            state: the slots of the lanes, contiguous. The steps change them, but no tensors with other names.
            lr: the learning rate, such as `lr_at(round, …)`.
        """
        return InPlaceStepper(self, theta, state, lr)

    # The class of `torch.optim` with the same rule, and the names of the state that starts at zero.
    _torch: ClassVar[type[torch.optim.Optimizer] | None] = None
    _zeros: ClassVar[tuple[str, ...]] = ()

    def per_coordinate(self) -> Mapping[str, float | None]:
        """The names and initial values of the state tensors that have the shape of θ."""
        return dict.fromkeys(self._zeros, 0.0)

    def per_lane(self) -> Counters:
        """The names, initial values and dtypes of the scalars in a lane's state. The scalar `step` counts its steps."""
        return STEP if self.inner() else {}

    def in_place(self) -> bool:
        """Whether `apply` makes no temporaries, so that smaller blocks are not faster."""
        return False

    def inner(self) -> Inner | None:
        """The class of `torch.optim` that implements the rule, and its arguments; None if `apply` does."""
        words = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lr"}  # type: ignore[arg-type]
        return None if self._torch is None else (self._torch, words)

    def apply(self, block: LaneGroup, g: Tensor, lr: float) -> None:
        """Make one step of one block, in place."""
        raise NotImplementedError


@dataclass
class LaneGroup:
    """A part of θ whose lanes have made the same number of steps. A rule is applied to it in one call.

    Args:
        start, stop: the range of the group in the concatenated lanes.
        lane: the first of the lanes with this number of steps.
        theta: a view of the parameters in this range, float `[stop − start]`.
        slots: views of the state in this range, of the same shape.
        count: the number of steps that the lanes have made.
    """

    start: int
    stop: int
    lane: int
    theta: Tensor
    slots: dict[str, Tensor]
    count: int


class InPlaceStepper:
    """Makes steps of one optimizer, in place, on lanes that the caller owns.

    Lanes are sorted by the number of steps that they will make, largest first. So the active lanes are always the first
    k, and k is the length of g. A lane that has finished does not change again. Neighbouring lanes with the same number
    of earlier steps are computed together, all others one after another.

    Example:
        >>> from atoll.plan.optimizer.rules import sgd
        >>> theta = torch.zeros(2, 3)
        >>> stepper = sgd(0.5).stepper(theta, {}, lr=0.5)
        >>> stepper.step(torch.ones(2, 3))
        >>> stepper.step(torch.ones(1, 3))
        >>> theta
        tensor([[-1.0000, -1.0000, -1.0000],
                [-0.5000, -0.5000, -0.5000]])
    """

    def __init__(self, optimizer: OptimizerBase, theta: Tensor, state: Tensors, lr: float) -> None:
        self._optimizer, self._lr = optimizer, lr
        self._theta, self._state = theta.detach(), state
        self._bind(self._theta.shape)

    def step(self, g: Tensor) -> None:
        """Make one step of the first k lanes.

        Args:
            g: the update, which points uphill: `[k, d]` for the first k of K lanes, or `[d]` for a single θ. From call
                to call k never increases.
        Raises:
            UsageError: g has another shape. θ and the state are unchanged.
        """
        if g.shape != self._shape:
            self._narrow(g.shape)
        flat = g.detach().reshape(-1)
        blocks = self._blocks
        self._advance([flat] if len(blocks) == 1 else [flat[block.start : block.stop] for block in blocks])
        if self._counter is not None:
            self._counter.add_(1)

    def _narrow(self, shape: torch.Size) -> None:
        now = self._shape
        if len(now) == 1 or len(shape) != len(now) or shape[1:] != now[1:] or shape[0] > now[0]:
            raise UsageError(
                f"An update of shape {list(shape)} for lanes of shape {list(now)}.",
                "the same shape, or fewer lanes of the same length.",
                "the first lanes are the active ones, and a lane that has finished stays finished.",
            )
        self._bind(shape)

    def _bind(self, shape: torch.Size) -> None:
        """Cut the active lanes into blocks. θ and the state contain everything that the blocks need."""
        self._shape = shape
        lanes, width = prod(shape[:-1]), shape[-1]
        theta = self._theta.view(-1)
        slots = {name: self._state[name].view(-1) for name in self._optimizer.per_coordinate()}
        counters = {name: self._state[name].view(-1)[:lanes] for name in self._optimizer.per_lane()}
        self._counter = counters.get("step")
        counts = [0] * lanes if self._counter is None else list(map(int, _numbers(self._counter)))
        equal = [list(run) for _, run in groupby(range(lanes), counts.__getitem__)]
        self._runs = [(run[0], run[-1] + 1, counts[run[0]]) for run in equal]
        cut = theta.device.type == "cpu" and not self._optimizer.in_place()
        size = limits.OPTIMIZER_BLOCK if cut else max(theta.numel(), 1)
        self._blocks = [
            LaneGroup(i, j, first, theta[i:j], {name: slot[i:j] for name, slot in slots.items()}, count)
            for first, end, count in self._runs
            for i in range(first * width, end * width, size)
            for j in (min(i + size, end * width),)
        ]
        inner = self._optimizer.inner()
        if inner is None or not self._blocks:
            self._advance: Callable[[list[Tensor]], None] = self._by_rule
        else:
            self._advance = self._by_torch(*inner, counters)

    def _by_rule(self, gs: list[Tensor]) -> None:
        for block, g in zip(self._blocks, gs, strict=True):
            self._optimizer.apply(block, g, self._lr)
            block.count += 1

    def _by_torch(
        self, cls: type[torch.optim.Optimizer], words: dict[str, Any], counters: Tensors
    ) -> Callable[[list[Tensor]], None]:
        """A step by a `torch.optim` object. Its parameters are the blocks, and its state is views of the state here."""
        thetas = [block.theta for block in self._blocks]
        inner: Any = cls(thetas, lr=self._lr, foreach=False, **words)  # type: ignore[call-arg]
        numbers = {name: _numbers(values) for name, values in counters.items()}
        for block in self._blocks:
            inner.state[block.theta] = dict(block.slots)
            for name, values in numbers.items():
                number = torch.tensor(values[block.lane], dtype=torch.float32, device="cpu")
                inner.state[block.theta][name] = number
        # torch has counters of its own. `step` is counted here too; every other number is copied to the lanes.
        leads = {block.lane: block.theta for block in reversed(self._blocks)}
        copied = [
            (values[first:end], inner.state[leads[first]][name])
            for first, end, _ in self._runs
            for name, values in counters.items()
            if name != "step"
        ]

        def advance(gs: list[Tensor]) -> None:
            for theta, g in zip(thetas, gs, strict=True):
                theta.grad = g
            inner.step()
            for theta in thetas:
                theta.grad = None  # so that the caller can free g
            for lane_state, torch_state in copied:
                lane_state.copy_(torch_state)

        return advance


def _numbers(counters: Tensor) -> list[float]:
    """Counters as Python numbers. A meta tensor has no numbers, so zeros are used."""
    return [0.0] * counters.numel() if counters.is_meta else counters.tolist()


def _memory(state: Tensors) -> dict[str, Tensor]:
    return {name[len(_LR) :]: value for name, value in state.items() if name.startswith(_LR)}


def _named(memory: Tensors) -> dict[str, Tensor]:
    return {_LR + name: value for name, value in memory.items()}
