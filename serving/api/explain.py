"""Answers administrators which replica a request would go to now, and why; nothing is sent and nothing is changed.

One gateway answers for itself: where there are several, each knows others' requests as of the last exchange with them
(serving.api.peers), and whoever asks through their common front asks any of them. `gateway` tells which.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from serving.admission import bounds, normal
from serving.admission.vocabulary import Vocabularies
from serving.api.auth import Identity
from serving.api.catalogue import Catalogue
from serving.api.routes import RELAYED, EngineRoute
from serving.config import GalerneConfig, TenantConfig
from serving.errors import BadRequest, NotFound
from serving.routing.asked import Asked
from serving.routing.replicas import ReplicaSet

# Bodies whose prompts engines keep in their prefix caches.
CACHING = frozenset({bounds.BodyKind.CHAT, bounds.BodyKind.COMPLETION, bounds.BodyKind.RESPONSES})


def asked(
    route: EngineRoute,
    facts: bounds.RequestFacts,
    body: bytes,
    tenant: str,
    model: str,
    session: bytes | None = None,
) -> Asked:
    """What routing may know of a request to this model that passed the bounds; it may name an adapter of it."""
    return Asked(
        body,
        (tenant, facts.model),
        prompt_bytes=facts.prompt_bytes,
        generates=route.kind in CACHING,
        session=session,
        adapter=None if facts.model == model else facts.model,
    )


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """A request as somebody would send it: whose, where to, the body, the header x-session-id."""

    tenant: str
    body: msgspec.Raw
    path: str = "/v1/chat/completions"
    session: str | None = None


class Explainer:
    """One gateway's."""

    def __init__(
        self, config: GalerneConfig, catalogue: Catalogue, vocabularies: Vocabularies, replicas: ReplicaSet
    ) -> None:
        self._limits = config.limits
        self._tenants: Mapping[str, TenantConfig] = {}
        self._catalogue = catalogue
        self._vocabularies = vocabularies
        self._replicas = replicas
        self.follow(config)

    def follow(self, config: GalerneConfig) -> None:
        """Take this configuration's tenants."""
        self._tenants = {tenant.id: tenant for tenant in config.tenants}

    def explain(self, question: bytes) -> dict[str, Any]:
        """The decision; raises BadRequest or NotFound as the request itself would be answered."""
        try:
            found = msgspec.json.decode(question, type=Question)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"The question is not one: {error}", code="invalid_json") from None
        tenant, route = self._tenants.get(found.tenant), RELAYED.get(found.path)
        if tenant is None:
            raise NotFound("There is no such tenant.", param="tenant")
        if route is None:
            raise NotFound(f"That path is not relayed. Relayed: {', '.join(RELAYED)}.", param="path")
        body = bytes(found.body)
        facts = bounds.read(route.kind, body, self._limits)
        body = normal.applied(body, facts)
        models = None if tenant.models is None else frozenset(tenant.models)
        model = self._catalogue.model(facts.model, Identity(tenant.id, "", models))
        self._vocabularies.check(model.id, facts)
        session = None if found.session is None else found.session.encode("latin-1", "replace")
        wanted = self._replicas.wanted(model.id, asked(route, facts, body, tenant.id, model.id, session))
        return {"gateway": os.getpid(), "model": model.id} | self._replicas.router(model.id).explain(wanted)
