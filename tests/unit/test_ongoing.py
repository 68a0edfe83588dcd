"""Requests under way at one gateway: bounded, and never all of them one tenant's."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from serving.admission.ongoing import Ongoing, may
from serving.config import FakeEngineConfig
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, rig

OTHER = {"authorization": "Bearer sk-other"}


def fill(ongoing: Ongoing, tenant: str) -> int:
    """As many as the tenant may have."""
    count = 0
    while ongoing.may(tenant):
        ongoing.begin(tenant)
        count += 1
    return count


def test_a_flood_leaves_a_ninth() -> None:
    ongoing = Ongoing(4096, 2)
    assert fill(ongoing, "flood") == 3641
    assert not ongoing.full
    assert ongoing.may("light")
    ongoing.end("flood")
    assert ongoing.may("flood")


def test_a_tenant_without_others_may_have_all() -> None:
    ongoing = Ongoing(100, 1)
    assert fill(ongoing, "only") == 100
    assert ongoing.full


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=400))
def test_the_bound_holds_and_nothing_is_kept_of_who_has_left(most: int, steps: list[tuple[int, bool]]) -> None:
    ongoing, under_way = Ongoing(most, 5), [0] * 5
    for number, comes in steps:
        tenant = f"t{number}"
        if comes and ongoing.may(tenant):
            ongoing.begin(tenant)
            under_way[number] += 1
        elif not comes and under_way[number]:
            ongoing.end(tenant)
            under_way[number] -= 1
        assert ongoing.requests == sum(under_way) <= most
        # Whoever has nothing comes in while anything is free.
        assert may(0, ongoing.requests, most, 5) == (not ongoing.full)
    assert len(ongoing._by_tenant) == sum(count > 0 for count in under_way)


async def test_bodies_that_never_come_do_not_lock_others_out() -> None:
    async with rig(FakeEngineConfig(decode_ms=1), max_ongoing_requests=64) as made:
        writers = []
        for _ in range(80):
            _, writer = await asyncio.open_connection("127.0.0.1", made.http.base_url.port)
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: {AUTH['authorization']}\r\n"
            writer.write(f"{head}content-type: application/json\r\ncontent-length: 1000\r\n\r\n{{".encode())
            writers.append(writer)
        while made.gateway._ongoing.requests < 57:
            await asyncio.sleep(0.01)
        refused = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await made.http.post(COMPLETIONS, headers=OTHER, json=CHAT)).status_code == 200
        for writer in writers:
            writer.close()
        while made.gateway._ongoing.requests:
            await asyncio.sleep(0.01)
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
