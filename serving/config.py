"""The whole configuration of a Galerne cluster, one model per concern.

A field that is not named here is refused: a misspelt limit must not silently be no limit. Reading the
YAML file, and errors with its line, are `serving.config_file`'s.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MODEL_ID = r"^[A-Za-z0-9][A-Za-z0-9._\-]*(/[A-Za-z0-9][A-Za-z0-9._\-]*)?$"
NAME = r"^[a-z0-9]([a-z0-9\-]{0,61}[a-z0-9])?$"
SHA256 = r"^[0-9a-f]{64}$"
SOURCE_SCHEMES = ("path", "hf", "pypi", "random", "fake")

# Engine arguments that Galerne owns: set through other fields, or never safe to hand over.
RESERVED_ENGINE_ARGS = frozenset(
    {
        "model",
        "tokenizer",
        "served_model_name",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "distributed_executor_backend",
        "trust_remote_code",
        "host",
        "port",
        "api_key",
        "enable_prompt_embeds",
        "allowed_local_media_path",
    }
)

# Strict: YAML's `yes` is true, which pydantic would take for 1.
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, strict=True)]


class Misplaced(ValueError):
    """A rule across fields that is broken; `where` is the field at fault, below the model that checks."""

    def __init__(self, message: str, *where: str | int) -> None:
        super().__init__(message, *where)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return self.message


class Frozen(BaseModel):
    """Base of every configuration model: immutable, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ListenConfig(Frozen):
    """Where clients connect. Loopback by default: exposing a cluster is a decision."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


class GatewayConfig(Frozen):
    """The gateway deployment: light, CPU only, one event loop a replica."""

    replicas: PositiveInt = 1
    cpus: Annotated[float, Field(ge=0)] = 0.5
    # Beyond it new requests get 503: an event loop that holds more only gets slower for all.
    max_ongoing_requests: PositiveInt = 4096
    connect_timeout_s: Seconds = 2.0
    # Until the engine's response headers. Long: a queued prompt answers only when its turn comes.
    response_timeout_s: Seconds = 600.0
    # A client must deliver its whole body within it (slow bodies hold memory).
    body_timeout_s: Seconds = 30.0
    # Prometheus metrics of a gateway replica: the first free port from here on.
    metrics_port: Annotated[int, Field(ge=1, le=65000)] = 9400


class LimitsConfig(Frozen):
    """Bounds on a single request, checked before any engine is touched."""

    body_bytes: PositiveInt = 4 * 1024 * 1024
    header_bytes: Annotated[int, Field(ge=1024, le=15 * 1024)] = 8 * 1024
    header_count: PositiveInt = 64
    json_depth: PositiveInt = 64
    n: PositiveInt = 8
    best_of: PositiveInt = 8
    output_tokens: PositiveInt = 32768
    logprobs: Annotated[int, Field(ge=0)] = 20
    stop_sequences: PositiveInt = 16
    stop_bytes: PositiveInt = 256
    logit_bias_entries: PositiveInt = 1024
    batch_prompts: PositiveInt = 64
    # Embedding inputs, rerank documents, score pairs: far cheaper than a generation. OpenAI's own bound.
    batch_inputs: PositiveInt = 2048
    prompt_tokens: PositiveInt = 131072
    messages: PositiveInt = 2048
    tools: PositiveInt = 128
    schema_bytes: PositiveInt = 64 * 1024


class ParallelConfig(Frozen):
    """How one replica spreads over workers: tensor x pipeline of them."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1

    @property
    def workers(self) -> int:
        """Worker processes of one replica."""
        return self.tensor * self.pipeline


class ReplicasConfig(Frozen):
    """How many replicas of a model run. Until autoscaling is configured `min` of them do."""

    min: PositiveInt = 1
    max: PositiveInt | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise Misplaced(f"max ({self.max}) is below min ({self.min})", "max")
        return self


class ResourcesConfig(Frozen):
    """What one worker of a replica takes from its node."""

    # auto: a GPU where vLLM's CUDA build is installed and Ray sees GPUs, else CPU.
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    # CPUs that Ray counts for it (1 where absent). A CPU engine computes on so many threads, or on all cores.
    cpus: Annotated[float, Field(gt=0)] | None = None
    # A fraction shares one GPU between replicas.
    gpus: Annotated[float, Field(gt=0)] = 1.0
    # Ray's accelerator type, e.g. "H100", "A100", "L4": the worker group that must hold it.
    accelerator_type: str | None = None
    # Size of the KV cache of a CPU engine, GiB.
    cpu_kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0

    @property
    def logical_cpus(self) -> float:
        """What Ray counts for one worker."""
        return 1.0 if self.cpus is None else self.cpus


class SloConfig(Frozen):
    """What users of a model are promised."""

    ttft_p95_s: Seconds | None = None
    itl_p95_s: Seconds | None = None


class FakeFaults(Frozen):
    """Faults the fake engine plays, each drawn per request from its seed."""

    # Chance that a request is answered 500.
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Chance that a request is accepted and never answered.
    hang_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    # The connection is cut after so many bytes of the response body.
    cut_after_bytes: PositiveInt | None = None
    # The whole process exits after so many bytes of response bodies.
    die_after_bytes: PositiveInt | None = None
    # Seconds before /health answers 200.
    slow_start_s: Annotated[float, Field(ge=0)] = 0.0


