"""The gateway: an ASGI app that tells a request's story from top to bottom.

    route -> authenticate -> read -> bound -> look the model up -> choose a replica -> relay -> count

Every step that can refuse comes before an engine is touched and raises a RequestError; `Gateway` turns it into
OpenAI's error body. It promises that each accepted request is counted exactly once as completed, rejected,
failed or cancelled.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import date
from random import Random
from typing import Any

import structlog

from serving.admission import bounds
from serving.api import errors, routes
from serving.api.auth import Identity, KeyRing
from serving.api.body import ClientLeft, Receive, Scope, Send, read_body
from serving.api.catalogue import Catalogue, version
from serving.api.relay import CutAnswer, Exchange, Headers, Relay
from serving.api.upstream import Pool
from serving.config import GalerneConfig
from serving.errors import BadRequest, HeadersTooLarge, MethodNotAllowed, NotFound, RequestError, Unavailable
from serving.metrics.gateway import GatewayMetrics
from serving.metrics.table import NO_MODEL, NO_TENANT
from serving.routing.replicas import Endpoint, ReplicaSet

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
CLIENT_LEFT = 499  # as nginx and HAProxy log it; nobody is there to receive it
CUT = "cut"
BUSY_RETRY_AFTER_S = 1
WEBSOCKET_POLICY = 1008
OTHER_ROUTE = "other"

log = structlog.get_logger("galerne.gateway")


class Gateway:
    """ASGI 3 app. `echo_request_id` is off where the server around it adds the header itself."""

    def __init__(
        self,
        config: GalerneConfig,
        *,
        engine_token: str,
        metrics: GatewayMetrics,
        echo_request_id: bool = True,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], date] = date.today,
        rng: Random | None = None,
    ) -> None:
        rng = rng or Random()  # noqa: S311 - spreads load; no secret depends on it
        self._config = config
        self._limits = config.limits
        self._keys = KeyRing(config.tenants)
        self._metrics = metrics
        self._echo_request_id = echo_request_id
        self._clock = clock
        self._today = today
        self._in_flight = 0
        self.replicas = ReplicaSet((m.id for m in config.models), rng)
        self._pool = Pool(config.gateway.connect_timeout_s)
        self._catalogue = Catalogue(config, self.replicas, int(time.time()))
        self._relay = Relay(
            self.replicas,
            self._pool,
            engine_token=engine_token,
            response_timeout_s=config.gateway.response_timeout_s,
            clock=clock,
            rng=rng,
            on_failure=metrics.upstream_failed,
            on_gap=metrics.gap,
        )
        metrics.watch(self.replicas)

    def update_replicas(self, model: str, endpoints: tuple[Endpoint, ...]) -> None:
        """Take the cluster's current replicas of a model."""
        for gone in self.replicas.update(model, endpoints):
            self._pool.drop(gone)

    def close(self) -> None:
        """Close idle connections to engines."""
        self._pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_other_protocols(scope, receive, send)
            return
        started_s = self._clock()
        call = _Call(scope, receive, send, echo_request_id=self._echo_request_id)
        try:
            status = await self._story(call)
        except RequestError as error:
            status = error.status
            await call.refuse(error)
        except ClientLeft:
            status = CLIENT_LEFT
        except CutAnswer:
            self._metrics.answered(call.route, call.model, call.tenant, CUT, self._clock() - started_s)
            raise
        except Exception:
            log.exception("request failed", request_id=call.request_id, route=call.route, model=call.model)
            status = RequestError.status
            await call.refuse(RequestError("The gateway failed on this request.", code="internal_error"))
        self._metrics.answered(call.route, call.model, call.tenant, str(status), self._clock() - started_s)

    async def _story(self, call: _Call) -> int:
        # The path as the server parsed it, never one rebuilt from Host: see THREATS, auth on a URL.
        path = call.path
        if path in {routes.LIVE, routes.READY}:
            return await self._health(call)
        self._bound_headers(call.scope["headers"])
        identity = self._keys.identify(call.headers.get(b"authorization"), self._today())
        call.tenant = identity.tenant_id
        route = routes.RELAYED.get(path)
        if route is None:
            return await self._own(call, identity)
        call.route = path
        if call.method != "POST":
            raise MethodNotAllowed(f"{path} takes POST.")
        if self._in_flight >= self._config.gateway.max_ongoing_requests:
            raise Unavailable(
                "The gateway has as many requests as it takes. Try again shortly.",
                code="overloaded",
                retry_after_s=BUSY_RETRY_AFTER_S,
            )
        self._in_flight += 1
        try:
            return await self._relayed(call, route, identity)
        finally:
            self._in_flight -= 1

    async def _relayed(self, call: _Call, route: routes.EngineRoute, identity: Identity) -> int:
        body = await read_body(
            call.headers.get(b"content-length"),
            call.receive,
            limit_bytes=self._limits.body_bytes,
            timeout_s=self._config.gateway.body_timeout_s,
        )
        facts = bounds.read(route.kind, body, self._limits)
        model = self._catalogue.model(facts.model, identity)
        call.model = model.id
        if model.task not in route.tasks:
            raise BadRequest(
                f"The model '{model.id}' is {_article(model.task)} model and does not serve {route.path}.",
                code="wrong_task",
                param="model",
            )
        exchange = Exchange(model.id, route.path, body, call.request_id, started_s=self._clock())
        with self._metrics.accepted(exchange, identity.tenant_id, facts.stream):
            await self._relay.run(exchange, call.receive, call.send, call.extra)
        return exchange.status

    def _bound_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        size = sum(len(name) + len(value) for name, value in headers)
        if size > self._limits.header_bytes or len(headers) > self._limits.header_count:
            raise HeadersTooLarge(
                f"The request's headers exceed {self._limits.header_bytes} bytes or {self._limits.header_count} fields."
            )

    async def _health(self, call: _Call) -> int:
        if call.method not in {"GET", "HEAD"}:
            raise MethodNotAllowed(f"{call.path} takes GET.")
        call.route = call.path
        ready = call.path == routes.LIVE or self._catalogue.ready()
        word = "live" if call.path == routes.LIVE else "ready" if ready else "starting"
        return await call.answer_json(200 if ready else 503, {"status": word})

    async def _own(self, call: _Call, identity: Identity) -> int:
        path = call.path
        if path == routes.MODELS:
            content: dict[str, Any] = self._catalogue.listing(identity)
        elif path == routes.VERSION:
            content = version()
        elif path.startswith(routes.MODEL_PREFIX):
            model = self._catalogue.model(path.removeprefix(routes.MODEL_PREFIX), identity)
            content = self._catalogue.card(model)
            path = routes.MODEL_PREFIX + "{id}"
        else:
            raise NotFound(f"There is no {call.method} {path[:128]} here. The README lists the routes.")
        call.route = path
        if call.method != "GET":
            raise MethodNotAllowed(f"{path} takes GET.")
        return await call.answer_json(200, content)


