"""The files that Prometheus reads: rules of every installation, scrapes of the cluster on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from serving.metrics import alerts, rules

# One that takes longer is late for the next decision.
SCRAPE_TIMEOUT_S: Final = 4
_WIDTH: Final = 120


def rule_file(release: str | None = None) -> str:
    """Recording rules and alerts, as YAML: of one release, or of all that a Prometheus watches, each by itself."""
    return _yaml({"groups": [*rules.groups(release), alerts.group(release)]})


def config_file(rules_path: Path, targets_path: Path) -> str:
    """Prometheus' configuration for the targets that `galerne serve` lists, as YAML."""
    return _yaml(
        {
            "global": {
                "scrape_interval": f"{rules.SCRAPE_S}s",
                "scrape_timeout": f"{SCRAPE_TIMEOUT_S}s",
                "evaluation_interval": f"{rules.SCRAPE_S}s",
            },
            "rule_files": [str(rules_path)],
            # Targets carry their own `job`, and engines `model` and `replica`.
            "scrape_configs": [
                {
                    "job_name": "galerne",
                    "file_sd_configs": [{"files": [str(targets_path)], "refresh_interval": f"{rules.SCRAPE_S}s"}],
                }
            ],
        }
    )


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=_WIDTH, allow_unicode=True)
