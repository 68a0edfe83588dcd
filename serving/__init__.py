"""Galerne: a self-hosted serving cluster for open-weight language models.

The packages tell a request's story in order: `api` receives and authenticates, `admission` bounds,
`routing` chooses a replica, `engine` computes, `metrics` measures.
"""

__version__ = "0.1.0"
