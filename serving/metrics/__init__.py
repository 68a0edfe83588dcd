"""Every metric Galerne itself exports, in one table."""
