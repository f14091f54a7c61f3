"""What every test gets: the same examples from hypothesis on every machine, and no deadline on a noisy one.

Where slow tests are left out (`make test`), so are most examples. HYPOTHESIS_PROFILE=search draws new ones, and more of
them: for looking for trouble, not for CI.
"""

import os

from hypothesis import HealthCheck, settings

NO_HURRY = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50, suppress_health_check=NO_HURRY)
settings.register_profile("quick", settings.get_profile("same"), max_examples=12)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=NO_HURRY)


def pytest_configure(config):
    """Before any test is read: its own `settings` are added to those of the profile."""
    usual = "quick" if config.option.markexpr == "not slow" else "same"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", usual))
