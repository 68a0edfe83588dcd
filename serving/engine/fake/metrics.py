"""The fake engine's /metrics: series with the names, types and labels of vLLM 0.29 (v1/metrics/loggers.py).

Values are plain numbers that a collector turns into series when it is scraped: the hot path pays a few
additions a token. `galerne_engine_simulated 1` marks the engine as what it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.engine.fake.scheduler import Scheduler, Sequence, Step

FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
ENGINE_INDEX = "0"

_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PARAMS_N = (1, 2, 5, 10, 20)


class Histogram:
    """Counts per bucket and a sum; bounds are inclusive upper ends."""

    def __init__(self, name: str, documentation: str, bounds: Iterable[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Adds one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, labels: dict[str, str]) -> Metric:
        """The series as they are now."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=list(labels))
        ends = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        cumulated = [(end, float(count)) for end, count in zip(ends, accumulate(self._counts), strict=True)]
        family.add_metric(list(labels.values()), cumulated, self._sum)
        return family


def token_buckets(maximum: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to `maximum`: vLLM's buckets for token counts."""
    buckets: list[int] = []
    magnitude = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * magnitude > maximum:
                return buckets
            buckets.append(mantissa * magnitude)
        magnitude *= 10


class EngineMetrics(Collector):
    """Everything that is counted about one fake engine."""

    def __init__(self, scheduler: Scheduler, model_id: str, max_model_len: int) -> None:
        self._scheduler = scheduler
        self._labels = {"model_name": model_id, "engine": ENGINE_INDEX}
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generation_tokens = 0
        self._finished = dict.fromkeys(FINISHED_REASONS, 0)
        tokens = token_buckets(max_model_len)
        self._ttft = Histogram("vllm:time_to_first_token_seconds", "Time to first token in seconds.", _TTFT_S)
        self._itl = Histogram("vllm:inter_token_latency_seconds", "Inter-token latency in seconds.", _ITL_S)
        self._tpot = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token of a request.", _ITL_S
        )
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", "Latency of whole requests.", _REQUEST_S)
        self._queue = Histogram("vllm:request_queue_time_seconds", "Time in WAITING phase.", _REQUEST_S)
        self._inference = Histogram("vllm:request_inference_time_seconds", "Time in RUNNING phase.", _REQUEST_S)
        self._prefill = Histogram("vllm:request_prefill_time_seconds", "Time in PREFILL phase.", _REQUEST_S)
        self._decode = Histogram("vllm:request_decode_time_seconds", "Time in DECODE phase.", _REQUEST_S)
        self._request_prompt = Histogram("vllm:request_prompt_tokens", "Prefill tokens of a request.", tokens)
        self._request_generation = Histogram(
            "vllm:request_generation_tokens", "Generation tokens of a request.", tokens
        )
        self._request_computed = Histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prefill tokens less cached ones.", tokens
        )
        self._max_tokens = Histogram("vllm:request_params_max_tokens", "max_tokens of a request.", tokens)
        self._params_n = Histogram("vllm:request_params_n", "n of a request.", _PARAMS_N)
        self._iteration = Histogram("vllm:iteration_tokens_total", "Tokens of an engine step.", _ITERATION_TOKENS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def record_request(self, n: int, max_tokens: int) -> None:
        """Counts a request's parameters."""
        self._params_n.observe(n)
        self._max_tokens.observe(max_tokens)

    def record_step(self, step: Step) -> None:
        """Counts the tokens of a forward pass."""
        tokens = len(step.yielded)
        for sequence, gap in step.yielded:
            if gap is not None:
                self._itl.observe(gap)
            else:
                tokens += self._record_first(sequence)
        for sequence in step.finished:
            if not sequence.output_tokens:
                tokens += self._record_first(sequence)
        self._generation_tokens += len(step.yielded)
        if tokens:
            self._iteration.observe(tokens)

    def record_end(self, sequence: Sequence, reason: str | None, now: float) -> None:
        """Counts a sequence that ended: `reason`, or the sequence's own where it is None."""
        self._finished[reason or sequence.finish_reason] += 1
        if reason is not None:
            return
        self._e2e.observe(now - sequence.queued_at)
        self._request_prompt.observe(sequence.prompt_tokens)
        self._request_generation.observe(sequence.produced)
        self._request_computed.observe(sequence.prompt_tokens - sequence.cached_tokens)
        scheduled, first, last = sequence.scheduled_at, sequence.first_token_at, sequence.last_token_at
        if scheduled is None or first is None or last is None:
            return
        self._queue.observe(scheduled - sequence.queued_at)
        self._prefill.observe(first - scheduled)
        self._decode.observe(last - first)
        self._inference.observe(last - scheduled)
        if sequence.produced > 1:
            self._tpot.observe((last - first) / (sequence.produced - 1))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The series of the moment (prometheus_client's collector interface)."""
        scheduler = self._scheduler
        yield GaugeMetricFamily(
            "galerne_engine_simulated", "1: this engine is simulated and computes nothing.", value=1
        )
        blocks = {"num_gpu_blocks": str(scheduler.pool.total), "block_size": str(scheduler.block_tokens)}
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the cache.", labels=[*blocks, "engine"])
        info.add_metric([*blocks.values(), ENGINE_INDEX], 1)
        yield info
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", len(scheduler.running))
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting.", len(scheduler.waiting))
        by_reason = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Waiting by reason.", labels=[*self._labels, "reason"]
        )
        by_reason.add_metric([*self._labels.values(), "capacity"], len(scheduler.waiting))
        by_reason.add_metric([*self._labels.values(), "deferred"], 0)
        yield by_reason
        yield self._gauge("vllm:kv_cache_usage_perc", "KV cache usage, 1 is full.", scheduler.pool.usage)
        for name, documentation, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", scheduler.prefix_queries_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", scheduler.prefix_hits_tokens),
            ("vllm:num_preemptions", "Preemptions.", scheduler.preemptions),
            ("vllm:prompt_tokens", "Prefill tokens processed.", self._prompt_tokens),
            ("vllm:prompt_tokens_cached", "Cached prompt tokens.", self._cached_tokens),
            ("vllm:generation_tokens", "Generation tokens.", self._generation_tokens),
        ):
            counter = CounterMetricFamily(name, documentation, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source.", labels=[*self._labels, "source"]
        )
        computed = self._prompt_tokens - self._cached_tokens
        for source, value in (
            ("local_compute", computed),
            ("local_cache_hit", self._cached_tokens),
            ("external_kv_transfer", 0),
        ):
            sources.add_metric([*self._labels.values(), source], value)
        yield sources
        success = CounterMetricFamily(
            "vllm:request_success", "Requests that ended.", labels=[*self._labels, "finished_reason"]
        )
        for reason, value in self._finished.items():
            success.add_metric([*self._labels.values(), reason], value)
        yield success
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family(self._labels)

    def _record_first(self, sequence: Sequence) -> int:
        if sequence.first_token_at is not None:
            self._ttft.observe(sequence.first_token_at - sequence.queued_at)
        self._prompt_tokens += sequence.prompt_tokens
        self._cached_tokens += sequence.cached_tokens
        return sequence.prompt_tokens - sequence.cached_tokens

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, documentation, labels=list(self._labels))
        gauge.add_metric(list(self._labels.values()), value)
        return gauge
