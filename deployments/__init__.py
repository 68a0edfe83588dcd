"""Ray Serve applications: thin wrappers that Serve imports on every node."""