class FakeEngineConfig(Frozen):
    """Latency model and sizes of the fake engine; the defaults are a 7B model on a mid-size GPU, rounded."""

    prefill_tokens_per_s: Annotated[float, Field(gt=0)] = 20000.0
    # Prompt tokens of one pass at most, longer prompts go in chunks (vLLM's max_num_batched_tokens).
    prefill_chunk_tokens: PositiveInt = 2048
    # One decode step for a batch of one, and what each further sequence adds, milliseconds.
    decode_ms: Annotated[float, Field(ge=0)] = 8.0
    decode_ms_per_sequence: Annotated[float, Field(ge=0)] = 0.02
    # Sequences in one batch (vLLM's max_num_seqs).
    batch_slots: PositiveInt = 256
    kv_blocks: PositiveInt = 8192
    block_tokens: PositiveInt = 16
    max_model_len: PositiveInt = 131072
    embedding_dimensions: PositiveInt = 384
    # Output length of a request that sets none, tokens.
    default_output_tokens: PositiveInt = 64
    seed: int = 0
    faults: FakeFaults = FakeFaults()


class ModelConfig(Frozen):
    """One model: where its weights come from, how it runs, what it promises."""

    id: Annotated[str, Field(pattern=MODEL_ID, max_length=128)]
    source: Annotated[str, Field(max_length=1024)]
    task: Literal["generate", "embed"] = "generate"
    # A name of serving.engine.presets; "none" keeps vLLM's own defaults.
    preset: str | None = None
    # vLLM engine arguments, as vLLM names them (AsyncEngineArgs).
    engine: dict[str, Any] = Field(default_factory=dict)
    parallel: ParallelConfig = ParallelConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    resources: ResourcesConfig = ResourcesConfig()
    slo: SloConfig = SloConfig()
    fake: FakeEngineConfig | None = None
    # Streams in flight get this long to finish when a replica goes.
    drain_timeout_s: Seconds = 600.0
    # From a replica's start to its first healthy answer.
    start_timeout_s: Seconds = 1800.0

    @field_validator("source")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        scheme, colon, rest = value.partition(":")
        if scheme not in SOURCE_SCHEMES or not colon or not rest:
            allowed = ", ".join(f"{s}:…" for s in SOURCE_SCHEMES)
            raise ValueError(f"no kind of model source that is known; allowed: {allowed}")
        return value

    @field_validator("engine")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED_ENGINE_ARGS & value.keys()):
            raise ValueError(
                f"{', '.join(taken)} cannot be set here: Galerne derives it from id, source, parallel "
                "and resources, or keeps it off for safety"
            )
        return value

    @property
    def is_fake(self) -> bool:
        """Whether the fake engine serves this model."""
        return self.source.startswith("fake:")


class KeyConfig(Frozen):
    """One API key of a tenant; only its digest is kept."""

    id: Annotated[str, Field(pattern=NAME)]
    sha256: Annotated[str, Field(pattern=SHA256)]
    expires: date | None = None

    def __repr__(self) -> str:
        return f"KeyConfig(id={self.id!r}, sha256='…', expires={self.expires!r})"


class TenantConfig(Frozen):
    """One organisation: its keys and the models it may use."""

    id: Annotated[str, Field(pattern=NAME)]
    keys: Annotated[tuple[KeyConfig, ...], Field(min_length=1)]
    # Model ids; absent: every model.
    models: tuple[str, ...] | None = None


class GalerneConfig(Frozen):
    """The configuration file's root."""

    listen: ListenConfig = ListenConfig()
    gateway: GatewayConfig = GatewayConfig()
    limits: LimitsConfig = LimitsConfig()
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]
    tenants: Annotated[tuple[TenantConfig, ...], Field(min_length=1)]
    # Keys in this file are published (the demo): `serve` warns and refuses to listen beyond loopback.
    demo_keys: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_duplicates([(m.id, ("models", i, "id")) for i, m in enumerate(self.models)])
        _refuse_duplicates([(t.id, ("tenants", i, "id")) for i, t in enumerate(self.tenants)])
        _refuse_duplicates(
            [
                (k.sha256, ("tenants", i, "keys", j, "sha256"))
                for i, t in enumerate(self.tenants)
                for j, k in enumerate(t.keys)
            ]
        )
        known = {m.id for m in self.models}
        for i, tenant in enumerate(self.tenants):
            _refuse_duplicates([(k.id, ("tenants", i, "keys", j, "id")) for j, k in enumerate(tenant.keys)])
            for j, model in enumerate(tenant.models or ()):
                if model not in known:
                    raise Misplaced(
                        f"there is no model {model!r}; models: {', '.join(sorted(known))}",
                        *("tenants", i, "models", j),
                    )
        if self.demo_keys and self.listen.host not in {"127.0.0.1", "::1", "localhost"}:
            raise Misplaced("demo_keys are public: with them listen.host must be a loopback address", "listen", "host")
        return self

    def model(self, model_id: str) -> ModelConfig:
        """The model of this id; KeyError where there is none."""
        return next(m for m in self.models if m.id == model_id)


def _refuse_duplicates(values: list[tuple[str, tuple[str | int, ...]]]) -> None:
    # The value itself is not repeated: it may be a digest.
    seen: set[str] = set()
    for value, where in values:
        if value in seen:
            raise Misplaced("the same value stands twice, and has to be unique", *where)
        seen.add(value)
