"""Filler: the same everywhere, of the wanted length, cut only at its end."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from loadtest.workloads.lengths import Lengths
from loadtest.workloads.text import filler, prose_cut, prose_tokens, tokens_per_word, words_of


@given(st.integers(0, 600), st.integers(0, 600), st.text(max_size=20))
def test_a_shorter_filler_is_the_beginning_of_a_longer_one(one: int, other: int, seed: str) -> None:
    short, long = (filler(tokens, seed=seed).split() for tokens in sorted((one, other)))
    assert long[: len(short)] == short
    assert len(short) == min(one, other)


def test_another_process_writes_the_same() -> None:
    # String hashes differ from process to process; the text must not hang on them.
    code = "from loadtest.workloads.text import filler; print(filler(30, seed='a'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    ).stdout
    assert other.strip() == filler(30, seed="a")
    assert filler(30, seed="a") != filler(30, seed="b")


def test_words_are_plain_and_many() -> None:
    words = filler(20_000, seed="all").split(" ")
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert 400 <= len(set(words)) <= 500


def test_a_count_of_tokens_calibrates() -> None:
    # A tokenizer that makes 130 tokens of 100 words, and 30 of the template around them.
    rate = tokens_per_word(160, 100, template_tokens=30)
    assert rate == 1.3
    assert len(filler(1300, seed="x", tokens_per_word=rate).split()) == 1000
    assert words_of(1, 5.0) == 1
    assert words_of(0, 5.0) == 0
    for counted, words in ((30, 10), (40, 0)):
        with pytest.raises(ValueError, match="the template's"):
            tokens_per_word(counted, words, template_tokens=30)
    with pytest.raises(ValueError, match="0 or more"):
        filler(-1, seed="x")


@given(st.text(min_size=1), st.integers(1, 40))
def test_prose_is_cut_at_its_end_and_within_the_bound(text: str, tokens: int) -> None:
    cut = prose_cut(text, tokens)
    assert text.startswith(cut)
    assert cut
    assert prose_tokens(cut) <= tokens
    assert cut == text or prose_tokens(text) > tokens


def test_prose_is_cut_between_words() -> None:
    assert prose_cut("four words are here", 3) == "four words"
    assert prose_cut("unbreakable", 1) == "unbr"


@pytest.mark.parametrize(
    ("given_as", "low", "high", "mean"),
    [
        (7, 7, 7, 7.0),
        ({"kind": "uniform", "low": 3, "high": 5}, 3, 5, 4.0),
        # The mean of a lognormal: median * exp(sigma² / 2), sigma = ln(4) / 1.645.
        ({"kind": "lognormal", "median": 100, "p95": 400}, 1, 20_000, 142.6),
    ],
)
def test_lengths_are_drawn_as_said(given_as: object, low: int, high: int, mean: float) -> None:
    lengths, rng = TypeAdapter(Lengths).validate_python(given_as), random.Random(6)
    drawn = sorted(lengths.draw(rng) for _ in range(20_000))
    assert low <= drawn[0] <= drawn[-1] <= high
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.03)
    if lengths.kind == "lognormal":
        assert drawn[10_000] == pytest.approx(100, rel=0.03)
        assert drawn[19_000] == pytest.approx(400, rel=0.05)


@pytest.mark.parametrize(
    "given_as",
    [0, 1.5, True, "7", {"kind": "uniform", "low": 5, "high": 3}, {"kind": "lognormal", "median": 9, "p95": 8}],
)
def test_lengths_that_are_none_are_refused(given_as: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Lengths).validate_python(given_as)
