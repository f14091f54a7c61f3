"""The contract of parts: the values that pass between parts, and one protocol for each kind of part.

Every attribute of a part that the package reads is declared here. A part that inherits its protocol gets the default
of every member that has one, and must define the abstract members only:

    Local        contribute
    Correction   pull
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
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import constructor
from atoll.base.random import Key, SecretKey
from atoll.compute.batches import ClientBatch, padded
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model
from atoll.compute.step_rule import StepRule
from atoll.compute.task import Task
from atoll.plan.form import Buffer, Form
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
    """The clients of a training.

    Args:
        clients: C, the number of clients.
        sizes: the number of rows of each client, int64 `[C]`.
        version: increases when a client joins or leaves, so that the plan is bound again.
    """

    clients: int
    sizes: Tensor
    version: int = 0


class Cohort(NamedTuple):
    """The clients selected for a round.

    Args:
        ids: the ids of the selected clients, int64 `[n]`.
        chance: the probability that a client is selected, float64: `[]` if it is equal for all clients, else `[C]`,
            equal in every round.
    """

    ids: Tensor
    chance: Tensor


class Ids(NamedTuple):
    """The starts of K clients. Row k of a contribution belongs to start k.

    A start is the event that a client receives the model and begins to train. A client may start several times in one
    round.

    Args:
        client: the id of the client of each start, int64 `[K]`.
        repeat: the number of earlier starts of the same client in the same round, int64 `[K]`; 0 for its first start.
    """

    client: Tensor
    repeat: Tensor

    def select(self, index: Tensor | slice) -> Ids:
        """Select starts by their positions."""
        return Ids(self.client[index], self.repeat[index])


class Contribution(NamedTuple):
    """The results of K clients. Every field except `per_client` goes through the aggregator.

    Args:
        means: float tensors `[K, length]`, which the aggregator averages with weights. `update` is the update, and it
            points uphill; `buffers` are the model's buffers.
        sums: tensors `[K]` or `[K, length]`, which the aggregator adds. `rows` is the number of rows that the other
            sums cover. A sum `rows/NAME` is the number of rows that the sum NAME covers.
        weight: the number of rows of each client, int64 `[K]`.
        counters: tensors of whole numbers `[K, …]`; the aggregator takes the largest.
        per_client: tensors `[K, …]`, which become columns of the report.
    """

    means: Tensors
    sums: Tensors
    weight: Tensor
    counters: Tensors
    per_client: Tensors


class Total(NamedTuple):
    """The aggregate of a round.

    Args:
        means: float64 `[length]` for each name. Before `finalize` this is Σ w·means, after it the mean or another
            aggregate.
        sums: Σ sums for each name, float64.
        weight: Σ w, `[]`: int64 in the total of an aggregator, float64 after `decode_sums`, since parts divide by it.
        arrived: the number of contributions, `[]`, of the same dtype.
        counters: the largest value of each counter.
        per_client: columns for the report. The column `id` contains client ids, int64 `[n]`; every other column has one
            entry for each of these ids. In the report, clients without an entry get 0.
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
        shared: the public server state of the parts `local` and `codec`; each is a mapping from names to tensors.
    """

    round: int
    model: Model
    shared: Shared


class RoundInfo(NamedTuple):
    """Facts of a round that the server's half of a part may use.

    Args:
        round: the number of the round, from 0.
        population: all clients.
        cohort_size: the number of clients that started in this round.
        chance: the probability that a client is selected, float64: `[]` if it is equal for all clients, else `[C]`.
        entropy: the secret key of the round. Only a part with `uses_entropy` may draw from it. Two equal draws give
            equal numbers: fold a name for each draw.
        total_weight: Σ w, the sum of the weights that the aggregator gives to all clients of the population, float64
            `[]`.
    """

    round: int
    population: Population
    cohort_size: int
    chance: Tensor
    entropy: SecretKey
    total_weight: Tensor


class Declared(NamedTuple):
    """The declaration of one tensor of a contribution.

    Args:
        length: the number of values in each client's row; a tensor `[K]` has length 1.
        dtype: the dtype of the tensor.
        kind: `"mean"` if the aggregator averages the tensor with weights, `"sum"` if it adds the rows.
        bound: an upper bound on the Euclidean norm of each row; None: the norm is unbounded.
    """

    length: int
    dtype: torch.dtype
    kind: Literal["mean", "sum"]
    bound: float | None = None


class Release(NamedTuple):
    """The release of a sum with normal noise in each round.

    Args:
        noise: the standard deviation of the noise in units of the largest contribution of a client, > 0.
        update: whether the noise covers the update, and not only a sum that the stage adds.
        messages: whether each message of a client has this noise, and not only their sum.
    """

    noise: float
    update: bool = True
    messages: bool = False


class Selection(NamedTuple):
    """A proof of how a sampler selects clients, which an accountant of privacy reads.

    Args:
        relation: the neighbouring populations: `"add or remove"` one client, `"replace one"` client, or `"zero out"`
            the contributions of one client.
        rounds: the number of rounds in which a client can take part.
        rate: the chance of a client to be in one of these rounds, in (0, 1].
        cohort: the expected number of clients in a round.
        fixed_size: whether a cohort has a fixed number of clients, drawn without replacement.
    """

    relation: Literal["add or remove", "replace one", "zero out"]
    rounds: int
    rate: float
    cohort: float
    fixed_size: bool = False


OPEN = "*"  # as a declared name: any further name with this length and kind is valid


class Conflict(NamedTuple):
    """A reason to refuse a plan, in the four parts of an error."""

    given: str
    required: str
    why: str
    write: str


class Open(Protocol):
    """The facts about an open round that a pace can read."""

    @property
    def wanted(self) -> int:
        """The number of contributions that make a full round."""
        ...

    @property
    def arrived(self) -> int:
        """The number of contributions that have arrived."""
        ...

    @property
    def elapsed(self) -> float:
        """Seconds since the round opened."""
        ...

    def starts(self) -> Iterable[int]:
        """For each arrived client, the number of its starts in rounds after that in which the oldest flight started."""
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
    """The computation of a client: it makes a contribution from the broadcast and the client's own rows.

    A subclass must define `contribute`. All other methods have defaults. The example doubles the update of
    `Gradient`, and inherits the default of `padded_batch`.

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
        """Compute the contribution of K clients.

        Args:
            broadcast: the model and the public server state.
            lanes: the rows of the K clients.
            memory: the client memory before the round, tensors `[K, …]`; the keys are names.
            key: the key of all random numbers that the method uses.
            task: the model, loss and metrics.
        Returns:
            The contribution, and the client memory after the round.
        """

    @default
    def numerics(self) -> str | None:
        """The only compute backend that the part can use; None: the part can use any."""
        return None

    @default
    def sends(self) -> Sends:
        """`"update"`, or `"model"` if the server subtracts the arriving model from the θ that it has at that time."""
        return "update"

    @default
    def batch(self) -> int | None:
        """The number of rows in a batch; None: all rows of the client; 0: the part has no such setting."""
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

    @default
    def needs_population(self) -> bool:
        """Whether `server_update` needs the total weight of all clients, which an open run does not know."""
        return False

    @default
    def needs_everyone(self) -> bool:
        """Whether the part makes a step only in rounds with the contributions of all clients."""
        return False

    @default
    def mixes_widths(self) -> bool:
        """Whether `contribute` takes clients of different padded lengths together, without a change of a bit."""
        return False

    def padded_batch(self, rows: int) -> int:
        """The length to which the batches of a client with `rows` rows are padded. Other clients must not change it."""
        return padded(rows)

    def sequential(self, rows: int) -> bool:
        """Whether the backend `loop` trains each client to its end before the next client starts.

        Args:
            rows: the number of rows of the largest client.
        """
        return False

    def examples_per_round(self, sizes: Tensor) -> Tensor:
        """The number of rows that each client processes in round 0, int64 `[C]`, counting repeated passes.

        Args:
            sizes: the number of rows of each client, int64 `[C]`.
        """
        return sizes

    def relative_work(self, round: int) -> float:
        """The amount of computation of a client in this round, divided by the amount in round 0."""
        return 1.0

    def first_memory(self, task: Task) -> Tensors:
        """The memory of one client before its first round, in CPU memory. The keys are names.

        Args:
            task: the model, loss and metrics; `task.start` is the model before the first round.
        """
        return {}

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round. Tensors whose names begin with an underscore are not broadcast."""
        return {}

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """Return the total that the aggregator finalizes, and the server state after the round."""
        return total, server

    def evaluated(self, theta: Tensor, server: Tensors) -> Tensor:
        """The parameters that are evaluated and exported, `[d]`, if they are not the server's θ.

        Args:
            theta: θ of the server, `[d]`.
            server: the server state of the part after the round.
        """
        return theta

    @default
    def own(self) -> tuple[str, ...] | Literal["norms"]:
        """Patterns of the names of parameters and buffers that stay at the client."""
        return ()

    @default
    def trains_personal(self) -> bool:
        """Whether each client has a model of its own, which `personal` builds."""
        return False

    def server_layout(self, layout: Layout) -> Layout:
        """The layout of the model at the server and in messages: that of the module, without what stays at clients."""
        return layout

    def whole(self, model: Model, task: Task) -> Model:
        """The server's model with all tensors of the module; the server has the first values of what it lacks."""
        return model

    def personal(self, model: Model, memory: Tensors, task: Task) -> Model:
        """The models of K clients, θ `[K, d]`, if `trains_personal`.

        Args:
            model: the model of the server, as clients receive it.
            memory: the client memory of the part, tensors `[K, …]`.
            task: the model, loss and metrics.
        """
        return model

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """The declaration of each mean and each sum in a contribution. The name `"*"` allows further names.

        The default declares an update, buffers if the model has any, and any sums of length 1.
        """
        layout = task.layout
        buffers = {"buffers": Declared(layout.b, layout.dtype, "mean")} if layout.b else {}
        update = {"update": Declared(layout.d, layout.dtype, "mean")}
        return {**update, **buffers, OPEN: Declared(1, torch.float64, "sum")}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


