"""What the gateway answers itself: the models a tenant may use, health and version."""

from __future__ import annotations

from typing import Any

from serving import __version__
from serving.api.auth import Identity
from serving.config import GalerneConfig, ModelConfig
from serving.errors import NotFound
from serving.routing.replicas import ReplicaSet


class Catalogue:
    """The configured models and their adapters, seen through one tenant's permissions."""

    def __init__(self, config: GalerneConfig, replicas: ReplicaSet, created_s: int) -> None:
        self._models = {model.id: model for model in config.models}
        # What clients may name: a model, or an adapter on top of one.
        self._named = {name: model for model in config.models for name in model.names}
        self._replicas = replicas
        self._created_s = created_s

    def allowed(self, identity: Identity) -> list[str]:
        """Ids of the models and adapters this identity may use, in the configuration's order."""
        return [m for m in self._named if identity.models is None or m in identity.models]

    def only(self, identity: Identity) -> str | None:
        """The one model or adapter this identity may use: what it means where it names none; None: it has several."""
        allowed = self.allowed(identity)
        return allowed[0] if len(allowed) == 1 else None

    def model(self, model_id: str, identity: Identity) -> ModelConfig:
        """The model that serves this id, its own or an adapter's; raises NotFound naming those that may be used.

        A model of another tenant and one that does not exist get the same answer. Who may use a model may not
        thereby use its adapters: they are named apart.
        """
        model = self._named.get(model_id)
        if model is None or not (identity.models is None or model_id in identity.models):
            names = ", ".join(f"'{name}'" for name in self.allowed(identity)) or "none"
            shown = model_id if len(model_id) <= 128 else model_id[:128] + "…"  # noqa: PLR2004
            raise NotFound(
                f"The model '{shown}' does not exist or this key may not use it. Models of this key: {names}.",
                code="model_not_found",
                param="model",
            )
        return model

    def listing(self, identity: Identity) -> dict[str, Any]:
        """The answer of GET /v1/models; a model that is still loading is listed too."""
        return {"object": "list", "data": [self.card(m) for m in self.allowed(identity)]}

    def card(self, name: str) -> dict[str, Any]:
        """One model or adapter in OpenAI's shape; `…_replicas` are Galerne's addition, `parent` is vLLM's."""
        model = self._named[name]
        adapter = {} if name == model.id else {"parent": model.id}
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "galerne",
            "task": model.task,
            "simulated": model.is_fake,
            "ready_replicas": self._replicas.ready(model.id),
            # 0: it may sleep, and having none ready is no sign that it starts.
            "min_replicas": model.replicas.min,
            **adapter,
        }

    def ready(self) -> bool:
        """Whether any model has a replica or sleeps until it is asked for: a gateway with none has nothing to offer."""
        asleep = self._replicas.known and any(m.replicas.min == 0 for m in self._models.values())
        return asleep or any(self._replicas.ready(model) for model in self._models)


def version() -> dict[str, str]:
    """The answer of GET /version."""
    return {"name": "galerne", "version": __version__}
