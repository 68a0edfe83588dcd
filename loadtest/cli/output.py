"""What every command writes: the page for people, and a summary for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.errors import LoadtestError
from loadtest.reports.html import page
from loadtest.reports.model import Figure, ReportRun, by_tenant_and_model
from loadtest.reports.verdict import judge

# Columns of a report that goes to a file or a log.
REPORT_WIDTH = 140


def report_files(runs: Sequence[ReportRun], folder: Path) -> Path:
    """Write report.html and summary.json into the folder; the page's path. Raises LoadtestError."""
    path = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(page(runs), encoding="utf-8")
        summary = json.dumps([summary_of(run) for run in runs], indent=2, ensure_ascii=False)
        (folder / "summary.json").write_text(summary + "\n", encoding="utf-8")
    except OSError as problem:
        raise LoadtestError(f"{folder}: cannot be written: {problem.strerror}") from problem
    return path


def summary_of(run: ReportRun) -> dict[str, Any]:
    """A run's verdict and figures, for programs: times in seconds, null for what does not exist."""
    verdict = judge(run)
    return {
        "name": run.name,
        "when": run.when.isoformat(),
        "simulated": run.simulated,
        "verdict": verdict.state.value,
        "reasons": list(verdict.reasons),
        "targets": [
            {
                "metric": line.target.metric,
                "limit": line.target.limit,
                "measured": _finite(line.measured),
                "met": line.met,
            }
            for line in verdict.lines
        ],
        "figures": [
            {"tenant": tenant or None, "model": model or None, **{key: _finite(value) for key, value in found.items()}}
            for tenant, model, found in by_tenant_and_model(run)
        ],
    }


def _finite(value: Figure) -> Figure:
    # JSON has no infinity: a target that was never reached has no value.
    return value if value is not None and math.isfinite(value) else None