class StepFacts(NamedTuple):
    """The facts of the local steps of K clients, for a correction.

    Args:
        lr: the learning rate of the clients in this round.
        decay: λ, the weight decay of the clients.
        rows: the number of rows of each client, int64 `[K]`.
        steps: the number of steps of each client, int64 `[K]`.
        weights: |a| of each client, float64 `[K]`: y₀ − y = lr·Σ aₜ∇ℓ(yₜ), |a| = Σ aₜ; `steps` for plain SGD. None
            before the steps, and for optimizers other than SGD.
        classes: the number of rows of each class, for a number of classes C: int64 `[K, C]`.
        loss: the mean loss of each client at θ, `[K]`, if the correction has `needs_loss`.
        gradient: the gradient of the mean loss of each client at θ, `[K, d]`, if the correction has `needs_gradient`.
    """

    lr: float
    decay: float
    rows: Tensor
    steps: Tensor
    weights: Tensor | None
    classes: Callable[[int], Tensor]
    loss: Tensor | None = None
    gradient: Tensor | None = None


class Pull(NamedTuple):
    """An affine pull of each local step: g ← ∇ℓ(y) + μ(y − a) + s − o, from y = y₀.

    A tensor is `[d]` for all clients, `[K, d]`, or None.

    Args:
        start: y₀; None: θ.
        anchor: a; None: 0.
        shift: s; None: 0.
        mu: μ ≥ 0.
        offset: o; None: 0. A vector of the client memory that is subtracted needs no copy if it is given here.
    """

    start: Tensor | None = None
    anchor: Tensor | None = None
    shift: Tensor | None = None
    mu: float = 0.0
    offset: Tensor | None = None


