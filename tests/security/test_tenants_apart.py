"""Between tenants (THREATS 13, 14, 16, 18): no key widens itself, no cache tells, no error names what is another's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from serving.api.auth import digest
from serving.api.ops import PATHS
from serving.config import FakeEngineConfig, FakeFaults
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, KEY, TOKEN, Rig, configuration, rig

ADMIN = "sk-admin-0123456789"
OTHER = {"authorization": "Bearer sk-other"}
PREFIX = CHAT | {"messages": [{"role": "user", "content": "a prefix of several blocks " * 40}]}


def with_admin(made: Rig) -> None:
    """Reload with an administrator."""
    found = configuration().model_dump() | {"admins": [{"id": "nadia", "sha256": digest(ADMIN)}]}
    made.gateway.reload(type(configuration()).model_validate(found))


METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")
TRICKS: list[dict[str, str]] = [
    {},
    {"x-admin": "true", "x-galerne-admin": "nadia"},
    {"x-original-url": "/ops/state", "x-rewrite-url": "/ops/state"},
    {"x-api-key": ADMIN, "cookie": f"authorization=Bearer {ADMIN}"},
    {"x-forwarded-user": "nadia", "forwarded": "for=127.0.0.1"},
    {"proxy-authorization": f"Bearer {ADMIN}"},
]


async def test_no_tenants_key_reaches_what_is_an_administrators() -> None:
    async with rig(FAST) as made:
        with_admin(made)
        forbidden = 0
        for method in METHODS:
            for trick in TRICKS:
                answer = await made.http.request(method, "/ops/state", headers=AUTH | trick)
                assert answer.status_code == 403, trick
                forbidden += 1
            # Nor by what it asks for in the query, where nothing is read.
            answer = await made.http.request(method, f"/ops/state?key={ADMIN}&admin=1", headers=AUTH)
            assert answer.status_code == 403
            forbidden += 1
            for path in ("/ops/state/", "//ops/state", "/ops//state", "/OPS/state"):
                answer = await made.http.request(method, path, headers=AUTH)
                assert answer.status_code in {404, 405}, path
        assert made.total("galerne_requests_denied_total", tenant="press", reason="not_admin") == forbidden


async def test_an_administrators_key_opens_nothing_of_a_tenants() -> None:
    async with rig(FAST) as made:
        with_admin(made)
        admin = {"authorization": f"Bearer {ADMIN}"}
        assert (await made.http.get("/ops/state", headers=admin)).status_code == 200
        for path in ("/v1/models", "/version"):
            assert (await made.http.get(path, headers=admin)).status_code == 401
        assert (await made.http.post(COMPLETIONS, headers=admin, json=CHAT)).status_code == 401
        assert PATHS  # there is something to reach


async def test_guesses_at_an_administrators_key_are_counted_wherever_they_stand() -> None:
    async with rig(FAST) as made:
        with_admin(made)
        for guess in ("sk-wrong", "nadia", OTHER["authorization"].removeprefix("Bearer ")):
            answer = await made.http.post(COMPLETIONS, headers=AUTH | {"x-galerne-admin": guess}, json=CHAT)
            assert answer.status_code == 200
            assert "x-galerne-route" not in answer.headers
        assert made.total("galerne_requests_denied_total", reason="unknown") == 2
        assert made.total("galerne_requests_denied_total", tenant="other", reason="not_admin") == 1
        told = await made.http.post(COMPLETIONS, headers=AUTH | {"x-galerne-admin": ADMIN}, json=CHAT)
        assert "x-galerne-route" in told.headers


# An engine takes the last of a key that stands twice, whatever spelling the first has.
SALTS: list[bytes] = [
    b'{"cache_salt": "guess", %b}',
    b'{%b, "cache_salt": "guess"}',
    b'{%b, "cache\\u005fsalt": "guess"}',
    b'{%b, "\\u0063ache_salt": null}',
    b'{%b, "cache_salt": "a", "cache_salt": "b"} \n\t',
]


@pytest.mark.parametrize("form", SALTS)
async def test_no_tenant_hits_what_another_has_cached(form: bytes) -> None:
    inner = json.dumps(PREFIX).encode()[1:-1]

    async with rig(FAST) as made:

        async def cached(headers: dict[str, str], body: bytes) -> int:
            answer = await made.http.post(COMPLETIONS, headers=headers, content=body)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert await cached(AUTH, form.replace(b"%b", inner)) == 0
        assert await cached(OTHER, form.replace(b"%b", inner)) == 0
        # Each its own, whatever salt it names.
        assert await cached(AUTH, b"{%b}" % inner) > 0
        assert await cached(OTHER, form.replace(b"%b", inner)) > 0


INTERNAL = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/work/|/tmp/|/usr/|/home/|127\.0\.0\.1|localhost|0x[0-9a-f]{6,}"
    r"|serving\.|pydantic|msgspec|uvicorn|ray\.|\bError\(|Exception"
)


async def test_no_error_echoes_internals() -> None:
    faults = (
        FakeEngineConfig(faults=FakeFaults(error_rate=1.0)),
        FakeEngineConfig(decode_ms=1, faults=FakeFaults(cut_after_bytes=2000)),
        FAST,
    )
    asked: list[tuple[str, str, dict[str, str], Any]] = [
        ("GET", "/nothing", AUTH, None),
        ("GET", "/v1/models", {}, None),
        ("GET", "/v1/models", {"authorization": "Bearer wrong"}, None),
        ("GET", COMPLETIONS, AUTH, None),
        ("POST", COMPLETIONS, AUTH, b"{"),
        ("POST", COMPLETIONS, AUTH, b"\xff\xfe"),
        ("POST", COMPLETIONS, AUTH, b'{"model": "secret"}'),
        ("POST", COMPLETIONS, AUTH, json.dumps(CHAT | {"n": 10**9})),
        ("POST", COMPLETIONS, AUTH, json.dumps(CHAT | {"model": "secret"})),
        ("POST", COMPLETIONS, AUTH, json.dumps(CHAT | {"messages": "x" * 300_000})),
        ("POST", COMPLETIONS, AUTH, json.dumps(CHAT | {"messages": [{"role": 1}]})),
        ("POST", COMPLETIONS, AUTH, json.dumps(CHAT | {"stream": True, "max_tokens": 500, "ignore_eos": True})),
        ("POST", COMPLETIONS, AUTH, json.dumps(CHAT)),
    ]
    secrets = {TOKEN, KEY, digest(KEY), "sk-other", digest("sk-other"), "other"}
    for fault in faults:
        async with rig(fault) as made:
            for method, path, headers, content in asked:
                answer = await made.http.request(method, path, headers=headers, content=content)
                told = [line for line in answer.text.splitlines() if '"error"' in line]
                for text in told:
                    found = INTERNAL.search(text)
                    assert found is None, (path, found, text)
                    words = set(re.findall(r"[\w.\-/]+", text))
                    assert not words & secrets, text
                if answer.status_code >= 400:
                    assert told, answer.text
