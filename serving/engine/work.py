"""What an engine computed for each request, for the gateway's bill: told where an answer broke off before it said so.

A client that leaves, or a stream that breaks, takes the usage event with it. The engine still knows: the port's gate
opens an account for every request, the engine (vLLM's or the fake) enters its sequences, and the gateway asks for the
account by the id that it gave the request. `KEPT` accounts of requests that are over are there to be asked for, a few
numbers each; those over longest go first.

Requests without an id of the gateway's (the warm-up, a call past it) share one account, so that the ledger can be held
against the engine's own counters to the token.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

KEPT: Final = 4096
ACCOUNTS: Final = "/galerne/work"
COUNTED: Final = ("counted_prompt_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class Done:
    """What one sequence has computed: its whole prompt once that is prefilled, as the engine's counters take it."""

    prompt: Hashable  # the same for sequences that answer one prompt
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Account:
    """Tokens of one request. `counted_prompt_tokens`: a prompt stands in the engine's counters once a sequence."""

    prompts: dict[Hashable, tuple[int, int]] = field(default_factory=dict)  # tokens, the fewest that were cached
    completion_tokens: int = 0
    counted_prompt_tokens: int = 0
    counted_cached_tokens: int = 0
    under_way: dict[Hashable, Callable[[], Done]] = field(default_factory=dict)
    open: bool = True  # its request is still being answered

    def began(self, sequence: Hashable, look: Callable[[], Done]) -> None:
        """A sequence is queued; `look` tells how far it is."""
        self.under_way[sequence] = look

    def ended(self, sequence: Hashable) -> None:
        """A sequence has finished or was aborted; a second time says nothing new."""
        look = self.under_way.pop(sequence, None)
        if look is not None:
            self._add(look())

    def document(self) -> dict[str, int | bool]:
        """As the gateway reads it; what is under way counts as far as it is. `final`: nothing will be added."""
        so_far = Account(dict(self.prompts), self.completion_tokens, self.counted_prompt_tokens)
        so_far.counted_cached_tokens = self.counted_cached_tokens
        for look in list(self.under_way.values()):
            so_far._add(look())
        return {
            "prompt_tokens": sum(tokens for tokens, _ in so_far.prompts.values()),
            "cached_tokens": sum(cached for _, cached in so_far.prompts.values()),
            "completion_tokens": so_far.completion_tokens,
            "counted_prompt_tokens": so_far.counted_prompt_tokens,
            "counted_cached_tokens": so_far.counted_cached_tokens,
            "final": not self.open and not self.under_way,
        }

    def _add(self, done: Done) -> None:
        self.completion_tokens += done.completion_tokens
        self.counted_prompt_tokens += done.prompt_tokens
        self.counted_cached_tokens += done.cached_tokens
        if done.prompt_tokens:
            _, cached = self.prompts.get(done.prompt, (0, done.cached_tokens))
            self.prompts[done.prompt] = (done.prompt_tokens, min(cached, done.cached_tokens))


class Shared(Account):
    """Of requests without an id: totals alone, or every prompt would be kept."""

    def _add(self, done: Done) -> None:
        self.completion_tokens += done.completion_tokens
        self.counted_prompt_tokens += done.prompt_tokens
        self.counted_cached_tokens += done.cached_tokens


# The account of the request that is being answered; an engine's handlers run in its context.
current: ContextVar[Account | None] = ContextVar("galerne_account", default=None)


class Accounts:
    """The accounts of one port."""

    def __init__(self) -> None:
        self._open: dict[str, Account] = {}
        self._over: OrderedDict[str, Account] = OrderedDict()
        self._others = Shared(open=False)

    def open(self, request_id: str) -> Account:
        """Open the account of a request; without an id it is the shared one."""
        if not request_id:
            return self._others
        account = self._open[request_id] = Account()
        return account

    def close(self, request_id: str) -> None:
        """The request is over, answered or not."""
        account = self._open.pop(request_id, None)
        if account is not None:
            account.open = False
            self._over[request_id] = account
            while len(self._over) > KEPT:
                self._over.popitem(last=False)

    def answer(self, path: str) -> bytes | None:
        """The JSON of an account; None where there is none (any more). Without an id: what no row can hold (yet)."""
        request_id = path.removeprefix(ACCOUNTS).removeprefix("/")
        if not request_id:
            under_way = [account.document() for account in self._open.values()]
            summed = {name: sum(found[name] for found in under_way) for name in COUNTED}
            return json.dumps({"others": self._others.document(), "under_way": summed}).encode()
        account = self._open.get(request_id) or self._over.get(request_id)
        return None if account is None else json.dumps(account.document()).encode()
