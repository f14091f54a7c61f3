"""Conformance checks: the contract of each slot of a plan, as a function that you can run on your own part.

    from atoll.testing import check_aggregator
    check_aggregator(Vote())

If the part breaks its contract, the check raises `Nonconformity`. The error states the behaviour of the part, the
requirement and the reason. Otherwise the check returns None. Checks draw from fixed keys, so the same part gives the
same result every time. `tests/conformance` runs the checks on all parts of atoll, and on parts that fail each of them.

Tests: tests/conformance/test_parts.py, tests/conformance/test_contributing.py
"""

from atoll.base.entropy import entropy_source
from atoll.testing.codecs import check_aggregator, check_stage
from atoll.testing.contract import Nonconformity, check_value, known_entropy, round_info
from atoll.testing.engines import check_engine
from atoll.testing.local import check_correction, check_local
from atoll.testing.optimizers import check_optimizer, check_schedule
from atoll.testing.paces import check_pace
from atoll.testing.samplers import check_partition, check_sampler

__all__ = [
    "Nonconformity",
    "check_aggregator",
    "check_correction",
    "check_engine",
    "check_local",
    "check_optimizer",
    "check_pace",
    "check_partition",
    "check_sampler",
    "check_schedule",
    "check_stage",
    "check_value",
    "entropy_source",
    "known_entropy",
    "round_info",
]
