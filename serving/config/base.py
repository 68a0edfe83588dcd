"""What every part of the configuration is made of: a strict base model, shared types, errors that name a field."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

NAME = r"^[a-z0-9]([a-z0-9\-]{0,61}[a-z0-9])?$"
SHA256 = r"^[0-9a-f]{64}$"
# What clients ask for: a model's name or an adapter's, with an organisation before it or without.
MODEL_ID = r"^[A-Za-z0-9][A-Za-z0-9._\-]*(/[A-Za-z0-9][A-Za-z0-9._\-]*)?$"

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


def known_source(value: str, schemes: tuple[str, ...], of: str) -> str:
    """The source as it stands, where its scheme is one of these; ValueError otherwise."""
    scheme, colon, rest = value.partition(":")
    if scheme not in schemes or not colon or not rest:
        allowed = ", ".join(f"{s}:…" for s in schemes)
        raise ValueError(f"no kind of {of} source that is known; allowed: {allowed}")
    return value


class Frozen(BaseModel):
    """Base of every configuration model: immutable, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML's `yes` is true, which pydantic would take for 1.
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            kinds = set(get_args(annotation)) or {annotation}
            if kinds & {int, float} and not kinds & {bool, Any}:
                raise PydanticKnownError("int_type" if int in kinds else "float_type")
        return value
