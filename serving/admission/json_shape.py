"""How deep and how wide a JSON text is, before anything parses it.

A parser spends memory and stack on nesting and on element counts; both are found here at memory speed, in
blocks, and a text over a bound is left at the block that breaks it. Of valid JSON the counts are exact. Of
a text that is no JSON they may be wrong past its first error, where no parser goes.
"""

from __future__ import annotations

from serving.errors import BadRequest

_BLOCK_BYTES = 64 * 1024
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# Set in "[" and "{", not in "]" and "}".
_OPENING = 0x02


def check(text: bytes, max_depth: int, max_values: int, param: str | None = None) -> None:
    """Raise BadRequest where lists and objects nest deeper than `max_depth`, or where there are more than
    `max_values` commas or containers, or twice as many strings."""
    depth = commas = brackets = quotes = 0
    inside = 0  # 1 while a string is open at the block's start
    start, end = 0, 0
    while start < len(text):
        end = min(start + _BLOCK_BYTES, len(text))
        block = text[start:end]
        if b"\\" in block:
            # An escape must not be cut in two: a block ends after an even run of backslashes.
            if end < len(text) and (len(block) - len(block.rstrip(b"\\"))) % 2:
                end -= 1
                block = block[:-1]
            # A run of backslashes pairs from its left, so what is left of one escapes a quote or another
            # character.
            block = block.replace(b"\\\\", b"").replace(b'\\"', b"")
        start = end
        pieces = block.split(b'"')
        outside = b"".join(pieces[inside::2])
        inside ^= (len(pieces) - 1) & 1

        structure = outside.translate(None, _NOT_BRACKETS)
        commas += outside.count(b",")
        brackets += len(structure)
        quotes += len(pieces) - 1
        # The first test alone decides for a block of brackets, before they are walked one by one.
        if structure.count(b"[") + structure.count(b"{") > max_depth or depth:
            depth = _walk(structure, depth, max_depth, param)
        else:
            depth += 2 * (structure.count(b"[") + structure.count(b"{")) - len(structure)
        if max(commas, brackets // 2, quotes // 4) > max_values:
            raise BadRequest(
                f"{_subject(param)} holds more than {max_values} values; send less in one request.",
                code="request_too_complex",
                param=param,
            )


def _walk(structure: bytes, depth: int, max_depth: int, param: str | None) -> int:
    for bracket in structure:
        depth += 1 if bracket & _OPENING else -1
        if depth > max_depth:
            raise BadRequest(
                f"{_subject(param)} nests lists and objects deeper than {max_depth} levels.",
                code="json_too_deep",
                param=param,
            )
    return depth


def _subject(param: str | None) -> str:
    return "The request body" if param is None else f"'{param}'"
