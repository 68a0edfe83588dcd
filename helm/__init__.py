"""Installing on Kubernetes: the chart (`galerne/`), and the code that generates its dashboards."""
