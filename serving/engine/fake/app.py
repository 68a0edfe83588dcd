"""The fake engine as an ASGI application: routes, refusals and faults around the handlers."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from serving.config import FakeEngineConfig
from serving.engine.fake import generate, pooling, responses, text
from serving.engine.fake.driver import ClientGoneError, Driver
from serving.engine.fake.engine import Engine, random_id
from serving.engine.fake.exchange import Exchange, Receive, Scope, Send
from serving.engine.fake.faults import BrokenOffError, Fault, Faults
from serving.engine.fake.metrics import EngineMetrics
from serving.engine.fake.protocol import RefusalError
from serving.engine.fake.scheduler import Scheduler
from serving.engine.load import EngineLoad

VERSION = "0.29.0+galerne-fake"
METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[Engine, Exchange], Awaitable[None]]

_TOKENIZER: dict[str, Handler] = {"/tokenize": text.tokenize, "/detokenize": text.detokenize}
# What vLLM offers depends on the model's task too.
ROUTES: dict[str, dict[str, Handler]] = {
    "generate": {
        "/v1/chat/completions": generate.chat,
        "/v1/completions": generate.completions,
        "/v1/responses": responses.responses,
        **_TOKENIZER,
    },
    "embed": {
        "/v1/embeddings": pooling.embeddings,
        "/v1/score": pooling.score,
        "/v1/rerank": pooling.rerank,
        **_TOKENIZER,
    },
}


class FakeApp:
    """One simulated engine behind vLLM's HTTP API (ASGI 3). Serve it on one event loop."""

    def __init__(
        self,
        config: FakeEngineConfig,
        model_id: str,
        task: str,
        clock: Callable[[], float],
        exit_process: Callable[[int], object],
        adapters: frozenset[str] = frozenset(),
    ) -> None:
        scheduler = self._scheduler = Scheduler(config)
        max_model_len = min(config.max_model_len, config.kv_blocks * config.block_tokens)
        metrics = EngineMetrics(scheduler, model_id, max_model_len)
        self._engine = Engine(config, model_id, max_model_len, Driver(scheduler, metrics, clock), metrics, adapters)
        self._routes = ROUTES[task]
        self._faults = Faults(config.faults, config.seed, exit_process)
        self._clock = clock
        self._started_at: float | None = None
        self._created = int(time.time())
        self._load = 0

    @property
    def healthy(self) -> bool:
        """Whether the engine has started and its configured slow start is over."""
        if self._started_at is None:
            return False
        return self._clock() - self._started_at >= self._engine.config.faults.slow_start_s

    def load(self) -> EngineLoad:
        """As vLLM's scheduler counts it."""
        scheduler = self._scheduler
        return EngineLoad(len(scheduler.running), len(scheduler.waiting), scheduler.pool.usage)

    async def start(self) -> None:
        """Begins the start-up time. A second call changes nothing."""
        if self._started_at is None:
            self._started_at = self._clock()

    async def aclose(self) -> None:
        """Aborts what runs; afterwards the engine is not healthy."""
        self._started_at = None
        self._engine.driver.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            exchange = Exchange(scope, receive, send)
            # Returning with the answer unfinished makes the server close the connection.
            with suppress(BrokenOffError, ClientGoneError, ConnectionError):
                try:
                    await self._answer(exchange)
                except RefusalError as refusal:
                    await exchange.refuse(refusal)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            event = await receive()
            if event["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif event["type"] == "lifespan.shutdown":
                await self.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, exchange: Exchange) -> None:
        handler = self._routes.get(exchange.path)
        if handler is None:
            await self._status(exchange)
            return
        if exchange.method != "POST":
            raise RefusalError(405, "Method Not Allowed")
        if not self.healthy:
            raise RefusalError(503, "The fake engine is starting (faults.slow_start_s).")
        media_type = exchange.headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
        if media_type != b"application/json":
            raise RefusalError(400, "Unsupported Media Type: Only 'application/json' is allowed")
        self._load += 1
        try:
            await self._with_faults(handler, exchange)
        finally:
            self._load -= 1

    async def _with_faults(self, handler: Handler, exchange: Exchange) -> None:
        fault = self._faults.draw()
        if fault is Fault.ERROR:
            raise RefusalError(500, "Simulated failure (faults.error_rate).", kind="InternalServerError")
        if fault is Fault.HANG:
            await exchange.disconnected()
            raise ClientGoneError
        exchange.send = self._faults.breaking(exchange.send)
        await handler(self._engine, exchange)

    async def _status(self, exchange: Exchange) -> None:
        answers: dict[str, Callable[[Exchange], Awaitable[None]]] = {
            "/health": self._health,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/version": self._version,
            "/load": self._server_load,
            "/tokenizer_info": self._tokenizer_info,
        }
        answer = answers.get(exchange.path)
        if answer is None:
            raise RefusalError(404, "Not Found")
        if exchange.method not in ("GET", "HEAD"):
            raise RefusalError(405, "Method Not Allowed")
        await answer(exchange)

    async def _health(self, exchange: Exchange) -> None:
        await exchange.answer(b"", status=200 if self.healthy else 503)

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.answer(self._engine.metrics.render(), content_type=METRICS_TYPE)

    async def _version(self, exchange: Exchange) -> None:
        await exchange.json({"version": VERSION})

    async def _server_load(self, exchange: Exchange) -> None:
        await exchange.json({"server_load": self._load})

    async def _tokenizer_info(self, exchange: Exchange) -> None:
        await exchange.json(text.TOKENIZER_INFO)

    async def _models(self, exchange: Exchange) -> None:
        permission = {
            "id": f"modelperm-{random_id()}",
            "object": "model_permission",
            "created": self._created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        base = self._engine.model_id
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "galerne-fake",
                "root": name,
                "parent": None if name == base else base,
                "max_model_len": self._engine.max_model_len,
                "permission": [permission],
            }
            for name in (base, *sorted(self._engine.adapters))
        ]
        await exchange.json({"object": "list", "data": cards})


def build_app(
    config: FakeEngineConfig,
    model_id: str,
    *,
    task: str = "generate",
    clock: Callable[[], float] = time.monotonic,
    exit_process: Callable[[int], object] = os._exit,
    adapters: Iterable[str] = (),
) -> FakeApp:
    """The fake engine for one model; `task` is "generate" or "embed", which decides its routes; `adapters`: names.

    `clock` counts seconds from any start; `exit_process` plays the fault that ends the process.
    Raises ValueError for another task.
    """
    if task not in ROUTES:
        raise ValueError(f"task {task!r} is none of {', '.join(ROUTES)}")
    return FakeApp(config, model_id, task, clock, exit_process, frozenset(adapters))
