"""GET /tokenizer_info: a model's tokenizer as vLLM tells of it, for evaluation harnesses that have no copy of it.

vLLM's answer is the tokenizer's whole configuration, with the paths of the machine it was read on. Promises: what is
told is on a list, and of the types that the list has; the engine's own words are never passed on unread.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from serving.api.upstream import Pool, UpstreamError
from serving.errors import BadRequest, Unavailable
from serving.routing.health import Health
from serving.routing.replicas import ReplicaSet

PATH: Final = "/tokenizer_info"
TIMEOUT_S: Final = 10.0
# Chat templates and lists of added tokens are long.
MOST_BYTES: Final = 8 * 1024 * 1024
RETRY_AFTER_S: Final = 5
OK: Final = 200


class Told(msgspec.Struct, omit_defaults=True):
    """What is told of a tokenizer, under the names of `tokenizer_config.json`."""

    tokenizer_class: str
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    sep_token: str | None = None
    cls_token: str | None = None
    mask_token: str | None = None
    additional_special_tokens: list[str] | None = None
    added_tokens_decoder: dict[str, str] | None = None
    chat_template: str | None = None
    # Some have 1e30 for "none".
    model_max_length: int | float | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    do_lower_case: bool | None = None
    padding_side: str | None = None
    truncation_side: str | None = None


_told = msgspec.json.Decoder(Told)


def asked_model(query: bytes) -> str | None:
    """The model that a query names; None where it names none. Raises BadRequest for anything else in it."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        raise BadRequest("The query is not of the form model=ID.", code="invalid_value") from None
    if unknown := next((name for name, _ in pairs if name != "model"), None):
        raise BadRequest(f"Unknown parameter: '{unknown[:64]}'.", code="unknown_parameter", param=unknown[:64])
    if len(pairs) > 1:
        raise BadRequest("'model' may be given once.", code="invalid_value", param="model")
    return pairs[0][1] if pairs else None


class TokenizerInfo:
    """Asks one of a model's replicas."""

    def __init__(self, pool: Pool, replicas: ReplicaSet, health: Health, *, engine_token: str) -> None:
        self._pool = pool
        self._replicas = replicas
        self._health = health
        self._token = engine_token

    async def of(self, model: str) -> dict[str, Any]:
        """What is told of a model's tokenizer; Unavailable while no replica can say it."""
        out = self._health[model].ejections.out
        for endpoint in self._replicas.endpoints(model):
            if endpoint.replica_id in out:
                continue
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    status, body = await self._pool.get(endpoint, PATH, self._token, most_bytes=MOST_BYTES)
                if status == OK:
                    told: dict[str, Any] = msgspec.to_builtins(_told.decode(body))
                    return told
            except (UpstreamError, TimeoutError, msgspec.DecodeError):
                continue
        raise Unavailable(
            f"No replica of the model '{model}' can tell of its tokenizer at the moment. Try again shortly; a model "
            "that sleeps is woken by a request that it answers.",
            retry_after_s=RETRY_AFTER_S,
        )
