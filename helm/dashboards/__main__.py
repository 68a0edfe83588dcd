"""`python -m helm.dashboards`: write the chart's dashboards anew."""

from __future__ import annotations

from helm.dashboards.catalogue import DASHBOARDS
from helm.dashboards.documents import DIRECTORY
from helm.dashboards.grafana import files


def main() -> None:
    """Replace every file of the directory, and remove those that nothing generates."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    written = files(DASHBOARDS)
    for name, content in written.items():
        (DIRECTORY / name).write_text(content)
    for path in DIRECTORY.glob("*.json"):
        if path.name not in written:
            path.unlink()


if __name__ == "__main__":
    main()
