"""API keys: who is let in, and that every other header gets one of three answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from serving.api.auth import Door, Identity, KeyRing, Refused, digest, new_key
from serving.api.auth.denials import BURST, Denials
from serving.api.auth.identity import MISSING, REFUSED, WRONG_SCHEME, NotAdmin
from serving.api.auth.keys import MAX_KEY_BYTES
from serving.config import DEFAULT_SCOPES, SCOPES, GalerneConfig
from serving.errors import Forbidden, Unauthenticated

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
PLAIN, DIGEST = new_key()
OLD, ADMIN = "sk-old", "sk-admin"


def key(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "sha256": digest(f"sk-{name}")} | fields


CONFIG = GalerneConfig.model_validate(
    {
        "models": [{"id": name, "source": f"fake:{name}"} for name in "abc"],
        "limits": {"n": 4},
        "tenants": [
            {
                "id": "press",
                "keys": [key("newsroom", sha256=DIGEST), key("half", models=["b"], scopes=["models"])],
                "models": ["a", "b"],
                "limits": {"n": 2, "output_tokens": 100},
            },
            {"id": "port", "keys": [key("old", expires=date(2026, 5, 31)), key("gone", revoked=True)]},
            {
                "id": "last",
                "keys": [
                    key("day", expires=date(2026, 6, 1)),
                    key("minute", expires=NOW + timedelta(seconds=60)),
                    key("zone", expires=datetime.fromisoformat("2026-06-01T13:59:59+02:00")),
                    key("office", networks=["10.0.0.0/8", "2001:db8::/32"]),
                ],
            },
        ],
        "admins": [{"id": "nadia", "sha256": digest(ADMIN)}, {"id": "past", "sha256": digest("sk-a"), "revoked": True}],
    }
)
RING = KeyRing(CONFIG.tenants, CONFIG.limits)


def door(now: datetime = NOW) -> Door:
    return Door(CONFIG, edge=b"proof", wall=now.timestamp)


def enter(header: bytes | None, now: datetime = NOW, client: str = "192.0.2.1") -> Identity:
    headers = {} if header is None else {b"authorization": header}
    return door(now).enter(headers, {"headers": list(headers.items()), "client": (client, 1)})


def refusal(header: bytes | None, **when: Any) -> str:
    with pytest.raises(Unauthenticated) as caught:
        enter(header, **when)
    return caught.value.message


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER ", b"  Bearer   "])
def test_a_known_key_is_let_in(scheme: bytes) -> None:
    identity = enter(scheme + PLAIN.encode() + b" ")
    assert (identity.tenant_id, identity.key_id, identity.models) == ("press", "newsroom", frozenset({"a", "b"}))
    assert identity.scopes == frozenset(DEFAULT_SCOPES)
    # What the whole tenant uses is for keys that say so.
    assert set(SCOPES) - identity.scopes == {"usage"}


def test_a_tenants_limits_narrow_the_clusters() -> None:
    identity = enter(b"Bearer " + PLAIN.encode())
    assert identity.limits is not None
    assert (identity.limits.n, identity.limits.best_of) == (2, CONFIG.limits.best_of)
    assert identity.output_tokens == identity.limits.output_tokens == 100
    # Nothing of its own: the cluster's, without a copy.
    assert enter(b"Bearer sk-day").limits is None


def test_a_key_may_be_narrower_than_its_tenant() -> None:
    identity = enter(b"Bearer sk-half")
    assert identity.models == {"b"}
    identity.require("models")
    with pytest.raises(Forbidden, match="inference"):
        identity.require("inference")


def test_nobody_has_a_scope_by_default() -> None:
    with pytest.raises(Forbidden):
        Identity("press", "x", None).require("inference")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("day", datetime(2026, 6, 1, 23, 59, 59, tzinfo=UTC), datetime(2026, 6, 2, tzinfo=UTC)),
        ("minute", NOW + timedelta(seconds=59), NOW + timedelta(seconds=60)),
        ("zone", NOW - timedelta(seconds=2), NOW),
    ],
)
def test_a_date_is_its_last_good_day_and_a_time_the_first_bad_moment(name: str, good: datetime, bad: datetime) -> None:
    assert enter(f"Bearer sk-{name}".encode(), now=good).tenant_id == "last"
    assert refusal(f"Bearer sk-{name}".encode(), now=bad) == REFUSED


@pytest.mark.parametrize(
    ("text", "reason", "tenant", "name"),
    [
        ("Bearer sk-old", "expired", "port", "old"),
        ("Bearer sk-gone", "revoked", "port", "gone"),
        ("Bearer sk-office", "network", "last", "office"),
        ("Bearer sk-nobody", "unknown", "", ""),
        ("Basic x", "scheme", "", ""),
        ("", "missing", "", ""),
    ],
)
def test_only_the_operator_hears_why(text: str, reason: str, tenant: str, name: str) -> None:
    with pytest.raises(Refused) as caught:
        enter(text.encode())
    assert (caught.value.reason, caught.value.tenant_id, caught.value.key_id) == (reason, tenant, name)
    if reason not in {"scheme", "missing"}:
        assert caught.value.message == REFUSED


def test_a_key_is_good_from_its_networks_alone() -> None:
    for client in ("10.1.2.3", "2001:db8::7", "::ffff:10.1.2.3"):
        assert enter(b"Bearer sk-office", client=client).key_id == "office"
    for client in ("11.0.0.1", "2001:db9::1", "10.1.2", ""):
        assert refusal(b"Bearer sk-office", client=client) == REFUSED


def test_an_administrator_is_nobody_elsewhere_and_a_tenant_no_administrator() -> None:
    def admin(text: str) -> str:
        return door().admin({b"authorization": f"Bearer {text}".encode()}, {"headers": [], "client": ("192.0.2.1", 1)})

    assert admin(ADMIN) == "nadia"
    assert refusal(f"Bearer {ADMIN}".encode()) == REFUSED
    with pytest.raises(NotAdmin):
        admin(PLAIN)
    for text in ("sk-a", "sk-old", "sk-nobody"):
        with pytest.raises(Refused):
            admin(text)


def test_a_flood_of_refusals_is_counted_and_not_written_down() -> None:
    counted: list[tuple[str, str]] = []
    times: Iterator[float] = iter([0.0] * 1001 + [1.0])
    denials = Denials(lambda tenant, reason: counted.append((tenant, reason)), lambda: next(times))
    with capture_logs() as lines:
        for _ in range(1001):
            denials.note(Refused("unknown"), "id")
    assert len(counted) == 1001
    assert len(lines) == BURST + 1
    assert lines[-1]["untold"] == 1000 - BURST


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
@given(st.binary(max_size=600) | st.binary(max_size=300).map(lambda key: b"Bearer " + key))
def test_any_bytes_are_an_answer(header: bytes) -> None:
    with pytest.raises(Unauthenticated) as caught:
        enter(header)
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
    assert "8 keys" in repr(RING)
    assert DIGEST not in caplog.text
