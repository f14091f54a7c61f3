"""Clip and Noise: codec stages that bound each update and add normal noise to the sum of a round.

Tests: tests/conformance/test_foreign.py
"""

from dataclasses import dataclass

from atoll.base.errors import UsageError
from atoll.base.validation import bounded_number, check_fields
from atoll.plan.codec import Codec, Identity
from atoll.plan.codec.grid import ordered_sum
from atoll.plan.protocols import Conflict, Declared


@dataclass(frozen=True, repr=False)
class Clip(Codec):
    """Scales down an update whose Euclidean norm exceeds a bound.

    y = x · min(1, bound / |x|)

    The sum `clipped` counts the updates that were scaled down.

    Args:
        bound: the largest norm, > 0.
    Raises:
        UsageError: the bound is out of range.
    Example:
        >>> Clip(1.0)
        Clip(1.0)

    Reference: McMahan et al., Learning Differentially Private Recurrent Language Models, 2018.
    """

    bound: float = bounded_number(above=0, example=1.0)

    def __post_init__(self):
        check_fields(self)

    def encode(self, x, memory, shared, key):
        """The scaled update of each client. No bit of it depends on the other clients."""
        norm = ordered_sum(x.double().square()).sqrt()
        return x * (self.bound / norm).clamp(max=1).to(x), {}, {"clipped": (norm[:, 0] > self.bound).to(x)}, memory

    def declare(self, layout):
        """A bounded update, and the count of clipped ones."""
        d, dtype = layout.d, layout.dtype
        return {"update": Declared(d, dtype, "mean", self.bound), "clipped": Declared(1, dtype, "sum")}


@dataclass(frozen=True, repr=False)
class Noise(Codec):
    """Adds normal noise to the sum of the updates, in proportion to the bound of the preceding stage.

    Σ g ← Σ g + multiplier · bound · z,   z ~ N(0, I) from the entropy of the round, which no seed determines

    Args:
        multiplier: standard deviation of the noise per unit of the bound, > 0.
    Raises:
        UsageError: the multiplier is out of range; in `bind`: the update has no bound, or the model has buffers.
    Example:
        >>> Clip(1.0) >> Noise(0.5)
        Clip(1.0) >> Noise(0.5)

    Reference: Abadi et al., Deep Learning with Differential Privacy, 2016.
    """

    multiplier: float = bounded_number(above=0, example=1.0)
    uses_entropy = True
    encode = Identity.encode  # clients send the bounded updates unchanged

    def __post_init__(self):
        check_fields(self)

    def bind(self, layout, total_weight=None, before=None):
        """The same stage with the bound of the preceding one."""
        bound, clip = super().bind(layout, total_weight, before), f"Clip(1.0) >> {self!r}"
        if bound.before.bound is None:
            raise UsageError(f"{self!r} without a bound.", "a bounded norm.", "the bound scales the noise.", clip)
        if layout.b:
            norm = f"torch.nn.GroupNorm(1, {layout.segment('buffers')[0].size})"
            raise UsageError(f"{self!r} with model buffers.", "no buffer.", "their mean has no noise.", norm)
        return bound

    def server_update(self, total, server, info, key):
        """The sum with noise. A round without a contribution has no sum."""
        draw, scale = info.entropy.normal, self.multiplier * self.before.bound
        noisy = {n: t + scale * draw(t.shape, t.dtype).to(t.device) for n, t in total.means.items() if n == "update"}
        return total._replace(means={**total.means, **noisy}), server

    def conflicts(self, slots):
        """Weights that change the bound of an update."""
        if slots.aggregator.weights != "equal":
            why = "a client's part of the sum is bounded only if its weight is 1."
            yield Conflict(f"{self!r} with {slots.aggregator!r}.", "equal weights.", why, 'Mean(weights="equal")')
