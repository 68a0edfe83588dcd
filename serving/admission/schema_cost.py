"""What a schema, a pattern or a grammar costs the engine before it writes a token, estimated from its text.

The engine turns each into an automaton and finds, for every state, which tokens of the vocabulary may follow. That is
nearly all of the cost: a state in which any character may follow (a string with a length, `.`, `[^a]`) takes about
10 ms of one core with a vocabulary of 50,000, a state of a narrow class (`[a-z]`) an eighth of it, a literal nothing.
So the unit is a wide state. Weights are measured on xgrammar 0.2 (`python -m tests.benches.schemas`):

- a length or a counted repetition makes a state a count; the engine folds what is beyond some 200 of them;
- equal strings of one schema are compiled once;
- optional properties can be left out in any order of what is left: their cost grows with their square; where further
  properties are allowed, each of them is a wide state;
- in a row of parts that may be left out each is reached from all before it: its cost grows with its square;
- alternatives, properties, items and references are cheap each.

Where the two can differ the estimate is the higher one. Pure; linear in the text.
"""

from __future__ import annotations

import re
from typing import Any, Final

WIDE: Final = 1.0
NARROW: Final = 1 / 8
LITERAL: Final = 1 / 128
# What a quantifier adds to what it repeats.
LOOP: Final = 1 / 64
# Rules' names in a row beyond which each is taken for one that may be empty.
SHORT_RUN: Final = 4
# A longer length or repetition costs no more.
MOST_COUNTED: Final = 256
PROPERTY: Final = 1 / 32
OPTIONAL_SQUARED: Final = 1 / 2400
ALTERNATIVE: Final = 1 / 64
COUNTED_ITEMS: Final = 1 / 4
FORMAT: Final = 1.0
# A string that was counted already, or an object or list of any kind.
AGAIN: Final = 1 / 64
# Of a schema's text: its names and constants.
BYTE: Final = 1 / 1024

