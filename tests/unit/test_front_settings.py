"""Every setting of HAProxy, uvicorn and Ray Serve has been chosen: docs/front.md has each, with its value and a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.front_settings import haproxy_settings, table

PAGE = Path(__file__).parents[2] / "docs" / "front.md"


def written(section: str) -> list[tuple[str, ...]]:
    """The cells of a section's table."""
    text = PAGE.read_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in row.strip("|").split(" | ")) for row in rows]


@pytest.mark.parametrize("section", ["HAProxy", "uvicorn", "Ray Serve"])
def test_no_setting_is_somebody_elses_choice(section: str) -> None:
    rows = written(section)
    assert all(row[-1] for row in rows), "a setting has no reason"
    found, wanted = {row[:-1] for row in rows}, set(table(section))
    assert found - wanted == set(), "these are no longer so: choose again, and write it into docs/front.md"
    assert wanted - found == set(), "nobody has chosen these: choose, and write them into docs/front.md"
    assert len(rows) == len(found)


def test_every_phase_of_a_connection_has_one_bound() -> None:
    settings = haproxy_settings()
    phases = "http-request http-keep-alive client client-fin connect queue server server-fin tunnel"
    assert {name for name in settings if name.startswith("timeout ")} == {f"timeout {p}" for p in phases.split()}
    # Of two lines the last would count, and of a backend's its own.
    assert all(len(settings[f"timeout {phase}"]) == 1 for phase in phases.split())
    # What would cut a stream by the clock.
    assert "hard-stop-after" not in settings
