"""The base of everything a user writes in a scenario: frozen, and refusing what it does not know by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

UNKNOWN_FIELD = "unknown_field"


class Strict(BaseModel):
    """A model whose error for an unknown field lists the fields there are."""

    # Strict types: YAML has its own, and a rate given as "2" is a mistake worth showing.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for name in value:
                if name not in cls.model_fields:
                    allowed = ", ".join(cls.model_fields)
                    raise PydanticCustomError(
                        UNKNOWN_FIELD, "unknown field; allowed: {allowed}", {"allowed": allowed, "field": name}
                    )
        return value
