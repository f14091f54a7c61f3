"""Differential privacy as stages of a codec: bound the update of each client, and add noise to the sum of a round.

    yᵢ = xᵢ / max(|xᵢ|, C)                      at the client: |yᵢ| ≤ 1
    yᵢ ← ⌊yᵢ⌉ + N(0, z²)                        at the client, with Noise(z, by="client")
    Σ yᵢ ← ⌊Σ yᵢ⌉ + N(0, z²)                    at the server, with Noise(z): on a grid, with discrete Gaussian noise
    Σ xᵢ ← C · Σ yᵢ

After the clip all numbers are in units of the clip. A chain runs its server half backwards, so the noise is added
before the sum is scaled, and noise and scale use the same C.

Tests: tests/identities/test_privacy_codecs.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key, SecretKey
from atoll.base.validation import bounded_number, check_fields
from atoll.compute import bounded_rows
from atoll.compute.discrete_gaussian import discrete_gaussian
from atoll.compute.layout import Layout
from atoll.plan.codec.lowrank import LowRank
from atoll.plan.codec.stage import Chain, Codec, Encoded, Identity, flat_layout
from atoll.plan.protocols import Conflict, Declared, Release, RoundInfo, Slots, Stage, Tensors, Total

_NORMS = "the norm of an update is a positive number."
_SLACK = {torch.float32: 2.0**-22, torch.float64: 2.0**-40}  # more than all rounding of a clipped update
MARGIN = 2.0**-10  # part of the noise that pays for all rounding between clip and noise
_FINEST = 1024.0  # least deviation of the noise in steps of its grid
_LARGEST = 2.0**61  # sums are cut to this size in steps of the grid, so that integers do not overflow
_ROWS = 'Mean(weights="equal", over="expected")'
_LOCAL = "Train(sgd(0.1), epochs=1, batch=10)"


class _Bounded(Codec):
    """A stage that bounds the norm of each update. The server multiplies the sum by the bound."""

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return {"update": Declared(layout.d, layout.dtype, "mean", 1.0)}

    def contraction(self) -> Codec:
        return Identity()

    def conflicts(self, slots: Slots) -> Iterator[Conflict]:
        """The sum has to be formed in units of the clip, and nothing else may be added to it."""
        if not slots.aggregator.linear:
            why = "the rule would receive updates in units of the clip, and only a sum can be multiplied by it."
            write = _ROWS if slots.codec.uses_entropy else "Mean()"
            yield Conflict(f"{self!r} with {slots.aggregator!r}.", "an aggregator that is linear.", why, write)
        stages = list(leaves(slots.codec))
        for stage in stages[: stages.index(self)] if self in stages else ():
            if isinstance(stage, LowRank):
                why = "its decode is a product of two factors, so it is not linear in the clipped numbers."
                yield Conflict(f"{slots.codec!r}.", f"{self!r} before {stage!r}.", why, f"{self!r} >> {stage!r}")
        if slots.local.sends == "model":
            why = "the server adds θ to the sum before it multiplies the sum by the clip."
            yield Conflict(f"{self!r} with {slots.local!r}.", 'sends="update".', why, _LOCAL)


@dataclass(frozen=True, repr=False)
class Clip(_Bounded):
    """Bounds the Euclidean norm of each update.

    y = x / max(|x|, bound) at the client, and Σ x = bound · Σ y at the server:  |x| ≤ bound

    The norm is computed in float64, and the factor is rounded down: |y| ≤ 1 holds for the numbers that are sent.

    Args:
        bound: the largest norm, in the unit of the update, from 1e-30 to 1e30.
    Raises:
        UsageError: the bound is out of range.
    Example:
        >>> y, *_ = Clip(5.0).encode(torch.tensor([[30.0, 40.0], [3.0, 0.0]]), {}, {}, Key(0))
        >>> y.round(decimals=4)
        tensor([[0.6000, 0.8000],
                [0.6000, 0.0000]])

    Reference: McMahan et al., Learning Differentially Private Recurrent Language Models, 2018.
    """

    bound: float = bounded_number(least=1e-30, most=1e30, example=1.0, why=_NORMS)

    def __post_init__(self) -> None:
        check_fields(self)

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        return _clipped(x, bounded_rows.norms(x), self.bound), {}, {}, memory

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        return _scaled(total, self.bound), server


@dataclass(frozen=True, repr=False)
class AdaptiveClip(_Bounded):
    """Bounds the norm of each update by a quantile of the norms, which follows the training.

    b = (Σ (1[|xᵢ| ≤ C] − ½) + N(0, count²)) / n + ½,   C⁺ = C exp(−rate (b − quantile))

    n is the expected number of clients of a round. A round is clipped, noised and scaled by the same C.

    Server state: `clip`, C, float64 `[]`. It is sent to clients.

    Args:
        quantile: the fraction of the clients whose updates are not clipped, in (0, 1).
        rate: the speed of C, > 0.
        start: C in round 0, from 1e-30 to 1e30.
        count: the standard deviation of the noise on the number of unclipped updates, ≥ 0. None: n/20 if a `Noise`
            follows, else 0.
    Raises:
        UsageError: a number is out of range.
    Example:
        >>> AdaptiveClip(0.5) >> AdaptiveClip(start=1.0)
        AdaptiveClip() >> AdaptiveClip(start=1.0)

    Reference: Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021.
    """

    quantile: float = bounded_number(0.5, above=0, below=1, why="it is a fraction of the clients.")
    rate: float = bounded_number(0.2, above=0, why="a rate of 0 never changes the bound; use Clip.")
    start: float = bounded_number(0.1, least=1e-30, most=1e30, why=_NORMS)
    count: float | None = bounded_number(None, least=0, example=5.0, why="a deviation is not negative.")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def uses_entropy(self) -> bool:
        return bool(self.count)

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return {**super().declare(layout), "unclipped": Declared(1, torch.float64, "sum", 0.5)}

    def event(self, cohort: float) -> Release | None:
        """The release of the number of unclipped updates: its sensitivity is ½."""
        count = cohort / 20 if self.count is None else self.count
        return Release(2 * count, update=False) if count else None

    def server(self, layout: Layout) -> Tensors:
        return {"clip": torch.tensor(self.start, dtype=torch.float64)}

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        norms, clip = bounded_rows.norms(x), shared["clip"].to(x.device)
        unclipped = (norms[:, 0] <= clip).to(torch.float64) - 0.5
        return _clipped(x, norms, clip), {}, {"unclipped": unclipped}, memory

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        sums = dict(total.sums)
        found = sums.pop("unclipped", torch.zeros(1, dtype=torch.float64)).reshape(1)
        chance, clip = info.chance, server["clip"]
        n = max(1.0, float(chance.sum() if chance.dim() else chance * info.population.clients))
        noised = self.binding is not None and self.binding.noised
        count = (n / 20 if noised else 0.0) if self.count is None else self.count
        if count:
            found = _released(found * 2, 2 * count, 1.0, info.entropy.fold("count")) / 2
        b = found[0].to(clip) / n + 0.5
        after = (clip * torch.exp(-self.rate * (b - self.quantile))).clamp(1e-30, 1e30)
        return _scaled(total._replace(sums=sums), clip), {"clip": after}

    def conflicts(self, slots: Slots) -> Iterator[Conflict]:
        yield from super().conflicts(slots)
        if slots.pace.asynchronous:
            why = "updates of several rounds would be in units of several clips."
            yield Conflict(f"{self!r} with {slots.pace!r}.", "Sync(), or a fixed clip.", why, "Sync()")
        stages = list(leaves(slots.codec))
        if any(isinstance(other, AdaptiveClip) for other in stages if other is not self):
            why = "both count the unclipped updates under one name."
            yield Conflict(f"{slots.codec!r}.", "one AdaptiveClip.", why, f"{self!r}")
        after = stages[stages.index(self) + 1 :]
        if kept := next((other for other in after if other.memory(flat_layout(64))), None):
            why = "the state of a client would be in units of an older clip."
            yield Conflict(f"{self!r} >> {kept!r}.", "a fixed clip.", why, f"Clip({self.start}) >> {kept!r}")


def noises_messages(codec: Stage) -> bool:
    """Whether each message of a client has noise, and not only the sum of a round."""
    event = codec.event(1.0)
    return event is not None and event.messages


@dataclass(frozen=True, repr=False)
class Noise(Codec):
    """Adds normal noise in proportion to the bound of the preceding stages: to the sum of a round, or to each update.

    Σ y ← ⌊Σ y⌉ + bound · N(0, z²),   |yᵢ| ≤ bound     by="server"
    yᵢ ← ⌊yᵢ⌉ + bound · N(0, z²)                       by="client"

    The sum is rounded to a grid of 2^-k with 2^-k √d ≤ 2⁻¹² bound, and the noise is a discrete Gaussian on this grid
    whose deviation is larger by the factor 1 + 2⁻¹⁰. This factor pays for all rounding. A discrete Gaussian of
    deviation σ ≥ 1024 steps is a normal number of deviation √(σ² − 16), rounded at random to the grid, up to a distance
    of 2⁻⁴⁵⁰. So the release is at least as private as continuous noise of deviation z · bound, in any dimension.

    A round without contributions releases noise, too.

    With `by="client"` each client rounds its own update and adds its own noise, so that its message is private for the
    server, too. The accountant then counts a message as a release of sensitivity 2, and no chance of a client helps.

    Args:
        z: the standard deviation of the noise in units of the largest update, from 1e-6 to 1e6.
        by: `"server"`: the noise of a round is added to the sum; `"client"`: each client adds noise to its update.
    Raises:
        UsageError: an argument is out of range; in `bind`: the update has no bound.
    Example:
        >>> Clip(0.5) >> Noise(2.0), Clip(0.5) >> Noise(2.0, by="client")
        (Clip(0.5) >> Noise(2.0), Clip(0.5) >> Noise(2.0, by='client'))

    Reference: Abadi et al., Deep Learning with Differential Privacy, 2016; Canonne, Kamath and Steinke, The Discrete
        Gaussian for Differential Privacy, 2020; Peikert, An Efficient and Parallel Gaussian Sampler for Lattices, 2010.
    """

    z: float = bounded_number(least=1e-6, most=1e6, example=1.0, why="it is the deviation of the noise per bound.")
    by: Literal["server", "client"] = "server"
    uses_entropy = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.by not in ("server", "client"):
            why = "the server adds noise to the sum, or each client to its update."
            raise UsageError(f"Noise: by = {self.by!r}.", "'server' or 'client'.", why, f"Noise({self.z})")

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        if self.by == "server" or x.is_meta:
            return x, {}, {}, memory
        bound, key = float(self.before.bound or math.inf), key.entropy.fold("noise")
        noisy = [_released(row, self.z, bound, key.only(k)) for k, row in enumerate(x)]
        finite = x.isfinite().all(-1, keepdim=True)  # a grid has no NaN; the server drops the client by name
        return torch.where(finite, torch.stack(noisy).to(x.dtype), torch.nan), {}, {}, memory

    def gain(self, layout: Layout) -> float:
        return 1.0 if self.by == "server" else math.inf

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return self.bounded(layout) if self.by == "server" else {"update": Declared(layout.d, layout.dtype, "mean")}

    def event(self, cohort: float) -> Release | None:
        return Release(self.z, update=True, messages=self.by == "client")

    def contraction(self) -> Codec:
        return Identity()

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Self:
        """The same stage with the bound of the preceding ones.

        Raises:
            UsageError: the update has no bound.
        """
        bound = super().bind(layout, total_weight, before)
        if bound.before.bound is None:
            raise UsageError(*_unbounded(self))
        return bound

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if self.by == "client":
            return total, server
        update = total.means["update"]
        bound = float(self.before.bound or math.inf)
        noisy = _released(update, self.z, bound, info.entropy.fold("noise"))
        return total._replace(means={**total.means, "update": noisy}), server

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """The combinations for which the noise has no proof."""
        yield from _codec_conflicts(self, slots.codec)
        yield from _rule_conflicts(self, slots)
        yield from _reader_conflicts(self, slots)


def _codec_conflicts(noise: Noise, codec: Stage) -> Iterator[Conflict]:
    stages = list(leaves(codec))
    at = stages.index(noise)
    before, after = stages[:at], stages[at + 1 :]
    clips = [stage for stage in before if stage.declare(flat_layout(64))["update"].bound is not None]
    if not clips:
        yield Conflict(*_unbounded(noise))
        return
    if noise.by == "client":
        yield from _message_conflicts(noise, codec, before)
        after = []  # a computation with the noised message
    between = before[before.index(clips[-1]) + 1 :]
    for stage in before[: before.index(clips[-1])]:
        if (stage.per_message or stage.per_sum) and not math.isfinite(stage.gain(flat_layout(64))):
            why = f"the server decodes {type(stage).__name__} after the clip, and that may enlarge an update."
            required = "stages with a finite gain before the clip."
            yield Conflict(f"{codec!r}.", required, why, f"{clips[-1]!r} >> {noise!r}")
    for stage in (*between, *after):
        gain = stage.gain(flat_layout(64))
        if not math.isfinite(gain):
            why = f"{type(stage).__name__} may enlarge the norm of an update, so the noise would be too small."
            yield Conflict(
                f"{codec!r}.", "stages with a finite gain after the clip.", why, f"{clips[-1]!r} >> {noise!r}"
            )
        elif gain > 1 and stage in after:
            others = [clips[-1], *between, *after, noise]
            why = f"{type(stage).__name__} enlarges the norm of an update after the noise was chosen."
            yield Conflict(f"{codec!r}.", "the noise last.", why, " >> ".join(map(repr, others)))
    for stage in stages:
        if len(stage.declare(flat_layout(64))) > 1 and stage.event(1.0) is None:
            why = "its sum is released, too."
            write = f"{'AdaptiveClip()' if isinstance(stage, AdaptiveClip) else 'Clip(1.0)'} >> {noise!r}"
            yield Conflict(f"{stage!r} with {noise!r}.", "noise on each sum that a stage adds.", why, write)


def _message_conflicts(noise: Noise, codec: Stage, before: list[Stage]) -> Iterator[Conflict]:
    """Refuse numbers that would leave a client without the noise of its update."""
    for stage in before:
        if isinstance(stage, AdaptiveClip):
            why = "the count of unclipped updates would leave a client without noise."
            yield Conflict(f"{stage!r} with {noise!r}.", "a fixed clip.", why, f"Clip({stage.start}) >> {noise!r}")
        if stage.form(flat_layout(64)).side:
            why = f"{type(stage).__name__} sends numbers next to the update, which have no noise."
            yield Conflict(f"{codec!r}.", "a clip and the noise first.", why, f"Clip(1.0) >> {noise!r}")


def _rule_conflicts(noise: Noise, slots: Slots) -> Iterator[Conflict]:
    rule, sampler = slots.aggregator, slots.sampler
    given = f"{noise!r} with {rule!r}."
    if not rule.linear or rule.forms_sum:
        yield Conflict(given, "a mean.", "the noise is that of a mean, with a fixed divisor.", _ROWS)
    elif rule.weights != "equal":
        yield Conflict(given, 'weights="equal".', "the largest weight of a client has no bound.", _ROWS)
    elif rule.over != "expected":
        why = "the number of clients that arrived reveals whether a client took part."
        yield Conflict(given, 'over="expected".', why, _ROWS)
    elif rule.sum != "exact":
        yield Conflict(given, 'sum="exact".', "the rounding of a float sum has no bound that the noise covers.", _ROWS)
    others = [stage for stage in leaves(slots.codec) if not isinstance(stage, (Clip, AdaptiveClip, Noise))]
    if rule.secure is not None and noise.by == "client":
        why = "a secure sum needs a bound on each update, and normal noise has none."
        yield Conflict(given, 'by="server".', why, repr(Noise(noise.z)))
    elif rule.secure is not None and others:
        why = f"no bound is known for the rounding of the sum after {type(others[0]).__name__}."
        yield Conflict(given, "a clip and noise as the codec.", why, "Clip(1.0) >> Noise(1.0)")
    if slots.pace.asynchronous or slots.pace.replaces_arrivals or slots.pace.cohort_size(1000) != 1000:
        why = "the clients that count are not those that the sampler drew."
        yield Conflict(f"{noise!r} with {slots.pace!r}.", "Sync().", why, "Sync()")
    if sampler.selection(1 << 40, 1) is None:
        why = "no proof bounds the chance and the number of selections of a client."
        yield Conflict(f"{noise!r} with {sampler!r}.", "Poisson, Uniform, Everyone or RoundRobin.", why, "Poisson(0.1)")


def _reader_conflicts(noise: Noise, slots: Slots) -> Iterator[Conflict]:
    local = slots.local
    if local.sends == "model":
        why = "a model has no bound; its difference to θ has."
        yield Conflict(f"{noise!r} with {local!r}.", 'sends="update".', why, _LOCAL)
    for part, write in ((local.optimizer, _LOCAL), (slots.optimizer, "sgd(1.0)")):
        if part is not None and part.schedule.init():
            why = "it reads the training loss, which stays at the clients."
            yield Conflict(f"{noise!r} with {part!r}.", "a schedule of the round.", why, write)


def _unbounded(noise: Noise) -> tuple[str, str, str, str]:
    why = "the noise is in proportion to the largest update."
    return f"{noise!r} without a clip before it.", "a bound on the norm of each update.", why, f"Clip(1.0) >> {noise!r}"


def leaves(codec: Stage) -> Iterator[Stage]:
    """The stages of a codec in the order of the client, without chains."""
    if not isinstance(codec, Chain):
        yield codec
        return
    for stage in codec.stages:
        yield from leaves(stage)


def _clipped(x: Tensor, norms: Tensor, bound: float | Tensor) -> Tensor:
    """x / max(|x|, bound) with a norm of at most 1."""
    exact = (1 - _SLACK[x.dtype]) / norms.clamp(min=bound)
    factor = exact.to(x.dtype)
    lower = torch.where(factor.double() > exact, torch.nextafter(factor, torch.zeros_like(factor)), factor)
    return bounded_rows.scaled(x, lower)


def _scaled(total: Total, by: float | Tensor) -> Total:
    update = {n: t * (by.to(t) if isinstance(by, Tensor) else by) for n, t in total.means.items() if n == "update"}
    return total._replace(means={**total.means, **update})


def _released(x: Tensor, z: float, bound: float, key: SecretKey) -> Tensor:
    """x on a grid, plus discrete Gaussian noise of deviation z · bound · (1 + 2⁻¹⁰), float64."""
    deviation = z * bound * (1 + MARGIN)
    fine = max(math.log2(_FINEST / deviation), math.log2(math.sqrt(max(1, x.numel())) * 2**12 / bound))
    steps = 2.0 ** math.ceil(fine)
    whole = (x.double() * steps).round().clamp(-_LARGEST, _LARGEST).long()
    noise = discrete_gaussian(key, x.numel(), deviation * steps).reshape(x.shape).to(x.device)
    return (whole + noise).double() / steps
