"""The formula of a plan as text, and the former names of parts. Loads without torch.

Tests: tests/surface/test_renamed.py, tests/surface/test_fast_commands.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from atoll.base.errors import UsageError
from atoll.base.grammar import arguments

# The slots of a plan in the order of its arguments, each with the text of its default.
DEFAULTS: Mapping[str, str] = {
    "local": "",
    "aggregator": "",
    "optimizer": "sgd(1.0)",
    "cohort": "Everyone()",
    "codec": "Identity()",
    "pace": "Sync()",
    "downlink": "Identity()",
    "max_failed": "0.5",
}

FEDAVG_RATE = 0.5  # of `fedavg()`, and of a training of classes that names no recipe

RENAMED = {"Feedback": "ErrorFeedback", "Shift": "EF21", "polynomial": "staleness_polynomial"}
OLD = re.compile(
    r"(?<![\w.:])(?:(Feedback|Shift)(?=\()"  # any call
    r"|(polynomial)(?=\(\s*(?:power\s*=\s*)?[-+.\w]+\s*\)))"  # a call with a single number was no schedule
)


def renamed(text: str) -> str:
    """Replace the former names of renamed parts in a plan text by the present names.

    Args:
        text: the text of a plan.
    Example:
        >>> renamed("Buffered(10, staleness=polynomial(1.0))"), renamed("sgd(polynomial(0.1, rounds=9))")
        ('Buffered(10, staleness=staleness_polynomial(1.0))', 'sgd(polynomial(0.1, rounds=9))')
    """
    return OLD.sub(lambda found: RENAMED[found[0]], text)


def formula(parts: Mapping[str, str]) -> str:
    """The formula of a plan with its slots filled in.

    Args:
        parts: the text of the part in each slot.
    """
    return "\n".join(
        (
            f"cohort = {parts['cohort']}",
            f"gᵢ     = {parts['local']}(θ, dataᵢ)",
            f"mᵢ     = {parts['codec']}(gᵢ)",
            f"g      = {parts['aggregator']}(mᵢ, wᵢ)          pace {parts['pace']}",
            f"θ⁺     = {parts['optimizer']}(θ, g, round)",
            *([] if parts["downlink"] == DEFAULTS["downlink"] else [f"θ̂⁺     = θ̂ + {parts['downlink']}(θ⁺ − θ̂)"]),
        )
    )


def formula_of(text: str) -> str:
    """The formula of a plan that was written as its `repr`. No part is built. A text that is no plan stays as it is.

    Example:
        >>> print(formula_of("Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))"))
        cohort = Everyone()
        gᵢ     = Gradient()(θ, dataᵢ)
        mᵢ     = Identity()(gᵢ)
        g      = Mean()(mᵢ, wᵢ)          pace Sync()
        θ⁺     = sgd(0.1)(θ, g, round)
    """
    try:
        name, given, words = arguments(renamed(text))
    except UsageError:
        return text
    parts = {**DEFAULTS, **dict(zip(DEFAULTS, given, strict=False)), **words}
    return formula(parts) if name == "Plan" and parts["local"] and parts["aggregator"] else text


def without_identity(text: str) -> str:
    """A formula without the codec that changes nothing, and without the pace that waits for all clients.

    Example:
        >>> print(without_identity(formula_of("Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))")))
        cohort = Everyone()
        gᵢ     = Gradient()(θ, dataᵢ)
        g      = Mean()(gᵢ, wᵢ)
        θ⁺     = sgd(0.1)(θ, g, round)
    """
    codec = f"mᵢ     = {DEFAULTS['codec']}(gᵢ)\n"
    text = text.replace(f"          pace {DEFAULTS['pace']}\n", "\n")
    return text.replace(codec, "").replace("(mᵢ, wᵢ)", "(gᵢ, wᵢ)") if codec in text else text
