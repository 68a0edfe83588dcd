"""The one error of the load-test tool."""

from __future__ import annotations


class LoadtestError(Exception):
    """A benchmark that cannot be run or must not be believed; the message says why and what to do."""
