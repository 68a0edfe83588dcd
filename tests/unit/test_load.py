"""What an engine's port says of its load: the header, whose requests are whose, vLLM's own word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.load import EngineLoad, Said, Share, Shares, read, signed, written
from serving.engine.vllm_load import VllmLoad

COUNT = st.integers(0, 10**9)


@given(running=COUNT, waiting=COUNT, permille=st.integers(0, 1000), others=st.tuples(COUNT, COUNT, COUNT))
def test_what_is_written_is_read(running: int, waiting: int, permille: int, others: tuple[int, int, int]) -> None:
    said = Said(EngineLoad(running, waiting, permille / 1000), Share(*others))
    assert read(written(said)) == said
    assert read(written(said) + b",7,x") == said, "what a later version says beyond is passed over"


@pytest.mark.parametrize("value", [b"", b"1", b"1,2,3,4,5", b"1,2,3,4,5,x", b"1,2,3,4,5,-1", b"1.5,0,0,0,0,0"])
def test_what_is_no_load_says_nothing(value: bytes) -> None:
    assert read(value) is None


def test_each_gateway_is_told_of_the_others() -> None:
    shares = Shares()
    first = shares.begin(signed(b"one", 100, 40))
    second = shares.begin(signed(b"two", 1000, 1000))
    stranger = shares.begin()
    assert shares.others(b"one") == Share(2, 1000, 1000)
    assert shares.others(signed(b"two", 5, 5)) == Share(2, 100, 40)
    assert shares.others(b"three") == shares.others() == Share(3, 1100, 1040)
    first.answered()
    first.answered()
    assert shares.others(b"two") == Share(2, 100, 0)
    for visit in (first, second, stranger, second):
        visit.end()
    assert shares.others(b"one") == Share()
    assert not shares._by_gateway, "no name stays"


@pytest.mark.parametrize("header", [b"one", b"one,", b"one,x,y", b"one,-5,-6", b"one,1,2,3"])
def test_numbers_that_are_none_count_as_nothing(header: bytes) -> None:
    shares = Shares()
    visit = shares.begin(header)
    assert (shares.others(b"two"), shares.others(b"one")) == (Share(1, 0, 0), Share())
    visit.end()


def test_vllms_word_is_its_last_over_all_cores() -> None:
    load = VllmLoad()
    assert load.now() == EngineLoad()
    loggers = [load.logger(None, core) for core in (0, 1)]
    for logger, (running, waiting, skipped, use) in zip(loggers, [(3, 1, 1, 0.5), (2, 0, 0, 0.3)], strict=True):
        stats = SimpleNamespace(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_skipped_waiting_reqs=skipped,
            kv_cache_usage=use,
        )
        logger.record(stats, None, mm_cache_stats=None, engine_idx=0)
    loggers[0].record(None, None)
    assert load.now() == EngineLoad(5, 2, pytest.approx(0.4))
