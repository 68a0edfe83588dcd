"""Takes secrets out of what leaves a cluster: documents by their structure, text by its form, and both by value.

What is certain is cut by structure: a Secret's data, the value of an environment variable that is not known to be
harmless, annotations that repeat whole objects. What was cut there is then cut wherever else it stands, logs included.
Text is searched for what secrets look like. The rest is a matter of form, and errs on the side of cutting.
"""

from __future__ import annotations

import base64
import contextlib
import re
from typing import Any, Final

MASK: Final = "«masked»"
# Values that short stand everywhere; cutting them out of logs would only make these unreadable.
SHORTEST_KNOWN: Final = 8
# Variables that are ours or Ray's and say nothing, unless their name speaks of a secret.
_HARMLESS: Final = re.compile(
    r"^(RAY_|VLLM_|NCCL_|OMP_|CUDA_VISIBLE|HF_HUB_|TRANSFORMERS_OFFLINE$|DO_NOT_TRACK$|PYTHON|GALERNE_RELEASE$)"
)
_SECRETIVE: Final = re.compile(
    r"(?i)(token|secret|passw|passphrase|api[-_.]?key|access[-_.]?key|account[-_.]?key|private[-_.]?key|credential|"
    r"authoriz|auth[-_.]?header|sha256|salt|signature|client[-_.]?secret|conn(ection)?[-_.]?str|dsn|cookie|bearer)"
)
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
# A name that speaks of a secret, and its value: key=value, "key": "value", key: value, --key value.
_NAMED: Final = re.compile(
    r"(?i)([\"']?[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|api[-_.]?key|access[-_.]?key|account[-_.]?key|"
    r"private[-_.]?key|credentials?|sha256|salt|signature|cookie)[\w.-]*[\"']?\s*(?:[:=]|\s(?=[\"']?\S{8}))\s*)"
    r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&}\]]+)"
)
# Counts of tokens, switches, the begin of something that is looked at by itself.
_HARMLESS_VALUE: Final = re.compile(r"(?i)[-+]?[\d.]+%?|true|false|null|none|[{\[|>]-?")
_PATTERNS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), MASK),
    (re.compile(r"(?i)((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)[^\r\n\"']+"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b(bearer|basic|negotiate)\s+[A-Za-z0-9._~+/=-]{6,}"), rf"\1 {MASK}"),
    (re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s:@\"']*:[^/\s@\"']+@"), rf"\1{MASK}@"),
    (
        re.compile(r"(?i)([?&](?:sig|signature|token|key|code|password|x-amz-[a-z-]+|se|sp|sv)=)[^&\s\"']+"),
        rf"\1{MASK}",
    ),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*"), MASK),
    (re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{6,}"), MASK),
    (re.compile(r"\bhf_[A-Za-z0-9]{10,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{8,}"), MASK),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), MASK),
    # Digests of keys. Those of images, which people need, are marked as such.
    (re.compile(r"(?<!sha256:)\b[0-9a-fA-F]{64}\b"), MASK),
)


class Masker:
    """Masks, and remembers which values it cut by structure; `cut` counts replacements."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self.cut = 0

    def learn(self, document: Any) -> None:
        """Remember the values that `document` would cut by structure, so that text loses them too."""
        self._walk(document, ())

    def document(self, document: Any) -> Any:
        """A copy without secrets."""
        return self._strings(self._walk(document, ()))

    def text(self, text: str) -> str:
        """Text without what looks like a secret, and without values known to be one."""
        for value in sorted(self._known, key=len, reverse=True):
            if value in text:
                self.cut += text.count(value)
                text = text.replace(value, MASK)
        for pattern, replacement in _PATTERNS:
            text, number = pattern.subn(replacement, text)
            self.cut += number
        text, number = _NAMED.subn(_named, text)
        self.cut += number
        return text

    def _walk(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return self._arguments([self._walk(item, path) for item in value])
        if not isinstance(value, dict):
            return value
        if value.get("kind") == "Secret" or ("data" in value and value.get("type") == "Opaque"):
            value = {**value, **{key: self._all(value[key]) for key in ("data", "stringData") if value.get(key)}}
        if isinstance(value.get("value"), str) and isinstance(value.get("name"), str):
            if not _HARMLESS.match(value["name"]) or _SECRETIVE.search(value["name"]):
                value = {**value, "value": self._cut(value["value"])}
            return value
        found = {}
        for key, item in value.items():
            if key in {_LAST_APPLIED, "managedFields"}:
                continue  # the whole object once more; nobody needs it
            if isinstance(item, str) and _SECRETIVE.search(key) and not _is_name(key):
                found[key] = self._cut(item)
            else:
                found[key] = self._walk(item, (*path, key))
        return found

    def _arguments(self, items: list[Any]) -> list[Any]:
        """A command line in parts: what follows `--password` goes, and what it names with `=`."""
        found = list(items)
        for index, item in enumerate(items):
            if not isinstance(item, str) or not item.startswith("-") or not _SECRETIVE.search(item):
                continue
            name, equals, inline = item.partition("=")
            if equals:
                found[index] = f"{name}={self._cut(inline)}"
            elif index + 1 < len(items) and isinstance(items[index + 1], str):
                found[index + 1] = self._cut(items[index + 1])
        return found

    def _all(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return MASK
        for value in data.values():
            with contextlib.suppress(ValueError, TypeError):
                self._remember(base64.b64decode(value, validate=True).decode())
        return {key: self._cut(str(value)) for key, value in data.items()}

    def _strings(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._strings(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._strings(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def _cut(self, value: str) -> str:
        if not value:
            return value
        self._remember(value)
        self.cut += 1
        return MASK

    def _remember(self, value: str) -> None:
        stripped = value.strip()
        if len(stripped) >= SHORTEST_KNOWN and stripped != MASK:
            self._known.add(stripped)


def _is_name(key: str) -> bool:
    """Fields that name a secret and hold none: secretName, tokenPath, secretStoreRef, …"""
    return bool(re.search(r"(?i)(name|ref|path|kind|key|type|seconds|mode|policy|class)$", key)) and not re.search(
        r"(?i)(api|access|account|private)[-_.]?key$", key
    )


def _named(match: re.Match[str]) -> str:
    value = match[2]
    bare = value.strip("\"'")
    if not bare or MASK in value or _HARMLESS_VALUE.fullmatch(bare):
        return match[0]
    if match[1].lower().endswith("sha256:") and value == bare:
        return match[0]  # an image's digest; a key's stands apart from its name, or in quotes
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match[1]}{quote}{MASK}{quote}"
