"""A prompt's chain of block hashes, from the text that the gateway has: it has no tokenizer.

A block's hash covers everything before it and who asked for which model, as the engine's do with the tenant's salt: two
prompts share hashes exactly as far as their bytes agree and one engine's cache would serve both. Appending messages to
a conversation keeps every whole block there was.

Blocks are coarser than an engine's (16 tokens), and grow: what routing must know is how much of a prompt a replica
holds, to some percent. With `BLOCKS_MOST` of them at most a prompt of any length costs a bounded time; what stands
beyond the last is counted and not compared. A token is taken for four bytes; a token id is four bytes here too.

Hashes are SHA-256's, begun with a key that a cluster's gateways share: they mean the same in each of them, and nobody
outside can make two prompts collide. A collision would cost a cache miss, nothing else.
"""

from __future__ import annotations

import hmac
from array import array
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import accumulate
from typing import Any, Final

import msgspec

from serving.metering.usage import BYTES_PER_TOKEN
from serving.routing.prefix_index import Prefix

# (so many blocks, of so many bytes): the first 4 KiB finely, where instructions end and questions begin.
STEPS: Final = ((16, 256), (60, 1024), (180, 4096))
BLOCKS_MOST: Final = sum(count for count, _ in STEPS)
_ENDS: Final = tuple(accumulate(size for count, size in STEPS for _ in range(count)))
# The same in tokens.
ENDS: Final = tuple(end // BYTES_PER_TOKEN for end in _ENDS)
# No UTF-8 holds these: text cannot forge where a message ends.
_MESSAGE, _CONTENT, _PART = b"\xff", b"\xfe", b"\xfd"
_MOST_ID: Final = 2**32 - 1
HASH_BYTES: Final = 8
# The engine token guards engines too; what it is used for here is told apart by this.
_PURPOSE: Final = b"galerne prefixes:"


def secret(engine_token: str) -> bytes:
    """The key of hashes; the same in every gateway of a cluster."""
    return hmac.new(engine_token.encode(), _PURPOSE, sha256).digest()


def fingerprint(prompt: bytes, *owner: str, key: bytes) -> Prefix:
    """The prefix of a prompt's bytes; `owner` (tenant, model) keeps equal prompts of different caches apart."""
    chain, start, hashes = hmac.digest(key, _owned(owner), "sha256"), 0, []
    size = len(prompt)
    for end in _ENDS:
        if end > size:
            break
        chain = sha256(chain + prompt[start:end]).digest()
        hashes.append(int.from_bytes(chain[:HASH_BYTES], "little"))
        start = end
    return Prefix(tuple(hashes), ENDS, max(1, size // BYTES_PER_TOKEN))


def _owned(owner: tuple[str, ...]) -> bytes:
    """No two owners, and no owner with a prompt's beginning, give the same."""
    names = [name.encode("utf-8", "surrogatepass") for name in owner]
    return b"".join(b"%d:%b" % (len(name), name) for name in names) + b"."


def of_length(prompt_bytes: int) -> Prefix:
    """A prompt of which only the length is known, or wanted."""
    return Prefix((), ENDS, max(1, prompt_bytes // BYTES_PER_TOKEN))


# -- the bytes of a prompt


class _Part(msgspec.Struct):
    text: str | None = None


_Content = str | list[str | _Part] | None


class _Message(msgspec.Struct):
    role: str | None = None
    content: _Content = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")
    # Of a responses request's items.
    output: _Content = None
    arguments: str | None = None


class _Body(msgspec.Struct):
    tools: msgspec.Raw = msgspec.Raw(b"")
    instructions: str | None = None
    messages: list[_Message] | None = None
    prompt: str | list[Any] | None = None
    input: str | list[_Message] | None = None


_decode: Final = msgspec.json.Decoder(_Body).decode


def prompt_bytes(body: bytes) -> bytes:
    """The prompt of a chat, completion or responses body, in the order in which templates write it; b"" of any other.

    The same for the same conversation however its JSON is spaced and escaped. Of several prompts in one completion
    request it is the first.
    """
    try:
        found = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return b""
    if found.messages is not None:
        return b"".join(_conversation(bytes(found.tools), None, found.messages))
    if found.prompt is not None:
        return _plain(found.prompt)
    if isinstance(found.input, str):
        return b"".join(_conversation(bytes(found.tools), found.instructions, ())) + found.input.encode()
    if found.input is not None:
        return b"".join(_conversation(bytes(found.tools), found.instructions, found.input))
    return b""


def _conversation(tools: bytes, instructions: str | None, messages: Iterable[_Message]) -> Iterator[bytes]:
    if tools:
        yield _MESSAGE + tools
    if instructions:
        yield _MESSAGE + instructions.encode()
    for message in messages:
        yield _MESSAGE + (message.role or "").encode() + _CONTENT
        yield _text(message.content)
        if message.reasoning_content:
            yield _PART + message.reasoning_content.encode()
        if message.tool_calls:
            yield _PART + bytes(message.tool_calls)
        if message.output or message.arguments:
            yield _PART + _text(message.output) + (message.arguments or "").encode()


def _text(content: _Content) -> bytes:
    if content is None:
        return b""
    if isinstance(content, str):
        return content.encode()
    return _PART.join((part if isinstance(part, str) else part.text or "").encode() for part in content)


def _plain(prompt: str | list[Any]) -> bytes:
    while isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt.encode()
    return array("I", (i & _MOST_ID for i in prompt if isinstance(i, int))).tobytes()
