"""Prompts of a wanted length: plain English words drawn by a seed, the same on every machine and in every run.

Every word below is one token, in the middle of a text (with its space) and at its beginning, in the vocabulary
of SmolLM2 (byte-level BPE, 49k) and in BERT's (WordPiece, 30k). Counted with those two tokenizers, texts of 1 to
2000 words were exactly as many tokens: error 0. Larger BPE vocabularies hold such words as well; for any other,
have the engine's /tokenize count a filler once and give what `tokens_per_word` makes of the count.
The chat template comes on top of every prompt: 31 tokens for SmolLM2, which adds its own system message.
"""

from __future__ import annotations

import math
import random

DEFAULT_TOKENS_PER_WORD = 1.0

# English prose is 4.2 to 4.6 bytes a token in BPE vocabularies; the rounder, lower value counts a few too many,
# so that what is held to a bound stays within it. Code and other languages are denser: 2.5 to 3.5.
PROSE_BYTES_PER_TOKEN = 4.0

_WORDS = tuple(
    """
    a able above action activity add after again against age air all allow almost along already also always among
    and any area arm around art as ask at away back bad because before begin being below best better between big
    bird black blue boat book both bottom bread bridge brown build building business but buy by call can car care
    case center change city class clear close cloth cold college come community company consider continue control
    cost could create cut dark data day decision deep development difference different director doctor door down dry
    during each early easy education effect eight end energy enough even event ever every expect experience eye face
    fact fall far fast feel few field figure final find fine first fish five follow foot for forest form four free
    friend from front full game general get give glass go gold good great green ground grow half hand hard head
    health heavy help here high hold home horse hot hour house how human idea image important in include industry
    information interest iron issue job just keep kind know known land large last late law lead leader learn leave
    less let letter level life light line little live local long look lot love low main make many market matter may
    member might mind minute moment money month moon more most move movie much music must name nation near need
    never new news next night nine north not now number of offer office official often oil old on once one only open
    or order other others over own paper part past pay people perhaps person phone picture piece place plan player
    point position power practice price process product program project public question quick quiet rain rate rather
    reach read ready real reason record red relationship remember report research result right river road role room
    round run same say sea season see send sense service set seven short show side simple since sit site six slow
    small snow some son soon space special spring stage stand star start stay step still stone stop story street
    strong study such summer sun support system table take talk teacher team tell ten test than that the then there
    these thing think this those though three through time to today together top town train tree true try turn two
    under understand until up use usual value very view voice wait walk wall want warm watch water way week well
    west what when where which while white whole why wide wild will win wind window winter with without wood word
    work worker world would write year yet young
    """.split()  # noqa: SIM905  # a list literal would be a line a word
)


def filler(tokens: int, *, seed: str, tokens_per_word: float = DEFAULT_TOKENS_PER_WORD) -> str:
    """About `tokens` tokens of text (at least one word; none for 0 tokens); equal arguments give equal text.

    A shorter text of the same seed is the beginning of a longer one, as a cut prompt has to be.
    Raises ValueError for a count below 0.
    """
    count = words_of(tokens, tokens_per_word)
    return " ".join(random.Random(seed).choices(_WORDS, k=count))


def words_of(tokens: int, tokens_per_word: float = DEFAULT_TOKENS_PER_WORD) -> int:
    """How many words make about `tokens` tokens: at least 1, but 0 for 0 tokens. Raises ValueError below 0."""
    if tokens < 0:
        raise ValueError(f"a text of {tokens} tokens; it must be 0 or more")
    return max(1, round(tokens / tokens_per_word)) if tokens else 0


def tokens_per_word(counted_tokens: int, words: int, *, template_tokens: int = 0) -> float:
    """The calibration from one count: what a tokenizer made of a filler of `words` words.

    `template_tokens` is what it counts for an empty message, where it counts a whole chat.
    Raises ValueError when nothing is left to divide.
    """
    if words < 1 or counted_tokens <= template_tokens:
        raise ValueError(f"{counted_tokens} tokens for {words} words, {template_tokens} of them the template's")
    return (counted_tokens - template_tokens) / words


def prose_tokens(text: str) -> int:
    """An estimate for text that somebody wrote: a few percent high for English, up to 40 % low for dense text."""
    return math.ceil(len(text.encode()) / PROSE_BYTES_PER_TOKEN)


def prose_cut(text: str, tokens: int) -> str:
    """The beginning of the text within `tokens` tokens by `prose_tokens`, cut between words where there are any."""
    if prose_tokens(text) <= tokens:
        return text
    held = text.encode()[: int(tokens * PROSE_BYTES_PER_TOKEN)].decode(errors="ignore")
    words, space, _ = held.rpartition(" ")
    return words if space and words.strip() else held
