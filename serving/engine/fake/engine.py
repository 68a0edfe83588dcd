"""What all handlers of the fake engine share: its configuration, clockwork and counters."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serving.config import FakeEngineConfig
from serving.engine.fake.driver import Driver, Ticket
from serving.engine.fake.exchange import Exchange
from serving.engine.fake.metrics import EngineMetrics
from serving.engine.fake.protocol import RefusalError, Request, bad_request
from serving.engine.fake.scheduler import Sequence as EngineSequence
from serving.engine.work import Done, current

MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt: int
    completion: int
    cached: int

    @classmethod
    def of(cls, sequences: Iterable[EngineSequence], *, per_prompt: int = 1) -> Usage:
        """Counts sequences; of each `per_prompt` that share a prompt, the prompt counts once."""
        all_of = list(sequences)
        firsts = all_of[::per_prompt]
        return cls(
            prompt=sum(s.prompt_tokens for s in firsts),
            completion=sum(s.produced for s in all_of),
            cached=sum(s.cached_tokens for s in firsts),
        )

    def brief(self) -> dict[str, object]:
        """The `usage` of a stream's chunks, as far as tokens are counted there."""
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
        }

    def final(self) -> dict[str, object]:
        """The `usage` of a stream's last chunk."""
        return {**self.brief(), "prompt_tokens_details": {"cached_tokens": self.cached}}

    def full(self) -> dict[str, object]:
        """The `usage` of a whole answer."""
        details = {"cached_tokens": self.cached, "created_cache_tokens": None, "multimodal_tokens": None}
        return {**self.brief(), "prompt_tokens_details": details, "completion_tokens_details": None}


@dataclass(frozen=True, slots=True)
class Engine:
    """One simulated model."""

    config: FakeEngineConfig
    model_id: str
    # Tokens of prompt and answer; bounded by the KV cache too, as one sequence must fit it.
    max_model_len: int
    driver: Driver
    metrics: EngineMetrics
    # Names of adapters: each answers, and caches prefixes, under its own.
    adapters: frozenset[str] = frozenset()

    def check_model(self, request: Request) -> str:
        """The name to answer under. Raises RefusalError 404 for a model that is neither this one nor an adapter of it.

        No model means this one, as in vLLM.
        """
        if not request.model:
            return self.model_id
        if request.model != self.model_id and request.model not in self.adapters:
            message = f"The model `{request.model}` does not exist."
            raise RefusalError(404, message, kind="NotFoundError", param="model")
        return request.model

    def check_token_ids(self, prompts: Iterable[str | list[int]]) -> None:
        """Raises RefusalError 400 for an id beyond the vocabulary, as the real engine's guard does."""
        highest = max((i for prompt in prompts if not isinstance(prompt, str) for i in prompt), default=-1)
        if highest >= self.config.token_ids:
            raise bad_request(
                f"Token id {highest} is out of vocabulary: the model has {self.config.token_ids} token ids. "
                "(parameter=prompt)",
                "prompt",
            )

    def salt(self, request: Request) -> str | None:
        """What keeps this request's cached prefixes apart from others': the caller's salt, and its adapter."""
        if request.model in self.adapters:
            return f"{request.model} {request.cache_salt or ''}"
        return request.cache_salt

    @asynccontextmanager
    async def running(
        self, sequences: Sequence[EngineSequence], exchange: Exchange, *, per_prompt: int = 1
    ) -> AsyncIterator[Ticket]:
        """Runs sequences while the client is there; leaving it aborts what has not finished.

        Of each `per_prompt` sequences that follow one another the prompt is the same.
        """
        ticket = self.driver.submit(list(sequences))
        watch = exchange.watch(lambda: self.driver.close(ticket))
        account = current.get()
        if account is not None:
            for i, sequence in enumerate(sequences):
                account.began(id(sequence), _looking(sequence, id(sequences[i - i % per_prompt])))
        try:
            yield ticket
        finally:
            watch.cancel()
            self.driver.close(ticket)
            if account is not None:
                for sequence in sequences:
                    account.ended(id(sequence))


def _looking(sequence: EngineSequence, prompt: int) -> Callable[[], Done]:
    def look() -> Done:
        prefilled = sequence.first_token_at is not None
        return Done(
            prompt=prompt,
            prompt_tokens=sequence.prompt_tokens if prefilled else 0,
            cached_tokens=sequence.cached_tokens if prefilled else 0,
            completion_tokens=sequence.produced,
        )

    return look


def request_id(prefix: str, exchange: Exchange) -> str:
    """An id for an answer: the client's X-Request-Id, as in vLLM, or a random one."""
    given = exchange.headers.get(b"x-request-id", b"").decode("latin-1")[:MAX_REQUEST_ID_CHARS]
    return f"{prefix}-{given or random_id()}"


def random_id() -> str:
    """Sixteen hex digits."""
    return uuid.uuid4().hex[:16]
