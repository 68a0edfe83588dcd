"""One model: its weights, its engine, its replicas, and what its users are promised."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.config import engine_args
from serving.config.adapters import AdapterConfig, LoraConfig
from serving.config.autoscaling import AutoscalingConfig
from serving.config.base import MODEL_ID, Frozen, Misplaced, PositiveInt, Seconds, known_source
from serving.config.fake import FakeEngineConfig
from serving.config.faults import ModelFaultsConfig
from serving.config.routing import RoutingConfig

SOURCE_SCHEMES = ("path", "hf", "pypi", "random", "fake")


class ParallelConfig(Frozen):
    """How one replica spreads over workers: tensor x pipeline of them."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1

    @property
    def workers(self) -> int:
        """Worker processes of one replica."""
        return self.tensor * self.pipeline


class ReplicasConfig(Frozen):
    """How many replicas of a model run: `min` of them without `autoscaling`, between both bounds with it."""

    # 0: the model sleeps while nobody asks for it.
    min: Annotated[int, Field(ge=0, strict=True)] = 1
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
    # Ray's accelerator type, e.g. "H100", "A100", "L4": the worker group that must hold it. On processors, whatever
    # name the group has.
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


class HoldConfig(Frozen):
    """Requests that wait in each gateway: their model has no replica (it sleeps, starts), or its engines are full."""

    # So many at most; 0: none waits, 503 at once.
    requests: Annotated[int, Field(ge=0, strict=True)] = 1024
    # And so many bytes of their bodies.
    bytes: PositiveInt = 64 * 1024 * 1024
    # Longer than a start takes; what is beyond it hears 503 with Retry-After.
    wait_s: Seconds = 120.0
    # A client that streams hears a comment so often, and the answer's head with the first: proxies cut what is silent.
    # Until then a refusal is a plain 503, which clients repeat by themselves.
    keep_alive_s: Seconds = 10.0
    # Exactly so many requests of one gateway on each replica; absent: as much as engines compute at a time.
    in_flight_per_replica: PositiveInt | None = None
    # What one replica computes at a time, where it is not to be asked: sequences, and tokens of its KV cache.
    sequences_per_replica: PositiveInt | None = None
    kv_tokens_per_replica: PositiveInt | None = None


class ModelConfig(Frozen):
    """One model: where its weights come from, how it runs, what it promises."""

    id: Annotated[str, Field(pattern=MODEL_ID, max_length=128)]
    source: Annotated[str, Field(max_length=1024)]
    task: Literal["generate", "embed"] = "generate"
    # A name of serving.engine.presets; "none" keeps vLLM's own defaults.
    preset: str | None = None
    # vLLM engine arguments, as vLLM names their fields (AsyncEngineArgs): those of serving.config.engine_args, which
    # says why others may not be set.
    engine: dict[str, Any] = Field(default_factory=dict)
    parallel: ParallelConfig = ParallelConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    resources: ResourcesConfig = ResourcesConfig()
    slo: SloConfig = SloConfig()
    autoscaling: AutoscalingConfig | None = None
    hold: HoldConfig = HoldConfig()
    routing: RoutingConfig = RoutingConfig()
    # LoRA adapters served on top of this model, each under a name of its own.
    adapters: tuple[AdapterConfig, ...] = ()
    lora: LoraConfig = LoraConfig()
    faults: ModelFaultsConfig = ModelFaultsConfig()
    fake: FakeEngineConfig | None = None
    # Streams in flight get this long to finish when a replica goes.
    drain_timeout_s: Seconds = 600.0
    # From a replica's start to its first healthy answer.
    start_timeout_s: Seconds = 1800.0

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.autoscaling is not None and self.replicas.max is None:
            raise Misplaced("models with `autoscaling` need it: as many replicas run at most", "replicas", "max")
        return self

    @model_validator(mode="after")
    def _wakes(self) -> Self:
        if self.replicas.min == 0 and self.autoscaling is None:
            raise Misplaced("0 needs an `autoscaling` section: nothing else would start a replica", "replicas", "min")
        return self

    @model_validator(mode="after")
    def _adapts(self) -> Self:
        if self.adapters and self.task != "generate":
            raise Misplaced("adapters are for models that generate text", "adapters")
        return self

    @field_validator("source")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return known_source(value, SOURCE_SCHEMES, "model")

    @field_validator("engine")
    @classmethod
    def _settable(cls, value: dict[str, Any]) -> dict[str, Any]:
        if found := list(engine_args.problems(value)):
            raise ValueError("; ".join(found))
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may ask for: the model itself, then its adapters."""
        return (self.id, *(adapter.id for adapter in self.adapters))

    @property
    def is_fake(self) -> bool:
        """Whether the fake engine serves this model."""
        return self.source.startswith("fake:")
