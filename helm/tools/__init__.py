"""What generates and unpacks around the chart; no part of what is installed on a cluster."""
