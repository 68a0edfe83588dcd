"""The run behind the pictures in docs/dashboards: its cluster, its load, and `python -m helm.dashboards.show`."""
