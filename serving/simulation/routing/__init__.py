"""Routing policies on recorded prompts: replicas with caches in virtual time, chosen among by the live code."""
