"""The command line of the load tester: `python -m loadtest run | report | sweep | compare | profile | scenarios`."""
