"""The contract of parts: the values that pass between parts, and one protocol for each kind of part.

Every attribute of a part that the package reads is declared here. A part that inherits its protocol gets the default
of every member that has one, and must define the abstract members only:

    Local        contribute
    Stage        encode
    Aggregator   zero, fold, merge, total, finalize
    Sampler      __call__
    Pace         should_close
    Optimizer    init, update, lr_at

A part may also define all members without inheriting. Parts import this module and never another part.

Tests: tests/surface/test_contract.py, tests/conformance/test_parts.py
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import constructor
from atoll.base.random import Key
from atoll.compute.batches import ClientBatch, padded
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.plan.schedule import NOTHING, Schedule, as_schedule

Tensors = Mapping[str, Tensor]
Shared = Mapping[str, Tensors]
Weights = Literal["examples", "equal"]
Over = Literal["arrived", "expected"]
SumKind = Literal["exact", "float"]
Sends = Literal["update", "model"]

if TYPE_CHECKING:
    default = property
else:

    class default:
        """A read-only member with a default value.

        It is no data descriptor and does not exist on the class. A dataclass field or a class attribute of the same
        name therefore replaces it, with or without a default of its own. A `property` would be taken for the default
        value of the field.
        """

        def __init__(self, get: Callable[[Any], Any]) -> None:
            self.get, self.__doc__ = get, get.__doc__

        def __get__(self, part: Any, owner: type | None = None) -> Any:
            if part is None:
                raise AttributeError(self.get.__name__)
            return self.get(part)


def _text(part: object) -> str:
    """The constructor call of a dataclass, which the grammar reads back."""
    return constructor(part) if dataclasses.is_dataclass(part) else object.__repr__(part)


# values


class Population(NamedTuple):
    """All clients.

    Args:
        clients: their number C.
        sizes: rows of each client, int64 `[C]`.
    """

    clients: int
    sizes: Tensor


class Cohort(NamedTuple):
    """The clients selected for a round.

    Args:
        ids: int64 `[n]`.
        chance: the probability that a client is selected, float64 `[]` or `[C]`.
    """

    ids: Tensor
    chance: Tensor


class Ids(NamedTuple):
    """The starts that K rows of a contribution belong to, in the order of the rows.

    Args:
        client: client ids, int64 `[K]`.
        repeat: 0 for the first start of a client in the round that it started in, then 1, 2, …; int64 `[K]`.
    """

    client: Tensor
    repeat: Tensor

    def select(self, index: Tensor | slice) -> Ids:
        """Some of the starts, by position."""
        return Ids(self.client[index], self.repeat[index])


class Contribution(NamedTuple):
    """The results of K clients. Every field except `per_client` goes through the aggregator.

    Args:
        means: float `[K, m]` by name, averaged by weight; `update` points uphill, `buffers` are the model's buffers.
        sums: `[K]` or `[K, s]` by name, added; `rows` is the number of rows that the other sums are about.
        weight: rows that each client holds, int64 `[K]`.
        counters: whole numbers `[K, …]` by name; the largest is kept.
        per_client: `[K, …]` by name, columns of the report.
    """

    means: Tensors
    sums: Tensors
    weight: Tensor
    counters: Tensors
    per_client: Tensors


class Total(NamedTuple):
    """The aggregate of a round.

    Args:
        means: Σ w·means by name before `finalize`, the mean or another aggregate after it; float64 `[m]`.
        sums: Σ sums by name, float64.
        weight: Σ w, int64 `[]`.
        arrived: number of contributions, int64 `[]`.
        counters: the largest of each counter by name.
        per_client: columns for the report. `id` holds client ids, int64 `[n]`; every other column has one entry for
            each of these ids. A client that is not listed gets 0.
    """

    means: Tensors
    sums: Tensors
    weight: Tensor
    arrived: Tensor
    counters: Tensors
    per_client: Tensors = NOTHING


class Broadcast(NamedTuple):
    """All that a client receives.

    Args:
        round: the number of the round in which the client starts, from 0.
        model: θ, buffers, counters and fixed tensors.
        shared: public server state by part (`local`, `codec`) and name.
    """

    round: int
    model: Model
    shared: Shared


class EntropySource(Protocol):
    """Random numbers that no key determines, for noise that is released and must not be predictable."""

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Independent standard normal numbers of this shape and dtype, on the host."""
        ...

    def integers(self, shape: Sequence[int], high: int) -> Tensor:
        """Independent uniform whole numbers in [0, high), int64, on the host; high ≤ 2⁶²."""
        ...


