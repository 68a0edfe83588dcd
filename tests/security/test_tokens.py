"""Tokens: only what an issuer signed, for this audience, now, speaks for a tenant; and never for an administrator."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from serving.api.app import Gateway
from serving.api.auth import Door, Refused, digest
from serving.api.auth import tokens as tokens_module
from serving.api.auth.identity import REFUSED, NotAdmin
from serving.api.auth.jwks import MAX_BYTES, MAX_KEYS, KeysError, KeyStore, parse, read_keys
from serving.api.auth.tokens import TokenDoor
from serving.config import GalerneConfig, OidcConfig
from serving.errors import Unavailable
from serving.metrics.gateway import GatewayMetrics

NOW_S = 1_800_000_000.0
ISSUER, AUDIENCE = "https://login.example.org/one", "galerne"
RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
WEAK_RSA = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused
P256 = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
ADMIN = "sk-admin"


def jwk(key: Any, kid: str | None = None, **fields: Any) -> dict[str, Any]:
    kind = next(a for a, k in ((RSAAlgorithm, rsa.RSAPublicKey), (ECAlgorithm, ec.EllipticCurvePublicKey), (OKPAlgorithm, ed25519.Ed25519PublicKey)) if isinstance(key, k))  # fmt: skip
    return kind.to_jwk(key, as_dict=True) | ({} if kid is None else {"kid": kid}) | fields


def jwks(*rows: dict[str, Any]) -> bytes:
    return json.dumps({"keys": rows}).encode()


KEYS = parse(jwks(jwk(RSA_KEY.public_key(), "r"), jwk(P256.public_key(), "e"), jwk(ED.public_key(), "o")))


def configuration(**fields: Any) -> GalerneConfig:
    issuer = {
        "id": "one",
        "issuer": ISSUER,
        "audience": [AUDIENCE],
        "jwks_file": "/nowhere/jwks.json",
        "algorithms": ["RS256", "ES256", "EdDSA"],
        "tenant_claim": "tenant",
        "leeway_s": 10,
    } | fields
    return GalerneConfig.model_validate(
        {
            "models": [{"id": "chat", "source": "fake:chat", "hold": {"requests": 0}}],
            "tenants": [
                {"id": "press", "models": ["chat"], "limits": {"n": 2}},
                {"id": "port", "keys": [{"id": "k", "sha256": digest("sk-port")}]},
            ],
            "admins": [{"id": "nadia", "sha256": digest(ADMIN)}],
            "oidc": [issuer],
        }
    )


def door(keys: Any = KEYS, **fields: Any) -> TokenDoor:
    made = TokenDoor(configuration(**fields))
    if keys:
        made.store("one").replace(keys)
    return made


DOOR = door()


def claims(**fields: Any) -> dict[str, Any]:
    found = {"iss": ISSUER, "aud": AUDIENCE, "exp": NOW_S + 300, "tenant": "press"} | fields
    return {name: value for name, value in found.items() if value is not ...}


def token(
    key: Any = RSA_KEY, alg: str = "RS256", kid: Any = "r", header: dict[str, Any] | None = None, **fields: Any
) -> bytes:
    named = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**fields), key, alg, headers=named | (header or {})).encode()


def raw(header: Any, payload: Any, signature: bytes = b"x" * 256) -> bytes:
    parts = [p if isinstance(p, bytes) else json.dumps(p).encode() for p in (header, payload)]
    return b".".join(urlsafe_b64encode(part).rstrip(b"=") for part in (*parts, signature))


def reason(text: bytes, door: TokenDoor = DOOR, now_s: float = NOW_S) -> str:
    with pytest.raises(Refused) as caught:
        door.identify(text, now_s)
    assert caught.value.message == REFUSED
    return caught.value.reason


@pytest.mark.parametrize(("key", "alg", "kid"), [(RSA_KEY, "RS256", "r"), (P256, "ES256", "e"), (ED, "EdDSA", "o")])
def test_a_good_token_speaks_for_its_tenant(key: Any, alg: str, kid: str) -> None:
    identity = DOOR.identify(token(key, alg, kid), NOW_S)
    assert (identity.tenant_id, identity.key_id, identity.models) == ("press", "one", {"chat"})
    assert identity.scopes == {"inference", "models"}
    assert identity.limits is not None
    assert identity.limits.n == 2


def public_pem(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    found: bytes = key.public_key().public_bytes(serialization.Encoding.PEM, form)
    return found


def confused(alg: str, secret: bytes) -> bytes:
    """Signed with the public key as a shared secret, which PyJWT itself refuses to do."""
    import hashlib
    import hmac

    head = raw({"alg": alg, "kid": "r", "typ": "JWT"}, claims(), b"").rpartition(b".")[0]
    return head + b"." + urlsafe_b64encode(hmac.new(secret, head, hashlib.sha256).digest()).rstrip(b"=")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        # Algorithm confusion, and none.
        (lambda: confused("HS256", public_pem(RSA_KEY)), "token_algorithm"),
        (lambda: confused("RS256", public_pem(RSA_KEY)), "token_signature"),
        (lambda: raw({"alg": "none"}, claims(), b""), "token_algorithm"),
        (lambda: raw({"alg": "None", "kid": "r"}, claims(), b""), "token_algorithm"),
        (lambda: token(alg="PS256"), "token_algorithm"),
        (lambda: token(alg="RS512"), "token_algorithm"),
        # A key of another kind under a name that is known.
        (lambda: token(P256, "ES256", "r"), "token_key"),
        (lambda: token(RSA_KEY, "RS256", "e"), "token_key"),
        # Somebody else's key, however the header calls it or brings it along.
        (lambda: token(OTHER_RSA), "token_signature"),
        (lambda: token(OTHER_RSA, kid="other"), "token_key"),
        (lambda: token(OTHER_RSA, kid="../../../../dev/null"), "token_key"),
        (lambda: token(OTHER_RSA, kid="' OR '1'='1"), "token_key"),
        (lambda: token(OTHER_RSA, header={"jwk": jwk(OTHER_RSA.public_key())}), "token_signature"),
        (lambda: token(OTHER_RSA, header={"jku": "https://evil.example/jwks", "x5u": "https://evil.example"}), "token_signature"),
        (lambda: raw({"alg": "RS256", "kid": 5}, claims()), "token_malformed"),
        (lambda: raw({"alg": "RS256", "kid": ["r"]}, claims()), "token_malformed"),
        (lambda: raw({"alg": "RS256", "kid": "k" * 300}, claims()), "token_malformed"),
        (lambda: raw({"alg": ["RS256"], "kid": "r"}, claims()), "token_malformed"),
        (lambda: token(header={"crit": ["exp"]}), "token_malformed"),
        (lambda: raw({"alg": "RS256", "kid": "r", "b64": False, "crit": ["b64"]}, claims()), "token_malformed"),
        # Claims.
        (lambda: token(exp=NOW_S - 10), "token_expired"),
        (lambda: token(nbf=NOW_S + 11), "token_early"),
        (lambda: token(exp=...), "token_claims"),
        (lambda: token(exp=True), "token_claims"),
        (lambda: token(exp="soon"), "token_claims"),
        (lambda: token(exp=[NOW_S + 5]), "token_claims"),
        (lambda: raw({"alg": "RS256", "kid": "r"}, b'{"iss": "%b", "exp": NaN}' % ISSUER.encode()), "token_malformed"),
        (lambda: token(exp=10**400), "token_claims"),
        (lambda: token(nbf="x"), "token_claims"),
        (lambda: token(aud="another"), "token_audience"),
        (lambda: token(aud=["another", "third"]), "token_audience"),
        (lambda: token(aud=...), "token_claims"),
        (lambda: token(aud={"galerne": 1}), "token_audience"),
        (lambda: token(iss="https://login.example.org/two"), "token_issuer"),
        (lambda: token(iss=ISSUER + "/"), "token_issuer"),
        (lambda: raw({"alg": "RS256", "kid": "r"}, claims(iss=[ISSUER])), "token_issuer"),
        (lambda: token(iss=...), "token_issuer"),
        (lambda: token(tenant=...), "token_tenant"),
        (lambda: token(tenant="nobody"), "token_tenant"),
        (lambda: token(tenant=["press", "port"]), "token_tenant"),
        (lambda: token(tenant={"press": 1}), "token_tenant"),
        (lambda: token(tenant="Press"), "token_tenant"),
        # Form and size.
        (lambda: token(padding="x" * 7000), "token_too_large"),
        (lambda: b"eyJ.e30." + b"x" * 20_000, "token_too_large"),
        (lambda: b"eyJ..", "token_malformed"),
        (lambda: raw({"alg": "RS256", "kid": "r"}, b"[" * 4000), "token_malformed"),
        (lambda: raw(b'{"alg": "RS256", "kid": "r", "x": ' + b"[" * 3000, claims()), "token_malformed"),
        (lambda: raw({"alg": "RS256", "kid": "r"}, b"[]"), "token_malformed"),
        (lambda: raw({"alg": "RS256", "kid": "r"}, b"\xff"), "token_malformed"),
        (lambda: token()[:-8] + b"AAAAAAAA", "token_signature"),
    ],
)  # fmt: skip
def test_every_other_token_is_refused_alike(made: Callable[[], bytes], why: str) -> None:
    assert reason(made()) == why


def test_leeway_is_for_clocks_that_differ() -> None:
    assert DOOR.identify(token(exp=NOW_S - 9), NOW_S).tenant_id == "press"
    assert DOOR.identify(token(nbf=NOW_S + 9), NOW_S).tenant_id == "press"


@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda b: b"eyJ" + b) | st.tuples(st.binary(max_size=60), st.binary(max_size=60)).map(lambda p: raw(*p)))  # fmt: skip
def test_any_bytes_are_an_answer(text: bytes) -> None:
    if text.count(b".") == 2:
        assert reason(text).startswith("token_")
    else:
        assert not DOOR.looks_like_one(text)


def test_a_changed_byte_is_no_token() -> None:
    good = token()
    for at in range(0, len(good) - 2, 7):
        changed = good[:at] + (b"A" if good[at : at + 1] != b"A" else b"B") + good[at + 1 :]
        if changed.count(b".") == 2:
            assert reason(changed)


def test_a_token_without_a_key_name_is_taken_where_one_fits() -> None:
    assert DOOR.identify(token(kid=None), NOW_S).tenant_id == "press"
    two = parse(jwks(jwk(RSA_KEY.public_key(), "r"), jwk(OTHER_RSA.public_key(), "s")))
    assert reason(token(kid=None), door(two)) == "token_key"


@pytest.mark.parametrize(
    ("fields", "given", "tenant", "scopes"),
    [
        ({"tenant_claim": "https://a.example/tenant"}, {"https://a.example/tenant": "port"}, "port", {"inference", "models"}),
        ({"tenant_claim": "resource.tenant.id"}, {"resource": {"tenant": {"id": "port"}}}, "port", {"inference", "models"}),
        ({"tenants": {"8f0c": "port"}}, {"tenant": "8f0c"}, "port", {"inference", "models"}),
        ({"tenants": {"g1": "port"}, "tenant_claim": "groups"}, {"groups": ["g0", "g1", 7]}, "port", {"inference", "models"}),
        ({"default_scopes": ["models"]}, {}, "press", {"models"}),
        ({"scopes_claim": "scp"}, {"scp": "openid models inference"}, "press", {"models", "inference"}),
        ({"scopes_claim": "scp"}, {"scp": ["inference", 1, "admin", "ops"]}, "press", {"inference"}),
        ({"scopes_claim": "scp"}, {}, "press", set()),
        ({"scopes_claim": "roles", "scopes": {"Galerne.Ask": "inference"}}, {"roles": ["Galerne.Ask", "models"]}, "press", {"inference"}),
    ],
)  # fmt: skip
def test_claims_say_tenant_and_scopes(fields: Any, given: Any, tenant: str, scopes: set[str]) -> None:
    identity = door(**fields).identify(token(**given), NOW_S)
    assert (identity.tenant_id, identity.scopes) == (tenant, scopes)


def test_no_claim_makes_an_administrator() -> None:
    config = configuration(scopes_claim="scp", tenants={"x": "press", "admins": "port"})
    made = TokenDoor(config)
    made.store("one").replace(KEYS)
    entrance = Door(config, edge=b"e", wall=lambda: NOW_S, tokens=made)
    for extra in ({"scp": "admin ops"}, {"scp": "inference", "admin": True, "role": "admin"}, {"sub": "nadia"}):
        text = token(**{"tenant": "x"} | extra)
        with pytest.raises(NotAdmin):
            entrance.admin({b"authorization": b"Bearer " + text}, {"headers": [], "client": None})
    for wrong in (ADMIN + "x", "sk-port"):
        with pytest.raises((Refused, NotAdmin)):
            entrance.admin({b"authorization": b"Bearer " + wrong.encode()}, {"headers": [], "client": None})
    for scope in ("admin", "ops"):
        with pytest.raises(ValidationError):
            configuration(scopes={"x": scope})


def test_at_the_gateway_tokens_and_keys_stand_side_by_side() -> None:
    metrics = GatewayMetrics(lambda: 0.0)
    app = Gateway(configuration(scopes_claim="scp"), engine_token="t", metrics=metrics, wall=lambda: NOW_S)
    assert app._tokens is not None

    def ask(path: str, text: str, method: str = "GET") -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return await client.request(method, path, headers={"authorization": f"Bearer {text}"}, json={})

        return asyncio.run(go())

    models = token(scp="models").decode()
    unknown = ask("/v1/models", models)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "issuer_unavailable")
    assert int(unknown.headers["retry-after"]) > 0
    app._tokens.store("one").replace(KEYS)
    assert ask("/v1/models", models).status_code == 200
    assert ask("/v1/models", "sk-port").status_code == 200
    refused = ask("/v1/chat/completions", models, "POST")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    assert ask("/ops/state", models).status_code == 403
    expired = ask("/v1/models", token(exp=NOW_S - 60).decode())
    assert (expired.status_code, expired.json()["error"]["message"]) == (401, REFUSED)
    denied = {labels["reason"]: n for labels, n in metrics.counts("galerne_requests_denied")}
    assert denied == {"scope": 1, "not_admin": 1, "token_expired": 1}


# -- remembered tokens


def test_a_token_is_verified_once_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    made, verified = door(), []
    whole = made._verify

    def counted(text: bytes, now_s: float) -> Any:
        verified.append(text)
        return whole(text, now_s)

    monkeypatch.setattr(made, "_verify", counted)
    text = token()
    assert made.identify(text, NOW_S) == made.identify(text, NOW_S + 309)
    assert len(verified) == 1
    assert reason(text, made, NOW_S + 310) == "token_expired"
    # A tenant that is gone, by a reload, is gone at once.
    made.identify(text, NOW_S)
    made.follow(configuration().model_copy(update={"tenants": ()}))
    assert reason(text, made) == "token_tenant"


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "REMEMBERED", 3)
    made = door()
    for number in range(6):
        made.identify(token(ED, "EdDSA", "o", jti=str(number)), NOW_S)
        with pytest.raises(Refused):
            made.identify(token(ED, "EdDSA", "o", jti=f"x{number}", tenant="nobody"), NOW_S)
    assert len(made._verified) == 3


# -- keys of an issuer


def test_what_could_not_check_a_signature_is_no_key() -> None:
    public = RSA_KEY.public_key()
    private = RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True)
    bad = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "a"},
        jwk(public, "b", use="enc"),
        jwk(public, "c", key_ops=["encrypt"]),
        jwk(public, "d", alg="HS256"),
        jwk(public, "e", alg="RSA-OAEP"),
        private | {"kid": "f"},
        jwk(WEAK_RSA.public_key(), "g"),
        jwk(P256.public_key(), "h", crv="secp256k1"),
        {"kty": "RSA", "n": "!!", "e": "AQAB", "kid": "i"},
        {"kty": "RSA", "kid": "j"},
        jwk(public, kid=None, kid2=1) | {"kid": 7},
        7,
    ]
    for row in bad:
        with pytest.raises(KeysError, match="no key"):
            parse(json.dumps({"keys": [row]}).encode())
    found = parse(json.dumps({"keys": [*bad, jwk(public, "good", alg="RS256", use="sig")]}).encode())
    assert [(key.kid, key.algorithms) for key in found] == [("good", {"RS256"})]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"keys": {}}', b"\xff", b"[" * 10_000, b'{"keys": [' + b"{}," * MAX_KEYS + b"{}]}", b" " * (MAX_BYTES + 1)],
)  # fmt: skip
def test_a_document_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(KeysError):
        parse(content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"jwks_file": None, "jwks_url": "http://login.example.org/keys"}, "https"),
        ({"jwks_file": None, "jwks_url": "file:///etc/passwd"}, "https"),
        ({"jwks_file": None, "jwks_url": "https://user:secret@login.example.org/"}, "password"),
        ({"jwks_file": None}, "either"),
        ({"jwks_url": "https://login.example.org/keys"}, "either"),
        ({"jwks_file": "keys.json"}, "whole path"),
        ({"algorithms": ["HS256"]}, "RS256"),
        ({"algorithms": ["none"]}, "RS256"),
        ({"algorithms": []}, "at least 1"),
        ({"audience": []}, "at least 1"),
    ],
)
def test_what_would_not_be_safe_cannot_be_configured(fields: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configuration(**fields)


def issuer(**fields: Any) -> OidcConfig:
    return OidcConfig.model_validate(
        {"id": "one", "issuer": ISSUER, "audience": ["a"], "tenant_claim": "t", "jwks_file": "/x"} | fields
    )


class Issuer(BaseHTTPRequestHandler):
    """Answers with what the server was told to."""

    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/elsewhere")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        for at in range(0, len(body), step := getattr(self.server, "step", MAX_BYTES * 2)):
            self.wfile.write(body[at : at + step])
            time.sleep(0.05 if step == 1 else 0)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    made = HTTPServer(("127.0.0.1", 0), Issuer)
    Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_keys_are_fetched_within_bounds(server: HTTPServer) -> None:
    config = issuer(jwks_file=None, jwks_url=f"http://127.0.0.1:{server.server_port}/keys", timeout_s=5)
    server.answer = (200, jwks(jwk(RSA_KEY.public_key(), "r")))  # type: ignore[attr-defined]
    assert [key.kid for key in parse(read_keys(config))] == ["r"]
    for status, body in ((302, b""), (500, b"x"), (200, b" " * (MAX_BYTES + 1))):
        server.answer = (status, body)  # type: ignore[attr-defined]
        with pytest.raises(KeysError):
            read_keys(config)


def test_a_slow_issuer_is_given_up(server: HTTPServer) -> None:
    config = issuer(jwks_file=None, jwks_url=f"http://127.0.0.1:{server.server_port}/keys", timeout_s=0.2)
    server.answer, server.step = (200, b" " * 20), 1  # type: ignore[attr-defined]
    with pytest.raises(KeysError, match="not whole"):
        read_keys(config)


async def test_keys_are_renewed_kept_and_given_up(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(jwk(RSA_KEY.public_key(), "r")))
    now_s, told, slept = 0.0, [], []
    store = KeyStore(issuer(jwks_file=str(path), refresh_s=60, keep_s=100), clock=lambda: now_s)
    naps: asyncio.Queue[None] = asyncio.Queue()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await naps.get()

    async def renewed(count: int) -> None:
        deadline_s = time.monotonic() + 10
        while len(told) < count:
            assert time.monotonic() < deadline_s
            if naps.empty():
                naps.put_nowait(None)
            await asyncio.sleep(0.001)

    assert store.candidates("r", "RS256") is None
    running = asyncio.create_task(store.run(told.append, sleep=sleep))
    await renewed(1)
    assert len(store.candidates("r", "RS256") or ()) == 1
    # The issuer changes its keys: those of before vouch for nothing.
    path.write_bytes(jwks(jwk(OTHER_RSA.public_key(), "s")))
    assert store.candidates("s", "RS256") == ()
    await renewed(2)
    assert store.candidates("r", "RS256") == ()
    assert len(store.candidates("s", "RS256") or ()) == 1
    # It cannot be read: kept, then given up.
    path.write_bytes(b"oops")
    await renewed(4)
    now_s = 100.0
    assert len(store.candidates("s", "RS256") or ()) == 1
    now_s = 101.0
    assert store.candidates("s", "RS256") is None
    assert told[:2] == [True, True]
    assert not any(told[2:])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_key_that_is_not_known_is_asked_for_and_not_too_often() -> None:
    asked, told = 0, []

    def read(_: OidcConfig) -> bytes:
        nonlocal asked
        asked += 1
        return jwks(jwk(RSA_KEY.public_key(), "r"))

    waits: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(seconds: float) -> None:
        waits.append((seconds, asyncio.get_running_loop().create_future()))
        await waits[-1][1]

    store = KeyStore(issuer(refresh_s=300))
    running = asyncio.create_task(store.run(told.append, read=read, sleep=sleep))
    while not waits:
        await asyncio.sleep(0.001)
    for _ in range(100):
        assert store.candidates("new", "RS256") == ()
    await asyncio.sleep(0.01)
    # However many ask: not before the shortest interval is over.
    assert (asked, waits[0][0]) == (1, 10.0)
    waits[0][1].set_result(None)
    while len(told) < 2:
        await asyncio.sleep(0.001)
    assert asked == 2
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_without_any_key_there_is_no_answer_but_later() -> None:
    with pytest.raises(Unavailable):
        door(keys=None).identify(token(), NOW_S)
