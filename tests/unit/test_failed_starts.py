"""Counts of failed starts in Ray's store: what is read, and that a store that is away is told of once."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from serving.cluster import failed_starts


class Nothing:
    """A thread that does nothing."""

    def __init__(self, **_: object) -> None: ...

    def start(self) -> None: ...


def test_a_store_that_is_away_is_told_of_once_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    away = True

    def keys(prefix: str, namespace: str) -> list[bytes]:
        if away:
            raise ConnectionError("away")
        return [f"{prefix}chat".encode()]

    monkeypatch.setattr(threading, "Thread", Nothing)
    monkeypatch.setattr(failed_starts, "_internal_kv_list", keys)
    monkeypatch.setattr(failed_starts, "_internal_kv_get", lambda key, namespace: b"3")
    starts = failed_starts.FailedStarts()
    with capture_logs() as logs:
        starts.look()
        starts.look()
        assert [entry["event"] for entry in logs] == ["failed starts cannot be read"]
        assert starts("chat") == 0
        away = False
        starts.look()
        assert starts("chat") == 3
        away = True
        starts.look()
        # What was known stays.
        assert starts("chat") == 3
        assert len(logs) == 2