class RoundInfo(NamedTuple):
    """Facts of a round that the server's half of a part may use.

    Args:
        round: from 0.
        population: all clients.
        cohort_size: clients that started in this round.
        chance: the probability that a client is selected, float64 `[]` or `[C]`.
        entropy: random numbers that no key determines; only a part with `uses_entropy` draws from it.
    """

    round: int
    population: Population
    cohort_size: int
    chance: Tensor
    entropy: EntropySource


class Declared(NamedTuple):
    """The declaration of one name of a contribution.

    Args:
        length: numbers in a client's row; a tensor `[K]` has length 1.
        dtype: of the numbers.
        kind: `"mean"`, averaged by weight, or `"sum"`, added.
        bound: an upper bound of the Euclidean norm of each row; None: unbounded.
    """

    length: int
    dtype: torch.dtype
    kind: Literal["mean", "sum"]
    bound: float | None = None


OPEN = "*"  # as a declared name: any further name with this length and kind is valid


class Conflict(NamedTuple):
    """A reason to refuse a plan, in the four parts of an error."""

    given: str
    required: str
    why: str
    write: str


class Open(Protocol):
    """An open round as a pace sees it."""

    @property
    def wanted(self) -> int:
        """Contributions that make a full round."""
        ...

    @property
    def arrived(self) -> int:
        """Contributions that have arrived."""
        ...

    @property
    def elapsed(self) -> float:
        """Seconds since the round opened."""
        ...

    def starts(self) -> Iterable[int]:
        """For each arrived client, its starts since the start of the oldest contribution that is in flight."""
        ...


# parts


class Slots(Protocol):
    """The parts of a plan, as `conflicts` receives them."""

    @property
    def local(self) -> Local: ...
    @property
    def aggregator(self) -> Aggregator: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def sampler(self) -> Sampler: ...
    @property
    def codec(self) -> Stage: ...
    @property
    def pace(self) -> Pace: ...
    @property
    def downlink(self) -> Stage: ...


@runtime_checkable
class Local(Protocol):
    """The computation of a client: from the broadcast and its own rows to a contribution.

    Example:
        >>> from dataclasses import dataclass
        >>> from atoll.plan.local import Gradient
        >>> @dataclass(frozen=True, repr=False)
        ... class Doubled(Local):
        ...     def contribute(self, broadcast, lanes, memory, key, task):
        ...         given, after = Gradient().contribute(broadcast, lanes, memory, key, task)
        ...         return given._replace(means={"update": 2 * given.means["update"]}), after
        >>> Doubled().padded_batch(17)
        18
    """

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The contribution of K clients and their memory after it.

        Args:
            broadcast: the model and the public server state.
            lanes: the rows of the K clients.
            memory: their memory by name, `[K, …]`.
            key: every draw comes from it.
            task: model, loss and metrics.
        """

    @default
    def numerics(self) -> str | None:
        """The only compute backend that the part can use; None: any."""
        return None

    @default
    def sends(self) -> Sends:
        """`"update"`, or `"model"` if the server subtracts the sent model from its own θ when it arrives."""
        return "update"

    @default
    def batch(self) -> int | None:
        """Rows in a batch; None: all rows of the client; 0: the part has no such setting."""
        return 0

    @default
    def lr(self) -> Schedule | float | None:
        """The client's learning rate if the part has one without an optimizer."""
        return None

    @default
    def optimizer(self) -> Optimizer | None:
        """The client's optimizer, if the part has one."""
        return None

    @default
    def keep(self) -> tuple[str, ...]:
        """Names of the client state that lasts between rounds, such as `"optimizer"`."""
        return ()

    @default
    def can_stop_early(self) -> bool:
        """Whether a client may stop at a deadline and send the steps that it has made."""
        return False

    @default
    def uses_entropy(self) -> bool:
        """Whether `server_update` draws from `info.entropy`."""
        return False

    def padded_batch(self, rows: int) -> int:
        """The padded length of a client's batch: a function of its own number of rows."""
        return padded(rows)

    def sequential(self, rows: int) -> bool:
        """Whether the backend `loop` trains one client to its end before the next, if the largest has `rows` rows."""
        return False

    def examples_per_round(self, sizes: Tensor) -> Tensor:
        """Rows that clients of these sizes process in their first round."""
        return sizes

    def relative_work(self, round: int) -> float:
        """The work of a client in this round, relative to round 0."""
        return 1.0

    def memory(self, layout: Layout) -> Tensors:
        """The memory of one client before its first round, by name."""
        return {}

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round, by name. Names with a leading underscore are not broadcast."""
        return {}

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """The total that the aggregator finalizes, and the server state after the round."""
        return total, server

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Names of means and sums in a contribution. The name `"*"` admits further names.

        The default: an update, buffers if the model has any, and sums of length 1.
        """
        layout = task.layout
        buffers = {"buffers": Declared(layout.b, layout.dtype, "mean")} if layout.b else {}
        update = {"update": Declared(layout.d, layout.dtype, "mean")}
        return {**update, **buffers, OPEN: Declared(1, torch.float64, "sum")}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


