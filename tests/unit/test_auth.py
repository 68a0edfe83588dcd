"""API keys: who is let in, and that every other header gets one of three answers."""

from __future__ import annotations

import logging
from datetime import date
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.api.auth import MAX_KEY_BYTES, MISSING, REFUSED, WRONG_SCHEME, Identity, KeyRing, digest, new_key
from serving.config import KeyConfig, TenantConfig
from serving.errors import Unauthenticated

TODAY = date(2026, 6, 1)
PLAIN, DIGEST = new_key()
OLD = "sk-old"
RING = KeyRing(
    (
        TenantConfig(id="press", keys=(KeyConfig(id="newsroom", sha256=DIGEST),), models=("a", "b")),
        TenantConfig(id="port", keys=(KeyConfig(id="old", sha256=digest(OLD), expires=date(2026, 5, 31)),)),
        TenantConfig(id="last", keys=(KeyConfig(id="day", sha256=digest("sk-day"), expires=TODAY),)),
    )
)


def refusal(header: bytes | None) -> str:
    with pytest.raises(Unauthenticated) as caught:
        RING.identify(header, TODAY)
    return caught.value.message


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER ", b"  Bearer   "])
def test_a_known_key_is_let_in(scheme: bytes) -> None:
    identity = RING.identify(scheme + PLAIN.encode() + b" ", TODAY)
    assert identity == Identity("press", "newsroom", frozenset({"a", "b"}))


def test_no_model_list_means_every_model_and_expiry_is_the_last_good_day() -> None:
    assert RING.identify(b"Bearer sk-day", TODAY) == Identity("last", "day", None)


@pytest.mark.parametrize("header", [None, b"", b"  ", b"\t"])
def test_a_missing_header_says_how_to_send_a_key(header: bytes | None) -> None:
    assert refusal(header) == MISSING


@pytest.mark.parametrize(
    "header",
    [
        b"Bearer",
        b"Bearer ",
        PLAIN.encode(),
        b"Basic " + PLAIN.encode(),
        b"Bearer " + PLAIN.encode() + b" x",
        b"Bearer " + PLAIN.encode() + b", Bearer x",
        b"Bearer\t" + PLAIN.encode(),
        b"Bearer: " + PLAIN.encode(),
    ],
)
def test_another_scheme_is_named(header: bytes) -> None:
    assert refusal(header) == WRONG_SCHEME


@pytest.mark.parametrize(
    "key",
    [
        b"sk-nobody",
        OLD.encode(),
        DIGEST.encode(),
        sha256(PLAIN.encode()).digest().replace(b" ", b"").replace(b",", b"") or b"x",
        PLAIN.encode() + b"\x00",
        PLAIN.encode()[:-1],
        PLAIN.lower().encode() + b"x",
        b"k" * (MAX_KEY_BYTES + 1),
        "sk-ключ".encode(),
        b"\xff\xfe",
    ],
)
def test_unknown_expired_and_odd_keys_get_one_answer(key: bytes) -> None:
    assert refusal(b"Bearer " + key) == REFUSED


# No deadline: a busy machine is no failure.
@settings(deadline=None)
@given(st.binary(max_size=600) | st.binary(max_size=300).map(lambda key: b"Bearer " + key))
def test_any_bytes_are_an_answer(header: bytes) -> None:
    with pytest.raises(Unauthenticated) as caught:
        RING.identify(header, TODAY)
    assert caught.value.message in {MISSING, WRONG_SCHEME, REFUSED}


def test_new_keys_differ_and_match_their_digest() -> None:
    keys = {new_key() for _ in range(50)}
    assert len({plain for plain, _ in keys}) == 50
    for plain, value in keys:
        assert plain.startswith("sk-")
        assert len(plain) >= 40
        assert value == digest(plain) == sha256(plain.encode()).hexdigest()


def test_nothing_printed_holds_a_digest(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").warning("%r %s %r", RING, RING, vars(RING))
    raw = repr(bytes.fromhex(DIGEST))
    for text in (repr(RING), str(RING), repr(list(RING._entries.values()))):
        assert DIGEST not in text
        assert raw not in text
    assert "3 keys" in repr(RING)
    assert DIGEST not in caplog.text
