"""A tenant's salt replaces what a client sends, in any spelling, and changes nothing else of a body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import bounds
from serving.api.cache_salt import CacheSalts
from serving.config import LimitsConfig

SALTS = CacheSalts("secret", ["press", "employment"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
SPACES = st.text(" \t\r\n", max_size=4)


@given(
    st.dictionaries(st.text(), VALUES, min_size=1),
    SPACES,
    SPACES,
    st.booleans(),
)
def test_the_engine_reads_the_same_body_with_the_tenants_salt(
    given_body: dict[str, Any], before: str, after: str, ascii_only: bool
) -> None:
    body = (before + json.dumps(given_body, ensure_ascii=ascii_only) + after).encode("utf-8", "surrogatepass")
    found = json.loads(SALTS.into(body, "press"))
    salt = found.pop("cache_salt")
    assert len(salt) == 64
    given_body.pop("cache_salt", None)
    assert found == given_body


@pytest.mark.parametrize("key", ['"cache_salt"', '"cache\\u005fsalt"', '"\\u0063ache_salt"'])
def test_a_clients_own_salt_is_void(key: str) -> None:
    body = b'{"model": "m", %b: "guessed"} ' % key.encode()
    assert json.loads(SALTS.into(body, "press"))["cache_salt"] not in {"guessed", ""}


def test_salts_differ_by_tenant_and_secret_and_are_the_same_in_every_gateway() -> None:
    def salt(secret: str, tenant: str) -> str:
        body = CacheSalts(secret, [tenant]).into(b'{"a":1}', tenant)
        return str(json.loads(body)["cache_salt"])

    assert salt("secret", "press") == salt("secret", "press")
    assert len({salt("secret", "press"), salt("secret", "employment"), salt("other", "press")}) == 3


def test_what_is_salted_is_still_within_bounds() -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
    limits = LimitsConfig()
    kind = bounds.BodyKind.CHAT
    assert bounds.read(kind, SALTS.into(body, "press"), limits) == bounds.read(kind, body, limits)
