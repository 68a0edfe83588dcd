"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Timings decide no test: on a busy machine an example takes as long as it takes.
settings.register_profile("galerne", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("galerne")
