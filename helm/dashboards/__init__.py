"""Grafana's dashboards as code: `python -m helm.dashboards` writes the chart's JSON files.

Nothing that serves imports this package, and the chart does not hold it. A panel is a frozen fact (`panels`), the
dashboards are lists of them (`overview`, `model`, `tenant`, `autoscaler`, `gateway`), and one module (`grafana`) knows
the SDK.
"""