_COUNT: Final = re.compile(r"\{\s*(\d{1,9})?\s*(,)?\s*(\d{1,9})?\s*\}|\s*~\s*(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_ORDINARY_RANGE: Final = re.compile(r"a-z|A-Z|0-9|[a-f]-[a-f]|[A-F]-[A-F]|[0-9]-[0-9]")
# In a class: a space, with which a third of all tokens begin, a range of other characters, an escape for many.
_WIDE_IN_CLASS: Final = re.compile(r"\s|\\[WSDpPuxs]|.-.", re.DOTALL)
_ALTERNATIVES = ("anyOf", "oneOf", "allOf", "enum", "prefixItems")
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
_OPEN_ENDED = ("additionalProperties", "unevaluatedProperties", "patternProperties")


class SchemaCost:
    """Adds up what one request has the engine compile, in wide states."""

    __slots__ = ("_seen", "_states")

    def __init__(self) -> None:
        self._states = 0.0
        self._seen: set[tuple[Any, ...]] = set()

    @property
    def states(self) -> int:
        """So far, rounded up."""
        return -int(-self._states // 1)

    def schema(self, value: Any, size_bytes: int = 0) -> None:
        """Add a JSON schema, or any JSON in which schemas stand (a response format, a structural tag, a tool)."""
        self._states += size_bytes * BYTE
        waiting = [value]
        while waiting:
            found = waiting.pop()
            if isinstance(found, dict):
                self._states += AGAIN
                self._object(found)
                waiting.extend(v for v in found.values() if isinstance(v, dict | list))
            elif isinstance(found, list):
                waiting.extend(v for v in found if isinstance(v, dict | list))

    def pattern(self, text: str) -> None:
        """Add a regular expression."""
        self._once(("pattern", text), lambda: _text_states(text, grammar=False))

    def grammar(self, text: str) -> None:
        """Add a grammar: EBNF as xgrammar takes it, or Lark's."""
        self._once(("grammar", text), lambda: _text_states(text, grammar=True))

    def choices(self, texts: list[str]) -> None:
        """Add a list of answers, of which one is to be given."""
        self._states += sum(ALTERNATIVE + len(text) * LITERAL for text in texts)

    def _object(self, node: dict[str, Any]) -> None:
        given = node.get("minLength"), node.get("maxLength")
        if longest := max(map(_number, given)):
            self._once(("length", *map(str, given)), lambda: WIDE * min(longest, MOST_COUNTED))
        for name in ("pattern", "regex"):
            if isinstance(text := node.get(name), str):
                self.pattern(text)
        if isinstance(text := node.get("grammar"), str):
            self.grammar(text)
        if isinstance(node.get("format"), str):
            self._once(("format", node["format"]), lambda: FORMAT)
        if isinstance(patterns := node.get("patternProperties"), dict):
            for text in patterns:
                self.pattern(text)
        if isinstance(properties := node.get("properties"), dict):
            self._properties(node, properties)
        self._states += sum(COUNTED_ITEMS for name in _COUNTS if _number(node.get(name)))
        self._states += sum(
            len(alternatives) * ALTERNATIVE
            for name in _ALTERNATIVES
            if isinstance(alternatives := node.get(name), list)
        )

    def _properties(self, node: dict[str, Any], properties: dict[str, Any]) -> None:
        required = node.get("required")
        named = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        optional = len(properties.keys() - named)
        self._states += len(properties) * PROPERTY + optional * optional * OPTIONAL_SQUARED
        if any(node.get(name) not in (None, False) for name in _OPEN_ENDED):
            self._states += len(properties) * WIDE

    def _once(self, key: tuple[Any, ...], states: Any) -> None:
        if key in self._seen:
            self._states += AGAIN
        else:
            self._seen.add(key)
            self._states += states()


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(min(max(value, 0), MOST_COUNTED * MOST_COUNTED))


class _Frame:
    """A group under way: what it costs, and whether what was read of it may be left out."""

    __slots__ = ("alternatives_nullable", "atom", "cost", "named", "nullable", "run", "skips")

    def __init__(self) -> None:
        self.cost = 0.0
        # The atom that a quantifier would follow: its cost; whether it may be left out; whether it is a rule's name.
        self.atom = 0.0
        self.skips = False
        self.named = False
        # Atoms in a row that may be left out: from each of their states all that follow can be reached.
        self.run = 0
        self.nullable = True
        self.alternatives_nullable = False

    def begin(self, cost: float, *, skips: bool = False, named: bool = False) -> None:
        self.end()
        self.atom, self.skips, self.named = cost, skips, named

    def repeat(self, times: int, *, skips: bool) -> None:
        # A rule's name may stand for anything.
        once = max(self.atom, WIDE) if self.named and times > 1 else self.atom
        self.atom, self.skips, self.named = once * times + LOOP, self.skips or skips, False

    def end(self) -> None:
        if not self.atom:
            return
        long_names = self.named and self.run >= SHORT_RUN
        if self.skips or self.named:
            self.run += 1
            self.cost += self.run * max(self.atom, WIDE) if self.skips or long_names else self.atom
            self.nullable &= self.skips
        else:
            self.run = 0
            self.cost += self.atom
            self.nullable = False
        self.atom, self.skips, self.named = 0.0, False, False

    def alternative(self) -> None:
        self.end()
        self.alternatives_nullable |= self.nullable
        self.run, self.nullable = 0, True

    def closed(self) -> tuple[float, bool]:
        self.end()
        return self.cost, self.nullable or self.alternatives_nullable


def _text_states(text: str, *, grammar: bool) -> float:
    """States of a regular expression or a grammar: what stands beside each other adds up, what repeats multiplies."""
    frames = [_Frame()]
    at = 0
    while at < len(text):
        character, frame, end = text[at], frames[-1], at + 1
        if character in "{~" and (count := _COUNT.match(text, at)):
            times = [int(number) for number in count.group(1, 3, 4, 5) if number]
            frame.repeat(min(max(times, default=1), MOST_COUNTED), skips=min(times, default=0) == 0 or not count[1])
            end = count.end()
        elif character == "(":
            frames.append(_Frame())
        elif character == ")" and len(frames) > 1:
            cost, skips = frames.pop().closed()
            frames[-1].begin(cost, skips=skips)
        elif character == "|" or (grammar and text.startswith("::=", at)):
            frame.alternative()
        elif character in "?*+":
            frame.repeat(1, skips=character != "+")
        elif not (grammar and character.isspace()):
            end, cost, named = _atom(text, at, grammar=grammar)
            frame.begin(cost, named=named)
        at = end
    return sum(frame.closed()[0] for frame in frames)


def _atom(text: str, at: int, *, grammar: bool) -> tuple[int, float, bool]:
    """The end of what stands here, its cost, and whether it is a rule's name."""
    character = text[at]
    if character == "\\":
        letter = text[at + 1 : at + 2]
        wide, narrow = letter in "WSDpP", letter in "wds"
        return at + 2, WIDE if letter and wide else NARROW if letter and narrow else LITERAL, False
    if character == "[":
        return *_class(text, at), False
    if character == ".":
        return at + 1, WIDE, False
    if grammar and character in "\"'":
        end = _quoted(text, at)
        return end, max(1, end - at - 2) * LITERAL, False
    if grammar and (name := _NAME.match(text, at)):
        return name.end(), NARROW, True
    return at + 1, LITERAL, False


def _class(text: str, at: int) -> tuple[int, float]:
    """The end of a character class and its weight."""
    start = at + 1
    negated = text[start : start + 1] == "^"
    end = start + negated
    if text[end : end + 1] == "]":
        end += 1
    while end < len(text) and text[end] != "]":
        end += 2 if text[end] == "\\" else 1
    inside = _ORDINARY_RANGE.sub("", text[start:end])
    return end + 1, WIDE if negated or _WIDE_IN_CLASS.search(inside) else NARROW


def _quoted(text: str, at: int) -> int:
    """The end of a string of a grammar."""
    end = at + 1
    while end < len(text) and text[end] != text[at]:
        end += 2 if text[end] == "\\" else 1
    return end + 1
