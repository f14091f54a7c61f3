"""What every test gets: the same examples from hypothesis on every machine, and no deadline on a noisy one.

HYPOTHESIS_PROFILE=search draws new examples, and more of them: for looking for trouble, not for CI.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
