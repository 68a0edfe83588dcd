"""The whole configuration of a Galerne cluster, one model per concern, one module per noun.

A field that is not named here is refused: a misspelt limit must not silently be no limit. Reading the
YAML file, and errors with its line, are `serving.config_file`'s.
"""

from serving.config.adapters import AdapterConfig, LoraConfig
from serving.config.autoscaling import (
    DAYS,
    AutoscalingConfig,
    CapacityConfig,
    Day,
    ExternalConfig,
    MinuteOfDay,
    ScheduledFloor,
    zone,
)
from serving.config.base import MODEL_ID, NAME, SHA256, Frozen, Misplaced, PositiveInt, Seconds
from serving.config.cors import CorsConfig
from serving.config.fake import FakeEngineConfig, FakeFaults
from serving.config.faults import GatewayFaultsConfig, ModelFaultsConfig
from serving.config.keys import (
    DEFAULT_SCOPES,
    SCOPES,
    AdminConfig,
    CredentialConfig,
    KeyConfig,
    Networks,
    Scope,
)
from serving.config.ledger import ENV_LEDGER_DIR, ENV_LEDGER_URL, LedgerConfig, known_ledger_url
from serving.config.limits import LimitsConfig, TenantLimitsConfig
from serving.config.listen import GatewayConfig, GatewayReplicasConfig, ListenConfig
from serving.config.live import Source
from serving.config.models import (
    SOURCE_SCHEMES,
    HoldConfig,
    ModelConfig,
    ParallelConfig,
    ReplicasConfig,
    ResourcesConfig,
    SloConfig,
)
from serving.config.oidc import OidcConfig
from serving.config.prometheus import PrometheusConfig
from serving.config.quotas import ENV_LIMITS_STORE_PASSWORD, LIMITS, MEMORY, Limit, OnOutage, QuotaConfig
from serving.config.root import ENV_RELEASE, GalerneConfig
from serving.config.routing import RoutingConfig, RoutingPolicy
from serving.config.tenants import PRIORITIES, Priority, TenantConfig, TenantQueueConfig
from serving.config.tracing import TracingConfig

__all__ = [
    "DAYS",
    "DEFAULT_SCOPES",
    "ENV_LEDGER_DIR",
    "ENV_LEDGER_URL",
    "ENV_LIMITS_STORE_PASSWORD",
    "ENV_RELEASE",
    "LIMITS",
    "MEMORY",
    "MODEL_ID",
    "NAME",
    "PRIORITIES",
    "SCOPES",
    "SHA256",
    "SOURCE_SCHEMES",
    "AdapterConfig",
    "AdminConfig",
    "AutoscalingConfig",
    "CapacityConfig",
    "CorsConfig",
    "CredentialConfig",
    "Day",
    "ExternalConfig",
    "FakeEngineConfig",
    "FakeFaults",
    "Frozen",
    "GalerneConfig",
    "GatewayConfig",
    "GatewayFaultsConfig",
    "GatewayReplicasConfig",
    "HoldConfig",
    "KeyConfig",
    "LedgerConfig",
    "Limit",
    "LimitsConfig",
    "ListenConfig",
    "LoraConfig",
    "MinuteOfDay",
    "Misplaced",
    "ModelConfig",
    "ModelFaultsConfig",
    "Networks",
    "OidcConfig",
    "OnOutage",
    "ParallelConfig",
    "PositiveInt",
    "Priority",
    "PrometheusConfig",
    "QuotaConfig",
    "ReplicasConfig",
    "ResourcesConfig",
    "RoutingConfig",
    "RoutingPolicy",
    "ScheduledFloor",
    "Scope",
    "Seconds",
    "SloConfig",
    "Source",
    "TenantConfig",
    "TenantLimitsConfig",
    "TenantQueueConfig",
    "TracingConfig",
    "known_ledger_url",
    "zone",
]
