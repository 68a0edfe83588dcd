"""Workloads: what a source records is what is planned, in its order, and a wrong line is named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.errors import LoadtestError
from loadtest.workloads import Draft, Setting, data_folder
from loadtest.workloads.azure import AzureWorkload
from loadtest.workloads.jsonl import JsonlWorkload
from loadtest.workloads.mooncake import MooncakeWorkload
from loadtest.workloads.mt_bench import MtBenchWorkload
from loadtest.workloads.synthetic import SyntheticWorkload

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
2023-11-16 18:15:50.9305900,0,55
"""


def _words(draft: Draft) -> list[str]:
    return draft.write(draft.prompt_tokens).split()


def _common(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """The longest beginning that all have."""
    places = takewhile(lambda values: len(set(values)) == 1, zip(*lists, strict=False))
    return [values[0] for values in places]


def _azure(folder: Path, text: str) -> list[Draft]:
    (folder / "azure2023_conv.csv").write_text(text)
    return list(AzureWorkload(kind="azure").drafts(Setting(seed="s", data=folder)))


def test_azure_rows_keep_their_times_and_lengths(tmp_path: Path) -> None:
    drafts = _azure(tmp_path, AZURE)
    assert [(d.at_s, d.prompt_tokens, d.output_tokens) for d in drafts] == [
        (0.0, 374, 44),
        (4.25, 396, 109),
        (4.25, 1, 55),
    ]
    assert [len(_words(draft)) for draft in drafts] == [374, 396, 1]
    assert _common([_words(drafts[0]), _words(drafts[1])]) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (AZURE.replace("396", "many"), ":3: not a row of this trace"),
        (AZURE.replace("50.9305900,396", "40.9305900,396"), ":3: earlier than the row before it"),
        (AZURE.replace("ContextTokens", "Tokens"), ":1: no column ContextTokens"),
        (AZURE + "2023-11-16 18:16:00,1\n", ":5: not a row of this trace"),
    ],
)
def test_a_wrong_azure_row_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(LoadtestError, match=f"azure2023_conv.csv{problem}"):
        _azure(tmp_path, text)


def test_a_missing_data_set_says_what_to_set(tmp_path: Path) -> None:
    for workload in (AzureWorkload(kind="azure"), MooncakeWorkload(kind="mooncake")):
        with pytest.raises(LoadtestError, match=f"{tmp_path}.*set GALERNE_SHARED"):
            next(workload.drafts(Setting(seed="s", data=tmp_path)))
    assert data_folder({"GALERNE_SHARED": "/srv/sets"}) == Path("/srv/sets/data")
    assert data_folder({}).parts[-2:] == ("shared", "data")


def _mooncake(folder: Path, lines: Sequence[dict[str, Any]], **fields: Any) -> list[Draft]:
    (folder / "mooncake_conversation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return list(MooncakeWorkload(kind="mooncake", **fields).drafts(Setting(seed="s", data=folder)))


def _request(blocks: Sequence[int], input_length: int, timestamp: int = 0) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": input_length, "output_length": 9, "hash_ids": list(blocks)}


@settings(max_examples=40)
@given(
    one=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    other=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    last=st.integers(1, 512),
    block_tokens=st.sampled_from([512, 64, 7]),
)
def test_prompts_share_exactly_the_blocks_that_their_hashes_share(
    tmp_path_factory: pytest.TempPathFactory, one: list[int], other: list[int], last: int, block_tokens: int
) -> None:
    lines = [_request(blocks, 512 * (len(blocks) - 1) + last) for blocks in (one, other)]
    drafts = _mooncake(tmp_path_factory.mktemp("data"), lines, block_tokens=block_tokens)
    words = [_words(draft) for draft in drafts]
    for draft, made, blocks in zip(drafts, words, (one, other), strict=True):
        assert len(made) == draft.prompt_tokens == max(1, round((512 * (len(blocks) - 1) + last) * block_tokens / 512))
    shared_words = len(_common(words))
    shared_blocks = len(_common([one, other]))
    expected = min(shared_blocks * block_tokens, *map(len, words))
    # Different blocks may still begin with one or two equal words: 432 to choose from.
    assert expected <= shared_words <= expected + 3


def test_a_capped_mooncake_prompt_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    (draft,) = _mooncake(tmp_path, [_request([5, 6, 7], 1300)])
    whole = draft.write(1300)
    for tokens in (1, 512, 700, 1024, 1299):
        cut = draft.write(tokens)
        assert len(cut.split()) == tokens
        assert whole.startswith(cut)


def test_mooncake_times_are_seconds_and_a_salt_changes_every_block(tmp_path: Path) -> None:
    drafts = _mooncake(tmp_path, [_request([1], 20), _request([1], 20, 3500)])
    assert [draft.at_s for draft in drafts] == [0.0, 3.5]
    salted = next(MooncakeWorkload(kind="mooncake").drafts(Setting(seed="s", salt="2", data=tmp_path)))
    other_stream = next(MooncakeWorkload(kind="mooncake").drafts(Setting(seed="t", data=tmp_path)))
    assert _words(salted) != _words(drafts[0])
    assert _words(other_stream) == _words(drafts[0])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"timestamp": 0}, "not a line of this trace: KeyError"),
        (_request([1], 513), "1 hash_ids for 513 tokens; 2 needed"),
        (_request([1], 10, -5), "earlier than the line before it"),
        ([], "not a line of this trace: TypeError"),
    ],
)
def test_a_wrong_mooncake_line_is_named(tmp_path: Path, line: Any, problem: str) -> None:
    with pytest.raises(LoadtestError, match=f"conversation.jsonl:2: {problem}"):
        _mooncake(tmp_path, [_request([1], 10), line])


