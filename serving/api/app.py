"""The gateway: an ASGI app that tells a request's story from top to bottom.

    route -> authenticate -> read -> bound -> look the model up -> quota -> queue -> choose a replica -> relay -> count

Every step that can refuse comes before an engine is touched and raises a RequestError; `Gateway` turns it into
OpenAI's error body. It promises that each accepted request is counted exactly once as completed, rejected,
failed or cancelled.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import structlog

from serving import tracing
from serving.admission import bounds, normal, output_default, quotas
from serving.admission.complaints import missing
from serving.admission.fair_share import FairShare, Holding
from serving.admission.holds import Hold
from serving.admission.shared_service import SharedService
from serving.admission.shedding import Bounds, Shedder
from serving.admission.vocabulary import Vocabularies
from serving.api import cors, loop_lag, openapi, routes, tokenizer_info
from serving.api.auth import Door, Identity
from serving.api.auth.denials import DENIALS, Denials
from serving.api.billing import Billing, NoLedger
from serving.api.body import ClientLeft, Receive, Scope, Send, read_body
from serving.api.cache_salt import CacheSalts
from serving.api.call import Call, refuse_other_protocols
from serving.api.catalogue import Catalogue, version
from serving.api.engine_facts import EngineFacts
from serving.api.exchange import Exchange
from serving.api.explain import Explainer, asked
from serving.api.hedge import hedge_after_s
from serving.api.ops import PATHS as OPS
from serving.api.ops import Answer, Ops
from serving.api.peers import Peers
from serving.api.quarantine import Quarantine
from serving.api.relay import CutAnswer, Relay
from serving.api.upstream import Pool
from serving.api.usage import TenantUsage
from serving.api.watch import Watch
from serving.cluster import edge
from serving.config import GalerneConfig
from serving.errors import BadRequest, HeadersTooLarge, MethodNotAllowed, NotFound, RequestError, Unavailable
from serving.metering.asking import LedgerQuestions
from serving.metering.ledger import Ledger
from serving.metering.row import Row
from serving.metering.spent import LedgerBooks
from serving.metering.usage import Usage
from serving.metrics.gateway import GatewayMetrics
from serving.routing.fingerprint import secret
from serving.routing.health import Health
from serving.routing.replicas import Endpoint, ReplicaSet

if TYPE_CHECKING:
    from serving.api.auth.tokens import TokenDoor

CUT = "cut"
BUSY_RETRY_AFTER_S = 1
NO_BODY = ((b"content-length", b"0"),)
# Names the conversation, for routing policy `session`.
SESSION_HEADER = b"x-session-id"
# Of an answer: what of the request its engine did not get.
LEFT_OUT_HEADER = b"x-galerne-left-out"
# An administrator's key beside a tenant's: the answer says which replica it came from and why.
ADMIN_HEADER = b"x-galerne-admin"

# What a replica said of its load counts until so many probes later: one that has gone silent is ejected by then.
PROBES_HEARD = 5
GATEWAY_NAME_CHARS = 16

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
        wall: Callable[[], float] = time.time,
        rng: Random | None = None,
        wake: Callable[[str], None] = lambda _: None,
        ledger: Ledger | None = None,
        limits_file: Path | None = None,
        limits_password: str | None = None,
    ) -> None:
        """`wake(model)` is called while requests wait for a model that sleeps; it must not block.

        `ledger` gets a row for each accepted request; None: nobody is billed. `limits_file` keeps budgets across
        restarts where no shared store does; `limits_password` is the shared store's where its URL has none.
        """
        rng = rng or Random()  # noqa: S311 - spreads load; no secret depends on it
        self._config = config
        self._limits = config.limits
        self._proof = edge.proof(engine_token).encode()
        self._wall = wall
        # Cryptography is loaded where there are tokens to verify.
        self._tokens = _tokens(config, metrics) if config.oidc else None
        self._door = Door(config, edge=self._proof, wall=wall, tokens=self._tokens)
        self._denials = Denials(metrics.denied, clock)
        self._metrics = metrics
        metrics.expect(config)
        self._echo_request_id = echo_request_id
        self._clock = clock
        self.ongoing = FairShare(config.gateway.max_ongoing_requests, len(config.tenants))
        self.bodies = FairShare(config.gateway.max_ongoing_body_bytes, len(config.tenants))
        self.replicas = ReplicaSet(config.models, rng, clock=clock, on_choice=metrics.routed, key=secret(engine_token))
        name = uuid.uuid4().hex[:GATEWAY_NAME_CHARS].encode()
        self._pool = Pool(config.gateway.connect_timeout_s, name, self.replicas.hear)
        self._peers = Peers(self._pool, self.replicas, engine_token=engine_token)
        self._facts = EngineFacts(self._pool, self.replicas)
        self._salts = CacheSalts(engine_token, (tenant.id for tenant in config.tenants))
        self._catalogue = Catalogue(config, self.replicas, int(time.time()))
        self.vocabularies = Vocabularies()
        self._explainer = Explainer(config, self._catalogue, self.vocabularies, self.replicas)
        self.hold = Hold(config.models, config.tenants, clock=clock, on_need=wake, metrics=metrics)
        self._rng = rng
        questions = None if ledger is None else LedgerQuestions(ledger.settings)
        books = None if ledger is None or questions is None else LedgerBooks(ledger, questions)
        self.quotas = quotas.of(config, metrics, limits_file, limits_password, books)
        self.health = Health(config.models, clock, metrics, lambda model, out: self.hold[model].ejected(out))
        faults = config.gateway.faults
        heard_for_s = PROBES_HEARD * faults.probe_interval_s
        self._tokenizer_info = tokenizer_info.TokenizerInfo(
            self._pool, self.replicas, self.health, engine_token=engine_token
        )
        self._watch = Watch(
            self._pool,
            self.health,
            faults,
            engine_token=engine_token,
            clock=clock,
            on_slow=metrics.slow_reader,
            on_round=lambda: self.replicas.forget_said(heard_for_s),
        )
        self._shedder = Shedder(
            Bounds(faults.shed_lag_s, faults.shed_memory_bytes), lambda: self.ongoing.used, lambda: self.bodies.used
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._relay = Relay(
            self.replicas,
            self._pool,
            self.hold,
            {m.id: m.hold.keep_alive_s for m in config.models},
            self.health,
            self._watch,
            engine_token=engine_token,
            response_timeout_s=config.gateway.response_timeout_s,
            clock=clock,
            rng=rng,
            quarantine=Quarantine(secret(engine_token), clock),
            on_failure=metrics.upstream_failed,
            on_gap=metrics.gap,
            on_first=metrics.first_byte,
            on_retry=metrics.retried,
            on_hedge=metrics.hedged,
        )
        self._ledger = ledger
        self._billing = Billing(
            NoLedger() if ledger is None else ledger,
            self._pool,
            engine_token=engine_token,
            clock=clock,
            on_row=metrics.billed,
        )
        if ledger is not None:
            metrics.watch_ledger(ledger.state)
        self._usage = TenantUsage(questions, self.quotas, self.hold, wall=wall, clock=clock)
        metrics.watch(self.replicas, self.hold)
        metrics.watch_ejections(self.health)
        self._tracer = None if config.tracing is None else tracing.tracer(config.tracing)
        self._ops = Ops.of(config, self.replicas, self.hold, self.health, metrics, lambda: self.ongoing.used, clock)

    def update_replicas(self, model: str, endpoints: tuple[Endpoint, ...]) -> None:
        """Take the cluster's current replicas of a model."""
        known = self.replicas.endpoints(model)
        for gone in self.replicas.update(model, endpoints):
            self._pool.drop(gone)
        for endpoint in endpoints:
            self._pool.keep(endpoint)
        # In this order: who is ejected and leaves must not be taken for one that is back.
        self.hold[model].update(self.replicas.ready(model))
        self.health.update(model, endpoints)
        for endpoint in endpoints:
            if endpoint not in known:
                self._facts.ask(model, endpoint)

    def divide(self, gateways: int) -> None:
        """Take how many gateways, this one included, serve the same clients with the same engines."""
        self.replicas.share(gateways > 1)
        self.hold.divide(gateways)
        self.quotas.divide(gateways)

    def start(self) -> None:
        """Begin what goes on beside requests; to be called on the event loop."""
        beside = {
            "watch": self._watch.run(),
            "peers": self._peers.run(asyncio.sleep),
            "loop-lag": loop_lag.watch(self._late, self._clock, asyncio.sleep),
            "quotas": self.quotas.watch(asyncio.sleep),
        }
        if self.quotas.link is not None:
            shared = SharedService(self.hold, self.quotas.link, uuid.uuid4().hex, self._clock)
            beside["shared-service"] = shared.run(asyncio.sleep)
        if self._tokens is not None:
            beside["issuers-keys"] = self._tokens.run()
        self._tasks = [asyncio.create_task(work, name=name) for name, work in beside.items()]

    def _late(self, seconds: float) -> None:
        self._metrics.loop_lag(seconds)
        self._shedder.observe(seconds)

    def close(self) -> None:
        """End the watch, close idle connections to engines, send the spans and rows that wait, write what is kept."""
        self._facts.close()
        for task in self._tasks:
            task.cancel()
        self._billing.close()
        self.quotas.close()
        self._usage.close()
        if self._ledger is not None:
            self._ledger.close()
        self._pool.close()
        if self._tracer is not None:
            self._tracer.close()

    async def finish(self) -> None:
        """`close`, once every request that has ended has its row and is charged: engines are asked as ever."""
        await self._billing.asked()
        await self.quotas.settled()
        self.close()
        if self.quotas.link is not None:
            await self.quotas.link.close()

    def reload(self, config: GalerneConfig) -> None:
        """Take this configuration's tenants and administrators, all at once; the rest of it has to be the same.

        Whoever was let in before keeps what it was let in as: no request under way is touched.
        """
        self._door = Door(config, edge=self._proof, wall=self._wall, tokens=self._tokens)
        if self._tokens is not None:
            self._tokens.follow(config)
        self._salts.follow(tenant.id for tenant in config.tenants)
        self.hold.update(config.tenants)
        self.quotas.update(config.tenants)
        self.ongoing.tenants = self.bodies.tenants = len(config.tenants)
        self._ops.follow(config)
        self._explainer.follow(config)
        self._metrics.expect(config)
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await refuse_other_protocols(scope, receive, send)
            return
        started_s = self._clock()
        call = Call(scope, receive, send, echo_request_id=self._echo_request_id)
        if (origin := call.headers.get(b"origin")) is not None and call.path not in OPS:
            call.extra += cors.answer_headers(self._config.gateway.cors, origin)
        try:
            status = await self._story(call)
        except RequestError as error:
            status = error.status
            self._metrics.refused(call.model, call.tenant, error.code or str(status))
            if isinstance(error, DENIALS):
                self._denials.note(error, call.request_id)
            await call.refuse(error)
        except ClientLeft:
            status = ClientLeft.status
        except CutAnswer:
            self._metrics.answered(call.route, call.model, call.tenant, CUT, self._clock() - started_s)
            raise
        except Exception:
            log.exception("request failed", request_id=call.request_id, route=call.route, model=call.model)
            status = RequestError.status
            await call.refuse(RequestError("The gateway failed on this request.", code="internal_error"))
        self._metrics.answered(call.route, call.model, call.tenant, str(status), self._clock() - started_s)

    async def _story(self, call: Call) -> int:
        # The path as the server parsed it, never one rebuilt from Host: see THREATS, auth on a URL.
        path = call.path
        if path in routes.PROBES:
            return await self._health(call)
        self._bound_headers(call.scope["headers"])
        if self._config.admins and path in OPS:
            call.route = path
            door = self._door
            return await call.answer(
                await self._ops.answer(path, call.method, lambda: door.admin(call.headers, call.scope))
            )
        if self._config.admins and path == routes.EXPLAIN:
            return await self._explain(call)
        if call.method == "OPTIONS":
            return await self._options(call)
        identity = self._door.enter(call.headers, call.scope)
        call.tenant = identity.tenant_id
        route = routes.RELAYED.get(path)
        if route is None:
            return await self._own(call, identity)
        call.route = path
        call.takes(routes.methods(path))
        identity.require("inference")
        tenant = identity.tenant_id
        if (why := self._too_many(tenant)) is not None:
            raise self._overloaded(why)
        self.ongoing.take(tenant)
        holding = Holding(self.bodies, tenant)
        try:
            return await self._relayed(call, route, identity, holding)
        finally:
            holding.end()
            self.ongoing.give(tenant)

    def _overloaded(self, why: str) -> Unavailable:
        self._metrics.shed(why)
        return Unavailable(
            "The gateway has as many requests as it takes. Try again shortly.",
            code="overloaded",
            retry_after_s=BUSY_RETRY_AFTER_S,
        )

    async def _read(self, call: Call, limit_bytes: int, holding: Holding) -> bytes:
        def room(amount: int) -> None:
            if not holding.grow(amount):
                raise self._overloaded("bodies" if amount > self.bodies.free else "tenant")

        return await read_body(
            call.headers,
            call.receive,
            limit_bytes=limit_bytes,
            timeout_s=self._config.gateway.body_timeout_s,
            room=room,
        )

    def _too_many(self, tenant: str) -> str | None:
        """Why a request of this tenant is refused before it is read; None: it is taken."""
        if self.ongoing.full:
            return "requests"
        if self._shedder.reason is not None:
            return self._shedder.reason
        return None if self.ongoing.may(tenant) else "tenant"

    async def _relayed(self, call: Call, route: routes.EngineRoute, identity: Identity, holding: Holding) -> int:
        limits = identity.limits or self._limits
        body = await self._read(call, limits.body_bytes, holding)
        facts = bounds.read(route.kind, body, limits, None if route.computes else self._catalogue.only(identity))
        body = normal.applied(body, facts)
        if facts.left_out:
            call.extra.append((LEFT_OUT_HEADER, normal.named(facts.left_out).encode()))
        body, facts = output_default.bounded(route.kind, body, facts, identity.output_tokens)
        model = self._catalogue.model(facts.model, identity)
        call.model = model.id
        if model.task not in route.tasks:
            raise BadRequest(
                f"The model '{model.id}' is {_article(model.task)} model and does not serve {route.path}.",
                code="wrong_task",
                param="model",
            )
        self.vocabularies.check(model.id, facts)
        ask_usage = facts.stream and route.says_usage and not facts.include_usage
        body_bytes = len(body)
        # From here on there is one body: the client's own is not kept beside what engines get.
        if route.computes:
            body = self._salts.into(body, identity.tenant_id, ask_usage=ask_usage)
        exchange = Exchange(
            model.id,
            route.path,
            body,
            call.request_id,
            started_s=self._clock(),
            tenant=identity.tenant_id,
            key_id=identity.key_id,
            facts=facts,
            computes=route.computes,
            asked=asked(route, facts, body, identity.tenant_id, model.id, call.headers.get(SESSION_HEADER)),
            shows_route=self._is_admins(call),
            stream=facts.stream,
            hedge_after_s=hedge_after_s(model, stream=facts.stream),
            holding=holding,
        )
        del body
        if identity.tenant_id not in self.quotas:
            return await self._accepted(call, exchange, None)
        cost = self.hold[model.id].expect(identity.tenant_id, exchange, body_bytes)
        lease = f"{self._rng.getrandbits(64):016x}"
        charge = await self.quotas.admit(identity.tenant_id, model.id, lease, cost, call.extra)
        try:
            return await self._accepted(call, exchange, charge)
        finally:
            if charge is not None:
                self.quotas.ended(charge)

    async def _accepted(self, call: Call, exchange: Exchange, charge: quotas.Charge | None) -> int:
        def charged(row: Row) -> None:
            if charge is not None:
                self.quotas.settle(charge, row)
            if exchange.ticket is not None:
                usage = Usage(row.prompt_tokens, row.completion_tokens)
                self.hold[exchange.model].charge(exchange.ticket, usage)

        billed = self._billing.request(exchange, charged)
        with self._metrics.accepted(exchange, exchange.tenant, exchange.stream), billed:
            if self._tracer is None:
                await self._relay.run(exchange, call.receive, call.send, call.extra)
            else:
                with self._tracer.request(exchange, call.headers.get(b"traceparent"), call.send) as (header, send):
                    exchange.traceparent = header
                    await self._relay.run(exchange, call.receive, send, call.extra)
        return exchange.status

    async def _explain(self, call: Call) -> int:
        call.route = routes.EXPLAIN
        self._door.admin(call.headers, call.scope)
        call.takes(("POST",))
        holding = Holding(self.bodies, call.tenant)
        try:
            question = await self._read(call, self._limits.body_bytes, holding)
        finally:
            holding.end()
        return await call.answer_json(200, self._explainer.explain(question))

    def _is_admins(self, call: Call) -> bool:
        """Whether an administrator's key came along; any other key there is counted and changes nothing else: headers
        refuse nobody.
        """
        key = call.headers.get(ADMIN_HEADER)
        if key is None:
            return False
        try:
            self._door.admin({b"authorization": b"Bearer " + key}, call.scope)
        except RequestError as error:
            if isinstance(error, DENIALS):
                self._denials.note(error, call.request_id)
            return False
        return True

    def _bound_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        size = sum(len(name) + len(value) for name, value in headers)
        if size > self._limits.header_bytes or len(headers) > self._limits.header_count:
            raise HeadersTooLarge(
                f"The request's headers exceed {self._limits.header_bytes} bytes or {self._limits.header_count} fields."
            )

    async def _health(self, call: Call) -> int:
        call.route = call.path
        if call.method == "OPTIONS":
            return await self._options(call)
        call.takes(routes.methods(call.path))
        ready = call.path == routes.LIVE or self._catalogue.ready()
        if call.path in {routes.HEALTH, routes.PING}:
            return await call.answer(Answer(200 if ready else 503, NO_BODY, b""))
        word = "live" if call.path == routes.LIVE else "ready" if ready else "starting"
        return await call.answer_json(200 if ready else 503, {"status": word})

    async def _options(self, call: Call) -> int:
        """A browser's question whether a page may call; no key comes with it."""
        methods = routes.methods(call.path)
        if not methods:
            raise NotFound("There is no such route here. The README lists the routes.")
        call.route = routes.label(call.path)
        allowed = cors.preflight(self._config.gateway.cors, call.headers, methods)
        if allowed is None:
            raise MethodNotAllowed(
                f"{call.route} takes {' or '.join(methods)}. Pages in browsers may call from the origins that the "
                "operator names in gateway.cors.origins; yours is none of them.",
                allow=methods,
            )
        return await call.answer(Answer(204, tuple(allowed), b""))

    async def _own(self, call: Call, identity: Identity) -> int:
        path = call.path
        if path == routes.USAGE:
            return await self._used(call, identity)
        if path == routes.TOKENIZER_INFO:
            return await self._tell_tokenizer(call, identity)
        if path == routes.MODELS:
            identity.require("models")
            content: dict[str, Any] = self._catalogue.listing(identity)
        elif path == routes.VERSION:
            content = version()
        elif path == routes.OPENAPI:
            content = openapi.document()
        elif path.startswith(routes.MODEL_PREFIX):
            identity.require("models")
            name = path.removeprefix(routes.MODEL_PREFIX)
            self._catalogue.model(name, identity)
            content = self._catalogue.card(name)
        else:
            raise NotFound(f"There is no {call.method} {path[:128]} here. The README lists the routes.")
        call.route = routes.label(path)
        call.takes(routes.methods(path))
        return await call.answer_json(200, content)

    async def _tell_tokenizer(self, call: Call, identity: Identity) -> int:
        call.route = routes.TOKENIZER_INFO
        identity.require("inference")
        call.takes(routes.methods(routes.TOKENIZER_INFO))
        name = tokenizer_info.asked_model(call.scope["query_string"]) or self._catalogue.only(identity)
        if name is None:
            raise missing("model")
        model = self._catalogue.model(name, identity)
        call.model = model.id
        return await call.answer_json(200, await self._tokenizer_info.of(model.id))

    async def _used(self, call: Call, identity: Identity) -> int:
        call.route = routes.USAGE
        identity.require("usage")
        call.takes(routes.methods(routes.USAGE))
        return await call.answer(await self._usage.answer(identity, call.scope["query_string"]))


def _tokens(config: GalerneConfig, metrics: GatewayMetrics) -> TokenDoor:
    from serving.api.auth.tokens import TokenDoor

    return TokenDoor(config, metrics.issuer_keys)


def _article(task: str) -> str:
    return {"generate": "a text generation", "embed": "an embedding"}[task]
