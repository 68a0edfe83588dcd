"""vLLM's tokenizer for `tokenizer_mode: mistral`, which takes the conversations that agents have.

`serving.engine.vllm_engine` names it in vLLM's own registry of tokenizers, so chat, responses and /tokenize all go
through it.
"""

from __future__ import annotations

from typing import Any

from vllm.tokenizers.mistral import MistralTokenizer

from serving.engine.mistral_turns import fitted


class PatientMistralTokenizer(MistralTokenizer):  # type: ignore[misc]  # vLLM has no types here
    """Mistral's tokenizer behind `fitted`."""

    def apply_chat_template(self, messages: Any, tools: Any = None, **kwargs: Any) -> Any:
        """Token ids of a conversation."""
        turns = [dict(message) for message in messages]
        return super().apply_chat_template(fitted(turns, self.version), tools, **kwargs)
