"""How many token ids each model has, and the refusal of ids beyond them.

An engine looks a token up in its embedding by its row: an id without a row ends vLLM's core, and with it every other
request there. How many there are a replica says when it has loaded its weights; what was said last stands while the
model sleeps. Until a gateway has heard it, the engine's own check (serving.engine.vllm_guard) is the only one.
"""

from __future__ import annotations

from collections.abc import Iterable

from serving.admission.bounds import RequestFacts
from serving.errors import BadRequest


class Vocabularies:
    """What this gateway knows of its models' token ids."""

    def __init__(self) -> None:
        self._token_ids: dict[str, int] = {}

    def learn(self, model: str, token_ids: Iterable[int]) -> None:
        """Take what a model's replicas say; the least holds while they differ, as in an update of weights."""
        least = min((count for count in token_ids if count > 0), default=None)
        if least is not None:
            self._token_ids[model] = least

    def check(self, model: str, facts: RequestFacts) -> None:
        """Raise BadRequest where a request names a token id that the model does not have."""
        known = self._token_ids.get(model)
        if known is None:
            return
        for param, highest in facts.token_id_uses:
            if highest >= known:
                raise BadRequest(
                    f"Invalid '{param}': expected token ids of at most {known - 1}, the last one of the model "
                    f"'{model}', but got {highest}.",
                    code="integer_above_max_value",
                    param=param,
                )
