"""The whole file, and the rules across its parts."""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from serving.config.base import Frozen, Misplaced
from serving.config.keys import AdminConfig
from serving.config.ledger import LedgerConfig
from serving.config.limits import LimitsConfig
from serving.config.listen import GatewayConfig, ListenConfig
from serving.config.models import ModelConfig
from serving.config.oidc import OidcConfig
from serving.config.prometheus import PrometheusConfig
from serving.config.quotas import MEMORY, OnOutage, StoreUrl
from serving.config.tenants import TenantConfig
from serving.config.tracing import TracingConfig

# Tells a process the name of its release, where the file does not.
ENV_RELEASE: Final = "GALERNE_RELEASE"


class GalerneConfig(Frozen):
    """The configuration file's root."""

    listen: ListenConfig = ListenConfig()
    gateway: GatewayConfig = GatewayConfig()
    limits: LimitsConfig = LimitsConfig()
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]
    tenants: Annotated[tuple[TenantConfig, ...], Field(min_length=1)]
    # A file that holds `tenants` and, where wanted, `admins`, so that keys can lie in a Secret of their own.
    tenants_file: str | None = None
    # Keys of the ops page; none: there is no such page.
    admins: tuple[AdminConfig, ...] = ()
    # Issuers of tokens (OpenID Connect) that are taken beside keys.
    oidc: tuple[OidcConfig, ...] = ()
    # Where quotas are counted: memory:// in the gateway itself (memory:///file keeps budgets there across restarts), or
    # redis://user:password@host:6379/0 for all gateways, which then share fairness too; rediss:// with TLS. A password
    # that is not there may come in the variable GALERNE_LIMITS_STORE_PASSWORD.
    limits_store: StoreUrl = "memory://"
    # While it does not answer. local: each gateway counts against its part of the limits, so that neither everybody is
    # refused nor anybody unlimited; open: nothing is counted; closed: tenants with quotas hear 503.
    limits_on_outage: OnOutage = "local"
    # Name of this release among those that one Prometheus watches: the label `galerne_release` of all its series, by
    # which its scaler, rules and dashboards find them. Empty: what the variable GALERNE_RELEASE says (the chart sets it
    # to NAMESPACE/RELEASE), else no label, which suffices where a Prometheus watches one release.
    release: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9._/-]*$")] = ""
    # Needed by models with `autoscaling`; `galerne serve --with-prometheus` sets it.
    prometheus: PrometheusConfig | None = None
    # Usage, one row a request.
    ledger: LedgerConfig = LedgerConfig()
    # OpenTelemetry traces, gateway to engine; absent: off.
    tracing: TracingConfig | None = None
    # Keys in this file are published (the demo): `serve` warns and refuses to listen beyond loopback.
    demo_keys: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_duplicates(
            [(m.id, ("models", i, "id")) for i, m in enumerate(self.models)]
            + [
                (a.id, ("models", i, "adapters", j, "id"))
                for i, m in enumerate(self.models)
                for j, a in enumerate(m.adapters)
            ]
        )
        _refuse_duplicates([(t.id, ("tenants", i, "id")) for i, t in enumerate(self.tenants)])
        _refuse_duplicates(
            [
                (k.sha256, ("tenants", i, "keys", j, "sha256"))
                for i, t in enumerate(self.tenants)
                for j, k in enumerate(t.keys)
            ]
            # One key for both would widen a tenant's.
            + [(a.sha256, ("admins", i, "sha256")) for i, a in enumerate(self.admins)]
        )
        _refuse_duplicates([(a.id, ("admins", i, "id")) for i, a in enumerate(self.admins)])
        _refuse_duplicates([(o.id, ("oidc", i, "id")) for i, o in enumerate(self.oidc)])
        _refuse_duplicates([(o.issuer, ("oidc", i, "issuer")) for i, o in enumerate(self.oidc)])
        known = frozenset(name for m in self.models for name in m.names)
        for i, tenant in enumerate(self.tenants):
            self._check_tenant(tenant, ("tenants", i), known)
        self._quotas_are_whole()
        if self.gateway.max_ongoing_body_bytes < self.limits.body_bytes:
            raise Misplaced(
                f"must be at least limits.body_bytes ({self.limits.body_bytes}), or no such body could be read",
                *("gateway", "max_ongoing_body_bytes"),
            )
        for i, model in enumerate(self.models):
            if (model.faults.hedge_after_s or 0.0) >= self.gateway.response_timeout_s:
                raise Misplaced(
                    f"must be less than gateway.response_timeout_s ({self.gateway.response_timeout_s:g})",
                    *("models", i, "faults", "hedge_after_s"),
                )
        if self.demo_keys and not self.listen.loopback:
            raise Misplaced("demo_keys are public: with them listen.host must be a loopback address", "listen", "host")
        return self

    def _check_tenant(self, tenant: TenantConfig, at: tuple[str | int, ...], known: frozenset[str]) -> None:
        _refuse_duplicates([(k.id, (*at, "keys", j, "id")) for j, k in enumerate(tenant.keys)])
        if not tenant.keys and not self.oidc:
            raise Misplaced("must not be empty: without `oidc` nobody could speak for this tenant", *at, "keys")
        _refuse_unknown(tenant.models, known, "there is no model", (*at, "models"))
        own = known if tenant.models is None else frozenset(tenant.models)
        for j, key in enumerate(tenant.keys):
            _refuse_unknown(key.models, own, "the tenant has no model", (*at, "keys", j, "models"))
        for name, value in ({} if tenant.limits is None else tenant.limits.given()).items():
            most = getattr(self.limits, name)
            if most is not None and value > most:
                raise Misplaced(f"must be at most {most}, the cluster's own limit", *at, "limits", name)

    def _quotas_are_whole(self) -> None:
        """Several gateways that each count for themselves would let a tenant have its limit several times."""
        if self.gateway.bounds.max == 1 or not self.limits_store.startswith(f"{MEMORY}:"):
            return
        for i, tenant in enumerate(self.tenants):
            if tenant.quota.limited:
                raise Misplaced(
                    f"{self.gateway.bounds.max} gateways share no memory: quotas need `limits_store: redis://…`",
                    *("tenants", i, "quota"),
                )

    def model(self, model_id: str) -> ModelConfig:
        """The model of this id; KeyError where there is none."""
        return next(m for m in self.models if m.id == model_id)


def _refuse_unknown(
    models: tuple[str, ...] | None, known: frozenset[str], what: str, at: tuple[str | int, ...]
) -> None:
    for j, model in enumerate(models or ()):
        if model not in known:
            raise Misplaced(f"{what} {model!r}; models: {', '.join(sorted(known))}", *at, j)


def _refuse_duplicates(values: list[tuple[str, tuple[str | int, ...]]]) -> None:
    # The value itself is not repeated: it may be a digest.
    seen: set[str] = set()
    for value, where in values:
        if value in seen:
            raise Misplaced("the same value stands twice, and has to be unique", *where)
        seen.add(value)
