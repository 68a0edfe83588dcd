"""Methods, browsers and compressed bodies: what is answered before a model is looked at, over a real socket."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from pydantic import ValidationError

from serving.api import routes
from serving.config import CorsConfig, GalerneConfig
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, rig

APP = "https://app.example"
PREFLIGHT = {
    "origin": APP,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def open_to(*origins: str) -> Any:
    def change(config: GalerneConfig) -> GalerneConfig:
        gateway = config.gateway.model_copy(update={"cors": CorsConfig(origins=origins, max_age_s=60)})
        return config.model_copy(update={"gateway": gateway})

    return change


async def test_a_page_may_call_where_its_origin_is_named() -> None:
    async with rig(FAST, change=open_to(APP, "http://localhost:5173")) as made:
        asked = await made.http.options(COMPLETIONS, headers=PREFLIGHT)
        assert (asked.status_code, asked.content) == (204, b"")
        assert asked.headers["access-control-allow-origin"] == APP
        assert asked.headers["access-control-allow-methods"] == "POST"
        assert asked.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        assert asked.headers["access-control-max-age"] == "60"
        assert "access-control-allow-credentials" not in asked.headers
        answer = await made.http.post(COMPLETIONS, headers=AUTH | {"origin": APP}, json=CHAT)
        refused = await made.http.post(COMPLETIONS, headers={"origin": APP}, json=CHAT)
        stream = await made.http.post(COMPLETIONS, headers=AUTH | {"origin": APP}, json=CHAT | {"stream": True})
        assert [a.status_code for a in (answer, refused, stream)] == [200, 401, 200]
        for given in (answer, refused, stream):
            assert given.headers["access-control-allow-origin"] == APP
            assert given.headers["vary"] == "origin"
            assert "x-request-id" in given.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", ["https://app.example.evil", "https://APP.example", "null", "http://app.example"])
async def test_a_page_of_another_origin_may_not(origin: str) -> None:
    async with rig(FAST, change=open_to(APP)) as made:
        asked = await made.http.options(COMPLETIONS, headers=PREFLIGHT | {"origin": origin})
        assert asked.status_code == 405
        assert "gateway.cors.origins" in asked.json()["error"]["message"]
        answer = await made.http.post(COMPLETIONS, headers=AUTH | {"origin": origin}, json=CHAT)
        assert answer.status_code == 200
        for given in (asked, answer):
            assert not [name for name in given.headers if name.startswith("access-control")]


async def test_without_a_word_in_the_configuration_no_page_may_call_and_is_told_why() -> None:
    async with rig(FAST) as made:
        for path in (COMPLETIONS, "/v1/models", "/health/live"):
            asked = await made.http.options(path, headers=PREFLIGHT)
            assert asked.status_code == 405, path
            assert asked.headers["allow"] == ", ".join(routes.methods(path))
            assert "gateway.cors.origins" in asked.json()["error"]["message"]
        assert (await made.http.options("/v1/files", headers=PREFLIGHT)).status_code == 404


async def test_every_page_where_all_are_named() -> None:
    async with rig(FAST, change=open_to("*")) as made:
        asked = await made.http.options("/v1/models", headers=PREFLIGHT | {"origin": "https://any.example"})
        assert asked.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://app.example/x", "ftp://a", "https://*.example", "a\nb"]
)
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError):
        CorsConfig(origins=(origin,))


@pytest.mark.parametrize("path", [*routes.RELAYED, *sorted(routes.OWN - {routes.USAGE}), "/v1/models/chat"])
async def test_a_method_that_a_route_does_not_take_is_told_those_that_it_takes(path: str) -> None:
    async with rig(FAST) as made:
        for method in ("DELETE", "PUT", "PATCH"):
            answer = await made.http.request(method, path, headers=AUTH)
            assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
            assert answer.headers["allow"] == ", ".join(routes.methods(path))
        if "GET" in routes.methods(path):
            head, whole = [await made.http.request(method, path, headers=AUTH) for method in ("HEAD", "GET")]
            assert (head.status_code, head.content) == (whole.status_code, b"")


async def test_health_as_vllm_has_it() -> None:
    """A status without a key and without a word, at the root: what tools made for vLLM's servers ask first."""
    async with rig(FAST) as made:
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            answer = await made.http.request(method, path)
            assert (answer.status_code, answer.content) == (200, b"")
        assert (await made.http.post("/health")).status_code == 405
    async with rig() as made:
        answer = await made.http.get("/health")
        assert (answer.status_code, answer.content) == (503, b"")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
async def test_a_compressed_body_is_refused_by_name(coding: str) -> None:
    async with rig(FAST) as made:
        body = gzip.compress(json.dumps(CHAT).encode())
        answer = await made.http.post(COMPLETIONS, headers=AUTH | {"content-encoding": coding}, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_encoding")
        assert answer.headers["accept-encoding"] == "identity"
        plain = await made.http.post(COMPLETIONS, headers=AUTH | {"content-encoding": "identity"}, json=CHAT)
        assert plain.status_code == 200
