"""The engine's account of a request: what was computed for it, whoever has left."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serving.engine import vllm_work, work
from serving.engine.work import Accounts, Done, current
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, TOKEN, rig

PATH = "/galerne/work"


def told(accounts: Accounts, request_id: str) -> dict[str, Any]:
    answer = accounts.answer(f"{PATH}/{request_id}")
    assert answer is not None
    found: dict[str, Any] = json.loads(answer)
    return found


class Processor:
    """vLLM's output processor, as far as accounts go."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def add_request(self, request: Any, prompt: str | None, parent_req: Any = None) -> None:
        self.request_states[request.request_id] = SimpleNamespace(
            request_id=request.request_id,
            parent_req=parent_req,
            prompt_len=7,
            is_prefilling=True,
            num_cached_tokens=0,
            stats=SimpleNamespace(num_generation_tokens=0),
        )

    def step(self, sequence: str, cached: int = 0) -> None:
        state = self.request_states[sequence]
        if state.is_prefilling:
            state.is_prefilling, state.num_cached_tokens = False, cached
        state.stats.num_generation_tokens += 1

    def _finish_request(self, req_state: Any) -> None:
        del self.request_states[req_state.request_id]

    def abort_requests(self, request_ids: Any, internal: bool) -> list[str]:
        return [i for i in request_ids if self.request_states.pop(i, None) is not None]


def test_sequences_that_share_a_prompt() -> None:
    processor, accounts = Processor(), Accounts()
    vllm_work.watch(processor)
    current.set(accounts.open("a"))
    parent = SimpleNamespace(request_id="p")
    for sequence in ("0", "1", "2"):
        processor.add_request(SimpleNamespace(request_id=sequence), None, parent)
    processor.step("0", cached=2)
    processor.step("0")
    processor.step("1", cached=6)
    state = processor.request_states["0"]
    processor._finish_request(state)
    assert not told(accounts, "a")["final"]
    processor.abort_requests(["1", "2"], internal=True)
    processor.abort_requests(["1", "2"], internal=True)
    accounts.close("a")
    assert told(accounts, "a") == {
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "completion_tokens": 3,
        # The third sequence never had its prompt computed.
        "counted_prompt_tokens": 14,
        "counted_cached_tokens": 8,
        "final": True,
    }


def test_an_account_is_open_while_its_request_is() -> None:
    accounts = Accounts()
    account = accounts.open("a")
    assert not told(accounts, "a")["final"]
    account.began(1, lambda: Done(1, 5, 0, 3))
    under_way = json.loads(accounts.answer(PATH) or b"")["under_way"]
    assert under_way == {"counted_prompt_tokens": 5, "completion_tokens": 3}
    accounts.close("a")
    assert not told(accounts, "a")["final"]
    account.ended(1)
    assert told(accounts, "a")["final"]
    assert told(accounts, "a")["completion_tokens"] == 3


def test_accounts_are_bounded_and_open_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "KEPT", 2)
    accounts = Accounts()
    accounts.open("open")
    for number in range(4):
        accounts.open(str(number))
        accounts.close(str(number))
    kept = [name for name in ("open", "0", "1", "2", "3") if accounts.answer(f"{PATH}/{name}") is not None]
    assert kept == ["open", "2", "3"]


async def test_accounts_are_for_the_gateway_alone() -> None:
    async with rig(FAST) as made:
        assert (await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT)).status_code == 200
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.engines[0].port}") as direct:
            assert (await direct.get(PATH)).status_code == 403
            own = {"x-galerne-engine-token": TOKEN}
            assert (await direct.get(PATH, headers=own)).json()["others"]["completion_tokens"] == 0
            # With a bearer key comes somebody else, whatever id it brings.
            bearer = {"authorization": f"Bearer {TOKEN}", "x-request-id": "its-own"}
            assert (await direct.post(COMPLETIONS, headers=bearer, json=CHAT)).status_code == 200
            assert (await direct.get(PATH, headers=own)).json()["others"]["completion_tokens"] == 6
            assert (await direct.get(f"{PATH}/its-own", headers=own)).status_code == 404