class _Call:
    """One HTTP request as the story reads it, and how to answer it without an engine.

    `route`, `model` and `tenant` are label values of the metrics, filled in as the story learns them; all come
    from bounded sets.
    """

    __slots__ = (
        "extra",
        "headers",
        "method",
        "model",
        "path",
        "receive",
        "request_id",
        "route",
        "scope",
        "send",
        "tenant",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, echo_request_id: bool) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = _request_id(self.headers.get(b"x-request-id"))
        self.extra: Headers = [(b"x-request-id", self.request_id.encode())] if echo_request_id else []
        self.route = OTHER_ROUTE
        self.model = NO_MODEL
        self.tenant = NO_TENANT

    async def refuse(self, error: RequestError) -> None:
        """Answer with OpenAI's error body."""
        await self._answer(error.status, errors.body(error), errors.headers(error))

    async def answer_json(self, status: int, content: dict[str, Any]) -> int:
        """Answer with JSON; returns the status."""
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._answer(status, body, headers)
        return status

    async def _answer(self, status: int, body: bytes, headers: Headers) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers + self.extra})
        # The server drops the body of an answer to HEAD.
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _article(task: str) -> str:
    return {"generate": "a text generation", "embed": "an embedding"}[task]


def _request_id(presented: bytes | None) -> str:
    if presented is not None and REQUEST_ID.fullmatch(presented):
        return presented.decode()
    return uuid.uuid4().hex


async def _refuse_other_protocols(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": WEBSOCKET_POLICY})
    elif scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