@runtime_checkable
class Stage(Protocol):
    """One stage of a codec. `atoll.plan.codec.Codec` adds `>>` and messages as bytes: inherit that class.

    `encode` runs at the client. The server runs `decode` on each message if `per_message`, `decode_sum` on the sum of
    each model version if `per_sum`, and `server_update` on the total of the round.
    """

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> tuple[Tensor, Tensors, Tensors, Tensors]:
        """(payload `[K, …]`, side tensors `[K, …]`, sums `[K]` or `[K, s]`, memory after) for updates x `[K, d]`."""

    @default
    def per_message(self) -> bool:
        """Whether the server decodes each message, because payloads cannot be added."""
        return False

    @default
    def per_sum(self) -> bool:
        """Whether the server decodes each sum."""
        return False

    @default
    def needs_model_coordinates(self) -> bool:
        """Whether the stage keeps state in the model's own coordinates."""
        return False

    @default
    def averages_all_clients(self) -> bool:
        """Whether the server's mean covers all clients, including those that did not participate."""
        return False

    @default
    def compressor(self) -> Stage | None:
        """The stage that compresses the bytes of whole messages, if there is one."""
        return None

    @default
    def parts(self) -> tuple[Stage, ...]:
        """The stages that this one contains, in the order in which a client runs them."""
        return ()

    @default
    def uses_entropy(self) -> bool:
        """Whether `server_update` draws from `info.entropy`."""
        return False

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Stage:
        """The same stage with the facts that no message carries.

        Args:
            layout: of the vector that the stage encodes.
            total_weight: Σ w over the whole population; None: unknown.
            before: the declaration of the vector that the stage receives, with the bound of the preceding stage.
        Raises:
            UsageError: the stage cannot work there.
        """
        return self

    def output_layout(self, layout: Layout) -> Layout:
        """The layout of the payload, which the next stage receives."""
        return layout

    def memory(self, layout: Layout) -> Tensors:
        """The memory of one client before its first round, by name."""
        return {}

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round, by name. Names with a leading underscore are not broadcast."""
        return {}

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        """The decoded messages `[K, …]`, each by itself."""
        return x

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        """The decoded sum of one model version, `[..., d]`: linear, and the same map for every client."""
        return x

    def nbytes(self, layout: Layout) -> int:
        """Bytes of a message; an upper bound if the stage compresses bytes."""
        return layout.d * layout.dtype.itemsize

    def sizes(self, payload: Tensor, side: Tensors) -> Tensor:
        """Bytes of the message of each client, int64 `[K]`."""
        whole = sum(t.numel() * t.element_size() for t in (payload, *side.values()))
        return torch.full((len(payload),), whole // max(1, len(payload)), dtype=torch.int64)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """The total that the aggregator finalizes, and the server state after the round."""
        return total, server

    def contraction(self) -> Stage:
        """This stage if E|x − C(x)|² < |x|² for every x, as error feedback requires; else the nearest such stage."""
        return self

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        """The declarations of the encoded vector, as `update`, and of the sums that the stage adds."""
        return {"update": Declared(self.output_layout(layout).d, layout.dtype, "mean")}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan whose codec contains this stage."""
        return ()


