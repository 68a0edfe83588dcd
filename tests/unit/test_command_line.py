"""What holds for every command: its answer alone is on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from serving import cli
from serving.cli import overview, state


def test_what_is_logged_meanwhile_is_not_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Path) -> dict[str, Any]:
        structlog.get_logger("galerne.test").warning("something happened")
        return {"url": "http://127.0.0.1:8000"}

    monkeypatch.setattr(state, "read", read)
    monkeypatch.setattr(overview, "read", lambda _: overview.Overview((), (), {}))
    answer = CliRunner().invoke(cli.app, ["status", "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout) == {"url": "http://127.0.0.1:8000", "replicas": [], "models": [], "shed": {}}
    assert "something happened" in answer.stderr
