"""Settings of hypothesis for all tests: the same examples on every machine, and no deadline, since some are slow.

`make test` leaves out slow tests and most examples. HYPOTHESIS_PROFILE=search draws new examples and more of them. Use
it to search for bugs, not in CI.
"""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

NO_HURRY = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50, suppress_health_check=NO_HURRY)
settings.register_profile("quick", settings.get_profile("same"), max_examples=12)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=NO_HURRY)


def pytest_configure(config):
    """Load the profile before a test module is read, since the `settings` of a test extend those of the profile."""
    usual = "quick" if config.option.markexpr == "not slow" else "same"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", usual))


@pytest.fixture
def known_secrets():
    """The secrets of rounds follow from a seed, so that two runs with noise are equal."""
    from atoll.testing import entropy_source, known_entropy

    with entropy_source(known_entropy(0)):
        yield


def pytest_collection_finish():
    """Modules and collected tests live until the end, so the garbage collector does not visit them again."""
    gc.freeze()
