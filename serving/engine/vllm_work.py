"""vLLM's sequences into the accounts of `serving.engine.work`.

vLLM's output processor knows every sequence from its queueing to its end, and counts its tokens exactly where it counts
those of its metrics. Three of its methods are wrapped; that they are what they were is held by a contract test, and
vLLM is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serving.engine.work import Account, Done, current


def watch(processor: Any) -> None:
    """Enter the sequences of an `OutputProcessor` from now on; its statistics must be on."""
    add, finish, abort = processor.add_request, processor._finish_request, processor.abort_requests
    owners: dict[str, Account] = {}

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        add(request, *args, **kwargs)
        account, state = current.get(), processor.request_states.get(request.request_id)
        if account is not None and state is not None:
            owners[state.request_id] = account
            account.began(state.request_id, lambda: look(state))

    def finish_request(state: Any) -> None:
        finish(state)
        ended(state.request_id)

    def abort_requests(request_ids: Iterable[str], internal: bool) -> list[str]:
        gone: list[str] = abort(request_ids, internal)
        for sequence in gone:
            ended(sequence)
        return gone

    def ended(sequence: str) -> None:
        account = owners.pop(sequence, None)
        if account is not None:
            account.ended(sequence)

    processor.add_request = add_request
    processor._finish_request = finish_request
    processor.abort_requests = abort_requests


def look(state: Any) -> Done:
    """A sequence as vLLM's counters have it: no prompt before its first output."""
    parent = state.parent_req
    return Done(
        prompt=state.request_id if parent is None else parent.request_id,
        prompt_tokens=0 if state.is_prefilling else state.prompt_len,
        cached_tokens=0 if state.is_prefilling else state.num_cached_tokens,
        completion_tokens=state.stats.num_generation_tokens,
    )
