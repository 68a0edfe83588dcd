"""Programs that run in a peer's environment, not in ours: nothing of them is imported here."""