class Finished(NamedTuple):
    """The results of a correction after the local steps of K clients, added to the contribution.

    Args:
        means: float tensors `[K, length]`, which the aggregator averages; `update` replaces the update.
        sums: tensors `[K]` or `[K, length]`, which the aggregator adds.
        per_client: tensors `[K, …]`, which become columns of the report.
        memory: the client memory of the correction after the round.
    """

    means: Tensors = NOTHING
    sums: Tensors = NOTHING
    per_client: Tensors = NOTHING
    memory: Tensors = NOTHING


@runtime_checkable
class Correction(Protocol):
    """A correction of local training for unequal clients: `Train(correction=…)`.

    `pull` runs before the local steps and `finish` after them. Every backend applies the pull inside its own step.

        g ← ∇ℓ(y) + λy + μ(y − a) + s ;  v ← βv + g ;  y ← y − lr·v,  from y₀

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, repr=False)
        ... class Decayed(Correction):
        ...     def pull(self, broadcast, memory, facts):
        ...         return Pull(mu=0.01)
        >>> Decayed()
        Decayed()
    """

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def pull(self, broadcast: Broadcast, memory: Tensors, facts: StepFacts) -> Pull:
        """The pull of K clients.

        Args:
            broadcast: θ, and in `shared["correction"]` the public server state of the correction.
            memory: the client memory of the correction, tensors `[K, …]`.
            facts: the facts of the steps.
        """

    def finish(self, broadcast: Broadcast, memory: Tensors, update: Tensor, facts: StepFacts) -> Finished:
        """The results after the steps.

        Args:
            broadcast, memory: those of `pull`.
            update: y₀ − y of each client, `[K, d]`.
            facts: the facts of the steps, with |a|.
        """
        return Finished(memory=memory)

    @default
    def needs_population(self) -> bool:
        """Whether `server_update` needs the total weight of all clients."""
        return False

    @default
    def needs_weights(self) -> bool:
        """Whether `finish` reads |a|, so that the clients' optimizer must be SGD."""
        return False

    @default
    def needs_equal_steps(self) -> bool:
        """Whether all clients must make the same number of steps."""
        return False

    @default
    def needs_loss(self) -> bool:
        """Whether `facts.loss` is computed, in a pass over all rows of a client before its steps."""
        return False

    @default
    def needs_gradient(self) -> bool:
        """Whether `facts.gradient` is computed, in a pass over all rows of a client before its steps."""
        return False

    @default
    def reads_classes(self) -> bool:
        """Whether `pull` reads `facts.classes`, in which a client may lack a class."""
        return False

    @default
    def personal_mu(self) -> float | None:
        """λ of a second training of each client, of its own model v: ∇ℓ(v) + λ(v − θ). None: there is none."""
        return None

    @default
    def parts(self) -> tuple[Correction, ...]:
        """The corrections that this one contains, in the order in which they run."""
        return ()

    def memory(self, layout: Layout) -> Tensors:
        """The memory of one client before its first round. The keys are names."""
        return {}

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round. Tensors whose names begin with an underscore are not broadcast."""
        return {}

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """Return the total that the aggregator finalizes, and the server state after the round."""
        return total, server

    def evaluated(self, theta: Tensor, server: Tensors) -> Tensor:
        """The parameters that are evaluated and exported, `[d]`, if they are not the server's θ."""
        return theta

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """The declaration of each mean and each sum that `finish` adds."""
        return {}

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
        """Encode the updates x `[K, d]` of K clients.

        Returns:
            The payload `[K, …]`; the side tensors `[K, …]`, which the message also contains; sums `[K]` or
            `[K, length]`, which are added over clients; and the client memory after the round.
        """

    @default
    def per_message(self) -> bool:
        """Whether the server decodes each message, because payloads cannot be added."""
        return False

    @default
    def per_sum(self) -> bool:
        """Whether the server decodes the sum of the messages of each model version."""
        return False

    @default
    def needs_model_coordinates(self) -> bool:
        """Whether the stage keeps state about coordinates of the model, so that no earlier stage may change them."""
        return False

    @default
    def averages_all_clients(self) -> bool:
        """Whether the server's mean covers all clients, including those that did not participate."""
        return False

    @default
    def lossless(self) -> bool:
        """Whether the server decodes exactly the update that the client encoded."""
        return False

    @default
    def corrects_error(self) -> bool:
        """Whether later messages of a client contain the error of its earlier ones."""
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
        """Whether `encode` draws from `key.entropy`, or `server_update` from `info.entropy`."""
        return False

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Stage:
        """A copy of the stage that knows the facts that no message carries.

        Args:
            layout: the layout of the vector that the stage encodes.
            total_weight: Σ w, the sum of the weights of all clients of the population; None: it is unknown.
            before: the declaration of the vector that the stage receives, with the bound of the preceding stage.
        Raises:
            UsageError: the stage cannot encode this vector.
        """
        return self

    def output_layout(self, layout: Layout) -> Layout:
        """The layout of the payload, which the next stage receives."""
        return layout

    def memory(self, layout: Layout) -> Tensors:
        """The memory of one client before its first round. The keys are names."""
        return {}

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round. Tensors whose names begin with an underscore are not broadcast."""
        return {}

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        """Decode K messages `[K, …]`. The result of a message does not depend on the others."""
        return x

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        """Decode the sum of one model version's messages to `[..., d]`. The map is linear and equal for all clients."""
        return x

    def form(self, layout: Layout) -> Form:
        """The fields of a message as bytes.

        Raises:
            UsageError: the stage defines no bytes of its messages.
        """
        raise _no_bytes(self)

    def to_bytes(self, payload: Tensor, side: Tensors) -> list[bytes]:
        """Convert the payload and the side tensors of each of K clients to the bytes of a message."""
        raise _no_bytes(self)

    def from_bytes(self, data: Sequence[Buffer]) -> tuple[Tensor, Tensors]:
        """The inverse of `to_bytes`: return payload and side tensors, one row for each message.

        Raises:
            MessageError: the bytes are not a message of this stage.
        """
        raise _no_bytes(self)

    def nbytes(self, layout: Layout) -> int:
        """The number of bytes of a message; an upper bound if the stage compresses bytes."""
        return layout.d * layout.dtype.itemsize

    def sizes(self, payload: Tensor, side: Tensors) -> Tensor:
        """The number of bytes of each client's message, int64 `[K]`."""
        whole = sum(t.numel() * t.element_size() for t in (payload, *side.values()))
        return torch.full((len(payload),), whole // max(1, len(payload)), dtype=torch.int64)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """Return the total that the aggregator finalizes, and the server state after the round."""
        return total, server

    def contraction(self) -> Stage:
        """This stage if it is a contraction: E|x − C(x)|² < |x|² for every x. Otherwise a variant that is one.

        Error feedback requires a contraction.
        """
        return self

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        """Declares the encoded vector under the name `update`, and the sums of the stage under their names."""
        return {"update": Declared(self.output_layout(layout).d, layout.dtype, "mean")}

    def gain(self, layout: Layout) -> float:
        """The largest ratio of the norm of a decoded update to the norm of the update; infinity if it has no bound.

        Args:
            layout: the layout of the vector that the stage encodes.
        """
        return math.inf

    def event(self, cohort: float) -> Release | None:
        """The release that the noise of `server_update` protects; None if the stage adds no noise with a proof.

        Args:
            cohort: the expected number of clients in a round.
        """
        return None

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan whose codec contains this stage."""
        return ()


def _no_bytes(stage: Stage) -> UsageError:
    return UsageError(
        f"{stage!r} has no form, to_bytes and from_bytes.",
        "a codec of a class that inherits atoll.plan.codec.Codec, or that defines these three methods.",
        "a network sends messages as bytes, and compares the length of a message before it is read.",
        "Identity()",
    )


class Group(Protocol):
    """A group of processes. Each has a partial aggregate, and `Partial.reduce` combines these."""

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
        """The elementwise maximum of each tensor over all processes. Shapes and dtypes must be equal."""
        ...


@runtime_checkable
class Partial(Protocol):
    """The aggregate of some contributions. Processes exchange it as named tensors.

    An aggregator whose partials lack `tensors` and `of` cannot be used with worker processes; one whose partials lack
    `reduce` cannot be used with torchrun.
    """

    @abstractmethod
    def tensors(self) -> Tensors:
        """Convert the partial to named tensors."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: Tensors) -> Self:
        """The inverse of `tensors`: build a partial from named tensors."""

    @abstractmethod
    def reduce(self, group: Group) -> Self:
        """The aggregate over all processes of the group. Every process must call it, and all get the same bits."""


@runtime_checkable
class Aggregator(Protocol):
    """Combines contributions. `fold` and `merge` are associative and commutative to the bit."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def zero(self) -> Any:
        """An empty partial, to which no contribution was added."""

    @abstractmethod
    def fold(self, partial: Any, contribution: Contribution, ids: Ids) -> Any:
        """Add K contributions to a partial. Row k of the contribution belongs to start k of `ids`."""

    @abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """Combine two partials into one."""

    @abstractmethod
    def total(self, partial: Any) -> Total:
        """The sums of a partial, as a total."""

    @abstractmethod
    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """The aggregate of the round: `means["update"]` is the direction that the optimizer descends."""

    @default
    def linear(self) -> bool:
        """Whether the aggregate is linear in the updates, so that a codec may decode the sum."""
        return False

    @default
    def forms_sum(self) -> bool:
        """Whether the update is the sum Σ w·g, which is not divided by a weight."""
        return False

    @default
    def weights(self) -> Weights:
        """`"examples"`: a client's weight is its number of rows; `"equal"`: 1."""
        return "examples"

    @default
    def over(self) -> Over:
        """The divisor of the sum: `"arrived"`: the weight that arrived; `"expected"`: the expected weight."""
        return "arrived"

    @default
    def sum(self) -> SumKind:
        """`"exact"`: the same bits in any order; `"float"`: rounded in the order of arrival."""
        return "exact"

    @default
    def uses_entropy(self) -> bool:
        """Whether `finalize` draws from `info.entropy`."""
        return False

    @default
    def needs_population(self) -> bool:
        """Whether the rule needs all clients of the population, which an open run does not know."""
        return False

    @default
    def secure(self) -> Any:
        """The secure sum by which the contributions are added; None: the server receives each contribution."""
        return None

    def least(self, started: int) -> int:
        """The least number of contributions of a round with an update, if this many clients started."""
        return 1

    def secured(self, vectors: Mapping[str, Declared], clients: int, weight: int, rows: int) -> Aggregator:
        """A copy of an aggregator with a secure sum, which knows the grid of each vector.

        Args:
            vectors: the vectors of a contribution, the update as the codec encodes it.
            clients: the largest number of clients of a round.
            weight: the largest weight of a client.
            rows: the largest number of rows that a client processes in round 0.
        Raises:
            UsageError: a vector has no bound, or a sum could leave the ring.
        """
        return self

    def added(self) -> Mapping[str, Declared]:
        """Declares the sums that `lift` adds to a contribution."""
        return {}

    def lift(self, contribution: Contribution, key: Key) -> Contribution:
        """The contribution that leaves the client. With a secure sum its numbers are rounded to the grid.

        Args:
            contribution: the contribution of K clients, the update as the codec encoded it.
            key: the key of the round, with one stream for each client.
        """
        return contribution

    def bind(self, population: Population, chance: Tensor) -> Aggregator:
        """A copy of the aggregator that knows the clients and their chances. It is called once for each training.

        Args:
            population: all clients.
            chance: the probability that a client is selected, as in `Cohort`.
        """
        return self

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round. It is not broadcast."""
        return {}

    def in_round(self, server: Tensors, key: Key) -> Aggregator:
        """A copy for the totals of one round, which knows the server state and the key of its random numbers."""
        return self

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """The server state after the round.

        Args:
            total: the sum of all totals of the round, before the server's half of the codec and of the local part.
            server: the server state before the round.
            info: facts of the round.
        """
        return server

    def weigh(self, clients: Tensor, rows: Tensor) -> Tensor:
        """The weight of each contribution in the aggregate, int64 `[K]`.

        Args:
            clients: the ids of the clients, int64 `[K]`.
            rows: the number of rows of each client, int64 `[K]`.
        """
        return torch.ones_like(rows) if self.weights == "equal" else rows

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


@runtime_checkable
class Sampler(Protocol):
    """Selects the clients of a round."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        """Select the cohort of this round, with ascending ids. All random numbers come from the key."""

    @default
    def interchangeable(self) -> bool:
        """Whether all sets of n clients are equally likely, so that one large draw can replace several draws of n."""
        return False

    @default
    def needs_population(self) -> bool:
        """Whether the sampler needs all clients of the population, which an open run does not know."""
        return False

    @default
    def needs_values(self) -> bool:
        """Whether `observe` reads values of single clients, which a secure sum and noise hide."""
        return False

    def memory(self, population: Population) -> Tensors:
        """The memory of the sampler before the first round. The keys are names."""
        return {}

    def with_memory(self, memory: Tensors) -> Sampler:
        """A copy for the draw of one round, which knows the memory."""
        return self

    def observe(self, memory: Tensors, ids: Tensor, values: Tensors) -> Tensors:
        """The memory after a round.

        Args:
            memory: the memory before the round.
            ids: the clients whose contributions arrived, int64 `[n]`.
            values: their columns of the report, such as `loss`, `[n, …]`.
        """
        return memory

    def largest(self, population: Population) -> int:
        """The largest number of clients of a cohort. A secure sum is proved for this number."""
        return population.clients

    def selection(self, clients: int, rounds: int) -> Selection | None:
        """A proof of how often and with what chance a client is selected; None if there is none.

        Args:
            clients: C, the number of clients.
            rounds: the number of rounds.
        """
        return None

    def resized(self, ask: Callable[[int], int]) -> Sampler | None:
        """A sampler that selects ask(n) clients if this sampler selects n; None: the size cannot be changed.

        Args:
            ask: returns the number of clients to start for a cohort of n, such as `Pace.cohort_size`.
        """
        return None

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


@runtime_checkable
class Pace(Protocol):
    """Decides when a round closes, as a pure function of the facts in `Open`."""

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
        """The number of seconds after which a round need not wait for more clients; None: there is no deadline."""
        return None

    def cohort_size(self, n: int) -> int:
        """The number of clients that start for a cohort of n."""
        return n

    def required(self, started: int) -> int:
        """The number of contributions that make a full round if `started` clients start."""
        return started

    def may_start(self, starts: int) -> bool:
        """Whether a client may start again.

        Args:
            starts: the number of starts of the client in rounds after that in which the oldest flight started.
        """
        return True

    def staleness_weight(self, staleness: int) -> float:
        """The factor, in [0, 1], that multiplies an update whose client started `staleness` rounds ago."""
        return 1.0

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse a plan with these parts."""
        return ()


class Stepper(Protocol):
    """Makes optimizer steps in place on tensors that the caller owns."""

    def step(self, g: Tensor) -> None:
        """Make one step against g.

        Args:
            g: the gradients of the first k of the K clients, `[k, d]`. From call to call k never increases.
        """
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A rule for optimizer steps. To train clients, inherit `atoll.plan.optimizer.OptimizerBase`."""

    def __repr__(self) -> str:
        return _text(self)

    @abstractmethod
    def init(self, theta: Tensor) -> Tensors:
        """The state before the first `update`."""

    @abstractmethod
    def update(self, theta: Tensor, g: Tensor, sums: Tensors, state: Tensors, round: int) -> tuple[Tensor, Tensors]:
        """Return θ after one step against g, and the optimizer's state after the step. The arguments do not change."""

    @abstractmethod
    def lr_at(self, round: int, state: Tensors) -> float:
        """The learning rate of this round."""

    @default
    def lr(self) -> Schedule | float | None:
        """The learning rate or its schedule, if the optimizer has one."""
        return None

    @default
    def schedule(self) -> Schedule:
        """The learning rate as a schedule of the round. It is 1 if the optimizer has no learning rate."""
        return as_schedule(1.0 if self.lr is None else self.lr)

    @default
    def trains_clients(self) -> bool:
        """Whether the optimizer has `slots` and `stepper`, which local training uses."""
        return False

    def step_rule(self, lr: float) -> StepRule | None:
        """The rule of a step at this learning rate, if the backends can make the steps; None: only `stepper` can."""
        return None

    def slots(self, theta: Tensor) -> dict[str, Tensor]:
        """The optimizer state of clients before their first step.

        Args:
            theta: the model of one client, `[d]`, or of K clients, `[K, d]`.
        """
        return {}

    def stepper(self, theta: Tensor, state: Tensors, lr: float) -> Stepper:
        """A stepper that makes steps in place on `theta` and `state`.

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
