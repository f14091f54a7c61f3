"""Parts that cannot stand beside each other: a plan that could not mean what it says is refused when it is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from atoll.errors import UsageError
from atoll.plan.codec.stage import flat
from atoll.plan.pace import Sync
from atoll.plan.sampler import Everyone, Poisson

if TYPE_CHECKING:
    from atoll.plan.plan import Plan


class Clash(NamedTuple):
    """What was given, what is required, why, and what to write instead."""

    given: str
    required: str
    why: str
    write: str


def refuse(plan: Plan) -> None:
    """Raise for the first two parts of a plan that exclude each other.

    Raises:
        UsageError: which two, why, and what to write instead of one of them.
    """
    for clash in (*_codec(plan), *_pace(plan), *_downlink(plan), *_sends(plan)):
        raise UsageError(*clash)


def _codec(plan: Plan) -> Iterator[Clash]:
    rule, codec = plan.aggregator, plan.codec
    if not rule.linear and codec.decodes:
        why = "the codec is undone once on the sum, and this rule forms no sum."
        yield Clash(f"{rule!r} with the codec {codec!r}.", "an aggregator that is linear.", why, "Mean()")
    if getattr(codec, "remembers_everyone", False):
        required = "Mean() over what arrived, and a pace under which nothing arrives late."
        why = "the server keeps the mean of all clients' last updates, which no other rule divides rightly."
        if type(rule).__name__ == "Sum" or not rule.linear or getattr(rule, "over", "arrived") == "expected":
            yield Clash(f"{codec!r} with {rule!r}.", required, why, "Mean()")
        if plan.pace.flies_on:
            yield Clash(f"{codec!r} with {plan.pace!r}.", required, why, "Sync()")


def _pace(plan: Plan) -> Iterator[Clash]:
    rule, pace, sampler = plan.aggregator, plan.pace, plan.sampler
    plain = pace == Sync()
    if getattr(pace, "partial", False) and not hasattr(plan.local, "epochs"):
        why = "only local training can stop half way: its steps so far are an update."
        yield Clash(f"{plan.local!r} with {pace!r}.", "Train(...).", why, "Train(sgd(0.1), epochs=1, batch=10)")
    if pace.flies_on and not rule.linear:
        why = "updates of several births are decoded and discounted as sums, and this rule forms no sum."
        yield Clash(f"{rule!r} with {pace!r}.", "an aggregator that is linear.", why, "Mean()")
    if not plain and getattr(rule, "over", "arrived") == "expected":
        why = "who counts depends on who is quick, and the chance of that is not known."
        yield Clash(f"{rule!r} with {pace!r}.", "Sync(), or a mean over what arrived.", why, "Sync()")
    if not plain and isinstance(sampler, Poisson):
        why = "a coin for each client asks for no number of clients that could be kept at work."
        yield Clash(f"{sampler!r} with {pace!r}.", "Sync(), or a cohort of n clients.", why, "Sync()")
    if pace.asks(1000) > 1000 and (
        isinstance(sampler, Everyone) or not (hasattr(sampler, "n") or hasattr(sampler, "q"))
    ):
        why = "there is nobody else to ask."
        yield Clash(f"{sampler!r} with {pace!r}.", "a cohort of n out of more clients.", why, "Uniform(10)")


def _downlink(plan: Plan) -> Iterator[Clash]:
    codec, somewhere = plan.downlink, flat(64)
    tame = codec.contraction() if hasattr(codec, "contraction") else codec
    if getattr(codec, "native", False) or codec.memory(somewhere) or codec.server(somewhere):
        why = "what the stream of deltas lost is in the next delta already: the server keeps θ as clients know it."
        yield Clash(f"downlink={codec!r}.", "a codec that keeps nothing between rounds.", why, _bare(codec))
    elif tame != codec:
        why = "its error can be larger than what it was given, and θ as clients know it would run away from θ."
        yield Clash(f"downlink={codec!r}.", "a codec that brings back less error than it was given.", why, repr(tame))


def _bare(codec: Any) -> str:
    """The stages of a codec that keep nothing, one around another taken off."""
    stages = [each for stage in getattr(codec, "stages", (codec,)) for each in _inside(stage)]
    return " >> ".join(repr(stage) for stage in stages if not getattr(stage, "native", True)) or "TopK(0.1)"


def _inside(stage: Any) -> Iterator[Any]:
    held = getattr(stage, "codec", stage)
    yield from getattr(held, "stages", (held,))


def _sends(plan: Plan) -> Iterator[Clash]:
    rule, codec = plan.aggregator, plan.codec
    if getattr(plan.local, "sends", "update") != "model":
        return
    if not rule.linear:
        why = "the server brings what clients moved to its own θ as a sum, and this rule forms no sum."
        yield Clash(f"{plan.local!r} with {rule!r}.", "an aggregator that is linear.", why, "Mean()")
    if getattr(codec, "remembers_everyone", False):
        required, why = "a codec whose server keeps no updates.", "those it keeps were about an older θ than its own."
        yield Clash(f"{plan.local!r} with {codec!r}.", required, why, _bare(codec))
