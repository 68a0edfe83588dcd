"""The last check before a request reaches vLLM's core: no token id without a row in the model's embedding.

vLLM compares ids with the greater of its tokenizer's and its model's sizes, and takes a tokenizer's size for its
greatest id. So the first id past the embedding passes, whether a client sent it or a tokenizer made it of a text, and
the core dies of it. Two methods of vLLM's input processor are wrapped; that they are what they were is held by a
contract test, and vLLM is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any


def watch(processor: Any, token_ids: int) -> None:
    """Have an `InputProcessor` refuse (as vLLM refuses, with 400) ids of `token_ids` and more from now on."""
    from vllm.exceptions import VLLMValidationError

    process, process_async = processor.process_inputs, processor.process_inputs_async

    def checked(request: Any) -> Any:
        if (highest := highest_id(request)) >= token_ids:
            raise VLLMValidationError(
                f"Token id {highest} is out of vocabulary: the model has {token_ids} token ids.", parameter="prompt"
            )
        return request

    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        return checked(process(*args, **kwargs))

    async def process_inputs_async(*args: Any, **kwargs: Any) -> Any:
        return checked(await process_async(*args, **kwargs))

    processor.process_inputs = process_inputs
    processor.process_inputs_async = process_inputs_async


def highest_id(request: Any) -> int:
    """The greatest token id of a request to the core; -1 where it has none.

    Its other ids (stop, bias, allowed, log probabilities) vLLM compares with its model's size itself.
    """
    banned: Iterable[list[int]] = ()
    if request.sampling_params is not None:
        banned = request.sampling_params.bad_words_token_ids or ()
    return max(chain(request.prompt_token_ids or (), *banned), default=-1)
