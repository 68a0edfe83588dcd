"""A simulated engine that speaks vLLM's HTTP protocol: load tests, demos, client development, faults.

It computes nothing. Latency follows a continuous-batching model (`scheduler`), text is deterministic words
(`tokens`), and everything that names itself says so: `system_fingerprint`, `/version`, the model's owner
and the metric `galerne_engine_simulated`.
"""

from serving.engine.fake.app import FakeApp, build_app

__all__ = ["FakeApp", "build_app"]
