"""Measurements that decide no test: `make bench-…` runs them."""
