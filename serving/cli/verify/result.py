"""What was verified, as one line that can be kept and held to account.

The line is one JSON object on one line, `{"galerne_verify": RESULT, "hmac_sha256": HEX}`. HEX is the HMAC-SHA256,
under the key with which the cluster was asked, of `galerne verify 1`, a line feed, and RESULT as JSON with sorted
keys, no spaces and every character beyond ASCII escaped. Whoever has the key can check that a line found in a log was
made by somebody who had it too and that nothing in it was changed. It does not show when: `at` is what the clock of
the machine said.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal

from serving.errors import GalerneError

Verdict = Literal["passed", "failed", "skipped"]
PASSED: Verdict = "passed"
FAILED: Verdict = "failed"
SKIPPED: Verdict = "skipped"

# The message begins with what it is, so that no other use of a key as an HMAC key can be passed off as a result.
CONTEXT = b"galerne verify 1\n"
RESULT_FIELD = "galerne_verify"
SIGNATURE_FIELD = "hmac_sha256"


class BadLine(GalerneError):
    """A result line that is not one, or that this key did not sign."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried, and what came of it."""

    name: str
    verdict: Verdict
    detail: str
    seconds: float


def outcome(checks: Iterable[Check]) -> Verdict:
    """Passed where something passed and nothing failed: a run that skipped everything has shown nothing."""
    verdicts = {check.verdict for check in checks}
    return PASSED if PASSED in verdicts and FAILED not in verdicts else FAILED


def signed_line(checks: Iterable[Check], *, url: str, version: str, at: datetime, key: str) -> str:
    """The result line of these checks."""
    checks = tuple(checks)
    result = {
        "url": url,
        "at": at.isoformat(timespec="seconds"),
        "version": version,
        "outcome": outcome(checks),
        "checks": [asdict(check) | {"seconds": round(check.seconds, 3)} for check in checks],
    }
    return _compact({RESULT_FIELD: result, SIGNATURE_FIELD: _signature(result, key)})


def checked(line: str, key: str) -> dict[str, Any]:
    """The result in a line; raises BadLine where the line is no result line or not signed under this key."""
    # Logs put times and names in front.
    start = line.find(f'{{"{RESULT_FIELD}"')
    try:
        document = json.loads(line[start:].strip()) if start >= 0 else None
    except ValueError:
        document = None
    if not isinstance(document, dict) or set(document) != {RESULT_FIELD, SIGNATURE_FIELD}:
        raise BadLine("this is no result line: it must be the last line that `galerne verify` printed, whole")
    result, signature = document[RESULT_FIELD], document[SIGNATURE_FIELD]
    if not isinstance(result, dict) or not isinstance(signature, str):
        raise BadLine("this is no result line: its fields are of another kind")
    if not hmac.compare_digest(signature.encode(errors="replace"), _signature(result, key).encode()):
        raise BadLine("the signature does not match: the line was changed, or made under another key")
    return result


def _signature(result: dict[str, Any], key: str) -> str:
    return hmac.new(key.encode(), CONTEXT + _compact(result).encode(), sha256).hexdigest()


def _compact(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
