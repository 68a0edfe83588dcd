"""No body that the gateway accepts has vLLM compute what is excluded: random bodies through both, on every route.

GALERNE_DIFFERENTIAL_BODIES sets how many on each route (a few hundred; `make differential` sends 20,000).
"""

from __future__ import annotations

import itertools
import json
import os

import pytest
from pydantic import TypeAdapter

from serving.admission.bounds import BodyKind
from serving.config import LimitsConfig
from tests import differential

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BODIES = int(os.environ.get("GALERNE_DIFFERENTIAL_BODIES", "400"))
# Small enough that bounds are met often.
LIMITS = LimitsConfig(prompt_logprobs=4096, output_tokens=4096, prompt_tokens=4096)
# Of all bodies of a route at least: else nothing would be compared.
ACCEPTED_SHARE = 0.05


@pytest.fixture(scope="module")
def adapters() -> dict[BodyKind, TypeAdapter[object]]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return differential.classes()


@pytest.mark.parametrize("kind", list(BodyKind))
def test_what_passes_means_no_more_to_vllm(kind: BodyKind, adapters: dict[BodyKind, TypeAdapter[object]]) -> None:
    adapter = adapters[kind]
    names = differential.fields(adapter)
    assert len(names) >= 1
    passed = compared = 0
    for body in itertools.islice(differential.bodies(kind, names, seed=1), BODIES):
        text = json.dumps(body).encode()
        facts = differential.accepted(kind, text, LIMITS)
        if facts is None:
            continue
        passed += 1
        request = differential.parsed(adapter, text)
        if request is None:
            continue
        compared += 1
        found = differential.judge(kind, facts, request, LIMITS)
        assert not found, (found, body)
    print(f"\n{kind}: {BODIES} bodies over {len(names)} fields, {passed} passed the gateway, {compared} vLLM's classes")
    assert compared >= ACCEPTED_SHARE * BODIES
