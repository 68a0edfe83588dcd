"""Which replica answers: the live replica set and the policies that choose from it."""