class Group(Protocol):
    """Processes that each hold a partial aggregate, as `Partial.reduce` sees them."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    def all_gather(self, tensors: Tensors) -> list[dict[str, Tensor]]:
        """The tensors of every process, in the order of ranks. Names and shapes may differ."""
        ...

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all processes. Shapes and dtypes must be equal."""
        ...

    def all_reduce_max(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The largest of each number over all processes. Shapes and dtypes must be equal."""
        ...


@runtime_checkable
class Partial(Protocol):
    """The aggregate of some contributions. Processes exchange it as named tensors.

    Without `tensors` and `of` it cannot leave its process; without `reduce` it cannot be used on torchrun.
    """

    @abstractmethod
    def tensors(self) -> Tensors:
        """The partial as tensors by name."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: Tensors) -> Self:
        """The partial with these tensors."""

    @abstractmethod
    def reduce(self, group: Group) -> Self:
        """The aggregate over all processes of the group, the same bits on each. Every process calls it."""


@runtime_checkable
class Aggregator(Protocol):
    """The combination of contributions. `fold` and `merge` are associative and commutative to the bit."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def zero(self) -> Any:
        """The partial of no contribution."""

    @abstractmethod
    def fold(self, partial: Any, contribution: Contribution, ids: Ids) -> Any:
        """The partial with K more contributions. `ids` are in the order of the contribution's rows."""

    @abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """The partial of both."""

    @abstractmethod
    def total(self, partial: Any) -> Total:
        """The finished sums of a partial."""

    @abstractmethod
    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """The aggregate of the round: `means["update"]` is the direction that the optimizer descends."""

    @default
    def linear(self) -> bool:
        """Whether the aggregate is linear in the updates, so that a codec may decode the sum."""
        return False

    @default
    def forms_sum(self) -> bool:
        """Whether the update is Σ w·g, and not divided by a weight."""
        return False

    @default
    def weights(self) -> Weights:
        """`"examples"`: a client's weight is its number of rows; `"equal"`: 1."""
        return "examples"

    @default
    def over(self) -> Over:
        """The weight that divides: of the contributions that `"arrived"`, or the `"expected"` one."""
        return "arrived"

    @default
    def sum(self) -> SumKind:
        """`"exact"`: the same bits in any order; `"float"`: rounded in the order of arrival."""
        return "exact"

    @default
    def uses_entropy(self) -> bool:
        """Whether `finalize` draws from `info.entropy`."""
        return False

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


@runtime_checkable
class Sampler(Protocol):
    """The selection of the clients of a round."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        """The cohort of this round, ids rising; every draw comes from the key."""

    @default
    def interchangeable(self) -> bool:
        """Whether every set of n clients is equally likely, so that a longer draw in random order replaces several."""
        return False

    def resized(self, ask: Callable[[int], int]) -> Sampler | None:
        """The sampler of ask(n) clients for the n that it selects; None: its size cannot be changed."""
        return None

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


@runtime_checkable
class Pace(Protocol):
    """The decision when a round closes. It is a pure function of an `Open` round."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def should_close(self, open: Open) -> bool:
        """Whether the round is over, although contributions are still in flight."""

    @default
    def asynchronous(self) -> bool:
        """Whether contributions that are in flight when a round closes are still awaited."""
        return False

    @default
    def replaces_arrivals(self) -> bool:
        """Whether another client starts in the open round for each one that arrives."""
        return False

    @default
    def partial(self) -> bool:
        """Whether a client that is computing at the deadline stops and sends the steps that it has made."""
        return False

    @default
    def deadline_s(self) -> float | None:
        """Seconds after which a round need not wait; None: no deadline."""
        return None

    def cohort_size(self, n: int) -> int:
        """Clients that start for a cohort of n."""
        return n

    def required(self, started: int) -> int:
        """Contributions that make a full round if `started` clients start."""
        return started

    def may_start(self, starts: int) -> bool:
        """Whether a client may start again after `starts` starts since the start of the oldest one in flight."""
        return True

    def staleness_weight(self, staleness: int) -> float:
        """The factor of an update that started `staleness` rounds ago, in [0, 1]."""
        return 1.0

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


class Stepper(Protocol):
    """Steps of an optimizer, in place, on tensors that the caller owns."""

    def step(self, g: Tensor) -> None:
        """One step down. g: `[k, d]` for the first k of K clients; k never grows."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A rule for steps down. To train clients, inherit `atoll.plan.optimizer.OptimizerBase`: it also steps in place."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def init(self, theta: Tensor) -> Tensors:
        """The state before the first `update`."""

    @abstractmethod
    def update(self, theta: Tensor, g: Tensor, sums: Tensors, state: Tensors, round: int) -> tuple[Tensor, Tensors]:
        """θ after one step down along g, and the state after it. No argument is changed."""

    @abstractmethod
    def lr_at(self, round: int, state: Tensors) -> float:
        """The learning rate of this round."""

    @default
    def lr(self) -> Schedule | float | None:
        """The learning rate or its schedule, if the optimizer has one."""
        return None

    @default
    def schedule(self) -> Schedule:
        """The learning rate as a schedule of the round; a constant 1 if the optimizer has none."""
        return as_schedule(1.0 if self.lr is None else self.lr)

    @default
    def trains_clients(self) -> bool:
        """Whether the optimizer has `slots` and `stepper`, which local training uses."""
        return False

    def is_plain_sgd(self) -> bool:
        """Whether a step is θ − lr·g and nothing else, so that the backward pass may apply it."""
        return False

    def slots(self, theta: Tensor) -> dict[str, Tensor]:
        """The state of clients before their first step; theta: `[d]` or `[K, d]`."""
        return {}

    def stepper(self, theta: Tensor, state: Tensors, lr: float) -> Stepper:
        """Steps in place on theta and its state.

        Raises:
            UsageError: the optimizer cannot step in place.
        """
        raise UsageError(
            f"{self!r} as the optimizer of clients.",
            "an optimizer with `trains_clients`, which inherits atoll.plan.optimizer.base.OptimizerBase.",
            "local training makes steps in place.",
            "sgd(0.1)",
        )

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()
