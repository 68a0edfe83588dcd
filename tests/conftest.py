"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# Timings decide no test: on a busy machine an example takes as long as it takes. The same commit has the same examples
# everywhere; to look for new ones: `pytest --hypothesis-profile=explore`.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("galerne", settings.get_profile("explore"), derandomize=True)
settings.load_profile("galerne")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that a test runs in this process says where its logs go: the next test starts as if it had not."""
    yield
    structlog.reset_defaults()