def _questions(folder: Path, count: int) -> Setting:
    lines = [{"turns": [f"question {n}?", f"and then {n}?"]} for n in range(count)]
    (folder / "mt_bench_question.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Setting(seed="s", data=folder)


def test_questions_are_asked_once_a_round_in_changing_order(tmp_path: Path) -> None:
    setting = _questions(tmp_path, 20)
    drafts = list(islice(MtBenchWorkload(kind="mt_bench", output_tokens=5).drafts(setting), 40))
    asked = [draft.write(draft.prompt_tokens) for draft in drafts]
    assert set(asked[:20]) == set(asked[20:])
    assert len(set(asked[:20])) == 20
    assert asked[:20] != asked[20:]
    assert {draft.session for draft in drafts} == {None}


def test_a_second_turn_follows_later_in_its_session_and_holds_the_first(tmp_path: Path) -> None:
    workload = MtBenchWorkload(kind="mt_bench", output_tokens=5, turns=2)
    drafts = list(islice(workload.drafts(_questions(tmp_path, 20)), 60))
    first_at: dict[str | None, int] = {}
    gaps = []
    for place, draft in enumerate(drafts):
        if draft.session not in first_at:
            first_at[draft.session] = place
            continue
        opening = drafts[first_at[draft.session]]
        assert draft.write(draft.prompt_tokens).startswith(opening.write(opening.prompt_tokens))
        gaps.append(place - first_at[draft.session])
    assert len(gaps) == 28
    assert min(gaps) >= 5
    assert max(gaps) < 10


def test_a_line_that_is_no_question_is_named(tmp_path: Path) -> None:
    setting = _questions(tmp_path, 1)
    with (tmp_path / "mt_bench_question.jsonl").open("a") as file:
        file.write('\n{"turns": ["only one"]}')
    with pytest.raises(LoadtestError, match=r"question\.jsonl:2: not a question with two turns"):
        next(MtBenchWorkload(kind="mt_bench", output_tokens=5).drafts(setting))


def _own(folder: Path, *lines: str, **setting: Any) -> list[Draft]:
    (folder / "own.jsonl").write_text("\n".join(lines))
    workload = JsonlWorkload(kind="jsonl", path="own.jsonl")
    return list(workload.drafts(Setting(seed="s", base=folder, **setting)))


def test_own_requests_are_taken_as_they_stand(tmp_path: Path) -> None:
    full = {"prompt": "Hello, Brest!", "output_tokens": 3, "at_s": 2, "tenant": "a", "session": "x", "model": "m"}
    one, two = _own(tmp_path, '{"prompt": "é", "output_tokens": 1}', "", json.dumps(full), tenants=frozenset("a"))
    assert (one.at_s, one.write(one.prompt_tokens), one.tenant, one.session, one.model) == (None, "é", None, None, None)
    assert (two.at_s, two.tenant, two.session, two.model, two.output_tokens) == (2.0, "a", "x", "m", 3)
    assert two.write(two.prompt_tokens) == "Hello, Brest!"
    assert two.write(2) == "Hello,"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a"}', "output_tokens: Field required"),
        ('{"prompt": "", "output_tokens": 1}', "prompt: String should have at least 1"),
        ('{"prompt": "a", "output_tokens": true}', "output_tokens: Input should be a valid integer"),
        ('{"prompt": "a", "output_tokens": 1.5}', "output_tokens: Input should be a valid integer"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens: Input should be greater than or equal to 1"),
        ('{"prompt": "a", "output_tokens": 1, "at_s": NaN}', "at_s: Input should be a finite number"),
        ('{"prompt": "a", "output_tokens": 1, "at_s": 0.5}', "at_s: 0.5 is earlier than 1.0 before it"),
        ('{"prompt": "a", "output_tokens": 1}', "at_s: missing; every line needs one"),
        ('{"prompt": "a", "output_tokens": 1, "at_s": 2, "tenant": "b"}', "tenant: 'b' has no key.*allowed: a"),
        ('{"prompt": "a", "output_tokens": 1, "tokens": 1}', "tokens: unknown field; allowed: prompt, output_tokens"),
        ('{"prompt": "a", ', "Invalid JSON"),
        ("7", "Input should be an object"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(tmp_path: Path, line: str, problem: str) -> None:
    right = '{"prompt": "a", "output_tokens": 1, "at_s": 1}'
    with pytest.raises(LoadtestError, match=f"own.jsonl:2: {problem}"):
        _own(tmp_path, right, line, tenants=frozenset("a"), needs_times=True)


def test_own_requests_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadtestError, match=r"nothing\.jsonl: cannot be read: No such file"):
        next(JsonlWorkload(kind="jsonl", path="nothing.jsonl").drafts(Setting(seed="s", base=tmp_path)))


def test_synthetic_prompts_share_their_prefix_and_nothing_else() -> None:
    workload = SyntheticWorkload(
        kind="synthetic",
        prefixes=3,
        prefix_tokens=40,
        tail_tokens={"kind": "uniform", "low": 10, "high": 20},
        output_tokens=4,
    )
    drafts = list(islice(workload.drafts(Setting(seed="s")), 60))
    prompts = [_words(draft) for draft in drafts]
    assert all(
        50 <= len(words) <= 60 and len(words) == d.prompt_tokens for words, d in zip(prompts, drafts, strict=True)
    )
    assert len({tuple(words[:40]) for words in prompts}) == 3
    assert len({tuple(words[40:46]) for words in prompts}) == 60
    assert drafts[0].write(30).split() == prompts[0][:30]
    again = list(islice(workload.drafts(Setting(seed="s")), 60))
    assert [_words(draft) for draft in again] == prompts


def test_skew_asks_for_the_first_prefixes_most() -> None:
    workload = SyntheticWorkload(
        kind="synthetic", prefixes=4, prefix_tokens=5, skew=1.0, tail_tokens=1, output_tokens=1
    )
    asked = Counter(draft.write(5) for draft in islice(workload.drafts(Setting(seed="s")), 5000))
    shares = [count / 5000 for _, count in asked.most_common()]
    # 1, 1/2, 1/3, 1/4 of their sum.
    assert shares == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.025)


_SHARED = data_folder()


@pytest.mark.skipif(not _SHARED.is_dir(), reason=f"no data sets in {_SHARED}")
@pytest.mark.parametrize("kind", ["azure", "mooncake"])
def test_the_published_traces_are_read_to_their_end(kind: str) -> None:
    workload = AzureWorkload(kind="azure") if kind == "azure" else MooncakeWorkload(kind="mooncake")
    count, prompt_tokens, last_s = 0, 0, 0.0
    for draft in workload.drafts(Setting(seed="s")):
        count, prompt_tokens, last_s = count + 1, prompt_tokens + draft.prompt_tokens, draft.at_s or 0.0
    expected = {"azure": (19_366, 1154.7, 3501.7), "mooncake": (12_031, 12_035.1, 3537.0)}[kind]
    assert (count, round(prompt_tokens / count, 1), round(last_s, 1)) == expected
