"""Profiles: the numbers behind the points come back, and a fake engine at that speed is one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.errors import LoadtestError
from loadtest.profiles.fit import fit, least_squares
from loadtest.profiles.measure import ProfileSettings, measure
from loadtest.profiles.model import DecodePoint, EngineProfile, PrefillPoint, bundled, load_profile
from loadtest.request import Target
from serving.config import FakeEngineConfig
from tests.unit.test_loadtest_truth import GAP_S, truth

DECODE = [(batch, context) for batch in (1, 2, 4, 8, 16) for context in (100, 1000)]


def points(
    rate: float, overhead_s: float, base: float, sequence: float, context: float, attention: float = 0.0
) -> tuple[list[PrefillPoint], list[DecodePoint]]:
    prefill = [
        PrefillPoint(prompt_tokens=n, ttft_s=overhead_s + n / rate + attention * n * n / 1e9)
        for n in (50, 200, 1000, 4000)
    ]
    decode = [
        DecodePoint(batch=b, context_tokens=c, step_s=(base + sequence * b + context * b * c / 1000) / 1e3)
        for b, c in DECODE
    ]
    return prefill, decode


@settings(max_examples=60)
@given(
    st.floats(50, 1e5),
    st.floats(0, 0.5),
    st.floats(1, 100),
    st.floats(0.01, 20),
    st.floats(0.01, 20),
    st.floats(0, 1000),
)
def test_known_numbers_are_found_again(
    rate: float, overhead_s: float, base: float, sequence: float, context: float, attention: float
) -> None:
    found = fit(*points(rate, overhead_s, base, sequence, context, attention))
    assert found.prefill_tokens_per_s == pytest.approx(rate, rel=1e-3)
    assert found.prefill_overhead_ms == pytest.approx(overhead_s * 1e3, rel=1e-3, abs=1e-3)
    assert found.prefill_ms_per_1k_tokens_squared == pytest.approx(attention, rel=1e-3, abs=1e-3)
    assert found.ttft_s(3000) == pytest.approx(overhead_s + 3000 / rate + attention * 9e-3, rel=1e-3)
    assert found.step_s(3, 500) == pytest.approx((base + 3 * sequence + 1.5 * context) / 1e3, rel=1e-2)
    assert found.decode_ms == pytest.approx(base, rel=1e-3)
    assert found.decode_ms_per_sequence == pytest.approx(sequence, rel=1e-2, abs=1e-3)
    assert found.decode_ms_per_1k_context_tokens == pytest.approx(context, rel=1e-2, abs=1e-3)
    assert max(found.prefill_error, found.decode_error) < 1e-3


def test_nothing_is_below_zero_and_what_cannot_be_told_is_zero() -> None:
    # The best line would begin below zero; the best through zero is 1.
    assert least_squares([(1, 1), (1, 2), (1, 3)], [0.5, 2.0, 3.5])[0] == 0.0
    # One batch only: base and per sequence are the same thing.
    same = least_squares([(1, 2), (1, 2)], [4.0, 4.0])
    assert same[0] + 2 * same[1] == pytest.approx(4.0)


def test_prompts_that_take_no_time_have_no_rate() -> None:
    _, decode = points(100, 0, 1, 1, 1)
    with pytest.raises(ValueError, match="did not take longer"):
        fit([PrefillPoint(prompt_tokens=n, ttft_s=0.1 / n) for n in (1, 10, 100, 1000)], decode)


def test_an_engine_of_known_speed_is_measured_as_it_is() -> None:
    """The server waits before its first token and between two; what it did is stamped, so a busy machine shifts both."""
    wanted = ProfileSettings(prompt_tokens=(8, 64), batches=(1, 3), contexts=(8,), repeats=2, output_tokens=5)
    with truth(lambda _number: 0.05) as server:
        prefill, decode = asyncio.run(
            measure(Target("t", "127.0.0.1", server.port), "m", wanted, salt="s", progress=lambda _text: None)
        )
    assert [point.batch for point in decode] == [1, 3]
    assert all(point.ttft_s >= 0.05 for point in prefill)
    assert all(point.step_s >= GAP_S * 0.9 for point in decode)


def document() -> EngineProfile:
    prefill, decode = points(1000, 0.01, 20, 2, 5)
    return EngineProfile(
        name="n",
        model="m",
        when="2026-01-01T00:00:00+00:00",
        simulated=False,
        machine={"cores": 2},
        engine={},
        prefill=tuple(prefill),
        decode=tuple(decode),
        fit=fit(prefill, decode),
    )


def test_a_profile_is_a_fake_engines_speed(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(document().model_dump_json())
    again = load_profile(path)
    assert again == document()
    fake = FakeEngineConfig.model_validate(again.as_fake())
    # The third of the four prompts: 1,000 tokens, a second for them and ten milliseconds before.
    assert fake.prefill_tokens_per_s == pytest.approx(1000 / 1.01, rel=1e-3)
    assert fake.decode_ms == pytest.approx(20, rel=1e-3)
    # Two a sequence, and five a thousand tokens of the larger half's thousand.
    assert fake.decode_ms_per_sequence == pytest.approx(7, rel=1e-2)


@pytest.mark.parametrize("name", bundled())
def test_a_bundled_profile_was_measured_and_fits_or_says_that_it_was_not(name: str) -> None:
    found = load_profile(name)
    assert found.name == name
    FakeEngineConfig.model_validate(found.as_fake())
    assert found.simulated is name.endswith("-published")
    if found.simulated:
        assert "NOT measured here" in found.remarks[0]
        # Its points come from its fit.
        assert all(
            point.ttft_s == pytest.approx(found.fit.ttft_s(point.prompt_tokens), abs=1e-6) for point in found.prefill
        )
        return
    assert fit(found.prefill, found.decode).decode_ms == pytest.approx(found.fit.decode_ms, rel=1e-6)


def test_there_is_a_profile_of_the_bundled_model_on_a_processor() -> None:
    assert "cpu-smollm2-135m" in bundled()


def test_what_is_no_profile_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoadtestError, match="nowhere: no such profile"):
        load_profile("nowhere")
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": 2}))
    with pytest.raises(LoadtestError, match="not an engine's profile"):
        load_profile(path)
