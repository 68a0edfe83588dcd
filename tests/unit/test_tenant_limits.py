"""Bounds of a tenant's own: narrower than the cluster's, and in force for a request that names no number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.admission.bounds import BodyKind, read
from serving.admission.output_default import bounded
from serving.config import GalerneConfig, LimitsConfig, TenantLimitsConfig
from tests.unit.test_gateway import AUTH, CHAT, COMPLETIONS, FAST, Rig, configuration, rig

OTHER = {"authorization": "Bearer sk-other"}
LIMITS = LimitsConfig()


def with_limits(made: Rig, **limits: Any) -> None:
    """Reload with limits of the first tenant's own."""
    found = configuration().model_dump()
    found["tenants"][0]["limits"] = limits
    made.gateway.reload(GalerneConfig.model_validate(found))


@pytest.mark.parametrize(
    ("limits", "fields", "param"),
    [
        ({"n": 1}, {"n": 2}, "n"),
        ({"output_tokens": 5}, {"max_tokens": 6}, "max_tokens"),
        ({"messages": 1}, {"messages": CHAT["messages"] * 2}, "messages"),
        ({"stop_sequences": 1}, {"stop": ["a", "b"]}, "stop"),
        ({"logprobs": 0}, {"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
        ({"body_bytes": 200}, {"messages": [{"role": "user", "content": "x" * 300}]}, None),
    ],
)
async def test_they_hold_for_this_tenant_alone(limits: Any, fields: Any, param: str | None) -> None:
    async with rig(FAST) as made:
        with_limits(made, **limits)
        mine = await made.http.post(COMPLETIONS, headers=AUTH, json=CHAT | fields)
        assert mine.status_code == (413 if param is None else 400)
        assert mine.json()["error"]["param"] == param
        theirs = await made.http.post(COMPLETIONS, headers=OTHER, json=CHAT | fields)
        assert theirs.status_code == 200, theirs.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_names_no_number_gets_the_tenants(stream: bool) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"} | {"max_completion_tokens": None}
    body |= {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    async with rig(FAST) as made:
        with_limits(made, output_tokens=3)
        used = []
        for headers in (AUTH, OTHER):
            text = (await made.http.post(COMPLETIONS, headers=headers, json=body)).text
            rows = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.strip().endswith("}")]
            used.append(next(row["usage"]["completion_tokens"] for row in rows if row.get("usage")))
        assert used[0] == 3
        assert used[1] > 3


BODIES = {
    BodyKind.CHAT: (CHAT["messages"], "messages", "max_completion_tokens"),
    BodyKind.RESPONSES: ("x", "input", "max_output_tokens"),
    BodyKind.COMPLETION: ("x", "prompt", None),
    BodyKind.EMBEDDING: ("x", "input", None),
}


@given(
    st.sampled_from(sorted(BODIES)),
    st.sampled_from([None, 1, 0]),
    st.sampled_from(["", " ", "\n\t "]),
    st.integers(1, 10**6),
)
def test_what_is_added_is_what_the_engine_reads(kind: BodyKind, given_: int | None, end: str, tokens: int) -> None:
    value, name, field = BODIES[kind]
    sent = {"model": "m", name: value} | ({field: given_} if field else {})
    body = (json.dumps(sent) + end).encode()
    facts = read(kind, body, LIMITS)
    whole, known = bounded(kind, body, facts, tokens)
    if field is None or given_ is not None:
        assert (whole, known) == (body, facts)
        return
    assert json.loads(whole) == sent | {field: tokens}
    assert read(kind, whole, LIMITS.model_copy(update={"output_tokens": 10**6})) == known


def test_without_a_bound_of_its_own_nothing_is_touched() -> None:
    body = json.dumps(CHAT | {"max_tokens": None}).encode()
    facts = read(BodyKind.CHAT, body, LIMITS)
    assert bounded(BodyKind.CHAT, body, facts, None) == (body, facts)


def test_they_only_narrow() -> None:
    found = configuration().model_dump()
    for name, value in TenantLimitsConfig.model_fields.items():
        assert value.default is None
        if getattr(LIMITS, name) is None:
            found["limits"][name] = 100
        found["tenants"][0]["limits"] = {name: (getattr(LIMITS, name) or 100) + 1}
        with pytest.raises(ValidationError, match="cluster's own limit" if name != "body_bytes" else "at most 200000"):
            GalerneConfig.model_validate(found)
    assert set(LimitsConfig.model_fields) - set(TenantLimitsConfig.model_fields) == {"header_bytes", "header_count"}
    assert TenantLimitsConfig(n=4).within(LIMITS.model_copy(update={"n": 2})).n == 2
