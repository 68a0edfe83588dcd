"""The gateway's OpenAPI document, and requests made from it: no 5xx, and no status that it does not name."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.api import routes
from serving.api.auth import digest
from serving.api.openapi import document
from serving.config import SCOPES, FakeEngineConfig
from serving.metering.ledger import Ledger
from serving.metering.settings import LedgerSettings
from serving.metering.spill import Spill
from serving.metering.writer import Writer
from tests.unit.test_bounds import BASE
from tests.unit.test_gateway import AUTH, KEY, rig

# A real client may send nonsense of its own accord; what is found here comes from the document.
EXAMPLES = 20
MODELS = {"generate": "chat", "embed": "acme/vectors"}


def test_it_names_every_route_and_no_other() -> None:
    assert set(document()["paths"]) == {*routes.RELAYED, *routes.OWN, routes.MODEL_PREFIX + "{id}"}


@pytest.mark.parametrize("path", routes.RELAYED)
def test_what_the_gateway_takes_fits_its_schema(path: str) -> None:
    found = document()
    ref = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = ref | {"components": found["components"]}
    body = BASE[routes.RELAYED[path].kind]
    jsonschema.Draft202012Validator(schema).validate(body)
    for wrong in ([], {}, body | {"model": 7}):
        assert not jsonschema.Draft202012Validator(schema).is_valid(wrong)


def test_it_is_a_document_of_its_version() -> None:
    found = json.loads(json.dumps(document()))
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    # What is refused everywhere is not offered.
    assert "chat_template" not in found["components"]["schemas"]["Chat"]["properties"]
    assert "image_url" not in found["components"]["schemas"]["Part"]["properties"]


class Served(threading.Thread):
    """The rig on an event loop of its own, for a client that has none."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.directory = directory
        self.url = ""
        self.ready, self.failed = threading.Event(), None
        self.stop = asyncio.Event()
        self.loop = asyncio.new_event_loop()

    def run(self) -> None:
        try:
            self.loop.run_until_complete(self._serve())
        except BaseException as error:
            self.failed = error
        finally:
            self.ready.set()
            self.loop.close()

    async def _serve(self) -> None:
        engine = FakeEngineConfig(decode_ms=0.01)
        told = LedgerSettings(f"sqlite:///{self.directory}/ledger.db", self.directory / "spill", 1.0, 2**24)
        # The table is made; nobody writes to it here.
        assert Writer(Spill(told.spill_dir), told.url, print).drain()
        keys = [{"id": "a", "sha256": digest(KEY), "scopes": SCOPES}]
        async with rig(engine, engine, ledger=Ledger(told, "g", program=None), tenant={"keys": keys}) as made:
            # Two engines, one for each model of the key.
            made.gateway.update_replicas("chat", made.endpoints[:1])
            made.gateway.update_replicas("acme/vectors", made.endpoints[1:])
            self.url = str(made.http.base_url)
            self.ready.set()
            await self.stop.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    served = Served(tmp_path_factory.mktemp("ledger"))
    served.start()
    assert served.ready.wait(20)
    assert served.url, served.failed
    yield served.url
    served.loop.call_soon_threadsafe(served.stop.set)
    served.join(20)
    # The rig's own books: nothing was left under way.
    assert served.failed is None


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SCHEMA = schemathesis.openapi.from_dict(document())


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_made_from_it_breaks_the_gateway(case: Any, url: str) -> None:
    if isinstance(case.body, dict) and case.body.get("model") is not None:
        # A model that exists: what is said of others is another test's.
        route = routes.RELAYED.get(case.path)
        task = "generate" if route is None or "generate" in route.tasks else "embed"
        case.body["model"] = MODELS[task]
        # Long answers only take time.
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body.get(name), int):
                case.body[name] = min(case.body[name], 20)
    case.headers = {**(case.headers or {}), **AUTH}
    response = case.call(base_url=url)
    case.validate_response(response, checks=CHECKS)
