"""What tenants share of one gateway, requests and bytes of bodies: bounded, and never all of it one tenant's."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission.fair_share import FairShare, Holding, may
from serving.config import FakeEngineConfig
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, Rig, rig

OTHER = {"authorization": "Bearer sk-other"}
FAST = FakeEngineConfig(decode_ms=1)
MIB = 1024 * 1024


def fill(share: FairShare, tenant: str, amount: int = 1) -> int:
    """As many as the tenant may have."""
    count = 0
    while share.may(tenant, amount):
        share.take(tenant, amount)
        count += 1
    return count


def test_a_flood_leaves_a_ninth() -> None:
    share = FairShare(4096, 2)
    assert fill(share, "flood") == 3641
    assert not share.full
    assert share.may("light")
    share.give("flood")
    assert share.may("flood")


def test_a_flood_of_large_bodies_leaves_room_for_others() -> None:
    share = FairShare(512 * MIB, 2)
    assert fill(share, "flood", 4 * MIB) == 114
    assert fill(share, "light", 4 * MIB) > 1


def test_a_tenant_without_others_may_have_all() -> None:
    share = FairShare(100, 1)
    assert fill(share, "only") == 100
    assert share.full


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 9)), max_size=400))
def test_the_bound_holds_and_nothing_is_kept_of_who_has_left(most: int, steps: list[tuple[int, int]]) -> None:
    share = FairShare(most, 5)
    held: list[list[Holding]] = [[] for _ in range(5)]
    for number, amount in steps:
        tenant = f"t{number}"
        if amount >= 0:
            holding = Holding(share, tenant)
            if holding.grow(amount):
                held[number].append(holding)
            assert holding.amount in {0, amount}
        elif held[number]:
            held[number][-1].end()
            held[number].pop().end()  # a second time, which changes nothing
        assert share.used == sum(holding.amount for mine in held for holding in mine) <= most
        # Whoever has nothing comes in while anything is free.
        assert may(0, share.used, most, 5) == (not share.full)
    assert share.holders == sum(any(holding.amount for holding in mine) for mine in held)


async def unfinished(made: Rig, headers: dict[str, str], length: int | None, body: bytes) -> asyncio.StreamWriter:
    """A request whose body does not end; a length of None is a chunked one."""
    _, writer = await asyncio.open_connection("127.0.0.1", made.http.base_url.port)
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: {headers['authorization']}\r\n{framing}\r\n\r\n"
    writer.write(head.encode() + (body if length is not None else b"%x\r\n%b\r\n" % (len(body), body)))
    return writer


async def test_bodies_that_never_come_do_not_lock_others_out() -> None:
    async with rig(FAST, max_ongoing_requests=64) as made:
        writers = [await unfinished(made, AUTH, 1000, b"{") for _ in range(80)]
        while made.gateway.ongoing.used < 57:
            await asyncio.sleep(0.01)
        refused = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await made.http.post(COMPLETIONS, headers=OTHER, json=CHAT)).status_code == 200
        for writer in writers:
            writer.close()
        while made.gateway.ongoing.used:
            await asyncio.sleep(0.01)
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200


@pytest.mark.parametrize("length", [150_000, None])
async def test_large_bodies_that_never_end_are_bounded_by_their_bytes(length: int | None) -> None:
    """Of 40 bodies of 150 kB a gateway that takes 1 MB of them holds six at most, and another tenant's still fits."""
    async with rig(FAST, max_ongoing_body_bytes=1_000_000) as made:
        writers = [await unfinished(made, AUTH, length, b"{" + b" " * 149_000) for _ in range(40)]
        while made.total("galerne_requests_shed_total") < 34:
            assert made.gateway.bodies.used <= 1_000_000
            await asyncio.sleep(0.01)
        large = CHAT | {"messages": [{"role": "user", "content": "x" * 50_000}]}
        refused = await made.http.post(COMPLETIONS, headers=AUTH, json=large | {"user": "y" * 100_000})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await made.http.post(COMPLETIONS, headers=OTHER, json=large)).status_code == 200
        for writer in writers:
            writer.close()
        while made.gateway.bodies.used:
            await asyncio.sleep(0.01)
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=large)).status_code == 200


async def test_a_stream_that_has_begun_holds_no_body() -> None:
    async with rig(FakeEngineConfig(decode_ms=5)) as made:
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 100, "ignore_eos": True, "user": "z" * 100_000})
        async with made.http.stream("POST", COMPLETIONS, headers=AUTH, content=body) as answer:
            events = answer.aiter_lines()
            await anext(events)
            assert made.gateway.ongoing.used == 1
            assert made.gateway.bodies.used == 0
            assert [line async for line in events][-2:] == ["data: [DONE]", ""]
