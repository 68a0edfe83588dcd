"""Objects of a kind as they change: list once, then watch, and go on where it broke off.

Promised: every state that still stands when a caller looks is seen, in order; none is reported twice; a break costs a
reconnect from the newest resource version seen (bookmarks count), and where the server has forgotten that version
(410) a new list, whose differences from what was known are reported as events. Silence is reported too, so that a
caller's own deadlines are kept. What cannot get better by itself (a refusal, a kind that is not there) is raised at
once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from serving.cluster.kubernetes.client import FIRST_PAUSE_S, LONGEST_PAUSE_S, Client
from serving.cluster.kubernetes.resources import Document, Resource, name_of, version_of
from serving.errors import ApiBusy, ApiGone, ApiUnreachable, KubernetesError

WINDOW_S: Final = 30
# The server ends a watch after its window; a connection that is silent for so much longer is dead.
GRACE_S: Final = 10.0
# Breaks in a row without one event in between, after which watching is given up.
MOST_BREAKS: Final = 8
_GONE: Final = 410

Kind = Literal["ADDED", "MODIFIED", "DELETED"]


@dataclass(frozen=True, slots=True)
class Event:
    """One change; `document` is the object after it (DELETED: its last state)."""

    kind: Kind
    document: Document


class Watch:
    """A resumable watch. `pause` sleeps before a reconnect; `window_s` is how long silence lasts before it is told."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        namespace: str | None,
        *,
        name: str | None = None,
        labels: str = "",
        window_s: int = WINDOW_S,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._resource = resource
        self._namespace = namespace
        self._fields = f"metadata.name={name}" if name else ""
        self._labels = labels
        self._window_s = window_s
        self._pause = pause
        self._known: dict[tuple[str, str], Document] = {}
        self._version = ""

    def events(self) -> Generator[Event | None]:
        """Events for ever; None: a window passed, nothing (more) happened in it. The caller closes it."""
        breaks = 0
        while True:
            try:
                if not self._version:
                    yield from self._relist()
                for event in self._window():
                    breaks = 0
                    yield event
            except ApiGone:
                self._version = ""
                continue
            except (ApiUnreachable, ApiBusy) as error:
                breaks = self._broken(breaks, error)
                continue
            except KubernetesError as error:
                if error.status < 500:  # noqa: PLR2004  # HTTP's server errors
                    raise
                breaks = self._broken(breaks, error)
                continue
            yield None

    def _broken(self, breaks: int, error: KubernetesError) -> int:
        if breaks + 1 >= MOST_BREAKS:
            raise error
        asked_s = error.retry_after_s if isinstance(error, ApiBusy) else None
        self._pause(min(FIRST_PAUSE_S * 2**breaks if asked_s is None else asked_s, LONGEST_PAUSE_S))
        return breaks + 1

    def _relist(self) -> Iterator[Event]:
        listing = self._client.list(self._resource, self._namespace, labels=self._labels, fields=self._fields)
        found = {_key(document): document for document in listing.items}
        known, self._known = self._known, found
        self._version = listing.resource_version
        for key, document in known.items():
            if key not in found or _uid(found[key]) != _uid(document):
                yield Event("DELETED", document)
        for key, document in found.items():
            before = known.get(key)
            if before is None or _uid(before) != _uid(document):
                yield Event("ADDED", document)
            elif version_of(before) != version_of(document):
                yield Event("MODIFIED", document)

    def _window(self) -> Iterator[Event]:
        query: dict[str, str | int] = {
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": self._window_s,
        }
        query |= {"labelSelector": self._labels} if self._labels else {}
        query |= {"fieldSelector": self._fields} if self._fields else {}
        for line in self._client.stream(self._resource, self._namespace, query, self._window_s + GRACE_S):
            kind, document = _parsed(line)
            if kind == "ERROR":
                raise _error(document)
            self._version = version_of(document) or self._version
            if kind == "DELETED":
                self._known.pop(_key(document), None)
                yield Event("DELETED", document)
            elif kind in {"ADDED", "MODIFIED"}:
                before = self._known.get(_key(document))
                self._known[_key(document)] = document
                if before is None or version_of(before) != version_of(document):
                    yield Event("ADDED" if before is None else "MODIFIED", document)


def _parsed(line: bytes) -> tuple[str, Document]:
    try:
        event = json.loads(line)
        kind, document = event["type"], event["object"]
    except (ValueError, KeyError, TypeError) as error:
        raise ApiUnreachable("the watch sent something else than an event") from error
    if not isinstance(kind, str) or not isinstance(document, dict):
        raise ApiUnreachable("the watch sent something else than an event")
    return kind, document


def _error(status: dict[str, Any]) -> KubernetesError:
    code = status.get("code")
    message = str(status.get("message") or "the watch ended with an error")
    if code == _GONE:
        return ApiGone(message, _GONE, str(status.get("reason") or ""))
    return ApiUnreachable(message, code if isinstance(code, int) else 0)


def _key(document: Document) -> tuple[str, str]:
    metadata = document.get("metadata") or {}
    return str(metadata.get("namespace") or ""), name_of(document)


def _uid(document: Document) -> str:
    return str((document.get("metadata") or {}).get("uid") or "")
