"""The fake engine's tokens: four bytes each, so that counting, hashing and slicing are free.

A prompt is one `bytes` object of four bytes a token. Text is cut every four bytes of its UTF-8 and its
last token padded with NUL; control tokens (start, role headers, end of turn) begin with 0xff, a byte that
UTF-8 never holds, so no text can forge one. A token's id is its four bytes as a little-endian number.

Every word that the engine "generates" is one such token (three letters and a space). A finished answer
that comes back as the assistant's turn of the next prompt therefore has the very tokens that were
generated, and finds them in the prefix cache as it would in a real engine.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable
from statistics import NormalDist

TOKEN_BYTES = 4
MAX_TOKEN_ID = 2**32 - 1

BOS = b"\xffbos"
END_OF_TURN = b"\xffeot"

_PAD = b"\x00"
# Each three letters.
_VOCABULARY = """
sea fog ebb bay oar tar jib aft the and one two low dim far old new big sun sky day red ice elm oak fir ash
bee owl fox cat dog hen sow ram ewe cow oat rye hop tea pie jam fig nut egg cup jug pan pot mat rug bed box
bag net rod map pen ink key"""
_WORDS = tuple(f"{word} ".encode() for word in _VOCABULARY.split())


def encode_text(text: str) -> bytes:
    """The tokens of a text; empty for an empty one. Lone surrogates are replaced."""
    raw = text.encode("utf-8", "replace")
    return raw + _PAD * (-len(raw) % TOKEN_BYTES)


def encode_ids(ids: Iterable[int]) -> bytes:
    """The tokens of these ids, which may come from any tokenizer: what exceeds 32 bits is cut."""
    return b"".join((i & MAX_TOKEN_ID).to_bytes(TOKEN_BYTES, "little") for i in ids)


def role_header(role: str) -> bytes:
    """The control token that opens a turn of this role."""
    return b"\xff" + role.encode("utf-8", "replace")[:3].ljust(3, _PAD)


def count(tokens: bytes) -> int:
    """Number of tokens."""
    return len(tokens) // TOKEN_BYTES


def token_ids(tokens: bytes) -> list[int]:
    """Id of every token."""
    return [int.from_bytes(tokens[i : i + TOKEN_BYTES], "little") for i in range(0, len(tokens), TOKEN_BYTES)]


def decode(tokens: bytes) -> str:
    """The text of tokens; control tokens show as <|name|>, bytes that are not UTF-8 as U+FFFD."""
    parts: list[str] = []
    run = bytearray()
    for i in range(0, len(tokens), TOKEN_BYTES):
        token = tokens[i : i + TOKEN_BYTES]
        if token[0] == BOS[0] and (name := token[1:].rstrip(_PAD)).isalpha():
            parts += [run.decode("utf-8", "replace"), f"<|{name.decode('ascii')}|>"]
            run.clear()
        else:
            run += token.rstrip(_PAD)
    return "".join([*parts, run.decode("utf-8", "replace")])


def block_hashes(tokens: bytes, block_tokens: int, cache_salt: str | None) -> tuple[int, ...]:
    """Chained hash of every full block, each covering all tokens before it and the salt.

    Equal within one process only (it uses Python's own `hash`): that is where blocks are compared.
    """
    size = block_tokens * TOKEN_BYTES
    chain = hash(cache_salt)
    hashes = []
    for start in range(0, len(tokens) - size + 1, size):
        chain = hash((chain, tokens[start : start + size]))
        hashes.append(chain)
    return tuple(hashes)


def drawn_length(prompt: bytes, median_tokens: int, spread: float, *, seed: int, choice: int) -> int:
    """How long the answer to a prompt is, log-normal: the same for the same arguments, in every process."""
    digest = hashlib.shake_128(prompt, usedforsecurity=False)
    digest.update(f"{seed}/{choice}/length".encode())
    # Never 0 or 1, of which a normal distribution has no quantile.
    quantile = (int.from_bytes(digest.digest(4), "little") + 0.5) / 2**32
    return max(1, round(median_tokens * math.exp(spread * NormalDist().inv_cdf(quantile))))


def words(prompt: bytes, length_tokens: int, *, seed: int, choice: int) -> list[bytes]:
    """The answer to a prompt, one ASCII word a token: the same for the same arguments, in every process."""
    digest = hashlib.shake_128(prompt, usedforsecurity=False)
    digest.update(f"{seed}/{choice}".encode())
    return [_WORDS[byte % len(_WORDS)] for byte in digest.digest(length_tokens)]


def pieces(text: str) -> list[bytes]:
    """ASCII text cut into tokens; raises UnicodeEncodeError for other text."""
    raw = text.encode("ascii")
    return [raw[i : i + TOKEN_BYTES] for i in range(0, len(raw), TOKEN_BYTES)]


def json_escaped(piece: bytes) -> bytes:
    """An ASCII piece as it stands inside a JSON string."""
    return json.dumps(piece.decode("ascii"))[1:-1].encode("ascii")


def vector(tokens: bytes, dimensions: int, *, seed: int) -> array[float]:
    """A pseudo-random vector (not normalised) that is the same for the same tokens, in every process.

    A longer vector begins with the shorter one, as with models trained for several sizes.
    """
    digest = hashlib.shake_128(tokens, usedforsecurity=False)
    digest.update(str(seed).encode())
    raw = array("h", digest.digest(2 * dimensions))
    return array("d", (value / 32768 for value in raw))
